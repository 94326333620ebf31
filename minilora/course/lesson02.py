"""Lesson 2's exercises: undo broadcasting, walk back through a graph, and the gradients of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .compare import Wrong, close
from .exercises import Draw, arrays, distinct_sizes, exercise, variant

# -- 2.1 undo broadcasting ---------------------------------------------------------------------------------------------


def stretched(big: str, small: str) -> Callable[[np.random.Generator], Draw]:
    """A draw of g with these axes, and the shape before the stretching; an axis called 1 has the length 1."""

    def draw(rng: np.random.Generator) -> Draw:
        sizes = distinct_sizes("BTm", rng, low=3, high=12) | {"1": 1}
        shape = tuple(sizes[axis] for axis in small.split())
        return Draw(sizes, g=rng.standard_normal([sizes[axis] for axis in big.split()]) + 1, shape=shape)

    return draw


def sums(leading: Callable[..., Any] = np.sum, ones: Callable[..., Any] = np.sum, keep: bool = True) -> Callable:
    """unbroadcast with another way to reduce the axes in front, or those of length 1."""

    def answer(g: Any, shape: Any) -> Any:
        front = g.ndim - len(shape)
        if front:
            g = leading(g, axis=tuple(range(front)))
        axes = tuple(i for i, size in enumerate(shape) if size == 1 and g.shape[i] != 1)
        return ones(g, axis=axes, keepdims=keep) if axes else g

    return answer


def first(g: Any, axis: Any, keepdims: bool = False) -> Any:
    """The first of the slices."""
    for i in reversed(axis):
        g = np.take(g, [0], i) if keepdims else np.take(g, 0, i)
    return g


@exercise(
    "2.1",
    draw=[
        stretched("T m", "m"),
        stretched("T m", "T 1"),
        stretched("B T m", "1 m"),
        stretched("B T m", "T 1"),
        stretched("B T m", "B 1 m"),
    ],
    smallest=stretched("T m", "T m"),
    returns="the gradient (shape)",
    decisive=["ones = tuple(axis for axis, size in enumerate(shape) if size == 1)"],
    mistakes={
        "kept axis lost": (
            sums(keep=False),
            "an axis of length 1 is gone: a (3, 1) gets a (3, 1), not a (3,): keepdims=True",
        ),
        "front alone": (
            sums(ones=lambda g, **axes: g),
            "an axis of length 1 was stretched, too: add up over it, and keep it with length 1",
        ),
        "ones alone": (
            sums(leading=lambda g, **axes: g),
            "there are axes too many in front: shapes line up at their last axis, so add up over those in front",
        ),
        "mean": (sums(np.mean, np.mean), "this is the mean: each use is a path of its own, and paths add up"),
        "first": (sums(first, first), "this is the first of several uses: all of them count, so add up"),
        "all": (
            lambda g, shape: np.full(shape, g.sum()),
            "everything is added up, the axes that were not stretched, too: they must stay apart",
        ),
        "first axis": (
            lambda g, shape: g.sum(axis=0),
            "the first axis is added up, whatever the shape says: compare the shapes, axis by axis, from the last one",
        ),
        "wrong end": (
            lambda g, shape: g.sum(axis=tuple(range(len(shape), g.ndim))) if g.ndim > len(shape) else sums()(g, shape),
            "axes are added up at the end: shapes line up at their last axis, so those in front are too many",
        ),
    },
)
def unbroadcast(g: Any, shape: Any) -> Any:
    """Sums over the axes in front, and over those of length 1."""
    return sums()(g, shape)


# -- 2.2 a walk back without a tape ------------------------------------------------------------------------------------


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
    computed(9, [8, 8, 2])  # twice the same
    for i in range(18, count):  # `last` depends on none of these, though they use what it depends on
        computed(i, [int(j) for j in rng.integers(3, i, 2)])
    return Draw(edges=edges, last=int(number[17]))


def order_of(edges: Any, last: int, everywhere: bool = False) -> list[int]:
    """Nodes that `last` depends on, each before its parents. everywhere: uses by other nodes are waited for, too."""
    waiting, todo = [0] * len(edges), list(range(len(edges))) if everywhere else [last]
    seen = set(todo)
    while todo:
        for parent, _ in edges[todo.pop()]:
            waiting[parent] += 1
            if parent not in seen:
                seen.add(parent)
                todo.append(parent)
    order, ready = [], [last]
    while ready:
        order.append(ready.pop())
        for parent, _ in edges[order[-1]]:
            waiting[parent] -= 1
            if not waiting[parent]:
                ready.append(parent)
    return order


def walked(order: Callable[[Any, int], list[int]] = order_of, share: Callable | None = None) -> Callable:
    """The walk in another order; share(what has arrived, slope, the node's own slope) is the parent's new value."""

    def answer(edges: Any, last: int) -> Any:
        slopes = np.zeros(len(edges))
        slopes[last] = 1
        for node in order(edges, last):
            for parent, slope in edges[node]:
                old = slopes[parent]
                slopes[parent] = share(old, slope, slopes[node]) if share else old + slope * slopes[node]
        return slopes

    return answer


def as_found(from_end: bool) -> Callable[[Any, int], list[int]]:
    """The order in which a search comes upon the nodes: a stack, or a queue."""

    def order(edges: Any, last: int) -> list[int]:
        found, todo, seen = [], [last], {last}
        while todo:
            found.append(todo.pop(-1 if from_end else 0))
            for parent, _ in edges[found[-1]]:
                if parent not in seen:
                    seen.add(parent)
                    todo.append(parent)
        return found

    return order


def every_path(edges: Any, last: int) -> Any:
    """Right, along every path: fine for small graphs."""
    slopes = np.zeros(len(edges))
    todo = [(last, 1.0)]
    while todo:
        node, g = todo.pop()
        slopes[node] += g
        todo += [(parent, g * slope) for parent, slope in edges[node]]
    return slopes


def hands_on_again(edges: Any, last: int) -> Any:
    """Everything that has arrived goes on, each time that something arrives."""
    slopes = np.zeros(len(edges))
    slopes[last] = 1
    todo = [last]
    while todo:
        node = todo.pop()
        for parent, slope in edges[node]:
            slopes[parent] += slope * slopes[node]
            todo.append(parent)
    return slopes


def depth_first(edges: Any, last: int) -> list[int]:
    """The right order, found by recursion."""
    order: dict[int, None] = {}

    def visit(node: int) -> None:
        for parent, _ in edges[node]:
            if parent not in order:
                visit(parent)
        order[node] = None

    visit(last)
    return list(order)[::-1]


class Counted(list):
    """Edges that note how often they are asked for."""

    reads = 0

    def __getitem__(self, i: Any) -> Any:
        self.reads += 1
        if self.reads > 100 * len(self):
            raise Wrong(
                "right, but it goes along every path, and 60 diamonds have 2^60 of them: hand on once, when complete"
            )
        return super().__getitem__(i)


def judge_large(answer: Any, drawn: Draw, rng: np.random.Generator) -> None:
    """A ladder of diamonds, and 5,000 additions."""
    if len(drawn["edges"]) > 1:  # once in each check, with the smallest draw
        return
    ladder = Counted([[], *([(i, 0.5), (i, 0.5)] for i in range(60))])
    chain: list[list[tuple[int, float]]] = [[], *([(i, 1.0), (0, 1.0)] for i in range(5000))]
    chain[1] = [(0, 1.0)]
    try:
        if not close(np.asarray(answer(edges=ladder, last=60), dtype=float), np.ones(61)):
            raise Wrong("right on small graphs, wrong on a ladder of 60 diamonds, where every slope is 1")
        if not close(np.asarray(answer(edges=chain, last=5000), dtype=float)[:1], np.array([5000.0])):
            raise Wrong("right on small graphs, wrong for 5,000 chained additions")
    except Wrong as wrong:
        if "RecursionError" in str(wrong):
            raise Wrong(
                "right on small graphs, but 5,000 chained additions are too deep for recursion: keep a list"
            ) from None
        raise


@exercise(
    "2.2",
    draw=draw_graph,
    smallest=lambda rng: Draw(edges=[[]], last=0),  # an input alone
    returns="slopes (nodes)",
    also=judge_large,
    decisive=["waiting[parent] -= 1"],
    mistakes={
        "overwrites": (
            walked(share=lambda old, slope, g: slope * g),
            "the slope of a node used twice is overwritten by the last use: paths add up, so += in place of =",
        ),
        "as found, stack": (
            walked(as_found(True)),
            "a node hands on its slope before all that use it have added theirs: wait until it is complete",
        ),
        "as found, queue": (
            walked(as_found(False)),
            "a node hands on its slope before all that use it have added theirs: wait until it is complete",
        ),
        "again and again": (
            hands_on_again,
            "a node hands on all it has each time something arrives, so early shares go on twice: wait until complete",
        ),
        "by number": (
            walked(lambda edges, last: list(range(len(edges)))[::-1]),
            "the nodes are taken by their numbers, which say nothing about the order: find it from the edges",
        ),
        "inputs first": (
            walked(lambda edges, last: order_of(edges, last)[::-1]),
            "the walk begins at the inputs: begin at last, whose slope is known",
        ),
        "added slopes": (
            walked(share=lambda old, slope, g: old + slope + g),
            "slopes are added along a path: along a path they multiply, where paths meet they add up",
        ),
        "own slope forgotten": (
            walked(share=lambda old, slope, g: old + slope),
            "the slope on the edge counts alone: multiply it by what has arrived at the node",
        ),
        "edge forgotten": (
            walked(share=lambda old, slope, g: old + g),
            "the slope on the edge is left out: multiply what has arrived at the node by it",
        ),
        "waits for all": (
            walked(lambda edges, last: order_of(edges, last, everywhere=True)),
            "some nodes wait forever, for uses that last does not depend on: count only the uses on the way from last",
        ),
        "no start": (
            lambda edges, last: np.zeros(len(edges)),
            "all are zero: the slope of last with respect to itself is 1",
        ),
        "last left out": (
            lambda edges, last: walked()(edges, last) * (np.arange(len(edges)) != last),
            "the slope of last with respect to itself is 1",
        ),
        "once per parent": (
            lambda edges, last: walked()([list(dict(pairs).items()) for pairs in edges], last),
            "a parent that stands twice in a list counts once: v · v uses v twice, so go through all pairs",
        ),
        "every path": (every_path, "right, but it goes along every path"),
        "recursion": (walked(depth_first), "too deep for recursion: keep a list"),
    },
)
def graph_gradients(edges: Any, last: int) -> Any:
    """Each node hands on its slope once, when it is complete."""
    return walked()(edges, last)


# -- 2.3 a layer -------------------------------------------------------------------------------------------------------


def layer(W: str, **sizes: int) -> Callable[[np.random.Generator], Draw]:
    """A draw of x (T, n), W with these axes, b (m), g (T, m)."""
    return lambda rng: arrays(rng, sizes or distinct_sizes("Tnm", rng), x="T n", W=W, b="m", g="T m")


def with_part(**parts: Callable) -> Callable:
    """The right gradients, some of dx, dW, db made in another way: function(x, W, b, g)."""

    def answer(x: Any, W: Any, b: Any, g: Any) -> Any:
        right = {"dx": g @ W, "dW": g.T @ x, "db": g.sum(axis=0)} | {n: f(x, W, b, g) for n, f in parts.items()}
        return right["dx"], right["dW"], right["db"]

    return answer


@exercise(
    "2.3",
    draw=layer("m n"),
    smallest=layer("m n", T=1, n=4, m=3),
    returns="dx (T, n), dW (m, n), db (m)",
    by_hand=True,
    decisive=["g @ W, g.T @ x, unbroadcast(g, b.shape)"],
    mistakes={
        "g for db": (
            with_part(db=lambda x, W, b, g: g),
            "db: it is g itself, one row per token: b is used by every token, so add up over them",
        ),
        "mean for db": (
            with_part(db=lambda x, W, b, g: g.mean(axis=0)),
            "db: this is the mean over the tokens: where the loss is a mean, g has that; add up",
        ),
        "db over outputs": (
            with_part(db=lambda x, W, b, g: g.sum(axis=1)),
            "db: it is added up over the outputs: b has one number per output, so add up over the tokens",
        ),
        "db of everything": (
            with_part(db=lambda x, W, b, g: np.full(len(b), g.sum())),
            "db: everything is added up: only the tokens share a number of b",
        ),
        "db kept": (
            with_part(db=lambda x, W, b, g: g.sum(axis=0, keepdims=True)),
            "db: it has the shape (1, m): b has one axis, so its gradient has one",
        ),
        "db of ones": (
            with_part(db=lambda x, W, b, g: np.ones(len(b))),
            "db: the slope of y with respect to b is 1, but the loss comes after y: g is missing",
        ),
        "dW per token": (
            with_part(dW=lambda x, W, b, g: g[:, :, None] * x[:, None, :]),
            "dW: one slice per token: all of them use the same W, so add them up",
        ),
        "dW mean": (
            with_part(dW=lambda x, W, b, g: g.T @ x / len(x)),
            "dW: it is divided by the number of tokens: where the loss is a mean, g has that",
        ),
        "dW without g": (
            with_part(dW=lambda x, W, b, g: np.ones_like(g).T @ x),
            "dW: g is missing: the loss comes after y",
        ),
        "dx without g": (
            with_part(dx=lambda x, W, b, g: np.ones_like(g) @ W),
            "dx: g is missing: the loss comes after y",
        ),
        "dx with b": (
            with_part(dx=lambda x, W, b, g: (g + b) @ W),
            "dx: b is added to g: what is added has no part in the slope of x",
        ),
        "swapped": (
            lambda x, W, b, g: (g.T @ x, g @ W, g.sum(axis=0)),
            "dx and dW are swapped: `return dx, dW, db`, in this order",
        ),
    },
)
def linear_backward(x: Any, W: Any, b: Any, g: Any) -> Any:
    """g W, gᵀ x, and the sum of g over the tokens."""
    return with_part()(x, W, b, g)


OTHER_LAYOUT = {
    r"x\,W^\top + b": r"x\,W + b",
    "W (m, n)": "W (n, m)",
    "g @ W, g.T @ x": "g @ W.T, x.T @ g",
    "W = rng.standard_normal((3, 4))": "W = rng.standard_normal((4, 3))",
    "(x @ W.T + b)": "(x @ W + b)",
}


@variant("linear_backward", OTHER_LAYOUT, draw=layer("n m"), smallest=layer("n m", T=1, n=4, m=3))
def linear_backward_columns(x: Any, W: Any, b: Any, g: Any) -> Any:
    """With W stored as (inputs, outputs)."""
    return g @ W.T, x.T @ g, g.sum(axis=0)
