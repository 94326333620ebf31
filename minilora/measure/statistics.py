"""Intervals: how far a number might have moved if other seeds, or other records, had been chosen.

Over seeds, `Interval.of` gives Student's interval of the mean. Over records, `Resampled` gives that of the bootstrap
(Efron 1979): draw as many records from those that there are, with replacement, compute the number again, and repeat
that 2,000 times; the middle 95 % of the results are the interval. Adapters that answered the same records are compared
on the same draws. A record that is hard for one is hard for all of them, so their difference is known better than
either number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
_AT_ONCE = 1_000_000  # draws held at a time


@dataclass(frozen=True)
class Interval:
    """A mean of n numbers, and the ends of its 95 % interval; the bootstrap of a single record has NaN there."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Student's interval of the mean, over seeds; of one number, that number. Raises ValueError without a finite
        one.

        >>> Interval.of([1.0, 2.0, 3.0])
        Interval(mean=2.0, low=-0.4841, high=4.484, n=3)
        """
        numbers = [float(value) for value in values]
        if not numbers or not all(map(math.isfinite, numbers)):
            raise ValueError(f"an interval needs finite numbers, one per seed; got {numbers}")
        n = len(numbers)
        mean = math.fsum(numbers) / n
        if n == 1:
            return cls(mean, mean, mean, 1)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / (n - 1))
        half = student(n - 1) * deviation / math.sqrt(n)
        return cls(mean, mean - half, mean + half, n)

    def within(self, least: float, most: float) -> Interval:
        """The interval without the part below `least` and above `most`, which the numbers cannot have."""
        return Interval(self.mean, max(self.low, least), min(self.high, most), self.n)

    def map(self, f: Callable[[float], float]) -> Interval:
        """The interval of f(mean), for a rising f, which keeps the order of the draws."""
        return Interval(f(self.mean), f(self.low), f(self.high), self.n)

    def __repr__(self) -> str:
        return f"Interval(mean={self.mean:.4}, low={self.low:.4}, high={self.high:.4}, n={self.n})"


def interval_as_json(interval: Interval) -> dict[str, float | None]:
    """An interval as JSON holds it: what is not finite is None."""
    numbers = {"value": interval.mean, "low": interval.low, "high": interval.high}
    return {name: x if math.isfinite(x) else None for name, x in numbers.items()}


def wilson(right: np.ndarray) -> Interval:
    """The share of True in (N,) with Wilson's score interval (1927, doi 10.2307/2276774), which has a width also where
    all are True.

    >>> wilson(np.arange(10) < 8)
    Interval(mean=0.8, low=0.4902, high=0.9433, n=10)
    """
    z, share, n = 1.959963984540054, float(np.mean(right)), len(right)  # z: of the normal distribution, for 95 %
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (max(0.0, min(1.0, (centre + sign * half) / (1 + z * z / n))) for sign in (-1, 1))
    return Interval(share, min(low, share), max(share, high), n)  # of 0 or 1, rounding would leave the share outside


def student(freedom: int, share: float = 0.95) -> float:
    """The t within ±t of which Student's distribution has `share` of its values, for that many degrees of freedom.

    It halves an interval over the closed form for whole degrees, a sum in θ = arctan(t / √freedom) (Abramowitz and
    Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4).

    >>> round(student(2), 3), round(student(30), 3)
    (4.303, 2.042)
    """
    if freedom < 1 or not 0 < share < 1:
        raise ValueError(f"freedom must be at least 1 and share between 0 and 1, got {freedom} and {share}")
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < share else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """The share of Student's distribution inside ±√freedom · tan(angle)."""
    odd, square = freedom % 2, math.cos(angle) ** 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for i in range(1, freedom // 2 + 1):
        total += term
        term *= square * (2 * i / (2 * i + 1) if odd else (2 * i - 1) / (2 * i))
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


class Resampled:
    """Means of K adapters over the same N records, and over 2,000 draws of them.

    amounts (K, N), weights (N,): the mean of adapter k is Σ amounts[k] / Σ weights. With nats and tokens it is the loss
    per token, and with weights of 1 a plain mean. The same seed makes the same draws.

    The bounds are percentiles: right for some dozens of records, somewhat too narrow for a handful. Where all records
    have the same number the interval is that number, although other records might have another. Records count as
    independent: of several questions about one fact, the interval is too narrow.
    """

    def __init__(self, amounts: np.ndarray, weights: np.ndarray, seed: int = 0):
        self.records = len(weights)
        self.means = amounts.sum(axis=1) / weights.sum()  # (K,)
        self.draws = np.full((RESAMPLES, len(amounts)), math.nan)  # (2000, K)
        if self.records < 2:
            return
        self.draws[:] = bootstrap(self.records, lambda times: times @ amounts.T / (times @ weights)[:, None], seed)

    def mean(self, k: int) -> Interval:
        """The mean of adapter k."""
        return self.interval(self.means[k], self.draws[:, k])

    def difference(self, k: int, other: int) -> Interval:
        """The mean of adapter k minus that of the other, paired: both on the same draws."""
        return self.interval(self.means[k] - self.means[other], self.draws[:, k] - self.draws[:, other])

    def interval(self, number: float, draws: np.ndarray) -> Interval:
        """A number that was computed from the means, and the middle 95 % of the same from each draw."""
        return Interval(float(number), *middle(draws), self.records)


def bootstrap(records: int, of: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> np.ndarray:
    """A number from each of 2,000 draws of the records, or several: (2000, ...).

    of: the numbers of some draws at a time, from how often each record was drawn, (draws, records).
    """
    rng, step = np.random.default_rng(seed), max(1, _AT_ONCE // records)
    each, sizes = np.full(records, 1 / records), [min(step, RESAMPLES - i) for i in range(0, RESAMPLES, step)]
    return np.concatenate([of(rng.multinomial(records, each, size=size)) for size in sizes])


def middle(draws: np.ndarray) -> tuple[float, float]:
    """The ends of the middle 95 % of the draws."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(draws, (tail, 100 - tail))
    return float(low), float(high)
