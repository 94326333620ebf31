"""Lesson 17's exercises: the smallest error of a rank, the rank that a task needs, and gradient descent by hand."""

from functools import partial
from typing import Any

import numpy as np

from .exercises import Draw, Drawing, arrays, changed, distinct_sizes, exercise, variant
from .lesson09 import lora_backward, lora_forward

# -- 17.1 the smallest error -------------------------------------------------------------------------------------------


def draw_task(rng: np.random.Generator, pace: float = 0.75, most: str = "") -> Draw:
    """Tokens that use some directions more than others, and a change with decreasing singular values. most: the axis
    that is the longest.
    """
    sizes = distinct_sizes("mnT", rng, low=14)
    if most:
        longest = max(sizes, key=lambda name: sizes[name])
        sizes[longest], sizes[most] = sizes[most], sizes[longest]
    T, n, m = (sizes[name] for name in "Tnm")
    x = rng.standard_normal((T, n)) * rng.permutation(1.5 ** -np.linspace(0, 6, n))
    delta = rng.standard_normal((m, n))
    U, S, Vt = np.linalg.svd(delta, full_matrices=False)
    return Draw(sizes, x=x, delta=4 * (U * pace ** np.arange(len(S))) @ Vt)


def draw_floor(rng: np.random.Generator, r: int | None = None, most: str = "") -> Draw:
    """A task, and a rank."""
    drawn = draw_task(rng, most=most)
    drawn["r"] = int(rng.integers(2, 6)) if r is None else r
    return drawn


def outputs(x: Any, delta: Any) -> Any:
    """The singular values of the change that the output needs."""
    return np.linalg.svd(x @ delta.T, compute_uv=False)


def tail_of(delta: Any, r: int) -> Any:
    """A change without its r largest rank-one terms."""
    U, S, Vt = np.linalg.svd(delta, full_matrices=False)
    return (U[:, r:] * S[r:]) @ Vt[r:]


@exercise(
    "17.1",
    draw=[draw_floor, partial(draw_floor, most="T")],
    smallest=lambda rng: draw_floor(rng, r=0),
    returns="the error",
)
def floor(x, delta, r):
    """x (T, n), delta (m, n), r -> the smallest possible mean squared error"""
    sizes = np.linalg.svd(x @ delta.T, compute_uv=False)
    return (sizes[r:] ** 2).sum() / len(x)


OVER_ALL = {  # the loss of 17.1 and of 17.3
    "squares summed over the outputs, averaged over the T tokens.": "squares averaged over all outputs of all tokens.",
    r"$$L = \frac{1}{T} \sum_{t,i}": r"$$L = \frac{1}{Tm} \sum_{t,i}",
}
variant(
    "floor",
    OVER_ALL | {".sum() / len(x)": ".sum() / (len(x) * len(delta))"},
    "the error is averaged over the outputs, too",
    lines={
        "len(x) -> (len(x) * len(delta))": "(len(x) * len(delta)) -> len(x)",
        "len(x) -> (sizes**2).sum()": "(len(x) * len(delta)) -> (sizes**2).sum()",
        "summed over the tokens: divide by T, the number of rows of x": "a sum: divide by T m, the number of outputs",
    },
)


# -- 17.2 the rank that is needed --------------------------------------------------------------------------------------


def draw_needed(rng: np.random.Generator, first: float = 1.0) -> Draw:
    """A task, and a share between two ranks. first: how much larger the largest part of the change is."""
    drawn = draw_task(rng, pace=0.85)
    drawn["delta"] += (first - 1) * (drawn["delta"] - tail_of(drawn["delta"], 1))
    squares = outputs(drawn["x"], drawn["delta"]) ** 2
    r = int(rng.integers(4, 7))
    drawn["share"] = float((squares[r:].sum() + squares[r - 1 :].sum()) / 2 / squares.sum())
    return drawn


NEEDED: list[Drawing] = [draw_needed, partial(draw_needed, first=10)]  # the second shows who compares with the largest


