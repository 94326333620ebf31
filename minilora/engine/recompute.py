"""Activation (gradient) checkpointing: save only a block's input, and compute the block again in the backward pass.

Chen et al. 2016 (arXiv 1604.06174). A step then costs one more forward pass, and holds the activations of one block
instead of those of all. The second forward pass equals the first bit for bit, including its random numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from .backend import Array, array_module
from .tensor import Node, Tensor, _recording, backward_pass, is_recording, leaves, shared_backward

_drawn: ContextVar[list[int] | None] = ContextVar("drawn", default=None)
_replayed: ContextVar[Iterator[int] | None] = ContextVar("replayed", default=None)
_CHANGED = (
    "recomputation: the block is not the same in the backward pass: call backward() before the model's mode or "
    "its adapters change"
)


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), of which only x is saved for the backward pass. The parameters inside get their usual gradients.

    They get them even if x itself needs no gradient, as above a frozen embedding. Raises ValueError if the function
    uses another tensor that was computed before, whose part of the gradient could not be known. The backward pass
    raises RuntimeError if the function then draws more or fewer random numbers, or no longer uses a parameter.
    """
    if not is_recording():
        return function(x)
    drawn: list[int] = []
    began, token = Node([]).number, _drawn.set(drawn)
    seen = x.detach()
    if x.node is not None:  # a hook may keep a tensor for another part of the loss: its graph leads on to x
        seen.node = Node([(x.node, lambda g: g, x.shape)])
    try:
        y = function(seen)
    finally:
        _drawn.reset(token)
    if (around := _drawn.get()) is not None:  # of a function around this one, which will draw again all that it drew
        around += drawn
    start, before, value, inside = x.data, x.node, y.data, leaves(y, began, seen.node)
    if before is None and not inside:
        return y  # nothing to train, neither inside nor before
    sources = inside if before is None else inside | {before: x.shape}

    def backward(g: Array) -> tuple[Array, ...]:
        entrance, again = Tensor(start, requires_grad=before is not None), iter(drawn)
        token, recording = _replayed.set(again), _recording.set(True)  # backward() may be called inside no_grad
        try:
            y = function(entrance)
        finally:
            _replayed.reset(token)
            _recording.reset(recording)
        if next(again, None) is not None or not inside.keys() <= leaves(y).keys():
            raise RuntimeError(_CHANGED)
        totals: dict[Node | None, Node] = defaultdict(lambda: Node([]))  # one for each source, to add up its gradient
        for leaf, grad in backward_pass(y, g):
            totals[before if leaf is entrance.node else leaf].receive(grad, fresh=True)
        if before is not None and totals[before].grad is None:  # the function does not use x
            totals[before].grad = array_module(start).zeros_like(start)
        return tuple(totals[source].grad for source in sources)

    edges = zip(sources, shared_backward(backward, len(sources)), sources.values(), strict=True)
    return Tensor(value, node=Node(list(edges), "recomputed"))


def remembered(draw: Callable[[], int]) -> int:
    """draw(), a random number; if a block is computed for the second time, the number drawn the first time."""
    numbers = _replayed.get()
    number = draw() if numbers is None else next(numbers, None)
    if number is None:
        raise RuntimeError(_CHANGED)
    if (drawn := _drawn.get()) is not None:
        drawn.append(number)
    return number
