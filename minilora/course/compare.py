"""Compare an answer's result with the solution's, and say in one line how they differ."""

import math
from collections.abc import Mapping
from itertools import permutations
from typing import Any

import numpy as np

from ..engine.tensor import Tensor

TOLERANCE = 1e-9  # in float64, relative to the largest number of the array
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}


class Wrong(Exception):
    """An answer that is wrong; the message says in one line what is wrong, in the student's terms."""


def close(got: np.ndarray, want: np.ndarray, tolerance: float = TOLERANCE) -> bool:
    """Equal except for rounding, relative to the largest number; False where a number is NaN."""
    return bool(np.abs(got - want).max(initial=0) <= tolerance * max(np.abs(want).max(initial=0), 1e-300))


def same(a: Any, b: Any, tolerance: float = TOLERANCE) -> bool:
    """Whether two values of any kind are equal within the tolerance. NaN equals NaN: mistakes are compared, too."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        alike = isinstance(a, Tensor) and isinstance(b, Tensor) and a.requires_grad == b.requires_grad
        return alike and same(a.data, b.data, tolerance)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)) or a.shape != b.shape:
            return False
        if not _alike(a.dtype, b.dtype):
            return False
        if not np.issubdtype(a.dtype, np.number):
            return bool(np.array_equal(a, b))
        finite = np.isfinite(a)
        same_holes = np.array_equal(finite, np.isfinite(b)) and np.array_equal(a[~finite], b[~finite], equal_nan=True)
        return bool(same_holes) and close(a[finite], b[finite], tolerance)
    if is_number(a) and is_number(b):
        near = math.isfinite(b) and abs(a - b) <= tolerance * abs(b)
        return bool(a == b or (math.isnan(a) and math.isnan(b)) or near)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], tolerance) for key in a)
    return type(a) is type(b) and bool(a == b)


def _alike(a: np.dtype, b: np.dtype) -> bool:
    """Whether arrays of these types may be equal. Integers may have any width, which differs between systems."""
    return a == b or a.kind == b.kind == "i"


def chance(value: Any, drawn: Mapping[str, Any]) -> int:
    """How often two mistakes have this value by chance: 0 never, 1 rarely, 2 often (a text, a small whole number).

    drawn: the arguments. A number out of a list of them is no better than its place in the list.
    """
    given = [x for each in drawn.values() if isinstance(each, list) for x in each if isinstance(x, float)]
    numbers = [x for x in leaves(value) if is_number(x) and math.isfinite(x)]
    if any(x % 1 != 0 and x not in given for x in numbers):
        return 0
    return 1 if len(leaves(value)) > 8 or any(abs(x) >= 1000 for x in numbers) else 2


def leaves(value: Any) -> list[Any]:
    """All numbers and texts in a value of any kind."""
    value = value.data if isinstance(value, Tensor) else value
    if isinstance(value, np.ndarray):
        return value.ravel().tolist()
    if isinstance(value, (list, tuple, dict)):
        return [x for part in (value.values() if isinstance(value, dict) else value) for x in leaves(part)]
    return [value]


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of an array, or of lists that would make one; () for all else."""
    try:
        return np.shape(value)
    except (TypeError, ValueError):  # a tensor, or lists of different lengths
        return ()


