"""`minilora gradcheck`: compare every operation's gradient with a measured derivative."""

from __future__ import annotations

import argparse

HELP = "compare every operation's gradient with a measured derivative"


def add(parser: argparse.ArgumentParser) -> None:
    """A seed for the inputs."""
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def run(arguments: argparse.Namespace) -> None:
    """Print one line per operation, and the largest error of all."""
    from ..engine.examples import check_all

    worst = 0.0
    for report in check_all(arguments.seed):
        print(report)
        worst = max(worst, report.max_relative_error)
    print(f"all gradients agree with central differences in float64; largest relative error {worst:.1e}")
