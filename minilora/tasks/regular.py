"""A regular language: symbols that an automaton writes. Which ones may come next, and how surely can it be known?

The automaton is in one of a few states. Each state allows some symbols, one of which is drawn, all equally likely, and
leads to the next state. So two limits are known. All of a model's probability can lie on what is allowed. And no
model's loss can be lower, on sequences it has not seen and on the average, than the entropy of the draws: log n where n
symbols are allowed. The model must find the state, and the state is written nowhere.

Sources: languages of this kind are those of Tomita (Dynamic construction of finite-state automata from examples using
hill-climbing, 1982), and the lowest floor in Neural Networks and the Chomsky Hierarchy (Delétang et al.,
arXiv 2207.02098).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..nn.parts import Sample
from .task import asked, at_least, draw_different, draw_symbols, log_probabilities, scored_ids

Automaton = Mapping[int, Mapping[str, int]]  # state -> {symbol: next state}; it starts in 0

LANGUAGES: Mapping[str, Automaton] = {
    "pairs": {0: {"a": 1, "b": 2}, 1: {"b": 0}, 2: {"a": 0}},  # (ab|ba)*
    "no bb": {0: {"a": 0, "b": 1}, 1: {"a": 0}},  # no two b beside each other
    "threes": {0: {"a": 1, "b": 0}, 1: {"a": 2}, 2: {"a": 0}},  # (aaa|b)*: a in threes, b between them
    "depth 3": {0: {"(": 1}, 1: {"(": 2, ")": 0}, 2: {"(": 3, ")": 1}, 3: {")": 2}},  # brackets, at most three open
}


@dataclass(frozen=True)
class Regular:
    """Sequences of `length` symbols from an automaton: one of LANGUAGES by its name, or one of your own.

    `trained` are for training, `tested` others to ask. Raises ValueError for settings that make no such task.
    """

    vocab_size: int
    language: str | Automaton = "pairs"
    length: int = 24
    trained: int = 256
    tested: int = 64
    seed: int = 0
    automaton: Automaton = field(init=False, repr=False, compare=False)
    token: dict[str, int] = field(init=False, repr=False, compare=False)  # of each symbol
    train: list[Sample] = field(init=False, repr=False, compare=False)
    test: list[Sample] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        at_least(1, length=self.length, trained=self.trained, tested=self.tested)
        at_least(0, seed=self.seed)
        automaton = _automaton(self.language)
        alphabet = sorted({symbol for allowed in automaton.values() for symbol in allowed})
        wanted, there = self.trained + self.tested, _count(automaton, self.length)
        if 2 * wanted > there:
            raise ValueError(f"{wanted} different sequences are too many of the {there} with {self.length} symbols")
        rng = np.random.default_rng(self.seed)
        token = dict(zip(alphabet, draw_symbols(rng, self.vocab_size, len(alphabet)), strict=True))

        def draw() -> tuple[int, ...]:
            state, written = 0, []
            for _ in range(self.length):
                symbol = sorted(automaton[state])[rng.integers(len(automaton[state]))]
                state = automaton[state][symbol]
                written.append(token[symbol])
            return tuple(written)

        samples = [asked((), written) for written in draw_different(draw, wanted)]
        for name, value in (("automaton", automaton), ("token", token)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "train", samples[: self.trained])
        object.__setattr__(self, "test", samples[self.trained :])

    def allowed(self, ids: np.ndarray) -> list[list[int]]:
        """The tokens that may stand at each place of a sequence of the language: (S,) -> S lists."""
        symbol = {token: name for name, token in self.token.items()}
        state, allowed = 0, []
        for i in ids.tolist():
            allowed.append([self.token[name] for name in self.automaton[state]])
            state = self.automaton[state][symbol[i]]
        return allowed

    def measure(self, model: Any) -> dict[str, float]:
        """ "score": the mean probability of what is allowed; "chance": that of a guess among all symbols.

        "loss": nats per symbol; "entropy": what a model that knows the automaton has as its loss on the same sequences.
        """
        mass, guess, loss, entropy = [], [], [], []
        for sample, found in log_probabilities(model, self.test):
            ids = scored_ids(sample)
            for i, tokens, row in zip(ids.tolist(), self.allowed(ids), found, strict=True):
                mass.append(np.exp(row[tokens]).sum())
                guess.append(len(tokens) / len(self.token))
                loss.append(-row[i])
                entropy.append(np.log(len(tokens)))
        means = {"score": mass, "chance": guess, "loss": loss, "entropy": entropy}
        return {"ceiling": 1.0} | {name: float(np.mean(values)) for name, values in means.items()}


def _automaton(language: str | Automaton) -> Automaton:
    """The automaton that is meant. Raises ValueError for one that could not go on from a state that it comes to."""
    if isinstance(language, str):
        if language not in LANGUAGES:
            raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, or an automaton, got {language!r}")
        return LANGUAGES[language]
    led_to = {0, *(state for allowed in language.values() for state in allowed.values())}
    for state in sorted(led_to):
        if not language.get(state):
            raise ValueError(f"the automaton comes to state {state}, in which no symbol is allowed")
    return language


def _count(automaton: Automaton, length: int) -> int:
    """How many sequences of this length there are."""
    ways = {0: 1}
    for _ in range(length):
        then: dict[int, int] = {}
        for state, count in ways.items():
            for to in automaton[state].values():
                then[to] = then.get(to, 0) + count
        ways = then
    return sum(ways.values())
