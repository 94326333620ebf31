"""Lessons and exercises as they are shipped, and the program that builds them from their sources."""

import copy
import itertools
import json
import os
import re
from types import SimpleNamespace

import pytest
from lessonfiles import BUILT, GRADED, KEPT, LESSONS, build_program, run_here
from times import exercise_minutes, reading_minutes, rounded

import minilora as ml
from minilora.course.edits import source_of
from minilora.course.exercises import EXERCISES
from minilora.course.pages import exercises_of
from minilora.course.plan import LESSONS as PLAN
from minilora.course.plan import SESSION, TERM, Lesson

SOURCES = sorted(path.relative_to(LESSONS / "src") for path in (LESSONS / "src").rglob("[0-9]*.py"))

each_exercise = pytest.mark.parametrize("name", GRADED)


def code_cells(name):
    return [cell for cell in BUILT[name]["cells"] if cell["cell_type"] == "code"]


# -- what is shipped ---------------------------------------------------------------------------------------------------


def test_every_source_has_its_notebook_and_every_notebook_its_source():
    assert sorted(source.with_suffix(".ipynb").as_posix() for source in SOURCES) == sorted(BUILT)


def test_the_pages_hold_the_tables_of_the_plan_and_of_the_exercises(program):
    for path, text in program.pages().items():
        assert path.read_text("utf-8") == text, "run: python lessons/build.py --pages"
    readme = (LESSONS / "README.md").read_text("utf-8")
    assert [name for name in BUILT if f"({name})" not in readme] == []


def test_a_number_that_no_lesson_has_is_explained():
    readme = (LESSONS / "README.md").read_text("utf-8")
    missing = set(range(max(PLAN))) - set(PLAN)
    assert [number for number in missing if f"There is no lesson {number}:" not in readme] == []


def test_a_page_without_a_place_for_its_table_is_refused(program):
    with pytest.raises(ValueError, match="it needs <!-- map --> and <!-- end of map -->"):
        program.filled("# A page", map="| |")


def test_a_notebook_opens_on_every_machine():
    for name, notebook in BUILT.items():
        text = re.sub(r'"image/png": "[^"]*"', "", json.dumps(notebook))
        assert notebook["metadata"]["kernelspec"]["name"] == "python3" and "widgets" not in notebook["metadata"], name
        assert (LESSONS / name).stat().st_size < 500_000, name
        assert code_cells(name)[0]["outputs"] == [], name
        of_one_machine = re.search(r"(?<![\w:/.<)])/[a-z]+/|[A-Z]:\\\\| at 0x[0-9a-f]{6}", text)
        assert not of_one_machine, (name, of_one_machine)
        ids = [cell["id"] for cell in notebook["cells"]]
        assert len(set(ids)) == len(ids), name


def test_a_notebook_shows_no_error_and_nothing_from_stderr():
    shown = [(name, output) for name in BUILT for cell in code_cells(name) for output in cell["outputs"]]
    assert [one for one in shown if one[1]["output_type"] == "error" or one[1].get("name") == "stderr"] == []


def test_a_lesson_was_run_from_top_to_bottom_and_an_exercise_was_not():
    for name in BUILT:
        counts = [cell["execution_count"] for cell in code_cells(name)]
        run = list(range(1, len(counts) + 1))
        assert counts == ([None] * len(counts) if name.startswith("exercises/") else run), name


@each_exercise
def test_a_released_exercise_has_stubs_that_each_have_a_graded_check(name):
    cells = [cell for cell in code_cells(name) if "nbgrader" in cell["metadata"]]
    stubs = [cell for cell in cells if cell["metadata"]["nbgrader"]["solution"]]
    checks = [cell for cell in cells if cell["metadata"]["nbgrader"]["grade"]]
    asked = [cell["metadata"]["nbgrader"]["grade_id"] for cell in stubs]
    lesson = int(name.split("/")[1][:2])
    known = [e.name for e in sorted(EXERCISES.values(), key=lambda e: e.number) if e.lesson == lesson]
    assert asked == known, f"a stub is missing, or: python lessons/build.py {name.split('/')[1].removesuffix('.ipynb')}"
    assert all("".join(cell["source"]).endswith("raise NotImplementedError") for cell in stubs)
    share = {
        name: f", points={cell['metadata']['nbgrader']['points']}" for name, cell in zip(asked, checks, strict=True)
    }
    called = [f"check({name}{share[name] if name.startswith('test_') else ''})" for name in asked]
    assert ["".join(cell["source"]).splitlines()[-1] for cell in checks] == called
    assert all(not cell["metadata"]["editable"] for cell in checks)
    points = {name: cell["metadata"]["nbgrader"]["points"] for name, cell in zip(asked, checks, strict=True)}
    assert sum(points.values()) == 8, f"the points of a page add up to 8, here {points}"


