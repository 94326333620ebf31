"""llama.cpp's block formats: a row of a matrix is divided into blocks of 32 or 256 values, and w = scale code + offset.

    kind   values  bytes  in this order                                              w
    Q4_0     32      18   d, 16 bytes of two 4-bit codes q                           d (q - 8)
    Q4_1     32      20   d, m, 16 bytes of two 4-bit codes q                        d q + m
    Q5_0     32      22   d, the highest bits of 32 codes, 16 bytes of the other 4   d (q - 16)
    Q8_0     32      34   d, 32 signed bytes q                                       d q
    Q4_K    256     144   d, e, s and t of 8 groups, 128 bytes of two 4-bit codes q  d s q - e t
    Q6_K    256     210   the low 4 bits of the codes, their high 2, s of 16 groups, d  d s (q - 32)

d, m and e are float16. In Q4_K, s and t are 6-bit integers, one of each for a group of 32 values; in Q6_K, s is a
signed byte for each group of 16. A byte of two 4-bit codes holds value i in its low half and value i + k in its high
half, where k is 16 in blocks of 32 values, 32 in Q4_K and 64 in Q6_K.
NF4, FP4 and INT4 (levels.py) do not occur in .gguf files: a model is rounded to them when it is loaded.
Source: the block structures in llama.cpp's ggml-common.h and the functions dequantize_row_* in ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..engine.backend import Array, array_module
from . import levels


@dataclass(frozen=True)
class Layout:
    """How one kind stores a block.

    values, nbytes: of a block. groups: how many groups of its values have their own scale.
    codes: packed (blocks, nbytes) uint8 -> (blocks, values) uint8 or int8; the levels themselves where the codes are
        indices of levels, float32.
    steps: packed -> the scale of each group, and what is added to it or None, (blocks, groups) float32 each.
    """

    values: int
    nbytes: int
    groups: int
    codes: Callable[[Array], Array]
    steps: Callable[[Array], tuple[Array, Array | None]]


def unpack(packed: Array, out: Array, layout: Layout) -> None:
    """Dequantise blocks: packed (blocks, nbytes) uint8 into out (blocks, values) float32."""
    out[...] = layout.codes(packed)
    scale, offset = layout.steps(packed)
    size = layout.values // layout.groups
    out *= scale.repeat(size).reshape(out.shape)  # faster than to broadcast over so short an axis
    if offset is not None:
        out += offset.repeat(size).reshape(out.shape)


def half_to_float32(bits: Array) -> Array:
    """The values of float16 bits, int16 of any shape -> float32: four times as fast as NumPy's own conversion.

    The exponent and the fraction move to their places in a float32, whose exponents are larger by 112.
    """
    if array_module(bits) is not np or ((bits & 0x7C00) == 0x7C00).any():  # infinity and NaN would become finite
        return bits.view(np.float16).astype(np.float32)
    wide = bits.astype(np.int32)
    wide <<= 13
    wide &= -0x70000001  # three copies of the sign
    values = wide.view(np.float32)
    values *= np.float32(2.0**112)
    return values


def _part(packed: Array, start: int, end: int) -> Array:
    """Bytes start..end of every block, a new array (blocks, end - start): on the host, copied as one item each."""
    if array_module(packed) is not np:
        return packed[:, start:end].copy()
    items = np.ndarray(len(packed), f"V{end - start}", packed, start, packed.strides[:1]).copy()
    return items.view(np.uint8).reshape(len(packed), -1)


def _halves(pairs: Array, count: int) -> Array:
    """Bytes (blocks, n) of two 4-bit codes -> (blocks, 2 n): of `count` bytes the low halves, then the high ones."""
    xp, item = array_module(pairs), np.complex128  # a type of 16 bytes: joining is fast if there are few items
    low, high = (pairs & 15).reshape(-1, count), (pairs >> 4).reshape(-1, count)
    return xp.concatenate((low.view(item), high.view(item)), axis=1).view(xp.uint8).reshape(len(pairs), -1)


def _half(packed: Array, at: int) -> Array:
    """The float16 at byte `at` of every block: (blocks, 1) float32."""
    return half_to_float32(_part(packed, at, at + 2).view(np.int16))


def _one_step(packed: Array) -> tuple[Array, None]:
    return _half(packed, 0), None


def _codes_q5_0(packed: Array) -> Array:
    xp = array_module(packed)
    high = xp.unpackbits(_part(packed, 2, 6).reshape(-1), bitorder="little").reshape(-1, 32)
    return (_halves(_part(packed, 6, 22), 16) + (high << 4) - 16).view(xp.int8)


def _codes_q6_k(packed: Array) -> Array:
    xp = array_module(packed)
    high = _part(packed, 128, 192).reshape(-1, 1, 32)
    shifted = xp.concatenate([high << 4, high << 2 & 48, high & 48, high >> 2 & 48], axis=1) & 48
    return ((_halves(_part(packed, 0, 128), 64) | shifted.reshape(-1, 256)) - 32).view(xp.int8)


def _steps_q4_k(packed: Array) -> tuple[Array, Array]:
    """d s and -e t. Of the first 4 groups, s and t are in bytes 4..11. Of the last 4, the low 4 bits are in bytes
    12..15, and the high 2 at the upper ends of bytes 4..11.
    """
    xp = array_module(packed)
    first, rest = (_part(packed, 4, 8), _part(packed, 8, 12)), _part(packed, 12, 16)
    s, t = (
        xp.concatenate([(each & 63).view(xp.uint32), (low | each >> 2 & 48).view(xp.uint32)], axis=1).view(xp.uint8)
        for each, low in zip(first, (rest & 15, rest >> 4), strict=True)
    )
    return _half(packed, 0) * s, -_half(packed, 2) * t


LAYOUTS = {
    "Q4_0": Layout(32, 18, 1, lambda p: (_halves(_part(p, 2, 18), 16) - 8).view(np.int8), _one_step),
    "Q4_1": Layout(32, 20, 1, lambda p: _halves(_part(p, 4, 20), 16), lambda p: (_half(p, 0), _half(p, 2))),
    "Q5_0": Layout(32, 22, 1, _codes_q5_0, _one_step),
    "Q8_0": Layout(32, 34, 1, lambda p: _part(p, 2, 34).view(np.int8), _one_step),
    "Q4_K": Layout(256, 144, 8, lambda p: _halves(_part(p, 16, 144), 32), _steps_q4_k),
    "Q6_K": Layout(256, 210, 16, _codes_q6_k,
                   lambda p: (_half(p, 208) * _part(p, 192, 208).view(np.int8).astype(np.float32), None)),
}  # fmt: skip
for _kind in levels.LEVELS:
    LAYOUTS[_kind] = Layout(levels.BLOCK, levels.BYTES, 1, partial(levels.unscaled, kind=_kind),
                            lambda p: (levels.scales(p), None))  # fmt: skip
