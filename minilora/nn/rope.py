"""The frequencies of rotary positions (RoPE, Su et al. 2021, arXiv 2104.09864), and Llama 3's scaling of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine.backend import Array


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of the frequencies for longer texts (arXiv 2407.21783), rope_type "llama3" in config.json.

    A pair that turns less than `low_freq_factor` times in the original context turns `factor` times more slowly; one
    that turns more than `high_freq_factor` times is unchanged; between them the change is gradual.

    Raises ValueError for values that are not positive numbers, or not in order.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"rope_scaling: {name} must be a positive number, got {value!r}")
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError("rope_scaling: low_freq_factor must be smaller than high_freq_factor")

    def divisors(self, frequencies: Array) -> Array:
        """By what each frequency (D/2) is divided: llama.cpp's tensor `rope_freqs.weight`."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clip(0, 1)  # 1: unchanged
        return 1 / (kept + (1 - kept) / self.factor)


def frequencies(theta: float, head_dim: int, scaling: RopeScaling | None = None, xp: Any = np) -> Array:
    """The angle by which each pair turns from one token to the next, (D/2) float64. xp: NumPy or CuPy."""
    plain = theta ** (-xp.arange(0, head_dim, 2) / head_dim)
    return plain if scaling is None else plain / scaling.divisors(plain)
