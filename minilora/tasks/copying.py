"""Copy and reverse: say a sequence again, in the same order or from its end.

What has to be learned is where to look, and nothing has to be stored: the symbols of the test are drawn anew.

Sources: copying is the first task of Neural Turing Machines (Graves et al., arXiv 1410.5401); reversing is one of those
of Learning to Transduce with Unbounded Memory (Grefenstette et al., arXiv 1506.02516).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..nn.parts import Sample
from .task import ANSWER, asked, at_least, draw_different, draw_symbols, right_tokens


@dataclass(frozen=True)
class Copying:
    """Random sequences of `shortest` to `longest` out of `symbols` symbols, each followed by itself; with `reverse`, by
    itself from the end. `trained` are for training, `tested` others to ask.

    Raises ValueError for settings that make no such task.
    """

    vocab_size: int
    symbols: int = 8
    shortest: int = 4
    longest: int = 8
    reverse: bool = False
    trained: int = 512
    tested: int = 128
    seed: int = 0
    train: list[Sample] = field(init=False, repr=False, compare=False)
    test: list[Sample] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        at_least(1, shortest=self.shortest, trained=self.trained, tested=self.tested)
        at_least(2, symbols=self.symbols)
        at_least(0, seed=self.seed)
        at_least(self.shortest, longest=self.longest)
        wanted, lengths = self.trained + self.tested, range(self.shortest, self.longest + 1)
        if 2 * wanted > self.symbols**self.longest / len(lengths):
            raise ValueError(
                f"{wanted} different sequences are too many of up to {self.longest} out of {self.symbols} symbols: ask "
                "for fewer, or take more symbols or a greater length"
            )
        rng = np.random.default_rng(self.seed)
        symbols = draw_symbols(rng, self.vocab_size, self.symbols)

        def draw() -> tuple[int, ...]:
            return tuple(rng.choice(symbols, rng.integers(self.shortest, self.longest + 1)).tolist())

        samples = [asked((*s, ANSWER), s[::-1] if self.reverse else s) for s in draw_different(draw, wanted)]
        object.__setattr__(self, "train", samples[: self.trained])
        object.__setattr__(self, "test", samples[self.trained :])

    def measure(self, model: Any) -> dict[str, float]:
        """ "score": the share of right symbols, each with all before it given; "whole": that of faultless sequences.

        A guess among the symbols is right once in `symbols`.
        """
        right = right_tokens(model, self.test)
        score, whole = float(np.mean(np.concatenate(right))), float(np.mean([each.all() for each in right]))
        return {"score": score, "ceiling": 1.0, "chance": 1 / self.symbols, "whole": whole}
