"""Quotations: answers that are sentences of a passage, word for word.

An adapter that quotes writes no answers. It learned to ask, after a passage, the question that some of its sentences
answer. The likelier a question is after sentences, the likelier they answer it: the query likelihood of Ponte and Croft
1998 (doi 10.1145/290941.291008), with a language model for each run of sentences.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .passages import PASSAGE, fill, terms, without_headings
from .records import Record

PART = "{part}"  # where the sentences go in the template
TEMPLATE = f"{PASSAGE}\n\nAsk a question that is answered here: {PART}"
_WIDE = tuple("。！？；｡")  # ends of sentences that no space follows
_END = re.compile(  # of a sentence: lookbehinds name what else a full stop can follow
    r"""(?:(?<=[.!?;:؟؛۔।॥])|(?<=[.!?]["'”“’»)\]])(?=\s+["'“„«(\[]?[A-ZÀ-ÖØ-Þ]))  # "Yes." He; but: "Yes!" he
    (?<!\b[A-Za-z]\.[A-Z]\.)(?<!\b(?:e\.g|i\.e|d\.h|u\.a)\.)  # P.O. Box, z.B. Kosten
    (?<!\b[A-Za-z]\.(?=\s+[A-Za-z]\.))(?<!\b[A-Za-z]\.\s[A-Za-z]\.)  # z. B. Kosten, J. R. Lee
    (?<!\b(?:Dr|Mr|Ms|vs|cf)\.)(?<!\bMrs\.)(?<!\b[DM][rs]\.\s[A-Z]\.)  # Dr. A. Who
    (?<!\b(?i:ca)\.)(?<!\b(?i:bzw|ggf|vgl)\.)(?<!\b(?i:inkl|zzgl)\.)(?<!\b(?i:approx)\.)
    (?<!\b[a-z]\.[a-z]\.(?=\s+[a-z]))(?<!\b(?:etc|usw|Inc|Ltd)\.(?=\s+[a-z]))  # 9 a.m. and; but: 9 a.m. We
    (?<!\.\.\.(?=\s+[a-z]))  # well... then
    (?<!\b(?:No|Nr|pp)\.(?=\s+[A-Z-]*\d))(?<!\b(?:Abs|Art|Fig|Sec)\.(?=\s+\d))  # No. A-5; but: No. You
    (?<!\b[pS]\.(?=\s+\d))
    (?<!\d\.(?=\s+(?:Jan|Feb|Mär|Apr|Mai|Jun|Jul|Aug|Sep|Okt|Nov|Dez)))  # 3. Mai
    (?<!^[A-Z]\.)(?<!^\d\.)(?<!^\d\d\.)  # 1. Open the box.
    \s+
    |(?<=[。！？；｡])(?![。！？；｡」』）”’])\s*(?!\Z)  # without a space""",
    re.MULTILINE | re.VERBOSE,
)


@dataclass(frozen=True)
class Quoting:
    """How an adapter was trained to quote. sentences: of a quotation. template: the prompt of a question to ask."""

    sentences: int
    template: str = TEMPLATE

    @classmethod
    def stored(cls, data: Mapping[str, Any]) -> Quoting | None:
        """What an adapter's entry "data" says, if it was trained to quote. Raises ValueError for what cannot be."""
        if (entry := data.get("quote")) is None:
            return None
        sentences, template = entry.get("sentences"), str(entry.get("template"))
        if not isinstance(sentences, int) or sentences < 1 or not (0 <= template.find(PASSAGE) < template.find(PART)):
            raise ValueError(f"the adapter's quote must have sentences, and a template with {PASSAGE} and then {PART}")
        return cls(sentences, template)

    def entry(self) -> dict[str, Any]:
        """What `stored` reads."""
        return {"quote": {"sentences": self.sentences, "template": self.template}}

    def parts(self, passage: str, sentences: int | None = None) -> list[str]:
        """Every run of this many sentences in a passage, without Markdown's headings; all of it if it has no more.

        >>> Quoting(2).parts("# Numbers\\nOne. Two! Three?")
        ['One. Two!', 'Two! Three?']
        """
        each, length = _END.split(without_headings(passage.strip()).lstrip()), sentences or self.sentences
        each = [one if one[-1:] in _WIDE else f"{one} " for one in each]
        return ["".join(each[i : i + length]).rstrip() for i in range(max(1, len(each) - length + 1))]

    def prompt(self, passage: str, part: str) -> str:
        """The prompt to ask the question that a part of a passage answers. Braces in the two are only text."""
        return fill(passage, part, self.template, PART)

    def answering(self, record: Record, passage: str) -> str:
        """The shortest run of up to `sentences` sentences that has the most of a record's keywords, or if it has none
        of the words of its answer.
        """
        wanted = wanted_of(record)
        runs = [part for length in range(1, self.sentences + 1) for part in self.parts(passage, length)]
        return max(runs, key=lambda part: (len(wanted.intersection(terms(part))), -len(part)))

    def turned(self, record: Record, passage: str, wordings: Sequence[str] = ()) -> list[Record]:
        """The record turned round, to train on: its question is the answer to the sentences that answer it.

        wordings: other questions, a record each.
        """
        *before, _, _ = record.messages
        prompt = self.prompt(passage, self.answering(record, passage))
        return [
            replace(
                record,
                messages=(*before, {"role": "user", "content": prompt}, {"role": "assistant", "content": question}),
                phrasings=(),
            )
            for question in (record.question, *wordings)
        ]


def wanted_of(record: Record) -> set[str]:
    """The words that sentences need to answer a record: of its keywords, or if it has none of its answer."""
    return set(terms(" ".join(record.keywords) or record.messages[-1]["content"]))
