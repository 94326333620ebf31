"""A stand-in for CuPy on machines without a GPU: arrays that compute with NumPy and refuse what a GPU's array refuses.

    np.asarray(x), np.exp(x)     TypeError: only `x.get()` copies an array to the host
    x + numpy_array              TypeError, in operators, functions, indices and assignments
    x.sum(), x[0]                zero-dimensional arrays of the device, never Python or NumPy scalars
    xp.fromiter, x.tobytes()     AttributeError: what CuPy lacks, or does differently, is not here

This module plays the part of `cupy`: `array_module(x)` returns it for its own arrays. It counts every crossing between
host and device in `crossings`: arrays sent by `asarray`, arrays and scalars fetched (`get`, `float`, `bool`, `item`),
and what makes the host wait for a size (`nonzero`, indexing with a mask).
"""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np

float16, float32, float64, complex128, bool_ = np.float16, np.float32, np.float64, np.complex128, np.bool_
int8, int16, int32, int64, uint8, uint16, uint32 = np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32
inf, nan, pi, newaxis, finfo = np.inf, np.nan, np.pi, None, np.finfo

crossings: list[str] = []


@contextmanager
def counting():
    """The list of crossings inside this block."""
    start, found = len(crossings), []
    try:
        yield found
    finally:
        found += crossings[start:]


def _host(x, what="this function"):
    """The NumPy array inside `x`; scalars, None, dtypes and strings as they are; sequences item by item."""
    if isinstance(x, ndarray):
        return x._host
    if isinstance(x, np.ndarray):
        raise TypeError(f"{what} got a NumPy array where one of the device is needed")
    return type(x)(_host(item, what) for item in x) if isinstance(x, (tuple, list)) else x


def _device(x):
    """A NumPy result as an array of the device."""
    if isinstance(x, tuple):
        return tuple(_device(item) for item in x)
    return ndarray(np.asarray(x))


class ndarray:
    """An array of the device. `_host`, which holds its values, is for this module only."""

    __array_priority__ = 100  # CuPy's
    __array_ufunc__ = None  # a NumPy array's operators leave the work to this class, which refuses it
    __hash__ = None

    def __init__(self, host):
        self._host = host

    def __array__(self, *args, **kwargs):
        raise TypeError("implicit conversion to a NumPy array is not allowed: use .get()")

    # -- to the host ----------------------------------------------------------------------------------------------
    def get(self):
        crossings.append("get")
        return self._host.copy()

    def item(self):
        crossings.append("item")
        return self._host.item()

    def tolist(self):
        crossings.append("tolist")
        return self._host.tolist()

    def __float__(self):
        crossings.append("float")
        return float(self._host)

    def __int__(self):
        crossings.append("int")
        return int(self._host)

    def __bool__(self):
        crossings.append("bool")
        return bool(self._host)

    def __format__(self, spec):
        crossings.append("format")
        return format(self._host, spec)

    def __repr__(self):
        return f"strictarray.{self._host!r}"

    # -- shape and kind -------------------------------------------------------------------------------------------
    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    flags = property(lambda self: self._host.flags)
    T = property(lambda self: ndarray(self._host.T))
    base = property(lambda self: None if self._host.base is None else ndarray(self._host.base))

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    # -- parts ----------------------------------------------------------------------------------------------------
    def __getitem__(self, key):
        return _device(self._host[_key(key)])

    def __setitem__(self, key, value):
        self._host[_key(key)] = _host(value, "an assignment")

    def nonzero(self):
        crossings.append("nonzero")  # the host must wait for their number
        return _device(self._host.nonzero())


def _method(name, *allowed):
    """A method of NumPy's arrays with those keywords that CuPy's has too."""

    def method(self, *args, **settings):
        if unknown := set(settings) - set(allowed):
            raise TypeError(f"{name} has no argument {unknown.pop()!r} in CuPy")
        settings = {key: _host(value, name) for key, value in settings.items()}
        return _device(getattr(self._host, name)(*_host(args, name), **settings))

    return method


_REDUCTIONS = dict(sum="axis dtype out keepdims", mean="axis dtype out keepdims", max="axis out keepdims",
                   min="axis out keepdims", any="axis out keepdims", all="axis out keepdims")  # fmt: skip