def markdown(name):
    return "\n".join("".join(cell["source"]) for cell in BUILT[name]["cells"] if cell["cell_type"] == "markdown")


def test_a_page_is_called_by_its_own_number():
    for name in (*KEPT, *GRADED):
        text, number = markdown(name), str(int(name.rpartition("/")[2][:2]))
        assert text.startswith(f"# Exercises {number}: " if "/" in name else f"# Lesson {number}: "), name
        links = re.findall(r"\[(?:exercises|lesson)\s(\d+)\]\([^)]*?(\d\d)_", text)
        assert [(name, said, found) for said, found in links if int(said) != int(found)] == []


def test_a_lesson_keeps_to_the_limits(program):
    for name in KEPT:
        notebook = program.nbformat.reads(json.dumps(BUILT[name]), as_version=4)
        assert program.over_limits(notebook) == [] and notebook.metadata.minilora.seconds > 0, name


def test_a_lesson_asks_before_it_shows_and_ends_with_what_to_remember():
    for name in KEPT:
        text = markdown(name)
        assert "**Predict.**" in text and "\n## What to remember" in text and "](../minilora/" in text, name
        assert f"](exercises/{name})" in text or not (LESSONS / "exercises" / name).exists(), name
        assert any("claim(" in "".join(cell["source"]) for cell in code_cells(name)), name


def test_lesson_6_without_merges_counts_bytes_and_with_all_of_them_what_the_tokenizer_counts():
    outputs = [output for cell in code_cells("06_what_the_model_reads.ipynb") for output in cell["outputs"]]
    (table,) = [text for each in outputs if (text := "".join(each.get("text", ""))).startswith("merges ")]
    rows = [line.replace(",", "").split() for line in table.splitlines()[1:5]]
    model, tokenizer = ml.load("tiny")
    law = ml.split_records(ml.read_records("legal"))["train"]
    text = "\n".join(record.messages[-1]["content"] for record in law)
    for row, tokens in ((rows[0], len(text.encode())), (rows[-1], len(tokenizer.encode(text)))):
        assert float(row[2]) == pytest.approx(tokens / len(text.split()), abs=0.006)
    assert [int(row[1]) for row in rows] == [3 + 256 + int(row[0]) for row in rows] and int(rows[-1][1]) == len(
        tokenizer
    )
    assert all(int(row[4]) == int(row[1]) * model.config.hidden_size for row in rows)


def test_the_minutes_of_the_plan_are_those_counted():
    for lesson in PLAN.values():
        counted = [reading_minutes(BUILT[f"{lesson.name}.ipynb"])]
        counted += [exercise_minutes(BUILT[f"exercises/{lesson.name}.ipynb"], e) for e in exercises_of(lesson)]
        wanted = f"{lesson.name} in plan.toml needs the minutes {tuple(map(rounded, counted))}"
        assert len(lesson.minutes) == len(counted), wanted
        assert all(abs(a - b) <= max(5, 0.1 * b) for a, b in zip(lesson.minutes, counted, strict=True)), wanted
        assert abs(sum(lesson.minutes) - sum(counted)) <= 0.1 * sum(counted), wanted
        assert all(0 < sum(part) <= SESSION for part in lesson.parts) and sum(lesson.parts, ()) == lesson.minutes


