"""The flags of a command are the fields of its options dataclass, which has their names, types, defaults and help.

@dataclass(frozen=True, kw_only=True)
class Options:
    method: str = option("lora", "what is trained", choices=("lora", "full"))
    r: int = option(8, "rank of the update", group="adapter", only={"method": "lora"})

add_flags(parser, Options)                           # --method, --r
options = from_flags(Options, parse(parser, argv))   # what was not given keeps the dataclass's default
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, field, fields
from difflib import get_close_matches
from functools import cache
from itertools import takewhile
from numbers import Integral, Real
from pathlib import Path, PurePath
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from .terminal import quote

Options = TypeVar("Options")
KINDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}

# Help texts that several commands share.
BASE = "tiny, smollm2, a .gguf file, a Hugging Face folder, or a name on huggingface.co"
PACKED: dict[str, Any] = {
    "help": "quantised base (QLoRA): its matrices stay as the .gguf file stores them, or are quantised to KIND (nf4, "
    "fp4, int4, q8_0, q4_1); less memory, more time",
    "choices": (True, False, "nf4", "fp4", "int4", "q8_0", "q4_1"),
    "metavar": "KIND",
    "alone": True,
}
BF16 = "matmuls with the base's frozen matrices in bfloat16: faster, half the memory; needs AMX or AVX512-BF16"
RECOMPUTE = "activation (gradient) checkpointing: less memory for activations, a third more time"

ELSEWHERE = {  # what other programs call it -> what it is called here
    "--rank": "--r", "--alpha": "--lora-alpha", "--learning-rate": "--lr", "--num-train-epochs": "--epochs",
    "--iters": "--steps", "--per-device-train-batch-size": "--batch-size", "--load-in-4bit": "--quantized",
    "--model": "--base", "--model-name-or-path": "--base", "--output-dir": "--out",
}  # fmt: skip


class UsageError(Exception):
    """Arguments that parse but mean nothing: exit status 2."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """In this block a ValueError becomes a UsageError: it is the arguments that are wrong."""
    try:
        yield
    except ValueError as error:
        raise UsageError(error) from error


def option(
    default: Any,
    help: str,
    *,
    group: str | None = None,
    choices: Sequence[Any] | None = None,
    metavar: str | None = None,
    only: Mapping[str, Any] | None = None,
    why: str | None = None,
    alone: Any = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    infinite: bool = False,
    follows: Sequence[str] = (),
    path: bool = False,
    recorded: bool = True,
) -> Any:
    """A field of an options dataclass that is also a flag. A plain `field(metadata={"help": ...})` is one, too.

    group: its heading in --help.
    choices: the values that it may have.
    metavar: the name of its value in --help.
    only: values of other options without which it means nothing. As a flag it is then refused where they are different:
        with {"steps": None} where --steps is given.
    why: the reason for `only`, which the refusal names.
    alone: the value of the flag where no value comes after it, unless it takes several.
    least, most, above: the limits of a number; `above` itself is not allowed.
    infinite: whether a number may be infinite.
    follows: other options that it depends on. Flags that change one of them also reset a file's value of this one.
    path: whether it is a path or a name. In a file of options, a relative path is relative to the folder of that file.
    recorded: False for an option of a single call, which no file of options holds.
    """
    metadata = {"help": help, "group": group, "choices": choices, "metavar": metavar, "only": only, "why": why,
                "alone": alone, "least": least, "most": most, "above": above}  # fmt: skip
    known = {key: value for key, value in metadata.items() if value is not None}
    return field(
        default=default, metadata=known | {"infinite": infinite, "follows": follows, "path": path, "recorded": recorded}
    )


def check(options: Any, *together: str) -> None:
    """Raise ValueError for the first option that has a value which is not allowed: for `__post_init__`.

    together: options that are refused where they are given and mean nothing with the values of the others.
    """
    for item in flag_fields(type(options)):
        object.__setattr__(options, item.name, as_python(getattr(options, item.name)))
        check_value(type(options), item.name, getattr(options, item.name))
    meaningful(type(options), vars(options), [name for name in together if getattr(options, name)])


def as_python(value: Any) -> Any:
    """A scalar or an array of NumPy, or a path, alone or in a list, as Python and JSON have it."""
    if isinstance(value, list | tuple):
        return type(value)(map(as_python, value))
    if isinstance(value, PurePath):
        return str(value)
    return value.tolist() if hasattr(value, "tolist") else value


def short_repr(options: Any, *always: str) -> str:
    """Name(field=value, ...) of a dataclass: the fields in `always`, and those whose value is not the default."""
    usual = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(options)}
    shown = {name: getattr(options, name) for name in usual}
    listed = (f"{name}={value!r}" for name, value in shown.items() if name in always or value != usual[name])
    return f"{type(options).__name__}({', '.join(listed)})"


def check_value(options: type, name: str, value: Any, called: str | None = None) -> None:
    """Raise ValueError when the field `name` of a dataclass may not have this value.

    called: the name of the option in the message. Of an option with several values, each one is checked.
    """
    item, hint = options.__dataclass_fields__[name], _hints(options)[name]  # type: ignore[attr-defined]
    if value is None and (item.default is None or or_none(hint)):
        return
    hint = item.metadata.get("several", hint)
    for one in value if "several" in item.metadata and isinstance(value, list) else [value]:
        try:
            reason = _refusal(fitted(one, hint), item.metadata)
        except TypeError as error:
            reason = str(error)
        if reason:
            shown = repr(one) if isinstance(one, str) or len(repr(one)) < 80 else f"a {type(one).__name__}"
            raise ValueError(f"{called or name} {reason}, got {shown}")


def fitted(value: Any, hint: Any) -> Any:
    """A value as a field of this type has it. Raises TypeError for one of another type."""
    kinds = kinds_of(hint)
    if kinds == [Any] or (value is None and or_none(hint)):
        return value
    for kind in kinds:
        origin = get_origin(kind)
        if origin is None:
            if kind is float and isinstance(value, Real) and not isinstance(value, bool):
                return float(value)
            if isinstance(value, Integral if kind is int else kind) and isinstance(value, bool) == (kind is bool):
                return value
        elif issubclass(origin, Mapping):
            if isinstance(value, Mapping):
                return {key: fitted(inner, get_args(kind)[1]) for key, inner in value.items()}
        elif isinstance(value, Sequence) and not isinstance(value, str):
            return [fitted(inner, get_args(kind)[0]) for inner in value]
    raise TypeError(f"must be {' or '.join(map(_name, kinds))}")


def _name(kind: Any) -> str:
    origin = get_origin(kind)
    return KINDS[kind] if origin is None else "a table" if issubclass(origin, Mapping) else "a list"


def check_whole(name: str, number: Any, least: int) -> None:
    """Raise ValueError unless this is a whole number of at least `least`."""
    if not isinstance(number, Integral) or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {number!r}")


_hints = cache(get_type_hints)  # fit checks its arguments one by one


def _refusal(value: Any, metadata: Mapping[str, Any]) -> str | None:
    """What a value that is not allowed must be; None for one that is allowed."""
    if value == "" and metadata.get("path"):
        return "must be a path or a name"
    if (choices := metadata.get("choices")) and value not in choices:
        return f"must be one of {', '.join(map(_word, choices))}"
    limits = {name: metadata[name] for name in ("least", "most", "above") if name in metadata}
    if not limits or not isinstance(value, Real):
        return None
    infinite = metadata.get("infinite", False)
    least, most, above = limits.get("least", -math.inf), limits.get("most", math.inf), limits.get("above", -math.inf)
    if least <= value <= most and value > above and (infinite or math.isfinite(value)):
        return None
    if "above" in limits:
        return f"must be a number above {above:g}{', or inf for none' if infinite else ''}"
    return f"must be from {least:g} to {most:g}" if "most" in limits else f"must be at least {least:g}"


def add_flags(parser: argparse.ArgumentParser, options: type) -> None:
    """Give a parser one flag for each field of a dataclass that has a help text.

    A bool is a switch. A sequence takes one value or more, a mapping takes KEY=VALUE pairs, and both may be repeated. A
    field whose metadata have `several`, the type of one value, takes one or more of them: numbers, words, true or
    false, none; a value that is a list itself is joined by commas. The parser sets no defaults: its namespace holds
    only flags that were given.
    """
    kinds = get_type_hints(options)
    groups: dict[str, Any] = {}
    for item in flag_fields(options):
        title = item.metadata.get("group")
        if title is not None and title not in groups:
            groups[title] = parser.add_argument_group(title)
        settings = settings_of(kinds[item.name], item.metadata)
        groups.get(title or "", parser).add_argument(
            flag(item.name), dest=item.name, default=argparse.SUPPRESS, help=_help(item), **settings
        )


def from_flags(
    options: type[Options], arguments: argparse.Namespace, below: Mapping[str, Any] | None = None
) -> Options:
    """The options that the flags given ask for. Raises UsageError for values that mean nothing, alone or together.

    below: values for the options that no flag sets, such as those of a file (toml.py). Values that conflict with a flag
    are dropped: the file's `steps` where --epochs is given, its `r` with --method full.
    """
    items = {item.name: item for item in flag_fields(options)}
    given = {name: value for name, value in vars(arguments).items() if name in items}
    kinds = get_type_hints(options)
    for name, value in given.items():
        if not isinstance(value, list):
            continue
        if isinstance(value[0], tuple):
            given[name] = _without_doubles(flag(name), value)
        elif len(value) == 1 and str in kinds_of(kinds[name]):  # all-linear, or a pattern
            given[name] = value[0]
    with usage_errors():
        lower = without_conflicts(options, given, below or {})
        meaningful(options, given | lower, given, flag)
        chosen = options(**lower | given)
    return chosen


def meaningful(
    options: type, values: Mapping[str, Any], given: Iterable[str], called: Callable[[str], str] = lambda name: name
) -> None:
    """Raise ValueError for the first of the options `given` that means nothing with the values of the others.

    called: the name of an option in the message.
    """
    items = {item.name: item for item in flag_fields(options)}
    values = {name: item.default for name, item in items.items()} | dict(values)
    for name in given:
        for other, needed in items[name].metadata.get("only", {}).items():
            if values[other] != needed:
                what = f"{called(name)} means nothing with {called(other)} {values[other]}"
                why = f" ({reason})" if (reason := items[name].metadata.get("why")) else ""
                raise ValueError(f"{what}{why}: leave out one of the two")


def has_meaning(item: Field[Any], values: Mapping[str, Any]) -> bool:
    """Whether an option means something with these values of the others: see `only`."""
    return all(values[other] == needed for other, needed in item.metadata.get("only", {}).items())


def without_conflicts(options: type, given: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `below`, such as those of a file, that do not conflict with those given."""
    items = {item.name: item for item in flag_fields(options)}
    given = {name: value for name, value in given.items() if name in items}  # of others the dataclass will complain
    needs = {name: item.metadata.get("only", {}) for name, item in items.items()}
    gone = {other for name in given for other, needed in needs[name].items() if needed is None}  # steps by --epochs
    changed = {name for name, value in given.items() if value != below.get(name, items[name].default)}
    changed |= gone & below.keys()
    for name in below:
        if changed.intersection(items[name].metadata.get("follows", ())):
            gone.add(name)
        if any(other in given and given[other] != needed for other, needed in needs[name].items()):
            gone.add(name)
    return {name: value for name, value in below.items() if name not in {*given, *gone}}


