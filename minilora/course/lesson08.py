"""Lesson 8's exercises: the forward pass, the backward pass by hand, and how an adapter starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..engine.tensor import Tensor
from .compare import Wrong, close, spread
from .exercises import Draw, arrays, distinct_sizes, exercise, variant


def draw(rng: np.random.Generator, r: int | None = None, **more: str) -> Draw:
    """x (T, n), W (m, n), A (r, n), B (m, r), then what `more` names, then alpha."""
    sizes = distinct_sizes("Tnm", rng) | {"r": int(rng.integers(2, 6)) if r is None else r}
    drawn = arrays(rng, sizes, x="T n", W="m n", A="r n", B="m r", **more)
    drawn["alpha"] = int(
        rng.choice([29, 31, 37, 41, 43, 47, 53, 59, 61])
    )  # primes above every r²: no two scales are alike
    return drawn


# -- 8.1 the forward pass ----------------------------------------------------------------------------------------------


def forward(scale_of: Callable[[float, int], float], base: float = 1, update: float = 1) -> Callable:
    """A forward pass with another scale, as scale_of(alpha, r), or other factors before its two parts."""

    def answer(x: Any, W: Any, A: Any, B: Any, alpha: float) -> Any:
        return base * (x @ W.T) + update * scale_of(alpha, len(A)) * (x @ A.T @ B.T)

    return answer


def forms_the_matrix(x: Any, W: Any, A: Any, B: Any, alpha: float) -> Any:
    """Right, by way of W + scale B A."""
    return x @ (W + alpha / len(A) * (B @ A)).T


def leaves_the_engine(x: Any, W: Any, A: Any, B: Any, alpha: float) -> Any:
    """Right on arrays; on tensors it hides B from the engine."""
    return x @ W.T + alpha / len(A) * (x @ A.T @ (B.detach() if isinstance(B, Tensor) else B).T)


def scales_all(x: Any, W: Any, A: Any, B: Any, alpha: float) -> Any:
    """The scale before x Wᵀ, too."""
    return alpha / len(A) * (x @ W.T + x @ A.T @ B.T)


def judge_forward(answer: Any, drawn: Draw, rng: np.random.Generator) -> None:
    """On tensors: the same numbers, and every gradient that the engine then finds."""
    tensors = {name: Tensor(value, requires_grad=name != "W") for name, value in drawn.items() if name != "alpha"}
    hint = "use only @, .T, +, *, / on what the function is given, so that the engine can follow it"
    try:
        result = answer(**tensors, alpha=drawn["alpha"])
    except Wrong:
        raise Wrong(f"right on NumPy arrays, but it stops on minilora's tensors: {hint}") from None
    x, W, A, B = (drawn[name] for name in "xWAB")
    scale, g = drawn["alpha"] / len(A), rng.standard_normal((len(x), len(W)))
    gradients = {"x": g @ W + scale * (g @ B @ A), "A": scale * (g @ B).T @ x, "B": scale * g.T @ (x @ A.T)}
    if isinstance(result, Tensor) and result.requires_grad and result.shape == g.shape:
        result.backward(g)
    for name, want in gradients.items():
        got = tensors[name].grad
        if got is None or not close(got, want):
            raise Wrong(f"y is right, but no right gradient reaches {name}: {hint}")


@exercise(
    "8.1",
    draw=draw,
    smallest=lambda rng: draw(rng, r=1),
    returns="y (T, m)",
    also=judge_forward,
    forbids={"m n": "right, but it forms a matrix of W's size: go down first, x @ A.T, then up; B A is never needed"},
    decisive=["x @ W.T + (x @ A.T) @ B.T * (alpha / r)"],
    mistakes={
        "no scale": (forward(lambda alpha, r: 1), "the scale is missing"),
        "alpha": (forward(lambda alpha, r: alpha), "scale is alpha / r, not alpha"),
        "square root": (
            forward(lambda alpha, r: alpha / np.sqrt(r)),
            "scale is alpha / r, not alpha / sqrt(r), which is rsLoRA's",
        ),
        "upside down": (forward(lambda alpha, r: r / alpha), "scale is alpha / r, not r / alpha"),
        "product": (forward(lambda alpha, r: alpha * r), "scale is alpha / r, not alpha * r"),
        "whole division": (forward(lambda alpha, r: alpha // r), "scale is alpha / r with /, not //"),
        "r fixed": (forward(lambda alpha, r: alpha / 8), "r is fixed at 8: it is the number of rows of A"),
        "scale twice": (forward(lambda alpha, r: (alpha / r) ** 2), "the scale stands once, not twice"),
        "r from x": (
            lambda x, W, A, B, alpha: x @ W.T + alpha / len(x) * (x @ A.T @ B.T),
            "r is the number of rows of A, not of x: that is T, the number of tokens",
        ),
        "r from columns": (
            lambda x, W, A, B, alpha: x @ W.T + alpha / A.shape[1] * (x @ A.T @ B.T),
            "r is the number of rows of A, not n, the number of its columns",
        ),
        "r from B": (
            lambda x, W, A, B, alpha: x @ W.T + alpha / len(B) * (x @ A.T @ B.T),
            "r is the number of columns of B, not m, the number of its rows",
        ),
        "base alone": (lambda x, W, A, B, alpha: x @ W.T, "the update is missing: y is x Wᵀ alone"),
        "update alone": (forward(lambda alpha, r: alpha / r, base=0), "x Wᵀ is missing: y is the update alone"),
        "all scaled": (scales_all, "the scale belongs to the update alone: x Wᵀ is scaled as well"),
        "subtracted": (forward(lambda alpha, r: alpha / r, update=-1), "the update is added, not subtracted"),
        "A and B swapped": (
            lambda x, W, A, B, alpha: x @ W.T + alpha / len(A) * (x @ B @ A.T),
            "meets m = ",
        ),
        "star for at": (
            lambda x, W, A, B, alpha: x @ W.T + alpha / len(A) * (x * A.T),
            "do not fit number by number: is * meant to be @?",
        ),
        "forms W": (forms_the_matrix, "right, but it forms a matrix of W's size"),
        "hides B": (leaves_the_engine, "y is right, but no right gradient reaches B"),
    },
)
def lora_forward(x: Any, W: Any, A: Any, B: Any, alpha: float) -> Any:
    """y = x Wᵀ + (alpha / r)(x Aᵀ) Bᵀ, on arrays and on tensors."""
    return x @ W.T + alpha / A.shape[0] * (x @ A.T @ B.T)


RS = {r"\frac{\alpha}{r}": r"\frac{\alpha}{\sqrt{r}}", "alpha / r": "alpha / r**0.5"}  # rsLoRA's scale


@variant("lora_forward", RS, also=None)
def lora_forward_rs(x: Any, W: Any, A: Any, B: Any, alpha: float) -> Any:
    """rsLoRA's scale."""
    return x @ W.T + alpha / A.shape[0] ** 0.5 * (x @ A.T @ B.T)


