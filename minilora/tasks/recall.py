"""Key-value recall: random keys with random values, to be learned by heart. How many bits are stored, and in how many
numbers?

Nothing in the pairs follows from anything else, so each value must be stored: log2(values) bits, N·log2(values) for N
pairs. What a model has stored is what its loss says: with p the probability that it gives to the right value, it still
needs -log2 p bits to write the value down, and has the rest. Guessing among the values stores nothing.

Sources: Physics of Language Models, part 3.3 (arXiv 2404.05405) measures so what models know, and finds that they store
2 bits per parameter after long training; LoRA Without Regret (Schulman et al., Thinking Machines, 2025) takes these
2 bits to ask when data exceed an adapter's capacity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..measure.counts import count_parameters
from ..nn.module import Module
from ..nn.parts import Sample
from .task import asked, at_least, draw_different, draw_symbols, log_probabilities, scored_ids


@dataclass(frozen=True)
class Recall:
    """`pairs` random pairs of a key, `key_length` symbols, and a value, one out of `values`.

    The test asks for what was trained: there is nothing to generalise to. Raises ValueError for settings that make no
    such task.
    """

    vocab_size: int
    pairs: int = 128
    values: int = 32
    key_length: int = 2
    key_symbols: int = 32
    seed: int = 0
    train: list[Sample] = field(init=False, repr=False, compare=False)
    value_tokens: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        at_least(1, pairs=self.pairs, key_length=self.key_length, key_symbols=self.key_symbols)
        at_least(2, values=self.values)
        at_least(0, seed=self.seed)
        if self.pairs > self.key_symbols**self.key_length:
            raise ValueError(
                f"{self.pairs} pairs need as many keys, and {self.key_length} of {self.key_symbols} symbols make "
                f"{self.key_symbols**self.key_length}"
            )
        rng = np.random.default_rng(self.seed)
        symbols = draw_symbols(rng, self.vocab_size, self.key_symbols + self.values)
        keys, values = symbols[: self.key_symbols], symbols[self.key_symbols :]
        different = draw_different(lambda: tuple(rng.choice(keys, self.key_length).tolist()), self.pairs)
        drawn = [(values[i],) for i in rng.integers(0, self.values, self.pairs)]
        samples = [asked(key, value) for key, value in zip(different, drawn, strict=True)]
        object.__setattr__(self, "train", samples)
        object.__setattr__(self, "value_tokens", values)

    @property
    def test(self) -> list[Sample]:
        return self.train

    @property
    def bits(self) -> float:
        """What there is to store: N·log2(values)."""
        return self.pairs * math.log2(self.values)

    def measure(self, model: Any) -> dict[str, float]:
        """ "score": bits stored, from 0 to the "ceiling" of `bits`; "accuracy": the share of values that it says.

        "bits_per_parameter": stored bits per trainable parameter, where the model has some.
        """
        lacking, right = 0.0, 0
        for sample, found in log_probabilities(model, self.test):
            value = scored_ids(sample)[0]
            lacking -= float(found[0, value]) / math.log(2)
            right += int(found[0].argmax() == value)
        stored = max(0.0, self.bits - lacking)
        measured = {"score": stored, "ceiling": self.bits, "chance": 0.0, "accuracy": right / self.pairs}
        if isinstance(model, Module) and (trainable := count_parameters(model).trainable):
            measured["bits_per_parameter"] = stored / trainable
        return measured
