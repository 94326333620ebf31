"""`minilora audit`: check every promise that an adapter makes."""

from __future__ import annotations

import argparse

from ..options import PACKED, settings_of
from .shared import BASE_OF_ADAPTER, FORCE, Instead, one_adapter

HELP = "check every promise that an adapter makes"


def add(parser: argparse.ArgumentParser) -> None:
    """A folder, and how its base is loaded."""
    parser.add_argument("adapter", nargs="?", default="runs/legal", metavar="DIR", help="default: %(default)s")
    alone = "the folder stands by itself, minilora audit DIR"
    parser.add_argument("--adapter", dest="instead", action=Instead, const=alone, help=argparse.SUPPRESS)
    parser.add_argument("--base", **BASE_OF_ADAPTER)
    parser.add_argument("--quantized", default=False, help=PACKED["help"], **settings_of(bool | str, PACKED))
    parser.add_argument("--force", **FORCE)


def run(arguments: argparse.Namespace) -> None:
    """Print one line per promise, one per kind of module."""
    from ..lora.audit import audit
    from ..models.with_adapters import load_with_adapters

    name, folder = one_adapter([arguments.adapter])
    model, _ = load_with_adapters({name: folder}, arguments.base, arguments.quantized, force=arguments.force)
    print(audit(model, name))
