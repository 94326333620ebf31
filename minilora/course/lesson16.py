"""Lesson 16's exercises: DoRA's lengths without the matrix, PiSSA's start, DoRA's gradients by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..engine.tensor import Tensor
from .compare import Wrong, as_parts, close
from .exercises import Draw, arrays, distinct_sizes, exercise
from .lesson08 import lora_backward, lora_forward

ALPHAS = [29, 31, 37, 41, 43]  # primes above every r²: no two scales are alike


def draw_layer(rng: np.random.Generator, r: int | None = None, **more: str) -> Draw:
    """What `more` names, then W (m, n), A (r, n), B (m, r); alpha is put in last by who needs it."""
    sizes = distinct_sizes("Tmn", rng) | {"r": int(rng.integers(2, 6)) if r is None else r}
    return arrays(rng, sizes, **more, W="m n", A="r n", B="m r")


# -- 16.1 the lengths of the rows --------------------------------------------------------------------------------------


def draw_norm(rng: np.random.Generator, r: int | None = None) -> Draw:
    """W, A, B, alpha, with an update about as long as W."""
    drawn = draw_layer(rng, r)
    drawn["alpha"] = int(rng.choice(ALPHAS))
    drawn["B"] *= len(drawn["A"]) / drawn["alpha"]
    return drawn


@exercise(
    "16.1",
    draw=draw_norm,
    smallest=lambda rng: draw_norm(rng, r=1),
    returns="the lengths (m)",
    forbids={
        "m n": "right, but an array of W's size is computed: V is never needed, and W * W is one, too; write the square"
        " of the length as three terms, and take einsum for the first"
    },
    decisive=["np.sqrt(first + 2 * second + third)"],
    mistakes="""
        right, but an array of W's size is computed
            -> return np.linalg.norm(W + alpha / len(A) * (B @ A), axis=1)
        these are the lengths of the columns: each row of V, one output's weights, has a length
            -> return np.linalg.norm(W + alpha / len(A) * (B @ A), axis=0)
        this is one length for all of V: each row has its own
            -> return np.linalg.norm(W + alpha / len(A) * (B @ A))
        these are the lengths of W's rows: the update changes them
            -> return np.linalg.norm(W, axis=1)
        these are the lengths of the update's rows: W is missing
            first + 2 * second + third -> third
        the two lengths are added: that is right only where both rows point the same way; add squares
            np.sqrt(first + 2 * second + third) -> np.sqrt(first) + np.sqrt(third)
        the middle term is missing: |w + u|² = |w|² + 2 w·u + |u|², and W's rows are not at right angles to the \
        update's
            + 2 * second ->
        the middle term stands twice in a square: 2 w·u
            2 * second -> second
        the sign of the middle term is wrong: the update is added
            + 2 * second -> - 2 * second
        in the last term the scale stands squared: |s u|² = s² |u|²
            b @ (A @ A.T), b -> b @ (A @ A.T), B
        the last term is the length of B's rows: A's rows are not of length 1 at right angles, so A Aᵀ counts
            b @ (A @ A.T) -> b
        these are the squares: take the root
            np.sqrt(first + 2 * second + third) -> first + 2 * second + third
        the scale alpha / r is missing
            (alpha / len(A)) * B -> B
        the scale is alpha / r, not alpha
            alpha / len(A) -> alpha
        the scale is alpha / r, not alpha / sqrt(r), which is rsLoRA's
            len(A) -> np.sqrt(len(A))
    """,
)
def dora_norm(W, A, B, alpha):
    """W (m, n), A (r, n), B (m, r) -> the lengths of the rows of W + (alpha / r) B A (m)"""
    b = (alpha / len(A)) * B
    first = np.einsum("mn,mn->m", W, W)
    second = np.einsum("mr,mr->m", W @ A.T, b)
    third = np.einsum("mr,mr->m", b @ (A @ A.T), b)
    return np.sqrt(first + 2 * second + third)


# -- 16.2 PiSSA's start ------------------------------------------------------------------------------------------------


def draw_start(rng: np.random.Generator, r: int | None = None) -> Draw:
    """W (m, n), wide or high, r and alpha."""
    sizes = distinct_sizes("mn", rng) | {"r": int(rng.integers(2, 6)) if r is None else r}
    drawn = arrays(rng, sizes, W="m n")
    drawn["r"], drawn["alpha"] = sizes["r"], int(rng.choice(ALPHAS))
    return drawn


def pieces(W: Any, r: int, take: slice | None = None) -> tuple[Any, Any, Any]:
    """U (m, r), S (r), Vᵀ (r, n) of W's largest singular values, or of those that `take` says."""
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    part = slice(r) if take is None else take
    return U[:, part], S[part], Vt[part]


