"""The flags of a command are the fields of its options dataclass: name, type, default and help stand there alone.

@dataclass(frozen=True, kw_only=True)
class Options:
    method: str = option("lora", "what is trained", choices=("lora", "full"))
    r: int = option(8, "rank of the update", group="adapter", only={"method": "lora"})

add_flags(parser, Options)                           # --method, --r
options = from_flags(Options, parse(parser, argv))   # what was not given keeps the dataclass's default
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from difflib import get_close_matches
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Options = TypeVar("Options")

BASE = "tiny, smollm2, a .gguf file, or a Hugging Face folder"  # help texts that several commands share
PACKED = "keep the base's matrices packed, as its .gguf file holds them: less memory, more time"
RECOMPUTE = "keep less for the backward pass, for a third more time"

ELSEWHERE = {  # what other programs call it -> what it is called here
    "--rank": "--r",
    "--lora-r": "--r",
    "--alpha": "--lora-alpha",
    "--targets": "--target-modules",
    "--learning-rate": "--lr",
    "--batch": "--batch-size",
    "--num-epochs": "--epochs",
    "--num-train-epochs": "--epochs",
    "--max-steps": "--steps",
    "--iters": "--steps",
    "--model": "--base",
    "--dataset": "--data",
    "--output": "--out",
    "--output-dir": "--out",
    "--max-seq-length": "--max-length",
    "--max-tokens": "--max-new-tokens",
    "--load-in-4bit": "--quantized",
    "--gradient-checkpointing": "--recompute",
}


class UsageError(Exception):
    """Arguments that parse but mean nothing: exit status 2."""


def option(
    default: Any,
    help: str,
    *,
    group: str | None = None,
    choices: Sequence[Any] | None = None,
    metavar: str | None = None,
    only: Mapping[str, Any] | None = None,
) -> Any:
    """A field of an options dataclass that is a flag as well. A plain `field(metadata={"help": ...})` is one, too.

    group: the heading it stands under in --help. only: values of other options without which it means nothing; as a
    flag it is then refused where they are different, {"steps": None} where --steps is given.
    """
    told = {"help": help, "group": group, "choices": choices, "metavar": metavar, "only": only}
    return field(default=default, metadata={key: value for key, value in told.items() if value is not None})


def add_flags(parser: argparse.ArgumentParser, options: type) -> None:
    """Give a parser one flag for each field of a dataclass that has a help text.

    A field of type bool is a switch; one that takes a sequence of words takes one or more, and may be given again. The
    parser sets no default: what stands in its namespace was given.
    """
    kinds = get_type_hints(options)
    groups: dict[str, Any] = {}
    for item in flag_fields(options):
        title = item.metadata.get("group")
        if title is not None and title not in groups:
            groups[title] = parser.add_argument_group(title)
        settings = {key: item.metadata[key] for key in ("choices", "metavar") if key in item.metadata}
        groups.get(title or "", parser).add_argument(
            flag(item.name), default=argparse.SUPPRESS, help=_help(item), **settings, **_kind(kinds[item.name])
        )


def from_flags(options: type[Options], arguments: argparse.Namespace) -> Options:
    """The options that the flags given ask for. Raises UsageError for values that mean nothing, alone or together."""
    items = {item.name: item for item in flag_fields(options)}
    given = {name: value for name, value in vars(arguments).items() if name in items}
    for name, value in given.items():
        if value == [items[name].default]:  # one word that is the default itself: all-linear
            given[name] = items[name].default
    values = {name: given.get(name, item.default) for name, item in items.items()}
    for name in given:
        for other, needed in items[name].metadata.get("only", {}).items():
            if values[other] != needed:
                what = f"{flag(name)} means nothing with {flag(other)} {values[other]}"
                raise UsageError(f"{what}: leave out one of the two")
    try:
        return options(**given)
    except ValueError as error:
        raise UsageError(error) from error


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse arguments. An unknown flag is answered with the usage of its own command and the flag that it resembles.

    A subcommand's parser is found as the default `parser` that it sets.
    """
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        command = getattr(arguments, "parser", parser)
        command.error(f"unrecognized arguments: {' '.join(unknown)}{_suggestion(command, unknown)}")
    return arguments


def flag(name: str) -> str:
    """The flag of a field.

    >>> flag("lora_alpha")
    '--lora-alpha'
    """
    return f"--{name.replace('_', '-')}"


def flag_fields(options: type) -> list[Field[Any]]:
    """The fields of a dataclass that are flags: those with a help text."""
    return [item for item in fields(options) if "help" in item.metadata]  # type: ignore[arg-type]


def _kind(hint: Any) -> dict[str, Any]:
    """How argparse reads a field of this type; a union with None is read as the rest of it."""
    kinds = [hint]
    if get_origin(hint) in (types.UnionType, Union):
        kinds = [kind for kind in get_args(hint) if kind is not types.NoneType]
    if kinds == [bool]:
        return {"action": "store_true"}
    sequences = [kind for kind in kinds if get_origin(kind) is not None]
    if sequences:
        return {"type": get_args(sequences[0])[0], "nargs": "+", "action": "extend"}
    return {"type": kinds[0]}


def _help(item: Field[Any]) -> str:
    text = item.metadata["help"]
    nothing = item.default is None or item.default is False or item.default is MISSING
    if not nothing and "(default" not in text:
        text += f" (default: {item.default:g})" if isinstance(item.default, float) else f" (default: {item.default})"
    return text.replace("%", "%%")


def _suggestion(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> str:
    known = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    for word in unknown:
        name = word.partition("=")[0]
        if not name.startswith("--"):
            continue
        near = [ELSEWHERE[name]] if ELSEWHERE.get(name) in known else get_close_matches(name, known, 1, cutoff=0.7)
        if near:
            return f" (did you mean {near[0]}?)"
    return ""
