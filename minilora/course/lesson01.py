"""Lesson 1's exercises: measure a gradient, compare two, and derive a first one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .exercises import Draw, arrays, distinct_sizes, exercise, variant

# -- 1.1 measure a whole gradient --------------------------------------------------------------------------------------


def draw_function(rng: np.random.Generator, axes: int) -> Draw:
    """A function with slopes that differ everywhere, x with so many axes, and a step that shows in the result."""
    x = rng.standard_normal(tuple(int(size) for size in rng.integers(3, 7, axes)))
    if axes == 1:
        x = rng.standard_normal(int(rng.integers(9, 20)))
    a, b, c = rng.uniform(0.5, 1.5, (3, *x.shape))

    def f(x: Any) -> float:
        return float((a * x**3 + b * x).sum() + np.tanh((c * x).sum()))

    return Draw(f=f, x=x, eps=float(rng.uniform(0.05, 0.2)))


def one_number(rng: np.random.Generator) -> Draw:
    """x of a single number."""
    return Draw(f=lambda x: float((x**3).sum()), x=rng.uniform(1, 2, 1), eps=0.1)


def each(slope: Callable[..., float]) -> Callable:
    """The gradient made of slope(f, x, one, eps) at every place; `one` is 1 there and 0 elsewhere."""

    def answer(f: Any, x: Any, eps: float = 1e-5) -> Any:
        gradient = np.zeros_like(x)
        for place, one in units(x):
            gradient[place] = slope(f, x, one, eps)
        return gradient

    return answer


def units(x: Any) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Every place of x, and an array that is 1 there."""
    for place in np.ndindex(x.shape):
        one = np.zeros_like(x)
        one[place] = 1
        yield place, one


def moved(back: Callable[..., None], own: bool) -> Callable:
    """In-place nudges: back(x, place, old, eps) is what is done after the second. own: on a copy of x."""

    def answer(f: Any, x: Any, eps: float = 1e-5) -> Any:
        x = x.copy() if own else x
        gradient = np.zeros_like(x)
        for place in np.ndindex(x.shape):
            old = x[place]
            x[place] += eps
            above = f(x)
            x[place] -= 2 * eps
            below = f(x)
            back(x, place, old, eps)
            gradient[place] = (above - below) / (2 * eps)
        return gradient

    return answer


def stays(x: Any, place: Any, old: float, eps: float) -> None:
    """Nothing is put back."""


def added(x: Any, place: Any, old: float, eps: float) -> None:
    """The step is added again, which rounds."""
    x[place] += eps