def judge_start(answer: Any, drawn: Draw, rng: np.random.Generator) -> None:
    """s B A is the best approximation of W, shared evenly, and the residual is the rest."""
    W, r, alpha = drawn["W"], drawn["r"], drawn["alpha"]
    s, (U, S, Vt) = alpha / r, pieces(W, r)
    best, low = (U * S) @ Vt, pieces(W, r, slice(-r, None))
    m, n = W.shape
    wanted = [np.empty(shape) for shape in ((r, n), (m, r), (m, n))]
    A, B, residual = as_parts(answer(W=W.copy(), r=r, alpha=alpha), ["A", "B", "residual"], wanted)
    for name, part, want, axes in zip(
        ["A", "B", "residual"], (A, B, residual), wanted, ("r, n", "m, r", "m, n"), strict=True
    ):
        if not isinstance(part, np.ndarray) or part.shape != want.shape:
            raise Wrong(f"{name} must be an array of shape ({axes}) = {want.shape}, got {np.shape(part)}")
        if not np.isfinite(part).all():
            raise Wrong(f"{name} holds NaN or infinite numbers: is something divided by zero?")
    product = B @ A
    if not close(s * product, best, 1e-8):
        for line, wrong in [
            (
                "the scale is forgotten: B A alone is the part of W, but s B A is what counts; s must be divided out",
                best,
            ),
            ("the scale is divided out twice: once is enough for A and B together, its root in each", best / s**2),
            ("the scale is alpha / r, not alpha", best / alpha),
            ("the scale is alpha / r, not alpha / sqrt(r), which is rsLoRA's", best * np.sqrt(r) / alpha),
            ("S stands in both factors whole, so it counts squared: its root belongs in each", (U * S**2) @ Vt / s),
            ("S is missing: U and Vᵀ only give directions, S says how much of each", U @ Vt / s),
            ("the root of S counts once: it belongs in A and in B", (U * np.sqrt(S)) @ Vt / s),
            (
                "these are the smallest singular values: the largest come first in what svd returns",
                (low[0] * low[1]) @ low[2] / s,
            ),
            ("A and B start as LoRA's, with an update of zero: PiSSA starts with the largest part of W", 0 * best),
        ]:
            if close(product, wrong, 1e-8):
                raise Wrong(line)
        raise Wrong(
            "s B A is not the best approximation of W of rank r: it is made of the first r columns of U, numbers of S"
            " and rows of Vᵀ"
        )
    if not close(A @ A.T, B.T @ B, 1e-8):
        raise Wrong("s B A is right, but one of the two holds more than its half: the root of S / s belongs in each")
    for line, wrong in [
        ("the residual is W itself: then the part that A and B hold would count twice", W),
        ("the residual leaves out the scale: W - s B A, not W - B A", W - product),
        ("the residual has the wrong sign: what is left of W is W - s B A", W + best),
        ("the residual has the wrong sign: what is left of W is W - s B A", best - W),
        ("the residual is the part that A and B hold: what is left of W is wanted", best),
    ]:
        if close(residual, wrong, 1e-8):
            raise Wrong(line)
    if not close(residual, W - best, 1e-8):
        raise Wrong("residual + s B A is not W: the start would not be the base")


@exercise(
    "16.2",
    draw=draw_start,
    smallest=lambda rng: draw_start(rng, r=1),
    returns="A (r, n), B (m, r), residual (m, n)",
    judge=judge_start,
    decisive=["root = np.sqrt(S[:r] / s)"],
    mistakes="""
        the scale is forgotten
            S[:r] / s -> S[:r]
        divided out twice
            np.sqrt(S[:r] / s) -> np.sqrt(S[:r]) / s
        the scale is alpha / r, not alpha
            alpha / r -> alpha
        not alpha / sqrt(r), which is rsLoRA's
            alpha / r -> alpha / np.sqrt(r)
        S stands in both factors whole
            np.sqrt(S[:r] / s) -> S[:r] / np.sqrt(s)
        S is missing
            S[:r] / s -> S[:r] ** 0 / s
        the root of S counts once
            np.sqrt(S[:r] / s) -> np.sqrt(S[:r]) / s
            root[:, None] * ->
        these are the smallest singular values
            full_matrices=False) -> full_matrices=False); U, S, Vt = U[:, ::-1], S[::-1], Vt[::-1]
        A and B start as LoRA's
            U[:, :r] * root -> 0 * U[:, :r]
        s B A is not the best approximation of W of rank r
            full_matrices=False) -> full_matrices=False); Vt = np.pad(Vt, ((0, W.shape[1] - len(Vt)), (0, 0)))
            Vt[:r] -> Vt[:, :r].T
        one of the two holds more than its half
            root[:, None] * ->
            * root -> * root**2
        one of the two holds more than its half
            root[:, None] * -> root[:, None] ** 2 *
            U[:, :r] * root -> U[:, :r]
        the residual is W itself
            W - s * (B @ A) -> W
        the residual leaves out the scale
            W - s * (B @ A) -> W - B @ A
        the residual has the wrong sign
            W - s -> W + s
        the residual has the wrong sign
            W - s * (B @ A) -> s * (B @ A) - W
        the residual is the part that A and B hold
            W - s -> s
    """,
)
def pissa_start(W, r, alpha):
    """W (m, n), r the rank -> A (r, n), B (m, r), residual (m, n)"""
    s = alpha / r
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    root = np.sqrt(S[:r] / s)
    A, B = root[:, None] * Vt[:r], U[:, :r] * root
    return A, B, W - s * (B @ A)


