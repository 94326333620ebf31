"""Quantised weights: quantise and dequantise, and matrices that stay quantised while a model is used and adapters are
trained on it. blocks.py has the formats.

A matrix that is stored in one of these formats is a `Packed`: its bytes, as they are in the file. A matmul with many
rows dequantises it, some rows at a time. A matmul with few rows, as in generation, is computed on the codes: within
a group of values with one scale, x wᵀ = scale (x codesᵀ) + offset Σ x.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np

from ..engine import bfloat16
from ..engine.backend import Array, array_module, to_device
from . import levels
from .blocks import LAYOUTS, half_to_float32, unpack

BLOCK = 32
PIECE = 4096  # blocks dequantised at a time on the host: half a megabyte, which fits the processor's cache
FEW = 8  # rows: with more, dequantising once is faster
_PLAIN = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2)}  # kind: (values per block, bytes per block)
_UNITS = _PLAIN | {kind: (layout.values, layout.nbytes) for kind, layout in LAYOUTS.items()}
PACKED = tuple(kind for kind in _UNITS if kind != "F32")  # the kinds that a matrix can keep in memory
ROUNDED = ("NF4", "FP4", "INT4", "Q8_0", "Q4_1")  # the kinds that the matrices of any model can be rounded to


@np.errstate(over="ignore", invalid="ignore")  # damaged blocks give NaN, which is reported on loading
def dequantize(raw: Array, kind: str) -> Array:
    """Dequantise a stored matrix: raw (m, bytes per row) uint8 -> (m, n) float32, a new array.

    kind: "F32", "F16", "BF16", a kind of blocks.py, or another one of a GGUF file, which the gguf library dequantises
        on the host, far more slowly. Raises ValueError for an unknown kind, or rows that are not whole blocks.
    """
    xp, (m, width) = array_module(raw), raw.shape
    n = _values_in(width, kind)
    if kind == "F32":
        return raw.view(xp.float32).copy()
    if kind == "F16":
        return half_to_float32(raw.view(xp.int16))
    if kind == "BF16":
        return bfloat16.to_float32(raw.view(xp.uint16))
    if kind not in LAYOUTS:
        return _by_library(raw, kind)
    layout, out = LAYOUTS[kind], xp.empty((m, n), xp.float32)
    packed, values = raw.reshape(-1, layout.nbytes), out.reshape(-1, layout.values)
    step = PIECE * BLOCK // layout.values if xp is np else max(1, len(packed))
    for i in range(0, len(packed), step):
        unpack(packed[i : i + step], values[i : i + step], layout)
    return out


@cache
def readable(kind: str) -> bool:
    """True if `dequantize` knows this kind, by itself or through the gguf library."""
    if kind in _UNITS:
        return True
    try:
        _by_library(np.zeros((1, _library_units(kind)[1]), np.uint8), kind)
    except (KeyError, NotImplementedError):
        return False
    return True


def _by_library(raw: np.ndarray, kind: str) -> np.ndarray:
    from gguf import GGMLQuantizationType, quants  # imported here, so that `import minilora` loads only NumPy

    return quants.dequantize(raw, GGMLQuantizationType[kind])


def _library_units(kind: str) -> tuple[int, int]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def _values_in(width: int, kind: str) -> int:
    """How many values a row of `width` bytes holds. Raises ValueError for an unknown kind or no whole blocks."""
    if not readable(kind):
        raise ValueError(f"cannot read quantisation type {kind}")
    block, whole = _UNITS.get(kind) or _library_units(kind)
    if width % whole:
        raise ValueError(f"a {kind} row of {width} bytes is not a multiple of {whole}")
    return width // whole * block


def bytes_of_row(n: int, kind: str) -> int:
    """The bytes of a row of n values. Raises ValueError for another kind, or if they are not whole blocks.

    >>> bytes_of_row(64, "NF4")
    36
    """
    if kind not in _UNITS:
        raise ValueError(f"cannot write quantisation type {kind}; known: {', '.join(_UNITS)}")
    block, whole = _UNITS[kind]
    if n % block:
        raise ValueError(f"a row of {n} values cannot be stored as {kind}: {n} is not a multiple of {block}")
    return n // block * whole


class Packed:
    """A frozen quantised matrix, stored as bytes and dequantised for each matmul.

    raw: (m, bytes per row) uint8 on the host or a GPU.
    kind: one of PACKED.
    in_bfloat16: matmuls are computed in bfloat16 (bfloat16.py).

    Its shape, dtype and size are those of the float32 matrix (m, n) that it represents; `nbytes` are the stored bytes.
    Arithmetic with it is a TypeError, since NumPy would dequantise it element by element.

    QLoRA (Dettmers et al. 2023, arXiv 2305.14314) trains adapters on such a base: the gradient with respect to the
    input needs the values of W again, and nothing ever writes to them.
    """

    ndim = 2
    dtype = np.dtype(np.float32)
    __array_ufunc__ = None  # array @ packed is a TypeError

    def __init__(self, raw: Array, kind: str, in_bfloat16: bool = False):
        if kind not in PACKED:
            raise ValueError(f"a matrix of kind {kind} is not kept packed: use dequantize()")
        self.raw, self.kind, self.in_bfloat16 = raw, kind, in_bfloat16
        self.shape = (len(raw), _values_in(raw.shape[1], kind))

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        return self.raw.nbytes

    @property
    def multiplied_as_stored(self) -> bool:
        """True if matmuls use the stored values themselves: bfloat16, computed in bfloat16."""
        return self.kind == "BF16" and self.in_bfloat16

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Array:
        """The values of some rows: an index, a slice, or integers (...) -> (..., n) float32."""
        raw = self.raw[rows]
        return dequantize(raw.reshape(-1, raw.shape[-1]), self.kind).reshape(*raw.shape[:-1], self.shape[1])

    def unpack(self, start: int = 0, stop: int | None = None) -> Array:
        """The values of rows start..stop, (rows, n) float32, a new array."""
        return dequantize(self.raw[start:stop], self.kind)

    def factor(self, start: int = 0, stop: int | None = None) -> Array:
        """Rows start..stop as the factor of a matmul: their values in float32 or in bfloat16."""
        if not self.in_bfloat16:
            return self.unpack(start, stop)
        if self.multiplied_as_stored:
            return bfloat16.BFloat16(self.raw[start:stop].view(np.uint16))
        start, stop, _ = slice(start, stop).indices(len(self))
        bits = np.empty((stop - start, self.shape[1]), np.uint16)
        step = max(1, PIECE * BLOCK // self.shape[1])
        for i in range(start, stop, step):
            bits[i - start : i - start + step] = bfloat16.rounded(self.unpack(i, min(i + step, stop)))
        return bfloat16.BFloat16(bits)

    def product_of_few(self, x: Array) -> Array | None:
        """x wᵀ without the whole w in float32, x (N, n) -> (N, m); None where dequantising is faster.

        NumPy computes it on the codes, some rows of w at a time, in the processor's cache, on one core: these calls are
        so short that a second thread waits for the GIL longer than it computes.
        """
        on_host = isinstance(x, np.ndarray) and x.dtype == np.float32
        if not on_host or self.multiplied_as_stored or len(x) > FEW:
            return None
        (m, n), N, layout = self.shape, len(x), LAYOUTS.get(self.kind)
        out = np.empty((N, m), x.dtype)
        step = min(max(1, _TILE // n), 256)
        groups = n // math.gcd(n, 64) if layout is None else n // layout.values * layout.groups  # G, in a row
        xs = x.reshape(N, groups, -1)  # (N, G, k)
        sums, xs = xs.sum(axis=-1), np.ascontiguousarray(xs.transpose(1, 2, 0))  # (N, G), (G, k, N)
        if layout is None:
            for i in range(0, m, step):
                tile = dequantize(self.raw[i : i + step], self.kind)
                dots = np.matmul(tile.reshape(len(tile), groups, -1).swapaxes(0, 1), xs)  # (G, rows, N)
                out[:, i : i + step] = dots.sum(axis=0).T
            return out
        packed = self.raw.reshape(-1, layout.nbytes)
        scale, offset = layout.steps(packed)
        scale = scale.reshape(m, groups)
        codes = np.empty((min(step, m), groups, xs.shape[1]), x.dtype)
        for i in range(0, m, step):
            rows = slice(i, min(i + step, m))
            blocks = packed[rows.start * n // layout.values : rows.stop * n // layout.values]
            tile = codes[: rows.stop - i]  # (rows, G, k)
            tile.reshape(len(blocks), -1)[...] = layout.codes(blocks)
            dots = np.matmul(tile.swapaxes(0, 1), xs)  # (G, rows, N)
            np.einsum("gmn,mg->nm", dots, scale[rows], out=out[:, rows])
        if offset is not None:
            out += sums @ offset.reshape(m, groups).T
        return out

    def is_finite(self) -> bool:
        """True if every value is finite. Codes always are, so scales and offsets decide."""
        for i in range(0, len(self), 1024):
            raw = self.raw[i : i + 1024]
            if self.kind in LAYOUTS:
                layout = LAYOUTS[self.kind]
                found = [s for s in layout.steps(raw.reshape(-1, layout.nbytes)) if s is not None]
                if not all(bool(array_module(s).isfinite(s).all()) for s in found):
                    return False
            else:
                exponents = {"F16": 0x7C00, "BF16": 0x7F80}[self.kind]  # all ones in infinity and NaN
                if (raw.view(np.uint16) & exponents == exponents).any():
                    return False
        return True

    def to(self, device: str) -> Packed:
        """The same matrix on `"cpu"` or `"cuda"`; it is copied in its packed form."""
        return Packed(to_device(self.raw, device), self.kind, self.in_bfloat16)

    def __array__(self, *args: Any, **settings: Any) -> np.ndarray:
        raise TypeError("a packed matrix is not an array: use its unpack()")

    def __repr__(self) -> str:
        return f"Packed({self.shape[0]} x {self.shape[1]}, {self.kind}, {self.nbytes:,} bytes)"


_TILE = 1 << 17  # values of a tile


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


@np.errstate(over="ignore", invalid="ignore")  # a step too large for float16, or NaN, is reported below
def quantize(w: np.ndarray, kind: str) -> np.ndarray:
    """Quantise a matrix: w (m, n) -> (m, bytes per row) uint8. `dequantize` gives the rounded matrix back.

    As in llama.cpp, Q8_0: d = largest magnitude / 127; Q4_1: d = (max - min) / 15, m = min. Codes are computed with the
    float32 step, before d is rounded to float16. NF4, FP4, INT4: the nearest level, see levels.py.
    Raises ValueError for another kind, for rows that are not whole blocks, and for values too large for float16.
    """
    (m, n), width = w.shape, bytes_of_row(w.shape[1], kind)
    if kind == "BF16":
        return bfloat16.rounded(np.asarray(w, np.float32)).view(np.uint8)
    if kind in _PLAIN:
        return _half(w, kind) if kind == "F16" else np.ascontiguousarray(w, np.float32).view(np.uint8)
    pack = _PACK.get(kind) or (partial(levels.pack, kind=kind) if kind in levels.LEVELS else None)
    if pack is None:
        raise ValueError(f"minilora cannot write {kind}; it writes {', '.join((*_PLAIN, *_PACK, *levels.LEVELS))}")
    out, (block, size) = np.empty((m, width), np.uint8), _UNITS[kind]
    rows = max(1, PIECE * BLOCK // n)  # a piece at a time, so that temporary arrays fit the processor's cache
    for i in range(0, m, rows):
        pack(np.asarray(w[i : i + rows], np.float32).reshape(-1, block), out[i : i + rows].reshape(-1, size))
    return out


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


_PACK = {"Q8_0": _pack_q8_0, "Q4_1": _pack_q4_1}


def _inverse(d: np.ndarray) -> np.ndarray:
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=d > np.finfo(np.float32).tiny)


def _half(x: np.ndarray, kind: str) -> np.ndarray:
    half = np.ascontiguousarray(x, np.float16)
    if not np.isfinite(half).all():
        raise ValueError(f"some values are NaN or too large for {kind}, which stores float16, up to 65504")
    return half.view(np.uint8)
