"""`minilora bench`: measure time and memory of every way to run a model."""

from __future__ import annotations

import argparse
import json
from itertools import chain
from pathlib import Path

from ..measure.bench import MODES, Settings, check, impossible, measure, measure_random, table
from ..options import UsageError, add_flags, from_flags
from ..progress import Bars
from .shared import AS_JSON

HELP = "measure time and memory of every way to run a model"


def add(parser: argparse.ArgumentParser) -> None:
    """The flags are the fields of Settings; besides, which modes run and how often."""
    add_flags(parser, Settings)
    parser.add_argument("--random-weights", action="store_true", help="a random model of SmolLM2's shape: no download")
    parser.add_argument("--modes", nargs="+", metavar="MODE", help="such as floor lora full (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each mode (default: %(default)s)")
    parser.add_argument("--json", **AS_JSON)
    parser.add_argument(
        "--growth", metavar="FOLDER", help="draw how cost grows with length, batch, rank, width and adapters instead"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print a table of modes, measured in turns, or the pictures of how cost grows."""
    if arguments.growth:
        from . import growth, many

        folder = Path(arguments.growth)
        with Bars()("growth", growth.turns() + many.turns(), "turn") as bar:
            for path in chain(growth.draw_all(folder, done=bar.update), many.draw(folder, done=bar.update)):
                print(path)
        return
    if arguments.random_weights and "base" in arguments:
        raise UsageError("--random-weights takes the shape of SmolLM2: leave out --base")
    modes = arguments.modes or list(MODES)
    settings = from_flags(Settings, arguments)
    try:
        check(modes, arguments.rounds)
    except ValueError as error:
        raise UsageError(error) from error
    turns = len(modes) - len(impossible(modes, None if arguments.random_weights else settings))
    how = measure_random if arguments.random_weights else measure
    with Bars()("bench", turns * (1 + arguments.rounds), "turn") as bar:

        def done(mode: str) -> None:
            bar.set_postfix_str(mode, refresh=False)
            bar.update()

        result = how(settings, modes=modes, rounds=arguments.rounds, done=done)
    print(json.dumps(result, indent=2) if arguments.json else table(result))
