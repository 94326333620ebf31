"""Reverse-mode automatic differentiation: values, the graph behind them, and the backward pass through it.

An operation is a plain function of arrays. It returns its value and one VJP (vector-Jacobian product) for each array
input: a function that takes g = dL/d(value) and returns dL/d(input). `@op` turns it into a function of tensors that
records, for every input that needs a gradient, an edge (parent node, VJP). The VJP of an input that needs none is
dropped at once, and Python then frees every array that only this VJP had captured. Freezing a weight therefore saves
memory without a line of code in any operation. This is LoRA's saving, and it happens here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial, wraps
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, cast, overload

import numpy as np

from .backend import Array, array_module, to_numpy

Vjp = Callable[[Array], Array]
Edge = tuple["Node", Vjp, tuple[int, ...]]

_clock = itertools.count()
_recording: ContextVar[bool] = ContextVar("recording", default=True)
OPS: dict[str, Operation] = {}  # every @op by name; the tests require a gradient check for each


class Node:
    """A node of the graph: edges to the nodes it was computed from, and the gradient accumulated so far.

    edges: for each input that needs a gradient, its node, its VJP and its shape. A leaf has none; after the backward
    pass, edges is None. A node never holds the tensor's value: if it did, dropping a VJP would free nothing.
    """

    __slots__ = ("__weakref__", "edges", "grad", "name", "number", "owned", "recompute")

    def __init__(self, edges: list[Edge], name: str = ""):
        self.edges: list[Edge] | None = edges
        self.name = name  # of the operation
        self.grad: Array | None = None
        self.owned = False  # True if no other code holds `grad`, so that it may be added to in place
        self.recompute: Callable[[], Array] | None = None  # computes the value again, where that is cheap: see `op`
        self.number = next(_clock)  # a parent is always older than its child

    def receive(self, grad: Array, fresh: bool) -> None:
        """Add a contribution to the gradient. fresh: no other code holds this array, so it may be written to."""
        if self.grad is None:
            self.grad, self.owned = grad, fresh
        elif self.owned:
            self.grad += grad
        else:
            self.grad = self.grad + grad
            self.owned = True


class Operation(Protocol):
    """What `op` makes of a function; the function itself is `forward`."""

    forward: Callable[..., Any]

    def __call__(self, *inputs: Any, **settings: Any) -> Tensor: ...


class Tensor:
    """An array and, if a gradient is wanted, its node in the graph.

    data: anything NumPy turns into an array. Python floats, and Python integers given with `requires_grad=True`, become
    float32; arrays are kept as they are, without a copy, and so is the memory of a torch tensor.

    Comparisons such as x > 0 give arrays of booleans. Further operations are in engine/ops.py and engine/fused.py.

    >>> x = Tensor([1.0, 2.0, 3.0], requires_grad=True)
    >>> (x * x).sum().backward()
    >>> x.grad
    array([2., 4., 6.], dtype=float32)
    """

    __slots__ = ("__weakref__", "data", "frozen", "node")  # frozen: the node of a leaf that requires no gradient now
    __array_ufunc__ = None  # array + tensor is Tensor.__radd__, and NumPy refuses a tensor in np.exp and the like
    __array_priority__ = 1000.0  # for CuPy: higher than that of its arrays, 100

    def __init__(self, data: Any, requires_grad: bool = False, node: Node | None = None):
        if not isinstance(data, np.ndarray):  # the usual case takes the short way
            data = _as_array(data, requires_grad)
        self.data: Array = data
        self.node = node
        if requires_grad:
            self.requires_grad = True

    # -- shape and value -------------------------------------------------------------------------------------------
    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.data.dtype

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Tensor]:
        """The elements of the first axis. Raises TypeError if there is none."""
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        return bool(self.data)

    def __repr__(self) -> str:
        """Its values if they are few, otherwise its shape."""
        few = isinstance(self.data, np.ndarray) and self.size <= 64
        what = np.array2string(self.data, separator=", ", prefix="Tensor(") if few else f"shape {self.shape}"
        wanted = ", requires_grad=True" if self.requires_grad else ""
        return f"{type(self).__name__}({what}, {self.dtype}{wanted})"

    def item(self) -> float:
        """The only element of this tensor, as a Python scalar."""
        return self.data.item()

    def __float__(self) -> float:
        return float(self.item())

    def __format__(self, spec: str) -> str:
        """f"{loss:.3f}" writes the only element, as a Python number."""
        return format(self.item(), spec) if spec else str(self)

    def numpy(self) -> np.ndarray:
        """Its values as a NumPy array, detached from the graph. Copied only from a GPU."""
        return to_numpy(self.data)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """For `np.asarray(tensor)`. Raises TypeError if the tensor requires a gradient, which would be lost."""
        if self.requires_grad:
            raise TypeError("a tensor that requires a gradient is no array: use tensor.numpy() to leave the graph")
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def detach(self) -> Tensor:
        """The same array, detached from the graph."""
        return Tensor(self.data)

    # -- gradients -------------------------------------------------------------------------------------------------
    @property
    def requires_grad(self) -> bool:
        return self.node is not None

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if not wanted:
            if self.node is not None and self.node.edges == []:
                self.frozen = self.node  # which graphs that exist lead to
            self.node = None
        elif self.node is None:
            if self.data.dtype.kind != "f":
                raise TypeError(f"only floating-point tensors can require a gradient, got {self.data.dtype}")
            self.node = self._leaf or Node([])

    @property
    def _leaf(self) -> Node | None:
        return self.node or getattr(self, "frozen", None)

    @property
    def grad(self) -> Array | None:
        """dL/d(this), after `backward`. Only leaves have one: all others are freed during the backward pass. As in
        PyTorch, a leaf that no longer requires a gradient has the last one until it is set to None.
        """
        return None if self._leaf is None else self._leaf.grad

    @grad.setter
    def grad(self, value: Array | None) -> None:
        if self.node is None and value is not None:
            raise RuntimeError("the gradient of a tensor that requires no gradient cannot be set")
        if self._leaf is not None:
            self._leaf.grad = None if value is None else self._gradient(value)
            self._leaf.owned = False

    def _gradient(self, grad: Any) -> Array:
        """What is given as a gradient of this tensor, as an array of its shape."""
        grad = grad.data if isinstance(grad, Tensor) else grad
        grad = array_module(self.data).asarray(grad, None if hasattr(grad, "dtype") else self.dtype)
        if grad.shape != self.shape:
            raise ValueError(f"the gradient has shape {grad.shape}, the tensor {self.shape}")
        return grad

    def backward(self, grad: Any = None) -> None:
        """Compute dL/dx for every leaf x that this tensor depends on, and add it to `x.grad`.

        grad: dL/d(this), an array or a tensor of this tensor's shape; 1 if left out, which only a tensor with a single
            element may do.
        The graph is consumed: saved arrays are freed during the pass, and a second call raises RuntimeError.
        """
        for leaf, leaf_grad in backward_pass(self, grad):
            leaf.receive(leaf_grad, fresh=True)

    # -- operators and methods: set in ops.py, next to their operations ----------------------------------------------
    changes_in_place: ClassVar[bool] = False  # by x -= y and the like: True for a module's parameters

    if TYPE_CHECKING:  # what editors and type checkers show of them

        def __add__(self, other: Any, /) -> Tensor: ...
        def __iadd__(self, other: Any, /) -> Self: ...
        def __gt__(self, other: Any, /) -> Array: ...  # of booleans
        def __eq__(self, other: object, /) -> Array: ...  # type: ignore[override]
        def __ne__(self, other: object, /) -> Array: ...  # type: ignore[override]
        def __hash__(self) -> int: ...
        def __neg__(self) -> Tensor: ...
        def __pow__(self, exponent: float, /) -> Tensor: ...
        def __getitem__(self, index: Any, /) -> Tensor: ...
        def exp(self) -> Tensor: ...
        def softmax(self, axis: int = -1) -> Tensor: ...
        def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor: ...
        def max(self, axis: int | None = None, keepdims: bool = False) -> Tensor: ...
        def reshape(self, *shape: Any) -> Tensor: ...
        def transpose(self, axes: Sequence[int] | None = None) -> Tensor: ...
        @property
        def T(self) -> Tensor: ...

        __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __add__
        __matmul__ = __rmatmul__ = __add__
        __isub__ = __imul__ = __itruediv__ = __iadd__
        __lt__ = __le__ = __ge__ = __gt__
        log = sqrt = tanh = relu = sigmoid = exp
        log_softmax = softmax
        mean = sum


# -- the backward pass -------------------------------------------------------------------------------------------------


def backward_pass(y: Tensor, grad: Array | None = None) -> Iterator[tuple[Node, Array]]:
    """Go backward through the graph of `y`; yield (leaf, gradient) for every gradient that arrives at a leaf.

    `Tensor.backward` adds these to each leaf's `.grad`; other callers accumulate them elsewhere. A leaf comes once for
    each of its uses, each time with a new array. Arguments, errors and what is freed: as for `Tensor.backward`.
    """
    if y.node is None:
        how = "set requires_grad=True on an input" if is_recording() else "leave no_grad()"
        raise RuntimeError(f"backward() on a tensor that depends on nothing trainable: {how}")
    if grad is None:
        if y.data.size != 1:
            raise ValueError(f"backward() needs a gradient for a tensor of shape {y.shape}; reduce it to a scalar")
        grad = array_module(y.data).ones(y.shape, y.dtype)
    grad = y._gradient(grad)
    nodes = _reachable(y.node)
    if not y.node.edges:
        yield y.node, array_module(grad).array(grad)
        return
    y.node.receive(grad, fresh=False)
    for node in sorted(nodes, key=attrgetter("number"), reverse=True):  # youngest first: children before parents
        if not (edges := node.edges):
            continue  # a leaf
        g, node.edges, node.grad, node.recompute = node.grad, None, None, None
        edges.reverse()
        while edges:  # popped one by one: what only this VJP had captured is freed before the next one runs
            parent, vjp, shape = edges.pop()
            part = vjp(g)
            if isinstance(part, Tensor) or getattr(part, "shape", None) != shape:
                found = f"shape {part.shape}" if isinstance(part, np.ndarray) else f"a {type(part).__name__}"
                raise TypeError(f"{node.name}: a VJP returned {found} for an input of shape {shape}")
            fresh = part is not g and part.base is None  # a VJP may return g, a view, or a fresh array;
            fresh &= str(getattr(vjp, "__module__", "")).startswith("minilora.")  # a user's may keep what it returns
            if parent.edges:
                parent.receive(part, fresh)
            else:
                yield parent, part if fresh and part.ndim else array_module(part).array(part)
            del part


def leaves(y: Tensor, began: int = 0, end: Node | None = None) -> dict[Node, tuple[int, ...]]:
    """The leaves that `y` was computed from, each with its shape, oldest first.

    began: the number of a node. Raises ValueError if `y` was computed from an older one that is not a leaf.
    end: a node that is no leaf; it is left out, and so is all that only it was computed from.
    """
    if y.node is None or y.node is end:
        return {}
    nodes = _reachable(y.node, end)
    if any(node.edges and node.number < began for node in nodes):
        raise ValueError(
            "recomputation: the block, or a hook in it, uses a tensor that was computed before the block, besides its "
            "input: compute it in the block, use its detach(), or leave recomputation out"
        )
    found = {parent: shape for node in nodes for parent, _, shape in node.edges or () if not parent.edges}
    found |= {y.node: y.shape} if not y.node.edges else {}
    return dict(sorted(found.items(), key=lambda pair: pair[0].number))


def _reachable(start: Node, end: Node | None = None) -> set[Node]:
    found, stack = {start}, [start]
    while stack:
        edges = stack.pop().edges
        if edges is None:
            raise RuntimeError("backward() has consumed this graph: compute the loss again before a second call")
        for parent, _, _ in edges:
            if parent not in found and parent is not end:
                found.add(parent)
                stack.append(parent)
    return found


# -- operations --------------------------------------------------------------------------------------------------------


@overload
def op(function: Callable[..., Any]) -> Operation: ...
@overload
def op(*, recomputable: bool = False, wants_recompute: bool = False) -> Callable[[Callable[..., Any]], Operation]: ...
def op(function: Callable | None = None, *, recomputable: bool = False, wants_recompute: bool = False) -> Any:
    """Turn a function of arrays that returns `(value, vjp_0, vjp_1, ...)` into an operation on tensors.

    If it returns k VJPs, its first k arguments are the array inputs; all others are settings. Inputs may be tensors,
    arrays or Python numbers, and must be given by position: a tensor given by name would be taken for a setting, so it
    is a TypeError. The function itself is available as `.forward`, for use without a graph.

    recomputable: the operation saves its inputs anyway, and computes its value from them in a pass or two. An operation
        that needs this value in the backward pass may compute it again instead of saving it.
    wants_recompute: the function takes a setting `recompute`: a function that computes its first input again, or None
        if that input is not the value of a recomputable operation.
    """
    if function is None:
        return partial(op, recomputable=recomputable, wants_recompute=wants_recompute)
    name = function.__name__

    @wraps(function)
    def call(*inputs: Any, **settings: Any) -> Tensor:
        for key, x in settings.items():
            if isinstance(x, Tensor):
                raise TypeError(f"{name}: pass the tensor {key!r} by position, not by name")
            settings[key] = _array(x)
        arrays = [_array(x) for x in inputs]
        if wants_recompute and isinstance(inputs[0], Tensor) and inputs[0].node is not None:
            settings["recompute"] = inputs[0].node.recompute
        result = function(*arrays, **settings)
        if type(result) is not tuple or len(result) < 2 or not callable(result[1]):
            raise TypeError(f"{name}: an @op must return its value and one VJP for each array input, as a tuple")
        if isinstance(result[0], Tensor):  # whose own graph would be lost
            raise TypeError(f"{name}: the value of an @op is an array, got a tensor: pass every tensor as an input")
        edges: list[Edge] = []
        if _recording.get():
            for i, x in enumerate(inputs):
                if isinstance(x, Tensor) and x.node is not None:
                    if i + 1 >= len(result):
                        raise TypeError(f"{name}: there is no VJP for input {i}, a tensor that requires a gradient")
                    edges.append((x.node, result[i + 1], x.data.shape))
        if not edges:
            return Tensor(result[0])
        node = Node(edges, name)
        if recomputable:  # computed once for all that need it, and dropped by the backward pass
            node.recompute = cache(lambda: function(*arrays, **settings)[0])
        return Tensor(result[0], node=node)

    operation = cast(Operation, call)
    operation.forward = function
    OPS[name] = operation
    return operation


def _as_array(data: Any, requires_grad: bool) -> Array:
    if isinstance(data, Tensor):
        return data.data
    if not isinstance(getattr(data, "dtype", None), np.dtype):
        plain, data = not hasattr(data, "dtype"), np.asarray(data)
        if plain and (data.dtype == np.float64 or (requires_grad and data.dtype.kind in "iu")):
            data = data.astype(np.float32)
    return np.asarray(data) if isinstance(data, np.generic) else data


def _array(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.data
    return x.item() if isinstance(x, np.generic) else x  # a NumPy scalar must not promote float32 to float64


def shared_backward(backward: Callable[[Array], tuple[Array, ...]], n: int) -> list[Vjp]:
    """Split one function that returns n gradients into n VJPs. It runs once, when the first of them is called."""
    found: dict[int, Array] = {}

    def vjp_of(i: int) -> Vjp:
        def vjp(g: Array) -> Array:
            if not found:
                found.update(enumerate(backward(g)))
            return found.pop(i)

        return vjp

    return [vjp_of(i) for i in range(n)]


def is_recording() -> bool:
    """True if operations build a graph, False inside `no_grad()`."""
    return _recording.get()


@contextmanager
def no_grad() -> Iterator[None]:
    """A block in which operations build no graph: for evaluation and generation.

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