def _without_doubles(name: str, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if doubles := [key for i, key in enumerate(keys) if key in keys[:i]]:
        raise UsageError(f"{name}: {doubles[0]} is given twice")
    return dict(pairs)


def refuse_other_settings(what: str, then: Mapping[str, Any], now: Mapping[str, Any], instead: str) -> None:
    """Raise ValueError when work that is continued was started with other settings, and list those that differ.

    what: the run or folder that is continued.
    then, now: the settings by name; values are compared as JSON stores them, tables name by name.
    instead: what the user can do.
    """
    then, now = _flat(then), _flat(now)
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if names:
        named = "; ".join(f"{name} {_word(then.get(name))}, now {_word(now.get(name))}" for name in names)
        raise ValueError(f"{what} was started with other settings: {named}; {instead}")


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings as JSON stores them. Those in a table get the table's name in front: base_sha256.tiny."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(settings)).items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) and value else {above + name: value}
    return flat


def _word(value: Any) -> str:
    """A setting in a message: none for None, and of a SHA-256 the first 16 digits."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:16] if re.fullmatch("[0-9a-f]{64}", text) else text


class Parser(argparse.ArgumentParser):
    """argparse's parser, which answers whatever is wrong with the flag that an unknown one resembles.

    Flags are not shortened: `--rank` would be --rank-pattern, and not the --r that was meant. A flag that has one
    value is given once: argparse would silently take the last.
    """

    def __init__(self, *inputs: Any, **settings: Any):
        super().__init__(*inputs, **(settings | {"allow_abbrev": False}))
        self.words: list[str] = []

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        """Parse as argparse does, and remember the words for `error`."""
        self.words = list(sys.argv[1:] if args is None else args)
        parsed = super().parse_known_args(self.words, namespace)
        given = [word.partition("=")[0] for word in takewhile("--".__ne__, self.words)]
        for action in self._actions:
            if isinstance(action, argparse._AppendAction) or action.nargs == 0:  # meant to be repeated, or a switch
                continue
            if sum(map(given.count, action.option_strings)) > 1:
                self.error(f"{action.option_strings[0]} is given twice: give it once")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print the message in one line, with a suggestion, and end with status 2."""
        known = [name for action in self._actions for name in action.option_strings]
        for word in self.words:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in known and (meant := nearest(name, known)):
                message += f" (did you mean {meant}{'' if name in message else f' by {name}'}?)"
                break
        message = re.sub(r"^argument (-\S+):(?= must)|^argument (?=-)", r"\1", message).replace(
            "unrecognized arguments:", "unknown arguments:"
        )
        self.exit(2, f"{self.prog.partition(' ')[0]}: {message}; {self.prog} --help lists all flags\n")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse arguments. The error for an unknown flag names its own command.

    A subcommand's parser is found as the default `parser` that it sets.
    """
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        own: Any = getattr(arguments, "parser", parser)
        path = Path(unknown[0])
        names = ["--adapter", "--data"] if any(path.glob("adapter_*")) else ["--data", "--adapter"]
        meant = [name for name in names if name in own._option_string_actions] if path.exists() else []
        hint = f" (did you mean {meant[0]} {quote(unknown[0])}?)" if meant else ""
        own.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return arguments


def flag(name: str) -> str:
    """The flag of a field.

    >>> flag("lora_alpha")
    '--lora-alpha'
    """
    return f"--{name.replace('_', '-').lower()}"


def flag_fields(options: type) -> list[Field[Any]]:
    """The fields of a dataclass that are flags: those with a help text."""
    return [item for item in fields(options) if "help" in item.metadata]  # type: ignore[arg-type]


def settings_of(hint: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """How argparse reads a flag, from the type and the metadata of its field."""
    several = "several" in metadata
    kinds = kinds_of(metadata.get("several", hint))
    if kinds == [bool] and not several:
        return {"action": "store_true"}
    inner = next((get_args(kind) for kind in kinds if get_origin(kind) is not None), ())  # of a list, or of a table
    shown = metadata.get("metavar", "KEY=VALUE")

    def read(word: str) -> Any:
        if several and or_none(metadata["several"]) and word.lower() == "none":
            value = None
        elif several and inner and ("," in word or str not in kinds):
            value = [_read(part, inner) for part in word.split(",")]
        elif len(inner) == 2:  # a key may be a pattern with a =, unless a value is any text
            key, sign, rest = word.partition("=") if inner[1] is str else word.rpartition("=")
            if not (key and sign and rest):
                raise argparse.ArgumentTypeError(f"expected {shown}, got {word!r}")
            return key, _read(rest, inner[1:], f" after {key}=")
        else:
            apart = "; values are separated by spaces" if several and "," in word else ""
            value = _read(word, inner if inner and not several else kinds, apart=apart)
        if reason := _refusal(value, metadata):
            raise argparse.ArgumentTypeError(f"{reason}, got {word!r}")
        return value

    settings: dict[str, Any] = {"type": read}
    if several or inner:
        settings |= {"nargs": "+", "action": "extend"}
    elif "alone" in metadata:
        settings |= {"nargs": "?", "const": metadata["alone"]}
    if "metavar" in metadata or len(inner) == 2:
        settings["metavar"] = shown
    elif "choices" in metadata:
        settings["metavar"] = f"{{{','.join(map(_word, metadata['choices']))}}}"
    return settings


def _read(word: str, kinds: Sequence[Any], where: str = "", apart: str = "") -> Any:
    """A word as a value of one of these types: true or false, or else the first other one."""
    if bool in kinds and word.lower() in ("true", "false"):
        return word.lower() == "true"
    kind = next((kind for kind in kinds if kind is not bool and get_origin(kind) is None), bool)
    if kind is not bool:
        with suppress(ValueError):
            return kind(word)
    raise argparse.ArgumentTypeError(f"expected {KINDS[kind]}{where}, got {word!r}{apart}")


def or_none(hint: Any) -> bool:
    """Whether a field of this type may be None."""
    return hint is not kinds_of(hint)[0] and types.NoneType in get_args(hint)


def kinds_of(hint: Any) -> list[Any]:
    """The types that a field of this type may have, None left out."""
    if get_origin(hint) in (types.UnionType, Union):
        return [kind for kind in get_args(hint) if kind is not types.NoneType]
    return [hint]


def _help(item: Field[Any]) -> str:
    text = item.metadata["help"]
    nothing = item.default is None or item.default is False or item.default is MISSING or item.default == ()
    if not nothing and "(default" not in text:
        text += f" (default: {item.default:g})" if isinstance(item.default, float) else f" (default: {item.default})"
    return text.replace("%", "%%")


def suggestion(word: str, known: Iterable[str]) -> str:
    """ " (did you mean tiny?)" for a word that resembles a known one, else nothing."""
    names = {name.lower(): name for name in known}
    meant = get_close_matches(word.lower(), list(names), 1)
    return f" (did you mean {names[meant[0]]}?)" if meant else ""


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known flag that an unknown one resembles, or that has the same meaning in other programs."""
    name = name.replace("_", "-")  # as Hugging Face's scripts write them
    if ELSEWHERE.get(name) in known:
        return ELSEWHERE[name]
    words = {one.lstrip("-"): one for one in known}  # the dashes, which all of them share, are no resemblance
    return next((words[word] for word in get_close_matches(name.lstrip("-"), list(words), 1, cutoff=0.7)), None)
