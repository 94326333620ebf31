"""`minilora pull`: download a model, or check the one that is there."""

from __future__ import annotations

import argparse

HELP = "download a model, or check the one that is there"


def add(parser: argparse.ArgumentParser) -> None:
    """The name of a model."""
    parser.add_argument("name", nargs="?", default="smollm2", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> None:
    """Make sure the model is here, and print where."""
    from ..models.hub import pull

    print(pull(arguments.name))
