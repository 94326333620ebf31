"""The layers of a transformer: each holds its parameters and calls one fused operation."""

from __future__ import annotations

import numpy as np

from ..engine import fused
from ..engine.backend import Array
from ..engine.tensor import Tensor
from .module import Module, Parameter


class Linear(Module):
    """y = x Wᵀ (+ bias)      weight (out_features, in_features), bias (out_features) or None.

    Adapters can be put on every Linear layer of a Module.

    bias: whether the layer has one; it starts at zero.
    rng: the generator of the initial weight, or its seed; None for zeros, which a loaded weight replaces.
    std: the standard deviation of the initial weight, drawn from N(0, std²).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        rng: np.random.Generator | int | None,
        std: float = 0.02,
    ):
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter(normal(rng, (out_features, in_features), std))
        self.bias = Parameter(np.zeros(out_features, np.float32)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)"""
        return fused.linear(x, self.weight) if self.bias is None else fused.linear(x, self.weight, self.bias)


class Embedding(Module):
    """The row `id` of a table      weight (num_embeddings, embedding_dim)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, rng: np.random.Generator | None = None):
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight = Parameter(normal(rng, (num_embeddings, embedding_dim), 0.02))

    def forward(self, ids: Array) -> Tensor:
        """ids (B, T) -> (B, T, embedding_dim)"""
        return fused.embedding(self.weight, ids)


class RMSNorm(Module):
    """x / rms(x) * (weight + offset)      weight (width), initially 1 - offset. offset: 1 in Gemma, 0 elsewhere."""

    def __init__(self, width: int, eps: float = 1e-5, offset: float = 0.0):
        self.weight = Parameter(np.full(width, 1 - offset, np.float32))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> (..., width)"""
        return fused.rms_norm(x, self.weight, eps=self.eps, offset=self.offset)


class LayerNorm(Module):
    """(x - mean(x)) / std(x) * weight + bias      weight (width), initially 1; bias (width), initially 0."""

    def __init__(self, width: int, eps: float = 1e-5):
        self.weight, self.bias = Parameter(np.ones(width, np.float32)), Parameter(np.zeros(width, np.float32))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> (..., width)"""
        return fused.layer_norm(x, self.weight, self.bias, eps=self.eps)


def normal(rng: np.random.Generator | int | None, shape: tuple[int, ...], std: float) -> np.ndarray:
    """float32 values drawn from N(0, std²); if `rng` is None, zeros that are read-only and take no memory."""
    if rng is None:
        return np.broadcast_to(np.float32(0), shape)  # one zero, read as often as needed
    return np.random.default_rng(rng).standard_normal(shape, dtype=np.float32) * np.float32(std)
