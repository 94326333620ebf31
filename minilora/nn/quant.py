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
