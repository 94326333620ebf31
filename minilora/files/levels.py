"""Quantisation to 4 bits as an index into sixteen levels: NF4, and FP4 and Int4 to compare it with.

A row is divided into blocks of 64 values that share one float32 scale, their largest magnitude. Each value is stored as
the index of the nearest level on that scale: 4 + 32 bytes per block, 0.5 + 4 / 64 = 0.5625 bytes per value.

    NF4    quantiles of the normal distribution, which trained matrices resemble: dense where weights are frequent
    FP4    floating point with 1 bit for the sign, 2 for the exponent, 1 for the fraction (E2M1)
    INT4   the integers from -7 to 7, divided by 7

Byte i of a block holds value 2 i in its high half and value 2 i + 1 in its low half, as in bitsandbytes.
Source: Dettmers et al. 2023, QLoRA (arXiv 2305.14314), section 3 and appendix E. Their double quantisation, which
stores the scales in 8 bits, is left out: it would save 0.05 of the 0.5625 bytes, and a row's bytes would depend on
other rows.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from types import ModuleType

import numpy as np

from ..engine.backend import Array, array_module

BLOCK, BYTES = 64, 36  # values and bytes of a block


def _nf4() -> list[float]:
    """Eight quantiles of the normal distribution at and below zero, nine at and above it, so that zero is a level.

    A normal distribution has no largest value: the outermost level is the quantile halfway between the middle of the
    last of 15 equal shares and that of the last of 16.
    """
    last = ((1 - 1 / 30) + (1 - 1 / 32)) / 2
    quantile = NormalDist().inv_cdf
    below = [-quantile(last + (0.5 - last) * i / 7) for i in range(7)]
    above = [quantile(last + (0.5 - last) * i / 8) for i in range(8)]
    return [x / above[0] for x in [*below, 0.0, *reversed(above)]]


LEVELS: dict[str, np.ndarray] = {
    "NF4": np.array(_nf4(), np.float32),
    "FP4": np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6, 6], np.float32) / 6,
    "INT4": np.array([*range(-7, 8), 7], np.float32) / 7,
}  # FP4 and INT4 have 15 different levels: the last one twice


def scales(packed: Array) -> Array:
    """The float32 scale of each block, (blocks, 1)."""
    xp = array_module(packed)
    return packed.view(xp.float32)[:, :1].copy()


def unscaled(packed: Array, kind: str) -> Array:
    """The levels of blocks (blocks, 36) uint8 before they are scaled: (blocks, 64) float32.

    Each byte is looked up in a table of all 256 pairs of levels: both values are copied as one item of 8 bytes.
    """
    xp = array_module(packed)
    return _pairs(kind, xp).take(packed[:, 4:]).view(xp.float32)


@cache
def _pairs(kind: str, xp: ModuleType) -> Array:
    levels = LEVELS[kind]
    pairs = np.stack([np.repeat(levels, 16), np.tile(levels, 16)], axis=1)  # (256, 2)
    return xp.asarray(pairs.view(np.complex64)[:, 0].copy())  # complex64 only as a type of 8 bytes


@np.errstate(invalid="ignore")  # NaN or infinity makes the scale NaN or infinite, which is reported on loading
def pack(w: np.ndarray, out: np.ndarray, kind: str) -> None:
    """Quantise w (blocks, 64) float32 into out (blocks, 36) uint8. Ties go to the lower level."""
    scale = np.abs(w).max(axis=-1, keepdims=True)
    x = w / np.where(scale > 0, scale, 1)
    codes = np.zeros(w.shape, np.uint8)
    for level, following in zip(LEVELS[kind], LEVELS[kind][1:], strict=False):
        codes += x > (level + following) / 2  # fifteen comparisons in the cache are faster than a search
    out[:, :4] = scale.view(np.uint8)
    out[:, 4:] = codes[:, 0::2] << 4 | codes[:, 1::2]
