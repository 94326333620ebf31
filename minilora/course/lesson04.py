"""Lesson 4's exercises: what softmax does with a gradient, attention with shared heads, and its gradients by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .exercises import Draw, arrays, distinct_sizes, exercise


def softmax(scores: Any, axis: int = -1) -> Any:
    """Positive numbers that add up to 1 along an axis."""
    e = np.exp(scores - scores.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


# -- 4.1 softmax -------------------------------------------------------------------------------------------------------


def draw_softmax(rng: np.random.Generator, T: int | None = None) -> Draw:
    """p (T, S), rows that add up to 1, and g (T, S)."""
    sizes = distinct_sizes("TS", rng) | ({} if T is None else {"T": T})
    drawn = arrays(rng, sizes, p="T S", g="T S")
    drawn["p"] = softmax(drawn["p"])
    return drawn


@exercise(
    "4.1",
    draw=draw_softmax,
    smallest=lambda rng: draw_softmax(rng, T=1),
    returns="ds (T, S)",
    by_hand=True,
    decisive=["p * (g - (p * g).sum(axis=-1, keepdims=True))"],
    mistakes={
        "no sum": (
            lambda p, g: p * g,
            "softmax divides by a sum, so a score moves every probability of its row: something is subtracted from g",
        ),
        "diagonal": (
            lambda p, g: p * (1 - p) * g,
            "p (1 - p) is how a probability moves with its own score alone; the others of its row move too",
        ),
        "plain sum": (
            lambda p, g: p * (g - g.sum(axis=-1, keepdims=True)),
            "the sum that is subtracted weights each g by its p",
        ),
        "mean": (
            lambda p, g: p * (g - g.mean(axis=-1, keepdims=True)),
            "what is subtracted is the mean of g weighted by p, not the plain mean",
        ),
        "one sum": (
            lambda p, g: p * (g - (p * g).sum()),
            "each row is a softmax of its own: sum along the last axis, and keep that axis",
        ),
        "columns": (
            lambda p, g: p * (g - (p * g).sum(axis=0, keepdims=True)),
            "wrong axis: a row is a softmax, so the sum goes along the last axis",
        ),
        "p missing": (
            lambda p, g: g - (p * g).sum(axis=-1, keepdims=True),
            "the factor p in front is missing: a probability near zero hardly moves",
        ),
        "sign": (
            lambda p, g: p * ((p * g).sum(axis=-1, keepdims=True) - g),
            "the sign is wrong: a larger score makes its own probability larger",
        ),
        "added": (
            lambda p, g: p * (g + (p * g).sum(axis=-1, keepdims=True)),
            "the sum is subtracted, not added: the row of probabilities keeps adding up to 1",
        ),
        "softmax again": (
            lambda p, g: softmax(p) * (g - (softmax(p) * g).sum(axis=-1, keepdims=True)),
            "p are the probabilities already: no second softmax",
        ),
    },
)
def softmax_vjp(p: Any, g: Any) -> Any:
    """The gradient of the scores: p (g - Σ p g), row by row."""
    return p * (g - (p * g).sum(axis=-1, keepdims=True))


# -- 4.2 attention -----------------------------------------------------------------------------------------------------


def draw_heads(rng: np.random.Generator, whole: bool = False) -> Draw:
    """q (T, H, D) are the last T of S tokens; k, v (S, K, D). whole: T is S, and one query head for each key head."""
    sizes = distinct_sizes("TSD", rng, 6, 20)
    sizes["T"], sizes["S"] = sorted((sizes["T"], sizes["S"]))
    sizes["K"], group = int(rng.integers(2, 4)), 1 if whole else int(rng.integers(2, 4))
    sizes["H"] = sizes["K"] * group
    if whole:
        sizes["T"] = sizes["S"]
    return arrays(rng, sizes, q="T H D", k="S K D", v="S K D")


def attended(
    scale: Callable[[Any], float] = lambda q: q.shape[2] ** -0.5,
    group: Callable[[int, int], Any] = lambda H, K: np.arange(H) // (H // K),
    hidden: Callable[[int, int], Any] = lambda T, S: np.triu(np.ones((T, S), bool), S - T + 1),
    weigh: Callable[[Any, Any], Any] = lambda s, hide: softmax(np.where(hide, -np.inf, s)),
    read: Callable[[Any, Any], Any] = lambda k, v: v,
) -> Callable:
    """Attention with one of its parts made in another way."""

    def answer(q: Any, k: Any, v: Any) -> Any:
        own = group(q.shape[1], k.shape[1])
        scores = np.einsum("thd,shd->hts", q, k[:, own]) * scale(q)
        weights = weigh(scores, hidden(len(q), len(k)))
        return np.einsum("hts,shd->thd", weights, read(k, v)[:, own])

    return answer


@exercise(
    "4.2",
    draw=draw_heads,
    smallest=lambda rng: draw_heads(rng, whole=True),
    returns="y (T, H, D)",
    decisive=["np.arange(S) > np.arange(S - T, S)[:, None]"],
    mistakes={
        "no scale": (attended(scale=lambda q: 1.0), "the scores are not divided by sqrt(D)"),
        "D": (attended(scale=lambda q: 1 / q.shape[2]), "the scores are divided by sqrt(D), not by D"),
        "times sqrt(D)": (
            attended(scale=lambda q: q.shape[2] ** 0.5),
            "the scores are divided by sqrt(D), not multiplied",
        ),
        "H": (
            attended(scale=lambda q: q.shape[1] ** -0.5),
            "the scores are divided by sqrt(D), the width of a head; you took H, the number of heads",
        ),
        "no mask": (
            attended(hidden=lambda T, S: np.zeros((T, S), bool)),
            "the future is not hidden: a token sees itself and what came before it",
        ),
        "corner": (
            attended(hidden=lambda T, S: np.triu(np.ones((T, S), bool), 1)),
            "the mask starts in the wrong corner: the queries are the last T of S tokens, query t stands at S - T + t",
        ),
        "not itself": (
            attended(hidden=lambda T, S: np.triu(np.ones((T, S), bool), S - T)),
            "a token sees itself, too: your mask hides it",
        ),
        "the past": (
            attended(hidden=lambda T, S: np.tril(np.ones((T, S), bool), S - T - 1)),
            "the mask is the wrong way round: it hides the past and shows the future",
        ),
        "after softmax": (
            attended(weigh=lambda s, hide: np.where(hide, 0, softmax(s))),
            "masked after softmax: the weights no longer add up to 1, and the future still counts in what divides them",
        ),
        "zeros": (
            attended(weigh=lambda s, hide: softmax(np.where(hide, 0, s))),
            "a hidden score of 0 is a score like any other: it must be -inf, for exp(-inf) is 0",
        ),
        "wrong axis": (
            attended(weigh=lambda s, hide: softmax(np.where(hide, -1e30, s), axis=1)),
            "softmax along the wrong axis: for each query the weights of its keys add up to 1, along the last axis",
        ),
        "no softmax": (
            attended(weigh=lambda s, hide: np.where(hide, 0, s)),
            "softmax is missing: the scores themselves are no weights",
        ),
        "not divided": (
            attended(weigh=lambda s, hide: np.where(hide, 0, np.exp(s))),
            "softmax is half done: exp(scores) must be divided by their sum",
        ),
        "turns": (
            attended(group=lambda H, K: np.arange(H) % K),
            "the key heads are dealt out in turn (h % K): neighbours share one, so head h reads key head h // (H // K)",
        ),
        "first head": (
            attended(group=lambda H, K: np.zeros(H, int)),
            "all query heads read key head 0: head h reads key head h // (H // K)",
        ),
        "keys read": (attended(read=lambda k, v: k), "what is found by the keys is read from v, not from k"),
    },
)
def grouped_attention(q: Any, k: Any, v: Any) -> Any:
    """softmax(q kᵀ / √D) v, causal, query heads in groups that share a key/value head."""
    return attended()(q, k, v)


# -- 4.3 its gradients -------------------------------------------------------------------------------------------------


def draw_one_head(rng: np.random.Generator, T: int | None = None) -> Draw:
    """One head, for which grouping does not matter."""
    sizes = distinct_sizes("TD", rng) | ({} if T is None else {"T": T})
    return arrays(rng, sizes, q="T D", k="T D", v="T D", g="T D")


def way_back(
    scale: Callable[[int], float] = lambda D: D**-0.5,
    causal: bool = True,
    vjp: Callable[[Any, Any], Any] = softmax_vjp,
    **parts: Callable,
) -> Callable:
    """dq, dk, dv with another scale on the way back, without a mask, or with some of them made in another way."""

    def answer(q: Any, k: Any, v: Any, g: Any) -> Any:
        T, D = q.shape
        s = q @ k.T / np.sqrt(D)
        p = softmax(np.where(np.tri(T, dtype=bool), s, -np.inf) if causal else s)
        ds = vjp(p, g @ v.T) * scale(D)
        right = {"dq": ds @ k, "dk": ds.T @ q, "dv": p.T @ g}
        return tuple(parts[n](q, k, v, g, p, ds) if n in parts else right[n] for n in right)

    return answer


@exercise(
    "4.3",
    draw=draw_one_head,
    smallest=lambda rng: draw_one_head(rng, T=2),
    returns="dq (T, D), dk (T, D), dv (T, D)",
    by_hand=True,
    decisive=["ds = softmax_vjp(p, g @ v.T) / np.sqrt(D)"],
    mistakes={
        "no scale": (
            way_back(scale=lambda D: 1.0),
            "the 1 / sqrt(D) of the scores is missing on the way back",
        ),
        "scale twice": (way_back(scale=lambda D: 1 / D), "1 / sqrt(D) stands once on the way back, not twice"),
        "no mask": (
            way_back(causal=False),
            "the weights are those of attention without a mask: hide the future before softmax",
        ),
        "no softmax": (
            way_back(vjp=lambda p, g: g),
            "the gradient of p is not yet that of the scores: send it through softmax_vjp first",
        ),
        "p times": (
            way_back(vjp=lambda p, g: p * g),
            "p * g is half of softmax_vjp: a score moves all weights of its row",
        ),
        "dv untransposed": (
            way_back(dv=lambda q, k, v, g, p, ds: p @ g),
            "dv: row s collects from every query that read it: p must be transposed",
        ),
        "dk untransposed": (
            way_back(dk=lambda q, k, v, g, p, ds: ds @ q),
            "dk: row s collects from every query that compared itself with it: ds must be transposed",
        ),
        "dq transposed": (
            way_back(dq=lambda q, k, v, g, p, ds: ds.T @ k),
            "dq: row t collects over the keys it was compared with: ds is not transposed here",
        ),
        "dv unweighted": (
            way_back(dv=lambda q, k, v, g, p, ds: np.tri(len(q)).T @ g),
            "dv: the weights are missing: what was read with a small weight gets a small gradient",
        ),
        "dq of q": (
            way_back(dq=lambda q, k, v, g, p, ds: ds @ q, dk=lambda q, k, v, g, p, ds: ds.T @ k),
            "a product gives each factor the other one: dq is made with k, and dk with q",
        ),
        "swapped": (
            lambda *a: tuple(attention_vjp(*a)[i] for i in (1, 0, 2)),
            "dq and dk are swapped: `return dq, dk, dv`, in this order",
        ),
        "order of v": (
            lambda *a: tuple(attention_vjp(*a)[i] for i in (2, 0, 1)),
            "dv stands first: `return dq, dk, dv`, in this order",
        ),
        "mean": (
            lambda q, k, v, g: tuple(x / len(q) for x in attention_vjp(q, k, v, g)),
            "it is divided by the number of tokens: where the loss is a mean, g has that",
        ),
    },
)
def attention_vjp(q: Any, k: Any, v: Any, g: Any) -> Any:
    """The three gradients of one causal head."""
    return way_back()(q, k, v, g)
