"""The ledger: what a training job really holds, by owner, found by following the graph back from the loss.

An operation's saved arrays are in the closures of its VJPs, where Python stores what a nested function uses from
outside. So the activations can be read off the graph, array by array, each with the name of the operation that saved
it. `predict_memory` computes the same from shapes, before anything runs.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import is_dataclass
from functools import partial
from typing import Any

from ..engine.backend import Array
from ..engine.tensor import OPS, Node, Tensor
from ..lora.adapters import base_state, lora_modules
from ..nn.language_model import LanguageModel
from ..nn.optim import AdamW
from .predict import Memory


def ledger(model: LanguageModel, optimizer: AdamW | None = None, loss: Tensor | None = None) -> Memory:
    """What is held now, by owner, in bytes. Scratch and program are 0: a finished operation has freed its scratch.

    loss: the result of `model.loss`, before its backward pass; what its graph holds counts as activations.
    """
    seen: dict[int, Array] = {}
    parameters = dict(model.named_parameters())
    weights = _new_bytes(seen, base_state(model).values())
    adapter = _new_bytes(seen, (p.data for p in parameters.values()))  # the base is counted already
    weights_of = (weights for module in lora_modules(model).values() for weights in module.adapters.values())
    adapter += _new_bytes(seen, (array for weights in weights_of for array in weights.initial or ()))
    gradients = _new_bytes(seen, (p.grad for p in parameters.values() if p.grad is not None))
    moments = _new_bytes(seen, [*optimizer.m, *optimizer.v]) if optimizer else 0
    kept = Counter[str]()
    if loss is not None and loss.node is not None:
        for operation, array in kept_arrays(loss.node):
            kept[operation] += _new_bytes(seen, [array])
    by_operation = {name: n for name, n in kept.most_common() if n}
    return Memory(weights, adapter, gradients, moments, sum(by_operation.values()), by_operation=by_operation)


def peak(function: Callable[[], object]) -> int:
    """Run `function()` and return the most bytes that it held at any moment, without what was held before.

    Python's tracemalloc counts them; NumPy reports its arrays to it. The function runs slower.
    """
    gc.collect()
    was_tracing = tracemalloc.is_tracing()
    if not was_tracing:
        tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        function()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        if not was_tracing:
            tracemalloc.stop()


def kept_arrays(start: Node) -> Iterator[tuple[str, Array]]:
    """Every array that the graph behind `start` holds for the backward pass, with the operation that saved it.

    An array can come several times, and parameters come, too. A recomputable operation computes its output again from
    arrays that it has saved itself, so its closure is not searched again where another operation refers to it.
    """
    nodes = _graph(start)
    visited = {id(node.recompute) for node in nodes}
    for node in nodes:
        for _, vjp, _ in node.edges or ():
            yield from _held_by(vjp, node.name, visited)


def _graph(start: Node) -> list[Node]:
    nodes = {start: None}
    for node in (stack := [start]):  # grows while it is walked through
        new = [parent for parent, _, _ in node.edges or () if parent not in nodes]
        nodes |= dict.fromkeys(new)
        stack += dict.fromkeys(new)
    return stack


def _held_by(x: Any, operation: str, visited: set[int]) -> Iterator[tuple[str, Array]]:
    """The arrays that x, an object captured by a VJP, keeps alive. Modules belong to the model and are passed over."""
    inside: Iterable[Any] = ()
    if _is_array(x):
        yield operation, x
    elif isinstance(x, (list, tuple)):
        inside = x
    elif isinstance(x, dict):
        inside = x.values()
    elif isinstance(x, partial):
        inside = (x.func, *x.args, *x.keywords.values())
    elif is_dataclass(x):
        inside = vars(x).values()
    elif getattr(x, "__closure__", None) and id(x) not in visited:
        visited.add(id(x))
        name = x.__qualname__.partition(".")[0]  # "attention.<locals>.backward" belongs to attention
        operation = name if name in OPS else operation
        inside = [cell.cell_contents for cell in x.__closure__ if _is_filled(cell)]
    for part in inside:
        yield from _held_by(part, operation, visited)


def _is_array(x: Any) -> bool:
    return hasattr(x, "nbytes") and hasattr(x, "base") and x.ndim > 0  # of NumPy or CuPy, and not a scalar


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable without a value
        return False


def _new_bytes(seen: dict[int, Array], arrays: Iterable[Array]) -> int:
    """The bytes of the buffers that are not in `seen`, and then are. A view counts as the array that it shows."""
    total = 0
    for x in arrays:
        buffer: Array = getattr(x, "raw", x)  # of a quantised matrix, its bytes
        while _is_array(below := buffer.base):
            buffer = below
        if id(buffer) not in seen:
            seen[id(buffer)] = buffer
            total += buffer.nbytes
    return total
