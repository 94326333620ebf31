"""Lesson 16's exercises: DoRA's lengths without the matrix, PiSSA's start, DoRA's gradients by hand."""

from __future__ import annotations

from collections.abc import Callable
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


def lengths(
    scale_of: Callable[[float, int], float] = lambda alpha, r: alpha / r,
    cross: float = 2,
    power: int = 2,
    base: float = 1,
    gram: bool = True,
    root: bool = True,
) -> Callable:
    """The lengths, with other factors before the three terms of the square, or without A Aᵀ, or without the root."""

    def answer(W: Any, A: Any, B: Any, alpha: float) -> Any:
        s = scale_of(alpha, len(A))
        square = base * np.einsum("mn,mn->m", W, W) + cross * s * np.einsum("mr,mr->m", W @ A.T, B)
        square = square + s**power * np.einsum("mr,mr->m", B @ (A @ A.T) if gram else B, B)
        return np.sqrt(square) if root else square

    return answer


def of_matrix(measure: Callable[[Any], Any]) -> Callable:
    """What `measure` finds of V = W + (alpha / r) B A, formed."""
    return lambda W, A, B, alpha: measure(W + alpha / len(A) * (B @ A))


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
    mistakes={
        "forms V": (of_matrix(lambda V: np.linalg.norm(V, axis=1)), "right, but an array of W's size is computed"),
        "columns": (
            of_matrix(lambda V: np.linalg.norm(V, axis=0)),
            "these are the lengths of the columns: each row of V, one output's weights, has a length",
        ),
        "one length": (of_matrix(np.linalg.norm), "this is one length for all of V: each row has its own"),
        "base alone": (
            lambda W, A, B, alpha: np.linalg.norm(W, axis=1),
            "these are the lengths of W's rows: the update changes them",
        ),
        "update alone": (lengths(base=0, cross=0), "these are the lengths of the update's rows: W is missing"),
        "lengths added": (
            lambda W, A, B, alpha: (
                np.linalg.norm(W, axis=1) + alpha / len(A) * np.sqrt(np.einsum("mr,mr->m", B @ (A @ A.T), B))
            ),
            "the two lengths are added: that is right only where both rows point the same way; add squares",
        ),
        "no cross term": (
            lengths(cross=0),
            "the middle term is missing: |w + u|² = |w|² + 2 w·u + |u|², and W's rows are not at right angles to the"
            " update's",
        ),
        "cross term once": (lengths(cross=1), "the middle term stands twice in a square: 2 w·u"),
        "minus": (lengths(cross=-2), "the sign of the middle term is wrong: the update is added"),
        "scale not squared": (lengths(power=1), "in the last term the scale stands squared: |s u|² = s² |u|²"),
        "no A Aᵀ": (
            lengths(gram=False),
            "the last term is the length of B's rows: A's rows are not of length 1 at right angles, so A Aᵀ counts",
        ),
        "no root": (lengths(root=False), "these are the squares: take the root"),
        "no scale": (lengths(lambda alpha, r: 1), "the scale alpha / r is missing"),
        "alpha": (lengths(lambda alpha, r: alpha), "the scale is alpha / r, not alpha"),
        "square root": (
            lengths(lambda alpha, r: alpha / np.sqrt(r)),
            "the scale is alpha / r, not alpha / sqrt(r), which is rsLoRA's",
        ),
    },
)
def dora_norm(W: Any, A: Any, B: Any, alpha: float) -> Any:
    """The length of each row of W + (alpha / r) B A, from three terms, none of them as large as W."""
    return lengths()(W, A, B, alpha)


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


def started(
    in_B: Callable[..., Any] = lambda S, s: np.sqrt(S / s),
    in_A: Callable[..., Any] = lambda S, s: np.sqrt(S / s),
    scale_of: Callable[[float, int], float] = lambda alpha, r: alpha / r,
    rest: Callable[..., Any] = lambda W, B, A, s: W - s * (B @ A),
    smallest: bool = False,
) -> Callable:
    """A start with in_B(S, s) on B's columns and in_A(S, s) on A's rows, another scale, residual or part of W."""

    def answer(W: Any, r: int, alpha: float) -> Any:
        U, S, Vt = pieces(W, r, slice(-r, None) if smallest else None)
        s = scale_of(alpha, r)
        A, B = in_A(S, s)[:, None] * Vt, U * in_B(S, s)
        return A, B, rest(W, B, A, s)

    return answer


