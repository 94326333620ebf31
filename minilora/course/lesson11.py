"""Lesson 11's exercises: the interval of a paired difference, a verdict, and a claim tried in worlds that are known."""

from __future__ import annotations

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
    """Losses of two methods over n seeds: a seed that is hard for one is hard for the other."""
    n = int(rng.integers(3, 8)) if n is None else n
    hard = rng.normal(2.6, 0.2, n)
    return Draw({"n": n}, a=hard + rng.normal(0.1, 0.05, n), b=hard + rng.normal(0, 0.05, n))


@exercise(
    "11.1",
    draw=draw_pairs,
    smallest=lambda rng: draw_pairs(rng, n=2),
    returns="mean, low, high",
    mistakes="""
        this is the standard deviation of single seeds: that of their mean, the standard error, is sqrt(n) times smaller
            / np.sqrt(len(d)) ->
        1.96 is for very many seeds: with few, the standard deviation is itself uncertain; take student(n - 1)
            student(len(d) - 1) -> 1.96
        student(n) instead of student(n - 1): the mean uses one of the n degrees of freedom
            student(len(d) - 1) -> student(len(d))
        the standard deviation is too small: NumPy's std divides by n; with ddof=1 it divides by n - 1
            ddof=1 -> ddof=0
        this is the 90 % interval: for 95 % call student(n - 1) without a second argument
            student(len(d) - 1) -> student(len(d) - 1, 0.9)
        mean ± one standard error misses the truth in a third of all cases or more: multiply by student(n - 1)
            student(len(d) - 1) * ->
        this uses the variance: use its root, the standard deviation
            d.std -> d.var
        twice too wide: student(n - 1) standard errors lie on each side of the mean
            student(len(d) - 1) -> 2 * student(len(d) - 1)
        the seeds are paired: a[i] and b[i] had the same seed and batches, so take a - b first; what is \
        hard for both then cancels
            d.std(ddof=1) -> np.sqrt(a.var(ddof=1) + b.var(ddof=1))
        the seeds are paired: a[i] and b[i] had the same seed and batches, so take a - b first; what is \
        hard for both then cancels
            d.std(ddof=1) -> np.sqrt(a.var(ddof=1) + b.var(ddof=1))
            student(len(d) - 1) -> student(2 * len(d) - 2)
        this is b - a: the sign says which is better, so return a - b
            a - b -> b - a
        this is the first seed alone: one seed has a difference, but no interval
            -> return (a[0] - b[0],) * 3
        these are the smallest and the largest difference: no 95 % interval, since they widen as seeds are added
            d.mean() - half, d.mean() + half -> d.min(), d.max()
    """,
)
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
    said = [answer(**case) for case in cases]
    for one in said:
        if one not in (REPRODUCED, NOT_HERE, CONTRADICTED):
            raise Wrong(f"{one!r} is no verdict: there are {REPRODUCED!r}, {NOT_HERE!r} and {CONTRADICTED!r}")
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


@exercise(
    "11.2",
    draw=draw_case,
    returns="the verdict",
    judge=judge_verdict,
    mistakes="""
        only the mean is used: an interval that reaches below `against` could be chance
            and low >= against ->
            high < against -> mean < against
        reproduced by the mean alone: the interval must not reach below `against`, however good the mean is
            and low >= against ->
        contradicted by the mean alone: the whole interval, including its high end, must be below `against`
            high < against -> mean < against
        contradicted as soon as the interval reaches below `against`: all of it, including its high end, must be there
            high < against -> low < against
        what is not reproduced is not contradicted yet: too few seeds, or a small effect, is `not at this size`
            "not at this size" -> "contradicted"
        a mean outside the band is called contradicted: between band and `against` nothing is decided
            high < against -> not band[0] <= mean <= band[1]
        too strict: the mean must lie in the band, and the interval must stay out of `against`, not inside the band
            band[0] <= mean <= band[1] and low >= against -> low >= band[0] and high <= band[1]
        too kind: an interval that touches the band is not enough, its mean must lie in it
            band[0] <= mean <= band[1] and -> high >= band[0] and low <= band[1] and
        the band has two ends: a mean above the upper one is not what the claim says either
            mean <= band[1] -> mean
        zero is used instead of `against`: which numbers contradict a claim depends on the claim
            low >= against -> low >= 0
            high < against -> high < 0
    """,
)
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
        "high < against -> mean < against": "mean < against and high < band[0] -> mean < against",
        "contradicted by the mean alone: the whole interval, including its high end, must be below `against`": (
            "contradicted by the mean alone: the whole interval, including its high end, must be below the band"
        ),
        "high < against -> low < against": "mean < against and high < band[0] -> low < against",
        "high < against -> not": "mean < against and high < band[0] -> not",
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


