"""Reverse-mode automatic differentiation: values, the graph behind them, and the walk back through it.

An operation is a plain function of arrays. It returns its value and one VJP (vector-Jacobian product) for each array
input: a function that takes g = dL/d(value) and returns dL/d(input). `@op` turns it into a function of tensors that
records, for every input that needs a gradient, an edge (parent node, VJP). The VJP of an input that needs none is
dropped on the spot, and with it Python frees every array that only this VJP had captured. Freezing a weight therefore
saves memory without a line of code in any operation; it is LoRA's saving, and it happens here.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from .backend import Array, array_module

Vjp = Callable[[Array], Array]

_clock = itertools.count()
_recording: ContextVar[bool] = ContextVar("recording", default=True)
OPS: dict[str, Callable] = {}  # every @op by name; the tests demand a gradient check for each


class Node:
    """One place in the graph: edges to the nodes it was computed from, and the gradient that has arrived so far.

    It never holds the tensor's value: if it did, dropping a VJP would free nothing. `edges` is empty for a leaf and
    None once backward has run through the node. `number` grows with time, so a parent is always older than its child.
    """

    __slots__ = ("__weakref__", "again", "edges", "grad", "number", "owned")

    def __init__(self, edges: list[tuple[Node, Vjp]]):
        self.edges: list[tuple[Node, Vjp]] | None = edges
        self.grad: Array | None = None
        self.again: Callable[[], Array] | None = None  # computes the value once more, where that is cheap: `cheap_op`
        self.number = next(_clock)
        self.owned = False  # may `grad` be added to in place, or might somebody else be reading it?

    def receive(self, grad: Array, fresh: bool) -> None:
        """Add one more contribution. fresh: nobody else holds this array, so that it may be written to."""
        if self.grad is None:
            self.grad, self.owned = grad, fresh
        elif self.owned:
            self.grad += grad
        else:
            self.grad = self.grad + grad
            self.owned = True


class Tensor:
    """An array and, if a gradient is wanted, its node in the graph.

    data: anything NumPy turns into an array. Python floats, and Python integers given with `requires_grad=True`, become
    float32; arrays are kept as they are, without a copy.

    >>> x = Tensor([1.0, 2.0, 3.0], requires_grad=True)
    >>> (x * x).sum().backward()
    >>> x.grad
    array([2., 4., 6.], dtype=float32)
    """

    __slots__ = ("__weakref__", "data", "node")
    __array_priority__ = 1000.0  # array + tensor must reach Tensor.__radd__; CuPy's own arrays have 100

    def __init__(self, data: Any, requires_grad: bool = False, node: Node | None = None):
        if not isinstance(data, np.ndarray):  # the usual case, in a hurry
            data = _as_array(data, requires_grad)
        self.data: Array = data
        self.node = node
        if requires_grad:
            self.requires_grad = True

    # -- what it is ------------------------------------------------------------------------------------------------
    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.data!r}{', requires_grad=True' if self.requires_grad else ''})"

    def item(self) -> float:
        """The one number this tensor holds, as a Python scalar."""
        return self.data.item()

    def detach(self) -> Tensor:
        """The same array, cut off from the graph."""
        return Tensor(self.data)

    # -- gradients -------------------------------------------------------------------------------------------------
    @property
    def requires_grad(self) -> bool:
        return self.node is not None

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if not wanted:
            self.node = None
        elif self.node is None:
            if self.data.dtype.kind != "f":
                raise TypeError(f"only floating-point tensors can require a gradient, got {self.data.dtype}")
            self.node = Node([])

    @property
    def grad(self) -> Array | None:
        """dL/d(this), after `backward`. Kept for leaves only; what lies between is freed as backward passes it."""
        return None if self.node is None else self.node.grad

    @grad.setter
    def grad(self, value: Array | None) -> None:
        if self.node is None:
            raise RuntimeError("a tensor that requires no gradient has none to set")
        self.node.grad = value
        self.node.owned = False

    def backward(self, grad: Array | None = None) -> None:
        """Compute dL/dx for every leaf x that this tensor depends on, and add it to `x.grad`.

        grad: dL/d(this), of this tensor's shape; may be left out for a tensor with a single element (then it is 1).
        The graph is consumed: arrays saved for backward are freed as the walk passes them, and a second call raises
        RuntimeError.
        """
        for leaf, leaf_grad in walk_back(self, grad):
            leaf.receive(leaf_grad, fresh=True)

    # -- operators: put in place by ops.py, which defines what they mean ---------------------------------------------
    if TYPE_CHECKING:
        T: Tensor

        def __add__(self, other: Any) -> Tensor: ...
        def __radd__(self, other: Any) -> Tensor: ...
        def __sub__(self, other: Any) -> Tensor: ...
        def __rsub__(self, other: Any) -> Tensor: ...
        def __mul__(self, other: Any) -> Tensor: ...
        def __rmul__(self, other: Any) -> Tensor: ...
        def __truediv__(self, other: Any) -> Tensor: ...
        def __rtruediv__(self, other: Any) -> Tensor: ...
        def __matmul__(self, other: Any) -> Tensor: ...
        def __rmatmul__(self, other: Any) -> Tensor: ...
        def __neg__(self) -> Tensor: ...
        def __pow__(self, exponent: float) -> Tensor: ...
        def __getitem__(self, index: Any) -> Tensor: ...
        def reshape(self, *shape: Any) -> Tensor: ...
        def sum(self, axis: Any = None, keepdims: bool = False) -> Tensor: ...
        def mean(self, axis: Any = None, keepdims: bool = False) -> Tensor: ...


def walk_back(y: Tensor, grad: Array | None = None) -> Iterator[tuple[Node, Array]]:
    """Walk back through the graph behind `y`; yield (leaf, gradient) for every gradient that arrives at a leaf.

    What `Tensor.backward` adds to each leaf's `.grad`, and others may add up elsewhere. A leaf comes once for each of
    its uses, and each gradient is an array of its own. Arguments, errors and what is freed: as for `Tensor.backward`.
    """
    if y.node is None:
        raise RuntimeError(
            "backward() on a tensor that depends on nothing trainable: set requires_grad=True on an input, "
            "add an adapter, or leave no_grad()"
        )
    if grad is None:
        if y.data.size != 1:
            raise ValueError(f"backward() needs a gradient for a tensor of shape {y.shape}; reduce it to a scalar")
        grad = array_module(y.data).ones(y.shape, y.dtype)
    elif grad.shape != y.shape:
        raise ValueError(f"the gradient has shape {grad.shape}, the tensor {y.shape}")
    nodes = _reachable(y.node)
    if not y.node.edges:
        yield y.node, array_module(grad).array(grad)
        return
    y.node.receive(grad, fresh=False)
    for node in sorted(nodes, key=attrgetter("number"), reverse=True):  # youngest first: children before parents
        if not (edges := node.edges):
            continue  # a leaf
        g, node.edges, node.grad, node.again = node.grad, None, None, None
        edges.reverse()
        while edges:  # popped one by one: what only this VJP had captured is freed before the next one runs
            parent, vjp = edges.pop()
            part = vjp(g)
            fresh = part is not g and part.base is None  # a VJP may return g, a view, or a fresh array
            if parent.edges:
                parent.receive(part, fresh)
            else:
                yield parent, part if fresh and part.ndim else array_module(part).array(part)
            del part


def leaves(start: Node) -> list[Node]:
    """The leaves that `start` was computed from, oldest first."""
    return sorted((node for node in _reachable(start) if not node.edges), key=attrgetter("number"))


def _reachable(start: Node) -> set[Node]:
    found, stack = {start}, [start]
    while stack:
        edges = stack.pop().edges
        if edges is None:
            raise RuntimeError("backward() ran through this graph already: compute the loss again before a second call")
        for parent, _ in edges:
            if parent not in found:
                found.add(parent)
                stack.append(parent)
    return found


def op(function: Callable) -> Callable[..., Tensor]:
    """Make an operation on tensors out of a function of arrays that returns `(value, vjp_0, vjp_1, ...)`.

    The first k arguments, k being the number of VJPs, are the array inputs; all others are settings. Inputs may be
    tensors, arrays or Python numbers, and are given by position: a tensor given by name would be taken for a setting,
    so it is a TypeError. The function itself stays reachable as `.forward`, for use without a graph.
    """
    return _operation(function, cheap=False)


def cheap_op(function: Callable) -> Callable[..., Tensor]:
    """An `op` that keeps its inputs for backward anyway, and computes its value from them in a pass or two.

    Who needs the value in backward (a linear map, for the gradient of its weight) can compute it again from there
    instead of keeping it: an operation with a setting called `again` is given a function that does so for its first
    input, or None.
    """
    return _operation(function, cheap=True)


def _operation(function: Callable, cheap: bool) -> Callable[..., Tensor]:
    asks_again = "again" in inspect.signature(function).parameters

    @wraps(function)
    def call(*inputs: Any, **settings: Any) -> Tensor:
        for name, x in settings.items():
            if isinstance(x, Tensor):
                raise TypeError(f"{function.__name__}: give the tensor {name!r} by position, not by name")
            settings[name] = _array(x)
        arrays = [_array(x) for x in inputs]
        if asks_again and isinstance(inputs[0], Tensor) and inputs[0].node is not None:
            settings["again"] = inputs[0].node.again
        value, *vjps = function(*arrays, **settings)
        edges = []
        if _recording.get():
            for x, vjp in zip(inputs, vjps, strict=False):
                if isinstance(x, Tensor) and x.node is not None:
                    edges.append((x.node, vjp))
        if not edges:
            return Tensor(value)
        node = Node(edges)
        if cheap:  # once for all who ask, until backward has passed
            node.again = cache(lambda: function(*arrays, **settings)[0])
        return Tensor(value, node=node)

    call.forward = function  # type: ignore[attr-defined]
    OPS[function.__name__] = call
    return call


def _as_array(data: Any, requires_grad: bool) -> Array:
    if isinstance(data, Tensor):
        return data.data
    if not hasattr(data, "dtype"):
        data = np.asarray(data)
        if data.dtype == np.float64 or (requires_grad and data.dtype.kind in "iu"):
            data = data.astype(np.float32)
    return np.asarray(data) if isinstance(data, np.generic) else data


def _array(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.data
    return x.item() if isinstance(x, np.generic) else x  # a NumPy scalar must not promote float32 to float64


def shared_backward(backward: Callable[[Array], tuple[Array, ...]], n: int) -> list[Vjp]:
    """Split one backward that returns n gradients into n VJPs, and run it once, when the first of them is called."""
    parts: dict[int, Array] = {}

    def vjp_of(i: int) -> Vjp:
        def vjp(g: Array) -> Array:
            if not parts:
                parts.update(enumerate(backward(g)))
            return parts.pop(i)

        return vjp

    return [vjp_of(i) for i in range(n)]


def is_recording() -> bool:
    """True where operations build a graph, False inside `no_grad()`."""
    return _recording.get()


@contextmanager
def no_grad() -> Iterator[None]:
    """Build no graph inside this block: for evaluation and generation.

    >>> x = Tensor([1.0], requires_grad=True)
    >>> with no_grad():
    ...     y = x * 2
    >>> y.requires_grad
    False
    """
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)
