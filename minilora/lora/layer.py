"""LoraLinear: y = x Wᵀ + (α/r)(x Aᵀ) Bᵀ. W is frozen; the low-rank factors A and B are trained.

A, the down-projection, maps each token from n dimensions to r; B, the up-projection, from r to m. B is initialised to
zero, so the first output equals the base model's bit for bit, and dL/dA is zero while dL/dB is not. The variants
(DoRA, PiSSA, dropout) are in variants.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import NamedTuple, Self

import numpy as np

from ..engine import fused
from ..engine.backend import Array, array_module, dense
from ..engine.dora import dora_linear
from ..engine.tensor import Tensor
from ..nn.layers import Linear
from ..nn.module import Module, Parameter
from .config import FROM_BASE, LoraConfig
from .variants import Dropout, dora_delta, dora_update, pissa_initial, row_norms, with_initial


class RowFactors(NamedTuple):
    """The factors of one adapter's update for the rows of a mixed batch.

    each: the factor of every row, (B). rows: the k rows whose factor is not zero. own: their factors, (k).
    """

    each: Array
    rows: Array
    own: Array


Factor = float | RowFactors  # of an adapter's update: one number for all rows, or one for each row


class LoraWeights(Module):
    """The weights of one adapter in one module: lora_A (r, n), lora_B (m, r), and the scale of their product.

    Each of these is None where it is not used:
    lora_magnitude_vector: DoRA's magnitude of each row, (m).
    initial: PiSSA's initial A and B.
    freeze_A: whether A stays as initialised while B is trained.
    dropout: applied to the input of A.
    """

    def __init__(self, lora_A: Array, lora_B: Array, scale: float):
        self.lora_A = Parameter(lora_A)
        self.lora_B = Parameter(lora_B)
        self.scale = scale
        self.lora_magnitude_vector: Parameter | None = None
        self.initial: tuple[Array, Array] | None = None
        self.dropout: Dropout | None = None
        self.freeze_A = False

    def requires_grad_(self, wanted: bool = True) -> Self:
        """Freeze or unfreeze these weights; A never becomes trainable with `freeze_A`."""
        super().requires_grad_(wanted)
        self.lora_A.requires_grad = wanted and not self.freeze_A
        return self

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def is_plain(self) -> bool:
        """Whether the update is scale · B A and nothing else."""
        return self.lora_magnitude_vector is None and self.initial is None

    @property
    def is_dora(self) -> bool:
        """Whether the update is DoRA's of scale · B A and nothing else."""
        return self.lora_magnitude_vector is not None and self.initial is None

    @property
    def drops(self) -> bool:
        """Whether dropout is active now."""
        return self.dropout is not None and self.dropout.active

    def summary(self) -> str:
        """Shapes and scale, for printing the model."""
        return f"{super().summary()}, scale {self.scale:g}"

    def factors(self) -> tuple[Array, Array]:
        """A and B whose product is the low-rank part; with PiSSA, the initial factors are appended."""
        return with_initial(self.lora_A.data, self.lora_B.data, self.initial)

    def norms(self, w: Array) -> Array:
        """DoRA's norm of each row of W + scale · B A, (m)."""
        return row_norms(w, *self.factors(), self.scale)

    def delta(self, w: Array | None = None) -> Array:
        """The update as one matrix, scale · B A, (m, n). Only DoRA's depends on the base's matrix w (m, n)."""
        a, b = self.factors()
        low = (b * self.scale) @ a
        if self.lora_magnitude_vector is None:
            return low
        if w is None:
            raise ValueError("the update of a DoRA adapter depends on the base's matrix: call delta(w) with it")
        return dora_delta(w, low, self.lora_magnitude_vector.data, self.norms(w))