for _name, _allowed in dict(
    astype="order copy", reshape="order", transpose="", swapaxes="", ravel="order", copy="order", view="", fill="",
    take="axis out", repeat="axis", cumsum="axis dtype out", argmax="axis keepdims", **_REDUCTIONS,
).items():  # fmt: skip
    setattr(ndarray, _name, _method(_name, *_allowed.split()))


def _key(key):
    """An index of NumPy's own. Arrays in it must be of the device; a mask makes the host wait for the size."""
    items = key if isinstance(key, tuple) else (key,)
    if any(isinstance(item, ndarray) and item.dtype == np.bool_ for item in items):
        crossings.append("mask")
    return _host(key, "an index")


def _operator(name, in_place):
    def operate(self, other):
        if not isinstance(other, (ndarray, int, float, np.generic)):
            if isinstance(other, np.ndarray):
                raise TypeError(f"{name} of an array of the device and a NumPy array")
            return NotImplemented
        if not in_place and getattr(other, "__array_priority__", 0) > self.__array_priority__:
            return NotImplemented
        result = getattr(self._host, name)(_host(other))
        return self if in_place else _device(result)

    return operate


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul",
              "and", "or", "xor", "lshift", "rshift"):  # fmt: skip
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__", in_place=False))
    setattr(ndarray, f"__r{_name}__", _operator(f"__r{_name}__", in_place=False))
    if _name != "matmul":  # CuPy's arrays have no @=
        setattr(ndarray, f"__i{_name}__", _operator(f"__i{_name}__", in_place=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__", in_place=False))
for _name in ("neg", "pos", "abs", "invert"):
    setattr(ndarray, f"__{_name}__", lambda self, name=f"__{_name}__": _device(getattr(self._host, name)()))


# -- the module's functions --------------------------------------------------------------------------------------------


def asarray(a, dtype=None, order=None):
    """Copy to the device: the only function that takes a NumPy array."""
    if isinstance(a, ndarray):
        host = np.asarray(a._host, dtype, order)
        return a if host is a._host else ndarray(host)
    crossings.append("asarray")
    return ndarray(np.array(a, dtype, order=order or "K"))


def array(obj, dtype=None, copy=True, order="K"):
    """A new array of the device."""
    return ndarray(np.array(obj._host, dtype, order=order)) if isinstance(obj, ndarray) else asarray(obj, dtype)


def _function(name, of):
    real = getattr(of, name)

    def function(*args, out=None, **kwargs):
        args = _host(args, name)
        if out is not None:
            real(*args, out=_host(out, name), **kwargs)
            return out
        return _device(real(*args, **{key: _host(value, name) for key, value in kwargs.items()}))

    function.__name__ = name
    return function


def _ufunc(name):
    function, real = _function(name, np), getattr(np, name)

    def ufunc(*args, **kwargs):
        if not any(isinstance(x, ndarray) for x in args):
            raise TypeError(f"{name} got no array of the device")
        return function(*args, **kwargs)

    ufunc.at = lambda a, indices, b: real.at(a._host, _key(indices), _host(b, f"{name}.at"))
    return ufunc


_UFUNCS = (
    "add", "subtract", "multiply", "divide", "maximum", "minimum", "exp", "log", "sqrt", "tanh", "cos", "sin", "abs",
    "isfinite", "logaddexp", "matmul",
)  # fmt: skip
_FUNCTIONS = (
    "arange", "empty", "zeros", "ones", "full", "empty_like", "zeros_like", "ones_like", "full_like", "where", "einsum",
    "concatenate", "stack", "expand_dims", "broadcast_to", "moveaxis", "transpose", "swapaxes", "argsort",
    "ascontiguousarray", "unpackbits",
)  # fmt: skip


def __getattr__(name):
    raise AttributeError(f"CuPy has no {name} like NumPy's, or nothing needed it: add it to tests/strictarray.py")


globals().update({name: _ufunc(name) for name in _UFUNCS} | {name: _function(name, np) for name in _FUNCTIONS})


# -- its submodules ----------------------------------------------------------------------------------------------------

linalg = SimpleNamespace(**{name: _function(name, np.linalg) for name in ("svd", "qr", "norm")})
cuda = SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=lambda: 1))


class _Generator:
    """The part of CuPy's random generator that is like NumPy's."""

    def __init__(self, seed):
        self._real = np.random.default_rng(seed)

    def random(self, size=None, dtype=np.float64, out=None):
        return _device(self._real.random(size, dtype))


random = SimpleNamespace(default_rng=_Generator)
