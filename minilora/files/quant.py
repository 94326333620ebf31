"""Quantised weights: the block formats in which llama.cpp stores matrices, how to get the numbers back, and matrices
that stay packed while a model is used and adapters are trained over them.

A row is cut into blocks of 32 numbers that share one float16 step d (and, in Q4_1, one float16 minimum m):

    Q8_0   d, 32 signed bytes q                  w = d q          34 bytes for 32 numbers, 8.5 bits each
    Q4_1   d, m, 16 bytes of two 4-bit codes q   w = d q + m      20 bytes for 32 numbers, 5 bits each

In Q4_1 byte i holds element i in its low half and element i + 16 in its high half.
Source: the block structures in llama.cpp's ggml-common.h.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..engine.backend import Array, array_module, to_device

BLOCK = 32
PIECE = 4096  # blocks unpacked at a time on the host: half a megabyte of numbers, which stays in the cache
BYTES_PER_BLOCK = {"F32": 4 * BLOCK, "F16": 2 * BLOCK, "Q8_0": 2 + BLOCK, "Q4_1": 4 + BLOCK // 2}


@np.errstate(over="ignore", invalid="ignore")  # damaged blocks give NaN, which whoever loads them reports
def dequantize(raw: Array, kind: str) -> Array:
    """Unpack a stored matrix: raw (m, bytes per row) uint8 -> (m, n) float32, a new array.

    kind: "F32", "F16", "Q8_0" or "Q4_1". Raises ValueError for another kind, or rows that are no whole blocks.
    """
    xp, (m, width) = array_module(raw), raw.shape
    n = _numbers_in(width, kind)
    if kind in ("F32", "F16"):
        return raw.view(xp.float32 if kind == "F32" else xp.float16).astype(xp.float32)
    out = xp.empty((m, n), xp.float32)
    packed, numbers = raw.reshape(-1, BYTES_PER_BLOCK[kind]), out.reshape(-1, BLOCK)
    unpack = _unpack_q8_0 if kind == "Q8_0" else _unpack_q4_1
    step = PIECE if xp is np else max(1, len(packed))
    for i in range(0, len(packed), step):
        unpack(packed[i : i + step], numbers[i : i + step])
    return out


def _numbers_in(width: int, kind: str) -> int:
    """How many numbers a row of `width` bytes holds. Raises ValueError for an unknown kind or no whole blocks."""
    if kind not in BYTES_PER_BLOCK:
        raise ValueError(f"cannot read quantisation type {kind}; known: {', '.join(BYTES_PER_BLOCK)}")
    whole = BYTES_PER_BLOCK[kind] if kind.startswith("Q") else BYTES_PER_BLOCK[kind] // BLOCK
    if width % whole:
        raise ValueError(f"a {kind} row of {width} bytes is no multiple of {whole}")
    return width * BLOCK // BYTES_PER_BLOCK[kind]


def _unpack_q8_0(packed: Array, out: Array) -> None:
    xp = array_module(packed)
    out[...] = packed[:, 2:].view(xp.int8)
    out *= _steps(packed, "Q8_0").astype(xp.float32)


def _unpack_q4_1(packed: Array, out: Array) -> None:
    xp = array_module(packed)
    steps = _steps(packed, "Q4_1").astype(xp.float32)  # (blocks, 2)
    codes = packed.view(xp.uint32)[:, 1:].copy()  # (blocks, 4): eight codes in a word
    low, high = codes & 0x0F0F0F0F, codes >> 4 & 0x0F0F0F0F
    # Putting the halves side by side is quick when each goes as one item of 16 bytes, whatever that item means.
    item = xp.complex128
    out[...] = xp.concatenate((low.view(item), high.view(item)), axis=1).view(xp.uint8)
    out *= steps[:, :1]
    out += steps[:, 1:]


def _steps(packed: Array, kind: str) -> Array:
    """The float16 d, in Q4_1 also m, of each block, (blocks, 1 or 2): quickly copied as one item of 2 or 4 bytes."""
    xp = array_module(packed)
    return packed.view(xp.uint16 if kind == "Q8_0" else xp.uint32)[:, :1].copy().view(xp.float16)


class Packed:
    """A frozen matrix as its file holds it: raw bytes in place of numbers, unpacked whenever a product needs them.

    raw (m, bytes per row) uint8 on the host or a GPU, kind "Q8_0" or "Q4_1". To whoever asks for its shape, dtype
    or number of elements it is the float32 matrix (m, n) that it stands for; `nbytes` are the bytes that it holds. It
    takes no part in arithmetic by itself: NumPy would unpack it unasked, and number by number.

    QLoRA (Dettmers et al. 2023, arXiv 2305.14314) trains adapters over such a base: the gradient with respect to the
    input needs the numbers of W once more, and nothing ever writes to them.
    """

    ndim = 2
    dtype = np.dtype(np.float32)
    __array_ufunc__ = None  # array @ packed is a TypeError

    def __init__(self, raw: Array, kind: str):
        if not kind.startswith("Q"):
            raise ValueError(f"a matrix of kind {kind} is not packed: its numbers are there already")
        self.raw, self.kind = raw, kind
        self.shape = (len(raw), _numbers_in(raw.shape[1], kind))

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        return self.raw.nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Array:
        """The numbers of some rows: an index, a slice, or integers (...) -> (..., n) float32."""
        raw = self.raw[rows]
        return dequantize(raw.reshape(-1, raw.shape[-1]), self.kind).reshape(*raw.shape[:-1], self.shape[1])

    def unpack(self, start: int = 0, stop: int | None = None) -> Array:
        """The numbers of rows start..stop, (rows, n) float32, a new array."""
        return self[start:stop]

    def is_finite(self) -> bool:
        """Is every number finite? Codes always are, so the float16 steps and minima tell."""
        steps = _steps(self.raw.reshape(-1, BYTES_PER_BLOCK[self.kind]), self.kind)
        return bool(array_module(steps).isfinite(steps).all())

    def to(self, device: str) -> Packed:
        """The same matrix on `"cpu"` or `"cuda"`; the bytes move, not the numbers."""
        return Packed(to_device(self.raw, device), self.kind)

    def __array__(self, *args: Any, **settings: Any) -> np.ndarray:
        raise TypeError("a packed matrix is no array: use its unpack()")

    def __repr__(self) -> str:
        return f"Packed({self.shape[0]} x {self.shape[1]}, {self.kind}, {self.nbytes:,} bytes)"


@np.errstate(over="ignore")  # a step too large for float16 is reported below
def quantize(w: np.ndarray, kind: str) -> np.ndarray:
    """Pack a matrix as llama.cpp does: w (m, n) -> (m, bytes per row) uint8, which `dequantize` takes back, rounded.

    Q8_0: d = largest magnitude / 127. Q4_1: d = (max - min) / 15, m = min. Codes are found with the float32 step,
    before d is rounded to float16. Raises ValueError for another kind, for rows that are no whole blocks, and for
    numbers that float16 cannot hold.
    """
    if kind not in BYTES_PER_BLOCK:
        raise ValueError(f"cannot write quantisation type {kind}; known: {', '.join(BYTES_PER_BLOCK)}")
    m, n = w.shape
    if kind in ("F32", "F16"):
        plain = np.ascontiguousarray(w, np.float32 if kind == "F32" else np.float16)
        if kind == "F16":
            _check_half(plain, kind)
        return plain.view(np.uint8)
    if n % BLOCK:
        raise ValueError(f"a row of {n} numbers cannot be stored as {kind}: it is no multiple of {BLOCK}")
    out = np.empty((m, n // BLOCK, BYTES_PER_BLOCK[kind]), np.uint8)
    pack = _pack_q8_0 if kind == "Q8_0" else _pack_q4_1
    rows = max(1, (1 << 18) // n)  # a piece at a time, so that the temporaries stay in the cache
    for i in range(0, m, rows):
        pack(np.asarray(w[i : i + rows], np.float32).reshape(-1, n // BLOCK, BLOCK), out[i : i + rows])
    return out.reshape(m, -1)


def codes_q4_1(raw: np.ndarray) -> np.ndarray:
    """The 4-bit codes of packed Q4_1 rows: raw (m, bytes per row) uint8 -> (m, n) uint8, each 0 to 15."""
    packed = raw.reshape(raw.shape[0], -1, BYTES_PER_BLOCK["Q4_1"])[..., 4:]  # (m, blocks, 16)
    return np.concatenate([packed & 15, packed >> 4], axis=-1).reshape(raw.shape[0], -1)


def _pack_q8_0(w: np.ndarray, out: np.ndarray) -> None:
    d = np.abs(w).max(axis=-1, keepdims=True) / np.float32(127)
    x = w * _inverse(d)
    whole = np.trunc(x)
    out[..., 2:] = (whole + np.trunc(2 * (x - whole))).astype(np.int8).view(np.uint8)  # halves round away from zero
    out[..., :2] = _half(d, "Q8_0")


def _pack_q4_1(w: np.ndarray, out: np.ndarray) -> None:
    low = w.min(axis=-1, keepdims=True)
    d = (w.max(axis=-1, keepdims=True) - low) / np.float32(15)
    q = np.clip((w - low) * _inverse(d) + np.float32(0.5), 0, 15).astype(np.uint8)
    out[..., 4:] = q[..., :16] | q[..., 16:] << 4
    out[..., :2] = _half(d, "Q4_1")
    out[..., 2:4] = _half(low, "Q4_1")


def _inverse(d: np.ndarray) -> np.ndarray:
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=d > np.finfo(np.float32).tiny)


def _half(x: np.ndarray, kind: str) -> np.ndarray:
    half = x.astype(np.float16)
    _check_half(half, kind)
    return half.view(np.uint8)


def _check_half(half: np.ndarray, kind: str) -> None:
    if not np.isfinite(half).all():
        raise ValueError(f"some numbers are too large for {kind}, which holds float16 up to 65504")
