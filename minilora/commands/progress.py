"""`minilora progress`: check the exercises that are solved, and say where to continue."""

from __future__ import annotations

import argparse
import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..course.exercises import Exercise

HELP = "check the exercises you have solved, and say where to continue"
MINE = "mine.py"  # what `check` writes


def add(parser: argparse.ArgumentParser) -> None:
    """The folder of mine.py."""
    help = "the course's folder, whose mine.py is run (default: this one)"
    parser.add_argument("folder", nargs="?", default=".", metavar="DIR", help=help)


def run(arguments: argparse.Namespace) -> None:
    """Print a table of the exercises, checked on the functions in mine.py."""
    print(progress(Path(arguments.folder)))


def find_mine(folder: Path) -> Path:
    """The mine.py of a course that is in this folder, or in one folder of it.

    Raises FileNotFoundError if no course is there, and if several are.
    """
    near = [folder / MINE, folder / "exercises" / MINE]
    below = sorted([*folder.glob(f"*/{MINE}"), *folder.glob(f"*/exercises/{MINE}")])
    if found := [path for path in near if path.exists()] or below:
        if len(found) > 1 and found is below:
            raise FileNotFoundError(f"several courses are below {folder}: name one of {', '.join(map(str, found))}")
        return found[0]
    if any(folder.glob("[0-9]*.ipynb")):  # notebooks alone: the file comes with the first exercise that is solved
        return near[0]
    raise FileNotFoundError(
        f"no course in {folder} or one folder below: `minilora course DIR` writes one, `minilora progress DIR` reads it"
    )


def progress(folder: Path) -> str:
    """A table of all exercises, each checked on what mine.py holds; how good the guesses were; where to continue."""
    from ..course import mine
    from ..course.exercises import EXERCISES
    from ..course.judge import OK
    from ..course.pages import exercises_of
    from ..course.plan import LESSONS
    from ..course.predictions import summary

    if not folder.is_dir():
        raise NotADirectoryError(f"there is no folder {folder}: name the one that holds your {MINE}")
    path = find_mine(folder)
    functions = mine.load(path) if path.exists() else {}
    variants = mine.variants(path) if path.exists() else {}
    lines, onward, passed = [], "", 0
    for lesson in LESSONS.values():
        asked = exercises_of(lesson)
        if not asked:
            continue
        said = {e.number: line_for(e, functions, variants) for e in asked}
        right = sum(line == OK for line in said.values())
        passed += right
        lines.append(f"{lesson.number:>3}  {lesson.question:<44} {right} of {len(asked)}")
        lines += [f"     {e.number:<5} {e.name:<22} {said[e.number]}" for e in asked]
        if not onward and right < len(asked):
            number = next(number for number, line in said.items() if line != OK)
            onward = f"continue with {number} in exercises/{lesson.name}.ipynb"
    where = f"read from {path}" if path.exists() else f"no {MINE} in {folder} yet: it comes with the first ok"
    whole = f"{passed} of {len(EXERCISES)} exercises pass ({where})"
    return "\n".join([*lines, "", *summary(path), whole, onward or "all exercises pass"])


def line_for(exercise: Exercise, functions: dict, variants: dict[str, int | None]) -> str:
    """What the checker says of the reader's function for this exercise."""
    import numpy as np

    from ..course.judge import NOT_YET, judged

    if exercise.name not in functions:
        return NOT_YET
    with redirect_stdout(io.StringIO()):  # what the answer prints is no part of the table
        return judged(exercise, functions[exercise.name], np.random.default_rng(), variants.get(exercise.name))
