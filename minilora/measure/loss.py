"""The loss of a model on samples, and which records it is measured on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from ..data.records import Record
from ..nn.language_model import LanguageModel, check_language_model
from ..nn.parts import Example, Sample, check_samples
from ..nn.step import loss_without_grad, losses_without_grad
from ..options import check_whole
from ..progress import progress

Item = TypeVar("Item")
_AT_ONCE = 16  # samples scored before the progress bar moves


def held_out(splits: Mapping[str, Sequence[Record]], most: int) -> dict[str, list[Record]]:
    """The sets that show whether a job has taught something. splits: the records of each split.

    "reworded": training records, asked in a question that shares some of their words; at most `most`, evenly
        chosen.
    "paraphrase": training records, asked in words that are not in the training data; as many.
    "unseen": the test split.
    """
    trained = splits["train"]
    asked = {
        "reworded": [record.asked(record.reworded) for record in trained if record.reworded is not None],
        "paraphrase": [record.asked_otherwise() for record in trained if record.paraphrase is not None],
    }
    return {name: evenly(records, most) for name, records in asked.items()} | {"unseen": list(splits["test"])}


def evenly(items: Sequence[Item], most: int | None) -> list[Item]:
    """Every item, or every second one, or every third, ...: at most `most` of them, or all for None."""
    return list(items[:: math.ceil(len(items) / (most or len(items) or 1)) or 1])


def mean_loss(model: LanguageModel, samples: Sequence[Example], batch_size: int = 16) -> float:
    """The mean cross-entropy per scored token over all samples, in nats; of pairs DPO's loss per pair.

    batch_size: samples computed at a time; it does not change the result, up to rounding.

    Raises ValueError for no samples and for a batch_size below 1, TypeError for a module that is not a language model.
    """
    check_language_model(model, "mean_loss")
    check_samples(samples)
    if not samples:
        raise ValueError("no samples to evaluate")
    check_whole("batch_size", batch_size, 1)
    ordered = sorted((sample for sample in samples if sample.scored), key=lambda sample: len(sample.ids))
    if not ordered:
        raise ValueError("no token is scored: every label is -100")
    total, count = 0.0, 0
    with progress("loss", len(ordered), "record") as bar:
        for i in range(0, len(ordered), batch_size):
            batch = ordered[i : i + batch_size]
            weight = sum(sample.weight for sample in batch)
            total += loss_without_grad(model, batch) * weight
            count += weight
            bar.update(len(batch))
    return total / count


def sample_losses(model: LanguageModel, samples: Sequence[Sample]) -> np.ndarray:
    """The loss of each sample in nats, summed over its scored tokens: (N,)."""
    losses: list[float] = []
    with progress("loss", len(samples), "record") as bar:
        for i in range(0, len(samples), _AT_ONCE):
            chosen = samples[i : i + _AT_ONCE]
            losses += losses_without_grad(model, chosen)
            bar.update(len(chosen))
    return np.array(losses) * scored_tokens(samples)


def scored_tokens(samples: Sequence[Sample]) -> np.ndarray:
    """How many tokens of each sample are scored: (N,)."""
    return np.array([sample.scored for sample in samples])
