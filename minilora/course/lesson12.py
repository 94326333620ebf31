"""Lesson 12's exercises: the scale that a module gets, the rank that a budget allows, the rate that a sweep found."""

from functools import partial
from typing import Any

import numpy as np

from .exercises import Draw, Drawing, changed, exercise, variant

# -- 12.1 the scale ----------------------------------------------------------------------------------------------------


def draw_scale(rng: np.random.Generator, twice: bool = False, rs: bool | None = None, whole: bool = False) -> Draw:
    """A module, and patterns for it and for others, among them two keys that only seem to match.

    The keys that match are the last part of the name, several parts, or the whole name; with `whole`, always the last
    of these. twice: two keys match in each pattern, of which the first counts.
    """
    layer, other = (int(i) for i in rng.choice(np.arange(2, 10), 2, replace=False))
    name = f"model.layers.{layer}.self_attn.v_proj"
    several, last = f"layers.{layer}.self_attn.v_proj", "v_proj"
    fits = [(several, last), (last, several), (name, name)][2 if whole else int(rng.integers(2 if twice else 3))]
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


SCALES: list[Drawing] = [
    partial(draw_scale, whole=True),
    partial(draw_scale, rs=False),
    partial(draw_scale, rs=True),
    partial(draw_scale, twice=True),
]


@exercise(
    "12.1",
    draw=SCALES,
    smallest=lambda rng: Draw(
        None, name="v_proj", r=5, lora_alpha=3, use_rslora=True, rank_pattern={}, alpha_pattern={}
    ),
    returns="the scale",
)
def scale_of(name, r, lora_alpha, use_rslora, rank_pattern, alpha_pattern):
    """name such as "model.layers.0.mlp.up_proj"; two dicts from endings of names to a rank or an alpha -> the scale"""

    def picked(pattern, default):
        fits = (value for ending, value in pattern.items() if f".{name}".endswith(f".{ending}"))
        return next(fits, default)

    r, alpha = picked(rank_pattern, r), picked(alpha_pattern, lora_alpha)
    return alpha / np.sqrt(r) if use_rslora else alpha / r


def reversed_keys(drawn: Draw) -> dict[str, Any]:
    """Both patterns in the opposite order."""
    return {name: dict(reversed(drawn[name].items())) for name in ("rank_pattern", "alpha_pattern")}


variant(
    "scale_of",
    {
        "the first key that matches counts.": "the last key that matches counts.",
        "next(fits, default)": "[default, *fits][-1]",
        "config.py) computes.": "config.py) computes, where the first key counts.",
    },
    "the last key that matches counts",
    draw=[changed(draw, reversed_keys) for draw in SCALES],
    lines={
        "[default, *fits][-1] -> [default, *fits][-1]": "[default, *fits][-1] -> next(fits, default)",
        "where two keys match, the first counts: stop there (break)": "where two keys match, the last one counts",
    },
)


# -- 12.2 the budget ---------------------------------------------------------------------------------------------------


def draw_budget(rng: np.random.Generator, most: int = 12) -> Draw:
    """Five choices: two that the budget limits, two that it does not limit, and one that is too large."""
    m, n = (int(size) for size in rng.permutation([37, 64, 90])[:2])
    choices = {
        "two": [(m, n), (m + 3, n + 50)],
        "narrow": [(n, m), (8, 5)],
        "many": [(m, n), (n, m + 7), (m + 1, n)] * int(rng.integers(2, 4)),
        "small": [(5, 9)],
        "large": [(30_000, 40_000)],
    }
    order = [list(choices)[i] for i in rng.permutation(5)]
    budget = (1 + int(rng.integers(6, most))) * sum(sum(shape) for shape in choices["many"]) - 1
    return Draw(None, choices={key: choices[key] for key in order}, budget=budget)


