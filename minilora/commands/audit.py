"""`minilora audit`: check that an adapter satisfies what every LoRA adapter must."""

import argparse
from pathlib import Path

from ..options import PACKED, UsageError
from .shared import BASE_OF_ADAPTER, FORCE, Instead, one_adapter

HELP = "check an adapter: scale, gradients, merging, file, unchanged base"
DEFAULT = "runs/legal"


class _Quantized(argparse.Action):
    """`--quantized [KIND]`. The adapter's folder may follow it directly, as in `audit --quantized DIR`."""

    def __call__(self, parser, namespace, values, option_string=None):
        kinds = [kind for kind in PACKED["choices"] if isinstance(kind, str)]
        if values is True or values in kinds:
            namespace.quantized = values
        elif Path(values).exists():
            namespace.quantized, namespace.folder = True, values
        else:
            raise argparse.ArgumentError(self, f"invalid choice: {values!r} (choose from {', '.join(kinds)})")


def add(parser: argparse.ArgumentParser) -> None:
    """A folder, and how its base is loaded."""
    parser.add_argument(
        "adapter", nargs="?", default=DEFAULT, metavar="DIR", help="folder of the adapter (default: %(default)s)"
    )
    instead = "give the folder without a flag, minilora audit DIR"
    parser.add_argument("--adapter", dest="instead", action=Instead, const=instead, help=argparse.SUPPRESS)
    parser.add_argument("--base", **BASE_OF_ADAPTER)
    parser.add_argument(
        "--quantized", nargs="?", const=True, default=False, action=_Quantized, metavar="KIND", help=PACKED["help"]
    )
    parser.add_argument("--force", **FORCE)
    parser.set_defaults(folder=None)


def run(arguments: argparse.Namespace) -> None:
    """Print one line for each check, and one for each kind of module."""
    from ..lora.audit import audit
    from ..models.with_adapters import load_with_adapters

    if arguments.folder is not None and arguments.adapter != DEFAULT:
        raise UsageError(f"one adapter at a time: {arguments.adapter}, {arguments.folder} are 2")
    name, folder = one_adapter([arguments.folder or arguments.adapter])
    model, _ = load_with_adapters({name: folder}, arguments.base, arguments.quantized, force=arguments.force)
    print(audit(model, name))
