"""A batch cut into parts of about equal work, for several cores, and small, for little memory.

Rows stay whole. In a packed row it is the sequences that stay whole; each part computes their common beginning itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..engine.attention import Packing
from ..engine.fused import NOT_SCORED

LEAST = 64  # tokens of a part: with fewer, matrix products lose more than a second core gains
GOOD = 256  # with more, they gain little, and all that a part keeps for its way back grows


@dataclass(frozen=True)
class Part:
    """Some rows of a batch, or some sequences of a packed one: what `Llama.loss` takes, and how many tokens count."""

    input_ids: np.ndarray
    labels: np.ndarray
    packing: Packing | None
    scored: int


def divide(input_ids: np.ndarray, labels: np.ndarray, packing: Packing | None, threads: int) -> list[Part]:
    """Cut input_ids and labels (B, T) into parts, for `threads` of them to be computed at a time.

    A part in which nothing is scored is left out.
    """
    rounds = max(1, round(input_ids.size / (threads * GOOD)))
    count = min(threads * rounds, len(packing.ends) if packing else len(input_ids), input_ids.size // LEAST)
    if count < 2:
        return [_part(input_ids, labels, packing)]
    if packing is None:
        pairs = zip(np.array_split(input_ids, count), np.array_split(labels, count), strict=True)
        parts = [_part(ids, own_labels, None) for ids, own_labels in pairs]
    else:
        once = labels.copy()  # labels of the common beginning count in the first part only
        once[:, : packing.prefix] = NOT_SCORED
        shares = _shares(packing, count)
        parts = [_chosen(input_ids, once if i else labels, packing, which) for i, which in enumerate(shares)]
    return [part for part in parts if part.scored]


def _part(input_ids: np.ndarray, labels: np.ndarray, packing: Packing | None) -> Part:
    return Part(input_ids, labels, packing, int((labels[:, 1:] != NOT_SCORED).sum()))


def _shares(packing: Packing, count: int) -> list[list[int]]:
    """Which sequences go into which part: the longest first, each to the part that has least so far."""
    lengths = [end - start for start, end in packing.own_spans()]
    shares: list[list[int]] = [[] for _ in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        min(shares, key=lambda share: sum(lengths[j] for j in share)).append(i)
    return [sorted(share) for share in shares]


def _chosen(input_ids: np.ndarray, labels: np.ndarray, packing: Packing, which: list[int]) -> Part:
    own = [np.arange(*packing.own_spans()[i]) for i in which]
    columns = np.concatenate([np.arange(packing.prefix), *own])
    ends = packing.prefix + np.cumsum([len(x) for x in own])
    return _part(input_ids[:, columns], labels[:, columns], Packing(packing.prefix, tuple(ends.tolist())))
