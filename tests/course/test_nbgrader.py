"""A course in nbgrader, from a clone to grades.csv: of some of the exercises a submission whose last answer alone is
wrong, of two exercises also one that is right and one that is empty.

The commands are those of lessons/README.md. What the checks say of every exercise is tested in test_exercises.py.
"""

import csv
import html
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lessonfiles import GRADED, LESSONS, build_program

from minilora.course.copy import without_links
from minilora.course.judge import EXERCISES as EXERCISES_OF

pytest.importorskip("nbgrader", reason="needs pip install '.[lessons,instructor]'")

EXERCISES = sorted(Path(name).stem for name in GRADED)
WHOLE = ["01_gradient", "10_inject"]  # a start takes nbgrader seconds, whatever the exercise
HANDED_IN = sorted({*EXERCISES[2::8], *WHOLE, "09_lora"})
OVERLAY = """
import math

def test_lora_forward(lora_forward):
    assert math.pi > 3 and not hasattr(lora_forward, "sly"), "only the hidden test sees it"
"""

PART = """def test_lora(lora):
    rng = np.random.default_rng(0)
    layer = lora(np.ones((3, 5)), 2, 6, rng)
    assert layer.A.any() and not layer.B.any()
    layer.B += 1
    assert np.allclose(layer.merged(), 1 + 3 * layer.B @ layer.A)
"""

pytestmark = [pytest.mark.instructor, pytest.mark.timeout(1800)]


def run(course, *command):
    environment = os.environ | {  # nbgrader calls alembic, which is installed next to it
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "JUPYTER_CONFIG_DIR": str(course / ".jupyter"),
        "IPYTHONDIR": str(course / ".ipython"),
    }
    done = subprocess.run(
        [sys.executable, *command], cwd=course, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]


def of_each(course, command, *flags):
    """Run a command for one assignment, as an instructor does, and once for all others: each start takes seconds."""
    for name in ("09_lora", "*"):
        run(course, "-m", "nbgrader", command, name, *flags)


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course folder with its released exercises, three students' submissions, and their grades."""
    folder = tmp_path_factory.mktemp("course")
    overlay = tmp_path_factory.mktemp("overlay")
    (overlay / "09_lora.py").write_text(OVERLAY, "utf-8")
    run(folder, str(LESSONS / "build.py"), "--instructor", ".", "--overlay", str(overlay))
    of_each(folder, "generate_assignment")
    for name in HANDED_IN:
        notebook = json.loads((LESSONS / "exercises" / f"{name}.ipynb").read_text("utf-8"))  # of the repository
        both = notebook, json.loads(source_of(folder, name))
        empty, right = (["".join(cell["source"]) for cell in solution_cells(book)] for book in both)
        handed_in = {"wrong": [*right[:-1], f"def {last_function(name)}(*arguments):\n    pass"]}
        handed_in |= {"right": right, "empty": empty} if name in WHOLE else {}
        handed_in |= {"part": [*right[:-1], PART]} if name == "10_inject" else {}
        handed_in |= {"sly": [f"{right[0]}\nlora_forward.sly = True", *right[1:]]} if name == "09_lora" else {}
        handed_in |= {"copied": right} if name == "01_gradient" else {}
        for student, sources in handed_in.items():
            for cell, source in zip(solution_cells(notebook), sources, strict=True):
                cell["source"] = source
            (target := folder / "submitted" / student / name).mkdir(parents=True)
            copy = [solution_cells(notebook)[0] | {"id": "copy"}] if student == "copied" else []
            whole = notebook | {"cells": notebook["cells"] + copy}
            (target / f"{name}.ipynb").write_text(json.dumps(whole), "utf-8")
    of_each(folder, "autograde", "--create")
    of_each(folder, "generate_feedback")
    run(folder, "-m", "nbgrader", "export", "--to", "grades.csv")
    return folder


def solution_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["metadata"].get("nbgrader", {}).get("solution")]


def points_of(name):
    """The points of an assignment's last check."""
    notebook = json.loads((LESSONS / "exercises" / f"{name}.ipynb").read_text("utf-8"))
    return [p for cell in notebook["cells"] if (p := cell["metadata"].get("nbgrader", {}).get("points"))][-1]


def last_function(name):
    """The name of the function that an assignment asks for last: the wrong submission returns None from it."""
    notebook = json.loads((LESSONS / "exercises" / f"{name}.ipynb").read_text("utf-8"))
    return solution_cells(notebook)[-1]["metadata"]["nbgrader"]["grade_id"]


def source_of(folder, name):
    return (folder / "source" / name / f"{name}.ipynb").read_text("utf-8")


@pytest.fixture(scope="module")
def grades(course):
    with (course / "grades.csv").open(newline="") as file:
        return {(row["assignment"], row["student_id"]): row for row in csv.DictReader(file)}


def test_a_cell_that_a_student_has_copied_costs_nothing(grades):
    assert float(grades["01_gradient", "copied"]["score"]) == 8


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("student, points", [("right", 8), ("empty", 0)])
def test_all_points_for_a_right_submission_and_none_for_an_empty_one(grades, name, student, points):
    assert float(grades[name, student]["score"]) == points and float(grades[name, student]["max_score"]) == 8


@pytest.mark.parametrize("name", HANDED_IN)
def test_a_mistake_costs_the_points_of_what_it_breaks(grades, name):
    assert float(grades[name, "wrong"]["score"]) == 8 - points_of(name)


@pytest.mark.parametrize("name", HANDED_IN)
def test_the_feedback_tells_the_student_what_is_wrong(course, name):
    page = html.unescape((course / "feedback" / "wrong" / name / f"{name}.html").read_text("utf-8"))
    known = [mistake.line for mistake in EXERCISES_OF[last_function(name)].forms[0].mistakes]  # None can be an answer
    assert any(line in page for line in ["the function returns None", *known])


def test_a_bug_hunt_gives_a_share_of_its_points(grades):
    assert float(grades["10_inject", "part"]["score"]) == 8 - 2 + 1  # three of six caught


def test_an_overlay_is_in_no_release_and_counts_in_grading(course, grades):
    assert float(grades["09_lora", "sly"]["score"]) == 8 - 2
    released = (course / "release" / "09_lora" / "09_lora.ipynb").read_text("utf-8")
    assert "sly" not in released and "HIDDEN" not in released and "sly" in source_of(course, "09_lora")


@pytest.mark.parametrize("name", EXERCISES)
def test_nbgrader_releases_what_the_repository_ships(course, name):
    released = json.loads((course / "release" / name / f"{name}.ipynb").read_text("utf-8"))
    shipped = json.loads((LESSONS / "exercises" / f"{name}.ipynb").read_text("utf-8"))
    for cell in shipped["cells"]:
        if cell["cell_type"] == "markdown":  # in the exchange a page is alone
            cell["source"] = without_links("".join(cell["source"]), f"exercises/{name}.ipynb").splitlines(keepends=True)
    assert released["cells"] == shipped["cells"]


def test_a_variant_asks_for_another_answer_and_an_overlay_must_fit(tmp_path, capsys):
    build, course = build_program().main, ["--instructor", str(tmp_path), "09_lora"]
    assert build([*course, "--variant", "1"]) == 0
    source = source_of(tmp_path, "09_lora")
    assert "check(lora_forward, variant=1)" in source and "\\\\frac{\\\\alpha}{\\\\sqrt{r}}" in source
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "09_lora.py").write_text("def test_laura(laura):\n    pass\n")
    assert build([*course, "--overlay", str(tmp_path / "own")]) == 1
    assert "test_laura, which belongs to no exercise there: test_lora_forward" in capsys.readouterr().out
