"""`minilora chat`: talk to a model, with or without adapters."""

from __future__ import annotations

import argparse

from ..options import add_flags, from_flags
from ..train.options import ChatOptions
from .shared import adapters, tell

HELP = "talk to a model, with or without an adapter"


def add(parser: argparse.ArgumentParser) -> None:
    """The flags are the fields of ChatOptions."""
    add_flags(parser, ChatOptions)


def run(arguments: argparse.Namespace) -> None:
    """One answer of each adapter for --prompt, else a talk in the terminal, or an answer per line of a pipe."""
    from ..chat.run import run
    from ..models.load import dtype_of
    from ..models.versions import load_versions

    options = from_flags(ChatOptions, arguments)
    named = adapters(options.adapter)
    model, tokenizer = load_versions(
        named, options.base, options.quantized, options.device, options.force, tell, dtype_of(options.bf16)
    )
    run(model, tokenizer, list(named), options)
