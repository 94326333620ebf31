"""Lesson 18's exercises: the interval of a paired difference, a verdict, and a claim tried in worlds that are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..experiments.claim import Verdict
from ..measure.statistics import student
from .compare import Wrong
from .exercises import Draw, Mistakes, exercise
from .worlds import TUNED, WORLDS, at, best_seed, both_tuned, rate_per_seed, tuned, without_worst

REPRODUCED, NOT_HERE, CONTRADICTED = (str(verdict) for verdict in Verdict)
Numbers = Any  # an array, one number per seed
Three = tuple[float, float, float]  # mean, low, high

# -- 18.1 the interval of a paired difference --------------------------------------------------------------------------


def draw_pairs(rng: np.random.Generator, n: int | None = None) -> Draw:
    """Losses of two methods over n seeds: a seed that is hard for one is hard for the other."""
    n = int(rng.integers(3, 8)) if n is None else n
    hard = rng.normal(2.6, 0.2, n)
    return Draw({"n": n}, a=hard + rng.normal(0.1, 0.05, n), b=hard + rng.normal(0, 0.05, n))


def around(
    half: Callable[[Numbers, Numbers], float], differences: Callable[[Numbers, Numbers], Numbers] = np.subtract
) -> Callable[..., Three]:
    """The mean of these differences, and so far on both sides of it."""

    def answer(a: Numbers, b: Numbers) -> Three:
        mean, way = float(np.mean(differences(a, b))), float(half(a, b))
        return mean, mean - way, mean + way

    return answer


def error(a: Numbers, b: Numbers) -> float:
    """The standard error of the mean of a - b."""
    return float(np.std(a - b, ddof=1)) / math.sqrt(len(a))


def t_of(a: Numbers, more: int = -1, share: float = 0.95) -> float:
    """Student's t for that many seeds."""
    return student(len(a) + more, share)


def unpaired(a: Numbers, b: Numbers) -> float:
    """The standard error of the difference of two means, as if the seeds had nothing to do with each other."""
    return math.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / len(a))


def extremes(a: Numbers, b: Numbers) -> Three:
    """The mean, the smallest and the largest difference."""
    return float((a - b).mean()), float((a - b).min()), float((a - b).max())


PAIR = (
    "the seeds are paired: a[i] and b[i] had the same start and the same batches, so take a - b first; what is hard for"
    " both then cancels"
)


@exercise(
    "18.1",
    draw=draw_pairs,
    smallest=lambda rng: draw_pairs(rng, n=2),
    returns="mean, low, high",
    decisive=["student(len(d) - 1) * d.std(ddof=1)"],
    mistakes={
        "standard deviation": (
            around(lambda a, b: t_of(a) * error(a, b) * math.sqrt(len(a))),
            "this is how far single seeds lie apart: the mean of n seeds is surer, by the root of n (standard error)",
        ),
        "normal": (
            around(lambda a, b: 1.96 * error(a, b)),
            "1.96 is for very many seeds: with few, the spread is itself a guess; take student(n - 1)",
        ),
        "t of n": (
            around(lambda a, b: t_of(a, 0) * error(a, b)),
            "student(n) in place of student(n - 1): the mean has used up one of the n numbers",
        ),
        "n below the line": (
            around(lambda a, b: t_of(a) * error(a, b) * math.sqrt((len(a) - 1) / len(a))),
            "the spread is too small: NumPy's std divides by n unless you say ddof=1, and then by n - 1",
        ),
        "one side": (
            around(lambda a, b: t_of(a, share=0.9) * error(a, b)),
            "this is the interval of 90 %: 95 % lie inside ± student(n - 1), without a share of your own",
        ),
        "one standard error": (
            around(error),
            "mean ± one standard error misses the truth in a third of all cases or more: times student(n - 1)",
        ),
        "variance": (
            around(lambda a, b: t_of(a) * float(np.var(a - b, ddof=1)) / math.sqrt(len(a))),
            "the variance stands where its root, the standard deviation, belongs",
        ),
        "whole width": (
            around(lambda a, b: 2 * t_of(a) * error(a, b)),
            "twice too wide: student(n - 1) standard errors lie on each side of the mean",
        ),
        "unpaired": (around(lambda a, b: t_of(a) * unpaired(a, b)), PAIR),
        "unpaired, both counted": (around(lambda a, b: student(2 * len(a) - 2) * unpaired(a, b)), PAIR),
        "sign": (
            around(lambda a, b: t_of(a) * error(a, b), lambda a, b: b - a),
            "this is b - a: the sign says who is better, so a - b is asked for",
        ),
        "first seed": (
            lambda a, b: (float(a[0] - b[0]),) * 3,
            "this is the first seed alone: one seed has a difference, but no interval",
        ),
        "extremes": (
            extremes,
            "these are the smallest and the largest difference: that is no interval of 95 %, it widens as seeds are"
            " added",
        ),
    },
)
def paired_interval(a: Numbers, b: Numbers) -> Three:
    """The mean of a - b over seeds, and the two ends of its 95 % interval."""
    return around(lambda a, b: t_of(a) * error(a, b))(a, b)


