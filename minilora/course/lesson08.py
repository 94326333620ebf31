"""Lesson 8's exercises: terms that explain a share of an update, its best factors, and the overlap of two updates."""

from typing import Any

import numpy as np

from .compare import shape_of
from .exercises import Draw, changed, distinct_sizes, exercise, variant


def falling(m: int, n: int, rng: np.random.Generator, pace: float = 0.85) -> np.ndarray:
    """A matrix (m, n) whose singular values fall by about `pace` from one to the next."""
    k = min(m, n)
    U, _, Vt = np.linalg.svd(rng.standard_normal((m, n)), full_matrices=False)
    return 3 * (U * (pace ** np.arange(k) * rng.uniform(0.95, 1, k))) @ Vt


# -- 8.1 how many terms ------------------------------------------------------------------------------------------------


def draw_rank(rng: np.random.Generator) -> Draw:
    """An update, and a share of variance that no number of terms explains exactly."""
    sizes = distinct_sizes("nm", rng, low=20)
    delta = falling(sizes["m"], sizes["n"], rng)
    squares = np.linalg.svd(delta, compute_uv=False) ** 2
    explained = np.cumsum(squares) / squares.sum()
    r = int(rng.integers(4, 9))
    return Draw(sizes, delta=delta, share=float(0.7 * explained[r - 2] + 0.3 * explained[r - 1]))


def draw_one_term(rng: np.random.Generator, share: float = 0.9) -> Draw:
    """Rank 1: one term explains everything."""
    sizes = distinct_sizes("nm", rng)
    delta = np.outer(rng.standard_normal(sizes["m"]), rng.standard_normal(sizes["n"]))
    return Draw(sizes, delta=delta, share=share)


@exercise("8.1", draw=draw_rank, smallest=draw_one_term, returns="r")
def rank_for(delta, share):
    """delta (m, n), share between 0 and 1 -> r, the number of rank-one terms"""
    squares = np.linalg.svd(delta, compute_uv=False) ** 2
    explained = np.cumsum(squares) / squares.sum()
    return int(np.searchsorted(explained, share) + 1)


variant(
    "rank_for",
    {
        "How many terms explain a share of the variance?": "How many terms leave a share of the variance?",
        "explain at least `share` of the variance.": "leave at most `share` of the variance unexplained.",
        "so a share of 0.6 needs one term and 0.7 needs two.": "so a share of 0.4 needs one term and 0.3 needs two.",
        "np.searchsorted(explained, share)": "np.searchsorted(explained, 1 - share)",
    },
    "the share is what may be left unexplained",
    lines={
        "explained, share -> np": "explained, 1 - share -> 1 - np",
        "already explains the share": "already leaves no more than the share",
        "terms explain the share?": "terms leave no more than the share?",
    },
    draw=changed(draw_rank, lambda drawn: {"share": 1 - drawn["share"]}),
    smallest=lambda rng: draw_one_term(rng, share=0.1),
)


# -- 8.2 two factors ---------------------------------------------------------------------------------------------------


def draw_factors(rng: np.random.Generator, r: int | None = None) -> Draw:
    """An update and a rank."""
    sizes = distinct_sizes("nm", rng, low=14) | {"r": int(rng.integers(3, 7)) if r is None else r}
    return Draw(sizes, delta=falling(sizes["m"], sizes["n"], rng, pace=0.8), r=sizes["r"])


def in_order(B: Any, A: Any) -> tuple[Any, Any]:
    """Two factors with the longest column of B first. Each column of B gets the sign that makes its largest number
    positive: the terms of a product have neither order nor sign. What is no product stays as it is.
    """
    if [len(shape_of(B)), len(shape_of(A))] != [2, 2] or np.shape(B)[1] != len(A) or not np.size(B):
        return B, A
    order = np.lexsort([-np.linalg.norm(A, axis=1), -np.linalg.norm(B, axis=0).round(6)])
    B, A = B[:, order], A[order]
    signs = np.sign(np.take_along_axis(B, np.abs(B).argmax(axis=0)[None], axis=0))
    return B * signs, A * signs.T


def factors(result: Any, arguments: dict[str, Any]) -> Any:
    """B and A as they are compared."""
    return in_order(*result) if isinstance(result, (tuple, list)) and len(result) == 2 else result


@exercise(
    "8.2",
    draw=draw_factors,
    smallest=lambda rng: draw_factors(rng, r=1),
    returns="B (m, r), A (r, n)",
    observe=factors,
)
def best_rank_r(delta, r):
    """delta (m, n), r -> B (m, r), A (r, n)"""
    U, S, Vt = np.linalg.svd(delta, full_matrices=False)
    B = U[:, :r] * np.sqrt(S[:r])
    A = np.sqrt(S[:r])[:, None] * Vt[:r]
    return B, A


variant(
    "best_rank_r",
    {
        "Choose the balanced pair: column i of B is as long as row i of A.": (
            "Choose the pair in which every row of A has length 1."
        ),
        "U[:, :r] * np.sqrt(S[:r])": "U[:, :r] * S[:r]",
        "np.sqrt(S[:r])[:, None] * Vt[:r]": "Vt[:r]",
    },
    "B holds the singular values, and the rows of A have length 1",
    lines={
        "column i of B must be as long as row i of A, so that each gets the square root": "the rows of A have length 1",
        "the root must be in B and in A, not in one of them": "B takes the whole value",
        "give B and A the square root each, not the value itself": "it belongs in B, once",
    },
)


# -- 8.3 do two updates agree ------------------------------------------------------------------------------------------


def draw_pair(rng: np.random.Generator, r: int | None = None) -> Draw:
    """Two updates that share some of their directions, and a rank."""
    sizes = distinct_sizes("nm", rng, low=14)
    delta = falling(sizes["m"], sizes["n"], rng, pace=0.8)
    other = delta + 0.12 * rng.standard_normal(delta.shape)
    return Draw(sizes, delta=delta, other=other, r=int(rng.integers(4, 8)) if r is None else r)


@exercise("8.3", draw=draw_pair, smallest=lambda rng: draw_pair(rng, r=1), returns="the overlap")
def overlap(delta, other, r):
    """delta (m, n), other (m, n), r -> a number from 0 to 1"""
    V1 = np.linalg.svd(delta, full_matrices=False)[2][:r]
    V2 = np.linalg.svd(other, full_matrices=False)[2][:r]
    return ((V1 @ V2.T) ** 2).sum() / r


variant(
    "overlap",
    {
        "Do they use the same directions of the input?": "Do they use the same directions of the output?",
        "compares the r input directions of each update": "compares the r directions of each update",
        "These directions are rows of length 1,": "Here these directions are columns of length 1,",
        "it is about r/n, so compare each value with r/n.": "it is about r/m, so compare each value with r/m.",
        "(delta, full_matrices=False)[2][:r]": "(delta, full_matrices=False)[0][:, :r].T",
        "(other, full_matrices=False)[2][:r]": "(other, full_matrices=False)[0][:, :r].T",
    },
    "directions of the output are compared, not those of the input",
    lines={
        "those are directions of the outputs (U): take those of the inputs, the rows of Vt": (
            "those are directions of the inputs (Vt): take those of the outputs, the columns of U"
        ),
        "columns of Vt are taken: its rows are the directions, Vt[:r]": (
            "rows of U are taken: its columns are the directions, U[:, :r]"
        ),
        "[2][:, :r].T": "[0][:r]",
        "the rows of Vt, of length 1": "the columns of U, of length 1",
    },
)