# -- 16.3 DoRA's gradients ---------------------------------------------------------------------------------------------


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


def forms_gradient(x: Any, W: Any, A: Any, B: Any, magnitude: Any, g: Any, alpha: float) -> Any:
    """Right, by way of the gradient of W."""
    s, own = alpha / len(A), dora_norm(W, A, B, alpha)
    G = (g * (magnitude / own)).T @ x
    return dora_backward(x, W, A, B, magnitude, g, alpha)[0], s * B.T @ G, s * G @ A.T


def by_the_engine(x: Any, W: Any, A: Any, B: Any, magnitude: Any, g: Any, alpha: float) -> Any:
    """Right, and found by the engine."""
    a, b, size = (Tensor(value, requires_grad=True) for value in (A, B, magnitude))
    (lora_forward(Tensor(x), Tensor(W), a, b, alpha) * (size / dora_norm(W, A, B, alpha))).backward(g)
    return size.grad, a.grad, b.grad


@exercise(
    "16.3",
    draw=draw_dora,
    smallest=lambda rng: draw_dora(rng, r=1),
    returns="dmagnitude (m), dA (r, n), dB (m, r)",
    by_hand=True,
    forbids={"m n": "right, but an array of W's size is computed: send g, scaled, through your lora_backward"},
    decisive=["(g * y).sum(axis=0) / norms"],
    mistakes="""
        dA and dB are plain LoRA's: g reaches them through the factor magnitude / norms of each output
            g * (magnitude / norms) -> g
        the lengths are those of W's rows: that is right at the start only, then V = W + s B A counts
            dora_norm(W, A, B, alpha) -> np.linalg.norm(W, axis=1)
        the factor is magnitude / norms, not norms / magnitude
            magnitude / norms -> norms / magnitude
        nothing is divided by the lengths: y = magnitude / norms · x Vᵀ
            .sum(axis=0) / norms -> .sum(axis=0)
            magnitude / norms -> magnitude
        the factor before g is magnitude / norms: the lengths are missing in it
            magnitude / norms -> magnitude
        dmagnitude is not divided by the lengths: y contains magnitude · (x Vᵀ / norms)
            .sum(axis=0) / norms -> .sum(axis=0)
        dmagnitude contains magnitude itself: y is linear in it, so its derivative does not
            g * y -> g * y * magnitude
        dmagnitude has one row per token: add them up, all tokens use the same magnitudes
            (g * y).sum(axis=0) -> g * y
        dmagnitude is divided by the number of tokens: where the loss is a mean, g has that
            .sum(axis=0) -> .mean(axis=0)
        dmagnitude sees x Wᵀ alone: what is stretched is x Vᵀ, with the update in it
            g * y -> g * (x @ W.T)
        dA lacks the factor magnitude / norms, dB has it
            return -> dA = lora_backward(x, W, A, B, g, alpha)[1]; return
        dB lacks the factor magnitude / norms, dA has it
            return -> dB = lora_backward(x, W, A, B, g, alpha)[2]; return
        the lengths are differentiated, too: right as mathematics, but DoRA holds them fixed in the gradient
            through_the_norm
        the scale stands twice: lora_backward takes alpha and divides by r itself
            (magnitude / norms), alpha -> (magnitude / norms), alpha / len(A)
        right, but an array of W's size is computed
            forms_gradient
        by hand: write the gradient down yourself, without .backward()
            by_the_engine
    """,
)
def dora_backward(x, W, A, B, magnitude, g, alpha):
    """x (T, n), W (m, n), A (r, n), B (m, r), magnitude (m), g (T, m) -> dmagnitude (m), dA (r, n), dB (m, r)"""
    norms = dora_norm(W, A, B, alpha)
    y = lora_forward(x, W, A, B, alpha)
    dmagnitude = (g * y).sum(axis=0) / norms
    _, dA, dB = lora_backward(x, W, A, B, g * (magnitude / norms), alpha)
    return dmagnitude, dA, dB
