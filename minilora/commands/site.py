"""`minilora site`: write a page in which anybody teaches the tiny base in the browser."""

from __future__ import annotations

import argparse

from ..terminal import quote

HELP = "write a static web page on which a small model is trained in the browser"


def add(parser: argparse.ArgumentParser) -> None:
    """The folder, and where Pyodide comes from."""
    parser.add_argument("folder", metavar="FOLDER", help="a new folder, or one that holds such a page")
    parser.add_argument(
        "--pyodide", metavar="FOLDER", help="a folder of Pyodide to copy (default: it is loaded from a CDN)"
    )
    parser.add_argument(
        "--course",
        action="store_true",
        help="also the lessons and exercises in JupyterLite (needs pip install 'minilora[site]')",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the files, and say how to look at them."""
    from ..site.write import write_site
    from .shared import usage_errors

    with usage_errors():
        size = write_site(arguments.folder, arguments.pyodide, arguments.course)
    print(f"Written to {arguments.folder}: {size / 1e6:.1f} MB. To look at it:")
    print(f"  python -m http.server --directory {quote(str(arguments.folder))}    and open http://localhost:8000")
