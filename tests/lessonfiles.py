"""The course as it is shipped, for the tests of it: notebooks by name, and the program that builds them."""

import contextlib
import functools
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest

sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema would build its grammar for 2 s: no notebook holds an IRI

LESSONS = Path(__file__).parents[1] / "lessons"
NOTEBOOKS = [path for path in sorted(LESSONS.rglob("[0-9]*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
BUILT = {path.relative_to(LESSONS).as_posix(): json.loads(path.read_text("utf-8")) for path in NOTEBOOKS}
KEPT = [name for name in BUILT if "/" not in name]  # the lessons
GLOSSARY = [  # of lessons/README.md: term, what it is, lesson, its names in PyTorch and in PEFT
    [cell.strip() for cell in line.strip().strip("|").split(" | ")]
    for line in (LESSONS / "README.md")
    .read_text("utf-8")
    .partition("\n## Glossary\n")[2]
    .partition("\n## ")[0]
    .splitlines()
    if line.startswith("| ") and not line.startswith("| term ")
]
SELF_TEST = "exercises/00_self_test.ipynb"  # no exercises of a lesson: nothing in it is graded
GRADED = [name for name in BUILT if name.startswith("exercises/") and name != SELF_TEST]


@functools.cache
def build_program():
    """lessons/build.py as a module, or a skip."""
    for needed in ("jupytext", "nbclient", "ipykernel"):
        pytest.importorskip(needed, reason="building lessons needs pip install '.[lessons]'")
    spec = importlib.util.spec_from_file_location("build", LESSONS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_here(cells):
    """Run a notebook's code cells in this process; returns what they have defined, and what they print."""
    scope, printed = {"__name__": "__main__"}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for cell in cells:
            if cell["cell_type"] == "code" and "setup" not in cell["metadata"].get("tags", []):
                exec("".join(cell["source"]), scope)
    return scope, printed.getvalue()
