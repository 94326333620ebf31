"""Lesson 3's exercises: one step of AdamW, and cross-entropy with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..engine.tensor import Tensor
from ..nn.optim import AdamW
from .compare import Wrong, close
from .exercises import Draw, arrays, distinct_sizes, exercise

# -- 3.1 one step of AdamW ---------------------------------------------------------------------------------------------


def draw_step(rng: np.random.Generator, t: int | None = None) -> Draw:
    """Four arrays in the middle of a training, with settings that all show in the result."""
    drawn = arrays(rng, distinct_sizes("mn", rng), w="m n", g="m n", m="m n", v="m n")
    drawn["v"] = rng.uniform(0.1, 2, drawn["v"].shape)
    drawn["t"] = int(rng.integers(2, 7)) if t is None else t
    drawn |= {"lr": float(rng.uniform(0.02, 0.1)), "beta1": float(rng.uniform(0.6, 0.8))}
    drawn |= {"beta2": float(rng.uniform(0.85, 0.95)), "eps": float(rng.uniform(0.05, 0.2))}
    drawn["decay"] = float(rng.uniform(0.3, 0.9))
    return drawn


def draw_first(rng: np.random.Generator) -> Draw:
    """The first step: m and v are zero, and one slope is."""
    drawn = draw_step(rng, t=1)
    drawn["m"], drawn["v"] = np.zeros_like(drawn["m"]), np.zeros_like(drawn["v"])
    drawn["g"][0, 0] = 0
    return drawn


def stepped(**parts: Callable) -> Callable:
    """The right step, some part made in another way. Parts are functions of a dict of all that is known so far.

    g (what goes into m and v), m, v, m_hat, v_hat, scaled (m_hat over the root of v_hat), w, then what is returned:
    m_out and v_out.
    """
    right: dict[str, Callable] = {
        "g": lambda s: s["g"],
        "new_m": lambda s: s["beta1"] * s["m"] + (1 - s["beta1"]) * s["g"],
        "new_v": lambda s: s["beta2"] * s["v"] + (1 - s["beta2"]) * s["g"] ** 2,
        "m_hat": lambda s: s["new_m"] / (1 - s["beta1"] ** s["t"]),
        "v_hat": lambda s: s["new_v"] / (1 - s["beta2"] ** s["t"]),
        "scaled": lambda s: s["m_hat"] / (np.sqrt(s["v_hat"]) + s["eps"]),
        "new_w": lambda s: s["w"] * (1 - s["lr"] * s["decay"]) - s["lr"] * s["scaled"],
        "m_out": lambda s: s["new_m"],
        "v_out": lambda s: s["new_v"],
    }

    def answer(
        w: Any, g: Any, m: Any, v: Any, t: Any, lr: Any, beta1: Any, beta2: Any, eps: Any, decay: Any
    ) -> tuple[Any, Any, Any]:
        s = {"w": w, "g": g, "m": m, "v": v, "t": t, "lr": lr, "beta1": beta1, "beta2": beta2}
        s |= {"eps": eps, "decay": decay}
        for name, compute in (right | parts).items():
            s[name] = compute(s)
        return s["new_w"], s["m_out"], s["v_out"]

    return answer


def judge_training(answer: Any, drawn: Draw, rng: np.random.Generator) -> None:
    """Ten steps, beside minilora's own AdamW, which PyTorch's agrees with."""
    if drawn["t"] > 1:  # once in each check
        return
    w = rng.standard_normal((3, 4))
    theirs = Tensor(w.copy(), requires_grad=True)
    optimizer = AdamW([theirs], lr=0.01, weight_decay=0.1)
    m, v = np.zeros_like(w), np.zeros_like(w)
    settings = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "decay": 0.1}
    for t in range(1, 11):
        g = rng.standard_normal(w.shape)
        theirs.grad = g.copy()
        optimizer.step()
        w, m, v = answer(w=w, g=g, m=m, v=v, t=t, **settings)
    if not close(w, theirs.data, 1e-12):
        raise Wrong("each step alone is right, but after ten steps w is not what minilora's AdamW has")


def l2(s: dict[str, Any]) -> Any:
    """The gradient with λ w in it."""
    return s["g"] + s["decay"] * s["w"]


@exercise(
    "3.1",
    draw=draw_step,
    smallest=draw_first,
    returns="w (m, n), m (m, n), v (m, n)",
    also=judge_training,
    decisive=["w * (1 - lr * decay) - lr * m_hat / (np.sqrt(v_hat) + eps)"],
    mistakes={
        "no divisors": (
            stepped(m_hat=lambda s: s["new_m"], v_hat=lambda s: s["new_v"]),
            "m and v are used as they are: divide by 1 - beta1**t and 1 - beta2**t, they start at zero",
        ),
        "m as it is": (stepped(m_hat=lambda s: s["new_m"]), "m is used as it is: divide it by 1 - beta1**t"),
        "v as it is": (stepped(v_hat=lambda s: s["new_v"]), "v is used as it is: divide it by 1 - beta2**t"),
        "t plus one": (
            stepped(
                m_hat=lambda s: s["new_m"] / (1 - s["beta1"] ** (s["t"] + 1)),
                v_hat=lambda s: s["new_v"] / (1 - s["beta2"] ** (s["t"] + 1)),
            ),
            "the divisors have t + 1 in them: t is 1 in the first step already",
        ),
        "t minus one": (
            stepped(
                m_hat=lambda s: s["new_m"] / (1 - s["beta1"] ** (s["t"] - 1)),
                v_hat=lambda s: s["new_v"] / (1 - s["beta2"] ** (s["t"] - 1)),
            ),
            "the divisors have t - 1 in them: in the first step that is 0, and they would be 0 as well",
        ),
        "no power": (
            stepped(m_hat=lambda s: s["new_m"] / (1 - s["beta1"]), v_hat=lambda s: s["new_v"] / (1 - s["beta2"])),
            "the divisors have no t in them: 1 - beta**t, which goes to 1 with time",
        ),
        "one beta": (
            stepped(v_hat=lambda s: s["new_v"] / (1 - s["beta1"] ** s["t"])),
            "v is divided by 1 - beta1**t: v has its own, beta2",
        ),
        "betas swapped": (
            stepped(
                new_m=lambda s: s["beta2"] * s["m"] + (1 - s["beta2"]) * s["g"],
                new_v=lambda s: s["beta1"] * s["v"] + (1 - s["beta1"]) * s["g"] ** 2,
            ),
            "the betas are swapped: beta1 belongs to m, beta2 to v",
        ),
        "L2": (stepped(g=l2), "decay is in the gradient, and so in m and v: that is L2; AdamW takes it from w, beside"),
        "no decay": (
            stepped(new_w=lambda s: s["w"] - s["lr"] * s["scaled"]),
            "decay is missing: w is multiplied by 1 - lr * decay as well",
        ),
        "decay without lr": (
            stepped(new_w=lambda s: s["w"] * (1 - s["decay"]) - s["lr"] * s["scaled"]),
            "decay without the learning rate: w is multiplied by 1 - lr * decay",
        ),
        "decay added": (
            stepped(new_w=lambda s: s["w"] * (1 + s["lr"] * s["decay"]) - s["lr"] * s["scaled"]),
            "decay makes w larger: it pulls toward zero, 1 - lr * decay",
        ),
        "decay at the end": (
            stepped(new_w=lambda s: (s["w"] - s["lr"] * s["scaled"]) * (1 - s["lr"] * s["decay"])),
            "decay is applied to the step as well: only the w that came in is multiplied by 1 - lr * decay",
        ),
        "eps in the root": (
            stepped(scaled=lambda s: s["m_hat"] / np.sqrt(s["v_hat"] + s["eps"])),
            "eps stands in the root: it is added to the root",
        ),
        "no eps": (
            stepped(scaled=lambda s: s["m_hat"] / np.sqrt(s["v_hat"])),
            "eps is missing: where all slopes were zero so far, 0 is divided by 0",
        ),
        "no root": (
            stepped(scaled=lambda s: s["m_hat"] / (s["v_hat"] + s["eps"])),
            "the root is missing: v is the mean of squares, so divide by np.sqrt of it",
        ),
        "uphill": (
            stepped(new_w=lambda s: s["w"] * (1 - s["lr"] * s["decay"]) + s["lr"] * s["scaled"]),
            "the sign is wrong: the gradient points uphill, w goes the other way",
        ),
        "old m": (
            stepped(m_hat=lambda s: s["m"] / (1 - s["beta1"] ** s["t"])),
            "w moves by the old m: first m and v take the new slope in, then w moves",
        ),
        "no square": (
            stepped(new_v=lambda s: s["beta2"] * s["v"] + (1 - s["beta2"]) * s["g"]),
            "v has g in it: it is the mean of the squares, g**2",
        ),
        "sum": (
            stepped(new_m=lambda s: s["beta1"] * s["m"] + s["g"]),
            "m takes all of g in: a running mean takes 1 - beta1 of it",
        ),
        "mean the wrong way round": (
            stepped(new_m=lambda s: (1 - s["beta1"]) * s["m"] + s["beta1"] * s["g"]),
            "m keeps 1 - beta1 of the old: it keeps beta1, and takes 1 - beta1 of g",
        ),
        "hats returned": (
            stepped(m_out=lambda s: s["m_hat"], v_out=lambda s: s["v_hat"]),
            "it comes back divided by 1 - beta**t: the next step needs it as it was before",
        ),
    },
)
def adamw_step(
    w: Any, g: Any, m: Any, v: Any, t: int, lr: float, beta1: float, beta2: float, eps: float, decay: float
) -> tuple[Any, Any, Any]:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""
    return stepped()(w, g, m, v, t, lr, beta1, beta2, eps, decay)


# -- 3.2 cross-entropy, with its gradient ------------------------------------------------------------------------------


def draw_logits(rng: np.random.Generator, spread: float = 0) -> Draw:
    """z (T, V), labels (T,). spread: how far rows, as a whole, lie from zero."""
    sizes = distinct_sizes("TV", rng)
    drawn = arrays(rng, sizes, z="T V")
    drawn["z"] = 2 * drawn["z"] + spread * np.linspace(-1, 1, sizes["T"])[:, None]
    drawn["labels"] = rng.integers(sizes["V"], size=sizes["T"])
    return drawn


def softmax(z: Any, axis: int = 1) -> Any:
    """Along an axis, its largest number subtracted first."""
    p = np.exp(z - z.max(axis=axis, keepdims=True))
    return p / p.sum(axis=axis, keepdims=True)


def logs(z: Any) -> Any:
    """ln softmax(z)."""
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def hot(z: Any, labels: Any) -> Any:
    """1 where the label is."""
    one = np.zeros_like(z)
    one[np.arange(len(z)), labels] = 1
    return one


def entropy(
    loss: Callable = lambda log_p, one: float(-(log_p * one).sum() / len(one)),
    dz: Callable = lambda p, one: (p - one) / len(one),
) -> Callable:
    """Loss and gradient, one of them made in another way."""

    def answer(z: Any, labels: Any) -> Any:
        one = hot(z, labels)
        return loss(logs(z), one), dz(softmax(z), one)

    return answer


def shifted(shift: Callable[[Any], Any]) -> Callable:
    """By e**z, with another number subtracted first."""

    def answer(z: Any, labels: Any) -> Any:
        e = np.exp(z - shift(z))
        p, one = e / e.sum(axis=1, keepdims=True), hot(z, labels)
        return float(-np.log(p[np.arange(len(z)), labels]).mean()), (p - one) / len(z)

    return answer


def down_the_columns(z: Any, labels: Any) -> Any:
    """Softmax over the tokens."""
    p, one = softmax(z, axis=0), hot(z, labels)
    return float(-np.log(p[np.arange(len(z)), labels]).mean()), (p - one) / len(z)


@exercise(
    "3.2",
    draw=[draw_logits, lambda rng: draw_logits(rng, 2000)],
    smallest=lambda rng: Draw({"T": 1, "V": 2}, z=rng.standard_normal((1, 2)), labels=np.array([1])),
    returns="L, dz (T, V)",
    by_hand=True,
    decisive=["dz[tokens, labels] -= 1"],
    mistakes={
        "sum": (
            entropy(loss=lambda log_p, one: float(-(log_p * one).sum())),
            "L is the sum over the tokens: it is the mean",
        ),
        "sign of L": (
            entropy(loss=lambda log_p, one: float((log_p * one).sum() / len(one))),
            "L is negative: ln p is negative, so the loss is minus that",
        ),
        "mean of all": (
            entropy(loss=lambda log_p, one: float(-(log_p * one).mean())),
            "L is divided by T · V: the mean goes over the T tokens",
        ),
        "base 2": (
            entropy(loss=lambda log_p, one: float(-(log_p * one).sum() / len(one) / np.log(2))),
            "L is in bits: take np.log, not np.log2",
        ),
        "all answers": (
            entropy(loss=lambda log_p, one: float(-log_p.sum() / len(one))),
            "L adds up over all answers: only the one that really came counts",
        ),
        "entropy": (
            entropy(loss=lambda log_p, one: float(-(np.exp(log_p) * log_p).sum() / len(one))),
            "L is the entropy of p, which knows nothing of the labels: take -ln p of the label",
        ),
        "one minus p": (
            entropy(loss=lambda log_p, one: float(1 - (np.exp(log_p) * one).sum() / len(one))),
            "L is 1 - p: the loss is -ln p, which grows without end where p goes to 0",
        ),
        "log of the mean": (
            entropy(loss=lambda log_p, one: float(-np.log((np.exp(log_p) * one).sum() / len(one)))),
            "L is -ln of the mean of p: first the logarithm, then the mean",
        ),
        "no 1 / T": (entropy(dz=lambda p, one: p - one), "dz is not divided by T: L is a mean over the tokens"),
        "p alone": (
            entropy(dz=lambda p, one: p / len(one)),
            "dz has p alone: the label's own logit counts in the first term, too",
        ),
        "late division": (
            entropy(dz=lambda p, one: p / len(one) - one),
            "dz: only p is divided by T: divide after the label has had its part",
        ),
        "sign of dz": (
            entropy(dz=lambda p, one: (one - p) / len(one)),
            "dz has the wrong sign: a larger logit of the label makes the loss smaller",
        ),
        "of p": (
            entropy(dz=lambda p, one: -one / np.maximum(p, 1e-300) / len(one)),
            "dz is the gradient of p, -1 / p at the label: go on through softmax to z",
        ),
        "label alone": (
            entropy(dz=lambda p, one: one * (p - 1) / len(one)),
            "dz is zero but for the labels: every logit of a row stands in the sum below the line",
        ),
        "softmax's square": (
            entropy(dz=lambda p, one: p * (1 - p) / len(one)),
            "dz has p (1 - p), the slope of one probability with respect to its own logit: the labels are missing",
        ),
        "columns": (down_the_columns, "softmax goes down the columns: each row is one token, so axis=1"),
        "nothing subtracted": (
            shifted(lambda z: 0),
            "large logits: e**z is infinite; subtract the largest logit of each row first, p stays the same",
        ),
        "one for all": (
            shifted(lambda z: z.max()),
            "one number is subtracted from all rows, and e**z of the lower ones is 0: each row has its own largest",
        ),
    },
)
def softmax_cross_entropy(z: Any, labels: Any) -> tuple[Any, Any]:
    """The mean of -ln p of the labels, and (p - one hot) / T."""
    return entropy()(z, labels)
