"""`minilora pull`: download a model, or verify it if it is here already."""

import argparse

HELP = "download a model, or verify it if it is here already"


def add(parser: argparse.ArgumentParser) -> None:
    """The name of a model."""
    parser.add_argument("name", nargs="?", default="smollm2", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> None:
    """Print the path of the model."""
    from ..models.hub import pull

    print(pull(arguments.name))
