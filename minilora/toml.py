"""Options as a TOML file, which records the options of a run and repeats it.

A file has one line per option. Its tables are the headings of --help; an option may be in any of them, or above.

    text = write(Options(), "a comment line")
    options = Options(**read(Options, Path("run.toml")))
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any, get_type_hints

from .options import check_value, fitted, flag, flag_fields, has_meaning, meaningful, nearest, or_none


def write(options: Any, *comments: str) -> str:
    """The options as TOML, each with its help text. `read` gives the same options, to the last digit.

    An option that is None is a comment; one that means nothing with the others is left out.
    """
    sections: dict[str, list[str]] = {"": [f"# {line}" for line in comments] + [""]}
    kinds = get_type_hints(type(options))
    for item in _recorded(type(options)):
        if not has_meaning(item, vars(options)):
            continue
        title, value, text = _heading(item), getattr(options, item.name), item.metadata["help"]
        shown = f"# {item.name} = " if value is None else f"{item.name} = {_shown(fitted(value, kinds[item.name]))}"
        sections.setdefault(title, ["", f"[{title}]"]).append(f"{shown} # {text}")
    return "\n".join(line for section in sections.values() for line in section) + "\n"


def read(options: type, path: Path) -> dict[str, Any]:
    """The options that a file gives.

    Raises ValueError naming the file: for a file that is not TOML, an unknown option (with the nearest one), a value of
    another type or outside its limits, and options that mean nothing together.
    """
    try:
        record = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: not readable as TOML ({error})") from error
    items = {item.name: item for item in _recorded(options)}
    headings, kinds = {_heading(item) for item in items.values()}, get_type_hints(options)
    given: dict[str, Any] = {}
    try:
        for name, value in _lines(record, items.keys(), headings):
            if name not in items:
                raise ValueError(f"unknown option {name!r}{_suggestion(name, [*items])}")
            if name in given:
                raise ValueError(f"{name} is given twice")
            several = items[name].metadata.get("several")
            try:
                given[name] = fitted(value, kinds[name]) if several is None else _each(value, several)
            except TypeError as error:
                raise ValueError(f"{name} {error}, got {value!r}") from error
            check_value(options, name, given[name])
            if items[name].metadata.get("path", False):
                given[name] = moved(given[name], path.parent, Path())
        meaningful(options, given, given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return given


def moved(value: Any, start: Path, end: Path) -> Any:
    """A relative path from one folder as it is from another one, also in a list or as a key; anything else is left as
    it is.

    That includes the name of a built-in data set or model, which has no slash and no dot, and a path from `start` that
    does not exist.
    """
    if isinstance(value, list):
        return [moved(one, start, end) for one in value]
    if isinstance(value, Mapping):
        return {moved(key, start, end): one for key, one in value.items()}
    named = isinstance(value, str) and re.search(r"[./\\]", value)
    if not named or os.path.isabs(value) or not (start / value).exists():
        return value
    try:
        return Path(os.path.relpath(start / value, end)).as_posix()
    except ValueError:  # on another drive of Windows
        return os.path.abspath(start / value)


def _recorded(options: type) -> list[Field[Any]]:
    return [item for item in flag_fields(options) if item.metadata.get("recorded", True)]


def _heading(item: Field[Any]) -> str:
    return item.metadata.get("group", "").replace(" ", "-")


def _shown(value: Any) -> str:
    """A value as TOML, on one line."""
    if isinstance(value, dict):
        keys = (key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _shown(key) for key in value)
        return f"{{{', '.join(f'{key} = {_shown(one)}' for key, one in zip(keys, value.values(), strict=True))}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's escapes are those of JSON


def _lines(record: Mapping[str, Any], names: Any, headings: set[str]) -> list[tuple[str, Any]]:
    """(name, value) of every line, those under headings last."""
    lines, inner = [], []
    for name, value in record.items():
        if name in headings and name not in names and isinstance(value, dict):
            inner += list(value.items())
        else:
            lines.append((name, value))
    return lines + inner


def _each(value: Any, hint: Any) -> list[Any]:
    """The values of an option that may have several: a list of them, or the only one. "none" is None."""
    values = value if isinstance(value, list) else [value]
    return [None if one == "none" and or_none(hint) else fitted(one, hint) for one in values]


def _suggestion(name: str, known: Sequence[str]) -> str:
    meant = nearest(flag(name), [flag(one) for one in known])
    return f" (did you mean {meant[2:].replace('-', '_')}?)" if meant else ""
