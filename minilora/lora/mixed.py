"""A mixed batch: each row is computed with an adapter of its own, and the frozen products once for all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ..engine.backend import array_module
from ..nn.module import Module
from .adapters import (
    Choice,
    activate,
    active_factors,
    check_known,
    factors_of,
    let_take_part,
    lora_modules,
    refuse_merged,
)
from .layer import Factor, RowFactors


class MixedBatch:
    """Which adapter each row of the batch is computed with, while `mixed_batch` lasts."""

    def __init__(self, model: Module, names: Sequence[Choice]):
        self.model, self.modules = model, list(lora_modules(model).values())
        self.choose(names)

    def choose(self, names: Sequence[Choice]) -> None:
        """Another choice, for a batch of other rows. Raises ValueError for a name that the model does not have."""
        mixes = [factors_of(name) for name in names]
        check_known(self.model, {name for mix in mixes for name in mix})
        self.names = list(names)
        if not self.modules:
            return
        like = self.modules[0].weight.data
        factors: dict[str, Factor] = {}
        for name in {name for mix in mixes for name in mix}:
            each = np.array([mix.get(name, 0.0) for mix in mixes], dtype=like.dtype)[:, None, None]  # (B, 1, 1)
            rows = np.flatnonzero(each)
            factors[name] = RowFactors(*(array_module(like).asarray(x) for x in (each, rows, each[rows])))
        let_take_part(self.model, self.modules, factors)

    def keep(self, alive: Iterable[int]) -> None:
        """Drop the rows that are not listed in `alive`, as `KVCache.keep` does: their answers are finished."""
        self.choose([self.names[int(row)] for row in alive])


@contextmanager
def mixed_batch(model: Module, names: Sequence[Choice]) -> Iterator[MixedBatch]:
    """Inside this block, row i of every batch (B, T) is computed with `names[i]`: an adapter, a mix such as
    {"legal": 0.5, "support": 0.5}, or None for the base alone.

    The frozen products, which are most of the work, run once over the whole batch, each adapter's thin ones over its
    own rows. `loss_and_grad` keeps the batch whole in here. Where rows leave the batch, as finished answers do in
    generation, say so:

        cache = model.new_cache(rows=3, capacity=64)
        with ml.mixed_batch(model, ["legal", None, "support"]) as rows:
            logits = model(tokens, cache)
            ...
            cache.keep(alive), rows.keep(alive)

    Raises ValueError for an unknown name or while an update is merged.
    """
    refuse_merged(model, "mixing adapters in a batch")
    before = active_factors(model)
    try:
        yield MixedBatch(model, names)
    finally:
        activate(model, before)
