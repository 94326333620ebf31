"""The judges of lesson 8's exercises: the forward pass, dA and dB by hand, and how an adapter starts."""

from __future__ import annotations

import numpy as np

from ..engine.tensor import Tensor
from .judge import Answer, Wrong, close, compare, distinct_sizes, exercise, named


def draw(rng: np.random.Generator) -> tuple[dict[str, int], dict[str, np.ndarray], int]:
    """Sizes T, n, m, r, no two equal; float64 arrays x (T, n), W (m, n), A (r, n), B (m, r); and an alpha."""
    sizes = distinct_sizes("Tnm", rng) | {"r": int(rng.integers(2, 6))}
    shapes = {"x": "Tn", "W": "mn", "A": "rn", "B": "mr"}
    arrays = {name: rng.standard_normal([sizes[axis] for axis in axes]) for name, axes in shapes.items()}
    return sizes, arrays, int(rng.integers(26, 65))  # larger than every r², so that no two scales are alike


@exercise
def lora_forward(answer: Answer, rng: np.random.Generator) -> None:
    """y = x Wᵀ + (alpha / r)(x Aᵀ) Bᵀ, on arrays; and on tensors, with the gradients that the engine then finds."""
    answer.sizes, inputs, alpha = draw(rng)
    x, W, A, B = inputs.values()
    base, update, r = x @ W.T, x @ A.T @ B.T, len(A)
    scale = alpha / r
    y = base + scale * update
    suspects = [
        ("the update is missing: y is x Wᵀ alone", base),
        ("x Wᵀ is missing: y is the update alone", scale * update),
        ("scale is alpha / r, not alpha", base + alpha * update),
        ("the scale alpha / r is missing", base + update),
        ("scale is alpha / r, not alpha / sqrt(r), which is rsLoRA's", base + alpha / np.sqrt(r) * update),
        ("scale is alpha / r, not r / alpha", base + r / alpha * update),
        ("scale is alpha / r, not alpha * r", base + alpha * r * update),
        ("scale is alpha / r with /, not //", base + alpha // r * update),
        ("r is the number of rows of A, not n, the number of its columns", base + alpha / A.shape[1] * update),
        ("r is the number of columns of B, not m, the number of its rows", base + alpha / len(B) * update),
        ("the scale belongs to the update alone: x Wᵀ is scaled as well", scale * (base + update)),
        ("the scale stands once, not twice", base + scale**2 * update),
        ("the update is added, not subtracted", base - scale * update),
    ]
    compare(answer(**inputs, alpha=alpha), y, "y", "T, m", answer.sizes, suspects)

    tensors = {name: Tensor(value, requires_grad=name != "W") for name, value in inputs.items()}
    hint = "use only @, .T, +, *, / on what the function is given, so that the engine can follow it"
    try:
        result = answer(**tensors, alpha=alpha)
    except Wrong:
        raise Wrong(f"right on NumPy arrays, but it stops on minilora's tensors: {hint}") from None
    g = rng.standard_normal(y.shape)
    gradients = {"x": g @ W + scale * (g @ B @ A), "A": scale * (g @ B).T @ x, "B": scale * g.T @ (x @ A.T)}
    if isinstance(result, Tensor) and result.requires_grad and result.shape == y.shape:
        result.backward(g)
    for name, want in gradients.items():
        got = tensors[name].grad
        if got is None or not close(got, want):
            raise Wrong(f"y is right, but no right gradient reaches {name}: {hint}")


@exercise
def lora_gradients(answer: Answer, rng: np.random.Generator) -> None:
    """dA = scale (g B)ᵀ x and dB = scale gᵀ (x Aᵀ): what an optimizer needs, by hand."""
    answer.sizes, inputs, alpha = draw(rng)
    x, W, A, B = inputs.values()
    g = rng.standard_normal((len(x), len(W)))
    result = answer(**inputs, g=g, alpha=alpha)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Wrong("return two arrays: `return dA, dB`")
    T, scale = len(x), alpha / len(A)
    right = {"dA": (g @ B).T @ x, "dB": g.T @ (x @ A.T)}  # without the scale
    if [np.shape(part) for part in result if isinstance(part, np.ndarray)] == [B.shape, A.shape]:
        raise Wrong("dA and dB are swapped: `return dA, dB`, in this order")
    slices = {"dA": np.einsum("tr,tn->trn", g @ B, x), "dB": np.einsum("tm,tr->tmr", g, x @ A.T)}
    of_W = "has the shape of W: that is gᵀ x, the gradient of W"
    reasons = {"dA": f"dA {of_W}; A sees g through B, as g B", "dB": f"dB {of_W}; B sees x through A, as x Aᵀ"}
    for (what, plain), axes, got in zip(right.items(), ["r, n", "m, r"], result, strict=True):
        suspects = [
            (f"{what}: scale is alpha / r, not alpha", alpha * plain),
            (f"{what}: the scale alpha / r is missing; y has it, so its gradients have it", plain),
            (f"{what}: the scale stands once, not twice", scale**2 * plain),
            (f"{what}: scale is alpha / r, not alpha / sqrt(r), which is rsLoRA's", alpha / np.sqrt(len(A)) * plain),
            (f"{what} is divided by the number of tokens: where the loss is a mean, g has that", scale * plain / T),
            (f"{what} has the wrong sign: the gradient points uphill, the optimizer turns round", -scale * plain),
            (f"{what} has one slice per token: add them up, all tokens use the same matrix", scale * slices[what]),
            (reasons[what], g.T @ x),
            (reasons[what], scale * g.T @ x),
        ]
        compare(got, scale * plain, what, axes, answer.sizes, suspects)


@exercise
def inject(answer: Answer, rng: np.random.Generator) -> None:
    """W frozen, A random and small, B zero: the first output is the base's, and the first gradient is not nothing."""
    m, n = (int(size) for size in rng.choice(np.arange(40, 60), size=2, replace=False))
    r, seed = int(rng.integers(3, 8)), int(rng.integers(2**31))
    answer.sizes = {"m": m, "n": n, "r": r}
    W = rng.standard_normal((m, n))

    def start(seed: int) -> list[Tensor]:
        result = answer(W=W, r=r, rng=np.random.default_rng(seed))
        if not isinstance(result, (tuple, list)) or len(result) != 3:
            raise Wrong("return three tensors: `return W, A, B`")
        for name, part in zip("WAB", result, strict=True):
            if not isinstance(part, Tensor):
                raise Wrong(f"{name} must be a tensor, as ml.Tensor({name}), got {type(part).__name__}")
        return list(result)

    parts = start(seed)
    for name, part, axes in zip("WAB", parts, ["mn", "rn", "mr"], strict=True):
        shape = tuple(answer.sizes[axis] for axis in axes)
        if part.shape != shape:
            got, want = named(part.shape, answer.sizes), ", ".join(axes)
            raise Wrong(f"{name} must have the shape ({want}) = {shape}, got {got}")
    frozen_W, A, B = parts
    if not np.array_equal(frozen_W.data, W):
        raise Wrong("W is not the base's own matrix any more: the base must keep its numbers")
    if frozen_W.requires_grad:
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
    spread = float(A.data.std()) * np.sqrt(n)
    if not 0.4 < spread < 2:  # 1 is asked for; the paper's own code has 0.58
        size = "large" if spread > 1 else "small"
        raise Wrong(f"A's numbers are too {size}: standard deviation {A.data.std():.3g}, expected 1 / sqrt(n)")
