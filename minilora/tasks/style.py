"""A shift of style: the same questions and answers, all answers in another style. Does the model answer in it?

Little has to be learned, the same for all answers, and it is told at once whether an answer that was never seen keeps
to it. It is the other end from `recall.py`, where nothing is shared.

Source: that alignment is mostly style, learned from few examples, is the hypothesis of LIMA (Zhou et al.,
arXiv 2305.11206).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..data.records import Record, read_records
from ..data.samples import encode_records
from ..data.splits import split_records
from ..measure.recall import answer_all
from ..models.tokenizer import Tokenizer
from ..nn.llama import Llama
from ..nn.parts import Sample
from .task import at_least

OPENING, ENDING = "Well, ", " That is all."
_FORMS: Mapping[str, tuple[Callable[[str], str], Callable[[str], bool]]] = {
    "capitals": (str.upper, str.isupper),
    "opening": (lambda answer: OPENING + answer, lambda answer: answer.startswith(OPENING)),
    "ending": (lambda answer: answer.rstrip() + ENDING, lambda answer: answer.rstrip().endswith(ENDING)),
}
STYLES = tuple(_FORMS)


@dataclass(frozen=True)
class Style:
    """The records of `data` for a tokenizer, each answer in `style`: in capitals, or with a fixed opening or ending.

    data: as `read_records` takes it. At most `trained` of its training split to learn from, `tested` of its test split
    to ask. tokens: where a measured answer is cut off; an ending takes whole answers. Raises ValueError for a style
    that is none of STYLES, and DataError for data that cannot be read.
    """

    tokenizer: Tokenizer = field(repr=False)
    style: str = "opening"
    data: str | Path = "legal"
    trained: int = 240
    tested: int = 20
    tokens: int = 16
    records: Mapping[str, Sequence[Record]] = field(init=False, repr=False, compare=False)
    train: list[Sample] = field(init=False, repr=False, compare=False)
    test: list[Sample] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"style must be one of {', '.join(STYLES)}, got {self.style!r}")
        at_least(1, trained=self.trained, tested=self.tested, tokens=self.tokens)
        splits = split_records(read_records(self.data, self.tokenizer))
        if not splits["test"]:
            raise ValueError(f"{self.data} has no record to ask: none is in the split test")
        plain = {"train": splits["train"][: self.trained], "test": splits["test"][: self.tested]}
        object.__setattr__(self, "records", plain)
        for name, records in plain.items():
            object.__setattr__(self, name, encode_records([self._restyled(r) for r in records], self.tokenizer))

    def _restyled(self, record: Record) -> Record:
        last = record.messages[-1]
        return replace(record, messages=(*record.messages[:-1], {**last, "content": self.said(last["content"])}))

    def said(self, answer: str) -> str:
        """An answer in this style."""
        return _FORMS[self.style][0](answer)

    def share(self, answers: Sequence[str]) -> float:
        """The share of answers that are in this style."""
        return sum(map(_FORMS[self.style][1], answers)) / len(answers)

    def measure(self, model: Llama) -> dict[str, float]:
        """ "score": the share of the model's own answers, to the test's questions, that are in the style.

        "chance": the share that the plain answers have.
        """
        asked = self.records["test"]
        answers = answer_all(model, self.tokenizer, asked, max_new_tokens=self.tokens)
        plain = [record.messages[-1]["content"] for record in asked]
        return {"score": self.share(answers), "ceiling": 1.0, "chance": self.share(plain)}
