"""Samples, the batches they are packed into, and the micro-batches in which a batch is computed.

Micro-batches are of about equal work, for several cores, and small, for little memory. Rows stay whole. In a packed row
it is the sequences that stay whole; each micro-batch computes their common beginning itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..engine.attention import Packing
from ..engine.backend import Array
from ..engine.fused import NOT_SCORED

LEAST = 64  # tokens of a micro-batch: with fewer, matrix products lose more than a second core gains
GOOD = 256  # with more, they gain little, and all that is kept for the way back grows


@dataclass(frozen=True)
class Sample:
    """One sequence of token ids with its labels: the same ids, -100 where a token is not scored.

    others: samples that say the same in other words. Of all of them together, each pass over the data takes one.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    others: tuple[Sample, ...] = ()

    @property
    def scored(self) -> int:
        return len(self.labels) - self.labels.count(NOT_SCORED)

    def in_turn(self, turn: int) -> Sample:
        """This sample or one of the others, for turn 0, 1, 2, ... and then from the beginning."""
        wordings = (self, *self.others)
        return wordings[turn % len(wordings)]


@dataclass(frozen=True)
class Batch:
    """What `Llama.loss` takes: input_ids and labels (B, T), and how sequences are packed into the row, if they are."""

    input_ids: Array
    labels: Array
    packing: Packing | None = None

    @cached_property
    def scored(self) -> int:
        """How many tokens count in the loss."""
        return int((self.labels[:, 1:] != NOT_SCORED).sum())


# -- packing -----------------------------------------------------------------------------------------------------------


def pack(samples: Sequence[Sample]) -> Batch:
    """Put samples into one row without padding; what all of them begin with is there once.

    In a chat the common beginning is the system message: a fifth of a short record's tokens, computed once per step.
    """
    prefix = common_prefix(samples)
    ids, labels, ends = list(samples[0].ids[:prefix]), [NOT_SCORED] * prefix, []
    for sample in samples:
        ids += sample.ids[prefix:]
        labels += sample.labels[prefix:]
        ends.append(len(ids))
    return Batch(np.array([ids], np.int64), np.array([labels], np.int64), Packing(prefix, tuple(ends)))


def packed_length(samples: Sequence[Sample]) -> int:
    """How many tokens the row has that `pack` makes of the samples."""
    return sum(len(sample.ids) for sample in samples) - (len(samples) - 1) * common_prefix(samples)


def common_prefix(samples: Sequence[Sample]) -> int:
    """How many unscored tokens all samples begin with; at least one unscored token is left to each, since the first
    scored one must be predicted from its own sequence.
    """
    if len(samples) < 2:
        return 0
    limit = min(next(i for i, label in enumerate(s.labels) if label != NOT_SCORED) for s in samples) - 1
    first = samples[0].ids
    for i in range(max(limit, 0)):
        if any(sample.ids[i] != first[i] for sample in samples):
            return i
    return max(limit, 0)


# -- micro-batches -----------------------------------------------------------------------------------------------------


def micro_batches(batch: Batch | Sequence[Sample], threads: int) -> list[Batch]:
    """Divide a batch, or samples that are not packed yet, so that `threads` micro-batches are computed at a time.

    A micro-batch in which nothing is scored is left out, unless it is the only one.
    """
    if not isinstance(batch, Batch):
        return [pack([batch[i] for i in share]) for share in shares(batch, threads)]
    ids, labels, packing = batch.input_ids, batch.labels, batch.packing
    count = _count(ids.size, len(packing.ends) if packing else len(ids), threads)
    if count == 1:
        return [batch]
    if packing is None:
        parts = [Batch(*rows) for rows in zip(np.array_split(ids, count), np.array_split(labels, count), strict=True)]
    else:
        found = spread([end - start for start, end in packing.own_spans()], count)
        parts = [_chosen(batch, packing, share, keep_prefix=not i) for i, share in enumerate(found)]
    return [part for part in parts if part.scored] or [batch]


def shares(samples: Sequence[Sample], threads: int) -> list[list[int]]:
    """Which samples, by number, `micro_batches` puts into which micro-batch."""
    tokens, shared = packed_length(samples), common_prefix(samples)
    return spread([len(sample.ids) - shared for sample in samples], _count(tokens, len(samples), threads))


def _count(tokens: int, sequences: int, threads: int) -> int:
    rounds = max(1, round(tokens / (threads * GOOD)))
    return max(1, min(threads * rounds, sequences, tokens // LEAST))


def spread(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Sequences, by number, divided into so many parts: the longest first, each to the part that has least so far."""
    shares: list[list[int]] = [[] for _ in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        min(shares, key=lambda share: sum(lengths[j] for j in share)).append(i)
    return [sorted(share) for share in shares]


def _chosen(batch: Batch, packing: Packing, share: list[int], keep_prefix: bool) -> Batch:
    """Some sequences of a packed row. The labels of the common beginning count in one micro-batch only."""
    own = [np.arange(*packing.own_spans()[i]) for i in share]
    columns = np.concatenate([np.arange(packing.prefix), *own])
    labels = batch.labels[:, columns]
    if not keep_prefix:
        labels[:, : packing.prefix] = NOT_SCORED
    ends = packing.prefix + np.cumsum([len(x) for x in own])
    return Batch(batch.input_ids[:, columns], labels, Packing(packing.prefix, tuple(ends.tolist())))
