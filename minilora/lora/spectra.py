"""Singular values and singular vectors of updates, and measures from papers that are computed from them.

An update ΔW (m, n) is a matrix, or a pair (B, A) with ΔW = B A, B (m, r) and A (r, n); any scale belongs in B. For a
pair the (m, n) matrix is never formed: with B = Q_B R_B and Aᵀ = Q_A R_A (QR), the SVD is of the small R_B R_Aᵀ.

All functions compute on the host: in float32 if float32 or float16 is given, otherwise in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..engine.backend import dense, to_numpy

Update = Any  # an array (m, n), or a pair of arrays: B (m, r) and A (r, n)


class Svd(NamedTuple):
    """u · diag(s) · vt: u (m, k) and vt (k, n) have orthonormal columns and rows, and s (k) is in descending order."""

    u: np.ndarray
    s: np.ndarray
    vt: np.ndarray


def svd(update: Update) -> Svd:
    """The thin singular value decomposition of an update: k = min(m, n) for a matrix, at most r for a pair (B, A).

    Raises ValueError for anything but a matrix or a pair that can be multiplied, and for NaN or infinity.
    """
    if not isinstance(update, tuple):
        return Svd(*np.linalg.svd(_matrix(update, "the update"), full_matrices=False))
    if len(update) != 2:
        raise ValueError(f"an update in factors is a pair (B, A), got {len(update)} arrays")
    b, a = _matrix(update[0], "B"), _matrix(update[1], "A")
    if b.shape[1] != a.shape[0]:
        raise ValueError(f"B {b.shape} and A {a.shape} have no product: B must have as many columns as A has rows")
    qb, rb = np.linalg.qr(b)
    qa, ra = np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(rb @ ra.T, full_matrices=False)
    return Svd(qb @ u, s, vt @ qa.T)


def singular_values(update: Update) -> np.ndarray:
    """An update's singular values in descending order; at most r for a pair (B, A). Raises ValueError as `svd` does."""
    if isinstance(update, tuple):
        return svd(update).s
    return np.linalg.svd(_matrix(update, "the update"), compute_uv=False)


