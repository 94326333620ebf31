"""Prefix caching: a conversation continues without computing again what was said before.

The keys and values of the last answers and of their prompts are kept, and a prompt that begins with the same tokens,
such as the next question or the same system prompt, is computed from there. SGLang (Zheng et al. 2023,
arXiv 2312.07104) and vLLM keep them in trees and blocks; here each conversation is one row.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..lora.adapters import Choice, factors_of
from ..nn.cache import KVCache
from ..nn.parts import same_beginning

Who = tuple[tuple[str, float], ...]  # adapters with their factors, sorted


class PrefixCache:
    """The rows of the last conversations, in `most_bytes` at most, by who computed them and their tokens.

    They are valid only for the weights that computed them: after a change of the model, call `forget`.
    """

    def __init__(self, most_bytes: int = 2**28):
        self.most_bytes = most_bytes
        self.kept: dict[tuple[Who, tuple[int, ...]], KVCache] = {}  # what was used last is at the end

    def keep(self, choice: Choice, tokens: Sequence[int], row: KVCache) -> None:
        """Keep a row, and drop those that it begins with; what was not used for longest makes room."""
        if row.nbytes > self.most_bytes:
            return
        who, new = _who(choice), tuple(tokens[: row.length])
        for key in [key for key in self.kept if key[0] == who and same_beginning([key[1], new]) == len(key[1])]:
            del self.kept[key]
        self.kept[who, new] = row
        while sum(one.nbytes for one in self.kept.values()) > self.most_bytes:
            del self.kept[next(iter(self.kept))]

    def longest(self, choice: Choice, prompt: Sequence[int]) -> tuple[int, KVCache | None]:
        """How many tokens of a prompt are known, and the row that begins with them. The prompt's last token is never
        known: computing it gives the answer's first.
        """
        who = _who(choice)
        mine = [(min(same_beginning([key[1], prompt]), len(prompt) - 1), key) for key in self.kept if key[0] == who]
        count, best = max(mine, key=lambda pair: pair[0], default=(0, None))
        if best is None or not count:
            return 0, None
        self.kept[best] = row = self.kept.pop(best)
        return count, row

    def forget(self, name: str | None = None) -> None:
        """Forget what an adapter computed, alone or in a combination; without a name everything."""
        self.kept = {key: row for key, row in self.kept.items() if name is not None and name not in dict(key[0])}


def _who(choice: Choice) -> Who:
    return tuple(sorted(factors_of(choice).items()))
