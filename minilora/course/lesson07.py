"""Lesson 7's exercises: how many pieces hold a share of an update, its best factors, and directions that two share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .compare import Wrong, close
from .exercises import Draw, distinct_sizes, exercise


def falling(m: int, n: int, rng: np.random.Generator, pace: float = 0.85) -> np.ndarray:
    """A matrix (m, n) whose singular values fall by about `pace` from one to the next."""
    k = min(m, n)
    U, _, Vt = np.linalg.svd(rng.standard_normal((m, n)), full_matrices=False)
    return 3 * (U * (pace ** np.arange(k) * rng.uniform(0.95, 1, k))) @ Vt


def sizes_of(delta: np.ndarray) -> np.ndarray:
    """The singular values, largest first."""
    return np.linalg.svd(delta, compute_uv=False)


# -- 7.1 how many pieces -----------------------------------------------------------------------------------------------


def draw_rank(rng: np.random.Generator) -> Draw:
    """An update, and a share that no number of pieces holds exactly."""
    sizes = distinct_sizes("nm", rng, low=20)
    delta = falling(sizes["m"], sizes["n"], rng)
    held = np.cumsum(sizes_of(delta) ** 2) / (sizes_of(delta) ** 2).sum()
    r = int(rng.integers(4, 9))
    return Draw(sizes, delta=delta, share=float((held[r - 2] + held[r - 1]) / 2))


def draw_one_piece(rng: np.random.Generator) -> Draw:
    """Rank 1: one piece holds all."""
    sizes = distinct_sizes("nm", rng)
    delta = np.outer(rng.standard_normal(sizes["m"]), rng.standard_normal(sizes["n"]))
    return Draw(sizes, delta=delta, share=0.9)


def first(held: Any, share: float) -> int:
    """How many entries of a rising row it takes to reach the share."""
    return int(np.searchsorted(held, share)) + 1


def counted(weight: Callable, off: int = 0) -> Callable:
    """The count, with something else added up than squares, or off by some."""

    def answer(delta: Any, share: float) -> int:
        parts = weight(sizes_of(delta))
        return first(np.cumsum(parts) / parts.sum(), share) + off

    return answer


@exercise(
    "7.1",
    draw=draw_rank,
    smallest=draw_one_piece,
    returns="r",
    decisive=["np.searchsorted(held, share) + 1"],
    mistakes={
        "no square": (
            counted(lambda s: s),
            "singular values are added up, not their squares: energy is the sum of squares",
        ),
        "fourth power": (
            counted(lambda s: s**4),
            "squared twice: the energy of a piece is its singular value squared, once",
        ),
        "one too few": (
            counted(lambda s: s**2, off=-1),
            "one too few: the piece at index i is piece number i + 1, and r counts pieces",
        ),
        "one too many": (counted(lambda s: s**2, off=1), "one too many: r pieces hold the share already"),
        "the rest": (
            lambda delta, share: first(np.cumsum(sizes_of(delta) ** 2) / (sizes_of(delta) ** 2).sum(), 1 - share),
            "that many pieces hold 1 - share: count until the share is held, not until it is left",
        ),
        "above the largest": (
            lambda delta, share: int((sizes_of(delta) >= share * sizes_of(delta)[0]).sum()),
            "those are the pieces larger than share times the largest: add energies up, and compare with their sum",
        ),
        "share of the length": (
            lambda delta, share: first(np.sqrt(np.cumsum(sizes_of(delta) ** 2) / (sizes_of(delta) ** 2).sum()), share),
            "a share of the norm, not of the energy: leave out the square root",
        ),
        "all": (
            lambda delta, share: int(np.linalg.matrix_rank(delta)),
            "that is the whole rank: how many of the pieces hold the share?",
        ),
        "rows": (
            lambda delta, share: round(share * min(delta.shape)),
            "a share of the number of pieces, not of energy",
        ),
    },
)
def rank_for(delta: Any, share: float) -> int:
    """The smallest r whose largest pieces hold at least this share of the energy."""
    energy = sizes_of(delta) ** 2
    return first(np.cumsum(energy) / energy.sum(), share)


# -- 7.2 two factors ---------------------------------------------------------------------------------------------------


def draw_factors(rng: np.random.Generator, r: int | None = None) -> Draw:
    """An update and a rank."""
    sizes = distinct_sizes("nm", rng, low=14) | {"r": int(rng.integers(3, 7)) if r is None else r}
    return Draw(sizes, delta=falling(sizes["m"], sizes["n"], rng, pace=0.8), r=sizes["r"])


def judge_factors(answer: Any, drawn: Draw, rng: np.random.Generator) -> None:
    """B A is the best of rank r, and B and A have equal parts in it. The sign of a piece may stand in either way."""
    delta, r = drawn["delta"], drawn["r"]
    result = answer(delta=delta, r=r)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Wrong("return two arrays: `return B, A`")
    (m, n), shapes = delta.shape, [np.shape(part) for part in result]
    if shapes == [(r, n), (m, r)]:
        raise Wrong("B and A are swapped: `return B, A`, in this order")
    for name, part, shape, axes in (("B", result[0], (m, r), "m, r"), ("A", result[1], (r, n), "r, n")):
        if not isinstance(part, np.ndarray) or part.shape != shape:
            got = f"an array of shape {part.shape}" if isinstance(part, np.ndarray) else type(part).__name__
            more = ""
            if isinstance(part, np.ndarray) and part.shape == shape[::-1]:
                more = ": transposed"
            elif isinstance(part, np.ndarray) and part.ndim == 2 and min(part.shape) > r:
                more = ": keep only r pieces"
            raise Wrong(f"{name} must have the shape ({axes}) = {shape}, got {got}{more}")
    B, A = result
    U, S, Vt = np.linalg.svd(delta, full_matrices=False)
    U, S, Vt, last = U[:, :r], S[:r], Vt[:r], (U[:, -r:] * S[-r:]) @ Vt[-r:]
    if not close(B @ A, (U * S) @ Vt):
        raise Wrong(_how_wrong(B @ A, U, S, Vt, last))
    lengths = np.linalg.norm(B, axis=0), np.linalg.norm(A, axis=1)
    if not close(*lengths):
        left = "B" if lengths[0].max() > lengths[1].max() else "A"
        raise Wrong(
            f"B A is right, but {left} carries the sizes alone: column i of B must be as long as row i of A, so that "
            "each gets the square root"
        )


def _how_wrong(product: Any, U: Any, S: Any, Vt: Any, last: Any) -> str:
    """The line for a product of the right shape that is not the best of rank r."""
    for power, line in (
        (0, "the sizes are lost: B A has the directions of the update, but each piece has size 1"),
        (2, "each piece has its size squared: give B and A the square root each, not the whole size"),
        (0.5, "each piece has the square root of its size: it must stand in B and in A, not in one of them"),
    ):
        if close(product, (U * S**power) @ Vt):
            return line
    if close(product, last):
        return "those are the smallest pieces: np.linalg.svd gives the largest first"
    k = min(product.shape)
    if close(product, -(U * S) @ Vt):
        return "the sign is wrong: B A comes to minus the update"
    return f"B A is not the best matrix of rank {min(len(S), k)}: does column i of B meet row i of Vt?"


def split(left: Callable, right: Callable, pieces: Callable = lambda r: slice(None, r)) -> Callable:
    """Factors with other powers of the sizes, or of other pieces."""

    def answer(delta: Any, r: int) -> Any:
        U, S, Vt = np.linalg.svd(delta, full_matrices=False)
        p = pieces(r)
        return U[:, p] * left(S[p]), right(S[p])[:, None] * Vt[p]

    return answer


@exercise(
    "7.2",
    draw=draw_factors,
    smallest=lambda rng: draw_factors(rng, r=1),
    returns="B (m, r), A (r, n)",
    judge=judge_factors,
    decisive=["U[:, :r] * np.sqrt(S[:r])"],
    mistakes={
        "sizes lost": (split(np.ones_like, np.ones_like), "the sizes are lost"),
        "sizes squared": (split(lambda s: s, lambda s: s), "each piece has its size squared"),
        "one root": (split(np.sqrt, np.ones_like), "each piece has the square root of its size"),
        "all in B": (split(lambda s: s, np.ones_like), "B carries the sizes alone"),
        "all in A": (split(np.ones_like, lambda s: s), "A carries the sizes alone"),
        "smallest": (split(np.sqrt, np.sqrt, lambda r: slice(-r, None)), "those are the smallest pieces"),
        "one piece fewer": (split(np.sqrt, np.sqrt, lambda r: slice(None, r - 1)), "B must have the shape (m, r)"),
        "all pieces": (split(np.sqrt, np.sqrt, lambda r: slice(None)), "keep only r pieces"),
        "swapped": (lambda delta, r: best_rank_r(delta, r)[::-1], "B and A are swapped"),
        "V for Vᵀ": (
            lambda delta, r: (best_rank_r(delta, r)[0], best_rank_r(delta, r)[1].T),
            "A must have the shape (r, n)",
        ),
        "sign": (lambda delta, r: (-best_rank_r(delta, r)[0], best_rank_r(delta, r)[1]), "the sign is wrong"),
        "product": (lambda delta, r: np.matmul(*best_rank_r(delta, r)), "return two arrays"),
    },
)
def best_rank_r(delta: Any, r: int) -> tuple[Any, Any]:
    """The factors of the nearest matrix of rank r, both of the same size."""
    return split(np.sqrt, np.sqrt)(delta, r)


# -- 7.3 do two updates agree ------------------------------------------------------------------------------------------


def draw_pair(rng: np.random.Generator, r: int | None = None) -> Draw:
    """Two updates that have some of their directions in common, and a rank."""
    sizes = distinct_sizes("nm", rng, low=14)
    delta = falling(sizes["m"], sizes["n"], rng, pace=0.8)
    other = delta + 0.12 * rng.standard_normal(delta.shape)
    return Draw(sizes, delta=delta, other=other, r=int(rng.integers(4, 8)) if r is None else r)


def cosines(delta: Any, other: Any, r: int | None) -> Any:
    """Between the r strongest directions of the inputs: (r, r)."""
    rows, columns = (np.linalg.svd(matrix, full_matrices=False)[2][:r] for matrix in (delta, other))
    return rows @ columns.T


@exercise(
    "7.3",
    draw=draw_pair,
    smallest=lambda rng: draw_pair(rng, r=1),
    returns="the overlap",
    decisive=["((V1 @ V2.T) ** 2).sum() / r"],
    mistakes={
        "no square": (
            lambda delta, other, r: float(np.abs(cosines(delta, other, r)).sum() / r),
            "the cosines are added up, not their squares",
        ),
        "norm": (
            lambda delta, other, r: float(np.linalg.norm(cosines(delta, other, r)) / r),
            "that is the root of the sum: leave the squares as they are, then divide by r",
        ),
        "not divided": (
            lambda delta, other, r: float((cosines(delta, other, r) ** 2).sum()),
            "it is not divided by r: two equal updates must give 1",
        ),
        "divided twice": (
            lambda delta, other, r: float((cosines(delta, other, r) ** 2).mean()),
            "the mean divides by r², the number of pairs: two equal updates must give 1, so divide by r",
        ),
        "pairs": (
            lambda delta, other, r: float((np.diag(cosines(delta, other, r)) ** 2).sum() / r),
            "piece i meets piece i alone: the same directions may come in another order, so compare each with each",
        ),
        "columns of U": (
            lambda delta, other, r: overlap(delta.T, other.T, r),
            "those are directions of the outputs (U): take those of the inputs, the rows of Vt",
        ),
        "columns of Vt": (
            lambda delta, other, r: float(
                (
                    (
                        np.linalg.svd(delta, full_matrices=False)[2][:, :r].T
                        @ np.linalg.svd(other, full_matrices=False)[2][:, :r]
                    )
                    ** 2
                ).sum()
                / r
            ),
            "columns of Vt are taken: its rows are the directions, Vt[:r]",
        ),
        "all": (
            lambda delta, other, r: float((cosines(delta, other, None) ** 2).sum() / min(delta.shape)),
            "all pieces are compared: keep the first r of each",
        ),
        "with sizes": (
            lambda delta, other, r: float(
                np.sum(best_rank_r(delta, r)[1] * best_rank_r(other, r)[1])
                / np.linalg.norm(best_rank_r(delta, r)[1])
                / np.linalg.norm(best_rank_r(other, r)[1])
            ),
            "the factors A are compared, sizes and all: take the rows of Vt, of length 1",
        ),
    },
)
def overlap(delta: Any, other: Any, r: int) -> float:
    """How far the r strongest input directions of two updates span the same space: 0 not at all, 1 the same."""
    return float((cosines(delta, other, r) ** 2).sum() / r)