def rank_for_variance(values: np.ndarray, share: float = 0.9) -> int:
    """The number of singular values that explain this share of the variance Σ s² (Biderman et al. 2024, figure 6).

    values: singular values, in any order. Raises ValueError if all are zero, or for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share!r}")
    values = np.asarray(to_numpy(values)).astype(np.float64)
    if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("singular values must be a list of finite numbers, none of them negative")
    if not values.any():
        raise ValueError("all singular values are zero, so there is no variance to explain")
    explained = np.cumsum(np.sort(values)[::-1] ** 2)
    return int(np.searchsorted(explained, share * explained[-1] * (1 - 1e-12))) + 1  # tolerates rounding errors


def subspace_similarities(one: Update, other: Update) -> np.ndarray:
    """φ(one, other, i, j) = ‖U_iᵀ U_j‖² / min(i, j) for all i and j, at [i - 1, j - 1]; each is between 0 and 1.

    It is the share of the smaller subspace that lies in the larger one (Hu et al. 2021, arXiv 2106.09685, section 7.2
    and equation 4). U_i (n, i) are the first i right singular vectors of `one`, U_j the first j of `other`. The paper
    compares the A's of two adapters (r, n); whole updates can be compared in the same way.

    Raises ValueError for updates with different n, or an update of zeros.
    """
    u, v = _directions(one), _directions(other)
    if u.shape[1] != v.shape[1]:
        raise ValueError(f"the updates have {u.shape[1]} and {v.shape[1]} inputs, so they cannot be compared")
    shared = np.cumsum(np.cumsum((u @ v.T) ** 2, axis=0), axis=1)
    return shared / np.minimum.outer(np.arange(1, len(u) + 1), np.arange(1, len(v) + 1))


def chance_similarity(i: int, j: int, n: int) -> float:
    """The expected φ(i, j) of random subspaces in n dimensions: max(i, j) / n.

    The squared projection of a random unit vector onto a j-dimensional subspace is j / n on average; for i vectors the
    sum is i j / n, and φ divides it by min(i, j). Raises ValueError unless i and j are between 1 and n.
    """
    if not (1 <= i <= n and 1 <= j <= n):
        raise ValueError(f"i and j must be between 1 and the {n} dimensions, got {i!r} and {j!r}")
    return max(i, j) / n


class Amplification(NamedTuple):
    """The result of `amplification`: a row of table 7 of the LoRA paper. All but `factor` are Frobenius norms.

    factor: update / seen.
    update: ‖ΔW‖.
    seen: ‖Uᵀ W V‖, the part of W between the singular vectors of ΔW.
    top: the same with the first r singular vectors of W, which is the largest possible value.
    chance: the same with random vectors, as a root mean square.
    """

    factor: float
    update: float
    seen: float
    top: float
    chance: float


def amplification(update: Update, w: np.ndarray, r: int | None = None) -> Amplification:
    """The amplification factor ‖ΔW‖ / ‖Uᵀ W V‖ of an update, with reference values.

    Hu et al. 2021 (arXiv 2106.09685), section 7.3, table 7 and appendix H.4. U (m, r) and V (n, r) are the first r left
    and right singular vectors of ΔW. A large factor means that ΔW amplifies directions that W hardly emphasises. For
    random directions the mean of ‖Uᵀ W V‖² is r² ‖W‖² / (m n).

    r: the number of singular vectors; if left out, the numerical rank of ΔW.

    Raises ValueError for different shapes, an update of zeros, an r above its rank, or if Uᵀ W V is zero.
    """
    w, (u, s, vt) = _matrix(dense(w), "W"), svd(update)
    m, n = w.shape
    if (len(u), vt.shape[1]) != (m, n):
        raise ValueError(f"the update is {len(u)} x {vt.shape[1]} and W is {m} x {n}: they must have the same shape")
    rank = _rank(s, max(m, n))
    r = rank if r is None else r
    if not 1 <= r <= rank:
        raise ValueError(f"r must be between 1 and the update's rank {rank}, got {r!r}")
    norm = float(np.linalg.norm(s))
    seen = float(np.linalg.norm(u[:, :r].T @ w @ vt[:r].T))
    if not seen:
        raise ValueError("W is zero in the directions of the update, so the amplification factor is not defined")
    top = float(np.linalg.norm(np.linalg.svd(w, compute_uv=False)[:r]))
    chance = r * float(np.linalg.norm(w)) / (m * n) ** 0.5
    return Amplification(norm / seen, norm, seen, top, chance)


def closest_cosines(w: np.ndarray, tuned: np.ndarray, k: int = 10) -> np.ndarray:
    """The largest |cosine| between each of the first k left singular vectors of `tuned` and any of W's, (k).

    The signs of singular vectors are arbitrary and are ignored. Vectors of equal singular values are arbitrary too, and
    so are their cosines. w, tuned: (m, n). Raises ValueError for different shapes, or a k outside 1 to min(m, n).
    """
    w, tuned = _of_one_shape(w, tuned)
    if not 1 <= k <= min(w.shape):
        raise ValueError(f"k must be between 1 and {min(w.shape)}, the number of singular vectors, got {k!r}")
    return np.abs(svd(w).u.T @ svd(tuned).u[:, :k]).max(axis=0)


def intruder_dimensions(w: np.ndarray, tuned: np.ndarray, k: int = 10, epsilon: float = 0.5) -> int:
    """The number of the first k left singular vectors of `tuned` whose |cosine| with each of W's is below epsilon.

    Shuttleworth et al. 2024 (arXiv 2410.21228), definition 1.

    w, tuned: the matrix before and after training, (m, n). k: how many singular vectors are compared with all of W's.

    Raises ValueError as `closest_cosines` does, and for an epsilon outside (0, 1].
    """
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon must be above 0 and at most 1, got {epsilon!r}")
    return int((closest_cosines(w, tuned, k) < epsilon).sum())


def row_changes(w: np.ndarray, tuned: np.ndarray) -> tuple[float, float]:
    """The mean change of the rows of a matrix in magnitude and in direction, (ΔM, ΔD).

    Liu et al. 2024 (arXiv 2402.09353), section 3.2: ΔM is the mean of | ‖w'‖ - ‖w‖ |, and ΔD of 1 - cos(w', w). The
    paper's columns are rows (outputs) here, as in `variants.py` and in PEFT. The computation is in float64, because
    1 - cos is tiny. Raises ValueError for different shapes, or a row of zeros, which has no direction.
    """
    w, tuned = (matrix.astype(np.float64) for matrix in _of_one_shape(w, tuned))
    before, after = np.linalg.norm(w, axis=1), np.linalg.norm(tuned, axis=1)
    if not (before.all() and after.all()):
        raise ValueError("a row of zeros has no direction")
    apart = w / before[:, None] - tuned / after[:, None]  # unit vectors: ‖a - b‖² = 2 (1 - cos)
    return float(np.abs(after - before).mean()), float((apart**2).sum(axis=1).mean() / 2)


def _of_one_shape(w: np.ndarray, tuned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    w, tuned = _matrix(dense(w), "W"), _matrix(dense(tuned), "the tuned matrix")
    if w.shape != tuned.shape:
        raise ValueError(f"W is {w.shape} and the tuned matrix is {tuned.shape}: they must have the same shape")
    return w, tuned


def _directions(update: Update) -> np.ndarray:
    """The right singular vectors of an update with singular values above rounding, as rows (rank, n)."""
    _, s, vt = svd(update)
    return vt[: _rank(s, vt.shape[1])]


def _rank(s: np.ndarray, longest: int) -> int:
    """The numerical rank. Singular vectors beyond it are arbitrary."""
    if not s[0]:
        raise ValueError("the update is zero and has no singular vectors")
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
