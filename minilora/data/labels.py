"""Data with a label for each text: the prompt that asks for the label, and the set of labels that can be the answer.

Both are stored with an adapter (`lora/provenance.py`), so that whoever uses it asks as it was trained. `doubts` names
labels that may not be what was meant.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import normalize

from ..models.tokenizer import Message
from .formats import listed
from .rows import DataError
from .words import folded, spelled

LISTED = 30  # labels, at most, that the prompt lists
LEAST = 10  # training records: of fewer, their labels are not counted
_NAMED = 5  # labels that a line names
_RARE = 4  # one of two labels that differ in a letter is a typing error if the other is this many times as frequent
_UNSEEN = re.compile("[\u0300-\u036f\u00ad\u200b-\u200f\u202a-\u202e\u2060\ufeff]")  # accents, and what has no width
_SHORTEST, _LONGEST = 5, 40  # letters of a label in which a typing error is looked for
TEXT = "{text}"  # where the text goes


class Asking:
    """What a task asks: a template of the prompt, in which {text} is the text that it is about."""

    template: str

    def prompt(self, text: str) -> str:
        """The question about a text."""
        before, _, after = self.template.rpartition(TEXT)
        return before + text + after

    def text(self, prompt: str) -> str:
        """The text in a prompt."""
        before, _, after = self.template.rpartition(TEXT)
        return prompt[len(before) : len(prompt) - len(after)]

    def asked(self, messages: Sequence[Message]) -> list[Message]:
        """The question about the last message, after the system prompt, if there is one. Earlier turns do not count."""
        system = [message for message in messages[:1] if message["role"] == "system"]
        return [*system, {"role": "user", "content": self.prompt(messages[-1]["content"])}]


@dataclass(frozen=True)
class LabelTask(Asking):
    """A set of labels, and the template of the prompt, in which {text} is the text that gets one of them."""

    labels: tuple[str, ...]
    template: str

    @classmethod
    def of(cls, labels: Iterable[str]) -> LabelTask:
        """The task of these labels. Up to `LISTED` of them are listed in the prompt: a base that was never trained on
        them can only choose what it is shown. More of them would fill the prompt.

        >>> LabelTask.of(["refund", "delivery"]).template
        'Which label fits the message: delivery, refund?\\n\\nMessage: {text}'
        """
        ordered = tuple(sorted(set(labels)))
        choices = f": {', '.join(ordered)}" if len(ordered) <= LISTED else ""
        return cls(ordered, f"Which label fits the message{choices}?\n\nMessage: {TEXT}")

    @classmethod
    def stored(cls, data: Mapping[str, Any]) -> LabelTask | None:
        """The task in an adapter's entry "data", if it was trained on labels. Raises ValueError for a bad one."""
        if "labels" not in data:
            return None
        labels, template = data["labels"], data.get("template", "")
        if len(labels) < 2 or not all(isinstance(label, str) and label for label in labels) or TEXT not in template:
            raise ValueError(f"the adapter's labels must be two texts or more, with a template that has {TEXT}")
        return cls(tuple(labels), template)

    def entry(self) -> dict[str, Any]:
        """What `stored` reads."""
        return {"labels": list(self.labels), "template": self.template}

    def is_like(self, other: LabelTask) -> bool:
        """Have both at least half of all their labels in common, as two versions of one task have?"""
        mine, others = {*self.labels}, {*other.labels}
        return 2 * len(mine & others) >= len(mine | others)


def task_of(labels: Sequence[tuple[str, str | None]], source: object, stored: Sequence[object]) -> LabelTask | None:
    """The task of records, or None if none of them has a label.

    labels: the id of each record, and its label or None.
    stored: the tasks of adapters that are used on them; the first that has all of their labels is taken.

    Raises DataError where only some records have a label, and for one label alone.
    """
    found = {label for _, label in labels if label is not None}
    without = [name for name, label in labels if label is None]
    if not found:
        return None
    if without:
        bare = f"no label for {len(without):,} of {len(labels):,} records ({listed(without, 5)})"
        raise DataError(f"{source}: {bare}: give each record one, or leave those out")
    known = [task for task in stored if isinstance(task, LabelTask)]
    if fitting := [task for task in known if found.issubset(task.labels)]:
        return fitting[0]
    if len(found) == 1:
        raise DataError(f"{source}: all records have the label {found.pop()!r}: at least two are needed")
    return LabelTask.of(found)


