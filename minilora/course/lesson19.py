"""Lesson 19's exercises: DoRA's lengths without the matrix, PiSSA's initialisation, DoRA's gradients by hand."""

from typing import Any

import numpy as np

from ..engine.tensor import Tensor
from .exercises import Draw, arrays, distinct_sizes, exercise, variant
from .lesson08 import in_order
from .lesson09 import lora_backward, lora_forward

ALPHAS = [29, 31, 37, 41, 43]  # primes above every r²: no two scales are alike


def draw_layer(rng: np.random.Generator, r: int | None = None, **more: str) -> Draw:
    """What `more` names, then W (m, n), A (r, n), B (m, r); alpha is put in last by who needs it."""
    sizes = distinct_sizes("Tmn", rng) | {"r": int(rng.integers(2, 6)) if r is None else r}
    return arrays(rng, sizes, **more, W="m n", A="r n", B="m r")


# -- 19.1 the lengths of the rows --------------------------------------------------------------------------------------


def draw_norm(rng: np.random.Generator, r: int | None = None) -> Draw:
    """W, A, B, alpha, with an update about as long as W."""
    drawn = draw_layer(rng, r)
    drawn["alpha"] = int(rng.choice(ALPHAS))
    drawn["B"] *= len(drawn["A"]) / drawn["alpha"]
    return drawn


@exercise(
    "19.1",
    draw=draw_norm,
    smallest=lambda rng: draw_norm(rng, r=1),
    returns="the lengths (m)",
    forbids={
        "m n": "right, but an array of W's size is computed: V is never needed, and W * W and 2 * W are such arrays,"
        " too; write the square of the length as three terms, and take einsum for the first"
    },
)
def dora_norm(W, A, B, alpha):
    """W (m, n), A (r, n), B (m, r) -> the lengths of the rows of W + (alpha / r) B A (m)"""
    b = (alpha / len(A)) * B
    first = np.einsum("mn,mn->m", W, W)
    second = np.einsum("mr,mr->m", W @ A.T, b)
    third = np.einsum("mr,mr->m", b @ (A @ A.T), b)
    return np.sqrt(first + 2 * second + third)


RS = {"the scale is s = alpha / r": "the scale is s = alpha / r**0.5", "(alpha / r) B A": "(alpha / r**0.5) B A"}
variant(
    "dora_norm",
    RS | {"(alpha / len(A))": "(alpha / len(A) ** 0.5)"},
    "the scale is that of rsLoRA",
    lines={
        "the scale alpha / r": "the scale alpha / sqrt(r)",
        "is alpha / r, not alpha / sqrt(r), which is rsLoRA's": "is alpha / sqrt(r), rsLoRA's, not alpha / r",
        "the scale is alpha / r": "the scale is alpha / sqrt(r)",
        "alpha / len(A) -> alpha": "alpha / len(A) ** 0.5 -> alpha",
        "len(A) -> np.sqrt(len(A))": "len(A) ** 0.5 -> len(A)",
        "alpha / len(A) * (B @ A)": "alpha / len(A) ** 0.5 * (B @ A)",
    },
)


# -- 19.2 PiSSA's start ------------------------------------------------------------------------------------------------


def draw_start(rng: np.random.Generator, r: int | None = None) -> Draw:
    """W (m, n), wide or high, r and alpha."""
    sizes = distinct_sizes("mn", rng) | {"r": int(rng.integers(2, 6)) if r is None else r}
    drawn = arrays(rng, sizes, W="m n")
    drawn["r"], drawn["alpha"] = sizes["r"], int(rng.choice(ALPHAS))
    return drawn


def factors(result: Any, arguments: dict[str, Any]) -> Any:
    """A, B and the residual as they are compared: the terms of B A have neither order nor sign."""
    if not isinstance(result, (tuple, list)) or len(result) != 3:
        return result
    A, B, residual = result
    return *in_order(B, A)[::-1], residual


@exercise(
    "19.2",
    draw=draw_start,
    smallest=lambda rng: draw_start(rng, r=1),
    returns="A (r, n), B (m, r), residual (m, n)",
    observe=factors,
    tolerance=1e-8,
)
def pissa_start(W, r, alpha):
    """W (m, n), r the rank -> A (r, n), B (m, r), residual (m, n)"""
    s = alpha / r
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    root = np.sqrt(S[:r] / s)
    A, B = root[:, None] * Vt[:r], U[:, :r] * root
    return A, B, W - s * (B @ A)


variant(
    "pissa_start",
    RS | {"    s = alpha / r\n    U, S": "    s = alpha / r**0.5\n    U, S"},
    "the scale is that of rsLoRA",
    lines={
        "alpha / r -> alpha / np.sqrt(r)": "alpha / r**0.5 -> alpha / r",
        "is alpha / r, not alpha / sqrt(r), which is rsLoRA's": "is alpha / sqrt(r), rsLoRA's, not alpha / r",
        "the scale is alpha / r": "the scale is alpha / sqrt(r)",
        "alpha / r -> alpha": "alpha / r**0.5 -> alpha",
    },
)


# -- 19.3 DoRA's gradients ---------------------------------------------------------------------------------------------


def draw_dora(rng: np.random.Generator, r: int | None = None) -> Draw:
    """x, W, A, B, magnitude (m), g, alpha; the magnitudes are not the lengths any more."""
    drawn = draw_layer(rng, r, x="T n")
    drawn["magnitude"] = rng.uniform(2, 9, drawn.sizes["m"])
    drawn["g"] = rng.standard_normal((drawn.sizes["T"], drawn.sizes["m"]))
    drawn["alpha"] = int(rng.choice(ALPHAS))
    return drawn


def through_the_norm(x: Any, W: Any, A: Any, B: Any, magnitude: Any, g: Any, alpha: float) -> Any:
    """The gradient of everything, of the lengths as well."""
    s = alpha / len(A)
    V, own = W + s * (B @ A), dora_norm(W, A, B, alpha)
    unit, G = V / own[:, None], g.T @ x
    dV = (magnitude / own)[:, None] * (G - unit * (unit * G).sum(1, keepdims=True))
    return (unit * G).sum(1), s * B.T @ dV, s * dV @ A.T


def by_the_engine(x: Any, W: Any, A: Any, B: Any, magnitude: Any, g: Any, alpha: float) -> Any:
    """Right, and found by the engine."""
    a, b, size = (Tensor(value, requires_grad=True) for value in (A, B, magnitude))
    (lora_forward(Tensor(x), Tensor(W), a, b, alpha) * (size / dora_norm(W, A, B, alpha))).backward(g)
    return size.grad, a.grad, b.grad


@exercise(
    "19.3",
    draw=draw_dora,
    smallest=lambda rng: draw_dora(rng, r=1),
    returns="dmagnitude (m), dA (r, n), dB (m, r)",
    by_hand=True,
    forbids={"m n": "right, but an array of W's size is computed: send g, scaled, through your lora_backward"},
)
def dora_backward(x, W, A, B, magnitude, g, alpha):
    """x (T, n), W (m, n), A (r, n), B (m, r), magnitude (m), g (T, m) -> dmagnitude (m), dA (r, n), dB (m, r)"""
    norms = dora_norm(W, A, B, alpha)
    y = lora_forward(x, W, A, B, alpha)
    dmagnitude = (g * y).sum(axis=0) / norms
    _, dA, dB = lora_backward(x, W, A, B, g * (magnitude / norms), alpha)
    return dmagnitude, dA, dB


variant(
    "dora_backward",
    RS,
    "the scale is that of rsLoRA",
    lines={"alpha and divides by r": "alpha and divides by the root of r"},
)