def test_minutes_are_counted_by_what_a_reader_does():
    picture = {"data": {"image/png": "", "text/plain": "as (claimed: 1 to 2)"}}
    said = {"text": ["a: 1 (claimed: exactly that): holds\n", "b: 2 (claimed: 1 to 3): holds\n"]}
    cells = [
        {"cell_type": "markdown", "source": "*10 minutes with the exercises: a head of the plan.*\n" + 300 * "word "},
        {"cell_type": "code", "source": "import os\n" * 80, "metadata": {"tags": ["setup"]}, "outputs": []},
        {"cell_type": "code", "source": "x = 1\n\n" * 16, "metadata": {}, "outputs": [picture, said]},
        {"cell_type": "code", "source": "", "metadata": {}, "outputs": [picture]},
    ]
    assert reading_minutes({"cells": cells}) == 2 + 2 + 2 * 2 + 1
    first = EXERCISES["numerical_gradient"]
    lines = len(source_of(first.forms[0].reference)[1].split("\n")) - 1
    page = "# Exercises\n\n## 1.1 A task\n\n" + 147 * "word " + "\n\n## 1.2 Another\n\n" + 999 * "word "
    page = {"cells": [{"cell_type": "markdown", "source": page}]}
    assert exercise_minutes(page, first) == 5 + 1 + 2.5 * lines
    with pytest.raises(ValueError, match=r"no section ## 9\.1"):
        exercise_minutes(page, EXERCISES["lora_forward"])


def test_a_lesson_that_is_longer_than_a_session_has_two_parts_as_equal_as_can_be():
    def parts(*minutes):
        return Lesson(7, "07_demo", "Does it?", minutes, (), "nothing", True).parts

    assert parts(40, 30, 20) == ((40, 30, 20),) and parts(15) == ((15,),)
    assert parts(40, 15, 55, 10) == ((40, 15), (55, 10)) and parts(30, 20, 20, 25) == ((30, 20), (20, 25))
    head = Lesson(7, "07_demo", "Does it?", (40, 15, 55, 10), (2, 3), "nothing", True).head
    assert head == (
        "*120 minutes with the exercises, 40 without; a second session begins with exercise 7.2. "
        "Needs: lessons 2 and 3. You build: nothing.*"
    )
    assert Lesson(0, "00_demo", "Does it?", (15,), (1,), "it", True).head == (
        "*15 minutes. Needs: lesson 1. You build: it.*"
    )


def test_a_term_holds_every_lesson_once_and_no_week_is_longer_than_a_session():
    weeks = [[number for number in week if number in PLAN] for week in TERM]
    assert sorted(itertools.chain(*weeks)) == sorted(number for number in PLAN if number)  # lesson 0 is read before
    assert all(sum(PLAN[number].minutes[0] for number in week) <= SESSION for week in weeks)


VERBS = {
    "build", "calculate", "choose", "combine", "compare", "construct", "count", "decide", "derive", "describe",
    "design", "distinguish", "encode", "explain", "find", "fine-tune", "implement", "judge", "list", "measure",
    "merge", "predict", "state", "test", "tune",
}  # fmt: skip


def test_a_lesson_has_three_outcomes_that_begin_with_verbs():
    assert [lesson.name for lesson in PLAN.values() if len(set(lesson.outcomes)) != 3] == []
    said = [line for lesson in PLAN.values() for line in lesson.outcomes]
    assert [line for line in said if line.partition(" ")[0] not in VERBS or line.endswith(".")] == []


# -- the program that builds them --------------------------------------------------------------------------------------

NO_LABELS = """import matplotlib.pyplot as plt
from minilora.course import show
plt.plot([1, 2, 4])
show(plt.gcf(), alt="A line through three points")
"""
LESSON = """# %% [markdown]
# # A lesson

# %%
import time

import matplotlib.pyplot as plt

# %%
print("the loss is", 3.14159)
plt.plot([1, 2, 4])
plt.show()

# %% tags=["measured"]
print(time.perf_counter_ns())
"""


@pytest.fixture(scope="module")
def program():
    """lessons/build.py as a module."""
    return build_program()


def write_source(folder, text, name="01_demo"):
    (folder / "src").mkdir(exist_ok=True)
    (folder / "src" / f"{name}.py").write_text(text, "utf-8")
    return folder / f"{name}.ipynb"


