"""`minilora serve`: let a page and OpenAI's clients ask a base and its adapters."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from ..options import add_flags, from_flags
from ..serve.options import ServeOptions
from .shared import adapters, tell

HELP = "let a page and OpenAI's clients ask a base and its adapters"


def add(parser: argparse.ArgumentParser) -> None:
    """The flags are the fields of ServeOptions."""
    add_flags(parser, ServeOptions)


def run(arguments: argparse.Namespace) -> None:
    """Serve until Ctrl-C; with --demo four adapters of the tiny base, trained first where they are missing."""
    options = from_flags(ServeOptions, arguments)
    adapters(options.adapter)  # refuses names that cannot be
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise RuntimeError(f"minilora serve needs {' and '.join(missing)}: pip install 'minilora[serve]'")
    from ..serve.run import run
    from .demo import demo_folders

    run(options, tell, demo_folders)