# -- 18.2 a verdict ----------------------------------------------------------------------------------------------------


def draw_case(rng: np.random.Generator) -> Draw:
    """An interval somewhere about a band, and the number below which it speaks against the claim."""
    against = float(rng.choice([-1, 1]) * rng.uniform(0.5, 1))
    low = against + float(rng.uniform(0.5, 1))
    high = low + float(rng.uniform(0.5, 1)) if rng.random() < 0.7 else math.inf
    mean = float(rng.uniform(against - 1.5, low + 2))
    half = float(rng.uniform(0.05, 1.5))
    return Draw(None, interval=(mean, mean - half, mean + half), band=(low, high), against=against)


def mean_held(interval: Three, band: tuple[float, float]) -> bool:
    """Does the mean lie in the band?"""
    return band[0] <= interval[0] <= band[1]


def decided(
    held: Callable[..., bool], against_it: Callable[..., bool], otherwise: str = NOT_HERE, first: str = REPRODUCED
) -> Callable[..., str]:
    """A verdict from two questions; where both say yes, `first` has it."""

    def answer(interval: Three, band: tuple[float, float], against: float) -> str:
        yes = {REPRODUCED: held(interval, band, against), CONTRADICTED: against_it(interval, band, against)}
        if yes[first]:
            return first
        return next((verdict for verdict in yes if yes[verdict]), otherwise)

    return answer


def held(i: Three, band: tuple[float, float], against: float) -> bool:
    """What makes a claim reproduced."""
    return mean_held(i, band) and i[1] >= against


def whole_against(i: Three, band: tuple[float, float], against: float) -> bool:
    """What makes it contradicted."""
    return i[2] < against


VERDICT_MISTAKES: Mistakes = {
    "mean alone": (
        decided(lambda i, band, against: mean_held(i, band), lambda i, band, against: i[0] < against),
        "only the mean is asked: where the interval reaches what speaks against the claim, chance could have done it",
    ),
    "held by the mean": (
        decided(lambda i, band, against: mean_held(i, band), whole_against),
        "reproduced by the mean alone: the interval must not reach below `against`, however good the mean is",
    ),
    "against by the mean": (
        decided(held, lambda i, band, against: i[0] < against),
        "contradicted by the mean alone: the whole interval must lie below `against`, its high end, too",
    ),
    "against by the low end": (
        decided(held, lambda i, band, against: i[1] < against),
        "contradicted as soon as the interval reaches below `against`: all of it must lie there, its high end, too",
    ),
    "no third": (
        decided(held, whole_against, otherwise=CONTRADICTED),
        "what is not reproduced is not contradicted yet: too few seeds, or a small effect, is `not at this size`",
    ),
    "outside the band": (
        decided(held, lambda i, band, against: not mean_held(i, band)),
        "a mean outside the band is called contradicted: between band and `against` lies what decides nothing",
    ),
    "whole interval in the band": (
        decided(lambda i, band, against: i[1] >= band[0] and i[2] <= band[1], whole_against),
        "too strict: the mean must lie in the band, and the interval must stay out of `against`, not inside the band",
    ),
    "touches the band": (
        decided(lambda i, band, against: i[2] >= band[0] and i[1] <= band[1] and i[1] >= against, whole_against),
        "too kind: an interval that touches the band is not enough, its mean must lie in it",
    ),
    "no upper end": (
        decided(lambda i, band, against: i[0] >= band[0] and i[1] >= against, whole_against),
        "the band has two ends: a mean above the upper one is not what the claim says either",
    ),
    "zero": (
        decided(lambda i, band, against: mean_held(i, band) and i[1] >= 0, lambda i, band, against: i[2] < 0),
        "zero stands where `against` belongs: which numbers speak against a claim depends on the claim",
    ),
}


