"""Leaks between splits: validation and test records that training has seen, in the same words."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .formats import listed
from .records import Record
from .rows import SPLITS
from .words import folded, length

NAMED = 5  # leaks that are named; the others are only counted
_LABEL = 4  # words of an answer, at most, that is a label rather than a text: many records share it


@dataclass(frozen=True)
class Leak:
    """A validation or test record that has `same` in common with a training record."""

    record: Record
    trained: Record
    same: str  # "question", "answer" or "question and answer"; "text" of two texts


def leaks(splits: Mapping[str, Sequence[Record]]) -> list[Leak]:
    """Validation and test records whose question or answer is also in the training set.

    Whole texts are compared; white space, case, how an accent is encoded and full stops at the end do not count. An
    answer of at most four words alone is no leak. Of several training records, the first with the most in common is
    named.
    """
    held = [record for name in SPLITS[1:] for record in splits[name]]
    waiting: dict[tuple[str, ...], list[int]] = {}
    for i, record in enumerate(held):
        for key in _keys(record):
            waiting.setdefault(key, []).append(i)
    found: dict[int, Leak] = {}
    for record in splits["train"] if held else ():
        for key in _keys(record):
            for i in waiting.pop(key, ()):  # popped: later training records have no more in common
                same = key[0] if held[i].messages or record.messages else "text"
                if i not in found or len(same) > len(found[i].same):
                    found[i] = Leak(held[i], record, same)
    return [found[i] for i in sorted(found)]


def warning_of_leaks(found: Sequence[Leak]) -> list[str]:
    """One line that names the leaks; none if there are none."""
    what = "1 validation or test record is" if len(found) == 1 else f"{len(found):,} validation or test records are"
    named = listed([f"{leak.record.id} has the {leak.same} of {leak.trained.id}" for leak in found], NAMED)
    return [f"{what} also in the training set, so the loss looks too good: {named}"] if found else []


def repeated(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Records that have the question and the answer (or the text) of an earlier one, with that one."""
    first: dict[tuple[str, ...], Record] = {}
    return [(again, one) for again in records if (one := first.setdefault(_whole(again), again)) is not again]


def contradictions(records: Sequence[Record]) -> list[str]:
    """One line about records that have the question of an earlier one and another label; none if there are none."""
    first: dict[str, Record] = {}
    pairs = [(first.setdefault(_form(record.question), record), record) for record in records]
    other = [(one, again) for one, again in pairs if one.label != again.label]
    found = [f"{again.id} {again.label!r} but {one.id} {one.label!r}" for one, again in other]
    number = "1 record has" if len(found) == 1 else f"{len(found):,} records have"
    return [f"{number} an earlier one's text and another label: {listed(found, NAMED)}"] if found else []


def _keys(record: Record) -> Iterator[tuple[str, ...]]:
    """What another record can have in common: its name, and the text. A text counts as a question."""
    _, question, *answers = whole = _whole(record)
    yield "question", question
    for answer in answers:
        yield whole
        if record.label is None and length(answer) > _LABEL:
            yield "answer", answer


def _whole(record: Record) -> tuple[str, ...]:
    """All that is compared of a record; a chat's questions are joined."""
    asked = " ".join(message["content"] for message in record.prompt if message["role"] != "system")
    if not record.messages:
        return "question", _form(record.text)
    return "question and answer", _form(asked), _form(record.messages[-1]["content"])


def _form(text: str) -> str:
    """A text as it is compared; of one that is full stops alone, all of it."""
    return (short := folded(text)).rstrip(".!?…。！？؟ ") or short
