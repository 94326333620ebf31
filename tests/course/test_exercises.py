"""What holds for every exercise: the right answer passes, each known mistake gets its own line, the stub fails."""

import re

import numpy as np
import pytest
from lessonfiles import LESSONS, build_program

from minilora.course import mine
from minilora.course.exercises import EXERCISES
from minilora.course.judge import NOT_YET, OK, judged

SOURCES = {path.stem: path.read_text("utf-8") for path in (LESSONS / "src" / "exercises").glob("[0-9]*.py")}
SOLUTION = re.compile(r"### BEGIN SOLUTION\n(.*?)### END SOLUTION", re.DOTALL)
BARE_NUMBER = re.compile(r"is [-\d.,e+nan]+, expected [-\d.,e+]+")  # says that it is wrong, not why

FORMS = [
    pytest.param(exercise, number, id=f"{exercise.number}-{exercise.name}" + f"-variant{number}" * (number > 0))
    for exercise in EXERCISES.values()
    for number in range(len(exercise.forms))
]
MISTAKES = [
    pytest.param(exercise, *mistake, id=f"{exercise.number}-{exercise.name}-{what}")
    for exercise in EXERCISES.values()
    for what, mistake in exercise.forms[0].mistakes.items()
]
each_exercise = pytest.mark.parametrize(
    "exercise", [pytest.param(e, id=f"{e.number}-{e.name}") for e in EXERCISES.values()]
)
each_form = pytest.mark.parametrize("exercise, variant", FORMS)


def squeezed(text):
    """Without blanks: a line that is broken in another way is the same line."""
    return re.sub(r"\s+", "", text)


def source_of(exercise):
    return next(text for name, text in SOURCES.items() if name.startswith(f"{exercise.lesson:02}_"))


def variant_of(number):
    """As `check` has it: readers give no variant, and a class gives one, 0 included."""
    return number or None


@each_form
def test_the_reference_passes_fifty_draws(exercise, variant):
    reference = exercise.forms[variant].reference
    assert {judged(exercise, reference, np.random.default_rng(seed), variant_of(variant)) for seed in range(50)} == {OK}


@pytest.mark.parametrize("exercise, function, line", MISTAKES)
def test_a_known_mistake_gets_its_line_whatever_is_drawn(exercise, function, line):
    for seed in range(6):
        said = judged(exercise, function, np.random.default_rng(seed))
        assert line in said and "\n" not in said and len(said) < 220


@each_exercise
def test_five_mistakes_get_lines_of_their_own_and_none_is_a_bare_number(exercise):
    lines = {line for _, line in exercise.forms[0].mistakes.values()}
    assert len(lines) >= 5
    for function, line in exercise.forms[0].mistakes.values():
        assert not BARE_NUMBER.search(judged(exercise, function, np.random.default_rng(0))), line


@each_exercise
def test_the_stub_fails(exercise):
    def stub(*arguments):
        raise NotImplementedError

    assert judged(exercise, stub, np.random.default_rng(0)) == NOT_YET


@pytest.mark.parametrize("exercise, variant", [p for p in FORMS if len(p.values[0].forms) > 1])
def test_the_answer_of_another_variant_is_recognised(exercise, variant):
    for number, other in enumerate(exercise.forms):
        said = judged(exercise, other.reference, np.random.default_rng(0), variant)
        assert said == OK if number == variant else "another variant" in said


@each_exercise
def test_its_number_stands_in_the_page_and_its_solution_in_the_source(exercise):
    source = source_of(exercise)
    assert re.search(rf"^# ## {re.escape(exercise.number)} ", source, re.MULTILINE)
    assert f"\ndef {exercise.name}(" in source and exercise.name not in vars(mine)


@each_exercise
def test_the_decisive_lines_stand_in_the_solution(exercise):
    solutions = squeezed("".join(SOLUTION.findall(source_of(exercise))))
    assert exercise.decisive and all(squeezed(line) in solutions for line in exercise.decisive)


@pytest.fixture(scope="module")
def program():
    """lessons/build.py as a module."""
    return build_program()


def solved(program, name, variant):
    """What a page of exercises has defined when all of its cells but the checks have run, with its solutions."""
    scope = {}
    for cell in program.read_source(LESSONS / "src" / "exercises" / f"{name}.py", variant).cells:
        if cell.cell_type == "code" and "setup" not in cell.metadata.get("tags", []) and "check(" not in cell.source:
            exec(cell.source, scope)
    return scope


@pytest.mark.parametrize("variant", [None, 1])
def test_what_is_joined_in_13_1_is_the_mix_whatever_scale_is_asked_for(variant, program, capsys):
    solved(program, "13_many_versions", variant)
    assert float(re.search(r"differ by (\S+) of the largest", capsys.readouterr().out)[1]) < 1e-5


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_the_solution_of_every_variant_passes(name, program, capsys, monkeypatch):
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")  # what an earlier page asks for is the reference
    asked = [e for e in EXERCISES.values() if name.startswith(f"{e.lesson:02}_")]
    for number in range(max(len(e.forms) for e in asked)):
        scope = solved(program, name, number or None)
        for exercise in asked:
            said = judged(exercise, scope[exercise.name], np.random.default_rng(0), number or None)
            assert said == OK, f"{exercise.name}, variant {number}: {said}"
