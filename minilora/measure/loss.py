"""What a model knows: the loss on a set of samples, and how many of the expected words its answers contain."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from ..data.records import Record
from ..generate.answers import generate_batch
from ..models.tokenizer import Tokenizer
from ..nn.llama import Llama
from ..nn.parts import Sample, check_samples
from ..nn.ranks import ALONE, Ranks
from ..nn.step import loss_without_grad

Item = TypeVar("Item")
ANSWER_TOKENS = 64  # where a measured answer is cut off


def held_out(splits: Mapping[str, Sequence[Record]], most: int) -> dict[str, list[Record]]:
    """What tells whether a job has taught something: records by set, of records by split.

    "paraphrase": those that are trained on, asked in words that are not; at most `most` of them, evenly chosen.
    "unseen": the test split.
    """
    paraphrased = [record.asked_otherwise() for record in splits["train"] if record.paraphrase is not None]
    return {"paraphrase": evenly(paraphrased, most), "unseen": list(splits["test"])}


def evenly(items: Sequence[Item], most: int | None) -> list[Item]:
    """Every one, every second one, or every third, ...: at most `most`, or all for None."""
    return list(items[:: math.ceil(len(items) / (most or len(items) or 1)) or 1])


def mean_loss(
    model: Llama,
    samples: Sequence[Sample],
    batch_size: int = 16,
    done: Callable[[int], object] = lambda count: None,
    ranks: Ranks = ALONE,
) -> float:
    """The mean cross-entropy per scored token over all samples, in nats. Raises ValueError for no samples.

    done: called with the number of samples that have just been scored. ranks: who shares the work; all must call this.
    """
    if not samples:
        raise ValueError("no samples to evaluate")
    check_samples(samples)
    ordered = sorted(samples, key=lambda sample: len(sample.ids))
    total, count = 0.0, 0
    for i in range(0, len(ordered), batch_size):
        batch = ordered[i : i + batch_size]
        if mine := ranks.share(batch):
            scored = sum(sample.scored for sample in mine)
            total += loss_without_grad(model, mine) * scored
            count += scored
        done(len(batch))
    whole, tokens = ranks.sum(total, count)
    return whole / tokens


def answer_all(
    model: Llama,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    max_new_tokens: int = ANSWER_TOKENS,
    done: Callable[[int], object] = lambda count: None,
    ranks: Ranks = ALONE,
) -> list[str]:
    """The model's own answer to each record's question, greedily. done, ranks: as for `mean_loss`."""
    prompts = [record.prompt for record in records]
    mine, left = prompts[ranks.number :: ranks.size], len(prompts)

    def finished(count: int) -> None:  # each stands for one of every other rank, as far as there are so many
        nonlocal left
        done(min(left, count * ranks.size))
        left -= min(left, count * ranks.size)

    return ranks.join(generate_batch(model, tokenizer, mine, max_new_tokens, done=finished))


def keyword_recall(answers: Sequence[str], records: Sequence[Record]) -> float:
    """The mean over records of the share of their keywords that stand in the answer: see `recalls`.

    Raises ValueError when no record has keywords.
    """
    shares = [share for share, record in zip(recalls(answers, records), records, strict=True) if record.keywords]
    if not shares:
        raise ValueError("no record has keywords")
    return float(np.mean(shares))


def recalls(answers: Sequence[str], records: Sequence[Record]) -> list[float]:
    """Of each record, the share of its keywords that stand in its answer as whole words, upper or lower case.

    NaN for a record without keywords.
    """
    return [
        float(np.mean([contains(answer, word) for word in record.keywords])) if record.keywords else math.nan
        for answer, record in zip(answers, records, strict=True)
    ]


def contains(text: str, word: str) -> bool:
    """Does `word` stand in `text` as a whole word?

    >>> contains("An enforceable promise.", "promise"), contains("Promised", "promise")
    (True, False)
    """
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None
