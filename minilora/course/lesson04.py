"""Lesson 4's exercises: the backward pass of softmax, grouped-query attention, and its backward pass by hand."""

from functools import partial
from typing import Any

import numpy as np

from .exercises import Draw, arrays, changed, distinct_sizes, drawing, exercise, variant


def softmax(scores: Any) -> Any:
    """Positive numbers that add up to 1 along the last axis."""
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# -- 4.1 softmax -------------------------------------------------------------------------------------------------------


def draw_softmax(rng: np.random.Generator, T: int | None = None) -> Draw:
    """p (T, S), rows that add up to 1, and g (T, S)."""
    sizes = distinct_sizes("TS", rng) | ({} if T is None else {"T": T})
    drawn = arrays(rng, sizes, p="T S", g="T S")
    drawn["p"] = softmax(drawn["p"])
    return drawn


@exercise("4.1", draw=draw_softmax, smallest=lambda rng: draw_softmax(rng, T=1), returns="ds (T, S)", by_hand=True)
def softmax_vjp(p, g):
    """p (T, S) probabilities, each row a softmax, g (T, S) -> the gradient of the scores (T, S)"""
    return p * (g - (p * g).sum(axis=-1, keepdims=True))


def columns(drawn: Draw) -> dict[str, Any]:
    """p (S, T), columns that add up to 1, and g (S, T)."""
    return {name: array.T.copy() for name, array in drawn.items()}


COLUMNS = {
    "A row of scores $s$ becomes a row of": "A column of scores $s$ becomes a column of",
    "| `p` | (T, S) | attention weights: row t": "| `p` | (S, T) in 4.1 | attention weights: column t",
    "all scores of a row, p does not change. So each row of your result adds up to zero.": (
        "all scores of a column, p does not change. So each column of your result adds up to zero."
    ),
    "p (T, S) probabilities, each row a softmax, g (T, S) -> the gradient of the scores (T, S)": (
        "p (S, T) probabilities, each column a softmax, g (S, T) -> the gradient of the scores (S, T)"
    ),
    "(p * g).sum(axis=-1, keepdims=True)": "(p * g).sum(axis=0, keepdims=True)",
}
variant(
    "softmax_vjp",
    COLUMNS,
    "each column is a softmax, not each row",
    lines={
        "of its row": "of its column",
        "each row is": "each column is",
        "the row of probabilities": "the column of probabilities",
        "along the last axis": "along the first axis",
        "axis=-1": "axis=0",
    },
    draw=changed(draw_softmax, columns),
    smallest=changed(partial(draw_softmax, T=1), columns),
)


# -- 4.2 attention -----------------------------------------------------------------------------------------------------


def draw_heads(rng: np.random.Generator, whole: bool = False) -> Draw:
    """q (T, H, D) are the last T of S tokens; k, v (S, K, D). whole: T is S, and one query head for each key head."""
    sizes = distinct_sizes("TSD", rng, 10, 24)  # H is less
    sizes["T"], sizes["S"] = sorted((sizes["T"], sizes["S"]))
    sizes["K"], group = int(rng.integers(2, 4)), 1 if whole else int(rng.integers(2, 4))
    sizes["H"] = sizes["K"] * group
    if whole:
        sizes["T"] = sizes["S"]
    return arrays(rng, sizes, q="T H D", k="S K D", v="S K D")


@exercise("4.2", draw=draw_heads, smallest=lambda rng: draw_heads(rng, whole=True), returns="y (T, H, D)")
def grouped_attention(q, k, v):
    """q (T, H, D), k (S, K, D), v (S, K, D) -> y (T, H, D)"""
    (T, H, D), (S, K, _) = q.shape, k.shape
    own = np.arange(H) // (H // K)  # the key head of each query head
    scores = np.einsum("thd,shd->hts", q, k[:, own]) / np.sqrt(D)
    future = np.arange(S) > np.arange(S - T, S)[:, None]  # (T, S)
    scores = np.where(future, -np.inf, scores)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hts,shd->thd", weights, v[:, own])


BY_D = {
    "scores divided by $\\sqrt D$, the causal mask": "the causal mask",
    "The rest is as in the lesson:": "As in µP, scores are divided by D, not by its root. The rest is as in lesson 4:",
    r"\mathrm{softmax}(q k^\top / \sqrt D)": r"\mathrm{softmax}(q k^\top / D)",
    "np.sqrt(D)": "D",
}
variant("grouped_attention", BY_D, "scores are divided by the width of a head, not by its root", lines={"sqrt(D)": "D"})


# -- 4.3 its gradients -------------------------------------------------------------------------------------------------


HEAD = dict.fromkeys("qkvg", "T D")  # one head, for which grouping does not matter


@exercise(
    "4.3",
    draw=drawing("TD", **HEAD),
    smallest=drawing("TD", {"T": 2}, **HEAD),
    returns="dq (T, D), dk (T, D), dv (T, D)",
    by_hand=True,
)
def attention_vjp(q, k, v, g):
    """q, k, v, g (T, D) -> dq, dk, dv (T, D) each"""
    T, D = q.shape
    scores = np.where(np.tri(T, dtype=bool), q @ k.T / np.sqrt(D), -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    ds = softmax_vjp(p, g @ v.T) / np.sqrt(D)
    return ds @ k, ds.T @ q, p.T @ g


variant(
    "attention_vjp",
    BY_D
    | {
        "softmax_vjp(p, g @ v.T)": "softmax_vjp(p.T, v @ g.T).T",
        "with **your** `softmax_vjp`, from the scores to q and k. Apart": (
            "with **your** `softmax_vjp`, which takes columns, from the scores to q and k. Apart"
        ),
    },
    "scores are divided by the width of a head, and the function of 4.1 takes columns",
    lines={"1 / sqrt(D)": "1 / D"},
)
