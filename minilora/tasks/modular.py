"""Modular addition: a + b mod p for a prime p. Some of the p² sums are trained, the others are asked.

A table of sums that are marked with meaningless symbols can be learned by heart, and then says nothing about a sum that
was left out; or its rule is found, and then all are right. Small models first do the one and much later the other.

Source: Grokking: Generalization Beyond Overfitting on Small Algorithmic Datasets (Power et al., arXiv 2201.02177), with
p = 97 and half of the sums trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..nn.parts import Sample
from .task import ANSWER, asked, at_least, draw_symbols, right_tokens


@dataclass(frozen=True)
class Modular:
    """The sums modulo `p`, each number a symbol; `share` of them to train on, the rest to ask.

    Raises ValueError for a p that is no prime, or a share that leaves nothing to train on or to ask.
    """

    vocab_size: int
    p: int = 23
    share: float = 0.5
    seed: int = 0
    train: list[Sample] = field(init=False, repr=False, compare=False)
    test: list[Sample] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        at_least(2, p=self.p)
        at_least(0, seed=self.seed)
        if any(self.p % divisor == 0 for divisor in range(2, int(self.p**0.5) + 1)):
            raise ValueError(f"p must be a prime number, got {self.p}")
        sums = self.p**2
        trained = round(self.share * sums) if 0 < self.share < 1 else 0
        if not 0 < trained < sums:
            raise ValueError(f"share must leave some of the {sums} sums on both sides, got {self.share}")
        rng = np.random.default_rng(self.seed)
        number = draw_symbols(rng, self.vocab_size, self.p)
        samples = []
        for i in rng.permutation(sums).tolist():
            a, b = divmod(i, self.p)
            samples.append(asked((number[a], number[b], ANSWER), (number[(a + b) % self.p],)))
        object.__setattr__(self, "train", samples[:trained])
        object.__setattr__(self, "test", samples[trained:])

    def measure(self, model: Any) -> dict[str, float]:
        """ "score": the share of sums never trained that are right; "trained": the same of those that were.

        The rule reaches 1, a guess among the numbers 1/p.
        """
        score, trained = (float(np.mean(np.concatenate(right_tokens(model, s)))) for s in (self.test, self.train))
        return {"score": score, "ceiling": 1.0, "chance": 1 / self.p, "trained": trained}
