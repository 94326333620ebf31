"""The KV cache for generation: one row for each answer in progress; rows can join and leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..engine.backend import Array, array_module

STEP = 64  # the capacity grows in multiples of this many tokens
BYTES_AT_ONCE = 3 * 2**26  # of the cache of a batch whose size we choose, at most


def rows_at_once(row: KVCache) -> int:
    """How many rows such as this one, of a batch whose size we choose, are computed at a time."""
    return max(1, BYTES_AT_ONCE // row.nbytes)


class KVCache:
    """Keys and values of all tokens so far, so that generation computes each token once.

    `LanguageModel.new_cache` makes one.

    blocks: the number of transformer blocks; each has two arrays, keys and values.
    shape: of each array, (rows, capacity, K, D).
    like: an array whose device and dtype they get.
    first: (B), each row's first token that is not padding. Rows of different lengths are padded on the left, and all
        end at `length`, where the next tokens go. None, or all 0, without padding.
    beginning: a cache of one row with the tokens before all of these rows, which is held once for all. `length`,
        `capacity` and `first` do not count its tokens.
    """

    def __init__(
        self,
        blocks: int,
        shape: tuple[int, int, int, int],
        like: Array,
        first: Array | None = None,
        beginning: KVCache | None = None,
    ):
        xp = array_module(like)
        self.keys = [xp.zeros(shape, like.dtype) for _ in range(blocks)]
        self.values = [xp.zeros(shape, like.dtype) for _ in range(blocks)]
        self.first = xp.asarray(first) if first is not None and first.any() else None
        self.beginning = beginning
        self.batch, self.length = shape[0], 0

    @property
    def capacity(self) -> int:
        """How many tokens a row has room for."""
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """The bytes of all keys and values, those of `beginning` apart."""
        return sum(array.nbytes for array in self._arrays())

    @property
    def before(self) -> int:
        """How many tokens all rows begin with."""
        return self.beginning.length if self.beginning else 0

    @property
    def longest(self) -> int:
        """How many tokens the longest row has, with those that all rows begin with."""
        padding = 0 if self.first is None or not self.batch else int(self.first.min())
        return self.before + self.length - padding

    def shared(self, layer: int) -> tuple[Array, Array] | None:
        """Keys and values of `layer` that all rows begin with, (1, P, K, D)."""
        if (one := self.beginning) is None:
            return None
        return one.keys[layer][:, : one.length], one.values[layer][:, : one.length]

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Append k, v (B, T, K, D) of new tokens to those of `layer`; return all of them, (B, S, K, D)."""
        start, end = self.length, self.length + k.shape[1]
        if end > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens, got {end}")
        B = self.batch
        self.keys[layer][:B, start:end] = k
        self.values[layer][:B, start:end] = v
        return self.keys[layer][:B, :end], self.values[layer][:B, :end]

    def keep(self, alive: Sequence[int] | np.ndarray) -> None:
        """Keep the rows listed in `alive`, in that order: the answers of the others are finished.

        If no row moves to a higher index, only rows that move are copied: filling a gap with the last row copies one
        row. The memory is kept for rows that join.
        """
        xp, alive = array_module(self.keys[0]), [int(row) for row in alive]
        moves = [(to, row) for to, row in enumerate(alive) if to != row]
        in_place = all(row > to for to, row in moves)
        for array in self._arrays():
            if in_place:
                for to, row in moves:
                    array[to, : self.length] = array[row, : self.length]
            else:
                array[: len(alive), : self.length] = array[alive, : self.length]
        self.first = None if self.first is None else self.first[xp.asarray(alive, dtype=int)]
        self.batch = len(alive)

    def row(self, i: int) -> KVCache:
        """A copy of one row, without its padding."""
        start = int(self._starts()[i])
        one = KVCache(len(self.keys), (1, self.length - start, *self.keys[0].shape[2:]), self.keys[0])
        for new, array in zip(one._arrays(), self._arrays(), strict=True):
            new[0] = array[i, start : self.length]
        one.length = one.capacity
        return one

    def begin(self, length: int, rows: Sequence[KVCache | None]) -> None:
        """Let each row begin with the tokens that its cache in `rows` has, up to this length: fewer of them, or
        none, where the row has padding.
        """
        for i, (row, start) in enumerate(zip(rows, self._starts(), strict=True)):
            if row is not None and (count := length - int(start)) > 0:
                for array, known in zip(self._arrays(), row._arrays(), strict=True):
                    array[i, length - count : length] = known[0, :count]
        self.length = length

    def join(self, other: KVCache, room: int, most: int | None = None) -> None:
        """Append the rows of another cache, with room for `room` tokens in every row.

        All rows then end where the longest one does. Both caches have the same beginning. most: the largest number of
        rows there will ever be, if known.

        Raises ValueError if the longest row has more tokens than `room`.
        """
        self.trim()
        rows, length = self.batch + other.batch, max(self.length, other.length)
        if room < length:
            raise ValueError(f"a cache with room for {room} tokens cannot hold a row of {length}")
        self.reserve(rows, room, most)
        mine, theirs = length - self.length, length - other.length  # the padding that each cache's rows need
        for array, new in zip(self._arrays(), other._arrays(), strict=True):
            if mine:
                array[: self.batch, mine:length] = array[: self.batch, : self.length].copy()
            array[self.batch : rows, :theirs] = 0  # an earlier row may have left NaN here
            array[self.batch : rows, theirs:length] = new[: other.batch, : other.length]
        if mine or theirs or self.first is not None or other.first is not None:
            xp = array_module(self.keys[0])
            self.first = xp.concatenate((self._starts() + mine, other._starts() + theirs))
        self.batch, self.length = rows, length

    def trim(self) -> None:
        """Drop the positions at the beginning that are padding in every row."""
        if self.first is None or not self.batch or not (spare := int(self.first.min())):
            return
        for array in self._arrays():
            array[: self.batch, : self.length - spare] = array[: self.batch, spare : self.length].copy()
        self.length -= spare
        self.first = self.first - spare if int(self.first.max()) > spare else None

    def reserve(self, rows: int, room: int, most: int | None = None) -> None:
        """Make the arrays large enough for this many rows and tokens. The number of rows doubles, up to `most`, so that
        joining rarely copies all rows.
        """
        have, capacity = self.keys[0].shape[:2]
        rows = have if rows <= have else max(rows, 2 * have if most is None else min(2 * have, most))
        capacity = capacity if room <= capacity else -(-room // STEP) * STEP
        if (rows, capacity) == (have, self.capacity):
            return
        xp = array_module(self.keys[0])
        for arrays in (self.keys, self.values):  # one by one, so that never all arrays exist twice
            for layer, old in enumerate(arrays):
                arrays[layer] = xp.zeros((rows, capacity, *old.shape[2:]), old.dtype)
                arrays[layer][: self.batch, : self.length] = old[: self.batch, : self.length]

    def _starts(self) -> Array:
        return array_module(self.keys[0]).zeros(self.batch, int) if self.first is None else self.first

    def _arrays(self) -> Iterator[Array]:
        yield from self.keys
        yield from self.values
