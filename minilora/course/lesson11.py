"""Lesson 11's exercises: the interval of a paired difference, a verdict, and a claim tried in worlds that are known."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..experiments.claim import Verdict
from ..measure.statistics import student
from .compare import Wrong
from .exercises import EXERCISES, Draw, exercise, variant
from .worlds import WORLDS

REPRODUCED, NOT_HERE, CONTRADICTED = (str(verdict) for verdict in Verdict)
# -- 11.1 the interval of a paired difference --------------------------------------------------------------------------


def draw_pairs(rng: np.random.Generator, n: int | None = None) -> Draw:
    """Losses of two methods over n seeds: one that is hard for a is hard for b; for one of them, b is worse."""
    n = int(rng.integers(3, 8)) if n is None else n
    b, d = rng.normal(2.6, 0.2, n), np.abs(rng.normal(0.1, 0.05, n))
    d[rng.integers(n)] *= -1
    return Draw({"n": n}, a=b + d, b=b)


@exercise("11.1", draw=draw_pairs, smallest=lambda rng: draw_pairs(rng, n=2), returns="mean, low, high")
def paired_interval(a, b):
    """a (n), b (n) -> mean, low, high of a - b, as three numbers"""
    d = a - b
    half = student(len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
    return d.mean(), d.mean() - half, d.mean() + half


variant(
    "paired_interval",
    {
        "By how much does b lie below a?": "By how much does b lie above a?",
        "difference $d = a - b$": "difference $d = b - a$",
        "mean, low, high of a - b": "mean, low, high of b - a",
        "d = a - b": "d = b - a",
        'paired_interval(losses["old"], losses["new"])': 'paired_interval(losses["new"], losses["old"])',
    },
    "the difference is counted the other way round",
    lines={
        "a - b -> b - a": "b - a -> a - b",
        "this is b - a: the sign says which is better, so return a - b": "this is a - b: return b - a",
        "so take a - b first": "so take b - a first",
        "(a[0] - b[0],)": "(b[0] - a[0],)",
    },
)


# -- 11.2 a verdict ----------------------------------------------------------------------------------------------------


def draw_case(rng: np.random.Generator) -> Draw:
    """An interval somewhere about a band, and the number below which it speaks against the claim."""
    against = float(rng.choice([-1, 1]) * rng.uniform(0.5, 1))
    low = against + float(rng.uniform(0.5, 1))
    high = low + float(rng.uniform(0.5, 1)) if rng.random() < 0.7 else math.inf
    mean = float(rng.uniform(against - 1.5, low + 2))
    half = float(rng.uniform(0.05, 1.5))
    return Draw(None, interval=(mean, mean - half, mean + half), band=(low, high), against=against)


def judge_verdict(answer: Callable[..., Any], drawn: Draw, rng: np.random.Generator, number: int = 0) -> None:
    """The right one of three, for a hundred intervals; whoever errs as a known mistake does gets its line."""
    cases = [drawn, *(draw_case(rng) for _ in range(99))]
    said = [str(answer(**case)) for case in cases]
    for one in said:
        if one not in (REPRODUCED, NOT_HERE, CONTRADICTED):
            raise Wrong(f"{one[:40]!r} is not a verdict: there are {REPRODUCED!r}, {NOT_HERE!r} and {CONTRADICTED!r}")
    form = EXERCISES["verdict"].forms[number]
    right = [form.reference(**case) for case in cases]
    if said == right:
        return
    for mistake in form.mistakes:
        if said == [mistake.function(**case) for case in cases]:
            raise Wrong(mistake.line)
    case, got, want = next((c, a, b) for c, a, b in zip(cases, said, right, strict=True) if a != b)
    mean, low, high = case["interval"]
    raise Wrong(
        f"mean {mean:.2f}, interval {low:.2f} to {high:.2f}, band {case['band'][0]:.2f} to {case['band'][1]:.2f},"
        f" against below {case['against']:.2f}: you say {got!r}, it is {want!r}"
    )


@exercise("11.2", draw=draw_case, returns="the verdict", judge=judge_verdict)
def verdict(interval, band, against):
    """interval (mean, low, high), band (low, high), against: a number -> one of the three texts"""
    mean, low, high = interval
    if band[0] <= mean <= band[1] and low >= against:
        return "reproduced"
    return "contradicted" if high < against else "not at this size"


variant(
    "verdict",
    {
        '"contradicted"`: the whole interval lies below `against`.': (
            '"contradicted"`: the whole interval lies below the band, and the mean below `against`.'
        ),
        "if high < against else": "if mean < against and high < band[0] else",
    },
    "the interval must lie below the band, and its mean below `against`, to contradict",
    lines={
        "contradicted by the mean alone: the whole interval, including its high end, must be below `against`": (
            "contradicted by the mean alone: the whole interval, including its high end, must be below the band"
        ),
        "high < against -> high < 0": "mean < against -> mean < 0",
        "all of it, including its high end, must be there": "its mean must be there, and all of it below the band",
    },
    judge=partial(judge_verdict, number=1),
)


# -- 11.3 a claim of one's own -----------------------------------------------------------------------------------------


def interval_of(differences: Any) -> Any:
    """The interval of differences; of one seed, the point."""
    if len(differences) == 1:
        return (differences[0],) * 3
    return paired_interval(differences, 0 * differences)


def by_the_normal(d: Any) -> Any:
    """The interval from 1.96 standard errors."""
    half = 1.96 * d.std(ddof=1) / math.sqrt(len(d))
    return d.mean(), d.mean() - half, d.mean() + half


def without_worst(losses: Any) -> Any:
    """The differences, without the one that speaks most against the new method."""
    d = losses["old"] - losses["new"]
    return np.delete(d, np.argmin(d))


def no_third(interval: Any, band: Any, against: float) -> str:
    """What is not reproduced is contradicted."""
    return REPRODUCED if verdict(interval, band, against) == REPRODUCED else CONTRADICTED


def observed(result: Any, arguments: dict[str, Any]) -> Any:
    """Pairs and lists of numbers as they are compared, whatever kind they come as."""
    if not isinstance(result, (tuple, list)) or len(result) != 3:
        return result
    band, found, said = result
    try:
        return tuple(float(end) for end in band), np.array(found, float), said
    except (TypeError, ValueError):
        return result


@exercise("11.3", draw=WORLDS, returns="band, differences (n), verdict", observe=observed)
def my_claim(run, rates, seeds, claimed):
    """run(method, lr, seed) -> {"validation": ..., "test": ...} -> band (low, against), differences (n), verdict"""

    def best(method):
        return min(rates, key=lambda lr: np.mean([run(method, lr, seed)["validation"] for seed in seeds]))

    band = (claimed, 0.0)
    losses = {}
    for method in ("old", "new"):
        lr = best(method)
        losses[method] = np.array([run(method, lr, seed)["test"] for seed in seeds])
    interval = paired_interval(losses["old"], losses["new"])
    return band, losses["old"] - losses["new"], verdict(interval, (band[0], np.inf), band[1])


variant(
    "my_claim",
    {
        "below which it is clearly wrong (new is behind old).": (
            "below which it is clearly wrong (new is not even half of `claimed` ahead)."
        ),
        'paired_interval(losses["old"], losses["new"])': 'paired_interval(losses["new"], losses["old"])',
        "(claimed, 0.0)": "(claimed, claimed / 2)",
    },
    "less than half of the claimed difference speaks against it",
    lines={
        "0.0); return band": "claimed / 2); return band",
        "(claimed, 0)": "(claimed, claimed / 2)",
        "(claimed / 2, 0.0)": "(claimed / 2, claimed / 2)",
        "a loss is": "less than half of it is",
    },
)
