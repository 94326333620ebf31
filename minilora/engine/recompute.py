"""Activation recomputation: keep a block's input alone, and compute the block again when its gradients are wanted.

Chen et al. 2016 (arXiv 1604.06174). A step then costs one more forward pass, and the activations of one block instead
of those of all. The second pass does what the first did, bit for bit: also its random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar

from .backend import Array
from .tensor import Node, Tensor, is_recording

_drawn: ContextVar[list[int] | None] = ContextVar("drawn", default=None)
_again: ContextVar[Iterator[int] | None] = ContextVar("again", default=None)


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), of which nothing but x is kept for backward. The parameters inside get their gradients as ever.

    They do even when nothing before x is trained, as under a frozen embedding: the way back enters here all the same.
    """
    if not is_recording():
        return function(x)
    drawn: list[int] = []
    token = _drawn.set(drawn)
    try:
        y = function(x.detach())
    finally:
        _drawn.reset(token)
    start, entered, value = x.data, x.node, y.data
    if entered is None and y.node is None:
        return y  # nothing to train, neither here nor before

    def vjp(g: Array) -> Array | None:
        dx: list[Array] = []
        entrance = Tensor(start, node=Node([(Node([]), dx.append)]) if entered else None)
        token = _again.set(iter(drawn))
        try:
            function(entrance).backward(g)
        finally:
            _again.reset(token)
        return dx[0] if entered else None

    return Tensor(value, node=Node([(entered or Node([]), vjp)]))


def remembered(draw: Callable[[], int]) -> int:
    """draw(), a random number, or what it gave the first time where a block is computed for the second time."""
    if (again := _again.get()) is not None:
        return next(again)
    number = draw()
    if (drawn := _drawn.get()) is not None:
        drawn.append(number)
    return number
