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
from ..progress import progress
from .labels import TooLongError, label_logprobs, without_nan
from .prefix_cache import ReadPassages

CANDIDATES = 10  # passages that BM25 ranks first, of which the sentences are compared
RUN = 2  # sentences after which the question is asked: of 1, 2 and 3 the best (tests/benchmarks/README.md)


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
    known: ReadPassages | None = None,
) -> Quotation:
    """The sentences that answer a question, of these passages, or of the `CANDIDATES` of a handbook that match best.

    system: the system prompt that the adapters were trained with. mixed, choice: who decides, as for `label_logprobs`.
    known: the passages that were read before, for the next question about them.

    Raises ValueError for a passage and a question that are too long for the model, and where that predicts NaN.
    """
    passages = candidates(question, passages)
    found, total = [], len(passages) if len(passages) > 1 else 0  # a single one has no bar
    with progress("reading", total, "passage") as bar:
        for passage in passages:
            found.append(read(model, tokenizer, quoting, question, passage, system, mixed, choice, known))
            bar.update()
    return likeliest(quoting, passages, found)


def candidates(question: str, passages: Handbook | Sequence[Passage]) -> Sequence[Passage]:
    """The passages to read for a question: all of a sequence, the best ones of a handbook, of equal texts the first."""
    if not isinstance(passages, Handbook):
        return passages
    first = dict[str, Passage]()
    for each in passages.ranked(question):
        first.setdefault(each.text, each)
        if len(first) == CANDIDATES:
            break
    return [*first.values()]


def read(
    model: LanguageModel,
    tokenizer: Tokenizer,
    quoting: Quoting,
    question: str,
    passage: Passage,
    system: str | None,
    mixed: bool,
    choice: Choice,
    known: ReadPassages | None,
) -> np.ndarray:
    """log p(question | run) for each run of `RUN` sentences of a passage. For what is given see `quote`."""
    before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    talks: list[list[Message]] = [
        [*before, {"role": "user", "content": quoting.prompt(passage.text, part)}]
        for part in quoting.parts(passage.text, min(RUN, quoting.sentences))
    ]
    try:
        return without_nan(label_logprobs(model, tokenizer, talks, [question], mixed, choice, known))[:, 0]
    except TooLongError as error:  # the question is no label
        what = f"the question and passage {passage.id}".rstrip()
        most = f"more tokens than the {model.config.max_position_embeddings:,} that the model can see"
        raise ValueError(f"{what} have {most}: ask in fewer words, or divide the passage") from error


def longest_prompt(quoting: Quoting, passage: str) -> str:
    """The longest of the prompts with which `read` asks about a passage."""
    return quoting.prompt(passage, max(quoting.parts(passage, min(RUN, quoting.sentences)), key=len))


def likeliest(quoting: Quoting, passages: Sequence[Passage], found: Sequence[np.ndarray]) -> Quotation:
    """The sentences with the largest expected share of the answer. found: of each passage what `read` returns."""
    number, start = window(found, min(RUN, quoting.sentences), quoting.sentences)
    return Quotation(passages[number], quoting.parts(passages[number].text)[start])


def window(logprobs: Sequence[np.ndarray], run: int, sentences: int) -> tuple[int, int]:
    """The passage, and in it the first of `sentences` sentences, which hold the largest expected share of the answer.

    logprobs: of each passage log p(question | run) for its runs of `run` sentences. By Bayes' rule a run is the answer
    with a probability in proportion to p(question | run), if passages, and runs within each, are equally likely before.
    """
    highest = max(each.max() for each in logprobs)
    best, most = (0, 0), -1.0
    for number, each in enumerate(logprobs):
        p = np.exp(each - highest) / len(each)  # (runs,), in proportion to the probability
        share = np.convolve(p, np.ones(run) / run)  # (run sentences,), of the answer in each sentence
        expected = np.convolve(share, np.ones(min(sentences, len(share))), "valid")
        if expected.max() > most:
            best, most = (number, int(expected.argmax())), expected.max()
    return best
