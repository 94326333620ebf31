"""Turn the sources in lessons/src into notebooks. Run it from anywhere:

    python lessons/build.py                       build all: lessons run, exercises lose their solutions
    python lessons/build.py 09_lora               only the sources of this name
    python lessons/build.py --check               write nothing; say what does not match its source, and exit with 1
    python lessons/build.py --check --numbers     the same for printed numbers: on a processor as before
    python lessons/build.py --words               write changes of the text alone, without running a cell
    python lessons/build.py --fresh               run the cells tagged `measured` for new outputs, too
    python lessons/build.py --pages               write the tables of the pages, and the map of the course
    python lessons/build.py --instructor FOLDER   a course folder for nbgrader, its exercises with their solutions
        --variant 1                               in another form of the exercises than the public one
        --overlay FOLDER                          with tests of your own, from FOLDER/NN_name.py

A source is a Python file in jupytext's percent format; src/TEMPLATE.md says what it holds. A second build gives the
same bytes: cells are named after what they hold, times and versions are left out. What no two runs share, such as
measured seconds, is in cells tagged `measured` (`# %% tags=["measured"]`), which keep their outputs from the build
before as long as their code is the same.

A lesson that needs the real model (in plan.toml) is run where the model is. Elsewhere its outputs stay what they
are, as with --words, and its code must be that of the notebook.

Needs `pip install '.[lessons]'`, and '.[instructor]' for the exercises.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from copy import deepcopy
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from tables import filled, mistakes, outcomes, plans, variants
from times import words_of_prose

from minilora.course.copy import smaller, without_links
from minilora.course.edits import source_of
from minilora.course.exercises import EXERCISES
from minilora.course.map import map_figure
from minilora.course.pages import course_map
from minilora.course.plan import LESSONS
from minilora.models import load as zoo
from minilora.pages.style import save_themes

HERE = Path(__file__).resolve().parent
MAP = HERE / "pictures" / "course-map.svg"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
SAME = 0.01  # --check --numbers: how much a number may move, relatively
NOISE = 1e-4  # and how much where a claim bounds it: what is left of two equal sums is rounding and nothing else
CELL_TIMEOUT = 1800  # seconds; a busy machine may need many for one that trains the real model
LIMITS = {"words of prose": 1600, "cells": 30, "lines of imports": 8, "seconds": 60, "kilobytes": 300}
# What the kernel runs before the first cell, so that a picture that cannot be read stops the lesson.
AT_START = (
    f"import sys; sys.path.append({str(HERE.parent / 'tests')!r})",
    "import figure_check; figure_check.watch_show()",
)
MODEL_SECONDS = 300  # for a lesson that trains the real model
SETUP = """# In Colab or Binder, this cell installs minilora. Where it is installed, nothing happens.
import importlib.util
import os
import pathlib