def judge_verdict(answer: Callable[..., Any], drawn: Draw, rng: np.random.Generator) -> None:
    """The right one of three, for a hundred intervals; whoever errs as a known mistake does gets its line."""
    cases = [drawn, *(draw_case(rng) for _ in range(99))]
    said = [answer(**case) for case in cases]
    for one in said:
        if one not in (REPRODUCED, NOT_HERE, CONTRADICTED):
            raise Wrong(f"{one!r} is no verdict: there are {REPRODUCED!r}, {NOT_HERE!r} and {CONTRADICTED!r}")
    right = [verdict(**case) for case in cases]
    if said == right:
        return
    for function, line in VERDICT_MISTAKES.values():
        if said == [function(**case) for case in cases]:
            raise Wrong(line)
    case, got, want = next((c, a, b) for c, a, b in zip(cases, said, right, strict=True) if a != b)
    mean, low, high = case["interval"]
    raise Wrong(
        f"mean {mean:.2f}, interval {low:.2f} to {high:.2f}, band {case['band'][0]:.2f} to {case['band'][1]:.2f},"
        f" against below {case['against']:.2f}: you say {got!r}, it is {want!r}"
    )


@exercise(
    "18.2",
    draw=draw_case,
    returns="the verdict",
    judge=judge_verdict,
    decisive=["if band[0] <= mean <= band[1] and low >= against:"],
    mistakes=VERDICT_MISTAKES,
)
def verdict(interval: Three, band: tuple[float, float], against: float) -> str:
    """What an interval says about a band."""
    return decided(held, whole_against)(interval, band, against)


# -- 18.3 a claim of one's own -----------------------------------------------------------------------------------------


def interval_of(differences: Numbers) -> Three:
    """Of one seed, the point."""
    if len(differences) == 1:
        return (float(differences[0]),) * 3
    return paired_interval(differences, np.zeros(len(differences)))


def judged_by(function: Callable[..., str]) -> Callable[..., str]:
    """The verdict of one of the functions of 18.2."""
    return lambda found, low, against: function(interval_of(found), (low, math.inf), against)


JUDGED = judged_by(verdict)


def by_the_normal(found: Numbers, low: float, against: float) -> str:
    """The verdict from 1.96 standard errors."""
    return verdict(around(lambda a, b: 1.96 * error(a, b))(found, 0 * found), (low, math.inf), against)


def own(
    measure: Callable[..., Numbers] = TUNED,
    band: Callable[[Numbers, float], tuple[float, float]] = lambda found, claimed: (claimed, 0.0),
    judged: Callable[..., str] = JUDGED,
) -> Callable[..., tuple[tuple[float, float], Numbers, str]]:
    """A claim with another measurement, band or verdict."""

    def answer(run: Any, rates: Any, seeds: Any, claimed: float) -> tuple[tuple[float, float], Numbers, str]:
        found = measure(run, rates, seeds)
        fixed = band(found, claimed)
        return fixed, found, judged(found, *fixed)

    return answer


def observed(result: Any, arguments: dict[str, Any]) -> Any:
    """Pairs and lists of numbers as they are compared, whatever kind they come as."""
    if not isinstance(result, (tuple, list)) or len(result) != 3:
        return result
    band, found, said = result
    try:
        return tuple(float(end) for end in band), np.array(found, float), said
    except (TypeError, ValueError):
        return result


