"""Records that are held out though what is trained on says the same: measured on them, memory counts as learning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .formats import listed
from .records import Record
from .rows import SPLITS

NAMED = 5  # such records that are named; of more, only the number is told


@dataclass(frozen=True)
class Twice:
    """A record that is held out though one that is trained on says the same: `same` is what both have in common."""

    record: Record
    trained: Record
    same: str  # "question", "answer" or "question and answer"


def twice(splits: Mapping[str, Sequence[Record]]) -> list[Twice]:
    """Held-out records whose question or answer is trained on, too; white space and upper or lower case apart.

    A text is compared as a whole. An answer of less than five words is a label rather than a text: many records share
    it, and it does not count alone. Of several trained records, the first that has most in common is named.
    """
    held = [record for name in SPLITS[1:] for record in splits[name]]
    said: dict[tuple[str, ...], list[int]] = {}
    for i, record in enumerate(held):
        for key in _said(record):
            said.setdefault(key, []).append(i)
    found: dict[int, Twice] = {}
    for record in splits["train"] if held else ():
        for key in _said(record):
            for i in said.pop(key, ()):  # once: those after it have no more in common
                if i not in found or len(key[0]) > len(found[i].same):
                    found[i] = Twice(held[i], record, key[0])
    return [found[i] for i in sorted(found)]


def told_of_twice(found: Sequence[Twice]) -> list[str]:
    """One line that names such records, or none."""
    if not found:
        return []
    named = listed([f"{item.record.id} has the {item.same} of {item.trained.id}" for item in found], NAMED)
    are = "held-out record says" if len(found) == 1 else "held-out records say"
    return [f"{len(found)} {are} what is trained on, too: {named}; measured on them, memory counts as learning"]


def _said(record: Record) -> Iterator[tuple[str, ...]]:
    """What can be the same: its name, and the text. A chat's questions are joined; a text counts as a question."""
    asked = " ".join(message["content"] for message in record.prompt if message["role"] != "system")
    question = _plain(asked or record.text)
    yield "question", question
    if record.messages:
        answer = _plain(record.messages[-1]["content"])
        yield "question and answer", question, answer
        if answer.count(" ") >= 4:
            yield "answer", answer


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
