"""Several adapters made into one: what can be had exactly, what only nearly, and what `linear` really computes.

The update of an adapter is s B A. The sum of two updates, w1 s1 B1 A1 + w2 s2 B2 A2, is in general of rank r1 + r2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..engine.backend import Array, array_module, to_numpy
from ..nn.module import Module
from .adapters import check_known, configs_of, install_adapter, lora_modules
from .layer import LoraWeights


@dataclass(frozen=True)
class Combination:
    """What `combine_adapters` made: ranks by module, and by module the relative error against the exact sum
    ‖made - sum‖ / ‖sum‖ (Frobenius norms).
    """

    ranks: dict[str, int]
    errors: dict[str, float]

    @property
    def error(self) -> float:
        """The largest relative error of any module."""
        return max(self.errors.values())


def combine_adapters(
    model: Module,
    names: Sequence[str],
    weights: Sequence[float],
    method: str = "cat",
    name: str = "combined",
    rank: int | None = None,
) -> Combination:
    """Add a new, active adapter that stands for the weighted sum of others.

    method: "cat" puts the factors side by side: exact, and ranks add up. "svd" takes the best approximation of the sum
    by `rank` directions (the largest rank among the adapters if left out), in the Frobenius norm (Eckart & Young 1936).
    "linear" adds the A's and the B's: (√w1 B1 + √w2 B2)(√w1 A1 + √w2 A2) with each scale folded in. This is NOT the sum
    of the updates: it has the cross terms √(w1 w2)(B1 A2 + B2 A1), and is right only for adapters that share A or B. It
    needs equal ranks and positive weights, as in PEFT.

    Returns the ranks and the errors against the exact sum. Raises ValueError for unknown names, a taken name, adapters
    on different modules with "linear", or another method.
    """
    check_known(model, names)
    if name in configs_of(model):
        raise ValueError(f"the model has an adapter called {name!r} already; remove it or choose another name")
    if not names or len(names) != len(weights):
        raise ValueError(f"expected one weight for each name, got {len(names)} names and {len(weights)} weights")
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    if method == "linear" and min(weights) <= 0:
        raise ValueError(
            f"method 'linear' takes square roots of the weights: they must be positive, got {list(weights)}"
        )
    made, errors = {}, {}
    for path, module in lora_modules(model).items():
        parts = [(module.adapters[n], w) for n, w in zip(names, weights, strict=True) if n in module.adapters]
        if not parts:
            continue
        if odd := [n for n in names if n in module.adapters and not module.adapters[n].is_plain]:
            raise ValueError(f"adapter {odd[0]!r} is no plain LoRA (DoRA, PiSSA or a bias): its factors do not add up")
        if method == "linear" and (len(parts) < len(names) or len({part.rank for part, _ in parts}) > 1):
            raise ValueError(f"method 'linear' needs every adapter with one rank on {path}: use 'cat' or 'svd'")
        factors = [(to_numpy(p.lora_B.data) * (p.scale * w), to_numpy(p.lora_A.data), w) for p, w in parts]
        b, a = _METHODS[method](factors, rank or max(part.rank for part, _ in parts))
        exact = sum(fb @ fa for fb, fa, _ in factors)
        norm = float(np.linalg.norm(exact))
        errors[path] = float(np.linalg.norm(b @ a - exact)) / norm if norm else 0.0
        xp = array_module(module.weight.data)
        made[path] = LoraWeights(xp.asarray(a), xp.asarray(b), 1.0)
    ranks = {path: part.rank for path, part in made.items()}
    first = configs_of(model)[names[0]]
    largest = max(ranks.values())
    config = replace(
        first,
        r=largest,
        lora_alpha=float(largest),
        use_rslora=False,
        target_modules=list(made),
        exclude_modules=None,
        layers_to_transform=None,
        rank_pattern={path: r for path, r in ranks.items() if r != largest},
        alpha_pattern={path: float(r) for path, r in ranks.items() if r != largest},
    )
    install_adapter(model, config, name, made)
    return Combination(ranks, errors)


Factors = list[tuple[np.ndarray, np.ndarray, float]]  # (B with scale and weight in it, A, weight) of each adapter


def _cat(factors: Factors, rank: int) -> tuple[Array, Array]:
    return np.concatenate([b for b, _, _ in factors], axis=1), np.concatenate([a for _, a, _ in factors])


def _svd(factors: Factors, rank: int) -> tuple[Array, Array]:
    b, a = _cat(factors, rank)  # (m, R), (R, n)
    qb, rb = np.linalg.qr(b)  # b a = qb (rb raᵀ) qaᵀ: the only SVD is of an (R, R) matrix
    qa, ra = np.linalg.qr(a.T)
    u, s, vt = np.linalg.svd(rb @ ra.T)
    kept = min(rank, len(s))
    root = np.sqrt(s[:kept])
    return (qb @ u[:, :kept]) * root, root[:, None] * (vt[:kept] @ qa.T)


def _linear(factors: Factors, rank: int) -> tuple[Array, Array]:
    return (
        sum(b / np.sqrt(np.asarray(w, b.dtype)) for b, _, w in factors),
        sum(a * np.sqrt(np.asarray(w, a.dtype)) for _, a, w in factors),
    )


_METHODS = {"cat": _cat, "svd": _svd, "linear": _linear}
