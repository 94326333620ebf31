"""Lesson 10's exercises: the scale that a module gets, the rank that a budget allows, the rate that a sweep found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .exercises import Draw, exercise

# -- 10.1 the scale ----------------------------------------------------------------------------------------------------


def draw_scale(rng: np.random.Generator, twice: bool = False, rs: bool | None = None) -> Draw:
    """A module, and patterns for it and for others, among them two keys that look as if they would fit.

    The keys that do fit are the last piece of the name, several, or the whole of it; twice: two keys fit in each
    pattern, of which the first counts.
    """
    layer, other = (int(i) for i in rng.choice(np.arange(2, 10), 2, replace=False))
    name = f"model.layers.{layer}.self_attn.v_proj"
    several, last = f"layers.{layer}.self_attn.v_proj", "v_proj"
    fits = [(several, last), (last, several), (name, name)][int(rng.integers(2 if twice else 3))]
    ranks, alphas = rng.permutation([5, 6, 7, 11, 13, 17]), rng.permutation([191, 211, 227, 251, 271, 293])

    def pattern(key: str, values: np.ndarray) -> dict[str, int]:
        keys = ["self_attn", "proj", f"layers.{other}.self_attn.v_proj", key]
        keys = [last, several] if twice else [keys[i] for i in (0, 1, *rng.permutation([2, 3]))]
        return {key: int(value) for key, value in zip(keys, values, strict=False)}

    return Draw(
        None,
        name=name,
        r=int(ranks[-1]),
        lora_alpha=int(alphas[-1]),
        use_rslora=bool(rng.integers(2)) if rs is None else rs,
        rank_pattern=pattern(fits[0], ranks),
        alpha_pattern=pattern(fits[1], alphas),
    )


def fitting(name: str, ending: str) -> bool:
    """Does the module's name end with this, from dot to dot?"""
    return f".{name}".endswith(f".{ending}")


def picked(name: str, pattern: dict[str, Any], default: Any, fits: Callable = fitting, last: bool = False) -> Any:
    """What the first key that fits says, or the default."""
    values = [value for key, value in pattern.items() if fits(name, key)]
    return values[-1 if last else 0] if values else default


def scaled(rule: Callable | None = None, ranks: bool = True, alphas: bool = True, **how: Any) -> Callable:
    """A scale by another rule(alpha, r, rs), without the one or the other pattern, or with keys that fit otherwise."""

    def answer(name: str, r: Any, lora_alpha: Any, use_rslora: bool, rank_pattern: dict, alpha_pattern: dict) -> float:
        r = picked(name, rank_pattern, r, **how) if ranks else r
        alpha = picked(name, alpha_pattern, lora_alpha, **how) if alphas else lora_alpha
        if rule:
            return float(rule(alpha, r, use_rslora))
        return float(alpha / (np.sqrt(r) if use_rslora else r))

    return answer


@exercise(
    "10.1",
    draw=[
        draw_scale,
        lambda rng: draw_scale(rng, rs=False),
        lambda rng: draw_scale(rng, rs=True),
        lambda rng: draw_scale(rng, twice=True),
    ],
    smallest=lambda rng: Draw(
        None, name="v_proj", r=1, lora_alpha=3, use_rslora=True, rank_pattern={}, alpha_pattern={}
    ),
    returns="the scale",
    decisive=['endswith(f".{ending}")'],
    mistakes={
        "alpha": (scaled(lambda alpha, r, rs: alpha), "that is alpha alone: it is divided by r, or by its root"),
        "flag not read": (
            scaled(lambda alpha, r, rs: alpha / r),
            "use_rslora is not looked at: with it, alpha / sqrt(r)",
        ),
        "always the root": (
            scaled(lambda alpha, r, rs: alpha / np.sqrt(r)),
            "alpha / sqrt(r) only where use_rslora is set, otherwise alpha / r",
        ),
        "flag turned": (
            scaled(lambda alpha, r, rs: alpha / (r if rs else np.sqrt(r))),
            "use_rslora is taken the wrong way round: with it sqrt(r), without it r",
        ),
        "root of all": (
            scaled(lambda alpha, r, rs: np.sqrt(alpha / r) if rs else alpha / r),
            "rsLoRA takes the root of r alone: alpha / sqrt(r), not sqrt(alpha / r)",
        ),
        "last piece": (
            scaled(fits=lambda name, key: name.split(".")[-1] == key),
            "a key may have several pieces, as layers.1.self_attn.v_proj: compare with the end of the whole name",
        ),
        "whole name": (
            scaled(fits=lambda name, key: name == key),
            "a key need not be the whole name: the name may end with it, after a dot",
        ),
        "no rank pattern": (scaled(ranks=False), "rank_pattern is not looked at"),
        "no alpha pattern": (scaled(alphas=False), "alpha_pattern is not looked at"),
        "no pattern": (scaled(ranks=False, alphas=False), "neither rank_pattern nor alpha_pattern is looked at"),
        "anywhere": (
            scaled(fits=lambda name, key: key in name),
            "a key must stand at the end of the name, not anywhere in it (endswith, not in)",
        ),
        "any ending": (
            scaled(fits=lambda name, key: name.endswith(key)),
            '"proj" is no module: before the ending there must be a dot, or nothing',
        ),
        "last fits": (scaled(last=True), "where two keys fit, the first counts: stop there (break)"),
        "upside down": (
            scaled(lambda alpha, r, rs: (np.sqrt(r) if rs else r) / alpha),
            "upside down: alpha stands above, r below",
        ),
    },
)
def scale_of(name: str, r: int, lora_alpha: float, use_rslora: bool, rank_pattern: dict, alpha_pattern: dict) -> float:
    """alpha / r, or alpha / sqrt(r), with the patterns of the module."""
    return scaled()(name, r, lora_alpha, use_rslora, rank_pattern, alpha_pattern)


