"""Data with a label for each text: the prompt that asks for the label, and the set of labels that can be the answer.

Both are stored with an adapter (`lora/provenance.py`), so that whoever uses it asks as it was trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .formats import listed
from .rows import SPLITS, DataError

if TYPE_CHECKING:
    from .records import Record

LISTED = 30  # labels, at most, that the prompt lists
TEXT = "{text}"  # where the text goes


@dataclass(frozen=True)
class LabelTask:
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

    def prompt(self, text: str) -> str:
        """The question for the label of a text."""
        before, _, after = self.template.rpartition(TEXT)
        return before + text + after

    def text(self, prompt: str) -> str:
        """The text in a prompt."""
        before, _, after = self.template.rpartition(TEXT)
        return prompt[len(before) : len(prompt) - len(after)]


def task_of(records: Sequence[Record], source: object, stored: Sequence[LabelTask] = ()) -> LabelTask | None:
    """The task of records as they were read, or None if they have no labels.

    stored: the tasks of adapters that are used on them; the first that has all of their labels is taken.

    Raises DataError where only some records have a label, and for one label alone.
    """
    labels = {record.label for record in records}
    if labels <= {None}:
        return None
    if None in labels:
        without = [record.id for record in records if record.label is None]
        rest = f"{len(records) - len(without):,} records have a label and {len(without):,} have none"
        raise DataError(f"{source}: {rest} ({listed(without, 5)}): give each record a label, or leave those out")
    found = {str(label) for label in labels}
    if fitting := [task for task in stored if found.issubset(task.labels)]:
        return fitting[0]
    if len(found) == 1:
        raise DataError(f"{source}: all records have the label {found.pop()!r}: at least two are needed")
    return LabelTask.of(found)


def check_labels(splits: Mapping[str, Sequence[Record]], source: object) -> list[str]:
    """Warnings, one line each, about labels that hardly can be learned. splits: the records of each split.

    Raises DataError for a label that is to be told apart and is never trained on.
    """
    counts = Counter(record.label for record in splits[SPLITS[0]])
    for name in SPLITS[1:]:
        new = [record for record in splits[name] if record.label is not None and record.label not in counts]
        if new:
            also = f", and {len(new) - 1} more such records" if len(new) > 1 else ""
            raise DataError(
                f"{source}: {new[0].id} ({name}) has the label {new[0].label!r}, which no training record has{also}: "
                "add training records with it, or leave it out"
            )
    once = [f"{label!r}" for label, count in counts.items() if label is not None and count == 1]
    few = f"{len(once)} labels are" if len(once) > 1 else "1 label is"
    return [f"{few} in one training record only: {listed(once, 5)}; is it a typing error?"] if once else []
