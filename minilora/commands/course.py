"""The commands `minilora course DIR` and `minilora progress`: the course on one's own disk, and how far one is."""

from __future__ import annotations

import argparse
import io
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from ..course import mine
from ..course.exercises import EXERCISES, Exercise
from ..course.judge import NOT_YET, OK, judged
from ..course.pages import course_map, exercises_of
from ..course.plan import LESSONS

README = """# minilora: the course

Open the notebooks in JupyterLab (`pip install jupyterlab && jupyter lab`), lesson by lesson:

{table}

In `exercises/` you write the functions yourself. `check` says in one line what is wrong, and keeps what is right in
`exercises/mine.py`, from where later exercises take it. `minilora progress` shows how far you are and where to go on.

Links to source files lead into minilora's repository; in Python, `help(thing)` ends with the file it is from.
"""


def notebooks() -> Path:
    """The folder of lessons, in the installed package or in the clone. Raises FileNotFoundError without one."""
    for folder in (Path(mine.__file__).parent / "notebooks", Path(__file__).parents[2] / "lessons"):
        if any(folder.glob("[0-9]*.ipynb")):
            return folder
    raise FileNotFoundError("this installation holds no lessons: install minilora again, or take them from a clone")


def copy_course(target: Path) -> str:
    """Write lessons, exercises, an empty mine.py and a README.md into a folder; returns what was done, in lines.

    A file that is there and differs is left alone: it may be the reader's work.
    """
    source = notebooks()
    texts = {path.relative_to(source).as_posix(): path.read_bytes() for path in sorted(source.rglob("[0-9]*.ipynb"))}
    texts = {name: text for name, text in texts.items() if ".ipynb_checkpoints" not in name and "src" not in name}
    texts["README.md"] = README.format(table=course_map(source)).encode()
    texts["exercises/mine.py"] = mine.HEAD.encode()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file: name a folder for the course")
    written, kept = 0, []
    for name, text in texts.items():
        path = target / name
        if path.exists():
            if path.read_bytes() != text:
                kept.append(name)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
        written += 1
    lines = [f"{written} files written to {target}" if written else f"nothing to write: {target} holds the course"]
    if kept:
        lines.append(f"left as they are, since they differ: {', '.join(kept)} (delete or rename one to get it anew)")
    first = min((name for name in texts if name[0].isdigit()), default="")
    return "\n".join([*lines, f"begin with: jupyter lab {target / first}"])


def find_mine(folder: Path) -> Path:
    """Where a reader's mine.py lies: in this folder or in the exercises below it."""
    places = [folder, folder / "exercises", folder / "lessons" / "exercises"]
    return next((place / mine.FILE for place in places if (place / mine.FILE).exists()), folder / mine.FILE)


def progress(folder: Path) -> str:
    """A table of all exercises, each checked on what mine.py holds, and where to go on."""
    if not folder.is_dir():
        raise NotADirectoryError(f"there is no folder {folder}: name the one that holds your mine.py")
    path = find_mine(folder)
    functions = mine.load(path) if path.exists() else {}
    variants = mine.variants(path) if path.exists() else {}
    lines, onward, passed = [], "", 0
    for lesson in LESSONS.values():
        asked = exercises_of(lesson)
        if not asked:
            continue
        said = {e.number: _verdict(e, functions, variants) for e in asked}
        right = sum(line == OK for line in said.values())
        passed += right
        lines.append(f"{lesson.number:>3}  {lesson.question:<44} {right} of {len(asked)}")
        lines += [f"     {e.number:<5} {e.name:<22} {said[e.number]}" for e in asked]
        if not onward and right < len(asked):
            number = next(number for number, line in said.items() if line != OK)
            onward = f"go on with {number} in exercises/{lesson.name}.ipynb"
    where = f"read from {path}" if path.exists() else f"no {mine.FILE} in {folder} yet: it comes with the first ok"
    whole = f"{passed} of {len(EXERCISES)} exercises pass ({where})"
    return "\n".join([*lines, "", whole, onward or "all exercises pass"])


def _verdict(exercise: Exercise, functions: dict, variants: dict[str, int | None]) -> str:
    if exercise.name not in functions:
        return NOT_YET
    with redirect_stdout(io.StringIO()):  # what the answer prints is no part of the table
        return judged(exercise, functions[exercise.name], np.random.default_rng(), variants.get(exercise.name))


HELP = "copy the lessons and exercises into a folder of your own"


def add(parser: argparse.ArgumentParser) -> None:
    """The folder."""
    parser.add_argument("folder", metavar="DIR", help="a folder, made if it is not there; nothing in it is overwritten")


def run(arguments: argparse.Namespace) -> None:
    """Copy lessons and exercises out of the installed package."""
    print(copy_course(Path(arguments.folder)))