# -- 10.2 the budget ---------------------------------------------------------------------------------------------------


def draw_budget(rng: np.random.Generator) -> Draw:
    """Four choices: two that the budget limits, one that it does not reach, one too dear."""
    m, n = (int(size) for size in rng.permutation([37, 64, 90])[:2])
    choices = {
        "two": [(m, n), (m + 3, n + 50)],
        "many": [(m, n), (n, m + 7), (m + 1, n)] * int(rng.integers(2, 4)),
        "small": [(5, 9)],
        "dear": [(30_000, 40_000)],
    }
    order = [list(choices)[i] for i in rng.permutation(4)]
    budget = int(rng.integers(6, 12)) * sum(sum(shape) for shape in choices["many"]) + 11
    return Draw(None, choices={key: choices[key] for key in order}, budget=budget)


def budgeted(per_rank: Callable, share: Callable | None = None, cap: bool = True) -> Callable:
    """Ranks with another count of what one rank costs, or another division, or without the smallest side."""

    def answer(choices: dict, budget: int) -> dict:
        ranks = {}
        for name, shapes in choices.items():
            r = share(budget, per_rank(shapes)) if share else budget // per_rank(shapes)
            ranks[name] = min(r, min(min(shape) for shape in shapes)) if cap else r
        return ranks

    return answer


def both_sides(shapes: Any) -> int:
    """What one rank costs."""
    return sum(m + n for m, n in shapes)