# -- 8.2 the backward pass ---------------------------------------------------------------------------------------------


def backward(scale_of: Callable[[float, int], float] = lambda alpha, r: alpha / r, factor: Any = 1) -> Callable:
    """A backward pass with another scale; `factor` is multiplied to all it returns, or is a function of T."""

    def answer(x: Any, W: Any, A: Any, B: Any, g: Any, alpha: float) -> Any:
        s = scale_of(alpha, len(A))
        f = factor(len(x)) if callable(factor) else factor
        du = s * (g @ B)
        return f * (g @ W + du @ A), f * du.T @ x, f * s * (g.T @ (x @ A.T))

    return answer


def by_the_engine(x: Any, W: Any, A: Any, B: Any, g: Any, alpha: float) -> Any:
    """Right, and found by the engine."""
    parts = {name: Tensor(value, requires_grad=True) for name, value in zip("xAB", (x, A, B), strict=True)}
    lora_forward(parts["x"], Tensor(W), parts["A"], parts["B"], alpha).backward(g)
    return tuple(part.grad for part in parts.values())


def replaced(**parts: Callable) -> Callable:
    """The right answer, with some of dx, dA, dB made in another way: function(x, W, A, B, g, scale)."""

    def answer(x: Any, W: Any, A: Any, B: Any, g: Any, alpha: float) -> Any:
        right = dict(zip(("dx", "dA", "dB"), lora_backward(x, W, A, B, g, alpha), strict=True))
        return tuple(parts[n](x, W, A, B, g, alpha / len(A)) if n in parts else right[n] for n in right)

    return answer


def spoils_g(x: Any, W: Any, A: Any, B: Any, g: Any, alpha: float) -> Any:
    """Right, but g is not what it was."""
    g *= alpha / len(A)
    return g @ W, (g @ B).T @ x, g.T @ (x @ A.T)


