"""`minilora gradcheck`: compare every operation's gradient with central differences."""

from __future__ import annotations

import argparse

HELP = "compare every operation's gradient with central differences"


def add(parser: argparse.ArgumentParser) -> None:
    """The seed of the random inputs."""
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def run(arguments: argparse.Namespace) -> None:
    """Print one line for each operation, and the largest error."""
    from ..engine.examples import check_all

    worst = 0.0
    for report in check_all(arguments.seed):
        print(report)
        worst = max(worst, report.max_relative_error)
    print(f"all gradients agree with central differences in float64; largest relative error {worst:.1e}")
