"""Prefix caching: a conversation continues without computing again what was said before.

The keys and values of the last answers and of their prompts are kept, and a prompt that begins with the same tokens,
such as the next question or the same system prompt, is computed from there. SGLang (Zheng et al. 2023,
arXiv 2312.07104) and vLLM keep them in trees and blocks; here each conversation is one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..lora.adapters import Choice, factors_of
from ..nn.cache import KVCache

MOST_BYTES = 2**28
Who = tuple[tuple[str, float], ...]  # adapters with their factors, sorted


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


def same_beginning(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    return next((i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), min(map(len, rows)))


def _same(one: Kept, tokens: Sequence[int]) -> int:
    return same_beginning([one.tokens, tokens])


def _who(choice: Choice) -> Who:
    return tuple(sorted(factors_of(choice).items()))