@exercise(
    "8.2",
    draw=lambda rng: draw(rng, g="T m"),
    smallest=lambda rng: draw(rng, r=1, g="T m"),
    returns="dx (T, n), dA (r, n), dB (m, r)",
    by_hand=True,
    forbids={"m n": "right, but it forms a matrix of W's size: g goes through B, then through A; B A is never needed"},
    decisive=["g @ W + du @ A"],
    mistakes={
        "alpha": (backward(lambda alpha, r: alpha), "scale is alpha / r, not alpha"),
        "no scale": (
            backward(lambda alpha, r: 1),
            "the scale alpha / r is missing; y has it, so its gradients have it",
        ),
        "scale twice": (backward(lambda alpha, r: (alpha / r) ** 2), "the scale stands once, not twice"),
        "square root": (
            backward(lambda alpha, r: alpha / np.sqrt(r)),
            "scale is alpha / r, not alpha / sqrt(r), which is rsLoRA's",
        ),
        "mean": (
            backward(factor=lambda T: 1 / T),
            "it is divided by the number of tokens: where the loss is a mean, g has that",
        ),
        "sign": (backward(factor=-1), "the sign is wrong: the gradient points uphill, the optimizer turns round"),
        "dx without W": (
            replaced(dx=lambda x, W, A, B, g, s: s * (g @ B) @ A),
            "dx: x is used twice, and its gradients add up: the way through W is missing",
        ),
        "dx without the update": (
            replaced(dx=lambda x, W, A, B, g, s: g @ W),
            "dx: x is used twice, and its gradients add up: the way through A and B is missing",
        ),
        "slices of dA": (
            replaced(dA=lambda x, W, A, B, g, s: s * np.einsum("tr,tn->trn", g @ B, x)),
            "dA has one slice per token: add them up, all tokens use the same matrix",
        ),
        "slices of dB": (
            replaced(dB=lambda x, W, A, B, g, s: s * np.einsum("tm,tr->tmr", g, x @ A.T)),
            "dB has one slice per token: add them up, all tokens use the same matrix",
        ),
        "dA of W": (
            replaced(dA=lambda x, W, A, B, g, s: g.T @ x),
            "dA has the shape of W: that is gᵀ x, the gradient of W; A sees g through B, as g B",
        ),
        "dB of W": (
            replaced(dB=lambda x, W, A, B, g, s: g.T @ x),
            "dB has the shape of W: that is gᵀ x, the gradient of W; B sees x through A, as x Aᵀ",
        ),
        "swapped": (
            lambda *a: tuple(lora_backward(*a)[i] for i in (0, 2, 1)),
            "dA and dB are swapped: `return dx, dA, dB`, in this order",
        ),
        "changes g": (spoils_g, "the function changes its input g: make a new value in place of changing it (+=, *=)"),
        "by the engine": (by_the_engine, "by hand: write the gradient down yourself, without .backward()"),
    },
)
def lora_backward(x: Any, W: Any, A: Any, B: Any, g: Any, alpha: float) -> Any:
    """dx = g W + scale (g B) A, dA = scale (g B)ᵀ x, dB = scale gᵀ (x Aᵀ)."""
    scale = alpha / len(A)
    du = scale * (g @ B)
    return g @ W + du @ A, du.T @ x, scale * (g.T @ (x @ A.T))


@variant("lora_backward", RS)
def lora_backward_rs(x: Any, W: Any, A: Any, B: Any, g: Any, alpha: float) -> Any:
    """With rsLoRA's scale."""
    return backward(lambda alpha, r: alpha / np.sqrt(r))(x, W, A, B, g, alpha)


# -- 8.3 the start -----------------------------------------------------------------------------------------------------


def draw_start(rng: np.random.Generator) -> Draw:
    """A wide W or a high one: 1 / sqrt(n) and 1 / sqrt(m) are far apart."""
    sizes = {"m": int(rng.integers(40, 60)), "n": int(rng.integers(400, 500)), "r": int(rng.integers(9, 16))}
    if rng.integers(2):
        sizes["m"], sizes["n"] = sizes["n"], sizes["m"]
    drawn = arrays(rng, sizes, W="m n")
    drawn["r"], drawn["rng"] = sizes["r"], np.random.default_rng(int(rng.integers(2**31)))
    return drawn


