"""Lesson 9's exercises: the forward pass, the backward pass by hand, and the initialisation of an adapter."""

from functools import partial
from typing import Any

import numpy as np

import minilora as ml

from ..engine.tensor import Tensor
from .compare import Wrong, check_deviation, close
from .exercises import Draw, arrays, distinct_sizes, exercise, variant


def draw(rng: np.random.Generator, r: int | None = None, **more: str) -> Draw:
    """x (T, n), W (m, n), A (r, n), B (m, r), then what `more` names, then alpha."""
    sizes = distinct_sizes("Tnm", rng) | {"r": int(rng.integers(2, 6)) if r is None else r}
    drawn = arrays(rng, sizes, x="T n", W="m n", A="r n", B="m r", **more)
    drawn["alpha"] = int(rng.choice([29, 31, 37, 41, 43, 47, 53, 59, 61]))  # primes above every r²: all scales differ
    return drawn


# -- 9.1 the forward pass ----------------------------------------------------------------------------------------------


def judge_forward(answer: Any, drawn: Draw, rng: np.random.Generator, power: float = 1) -> None:
    """On tensors: the same output, and the right gradient of each through the engine."""
    tensors = {name: Tensor(value, requires_grad=name != "W") for name, value in drawn.items() if name != "alpha"}
    hint = "use only @, .T, +, *, / on what the function is given, so that the engine can differentiate it"
    try:
        result = answer(**tensors, alpha=drawn["alpha"])
    except Wrong:
        raise Wrong(f"right on NumPy arrays, but it stops on minilora's tensors: {hint}") from None
    x, W, A, B = (drawn[name] for name in "xWAB")
    scale, g = drawn["alpha"] / len(A) ** power, rng.standard_normal((len(x), len(W)))
    gradients = {"x": g @ W + scale * (g @ B @ A), "A": scale * (g @ B).T @ x, "B": scale * g.T @ (x @ A.T)}
    if isinstance(result, Tensor) and result.requires_grad and result.shape == g.shape:
        result.backward(g)
    for name, want in gradients.items():
        got = tensors[name].grad
        if got is None or not close(got, want):
            raise Wrong(f"y is right, but the gradient of {name} is missing or wrong: {hint}")


@exercise(
    "9.1",
    draw=draw,
    smallest=lambda rng: draw(rng, r=1),
    returns="y (T, m)",
    also=judge_forward,
    forbids={"m n": "right, but it forms a matrix of W's size: multiply x by A.T, then by B.T; B A is never needed"},
)
def lora_forward(x, W, A, B, alpha):
    """x (T, n), W (m, n), A (r, n), B (m, r) -> y (T, m)"""
    r = A.shape[0]
    return x @ W.T + (x @ A.T) @ B.T * (alpha / r)


RS = {r"\frac{\alpha}{r}": r"\frac{\alpha}{\sqrt{r}}", "alpha / r": "alpha / r**0.5"}  # rsLoRA's scale
variant("lora_forward", RS, "the scale is that of rsLoRA", also=partial(judge_forward, power=0.5))


# -- 9.2 the backward pass ---------------------------------------------------------------------------------------------


def by_the_engine(x: Any, W: Any, A: Any, B: Any, g: Any, alpha: float) -> Any:
    """The right gradients, computed by the engine instead of by hand."""
    parts = {name: Tensor(value, requires_grad=True) for name, value in zip("xAB", (x, A, B), strict=True)}
    lora_forward(parts["x"], Tensor(W), parts["A"], parts["B"], alpha).backward(g)
    return tuple(part.grad for part in parts.values())


@exercise(
    "9.2",
    draw=lambda rng: draw(rng, g="T m"),
    smallest=lambda rng: draw(rng, r=1, g="T m"),
    returns="dx (T, n), dA (r, n), dB (m, r)",
    by_hand=True,
    forbids={"m n": "right, but it forms a matrix of W's size: g goes through B, then through A; B A is never needed"},
)
def lora_backward(x, W, A, B, g, alpha):
    """x (T, n), W (m, n), A (r, n), B (m, r), g (T, m) -> dx (T, n), dA (r, n), dB (m, r), all NumPy arrays"""
    r = A.shape[0]
    scale = alpha / r
    du = scale * (g @ B)
    dx = g @ W + du @ A
    dA = du.T @ x
    dB = scale * (g.T @ (x @ A.T))
    return dx, dA, dB


