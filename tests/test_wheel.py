"""The wheel: it holds every package and the lessons, and the course works from it alone, far from the repository."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]


def test_every_package_is_in_the_list():
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "minilora").rglob("__init__.py")}
    assert found == set(SETTINGS["packages"]) - set(SETTINGS["package-dir"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy of what it is made of. setuptools must be installed: nothing is downloaded."""
    pytest.importorskip("setuptools", "77", reason="needs setuptools 77 to build the wheel")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("minilora", "lessons"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"  # as pip calls it
    command = [sys.executable, "-c", build, out]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = out.glob("*.whl")
    return file


def test_the_wheel_holds_every_notebook_and_no_source_of_one(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    notebooks = {name.removeprefix("minilora/course/notebooks/") for name in names if name.endswith(".ipynb")}
    lessons = ROOT / "lessons"
    files = [*lessons.glob("[0-9]*.ipynb"), *lessons.glob("exercises/[0-9]*.ipynb")]
    assert notebooks == {file.relative_to(lessons).as_posix() for file in files} and notebooks
    assert not any("/src/" in name or name.startswith("lessons") for name in names)


def test_the_wheel_holds_every_file_that_the_package_reads(wheel):
    kinds = {".html", ".jinja", ".jsonl", ".json", ".safetensors", ".toml", ".txt", ".typed"}
    files = [path for path in (ROOT / "minilora").rglob("*") if path.suffix in kinds and "claims" not in path.parts]
    named = {path.relative_to(ROOT).as_posix() for path in files}
    assert "minilora/data/legal.jsonl" in named and named <= set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_is_small_enough_for_a_browser(wheel):
    assert wheel.stat().st_size < 6e6


def test_the_course_comes_out_of_the_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-m", "minilora", "course", "mine"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "files written to mine" in done.stdout, done.stderr
    lessons = sorted(path.name for path in (ROOT / "lessons").glob("[0-9]*.ipynb"))
    assert sorted(path.name for path in (tmp_path / "mine").glob("[0-9]*.ipynb")) == lessons
