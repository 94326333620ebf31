"""Data with a label for each text: the prompt that asks for the label, and the set of labels that can be the answer.

Both are stored with an adapter (`lora/provenance.py`), so that whoever uses it asks as it was trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..models.tokenizer import Message
from .formats import listed
from .rows import DataError

LISTED = 30  # labels, at most, that the prompt lists
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
