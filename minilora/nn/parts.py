"""Samples, the batches they are packed into, and the micro-batches in which a batch is computed.

Micro-batches need about the same work, for several cores, and are small, for little memory. Rows are never split. In a
packed row, sequences are never split; each micro-batch computes their common prefix itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from operator import index
from typing import Any, ClassVar, Self, cast

import numpy as np

from ..engine.attention import Packing
from ..engine.backend import Array
from ..engine.fused import NOT_SCORED, preference_loss
from ..engine.tensor import Tensor

LEAST = 64  # tokens of a micro-batch: with fewer, matmuls lose more than a second core gains
GOOD = 256  # with more, matmuls gain little, and the activations saved for the backward pass grow


@dataclass(frozen=True, repr=False)
class Sample:
    """One sequence of token ids with its labels: the same ids, or -100 for a token that is not scored. The first one
    never is, because nothing predicts it.

    others: paraphrases of this sample. The epochs take the sample and these in turn.

    Lists and arrays of integers are stored as tuples. Raises ValueError for values that are not integers, and for
    another number of labels than ids.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    others: tuple[Sample, ...] = ()

    def __post_init__(self):
        for name in ("ids", "labels"):
            given = getattr(self, name)
            if isinstance(given, tuple) and {int}.issuperset(map(type, given)):
                continue
            try:
                object.__setattr__(self, name, tuple(map(index, given)))
            except TypeError:
                raise ValueError(f"{name} must be integers, got {given!r:.80}") from None
        if len(self.ids) != len(self.labels):
            raise ValueError(f"a sample has a label for each id, got {len(self.ids)} ids and {len(self.labels)} labels")
        if self.labels and self.labels[0] != NOT_SCORED:  # in a packed row, the sample before it would predict it
            object.__setattr__(self, "labels", (NOT_SCORED, *self.labels[1:]))

    def __repr__(self) -> str:
        others = f", {len(self.others)} others" if self.others else ""
        return f"Sample({len(self.ids)} tokens, {self.scored} scored{others})"

    @property
    def scored(self) -> int:
        return len(self.labels) - self.labels.count(NOT_SCORED)

    @cached_property
    def shareable(self) -> int:
        """How many of its first tokens a row may hold once for all samples: unscored ones, less the last, which has to
        predict the first scored token.
        """
        return next((i for i, label in enumerate(self.labels) if label != NOT_SCORED), len(self.labels)) - 1

    @property
    def weight(self) -> int:
        """Its weight in a mean loss: the number of its scored tokens."""
        return self.scored

    def truncated(self, length: int) -> Self:
        """Its first `length` tokens, and those of the others that then have a scored token."""
        others = (other.truncated(length) for other in self.others)
        kept = tuple(other for other in others if other.scored)
        return replace(self, ids=self.ids[:length], labels=self.labels[:length], others=kept)

    def in_turn(self, turn: int) -> Sample:
        """The sample of epoch `turn`, from 0: this one, then the others, then this one again."""
        wordings = (self, *self.others)
        return wordings[turn % len(wordings)]

    @property
    def sequences(self) -> tuple[Sample, ...]:
        """What a packed row holds of it: itself."""
        return (self,)


@dataclass(frozen=True, repr=False)
class Pair:
    """A chosen and a rejected answer to the same prompt, for preference optimisation (DPO).

    chosen, rejected: the prompt with each answer; the tokens of the answers are scored.
    reference: log π(chosen) - log π(rejected) of the model before training, from `with_reference`; None at first.
    beta: DPO's β: the higher, the closer training keeps the model to that one.

    Raises ValueError for a beta that is not a finite number above 0.
    """

    chosen: Sample
    rejected: Sample
    reference: float | None = None
    beta: float = 0.1
    others: ClassVar[tuple[Sample, ...]] = ()

    def __post_init__(self):
        if isinstance(self.beta, bool) or not isinstance(self.beta, Real) or not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be a number above 0, got {self.beta!r}")

    def __repr__(self) -> str:
        reference = "none" if self.reference is None else f"{self.reference:.3g}"
        return f"Pair({self.chosen}, {self.rejected}, reference {reference}, beta {self.beta:g})"

    @property
    def ids(self) -> tuple[int, ...]:
        return self.chosen.ids + self.rejected.ids

    @property
    def labels(self) -> tuple[int, ...]:
        return self.chosen.labels + self.rejected.labels

    @property
    def scored(self) -> int:
        return self.chosen.scored + self.rejected.scored

    @property
    def weight(self) -> int:
        """Its weight in a mean loss: pairs count alike, however long they are."""
        return 1

    def truncated(self, length: int) -> Self:
        """The first `length` tokens of both."""
        return replace(self, chosen=self.chosen.truncated(length), rejected=self.rejected.truncated(length))

    def in_turn(self, turn: int) -> Pair:
        """The same pair in every epoch."""
        return self

    @property
    def sequences(self) -> tuple[Sample, ...]:
        """What a packed row holds of it: both answers, each with the prompt."""
        return self.chosen, self.rejected