def wrong_side(W: Any, r: int, alpha: float) -> Any:
    """A from the columns of Vᵀ, as if it were V."""
    s, (U, S, Vt) = alpha / r, np.linalg.svd(W, full_matrices=False)
    V = np.zeros((W.shape[1], W.shape[1]))
    V[: len(Vt)] = Vt
    A, B = np.sqrt(S[:r] / s)[:, None] * V[:, :r].T, U[:, :r] * np.sqrt(S[:r] / s)
    return A, B, W - s * (B @ A)


@exercise(
    "16.2",
    draw=draw_start,
    smallest=lambda rng: draw_start(rng, r=1),
    returns="A (r, n), B (m, r), residual (m, n)",
    judge=judge_start,
    decisive=["root = np.sqrt(S[:r] / s)"],
    mistakes={
        "scale forgotten": (started(lambda S, s: np.sqrt(S), lambda S, s: np.sqrt(S)), "the scale is forgotten"),
        "scale twice": (started(lambda S, s: np.sqrt(S) / s, lambda S, s: np.sqrt(S) / s), "divided out twice"),
        "alpha": (started(scale_of=lambda alpha, r: alpha), "the scale is alpha / r, not alpha"),
        "square root": (
            started(scale_of=lambda alpha, r: alpha / np.sqrt(r)),
            "not alpha / sqrt(r), which is rsLoRA's",
        ),
        "S in both": (
            started(lambda S, s: S / np.sqrt(s), lambda S, s: S / np.sqrt(s)),
            "S stands in both factors whole",
        ),
        "no S": (started(lambda S, s: S**0 / np.sqrt(s), lambda S, s: S**0 / np.sqrt(s)), "S is missing"),
        "one root": (started(lambda S, s: np.sqrt(S) / s, lambda S, s: S**0), "the root of S counts once"),
        "smallest": (started(smallest=True), "these are the smallest singular values"),
        "LoRA's start": (started(in_B=lambda S, s: 0 * S), "A and B start as LoRA's"),
        "columns of Vᵀ": (wrong_side, "s B A is not the best approximation of W of rank r"),
        "all in B": (started(lambda S, s: S / s, lambda S, s: S**0), "one of the two holds more than its half"),
        "all in A": (started(lambda S, s: S**0, lambda S, s: S / s), "one of the two holds more than its half"),
        "residual is W": (started(rest=lambda W, B, A, s: W), "the residual is W itself"),
        "residual without scale": (started(rest=lambda W, B, A, s: W - B @ A), "the residual leaves out the scale"),
        "residual added": (started(rest=lambda W, B, A, s: W + s * (B @ A)), "the residual has the wrong sign"),
        "residual turned": (started(rest=lambda W, B, A, s: s * (B @ A) - W), "the residual has the wrong sign"),
        "the part": (started(rest=lambda W, B, A, s: s * (B @ A)), "the residual is the part that A and B hold"),
    },
)
def pissa_start(W: Any, r: int, alpha: float) -> Any:
    """A and B from the largest singular values, and what is left of W."""
    return started()(W, r, alpha)


# -- 16.3 DoRA's gradients ---------------------------------------------------------------------------------------------


def draw_dora(rng: np.random.Generator, r: int | None = None) -> Draw:
    """x, W, A, B, magnitude (m), g, alpha; the magnitudes are not the lengths any more."""
    drawn = draw_layer(rng, r, x="T n")
    drawn["magnitude"] = rng.uniform(2, 9, drawn.sizes["m"])
    drawn["g"] = rng.standard_normal((drawn.sizes["T"], drawn.sizes["m"]))
    drawn["alpha"] = int(rng.choice(ALPHAS))
    return drawn


def gradients(
    norms: Callable[..., Any] = dora_norm,
    quotient: Callable[..., Any] = lambda magnitude, norms: magnitude / norms,
    dm: Callable[..., Any] = lambda g, y, magnitude, norms: (g * y).sum(0) / norms,
    parts: Callable[..., Any] = lambda dA, dB, plain: (dA, dB),
    scale_of: Callable[[float, int], float] = lambda alpha, r: alpha,
) -> Callable:
    """The gradients, with other lengths, another quotient before g, another dmagnitude, or other parts."""

    def answer(x: Any, W: Any, A: Any, B: Any, magnitude: Any, g: Any, alpha: float) -> Any:
        own = norms(W, A, B, alpha)
        y = lora_forward(x, W, A, B, alpha)
        _, dA, dB = lora_backward(x, W, A, B, g * quotient(magnitude, own), scale_of(alpha, len(A)))
        plain = lora_backward(x, W, A, B, g, alpha)[1:]
        return dm(g, y, magnitude, own), *parts(dA, dB, plain)

    return answer


