"""The self-test: the right answer of each question passes, and wrong ones are told what is wrong and what to read."""

import re

import numpy as np
import pytest
from lessonfiles import BUILT, LESSONS, SELF_TEST, run_here

from minilora.course import check, mine
from minilora.course.edits import sections, source_of
from minilora.course.exercises import EXERCISES, QUESTIONS
from minilora.course.judge import OK, judged

PAGE = (LESSONS / "src" / "exercises" / "00_self_test.py").read_text("utf-8")
WRONG = {  # an answer, and a part of its line
    "product_shape": (lambda a, b: (b[1], a[0]), "rows and columns are swapped"),
    "per_token": (lambda x, W: W @ x.T, "y is transposed"),
    "column_sums": (lambda X: X.sum(axis=0, keepdims=True), "must have the shape (N)"),
    "centred": (lambda X: X - X.mean(axis=1), "do not fit"),
    "slope": (lambda x: np.exp(x) / (1 + np.exp(x)), "the derivative is"),
    "slope_of_power": (lambda x: 3 * (x**2 + 1) ** 2, "2 x, is missing"),
    "slope_of_tanh": (lambda x: 1 - x**2, "the derivative is"),
    "surprise": (lambda p: -sum(map(float, np.log2(p))), "to the base 2"),
    "multiplier": (lambda a: lambda x: 2 * x, "multiplier(3)(10) is 20, expected 30"),
    "doubled": (lambda f: lambda x: 2 * f(x), "stops with TypeError"),
}

each_question = pytest.mark.parametrize("question", QUESTIONS.values(), ids=lambda question: question.name)


def said_of(question, answer, seed=0):
    return judged(question, answer, np.random.default_rng(seed))


def test_there_are_ten_and_none_is_an_exercise():
    assert [q.number for q in QUESTIONS.values()] == [f"question {i}" for i in range(1, 11)]
    assert not set(QUESTIONS) & set(EXERCISES) and all(q.read for q in QUESTIONS.values())
    assert sections("selftest").keys() <= QUESTIONS.keys()


@each_question
def test_the_right_answer_passes_and_each_known_mistake_gets_its_line(question):
    form = question.forms[0]
    for seed in range(10):
        assert said_of(question, form.reference, seed) == OK
        assert all(said_of(question, mistake.function, seed) == mistake.line for mistake in form.mistakes)


@each_question
def test_a_wrong_answer_is_told_what_is_wrong_and_what_to_read(question, capsys, monkeypatch):
    answer, part = WRONG[question.name]
    monkeypatch.setattr(answer, "__name__", question.name)
    check(answer)
    line = capsys.readouterr().out
    assert line.startswith(f"{question.number}  ") and line.endswith(f" (to read: {question.read})\n") and part in line


@pytest.mark.parametrize(
    "name, answer, line",
    [
        ("multiplier", lambda a: 10 * a, "return a function, not a value of type int"),
        ("multiplier", lambda a: None, "the function returns None"),
        ("doubled", lambda f: lambda *arguments: f(*arguments), "doubled(f)(), where f() is 4, is 4, expected 8"),
    ],
)
def test_an_answer_that_returns_no_function_or_another_one(name, answer, line):
    assert line in said_of(QUESTIONS[name], answer)


def test_a_right_answer_is_not_kept_in_mine(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mine, "keep", lambda *arguments: pytest.fail("it was kept"))
    check(QUESTIONS["slope"].forms[0].reference)
    assert capsys.readouterr().out == "question 5  ok\n"


@each_question
def test_the_page_asks_it_under_its_number_and_does_not_answer_it(question):
    stub, body = source_of(question.forms[0].reference)
    asked = f"{stub.rstrip()}\n    raise NotImplementedError\n\n\ncheck({question.name})\n"
    before, _, _ = PAGE.partition(asked)
    assert before != PAGE and body.strip() not in PAGE
    assert re.findall(r"\*\*(\d+)\.\*\*", before)[-1] == question.number.split()[1]


def test_before_it_is_solved_every_question_is_not_written_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, printed = run_here(BUILT[SELF_TEST]["cells"])
    assert printed.splitlines() == [f"{q.number}  not written yet" for q in QUESTIONS.values()]
