"""What readers expect before a lesson measures it: asked for, kept in mine.py, compared, and counted by `progress`."""

import ast
import math
import re
from itertools import pairwise

import numpy as np
import pytest
from lessonfiles import LESSONS

from minilora.commands.progress import progress
from minilora.course import claim, mine, predict, predictions
from minilora.course.exercises import EXERCISES

NAME = "parameters in A and B, in % of W"
NO_GUESS = "no guess yet: add the two ends of a range that you are 80 % sure of\n"
SOURCES = sorted((LESSONS / "src").glob("[0-9]*.py"))


@pytest.fixture(autouse=True)
def session(tmp_path, monkeypatch):
    """A new folder, in which a notebook has just been opened."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predictions, "ASKED", {})


def restart(monkeypatch):
    monkeypatch.setattr(predictions, "ASKED", {})


def measured(value, name=NAME):
    claim(name, value, -math.inf, math.inf)


def test_a_lesson_that_is_only_run_prints_a_question_and_leaves_no_file(tmp_path, capsys):
    predict(NAME)
    measured(1.91)
    claim("never asked for", 2, 2, 2)
    assert capsys.readouterr().out == f"{NO_GUESS}{NAME}: 1.91 (claimed: at least -inf): holds\n" + (
        "never asked for: 2 (claimed: exactly that): holds\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "low, high, value, line",
    [
        (1, 3, 1.91, "your guess: 1 to 3: right"),
        (1.91, 1.91, 1.91, "your guess: 1.91: right"),
        (10, 50, 1.91, "your guess: 10 to 50: missed; 1.91 is 5.2 times smaller than 10"),
        (10, 50, 100, "your guess: 10 to 50: missed; 100 is 2.0 times larger than 50"),
        (10, 50, 9.5, "your guess: 10 to 50: missed; 9.5 is off by 0.5"),
        (10, 50, -1, "your guess: 10 to 50: missed; -1 is off by 11"),
        (-4, -2, -1, "your guess: -4 to -2: missed; -1 is 2.0 times smaller than -2"),
        (0, 0, 3, "your guess: 0: missed; 3 is off by 3"),
        (math.log(2), math.log(2), np.float32(math.log(2)), "your guess: 0.6931: right"),
        (7.389, 7.389, math.e**2, "your guess: 7.389: right"),
        (1, 2, np.float32(4), "your guess: 1 to 2: missed; 4 is 2.0 times larger than 2"),
    ],
)
def test_a_guess_is_compared_below_the_claim_and_again_in_the_next_session(low, high, value, line, capsys, monkeypatch):
    for _ in range(2):
        predict(NAME, low, high)
        measured(value)
        question, _, answer = capsys.readouterr().out.splitlines()
        assert answer == line and line.startswith(question)
        restart(monkeypatch)


def test_the_last_guess_before_the_claim_counts_and_none_after_it(capsys, monkeypatch):
    predict(NAME, 1, 2)
    predict(NAME, 10, 50)
    measured(1.91)
    predict(NAME, 1.9, 2)
    restart(monkeypatch)
    predict(NAME, 1.9, 2)
    measured(1.95)  # the first value stays
    assert (
        capsys.readouterr().out.count(
            "it was measured before, as 1.91, so this guess does not count; your guess: 10 to 50"
        )
        == 2
    )
    assert predictions.read(predictions.place()) == {NAME: {"low": 10, "high": 50, "value": 1.91}}


def test_a_number_that_was_seen_before_it_was_guessed_does_not_count(tmp_path, capsys, monkeypatch):
    predict(NAME)
    measured(1.91)
    predict(NAME, 1, 2)  # in this session
    (tmp_path / "mine.py").write_text(mine.HEAD)
    measured(1.92)
    restart(monkeypatch)
    predict(NAME, 1, 2)  # and, where there is a mine.py, in a later one
    assert capsys.readouterr().out.count("it was measured before, as 1.91, so this guess does not count\n") == 2
    assert predictions.summary(tmp_path / "mine.py") == []


@pytest.mark.parametrize("ends", [(3,), (None, 3), (5, 1), ("a", 2), (math.nan, 2), (1, math.inf), ([1], 2), (True, 2)])
def test_what_is_no_range_is_one_line_and_nothing_is_kept(ends, tmp_path, capsys):
    predict(NAME, *ends)
    measured(2)
    said, _ = capsys.readouterr().out.splitlines()
    assert said.startswith(f"a guess is two numbers, the smaller one first: predict({NAME!r}, low, high); got ")
    assert not (tmp_path / "mine.py").exists()


def test_guesses_are_kept_in_the_exercises_folder_if_there_is_one(tmp_path):
    (tmp_path / "exercises").mkdir()
    predict(NAME, np.float64(1), 2)
    assert mine.load(tmp_path / "exercises" / "mine.py")["PREDICTIONS"] == {NAME: {"low": 1, "high": 2}}
    (tmp_path / "mine.py").write_text(mine.HEAD)  # one that is nearer
    predict("another", 3, 4)
    assert mine.load(tmp_path / "mine.py")["PREDICTIONS"] == {"another": {"low": 3, "high": 4}}


def test_functions_and_guesses_stay_when_the_others_are_written(tmp_path):
    def keep(text, number="9.1"):
        scope = {"__name__": "__main__"}
        path = tmp_path / "cell.py"
        path.write_text(text)
        exec(compile(text, str(path), "exec"), scope)
        assert mine.keep(scope["lora_forward"], number, None, lambda kept: "")

    keep("import math\ndef lora_forward(x):\n    return math.pi\n")
    predict('it\'s "quoted" \\ and µ', 1, 2)
    keep("import math\ndef lora_forward(x):\n    return math.e\n")
    predict("another", 3, 4)
    kept = mine.load(tmp_path / "mine.py")
    assert kept["lora_forward"](0) == math.e and list(kept["PREDICTIONS"]) == ['it\'s "quoted" \\ and µ', "another"]
    assert (tmp_path / "mine.py").read_text("utf-8").count("# predictions") == 1


@pytest.mark.parametrize(
    "section",
    [
        "PREDICTIONS = {",
        "PREDICTIONS = {'a': 1}",
        "PREDICTIONS = {'a': {'low': 1}}",
        "PREDICTIONS = {'a': {'low': '1', 'high': 2}}",
        "PREDICTIONS = {'a': {'width': 1}}",
        "PREDICTIONS = [1]",
        "PREDICTIONS = {'a': open('x')}",
        "",
        "\x00",
    ],
)
def test_a_broken_section_is_one_line_and_stays_as_it_is(section, tmp_path, capsys):
    text = f"{mine.HEAD}\n# predictions\n{section}\n"
    (tmp_path / "mine.py").write_text(text)
    predict(NAME, 1, 2)
    measured(1.5)
    said, _ = capsys.readouterr().out.splitlines()
    assert said == "the predictions in mine.py cannot be read: fix what is below `# predictions`, or delete it"
    assert predictions.summary(tmp_path / "mine.py") == [said.replace("mine.py", str(tmp_path / "mine.py"))]
    assert (tmp_path / "mine.py").read_text() == text


def test_a_file_that_cannot_be_read_or_written_never_stops_a_lesson(tmp_path, capsys):
    (tmp_path / "mine.py").mkdir()
    predict(NAME, 1, 2)
    measured(1.5)
    assert capsys.readouterr().out.count("\n") == 2


@pytest.mark.parametrize(
    "value, low, high, band",
    [(0.9, 1, 2, "1 to 2"), (2.1, 1, 2, "1 to 2"), (2.1, 2, 2, "exactly 2"), (4, -math.inf, 3, "at most 3"),
     (4, 5, math.inf, "at least 5"), (math.nan, 1, 2, "1 to 2")],
)  # fmt: skip
def test_a_number_outside_its_band_ends_the_lesson_and_the_ends_are_inside(value, low, high, band, capsys):
    with pytest.raises(AssertionError, match=rf"^n: .* \(claimed: {band}\): DOES NOT HOLD\nWas a cell"):
        claim("n", value, low, high)
    ends = [end for end in (low, high) if math.isfinite(end)]
    for end in ends:
        claim("n", end, low, high)
    assert capsys.readouterr().out.count(": holds\n") == len(ends)


def test_a_band_is_given_from_its_smaller_end():
    with pytest.raises(ValueError, match="claim 'n': the band goes from 2 to 1; give the smaller end first"):
        claim("n", 1.5, 2, 1)


def kept(right, wrong):
    known = {f"right {i}": {"low": 1, "high": 2, "value": 1.5} for i in range(right)}
    return known | {f"wrong {i}": {"low": 1, "high": 2, "value": 3.0 + i} for i in range(wrong)}


@pytest.mark.parametrize(
    "right, wrong, verdict",
    [
        (3, 1, "too few to say more"),
        (4, 1, "as they should be"),
        (8, 2, "as they should be"),
        (6, 4, "a little too narrow"),
        (14, 6, "a little too narrow"),
        (3, 7, "too narrow"),
        (9, 0, "a little too wide"),
        (17, 0, "too wide"),
    ],
)
def test_progress_says_how_well_calibrated_the_guesses_are_and_which_missed_by_most(right, wrong, verdict, tmp_path):
    predictions.write(tmp_path / "mine.py", kept(right, wrong) | {"waits": {"low": 0, "high": 1}, "seen": {"value": 2}})
    lines = progress(tmp_path).splitlines()
    at = lines.index(f"predictions: {right} of {right + wrong} inside your ranges, 80 % are meant to be: {verdict}")
    worst = [line.split(":")[0].strip() for line in lines[at + 1 :] if line.startswith("     wrong")]
    assert worst == [f"wrong {i}" for i in reversed(range(wrong))][:3]
    assert lines[at + 1 + len(worst)].startswith(f"0 of {len(EXERCISES)} exercises pass")


def calls(source, name):
    """The first arguments of the calls of this function in a source, each with its line."""
    found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == name]
    return [(n.args[0].value if isinstance(n.args[0], ast.Constant) else None, n) for n in found]


def test_a_lesson_asks_below_a_question_for_numbers_that_it_measures_later():
    for path in SOURCES:
        text = path.read_text("utf-8")
        asked, claimed = calls(text, "predict"), dict(calls(text, "claim"))
        assert 1 <= len(asked) <= 4 and len({name for name, _ in asked}) == len(asked), path.name
        for name, call in asked:
            assert len(call.args) == 1 and claimed[name].lineno > call.lineno, path.name
        for before, cell in pairwise(re.split(r"(?m)^# %%", text)):
            if "\npredict(" in cell:
                assert "**Predict.**" in before and set(re.findall(r"(?m)^\w+", cell)) == {"predict"}, path.name