@exercise(
    "11.3",
    draw=WORLDS,
    returns="band, differences (n), verdict",
    observe=observed,
    mistakes="""
        one seed only: it has no interval, and chance may have chosen it; take every seed you are given
            -> seeds = seeds[:1]
            paired_interval(losses["old"], losses["new"]) -> interval_of(losses["old"] - losses["new"])
        the baseline is untuned: `old` runs at the first rate of the list, `new` at its best; tune both alike
            lr = best(method) -> lr = best(method) if method == "new" else rates[0]
        both run at the first rate of the list, and none is tuned: the method that happens to suit that rate wins
            lr = best(method) -> lr = rates[0]
        the baseline runs at the rate that is best for `new`: a rate that suits one need not suit the other
            lr = best(method) -> lr = best("new")
        `new` runs at the baseline's best rate: being unfair to the new method is unfair, too; tune both alike
            lr = best(method) -> lr = best("old")
        the rate was chosen on the test set: then the test set has been used for tuning; choose on validation
            ["validation"] -> ["test"]
        measured where the rate was chosen: the best of several looks better than it is; measure on the test
            ["test"] -> ["validation"]
        the rate was chosen on the first seed alone: take the mean over all seeds
            ["validation"] for seed in seeds -> ["validation"] for seed in seeds[:1]
        each seed has its own rate: use one rate per method, the best by the mean over all seeds
            best(method): -> best(method, seeds=seeds):
            run(method, lr, seed)["test"] -> run(method, best(method, [seed]), seed)["test"]
        the best seed of each was compared: that measures luck, and rewards trying more often
            [run(method, lr, seed)["test"] for seed in seeds] -> [min(run(method, lr, s)["test"] for s in seeds)]
            paired_interval(losses["old"], losses["new"]) -> interval_of(losses["old"] - losses["new"])
        the seed that spoke against it was left out: a seed may go only for a reason fixed before the run
            paired_interval(losses["old"], losses["new"]) -> interval_of(without_worst(losses))
            losses["old"] - losses["new"], verdict -> without_worst(losses), verdict
        the difference is new - old: losses are better when lower, so old - new says by how much new is ahead
            paired_interval(losses["old"], losses["new"]) -> paired_interval(losses["new"], losses["old"])
            losses["old"] - losses["new"], verdict -> losses["new"] - losses["old"], verdict
        the band was moved after the numbers were seen: it comes from the sentence alone, (claimed, 0)
            return band -> band = (min(claimed, interval[0]), 0.0); return band
        the band was moved after the numbers were seen: it comes from the sentence alone, (claimed, 0)
            return band -> band = interval[:2]; return band
        the band is easier than the sentence: it says `at least claimed`, so the band begins there
            (claimed, 0.0) -> (claimed / 2, 0.0)
        all below `claimed` is called against it: a smaller gain than promised is no contradiction, a loss is
            (claimed, 0.0) -> (claimed, claimed)
        the verdict comes from 1.96 standard errors: with so few seeds take your paired_interval
            paired_interval(losses["old"], losses["new"]) -> by_the_normal(losses["old"] - losses["new"])
        the verdict comes from the mean alone: ask where the interval ends, with your verdict of 11.2
            verdict(interval -> verdict(interval[:1] * 3
        there are three verdicts: what these seeds cannot decide is `not at this size`
            verdict(interval -> no_third(interval
    """,
)
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
        "below which it is clearly wrong\n   (new is behind old).": (
            "below which it is clearly wrong\n   (new is not even half of `claimed` ahead)."
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
