"""Lesson 14's exercises: the error that a rank cannot avoid, the rank that a task needs, and descent by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .exercises import Draw, arrays, distinct_sizes, exercise
from .lesson08 import lora_backward, lora_forward

# -- 14.1 what is left at best -----------------------------------------------------------------------------------------


def draw_task(rng: np.random.Generator, pace: float = 0.75) -> Draw:
    """Tokens that use some directions more than others, and a change whose pieces fall in size."""
    sizes = distinct_sizes("mnT", rng, low=14)
    T, n, m = (sizes[name] for name in "Tnm")
    x = rng.standard_normal((T, n)) * rng.permutation(1.5 ** -np.linspace(0, 6, n))
    delta = rng.standard_normal((m, n))
    U, S, Vt = np.linalg.svd(delta, full_matrices=False)
    return Draw(sizes, x=x, delta=4 * (U * pace ** np.arange(len(S))) @ Vt)


def draw_floor(rng: np.random.Generator, r: int | None = None) -> Draw:
    """A task, and a rank."""
    drawn = draw_task(rng)
    drawn["r"] = int(rng.integers(2, 6)) if r is None else r
    return drawn


def outputs(x: Any, delta: Any) -> Any:
    """The singular values of what the layer is to change."""
    return np.linalg.svd(x @ delta.T, compute_uv=False)


def tail_of(delta: Any, r: int) -> Any:
    """What is left of a change without its own r largest pieces."""
    U, S, Vt = np.linalg.svd(delta, full_matrices=False)
    return (U[:, r:] * S[r:]) @ Vt[r:]


def left(
    sizes: Callable = outputs, power: float = 2, divisor: Callable = lambda x, delta: len(x), off: int = 0
) -> Callable:
    """What is left, from other singular values, to another power, or divided by something else."""
    return lambda x, delta, r: float((sizes(x, delta)[r + off :] ** power).sum() / divisor(x, delta))


@exercise(
    "14.1",
    draw=draw_floor,
    smallest=lambda rng: draw_floor(rng, r=0),
    returns="the error",
    decisive=["(sizes[r:] ** 2).sum() / len(x)"],
    mistakes={
        "no square": (left(power=1), "singular values are added up, not their squares"),
        "one more piece": (left(off=1), "r + 1 pieces are taken away: sizes[r:] begins after the first r"),
        "one piece fewer": (
            lambda x, delta, r: float((outputs(x, delta)[max(r - 1, 0) :] ** 2).sum() / len(x)),
            "r - 1 pieces are taken away: sizes[r:] begins after the first r",
        ),
        "tokens forgotten": (
            left(sizes=lambda x, delta: np.linalg.svd(delta, compute_uv=False), divisor=lambda x, delta: 1),
            "those are delta's own pieces: what counts is what they do to these tokens, x @ delta.T",
        ),
        "tokens forgotten, divided": (
            left(sizes=lambda x, delta: np.linalg.svd(delta, compute_uv=False)),
            "those are delta's own pieces: what counts is what they do to these tokens, x @ delta.T",
        ),
        "delta cut first": (
            lambda x, delta, r: float(((x @ tail_of(delta, r).T) ** 2).sum() / len(x)),
            "delta was cut to rank r before the tokens came: cut x @ delta.T, then the error is smaller",
        ),
        "sum over tokens": (
            left(divisor=lambda x, delta: 1),
            "summed over the tokens: divide by T, the number of rows of x",
        ),
        "mean over all": (
            left(divisor=lambda x, delta: len(x) * len(delta)),
            "averaged over the outputs, too: sum over the m outputs, average over the T tokens",
        ),
        "what is held": (
            lambda x, delta, r: float((outputs(x, delta)[:r] ** 2).sum() / len(x)),
            "that is what the r largest pieces remove: the error is what is left, sizes[r:]",
        ),
        "the largest left": (
            lambda x, delta, r: float(outputs(x, delta)[r] ** 2 / len(x)),
            "only the first of the pieces that are left: all of them add to the error",
        ),
        "root": (
            lambda x, delta, r: float(np.sqrt((outputs(x, delta)[r:] ** 2).sum() / len(x))),
            "the square root was taken: the mean squared error is wanted",
        ),
        "share": (
            lambda x, delta, r: float((outputs(x, delta)[r:] ** 2).sum() / (outputs(x, delta) ** 2).sum()),
            "that is a share of the energy: the error itself is wanted",
        ),
    },
)
def floor(x: Any, delta: Any, r: int) -> float:
    """The tail energy of x deltaᵀ, per token."""
    return left()(x, delta, r)


# -- 14.2 the rank that is needed --------------------------------------------------------------------------------------


def draw_needed(rng: np.random.Generator) -> Draw:
    """A task, and a share between two ranks."""
    drawn = draw_task(rng, pace=0.85)
    energy = outputs(drawn["x"], drawn["delta"]) ** 2
    r = int(rng.integers(4, 7))
    drawn["share"] = float((energy[r:].sum() + energy[r - 1 :].sum()) / 2 / energy.sum())
    return drawn


def needed(sizes: Callable = outputs, power: float = 2, share: Callable = lambda s: s, off: int = 0) -> Callable:
    """The first rank whose rest is small enough, from other sizes, another power, or another share."""

    def answer(x: Any, delta: Any, wanted: float) -> int:
        parts = sizes(x, delta) ** power
        rests = [parts[r:].sum() / parts.sum() for r in range(len(parts))] + [0.0]
        return next(r for r, rest in enumerate(rests) if rest <= share(wanted)) + off

    return answer


@exercise(
    "14.2",
    draw=draw_needed,
    smallest=lambda rng: Draw(None, x=rng.standard_normal((1, 3)), delta=rng.standard_normal((2, 3)), share=0.25),
    returns="r",
    decisive=["while floor(x, delta, r) > allowed"],
    mistakes={
        "no square": (needed(power=1), "singular values are compared, not their squares"),
        "one too many": (needed(off=1), "one too many: r - 1 leaves little enough already"),
        "one too few": (needed(off=-1), "one too few: with this r more than the share is left"),
        "tokens forgotten": (
            needed(sizes=lambda x, delta: np.linalg.svd(delta, compute_uv=False)),
            "those are delta's own pieces: what counts is what they do to these tokens, x @ delta.T",
        ),
        "share held": (
            needed(share=lambda s: 1 - s),
            "share is what may be left, not what must be gone: for 0.1, nine tenths must be gone",
        ),
        "absolute": (
            lambda x, delta, share: next(
                r for r in range(99) if r >= min(len(x), *delta.shape) or floor(x, delta, r) <= share
            ),
            "share is compared with the error itself: it is a share of the error at r = 0",
        ),
        "root": (
            needed(share=lambda s: s**2),
            "a share of the root of the error, not of the error: compare mean squared errors",
        ),
        "all": (
            lambda x, delta, share: int(np.linalg.matrix_rank(x @ delta.T)),
            "that rank leaves nothing: how many pieces are enough to leave the share?",
        ),
    },
)
def smallest_r(x: Any, delta: Any, share: float) -> int:
    """The smallest rank that leaves no more than the share."""
    return needed()(x, delta, share)


# -- 14.3 descent by hand ----------------------------------------------------------------------------------------------


def draw_descent(rng: np.random.Generator, steps: int | None = None) -> Draw:
    """A layer, what it should give out, and an adapter of rank 1: there alpha / r is alpha / sqrt(r), so that a student
    who wrote rsLoRA's variant of exercises 8 comes to the same.
    """
    sizes = distinct_sizes("Tnm", rng) | {"r": 1}
    drawn = arrays(rng, sizes, x="T n", W="m n", y="T m", A="r n", B="m r")
    drawn["alpha"] = 1.5
    drawn["lr"] = 0.002
    drawn["steps"] = int(rng.integers(3, 7)) if steps is None else steps
    return drawn


def going(
    factor: Callable = lambda T, m: 2 / T,
    more: int = 0,
    order: str = "both",
    base: float = 1,
    final: bool = True,
) -> Callable:
    """Descent with another factor in g, other steps, or one matrix moved before the other's gradient is taken."""

    def answer(x: Any, W: Any, y: Any, A: Any, B: Any, alpha: float, lr: float, steps: int) -> Any:
        def gradients() -> Any:
            g = factor(len(x), len(W)) * (lora_forward(x, base * W, A, B, alpha) - y)
            return lora_backward(x, W, A, B, g, alpha)[1:]

        start = gradients()
        for _ in range(steps + more):
            dA, dB = gradients() if final else start
            if order == "A first":
                A = A - lr * dA
                B = B - lr * gradients()[1]
            elif order == "B first":
                B = B - lr * dB
                A = A - lr * gradients()[0]
            else:
                A, B = A - lr * dA, B - lr * dB
        return A, B

    return answer