@pytest.fixture(scope="module")
def lesson(program, tmp_path_factory):
    """A folder with a small lesson and its notebook, built once on a machine on which 1,000 seconds pass between any
    two looks at the clock. Not to be changed.
    """
    folder = tmp_path_factory.mktemp("lessons")
    target = write_source(folder, LESSON)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "time", SimpleNamespace(perf_counter=itertools.count(0, 1000).__next__))
        assert program.main([], folder) == 0
    return target


@pytest.fixture
def replayed(program, lesson, monkeypatch):
    """No kernel is started: cells print what they printed in `lesson`, the measured ones another number."""
    built = {cell.id: cell for cell in program.nbformat.read(lesson, as_version=4).cells}

    def run(notebook):
        for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
            cell.execution_count = count
            cell.outputs = copy.deepcopy(built[cell.id].outputs) if cell.id in built else []
            if program.is_measured(cell):
                cell.outputs[0].text = "17\n"
        notebook.metadata.minilora = notebook.metadata.get("minilora", {}) | {"seconds": 1}

    monkeypatch.setattr(program, "run", run)


def outputs(target):
    cells = json.loads(target.read_text("utf-8"))["cells"]
    return [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]


def test_a_lesson_keeps_its_text_pictures_and_measurements(lesson):
    setup, nothing, (text, picture), (measured,) = outputs(lesson)
    assert (
        setup == nothing == [] and text["text"] == ["the loss is 3.14159\n"] and measured["text"][0].strip().isdigit()
    )
    assert set(picture["data"]) == {"image/png", "text/plain"}


def test_a_lesson_is_not_slow_because_the_machine_is_busy(lesson):
    assert 0 < json.loads(lesson.read_text("utf-8"))["metadata"]["minilora"]["seconds"] < 100


def test_a_second_build_gives_the_same_bytes(lesson, program):
    before = lesson.read_bytes()
    assert program.main(["01_demo"], lesson.parent) == 0
    assert lesson.read_bytes() == before
    assert sorted(path.name for path in lesson.parent.iterdir()) == ["01_demo.ipynb", "src"]


def test_a_fresh_build_measures_again_and_changes_nothing_else(lesson, program, replayed, tmp_path):
    target = write_source(tmp_path, LESSON)
    target.write_bytes(lesson.read_bytes())
    assert program.main(["--fresh"], tmp_path) == 0
    *same, measured = outputs(target)
    assert same == outputs(lesson)[:-1] and measured[0]["text"] == ["17\n"]
    assert program.main([], tmp_path) == 0 and outputs(target)[-1] == measured  # kept, since the code is the same


# -- the folder of an instructor ---------------------------------------------------------------------------------------

PAGES = sorted((LESSONS / "src" / "exercises").glob("[0-9]*.py"))


def made(program, folder, *names, overlay=None):
    """The notebooks of these pages, as an instructor hands them out, with their solutions."""
    pages = [page for page in PAGES if page.stem in names]
    program.make_course(folder, pages, None, overlay)
    return [json.loads((folder / "source" / name / f"{name}.ipynb").read_text("utf-8")) for name in names]


def test_a_page_that_is_handed_out_alone_has_no_link_to_a_file(program, tmp_path):
    names = [page.stem for page in PAGES if not page.stem.startswith("00")]
    for notebook in made(program, tmp_path, *names):
        text = "".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
        assert re.findall(r"\]\((?!https?:|#)[^)]*\)", text) == [] and "`" in text


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("9_lora.py", "", "9_lora.py belongs to no page of exercises: their names are as 00_"),
        ("09_lora.py", "SHAPE = (4, 1)\n\ndef test_lora_backward(f): ...", "line 1: 'SHAPE = (4, 1)' is no import and"),
        ("09_lora.py", '"Mine."\nimport math\nprint(1)', "09_lora.py, line 3: 'print(1)' is no import and no test"),
    ],
)
def test_what_an_overlay_cannot_hold_is_refused(program, tmp_path, name, text, words):
    own = tmp_path / "own"
    own.mkdir()
    (own / name).write_text(text)
    with pytest.raises(program.LessonError, match=re.escape(words)):
        made(program, tmp_path / "course", "09_lora", overlay=own)
    (own / name).unlink()
    (own / "09_lora.py").write_text('"Mine."\nimport math\n\ndef test_lora_backward(f):\n    math.pi\n')
    (notebook,) = made(program, tmp_path / "course", "09_lora", overlay=own)
    assert "math.pi" in str(notebook) and "HIDDEN TESTS" in str(notebook)
    with pytest.raises(program.LessonError, match="absent: there is no such folder"):
        made(program, tmp_path / "course", "09_lora", overlay=tmp_path / "absent")


