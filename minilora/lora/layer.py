"""LoraLinear: y = x Wᵀ + (α/r)(x Aᵀ) Bᵀ. A frozen matrix, and beside it two thin ones that learn.

A, the down-projection, takes each token from n numbers to r; B, the up-projection, from r to m. B starts at zero, so
the first output is the base model's to the last bit, and dL/dA is zero while dL/dB is not. What DoRA, PiSSA and dropout
change about it stands in variants.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..engine import fused
from ..engine.backend import Array, array_module, dense
from ..engine.tensor import Tensor
from ..nn.layers import Embedding, Linear
from ..nn.module import Module, Parameter
from .config import LoraConfig
from .variants import Dropout, dora_delta, dora_update, pissa_start, row_norms, with_start


class RowFactors(NamedTuple):
    """How much of an adapter's update each row of a mixed batch gets.

    each: a factor for every row, (B, 1, 1). rows: those (k) where it is not zero. own: their factors, (k, 1, 1).
    """

    each: Array
    rows: Array
    own: Array


Factor = float | RowFactors  # how much of an adapter's update: one number for all rows, or one for each


class LoraWeights(Module):
    """One adapter's weights of one module: lora_A (r, n), lora_B (m, r), and the scale of their product.

    What a variant or a setting adds, each None where it is not used:
    lora_magnitude_vector (m): DoRA's length of each row. start: PiSSA's first A and B. bias (m): this adapter's own
    bias, in place of the layer's, so that the base's stays as it is. dropout: on the input of A.
    """

    def __init__(self, lora_A: Array, lora_B: Array, scale: float):
        self.lora_A = Parameter(lora_A)
        self.lora_B = Parameter(lora_B)
        self.scale = scale
        self.lora_magnitude_vector: Parameter | None = None
        self.start: tuple[Array, Array] | None = None
        self.bias: Parameter | None = None
        self.dropout: Dropout | None = None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def is_plain(self) -> bool:
        """Is the update scale · B A and nothing else?"""
        return self.lora_magnitude_vector is None and self.start is None and self.bias is None

    @property
    def drops(self) -> bool:
        """Does dropout take part just now?"""
        return self.dropout is not None and self.dropout.active

    def summary(self) -> str:
        """Shapes and scale, where a model is printed."""
        return f"{super().summary()}, scale {self.scale:g}"

    def factors(self) -> tuple[Array, Array]:
        """A and B whose product is the low-rank part; with PiSSA's first ones joined to them."""
        return with_start(self.lora_A.data, self.lora_B.data, self.start)

    def norms(self, w: Array) -> Array:
        """DoRA's ‖W + scale · B A‖ of each row, (m)."""
        return row_norms(w, *self.factors(), self.scale)

    def delta(self, w: Array | None = None) -> Array:
        """The update as one matrix: scale · B A, (m, n). DoRA's depends on the base's w (m, n), all others do not."""
        a, b = self.factors()
        low = (b * self.scale) @ a
        if self.lora_magnitude_vector is None:
            return low
        if w is None:
            raise ValueError("the update of a DoRA adapter depends on the base's matrix: give delta() that matrix")
        return dora_delta(w, low, self.lora_magnitude_vector.data, self.norms(w))


class EmbeddingWeights(LoraWeights):
    """An adapter's weights of an embedding, under PEFT's names: lora_embedding_A (r, V) and lora_embedding_B (C, r)."""

    @property
    def lora_A(self) -> Parameter:
        return self.lora_embedding_A

    @lora_A.setter
    def lora_A(self, value: Parameter) -> None:
        self.lora_embedding_A = value

    @property
    def lora_B(self) -> Parameter:
        return self.lora_embedding_B

    @lora_B.setter
    def lora_B(self, value: Parameter) -> None:
        self.lora_embedding_B = value