@exercise(
    "17.2",
    draw=NEEDED,
    smallest=lambda rng: Draw(None, x=rng.standard_normal((1, 3)), delta=rng.standard_normal((2, 3)), share=0.25),
    returns="r",
)
def smallest_r(x, delta, share):
    """x (T, n), delta (m, n), share between 0 and 1 -> the smallest rank that is enough"""
    allowed = share * floor(x, delta, 0)
    r = 0
    while floor(x, delta, r) > allowed:
        r += 1
    return r


variant(
    "smallest_r",
    {
        "Return the smallest r whose smallest possible error is at most `share` times the error without an update.": (
            "Return the smallest r with which at least `share` of this error can be removed."
        ),
        "With `share=0.1`, the update must remove nine tenths of the error.": (
            "With `share=0.9`, a tenth of the error may be left."
        ),
        "share * floor(x, delta, 0)": "(1 - share) * floor(x, delta, 0)",
    },
    "the share is what must be removed",
    lines={
        "share is what may remain: for 0.1, the update must remove nine tenths": (
            "share is what must be removed: for 0.9, a tenth may remain"
        ),
        "share * -> (1 - share) *": "(1 - share) * -> share *",
        "share * -> share**2 *": "(1 - share) * -> (1 - share) ** 2 *",
        "that leaves at most the share": "that removes at least the share",
        "with this r more than the share remains": "with this r less than the share is removed",
        "(1 - share) * floor(x, delta, 0) -> share": "(1 - share) * floor(x, delta, 0) -> 1 - share",
    },
    draw=[changed(draw, lambda drawn: {"share": 1 - drawn["share"]}) for draw in NEEDED],
    smallest=lambda rng: Draw(None, x=rng.standard_normal((1, 3)), delta=rng.standard_normal((2, 3)), share=0.75),
)


# -- 17.3 descent by hand ----------------------------------------------------------------------------------------------


def draw_descent(rng: np.random.Generator, steps: int | None = None) -> Draw:
    """A layer, its target outputs, and an adapter of rank 1: there alpha / r equals alpha / sqrt(r), so that a student
    who wrote rsLoRA's variant of exercises 9 gets the same result.
    """
    sizes = distinct_sizes("Tnm", rng) | {"r": 1}
    drawn = arrays(rng, sizes, x="T n", W="m n", y="T m", A="r n", B="m r")
    drawn["alpha"], drawn["lr"] = float(rng.uniform(1.2, 1.8)), float(rng.uniform(0.001, 0.003))
    drawn["steps"] = int(rng.integers(3, 7)) if steps is None else steps
    return drawn


def gradients(x: Any, W: Any, y: Any, A: Any, B: Any, alpha: float) -> Any:
    """dA and dB of the loss."""
    return lora_backward(x, W, A, B, 2 * (lora_forward(x, W, A, B, alpha) - y) / len(x), alpha)[1:]


@exercise(
    "17.3",
    draw=draw_descent,
    smallest=lambda rng: draw_descent(rng, steps=0),
    returns="A (r, n), B (m, r)",
    by_hand=True,
)
def descend(x, W, y, A, B, alpha, lr, steps):
    """x (T, n), W (m, n), y (T, m), A (r, n), B (m, r) -> A (r, n), B (m, r) after the last step"""
    for _ in range(steps):
        g = 2 * (lora_forward(x, W, A, B, alpha) - y) / len(x)
        _, dA, dB = lora_backward(x, W, A, B, g, alpha)
        A, B = A - lr * dA, B - lr * dB
    return A, B


variant(
    "descend",
    OVER_ALL | {"- y) / len(x)": "- y) / y.size"},
    "the loss is averaged over the outputs, too",
    lines={
        "len(x) -> y.size": "y.size -> len(x)",
        "not divided by T: the loss is a mean over the tokens": "not divided by T m: the loss is a mean over both",
        "g is divided by T m: the loss averages over the T tokens, and sums over the m outputs": (
            "g is divided by T: the loss averages over the T tokens and the m outputs"
        ),
    },
)
