"""Combine several adapters into one: exactly, approximately, or, with "linear", not as their sum.

The update of an adapter is s B A. The sum of two updates, w1 s1 B1 A1 + w2 s2 B2 A2, has in general rank r1 + r2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from ..engine.backend import Array, array_module, to_numpy
from ..nn.module import Module
from .adapters import check_known, install_adapter, lora_modules, refuse_new
from .config import LoraConfig
from .layer import LoraWeights


@dataclass(frozen=True, repr=False)
class Combination:
    """The result of `combine_adapters`.

    ranks: of the new adapter, by module.
    errors: ‖combined - sum‖ / ‖sum‖ by module, in Frobenius norms, where sum is the exact weighted sum.
    """

    ranks: dict[str, int]
    errors: dict[str, float]

    @property
    def error(self) -> float:
        """The largest relative error of any module."""
        return max(self.errors.values())

    def __repr__(self) -> str:
        counts = sorted(Counter(self.ranks.values()).items())
        ranks = ", ".join(f"rank {rank} in {n} module{'s' * (n > 1)}" for rank, n in counts)
        return f"<Combination: {ranks}; largest relative error against the exact sum {self.error:.2g}>"


def combine_adapters(
    model: Module,
    names: Sequence[str],
    weights: Sequence[float],
    method: str = "cat",
    name: str = "combined",
    rank: int | None = None,
) -> Combination:
    """Add a new, active adapter that is a weighted combination of others.

    names, weights: the adapters to combine, and one weight for each of them.
    method: how to combine them:
        "cat" concatenates the factors. This is exact, and ranks add up, at most to the rank of the matrix.
        "svd" is the best approximation of the sum with this `rank`, in the Frobenius norm (Eckart & Young 1936).
        "linear" adds the A's and the B's, as PEFT does: (√w1 B1 + √w2 B2)(√w1 A1 + √w2 A2), where w is a weight times
        its adapter's scale. This is NOT the sum of the updates: it has the cross terms √(w1 w2)(B1 A2 + B2 A1). It
        needs equal ranks and positive weights (PEFT gives A the sign of a negative one).
    rank: for "svd"; if left out, the largest rank among the adapters.

    Returns the ranks and the errors against the exact sum. The new adapter is a plain LoRA without dropout. Raises
    ValueError, before anything is changed, for invalid arguments, or adapters that cannot be combined.
    """
    refuse_new(model, name)
    for what, given in (("names", names), ("weights", weights)):
        if isinstance(given, str) or not isinstance(given, Sized):
            raise TypeError(f"expected a list of {what}, got {given!r} alone: put it in a list")
    check_known(model, names)
    if not names or len(names) != len(weights):
        raise ValueError(f"expected one weight for each name, got {len(names)} names and {len(weights)} weights")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not all(isinstance(weight, Real) and math.isfinite(weight) for weight in weights):
        raise ValueError(f"the weights must be finite numbers, got {list(weights)}")
    if method == "linear" and min(weights) <= 0:
        raise ValueError(
            f"method 'linear' takes the square roots of the weights, so they must be positive, got {list(weights)}"
        )
    if rank is not None and (method != "svd" or not isinstance(rank, Integral) or rank < 1):
        needed = "rank is for method 'svd' and must be a whole number of at least 1"
        raise ValueError(f"{needed}, got rank={rank!r} with method {method!r}")
    combined: dict[str, LoraWeights] = {}
    errors = {}
    for path, module in lora_modules(model).items():
        own = [(module.adapters[n], w) for n, w in zip(names, weights, strict=True) if n in module.adapters]
        if not own:
            continue
        if odd := [n for n in names if n in module.adapters and not module.adapters[n].is_plain]:
            raise ValueError(f"adapter {odd[0]!r} has DoRA or PiSSA, and only plain LoRAs can be combined")
        if method == "linear" and (len(own) < len(names) or len({one.rank for one, _ in own}) > 1):
            raise ValueError(f"method 'linear' needs all adapters with equal rank on {path}: use 'cat' or 'svd'")
        weighted = [(one, one.scale * float(w)) for one, w in own]  # NumPy's would turn float32 into float64
        factors = [(to_numpy(one.lora_B.data) * w, to_numpy(one.lora_A.data), w) for one, w in weighted]
        if method == "linear":
            b, a = _linear(factors)
        else:
            limit = min(module.in_features, module.out_features)
            total = sum(one.rank for one, _ in own)
            kept = total if method == "cat" else rank or max(one.rank for one, _ in own)
            b, a = _cat(factors) if kept == total <= limit else _svd(*_cat(factors), min(kept, limit))
        exact = sum(fb @ fa for fb, fa, _ in factors)
        norm = float(np.linalg.norm(exact))
        errors[path] = float(np.linalg.norm(b @ a - exact)) / norm if norm else 0.0
        xp = array_module(module.weight.data)
        combined[path] = LoraWeights(xp.asarray(a), xp.asarray(b), 1.0)
    ranks = {path: one.rank for path, one in combined.items()}
    install_adapter(model, LoraConfig.of_ranks(ranks), name, combined)
    return Combination(ranks, errors)


METHODS = ("cat", "svd", "linear")
Factors = list[tuple[np.ndarray, np.ndarray, float]]  # (w B, A, w) of each adapter, w its scale · weight


def _cat(factors: Factors) -> tuple[Array, Array]:
    return np.concatenate([b for b, _, _ in factors], axis=1), np.concatenate([a for _, a, _ in factors])


def _svd(b: Array, a: Array, rank: int) -> tuple[Array, Array]:
    """The best approximation of b a, (m, R) times (R, n), with this rank. The (m, n) matrix is never formed: with
    b = Q_b R_b and aᵀ = Q_a R_a (QR), the SVD is of the small R_b R_aᵀ.
    """
    qb, rb = np.linalg.qr(b)
    qa, ra = np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(rb @ ra.T, full_matrices=False)
    root = np.sqrt(s[:rank])
    return (qb @ u)[:, :rank] * root, root[:, None] * (vt @ qa.T)[:rank]


def _linear(factors: Factors) -> tuple[Array, Array]:
    return (
        sum(b / np.sqrt(np.asarray(w, b.dtype)) for b, _, w in factors),
        sum(a * np.sqrt(np.asarray(w, a.dtype)) for _, a, w in factors),
    )
