"""`minilora progress`: check the exercises that are solved, and say where to go on."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "check the exercises you have solved, and say where to go on"


def add(parser: argparse.ArgumentParser) -> None:
    """The folder of mine.py."""
    parser.add_argument("folder", nargs="?", default=".", metavar="DIR", help="where mine.py lies (default: here)")


def run(arguments: argparse.Namespace) -> None:
    """Print a table of the exercises, checked on the functions in mine.py."""
    from .course import progress

    print(progress(Path(arguments.folder)))
