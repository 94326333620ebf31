"""Check an answer and say in one line what is wrong with it.

An exercise is a judge: a function that draws fresh arguments, calls the student's function with them and raises
`Wrong` with a line that helps. To find that line, what came back is compared with what known mistakes would have
given (alpha in place of alpha / r, a missing sum, ...): a `Suspect` is such a mistake and the line that names it.
"""

from __future__ import annotations

import inspect
import linecache
import os
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

DRAWS = 3  # fresh shapes and numbers that every answer is tried on
TOLERANCE = 1e-9  # in float64, relative to the largest number of the array
OK = "ok"

Suspect = tuple[str, np.ndarray]
Judge = Callable[["Answer", np.random.Generator], None]
JUDGES: dict[str, Judge] = {}  # by the name of the function that the student writes


class Wrong(Exception):
    """What is wrong with an answer, in one line and in the student's terms."""


def exercise(judge: Judge) -> Judge:
    """Register a judge under its own name, which is the name of the function that the student writes."""
    JUDGES[judge.__name__] = judge
    return judge


def check(function: Callable) -> None:
    """Try a function on fresh random inputs and print one line: "ok", "not written yet", or what is wrong with it.

    function: your answer to an exercise. The exercise is found by the function's name.

    Returns None. Under nbgrader, which sets NBGRADER_EXECUTION, or with MINILORA_STRICT=1 in the environment, an answer
    that is not right raises AssertionError with the line in place of printing it.
    """
    line = verdict(function, np.random.default_rng())
    if line != OK and (os.environ.get("NBGRADER_EXECUTION") or os.environ.get("MINILORA_STRICT") == "1"):
        raise AssertionError(line)
    print(line)


def verdict(function: Callable, rng: np.random.Generator) -> str:
    """The line that `check` prints."""
    name = getattr(function, "__name__", None)
    if not callable(function) or name not in JUDGES:
        what = f"{name!r}" if callable(function) and name else f"a value of type {type(function).__name__}"
        return f"{what} is no exercise: check one of {', '.join(JUDGES)}, without parentheses behind the name"
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning would go to stderr, for which nbgrader gives no points
        try:
            for _ in range(DRAWS):
                JUDGES[name](Answer(function), rng)
        except NotImplementedError:
            return "not written yet"
        except Wrong as wrong:
            return str(wrong)
    return OK


class Answer:
    """A student's function. Its errors become `Wrong`, and so does a change to one of its arguments.

    sizes: what the axes of the drawn arrays are called, as {"n": 7, "r": 3}. No two are equal, so that a number in an
    error tells which axis it belongs to.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.sizes: dict[str, int] = {}

    def __call__(self, **arguments: Any) -> Any:
        """Call the function with the arguments in their order, under whatever names it gives them."""
        try:
            inspect.signature(self.function).bind(*arguments.values())
        except TypeError:
            raise Wrong(f"the function must take ({', '.join(arguments)}), in this order") from None
        before = {name: x.copy() for name, x in arguments.items() if isinstance(x, (np.ndarray, dict))}
        try:
            result = self.function(*arguments.values())
        except (NotImplementedError, Wrong):
            raise
        except Exception as error:
            raise Wrong(self.explain(error)) from None
        for name, old in before.items():
            new = arguments[name]
            if not (np.array_equal(new, old) if isinstance(old, np.ndarray) else new == old):
                raise Wrong(f"the function changes its input {name}: make a new value in place of changing it (+=, *=)")
        if result is None:
            raise Wrong("the function returns nothing: is a `return` missing?")
        return result

    def explain(self, error: Exception) -> str:
        """Which line of the function stopped, why, and which axes met if it was a product of matrices."""
        place, trace = "", error.__traceback__
        while trace is not None:
            code = trace.tb_frame.f_code
            if code is getattr(self.function, "__code__", None):
                place = linecache.getline(code.co_filename, trace.tb_lineno).strip()
            trace = trace.tb_next
        where = f"at `{place}`: " if place else ""
        text = str(error).partition("\n")[0]
        if met := re.search(r"size (\d+) is different from (\d+)", text):
            names = {size: name for name, size in self.sizes.items()}
            right, left = (f"{names.get(int(size), 'size')} = {size}" for size in met.groups())
            return f"{where}the shapes do not fit, {left} meets {right} in a product: is a transpose (.T) missing?"
        return f"{where}{type(error).__name__}: {text}"


def compare(
    got: Any, want: np.ndarray, what: str, axes: str, sizes: dict[str, int], suspects: Sequence[Suspect] = ()
) -> None:
    """Raise Wrong unless `got` is the float64 array `want`.

    what, axes: what the array is called, as "dA", and its axes, as "r, n". suspects: what known mistakes give.
    """
    if not isinstance(got, np.ndarray):
        raise Wrong(f"{what} must be a NumPy array of shape ({axes}), got {type(got).__name__}")
    for line, mistake in suspects:
        if got.shape == mistake.shape and close(got, mistake) and not (got.shape == want.shape and close(got, want)):
            raise Wrong(line)
    if got.shape == want.shape[::-1] != want.shape:
        turned = ", ".join(reversed(axes.split(", ")))
        raise Wrong(f"{what} is transposed: got ({turned}), expected ({axes})")
    if got.shape != want.shape:
        raise Wrong(f"{what} must have the shape ({axes}) = {want.shape}, got {named(got.shape, sizes)}")
    if got.dtype != np.float64:
        raise Wrong(f"{what} is {got.dtype}, the inputs are float64: keep their precision")
    if not close(got, want):
        at = np.unravel_index(np.argmax(np.nan_to_num(np.abs(got - want), nan=np.inf)), want.shape)
        index = ", ".join(str(int(i)) for i in at)
        raise Wrong(f"{what}[{index}] is {got[at]:.6g}, expected {want[at]:.6g}")


def close(got: np.ndarray, want: np.ndarray) -> bool:
    """Equal in float64, but for rounding, on the scale of the largest number."""
    return bool(np.abs(got - want).max(initial=0) <= TOLERANCE * max(np.abs(want).max(initial=0), 1e-300))


def named(shape: tuple[int, ...], sizes: dict[str, int]) -> str:
    """A shape with the names of its axes where they are known: "(n, r) = (7, 3)"."""
    names = {size: name for name, size in sizes.items()}
    if shape and all(size in names for size in shape):
        return f"({', '.join(names[size] for size in shape)}) = {shape}"
    return str(shape)


def distinct_sizes(names: str, rng: np.random.Generator) -> dict[str, int]:
    """A different size for each name, as {"T": 11, "n": 5}: a transposed array never has the right shape by luck."""
    sizes = rng.choice(np.arange(6, 16), size=len(names), replace=False)
    return dict(zip(names, map(int, sizes), strict=True))
