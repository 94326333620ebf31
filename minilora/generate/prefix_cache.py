"""Prefix caching: a conversation continues without computing again what was said before.

The keys and values of the last answers and of their prompts are kept, and a prompt that begins with the same tokens,
such as the next question or the same system prompt, is computed from there. SGLang (Zheng et al. 2023,
arXiv 2312.07104) and vLLM keep them in trees and blocks; here each conversation is one row, and the prompts that one
passage is read by are kept together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from ..lora.adapters import Choice, factors_of
from ..nn.cache import KVCache
from ..nn.parts import same_beginning

Who = tuple[tuple[str, float], ...]  # adapters with their factors, sorted
Held = TypeVar("Held", KVCache, "Read")


class _Recent(Generic[Held]):
    """What was computed last, in `most_bytes` at most, by who computed it and of which tokens.

    It is valid only for the weights that computed it: after a change of the model, call `forget`.
    """

    most_bytes: int

    def __init__(self) -> None:
        self.kept: dict[tuple[Who, Any], Held] = {}  # what was used last is at the end

    def _keep(self, key: tuple[Who, Any], held: Held) -> None:
        """Keep this; what was not used for longest makes room."""
        self.kept.pop(key, None)
        self.kept[key] = held
        while sum(one.nbytes for one in self.kept.values()) > self.most_bytes:
            del self.kept[next(iter(self.kept))]

    def forget(self, name: str | None = None) -> None:
        """Forget what an adapter computed, alone or in a combination; without a name everything."""
        self.kept = {key: held for key, held in self.kept.items() if name is not None and name not in dict(key[0])}


class PrefixCache(_Recent[KVCache]):
    """The rows of the last conversations."""

    def __init__(self, most_bytes: int = 2**28):
        super().__init__()
        self.most_bytes = most_bytes

    def keep(self, choice: Choice, tokens: Sequence[int], row: KVCache) -> None:
        """Keep a row, and drop those that it begins with."""
        if row.nbytes > self.most_bytes:
            return
        who, new = _who(choice), tuple(tokens[: row.length])
        for key in [key for key in self.kept if key[0] == who and same_beginning([key[1], new]) == len(key[1])]:
            del self.kept[key]
        self._keep((who, new), row)

    def longest(self, choice: Choice, prompt: Sequence[int]) -> tuple[int, KVCache | None]:
        """How many tokens of a prompt are known, and the row that begins with them. The prompt's last token is never
        known: computing it gives the answer's first.
        """
        who = _who(choice)
        mine = [(min(same_beginning([key[1], prompt]), len(prompt) - 1), key) for key in self.kept if key[0] == who]
        count, best = max(mine, key=lambda pair: pair[0], default=(0, None))
        if best is None or not count:
            return 0, None
        self._keep(best, row := self.kept[best])
        return count, row


@dataclass(eq=False)
class Read:
    """Prompts that were computed.

    prefix: a row of a KV cache with the tokens that all of them begin with, if there are any. rows: of each prompt a
    row with the tokens that follow, and the log-probabilities of the next token, (V).
    """

    prefix: KVCache | None
    rows: list[tuple[KVCache, np.ndarray]] = field(default_factory=list, repr=False)

    @property
    def nbytes(self) -> int:
        """The bytes of all that is kept."""
        kept = [each for row in self.rows for each in row]
        return sum(each.nbytes for each in kept) + (self.prefix.nbytes if self.prefix else 0)


class ReadPassages(_Recent[Read]):
    """The prompts by which passages were read last, for the next question about them."""

    most_bytes = 2**29  # 15 to 20 passages of 200 tokens, read by SmolLM2

    def keep(self, choice: Choice, prompts: Sequence[Sequence[int]], read: Read) -> None:
        """Keep what was read."""
        self._keep((_who(choice), tuple(map(tuple, prompts))), read)

    def get(self, choice: Choice, prompts: Sequence[Sequence[int]]) -> Read | None:
        """What is known of exactly these prompts."""
        key = _who(choice), tuple(map(tuple, prompts))
        if (read := self.kept.get(key)) is not None:
            self._keep(key, read)
        return read


def _who(choice: Choice) -> Who:
    return tuple(sorted(factors_of(choice).items()))
