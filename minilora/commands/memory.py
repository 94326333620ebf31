"""`minilora memory`: take a training step and compare the memory it holds, owner by owner, with the prediction."""

from __future__ import annotations

import argparse
import json

from ..measure.process import STAGES, Job, report, step_of, table
from ..options import add_flags, from_flags
from ..progress import Bars
from .shared import AS_JSON

HELP = "take a training step and compare the memory it holds, owner by owner, with the prediction"


def add(parser: argparse.ArgumentParser) -> None:
    """The flags are the fields of Job."""
    add_flags(parser, Job)
    parser.add_argument("--json", **AS_JSON)


def run(arguments: argparse.Namespace) -> None:
    """Print where a step's bytes go, prediction beside measurement."""
    job = from_flags(Job, arguments)
    step_of(job)  # pulls the base and refuses what no model can take, before there is a bar
    with Bars()("memory", len(STAGES), "stage") as bar:

        def done(stage: str) -> None:
            bar.set_postfix_str(stage, refresh=False)
            bar.update()

        result = report(job, done)
    print(json.dumps(result, indent=2) if arguments.json else table(result))
