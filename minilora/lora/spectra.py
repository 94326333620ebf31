"""What an update looks like from inside: its singular values, how many of them matter, and where they point.

An update ΔW (m, n) is given as a matrix, or as a pair (B, A) with ΔW = B A, B (m, r) and A (r, n). Of a pair the (m, n)
matrix is never made: B = Q_B R_B and Aᵀ = Q_A R_A (QR), and the SVD is of the small R_B R_Aᵀ. A scale belongs into B.

Everything here is computed on the host, in float64 where float64 is given and else in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..engine.backend import dense, to_numpy

Update = Any  # an array (m, n), or a pair of arrays: B (m, r) and A (r, n)


class Svd(NamedTuple):
    """u · diag(s) · vt, with k = rank at most: u (m, k) and vt (k, n) orthonormal, s (k) from the largest down."""

    u: np.ndarray
    s: np.ndarray
    vt: np.ndarray


def svd(update: Update) -> Svd:
    """The singular value decomposition of an update, thin: k = min(m, n) of a matrix, at most r of a pair (B, A).

    Raises ValueError for what is no matrix and no pair that can be multiplied, or holds NaN or infinity.
    """
    if not isinstance(update, tuple):
        return Svd(*np.linalg.svd(_matrix(update, "the update"), full_matrices=False))
    if len(update) != 2:
        raise ValueError(f"an update in factors is a pair (B, A), got {len(update)} of them")
    b, a = _matrix(update[0], "B"), _matrix(update[1], "A")
    if b.shape[1] != a.shape[0]:
        raise ValueError(f"B {b.shape} and A {a.shape} have no product: B's columns must be as many as A's rows")
    qb, rb = np.linalg.qr(b)
    qa, ra = np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(rb @ ra.T, full_matrices=False)
    return Svd(qb @ u, s, vt @ qa.T)


def singular_values(update: Update) -> np.ndarray:
    """An update's singular values, from the largest down; of a pair (B, A) at most r. Raises ValueError as `svd`."""
    if isinstance(update, tuple):
        return svd(update).s
    return np.linalg.svd(_matrix(update, "the update"), compute_uv=False)


