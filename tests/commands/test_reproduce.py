"""`minilora reproduce`: what is run and what is read, what a page says, and what happens when a claim breaks."""

import json
import sys

import pytest
from commandline import complaint, status
from hearing import counts_of

from minilora.commands import reproduce as reproducing
from minilora.commands.reproduce import ReproduceOptions, chosen, failures, listing, page, summary, write_page
from minilora.commands.reproduce import reproduce as run
from minilora.experiments import claim as claims
from minilora.experiments import memo, trials
from minilora.pages.claims import rows_of, sections_of

GOOD = '''"""Exact: twice a number is more than once."""

from minilora.experiments.claim import Band, Claim

CLAIM = Claim(
    source="Euclid", where="Elements, book 5", says="Twice is more.", here="Multiplied.", switch="Halved.",
    base="matrices", minutes=0.1, band=Band("factor", low=1.5, against_below=1), explained={"contradicted": "By half."},
)


def double(seed, half):
    with open(f"{seed}.ran", "a") as file:
        file.write("x")
    return (0.5 if half else 2.0) + 0.01 * seed


def run(setting):
    factors = setting.each(double, [dict(seed=seed, half=setting.switched) for seed in setting.seeds])
    return {"measured": factors, "more": {"largest": max(factors)}}


def picture(numbers):
    from minilora.pages.style import panels

    figure, axes = panels()
    axes.plot(numbers["measured"])
    return figure
'''


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A package with two claims, `good` and `also-good`, instead of minilora's, and a folder to be in."""
    package = tmp_path / "shelf" / f"claims_{tmp_path.name}"
    package.mkdir(parents=True)
    for name in ("__init__", "good", "also_good"):
        (package / f"{name}.py").write_text("" if name == "__init__" else GOOD, encoding="utf-8")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(claims, "CLAIMS", package.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MINILORA_TRACEBACK", raising=False)
    for module in (reproducing, trials):  # a process reads each file once; those of the shelf change under it
        monkeypatch.setattr(module, "code_sha256", lambda file: memo._code.__wrapped__(file)[0])
    return package


def rewritten(shelf, name, old, new):
    """Change a claim's file, as an editor does between two runs."""
    path = shelf / f"{name}.py"
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    for module in [module for module in sys.modules if module.startswith(shelf.name)]:
        del sys.modules[module]
    for cache in shelf.rglob("*.pyc"):
        cache.unlink()


# the same with a form on SmolLM2, where the factor is the negative of that on matrices
BOTH = GOOD.replace("Band, Claim", "Band, Claim, OnSmolLM2").replace(
    'explained=', 'on_smollm2=OnSmolLM2(here="Larger.", minutes=2, explained={"contradicted": "By size."}), explained='
).replace("def double(seed, half):", "def double(seed, half, sign=1):").replace(
    "    return (0.5", "    return sign * (0.5").replace(
    "half=setting.switched)", "half=setting.switched, sign=-1 if setting.on_smollm2 else 1)"
)  # fmt: skip
SERIAL = ReproduceOptions(jobs=1)


def runs(folder):
    """How often the trial of seed 0 has run."""
    path = folder / "0.ran"
    return len(path.read_text()) if path.exists() else 0


def test_a_claim_is_run_and_judged_and_the_second_time_it_is_read(shelf, tmp_path):
    with counts_of("s") as counted:
        first = run(["good"], SERIAL)
    assert sum(counted) == round(60 * claims.read_claim("good").CLAIM.minutes)
    found = first["claims"]["good"]
    assert found["verdict"] == "reproduced" and found["interval"]["mean"] == pytest.approx(2.01)
    assert found["numbers"]["more"]["largest"] == 2.02 and runs(tmp_path) == 1
    assert json.loads((tmp_path / "runs/claims/claims.json").read_text())["claims"]["good"] == found
    assert run(["good"], SERIAL)["claims"] == first["claims"] and runs(tmp_path) == 1


@pytest.mark.parametrize(
    ("old", "new", "again"),
    [
        ("0.01 * seed", "0.02 * seed", 1),  # another trial
        ("Twice is more.", "More.", 0),
        ("figure, axes = panels()", "figure, axes = panels(height=4)", 0),
        ('"""Exact: ', '"""Exactly: ', 0),
    ],
)
def test_what_decides_no_number_may_change_without_a_run(shelf, tmp_path, old, new, again):
    run(["good"], SERIAL)
    rewritten(shelf, "good", old, new)
    run(["good"], SERIAL)
    assert runs(tmp_path) == 1 + again


def test_a_verdict_is_that_of_the_band_as_it_stands(shelf):
    assert run(["good"], SERIAL)["claims"]["good"]["verdict"] == "reproduced"
    rewritten(shelf, "good", "low=1.5, against_below=1", "low=9, against_below=8")
    found = run(["good"], SERIAL)["claims"]["good"]
    assert (found["verdict"], found["explained"]) == ("contradicted", "By half.")


def test_other_seeds_and_the_other_form_are_other_runs(shelf, tmp_path):
    run(["good"], SERIAL)
    found = run(["good"], ReproduceOptions(jobs=1, seeds=[0, 5]))["claims"]["good"]
    assert found["seeds"] == [0, 5] and found["interval"]["n"] == 2
    turned = run(["good"], ReproduceOptions(jobs=1, switched=True))["claims"]["good"]
    assert (turned["verdict"], turned["explained"]) == ("contradicted", "")  # its reason is that of the whole claim
    setting = ReproduceOptions(jobs=3, seeds=[0, 5]).setting(claims.read_claim("good").CLAIM)
    assert ReproduceOptions().setting(claims.read_claim("good").CLAIM).jobs is None  # one for each core
    assert (setting.jobs, setting.seeds) == (3, (0, 5)) and (tmp_path / "runs/claims-switched/claims.json").is_file()


def test_switched_off_the_page_says_whether_the_verdict_turned(shelf, tmp_path, capsys, quick_pictures):
    rewritten(shelf, "also_good", "0.5 if half else 2.0", "2.0")
    assert status("reproduce", "--jobs=1", "--switched", "--seeds", "0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["also-good", "reproduced", "2", "(did", "not", "turn,", "though", "it", "must:",
                                "this", "experiment", "does", "not", "show", "the", "effect)"]  # fmt: skip
    assert lines[1].endswith("contradicted      0.5  (turned, as it must: reproduced with the effect on)")
    text = (tmp_path / "runs/claims-switched/README.md").read_text("utf-8")
    assert "1 of 2 verdicts turned" in text and "**Verdict: contradicted** (turned, as it must" in text
    assert "By half." not in text and "not known" not in text  # reasons are for the effect as it is
    assert runs(tmp_path) == 4  # each form of each claim
    found = json.loads((tmp_path / "runs/claims-switched/claims.json").read_text())["claims"]
    assert [(one["on"], one["turned"]) for one in found.values()] == [("reproduced", False), ("reproduced", True)]
    assert status("reproduce", "--jobs=1", "--seeds", "0") == 0 and runs(tmp_path) == 4
    assert "turn" not in capsys.readouterr().out


@pytest.mark.parametrize("number", ["float('nan')", "float('inf')"])
def test_a_claim_with_a_number_that_is_none_is_a_failed_one(shelf, number, tmp_path):
    rewritten(shelf, "good", '"more": {"largest": max(factors)}', f'"more": {{"largest": {number}}}')
    found = run(["good"], ReproduceOptions(jobs=1, seeds=[0]))["claims"]["good"]
    assert found["failed"].startswith("expected finite numbers") and "verdict" not in found
    assert json.loads((tmp_path / "runs/claims/claims.json").read_text())["claims"]["good"]["failed"]
    rewritten(shelf, "good", '{"measured": factors', f'{{"measured": [{number}]')
    assert "finite numbers" in run(["good"], ReproduceOptions(jobs=1, seeds=[0]))["claims"]["good"]["failed"]


def test_what_could_not_be_judged_is_not_kept(shelf, tmp_path):
    rewritten(shelf, "good", '{"measured": factors', '{"measured": []')
    assert "finite numbers" in run(["good"], SERIAL)["claims"]["good"]["failed"]
    assert list((tmp_path / "runs/claims/cache").glob("good-*.json")) == []


def test_a_claim_from_second_hand_says_so_and_two_seeds_have_an_interval(shelf):
    rewritten(shelf, "good", 'base="matrices"', 'base="matrices", second_hand=True')
    result = run([], ReproduceOptions(jobs=1, seeds=[0, 5]))
    text = page(result, {})
    assert text.count("(second-hand)") == text.count("Second-hand: ") == 1
    assert text.index("## also-good") < text.index("## good") < text.index("Second-hand: ")
    assert "| Euclid, Elements, book 5 (second-hand) |" in text and "mean 2.025 [1.707, 2.343]" in text
    assert "reproduced        2.025 [1.707, 2.343]" in summary(result)


def test_what_is_not_reproduced_is_explained(shelf):
    rewritten(shelf, "good", "low=1.5, against_below=1", "low=9, against_below=8")
    rewritten(shelf, "also_good", "low=1.5, against_below=1", "low=9")
    rewritten(shelf, "also_good", '"Euclid"', '"Euclid | Elements"')
    text = page(run([], SERIAL), {})
    assert r"| Euclid \| Elements, Elements, book 5 |" in text  # a column is not divided
    assert "**Verdict: contradicted**\n\nBy half." in text
    assert "**Verdict: not at this size**\n\nThe reason is not known yet." in text


def test_a_claim_that_was_kept_stays_on_the_page(shelf):
    run(["good"], SERIAL)
    assert list(run(["also-good"], SERIAL)["claims"]) == ["also-good", "good"]


def test_a_claim_that_raises_is_a_row_and_the_others_go_on(shelf, capsys, quick_pictures):
    rewritten(shelf, "also_good", '{"measured": factors', '{"measured": factors[5]')
    assert status("reproduce", "--jobs=1", "--seeds", "0") == 1
    out, err = capsys.readouterr()
    assert "also-good" in out and "failed: IndexError: list index out of range" in out
    assert "reproduced" in out and err.splitlines()[-1].endswith("1 of 2 claims could not be run: also-good")


@pytest.mark.parametrize("text", ["def run(:", "import nothing_of_the_kind", "CLAIM = None"])
def test_a_file_that_cannot_be_read_is_a_row_as_well(shelf, text):
    (shelf / "broken.py").write_text(text, encoding="utf-8")
    result = run([], ReproduceOptions(jobs=1, seeds=[0]))
    assert failures(result) == ["broken"] and len(result["claims"]) == 3
    assert "broken" in listing(["broken"]) and "failed" in page(result, {})


def test_a_trial_that_fails_says_with_which_settings(shelf):
    rewritten(shelf, "good", "    return (0.5", "    assert seed < 1, 'too many'\n    return (0.5")
    found = run(["good"], SERIAL)["claims"]["good"]
    assert found["failed"] == "double(seed=1, half=False): AssertionError: too many"


def test_ctrl_c_keeps_what_is_done(shelf, tmp_path, caplog):
    rewritten(shelf, "good", "    with open(f", "    if seed == 2: raise KeyboardInterrupt\n    with open(f")
    with caplog.at_level("INFO", "minilora"), pytest.raises(KeyboardInterrupt):
        run(["also-good", "good"], SERIAL)
    assert caplog.messages[0] == "2 claims to run, about 12.0 s of one core" and "is kept in" in caplog.messages[-1]
    ran = runs(tmp_path)
    rewritten(shelf, "good", "    if seed == 2: raise KeyboardInterrupt\n", "")
    run(["also-good"], SERIAL)
    assert runs(tmp_path) == ran  # also-good was whole


def test_the_smallest_form_is_announced_without_the_minutes_of_the_whole_one(shelf, caplog):
    with caplog.at_level("INFO", "minilora"), counts_of("claim") as counted:
        run([], ReproduceOptions(jobs=1, small=True))
    assert caplog.messages == ["2 claims to run, in the smallest form"] and sum(counted) == 2


def test_the_time_of_runs_that_a_claim_shares_is_announced_where_they_are_not_kept(shelf, caplog):
    rewritten(shelf, "good", "explained=", 'shares_with="also-good", explained=')
    rewritten(shelf, "also_good", "minutes=0.1", "minutes=30")
    few = "1 claim to run, about 6.00 s of one core"

    def announced(names, **change):
        caplog.clear()
        with caplog.at_level("INFO", "minilora"):
            run(names, ReproduceOptions(jobs=1, **change))
        return caplog.messages

    assert announced(["good"]) == [f"{few}, and up to 30.0 minutes for the runs of also-good, which are not kept"]
    assert announced(["good"], out="second", small=True) == ["1 claim to run, in the smallest form"]
    assert announced(["good", "also-good"], out="third") == ["2 claims to run, about 30.1 minutes of one core"]
    assert announced(["also-good"], out="fourth") == ["1 claim to run, about 30.0 minutes of one core"]
    assert announced(["good"], out="fourth") == [few]
    (shelf / "also_good.py").write_text("nothing", encoding="utf-8")
    rewritten(shelf, "good", "0.01 * seed", "0.02 * seed")
    assert announced(["good"]) == [few]
    assert "up to" not in listing(["good"])


def test_the_page_has_everything(shelf, tmp_path):
    result = run(["good"], SERIAL)
    text = write_page(result, tmp_path / "runs/claims").read_text("utf-8")
    for words in ("Euclid, Elements, book 5", "Twice is more.", "Multiplied.", "Halved.", "at least 1.5; against it",
                  "2, 2.01, 2.02", "**reproduced**", "more: largest", "good-dark.png", "1 reproduced"):  # fmt: skip
        assert words in text, words
    assert {path.name for path in (tmp_path / "runs/claims/pictures").iterdir()} == {"good.png", "good-dark.png"}


def test_a_picture_that_cannot_be_drawn_is_a_line(shelf, tmp_path):
    rewritten(shelf, "good", 'numbers["measured"])\n    return', 'numbers["nothing"])\n    return')
    text = write_page(run(["good"], SERIAL), tmp_path / "runs/claims").read_text("utf-8")
    assert "No picture: KeyError: 'nothing'" in text


def test_a_claim_that_is_run_anew_goes_into_a_page_and_all_others_stay(shelf, tmp_path, capsys, quick_pictures):
    folder = write_page(run([], SERIAL), tmp_path / "page").parent
    before = (folder / "README.md").read_text("utf-8")
    rewritten(shelf, "good", "low=1.5, against_below=1", "low=9, against_below=8")
    (shelf / "a_more.py").write_text(GOOD.replace("Euclid", "Eudoxus"), encoding="utf-8")
    rewritten(shelf, "also_good", "Twice is more.", "More is twice.")
    assert status("reproduce", "good", "a-more", "--jobs=1", "--into", str(folder)) == 0
    assert capsys.readouterr().out.endswith(f" and {folder / 'README.md'}\n")
    text = (folder / "README.md").read_text("utf-8")
    assert list(rows_of(text)) == list(sections_of(text)) == ["a-more", "also-good", "good"]
    assert "3 claims: 2 reproduced, 0 not at this size, 1 contradicted." in text and "2 claims" not in text
    assert rows_of(text)["also-good"] == rows_of(before)["also-good"] and "Eudoxus" in sections_of(text)["a-more"]
    assert sections_of(text)["also-good"] == sections_of(before)["also-good"]
    assert "**contradicted**" in rows_of(text)["good"] and "**Verdict: contradicted**" in sections_of(text)["good"]
    assert len(list((folder / "pictures").iterdir())) == 6
    rewritten(shelf, "also_good", "More is twice.", "Twice is more.")
    whole = write_page(run([], SERIAL), tmp_path / "whole").read_text("utf-8")
    assert text.partition("\n\n| claim")[2] == whole.partition("\n\n| claim")[2]  # as if all had been run at once
    capsys.readouterr()
    assert status("reproduce", "good", "--into", str(tmp_path)) == 2
    assert "has no README.md: give the folder of a page" in complaint(capsys)
    assert status("reproduce", "good", "--small", "--into", str(folder)) == 2


@pytest.fixture
def both(shelf):
    """`good` has a form on SmolLM2 as well, and `also-good` has none."""
    (shelf / "good.py").write_text(BOTH, encoding="utf-8")


def test_both_forms_are_run_and_kept_and_each_has_its_own_verdict(shelf, both, tmp_path, caplog):
    with caplog.at_level("INFO", "minilora"):
        first = run([], SERIAL)
    assert caplog.messages[0] == "2 claims to run, about 2.2 minutes of one core"
    assert "on_smollm2" not in first["claims"]["also-good"] and runs(tmp_path) == 3
    found = first["claims"]["good"]
    form = found["on_smollm2"]
    assert (found["base"], found["here"], found["verdict"], found["explained"]) == (
        "matrices", "Multiplied.", "reproduced", "")  # fmt: skip
    assert (form["base"], form["here"], form["verdict"], form["explained"]) == (
        "smollm2", "Larger.", "contradicted", "By size.")  # fmt: skip
    assert found["numbers"]["measured"] == [2.0, 2.01, 2.02] and form["numbers"]["measured"][0] == -2.0
    assert first["seconds"] == pytest.approx(sum(one["seconds"] for one in (found, form, first["claims"]["also-good"])))
    caplog.clear()
    assert run(["good"], SERIAL)["claims"] == first["claims"] and runs(tmp_path) == 3 and caplog.messages == []
    rewritten(shelf, "good", "minutes=2,", 'minutes=2, band=Band("factor", high=0, against_above=1),')
    found = run(["good"], SERIAL)["claims"]["good"]
    assert (found["verdict"], found["on_smollm2"]["verdict"]) == ("reproduced", "reproduced") and runs(tmp_path) == 3
    rewritten(shelf, "good", 'Band("factor", low=1.5, against_below=1)', 'Band("factor", low=9, against_below=8)')
    found = run(["good"], SERIAL)["claims"]["good"]
    assert (found["verdict"], found["on_smollm2"]["verdict"]) == ("contradicted", "reproduced")


def test_a_form_that_fails_leaves_the_other_and_is_run_again(shelf, both, tmp_path, capsys, quick_pictures):
    rewritten(shelf, "good", "    return sign", "    assert sign > 0, 'no such base'\n    return sign")
    assert status("reproduce", "good", "--jobs=1", "--seeds", "0") == 1
    out, err = capsys.readouterr()
    first, second, *_ = out.splitlines()
    assert first.split() == ["good", "reproduced", "2"] and second.startswith("  on SmolLM2 ")
    assert second.endswith("failed: double(seed=0, half=False, sign=-1): AssertionError: no such base")
    assert err.splitlines()[-1].endswith("1 of 1 claim could not be run: good")
    text = (tmp_path / "runs/claims/README.md").read_text("utf-8")
    assert "1 claim: 1 reproduced, 0 not at this size, 0 contradicted; on SmolLM2 1 of them: " in text
    assert "0 contradicted, 1 failed." in text and "**On SmolLM2**: Larger. **Failed**: double(" in text
    assert rows_of(text)["good"].endswith("| **reproduced** | *failed*: double(seed=0, half=False, sign=-1):"
                                          " AssertionError: no such base |")  # fmt: skip
    assert "good" not in run(["also-good"], ReproduceOptions(jobs=1, seeds=[0]))["claims"], "half of it is not kept"
    rewritten(shelf, "good", "    assert sign > 0, 'no such base'\n", "")
    assert not failures(run(["good"], ReproduceOptions(jobs=1, seeds=[0])))
    rewritten(shelf, "good", "    return sign", "    assert sign < 0, 'no'\n    return sign")
    result = run(["good"], ReproduceOptions(jobs=1, seeds=[0]))
    text = page(result, {})
    assert failures(result) == ["good"] and rows_of(text)["good"].endswith("| -2 *contradicted* |")
    assert "2 claims: 1 reproduced, 0 not at this size, 0 contradicted, 1 failed; on SmolLM2 1 of them: 0" in text
    assert "| number | smollm2 |" in text


@pytest.mark.parametrize("how", [{"small": True}, {"switched": True}])
def test_the_smallest_form_and_a_switched_one_are_of_the_first_form_alone(shelf, both, tmp_path, how):
    result = run(["good"], ReproduceOptions(jobs=1, seeds=[0], **how))
    assert "on_smollm2" not in result["claims"]["good"] and runs(tmp_path) == 1 + how.get("switched", False)
    text = page(result, {})
    assert rows_of(text)["good"].endswith("** |  |") and "**On SmolLM2**" not in text


def test_the_page_has_both_forms_side_by_side(shelf, both, tmp_path, quick_pictures):
    layers = '"layers": {f"layer {i}": i for i in range(17)}, '  # too many for the page
    rewritten(shelf, "good", '"more": {', f'"only": setting.base, {layers}"more": {{')
    rewritten(shelf, "good", 'return {"measured": factors, "only"', 'return {"measured": factors, f"on {setting.base}"')
    text = write_page(run([], SERIAL), tmp_path / "runs/claims").read_text("utf-8")
    section = sections_of(text)["good"]
    assert "2 claims: 2 reproduced, 0 not at this size, 0 contradicted; on SmolLM2 1 of them: 0 reproduced, 0" in text
    verdicts = "2.01 [1.985, 2.035] | **reproduced** | -1.99 [-2.015, -1.965] *contradicted* |"
    assert rows_of(text)["good"].endswith(verdicts)
    assert rows_of(text)["also-good"].endswith("| **reproduced** |  |")
    assert "**On SmolLM2**: Larger. Measured on 20" in section and "SmolLM2" not in sections_of(text)["also-good"]
    assert "seeds 0, 1, 2: -2, -1.99, -1.98; mean -1.99 [-2.015, -1.965]; **contradicted**\n\nBy size.\n" in section
    lines = ["| number | matrices | smollm2 |", "|---|---|---|", "| on matrices | matrices |  |",
             "| more: largest | 2.02 | -1.98 |", "| on smollm2 |  | smollm2 |"]  # fmt: skip
    assert "\n".join(lines) in section and "| number | value |" in sections_of(text)["also-good"]
    assert "layer 3" not in section
    assert section.count("<picture>") == 2 and 'alt="good on SmolLM2: factor, -1.99 [' in section
    drawn = {path.name for path in (tmp_path / "runs/claims/pictures").iterdir()}
    assert {"good.png", "good-dark.png", "good-smollm2.png", "good-smollm2-dark.png"} < drawn and len(drawn) == 6
    assert "\n\n\n" not in text.partition("\n## ")[2].replace("\n\n\n## ", "")
    other = write_page(run([], SERIAL), tmp_path / "page").read_text("utf-8")
    assert text == other


def test_what_is_different_on_smollm2_is_stated_there(shelf, both, tmp_path):
    assert "Larger. Measured on" in page(run(["good"], SERIAL), {}), "the band is the same, and is not repeated"
    rewritten(shelf, "good", "minutes=2,", 'minutes=2, band=Band("factor", low=-5, against_below=-6),')
    rewritten(shelf, "good", "    figure, axes", "    assert numbers['measured'][0] > 0\n    figure, axes")
    text = write_page(run(["good"], SERIAL), tmp_path / "page").read_text("utf-8")
    assert "**On SmolLM2**: Larger. Band: at least -5; against it: below -6. Measured on" in text
    assert text.count("No picture on SmolLM2: AssertionError") == 1 and text.count("<picture>") == 1
    assert "**reproduced**\n\n| number" in text, "nothing has to be explained"


def test_a_form_on_smollm2_goes_into_a_page_that_had_no_such_column(shelf, tmp_path, quick_pictures):
    (shelf / "good.py").write_text(GOOD.replace('"Euclid"', '"Euclid | others"'), encoding="utf-8")
    folder = write_page(run([], SERIAL), tmp_path / "page").parent
    now = (folder / "README.md").read_text("utf-8")
    old = now.replace(" on SmolLM2 |", "").replace("|---|---|---|---|---|---|---|", "|---|---|---|---|---|---|")
    old = old.replace("**reproduced** |  |", "**reproduced** |").replace("its own verdict in the last column", "none")
    assert old.partition("\n## ")[0].count("|---") == 6 and "SmolLM2, with none" in old
    (folder / "README.md").write_text(old, encoding="utf-8")
    rewritten(shelf, "also_good", GOOD, BOTH)
    assert status("reproduce", "also-good", "--jobs=1", "--into", str(folder)) == 0
    text = (folder / "README.md").read_text("utf-8")
    whole = write_page(run([], SERIAL), tmp_path / "whole").read_text("utf-8")
    assert text.partition("\n\n| claim")[2] == whole.partition("\n\n| claim")[2]
    assert "its own verdict in the last column" in text and text.count("# Claims of papers") == 1
    assert "2 claims: 2 reproduced, 0 not at this size, 0 contradicted; on SmolLM2 1 of them: 0 reproduced" in text
    assert status("reproduce", "good", "--jobs=1", "--into", str(folder)) == 0
    assert rows_of((folder / "README.md").read_text("utf-8"))["also-good"] == rows_of(text)["also-good"]


def test_a_new_claim_has_a_file_with_blanks_that_runs_as_it_is(shelf, monkeypatch, capsys):
    assert status("reproduce", "--new", "my-claim") == 0
    out = capsys.readouterr().out
    assert f"Written to {shelf / 'my_claim.py'}" in out and "my-claim --small" in out
    assert "my-claim" in claims.claim_names()
    text = (shelf / "my_claim.py").read_text("utf-8")
    assert text.count("TODO") > 8
    (shelf / "my_claim.py").write_text(text.replace("from ..", "from minilora."), encoding="utf-8")
    file = claims.read_claim("my-claim")
    off = lambda trial: abs(trial["lr"] / (3e-2 if trial.get("variant") else 1e-2) - 1)
    world = lambda **trial: {"validation": off(trial), "test": 2.0 - 0.1 * ("variant" in trial), "trained": 1}
    monkeypatch.setattr(claims, "run_trials", lambda function, trials, *more, **most: [world(**one) for one in trials])
    for small in (False, True):
        numbers = file.run(claims.Setting(small=small))
        assert numbers["measured"] == pytest.approx([5.0] * 3) and file.CLAIM.verdict(numbers) == "reproduced"
        assert file.run(claims.Setting(small=small, switched=True))["measured"] == [0.0] * 3
    assert file.picture(numbers)


@pytest.mark.parametrize("name", ["good", "My-claim", "my_claim", "1st", "a--b", "-a", "a/b", "a-", "../a"])
def test_a_name_that_is_taken_or_none_is_refused_in_a_line(shelf, name, capsys):
    before = {path: path.read_text("utf-8") for path in shelf.rglob("*.py")}
    assert status("reproduce", f"--new={name}") == 2
    assert "there already" in (said := complaint(capsys)) or "in small letters, digits and dashes" in said
    assert {path: path.read_text("utf-8") for path in shelf.rglob("*.py")} == before


def test_a_caveat_stands_beside_a_verdict_that_holds_and_power_beside_the_band(shelf):
    rewritten(shelf, "good", '"contradicted": "By half."', '"reproduced": "For whole numbers."')
    rewritten(shelf, "good", "Band, Claim", "Band, Claim, Effect")
    rewritten(shelf, "good", "explained=", "effect=Effect(paper=2, none=1, std=0.01), explained=")
    text = page(run([], SERIAL), {})
    assert text.count("**Verdict: reproduced**\n\nFor whole numbers.") == 1
    assert "against it: below 1. Its power, simulated with 3 seeds" in text
    assert text.count("Its power") == 1 and "not known" not in text


def test_the_power_is_that_of_the_seeds_that_were_run_and_only_of_the_whole_form(shelf):
    rewritten(shelf, "good", "Band, Claim", "Band, Claim, Effect")
    rewritten(shelf, "good", "explained=", "effect=Effect(paper=2, none=1, std=0.5), explained=")
    claim = claims.read_claim("good").CLAIM

    def power(**change):
        return run(["good"], ReproduceOptions(jobs=1, **change))["claims"]["good"]["power"]

    assert power() == claim.effect.told(claim.band, 3)
    assert power(seeds=[4, 5]) == claim.effect.told(claim.band, 2) != power()
    assert power(seeds=[4]) == power(small=True) == power(small=True, seeds=[4, 5]) == ""
    rewritten(shelf, "good", "base=", "seeds=(0,), base=")  # its number is exact
    assert power() == claim.effect.told(claim.band, 1)


def test_an_unknown_name_is_answered_with_the_nearest(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status("reproduce", "planted-rnk") == 2
    assert "no claim is called 'planted-rnk'; did you mean planted-rank?" in complaint(capsys)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="did you mean which-weights"):
        chosen(["weights"])
    assert chosen(["planted_rank.py"]) == ["planted-rank"]


@pytest.mark.parametrize("words", [["--seeds", "1", "1"], ["--seeds=-1"], ["--jobs=0"]], ids=" ".join)
def test_values_that_mean_nothing_are_refused(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status("reproduce", *words) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_list_names_all_with_their_minutes(capsys):
    assert status("reproduce", "--list") == 0
    out = capsys.readouterr().out
    assert "planted-rank" in out and "minutes of one core in all" in out
    assert status("reproduce", "--list", "planted-rank") == 0
    line, total = capsys.readouterr().out.splitlines()
    assert line.startswith("planted-rank ") and total.startswith("1 claim, ")
    assert status("reproduce", "--list", "planted-rank", "learns-less") == 0
    *_, second, shared, total = capsys.readouterr().out.splitlines()
    small, large = (form.minutes for form in claims.read_claim("learns-less").CLAIM.forms)
    assert second.split() == ["the", "same", "on", "SmolLM2", "smollm2", f"{large:g}", "min"]
    other = claims.read_claim("forgets-less").CLAIM.form_on("smollm2").minutes
    assert shared.strip() == f"up to {large + other:.0f} min without the runs of forgets-less"
    minutes = claims.read_claim("planted-rank").CLAIM.minutes + small + large
    assert total == f"2 claims, {minutes:.0f} minutes of one core in all"
    assert status("reproduce", "--list", "--json") == 2
    assert "--list prints text: leave out --json" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert status("reproduce", "planted-rank", "--small", "--out", tmp_path / "file") == 1
    line = "file: results cannot be written there (File exists); choose another --out\n"
    assert capsys.readouterr().err.endswith(line)