# -- labels that may not be what was meant -----------------------------------------------------------------------------


def doubts(counts: Mapping[str, int]) -> list[str]:
    """A line for each thing that may be wrong with labels. counts: how many training records have each."""
    lines, total, alike = list[str](), sum(counts.values()), variants(counts)
    once = [label for label, n in counts.items() if n == 1 and not any(label in group for group in alike)]
    if total >= LEAST and 2 * len(counts) > total:
        what = f"{len(counts):,} labels in {total:,} training records: are they answers, each its own text?"
        lines.append(f"{what} Then name the columns with --field question=... answer=...")
    elif once:
        few = f"{len(once)} labels are" if len(once) > 1 else "1 label is"
        named = listed([repr(label) for label in once], _NAMED)
        lines.append(f"{few} in one training record only: {named}; is it a typing error?")
    if same := [" and ".join(spelled(repr(label)) for label in group) for group in alike]:
        lines.append(f"these count as different labels: {listed(same, _NAMED)}; is it one label?")
    if several := _several(counts):
        what = f"{several[0]!r} and {len(several) - 1:,} more" if len(several) > 1 else repr(several[0])
        how = "each combination counts as one label; for several labels of a text, use a list, with --schema"
        lines.append(f"more than one label in a cell: {what}: {how}")
    most, often = max(counts.items(), key=lambda item: item[1], default=("", 0))
    if total >= LEAST and total > often >= 0.9 * total:
        share = f"{often:,} of {total:,} training records have the label {most!r}"
        lines.append(f"{share}: a model that always gives it is right as often; compare macro-F1, not accuracy")
    return lines


def variants(counts: Mapping[str, int]) -> list[list[str]]:
    """Groups of labels that may be one: they are the same without case, spaces, punctuation and accents, or differ in a
    letter and one is rare.

    >>> variants({"Sign-up": 3, "sign up": 2, "billing": 9, "biling": 2, "level 1": 9, "level 2": 1, "C": 1, "C#": 1})
    [['Sign-up', 'sign up'], ['biling', 'billing']]
    """
    whole, less, groups = dict[str, str](), dict[str, str](), dict[str, list[str]]()
    for label in sorted(counts, key=lambda label: (-counts[label], label)):
        form = _UNSEEN.sub("", normalize("NFD", folded(label)))
        if sum(map(str.isalpha, form)) > 1:  # -1 is not 1
            form = re.sub(r"[\s_.,:;!?/'\"()-]+", "", form)
        forms = [form]
        if _SHORTEST <= len(form) <= _LONGEST:  # what has a letter less than two words have differs little from both
            forms += [form[:i] + form[i + 1 :] for i, letter in enumerate(form) if letter.isalpha()]
        near = (less[each] for each in forms if each in less)
        near = (one for one in near if _RARE * counts[label] <= sum(counts[same] for same in groups[one]))
        first = whole.get(form) or next(near, label)
        groups.setdefault(first, []).append(label)
        whole.setdefault(form, first)
        for each in forms:
            less.setdefault(each, first)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _several(labels: Iterable[str]) -> list[str]:
    """Labels that are others of the set, or the same as another in another order, with ; , or | between them."""
    parts = {label: tuple(sorted(filter(None, re.split(r"\s*[;,|]\s*", label)))) for label in labels}
    times = Counter(parts.values())
    return [
        label
        for label, each in parts.items()
        if len(each) > 1 and (times[each] > 1 or all(one in parts for one in each))
    ]