def is_number(value: Any) -> bool:
    """Whether this is one number, of Python or of NumPy, and not a truth value."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def number(value: Any, what: str) -> float:
    """The answer as a number. Raises Wrong if it is not one, or is not finite."""
    if isinstance(value, np.ndarray) and value.shape == ():
        value = value[()]
    if not is_number(value):
        raise Wrong(f"{what} must be one number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise Wrong(f"{what} is {value}: is something divided by zero?")
    return value


def compare(
    got: Any, want: Any, what: str, axes: str | None, sizes: dict[str, int], tolerance: float = TOLERANCE
) -> None:
    """Raise Wrong unless `got` is `want`.

    what, axes: the value's name, such as "dA", and its axes, such as "r, n", if it is an array. sizes: of the axes.
    """
    if isinstance(want, Tensor):
        if not isinstance(got, Tensor):
            raise Wrong(f"{what} must be a tensor, as ml.Tensor({what}), got {type(got).__name__}")
        if got.requires_grad != want.requires_grad:
            raise Wrong(f"{what} must {'require' if want.requires_grad else 'not require'} a gradient (requires_grad)")
        got, want = got.data, want.data
    if isinstance(want, np.ndarray) and want.ndim:
        _compare_arrays(got, want, what, axes or "", sizes, tolerance)
    elif is_number(want) or isinstance(want, np.ndarray):
        value = number(got, what)
        if not abs(value - want) <= tolerance * abs(want):
            _report(what, f"{value:,.7g}", f"{want:,.7g}")
    elif not same(got, want, tolerance):
        if isinstance(want, (list, tuple, dict)):
            if not isinstance(got, dict if isinstance(want, dict) else (list, tuple)):
                raise Wrong(f"{what} must be a {type(want).__name__}, got {type(got).__name__}")
            if len(got) != len(want):
                raise Wrong(f"{what}: got {len(got)} values, expected {len(want)}")
        short = [text if len(text) < 60 else text[:57] + "..." for text in map(repr, (got, want))]
        raise Wrong(f"{what} is {short[0]}, expected {short[1]}")


def _compare_arrays(got: Any, want: np.ndarray, what: str, axes: str, sizes: dict[str, int], tolerance: float) -> None:
    shape = f"({axes}) = {want.shape}" if axes else f"{want.shape}"
    if not isinstance(got, np.ndarray):
        raise Wrong(f"{what} must be a NumPy array of shape {shape}, got {type(got).__name__}")
    if got.shape == want.shape[::-1] != want.shape:
        names = ", ".join(reversed(axes.split(", ")))
        both = f"({names}), expected ({axes})" if names != axes else f"{got.shape}, expected {want.shape}"
        raise Wrong(f"{what} is transposed: got {both}")
    if got.shape != want.shape:
        raise Wrong(f"{what} must have the shape {shape}, got {named(got.shape, sizes)}")
    if not _alike(got.dtype, want.dtype):
        hint = ": keep the precision of the inputs" if want.dtype == np.float64 else ""
        raise Wrong(f"{what} is {got.dtype}, expected {want.dtype}{hint}")
    if not np.issubdtype(want.dtype, np.number):
        if not np.array_equal(got, want):
            raise Wrong(f"{what} differs from what is expected in {int((got != want).sum())} places")
        return
    if np.isnan(got).any():
        raise Wrong(f"{what} contains NaN (not a number): is something divided by zero, or infinite?")
    if not close(got, want, tolerance):
        at = np.unravel_index(np.argmax(np.abs(got - want)), want.shape)
        index = ", ".join(str(int(i)) for i in at)
        _report(f"{what}[{index}]", f"{got[at]:.6g}", f"{want[at] + 0:.6g}")  # + 0: no minus before a zero


def _report(what: str, got: str, want: str) -> None:
    if got == want:
        raise Wrong(f"{what} is {got} as expected, but later digits differ: is it rounded, or measured, not derived?")
    raise Wrong(f"{what} is {got}, expected {want}")


def named(shape: tuple[int, ...], sizes: dict[str, int]) -> str:
    """A shape with the names of its axes where they are known: "(n, r) = (7, 3)"."""
    names = {size: name for name, size in sizes.items()}
    if shape and all(size in names for size in shape):
        return f"({', '.join(names[size] for size in shape)}) = {shape}"
    return str(shape)


def as_parts(result: Any, names: list[str], wanted: list[Any]) -> list[Any]:
    """The values that an answer returns, one for each name. Raises Wrong if their number or order is another."""
    if len(names) == 1:
        return [result]
    order = f"`return {', '.join(names)}`"
    if isinstance(result, np.ndarray) and result.ndim and result.shape == shape_of(wanted):  # all in one
        result = list(result)
    if not isinstance(result, (tuple, list)) or len(result) != len(names):
        kind = "arrays" if all(isinstance(want, np.ndarray) for want in wanted) else "values"
        raise Wrong(f"return {COUNTS.get(len(names), len(names))} {kind}: {order}")
    for alike in (lambda a, b: shape_of(a) == shape_of(b), same):
        moved = [name for name, a, b in zip(names, result, wanted, strict=False) if not alike(a, b)]
        if moved and any(all(map(alike, result, other)) for other in permutations(wanted)):
            raise Wrong(f"{', '.join(moved[:-1])} and {moved[-1]} are swapped: {order}, in this order")
    return list(result)


def check_deviation(values: np.ndarray, what: str, expected: str, want: float) -> None:
    """Raise Wrong unless random numbers have mean 0 and the standard deviation `want`, which `expected` spells.

    Accepts any distribution. The bounds are 6 standard errors for the mean, and a fifth for the standard deviation of
    a few thousand numbers, so that no right answer fails by chance.
    """
    mean, deviation = float(np.mean(values)), float(np.std(values))
    if abs(mean) > 6 * deviation / math.sqrt(values.size):
        raise Wrong(f"{what}'s numbers have the mean {mean:.3g}: half of them must be below zero, half above")
    if not 0.8 * want < deviation < 1.25 * want:
        size = "large" if deviation > want else "small"
        raise Wrong(f"{what}'s numbers are too {size}: standard deviation {deviation:.3g}, expected {expected}")


def digits(value: float) -> str:
    """A number for readers: integers in full, others with four digits."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
