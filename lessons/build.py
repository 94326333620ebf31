"""Turn the sources in lessons/src into notebooks. Run it from anywhere:

    python lessons/build.py                       build all: lessons run, exercises lose their solutions
    python lessons/build.py 08_lora               only the sources of this name
    python lessons/build.py --check               write nothing; say what does not match its source, and exit with 1
    python lessons/build.py --fresh               run the cells tagged `measured` for new outputs, too
    python lessons/build.py --instructor FOLDER   a course folder for nbgrader, its exercises with their solutions

A source is a Python file in jupytext's percent format. A second build gives the same bytes: cells are named after what
they hold, times and versions are left out. What no two runs share, such as measured seconds, stands in cells tagged
`measured` (`# %% tags=["measured"]`), which keep their outputs from the build before as long as their code is the same.

Needs `pip install '.[lessons]'`, and '.[instructor]' for the exercises.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import os
import re
import shutil
import sys
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jupytext
import nbformat

HERE = Path(__file__).resolve().parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
SAME = 0.01  # --check: how much a number may move, relatively; another processor rounds in another way
CELL_TIMEOUT = 300  # seconds


class LessonError(Exception):
    """A source that cannot be built, in one line."""


def read_source(path: Path) -> nbformat.NotebookNode:
    """The notebook that a percent file describes, not yet run; cells are named after their content."""
    notebook = jupytext.read(path)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: Counter[str] = Counter()
    for cell in notebook.cells:
        cell.metadata.pop("lines_to_next_cell", None)  # jupytext's, about blank lines in the source
        digest = hashlib.sha256(f"{cell.cell_type} {cell.source}".encode()).hexdigest()[:10]
        seen[digest] += 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    return notebook


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells in `folder`. Raises LessonError for a cell that fails or writes to stderr."""
    import matplotlib.font_manager  # noqa: F401  builds its cache here, where the message is in no cell
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_TIMEOUT,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("MINILORA_STRICT", "MPLBACKEND")}
    try:
        client.execute(env=environment | {"PYTHONHASHSEED": "0"})
    except CellExecutionError as error:
        raise LessonError(f"a cell stops with {error.ename}: {error.evalue.partition(chr(10))[0]}") from None
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise LessonError(f"cell {cell.id} writes to stderr: {output.text.strip().splitlines()[0]}")
    shrink_pictures(notebook)
    notebook.metadata.language_info = {"name": "python"}  # without the version


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
    """Give the cells tagged `measured` the outputs they had, if their code has not changed."""
    outputs = {cell.id: cell.outputs for cell in before.cells if cell.cell_type == "code" and cell.execution_count}
    for cell in notebook.cells:
        if is_measured(cell) and cell.id in outputs:
            cell.outputs = outputs[cell.id]


def is_measured(cell: nbformat.NotebookNode) -> bool:
    """Do the outputs of this cell differ from run to run?"""
    return "measured" in cell.metadata.get("tags", [])


def without_solutions(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook that students get, as nbgrader makes it: stubs in place of solutions, checks locked."""
    from nbgrader.preprocessors import CheckCellMetadata, ClearSolutions, ComputeChecksums, LockCells
    from traitlets.config import PyFileConfigLoader

    config = PyFileConfigLoader("nbgrader_config.py", path=str(HERE)).load_config()
    resources: dict[str, Any] = {}
    for step in (LockCells, ClearSolutions, ComputeChecksums, CheckCellMetadata):
        notebook, resources = step(config=config).preprocess(notebook, resources)
    return notebook


def build(source: Path, target: Path, fresh: bool) -> nbformat.NotebookNode:
    """The finished notebook of a source. `target` is only read, for what was measured before."""
    notebook = read_source(source)
    if source.parent.name == "exercises":
        return without_solutions(notebook)
    run(notebook, target.parent)
    if target.exists() and not fresh:
        keep_measured(notebook, nbformat.read(target, as_version=4))
    return notebook


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


def same_line(a: str, b: str) -> bool:
    """Equal, but for numbers that moved by less than SAME."""
    if a == b:
        return True
    numbers = [[float(number.replace(",", "")) for number in NUMBER.findall(line)] for line in (a, b)]
    if NUMBER.sub("#", a) != NUMBER.sub("#", b):
        return False
    return all(abs(x - y) <= SAME * max(abs(x), abs(y)) for x, y in zip(*numbers, strict=True))


def differences(built: nbformat.NotebookNode, wanted: nbformat.NotebookNode) -> str | None:
    """The first line in which two notebooks differ, pictures and measurements aside."""
    for number, (old, new) in enumerate(zip_longest(built.cells, wanted.cells), 1):
        if old is None or new is None:
            return f"it has {len(built.cells)} cells, its source {len(wanted.cells)}"
        if old.cell_type != new.cell_type or old.metadata != new.metadata:
            return f"cell {number} is of another kind or has other tags than its source says"
        for a, b in zip_longest(text_of(old), text_of(new), fillvalue=""):
            if not same_line(a, b):
                return f"cell {number} has {a!r}, its source gives {b!r}"
    return None


def make_course(folder: Path, sources: list[Path]) -> None:
    """Lay out nbgrader's folders: source/NAME/NAME.ipynb with the solutions, and its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "nbgrader_config.py", folder)
    for source in sources:
        write(read_source(source), folder / "source" / source.stem / f"{source.stem}.ipynb")
        print(f"{folder / 'source' / source.stem / source.stem}.ipynb", flush=True)


def main(arguments: list[str] | None = None, here: Path = HERE) -> int:
    """The command line; `here` is the folder that holds src/. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Turn lesson sources into notebooks.")
    parser.add_argument("names", nargs="*", help="names of sources, as 08_lora; all if none is given")
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    parser.add_argument("--fresh", action="store_true", help="do not keep what was measured before")
    parser.add_argument("--instructor", type=Path, metavar="FOLDER", help="make a course folder for nbgrader")
    options = parser.parse_args(arguments)
    found = sorted((here / "src").glob("[0-9]*.py")) + sorted((here / "src" / "exercises").glob("[0-9]*.py"))
    if unknown := set(options.names) - {source.stem for source in found}:
        parser.error(f"no source is called {min(unknown)}: there are {', '.join(sorted({s.stem for s in found}))}")
    sources = [source for source in found if not options.names or source.stem in options.names]
    if options.instructor:
        make_course(options.instructor, [source for source in sources if source.parent.name == "exercises"])
        return 0
    failed = False
    for source in sources:
        target = here / source.relative_to(here / "src").with_suffix(".ipynb")
        line = "matches its source" if options.check else "built"
        try:
            notebook = build(source, target, options.fresh)
            if not options.check:
                write(notebook, target)
            elif not target.exists():
                raise LessonError("has not been built")
            elif difference := differences(nbformat.read(target, as_version=4), notebook):
                raise LessonError(difference)
        except LessonError as error:
            line, failed = f"FAILED: {error}", True
        print(f"{target.relative_to(here)}: {line}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
