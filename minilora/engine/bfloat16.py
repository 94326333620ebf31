"""Matmuls of float32 rows with a frozen matrix in bfloat16: what `ml.load(name, dtype="bfloat16")` computes with.

A bfloat16 is the upper half of a float32: its sign, its exponent, and 7 of the 23 bits of its fraction. Processors with
AMX or AVX512-BF16 multiply bfloat16, and accumulate in float32, faster than they multiply float32. NumPy has neither
the type nor the matmul. oneDNN has both: see onednn.py.

How large is the error? Rounding to the nearest bfloat16 changes a value by at most the factor u = 2⁻⁸. With both
factors rounded, x w changes by at most (2u + u²) |x| |w|. Accumulating k products in float32 adds at most
k 2⁻²³ |x| |w|. Measured errors are far smaller, because they have both signs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from . import onednn
from .backend import Array

CPUINFO = Path("/proc/cpuinfo")


class BFloat16(onednn.Factor):
    """A matrix (m, n) in bfloat16 as a factor: `x @ w`, `x @ w.T` and `w @ x` of a float32 x are float32.

    stored: the upper halves of its float32 values, uint16 (m, n).
    """

    @property
    def size(self) -> int:
        return self.stored.size

    def left(self, x: Array) -> Array:
        """x, rounded."""
        return rounded(x)

    def __matmul__(self, x: Array) -> Array:
        return (x.T @ self.T).T  # w x = (xᵀ wᵀ)ᵀ


def rounded(x: np.ndarray) -> np.ndarray:
    """The bits of the bfloat16s nearest to x: float32 of any shape -> uint16 of that shape. Ties go to even bits.

    Processors take values below 2⁻¹²⁶ for 0.
    """
    return onednn.library().rounded(np.asarray(x, order="C"))


def to_float32(bits: np.ndarray) -> np.ndarray:
    """The values of bfloat16 bits: uint16 of any shape -> float32 of that shape, exactly."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


@cache
def why_not() -> str | None:
    """Why this machine cannot multiply in bfloat16, in a few words; None if it can."""
    try:
        has_matmul = onednn.library().has(onednn.BFLOAT16)
    except onednn.Missing as error:
        return str(error)
    return None if has_matmul else "this processor has no matmul in bfloat16 (AMX, AVX512-BF16)"


def hint() -> str | None:
    """How to compute faster, in a sentence, where the processor multiplies bfloat16; None elsewhere. oneDNN is not
    loaded for it.
    """
    try:
        processor = CPUINFO.read_text()
    except OSError:  # another system, which oneDNN is not called on
        return None
    if not any(name in processor for name in ("avx512_bf16", "amx_bf16")):
        return None
    return "this processor multiplies bfloat16, which is faster: --bf16"
