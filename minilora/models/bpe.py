"""Byte-level BPE in plain Python: how a text becomes the tokens of the tiny base, without the library `tokenizers`.

Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) begins with single symbols, and merges the pair that was
learned first for as long as there is a pair that was learned. In GPT-2's form (Radford et al. 2019) the symbols are
bytes, so that every text can be written, and no merge crosses the border of a word: `words` divides the text first.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# GPT-2's rule, with every digit as a word: a contraction, letters or signs with the space before them, or white space,
# whose last character belongs to the next word. It is for a text whose characters beyond ASCII `KINDS` has replaced.
WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+(?![^\s0-9])|\s+", re.ASCII)


class _Kinds(dict[int, str]):
    """For `str.translate`: an ASCII character of the same kind (letter, number, white space, other) for each one."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kind = {"L": "A", "N": "0"}.get(unicodedata.category(character)[0], "\t" if character.isspace() else "!")
        self[code] = character if code < 128 else kind
        return self[code]


KINDS = _Kinds()


def words(text: str) -> list[str]:
    """The parts of a text between which nothing is merged.

    >>> words("It's 42 naïve  words")
    ['It', "'s", ' ', '4', '2', ' naïve', ' ', ' words']
    """
    return [text[slice(*found.span())] for found in WORD.finditer(text.translate(KINDS))]


def merged(symbols: Sequence[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Merge pairs of neighbours, the lowest rank first, everywhere in a word, until no pair has a rank.

    >>> merged("hello", {("l", "l"): 0, ("h", "e"): 1, ("he", "ll"): 2})
    ['hell', 'o']
    """
    symbols = list(symbols)
    while known := [pair for pair in pairwise(symbols) if pair in ranks]:
        first, i = min(known, key=ranks.__getitem__), 0
        while i < len(symbols) - 1:
            if (symbols[i], symbols[i + 1]) == first:
                symbols[i : i + 2] = ["".join(first)]
            i += 1
    return symbols


def byte_symbols() -> dict[int, str]:
    """The character that represents each byte in a byte-level vocabulary."""
    printable = set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256))  # bytes that represent themselves
    others = [b for b in range(256) if b not in printable]  # others are represented by characters from 256 on
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


SYMBOLS = byte_symbols()
BYTES = {symbol: byte for byte, symbol in SYMBOLS.items()}


def bytes_of(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary represents."""
    return bytes(BYTES[c] for c in token) if all(c in BYTES for c in token) else token.encode()


# -- the file ----------------------------------------------------------------------------------------------------------

_BYTE_LEVEL = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
_KIND = {  # what a tokenizer.json must say besides its special tokens, its vocabulary and its merges
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL | {"add_prefix_space": False}],
    },
    "post_processor": None,
    "decoder": _BYTE_LEVEL | {"add_prefix_space": True},
    "model": {"type": "BPE"}
    | dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    | dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
}


class BytePairs:
    """The tokenizer of a tokenizer.json of the tiny base's kind, with the methods of the library that minilora calls.

    Raises ValueError, KeyError or TypeError for any other kind of file.
    """

    def __init__(self, record: Mapping[str, Any]):
        options = {key: value for key, value in record["model"].items() if key not in ("vocab", "merges")}
        added = {entry["id"]: SimpleNamespace(**entry) for entry in record["added_tokens"]}
        plain = not any(a.single_word or a.lstrip or a.rstrip or a.normalized for a in added.values())
        if not plain or {key: record.get(key) for key in _KIND} | {"model": options} != _KIND:
            raise ValueError("this kind needs the library tokenizers: install it, or use the base tiny")
        self.added, self.vocabulary = added, record["model"]["vocab"]
        self.ranks = {(left, right): rank for rank, (left, right) in enumerate(record["model"]["merges"])}
        self.ids: dict[str, int] = self.vocabulary | {token.content: i for i, token in added.items()}
        self.tokens = {i: token for token, i in self.ids.items()}
        names = sorted((re.escape(token.content) for token in added.values()), key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(names) or '(?!)'})")
        self._ids_of_word = lru_cache(10_000)(self._ids_of)

    @classmethod
    def from_file(cls, path: str) -> BytePairs:
        """Read a tokenizer.json."""
        return cls(json.loads(Path(path).read_text(encoding="utf-8")))

    def _ids_of(self, word: str) -> list[int]:
        return [self.vocabulary[s] for s in merged([SYMBOLS[byte] for byte in word.encode()], self.ranks)]

    def encode_batch_fast(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[SimpleNamespace]:
        """The `ids` of each text. Names of special tokens become special tokens."""
        found = []
        for text in texts:
            ids: list[int] = []
            for i, part in enumerate(self._added.split(text)):  # every second part is the name of a special token
                ids += [self.ids[part]] if i % 2 else [i for word in words(part) for i in self._ids_of_word(word)]
            found.append(SimpleNamespace(ids=ids))
        return found

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        hidden = {i for i, token in self.added.items() if token.special and skip_special_tokens}
        kept = (self.tokens[i] for i in ids if i not in hidden and i in self.tokens)
        return b"".join(map(bytes_of, kept)).decode(errors="replace")

    def token_to_id(self, token: str) -> int | None:
        """The id of a token; None if there is no such token."""
        return self.ids.get(token)

    def id_to_token(self, i: int) -> str | None:
        """The token with an id; None if there is no such id."""
        return self.tokens.get(i)

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """The ids of all tokens."""
        return self.ids if with_added_tokens else self.vocabulary

    def get_vocab_size(self) -> int:
        """The number of tokens, special ones included."""
        return len(self.ids)

    def get_added_tokens_decoder(self) -> dict[int, SimpleNamespace]:
        """The special tokens by id: `content`, and whether each is `special`."""
        return self.added

    def no_padding(self) -> None:
        """There is none."""

    no_truncation = no_padding
