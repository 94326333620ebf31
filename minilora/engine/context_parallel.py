"""Context parallelism: one long sequence on several cores, each of which computes some of its tokens.

All operations but attention treat every token by itself, so each thread runs the whole model on its own tokens. Before
attention the threads exchange keys and values, and in the backward pass the gradients of these. Llama 3 was trained on
long texts in this way, on many GPUs (arXiv 2407.21783, section 3.3.2).

Shapes: T tokens of the sequence, t of them in one thread, K key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Barrier

from .attention import Packing
from .backend import Array, array_module
from .tensor import op


class Exchange:
    """Where the threads of one sequence meet. All must call `meet` equally often, in the same order."""

    def __init__(self, threads: int):
        self.slots: list[Array] = [None] * threads
        self.barrier = Barrier(threads, action=self._combine)

    def meet(self, thread: int, given: Array, combine: Callable[[list[Array]], Array]) -> Array:
        """Wait for the other threads, and return combine(what each of them gave), one array for all.

        Raises threading.BrokenBarrierError if another thread has failed.
        """
        self.slots[thread], self.combine = given, combine
        self.barrier.wait()
        combined, self.slots[thread] = self.slots[thread], None
        return combined

    def _combine(self) -> None:  # in one of the threads, when all have come
        self.slots = [self.combine(self.slots)] * len(self.slots)


@dataclass(frozen=True)
class Shard(Packing):
    """The tokens of one sequence that thread number `number` computes: the parts `number` and 2n - 1 - number of 2n.

    So all n threads have as much to do, although a late token attends to more tokens than an early one.
    """

    number: int = 0
    exchange: Exchange = field(default_factory=lambda: Exchange(1))

    @property
    def count(self) -> int:
        """The number of threads."""
        return self.exchange.barrier.parties

    def parts(self, number: int) -> tuple[slice, slice]:
        """Where the tokens of thread `number` are in the sequence."""
        edges = [self.ends[-1] * i // (2 * self.count) for i in range(2 * self.count + 1)]
        early, late = number, 2 * self.count - 1 - number
        return slice(edges[early], edges[early + 1]), slice(edges[late], edges[late + 1])

    def ranges(self) -> list[range]:
        """The positions of this thread's tokens, in both parts."""
        return [range(part.start, part.stop) for part in self.parts(self.number)]

    def layout(self) -> list[tuple[int, range, int]]:
        """Of both parts: start among this thread's tokens, positions, and origin 0: a key's index is its position."""
        first, second = self.ranges()
        return [(0, first, 0), (len(first), second, 0)]

    def own(self, x: Array) -> Array:
        """This thread's tokens: (1, T, ...) -> (1, t, ...)."""
        return array_module(x).concatenate([x[:, part] for part in self.parts(self.number)], axis=1)

    def in_order(self, given: list[Array]) -> Array:
        """All tokens, from those of each thread: (1, t, ...) each -> (1, T, ...). Undoes `own`."""
        x = given[0]
        whole = array_module(x).empty((1, self.ends[-1], *x.shape[2:]), x.dtype)
        for number, own in enumerate(given):
            first, second = self.parts(number)
            middle = first.stop - first.start
            whole[:, first], whole[:, second] = own[:, :middle], own[:, middle:]
        return whole


def shards(tokens: int, count: int) -> list[Shard]:
    """One sequence of `tokens` tokens divided among `count` threads."""
    exchange = Exchange(count)
    return [Shard(0, (tokens,), number, exchange) for number in range(count)]


@op
def gathered(x, shard: Shard):
    """The keys or values of all tokens: x (1, t, K, D) of this thread's -> (1, T, K, D), one array for all threads.

    Saves nothing. In the backward pass each thread gets the sum of all threads' gradients of its tokens.
    """

    def dx(g):
        return shard.own(shard.exchange.meet(shard.number, g, sum))

    return shard.exchange.meet(shard.number, x, shard.in_order), dx
