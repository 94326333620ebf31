"""Lesson 2's exercises: undo broadcasting, the backward pass through a graph, and that of a linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from graphlib import TopologicalSorter
from typing import Any

import numpy as np

from .compare import Wrong, close
from .exercises import Draw, arrays, changed, distinct_sizes, exercise, variant
from .hunts import hunt

# -- 2.1 undo broadcasting ---------------------------------------------------------------------------------------------

BROADCAST = [("B T m", "m"), ("T m", "T 1"), ("B T m", "1 m"), ("B T m", "T 1"), ("B T m", "B 1 m")]  # g, before


def stretched(big: str, small: str) -> Callable[[np.random.Generator], Draw]:
    """A draw of g with these axes, and the shape before broadcasting; an axis called 1 has length 1."""

    def draw(rng: np.random.Generator) -> Draw:
        sizes = distinct_sizes("BTm", rng, low=3, high=12) | {"1": 1}
        shape = tuple(sizes[axis] for axis in small.split())
        return Draw(sizes, g=rng.standard_normal([sizes[axis] for axis in big.split()]) + 1, shape=shape)

    return draw


def first(g: Any, axis: Any, keepdims: bool = False) -> Any:
    """The first of the slices, where a sum was expected."""
    for i in reversed(axis):
        g = np.take(g, [0], i) if keepdims else np.take(g, 0, i)
    return g


@exercise(
    "2.1",
    draw=[stretched(big, small) for big, small in BROADCAST],
    smallest=stretched("T m", "T m"),
    returns="the gradient",
)
def unbroadcast(g, shape):
    """g: the gradient of the broadcast array; shape: a tuple, the shape before -> an array of that shape"""
    g = g.sum(axis=tuple(range(g.ndim - len(shape))))
    ones = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return g.sum(axis=ones, keepdims=True)


def given_array(big: str, small: str) -> Callable[[np.random.Generator], Draw]:
    """A draw of g, and of the array before broadcasting."""

    def draw(rng: np.random.Generator) -> Draw:
        drawn = stretched(big, small)(rng)
        return Draw(drawn.sizes, g=drawn["g"], x=rng.standard_normal(drawn["shape"]))

    return draw


variant(
    "unbroadcast",
    {
        "gradient of the array that had the shape `shape` before broadcasting. The result has exactly that shape:": (
            "gradient of `x`, the array before broadcasting. The result has exactly the shape of x:"
        ),
        "unbroadcast(g, shape)": "unbroadcast(g, x)",
        "shape: a tuple, the shape before -> an array of that shape": "x: the array before -> an array of x's shape",
        "len(shape)": "x.ndim",
        "enumerate(shape)": "enumerate(x.shape)",
        "unbroadcast(g, b.shape)": "unbroadcast(g, b)",
    },
    "it gets the array before broadcasting, not its shape",
    draw=[given_array(big, small) for big, small in BROADCAST],
    smallest=given_array("T m", "T m"),
)


# -- 2.2 a backward pass without a tape --------------------------------------------------------------------------------


def draw_graph(rng: np.random.Generator) -> Draw:
    """A graph with shuffled numbers: diamonds, the same parent twice, and nodes that `last` does not depend on."""
    count = 24
    number = rng.permutation(count)
    edges: list[list[tuple[int, float]]] = [[] for _ in range(count)]

    def computed(i: int, parents: list[int]) -> None:
        edges[number[i]] = [(int(number[j]), float(rng.uniform(0.5, 1.5) * rng.choice([-1, 1]))) for j in parents]

    for i in range(3, 18):
        parents = [i - 1, int(rng.integers(max(0, i - 6), i - 1))]
        computed(i, [parents[k] for k in rng.permutation(2)])
    computed(12, [8, 11, 8])  # twice the same, which 9 uses as well, later
    for i in range(18, count):  # `last` depends on none of these, though they use what it depends on
        computed(i, [int(j) for j in rng.integers(3, i, 2)])
    return Draw(edges=edges, last=int(number[17]))


def every_path(edges: Any, last: int) -> Any:
    """Right, along every path: fine for small graphs."""
    derivatives = np.zeros(len(edges))
    todo = [(last, 1.0)]
    while todo:
        node, g = todo.pop()
        derivatives[node] += g
        todo += [(parent, g * slope) for parent, slope in edges[node]]
    return derivatives


def by_recursion(edges: Any, last: int) -> Any:
    """Right, in an order that recursion finds."""
    order: dict[int, None] = {}

    def visit(node: int) -> None:
        for parent, _ in edges[node]:
            if parent not in order:
                visit(parent)
        order[node] = None

    visit(last)
    return in_order(edges, last, list(order)[::-1])


def inputs_first(edges: Any, last: int) -> Any:
    """From the inputs to the last node."""
    graph: dict[int, set[int]] = {}
    todo = [last]
    while todo:
        node = todo.pop()
        graph[node] = {parent for parent, _ in edges[node]}
        todo += graph[node] - set(graph)
    return in_order(edges, last, TopologicalSorter(graph).static_order())


def in_order(edges: Any, last: int, order: Iterable[int]) -> Any:
    """Each node passes on what it has when its turn comes."""
    derivatives = np.zeros(len(edges))
    derivatives[last] = 1
    for node in order:
        for parent, slope in edges[node]:
            derivatives[parent] += slope * derivatives[node]
    return derivatives


class Counted(list):
    """Edges that note how often they are asked for."""

    reads = 0

    def swapped(self) -> Counted:
        """The same, its pairs the other way round."""
        return Counted([pair[::-1] for pair in pairs] for pairs in self)

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: Any) -> Any:
        self.reads += 1
        if self.reads > 100 * len(self) ** 2:
            raise Wrong(
                "right, but it follows every path, and 60 diamonds have 2^60 of them: pass on once, when complete"
            )
        return super().__getitem__(i)


def judge_large(answer: Any, drawn: Draw, rng: np.random.Generator) -> None:
    """A ladder of diamonds, and 2,000 additions."""
    if len(drawn["edges"]) > 1:  # once in each check, with the smallest draw
        return
    ladder = Counted([[], *([(i, 0.5), (i, 0.5)] for i in range(60))])
    chain = Counted([[], *([(i, 1.0), (0, 1.0)] for i in range(2000))])
    chain[1] = [(0, 1.0)]
    try:
        if not close(np.asarray(answer(edges=ladder, last=60), dtype=float), np.ones(61)):
            raise Wrong(
                "right on small graphs, wrong on 60 diamonds in a chain, with derivatives of 1: does it stop early?"
            )
        if not close(np.asarray(answer(edges=chain, last=2000), dtype=float)[:1], np.array([2000.0])):
            raise Wrong("right on small graphs, wrong for 2,000 chained additions: does it stop early?")
    except Wrong as wrong:
        if "RecursionError" in str(wrong):
            raise Wrong(
                "right on small graphs, but 2,000 chained additions are too deep for recursion: keep a list"
            ) from None
        raise


@exercise(
    "2.2",
    draw=draw_graph,
    smallest=lambda rng: Draw(edges=[[]], last=0),  # an input alone
    returns="derivatives",
    also=judge_large,
)
def graph_gradients(edges, last):
    """edges: for each node a list of (parent, slope); last: the number of a node -> an array, a derivative per node"""
    waiting = [0] * len(edges)
    seen, todo = {last}, [last]
    while todo:
        for parent, _ in edges[todo.pop()]:
            waiting[parent] += 1
            if parent not in seen:
                seen.add(parent)
                todo.append(parent)
    derivatives = np.zeros(len(edges))
    derivatives[last] = 1
    ready = [last]
    while ready:
        node = ready.pop()
        for parent, slope in edges[node]:
            derivatives[parent] += slope * derivatives[node]
            waiting[parent] -= 1
            if waiting[parent] == 0:
                ready.append(parent)
    return derivatives


def judge_large_swapped(answer: Any, drawn: Draw, rng: np.random.Generator) -> None:
    """`judge_large`, for pairs (slope, parent)."""
    judge_large(lambda edges, last: answer(edges=edges.swapped(), last=last), drawn, rng)


variant(
    "graph_gradients",
    {
        "pairs `(parent, slope)`": "pairs `(slope, parent)`",
        "a list of (parent, slope)": "a list of (slope, parent)",
        "for parent, _ in": "for _, parent in",
        "for parent, slope in": "for slope, parent in",
    },
    "the pairs hold the slope first",
    draw=changed(draw_graph, lambda drawn: {"edges": [[pair[::-1] for pair in pairs] for pairs in drawn["edges"]]}),
    also=judge_large_swapped,
)


# -- 2.3 a layer -------------------------------------------------------------------------------------------------------


def layer(W: str, **sizes: int) -> Callable[[np.random.Generator], Draw]:
    """A draw of x (T, n), W with these axes, b (m), g (T, m)."""
    return lambda rng: arrays(rng, sizes or distinct_sizes("Tnm", rng), x="T n", W=W, b="m", g="T m")


@exercise(
    "2.3",
    draw=layer("m n"),
    smallest=layer("m n", T=1, n=4, m=3),
    returns="dx (T, n), dW (m, n), db (m)",
    by_hand=True,
)
def linear_backward(x, W, b, g):
    """x (T, n), W (m, n), b (m,), g (T, m) -> dx (T, n), dW (m, n), db (m,)"""
    return g @ W, g.T @ x, unbroadcast(g, b.shape)


OTHER_LAYOUT = {
    r"x\,W^\top + b": r"x\,W + b",
    "W (m, n)": "W (n, m)",
    "g @ W, g.T @ x": "g @ W.T, x.T @ g",
    "W = rng.standard_normal((3, 4))": "W = rng.standard_normal((4, 3))",
    "(x @ W.T + b)": "(x @ W + b)",
    "unbroadcast(g, b.shape)": "unbroadcast(g, b)",
}


variant(
    "linear_backward",
    OTHER_LAYOUT,
    "W is stored as (inputs, outputs)",
    lines={
        "g @ W ->": "g @ W.T ->",
        "-> g.T @ x, g @ W": "-> x.T @ g, g @ W.T",
        "-> np.ones_like(g) @ W": "-> np.ones_like(g) @ W.T",
        "-> (g + b) @ W": "-> (g + b) @ W.T",
        "g.T @ x -> g[:, :, None] * x[:, None, :]": "x.T @ g -> x[:, :, None] * g[:, None, :]",
        "g.T @ x -> g.T @ x / len(x)": "x.T @ g -> x.T @ g / len(x)",
        "g.T @ x -> np.ones_like(g).T @ x": "x.T @ g -> x.T @ np.ones_like(g)",
    },
    draw=layer("n m"),
    smallest=layer("n m", T=1, n=4, m=3),
)


# -- 2.4 a bug hunt ----------------------------------------------------------------------------------------------------


def gradients(f: Any, *arrays: Any) -> Any:
    """The gradients of f, which computes one number from as many values, with respect to these arrays."""
    tape: list[Any] = []

    def record(value: Any, *inputs: Any) -> Any:
        tape.append((Value(value), inputs))
        return tape[-1][0]

    def fitted(g: Any, shape: Any) -> Any:
        while np.ndim(g) > len(shape):
            g = g.sum(axis=0)
        return g.sum(axis=tuple(i for i, size in enumerate(shape) if size == 1), keepdims=True)

    def value_of(x: Any) -> Any:
        return x if isinstance(x, Value) else Value(x)  # a constant

    class Value:
        __array_ufunc__ = None  # so that NumPy leaves `array * value` to __rmul__

        def __init__(self, value: Any):
            self.value, self.grad = np.asarray(value, dtype=float), 0.0

        def __add__(self, other: Any) -> Any:
            other = value_of(other)
            return record(self.value + other.value, (self, lambda g: g), (other, lambda g: g))

        def __mul__(self, other: Any) -> Any:
            other = value_of(other)
            a, b = self.value, other.value
            return record(a * b, (self, lambda g: g * b), (other, lambda g: g * a))

        def __matmul__(self, other: Any) -> Any:
            other = value_of(other)
            a, b = self.value, other.value
            if max(a.ndim, b.ndim) > 2:
                raise ValueError(f"@ takes vectors and matrices, got the shapes {a.shape} and {b.shape}")
            y = a @ b
            a, b = np.atleast_2d(a), b.reshape(len(b), -1)  # a vector is a row on the left, a column on the right

            def da(g: Any) -> Any:
                return (g.reshape(len(a), -1) @ b.T).reshape(self.value.shape)

            def db(g: Any) -> Any:
                return (a.T @ g.reshape(len(a), -1)).reshape(other.value.shape)

            return record(y, (self, da), (other, db))

        def __rmatmul__(self, other: Any) -> Any:
            return Value(other) @ self

        __radd__, __rmul__ = __add__, __mul__

        def tanh(self) -> Any:
            y = np.tanh(self.value)
            return record(y, (self, lambda g: g * (1 - y * y)))

        def sum(self) -> Any:
            return record(self.value.sum(), (self, lambda g: np.full(self.value.shape, g)))

    values = [Value(array) for array in arrays]
    f(*values).grad = np.ones(())
    for result, inputs in reversed(tape):
        for x, vjp in inputs if np.ndim(result.grad) or result.grad else ():
            x.grad = x.grad + fitted(np.asarray(vjp(result.grad)), x.value.shape)
    return [x.grad + np.zeros(x.value.shape) for x in values]


MEAN = {
    "`.sum()`": "`.mean()`",
    ".tanh().sum(), x, y)": ".tanh().mean(), x, y)",
    ".sum(), ": ".mean(), ",
    "np.random.default_rng(0), 1\n": "np.random.default_rng(0), 1 / 12\n",
}


@exercise("2.4", draw=lambda rng: Draw(None, gradients=gradients), returns="nothing", judge=hunt("2.4", gradients))
def test_engine(gradients):
    """gradients(f, *arrays) -> a list: passes if the engine is right, raises AssertionError if it is broken"""
    rng, each = np.random.default_rng(0), 1
    W, x, y, b, c = (rng.standard_normal(shape) for shape in [(4, 4), (3, 4), (3, 4), (4,), (3, 1)])
    assert np.allclose(gradients(lambda x, b: (x + b).sum(), x, b)[1], 3 * each)
    assert np.allclose(gradients(lambda x, c: (x + c).sum(), x, c)[1], 4 * each)
    assert np.allclose(gradients(lambda x: (x + x).sum(), x)[0], 2 * each)
    assert np.allclose(gradients(lambda x: x.tanh().sum(), x)[0], each * (1 - np.tanh(x) ** 2))
    assert np.allclose(gradients(lambda x, W: (x @ W).sum(), x, W)[1], each * x.sum(axis=0)[:, None])
    assert np.allclose(gradients(lambda x, y: (x * y).sum(), x, y)[1], each * x)


ENGINE_OF_MEANS = {"def sum(self)": "def mean(self)", "self.value.sum()": "self.value.mean()",
                   "np.full(self.value.shape, g)": "np.full(self.value.shape, g / self.value.size)"}  # fmt: skip
variant(
    "test_engine",
    MEAN,
    "the functions end with a mean, not with a sum",
    judge=hunt("2.4", gradients, ENGINE_OF_MEANS),
)
