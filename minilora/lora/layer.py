"""LoraLinear: y = x Wᵀ + (α/r)(x Aᵀ) Bᵀ. A frozen matrix, and beside it two thin ones that learn.

A, the down-projection, takes each token from n numbers to r; B, the up-projection, from r to m. B starts at zero, so
the first output is the base model's to the last bit, and dL/dA is zero while dL/dB is not.
"""

from __future__ import annotations

import math

import numpy as np

from ..engine import fused
from ..engine.backend import Array, array_module
from ..engine.tensor import Tensor
from ..nn.layers import Linear
from ..nn.module import Module, Parameter
from .config import LoraConfig


class LoraWeights(Module):
    """One adapter's share of one module: lora_A (r, n), lora_B (m, r), and the scale of their product."""

    def __init__(self, lora_A: np.ndarray, lora_B: np.ndarray, scale: float):
        self.lora_A = Parameter(lora_A)
        self.lora_B = Parameter(lora_B)
        self.scale = scale

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def delta(self) -> Array:
        """The update as one matrix: scale · B A, (m, n)."""
        return (self.lora_B.data * self.scale) @ self.lora_A.data


class LoraLinear(Linear):
    """A linear layer that can carry adapters. It holds the very weight of the layer it replaces, frozen.

    adapters: by name. active: which of them take part, each with a factor; nothing active is the base layer.
    unmerged: while the active update is added into the weight, the base's own array; else None.
    """

    def __init__(self, base: Linear):
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.adapters: dict[str, LoraWeights] = {}
        self.active: dict[str, float] = {}
        self.unmerged: Array | None = None

    def base_layer(self) -> Linear:
        """A plain linear layer with the very weight of this one."""
        plain = Linear.__new__(Linear)
        plain.in_features, plain.out_features = self.in_features, self.out_features
        plain.weight, plain.bias = self.weight, self.bias
        return plain

    def parts(self) -> list[tuple[LoraWeights, float]]:
        """The active adapters that this layer carries, each with its factor."""
        return [(self.adapters[name], factor) for name, factor in self.active.items() if name in self.adapters]

    def merge(self) -> None:
        """Add the active update to the weight: a new array takes its place, the base's own is kept, untouched."""
        if self.unmerged is None and (parts := self.parts()):
            self.unmerged = self.weight.data
            self.weight.data = self.unmerged + sum(part.delta() * factor for part, factor in parts)

    def unmerge(self) -> None:
        """Put the base's own array back. Subtracting the update would not restore every bit."""
        if self.unmerged is not None:
            self.weight.data, self.unmerged = self.unmerged, None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) -> (..., m)"""
        parts = [] if self.unmerged is not None else self.parts()
        if len(parts) == 1 and self.bias is None:
            lora, factor = parts[0]
            return fused.lora_linear(x, self.weight, lora.lora_A, lora.lora_B, scale=lora.scale * factor)
        y = super().forward(x)
        for lora, factor in parts:
            y = y + fused.linear(fused.linear(x, lora.lora_A), lora.lora_B) * (lora.scale * factor)
        return y


def new_weights(name: str, base: Linear, config: LoraConfig, rng: np.random.Generator) -> LoraWeights:
    """Fresh A and B for the module called `name`, drawn with `rng` as `config.init_lora_weights` says.

    Raises ValueError when the rank is larger than the matrix.
    """
    m, n = base.out_features, base.in_features
    r = config.rank_of(name)
    if r > min(m, n):
        raise ValueError(
            f"r={r} is larger than {name} ({m} x {n}) can use: the rank of a matrix is at most {min(m, n)}"
        )
    if config.init_lora_weights == "gaussian":
        a = rng.standard_normal((r, n), dtype=np.float32) / np.float32(r)
    else:  # what PEFT and microsoft/LoRA call kaiming_uniform(a=sqrt(5))
        a = rng.uniform(-1 / math.sqrt(n), 1 / math.sqrt(n), (r, n)).astype(np.float32)
    if config.init_lora_weights is False:
        b = rng.standard_normal((m, r), dtype=np.float32) / np.float32(math.sqrt(r))
    else:
        b = np.zeros((m, r), np.float32)
    like = base.weight.data
    xp = array_module(like)
    return LoraWeights(xp.asarray(a, dtype=like.dtype), xp.asarray(b, dtype=like.dtype), config.scale_of(name))