MOVED = "the band was moved after the numbers were seen: it comes from the sentence alone, (claimed, 0)"


@exercise(
    "18.3",
    draw=WORLDS,
    returns="band, differences (n), verdict",
    observe=observed,
    decisive=["return min(rates, key=lambda lr: np.mean("],
    mistakes={
        "one seed": (
            own(lambda run, rates, seeds: TUNED(run, rates, seeds[:1])),
            "one seed only: it has no interval, and chance may have chosen it; take every seed you are given",
        ),
        "untuned baseline": (
            own(at(lambda run, rates, seeds: both_tuned(run, rates, seeds) | {"old": rates[0]})),
            "the baseline is untuned: `old` runs at the first rate of the list, `new` at its best; tune both alike",
        ),
        "none tuned": (
            own(at(lambda run, rates, seeds: {"old": rates[0], "new": rates[0]})),
            "both run at the first rate of the list, and none is tuned: whoever happens to like that rate wins",
        ),
        "the other's rate": (
            own(at(lambda run, rates, seeds: dict.fromkeys(("old", "new"), tuned(run, rates, seeds, "new")))),
            "the baseline runs at the rate that is best for `new`: a rate that suits one need not suit the other",
        ),
        "the baseline's rate": (
            own(at(lambda run, rates, seeds: dict.fromkeys(("old", "new"), tuned(run, rates, seeds, "old")))),
            "`new` runs at the baseline's best rate: unfair to the new one is unfair, too; tune both alike",
        ),
        "tuned on the test": (
            own(at(lambda run, rates, seeds: {m: tuned(run, rates, seeds, m, "test") for m in ("old", "new")})),
            "the rate was chosen on the test set: then the test has been trained on; choose on validation",
        ),
        "measured on validation": (
            own(at(both_tuned, "validation")),
            "measured where the rate was chosen: the best of several looks better than it is; measure on the test",
        ),
        "rate of one seed": (
            own(at(lambda run, rates, seeds: both_tuned(run, rates, seeds[:1]))),
            "the rate was chosen on the first seed alone: take the mean over all seeds",
        ),
        "rate per seed": (
            own(rate_per_seed),
            "each seed has a rate of its own: one rate per method, the best by the mean over all seeds",
        ),
        "best seed": (
            own(best_seed),
            "the best seed of each was compared: that measures luck, and rewards who tries more often",
        ),
        "a seed left out": (
            own(without_worst),
            "the seed that spoke against it was left out: a seed may go only for a reason fixed before the run",
        ),
        "sign": (
            own(lambda run, rates, seeds: -TUNED(run, rates, seeds)),
            "the difference is new - old: losses are better when lower, so old - new says by how much new is ahead",
        ),
        "band at the mean": (own(band=lambda found, claimed: (min(claimed, float(found.mean())), 0.0)), MOVED),
        "band around the numbers": (own(band=lambda found, claimed: interval_of(found)[:2]), MOVED),
        "band at half": (
            own(band=lambda found, claimed: (claimed / 2, 0.0)),
            "the band is easier than the sentence: it says `at least claimed`, so the band begins there",
        ),
        "no gap": (
            own(band=lambda found, claimed: (claimed, claimed)),
            "all below `claimed` is called against it: a smaller gain than promised is no contradiction, a loss is",
        ),
        "normal": (
            own(judged=by_the_normal),
            "the verdict comes from 1.96 standard errors: with so few seeds take your paired_interval",
        ),
        "mean alone": (
            own(judged=judged_by(VERDICT_MISTAKES["mean alone"][0])),
            "the verdict comes from the mean alone: ask where the interval ends, with your verdict of 18.2",
        ),
        "no third": (
            own(judged=judged_by(VERDICT_MISTAKES["no third"][0])),
            "there are three verdicts: what these seeds cannot decide is `not at this size`",
        ),
    },
)
def my_claim(run: Any, rates: Any, seeds: Any, claimed: float) -> tuple[tuple[float, float], Numbers, str]:
    """The band, the differences over seeds with each method at its own best rate, and the verdict."""
    return own()(run, rates, seeds, claimed)