variant("lora_backward", RS, "the scale is that of rsLoRA")


# -- 9.3 the initialisation --------------------------------------------------------------------------------------------


def draw_start(rng: np.random.Generator) -> Draw:
    """A wide W or a tall one: 1 / sqrt(n) and 1 / sqrt(m) differ clearly."""
    sizes = {"m": int(rng.integers(40, 60)), "n": int(rng.integers(400, 500)), "r": int(rng.integers(9, 16))}
    if rng.integers(2):
        sizes["m"], sizes["n"] = sizes["n"], sizes["m"]
    drawn = arrays(rng, sizes, W="m n")
    drawn["r"], drawn["rng"] = sizes["r"], np.random.default_rng(int(rng.integers(2**31)))
    return drawn


def judge_start(answer: Any, drawn: Draw, rng: np.random.Generator, power: float = 0.5, of: str = "n") -> None:
    """W frozen, A random and small, B zero: the first output is the base's, and not both gradients are zero."""
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
        raise Wrong("W is no longer the base's matrix: its values must not change")
    for name, part, axes in [("A", A, "r n"), ("B", B, "m r")]:
        shape = tuple(answer.sizes[axis] for axis in axes.split())
        if part.shape != shape:
            raise Wrong(f"{name} must have the shape ({', '.join(axes.split())}) = {shape}, got {part.shape}")
    if frozen.requires_grad:
        nothing = A.requires_grad and B.requires_grad
        raise Wrong(f"{'you froze nothing: ' if nothing else ''}W still requires a gradient (requires_grad)")
    for name, part in [("A", A), ("B", B)]:
        if not part.requires_grad:
            raise Wrong(f"{name} is frozen and would never change: use ml.Tensor({name}, requires_grad=True)")
        if part.node and part.node.edges:
            raise Wrong(f"{name} is the result of an operation on a tensor, and gets no gradient: make the tensor last")
    if not A.data.any():
        if B.data.any():
            raise Wrong("A and B are initialised the wrong way round: A random, B zero, as in the paper")
        raise Wrong("A and B are both zero: then both gradients are zero, and neither ever changes")
    if B.data.any():
        raise Wrong("B must be initialised to zero: now the first output differs from the base's")
    if not np.array_equal(A.data, start(seed)[1].data):
        raise Wrong("the same seed gives a different A: draw it with the rng that is passed")
    if np.array_equal(A.data, start(seed + 1)[1].data):
        raise Wrong("another seed gives the same A: draw it with the rng that is passed")
    if np.ptp(A.data, axis=0).max() == 0:
        raise Wrong("all rows of A are the same, so that B A has rank 1: draw (r, n) numbers")
    expected = f"1 / sqrt({of})" if power == 0.5 else f"1 / {of}"
    check_deviation(A.data, "A", expected, answer.sizes[of] ** -power)


@exercise("9.3", draw=draw_start, returns="W (m, n), A (r, n), B (m, r)", judge=judge_start)
def inject(W, r, rng):
    """W (m, n) a NumPy array, r the rank, rng a NumPy generator -> W (m, n), A (r, n), B (m, r), all ml.Tensor"""
    m, n = W.shape
    A = rng.standard_normal((r, n)) / np.sqrt(n)
    B = np.zeros((m, r))
    return ml.Tensor(W), ml.Tensor(A, requires_grad=True), ml.Tensor(B, requires_grad=True)


variant(
    "inject",
    {
        r"`rng.standard_normal`, divided by $\sqrt{n}$.": "`rng.standard_normal`, divided by r.",
        "rng.standard_normal((r, n)) / np.sqrt(n)": "rng.standard_normal((r, n)) / r",
    },
    "A is divided by the rank",
    lines={"1 / sqrt(n)": "1 / r"},
    judge=partial(judge_start, power=1, of="r"),
)