Example = Sample | Pair  # what a model is trained on


@dataclass(frozen=True)
class Batch:
    """The arguments of `LanguageModel.loss`: input_ids and labels (B, T), and the packing of sequences, if any."""

    input_ids: Array
    labels: Array
    packing: Packing | None = None

    @cached_property
    def scored(self) -> int:
        """How many tokens are scored."""
        return int((self.labels[:, 1:] != NOT_SCORED).sum())

    @property
    def weight(self) -> int:
        """Its weight in a mean loss."""
        return self.scored

    @property
    def samples(self) -> Sequence[Example]:
        """Those of a packed row, as `pack` takes them. Labels of the tokens that all begin with are the first one's."""
        packing = cast(Packing, self.packing)
        ids, labels, start = self.input_ids[0].tolist(), self.labels[0].tolist(), packing.prefix
        begin = [labels[:start], *[[NOT_SCORED] * start] * len(packing.ends)]
        spans = zip(packing.own_spans(), begin, strict=False)
        return [Sample(ids[:start] + ids[i:j], first + labels[i:j]) for (i, j), first in spans]

    def loss(self, model: Any) -> Tensor:
        """The model's mean cross-entropy per scored token."""
        return model.loss(self.input_ids, self.labels, self.packing)


@dataclass(frozen=True)
class PairBatch(Batch):
    """A packed row of pairs: chosen, rejected, chosen, and so on."""

    pairs: tuple[Pair, ...] = ()

    @property
    def weight(self) -> int:
        """Its weight in a mean loss: the number of pairs."""
        return len(self.pairs)

    @property
    def samples(self) -> Sequence[Example]:
        """The pairs."""
        return self.pairs

    def loss(self, model: Any) -> Tensor:
        """DPO's loss, a mean over pairs."""
        losses = model.loss_of_each(self.input_ids, self.labels, self.packing)
        counts = [sample.scored for pair in self.pairs for sample in pair.sequences]
        log_p = [loss * -float(count) for loss, count in zip(losses, counts, strict=True)]
        beta = np.array([pair.beta for pair in self.pairs])
        return preference_loss(*log_p, reference=references(self.pairs), beta=beta)


def references(pairs: Sequence[Pair]) -> np.ndarray:
    """The references of pairs, (N). Raises ValueError if one has none."""
    found = [pair.reference for pair in pairs]
    if None in found:
        raise ValueError("a pair has no reference: call with_reference(model, pairs) before training")
    return np.array(found, float)


# -- batches of samples ------------------------------------------------------------------------------------------------


def check_samples(samples: Sequence[Example]) -> None:
    """Raise TypeError unless `samples` is a list, or the like, of samples alone or of pairs alone."""
    if not isinstance(samples, Sequence):
        raise TypeError(f"expected a list of samples, got a {type(samples).__name__}")
    for sample in samples:
        if not isinstance(sample, Example):
            raise TypeError(
                f"expected samples, got a {type(sample).__name__}: call encode_records(records, tokenizer) first"
            )
        if isinstance(sample, Pair) != isinstance(samples[0], Pair):
            raise TypeError("expected samples alone or pairs alone, got both")