def test_the_rows_of_tables_stay_whole_in_every_variant(program):
    for page in PAGES:
        for variant in (0, 1, 2):
            cells = [cell for cell in program.read_source(page, variant).cells if cell.cell_type == "markdown"]
            rows = [line for cell in cells for line in cell.source.splitlines() if line.startswith("| ")]
            assert [row for row in rows if not row.endswith("|")] == [], (page.stem, variant)


@pytest.mark.parametrize(
    "wheel, folder, installed",
    [
        ("https://host/minilora.whl", "clone/lessons", "https://host/minilora.whl"),
        ("", "clone/lessons", "clone"),
        ("", "elsewhere", None),
        ("", "elsewhere/pyproject", None),
    ],
)
def test_the_first_cell_installs_a_given_wheel_or_the_clone_and_no_other_package(
    wheel, folder, installed, program, tmp_path, monkeypatch, capsys
):
    from IPython.core.interactiveshell import InteractiveShell

    for path in ("clone/lessons", "clone/minilora/course", "elsewhere/pyproject"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "elsewhere" / "pyproject.toml").touch()  # of another project
    monkeypatch.chdir(tmp_path / folder)
    monkeypatch.setenv("MINILORA_WHEEL", wheel)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    shell, asked = InteractiveShell(), []
    shell.register_magic_function(asked.append, magic_name="pip")
    assert shell.run_cell(program.SETUP).success
    printed = capsys.readouterr().out
    if installed:
        place = installed if ":" in installed else tmp_path / installed
        assert asked == [f'install --quiet "{place}"'] and printed == ""
    else:
        assert asked == [] and printed.count("\n") == 1 and "%env MINILORA_WHEEL=URL" in printed


def test_where_minilora_is_installed_the_first_cell_does_nothing(program, tmp_path, monkeypatch, capsys):
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.chdir(tmp_path)
    assert InteractiveShell().run_cell(program.SETUP).success and capsys.readouterr().out == ""


def test_a_lesson_with_marked_lines_is_run_with_the_values_of_the_browser_too(program, tmp_path, monkeypatch, capsys):
    ran = []

    def run(notebook, **variables):
        assert len(ran) != 1 or os.listdir(variables["MINILORA_CACHE"]) == []  # no model there
        (code,) = (cell.source for cell in notebook.cells if "STEPS" in cell.source)
        ran.append(code)
        notebook.metadata.minilora = {"seconds": 40 if "STEPS = 40" in code else 10}
        if code.startswith("STEPS = 0"):
            raise program.LessonError("a claim does not hold")

    monkeypatch.setattr(program, "run", run)
    target = write_source(tmp_path, "# %% [markdown]\n# # A lesson\n\n# %%\nSTEPS = 40  # in the browser: 10\n")
    assert program.main([], tmp_path) == 0
    assert ran == ["STEPS = 40  # in the browser: 10", "STEPS = 10  # elsewhere: 40"]
    assert "STEPS = 40  # in" in target.read_text("utf-8")
    assert json.loads(target.read_text("utf-8"))["metadata"]["minilora"] == {"seconds": 40}
    assert program.main(["--check"], tmp_path) == 0 and ran[2:] == ["STEPS = 40  # in the browser: 10"]
    write_source(tmp_path, "# %% [markdown]\n# # A lesson\n\n# %%\nSTEPS = 40  # in the browser: 0\n")
    assert program.main([], tmp_path) == 1 and "FAILED: a claim does not hold" in capsys.readouterr().out


@pytest.mark.long
def test_cells_see_the_variables_that_a_lesson_is_run_with(program):
    cell = program.nbformat.v4.new_code_cell("import os\nprint(os.environ['MINILORA_CACHE'])")
    notebook = program.nbformat.v4.new_notebook(cells=[cell])
    program.run(notebook, MINILORA_CACHE="/nowhere")
    assert notebook.cells[0].outputs[0].text == "/nowhere\n"


