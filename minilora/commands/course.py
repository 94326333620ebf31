"""`minilora course`: copy lessons and exercises out of the installed package."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "copy the lessons and exercises into a folder of your own"


def add(parser: argparse.ArgumentParser) -> None:
    """The folder, and the course in the browser."""
    parser.add_argument(
        "folder",
        metavar="DIR",
        help="a folder, created if needed; notebooks in it that you have changed are not overwritten",
    )
    parser.add_argument(
        "--site",
        metavar="URL",
        default="",
        help="put links into the notebooks to the course in the browser, which `minilora site --course` wrote",
    )


def run(arguments: argparse.Namespace) -> None:
    """Copy lessons and exercises out of the installed package."""
    from ..course.copy import copy_course

    print(copy_course(Path(arguments.folder), arguments.site))
