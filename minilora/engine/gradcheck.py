"""Gradient check: compare a gradient with central differences.

Each input element is moved by ±eps, and the change of L = Σ w · f(inputs) is measured, with fixed random weights w.
The quotient (L₊ - L₋) / 2 eps is the derivative up to an error of order eps². Everything is in float64: in float32 the
quotient itself is wrong in the third digit, and a check with such a tolerance misses real mistakes. The message about
a wrong gradient contains no random weights: it names one element of the result and one of an input, to check by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import singledispatch

import numpy as np

from .backend import Array
from .tensor import Tensor, no_grad

F = Callable[..., Tensor]
ACCURACY = 1e-10  # of central differences in float64: derivatives that are all smaller are 0


class GradientError(AssertionError):
    """A gradient differs from the central difference; the message names the input and the element."""


@dataclass(frozen=True)
class GradcheckReport:
    """The result of `gradcheck`: a name, the number of elements, and the largest relative error of all inputs."""

    name: str
    elements: int
    max_relative_error: float

    def __str__(self) -> str:
        return f"{self.name:<24} {self.elements:>6} derivatives, largest relative error {self.max_relative_error:.1e}"


@singledispatch
def gradcheck(f: F, *arrays: Array, eps: float = 1e-5, tolerance: float = 1e-6, seed: int = 0) -> GradcheckReport:
    """Check f's gradient with respect to every element of every array. Returns a GradcheckReport.

    Of a model, `ml.gradcheck(model, samples)`, of another module, `ml.gradcheck(module, *arrays)`: see nn/gradcheck.py.

    f: takes as many tensors as there are arrays, and returns a tensor of any shape.
    arrays: the inputs, of any float dtype; they are copied to float64.
    eps: half the distance of the central differences.
    tolerance: the largest accepted relative error. Elements smaller than a thousandth of the largest gradient are
        compared on that scale. A difference below 1e-10 is none, since central differences are not more accurate.
    seed: of the random weights.

    Raises GradientError that names the input, the index, and the derivative of one element of the result: got and
    expected.

    >>> gradcheck(lambda x: x * x, np.array([1.0, 2.0])).elements
    2
    """
    name: str = getattr(getattr(f, "func", f), "__name__", "function")  # func: of a partial
    inputs = {f"input {i}": Tensor(np.array(a, dtype=np.float64), requires_grad=True) for i, a in enumerate(arrays)}
    return compare(f, name, inputs, eps, tolerance, seed)


def compare(f: F, name: str, of: Mapping[str, Tensor], eps: float, tolerance: float, seed: int = 0) -> GradcheckReport:
    """`gradcheck` of a function called `name`, whose float64 inputs have names."""
    inputs = list(of.values())
    if not inputs:
        raise ValueError("gradcheck needs at least one array to differentiate with respect to")
    y = f(*inputs)
    if not isinstance(y, Tensor) or not y.requires_grad:
        raise GradientError(f"{name}: the result does not depend on any input through the graph")
    weights = np.random.default_rng(seed).standard_normal(y.shape)
    y.backward(weights)

    worst, count = 0.0, 0
    for called, x in of.items():
        got = np.zeros(x.shape) if x.grad is None else x.grad
        slopes_at = [np.sum(weights * _slopes(f, inputs, x, index, eps)) for index in np.ndindex(x.shape)]
        expected = np.array(slopes_at).reshape(x.shape)
        error = _relative_error(got, expected, tolerance)
        count += x.size
        if x.size and not error.max() <= tolerance:  # written so that NaN fails
            index = tuple(int(i) for i in np.unravel_index(np.argmax(np.nan_to_num(error, nan=np.inf)), x.shape))
            details = _got_and_expected(f, inputs, x, index, eps, weights, tolerance)
            raise GradientError(f"{name}: gradient of {called} at index {index}{details}")
        worst = max(worst, float(error.max(initial=0.0)))
    return GradcheckReport(name, count, worst)


def _relative_error(got: np.ndarray, expected: np.ndarray, tolerance: float) -> np.ndarray:
    """Within the tolerance if the difference is below ACCURACY."""
    largest = [float(np.abs(each).max(initial=0.0)) for each in (expected, got)]
    if all(each < ACCURACY for each in largest):  # not NaN
        return np.zeros_like(expected)
    least = max(1e-3 * max(largest), ACCURACY / max(tolerance, ACCURACY))
    with np.errstate(invalid="ignore"):  # an infinite gradient makes inf / inf, NaN, which exceeds any tolerance
        return np.abs(got - expected) / np.maximum(np.maximum(np.abs(got), np.abs(expected)), least)


def _slopes(f: F, inputs: list[Tensor], x: Tensor, index: tuple, eps: float) -> np.ndarray:
    """The derivative of every element of the result with respect to one element of x, by central differences."""
    with no_grad():
        middle = x.data[index]
        x.data[index] = middle + eps
        above = f(*inputs).data.copy()  # a copy, since it may be a view of x, which changes next
        x.data[index] = middle - eps
        below = f(*inputs).data.copy()
        x.data[index] = middle
    return (above - below) / (2 * eps)


def _got_and_expected(
    f: F, inputs: list[Tensor], x: Tensor, index: tuple, eps: float, weights: np.ndarray, tolerance: float
) -> str:
    """The end of the message about a wrong gradient at x[index]: of which element of the result, to check by hand."""
    expected = _slopes(f, inputs, x, index, eps)

    def got(g: np.ndarray) -> float:
        x.grad = None
        f(*inputs).backward(g)
        return 0.0 if x.grad is None else x.grad[index]

    units = np.eye(expected.size).reshape(-1, *expected.shape)  # for each element of the result: g, which is 1 there
    found = np.array([got(unit) for unit in units]).reshape(expected.shape)
    wrong = ~(_relative_error(found, expected, tolerance) <= tolerance)
    if wrong.any():  # of those elements, the one with the largest derivative
        out = np.unravel_index(np.argmax(np.where(wrong, np.abs(expected), -1)), expected.shape)
        where = f", of the result's element {tuple(int(i) for i in out)}" if out else ""
        mine, right = found[out], expected[out]
    else:  # right for each element alone, so the VJP is not linear in g
        where = ", where g is not 1"
        mine, right = np.array(got(weights)), np.sum(weights * expected)
    error = float(_relative_error(mine, right, tolerance))
    return f"{where}: got {mine:.10g}, expected {right:.10g} (relative error {error:.1e}, tolerance {tolerance:.0e})"
