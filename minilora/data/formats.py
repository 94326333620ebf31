"""The ways in which people's data write a conversation down, and how each becomes messages.

FORMATS holds them: Alpaca's instruction/output, ShareGPT's conversations, and so on. Each row of a file is recognised
for itself, by the columns it has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ..models.tokenizer import Message

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
}


class ColumnError(ValueError):
    """A row has not the columns that it needs: most likely no row of its file has."""


@dataclass(frozen=True)
class Format:
    """One way to write a conversation down: the columns it needs, those it may have, and how they become messages."""

    name: str
    needs: tuple[str, ...]
    also: tuple[str, ...]
    messages: Callable[[Mapping[str, Any]], list[Message]]


def _asked(question: str, answer: str) -> Callable[[Mapping[str, Any]], list[Message]]:
    """Messages of two columns."""

    def messages(row: Mapping[str, Any]) -> list[Message]:
        return [
            {"role": "user", "content": text_of(row, question)},
            {"role": "assistant", "content": text_of(row, answer)},
        ]

    return messages


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    """The input, if there is one, stands below the instruction, after a blank line."""
    messages = _asked("instruction", "output")(row)
    if row.get("input") not in (None, ""):
        messages[0]["content"] += f"\n\n{text_of(row, 'input')}"
    return messages


def _turns(key: str) -> Callable[[Mapping[str, Any]], list[Message]]:
    """Messages of a list of turns: {"role", "content"} or {"from", "value"}."""

    def messages(row: Mapping[str, Any]) -> list[Message]:
        turns = row[key]
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"{key} must be a non-empty list, got {_short(turns)}")
        said = [_turn(i, turn) for i, turn in enumerate(turns, 1)]
        first = next((message["role"] for message in said if message["role"] != "system"), "user")
        if first != "user":
            raise ValueError("the first message must be the user's (or a system message): an answer needs a question")
        if said[-1]["role"] != "assistant":
            raise ValueError("the last message must be the assistant's: it is what is learned")
        return said

    return messages


def _turn(i: int, turn: Any) -> Message:
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"message {i} needs a role of system, user (human) or assistant (gpt), got {_short(turn)}")
    return {"role": _ROLES[role], "content": text_of(turn, "content" if "content" in turn else "value")}


FACTS = ("id", "split", "keywords", "phrasings", "paraphrase", "validation_paraphrase")  # what a row may say as well
_ASKED = ("system", *FACTS)
TEXT = Format("text", ("text",), ("id", "split"), lambda row: [])  # it asks nothing, in no words
FORMATS = (  # a row is read in the first way whose columns it has
    Format("messages", ("messages",), _ASKED, _turns("messages")),
    Format("conversations", ("conversations",), _ASKED, _turns("conversations")),
    Format("question/answer", ("question", "answer"), _ASKED, _asked("question", "answer")),
    Format("q/a", ("q", "a"), _ASKED, _asked("q", "a")),
    Format("instruction/output", ("instruction", "output"), ("input", *_ASKED), _alpaca),
    Format("prompt/completion", ("prompt", "completion"), _ASKED, _asked("prompt", "completion")),
    TEXT,
)
LISTS = ("messages", "conversations", "keywords", "phrasings")  # columns of a table that hold JSON
OPTIONAL = ("system", "input", *FACTS)
NAMES = (*(name for kind in FORMATS for name in kind.needs), *OPTIONAL)


def check_field(field: Mapping[str, str]) -> None:
    """Raise ValueError for a mapping of columns to what minilora does not know."""
    for name in field:
        if name not in NAMES:
            near = get_close_matches(name, NAMES, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(NAMES)}"
            raise ValueError(f"field {name}={field[name]}: minilora reads no {name!r} ({hint})")


def rename(row: Any, field: Mapping[str, str]) -> dict[str, Any]:
    """A row under minilora's own names: `field` says which columns have others, and case does not count.

    Raises ValueError for what is no row, ColumnError for a column that is not there, though the row's format needs it.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    for name, column in field.items():
        if column not in row and name not in OPTIONAL:
            raise ColumnError(f"field {name}={column}: no such column; there are {_columns(row)}")
    named = {name: row[column] for name, column in field.items() if column in row}
    taken = set(field.values())
    for column, value in row.items():
        if column not in taken:
            plain = column.strip().lower()
            named.setdefault(plain if plain in NAMES and plain not in row else column, value)
    return named


def with_lists(row: Mapping[str, Any], kind: Format) -> dict[str, Any]:
    """A row whose lists may be written as JSON, as a table must. Raises ValueError for what is none."""
    told = {name: row[name] for name in (*kind.needs, *kind.also) if name in LISTS and isinstance(row.get(name), str)}
    return {**row, **{name: _list_of(name, text) for name, text in told.items()}}


def _list_of(name: str, text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise ValueError(f'{name} must be a list, such as ["...", "..."], got {_short(text)}')
    return value


def format_of(row: Mapping[str, Any], field: Mapping[str, str]) -> Format:
    """The way in which a row is written: the one whose columns it has. Columns that `field` names come first.

    Raises ColumnError that says what is missing.
    """
    there = {name for name, value in row.items() if value is not None}
    chosen = [kind for kind in FORMATS if not field.keys().isdisjoint(kind.needs)] or FORMATS
    best = max(chosen, key=lambda kind: -1 if kind is TEXT else len(there.intersection(kind.needs)) / len(kind.needs))
    if there.isdisjoint(best.needs) and TEXT in chosen:
        best = TEXT
    missing = [name for name in best.needs if name not in there]
    if not missing:
        return best
    if there.isdisjoint(best.needs) and row.keys().isdisjoint(best.needs):
        known = ", ".join(kind.name for kind in FORMATS)
        raise ColumnError(f"expected {known}; got {_columns(row)}: name yours with --field question=... answer=...")
    if missing[0] in row:
        raise ValueError(f"{missing[0]} must be a non-empty text, got None")
    wanted = f"{best.name} without {missing[0]}; there are {_columns(row)}"
    raise ColumnError(f"{wanted}: say which it is with --field {missing[0]}=...")


def conversation(kind: Format, row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The messages of a row; a column `system` comes first. Raises ValueError that says what is wrong with it."""
    messages = kind.messages(row)
    if row.get("system") not in (None, "") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": text_of(row, "system")})
    return tuple(messages)


def text_of(row: Mapping[str, Any], key: str) -> str:
    """The text in a column. Raises ValueError if it is empty or no text."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} must be a non-empty text, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _columns(row: Mapping[str, Any]) -> str:
    return listed([str(name) for name in row]) or "an empty object"


def listed(names: list[str], most: int = 12) -> str:
    """Names with commas between them; beyond `most` they are counted."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
