"""A claim of a paper: the band that was fixed for it before the run, and the verdict that the numbers give.

A file minilora/claims/NAME.py holds one claim, and three names:

    CLAIM = Claim(...)              # the sentence of the paper with its place, what is run here, the band
    def run(setting): ...           # numbers that JSON can hold; "measured" has one number per seed
    def picture(numbers): ...       # a figure of them

`minilora reproduce` finds every such file. The verdict depends on `measured` and the band alone.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..measure.statistics import Interval, student
from ..pages.template import TEMPLATES
from ..pages.text import counted
from .trials import has_failed, run_trials
from .tuned import tuned

CLAIMS = "minilora.claims"  # the package whose files are the claims; they are found by listing it


class Verdict(StrEnum):
    """What a run says about a claim."""

    REPRODUCED = "reproduced"
    NOT_HERE = "not at this size"
    CONTRADICTED = "contradicted"


@dataclass(frozen=True)
class Band:
    """What must be measured for the claim to hold, and what speaks against it: fixed before the run, never after.

    quantity: what the number is, with its unit.
    low, high: the claim holds between them.
    against_below, against_above: numbers beyond speak against it. In between, neither is the case.
    """

    quantity: str
    low: float = -math.inf
    high: float = math.inf
    against_below: float = -math.inf
    against_above: float = math.inf

    def __post_init__(self):
        if not self.against_below <= self.low <= self.high <= self.against_above:
            raise ValueError(f"a band is against_below <= low <= high <= against_above, got {self}")

    def verdict(self, interval: Interval) -> Verdict:
        """Reproduced: the mean is inside, and the interval does not reach what speaks against the claim. Contradicted:
        the whole interval speaks against it. Otherwise: not at this size.

        >>> Band("loss", low=2, against_below=1).verdict(Interval.of([2.5, 2.6, 2.7]))
        <Verdict.REPRODUCED: 'reproduced'>
        """
        if interval.high < self.against_below or interval.low > self.against_above:
            return Verdict.CONTRADICTED
        passed = self.passed(interval.mean, interval.low, interval.high)
        return Verdict.REPRODUCED if passed else Verdict.NOT_HERE

    def passed(self, mean: Any, low: Any, high: Any) -> Any:
        """Whether a run with this mean and this interval is called reproduced; for arrays, each."""
        inside = (self.low <= mean) & (mean <= self.high)
        return inside & (self.against_below <= low) & (high <= self.against_above)

    def of(self, quantity: str) -> Band:
        """The same limits for another quantity."""
        return replace(self, quantity=quantity)

    def __str__(self) -> str:
        """In words: what holds, and what speaks against it."""
        ends = {"below": self.against_below, "above": self.against_above}
        against = [f"{side} {end:g}" for side, end in ends.items() if math.isfinite(end)]
        if math.isinf(self.low) or math.isinf(self.high):
            held = f"at most {self.high:g}" if math.isinf(self.low) else f"at least {self.low:g}"
        else:
            held = f"{self.low:g} to {self.high:g}"
        return f"{held}; against it: {' or '.join(against)}" if against else held


@dataclass(frozen=True)
class Effect:
    """What a band has to tell apart, in its unit, for the power of the band.

    paper: what the paper's statement would be measured as here.
    none: what is measured where the statement is wrong, as with the effect switched off.
    std: the standard deviation between seeds, measured in a pilot, or in the run on the page; 0 of what is exact.
    short: why the band does not reach 5 and 80 %, where it does not.
    assumed: the paper's statement has no number that could be measured here, and `paper` is one that would bear it out.
    """

    paper: float
    none: float
    std: float
    short: str = ""
    assumed: bool = False

    def power(self, band: Band, seeds: int, runs: int = 4000) -> tuple[float, float]:
        """The shares of simulated runs that the band calls reproduced: without the effect, and with the paper's.

        A run is `seeds` draws from a normal distribution. One draw has no interval.
        """
        draws = np.random.default_rng(0).standard_normal((runs, seeds)) * self.std
        half = student(seeds - 1) * draws.std(axis=1, ddof=1) / math.sqrt(seeds) if seeds > 1 else np.zeros(runs)
        means = [draws.mean(axis=1) + effect for effect in (self.none, self.paper)]
        none, paper = (float(np.mean(band.passed(mean, mean - half, mean + half))) for mean in means)
        return none, paper

    def told(self, band: Band, seeds: int) -> str:
        """The power in a sentence."""
        none, paper = self.power(band, seeds)
        one = f"one of {self.paper:g}, as the paper has no number," if self.assumed else f"the paper's ({self.paper:g})"
        found = (
            f"Its power, simulated with {counted(seeds, 'seed')} and a standard deviation between seeds of"
            f" {self.std:g}: without an effect ({self.none:g}) {100 * none:.0f} % of runs pass, with {one}"
            f" {100 * paper:.0f} %."
        )
        return f"{found} {self.short}".strip()


# What the vague words of introductions to LoRA mean here, as shares of full fine-tuning's number.
FEW = Band("very few, small", high=1 / 10, against_above=1 / 2)
LOW = Band("low, fast, cheap", high=1 / 3, against_above=9 / 10)  # nobody would say so of more than nine tenths
SPARED = Band("forgotten", high=1 / 2, against_above=9 / 10)
SLIGHT = Band("slightly behind", low=0.95, against_below=0.8)  # by a twentieth of the gain


@dataclass(frozen=True)
class Setting:
    """How a claim is run.

    small: in seconds, with matrices or the tiny base, for a test.
    switched: with the effect switched off.
    seeds: one measured number for each.
    jobs: trials at a time; as many as there are cores if None.
    folder: where results are kept; nowhere if None.
    base: that of the form, for a claim that also has one on SmolLM2, which is never switched.
    """

    small: bool = False
    switched: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    jobs: int | None = None
    folder: Path | None = None
    base: str = "tiny"

    @property
    def on_smollm2(self) -> bool:
        """Whether a claim on the tiny base is to run its second form."""
        return self.base == "smollm2"

    def attempt(self, function: Callable[..., Any], trials: Sequence[dict[str, Any]]) -> list[Any]:
        """function(**trial) for each trial, in order, or {"failed": why}.

        function: at the top level of its file; it takes and returns what JSON can hold. A small run calls it in this
        process; any other has `jobs` trials at a time and keeps their results in `folder`.
        """
        return run_trials(function, trials, 1 if self.small else self.jobs, folder=None if self.small else self.folder)

    def each(self, function: Callable[..., Any], trials: Sequence[dict[str, Any]]) -> list[Any]:
        """The same. Raises RuntimeError if a trial fails."""
        results = self.attempt(function, trials)
        for trial, result in zip(trials, results, strict=True):
            if has_failed(result):
                words = ", ".join(f"{key}={value}" for key, value in trial.items())
                raise RuntimeError(f"{function.__name__}({words}): {result['failed']}")
        return results

    def tuned(
        self, function: Callable[..., Any], contenders: Mapping[str, Mapping[str, Any]], walk: bool = True, **more: Any
    ) -> dict[str, dict[str, Any]]:
        """`tuned` of the contenders, each run with all seeds; a small run takes each where its search would begin."""
        return tuned(self.attempt, function, contenders, self.seeds, walk=walk and not self.small, **more)


@dataclass(frozen=True)
class OnSmolLM2:
    """The second form of a claim on the tiny base: what is different on SmolLM2. The fields are those of `Claim`.

    minutes: of one core, where the claims before it in the alphabet have run: the runs that they share are kept.
    band: that of the claim if None; fixed before the run as well.
    """

    here: str
    minutes: float
    band: Band | None = None
    explained: Mapping[str, str] = field(default_factory=dict)
    effect: Effect | None = None
    shares_with: str = ""


@dataclass(frozen=True)
class Claim:
    """What a paper says, and how it is tried here.

    source, where: the paper, with its number; section, table or page.
    says: its statement in our words, with its exact numbers.
    here: what is run.
    switch: the same experiment without the cause, so that the verdict must turn.
    base: "matrices", "tiny" or "smollm2".
    minutes: of one core, where the claims before it in the alphabet have run: the runs that they share are kept.
    shares_with: the claim before it in the alphabet whose form on the same base has runs that this one uses as well.
        Where they are not kept, it takes up to the minutes of that form more.
    band: of `measured`. small_band: of the small form, if that needs its own.
    second_hand: the paper itself could not be read.
    explained: by verdict, a paragraph: the reason for what is not reproduced, a caveat for what is.
    effect: what the band has to tell apart. The page shows how often the band would pass with it and without it.
    one_rate: why contenders share a learning rate, where they do. Otherwise `tuned` finds each one's best.
    on_smollm2: a second form, for a statement about pretrained models that runs on the tiny base. Each form has its own
        verdict.
    """

    source: str
    where: str
    says: str
    here: str
    switch: str
    base: str
    minutes: float
    band: Band
    seeds: tuple[int, ...] = (0, 1, 2)
    second_hand: bool = False
    explained: Mapping[str, str] = field(default_factory=dict)
    small_band: Band | None = None
    effect: Effect | None = None
    one_rate: str = ""
    on_smollm2: OnSmolLM2 | None = None
    shares_with: str = ""

    @property
    def forms(self) -> list[Claim]:
        """This claim, and its form on SmolLM2 as a claim of the same kind, where it has one."""
        if (other := self.on_smollm2) is None:
            return [self]
        band, explained = other.band or self.band, other.explained
        own = replace(self, base="smollm2", here=other.here, minutes=other.minutes, band=band, explained=explained)
        return [self, replace(own, effect=other.effect, on_smollm2=None, shares_with=other.shares_with)]

    def form_on(self, base: str) -> Claim:
        """The form on this base. Raises ValueError where there is none."""
        if (found := next((form for form in self.forms if form.base == base), None)) is None:
            raise ValueError(f"no form of this claim is on {base}")
        return found

    def verdict(self, numbers: Mapping[str, Any], small: bool = False) -> Verdict:
        """What these numbers of `run` say about the claim."""
        return self.band_of(small).verdict(Interval.of(numbers["measured"]))

    def band_of(self, small: bool = False) -> Band:
        """The band of the form that is run."""
        return self.small_band if small and self.small_band else self.band


class ClaimFile(Protocol):
    """What a file in minilora/claims/ holds."""

    CLAIM: Claim

    def run(self, setting: Setting) -> dict[str, Any]:
        """Measure: {"measured": [one number per seed], ...}, all of it fit for JSON."""

    def picture(self, numbers: dict[str, Any]) -> Any:
        """A matplotlib figure of what `run` returned."""


def write_new(name: str) -> Path:
    """Write the file of a new claim, with blanks to fill in. Raises ValueError for a name that is taken, or is none."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ValueError(f"expected a name in small letters, digits and dashes, such as rate-ten-times; got {name!r}")
    path = Path(importlib.import_module(CLAIMS).__path__[0]) / f"{name.replace('-', '_')}.py"
    if path.exists():
        raise ValueError(f"{path} is there already: choose another name, or fill in that file")
    path.write_text((TEMPLATES / "claim.py.txt").read_text("utf-8"), "utf-8")
    return path


def claim_names() -> list[str]:
    """The names of all claims, sorted: those of their files, with dashes. Files that begin with _ are no claims."""
    listed = pkgutil.iter_modules(importlib.import_module(CLAIMS).__path__)
    return sorted(found.name.replace("_", "-") for found in listed if not found.name.startswith("_"))


def read_claim(name: str) -> ClaimFile:
    """The claim of this name. Raises AttributeError where the file lacks one of the three names."""
    module: Any = importlib.import_module(f"{CLAIMS}.{name.replace('-', '_')}")
    if missing := [part for part in ("CLAIM", "run", "picture") if not hasattr(module, part)]:
        raise AttributeError(f"{module.__file__} lacks {missing[0]}: a claim's file has CLAIM, run and picture")
    return module