if importlib.util.find_spec("minilora") is None:
    clone = next((str(p) for p in pathlib.Path.cwd().parents if (p / "minilora" / "course").exists()), None)
    if wheel := os.environ.get("MINILORA_WHEEL") or clone:
        %pip install --quiet "$wheel"
    else:
        print("minilora is missing: run %env MINILORA_WHEEL=URL (or path) of its wheel, then this cell again")"""
GRADED = {"grade": False, "locked": False, "schema_version": 3, "solution": True, "task": False}
CHECK = GRADED | {"grade": True, "locked": True, "solution": False}


class LessonError(Exception):
    """A source that cannot be built, in one line."""


def read_source(path: Path, variant: int | None = None) -> nbformat.NotebookNode:
    """The notebook that a percent file describes, not yet run; cells are named after their content.

    Put in: the cell that installs minilora, a line on time and prerequisites below a lesson's title, and a check below
    each exercise. variant: which form of the exercises.
    """
    notebook = jupytext.read(path)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    if path.parent.name == "exercises":
        notebook.cells = [new for cell in notebook.cells for new in with_check(cell, variant)]
        if variant is not None:
            say_variant(notebook, variant)
    elif lesson := next((row for row in LESSONS.values() if row.name == path.stem), None):
        title, _, rest = notebook.cells[0].source.partition("\n")
        notebook.cells[0].source = f"{title}\n\n{lesson.head}\n{rest}"
        notebook.metadata.minilora = {"needs_model": lesson.needs_model} if lesson.needs_model else {}
    first = next((i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"), len(notebook.cells))
    notebook.cells.insert(first, nbformat.v4.new_code_cell(SETUP, metadata={"tags": ["setup"]}))
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        cell.metadata.pop("lines_to_next_cell", None)  # jupytext's, about blank lines in the source
        digest = hashlib.sha256(f"{cell.cell_type} {cell.source}".encode()).hexdigest()[:10]
        seen[digest] += 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    return notebook


def with_check(cell: nbformat.NotebookNode, variant: int | None) -> list[nbformat.NotebookNode]:
    """The cells of a stub (`# %% points=2`): with its solution, as nbgrader marks one, and its check. Others stay.

    The solution is written once, in minilora/course/lessonNN.py. Its signature and its docstring are the stub.
    """
    points = cell.metadata.pop("points", None)
    if points is None:
        return [cell]
    names = [name for name in re.findall(r"^def (\w+)", cell.source, re.MULTILINE) if name in EXERCISES]
    if len(names) != 1:
        raise LessonError(f"a cell with points must define one exercise of minilora.course, got {names or 'none'}")
    (name,) = names
    stub, body = source_of(EXERCISES[name].forms[0].reference)
    if cell.source.strip() != stub.strip():
        raise LessonError(f"the stub of {name} is not the signature and docstring of its solution:\n{stub}")
    cell.source = f"{stub.rstrip()}\n    ### BEGIN SOLUTION\n{body.rstrip()}\n    ### END SOLUTION"
    cell.metadata["nbgrader"] = GRADED | {"grade_id": name}
    argument = "" if variant is None else f", variant={variant}"
    share = f", points={points}" if name.startswith("test_") else ""  # a bug hunt: a part of the points can be won
    source = f"from minilora.course import check\n\ncheck({name}{argument}{share})"
    settings = CHECK | {"grade_id": f"check_{name}", "points": points}
    return [cell, nbformat.v4.new_code_cell(source, metadata={"nbgrader": settings})]


def say_variant(notebook: nbformat.NotebookNode, variant: int) -> None:
    """Put a variant's words instead of those of the public form, in all cells. Exercises of a page may share words.

    In text, the words may go on in the next line.
    """
    names = [cell.metadata.nbgrader.grade_id for cell in notebook.cells if "nbgrader" in cell.metadata]
    asked = [EXERCISES[name].form(variant) for name in names if name in EXERCISES]
    for old, new in dict(pair for form in asked for pair in form.replaces.items()).items():
        before = [cell.source for cell in notebook.cells]
        words = r"\s+".join(map(re.escape, old.split()))
        for cell in notebook.cells:
            pattern = words if cell.cell_type == "markdown" else re.escape(old)
            cell.source = re.sub(pattern, new.replace("\\", r"\\"), cell.source)
        if before == [cell.source for cell in notebook.cells]:
            raise LessonError(f"variant {variant} replaces {old!r}, which the page does not hold")


def run(notebook: nbformat.NotebookNode, **variables: str) -> None:
    """Run all cells in an empty folder, with more environment variables.

    Raises LessonError for a cell that fails or writes to stderr.
    """
    import matplotlib.font_manager  # noqa: F401  builds its cache here, where the message is in no cell
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    environment = {name: value for name, value in os.environ.items() if name not in ("MINILORA_STRICT", "MPLBACKEND")}
    environment |= {"PYTHONHASHSEED": "0"} | variables
    if "PYTHONPATH" in environment:  # of a clone: it holds in another folder, too
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, environment["PYTHONPATH"].split(os.pathsep)))
    start, used = time.perf_counter(), sum(os.times()[2:4])  # used: by processes that this one started
    with tempfile.TemporaryDirectory(prefix="lesson") as alone:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=CELL_TIMEOUT,
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=[f"--IPKernelApp.exec_lines={line}" for line in AT_START],
            resources={"metadata": {"path": alone}},
        )
        try:
            client.execute(env=environment)
        except CellExecutionError as error:
            raise LessonError(f"a cell stops with {error.ename}: {error.evalue.partition(chr(10))[0]}") from None
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise LessonError(f"cell {cell.id} writes to stderr: {output.text.strip().splitlines()[0]}")
    shrink_pictures(notebook)
    notebook.metadata.language_info = {"name": "python"}  # without the version
    about = notebook.metadata.get("minilora", {})
    waited, computed = time.perf_counter() - start, sum(os.times()[2:4]) - used
    # On a busy machine a lesson waits. What it would take on an idle one is at most what it computed.
    notebook.metadata.minilora = about | {"seconds": round(min(waited, computed or waited))}


def shrink_pictures(notebook: nbformat.NotebookNode) -> None:
    """Store pictures with a palette of 64 colours, which is what a diagram needs: a third of the bytes."""
    from PIL import Image  # comes with matplotlib

    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if png := output.get("data", {}).get("image/png"):
            small = io.BytesIO()
            picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
            picture.quantize(64, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
            output["data"]["image/png"] = base64.b64encode(small.getvalue()).decode() + "\n"


def keep_measured(notebook: nbformat.NotebookNode, before: nbformat.NotebookNode) -> None:
    """Give the cells tagged `measured` the outputs they had, if their code has not changed; the seconds of all, too."""
    outputs = {cell.id: cell.outputs for cell in before.cells if cell.cell_type == "code" and cell.execution_count}
    code = [[cell.source for cell in book.cells if cell.cell_type == "code"] for book in (notebook, before)]
    if code[0] == code[1]:
        notebook.metadata.minilora = before.metadata.get("minilora", notebook.metadata.minilora)
    for cell in notebook.cells:
        if is_measured(cell) and cell.id in outputs:
            cell.outputs = outputs[cell.id]


def is_setup(cell: nbformat.NotebookNode) -> bool:
    """Is it the cell that installs minilora?"""
    return "setup" in cell.metadata.get("tags", [])


def is_measured(cell: nbformat.NotebookNode) -> bool:
    """Do the outputs of this cell differ from run to run?"""
    return "measured" in cell.metadata.get("tags", [])


def without_solutions(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook that students get, as nbgrader makes it: stubs instead of solutions, checks locked."""
    from nbgrader.preprocessors import CheckCellMetadata, ClearSolutions, ComputeChecksums, LockCells
    from traitlets.config import PyFileConfigLoader

    config = PyFileConfigLoader("nbgrader_config.py", path=str(HERE)).load_config()
    resources: dict[str, Any] = {}
    for step in (LockCells, ClearSolutions, ComputeChecksums, CheckCellMetadata):
        notebook, resources = step(config=config).preprocess(notebook, resources)
    return notebook