def effective_rank(values: np.ndarray) -> float:
    """How many directions an update has, as a number between 1 and its rank: exp(-Σ p log p) with p = s / Σ s.

    Roy & Vetterli 2007 (EUSIPCO, "The effective rank: a measure of effective dimensionality"): the exponential of the
    entropy of the singular values themselves. Others square them first, which gives a smaller number.

    values: singular values, in any order. Raises ValueError where there are none above zero: nothing has no directions.
    """
    values = _values(values)
    p = values[values > 0] / values.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def rank_for_energy(values: np.ndarray, share: float = 0.9) -> int:
    """The rank of the smallest matrix that has this share of an update's energy, Σ s² (Biderman et al. 2024, figure 6).

    values: singular values, in any order. Raises ValueError where none is above zero, or for a share that is not in
    (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share!r}")
    energy = np.cumsum(np.sort(_values(values))[::-1] ** 2)
    return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12))) + 1  # rounding decides no rank


def subspace_similarity(one: Update, other: Update, i: int, j: int) -> float:
    """φ(one, other, i, j) = ‖U_iᵀ U_j‖² / min(i, j): the share of the smaller subspace that lies in the other, 0 to 1.

    Hu et al. 2021 (arXiv 2106.09685), section 7.2 and equation 4. U_i (n, i) are the first i right singular vectors of
    `one`, U_j those of `other`. The paper gives it the A's of two adapters (r, n); whole updates are as good.

    Raises ValueError for updates with different n, one of zeros, or an i or j beyond the rank of its update.
    """
    table = subspace_similarities(one, other)
    for name, k, rank in (("i", i, table.shape[0]), ("j", j, table.shape[1])):
        if not 1 <= k <= rank:
            raise ValueError(f"{name} counts directions, from 1 to {rank} here, got {k!r}")
    return float(table[i - 1, j - 1])


def subspace_similarities(one: Update, other: Update) -> np.ndarray:
    """`subspace_similarity` for every i and j: φ(one, other, i, j) at [i - 1, j - 1]. Raises ValueError as it does."""
    u, v = _directions(one), _directions(other)
    if u.shape[1] != v.shape[1]:
        raise ValueError(f"the updates take {u.shape[1]} and {v.shape[1]} inputs: their directions cannot be compared")
    shared = np.cumsum(np.cumsum((u @ v.T) ** 2, axis=0), axis=1)
    return shared / np.minimum.outer(np.arange(1, len(u) + 1), np.arange(1, len(v) + 1))


def chance_similarity(i: int, j: int, n: int) -> float:
    """The mean of φ(i, j) over random directions in n dimensions: max(i, j) / n.

    Each of i random unit vectors has j/n of its square in a subspace of j dimensions, and i j / n is divided by the
    smaller of both. Raises ValueError for more directions than dimensions.
    """
    if not (1 <= i <= n and 1 <= j <= n):
        raise ValueError(f"i and j must be from 1 to the {n} dimensions that there are, got {i!r} and {j!r}")
    return max(i, j) / n


class Amplification(NamedTuple):
    """What `amplification` measured, the row of table 7 in the LoRA paper. All but `factor` are Frobenius norms.

    factor: update / seen. update: ‖ΔW‖. seen: ‖Uᵀ W V‖, what W does between the directions of ΔW. top: the same with
    W's own first r directions, the most that is possible. chance: with random ones, √(mean of the square).
    """

    factor: float
    update: float
    seen: float
    top: float
    chance: float


def amplification(update: Update, w: np.ndarray, r: int | None = None) -> Amplification:
    """How much larger an update is than what W does in the same directions, ‖ΔW‖ / ‖Uᵀ W V‖, and what to hold it to.

    Hu et al. 2021 (arXiv 2106.09685), section 7.3, table 7 and appendix H.4. U (m, r) and V (n, r) are the first r
    singular vectors of ΔW on the left and on the right. A large factor says that ΔW amplifies what W hardly does.

    w: the base's matrix (m, n). r: how many directions; those with a singular value above rounding if left out. For
    random directions ‖Uᵀ W V‖² is r² ‖W‖² / (m n) in the mean.

    Raises ValueError for other shapes than W's, an update of zeros, an r beyond its rank, or where W does nothing at
    all in these directions.
    """
    w, (u, s, vt) = _matrix(dense(w), "W"), svd(update)
    m, n = w.shape
    if (len(u), vt.shape[1]) != (m, n):
        raise ValueError(f"the update is {len(u)} x {vt.shape[1]} and W {m} x {n}: they must have one shape")
    rank = _rank(s, max(m, n))
    r = rank if r is None else r
    if not 1 <= r <= rank:
        raise ValueError(f"r must be from 1 to the update's rank {rank}, got {r!r}")
    norm = float(np.linalg.norm(s))
    seen = float(np.linalg.norm(u[:, :r].T @ w @ vt[:r].T))
    if not seen:
        raise ValueError("W does nothing in the directions of the update: no factor says how much that is amplified")
    top = float(np.linalg.norm(np.linalg.svd(w, compute_uv=False)[:r]))
    chance = r * float(np.linalg.norm(w)) / (m * n) ** 0.5
    return Amplification(norm / seen, norm, seen, top, chance)


def closest_cosines(w: np.ndarray, tuned: np.ndarray, k: int = 10) -> np.ndarray:
    """For each of the first k left singular vectors of the tuned matrix, its largest |cosine| with any of W's, (k).

    Signs of singular vectors are arbitrary, so they do not count. w, tuned: (m, n). Where singular values are equal,
    their vectors could be others, and the cosines with them. Raises ValueError for matrices of two shapes, or a k that
    is not from 1 to min(m, n).
    """
    w, tuned = _matrix(dense(w), "W"), _matrix(dense(tuned), "the tuned matrix")
    if w.shape != tuned.shape:
        raise ValueError(f"W is {w.shape} and the tuned matrix {tuned.shape}: they must have one shape")
    if not 1 <= k <= min(w.shape):
        raise ValueError(f"k must be from 1 to {min(w.shape)}, the singular vectors that there are, got {k!r}")
    return np.abs(svd(w).u.T @ svd(tuned).u[:, :k]).max(axis=0)


def intruder_dimensions(w: np.ndarray, tuned: np.ndarray, k: int = 10, epsilon: float = 0.5) -> int:
    """How many of the first k singular vectors of the tuned matrix are like none of W's: |cosine| below epsilon.

    Shuttleworth et al. 2024 (arXiv 2410.21228), definition 1: left singular vectors, each compared with all of W's.
    Raises ValueError as `closest_cosines`, and for an epsilon that is not in (0, 1].
    """
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon is a cosine, above 0 and at most 1, got {epsilon!r}")
    return int((closest_cosines(w, tuned, k) < epsilon).sum())


def row_changes(w: np.ndarray, tuned: np.ndarray) -> tuple[float, float]:
    """How much the rows of a matrix changed in length and in direction: (ΔM, ΔD), each the mean over all rows.

    Liu et al. 2024 (arXiv 2402.09353), section 3.2: ΔM is the mean of | ‖w'‖ - ‖w‖ |, and ΔD of 1 - cos(w', w). What
    is a column there is a row (an output) here, as in `variants.py` and in PEFT. Computed in float64, since 1 - cos is
    tiny. Raises ValueError for matrices of two shapes, or a row of zeros, which has no direction.
    """
    w, tuned = _matrix(dense(w), "W").astype(np.float64), _matrix(dense(tuned), "the tuned matrix").astype(np.float64)
    if w.shape != tuned.shape:
        raise ValueError(f"W is {w.shape} and the tuned matrix {tuned.shape}: they must have one shape")
    before, after = np.linalg.norm(w, axis=1), np.linalg.norm(tuned, axis=1)
    if not (before.all() and after.all()):
        raise ValueError("a row of zeros has no direction that could change")
    apart = w / before[:, None] - tuned / after[:, None]  # of unit vectors: ‖a - b‖² = 2 (1 - cos), without cancelling
    return float(np.abs(after - before).mean()), float((apart**2).sum(axis=1).mean() / 2)


def _directions(update: Update) -> np.ndarray:
    """The right singular vectors that an update has, as rows (rank, n)."""
    _, s, vt = svd(update)
    return vt[: _rank(s, vt.shape[1])]


def _rank(s: np.ndarray, longest: int) -> int:
    """How many singular values are above rounding. Vectors of the others are arbitrary."""
    if not s[0]:
        raise ValueError("the update is zero: it has no directions")
    return int((s > s[0] * longest * np.finfo(s.dtype).eps).sum())


def _matrix(x: Any, name: str) -> np.ndarray:
    x = np.asarray(to_numpy(x))
    if x.ndim != 2 or not x.size:
        raise ValueError(f"{name} must be a matrix with rows and columns, got shape {x.shape}")
    if x.dtype != np.float64:
        x = x.astype(np.float32 if x.dtype in (np.float16, np.float32) else np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"{name} holds NaN or infinity: it has no singular values")
    return x


def _values(values: Any) -> np.ndarray:
    values = np.asarray(to_numpy(values)).astype(np.float64)
    if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("singular values must be a list of finite numbers, none of them negative")
    if not values.any():
        raise ValueError("all singular values are zero: an update of nothing has no rank to speak of")
    return values
