"""`minilora course`: copy lessons and exercises out of the installed package, or make slides of them."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "copy the lessons and exercises into a folder of your own, or make slides of them"


def add(parser: argparse.ArgumentParser) -> None:
    """The folder, and what to write into it."""
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
    parser.add_argument("--slides", action="store_true", help="write slides instead: questions, claims and figures")
    parser.add_argument(
        "--reveal", metavar="PLACE", help="with --slides: a folder or URL of reveal.js (default: a CDN)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Copy lessons and exercises out of the installed package."""
    from ..course.copy import copy_course, notebooks
    from ..course.slides import REVEAL, write_slides

    folder = Path(arguments.folder)
    if arguments.reveal and not arguments.slides:
        raise ValueError("--reveal belongs to --slides: add it, or leave --reveal out")
    if not arguments.slides:
        print(copy_course(folder, arguments.site))
        return
    if arguments.site:
        raise ValueError("--site is for notebooks: leave --site or --slides out")
    pages = write_slides(notebooks(), folder, arguments.reveal or REVEAL)
    print(f"slides of {len(pages)} lessons written to {folder}\nopen {folder / 'index.html'} in a browser")
