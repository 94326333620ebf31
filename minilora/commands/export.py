"""`minilora export`: write an adapter as a file for llama.cpp, or as a folder for mlx-lm."""

import argparse

from .shared import ADAPTER, BASE_OF_ADAPTER, FORCE, OVERWRITE, one_adapter

HELP = "write an adapter as a file for llama.cpp, or as a folder for mlx-lm"


def add(parser: argparse.ArgumentParser) -> None:
    """The adapter and the file."""
    parser.add_argument("--base", **BASE_OF_ADAPTER)
    parser.add_argument("--adapter", **ADAPTER)
    parser.add_argument("--out", required=True, help="a file that ends in .gguf; for mlx, a new folder")
    parser.add_argument(
        "--format", choices=("gguf", "mlx"), default="gguf", help="for llama.cpp (gguf, default), or for mlx-lm"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="type of the stored adapter; float16 takes half the space",
    )
    parser.add_argument("--overwrite", **OVERWRITE | {"help": "replace an exported adapter that is there already"})
    parser.add_argument("--force", **FORCE)


def run(arguments: argparse.Namespace) -> None:
    """Write the file; print how it compares with the adapter."""
    from ..models.merge import export

    _, folder = one_adapter(arguments.adapter)
    given = (arguments.out, arguments.overwrite, arguments.force, arguments.format, arguments.dtype)
    print(export(arguments.base, folder, *given))
