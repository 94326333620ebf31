"""Which library does an array belong to? NumPy's live on the host, CuPy's on a GPU; operations need not know.

An operation calls `array_module(x)` where it needs a *function* (`xp.exp`); operators and methods (`@`, `.sum()`)
belong to the array already. CuPy is imported only if a GPU is asked for by name.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from contextlib import suppress
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # a numpy.ndarray or a cupy.ndarray: both offer the same methods, neither has a common base class


@cache
def _module_of(array_type: type) -> ModuleType:
    return sys.modules[array_type.__module__.partition(".")[0]]


def array_module(x: Array) -> ModuleType:
    """Return the library `x` belongs to: `numpy` for a NumPy array, `cupy` for a CuPy one.

    >>> array_module(np.zeros(3)).__name__
    'numpy'
    """
    array_type: Any = type(getattr(x, "raw", x))  # a quantised matrix is where its bytes are
    return _module_of(array_type)


def is_packed(w: Array) -> bool:
    """True for a quantised matrix (files/quant.py), which is stored as bytes and dequantised for each matmul."""
    return hasattr(w, "unpack")


def dense(w: Array, start: int = 0, stop: int | None = None) -> Array:
    """The values of a matrix or of its rows start..stop: itself or a view, or a new array if it is packed."""
    if is_packed(w):
        return w.unpack(start, stop)
    return w[start:stop] if start or stop is not None else w


def to_device(x: Array, device: str = "cpu") -> Array:
    """Move an array, or the bytes of a packed one, to `"cpu"` or `"cuda"`. An array that is there is returned itself.

    Raises ValueError for another device name, and RuntimeError if CuPy or a GPU is missing.
    """
    if is_packed(x):
        return x.to(device)
    if device == "cpu":
        return to_numpy(x)
    if device != "cuda":
        raise ValueError(f"device {device!r} is unknown: use 'cpu' or 'cuda'")
    return _cupy().asarray(x)


def to_numpy(x: Array) -> np.ndarray:
    """Return `x` as a NumPy array: itself if it is one, a copy on the host if it is on a GPU."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


def owned(x: Array) -> Array:
    """`x` in C order and writable: itself, or a copy of a transposed view, or of zeros that take no memory."""
    x = array_module(x).asarray(x, order="C")
    return x if getattr(x.flags, "writeable", True) else x.copy()


def release_memory() -> None:
    """Give freed memory back to the system, where the C library keeps it for later: glibc's does, in each thread."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _cupy() -> ModuleType:
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as error:
        raise RuntimeError("device 'cuda' needs CuPy, which is not installed: pip install 'minilora[gpu]'") from error
    try:
        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy's own error type cannot be named before CuPy is imported
        reason = str(error).splitlines()[0]
        raise RuntimeError(
            f"device 'cuda' finds no usable GPU ({reason}): check nvidia-smi, or use device 'cpu'"
        ) from error
    return cupy
