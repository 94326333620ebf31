"""Four bits as an index into sixteen levels: NF4, and beside it FP4 and Int4, which it is measured against.

A row is cut into blocks of 64 numbers that share one float32 scale, their largest magnitude. What is stored of a number
is the level nearest to it on that scale: 4 bytes and 32, 0.5 + 4 / 64 = 0.5625 bytes a number.

    NF4    quantiles of the normal distribution, which a trained matrix is near to: each level is met about as often
    FP4    a floating-point number of 1 bit for the sign, 2 for the exponent, 1 for the fraction (E2M1)
    INT4   the whole numbers from -7 to 7, divided by 7

Byte i of a block holds number 2 i in its high half and number 2 i + 1 in its low half, as bitsandbytes lays out NF4.
Source: Dettmers et al. 2023, QLoRA (arXiv 2305.14314), section 3 and appendix E. Their double quantisation, the scales
in 8 bits, is left out: it would save 0.05 bytes of the 0.5625, and tie a row's bytes to those of other rows.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist
from types import ModuleType

import numpy as np

from ..engine.backend import Array, array_module

BLOCK, BYTES = 64, 36  # numbers of a block, and the bytes that it takes


def _nf4() -> list[float]:
    """Eight quantiles of the normal distribution at and below zero, nine at and above it: zero itself is a level.

    The outermost ones stand for the middle of the last of 15 and of 16 equal shares, halfway between the two: a normal
    distribution has no end.
    """
    last = ((1 - 1 / 30) + (1 - 1 / 32)) / 2
    quantile = NormalDist().inv_cdf
    below = [-quantile(last + (0.5 - last) * i / 7) for i in range(7)]
    above = [quantile(last + (0.5 - last) * i / 8) for i in range(8)]
    return [x / above[0] for x in [*below, 0.0, *reversed(above)]]


def _fp4() -> list[float]:
    magnitudes = [x / 6 for x in (0.5, 1, 1.5, 2, 3, 4, 6)]
    return [*(-x for x in reversed(magnitudes)), 0.0, *magnitudes, 1.0]  # of 15: the last stands there twice


def _int4() -> list[float]:
    return [*(i / 7 for i in range(-7, 8)), 1.0]


LEVELS = {kind: np.array(levels(), np.float32) for kind, levels in (("NF4", _nf4), ("FP4", _fp4), ("INT4", _int4))}


def scales(packed: Array) -> Array:
    """The float32 scale of each block, (blocks, 1)."""
    xp = array_module(packed)
    return packed.view(xp.float32)[:, :1].copy()


def unpack(packed: Array, out: Array, kind: str) -> None:
    """Blocks (blocks, 36) uint8 as their numbers, written to out (blocks, 64) float32.

    A byte is looked up as a whole, in a table of all 256 pairs of levels: both numbers come as one item of 8 bytes.
    """
    xp = array_module(packed)
    out[...] = _pairs(kind, xp).take(packed[:, 4:]).view(xp.float32)
    out *= scales(packed)


@cache
def _pairs(kind: str, xp: ModuleType) -> Array:
    levels = LEVELS[kind]
    pairs = np.stack([np.repeat(levels, 16), np.tile(levels, 16)], axis=1)  # (256, 2)
    return xp.asarray(pairs.view(np.complex64)[:, 0].copy())  # what that item means does not matter


@np.errstate(invalid="ignore")  # what is not finite has a scale that is not, either, which whoever loads it reports
def pack(w: np.ndarray, out: np.ndarray, kind: str) -> None:
    """Numbers w (blocks, 64) float32 as blocks, written to out (blocks, 36) uint8. Halfway is rounded down."""
    scale = np.abs(w).max(axis=-1, keepdims=True)
    x = w / np.where(scale > 0, scale, 1)
    codes = np.zeros(w.shape, np.uint8)
    for level, following in zip(LEVELS[kind], LEVELS[kind][1:], strict=False):
        codes += x > (level + following) / 2  # fifteen comparisons in the cache are quicker than a search
    out[:, :4] = scale.view(np.uint8)
    out[:, 4:] = codes[:, 0::2] << 4 | codes[:, 1::2]
