"""Activation recomputation: keep a block's input alone, and compute the block again when its gradients are wanted.

Chen et al. 2016 (arXiv 1604.06174). A step then costs one more forward pass, and the activations of one block instead
of those of all. The second pass does what the first did, bit for bit: also its random numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from .backend import Array
from .tensor import Node, Tensor, is_recording, leaves, shared_backward, walk_back

_drawn: ContextVar[list[int] | None] = ContextVar("drawn", default=None)
_replayed: ContextVar[Iterator[int] | None] = ContextVar("replayed", default=None)


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), of which nothing but x is kept for backward. The parameters inside get their gradients as ever.

    They do even when nothing before x is trained, as under a frozen embedding.
    """
    if not is_recording():
        return function(x)
    drawn: list[int] = []
    token = _drawn.set(drawn)
    try:
        y = function(x.detach())
    finally:
        _drawn.reset(token)
    start, before, value, inside = x.data, x.node, y.data, leaves(y)
    if before is None and not inside:
        return y  # nothing to train, neither here nor before
    sources = inside if before is None else inside | {before: x.shape}

    def backward(g: Array) -> tuple[Array, ...]:
        entrance = Tensor(start, requires_grad=before is not None)
        token = _replayed.set(iter(drawn))
        try:
            y = function(entrance)
        finally:
            _replayed.reset(token)
        totals: dict[Node, Node] = defaultdict(lambda: Node([]))  # a stand-in for each leaf, which adds up
        for leaf, grad in walk_back(y, g):
            totals[leaf].receive(grad, fresh=True)
        own = [*inside] if entrance.node is None else [*inside, entrance.node]
        return tuple(totals[leaf].grad for leaf in own)

    edges = zip(sources, shared_backward(backward, len(sources)), sources.values(), strict=True)
    return Tensor(value, node=Node(list(edges), "recomputed"))


def remembered(draw: Callable[[], int]) -> int:
    """draw(), a random number, or what it gave the first time where a block is computed for the second time."""
    if (numbers := _replayed.get()) is not None:
        return next(numbers)
    number = draw()
    if (drawn := _drawn.get()) is not None:
        drawn.append(number)
    return number