def collate(samples: Sequence[Sample], pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Input ids and labels (B, T) of some samples, one in each row, for `model.loss` and `loss_and_grad`.

    Shorter samples are padded on the right with the token `pad_id`. Padding has the label -100, so it is not scored,
    and no other token sees it. (`fit` needs no padding: it packs samples into one row.)

    >>> collate([Sample((5, 6, 7), (-100, 6, 7)), Sample((8, 9), (-100, 9))])
    (array([[5, 6, 7],
           [8, 9, 0]]), array([[-100,    6,    7],
           [-100,    9, -100]]))
    """
    check_samples(samples)
    if any(isinstance(sample, Pair) for sample in samples):
        raise TypeError("expected samples, got a Pair: give its chosen and its rejected sample")
    shape = len(samples), max((len(sample.ids) for sample in samples), default=0)
    input_ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, NOT_SCORED, np.int64)
    for row, sample in enumerate(samples):
        input_ids[row, : len(sample.ids)], labels[row, : len(sample.ids)] = sample.ids, sample.labels
    return input_ids, labels


def pack(samples: Sequence[Example]) -> Batch:
    """Put samples into one row without padding; the prefix that all of them share occurs once.

    In a chat the common prefix is the system message: a fifth of a short record's tokens, computed once per step.
    """
    prefix, sequences = common_prefix(samples), _sequences(samples)
    ids, labels, ends = list(sequences[0].ids[:prefix]), [NOT_SCORED] * prefix, []
    for sample in sequences:
        ids += sample.ids[prefix:]
        labels += sample.labels[prefix:]
        ends.append(len(ids))
    row = np.array([ids], np.int64), np.array([labels], np.int64), Packing(prefix, tuple(ends))
    pairs = tuple(sample for sample in samples if isinstance(sample, Pair))
    return PairBatch(*row, pairs) if pairs else Batch(*row)


def packed_length(samples: Sequence[Example]) -> int:
    """How many tokens `pack(samples)` has."""
    shared, sequences = common_prefix(samples), _sequences(samples)
    return sum(len(sample.ids) for sample in sequences) - (len(sequences) - 1) * shared


def common_prefix(samples: Sequence[Example]) -> int:
    """How many unscored tokens all samples begin with. Each sample keeps at least one unscored token, since its first
    scored token must be predicted from its own sequence.
    """
    check_samples(samples)
    sequences = _sequences(samples)
    if len(sequences) < 2:
        return 0
    rows = [sequence.ids[: sequence.shareable] for sequence in sequences]
    return same_beginning([min(rows), max(rows)])  # sorted, the others are between these two: they begin alike, too


def same_beginning(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    return next((i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), min(map(len, rows)))


def _sequences(samples: Sequence[Example]) -> list[Sample]:
    return [sequence for sample in samples for sequence in sample.sequences]


# -- micro-batches -----------------------------------------------------------------------------------------------------


def micro_batches(batch: Batch | Sequence[Example], threads: int) -> list[Batch]:
    """Divide a batch, or samples that are not packed yet, so that `threads` micro-batches can be computed at a time.

    A micro-batch in which no token is scored is left out, but for the first one if there is no other.
    """
    if isinstance(batch, Batch) and batch.packing is None:
        count = _count(batch.input_ids.size, 0, len(batch.input_ids), threads)
        rows = (np.array_split(x, count) for x in (batch.input_ids, batch.labels))
        parts = [Batch(*both) for both in zip(*rows, strict=True)]
    else:
        samples = batch.samples if isinstance(batch, Batch) else batch
        parts = [pack([samples[i] for i in part]) for part in divided_samples(samples, threads)]
    return [part for part in parts if part.scored] or parts[:1]


def divided_samples(samples: Sequence[Example], threads: int) -> list[list[int]]:
    """The samples of each micro-batch that `micro_batches` makes, by index.

    Samples that begin alike are together, so that their beginning is computed once: in one micro-batch, or if there are
    many of them, in each of a few.
    """
    groups, parts = begin_alike(samples), list[list[int]]()
    together = sorted((group for group in groups if len(group) > 1), key=lambda group: samples[group[0]].ids)
    alone = [group[0] for group in groups if len(group) == 1]
    for alike, group in [*((True, group) for group in together), (False, alone)]:
        shared = common_prefix([samples[i] for i in group])
        lengths = [len(samples[i].ids) - shared * len(samples[i].sequences) for i in group]
        count = _count(sum(lengths), shared, len(group), 1 if alike else threads)
        parts += [[group[i] for i in part] for part in balanced(lengths, count) if part]
    return parts


def begin_alike(samples: Sequence[Example]) -> list[list[int]]:
    """Groups of samples, by index, that begin alike and unlike the others: with the same document, say.

    They have at least `LEAST` unscored tokens more in common than all samples.
    """
    enough, groups = common_prefix(samples) + LEAST, dict[Any, list[int]]()
    for i, sample in enumerate(samples):
        begin = {s.ids[:enough] if s.shareable >= enough else i for s in sample.sequences}
        groups.setdefault(begin.pop() if len(begin) == 1 else i, []).append(i)
    return list(groups.values())


def distinct_length(samples: Sequence[Example]) -> int:
    """How many tokens samples have, where those that begin alike have their beginning once."""
    groups = begin_alike(samples)
    alone = [group[0] for group in groups if len(group) == 1]
    parts = [*(group for group in groups if len(group) > 1), alone]
    return sum(packed_length([samples[i] for i in part]) for part in parts if part)


def _count(own: int, shared: int, sequences: int, threads: int) -> int:
    """How many micro-batches sequences are divided into. own: all of their tokens, without the `shared` ones that all
    begin with: each micro-batch computes these itself, so they are no reason to have more micro-batches.
    """
    rounds = max(1, round(own / (threads * GOOD)))
    return max(1, min(threads * rounds, sequences, (shared + own) // LEAST))


def balanced(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Divide sequences, by index, into `count` parts: the longest first, each to the part with the fewest tokens."""
    parts: list[list[int]] = [[] for _ in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        min(parts, key=lambda part: sum(lengths[j] for j in part)).append(i)
    return [sorted(part) for part in parts]
