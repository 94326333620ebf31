"""Mixed batches: each row has its own adapter, and the products with frozen matrices are computed once for all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from ..engine.backend import array_module
from ..nn.module import Module
from .adapters import Choice, Remembered, activate, check_known, factors_of, refuse_merged
from .layer import Factor, LoraLinear, RowFactors


class MixedBatch:
    """The adapter of each row of the batch, inside a `mixed_batch` block."""

    def __init__(self, model: Module, modules: Sequence[LoraLinear], names: Sequence[Choice]):
        self.model, self.modules = model, modules
        self.choose(names)

    def choose(self, names: Sequence[Choice]) -> None:
        """Choose again, for a batch of other rows. Raises ValueError for an unknown name."""
        of_rows = [factors_of(name) for name in names]
        check_known(self.model, {name for factors in of_rows for name in factors})
        self.names = list(names)
        if not self.modules:
            return
        like = self.modules[0].weight.data
        active: dict[str, Factor] = {}
        for name in {name for factors in of_rows for name in factors}:
            each = np.array([factors.get(name, 0.0) for factors in of_rows], dtype=like.dtype)  # (B)
            rows = np.flatnonzero(each)
            active[name] = RowFactors(*(array_module(like).asarray(x) for x in (each, rows, each[rows])))
        activate(self.model, active, self.modules)

    def keep(self, alive: Iterable[int]) -> None:
        """Keep only the rows with these numbers, as `KVCache.keep` does, when the other answers are finished."""
        self.choose([self.names[int(row)] for row in alive])


@contextmanager
def mixed_batch(model: Module, names: Sequence[Choice]) -> Iterator[MixedBatch]:
    """Inside this block, compute row i of every batch (B, ...) with `names[i]`: an adapter, a weighted combination such
    as {"legal": 0.5, "support": 0.5}, or None for the base alone.

    The products with frozen matrices, which are most of the work, run once over the whole batch; the low-rank products
    of each adapter run over its own rows. Inside the block `loss_and_grad` does not split batches. Afterwards the
    adapters are active and trainable as before, whatever the block chooses, adds or removes. When rows leave the
    batch, as finished answers do in generation, call `keep`:

        cache = model.new_cache(rows=3, capacity=64)
        with ml.mixed_batch(model, ["legal", None, "support"]) as rows:
            logits = model(tokens, cache)
            ...
            cache.keep(alive), rows.keep(alive)

    Raises ValueError for an unknown name or while an update is merged, TypeError for a single name or combination.
    """
    refuse_merged(model, "starting a mixed batch")
    if isinstance(names, str | Mapping | None):
        raise TypeError(f"expected a list with an adapter for each row, got {names!r} alone: put it in a list")
    before = Remembered(model)
    try:
        yield MixedBatch(model, before.modules, names)
    finally:
        before.restore()