def judge_start(answer: Any, drawn: Draw, rng: np.random.Generator) -> None:
    """W frozen, A random and small, B zero: the first output is the base's, and the first gradient is not nothing."""
    W, r, seed = drawn["W"], drawn["r"], int(rng.integers(2**31))

    def start(seed: int) -> list[Tensor]:
        result = answer(W=W, r=r, rng=np.random.default_rng(seed))
        if not isinstance(result, (tuple, list)) or len(result) != 3:
            raise Wrong("return three tensors: `return W, A, B`")
        for name, part in zip("WAB", result, strict=True):
            if not isinstance(part, Tensor):
                raise Wrong(f"{name} must be a tensor, as ml.Tensor({name}), got {type(part).__name__}")
        return list(result)

    frozen, A, B = start(seed)
    if not np.array_equal(frozen.data, W):
        raise Wrong("W is not the base's own matrix any more: the base must keep its numbers")
    for name, part, axes in [("A", A, "r n"), ("B", B, "m r")]:
        shape = tuple(answer.sizes[axis] for axis in axes.split())
        if part.shape != shape:
            raise Wrong(f"{name} must have the shape ({', '.join(axes.split())}) = {shape}, got {part.shape}")
    if frozen.requires_grad:
        nothing = A.requires_grad and B.requires_grad
        raise Wrong(f"{'you froze nothing: ' if nothing else ''}W still asks for a gradient (requires_grad)")
    for name, part in [("A", A), ("B", B)]:
        if not part.requires_grad:
            raise Wrong(f"{name} is frozen and would never learn: ml.Tensor({name}, requires_grad=True)")
    if not A.data.any():
        if B.data.any():
            raise Wrong("A and B start the wrong way round: A random, B zero, as in the paper")
        raise Wrong("A and B are both zero: then both gradients are zero, and neither ever moves")
    if B.data.any():
        raise Wrong("B must start at zero: now the first output differs from the base's")
    if not np.array_equal(A.data, start(seed)[1].data):
        raise Wrong("the same seed gives another A: draw it with the rng you are given")
    if np.array_equal(A.data, start(seed + 1)[1].data):
        raise Wrong("another seed gives the same A: draw it with the rng you are given")
    spread(A.data, "A", "1 / sqrt(n)", 1 / np.sqrt(answer.sizes["n"]))


def started(change: Callable) -> Callable:
    """The right start, changed: change(W, A, B, rng) returns what the function returns."""

    def answer(W: Any, r: int, rng: np.random.Generator) -> Any:
        return change(*(part.data for part in inject(W, r, rng)), rng)

    return answer


def learns(array: Any) -> Tensor:
    """A tensor that asks for a gradient."""
    return Tensor(array, requires_grad=True)


@exercise(
    "8.3",
    draw=draw_start,
    returns="W (m, n), A (r, n), B (m, r)",
    judge=judge_start,
    decisive=["rng.standard_normal((r, n)) / np.sqrt(n)"],
    mistakes={
        "nothing frozen": (started(lambda W, A, B, rng: (learns(W), learns(A), learns(B))), "you froze nothing"),
        "A frozen": (
            started(lambda W, A, B, rng: (Tensor(W), Tensor(A), learns(B))),
            "A is frozen and would never learn",
        ),
        "both random": (started(lambda W, A, B, rng: (Tensor(W), learns(A), learns(B + 1))), "B must start at zero"),
        "both zero": (started(lambda W, A, B, rng: (Tensor(W), learns(0 * A), learns(B))), "neither ever moves"),
        "wrong way round": (
            started(lambda W, A, B, rng: (Tensor(W), learns(0 * A), learns(B + 1))),
            "A and B start the wrong way round",
        ),
        "own generator": (
            started(
                lambda W, A, B, rng: (Tensor(W), learns(np.random.default_rng().standard_normal(A.shape)), learns(B))
            ),
            "the same seed gives another A",
        ),
        "not random": (
            started(lambda W, A, B, rng: (Tensor(W), learns(np.ones(A.shape)), learns(B))),
            "another seed gives the same A",
        ),
        "too large": (
            started(lambda W, A, B, rng: (Tensor(W), learns(A * np.sqrt(A.shape[1])), learns(B))),
            "A's numbers are too large",
        ),
        "width of the output": (
            lambda W, r, rng: (
                Tensor(W),
                learns(rng.standard_normal((r, W.shape[1])) / np.sqrt(len(W))),
                learns(np.zeros((len(W), r))),
            ),
            "expected 1 / sqrt(n)",
        ),
        "all positive": (
            started(lambda W, A, B, rng: (Tensor(W), learns(A + 1 / np.sqrt(A.shape[1])), learns(B))),
            "half of them must lie below zero",
        ),
        "changed base": (
            started(lambda W, A, B, rng: (Tensor(W + 1), learns(A), learns(B))),
            "the base must keep its numbers",
        ),
        "arrays": (started(lambda W, A, B, rng: (Tensor(W), A, learns(B))), "A must be a tensor"),
        "transposed": (
            started(lambda W, A, B, rng: (Tensor(W), learns(A.T), learns(B))),
            "A must have the shape (r, n)",
        ),
    },
)
def inject(W: Any, r: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """W frozen, A of spread 1 / sqrt(n), B zero."""
    m, n = W.shape
    return Tensor(W), learns(rng.standard_normal((r, n)) / np.sqrt(n)), learns(np.zeros((m, r)))
