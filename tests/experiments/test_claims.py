"""Every claim in minilora/claims: its file, its smallest form, and that it can fail."""

import ast
import functools
import json
import re
from pathlib import Path

import pytest

from minilora.experiments.claim import Setting, Verdict, claim_names, read_claim
from minilora.experiments.trials import run_trials
from minilora.pages.claims import COUNTS, counts, rows_of, sections_of
from minilora.pages.style import save_themes

FOLDER = Path(__file__).parents[2] / "minilora/claims"  # of the clone: an installed package has no page
BASES = {"matrices", "tiny", "smollm2"}
LINES = 97  # of a claim's file: a page
THREE = {"frozen-a", "lora-plus", "mlp-before-attention", "zero-b-start"}
NAMES = claim_names()
each_claim = pytest.mark.parametrize("name", NAMES)


def test_every_file_is_found():
    files = {path.stem.replace("_", "-") for path in FOLDER.glob("*.py") if not path.name.startswith("_")}
    assert sorted(files) == NAMES and files


@each_claim
def test_a_claim_says_all_there_is_to_say_on_a_page(name):
    claim = read_claim(name).CLAIM
    for words in ("source", "where", "says", "here", "switch"):
        told = getattr(claim, words)
        assert told.strip() and "TODO" not in told, f"fill in {words}: {told}"
    assert claim.base in BASES and claim.minutes > 0 and claim.seeds and claim.band.quantity
    assert set(claim.explained) <= set(Verdict)
    assert "against it" in str(claim.band), "nothing could speak against it"
    assert claim.on_smollm2 is None or claim.base == "tiny"
    for form in claim.forms[1:]:
        assert form.here.strip() and form.minutes > 0 and set(form.explained) <= set(Verdict)
        assert "against it" in str(form.band)
    text = (FOLDER / f"{name.replace('-', '_')}.py").read_text("utf-8")
    assert len(text.splitlines()) <= LINES or "Longer than a page: " in ast.get_docstring(ast.parse(text))


def test_the_page_has_every_claim_once_and_its_counts_and_those_of_readme_are_right():
    page, readme = (FOLDER / "README.md").read_text("utf-8"), (FOLDER.parents[1] / "README.md").read_text("utf-8")
    rows = rows_of(page)
    assert list(rows) == list(sections_of(page)) == NAMES, "minilora reproduce NAME --into minilora/claims adds one"
    assert page.count("\n| [") == page.count("\n## ") == len(NAMES)
    assert COUNTS.search(page)[0] == f"{counts(rows.values(), Verdict)}."
    for name, row in rows.items():
        assert row.split("**")[1] == re.search(r"^\*\*Verdict: (.*)\*\*", sections_of(page)[name], re.MULTILINE)[1]
        assert (FOLDER / f"pictures/{name}.png").is_file() and (FOLDER / f"pictures/{name}-dark.png").is_file()
    reproduced, not_here, contradicted = (sum(f"**{verdict}**" in row for row in rows.values()) for verdict in Verdict)
    said = (
        f"runs [{len(NAMES)} claims of papers about LoRA](minilora/claims/README.md), each with a band that was fixed"
    )
    found = f"{reproduced} were reproduced at this size, {not_here} were not, {contradicted} was contradicted"
    assert f"{said} before the run: {found}" in " ".join(readme.split()), found


@each_claim
def test_the_page_states_the_band_and_the_sentences_of_the_file(name):
    claim, page = read_claim(name).CLAIM, (FOLDER / "README.md").read_text("utf-8")
    section = sections_of(page).get(name)
    assert section, f"not on the page: minilora reproduce {name} --into minilora/claims"
    assert f"**Band**, {claim.band.quantity}: {claim.band}" in section, "the band is not the one of the run"
    assert f"seeds {', '.join(map(str, claim.seeds))}: " in section
    for words in (claim.says, claim.here, claim.switch):
        assert words in section, words
    verdict = rows_of(page)[name].split("**")[1]
    assert claim.explained.get(verdict, "") in section
    assert claim.effect and claim.effect.told(claim.band, len(claim.seeds)) in section


def test_a_claim_that_uses_the_runs_of_others_names_the_first_of_them():
    first, *others = (name for name in NAMES if hasattr(read_claim(name), "followed_on_smollm2"))
    assert others and not read_claim(first).CLAIM.form_on("smollm2").shares_with
    assert {read_claim(name).CLAIM.form_on("smollm2").shares_with for name in others} == {first}
    for name in NAMES:
        for form in read_claim(name).CLAIM.forms:
            if other := form.shares_with:
                assert other in NAMES and other < name, "the minutes count on it"
                assert read_claim(other).CLAIM.form_on(form.base).minutes


