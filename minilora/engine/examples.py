"""Gradient checks of all operations in the engine, on small random inputs: what `minilora gradcheck` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from . import fused
from .backend import Array, array_module
from .gradcheck import GradcheckReport, GradientError, gradcheck
from .tensor import OPS

Inputs = tuple[list[np.ndarray], dict[str, Any]]  # the arrays to differentiate by, and the settings


def check_all(seed: int = 0) -> Iterator[GradcheckReport]:
    """Check every registered operation and yield its report. Raises GradientError at the first wrong gradient, or for
    an operation that has no example here.
    """
    rng = np.random.default_rng(seed)
    for name, operation in OPS.items():
        if name not in EXAMPLES:
            raise GradientError(f"{name}: no example of its inputs: add one to EXAMPLES in minilora/engine/examples.py")
        arrays, settings = EXAMPLES[name](rng)
        yield gradcheck(partial(operation, **settings), *arrays, seed=seed)


def _normal(*shapes: tuple[int, ...], **settings: Any) -> Callable[[np.random.Generator], Inputs]:
    return lambda rng: ([rng.standard_normal(shape) for shape in shapes], settings)


def _positive(*shapes: tuple[int, ...], **settings: Any) -> Callable[[np.random.Generator], Inputs]:
    return lambda rng: ([rng.uniform(0.5, 2.0, shape) for shape in shapes], settings)


def _weights(like: Array) -> Array:
    """Different factors for the values of an array, as a mask has them."""
    return array_module(like).arange(like.size, dtype=like.dtype).reshape(like.shape) / like.size


_LABELS = np.array([[1, fused.NOT_SCORED, 3], [0, 5, 2]])
_ANGLES = np.linspace(-3, 3, 12).reshape(1, 4, 1, 3)

EXAMPLES: dict[str, Callable[[np.random.Generator], Inputs]] = {
    "add": _normal((3, 4), (4,)),
    "sub": _normal((3, 4), (3, 1)),
    "mul": _normal((3, 4), (1, 4)),
    "div": _positive((3, 4), (4,)),
    "neg": _normal((3, 4)),
    "pow": _positive((3, 4), exponent=3),
    "matmul": _normal((2, 3, 4), (4, 5)),
    "exp": _normal((3, 4)),
    "log": _positive((3, 4)),
    "sqrt": _positive((3, 4)),
    "tanh": _normal((3, 4)),
    "relu": _positive((3, 4)),
    "sigmoid": _normal((3, 4)),
    "sum": _normal((3, 4), axis=0),
    "mean": _normal((3, 4), axis=1, keepdims=True),
    "max": _normal((3, 4), axis=1),
    "softmax": _normal((3, 4)),
    "log_softmax": _normal((3, 4)),
    "reshape": _normal((3, 4), shape=(2, 6)),
    "transpose": _normal((2, 3, 4), axes=(2, 0, 1)),
    "getitem": _normal((5, 4), index=np.array([0, 2, 2])),
    "concatenate": _normal((2, 3), (4, 3)),
    "linear": _normal((2, 3, 4), (5, 4), (5,)),
    "masked": _normal((3, 4), mask=_weights),
    "lora_linear": _normal((2, 3, 4), (5, 4), (2, 4), (5, 2), scale=0.5),
    "dora_linear": _normal((2, 3, 4), (5, 4), (2, 4), (5, 2), (5,), norms=np.linspace(1, 2, 5), scale=0.5),
    "mixed_lora_linear": _normal(
        (3, 2, 4), (5, 4), (2, 4), (5, 2), (1, 4), (5, 1), parts=[(np.array([0, 2]), 0.5), (None, 2.0)]
    ),
    "embedding": _normal((6, 4), ids=np.array([[0, 2, 2], [5, 1, 0]])),
    "rms_norm": _normal((2, 3, 4), (4,), eps=1e-5),
    "layer_norm": _normal((2, 3, 4), (4,), (4,), eps=1e-5),
    "rope": _normal((2, 4, 2, 6), cos=np.cos(_ANGLES), sin=np.sin(_ANGLES)),
    "gelu": _normal((2, 3, 4)),
    "swiglu": _normal((2, 3, 4), (2, 3, 4)),
    "geglu": _normal((2, 3, 4), (2, 3, 4)),
    "attention": _normal((2, 4, 4, 6), (2, 5, 2, 6), (2, 5, 2, 6), block=3, window=3),
    "cross_entropy": _normal((2, 3, 6), labels=_LABELS),
    "preference_loss": _normal((), (), (), (), reference=np.array([0.3, -1.0]), beta=np.array([0.5, 2.0])),
    "linear_cross_entropy": _normal((2, 3, 4), (6, 4), labels=_LABELS, block=2),
}