def no_copies(f: Any, x: Any, eps: float = 1e-5) -> Any:
    """up and down are x itself."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        up = x
        up[place] += eps
        down = x
        down[place] -= eps
        gradient[place] = (f(up) - f(down)) / (2 * eps)
    return gradient


def all_at_once(f: Any, x: Any, eps: float = 1e-5) -> Any:
    """One slope, that of moving everything."""
    return np.zeros_like(x) + (f(x + eps) - f(x - eps)) / (2 * eps)


def rows_at_once(f: Any, x: Any, eps: float = 1e-5) -> Any:
    """One slope for each index of the first axis."""
    gradient = np.zeros_like(x)
    for i in range(len(x)):
        one = np.zeros_like(x)
        one[i] = 1
        gradient[i] = (f(x + eps * one) - f(x - eps * one)) / (2 * eps)
    return gradient


NOT_UNDONE = "a number that was moved is still moved when the next one is: put the old number back each time"


@exercise(
    "1.1",
    draw=[lambda rng: draw_function(rng, 2), lambda rng: draw_function(rng, 1), lambda rng: draw_function(rng, 3)],
    smallest=one_number,
    returns="the gradient (shape of x)",
    decisive=["gradient[place] = (above - below) / (2 * eps)"],
    mistakes={
        "one-sided": (
            each(lambda f, x, one, eps: (f(x + eps * one) - f(x)) / eps),
            "one-sided: this is (f(x + eps) - f(x)) / eps; move each number down as well, and divide by 2 eps",
        ),
        "one-sided, down": (
            each(lambda f, x, one, eps: (f(x) - f(x - eps * one)) / eps),
            "one-sided: this is (f(x) - f(x - eps)) / eps; move each number up as well, and divide by 2 eps",
        ),
        "one side over two": (
            each(lambda f, x, one, eps: (f(x + eps * one) - f(x)) / (2 * eps)),
            "the difference is that of one side, the division that of two: take f(x + eps) - f(x - eps)",
        ),
        "no factor 2": (
            each(lambda f, x, one, eps: (f(x + eps * one) - f(x - eps * one)) / eps),
            "twice too large: up and down are 2 eps apart",
        ),
        "half": (
            each(lambda f, x, one, eps: (f(x + eps * one) - f(x - eps * one)) / (4 * eps)),
            "half of what it should be: up and down are 2 eps apart",
        ),
        "no parentheses": (
            each(lambda f, x, one, eps: (f(x + eps * one) - f(x - eps * one)) / 2 * eps),
            "`/ 2 * eps` divides by 2 and then multiplies by eps: write / (2 * eps)",
        ),
        "not divided": (
            each(lambda f, x, one, eps: f(x + eps * one) - f(x - eps * one)),
            "this is the difference alone: a slope is the difference divided by the way, 2 eps",
        ),
        "sign": (
            each(lambda f, x, one, eps: (f(x - eps * one) - f(x + eps * one)) / (2 * eps)),
            "the sign is wrong: up minus down, not down minus up",
        ),
        "own step": (
            each(lambda f, x, one, eps: (f(x + 1e-5 * one) - f(x - 1e-5 * one)) / 2e-5),
            "the step is fixed at 1e-5: use eps, which is given",
        ),
        "all at once": (
            all_at_once,
            "all numbers are moved at once: that gives one slope for all; move one, and leave the others",
        ),
        "rows at once": (
            rows_at_once,
            "whole rows are moved at once: x[i] is a row; np.ndindex(x.shape) goes through single numbers",
        ),
        "not undone": (moved(stays, own=False), NOT_UNDONE),
        "not undone in a copy": (moved(stays, own=True), NOT_UNDONE),
        "undone by adding": (
            moved(added, own=False),
            "x comes back with other last digits: adding and subtracting eps rounds, so keep the old number, or a copy",
        ),
        "no copies": (
            no_copies,
            "zero everywhere: `up = x` makes no copy, so that up and down are one array; write x.copy()",
        ),
    },
    tolerance=1e-7,
)
def numerical_gradient(f: Any, x: Any, eps: float = 1e-5) -> Any:
    """The central difference at every place of x."""
    return each(lambda f, x, one, eps: (f(x + eps * one) - f(x - eps * one)) / (2 * eps))(f, x, eps)


# -- 1.2 how far apart two gradients are -------------------------------------------------------------------------------


def draw_pair(rng: np.random.Generator, factor: float) -> Draw:
    """Two gradients, one about `factor` times the other; the largest number is negative, some are nearly zero."""
    sizes = distinct_sizes("mn", rng)
    expected = arrays(rng, sizes, expected="m n")["expected"] * 10.0 ** rng.uniform(-6, 0, (sizes["m"], sizes["n"]))
    expected[1, 2] = -5
    got = factor * expected + 0.01 * rng.standard_normal(expected.shape)
    return Draw(sizes, got=got, expected=expected)


def draw_shapes(rng: np.random.Generator) -> Draw:
    """A gradient that fits only by broadcasting."""
    sizes = distinct_sizes("m", rng)
    expected = rng.standard_normal(sizes["m"])
    got = expected[:, None] if rng.integers(2) else expected[None]
    return Draw(sizes, got=got * 1.0, expected=expected)


def draw_zeros(rng: np.random.Generator) -> Draw:
    """Nothing but zeros, twice."""
    return Draw(got=np.zeros((2, 3)), expected=np.zeros((2, 3)))


def over(size: Callable[[Any, Any], Any], reduce: Callable = np.max, difference: Callable | None = None) -> Callable:
    """reduce(|got - expected| / size(got, expected)), with the two special cases as they should be."""

    def answer(got: Any, expected: Any) -> Any:
        if got.shape != expected.shape:
            return np.inf
        if not (got.any() or expected.any()):
            return 0.0
        apart = np.abs(got - expected) if difference is None else difference(got, expected)
        return float(reduce(apart / size(got, expected)))

    return answer


def largest(got: Any, expected: Any) -> float:
    """The largest number of both arrays, whatever its sign."""
    return float(max(np.abs(got).max(initial=0), np.abs(expected).max(initial=0)))


def no_shapes(got: Any, expected: Any) -> float:
    """As NumPy subtracts them."""
    return float(np.abs(got - expected).max() / largest(got, expected)) if got.any() or expected.any() else 0.0


def no_zeros(got: Any, expected: Any) -> float:
    """0 / 0 where both are zero."""
    if got.shape != expected.shape:
        return np.inf
    return float(np.abs(got - expected).max() / np.float64(largest(got, expected)))


@exercise(
    "1.2",
    draw=[
        lambda rng: draw_pair(rng, 0.8),
        lambda rng: draw_pair(rng, 1.3),
        lambda rng: draw_pair(rng, 0),
        draw_shapes,
    ],
    smallest=draw_zeros,
    returns="the error",
    decisive=["difference / size if size > 0 else 0.0"],
    mistakes={
        "absolute": (
            over(lambda got, expected: 1),
            "nothing is divided: an error of 0.01 is small beside 5 and large beside 0.001",
        ),
        "signed": (
            over(largest, difference=lambda got, expected: got - expected),
            "the differences keep their signs: where got is too small, the largest one misses it; take np.abs",
        ),
        "of each its own": (
            over(lambda got, expected: np.maximum(np.abs(got), np.abs(expected))),
            "each number is divided by its own size: slopes near zero then decide all; take the largest of both arrays",
        ),
        "of each expected": (
            over(lambda got, expected: np.abs(expected)),
            "each number is divided by its own size: slopes near zero then decide all; take the largest of both arrays",
        ),
        "expected alone": (
            over(lambda got, expected: np.abs(expected).max()),
            "it is divided by the largest of expected: the largest number of both arrays counts",
        ),
        "got alone": (
            over(lambda got, expected: np.abs(got).max()),
            "it is divided by the largest of got: the largest number of both arrays counts",
        ),
        "largest without abs": (
            over(lambda got, expected: max(got.max(), expected.max())),
            "below the line the signs are kept: -5 is a larger slope than 2, so take np.abs before max",
        ),
        "sum of both": (
            over(lambda got, expected: np.abs(got).max() + np.abs(expected).max()),
            "below the line stands the sum of two maxima: take the larger one",
        ),
        "mean": (
            over(largest, np.mean),
            "this is the mean error: one wrong slope among many is lost in it; take the largest",
        ),
        "sum": (
            over(largest, np.sum),
            "this is the sum of the errors: it grows with the size of the array; take the largest",
        ),
        "lengths": (
            over(lambda got, expected: max(np.linalg.norm(got), np.linalg.norm(expected)), np.linalg.norm),
            "these are lengths of whole arrays: one wrong slope among many would be lost in them; take the largest",
        ),
        "shapes": (no_shapes, "the shapes differ, and NumPy stretched one array to fit the other: return np.inf there"),
        "zeros": (no_zeros, "both are zero everywhere, and 0 is divided by 0: return 0 there"),
    },
)
def relative_error(got: Any, expected: Any) -> float:
    """The largest difference over the largest number."""
    if got.shape != expected.shape:
        return np.inf
    return over(largest)(got, expected)


# -- 1.3 a gradient by formula -----------------------------------------------------------------------------------------


def draw_layer(rng: np.random.Generator) -> Draw:
    """W (m, n), x (T, n), t (T, m)."""
    return arrays(rng, distinct_sizes("Tmn", rng), W="m n", x="T n", t="T m")


def times(factor: Callable[[Any], float]) -> Callable:
    """(y - t)ᵀ x, times factor(t)."""

    def answer(W: Any, x: Any, t: Any) -> Any:
        return factor(t) * (x @ W.T - t).T @ x

    return answer


@exercise(
    "1.3",
    draw=draw_layer,
    smallest=lambda rng: arrays(rng, {"T": 1, "m": 2, "n": 3}, W="m n", x="T n", t="T m"),
    returns="dW (m, n)",
    by_hand=True,
    decisive=["(2 / error.size) * error.T @ x"],
    mistakes={
        "no 2": (times(lambda t: 1 / t.size), "half of what it should be: the slope of a square, e², is 2e"),
        "per token": (times(lambda t: 2 / len(t)), "it is divided by T: the mean goes over all T · m numbers"),
        "per output": (times(lambda t: 2 / t.shape[1]), "it is divided by m: the mean goes over all T · m numbers"),
        "sum": (times(lambda t: 2), "this is the gradient of the sum: the loss is the mean over all T · m numbers"),
        "half the sum": (times(lambda t: 1), "this is the gradient of half the sum: look at the factor before the sum"),
        "sign": (
            times(lambda t: -2 / t.size),
            "the sign is wrong: the difference is y - t, so L grows with y where y is too large",
        ),
        "of W's size": (
            lambda W, x, t: 2 / W.size * (x @ W.T - t).T @ x,
            "it is divided by m · n, the numbers of W: the mean goes over the T · m numbers of y",
        ),
        "no target": (
            lambda W, x, t: 2 / t.size * (x @ W.T).T @ x,
            "the target is missing: the difference is y - t",
        ),
        "slices": (
            lambda W, x, t: 2 / t.size * (x @ W.T - t)[:, :, None] * x[:, None, :],
            "one slice per token: every token uses the same W, so add them up",
        ),
        "squared": (
            lambda W, x, t: ((x @ W.T - t) ** 2).T @ x / t.size,
            "the square is still there: the slope of e² is 2e",
        ),
        "the loss": (
            lambda W, x, t: float(((x @ W.T - t) ** 2).mean()),
            "this is the loss itself: its gradient is asked for, an array of W's shape",
        ),
    },
)
def mse_gradient(W: Any, x: Any, t: Any) -> Any:
    """2 / (T m) (x Wᵀ - t)ᵀ x."""
    return times(lambda t: 2 / t.size)(W, x, t)


HALF = {
    r"L = \frac{1}{Tm} \sum": r"L = \frac{1}{2} \sum",
    "the mean of the squared\ndifferences over": "half the sum of the squared\ndifferences over",
    "(2 / error.size)": "1.0",
    "difference @ difference / difference.size": "difference @ difference / 2",
}


@variant("mse_gradient", HALF)
def mse_gradient_half(W: Any, x: Any, t: Any) -> Any:
    """With half the sum in place of the mean."""
    return times(lambda t: 1)(W, x, t)