class LoraLinear(Linear):
    """A linear layer with adapters. It shares the weight of the layer that it replaces.

    adapters: their weights, by name.
    active: the factors of the model's active adapters, by name. Without any, this is the base layer.
    unmerged: the base's own array while an update is merged into the weight; otherwise None.
    """

    def __init__(self, base: Linear):
        vars(self).update(vars(base))
        self.replaced = SimpleNamespace(layer=base)  # where named_modules does not find it a second time
        self.adapters: dict[str, LoraWeights] = {}
        self.active: Mapping[str, Factor] = {}
        self.unmerged: Array | None = None

    def base_layer(self) -> Linear:
        """The plain layer that this one replaced, with this one's mode and hooks. Both share one weight."""
        layer = self.replaced.layer
        layer.training = self.training
        if "forward_hooks" in vars(self):  # of this layer, and not the empty ones of its class
            layer.forward_hooks = self.forward_hooks
        return layer

    @property
    def merged(self) -> bool:  # type: ignore[override]
        """Whether the active update is added to the weight."""
        return self.unmerged is not None

    @property
    def rows_differ(self) -> bool:  # type: ignore[override]
        """Whether each row has its own factors, as in a mixed batch."""
        return not all(isinstance(factor, float) for factor in self.active.values())

    def active_adapters(self, rows: int | None = None) -> list[tuple[LoraWeights, Factor]]:
        """The weights and the factor of each active adapter of this layer.

        rows: of the batch, if there is one. Raises ValueError for a mixed batch of another number of rows.
        """
        for factor in self.active.values():
            if rows is not None and isinstance(factor, RowFactors) and len(factor.each) != rows:
                raise ValueError(f"the mixed batch has adapters for {len(factor.each)} rows, and the batch has {rows}")
        return [(self.adapters[name], factor) for name, factor in self.active.items() if name in self.adapters]

    def delta_weight(self, factors: Mapping[str, float]) -> Array:
        """Σ factor · update over the named adapters, (m, n); zero if the layer has none of them.

        An update is what `LoraWeights.delta` returns: scale · B A, or what DoRA and PiSSA make of it.
        """
        base = dense(self.weight.data if self.unmerged is None else self.unmerged)
        updates = [
            self.adapters[name].delta(base) * factor for name, factor in factors.items() if name in self.adapters
        ]
        return sum(updates) if updates else array_module(base).zeros_like(base)

    def merge(self) -> None:
        """Replace the weight by a new array, weight + active update. The base's own array is stored, unchanged.

        On a quantised base the merged matrix is a dense one.
        """
        if self.merged or not self.active_adapters():
            return
        one = {name: factor for name, factor in self.active.items() if isinstance(factor, float)}
        merged = dense(self.weight.data) + self.delta_weight(one)
        self.unmerged, self.weight.data = self.weight.data, array_module(merged).ascontiguousarray(merged)

    def unmerge(self) -> None:
        """Restore the base's own array. Subtracting the update would not restore every bit."""
        if self.unmerged is not None:
            self.weight.data, self.unmerged = self.unmerged, None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) -> (..., m)      One plain LoRA, one DoRA, or several plain LoRAs are a single fused operation."""
        active = [] if self.merged else self.active_adapters(x.shape[0])
        if not active:
            return super().forward(x)
        lora, factor = active[0]
        alone = factor if len(active) == 1 and isinstance(factor, float) else None  # the factor of the only adapter
        if alone is not None and lora.is_plain:
            mask = lora.dropout.draw() if lora.dropout is not None and lora.drops else None
            y = fused.lora_linear(x, self.weight, lora.lora_A, lora.lora_B, scale=lora.scale * alone, mask=mask)
        elif alone == 1 and lora.is_dora and not lora.drops:
            weights = lora.lora_A, lora.lora_B, lora.lora_magnitude_vector
            y = dora_linear(x, self.weight, *weights, norms=lora.norms(dense(self.weight.data)), scale=lora.scale)
        elif all(lora.is_plain and not lora.drops for lora, _ in active):
            y = self.several_plain(x, active)
        else:
            product = fused.linear(x, self.weight)
            y = product if self.bias is None else product + self.bias
            for lora, factor in active:
                y = y + self.update(x, product, lora, _of_each_row(factor, y.ndim))
            return y
        return y if self.bias is None else y + self.bias

    def several_plain(self, x: Tensor, active: Sequence[tuple[LoraWeights, Factor]]) -> Tensor:
        """x Wᵀ plus several updates scale · B A, of all rows or of an adapter's own      x (..., n) -> (..., m)"""
        thin = [matrix for lora, _ in active for matrix in (lora.lora_A, lora.lora_B)]
        parts = [
            (None, lora.scale * factor)
            if isinstance(factor, float)
            else (factor.rows, _for_axes(factor.own, x.ndim) * lora.scale)
            for lora, factor in active
        ]
        return fused.mixed_lora_linear(x, self.weight, *thin, parts=parts)

    def update(self, x: Tensor, product: Tensor, lora: LoraWeights, factor: float | Array) -> Tensor:
        """What one adapter adds to the product x Wᵀ      x (..., n) -> (..., m)"""
        seen = x if lora.dropout is None else lora.dropout(x)
        low = fused.linear(fused.linear(seen, lora.lora_A), lora.lora_B)
        if lora.initial is not None:
            a, b = lora.initial
            low = low - fused.linear(fused.linear(seen, a), b)
        if lora.lora_magnitude_vector is None:
            y = low * (lora.scale * factor)
        else:
            product = product if seen is x else fused.linear(seen, self.weight)
            norms = lora.norms(dense(self.weight.data))
            y = dora_update(product, low * lora.scale, lora.lora_magnitude_vector, norms, factor)
        if lora.initial is not None and seen is not x:  # what PiSSA takes out of the base gets all of x
            y = y - fused.linear(fused.linear(x - seen, a), b) * (lora.scale * factor)
        return y


