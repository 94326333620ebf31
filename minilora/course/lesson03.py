"""Lesson 3's exercises: one step of AdamW, and cross-entropy with its gradient."""

from functools import partial
from typing import Any

import numpy as np

from ..engine.tensor import Tensor
from ..nn.optim import AdamW
from .compare import Wrong, close
from .exercises import Draw, arrays, changed, distinct_sizes, exercise, variant

# -- 3.1 one step of AdamW ---------------------------------------------------------------------------------------------


def draw_step(rng: np.random.Generator, t: int | None = None) -> Draw:
    """Four arrays in the middle of training, with hyperparameters that all change the result."""
    drawn = arrays(rng, distinct_sizes("mn", rng), w="m n", g="m n", m="m n", v="m n")
    drawn["v"] = rng.uniform(0.1, 2, drawn["v"].shape)
    drawn["t"] = int(rng.integers(2, 7)) if t is None else t
    drawn |= {"lr": float(rng.uniform(0.02, 0.1)), "beta1": float(rng.uniform(0.6, 0.8))}
    drawn |= {"beta2": float(rng.uniform(0.85, 0.95)), "eps": float(rng.uniform(0.05, 0.2))}
    drawn["decay"] = float(rng.uniform(0.3, 0.9))
    return drawn


def draw_first(rng: np.random.Generator) -> Draw:
    """The first step: m and v are zero, and so is one gradient."""
    drawn = draw_step(rng, t=1)
    drawn["m"], drawn["v"] = np.zeros_like(drawn["m"]), np.zeros_like(drawn["v"])
    drawn["g"][0, 0] = 0
    return drawn


def judge_training(answer: Any, drawn: Draw, rng: np.random.Generator) -> None:
    """Ten steps, compared with minilora's own AdamW, which agrees with PyTorch's."""
    if drawn["t"] > 1:  # once in each check
        return
    w = rng.standard_normal((3, 4))
    theirs = Tensor(w.copy(), requires_grad=True)
    optimizer = AdamW([theirs], lr=0.01, weight_decay=0.1)
    m, v = np.zeros_like(w), np.zeros_like(w)
    hyperparameters = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "decay": 0.1}
    for t in range(1, 11):
        g = rng.standard_normal(w.shape)
        theirs.grad = g.copy()
        optimizer.step()
        w, m, v = answer(w=w, g=g, m=m, v=v, t=t, **hyperparameters)
    if not close(w, theirs.data, 1e-12):
        raise Wrong(
            "each step alone is right, but after ten steps w differs from AdamW's: use t, m and v as they are passed"
        )


@exercise("3.1", draw=draw_step, smallest=draw_first, returns="w (m, n), m (m, n), v (m, n)", also=judge_training)
def adamw_step(w, g, m, v, t, lr, beta1, beta2, eps, decay):
    """w, g, m, v: arrays of one shape; t = 1, 2, ...; the rest are numbers -> the new w, m, v"""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    w = w * (1 - lr * decay) - lr * m_hat / (np.sqrt(v_hat) + eps)
    return w, m, v


from_zero = partial(changed, change=lambda drawn: {"t": drawn["t"] - 1})  # a draw, its steps counted from 0


def judge_training_from_zero(answer: Any, drawn: Draw, rng: np.random.Generator) -> None:
    """`judge_training`, with steps that are counted from 0."""
    judge_training(lambda t, **rest: answer(**(drawn | rest | {"t": t - 1})), Draw(t=drawn["t"] + 1), rng)


variant(
    "adamw_step",
    {
        "- `t` counts the steps and is 1 in the first one.": "- `t` counts the steps and is 0 in the first one.",
        "t = 1, 2, ...;": "t = 0, 1, ...;",
        "beta1**t": "beta1 ** (t + 1)",
        "beta2**t": "beta2 ** (t + 1)",
        "*state[name], t, 0.1": "*state[name], t - 1, 0.1",
        'x @ parameters["W"].T + parameters': 'x @ parameters["W"] + parameters',  # as in this form of 2.3
    },
    "the steps are counted from 0",
    lines={
        "t is already 1 in the first step": "t is 0 in the first step, so they use t + 1",
        "beta1 ** (t + 1) -> beta1 ** (t + 1)": "beta1 ** (t + 1) -> beta1 ** (t + 2)",
        "beta2 ** (t + 1) -> beta2 ** (t + 1)": "beta2 ** (t + 1) -> beta2 ** (t + 2)",
        "beta1 ** (t + 1) -> beta1 ** (t - 1)": "beta1 ** (t + 1) -> beta1**t",
        "beta2 ** (t + 1) -> beta2 ** (t - 1)": "beta2 ** (t + 1) -> beta2**t",
        "the bias corrections use t + 1": "the bias corrections use t + 2",
        "use t - 1: in the first step that is 0": "use t: in the first step it is 0",
    },
    draw=from_zero(draw_step),
    smallest=from_zero(draw_first),
    also=judge_training_from_zero,
)


# -- 3.2 cross-entropy, with its gradient ------------------------------------------------------------------------------


def draw_logits(rng: np.random.Generator, offset: float = 0) -> Draw:
    """z (T, V), labels (T,). offset: how far rows are from zero, class 0 below others, some labels above."""
    sizes = distinct_sizes("TV", rng)
    drawn = arrays(rng, sizes, z="T V")
    drawn["z"] = 2 * drawn["z"] + offset * np.linspace(-1, 1, sizes["T"])[:, None]
    drawn["z"][:, 0] -= offset
    drawn["labels"] = rng.integers(1 if offset else 0, sizes["V"], size=sizes["T"])
    tokens = np.arange(sizes["T"])
    drawn["z"][tokens, drawn["labels"]] += offset * (tokens % 2)
    return drawn


@exercise(
    "3.2",
    draw=[draw_logits, lambda rng: draw_logits(rng, 2000)],
    smallest=lambda rng: Draw({"T": 1, "V": 2}, z=rng.standard_normal((1, 2)), labels=np.array([0])),
    returns="L, dz (T, V)",
    by_hand=True,
)
def softmax_cross_entropy(z, labels):
    """z (T, V) logits, labels (T,) whole numbers from 0 to V - 1 -> L, a number, and dz (T, V)"""
    tokens = np.arange(len(z))
    z = z - z.max(axis=1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    loss = -log_p[tokens, labels].mean()
    dz = np.exp(log_p)
    dz[tokens, labels] -= 1
    return loss, dz / len(z)


variant(
    "softmax_cross_entropy",
    {
        r"$$L = -\frac{1}{T} \sum_t": r"$$L = -\sum_t",
        "[tokens, labels].mean()": "[tokens, labels].sum()",
        "dz / len(z)": "dz",
        "loss {loss:.3f}": "loss {loss / 2000:.3f}",
    },
    "the loss is the sum over the tokens, not their mean",
    lines={
        "L is the sum over the tokens: it is the mean": "L is the mean over the tokens: it is the sum",
        "by T · V: the mean is over the T tokens": "by T · V: it is the sum over the T tokens",
        "dz is not divided by T: L is a mean over the tokens": "dz is divided by T: L is a sum over the tokens",
    },
)