class LoraLayer(Module):
    """A layer that can carry adapters. It holds the very weight of the layer it replaces, frozen.

    adapters: their weights by name. active: which of the model's adapters take part, each with a factor; nothing active
    is the base layer.
    unmerged: while the active update is added into the weight, the base's own array; else None.
    """

    weight: Parameter
    bias: Parameter | None = None
    in_features: int
    out_features: int

    def __init__(self, base: Module):
        vars(self).update(vars(base))
        self.replaced = (base,)  # in a tuple, where no walk through the modules finds its parameters a second time
        self.adapters: dict[str, LoraWeights] = {}
        self.active: Mapping[str, Factor] = {}
        self.unmerged: Array | None = None
        self.unmerged_bias: Array | None = None

    def base_layer(self) -> Module:
        """The plain layer that this one replaced. Its weight is the very same."""
        return self.replaced[0]

    @property
    def merged(self) -> bool:  # type: ignore[override]
        """Is the active update added to the weight?"""
        return self.unmerged is not None

    @property
    def rows_differ(self) -> bool:  # type: ignore[override]
        """In a mixed batch each row has factors of its own."""
        return not all(isinstance(factor, float) for factor in self.active.values())

    def active_adapters(self) -> list[tuple[LoraWeights, Factor]]:
        """The weights of the active adapters that this layer carries, each with its factor."""
        return [(self.adapters[name], factor) for name, factor in self.active.items() if name in self.adapters]

    def delta_weight(self, factors: Mapping[str, float]) -> Array:
        """Σ factor · update of the adapters named, in the shape of this layer's weight; zero for none of its own.

        The update is that of `LoraWeights.delta`: scale · B A, and what DoRA and PiSSA make of it.
        """
        base = dense(self.weight.data if self.unmerged is None else self.unmerged)
        w = self.matrix(base)
        updates = [self.adapters[name].delta(w) * factor for name, factor in factors.items() if name in self.adapters]
        return self.matrix(sum(updates)) if updates else array_module(base).zeros_like(base)

    def matrix(self, weight: Array) -> Array:
        """The weight as W (m, n), or back again: as it is for a linear layer."""
        return weight

    def merge(self) -> None:
        """Add the active update to the weight: a new array takes its place, the base's own is kept, untouched.

        Over a packed base, the merged matrix is a dense one.
        """
        if self.unmerged is not None or not (active := self.active_adapters()):
            return
        one = {name: factor for name, factor in self.active.items() if isinstance(factor, float)}
        merged = dense(self.weight.data) + self.delta_weight(one)
        self.unmerged, self.weight.data = self.weight.data, array_module(merged).ascontiguousarray(merged)
        if self.bias is not None:
            self.unmerged_bias = bias = self.bias.data
            own = [(weights.bias.data - bias) * factor for weights, factor in active if weights.bias is not None]
            self.bias.data = bias + sum(own) if own else bias

    def unmerge(self) -> None:
        """Put the base's own arrays back. Subtracting the update would not restore every bit."""
        if self.unmerged is not None:
            self.weight.data, self.unmerged = self.unmerged, None
        if self.bias is not None and self.unmerged_bias is not None:
            self.bias.data, self.unmerged_bias = self.unmerged_bias, None


class LoraLinear(LoraLayer, Linear):
    """A linear layer with adapters."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) -> (..., m)"""
        active = [] if self.unmerged is not None else self.active_adapters()
        if not active:
            return super().forward(x)
        if self.bias is None and all(lora.is_plain and not lora.drops for lora, _ in active):
            return self.all_plain(x, active)
        product = fused.linear(x, self.weight)
        y = product if self.bias is None else product + self.bias
        for lora, factor in ((lora, _of_each_row(factor)) for lora, factor in active):
            y = y + self.update(x, product, lora, factor)
            if lora.bias is not None:
                y = y + (lora.bias - self.bias) * factor
        return y

    def all_plain(self, x: Tensor, active: Sequence[tuple[LoraWeights, Factor]]) -> Tensor:
        """The output where every update is scale · B A and nothing else      x (..., n) -> (..., m)"""
        lora, factor = active[0]
        if len(active) == 1 and isinstance(factor, float):
            return fused.lora_linear(x, self.weight, lora.lora_A, lora.lora_B, scale=lora.scale * factor)
        thin = [matrix for lora, _ in active for matrix in (lora.lora_A, lora.lora_B)]
        parts = [
            (None, lora.scale * factor) if isinstance(factor, float) else (factor.rows, factor.own * lora.scale)
            for lora, factor in active
        ]
        return fused.mixed_lora_linear(x, self.weight, *thin, parts=parts)

    def update(self, x: Tensor, product: Tensor, lora: LoraWeights, factor: float | Array) -> Tensor:
        """What one adapter adds to product = x Wᵀ, times its factor      x (..., n), product (..., m) -> (..., m)"""
        seen = x if lora.dropout is None else lora.dropout(x)
        low = fused.linear(fused.linear(seen, lora.lora_A), lora.lora_B)
        if lora.start is not None:
            a, b = lora.start
            low = low - fused.linear(fused.linear(seen, a), b)
        if lora.lora_magnitude_vector is None:
            return low * (lora.scale * factor)
        if seen is not x:
            product = fused.linear(seen, self.weight)
        norms = lora.norms(dense(self.weight.data))
        return dora_update(product, low * lora.scale, lora.lora_magnitude_vector, norms, factor)


