"""`minilora merge`: write base and adapter as one model."""

import argparse
from pathlib import Path

from ..options import usage_errors
from .shared import ADAPTER, BASE_OF_ADAPTER, FORCE, OVERWRITE, one_adapter

HELP = "write base and adapter as one model"


def add(parser: argparse.ArgumentParser) -> None:
    """The adapter, and the file or folder of the model."""
    parser.add_argument("--base", **BASE_OF_ADAPTER)
    parser.add_argument("--adapter", **ADAPTER | {"help": ADAPTER["help"] + ", or a .gguf file"})
    parser.add_argument("--out", required=True, help="a new folder, or a file that ends in .gguf")
    parser.add_argument(
        "--format", choices=("hf", "gguf"), help="a Hugging Face folder, or GGUF (default: from the ending of --out)"
    )
    parser.add_argument(
        "--type",
        choices=("f32", "f16", "q8_0", "q4_1"),
        help="how matrices are stored (default: f32 in a folder, f16 in GGUF; q8_0 and q4_1 only in GGUF)",
    )
    parser.add_argument("--overwrite", **OVERWRITE)
    parser.add_argument("--force", **FORCE)


def run(arguments: argparse.Namespace) -> None:
    """Write one whole model; print how it compares with the merged one, and what 4 bits lose."""
    from ..models.merge import merge, resolve

    with usage_errors():
        resolve(Path(arguments.out), arguments.format, arguments.type)
    _, folder = one_adapter(arguments.adapter)
    given = (arguments.out, arguments.format, arguments.type, arguments.overwrite, arguments.force)
    print(merge(arguments.base, folder, *given))
