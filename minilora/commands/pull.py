"""`minilora pull`: download a model, or verify it if it is here already."""

import argparse

HELP = "download a model, or verify it if it is here already"


def add(parser: argparse.ArgumentParser) -> None:
    """The name of a model."""
    parser.add_argument(
        "name", nargs="?", metavar="NAME", default="smollm2", help="smollm2 (default): SmolLM2-135M-Instruct, 98 MB"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the path of the model."""
    from ..models.hub import pull

    print(pull(arguments.name))