def test_words_alone_are_written_without_running_and_code_is_refused(lesson, program, tmp_path, monkeypatch, capsys):
    target = write_source(tmp_path, LESSON.replace("# # A lesson", "# # A better lesson"))
    monkeypatch.setattr(program, "run", lambda notebook: pytest.fail("a cell was run"))
    assert program.main(["--words"], tmp_path) == 1  # there is no notebook yet
    target.write_bytes(lesson.read_bytes())
    assert program.main(["--words"], tmp_path) == 0
    assert outputs(target) == outputs(lesson) and b"# A better lesson" in target.read_bytes()
    monkeypatch.setattr(program, "SETUP", "import minilora")  # the cell that installs is no part of the lesson
    assert program.main(["--words"], tmp_path) == 0 and b'"import minilora"' in target.read_bytes()
    write_source(tmp_path, LESSON.replace("3.14159", "3"))
    assert program.main(["--words"], tmp_path) == 1 and "the code has changed, too" in capsys.readouterr().out


def test_a_lesson_that_needs_the_real_model_keeps_its_outputs_where_there_is_none(
    lesson, program, replayed, tmp_path, monkeypatch, capsys
):
    needs = {1: Lesson(1, "01_demo", "Does it?", (5,), (), "nothing", True, needs_model=True)}
    monkeypatch.setattr(program, "LESSONS", needs)
    target = write_source(tmp_path, LESSON)
    monkeypatch.setattr(program.zoo, "find", lambda name: tmp_path)
    assert program.main([], tmp_path) == 0
    built = outputs(target)
    monkeypatch.setattr(program.zoo, "find", lambda name: None)
    monkeypatch.setattr(program, "run", lambda notebook: pytest.fail("a cell was run"))
    write_source(tmp_path, LESSON.replace("# # A lesson", "# # A better lesson"))
    assert program.main([], tmp_path) == 0 and program.main(["--check"], tmp_path) == 0
    assert outputs(target) == built and b"# A better lesson" in target.read_bytes()
    assert "outputs kept: to run it needs the real model (minilora pull smollm2)" in capsys.readouterr().out
    write_source(tmp_path, LESSON.replace("3.14159", "3"))
    assert program.main(["--check"], tmp_path) == 1
    assert "its code has changed, too: to run it needs the real model" in capsys.readouterr().out


def test_a_lesson_that_trains_the_real_model_may_take_longer(program):
    notebook = program.nbformat.v4.new_notebook()
    notebook.metadata.minilora = {"seconds": program.LIMITS["seconds"] + 1}
    assert program.over_limits(notebook) == ["61 seconds, at most 60"]
    notebook.metadata.minilora.needs_model = True
    assert program.over_limits(notebook) == []


def test_check_finds_a_change_of_the_source_and_writes_nothing(lesson, program, replayed, tmp_path, capsys):
    target = write_source(tmp_path, LESSON)
    target.write_bytes(lesson.read_bytes())
    assert program.main(["--check"], tmp_path) == 0
    write_source(tmp_path, LESSON.replace("3.14159", "2.71828"))
    assert program.main(["--check"], tmp_path) == 1
    assert capsys.readouterr().out.splitlines()[1].startswith("01_demo.ipynb: FAILED: cell 4 has 'print(")
    assert target.read_bytes() == lesson.read_bytes()


def test_check_compares_text_and_small_numbers_but_no_pictures_and_no_measurements(lesson, program):
    built = program.nbformat.read(lesson, as_version=4)
    wanted = copy.deepcopy(built)
    _, _, _, cell, measured = wanted.cells
    cell.outputs[1].data["image/png"] = "another picture"
    measured.outputs[0].text = "17\n"
    cell.outputs[0].text = "the loss is 3.14160\n"
    assert program.differences(built, wanted) is None
    cell.outputs[0].text = "the loss is 3.24\n"
    assert "cell 4 has 'the loss is 3.14159'" in program.differences(built, wanted)
    cell.outputs[0].text = "a loss is 3.14159\n"
    assert "its source gives 'a loss" in program.differences(built, wanted)
    cell.outputs[0].text = "the loss is 3.24\n"
    assert program.differences(built, wanted, compare_numbers=False) is None
    cell.source += "  # 1"
    assert "# 1" in program.differences(built, wanted, compare_numbers=False)
    del wanted.cells[0]
    assert program.differences(built, wanted)


