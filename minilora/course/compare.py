"""Compare an answer's result with the solution's, and say in one line how they differ."""

import math
from collections.abc import Mapping
from itertools import permutations
from typing import Any

import numpy as np

from ..engine.tensor import Tensor

TOLERANCE = 1e-9  # in float64, relative to the largest number of the array
ALIKE = 1e-6  # how close a wrong result must be to what it is recognised as, relatively
NONE = "the function returns None: is a `return` missing?"
NEARLY = "is it rounded, a difference instead of a derivative, or is a small number such as eps added?"
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}


class Wrong(Exception):
    """An answer that is wrong; the message says in one line what is wrong, in the student's terms."""


class Differs(Wrong):
    """An answer of the right kind that has another value than the solution. how: what is known about the difference."""

    def __init__(self, line: str, how: str = ""):
        super().__init__(f"{line}{how and '; '}{how}")
        self.how = how


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


def _alike(got: np.dtype, want: np.dtype) -> bool:
    """Whether arrays of these types may be equal. Where integers are wanted, they may have any width, and no sign."""
    return got == want or (want.kind == "i" and got.kind in "iu")


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
    if value is None:
        raise Wrong(NONE)
    if not is_number(value):
        raise Wrong(f"{what} must be one number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise Wrong(f"{what} is {value}: is something divided by zero, or is it the logarithm of a negative number?")
    return value


def compare(
    got: Any,
    want: Any,
    what: str,
    axes: str | None,
    sizes: Mapping[str, int],
    tolerance: float = TOLERANCE,
    numbers: Mapping[str, float] | None = None,
) -> None:
    """Raise Wrong unless `got` is `want`.

    what, axes: the value's name, such as "dA", and its axes, such as "r, n", if it is an array. sizes: of the axes.
    numbers: by name, those that a factor may consist of; by default the sizes.
    """
    numbers = sizes if numbers is None else numbers
    if isinstance(want, Tensor):
        if not isinstance(got, Tensor):
            raise Wrong(f"{what} must be a tensor, as ml.Tensor({what}), got {type(got).__name__}")
        if got.requires_grad != want.requires_grad:
            raise Wrong(f"{what} must {'require' if want.requires_grad else 'not require'} a gradient (requires_grad)")
        got, want = got.data, want.data
    if isinstance(want, np.ndarray) and not want.ndim:
        want = want[()]
    if isinstance(want, np.ndarray):
        _compare_arrays(got, want, what, axes or "", sizes, tolerance, numbers)
    elif is_number(want):
        value = number(got, what)
        if not same(value, want, tolerance):
            _report(what, _digits(value), _digits(want), _number_pattern(value, want, numbers))
    elif not same(got, want, tolerance):
        if isinstance(want, (list, tuple, dict)):
            _compare_items(got, want, what, tolerance)
        _report(what, *_shortened(got, want))


def _compare_items(got: Any, want: list | tuple | dict, what: str, tolerance: float) -> None:
    """Raise Wrong with the first item in which two lists or dictionaries differ."""
    mapping = isinstance(want, dict)
    if not isinstance(got, dict if mapping else (list, tuple)):
        raise Wrong(f"{what} must be a {type(want).__name__}, got {type(got).__name__}")
    keys = list(want) if mapping else range(min(len(got), len(want)))
    if mapping and (keys != list(got) and {*want} != {*got}):
        lost, extra = [key for key in want if key not in got], [key for key in got if key not in want]
        raise Wrong(f"{what} must have the key {lost[0]!r}" if lost else f"{what} must not have the key {extra[0]!r}")
    first = next((key for key in keys if not same(got[key], want[key], tolerance)), None)
    lengths = "" if len(got) == len(want) else f"the number of values is {len(got)}, expected {len(want)}"
    if first is None:
        raise Differs(f"{what}: {lengths}", "the first values are right" if keys else "")
    _report(f"{what}[{first!r}]", *_shortened(got[first], want[first]), lengths)


def _digits(x: float) -> str:
    return f"{x:,.0f}" if x % 1 == 0 and abs(x) < 1e15 else f"{x:,.7g}"


def _shortened(got: Any, want: Any) -> tuple[str, str]:
    """Two values as code, 60 characters of each: the first ones, or those around the place where they first differ."""
    a, b = (repr(x.item() if isinstance(x, np.generic) else x) for x in (got, want))
    apart = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = apart - 20 if apart > 50 else 0
    cut = lambda text: f"{'...' if start else ''}{text[start : start + 57]}{'...' if len(text) > start + 57 else ''}"
    return cut(a), cut(b)


def _compare_arrays(
    got: Any,
    want: np.ndarray,
    what: str,
    axes: str,
    sizes: Mapping[str, int],
    tolerance: float,
    numbers: Mapping[str, float],
) -> None:
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
        hint = ": keep the precision of the inputs" if got.dtype.kind == want.dtype.kind == "f" else ""
        if want.dtype == np.int64 and got.dtype.kind in "bf" and what.isidentifier():
            hint = f": write {what}.astype(int)"
        raise Wrong(f"{what} is {got.dtype}, expected {want.dtype}{hint}")
    if not np.issubdtype(want.dtype, np.number):
        if not np.array_equal(got, want):
            raise Wrong(f"{what} differs from what is expected in {int((got != want).sum())} places")
        return
    if np.isnan(got).any():
        raise Wrong(f"{what} contains NaN (not a number): is something divided by zero, or infinite?")
    if np.isinf(got).any() and np.isfinite(want).all():
        raise Wrong(
            f"{what} contains {got[np.isinf(got)][0]}: is something divided by zero, or is an exponential too large?"
        )
    if not same(got, want, tolerance):
        with np.errstate(invalid="ignore"):  # of equal infinities
            apart = np.nan_to_num(np.abs(np.subtract(got, want, dtype=float)), posinf=np.inf)
        at = np.unravel_index(np.argmax(apart), want.shape)
        index = ", ".join(str(int(i)) for i in at)
        how = ""
        if np.isfinite(want).all():
            how = _pattern(got.astype(float), want.astype(float), what, apart > tolerance * np.abs(want).max(), numbers)
        _report(f"{what}[{index}]", f"{got[at]:.6g}", f"{want[at] + 0:.6g}", how)  # + 0: no minus before a zero


def _report(what: str, got: str, want: str, how: str = "") -> None:
    if got == want:
        raise Differs(f"{what} is {got} as expected, but later digits differ", NEARLY)
    raise Differs(f"{what} is {got}, expected {want}", how)


def _number_pattern(got: float, want: float, numbers: Mapping[str, float]) -> str:
    """How two numbers differ: by a factor that has a name or is a whole number, or whole numbers by how many."""
    whole = got % 1 == want % 1 == 0
    if not (want and math.isfinite(want)):
        return ""
    if abs(got + want) < ALIKE * abs(want):
        return "the sign is wrong"
    if not whole and got and any(got == round(want, digits) for digits in range(2, 7)):
        return "it is rounded: return all digits"
    factor = got / want
    if 1e-300 < abs(factor) < 1e300 and (not whole or abs(want) >= 1000):
        name = _product(factor, numbers)
        if name or any(abs(x - round(x)) < ALIKE and 2 <= round(abs(x)) < 1e7 for x in (factor, 1 / factor)):
            return f"that is {_times(factor, name)}"
    return f"{_digits(abs(got - want))} too {'large' if got > want else 'small'}" if whole else ""


def _pattern(got: np.ndarray, want: np.ndarray, what: str, wrong: np.ndarray, numbers: Mapping[str, float]) -> str:
    """How an array differs from the expected one; "" if there is nothing to say. wrong: where it does."""
    if not got.any():
        return f"{what} is zero everywhere"
    if any(np.array_equal(got, want.round(digits)) for digits in range(2, 7)):
        return "it is rounded: return all digits"
    if close(got, want, ALIKE):
        return NEARLY
    if want.size > 1 and (factor := _constant(got, want)) is not None:
        if abs(factor + 1) < ALIKE:
            return f"all of {what} has the wrong sign"
        return f"all of {what} is {_times(factor, _product(factor, numbers))}"
    if want.size > 2 and close(got - got.mean(), want - want.mean(), ALIKE):
        offset = float((got - want).mean())
        return f"all of {what} is {abs(offset):.4g} too {'large' if offset > 0 else 'small'}"
    if close(np.abs(got), np.abs(want), ALIKE):
        return f"the magnitudes are right, the sign is wrong in {int(wrong.sum())} of {want.size} places"
    if want.ndim == 2 and min(want.shape) > 1:
        for name, a, b in (("row", got, want), ("column", got.T, want.T)):
            factors = [_constant(x, y) for x, y in zip(a, b, strict=True)]
            if None not in factors and sum(not close(x, y, ALIKE) for x, y in zip(a, b, strict=True)) > 1:
                return f"each {name} is right except for a factor, which differs from {name} to {name}"
            if close(a[np.lexsort(a.T.round(6))], b[np.lexsort(b.T.round(6))], ALIKE):
                return f"the {name}s are right, but in another order"
    if want.size > 2 and close(np.sort(got, axis=None), np.sort(want, axis=None), ALIKE):
        return "the numbers are right, but in other places"
    return _places(got, want, what, wrong)


def _places(got: np.ndarray, want: np.ndarray, what: str, wrong: np.ndarray) -> str:
    """Where an array differs from the expected one; "" if it does nearly everywhere."""
    if (empty := int(((got == 0) & (want != 0)).sum())) > want.size / 4:
        return f"{empty} of its {want.size} numbers are zero, but should not be"
    if len(wrong) > 1:
        rows = wrong.reshape(len(wrong), -1).any(axis=1)
        for some, state in ((np.flatnonzero(rows), "wrong"), (np.flatnonzero(~rows), "right")):
            if len(some) == 1:
                return f"only {what}[{some[0]}] is {state}"
    return f"{int(wrong.sum())} of {want.size} places differ" if wrong.sum() < 0.9 * want.size else ""


def _constant(got: np.ndarray, want: np.ndarray) -> float | None:
    """The factor between two arrays, if it is the same everywhere."""
    most = np.abs(want).argmax()
    factor = got.flat[most] / want.flat[most] if want.flat[most] else 0.0
    return float(factor) if factor and close(got, factor * want, ALIKE) else None


def _times(factor: float, name: str) -> str:
    part = round(1 / factor) if abs(factor) > 1e-3 else 0
    shown = f"1/{part}" if 3 <= part < 100 and abs(part * factor - 1) < ALIKE else f"{factor:,.6g}"
    return f"{shown}{name and f' ({name})'} times the expected value"


def _product(factor: float, numbers: Mapping[str, float]) -> str:
    """A factor in terms of named numbers, as "1 / m" or "-T / V". "" if there is none, for 2 and 1/2, which are often
    a forgotten 2, and for a power of ten.
    """
    sign, factor = "-" if factor < 0 else "", abs(factor)
    if not 1e-300 < factor < 1e300 or abs(math.log10(factor) - round(math.log10(factor))) < ALIKE:
        return ""
    if abs(factor - 2) < ALIKE or abs(factor - 0.5) < ALIKE:
        return ""
    known = {name: abs(value) for name, value in numbers.items() if abs(value) not in (0, 1) and " " not in name}
    forms = {form: value for a, x in known.items() for form, value in ((a, x), (f"1 / {a}", 1 / x))}
    if not any(abs(x - round(x)) < ALIKE and round(x) < 9 for x in (factor, 1 / factor)):  # other forms of 2 are chance
        for a, x in known.items():
            forms |= {f"{a}²": x**2, f"1 / {a}²": x**-2, f"sqrt({a})": x**0.5, f"1 / sqrt({a})": x**-0.5}
            for b, y in known.items():
                forms |= {f"{a} / {b}": x / y} if a != b else {}
                forms |= {f"{a} · {b}": x * y, f"1 / ({a} · {b})": 1 / (x * y)} if a < b else {}
    return next((sign + form for form, value in forms.items() if abs(factor / value - 1) < ALIKE), "")


def named(shape: tuple[int, ...], sizes: Mapping[str, int]) -> str:
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