def test_the_page_has_the_forms_on_smollm2_of_all_claims_that_have_one():
    sections = sections_of((FOLDER / "README.md").read_text("utf-8"))
    shown = [name for name in NAMES if "**On SmolLM2**: " in sections.get(name, "")]
    for name in shown:
        form = read_claim(name).CLAIM.forms[1]
        told = sections[name].partition("**On SmolLM2**: ")[2]
        assert told.startswith(form.here) and f"seeds {', '.join(map(str, form.seeds))}: " in told
        verdict = told.split("**")[1]
        assert verdict in set(Verdict) and form.explained.get(verdict, "") in told
        assert form.effect and form.effect.told(form.band, len(form.seeds)) in told
        assert (FOLDER / f"pictures/{name}-smollm2.png").is_file()
        assert f"*{verdict}* |" in rows_of((FOLDER / "README.md").read_text("utf-8"))[name]
    assert not shown or shown == [name for name in NAMES if read_claim(name).CLAIM.on_smollm2]


@each_claim
def test_a_band_has_the_power_to_tell_the_papers_effect_from_none_or_says_that_it_has_not(name):
    for claim in read_claim(name).CLAIM.forms:
        effect = claim.effect
        assert effect, "which effect does the band tell from none?"
        none, paper = effect.power(claim.band, len(claim.seeds))
        reached = none <= 0.05 and paper >= 0.8
        assert reached != bool(effect.short), f"{none:.1%} without the effect, {paper:.1%} with it: {effect.short!r}"


TRAIN = ("tiny_run", "followed_run", "fit", "AdamW", "SGD", "train_matrix")  # what trains


@each_claim
def test_a_claim_that_trains_finds_each_contenders_best_rate_or_says_why_not(name):
    tree = ast.parse((FOLDER / f"{name.replace('-', '_')}.py").read_text("utf-8"))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if trained := used & set(TRAIN):
        used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        tuned = used & {"tuned", "best_rate"}
        assert tuned or read_claim(name).CLAIM.one_rate, f"{', '.join(trained)} at rates set by hand, without a reason"


def seeds_of(name):
    """The seeds of a smallest form: two, or three if two leave its interval so wide that no verdict turns."""
    return read_claim(name).CLAIM.seeds[: 3 if name in THREE else 2]


@functools.cache
def ran(function, trial):
    """What the function returns, as JSON, for the arguments `trial`, which are JSON, too."""
    return json.dumps(run_trials(function, [json.loads(trial)], jobs=1)[0])


class Once(Setting):
    """A trial that several claims need, or a claim and its switched form, is run once."""

    def attempt(self, function, trials):
        return [json.loads(ran(function, json.dumps(trial, sort_keys=True))) for trial in trials]


def small(name, setting=Once, **more):
    """The numbers of the smallest form, as JSON keeps them."""
    claim = read_claim(name)
    numbers = claim.run(setting(**{"small": True, "seeds": seeds_of(name)} | more))
    return json.loads(json.dumps(numbers, allow_nan=False))


@functools.cache
def first(name):
    """The same, once for all tests. What it measures is printed beside a test that fails."""
    print(f"{name}: {(numbers := small(name))['measured']}")
    return numbers


FORMS = [(name, 0) for name in NAMES] + [(name, 1) for name in NAMES if read_claim(name).CLAIM.on_smollm2]


@pytest.mark.claims
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_the_smallest_form_of_each_has_a_verdict_and_a_picture(name, form, tmp_path):
    claim = read_claim(name)
    seeds, numbers = ((0,), small(name, seeds=(0,), base="smollm2")) if form else (seeds_of(name), first(name))
    assert len(numbers["measured"]) == len(seeds)
    assert claim.CLAIM.forms[form].verdict(numbers, small=not form) in Verdict
    for file in save_themes(lambda: claim.picture(numbers), tmp_path / "picture.png"):
        assert file.stat().st_size > 5000


@pytest.mark.slow
@each_claim
def test_its_smallest_form_gives_the_same_verdict_twice(name):
    verdict = read_claim(name).CLAIM.verdict
    assert verdict(small(name, Setting), small=True) == verdict(first(name), small=True)


@pytest.mark.claims
@each_claim
def test_with_the_effect_switched_off_the_verdict_turns(name):
    verdict = read_claim(name).CLAIM.verdict
    on, off = first(name), small(name, switched=True)
    found = f"{on['measured']} with the effect and {off['measured']} without it"
    assert verdict(off, small=True) != verdict(on, small=True), (
        f"{verdict(on, small=True)} either way (with three seeds, too?): {found}"
    )