@pytest.mark.parametrize(
    "a, b, same",
    [
        ("1,216 parameters", "1,217 parameters", True),
        ("1,216 parameters", "1,316 parameters", False),
        ("r=8: 0.5e-3", "r=8: 0.5e-4", False),
        ("[1 2]", "[1 2 3]", False),
        ("ok", "OK", False),
        ("off: 7.9e-06 (claimed: 0 to 0.001): holds", "off: 0 (claimed: 0 to 0.001): holds", True),
        ("off: 7.9e-06 (claimed: 0 to 0.001): holds", "off: 7.9e-04 (claimed: 0 to 0.001): holds", False),
        ("off: 7.9e-06", "off: 0", False),
    ],
)
def test_numbers_may_move_by_one_percent_and_a_claim_by_what_rounding_leaves(program, a, b, same):
    assert program.same_line(a, b) is same


def test_without_numbers_only_words_and_their_order_are_compared(program):
    assert program.same_line("loss    9.98, r 8", "loss   10.02, r 4", compare_numbers=False)
    assert not program.same_line("holds: 2", "fails: 2", compare_numbers=False)
    assert not program.same_line("[1 2]", "[1 2 3]", compare_numbers=False)


@pytest.mark.parametrize(
    "code, line",
    [
        ("import sys; print('careful', file=sys.stderr)", "writes to stderr: careful"),
        (NO_LABELS, "a cell stops with AssertionError: the picture: "),
    ],
)
def test_a_lesson_that_fails_is_one_line_and_the_old_notebook_stays(code, line, program, tmp_path, capsys):
    target = write_source(tmp_path, f"# %%\n{code}\n")
    target.write_text("old")
    assert program.main([], tmp_path) == 1
    said = capsys.readouterr().out
    assert said.startswith("01_demo.ipynb: FAILED: ") and line in said and said.count("\n") == 1
    assert target.read_text() == "old"


def test_a_lesson_that_was_never_built_is_noticed(program, replayed, tmp_path, capsys):
    write_source(tmp_path, "# %% [markdown]\n# Text\n")
    assert program.main(["--check"], tmp_path) == 1
    assert "has not been built" in capsys.readouterr().out


def test_a_name_that_no_source_has_lists_those_there_are(program, capsys):
    with pytest.raises(SystemExit):
        program.main(["08_laura"])
    assert "no source is called 08_laura: there are 00_" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["", "exercises"])
def test_a_built_notebook_has_the_cells_of_its_source(folder, program):
    if folder:
        pytest.importorskip("nbgrader", reason="exercises are built by pip install '.[instructor]'")
    for source in (source for source in SOURCES if source.parent.name == folder):
        notebook = program.read_source(LESSONS / "src" / source)
        if folder:
            notebook = program.without_solutions(notebook)
        built = BUILT[source.with_suffix(".ipynb").as_posix()]["cells"]
        assert [cell.source for cell in notebook.cells] == ["".join(cell["source"]) for cell in built], source
        assert [cell.id for cell in notebook.cells] == [cell["id"] for cell in built], source


@pytest.mark.parametrize("name", ["02_tape.ipynb", pytest.param("05_transformer.ipynb", marks=pytest.mark.long)])
def test_a_cell_of_a_lesson_that_does_not_train_can_be_run_twice(name, tmp_path, monkeypatch):
    """A claim that fails raises."""
    monkeypatch.chdir(tmp_path)
    _, printed = run_here([cell for cell in BUILT[name]["cells"] for _ in range(2)])
    assert [line for line in {*printed.splitlines()} if line.endswith("holds") and printed.count(line) % 2] == []


@each_exercise
def test_an_exercise_runs_alone_before_it_is_solved(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, printed = run_here(BUILT[name]["cells"])
    asked = sorted(e.number for e in EXERCISES.values() if e.lesson == int(name.split("/")[1][:2]))
    written = [line for line in printed.splitlines() if re.match(r"\d+\.\d ", line)]
    assert written == [f"{number}  not written yet" for number in asked]
