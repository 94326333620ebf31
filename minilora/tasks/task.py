"""What all tasks share: samples to train on and to ask, a measure between a guesser's score and a ceiling.

    task = Recall(vocab_size=2048, pairs=128, seed=0)       # or Modular, Copying, Regular; Style takes a tokenizer
    ml.fit(model, task.train, steps=100, lr=5e-3)
    task.measure(model)                                     # {"score": ..., "ceiling": ..., "chance": ..., ...}

A task is settings and a seed: the same ones make the same samples. Its sequences are token ids. 0, 1 and 2 are marks
(start, answer, end), which the tiny base and SmolLM2 have at the same numbers; the symbols are drawn from the other ids
below `vocab_size`. So a task is the same whether a pretrained model learns it or a random one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from ..engine.backend import to_numpy
from ..engine.fused import NOT_SCORED
from ..engine.tensor import no_grad
from ..nn.parts import Sample

START, ANSWER = 0, 1
MARKS = 3  # with 2, the end
_AT_ONCE = 64  # sequences whose scores for all tokens are held at a time


class Task(Protocol):
    """Samples with known answers, and how well a model gives them."""

    @property
    def train(self) -> Sequence[Sample]: ...

    @property
    def test(self) -> Sequence[Sample]: ...

    def measure(self, model: Any) -> dict[str, float]:
        """At least "score", "ceiling" (what the best model gets) and "chance" (what one that knows nothing gets)."""


def at_least(least: int, **settings: int) -> None:
    """Refuse, with a ValueError, the first of the settings that is no whole number from `least` on."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be a whole number from {least} on, got {value!r}")


def draw_symbols(rng: np.random.Generator, vocab_size: int, count: int) -> list[int]:
    """`count` different token ids that are no marks. Raises ValueError where the vocabulary has not so many."""
    if count > vocab_size - MARKS:
        raise ValueError(
            f"{count} symbols and {MARKS} marks need a vocab_size of at least {count + MARKS}, got {vocab_size}"
        )
    return [int(i) + MARKS for i in rng.permutation(vocab_size - MARKS)[:count]]


def draw_different(draw: Callable[[], tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """So many different results of `draw`, in the order of their first coming."""
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def asked(question: Sequence[int], answer: Sequence[int]) -> Sample:
    """A sequence of start mark, question and answer, of which the answer is scored."""
    ids = (START, *question, *answer)
    return Sample(ids, (NOT_SCORED,) * (1 + len(question)) + tuple(answer))


def log_probabilities(model: Any, samples: Sequence[Sample]) -> Iterator[tuple[Sample, np.ndarray]]:
    """Each sample, and the model's log-probabilities (S, V) of all tokens where one of its S scored tokens stands.

    model: whatever gives logits (B, T, V) for ids (B, T). Samples come in order of their length.
    """
    ordered = sorted(samples, key=lambda sample: len(sample.ids))
    while ordered:
        length = len(ordered[0].ids)
        batch = [sample for sample in ordered[:_AT_ONCE] if len(sample.ids) == length]
        ordered = ordered[len(batch) :]
        with no_grad():
            logits = to_numpy(model(np.array([sample.ids for sample in batch], np.int64)).data)  # (B, T, V)
        for sample, row in zip(batch, logits, strict=True):
            places = [i - 1 for i, label in enumerate(sample.labels) if label != NOT_SCORED]
            yield sample, _log_softmax(row[places].astype(np.float64))  # (S, V)


def scored_ids(sample: Sample) -> np.ndarray:
    """The tokens (S,) that a sample is scored on."""
    return np.array([label for label in sample.labels if label != NOT_SCORED])


def right_tokens(model: Any, samples: Sequence[Sample]) -> list[np.ndarray]:
    """Of each sample, whether the likeliest token is the right one at its S scored tokens: (S,) of True and False.

    With all before it right, too, these are the tokens that greedy generation writes.
    """
    return [found.argmax(axis=1) == scored_ids(sample) for sample, found in log_probabilities(model, samples)]


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))
