"""Weights or prompt? The same questions closed-book, with the right passage, and with the one that is found."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..data.passages import Handbook, Passage
from ..data.records import Record
from ..generate.as_trained import template_of
from ..lora.adapters import Choice, set_adapter
from ..models.tokenizer import Tokenizer
from ..nn.language_model import LanguageModel
from ..progress import log
from .recall import answer_all, recalls
from .statistics import Resampled, interval_as_json

CLOSED, RIGHT, FOUND = "closed", "right", "found"  # no passage; the one with the answer; the best match of the question
ALONE = "the passage alone"  # without a model: the whole passage is the answer
AT = (1, 3)  # passages in which the right one may be


def with_own_passages(records: Sequence[Record], handbook: Handbook) -> Handbook:
    """A handbook of the passages of another and of those that records have themselves, each once: these as they are in
    a handbook, without white space around them.
    """
    passages = {passage.text: passage for passage in handbook.passages}
    for record in records:
        if record.context is not None:
            text = record.context.strip()
            passages.setdefault(text, Passage("", text))  # the record's id may say what it asks
    return Handbook(list(passages.values()), handbook.source)


def open_book_report(
    model: LanguageModel,
    tokenizer: Tokenizer,
    adapters: Mapping[str, Choice],
    records: Sequence[Record],
    handbook: Handbook,
    seed: int = 0,
) -> dict[str, Any]:
    """How much of its keywords each record is answered with: by each adapter, and by the passage alone.

    adapters: by name. One that was trained without passages is asked without any.
    records: questions with keywords. The right passage of a record is the one that it has itself, or else the one that
        question and answer find together.
    handbook: all passages, see `with_own_passages`.
    seed: of the bootstrap draws behind the intervals.

    Returns `hits`, the share of questions whose right passage is among the first ones that BM25 finds, by their number,
    and `rows`: the name, the kind of prompt (CLOSED, RIGHT, FOUND), keyword recall with its interval, tokens of a
    prompt, and seconds for an answer, of which many are computed at a time. The model ends as its base alone.
    """
    by_text = {passage.text: passage for passage in handbook.passages}
    right = [handbook.right(r.messages) if r.context is None else by_text[r.context.strip()] for r in records]
    records = [record.closed_book() for record in records]
    found = [handbook.found(record.question)[: max(AT)] for record in records]
    passages = {RIGHT: right, FOUND: [first[0] if first else handbook.passages[0] for first in found]}
    rows: list[dict[str, Any]] = []
    shares: list[list[float]] = []
    for name, choice in adapters.items():
        template = template_of(model, choice)
        set_adapter(model, choice)
        asked_by_kind = {CLOSED: records}
        if template is not None:  # otherwise a passage has no place in the prompt
            for kind, chosen in passages.items():
                asked_by_kind[kind] = [r.open_book(p.text, template) for r, p in zip(records, chosen, strict=True)]
        for kind, asked in asked_by_kind.items():
            tokens = float(np.mean([len(tokenizer.encode_chat(r.prompt, answer_next=True)) for r in asked]))
            log.info(f"{name}, {kind}: {len(asked)} answers")
            began = time.perf_counter()
            shares.append(recalls(answer_all(model, tokenizer, asked), asked))
            seconds = (time.perf_counter() - began) / len(asked)
            rows.append({"name": name, "kind": kind, "prompt_tokens": tokens, "seconds": seconds})
    set_adapter(model, None)
    for kind, chosen in passages.items():
        shares.append(recalls([passage.text for passage in chosen], records))
        rows.append({"name": ALONE, "kind": kind, "prompt_tokens": None, "seconds": None})
    draws = Resampled(np.array(shares), np.ones(len(records)), seed)
    for i, row in enumerate(rows):
        row["keyword_recall"] = interval_as_json(draws.mean(i))
    return {
        "context": handbook.source,
        "passages": len(handbook.passages),
        "records": len(records),
        "hits": {
            str(n): float(np.mean([one in first[:n] for one, first in zip(right, found, strict=True)])) for n in AT
        },
        "rows": rows,
    }
