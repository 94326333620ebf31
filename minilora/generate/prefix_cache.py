"""Prefix caching: a conversation continues without computing again what was said before.

The keys and values of the last answers and of their prompts are kept, and a prompt that begins with the same tokens,
such as the next question or the same system prompt, is computed from there. SGLang (Zheng et al. 2023,
arXiv 2312.07104) and vLLM keep them in trees and blocks; here each conversation is one row, and the prompts that one
passage is read by are kept together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..lora.adapters import Choice, factors_of
from ..nn.cache import KVCache

MOST_BYTES = 2**28
MOST_BYTES_OF_PASSAGES = 2**29  # 15 to 20 passages of 200 tokens, read by SmolLM2
Who = tuple[tuple[str, float], ...]  # adapters with their factors, sorted
Prompts = tuple[tuple[int, ...], ...]  # the tokens of each


@dataclass(eq=False)
class Kept:
    """A row of a KV cache with its tokens, by the choice of adapters that computed it."""

    who: Who
    tokens: list[int] = field(repr=False)
    row: KVCache = field(repr=False)


class PrefixCache:
    """The rows of the last conversations, those used last at the end, in `most_bytes` at most.

    They are those of the weights that computed them: after a change of the model, call `forget`.
    """

    def __init__(self, most_bytes: int = MOST_BYTES):
        self.most_bytes, self.kept = most_bytes, list[Kept]()

    def keep(self, choice: Choice, tokens: Sequence[int], row: KVCache) -> None:
        """Keep a row, in the place of those that are its beginning; rows that were not used for longest make room."""
        new = Kept(_who(choice), list(tokens[: row.length]), row)
        if row.nbytes > self.most_bytes:
            return
        self.kept = [one for one in self.kept if one.who != new.who or _same(one, new.tokens) < len(one.tokens)]
        self.kept.append(new)
        while sum(one.row.nbytes for one in self.kept) > self.most_bytes:
            del self.kept[0]

    def longest(self, choice: Choice, prompt: Sequence[int]) -> tuple[int, KVCache | None]:
        """How many tokens of a prompt are known, and the row that begins with them. The prompt's last token is never
        known: computing it gives the answer's first.
        """
        who = _who(choice)
        mine = [(min(_same(one, prompt), len(prompt) - 1), one) for one in self.kept if one.who == who]
        count, best = max(mine, key=lambda pair: pair[0], default=(0, None))
        if best is None or not count:
            return 0, None
        self.kept.remove(best)
        self.kept.append(best)
        return count, best.row

    def forget(self, name: str | None = None) -> None:
        """Forget what an adapter computed, alone or in a combination; without a name everything."""
        self.kept = [one for one in self.kept if name is not None and name not in dict(one.who)]


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


class ReadPassages:
    """The prompts by which passages were read last, in `most_bytes` at most, for the next question about them.

    As for a PrefixCache: after a change of the model, call `forget`.
    """

    def __init__(self, most_bytes: int = MOST_BYTES_OF_PASSAGES):
        self.most_bytes, self.kept = most_bytes, dict[tuple[Who, Prompts], Read]()

    def keep(self, choice: Choice, prompts: Sequence[Sequence[int]], read: Read) -> None:
        """Keep what was read; what was not used for longest makes room."""
        self.kept[_who(choice), _prompts(prompts)] = read
        while sum(one.nbytes for one in self.kept.values()) > self.most_bytes:
            del self.kept[next(iter(self.kept))]

    def get(self, choice: Choice, prompts: Sequence[Sequence[int]]) -> Read | None:
        """What is known of exactly these prompts."""
        key = _who(choice), _prompts(prompts)
        if (read := self.kept.pop(key, None)) is not None:
            self.kept[key] = read  # used last
        return read

    def forget(self, name: str | None = None) -> None:
        """Forget what an adapter computed, alone or in a combination; without a name everything."""
        self.kept = {key: read for key, read in self.kept.items() if name is not None and name not in dict(key[0])}


def same_beginning(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    return next((i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), min(map(len, rows)))


def _same(one: Kept, tokens: Sequence[int]) -> int:
    return same_beginning([one.tokens, tokens])


def _who(choice: Choice) -> Who:
    return tuple(sorted(factors_of(choice).items()))


def _prompts(prompts: Sequence[Sequence[int]]) -> Prompts:
    return tuple(map(tuple, prompts))
