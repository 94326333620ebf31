"""A course in nbgrader, from a clone to grades.csv: one right, one wrong and one empty submission of each exercise.

The commands are those of lessons/README.md.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbgrader", reason="needs pip install '.[lessons,instructor]'")

LESSONS = Path(__file__).parents[2] / "lessons"
EXERCISES = sorted(path.stem for path in (LESSONS / "exercises").glob("*.ipynb"))
MISTAKE = {  # a line of each solution, and what a student might have written
    "08_lora": ("dA = du.T @ x", "dA = alpha * (g @ B).T @ x"),
    "11_what_lora_saves": ("return 4 * (base + adapter + learns + 2 * learns)", "return 4 * (adapter + 3 * learns)"),
}

pytestmark = [pytest.mark.instructor, pytest.mark.timeout(900)]


def run(course, *command):
    environment = os.environ | {  # nbgrader calls alembic, which is installed beside it
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "JUPYTER_CONFIG_DIR": str(course / ".jupyter"),
        "IPYTHONDIR": str(course / ".ipython"),
    }
    done = subprocess.run(
        [sys.executable, *command], cwd=course, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course folder with its released exercises, three students' submissions, and their grades."""
    folder = tmp_path_factory.mktemp("course")
    run(folder, str(LESSONS / "build.py"), "--instructor", ".")
    for name in EXERCISES:
        run(folder, "-m", "nbgrader", "generate_assignment", name)
        stub = (LESSONS / "exercises" / f"{name}.ipynb").read_text("utf-8")  # what students get from the repository
        right = json.loads(stub)
        solved = {cell["id"]: cell for cell in json.loads(source_of(folder, name))["cells"]}
        answers = [cell for cell in solved.values() if cell["metadata"].get("nbgrader", {}).get("solution")]
        stubs = [cell for cell in right["cells"] if cell["metadata"].get("nbgrader", {}).get("solution")]
        for cell, answer in zip(stubs, answers, strict=True):
            cell["source"] = answer["source"]
        submit(folder, "right", name, json.dumps(right))
        line, mistake = MISTAKE[name]
        wrong = json.dumps(right).replace(line, mistake)
        assert wrong != json.dumps(right)
        submit(folder, "wrong", name, wrong)
        submit(folder, "empty", name, stub)
        run(folder, "-m", "nbgrader", "autograde", name, "--create")
        run(folder, "-m", "nbgrader", "generate_feedback", name)
    run(folder, "-m", "nbgrader", "export", "--to", "grades.csv")
    return folder


def source_of(folder, name):
    return (folder / "source" / name / f"{name}.ipynb").read_text("utf-8")


def submit(folder, student, name, text):
    target = folder / "submitted" / student / name / f"{name}.ipynb"
    target.parent.mkdir(parents=True)
    target.write_text(text, "utf-8")


@pytest.fixture(scope="module")
def grades(course):
    with (course / "grades.csv").open(newline="") as file:
        return {(row["assignment"], row["student_id"]): row for row in csv.DictReader(file)}


@pytest.mark.parametrize("name", EXERCISES)
@pytest.mark.parametrize("student, points", [("right", 8), ("empty", 0)])
def test_all_points_for_a_right_submission_and_none_for_an_empty_one(grades, name, student, points):
    assert float(grades[name, student]["score"]) == points and float(grades[name, student]["max_score"]) == 8


@pytest.mark.parametrize("name, points", [("08_lora", 4), ("11_what_lora_saves", 2)])
def test_a_mistake_costs_the_points_of_what_it_breaks(grades, name, points):
    assert float(grades[name, "wrong"]["score"]) == points


@pytest.mark.parametrize("name", EXERCISES)
def test_the_feedback_tells_the_student_what_is_wrong(course, name):
    page = (course / "feedback" / "wrong" / name / f"{name}.html").read_text("utf-8")
    assert {"08_lora": "dA: scale is alpha / r, not alpha", "11_what_lora_saves": "full fine-tuning:"}[name] in page


@pytest.mark.parametrize("name", EXERCISES)
def test_nbgrader_releases_what_the_repository_ships(course, name):
    released = json.loads((course / "release" / name / f"{name}.ipynb").read_text("utf-8"))
    shipped = json.loads((LESSONS / "exercises" / f"{name}.ipynb").read_text("utf-8"))
    assert released["cells"] == shipped["cells"]