def keep_all(notebook: nbformat.NotebookNode, target: Path) -> None:
    """Give all cells the outputs of the notebook before. Raises LessonError if there is none, or with other code."""
    before = nbformat.read(target, as_version=4) if target.exists() else nbformat.v4.new_notebook()
    old, new = ([cell for cell in book.cells if cell.cell_type == "code"] for book in (before, notebook))
    if [cell.source for cell in old if not is_setup(cell)] != [cell.source for cell in new if not is_setup(cell)]:
        raise LessonError(
            "its code has changed, too: to run it needs the real model (minilora pull smollm2)"
            if not_here(notebook)
            else "--words is for changes of the text, and the code has changed, too"
        )
    for cell, same in zip(new, old, strict=True):
        cell.outputs, cell.execution_count = same.outputs, same.execution_count
    notebook.metadata.minilora = before.metadata.get("minilora", {})


def in_browser(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """The notebook with the values that marked lines have in the browser; None if no line is marked."""
    less = deepcopy(notebook)
    for cell in less.cells:
        cell.source = smaller(cell.source)
    return less if less.cells != notebook.cells else None


def build(source: Path, target: Path, fresh: bool, words: bool, check: bool = False) -> nbformat.NotebookNode:
    """The finished notebook of a source. `target` is only read, for what was measured before.

    If lines are marked for the browser, the lesson is run with their values, too, so that its claims hold there. check:
    not now.
    """
    notebook = read_source(source)
    if source.parent.name == "exercises":
        return without_solutions(notebook)
    if words or not_here(notebook):
        keep_all(notebook, target)
        return notebook
    run(notebook)
    if not check and (less := in_browser(notebook)):
        with tempfile.TemporaryDirectory() as nothing:  # a browser has no downloaded model
            run(less, MINILORA_CACHE=nothing)
    if target.exists() and not fresh:
        keep_measured(notebook, nbformat.read(target, as_version=4))
    return notebook


def not_here(notebook: nbformat.NotebookNode) -> bool:
    """Does it need the real model on a machine that has none?"""
    return bool(notebook.metadata.get("minilora", {}).get("needs_model")) and zoo.find("smollm2") is None


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook whole, or not at all."""
    nbformat.validate(notebook)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    try:
        nbformat.write(notebook, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def text_of(cell: nbformat.NotebookNode) -> list[str]:
    """A cell's source and the text it puts out, line by line; no pictures, and nothing that was measured."""
    lines = cell.source.splitlines()
    for output in [] if is_measured(cell) else cell.get("outputs", []):
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        lines += text.splitlines()
    return lines


def same_line(a: str, b: str, compare_numbers: bool = True) -> bool:
    """Equal, but for numbers that moved by less than SAME, or by less than NOISE where a claim holds them.

    compare_numbers: if False, numbers may move by any amount. Another processor rounds in another way, and training
        amplifies it; the claims of a lesson hold its numbers in bands, wherever it runs.
    """
    if a == b:
        return True
    if NUMBER.sub("#", a).split() != NUMBER.sub("#", b).split():  # a shorter number leaves more spaces
        return False
    if not compare_numbers:
        return True
    numbers = [[float(number.replace(",", "")) for number in NUMBER.findall(line)] for line in (a, b)]
    noise = NOISE if " (claimed: " in a else 0.0
    return all(abs(x - y) <= max(noise, SAME * max(abs(x), abs(y))) for x, y in zip(*numbers, strict=True))


def differences(
    built: nbformat.NotebookNode, wanted: nbformat.NotebookNode, compare_numbers: bool = True
) -> str | None:
    """The first line in which two notebooks differ, pictures and measurements aside. compare_numbers: of outputs."""
    for number, (old, new) in enumerate(zip_longest(built.cells, wanted.cells), 1):
        if old is None or new is None:
            return f"it has {len(built.cells)} cells, its source {len(wanted.cells)}"
        if old.cell_type != new.cell_type or old.metadata != new.metadata:
            return f"cell {number} is of another kind or has other tags than its source says"
        exact = compare_numbers or old.source != new.source
        for a, b in zip_longest(text_of(old), text_of(new), fillvalue=""):
            if not same_line(a, b, exact):
                return f"cell {number} has {a!r}, its source gives {b!r}"
    return None


def sizes(notebook: nbformat.NotebookNode) -> dict[str, int]:
    """What LIMITS is about."""
    cells = [cell for cell in notebook.cells if not is_setup(cell)]
    prose = " ".join(cell.source for cell in cells if cell.cell_type == "markdown")
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    return {
        "words of prose": words_of_prose(prose),
        "cells": len(cells),
        "lines of imports": len(re.findall(r"^\s*(?:import|from) ", code, re.MULTILINE)),
        "seconds": notebook.metadata.get("minilora", {}).get("seconds", 0),
        "kilobytes": len(nbformat.writes(notebook)) // 1000,
    }


def over_limits(notebook: nbformat.NotebookNode) -> list[str]:
    """Which limits a lesson breaks, as "1,700 words of prose, at most 1,600"."""
    found = sizes(notebook)
    slow = notebook.metadata.get("minilora", {}).get("needs_model")
    limits = LIMITS | ({"seconds": MODEL_SECONDS} if slow else {})
    return [f"{found[what]:,} {what}, at most {most:,}" for what, most in limits.items() if found[what] > most]


def make_course(folder: Path, sources: list[Path], variant: int | None, overlay: Path | None) -> None:
    """Lay out nbgrader's folders: source/NAME/NAME.ipynb with the solutions, and its configuration.

    overlay: a folder of NAME.py; each function `test_NAME_OF_EXERCISE(function)` in them becomes hidden lines of that
    exercise's check, which nbgrader takes out of what students get.

    Raises LessonError for an overlay that is no folder, or has a file that belongs to none of all sources.
    """
    if overlay:
        refuse_other_files(overlay)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "nbgrader_config.py", folder)
    for source in sources:
        notebook = read_source(source, variant)
        if not any("nbgrader" in cell.metadata for cell in notebook.cells):
            continue  # the self-test: nothing in it is graded
        for cell in notebook.cells:
            if cell.cell_type == "markdown":  # a student gets this page alone
                cell.source = without_links(cell.source, f"exercises/{source.stem}.ipynb")
        if overlay and (own := overlay / source.name).exists():
            hide_tests(notebook, own)
        write(notebook, folder / "source" / source.stem / f"{source.stem}.ipynb")
        print(f"{folder / 'source' / source.stem / source.stem}.ipynb", flush=True)


