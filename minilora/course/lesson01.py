"""Lesson 1's exercises: measure a gradient, compare two, and derive a first one."""

from typing import Any

import numpy as np

from .exercises import Draw, arrays, distinct_sizes, drawing, exercise, variant

# -- 1.1 measure a whole gradient --------------------------------------------------------------------------------------


def draw_function(rng: np.random.Generator, axes: int) -> Draw:
    """A function whose derivatives differ in size and sign, x with this many axes, and a step large enough to show."""
    x = rng.standard_normal(tuple(int(size) for size in rng.integers(3, 7, axes)))
    if axes == 1:
        x = rng.standard_normal(int(rng.integers(9, 20)))
    a, b, c = rng.uniform(0.5, 1.5, (3, *x.shape))

    def f(x: Any) -> float:
        return float((a * x**3 - 2 * b * x).sum() + np.tanh((c * x).sum()))

    return Draw(f=f, x=x, eps=float(rng.uniform(0.05, 0.2)))


@exercise(
    "1.1",
    draw=[lambda rng: draw_function(rng, 2), lambda rng: draw_function(rng, 1), lambda rng: draw_function(rng, 3)],
    smallest=lambda rng: Draw(f=lambda x: float((x**3).sum()), x=rng.uniform(1, 2, 1), eps=0.1),
    returns="the gradient",
    tolerance=1e-7,
)
def numerical_gradient(f, x, eps=1e-5):
    """f: array -> number, x any shape (float64), eps the step -> the gradient, of x's shape"""
    x = x.copy()
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        old = x[place]
        x[place] += eps
        above = f(x)
        x[place] -= 2 * eps
        below = f(x)
        x[place] = old
        gradient[place] = (above - below) / (2 * eps)
    return gradient


variant(
    "numerical_gradient",
    {
        "the central difference with the step `eps`.": "the central difference of two points whose distance is `eps`.",
        "eps the step ->": "eps the distance ->",
        "x[place] += eps": "x[place] += eps / 2",
        "x[place] -= 2 * eps": "x[place] -= eps",
        "/ (2 * eps)": "/ eps",
    },
    "`eps` is the distance of the two points, not that of each from x",
    lines={
        "this is (f(x + eps) - f(x)) / eps": "this is one value at x itself",
        "this is (f(x) - f(x - eps)) / eps": "this is one value at x itself",
        "subtract eps from": "subtract eps / 2 from",
        "add eps to": "add eps / 2 to",
        "divide by 2 eps": "divide by eps",
        "divided by 2 eps: take f(x + eps) - f(x - eps)": "divided by eps: take f(x + eps / 2) - f(x - eps / 2)",
        "2 eps apart": "eps apart",
        "distance, 2 eps": "distance, eps",
        "x[place] -= eps -> x[place] -= eps": "x[place] -= eps -> x[place] -= eps / 2",
        "/ eps -> / eps": "/ eps -> / (eps / 2)",
        "/ eps -> / (4 * eps)": "/ eps -> / (2 * eps)",
    },
)


# -- 1.2 how far apart two gradients are -------------------------------------------------------------------------------


def draw_pair(rng: np.random.Generator, factor: float, size: float = 5) -> Draw:
    """Two gradients, one about `factor` times the other; the largest element is -size, some are nearly zero."""
    sizes = distinct_sizes("mn", rng)
    expected = arrays(rng, sizes, expected="m n")["expected"] * 10.0 ** rng.uniform(-6, 0, (sizes["m"], sizes["n"]))
    expected[1, 2] = -5
    got = factor * (expected + 0.01 * rng.standard_normal(expected.shape))
    return Draw(sizes, got=got * size / 5, expected=expected * size / 5)


def draw_near_zero(rng: np.random.Generator, cancel: bool) -> Draw:
    """Two gradients that are not zero, whose sums are exactly zero, or whose largest elements are."""
    expected = rng.integers(1, 6, (2, 3)).astype(float)
    expected = np.concatenate([expected, -expected]) if cancel else np.concatenate([0 * expected, -expected])
    return Draw(got=2 * expected, expected=expected)


def draw_shapes(rng: np.random.Generator, got: str, expected: str = "m") -> Draw:
    """Gradients with these axes, of which one fits only by broadcasting; an axis called 1 has length 1."""
    sizes = distinct_sizes("mn", rng)
    return arrays(rng, sizes | {"1": 1}, got=got, expected=expected)


@exercise(
    "1.2",
    draw=[
        lambda rng: draw_pair(rng, 0.8),
        lambda rng: draw_pair(rng, 1.3, size=1e-20),
        lambda rng: draw_pair(rng, 0),
        lambda rng: draw_pair(rng, -0.9),
        lambda rng: draw_shapes(rng, "m 1"),
        lambda rng: draw_shapes(rng, "1 m"),
        lambda rng: draw_shapes(rng, "m n", "m 1"),
        lambda rng: draw_near_zero(rng, cancel=True),
        lambda rng: draw_near_zero(rng, cancel=False),
    ],
    smallest=lambda rng: Draw(got=np.zeros((2, 3)), expected=np.zeros((2, 3))),
    returns="the error",
)
def relative_error(got, expected):
    """got, expected: arrays -> a number: 0 where they agree, np.inf where their shapes differ"""
    if got.shape != expected.shape:
        return np.inf
    difference = np.abs(got - expected).max()
    size = max(np.abs(got).max(), np.abs(expected).max())
    return difference / size if size > 0 else 0.0


variant(
    "relative_error",
    {
        r"\max\big(\max |\text{got}|,\; \max |\text{expected}|\big)": r"\max |\text{got}| + \max |\text{expected}|",
        "max(np.abs(got).max(), np.abs(expected).max())": "np.abs(got).max() + np.abs(expected).max()",
    },
    "the two largest elements are added in the denominator",
    lines={
        "take the largest of both arrays": "take the sum of both maxima",
        "the largest element of both arrays counts": "the largest elements of both arrays are added",
    },
)


# -- 1.3 a gradient by formula -----------------------------------------------------------------------------------------


LAYER = {"W": "m n", "x": "T n", "t": "T m"}


@exercise(
    "1.3",
    draw=drawing("Tmn", **LAYER),
    smallest=drawing("Tmn", {"T": 1, "m": 2, "n": 3}, **LAYER),
    returns="dW (m, n)",
    by_hand=True,
)
def mse_gradient(W, x, t):
    """W (m, n), x (T, n), t (T, m) -> dW (m, n)"""
    error = x @ W.T - t
    return (2 / error.size) * error.T @ x


HALF = {
    r"L = \frac{1}{Tm} \sum": r"L = \frac{1}{2} \sum",
    "the mean of the squared differences over": "half the sum of the squared differences over",
    "(2 / error.size)": "1.0",
    "difference @ difference / difference.size": "difference @ difference / 2",
}


variant(
    "mse_gradient",
    HALF,
    "the loss is half the sum of the squares, not their mean",
    lines={
        "half of what it should be: the derivative of a square, e², is 2e": (
            "this is the gradient of half the mean: the loss is half the sum"
        ),
        "of the sum: the loss is the mean over all T · m elements": "of the whole sum: the loss is half of it",
        "the mean is over all T · m elements": "the loss is half a sum, not a mean",
        "the mean is over the T · m elements of y": "the loss is half a sum, not a mean",
    },
)