class LoraEmbedding(LoraLayer, Embedding):
    """An embedding with adapters: row `id` of the table plus scale · (column `id` of A)ᵀ Bᵀ.

    Only the lookup gets the update. Where the head shares the table (`tied`), it goes on reading the base's, as in
    PEFT; a merged table then stands beside it, as `merged_weight`, since one matrix cannot be both.
    """

    def __init__(self, base: Embedding, tied: bool = False):
        super().__init__(base)
        self.in_features, self.out_features = base.num_embeddings, base.embedding_dim
        self.tied = tied
        self.merged_weight: Parameter | None = None

    def matrix(self, weight: Array) -> Array:
        """The table (V, C) as the matrix of a linear map of one-hot vectors, W (C, V), or back again."""
        return weight.T

    def merge(self) -> None:
        """Add the active update to the table; beside the base's own where that is also the head."""
        super().merge()
        if self.tied and self.unmerged is not None and self.merged_weight is None:
            self.merged_weight = Parameter(self.weight.data, requires_grad=False)
            self.weight.data = self.unmerged

    def unmerge(self) -> None:
        """Put the base's own table back."""
        super().unmerge()
        self.merged_weight = None

    def forward(self, ids: Array) -> Tensor:
        """ids (B, T) -> (B, T, C)"""
        if self.merged_weight is not None:
            return fused.embedding(self.merged_weight, ids)
        y = product = super().forward(ids)
        for lora, factor in [] if self.unmerged is not None else self.active_adapters():
            factor = _of_each_row(factor)
            low = fused.linear(fused.embedding(lora.lora_A.T, ids), lora.lora_B)
            if lora.lora_magnitude_vector is None:
                y = y + low * (lora.scale * factor)
            else:
                norms = lora.norms(self.matrix(dense(self.weight.data)))
                y = y + dora_update(product, low * lora.scale, lora.lora_magnitude_vector, norms, factor)
        return y


def _of_each_row(factor: Factor) -> float | Array:
    return factor.each if isinstance(factor, RowFactors) else factor


def new_weights(name: str, base: Linear | Embedding, config: LoraConfig, rng: np.random.Generator) -> LoraWeights:
    """Fresh weights for the module called `name`, drawn with `rng` as `config` says.

    Raises ValueError when the rank is larger than the matrix, or the start is not made for the kind of module.
    """
    like, start = base.weight.data, config.init_lora_weights
    embeds = isinstance(base, Embedding)
    (m, n), r, scale = like.shape[:: -1 if embeds else 1], config.rank_of(name), config.scale_of(name)
    if r > min(m, n):
        raise ValueError(
            f"r={r} is larger than {name} ({m} x {n}) can use: the rank of a matrix is at most {min(m, n)}"
        )
    if embeds and start == "pissa":
        raise ValueError(f"init_lora_weights='pissa' is for linear layers: leave {name} out of target_modules")
    if start == "pissa":
        a, b = pissa_start(dense(like), r, scale)
    else:
        a, b = (_embedding_start if embeds else _linear_start)(m, n, r, start, rng)
    xp = array_module(like)
    a, b = xp.asarray(a, dtype=like.dtype, order="C"), xp.asarray(b, dtype=like.dtype, order="C")
    weights = (EmbeddingWeights if embeds else LoraWeights)(a, b, scale)
    if start == "pissa":
        weights.start = (a.copy(), b.copy())  # training moves A and B in place
    if config.use_dora:
        w = dense(like)
        weights.lora_magnitude_vector = Parameter(weights.norms(w.T if embeds else w))
    if isinstance(base, Linear):
        if config.bias != "none" and base.bias is not None:
            weights.bias = Parameter(base.bias.data.copy())
        if config.lora_dropout:  # a generator of its own, so that A is the same with dropout and without
            weights.dropout = Dropout(config.lora_dropout, seed=int(rng.spawn(1)[0].integers(2**63)))
    return weights


def _linear_start(m: int, n: int, r: int, start: bool | str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A (r, n) random, and B (m, r) zero, so that the adapter starts as no change; random, too, if `start` is False."""
    if start == "gaussian":
        a = rng.standard_normal((r, n), dtype=np.float32) / np.float32(r)
    else:  # what PEFT and microsoft/LoRA call kaiming_uniform(a=sqrt(5))
        a = rng.uniform(-1 / math.sqrt(n), 1 / math.sqrt(n), (r, n)).astype(np.float32)
    if start is False:
        return a, rng.standard_normal((m, r), dtype=np.float32) / np.float32(math.sqrt(r))
    return a, np.zeros((m, r), np.float32)


def _embedding_start(
    m: int, n: int, r: int, start: bool | str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The other way round, as microsoft/LoRA and PEFT do it: A (r, V) zero and B (C, r) random."""
    b = rng.standard_normal((m, r), dtype=np.float32)
    a = rng.standard_normal((r, n), dtype=np.float32) if start is False else np.zeros((r, n), np.float32)
    return a, b