def refuse_other_files(overlay: Path) -> None:
    """Raise LessonError unless each Python file of an overlay has the name of an exercise page's source."""
    if not overlay.is_dir():
        raise LessonError(f"--overlay {overlay}: there is no such folder")
    known = {source.name for source in (HERE / "src" / "exercises").glob("[0-9]*.py")}
    if other := sorted({path.name for path in overlay.glob("*.py")} - known):
        raise LessonError(f"{overlay / other[0]} belongs to no page of exercises: their names are as {min(known)}")


def pages() -> dict[Path, str]:
    """The pages next to this program as they should be, their tables made from the plan and from the exercises."""
    tables = {
        "README.md": {"map": course_map(HERE), "plans": plans()},
        "INSTRUCTORS.md": {"outcomes": outcomes()},
        "MISTAKES.md": {"variants": variants(), "mistakes": mistakes()},
    }
    return {HERE / name: filled((HERE / name).read_text("utf-8"), **parts) for name, parts in tables.items()}


def hide_tests(notebook: nbformat.NotebookNode, overlay: Path) -> None:
    """Append an overlay's tests to the checks they belong to, between nbgrader's marks for hidden tests."""
    text = overlay.read_text("utf-8")
    tree = ast.parse(text)
    kinds = (ast.FunctionDef, ast.Import, ast.ImportFrom)
    for node in tree.body[ast.get_docstring(tree) is not None :]:
        if not isinstance(node, kinds):
            what = (ast.get_source_segment(text, node) or "").splitlines()[0]
            raise LessonError(
                f"{overlay.name}, line {node.lineno}: {what!r} is no import and no test: put it into a test"
            )
    tests = {node.name: ast.get_source_segment(text, node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    imports = [ast.get_source_segment(text, n) for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    checks = {cell.metadata.nbgrader.grade_id: cell for cell in notebook.cells if "nbgrader" in cell.metadata}
    for name, code in tests.items():
        asked = name.removeprefix("test_")
        if f"check_{asked}" not in checks:
            known = ", ".join(f"test_{key.removeprefix('check_')}" for key in checks if key.startswith("check_"))
            raise LessonError(f"{overlay.name} holds {name}, which belongs to no exercise there: {known}")
        lines = [*imports, code, f"{name}({asked})"]
        hidden = "\n".join(["### BEGIN HIDDEN TESTS", *map(str, lines), "### END HIDDEN TESTS"])
        checks[f"check_{asked}"].source += "\n" + hidden


def main(arguments: list[str] | None = None, here: Path = HERE) -> int:
    """The command line; `here` is the folder that holds src/. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Turn lesson sources into notebooks.")
    parser.add_argument("names", nargs="*", help="names of sources, as 09_lora; all if none is given")
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    parser.add_argument("--numbers", action="store_true", help="with --check: numbers that were printed as well")
    parser.add_argument("--words", action="store_true", help="only the text has changed: run nothing")
    parser.add_argument("--fresh", action="store_true", help="do not keep what was measured before")
    parser.add_argument("--instructor", type=Path, metavar="FOLDER", help="make a course folder for nbgrader")
    parser.add_argument("--pages", action="store_true", help="write the tables of the pages, and the map of the course")
    parser.add_argument("--variant", type=int, metavar="NUMBER", help="with --instructor: which form of the exercises")
    parser.add_argument("--overlay", type=Path, metavar="FOLDER", help="with --instructor: hidden tests of your own")
    options = parser.parse_args(arguments)
    if not options.instructor and (options.variant is not None or options.overlay):
        parser.error("--variant and --overlay belong to --instructor FOLDER")
    found = sorted((here / "src").glob("[0-9]*.py")) + sorted((here / "src" / "exercises").glob("[0-9]*.py"))
    if unknown := set(options.names) - {source.stem for source in found}:
        parser.error(f"no source is called {min(unknown)}: there are {', '.join(sorted({s.stem for s in found}))}")
    sources = [source for source in found if not options.names or source.stem in options.names]
    if options.pages:
        for path, text in pages().items():
            path.write_text(text, "utf-8")
        save_themes(map_figure, MAP)
        return 0
    if options.instructor:
        exercises = [source for source in sources if source.parent.name == "exercises"]
        try:
            make_course(options.instructor, exercises, options.variant, options.overlay)
        except LessonError as error:
            print(f"FAILED: {error}")
            return 1
        return 0
    failed = False
    for source in sources:
        target = here / source.relative_to(here / "src").with_suffix(".ipynb")
        line = "matches its source" if options.check else "built"
        try:
            notebook = build(source, target, options.fresh, options.words, options.check)
            if not options.check:
                write(notebook, target)
            elif not target.exists():
                raise LessonError("has not been built")
            elif difference := differences(nbformat.read(target, as_version=4), notebook, options.numbers):
                raise LessonError(difference)
            if source.parent.name != "exercises" and not options.check:
                line = f"built in {notebook.metadata.minilora.get('seconds', '?')} s"
                if not_here(notebook):
                    line = "outputs kept: to run it needs the real model (minilora pull smollm2)"
                if over := over_limits(notebook):
                    raise LessonError(f"written, but it has {'; '.join(over)}")
        except LessonError as error:
            line, failed = f"FAILED: {error}", True
        print(f"{target.relative_to(here)}: {line}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
