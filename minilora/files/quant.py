"""Quantised weights: llama.cpp's block formats, how to quantise and dequantise, and matrices that stay quantised while
a model is used and adapters are trained on it.

A row is divided into blocks of 32 values that share one float16 step d (and, in Q4_1, one float16 minimum m):

    Q8_0   d, 32 signed bytes q                  w = d q          34 bytes for 32 values, 8.5 bits each
    Q4_1   d, m, 16 bytes of two 4-bit codes q   w = d q + m      20 bytes for 32 values, 5 bits each

In Q4_1 byte i holds value i in its low half and value i + 16 in its high half.
Source: the block structures in llama.cpp's ggml-common.h.

NF4, FP4 and INT4 (levels.py) do not occur in .gguf files: a model is rounded to these when it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from ..engine import bfloat16
from ..engine.backend import Array, array_module, to_device
from . import levels

BLOCK = 32
PIECE = 4096  # blocks dequantised at a time on the host: half a megabyte, which fits the processor's cache
BYTES_PER_BLOCK = {"F32": 4 * BLOCK, "F16": 2 * BLOCK, "Q8_0": 2 + BLOCK, "Q4_1": 4 + BLOCK // 2}  # in .gguf files
_PLAIN = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2)}  # kind: (values per block, bytes per block)
_PACKED = {kind: (BLOCK, BYTES_PER_BLOCK[kind]) for kind in ("Q8_0", "Q4_1")}
_PACKED |= dict.fromkeys(levels.LEVELS, (levels.BLOCK, levels.BYTES))
_UNITS = _PLAIN | _PACKED
ROUNDED = ("NF4", "FP4", "INT4", "Q8_0", "Q4_1")  # the kinds that the matrices of any model can be rounded to


@np.errstate(over="ignore", invalid="ignore")  # damaged blocks give NaN, which is reported on loading
def dequantize(raw: Array, kind: str) -> Array:
    """Dequantise a stored matrix: raw (m, bytes per row) uint8 -> (m, n) float32, a new array.

    kind: "F32", "F16", "BF16", "Q8_0", "Q4_1", "NF4", "FP4" or "INT4". Raises ValueError for another kind, or rows that
    are no whole blocks.
    """
    xp, (m, width) = array_module(raw), raw.shape
    n = _values_in(width, kind)
    if kind == "BF16":
        return bfloat16.to_float32(raw.view(xp.uint16))
    if kind in _PLAIN:
        return raw.view(xp.float32 if kind == "F32" else xp.float16).astype(xp.float32)
    out, (block, size) = xp.empty((m, n), xp.float32), _PACKED[kind]
    packed, values = raw.reshape(-1, size), out.reshape(-1, block)
    unpack = {"Q8_0": _unpack_q8_0, "Q4_1": _unpack_q4_1}.get(kind) or partial(levels.unpack, kind=kind)
    step = PIECE if xp is np else max(1, len(packed))
    for i in range(0, len(packed), step):
        unpack(packed[i : i + step], values[i : i + step])
    return out


def _values_in(width: int, kind: str) -> int:
    """How many values a row of `width` bytes holds. Raises ValueError for an unknown kind or no whole blocks."""
    if kind not in _UNITS:
        raise ValueError(f"cannot read quantisation type {kind}; known: {', '.join(_UNITS)}")
    block, whole = _UNITS[kind]
    if width % whole:
        raise ValueError(f"a {kind} row of {width} bytes is not a multiple of {whole}")
    return width // whole * block


def bytes_of_row(n: int, kind: str) -> int:
    """The bytes of a row of n values. Raises ValueError for another kind, or if they are no whole blocks.

    >>> bytes_of_row(64, "NF4")
    36
    """
    if kind not in _UNITS:
        raise ValueError(f"cannot write quantisation type {kind}; known: {', '.join(_UNITS)}")
    block, whole = _UNITS[kind]
    if n % block:
        raise ValueError(f"a row of {n} values cannot be stored as {kind}: {n} is not a multiple of {block}")
    return n // block * whole


def _unpack_q8_0(packed: Array, out: Array) -> None:
    xp = array_module(packed)
    out[...] = packed[:, 2:].view(xp.int8)
    out *= _steps(packed, "Q8_0").astype(xp.float32)


def _unpack_q4_1(packed: Array, out: Array) -> None:
    xp = array_module(packed)
    steps = _steps(packed, "Q4_1").astype(xp.float32)  # (blocks, 2)
    codes = packed.view(xp.uint32)[:, 1:].copy()  # (blocks, 4): eight codes in each uint32
    low, high = codes & 0x0F0F0F0F, codes >> 4 & 0x0F0F0F0F
    item = xp.complex128  # only as a type of 16 bytes: concatenating the halves is fast if each is one item
    out[...] = xp.concatenate((low.view(item), high.view(item)), axis=1).view(xp.uint8)
    out *= steps[:, :1]
    out += steps[:, 1:]


def _steps(packed: Array, kind: str) -> Array:
    """The float16 d, in Q4_1 also m, of each block, (blocks, 1 or 2), copied fast as one item of 2 or 4 bytes.

    For NF4, FP4 and INT4, the float32 scales.
    """
    if kind in levels.LEVELS:
        return levels.scales(packed)
    xp = array_module(packed)
    return packed.view(xp.uint16 if kind == "Q8_0" else xp.uint32)[:, :1].copy().view(xp.float16)


class Packed:
    """A frozen quantised matrix, stored as bytes and dequantised for each matmul.

    raw: (m, bytes per row) uint8 on the host or a GPU.
    kind: "BF16", "Q8_0", "Q4_1", "NF4", "FP4" or "INT4".
    in_bfloat16: matmuls are computed in bfloat16, as those of kind "BF16" always are.

    Its shape, dtype and size are those of the float32 matrix (m, n) that it represents; `nbytes` are the stored bytes.
    Arithmetic with it is a TypeError, since NumPy would dequantise it element by element.

    QLoRA (Dettmers et al. 2023, arXiv 2305.14314) trains adapters on such a base: the gradient with respect to the
    input needs the values of W again, and nothing ever writes to them.
    """

    ndim = 2
    dtype = np.dtype(np.float32)
    __array_ufunc__ = None  # array @ packed is a TypeError

    def __init__(self, raw: Array, kind: str, in_bfloat16: bool = False):
        if kind in ("F32", "F16"):
            raise ValueError(f"a matrix of kind {kind} is not packed: use dequantize()")
        self.raw, self.kind, self.in_bfloat16 = raw, kind, in_bfloat16 or kind == "BF16"
        self.shape = (len(raw), _values_in(raw.shape[1], kind))

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        return self.raw.nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Array:
        """The values of some rows: an index, a slice, or integers (...) -> (..., n) float32."""
        raw = self.raw[rows]
        return dequantize(raw.reshape(-1, raw.shape[-1]), self.kind).reshape(*raw.shape[:-1], self.shape[1])

    def unpack(self, start: int = 0, stop: int | None = None) -> Array:
        """The values of rows start..stop, (rows, n) float32, a new array."""
        return self[start:stop]

    def factor(self, start: int = 0, stop: int | None = None) -> Array:
        """Rows start..stop as the factor of a matmul: their values in float32 or in bfloat16."""
        if not self.in_bfloat16:
            return self.unpack(start, stop)
        if self.kind == "BF16":
            return bfloat16.BFloat16(self.raw[start:stop].view(np.uint16))
        start, stop, _ = slice(start, stop).indices(len(self))
        bits = np.empty((stop - start, self.shape[1]), np.uint16)
        step = max(1, PIECE * BLOCK // self.shape[1])
        for i in range(start, stop, step):
            bits[i - start : i - start + step] = bfloat16.rounded(self.unpack(i, min(i + step, stop)))
        return bfloat16.BFloat16(bits)

    def is_finite(self) -> bool:
        """True if every value is finite. Codes always are, so the steps, minima and scales decide."""
        if self.kind == "BF16":
            exponents = 0x7F80  # all ones in infinity and NaN
            pieces = (self.raw[i : i + 1024].view(np.uint16) for i in range(0, len(self), 1024))
            return all(bool((piece & exponents != exponents).all()) for piece in pieces)
        steps = _steps(self.raw.reshape(-1, _PACKED[self.kind][1]), self.kind)
        return bool(array_module(steps).isfinite(steps).all())

    def to(self, device: str) -> Packed:
        """The same matrix on `"cpu"` or `"cuda"`; it is copied in its packed form."""
        return Packed(to_device(self.raw, device), self.kind, self.in_bfloat16)

    def __array__(self, *args: Any, **settings: Any) -> np.ndarray:
        raise TypeError("a packed matrix is not an array: use its unpack()")

    def __repr__(self) -> str:
        return f"Packed({self.shape[0]} x {self.shape[1]}, {self.kind}, {self.nbytes:,} bytes)"


@contextmanager
def in_float32(matrices: Iterable[Array]) -> Iterator[None]:
    """A block in which matmuls with these matrices are computed in float32, even if they are set to bfloat16."""
    changed = [w for w in matrices if isinstance(w, Packed) and w.in_bfloat16]
    try:
        for w in changed:
            w.in_bfloat16 = False
        yield
    finally:
        for w in changed:
            w.in_bfloat16 = True


@np.errstate(over="ignore")  # a step too large for float16 is reported below
def quantize(w: np.ndarray, kind: str) -> np.ndarray:
    """Quantise a matrix: w (m, n) -> (m, bytes per row) uint8. `dequantize` gives the rounded matrix back.

    As in llama.cpp, Q8_0: d = largest magnitude / 127; Q4_1: d = (max - min) / 15, m = min. Codes are computed with the
    float32 step, before d is rounded to float16. NF4, FP4, INT4: the nearest level, see levels.py.
    Raises ValueError for another kind, for rows that are no whole blocks, and for values too large for float16.
    """
    (m, n), width = w.shape, bytes_of_row(w.shape[1], kind)
    if kind in _PLAIN:
        if kind == "BF16":
            return bfloat16.rounded(np.asarray(w, np.float32)).view(np.uint8)
        plain = np.ascontiguousarray(w, np.float32 if kind == "F32" else np.float16)
        if kind == "F16":
            _check_half(plain, kind)
        return plain.view(np.uint8)
    out, (block, size) = np.empty((m, width), np.uint8), _PACKED[kind]
    pack = {"Q8_0": _pack_q8_0, "Q4_1": _pack_q4_1}.get(kind) or partial(levels.pack, kind=kind)
    rows = max(1, PIECE * BLOCK // n)  # a piece at a time, so that temporary arrays fit the processor's cache
    for i in range(0, m, rows):
        pack(np.asarray(w[i : i + rows], np.float32).reshape(-1, block), out[i : i + rows].reshape(-1, size))
    return out


def codes_of(raw: np.ndarray, kind: str = "Q4_1") -> np.ndarray:
    """The 4-bit codes of packed rows: raw (m, bytes per row) uint8 -> (m, n) uint8, each 0 to 15."""
    packed = raw.reshape(raw.shape[0], -1, _PACKED[kind][1])[..., 4:]  # (m, blocks, bytes of codes)
    low, high = packed & 15, packed >> 4
    pairs = np.concatenate([low, high], axis=-1) if kind == "Q4_1" else np.stack([high, low], axis=-1)
    return pairs.reshape(raw.shape[0], -1)


def _pack_q8_0(w: np.ndarray, out: np.ndarray) -> None:
    d = np.abs(w).max(axis=-1, keepdims=True) / np.float32(127)
    x = w * _inverse(d)
    whole = np.trunc(x)
    out[:, 2:] = (whole + np.trunc(2 * (x - whole))).astype(np.int8).view(np.uint8)  # halves round away from zero
    out[:, :2] = _half(d, "Q8_0")


def _pack_q4_1(w: np.ndarray, out: np.ndarray) -> None:
    low = w.min(axis=-1, keepdims=True)
    d = (w.max(axis=-1, keepdims=True) - low) / np.float32(15)
    q = np.clip((w - low) * _inverse(d) + np.float32(0.5), 0, 15).astype(np.uint8)
    out[:, 4:] = q[:, :16] | q[:, 16:] << 4
    out[:, :2] = _half(d, "Q4_1")
    out[:, 2:4] = _half(low, "Q4_1")


def _inverse(d: np.ndarray) -> np.ndarray:
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=d > np.finfo(np.float32).tiny)


def _half(x: np.ndarray, kind: str) -> np.ndarray:
    half = x.astype(np.float16)
    _check_half(half, kind)
    return half.view(np.uint8)


def _check_half(half: np.ndarray, kind: str) -> None:
    if not np.isfinite(half).all():
        raise ValueError(f"some values are too large for {kind}, which stores float16, up to 65504")
