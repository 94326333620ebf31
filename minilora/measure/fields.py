"""How well fields are found: the share that is right, field by field and together, and whole objects; and baselines.

A field is right if its value is the record's, letter by letter; a list is right if it has the same members, in any
order. Every answer is decoded under the schema, also those of the base.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.fields import FieldTask, Task, as_json
from ..data.records import Record
from ..generate.answers import generate_batch
from ..generate.as_trained import guide_of
from ..models.tokenizer import Tokenizer
from ..nn.language_model import LanguageModel
from .labels import Checked, Labelled, with_examples
from .loss import evenly
from .preferences import Preferred
from .statistics import Resampled, interval_as_json, wilson

SHOTS = 4  # examples in the prompt of the base, at most
ANSWER_TOKENS = 160  # of an answer, at most, unless the schema has many fields; those that come along need 104
USUAL = "most frequent values"


@dataclass(frozen=True)
class WithFields(Checked):
    """Records whose fields the model must find. An answer is a text, JSON under the schema."""

    task: FieldTask
    key = "fields"

    @property
    def tokens(self) -> int:
        """The tokens of an answer, at most: half as many again as the bytes of the shortest, if those are many."""
        return max(ANSWER_TOKENS, self.task.least() * 3 // 2)

    def texts(self) -> list[str]:
        """The texts without the question for their fields."""
        return [self.task.text(record.question) for record in self.records]

    def ask(self, model: LanguageModel, tokenizer: Tokenizer, shots: int = 0) -> list[str]:
        """The answer to each record, as JSON."""
        talks = with_examples(self.records, evenly(self.examples, shots)[:shots])
        guides = [guide_of(self.task, tokenizer, text) for text in self.texts()]
        return generate_batch(model, tokenizer, talks, self.tokens, guides=guides)

    def lengths(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens of each prompt, and of the longest answer that is allowed."""
        return [len(tokenizer.encode_chat(record.prompt, answer_next=True)) + self.tokens for record in self.records]

    def shots_that_fit(self, tokenizer: Tokenizer, limit: int) -> int:
        """How many examples, up to SHOTS, fit before every record, however long they are."""

        def longest(records: Sequence[Record]) -> int:
            return max(len(tokenizer.encode_chat(record.messages)) for record in records)

        if not self.examples:
            return 0
        fitting = (limit - self.tokens - longest(self.records)) // longest(self.examples)
        return max(0, min(SHOTS, len(self.examples), fitting))

    def report(self, answers: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
        """The share of fields and of whole objects that is right, mistakes, and the most frequent values."""
        contenders = {USUAL: usual(self)} if self.examples else {}
        contenders |= {name: list(each) for name, each in answers.items()}
        names = [one.name for one in self.task.fields]
        truth = [json.loads(record.messages[-1]["content"]) for record in self.records]
        given = {name: [json.loads(text) for text in each] for name, each in contenders.items()}
        right = {
            name: np.array(
                [[same(one[key], true[key]) for key in names] for one, true in zip(each, truth, strict=True)]
            )
            for name, each in given.items()
        }  # (N, F) each
        *_, subject = right
        micro = Resampled(np.array([each.mean(axis=1) for each in right.values()]), np.ones(len(truth)), seed)
        rows = [
            {
                "name": name,
                "fields_right": interval_as_json(micro.mean(k)),
                "objects_right": interval_as_json(wilson(np.all(each, axis=1))),
                "fields": {key: interval_as_json(wilson(each[:, j])) for j, key in enumerate(names)},
                "lead": interval_as_json(micro.difference(len(right) - 1, k)),  # of the model's share over this one's
            }
            for k, (name, each) in enumerate(right.items())
        ]
        mistakes = []
        for i, text in enumerate(self.texts()):
            own, true = given[subject][i], truth[i]
            if wrong := {key: [true[key], own[key]] for key in names if not same(own[key], true[key])}:
                mistakes.append({"id": self.records[i].id, "text": text, "wrong": wrong})
        return {
            "fields": names,
            "copied": list(self.task.copied),
            "records": len(truth),
            "subject": subject,
            "rows": rows,
            "mistakes": sorted(mistakes, key=lambda one: -len(one["wrong"])),
        }


def usual(held: WithFields) -> list[str]:
    """The most frequent value of each field in the training records, whatever the text."""
    answers = [json.loads(record.messages[-1]["content"]) for record in held.examples]
    values = {}
    for one in held.task.fields:
        counts = Counter(as_json(answer[one.name]) for answer in answers)
        values[one.name] = json.loads(counts.most_common(1)[0][0])
    return [as_json(values)] * len(held.records)


def same(value: Any, other: Any) -> bool:
    """Are two values of a field the same? Lists are, whatever the order of their members.

    >>> same(["a", "b"], ["b", "a"]), same(1, 1.0), same("a", "A"), same(None, [])
    (True, True, False, False)
    """
    if isinstance(value, list) and isinstance(other, list):
        return sorted(map(as_json, value)) == sorted(map(as_json, other))
    return as_json(value) == as_json(other)


def checked_of(task: Task | None, records: Sequence[Record], examples: Sequence[Record]) -> Checked | None:
    """The records of a task with their examples, or those with a rejected answer each; None for others."""
    if task is None:
        return Preferred(None, records) if records and all(one.rejected is not None for one in records) else None
    return WithFields(task, records, examples) if isinstance(task, FieldTask) else Labelled(task, records, examples)