def in_place(x: Any, W: Any, y: Any, A: Any, B: Any, alpha: float, lr: float, steps: int) -> Any:
    """Right, but A and B are not what they were."""
    A[:], B[:] = going()(x, W, y, A, B, alpha, lr, steps)
    return A, B


def stale_forward(x: Any, W: Any, y: Any, A: Any, B: Any, alpha: float, lr: float, steps: int) -> Any:
    """g is computed once, before the loop."""
    g = 2 * (lora_forward(x, W, A, B, alpha) - y) / len(x)
    for _ in range(steps):
        _, dA, dB = lora_backward(x, W, A, B, g, alpha)
        A, B = A - lr * dA, B - lr * dB
    return A, B


@exercise(
    "14.3",
    draw=draw_descent,
    smallest=lambda rng: draw_descent(rng, steps=0),
    returns="A (r, n), B (m, r)",
    by_hand=True,
    decisive=["g = 2 * (lora_forward(x, W, A, B, alpha) - y) / len(x)"],
    mistakes={
        "no factor 2": (
            going(lambda T, m: 1 / T),
            "the factor 2 is missing: the derivative of a square is twice what was squared",
        ),
        "no mean": (going(lambda T, m: 2), "g is not divided by T: the loss is a mean over the tokens"),
        "mean over all": (
            going(lambda T, m: 2 / (T * m)),
            "g is divided by T m: the loss averages over the T tokens, and sums over the m outputs",
        ),
        "uphill": (
            going(lambda T, m: -2 / T),
            "it goes uphill: g is output minus y, and a step goes against the gradient",
        ),
        "one step": (
            lambda *a: going()(*a[:-1], min(a[-1], 1)),
            "only one step is taken: repeat all of it `steps` times",
        ),
        "one step more": (going(more=1), "one step too many: range(steps) has `steps` steps"),
        "g once": (stale_forward, "g is computed once: the output changes with every step, and g with it"),
        "gradients once": (
            going(final=False),
            "the gradients are computed once: compute them again in every step",
        ),
        "A first": (
            going(order="A first"),
            "A is moved before dB is computed: take both gradients first, then move both",
        ),
        "B first": (
            going(order="B first"),
            "B is moved before dA is computed: take both gradients first, then move both",
        ),
        "no base": (going(base=0), "x Wᵀ is missing in the output: lora_forward has it"),
        "swapped": (lambda *a: going()(*a)[::-1], "A and B are swapped: `return A, B`, in this order"),
        "in place": (in_place, "the function changes its input"),
    },
)
def descend(x: Any, W: Any, y: Any, A: Any, B: Any, alpha: float, lr: float, steps: int) -> Any:
    """A and B after some steps of gradient descent."""
    return going()(x, W, y, A, B, alpha, lr, steps)
