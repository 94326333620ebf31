"""What multiplies: `x @ factor(w)`, with a matrix itself or what is faster than NumPy."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from . import onednn
from .backend import Array, is_packed
from .parallel import has_one_core

HAS_BLAS = sys.platform != "emscripten"


def factor(w: Array, start: int = 0, stop: int | None = None) -> Any:
    """Rows of a matrix as the right factor of a matmul: `x @ factor(w)`, `x @ factor(w).T`.

    Their values, as of `dense`, or a matrix in bfloat16 (bfloat16.py) if a packed matrix computes in it.
    """
    return w.factor(start, stop) if is_packed(w) else fast_factor(w[start:stop])


def fast_factor(w: Array) -> Any:
    """A matrix as the right factor of a matmul: itself, or what multiplies faster. In a browser, where NumPy has no
    BLAS, that is an `EinsumFactor`; in one of several threads oneDNN's factor, where it runs.

    Outside of such threads both libraries would use all cores, and the idle threads of one keep the other waiting.
    """
    if not HAS_BLAS:
        return EinsumFactor(w)
    found = onednn.float32_factor(w) if has_one_core.get() else None
    return w if found is None else found


class EinsumFactor:
    """A matrix (k, m) as the right factor, x @ w, whose product `einsum` computes.

    Without a BLAS library `einsum` is 1.8 times as fast as `x @ w.T`, 4 times as fast as `x @ w`, and a training step
    of the tiny base takes half the time.
    """

    __array_ufunc__ = None  # so that array @ factor calls __rmatmul__

    def __init__(self, w: np.ndarray):
        self.w = w

    @property
    def T(self) -> EinsumFactor:
        """The transposed matrix."""
        return EinsumFactor(self.w.T)

    def __rmatmul__(self, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.einsum("nk,km->nm", x, self.w))  # order="C" would take twice the time


def adds_products(w: Array) -> bool:
    """True if `factor(w)` can add a product to an existing array at no cost: one of oneDNN can."""
    return getattr(w, "in_bfloat16", False) if is_packed(w) else isinstance(fast_factor(w), onednn.Factor)
