"""Answers under a schema: which tokens may come next, so that every answer is JSON that the schema allows, and ends.

The texts that a schema of one level allows form a regular language. `Language` holds them as a finite automaton over
bytes, and `Guide` follows it token by token: it allows the tokens whose bytes lead on to an end that can still be
reached. Willard & Louf 2023 (arXiv 2307.09702) decode this way. The tokens that a state allows are computed when an
answer comes by, and then kept.

    language = Language.of(task)                        # Language.of(task, text) where fields are copied from a text
    guide = Guide(language, vocabulary_of(tokenizer))
    ids = guide.allowed(left=100)                       # the tokens that may come next, if 100 are left
    guide.take(token)
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import numpy as np

from ..data.fields import DECIMALS, DIGITS, Field, FieldTask, as_json, borders, characters_of, is_copy, numbers_in
from ..models.tokenizer import Tokenizer

_PLAIN = frozenset(range(32, 128)) - set(b'"\\')  # ASCII that stands for itself in a JSON string
_AFTER = frozenset(range(0x80, 0xC0))  # the second and later bytes of a character in UTF-8
_WIDE = (  # the first bytes of a character of two bytes and more, and those that may follow
    (range(0xC2, 0xE0), [_AFTER]),
    (range(0xE0, 0xE1), [frozenset(range(0xA0, 0xC0)), _AFTER]),
    (range(0xE1, 0xED), [_AFTER, _AFTER]),
    (range(0xED, 0xEE), [frozenset(range(0x80, 0xA0)), _AFTER]),
    (range(0xEE, 0xF0), [_AFTER, _AFTER]),
    (range(0xF0, 0xF1), [frozenset(range(0x90, 0xC0)), _AFTER, _AFTER]),
    (range(0xF1, 0xF4), [_AFTER, _AFTER, _AFTER]),
    (range(0xF4, 0xF5), [frozenset(range(0x80, 0x90)), _AFTER, _AFTER]),
)

_ONE = [frozenset([byte]) for byte in range(256)]  # shared by all edges
KEPT = 1 << 22  # ids of allowed tokens that a language keeps, at most: 32 MiB

State = frozenset[int]  # the nodes at which one may be
Way = Callable[[int], int]  # adds a part of the language after a node, and returns the node at its end


class Language:
    """Texts as paths of an automaton from node 0 to the node `end` (Thompson's construction).

    edges: for each node the sets of bytes that lead on, each with the node behind. free: the nodes that it leads to
    without a byte.
    """

    def __init__(self) -> None:
        self.edges: list[list[tuple[frozenset[int], int]]] = [[]]
        self.free: list[list[int]] = [[]]
        self.end = 0
        self.steps: dict[State, dict[int, State]] = {}
        self.tokens: dict[State, tuple[np.ndarray, np.ndarray]] = {}  # filled by `Guide`

    @classmethod
    def of(cls, task: FieldTask, text: str | None = None) -> Language:
        """The answers that a task's schema allows. text: where the values of copied fields are taken from."""
        language = cls()
        for i, field in enumerate(task.fields):
            name = f"{'{' if i == 0 else ','}{as_json(field.name)}:"
            language.end = language.literal(name, language.end)
            language.end = language.value(field, text if field.name in task.copied else None, language.end)
        language.end = language.literal("}", language.end)
        language.finish()
        return language

    # -- parts ---------------------------------------------------------------------------------------------------------

    def node(self) -> int:
        """A new node."""
        self.edges.append([])
        self.free.append([])
        return len(self.edges) - 1

    def one_of(self, allowed: Iterable[int], start: int) -> int:
        """One of these bytes."""
        end = self.node()
        self.edges[start].append((frozenset(allowed), end))
        return end

    def literal(self, text: str, start: int) -> int:
        """Exactly this text."""
        for byte in text.encode():
            start = self.one_of(_ONE[byte], start)
        return start

    def either(self, ways: Iterable[Way], start: int) -> int:
        """One of several ways."""
        end = self.node()
        for way in ways:
            self.free[way(start)].append(end)
        return end

    def many(self, way: Way, start: int) -> int:
        """Any number of times, or never."""
        place = self.node()
        self.free[start].append(place)
        self.free[way(place)].append(place)
        return place

    def value(self, field: Field, text: str | None, start: int) -> int:
        """A value of a field. text: where its strings and numbers are copied from, as far as there are any."""
        ways: list[Way] = [partial(self.literal, choice) for choice in field.choices]
        if not field.choices:
            ways += [way for kind in field.kinds for way in self._of_kind(kind, field, text)]
        return self.either(ways, start) if ways else self.value(field, None, start)

    def _of_kind(self, kind: str, field: Field, text: str | None) -> list[Way]:
        if kind == "array":
            assert field.items is not None
            return [partial(self._list, field.items, text)]
        if kind == "string" and (text is None or not field.pattern):
            return [partial(self._string, field.pattern, text)]
        if kind in ("number", "integer") and text is None:
            return [partial(self._number, kind == "number")]
        if kind in ("null", "boolean"):
            values: list[Any] = [None] if kind == "null" else [True, False]
        elif kind == "string":
            found = re.findall(f"(?=({field.pattern[1:-1]}))", text or "", re.ASCII)  # also those that overlap
            values = [one for one in dict.fromkeys(found) if is_copy(one, text or "")]
        else:
            values = [number for number in numbers_in(text or "") if kind == "number" or isinstance(number, int)]
        return [partial(self.literal, as_json(value)) for value in dict.fromkeys(values)]

    def _number(self, decimals: bool, start: int) -> int:
        """A number as JSON writes it, without an exponent."""
        signed = self.one_of(b"-", start)
        self.free[start].append(signed)
        whole = self.one_of(b"0", signed)
        last = self._digits(DIGITS - 1, self.one_of(b"123456789", signed))
        self.free[last].append(whole)
        if decimals:
            last = self._digits(DECIMALS - 1, self.one_of(b"0123456789", self.one_of(b".", whole)))
            self.free[whole].append(last)
            return last
        return whole

    def _digits(self, most: int, start: int) -> int:
        end = self.node()
        for _ in range(most):
            self.free[start].append(end)
            start = self.one_of(b"0123456789", start)
        self.free[start].append(end)
        return end

    def _list(self, items: Field, text: str | None, start: int) -> int:
        end = self.node()
        first = self.value(items, text, begun := self.one_of(b"[", start))
        more = self.many(lambda place: self.value(items, text, self.one_of(b",", place)), first)
        for place in (begun, more):
            self.edges[place].append((frozenset(b"]"), end))
        return end

    def _string(self, pattern: str, text: str | None, start: int) -> int:
        start = self.one_of(b'"', start)
        if pattern:
            for allowed in characters_of(pattern):
                start = self._one_character(allowed, start)
        elif text is not None and text.strip():
            start = self._copy(text.rstrip(), start)  # no word follows the last
        else:
            start = self.many(self._character, start)
        return self.one_of(b'"', start)

    def _one_character(self, allowed: frozenset[str], start: int) -> int:
        """One of these characters, of which several are a class: ASCII from the space to `~`."""
        if len(allowed) == 1:
            return self.literal(as_json(*allowed)[1:-1], start)
        plain, escaped = _bytes_of(allowed)
        end = self.one_of(plain, start)
        if escaped:
            self.edges[self.one_of(b"\\", start)].append((escaped, end))
        return end

    def _character(self, start: int) -> int:
        """One character of a JSON string: itself, or a backslash and what stands for it."""
        end = self.node()
        self.edges[start].append((_PLAIN, end))
        self.edges[self.one_of(b"\\", start)].append((frozenset(b'"\\/bfnrt'), end))
        for first, others in _WIDE:
            place = self.one_of(first, start)
            for allowed in others[:-1]:
                place = self.one_of(allowed, place)
            self.edges[place].append((others[-1], end))
        return end

    def _copy(self, text: str, start: int) -> int:
        """Words of a text, from the border of a word to another."""
        end, edge, before = self.node(), borders(text), None
        for i, character in enumerate(text):
            written = as_json(character)[1:-1]
            after = self.node()
            begins = edge[i] and not character.isspace()
            for place in [*([start] if begins else []), *([] if before is None else [before])]:
                self.free[self.literal(written, place)].append(after)
            if edge[i + 1] and not character.isspace():
                self.free[after].append(end)
            before = after
        return end

    # -- states --------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Compute how far each node is from the end, in bytes: once, when all parts are there."""
        self.distance = [math.inf] * len(self.edges)
        back: list[list[tuple[int, int]]] = [[] for _ in self.edges]
        for node, (edges, free) in enumerate(zip(self.edges, self.free, strict=True)):
            for allowed, after in edges:
                if allowed:  # of a class such as ["\\], no character stands for itself
                    back[after].append((1, node))
            for after in free:
                back[after].append((0, node))
        self.distance[self.end], found = 0, deque([self.end])  # the nearest first, so that few come twice
        while found:
            node = found.popleft()
            for step, earlier in back[node]:
                if self.distance[node] + step < self.distance[earlier]:
                    self.distance[earlier] = self.distance[node] + step
                    (found.append if step else found.appendleft)(earlier)

    def state(self, nodes: Iterable[int]) -> State:
        """These nodes, and those that they lead to without a byte."""
        reached, found = set(), list(nodes)
        while found:
            if (node := found.pop()) not in reached:
                reached.add(node)
                found += self.free[node]
        return frozenset(reached)

    def after(self, state: State) -> dict[int, State]:
        """The states that follow a state, by byte."""
        if state not in self.steps:
            nodes: dict[int, set[int]] = {}
            for allowed, node in (edge for here in state for edge in self.edges[here]):
                for byte in allowed:
                    nodes.setdefault(byte, set()).add(node)
            states = {reached: self.state(reached) for reached in set(map(frozenset, nodes.values()))}
            self.steps[state] = {byte: states[frozenset(reached)] for byte, reached in nodes.items()}
        return self.steps[state]

    def to_end(self, state: State) -> float:
        """The bytes of the shortest way from a state to the end: of as many tokens, at most."""
        return min(self.distance[node] for node in state)


@lru_cache(maxsize=256)
def _bytes_of(allowed: frozenset[str]) -> tuple[frozenset[int], frozenset[int]]:
    """The bytes of a class that stand for themselves in a JSON string, and those after a backslash: shared by edges."""
    found = frozenset(map(ord, allowed))
    return found & _PLAIN, found - _PLAIN


def check_room(least: int, tokens: int) -> None:
    """Raise ValueError if the shortest answer, of `least` bytes, may need more than these tokens."""
    if least > tokens:
        raise ValueError(
            f"an answer under this schema may need {least:,} tokens, one for each byte, and has {tokens:,}: allow more"
        )


class Vocabulary:
    """The bytes of a model's tokens, sorted so that those with the same beginning are next to each other.

    plain: the ids of tokens that are all plain ASCII. words, ids: all tokens; others, other_ids: those not plain.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.bytes_of = tokenizer.token_bytes()
        self.eos = tokenizer.eos_id
        pairs = sorted((word, i) for i, word in self.bytes_of.items())
        self.words, self.ids = [word for word, _ in pairs], [i for _, i in pairs]
        plain = [_PLAIN.issuperset(word) for word in self.words]
        self.plain = np.array([i for i, is_plain in zip(self.ids, plain, strict=True) if is_plain], np.int32)
        self.others = [word for word, is_plain in zip(self.words, plain, strict=True) if not is_plain]
        self.other_ids = [i for i, is_plain in zip(self.ids, plain, strict=True) if not is_plain]


@lru_cache(maxsize=2)
def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of a tokenizer, made once."""
    return Vocabulary(tokenizer)


class Guide:
    """One answer's way through a language.

    hurried: whether a token was left out because too few tokens were left to end the answer after it.
    """

    def __init__(self, language: Language, vocabulary: Vocabulary):
        self.language, self.vocabulary = language, vocabulary
        self.place, self.hurried = language.state([0]), False

    @property
    def least(self) -> int:
        """The bytes that are left of the shortest answer: as many tokens are enough for it."""
        return int(self.language.to_end(self.place))

    def take(self, token: int) -> None:
        """Go on by a token that is allowed."""
        if token != self.vocabulary.eos:
            for byte in self.vocabulary.bytes_of[token]:
                self.place = self.language.after(self.place)[byte]

    def allowed(self, left: int) -> np.ndarray:
        """The ids of the tokens that may come next, if `left` tokens may come, and the end token after them."""
        known = self.language.tokens
        if self.place not in known:
            if sum(len(ids) for ids, _ in known.values()) > KEPT:
                known.clear()
            known[self.place] = self._tokens()
        ids, to_end = known[self.place]
        in_time = to_end < left
        self.hurried |= not in_time.all()
        return ids[in_time] if self.hurried else ids

    def _tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that lead on from this state, and for each the distance from there to the end."""
        language, vocabulary = self.language, self.vocabulary
        if language.end in self.place:
            return np.array([vocabulary.eos], np.int32), np.zeros(1, np.float32)
        ids: list[int] = []
        to_end: list[float] = []
        words, numbers, inside = vocabulary.words, vocabulary.ids, language.after(self.place).get(ord("a"), self.place)
        if loops := all(language.after(state).get(b) == inside for state in (self.place, inside) for b in _PLAIN):
            words, numbers = vocabulary.others, vocabulary.other_ids  # in a free string, which all plain tokens prolong
        found = [(self.place, b"", 0, len(words))]
        while found:  # words[low:high] begin with `begun`, which leads to `state`
            state, begun, low, high = found.pop()
            moves = language.after(state)
            while low < high and len(words[low]) == len(begun):
                ids.append(numbers[low])
                to_end.append(language.to_end(state))
                low += 1
            few = moves if len(moves) < high - low else {word[len(begun)] for word in words[low:high]}
            for byte in few:
                if byte in moves:
                    longer = begun + bytes([byte])
                    start = bisect_left(words, longer, low, high)
                    stop = bisect_left(words, begun + bytes([byte + 1]), start, high) if byte < 255 else high
                    if start < stop:
                        found.append((moves[byte], longer, start, stop))
        if not loops:
            return np.array(ids, np.int32), np.array(to_end, np.float32)
        same = np.full(len(vocabulary.plain), language.to_end(inside))
        return np.append(vocabulary.plain, np.array(ids, np.int32)), np.append(same, to_end).astype(np.float32)
