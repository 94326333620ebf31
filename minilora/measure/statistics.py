"""What a model scored on a data set, record by record, and how far the choice of records may have moved the result.

Other records would have given another number. How much another is what the bootstrap says (Efron 1979): draw as many
records from those that there are, with replacement, compute the number again, and do that 2,000 times; the middle 95 %
of the results are the interval. Versions that answered the same records are compared on the same draws: what is hard in
a record is hard for all of them, so that their difference is known better than either number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.records import Record
from ..models.tokenizer import Tokenizer
from ..nn.llama import Llama
from ..nn.parts import Sample
from ..nn.step import losses_without_grad
from .loss import answer_all, recalls

RESAMPLES = 2000
CONFIDENCE = 0.95
_AT_ONCE = 1_000_000  # draws held at a time
_TOLD = 16  # records scored between two words of progress


@dataclass(frozen=True)
class Interval:
    """A number, and the bounds between which it lies for 95 % of the draws; NaN where one record alone says nothing."""

    value: float
    low: float
    high: float

    def map(self, f: Callable[[float], float]) -> Interval:
        """The interval of f(number), for an f that rises: the draws keep their order."""
        return Interval(f(self.value), f(self.low), f(self.high))


@dataclass(frozen=True)
class Scores:
    """One version on one data set. nats (N,): each record's loss summed over its scored tokens, of which it has
    `tokens` (N,). recall (M,): the share of keywords in each answer, for those records that have keywords.
    """

    nats: np.ndarray
    tokens: np.ndarray
    recall: np.ndarray


class Resampled:
    """Means of K versions over the same N records, and over 2,000 draws of them.

    amounts (K, N), weights (N,): the mean of version k is Σ amounts[k] / Σ weights, so that with nats and tokens it is
    the loss per token, and with weights of 1 a plain mean. The same seed makes the same draws.

    The bounds are percentiles: honest for some dozens of records, somewhat too narrow for a handful. Where all records
    say the same they are that number, which does not mean that other records would say it, too.
    """

    def __init__(self, amounts: np.ndarray, weights: np.ndarray, seed: int = 0):
        records = len(weights)
        self.values = amounts.sum(axis=1) / weights.sum()  # (K,)
        self.draws = np.full((RESAMPLES, len(amounts)), math.nan)  # (2000, K)
        if records < 2:
            return
        rng, step = np.random.default_rng(seed), max(1, _AT_ONCE // records)
        for start in range(0, RESAMPLES, step):
            drawn = self.draws[start : start + step]
            times = rng.multinomial(records, np.full(records, 1 / records), size=len(drawn))  # how often each record
            drawn[:] = times @ amounts.T / (times @ weights)[:, None]

    def mean(self, version: int) -> Interval:
        """The mean of one version."""
        return interval(self.values[version], self.draws[:, version])

    def difference(self, version: int, other: int) -> Interval:
        """The mean of `version` less that of `other`, paired: both on the same draws."""
        return interval(self.values[version] - self.values[other], self.draws[:, version] - self.draws[:, other])


def interval(value: float, draws: np.ndarray) -> Interval:
    """A number with the middle 95 % of what the draws made of it."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(draws, (tail, 100 - tail))
    return Interval(float(value), float(low), float(high))


def score_losses(model: Llama, samples: Sequence[Sample], done: Callable[[int], object]) -> np.ndarray:
    """The loss of each sample in nats, summed over its scored tokens: (N,). done: told how many were just scored."""
    losses: list[float] = []
    for i in range(0, len(samples), _TOLD):
        chosen = samples[i : i + _TOLD]
        losses += losses_without_grad(model, chosen)
        done(len(chosen))
    return np.array(losses) * tokens_of(samples)


def tokens_of(samples: Sequence[Sample]) -> np.ndarray:
    """How many tokens of each sample are scored: (N,)."""
    return np.array([sample.scored for sample in samples])


def score_recall(
    model: Llama, tokenizer: Tokenizer, records: Sequence[Record], done: Callable[[int], object]
) -> np.ndarray:
    """The share of each record's keywords in the model's own answer: (M,). Every record must have some."""
    return np.array(recalls(answer_all(model, tokenizer, records, done=done), records))
