"""oneDNN, a library of matmuls, called through its C interface, on Linux and x86_64.

It multiplies bfloat16, which NumPy cannot (bfloat16.py). With AVX-512 it also multiplies float32 faster than OpenBLAS,
NumPy's own library: a LoRA step of SmolLM2 takes 0.88 of the time. In the environment, ONEDNN_MAX_CPU_ISA=AVX2
switches both off.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from .backend import Array
from .parallel import cores, has_one_core

_NAMES = ("libdnnl.so.3", "libdnnl.so.3.7", "libdnnl.so.3.6")  # of the Python package, and of distributions
LEAST = 1 << 16  # values of a float32 matrix: with fewer, the call takes longer than is gained


class Factor:
    """A matrix as the right factor of a matmul that oneDNN computes: `x @ w` and `x @ w.T` of a float32 x are float32.

    stored: its values (m, n), in order. transposed: the factor is the transpose of what is stored.
    """

    __array_ufunc__ = None  # so that array @ factor calls __rmatmul__

    def __init__(self, stored: np.ndarray, transposed: bool = False):
        self.stored, self.transposed = stored, transposed

    @property
    def T(self) -> Self:
        """The transposed matrix, with the same values."""
        return type(self)(self.stored, not self.transposed)

    def left(self, x: Array) -> Array:
        """x as `Library.multiply` takes it."""
        return np.ascontiguousarray(x)

    def __rmatmul__(self, x: Array) -> Array:
        out = np.empty((len(x), self.stored.shape[0 if self.transposed else 1]), np.float32)
        library().multiply(self.left(x), self.stored, self.transposed, out, 0.0)
        return out

    def onto(self, out: Array, x: Array) -> Array:
        """out += x w, at the cost of the product alone; returns `out`."""
        library().multiply(self.left(x), self.stored, self.transposed, out, 1.0)
        return out


def float32_factor(w: Array) -> Factor | None:
    """w as a factor, if it is a float32 matrix whose products oneDNN computes faster than NumPy; None otherwise."""
    is_matrix = isinstance(w, np.ndarray) and w.dtype == np.float32 and w.ndim == 2 and w.flags.c_contiguous
    return Factor(w) if is_matrix and w.size >= LEAST and _is_faster() else None


@cache
def _is_faster() -> bool:
    try:
        return library().has(AVX512)
    except Missing:
        return False


_CPU, _IN_ORDER, _F32, _BF16 = 1, 1, 3, 2  # constants from oneapi/dnnl/dnnl_types.h
_FROM, _TO = 1, 17
_OUT_OF_MEMORY = 1
BFLOAT16, AVX512 = 0x80, 0x20  # bits that all instruction sets with bfloat16 matmuls, or with AVX-512, have in common
_Place = ctypes.c_void_p


class _Argument(ctypes.Structure):
    _fields_ = (("what", ctypes.c_int), ("memory", _Place))


class _Made:
    """An object of oneDNN with the handle `place`, destroyed with its last reference."""

    def __init__(self, place: ctypes.c_void_p, destroy: Any):
        self.place, self._as_parameter_, self._destroy = place, place, destroy

    def __del__(self) -> None:
        self._destroy(self.place)


class Missing(Exception):
    """oneDNN cannot be called here; the message says why."""


class Library:
    """What oneDNN does here: it rounds and it multiplies.

    Small calls keep the GIL, since releasing it takes longer than the call; a matmul releases it.
    """

    def __init__(self, path: str):
        with _patience():
            self._brief = brief = ctypes.PyDLL(path)
        try:
            self._set_threads = brief.omp_set_num_threads  # of its OpenMP, which has a setting for every thread
            releasing = ctypes.CDLL(path)
            bf16, f32 = releasing.dnnl_gemm_bf16bf16f32, releasing.dnnl_sgemm  # the first is in no header, but exported
        except AttributeError as error:
            raise OSError(f"{path} is built in another way: {error}") from error
        self._isa = brief.dnnl_get_effective_cpu_isa()  # ONEDNN_MAX_CPU_ISA in the environment limits it
        flag, size, number = ctypes.c_char, ctypes.c_int64, ctypes.c_float
        for gemm in (bf16, f32):
            gemm.argtypes = (flag, flag, size, size, size, number, _Place, size, _Place, size, number, _Place, size)
        self._gemms = {np.dtype(np.uint16): bf16, np.dtype(np.float32): f32}
        self._engine = self._new("engine", "engine_create", _CPU, ctypes.c_size_t(0))
        self._stream = self._new("stream", "stream_create", self._engine, _IN_ORDER)
        self._rounding = lru_cache(maxsize=256)(self._new_rounding)

    @cached_property
    def _cores(self) -> int:  # looked up outside of several threads, in which NumPy's library has one
        return cores()

    def has(self, instructions: int) -> bool:
        """Whether the processor has them, and oneDNN uses them."""
        return bool(self._isa & instructions)

    def multiply(self, x: np.ndarray, w: np.ndarray, transposed: bool, out: np.ndarray, beta: float) -> None:
        """out = beta · out + x w, or x wᵀ if w is transposed      x (N, k)  w (k, n) or (n, k)  out (N, n) float32

        x and w are both float32, or both the bits of bfloat16, and all are in order.
        """
        (rows, k), n = x.shape, out.shape[1]
        if x.dtype != w.dtype:
            raise ValueError(f"x is {x.dtype} and the other factor {w.dtype}: oneDNN multiplies equal types")
        if w.shape != ((n, k) if transposed else (k, n)):
            raise ValueError(f"x of shape {x.shape} cannot be multiplied by {w.shape}{'ᵀ' * transposed}")
        self._set_threads(1 if has_one_core.get() else self._cores)
        how, (at_x, at_w, at_out) = b"T" if transposed else b"N", (a.ctypes.data for a in (x, w, out))
        status = self._gemms[x.dtype](b"N", how, rows, n, k, 1.0, at_x, k, at_w, w.shape[1], beta, at_out, n)
        _check(status, "multiply")

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """As the function `rounded`, for a contiguous x."""
        out = np.empty(x.shape, np.uint16)
        self._set_threads(1)  # waking a second thread takes longer than rounding
        rounding, ends = self._rounding(x.size)
        there, here = (
            self._new("memory", "memory_create", end, self._engine, _Place(array.ctypes.data))
            for end, array in zip(ends, (x, out), strict=True)
        )
        arguments = (_Argument * 2)(_Argument(_FROM, there.place), _Argument(_TO, here.place))
        _check(self._brief.dnnl_primitive_execute(rounding, self._stream, 2, arguments), "round")
        return out

    def _new_rounding(self, size: int) -> tuple[_Made, list[_Made]]:
        """The primitive that rounds `size` values, and the descriptions of its input and output."""
        sizes, described = ctypes.c_int64 * 12, "memory_desc_create_with_strides"
        ends = [self._new("memory_desc", described, 1, sizes(size), kind, sizes(1)) for kind in (_F32, _BF16)]
        way = (ends[0], self._engine, ends[1], self._engine, None)
        how = self._new("primitive_desc", "reorder_primitive_desc_create", *way)
        return self._new("primitive", "primitive_create", how), ends

    def _new(self, kind: str, create: str, *arguments: Any) -> _Made:
        place = _Place()
        _check(getattr(self._brief, f"dnnl_{create}")(ctypes.byref(place), *arguments), f"make a {kind}")
        return _Made(place, getattr(self._brief, f"dnnl_{kind}_destroy"))


@contextmanager
def _patience() -> Iterator[None]:
    """A block in which OpenMP is loaded with a spin time of half a millisecond, unless the environment has another.

    Its default is about ten: a thread that waits for others then keeps a core from them if other programs run, too.
    """
    given = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    if not given:
        os.environ["GOMP_SPINCOUNT"] = "10000"
    try:
        yield
    finally:
        if not given:
            del os.environ["GOMP_SPINCOUNT"]


def _check(status: int, what: str) -> None:
    if status == _OUT_OF_MEMORY:
        raise MemoryError
    if status:
        raise RuntimeError(f"oneDNN could not {what}: status {status}")


@cache
def library() -> Library:
    """oneDNN, loaded once. Raises Missing where it is not installed, or does not run."""
    if (where := (platform.system(), platform.machine())) != ("Linux", "x86_64"):
        raise Missing(f"it needs Linux on x86_64, this is {' on '.join(where)}")
    own, reasons = Path(sys.prefix, "lib", _NAMES[0]), []
    for place in (str(own), *_NAMES) if own.exists() else _NAMES:
        try:
            return Library(place)
        except OSError as error:
            reasons.append(str(error))
    advice = "pip install onednn-cpu-gomp, or your system's libdnnl"
    if "libgomp" in reasons[0]:  # containers such as python:slim come without it
        advice = "install GCC's OpenMP library, libgomp (Debian and Ubuntu: apt-get install libgomp1)"
    raise Missing(f"oneDNN cannot be loaded ({reasons[0]}): {advice}")
