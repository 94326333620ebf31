"""Bands and verdicts, by numbers known by hand; and that claims are found."""

import math

import numpy as np
import pytest

from minilora.experiments import claim as claims
from minilora.experiments.claim import Band, Claim, Effect, OnSmolLM2, Setting, Verdict, read_claim
from minilora.measure.statistics import Interval

UP = Band("ratio", low=2, against_below=1)
BETWEEN = Band("share", low=-1, high=1, against_below=-2, against_above=2)


@pytest.mark.parametrize(
    ("band", "mean", "low", "high", "verdict"),
    [
        (UP, 3, 2.5, 3.5, Verdict.REPRODUCED),
        (UP, 2, 1, 3, Verdict.REPRODUCED),  # both ends belong to the band
        (BETWEEN, 0.5, -1.9, 2.1, Verdict.NOT_HERE),  # an end that speaks against it
        (BETWEEN, 0.5, -2.1, 1.9, Verdict.NOT_HERE),
        (UP, 3, 0.9, 5.1, Verdict.NOT_HERE),  # too wide to tell
        (UP, 1.5, 1.4, 1.6, Verdict.NOT_HERE),
        (UP, 0.5, 0.1, 0.9, Verdict.CONTRADICTED),
        (UP, 0.5, -0.5, 1.5, Verdict.NOT_HERE),
        (BETWEEN, 0, -1.5, 1.5, Verdict.REPRODUCED),
        (BETWEEN, 0, -2.5, 2.5, Verdict.NOT_HERE),
        (BETWEEN, -3, -3.5, -2.5, Verdict.CONTRADICTED),
        (BETWEEN, 3, 2.5, 3.5, Verdict.CONTRADICTED),
        (BETWEEN, 1.5, 1.4, 1.6, Verdict.NOT_HERE),
        (BETWEEN, 0, -2, 2, Verdict.REPRODUCED),  # an interval may reach what speaks against the claim, and not beyond
        (Band("anything", low=0), -9, -10, -8, Verdict.NOT_HERE),  # nothing speaks against it
    ],
)
def test_verdicts(band, mean, low, high, verdict):
    assert band.verdict(Interval(mean, low, high, 3)) == verdict


@pytest.mark.parametrize(
    "ends", [dict(low=2, high=1), dict(low=0, against_below=1), dict(high=0, against_above=-1), dict(low=math.nan)]
)
def test_a_band_whose_ends_are_in_no_order_is_refused(ends):
    with pytest.raises(ValueError, match="a band is"):
        Band("x", **ends)


def test_bands_in_words():
    assert str(UP) == "at least 2; against it: below 1"
    assert str(BETWEEN) == "-1 to 1; against it: below -2 or above 2"
    assert str(Band("x", high=0.5)) == "at most 0.5"


def test_a_form_on_smollm2_is_a_claim_with_the_band_of_the_first_form_or_its_own():
    told = dict(source="S", where="", says="", here="tiny", switch="", base="tiny", minutes=1, band=UP, seeds=(4, 5))
    told |= dict(explained={"reproduced": "tiny"}, effect=Effect(2, 1, 0.1))
    assert [form.here for form in Claim(**told).forms] == ["tiny"]
    first, second = Claim(**told, on_smollm2=OnSmolLM2("larger", 9)).forms
    assert (first.base, first.minutes, first.explained) == ("tiny", 1, {"reproduced": "tiny"})
    assert (second.base, second.here, second.minutes, second.explained) == ("smollm2", "larger", 9, {})
    assert (second.source, second.band, second.seeds) == ("S", UP, (4, 5))
    assert second.effect is None and second.forms == [second]  # the standard deviation was measured on the tiny base
    other = Claim(**told, on_smollm2=OnSmolLM2("larger", 9, BETWEEN, {"reproduced": "why"}))
    assert [form.band for form in other.forms] == [UP, BETWEEN] and other.forms[1].explained == {"reproduced": "why"}
    assert [form.verdict({"measured": [0.5]}) for form in other.forms] == [Verdict.CONTRADICTED, Verdict.REPRODUCED]


def test_a_claim_in_small_has_its_own_band_where_it_needs_one():
    told = dict(source="", where="", says="", here="", switch="", base="matrices", minutes=1, band=UP)
    numbers = {"measured": [1.5]}
    assert Claim(**told).verdict(numbers, small=True) == Verdict.NOT_HERE
    assert Claim(**told, small_band=Band("ratio", low=1)).verdict(numbers, small=True) == Verdict.REPRODUCED
    assert Claim(**told, small_band=Band("ratio", low=1)).verdict(numbers) == Verdict.NOT_HERE