def _for_axes(factors: Array, ndim: int) -> Array:
    """Factors of rows, (k) -> (k, 1, ..., 1), to multiply an array with this number of axes."""
    return factors.reshape(-1, *(1,) * (ndim - 1))


def _of_each_row(factor: Factor, ndim: int) -> float | Array:
    return _for_axes(factor.each, ndim) if isinstance(factor, RowFactors) else factor


def new_weights(
    name: str, base: Linear, config: LoraConfig, rng: np.random.Generator, any_rank: bool = False
) -> LoraWeights:
    """Initialise the weights of a new adapter in one module, whose name decides rank and scale.

    Raises ValueError if the rank is larger than the matrix's, unless `any_rank`.
    """
    like, init = base.weight.data, config.init_lora_weights
    (m, n), r, scale = like.shape, config.rank_of(name), config.scale_of(name)
    if r > min(m, n) and not any_rank:
        most = f"whose rank is at most {min(m, n)}: lower r, or name the module in exclude_modules"
        raise ValueError(f"r={r} is too large for {name} ({m} x {n}), {most}")
    if init == "pissa":
        a, b = pissa_initial(dense(like), r, scale)
    else:
        a, b = _initial(m, n, r, init, rng)
    xp = array_module(like)
    a, b = xp.asarray(a, dtype=like.dtype, order="C"), xp.asarray(b, dtype=like.dtype, order="C")
    weights = LoraWeights(a, b, scale)
    weights.freeze_A = config.freeze_A
    if init in FROM_BASE:
        weights.initial = (a.copy(), b.copy())  # training changes A and B in place
    if config.use_dora:
        weights.lora_magnitude_vector = Parameter(weights.norms(dense(like)))
    if config.lora_dropout:  # from its own generator, so that A is the same with and without dropout
        weights.dropout = Dropout(config.lora_dropout, seed=int(rng.spawn(1)[0].integers(2**63)))
    return weights


def _initial(m: int, n: int, r: int, init: bool | str, rng: np.random.Generator) -> tuple[Array, Array]:
    """A (r, n) random and B (m, r) zero, so that the initial update is zero. With init=False B is random as well."""
    if init == "gaussian":
        a = rng.standard_normal((r, n), dtype=np.float32) / np.float32(r)
    else:  # what PEFT and microsoft/LoRA call kaiming_uniform(a=sqrt(5))
        a = rng.uniform(-1 / math.sqrt(n), 1 / math.sqrt(n), (r, n)).astype(np.float32)
    if init is False:
        return a, rng.standard_normal((m, r), dtype=np.float32) / np.float32(math.sqrt(r))
    return a, np.zeros((m, r), np.float32)