@exercise(
    "10.2",
    draw=draw_budget,
    smallest=lambda rng: Draw(None, choices={"one": [(3, 4)]}, budget=7),
    returns="ranks",
    decisive=["min(budget // per_rank, smallest)"],
    mistakes={
        "no cap": (
            budgeted(both_sides, cap=False),
            "no rank is higher than the smallest side of a matrix: take the minimum",
        ),
        "product": (
            budgeted(lambda shapes: sum(m * n for m, n in shapes)),
            "m n is what W has: an adapter of rank r has r (m + n) numbers",
        ),
        "first matrix": (
            budgeted(lambda shapes: sum(shapes[0])),
            "only the first matrix is paid for: add up over all matrices of the choice",
        ),
        "each its budget": (
            budgeted(lambda shapes: max(m + n for m, n in shapes)),
            "each matrix is given the whole budget: it is for all matrices together",
        ),
        "rounded up": (
            budgeted(both_sides, lambda budget, cost: -(-budget // cost)),
            "rounded up: that is more than the budget holds",
        ),
        "not whole": (
            budgeted(both_sides, lambda budget, cost: budget / cost),
            "a rank is a whole number: divide with //",
        ),
        "at least 1": (
            budgeted(both_sides, lambda budget, cost: max(1, budget // cost)),
            "where not even rank 1 fits, the rank is 0",
        ),
        "rows alone": (
            budgeted(lambda shapes: sum(m for m, n in shapes)),
            "only B is paid for, r m numbers: A has r n more",
        ),
        "columns alone": (
            budgeted(lambda shapes: sum(n for m, n in shapes)),
            "only A is paid for, r n numbers: B has r m more",
        ),
        "largest side": (
            lambda choices, budget: {
                name: min(budget // both_sides(shapes), max(max(shape) for shape in shapes))
                for name, shapes in choices.items()
            },
            "the limit is the smallest side of a matrix, not the largest",
        ),
    },
)
def ranks_for_budget(choices: dict, budget: int) -> dict:
    """The largest rank of each choice."""
    return budgeted(both_sides)(choices, budget)


# -- 10.3 the sweep ----------------------------------------------------------------------------------------------------


def draw_sweep(rng: np.random.Generator, lowest: str = "middle") -> Draw:
    """A valley over seven rates.

    lowest: "middle"; "edge" where the bottom is not seen; "cut" where the rate beside the best one diverged once.
    """
    k, seeds = 7, 3
    rates = [float(f"{1e-4 * 3**i * rng.uniform(0.9, 1.1):.3g}") for i in range(k)]
    bottom = {"middle": int(rng.integers(2, 4)), "edge": int(rng.choice([0, k - 1])), "cut": 3}[lowest]
    losses = 3 + 0.1 * np.abs(np.arange(k) - bottom) + np.array([0, 0.3, 0.6])[:, None]
    losses = losses + rng.uniform(0, 0.02, (seeds, k))
    if lowest != "edge":
        losses[0, bottom - 1] -= 0.4 + 0.1  # one lucky seed; the mean stays above the valley's bottom
        losses[1:, bottom - 1] += 0.35
        losses[1, [bottom + 2, k - 1]] = np.nan
        losses[0, k - 1] = losses[2, k - 1] = 1  # so low that only the diverged seed keeps it out
    if lowest == "cut":
        losses[2, bottom + 1] = np.nan
    order = rng.permutation(seeds)
    return Draw({"seeds": seeds, "k": k}, rates=rates, losses=losses[order])


def swept(means: Callable, pick: Callable = np.argmin, edges: bool = True, rate: bool = True) -> Callable:
    """What a sweep found, with another way to sum up the seeds or to pick."""

    def answer(rates: Any, losses: Any) -> Any:
        row = means(losses)
        i = int(pick(row))
        return None if edges and i in (0, len(rates) - 1) else (rates[i] if rate else i)

    return answer


def finite_mean(losses: Any) -> Any:
    """The mean over seeds, infinite where one of them diverged."""
    means = losses.mean(axis=0)
    return np.where(np.isfinite(means), means, np.inf)


def mean_of_survivors(losses: Any) -> Any:
    """The mean over the seeds that did not diverge."""
    return np.nanmean(np.where(np.isfinite(losses), losses, np.nan), axis=0)


def left_edges(rates: Any, losses: Any) -> Any:
    """The edges are looked for among the rates that are left."""
    means = finite_mean(losses)
    left = np.flatnonzero(np.isfinite(means))
    i = int(np.argmin(means))
    beside = i in (left[0], left[-1]) or not (np.isfinite(means[i - 1]) and np.isfinite(means[i + 1]))
    return None if beside else rates[i]


@exercise(
    "10.3",
    draw=[draw_sweep, lambda rng: draw_sweep(rng, "edge"), lambda rng: draw_sweep(rng, "cut"), draw_sweep],
    returns="the rate",
    decisive=["np.where(np.isfinite(means), means, np.inf)"],
    mistakes={
        "any neighbour": (
            left_edges,
            "an edge is the first or the last rate of all that were tried, whether or not a neighbour diverged",
        ),
        "edge not seen": (
            swept(finite_mean, edges=False),
            "the best rate is at the edge of what was tried: the sweep was too narrow, return None",
        ),
        "survivors": (
            swept(mean_of_survivors),
            "a rate counts although a seed diverged there: leave the rate out, not only the seed",
        ),
        "survivors, edge not seen": (
            swept(mean_of_survivors, edges=False),
            "a rate counts although a seed diverged there: leave the rate out, not only the seed",
        ),
        "one seed": (
            swept(lambda losses: np.where(np.isfinite(losses).all(axis=0), losses[0], np.inf)),
            "only the first seed is looked at: take the mean over all",
        ),
        "luckiest seed": (
            swept(lambda losses: np.where(np.isfinite(losses).all(axis=0), losses.min(axis=0), np.inf)),
            "the best single run decides: that is luck, take the mean over the seeds",
        ),
        "index": (
            swept(finite_mean, rate=False),
            "that is the place of the best rate in the list: return the rate itself",
        ),
        "highest": (
            swept(finite_mean, pick=lambda row: np.argmax(np.where(np.isfinite(row), row, -np.inf))),
            "that is the rate with the highest loss: the lowest is wanted",
        ),
        "the loss": (
            lambda rates, losses: float(finite_mean(losses).min()),
            "that is the lowest loss: return the rate at which it was reached",
        ),
        "nan wins": (
            swept(lambda losses: losses.mean(axis=0)),
            "np.argmin takes nan for the smallest number: put infinity in its place first",
        ),
    },
)
def best_rate(rates: Any, losses: Any) -> Any:
    """The rate with the lowest mean, or None at the edge."""
    return swept(finite_mean)(rates, losses)
