"""Quantised weights: the block formats in which llama.cpp stores matrices, and how to get the numbers back.

A row is cut into blocks of 32 numbers that share one float16 step d (and, in Q4_1, one float16 minimum m):

    Q8_0   d, 32 signed bytes q                  w = d q          34 bytes for 32 numbers, 8.5 bits each
    Q4_1   d, m, 16 bytes of two 4-bit codes q   w = d q + m      20 bytes for 32 numbers, 5 bits each

In Q4_1 byte i holds element i in its low half and element i + 16 in its high half.
Source: the block structures in llama.cpp's ggml-common.h.
"""

from __future__ import annotations

import numpy as np

BLOCK = 32
BYTES_PER_BLOCK = {"F32": 4 * BLOCK, "F16": 2 * BLOCK, "Q8_0": 2 + BLOCK, "Q4_1": 4 + BLOCK // 2}


@np.errstate(over="ignore", invalid="ignore")  # damaged blocks give NaN, which whoever loads them reports
def dequantize(raw: np.ndarray, kind: str) -> np.ndarray:
    """Unpack a stored matrix: raw (m, bytes per row) uint8 -> (m, n) float32.

    kind: "F32", "F16", "Q8_0" or "Q4_1". Raises ValueError for another kind, or rows that are no whole blocks.
    """
    if kind not in BYTES_PER_BLOCK:
        raise ValueError(f"cannot read quantisation type {kind}; known: {', '.join(BYTES_PER_BLOCK)}")
    rows = raw.shape[0]
    if kind in ("F32", "F16"):
        return raw.view(np.float32 if kind == "F32" else np.float16).astype(np.float32)
    if raw.shape[1] % BYTES_PER_BLOCK[kind]:
        raise ValueError(f"a {kind} row of {raw.shape[1]} bytes is no multiple of {BYTES_PER_BLOCK[kind]}")
    packed = raw.reshape(rows, -1, BYTES_PER_BLOCK[kind])  # (m, blocks, bytes)
    d = packed[..., 0:2].copy().view(np.float16).astype(np.float32)  # (m, blocks, 1)
    out = np.empty((rows, packed.shape[1], BLOCK), np.float32)
    if kind == "Q8_0":
        np.multiply(packed[..., 2:].view(np.int8), d, out=out)
    else:
        minimum = packed[..., 2:4].copy().view(np.float16).astype(np.float32)
        codes = packed[..., 4:]
        out[..., :16] = codes & 15
        out[..., 16:] = codes >> 4
        out *= d
        out += minimum
    return out.reshape(rows, -1)


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
