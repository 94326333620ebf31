"""Answers that are quotations: the sentences of a passage after which a model finds the question likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.passages import Handbook, Passage
from ..data.quotes import Quoting
from ..lora.adapters import Choice, factors_of, same_of_all
from ..models.tokenizer import Message, Tokenizer
from ..nn.language_model import LanguageModel
from ..progress import hide_progress
from .labels import label_logprobs

CANDIDATES = 10  # passages that BM25 ranks first, of which the sentences are compared


@dataclass(frozen=True)
class Quotation:
    """Sentences of a passage, word for word."""

    passage: Passage
    text: str


def quoting_of(model: LanguageModel, choice: Choice) -> Quoting | None:
    """How a choice of adapters quotes, or without one a whole model; None if they were not all trained to, alike."""
    return same_of_all(model, choice, Quoting.stored, Quoting.stored(model.data))


def refuse_without_passages(model: LanguageModel, choice: Choice, handbook: Handbook | None) -> None:
    """Raise ValueError for a choice of adapters that quotes, and nothing to quote from: it would only ask questions."""
    if handbook is None and quoting_of(model, choice) is not None:
        names = ", ".join(factors_of(choice)) or "this model"
        raise ValueError(f"{names} answers with sentences of passages: give some with --context FILE")


def quote(
    model: LanguageModel,
    tokenizer: Tokenizer,
    quoting: Quoting,
    question: str,
    passages: Handbook | Sequence[Passage],
    system: str | None = None,
    mixed: bool = False,
    choice: Choice = None,
) -> Quotation:
    """The sentences that answer a question, of these passages, or of the `CANDIDATES` of a handbook that match best.

    system: the system prompt that the adapters were trained under. mixed, choice: who decides, as for `label_logprobs`.

    Raises ValueError for a passage and a question that are too long for the model.
    """
    candidates = passages.ranked(question)[:CANDIDATES] if isinstance(passages, Handbook) else passages
    best, highest = None, -np.inf
    before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for passage in candidates:
        parts = quoting.parts(passage.text)
        talks: list[list[Message]] = [
            [*before, {"role": "user", "content": quoting.prompt(passage.text, part)}] for part in parts
        ]
        with hide_progress():
            scores = label_logprobs(model, tokenizer, talks, [question], mixed, choice)[:, 0]  # log p(question | part)
        if best is None or scores.max() > highest:
            best, highest = Quotation(passage, parts[int(scores.argmax())]), scores.max()
    assert best is not None  # a handbook has passages
    return best
