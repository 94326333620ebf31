"""The elementary operations: each a function of arrays with its value and its gradients side by side.

The lessons derive these, and the fused operations are checked against them. How to read one: it returns the value,
followed by one VJP per array input, in the order of the inputs. `g` is dL/d(value); a VJP returns dL/d(input).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .backend import Array, array_module, owned
from .tensor import Operation, Tensor, Vjp, is_recording, op


def sum_to(x: Any) -> Vjp:
    """Undo broadcasting: a function that sums a gradient over the axes along which the input `x` was broadcast.

    Broadcasting uses an element several times, and the gradient is then the sum over its uses. The function captures
    x's shape, not x, so it keeps no array alive.
    """
    shape = getattr(x, "shape", ())

    def summed(g: Array) -> Array:
        if g.shape == shape:
            return g
        g = g.sum(axis=tuple(range(g.ndim - len(shape))))
        stretched = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
        return g.sum(axis=stretched, keepdims=True) if stretched else g

    return summed


# -- arithmetic ----------------------------------------------------------------------------------------------------


@op
def add(a, b):
    """a + b, with broadcasting."""
    return a + b, sum_to(a), sum_to(b)


@op
def sub(a, b):
    """a - b, with broadcasting."""
    to_a, to_b = sum_to(a), sum_to(b)
    return a - b, to_a, lambda g: to_b(-g)


@op
def mul(a, b):
    """a * b elementwise, with broadcasting."""
    to_a, to_b = sum_to(a), sum_to(b)
    return a * b, lambda g: to_a(g * b), lambda g: to_b(g * a)


@op
def div(a, b):
    """a / b elementwise, with broadcasting."""
    to_a, to_b, y = sum_to(a), sum_to(b), a / b
    return y, lambda g: to_a(g / b), lambda g: to_b(-g * y / b)  # b * b may overflow


@op
def neg(a):
    """-a."""
    return -a, lambda g: -g


@op
def pow(a, exponent: float):
    """a ** exponent, for a constant number as the exponent."""
    if np.shape(exponent):
        raise TypeError(f"pow: the exponent must be a number, got shape {np.shape(exponent)}: use (x.log() * y).exp()")
    less = exponent - 1 if exponent else 0  # a ** 0 is constant, also at 0
    return a**exponent, lambda g: g * exponent * a**less


@op
def matmul(a, b):
    """a @ b      a (..., n, k)  b (..., k, m)  ->  (..., n, m); leading axes broadcast; 1-D operands as in NumPy."""
    if a.ndim == 1 and b.ndim == 1:  # (k) · (k) -> ()
        return a @ b, lambda g: g * b, lambda g: g * a
    to_a, to_b = sum_to(a), sum_to(b)
    if b.ndim == 1:  # (..., n, k) · (k) -> (..., n)
        return a @ b, lambda g: g[..., None] * b, lambda g: to_b(g[..., None] * a)
    if a.ndim == 1:  # (k) · (..., k, m) -> (..., m)
        return a @ b, lambda g: to_a((b @ g[..., None])[..., 0]), lambda g: a[:, None] * g[..., None, :]

    def da(g):
        return to_a(g @ b.swapaxes(-1, -2))

    def db(g):
        return to_b(a.swapaxes(-1, -2) @ g)

    return a @ b, da, db


# -- elementwise functions -----------------------------------------------------------------------------------------


@op
def exp(a):
    """e ** a. Saves its value, which is also its derivative."""
    y = array_module(a).exp(a)
    return y, lambda g: g * y


@op
def log(a):
    """The natural logarithm."""
    return array_module(a).log(a), lambda g: g / a


@op
def sqrt(a):
    """The square root."""
    y = array_module(a).sqrt(a)
    return y, lambda g: g / (2 * y)


@op
def tanh(a):
    """The hyperbolic tangent."""
    y = array_module(a).tanh(a)
    return y, lambda g: g * (1 - y * y)


@op
def relu(a):
    """max(a, 0). The gradient at exactly 0 is 0, as in PyTorch."""
    return array_module(a).maximum(a, 0), lambda g: g * (a > 0)


@op
def sigmoid(a):
    """1 / (1 + e ** -a), and 0 where e ** -a is infinite."""
    with np.errstate(over="ignore"):
        y = 1 / (1 + array_module(a).exp(-a))
    return y, lambda g: g * y * (1 - y)


# -- sums ----------------------------------------------------------------------------------------------------------


@op
def sum(a, axis: int | tuple[int, ...] | None = None, keepdims: bool = False):
    """The sum over `axis`, or of everything."""
    return _reduced(a, a.sum(axis=axis, keepdims=keepdims), axis, keepdims, 1.0)


@op
def mean(a, axis: int | tuple[int, ...] | None = None, keepdims: bool = False):
    """The mean over `axis`, or of everything."""
    y = a.mean(axis=axis, keepdims=keepdims)
    return _reduced(a, y, axis, keepdims, y.size / a.size if a.size else 1.0)


def _reduced(a: Array, y: Array, axis: Any, keepdims: bool, weight: float) -> tuple[Array, Vjp]:
    xp, shape = array_module(a), a.shape

    def da(g):  # every element contributes once, with the same weight
        if axis is not None and not keepdims:
            g = xp.expand_dims(g, axis)
        return xp.broadcast_to(g if weight == 1.0 else g * weight, shape)

    return xp.asarray(y), da


@op
def max(a, axis: int | None = None, keepdims: bool = False):
    """The largest element along `axis`. If several are equal, they share the gradient evenly."""
    xp = array_module(a)
    top = a.max(axis=axis, keepdims=True)
    y = top if keepdims else xp.asarray(a.max(axis=axis))

    def da(g):
        if axis is not None and not keepdims:
            g = xp.expand_dims(g, axis)
        hit = (a == top).astype(a.dtype)
        return hit * (g / hit.sum(axis=axis, keepdims=True))

    return y, da


@op
def softmax(a, axis: int = -1):
    """e ** a / Σ e ** a along `axis`. The largest element is subtracted first, so that nothing overflows."""
    y = array_module(a).exp(a - a.max(axis=axis, keepdims=True))
    y /= y.sum(axis=axis, keepdims=True)
    return y, lambda g: y * (g - (g * y).sum(axis=axis, keepdims=True))


@op
def log_softmax(a, axis: int = -1):
    """The logarithm of `softmax` along `axis`, which is finite where softmax(a) is rounded to 0. Saves its value."""
    xp = array_module(a)
    y = a - a.max(axis=axis, keepdims=True)
    y -= xp.log(xp.exp(y).sum(axis=axis, keepdims=True))
    return y, lambda g: g - xp.exp(y) * g.sum(axis=axis, keepdims=True)


# -- shapes --------------------------------------------------------------------------------------------------------


@op
def reshape(a, shape: tuple[int, ...]):
    """The same elements in another shape; one length may be -1."""
    old = a.shape
    return a.reshape(shape), lambda g: g.reshape(old)


@op
def transpose(a, axes: Sequence[int] | None = None):
    """Permute the axes; without `axes`, reverse them."""
    xp = array_module(a)
    back = None if axes is None else tuple(int(i) for i in np.argsort([i % a.ndim for i in axes]))
    return xp.transpose(a, axes), lambda g: xp.transpose(g, back)


@op
def getitem(a, index: Any):
    """a[index], for any index NumPy accepts. An element selected twice receives both gradients."""
    xp, shape, dtype = array_module(a), a.shape, a.dtype
    parts = index if isinstance(index, tuple) else (index,)
    once = all(part is None or part is Ellipsis or isinstance(part, (int, slice)) for part in parts)

    def da(g):
        out = xp.zeros(shape, dtype)
        if once:  # no element is selected twice
            out[index] = g
        else:
            xp.add.at(out, index, g)
        return out

    return xp.asarray(a[index]), da


@op
def concatenate(*arrays, axis: int = 0):
    """Join arrays along an existing axis."""
    xp = array_module(arrays[0])
    ends = np.cumsum([a.shape[axis] for a in arrays]).tolist()

    def part(start: int, end: int) -> Vjp:
        return lambda g: xp.moveaxis(xp.moveaxis(g, axis, 0)[start:end], 0, axis)

    return xp.concatenate(arrays, axis=axis), *(part(s, e) for s, e in zip([0, *ends], ends, strict=False))


# -- the operators of Tensor -----------------------------------------------------------------------------------------


def _swapped(operation: Operation) -> Callable[[Any, Any], Tensor]:
    return lambda self, other: operation(other, self)


def _in_place(operation: Operation) -> Callable[[Tensor, Any], Any]:
    """x -= y and the like: it changes the array of a leaf or a parameter, as in PyTorch; of others it is x = x - y.

    A graph that was computed from x before uses the changed values in its backward pass. PyTorch raises there.
    """

    def change(self: Tensor, other: Any) -> Any:
        leaf = self.node is not None and self.node.edges == []
        if not (leaf or self.changes_in_place):
            return NotImplemented
        if leaf and is_recording():
            raise TypeError("a tensor that requires a gradient is changed in place: do it inside ml.no_grad()")
        changed = operation(self, other).data
        if changed.shape != self.shape:
            raise ValueError(f"a tensor of shape {self.shape} cannot take values of shape {changed.shape}")
        self.data = owned(self.data)
        self.data[...] = changed
        return self

    return change


def _comparison(compare: Callable[[Any, Any], Any]) -> Callable[[Tensor, Any], Any]:
    """x > 0 and the like: an array of booleans, which has no gradient."""
    return lambda self, other: compare(self.data, other.data if isinstance(other, Tensor) else other)


def _reshape(self: Tensor, *shape: Any) -> Tensor:  # x.reshape(2, 3) and x.reshape((2, 3))
    return reshape(self, shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape)


_class: Any = Tensor  # whose methods a type checker reads in tensor.py
_class.__add__, _class.__radd__ = add, _swapped(add)
_class.__sub__, _class.__rsub__ = sub, _swapped(sub)
_class.__mul__, _class.__rmul__ = mul, _swapped(mul)
_class.__truediv__, _class.__rtruediv__ = div, _swapped(div)
_class.__iadd__, _class.__isub__ = _in_place(add), _in_place(sub)
_class.__imul__, _class.__itruediv__ = _in_place(mul), _in_place(div)
_class.__matmul__, _class.__rmatmul__ = matmul, _swapped(matmul)
_class.__neg__, _class.__pow__, _class.__getitem__ = neg, pow, getitem
_class.__lt__, _class.__le__ = _comparison(operator.lt), _comparison(operator.le)
_class.__gt__, _class.__ge__ = _comparison(operator.gt), _comparison(operator.ge)
_class.__eq__, _class.__ne__ = _comparison(operator.eq), _comparison(operator.ne)
_class.__hash__ = object.__hash__
_class.exp, _class.log, _class.sqrt, _class.tanh = exp, log, sqrt, tanh
_class.relu, _class.sigmoid, _class.softmax, _class.log_softmax = relu, sigmoid, softmax, log_softmax
_class.sum, _class.mean, _class.max = sum, mean, max
_class.reshape, _class.transpose, _class.T = _reshape, transpose, property(lambda self: transpose(self))