def through_the_norm(x: Any, W: Any, A: Any, B: Any, magnitude: Any, g: Any, alpha: float) -> Any:
    """The gradient of everything, of the lengths as well."""
    s = alpha / len(A)
    V, own = W + s * (B @ A), dora_norm(W, A, B, alpha)
    unit, G = V / own[:, None], g.T @ x
    dV = (magnitude / own)[:, None] * (G - unit * (unit * G).sum(1, keepdims=True))
    return (unit * G).sum(1), s * B.T @ dV, s * dV @ A.T


def with_base(x: Any, W: Any, A: Any, B: Any, magnitude: Any, g: Any, alpha: float) -> Any:
    """dmagnitude from x Wᵀ in place of x Vᵀ."""
    right = dora_backward(x, W, A, B, magnitude, g, alpha)
    return (g * (x @ W.T)).sum(0) / dora_norm(W, A, B, alpha), *right[1:]


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
    mistakes={
        "plain LoRA": (
            gradients(quotient=lambda magnitude, norms: 1),
            "dA and dB are plain LoRA's: g reaches them through the factor magnitude / norms of each output",
        ),
        "length of W": (
            gradients(norms=lambda W, A, B, alpha: np.linalg.norm(W, axis=1)),
            "the lengths are those of W's rows: that is right at the start only, then V = W + s B A counts",
        ),
        "upside down": (
            gradients(quotient=lambda magnitude, norms: norms / magnitude),
            "the factor is magnitude / norms, not norms / magnitude",
        ),
        "not divided": (
            gradients(quotient=lambda magnitude, norms: magnitude, dm=lambda g, y, magnitude, norms: (g * y).sum(0)),
            "nothing is divided by the lengths: y = magnitude / norms · x Vᵀ",
        ),
        "factor without length": (
            gradients(quotient=lambda magnitude, norms: magnitude),
            "the factor before g is magnitude / norms: the lengths are missing in it",
        ),
        "dm not divided": (
            gradients(dm=lambda g, y, magnitude, norms: (g * y).sum(0)),
            "dmagnitude is not divided by the lengths: y contains magnitude · (x Vᵀ / norms)",
        ),
        "dm with magnitude": (
            gradients(dm=lambda g, y, magnitude, norms: (g * y * magnitude).sum(0) / norms),
            "dmagnitude contains magnitude itself: y is linear in it, so its derivative does not",
        ),
        "slices": (
            gradients(dm=lambda g, y, magnitude, norms: g * y / norms),
            "dmagnitude has one row per token: add them up, all tokens use the same magnitudes",
        ),
        "mean": (
            gradients(dm=lambda g, y, magnitude, norms: (g * y).mean(0) / norms),
            "dmagnitude is divided by the number of tokens: where the loss is a mean, g has that",
        ),
        "base": (with_base, "dmagnitude sees x Wᵀ alone: what is stretched is x Vᵀ, with the update in it"),
        "dA without factor": (
            gradients(parts=lambda dA, dB, plain: (plain[0], dB)),
            "dA lacks the factor magnitude / norms, dB has it",
        ),
        "dB without factor": (
            gradients(parts=lambda dA, dB, plain: (dA, plain[1])),
            "dB lacks the factor magnitude / norms, dA has it",
        ),
        "through the norm": (
            through_the_norm,
            "the lengths are differentiated, too: right as mathematics, but DoRA holds them fixed in the gradient",
        ),
        "scale": (
            gradients(scale_of=lambda alpha, r: alpha / r),
            "the scale stands twice: lora_backward takes alpha and divides by r itself",
        ),
        "forms the gradient of W": (forms_gradient, "right, but an array of W's size is computed"),
        "by the engine": (by_the_engine, "by hand: write the gradient down yourself, without .backward()"),
    },
)
def dora_backward(x: Any, W: Any, A: Any, B: Any, magnitude: Any, g: Any, alpha: float) -> Any:
    """With the lengths held fixed, DoRA is LoRA with each output's g times magnitude / norms."""
    return gradients()(x, W, A, B, magnitude, g, alpha)