def test_power_is_the_share_of_simulated_runs_that_pass():
    band = Band("x", low=1, against_below=0)
    none, paper = Effect(paper=1, none=0, std=0.01).power(band, 3)
    assert none == 0 and paper == pytest.approx(0.5, abs=0.03)  # half of the means are below the band's end
    assert Effect(2, 0, 0.01).power(band, 3) == (0, 1)
    none, paper = Effect(paper=2, none=0, std=1).power(band, 1)  # one seed has no interval: Φ(-1) and Φ(1)
    assert none == pytest.approx(0.159, abs=0.02) and paper == pytest.approx(0.841, abs=0.02)
    wide = Effect(2, 0, 1.5).power(band, 2)[1]
    assert wide < 0.2 < 0.8 < Effect(2, 0, 1.5).power(band, 30)[1]  # two seeds: the interval reaches below zero


def test_what_a_run_passes_is_what_its_verdict_says():
    rng = np.random.default_rng(0)
    for band in (UP, BETWEEN):
        for mean, half in rng.uniform([-3, 0], [4, 2], (50, 2)):
            said = band.verdict(Interval(mean, mean - half, mean + half, 3)) == Verdict.REPRODUCED
            assert said == bool(band.passed(np.array([mean]), np.array([mean - half]), np.array([mean + half]))[0])


def test_a_simulated_run_is_judged_as_a_run_of_as_many_seeds():
    band, effect = Band("x", low=1, against_below=0), Effect(paper=1.2, none=0.3, std=0.7)
    draws = np.random.default_rng(0).standard_normal((200, 3)) * effect.std
    for at, share in zip((effect.none, effect.paper), effect.power(band, 3, runs=200), strict=True):
        passed = [band.verdict(Interval.of(draw + at)) == Verdict.REPRODUCED for draw in draws]
        assert share == np.mean(passed)


def test_power_in_words():
    told = Effect(paper=2, none=0, std=0.1).told(Band("x", low=1, against_below=0), 3)
    assert "3 seeds and a standard deviation between seeds of 0.1: without an effect (0) 0 % of runs pass" in told
    assert told.endswith("with the paper's (2) 100 %.")
    assert Effect(2, 0, 0.1, "Too few seeds.").told(UP, 3).endswith("%. Too few seeds.")
    told = Effect(2, 0, 0.1, assumed=True).told(Band("x", low=1, against_below=0), 3)
    assert told.endswith("with one of 2, as the paper has no number, 100 %.")


def root(x):
    if x < 0:
        raise ValueError("no root")
    return x**0.5


def test_each_gives_the_results_in_order_and_attempt_failures_as_well():
    setting = Setting(small=True)
    assert setting.each(root, [{"x": 9}, {"x": 1}, {"x": 4}]) == [3, 1, 2]
    assert setting.attempt(root, [{"x": 9}, {"x": -1}]) == [3, {"failed": "no root"}]
    with pytest.raises(RuntimeError, match=r"^root\(x=-1\): no root$"):
        setting.each(root, [{"x": 9}, {"x": -1}])


def test_a_small_run_keeps_nothing(tmp_path):
    Setting(small=True, folder=tmp_path).each(root, [{"x": 9}])
    assert list(tmp_path.iterdir()) == []
    Setting(jobs=1, folder=tmp_path).each(root, [{"x": 9}])
    assert len(list(tmp_path.iterdir())) == 1


def loss_of(lr, seed):
    return {"validation": abs(np.log10(lr)), "seed": seed}  # the best rate is 1


@pytest.mark.parametrize(("small", "walk", "lr"), [(False, True, 1), (False, False, 0.1), (True, True, 0.1)])
def test_a_claim_tunes_for_all_its_seeds_and_a_small_one_takes_the_first_rate(small, walk, lr):
    found = Setting(small=small, seeds=(4, 2), jobs=1).tuned(loss_of, {"one": {"lr": 0.1}}, walk)["one"]
    assert found["lr"] == pytest.approx(lr) and [run["seed"] for run in found["runs"]] == [4, 2]


def test_a_file_that_lacks_something_is_named(monkeypatch):
    monkeypatch.setattr(claims, "CLAIMS", "minilora.engine")
    monkeypatch.setattr(claims.importlib, "import_module", lambda name: claims)
    with pytest.raises(AttributeError, match=r"claim\.py lacks CLAIM"):
        read_claim("anything")
