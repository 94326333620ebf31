"""Matmuls of float32 rows with a frozen matrix in bfloat16: what `ml.load(name, dtype="bfloat16")` computes with.

A bfloat16 is the upper half of a float32: its sign, its exponent, and 7 of the 23 bits of its fraction. Processors with
AMX or AVX512-BF16 multiply bfloat16, and accumulate in float32, faster than they multiply float32. NumPy has neither
the type nor the matmul. oneDNN has both (pip install 'minilora[bf16]'), and is called through its C interface.

How large is the error? Rounding to the nearest bfloat16 changes a value by at most the factor u = 2⁻⁸. With both
factors rounded, x w changes by at most (2u + u²) |x| |w|. Accumulating k products in float32 adds at most
k 2⁻²³ |x| |w|. Measured errors are far smaller, because they have both signs.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .backend import Array
from .parallel import cores, has_one_core

CPUINFO = Path("/proc/cpuinfo")
_NAMES = ("libdnnl.so.3", "libdnnl.so.3.7", "libdnnl.so.3.6")  # of the Python package, and of distributions


class BFloat16:
    """A matrix (m, n) in bfloat16 as a factor: `x @ w`, `x @ w.T` and `w @ x` of a float32 x are float32.

    bits: the upper halves of its float32 values, uint16 (m, n).
    """

    __array_ufunc__ = None  # so that array @ matrix calls __rmatmul__

    def __init__(self, bits: np.ndarray, transposed: bool = False):
        self.bits, self.transposed = bits, transposed

    @property
    def T(self) -> BFloat16:
        """The transposed matrix, with the same bits."""
        return BFloat16(self.bits, not self.transposed)

    @property
    def size(self) -> int:
        return self.bits.size

    def __rmatmul__(self, x: Array) -> Array:
        out = np.empty((len(x), self.bits.shape[0 if self.transposed else 1]), np.float32)
        _library().multiply(rounded(x), self.bits, self.transposed, out, 0.0)
        return out

    def __matmul__(self, x: Array) -> Array:
        return (x.T @ self.T).T  # w x = (xᵀ wᵀ)ᵀ

    def onto(self, out: Array, x: Array) -> Array:
        """out += x w, at the cost of the product alone; returns `out`."""
        _library().multiply(rounded(x), self.bits, self.transposed, out, 1.0)
        return out


def rounded(x: np.ndarray) -> np.ndarray:
    """The bits of the bfloat16s nearest to x: float32 of any shape -> uint16 of that shape. Ties go to even bits.

    Processors take values below 2⁻¹²⁶ for 0.
    """
    return _library().rounded(np.ascontiguousarray(x))


def to_float32(bits: np.ndarray) -> np.ndarray:
    """The values of bfloat16 bits: uint16 of any shape -> float32 of that shape, exactly."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


@cache
def why_not() -> str | None:
    """Why this machine cannot multiply in bfloat16, in a few words; None if it can."""
    try:
        _library()
    except _Missing as error:
        return str(error)
    return None


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
    return "this processor multiplies bfloat16, which is faster: --bf16 (pip install 'minilora[bf16]')"


# -- oneDNN ------------------------------------------------------------------------------------------------------------

_CPU, _IN_ORDER, _F32, _BF16 = 1, 1, 3, 2  # constants from oneapi/dnnl/dnnl_types.h
_FROM, _TO = 1, 17
_HAS_PRODUCTS = 0x80  # the bit that all instruction sets with bfloat16 matmuls have in common
_Place = ctypes.c_void_p


class _Argument(ctypes.Structure):
    _fields_ = (("what", ctypes.c_int), ("memory", _Place))


class _Made:
    """An object of oneDNN with the handle `place`, destroyed with its last reference."""

    def __init__(self, place: ctypes.c_void_p, destroy: Any):
        self.place, self._as_parameter_, self._destroy = place, place, destroy

    def __del__(self) -> None:
        self._destroy(self.place)


class _Missing(Exception):
    pass


class _Library:
    """What oneDNN does here: it rounds and it multiplies.

    Small calls keep the GIL, since releasing it takes longer than the call; a matmul releases it.
    """

    def __init__(self, path: str):
        with _patience():
            self._brief = brief = ctypes.PyDLL(path)
        try:
            self._set_threads = brief.omp_set_num_threads  # of its OpenMP, which has a setting for every thread
            self._gemm = ctypes.CDLL(path).dnnl_gemm_bf16bf16f32  # in no header, but exported by 3.2 and by 3.7
        except AttributeError as error:
            raise OSError(f"{path} is built in another way: {error}") from error
        if not brief.dnnl_get_effective_cpu_isa() & _HAS_PRODUCTS:
            raise _Missing("this processor has no matmul in bfloat16 (AMX, AVX512-BF16)")
        flag, size, number = ctypes.c_char, ctypes.c_int64, ctypes.c_float
        self._gemm.argtypes = (flag, flag, size, size, size, number, _Place, size, _Place, size, number, _Place, size)
        self._cores = cores()
        self._engine = self._new("engine", "engine_create", _CPU, ctypes.c_size_t(0))
        self._stream = self._new("stream", "stream_create", self._engine, _IN_ORDER)
        self._rounding = lru_cache(maxsize=256)(self._new_rounding)

    def multiply(self, x: np.ndarray, w: np.ndarray, transposed: bool, out: np.ndarray, beta: float) -> None:
        """out = beta · out + x w, or x wᵀ if w is transposed, of bits x (N, k), w (k, n) or (n, k), and out (N, n)."""
        (rows, k), n = x.shape, out.shape[1]
        if w.shape != ((n, k) if transposed else (k, n)):
            raise ValueError(f"x of shape {x.shape} cannot be multiplied by {w.shape}{'ᵀ' * transposed}")
        self._set_threads(1 if has_one_core.get() else self._cores)
        how, (at_x, at_w, at_out) = b"T" if transposed else b"N", (a.ctypes.data for a in (x, w, out))
        status = self._gemm(b"N", how, rows, n, k, 1.0, at_x, k, at_w, w.shape[1], beta, at_out, n)
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
    if status:
        raise RuntimeError(f"oneDNN could not {what}: status {status}")


@cache
def _library() -> _Library:
    if (where := (platform.system(), platform.machine())) != ("Linux", "x86_64"):
        raise _Missing(f"it needs Linux on x86_64, this is {' on '.join(where)}")
    own, reasons = Path(sys.prefix, "lib", _NAMES[0]), []
    for place in (str(own), *_NAMES) if own.exists() else _NAMES:
        try:
            return _Library(place)
        except OSError as error:
            reasons.append(str(error))
    raise _Missing(f"oneDNN is not installed ({reasons[0]}): pip install 'minilora[bf16]'")
