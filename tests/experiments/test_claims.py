"""Every claim in minilora/claims: its file, its smallest form, and that it can fail."""

import functools
import json
import time
from pathlib import Path

import pytest

from minilora.experiments.claim import Setting, Verdict, claim_names, read_claim
from minilora.pages.style import save_themes

FOLDER = Path(read_claim("planted-rank").__file__).parent
BASES = {"matrices", "tiny", "smollm2"}
LINES = 93  # of a claim's file: a page
NAMES = claim_names()
each_claim = pytest.mark.parametrize("name", NAMES)


def test_every_file_is_found():
    files = {path.stem.replace("_", "-") for path in FOLDER.glob("*.py") if not path.name.startswith("_")}
    assert sorted(files) == NAMES and files


@each_claim
def test_a_claim_says_all_there_is_to_say_on_a_page(name):
    claim = read_claim(name).CLAIM
    for words in ("source", "where", "says", "here", "switch"):
        assert getattr(claim, words).strip(), words
    assert claim.base in BASES and claim.minutes > 0 and claim.seeds and claim.band.quantity
    assert set(claim.explained) <= set(Verdict) - {Verdict.REPRODUCED}
    assert "against it" in str(claim.band), "nothing could speak against it"
    assert len((FOLDER / f"{name.replace('-', '_')}.py").read_text("utf-8").splitlines()) <= LINES


def small(name, switched=False):
    """The numbers of the smallest form, as JSON keeps them."""
    claim = read_claim(name)
    numbers = claim.run(Setting(small=True, switched=switched, seeds=claim.CLAIM.seeds))
    return json.loads(json.dumps(numbers, allow_nan=False))


@functools.cache
def first(name):
    """The same, run once for all tests."""
    start = time.perf_counter()
    numbers = small(name)
    print(f"{name}: {time.perf_counter() - start:.1f} s, {numbers['measured']}")
    return numbers


@pytest.mark.claims
@each_claim
def test_its_smallest_form_has_a_verdict_and_a_picture(name, tmp_path):
    claim, numbers = read_claim(name), first(name)
    assert len(numbers["measured"]) == len(claim.CLAIM.seeds)
    assert claim.CLAIM.verdict(numbers, small=True) in Verdict
    for file in save_themes(lambda: claim.picture(numbers), tmp_path / "picture.png"):
        assert file.stat().st_size > 5000


@pytest.mark.slow
@each_claim
def test_its_smallest_form_gives_the_same_verdict_twice(name):
    verdict = read_claim(name).CLAIM.verdict
    assert verdict(small(name), small=True) == verdict(first(name), small=True)


@pytest.mark.claims
@each_claim
def test_with_the_effect_switched_off_the_verdict_turns(name):
    verdict = read_claim(name).CLAIM.verdict
    on, off = verdict(first(name), small=True), verdict(small(name, switched=True), small=True)
    assert off != on, f"{on} either way"
