"""Lesson 3's exercises: one step of AdamW, and cross-entropy with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..engine.tensor import Tensor
from ..nn.optim import AdamW
from .compare import Wrong, close
from .exercises import Draw, arrays, distinct_sizes, exercise, variant

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
        raise Wrong("each step alone is right, but after ten steps w differs from that of minilora's AdamW")


@exercise(
    "3.1",
    draw=draw_step,
    smallest=draw_first,
    returns="w (m, n), m (m, n), v (m, n)",
    also=judge_training,
    mistakes="""
        bias correction is missing: divide m by 1 - beta1**t and v by 1 - beta2**t, since both start at zero
            m / (1 - beta1**t) -> m
            v / (1 - beta2**t) -> v
        m has no bias correction: divide it by 1 - beta1**t
            m / (1 - beta1**t) -> m
        v has no bias correction: divide it by 1 - beta2**t
            v / (1 - beta2**t) -> v
        the bias corrections use t + 1: t is already 1 in the first step
            beta1**t -> beta1 ** (t + 1)
            beta2**t -> beta2 ** (t + 1)
        the bias corrections use t - 1: in the first step that is 0, and they divide by 0
            beta1**t -> beta1 ** (t - 1)
            beta2**t -> beta2 ** (t - 1)
        the bias corrections do not use t: divide by 1 - beta**t, which approaches 1
            beta1**t -> beta1
            beta2**t -> beta2
        v is divided by 1 - beta1**t: use beta2 for v
            beta2**t -> beta1**t
        the betas are swapped: beta1 belongs to m, beta2 to v
            beta1 * m + (1 - beta1) * g -> beta2 * m + (1 - beta2) * g
            beta2 * v + (1 - beta2) * g**2 -> beta1 * v + (1 - beta1) * g**2
        decay was added to the gradient, and so to m and v: that is L2 regularisation; AdamW applies it to w separately
            -> g = g + decay * w
        decay is missing: w is multiplied by 1 - lr * decay as well
            w * (1 - lr * decay) -> w
        decay without the learning rate: w is multiplied by 1 - lr * decay
            1 - lr * decay -> 1 - decay
        decay makes w larger: it must pull w toward zero, 1 - lr * decay
            1 - lr * decay -> 1 + lr * decay
        decay is applied to the step as well: multiply only the w that is passed by 1 - lr * decay
            lr * m_hat -> (1 - lr * decay) * lr * m_hat
        eps is inside the root: add it after the root
            np.sqrt(v_hat) + eps -> np.sqrt(v_hat + eps)
        eps is missing: where all gradients were zero so far, 0 is divided by 0
            (np.sqrt(v_hat) + eps) -> np.sqrt(v_hat)
        the root is missing: v is the mean of squares, so divide by np.sqrt of it
            np.sqrt(v_hat) -> v_hat
        the sign is wrong: w moves against the gradient
            - lr * m_hat -> + lr * m_hat
        w was updated with the old m: update m and v first, then w
            -> before = m
            m / (1 - beta1**t) -> before / (1 - beta1**t)
        v averages g: it is the running mean of the squares, g**2
            g**2 -> g
        m takes all of g: a running mean takes 1 - beta1 of it
            (1 - beta1) * g -> g
        m keeps 1 - beta1 of the old m: it keeps beta1, and takes 1 - beta1 of g
            beta1 * m + (1 - beta1) * g -> (1 - beta1) * m + beta1 * g
        it is returned with bias correction: the next step needs it without
            return w, m, v -> return w, m_hat, v_hat
    """,
)
def adamw_step(w, g, m, v, t, lr, beta1, beta2, eps, decay):
    """w, g, m, v: arrays of one shape; t = 1, 2, ...; the rest are numbers -> the new w, m, v"""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    w = w * (1 - lr * decay) - lr * m_hat / (np.sqrt(v_hat) + eps)
    return w, m, v


def from_zero(draw: Callable[..., Draw]) -> Callable[[np.random.Generator], Draw]:
    """The same draw, with steps that are counted from 0."""

    def drawn(rng: np.random.Generator) -> Draw:
        found = draw(rng)
        found["t"] -= 1
        return found

    return drawn


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
    """z (T, V), labels (T,). offset: how far whole rows are from zero."""
    sizes = distinct_sizes("TV", rng)
    drawn = arrays(rng, sizes, z="T V")
    drawn["z"] = 2 * drawn["z"] + offset * np.linspace(-1, 1, sizes["T"])[:, None]
    drawn["labels"] = rng.integers(sizes["V"], size=sizes["T"])
    return drawn


@exercise(
    "3.2",
    draw=[draw_logits, lambda rng: draw_logits(rng, 2000)],
    smallest=lambda rng: Draw({"T": 1, "V": 2}, z=rng.standard_normal((1, 2)), labels=np.array([1])),
    returns="L, dz (T, V)",
    by_hand=True,
    mistakes="""
        L is the sum over the tokens: it is the mean
            .mean() -> .sum()
        L is negative: ln p is negative, so the loss is minus that
            -log_p[tokens, labels] -> log_p[tokens, labels]
        L is divided by T · V: the mean is over the T tokens
            .mean() -> .sum() / z.size
        L is in bits: take np.log, not np.log2
            .mean() -> .mean() / np.log(2)
        L adds up over all classes: only the label counts
            -log_p[tokens, labels].mean() -> -log_p.sum() / len(z)
        L is the entropy of p, which does not depend on the labels: take -ln p of the label
            -log_p[tokens, labels].mean() -> -(np.exp(log_p) * log_p).sum() / len(z)
        L is 1 - p: the loss is -ln p, which has no upper bound as p approaches 0
            -log_p[tokens, labels].mean() -> 1 - np.exp(log_p[tokens, labels]).mean()
        L is -ln of the mean of p: first the logarithm, then the mean
            -log_p[tokens, labels].mean() -> -np.log(np.exp(log_p[tokens, labels]).mean())
        dz is not divided by T: L is a mean over the tokens
            dz / len(z) -> dz
        dz is p alone: the first term also depends on the label's logit
            -= 1 -> -= 0
        dz: only p is divided by T: subtract 1 at the label first, then divide
            -= 1 -> -= len(z)
        dz has the wrong sign: a larger logit of the label makes the loss smaller
            dz / len(z) -> -dz / len(z)
        dz is the gradient with respect to p, -1 / p at the label: continue through softmax to z
            dz = np.exp(log_p) -> dz = np.zeros_like(z)
            -= 1 -> = -1 / np.exp(log_p[tokens, labels])
        dz is zero except at the labels: softmax's denominator contains every logit of a row
            dz = np.exp(log_p) -> dz = np.zeros_like(z)
            -= 1 -> = np.exp(log_p[tokens, labels]) - 1
        dz is p (1 - p), the derivative of one probability with respect to its own logit: the labels are missing
            dz[tokens, labels] -= 1 -> dz = dz * (1 - dz)
        softmax runs over the columns: each row is one token, so use axis=1
            z.max(axis=1 -> z.max(axis=0
            .sum(axis=1 -> .sum(axis=0
        large logits: e**z overflows; subtract the largest logit of each row first, p does not change
            z = z - z.max(axis=1, keepdims=True) -> pass
        large logits: e**z overflows; subtract the largest logit of each row first, p does not change
            z = z - z.max(axis=1, keepdims=True) -> pass
            z - np.log(np.exp(z).sum(axis=1, keepdims=True)) -> np.log(np.exp(z) / np.exp(z).sum(axis=1)[:, None])
        one number is subtracted from all rows, and e**z of the lower ones is 0: each row has its own largest
            z.max(axis=1, keepdims=True) -> z.max()
        one number is subtracted from all rows, and e**z of the lower ones is 0: each row has its own largest
            z.max(axis=1, keepdims=True) -> z.max()
            z - np.log(np.exp(z).sum(axis=1, keepdims=True)) -> np.log(np.exp(z) / np.exp(z).sum(axis=1)[:, None])
    """,
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
