"""`minilora finetune`: fine-tune a model on a data file, and report what it learned and what it cost."""

import argparse
from functools import partial

from ..nn.ranks import world
from ..options import UsageError, add_flags
from ..train.options import Options
from .shared import Outcome, read_options

HELP = "fine-tune a model on a data file, and report what it learned and what it cost"


def add(parser: argparse.ArgumentParser) -> None:
    """The flags are the fields of Options; --config names a file of them."""
    add_flags(parser, Options)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="take three steps, print what the whole run would take (records, memory, time), and write nothing",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a TOML file of options, such as runs/legal/run.toml, or a recipe for one kind of data: facts (to know "
        "what the data say, not only their form), labels (a thousand messages or more), fields (a few hundred)",
    )


def run(arguments: argparse.Namespace) -> Outcome | None:
    """Run the job, or the first steps of it; its page."""
    from ..pages.text import terminal_width
    from ..train.job import finetune, rehearse
    from .report import page, rehearsal

    if arguments.dry_run and world().size > 1:
        raise UsageError("--dry-run is for one process: leave out mpiexec")
    if arguments.dry_run and "resume" in arguments:
        raise UsageError("--resume means nothing with --dry-run, which takes the first steps: leave out one of the two")
    options = read_options(Options, arguments).on_its_base()
    if options.resume and (begun := options.begun()):  # the options that the run began with
        options = read_options(Options, arguments, begun)
    if arguments.dry_run:
        return Outcome(rehearse(options), partial(rehearsal, width=terminal_width()))
    metrics = finetune(options)  # none on another than the first of several ranks
    return Outcome(metrics, partial(page, width=terminal_width())) if metrics else None