@exercise(
    "12.2",
    draw=draw_budget,
    smallest=lambda rng: Draw(None, choices={"one": [(3, 4)]}, budget=7),
    returns="ranks",
)
def ranks_for_budget(choices, budget):
    """choices {name: [(m, n), ...]}, budget a whole number -> {name: r}"""
    ranks = {}
    for name, shapes in choices.items():
        per_rank = sum(m + n for m, n in shapes)
        smallest = min(min(shape) for shape in shapes)
        ranks[name] = min(budget // per_rank, smallest)
    return ranks


variant(
    "ranks_for_budget",
    {
        "A rank is a whole number. It is 0 where even rank 1 exceeds the budget.": (
            "A rank is a multiple of 2. It is 0 where even rank 2 exceeds the budget."
        ),
        "min(budget // per_rank, smallest)": "min(budget // per_rank, smallest) // 2 * 2",
    },
    "ranks are even",
    lines={
        "rank 1": "rank 2",
        "smallest) // 2 * 2 -> budget // per_rank": "smallest) -> budget // per_rank",
        "max(1, budget": "max(2, budget",
    },
    draw=lambda rng: draw_budget(rng, 13),
    smallest=lambda rng: Draw(None, choices={"one": [(3, 4)]}, budget=14),
)


# -- 12.3 the sweep ----------------------------------------------------------------------------------------------------


def draw_sweep(rng: np.random.Generator, lowest: str = "middle") -> Draw:
    """Losses at seven or eight rates, with one minimum.

    lowest: "middle"; "lucky", where the first seed was lucky; "first" or "last", where the minimum is outside the
        sweep; "second", next to the edge; "cut", where the rate next to the best one diverged once;
        "stable", where no seed diverged.
    """
    k, seeds = 7 + (lowest == "last"), 3
    rates = [float(f"{1e-4 * 3**i * rng.uniform(0.9, 1.1):.3g}") for i in range(k)]
    inside = int(rng.integers(2, 4))
    bottom = {"first": 0, "second": 1, "last": k - 1, "cut": 3}.get(lowest, inside)
    losses = 3 + 0.1 * np.abs(np.arange(k) - bottom) + np.array([0, 0.3, 0.6])[:, None]
    losses = losses + rng.uniform(0, 0.02, (seeds, k))
    if 0 < bottom < k - 1:
        losses[0, bottom - 1] -= 0.4 + 0.1  # one lucky seed; the mean stays above the minimum
        losses[1:, bottom - 1] += 0.35
        losses[:, bottom + 1] += np.array([-0.2, -0.2, 0.6])  # one unlucky seed; the median is low
        losses[:, bottom + 3] = 3.5  # the worst seed is better than that of the best rate; the mean is not
        if lowest != "stable":
            losses[1, [bottom + 2, k - 1]] = np.nan
            losses[0, k - 1] = losses[2, k - 1] = 1  # so low that only the diverged seed keeps it out
    if lowest == "cut":
        losses[2, bottom + 1] = np.nan
    order = [0, *(1 + rng.permutation(seeds - 1))] if lowest == "lucky" else rng.permutation(seeds)
    return Draw({"seeds": seeds, "k": k}, rates=rates, losses=100 * losses[order])  # no number of one's own is as large


SWEEPS = [
    partial(draw_sweep, lowest=lowest) for lowest in ("middle", "first", "second", "last", "cut", "lucky", "stable")
]


@exercise("12.3", draw=SWEEPS, returns="the rate")
def best_rate(rates, losses):
    """rates: a list of k numbers, losses (seeds, k) -> the best rate, or None where it is at an edge"""
    means = losses.mean(axis=0)
    means = np.where(np.isfinite(means), means, np.inf)
    i = int(np.argmin(means))
    return None if i in (0, len(rates) - 1) else rates[i]


variant(
    "best_rate",
    {
        "a row for each seed and a column for each rate.": "a row for each rate and a column for each seed.",
        "losses (seeds, k)": "losses (k, seeds)",
        "losses.mean(axis=0)": "losses.mean(axis=1)",
    },
    "the table of losses is transposed",
    lines={
        "np.nanmean(losses, axis=0)": "np.nanmean(losses, axis=1)",
        "losses[0]": "losses[:, 0]",
        "losses.min(axis=0)": "losses.min(axis=1)",
    },
    draw=[changed(draw, lambda drawn: {"losses": drawn["losses"].T.copy()}) for draw in SWEEPS],
)
