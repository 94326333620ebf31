"""What multiplies: `x @ factor(w)`, with a matrix itself or what is faster than NumPy; a compiled loop for few rows."""

from __future__ import annotations

import math
import platform
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from . import onednn
from .backend import Array, is_packed
from .parallel import has_one_core, processors

HAS_BLAS = sys.platform != "emscripten"
COMPILED_ROWS = 16  # of x: for more, BLAS is faster than a compiled loop
SMALL, SHORT = 1 << 16, 256  # weights of a matrix, and of a row: with fewer NumPy is fast enough, and LLVM not loaded
CORES = 2  # with more of them BLAS is faster: the loop uses one


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


@cache
def compiles() -> bool:
    """True if loops can be compiled for this processor: see compiled.py."""
    try:
        from .compiled import runs_here
    except (ImportError, OSError):  # llvmlite is an extra; its own library may lack another one of the system
        return False
    return runs_here()


def hint() -> str | None:
    """What to install for compiled loops, in one line; None where they are there, or could not run."""
    if find_spec("llvmlite") is not None or platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    return "a 4-bit base answers in a fifth of the time with: pip install 'minilora[fast]'"


def is_compiled(rows: int, shape: tuple[int, ...]) -> bool:
    """True if x wᵀ is computed by a compiled loop, for this many rows of x and a w of this shape (m, n)."""
    return rows <= COMPILED_ROWS and math.prod(shape) >= SMALL and shape[-1] >= SHORT and compiles()


def product_of_few(x: Array, w: Array) -> Array | None:
    """x wᵀ for a few rows of x by a compiled loop, (N, n) and (m, n) -> (N, m); None where BLAS does it."""
    if not isinstance(w, np.ndarray) or not x.dtype == w.dtype == np.float32 or processors() > CORES:
        return None
    if not is_compiled(len(x), w.shape):
        return None
    from . import few_rows

    return few_rows.product(x, w)


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
