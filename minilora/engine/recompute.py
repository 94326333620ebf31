"""Activation (gradient) checkpointing: save only a block's input, and compute the block again in the backward pass.

Chen et al. 2016 (arXiv 1604.06174). A step then costs one more forward pass, and holds the activations of one block
instead of those of all. The second forward pass equals the first bit for bit, including its random numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from .backend import Array
from .tensor import Node, Tensor, backward_pass, is_recording, leaves, shared_backward

_drawn: ContextVar[list[int] | None] = ContextVar("drawn", default=None)
_replayed: ContextVar[Iterator[int] | None] = ContextVar("replayed", default=None)


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), of which only x is saved for the backward pass. The parameters inside get their usual gradients.

    They get them even if x itself needs no gradient, as above a frozen embedding.
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
        return y  # nothing to train, neither inside nor before
    sources = inside if before is None else inside | {before: x.shape}

    def backward(g: Array) -> tuple[Array, ...]:
        entrance = Tensor(start, requires_grad=before is not None)
        token = _replayed.set(iter(drawn))
        try:
            y = function(entrance)
        finally:
            _replayed.reset(token)
        totals: dict[Node, Node] = defaultdict(lambda: Node([]))  # one for each leaf, to accumulate its gradient
        for leaf, grad in backward_pass(y, g):
            totals[leaf].receive(grad, fresh=True)
        own = [*inside] if entrance.node is None else [*inside, entrance.node]
        return tuple(totals[leaf].grad for leaf in own)

    edges = zip(sources, shared_backward(backward, len(sources)), sources.values(), strict=True)
    return Tensor(value, node=Node(list(edges), "recomputed"))


def remembered(draw: Callable[[], int]) -> int:
    """draw(), a random number; if a block is computed for the second time, the number drawn the first time."""
    if (numbers := _replayed.get()) is not None:
        return next(numbers)
    number = draw()
    if (drawn := _drawn.get()) is not None:
        drawn.append(number)
    return number
