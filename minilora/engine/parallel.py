"""One loss over several cores: the parts of a batch go forward and backward in threads, some at a time.

NumPy frees Python's lock while it computes, so threads do run at the same time. Spreading a batch instead of each
operation keeps every operation as plain as it is written, and the elementwise work runs on all cores, too; the matrix
library, which would use all cores for every product, is told to use one in each thread.

The parts' graphs meet only in the parameters. There, gradients are added in an order that is fixed beforehand and never
in the order of arrival, so that the same batch gives the same bits.
"""

from __future__ import annotations

import operator
import os
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar, copy_context
from functools import cache, partial
from threading import Lock
from typing import Any

import numpy as np

from .backend import Array
from .tensor import Node, Tensor, Vjp, leaf_delivery

Queue = deque[tuple[Array, Array]]
current_part: ContextVar[int] = ContextVar("current_part", default=0)  # for what differs by part: random numbers


def cores() -> int:
    """How many threads a matrix product may use just now: OPENBLAS_NUM_THREADS and its like are respected."""
    libraries = _controller().select(user_api="blas").info()
    return max((library["num_threads"] for library in libraries), default=0) or os.cpu_count() or 1


@cache
def _controller() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def weighted_sum(functions: Sequence[Callable[[], Tensor]], weights: Sequence[float], threads: int) -> Tensor:
    """Σ weight · function(), the functions spread over `threads` threads. Each returns a scalar tensor.

    Every function goes forward and, where a graph is recorded, back at once: what it keeps for backward exists only as
    long as it runs, and never for all of them. The gradients found wait for this tensor's own backward. The result is
    the same in every run, to the last bit.
    """
    from concurrent.futures import ThreadPoolExecutor

    meeting = _Meeting(threads)
    values: list[Array] = [None] * len(functions)

    def work(thread: int) -> None:
        leaf_delivery.set(meeting.delivery(thread))
        for i in range(thread, len(functions), threads):
            current_part.set(i)
            part = functions[i]()
            values[i] = part.data * weights[i]
            if part.node is not None:
                part.backward(np.full_like(part.data, weights[i]))

    contexts = [copy_context() for _ in range(threads)]  # no_grad() and the like hold in every thread
    with _controller().limit(limits=1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(contexts[t].run, work, t) for t in range(threads)]:
            done.result()
    gradients = meeting.sums()
    edges: list[tuple[Node, Vjp]] = [(leaf, partial(operator.mul, gradients.pop(leaf))) for leaf in list(gradients)]
    return Tensor(sum(values), node=Node(edges) if edges else None)


class _Meeting:
    """Where the threads' gradients of the same parameter wait for each other, to be added in order."""

    def __init__(self, threads: int):
        self.lock = Lock()
        self.totals: dict[Node, Node] = defaultdict(lambda: Node([]))  # a stand-in for each leaf, which adds up
        self.waiting: dict[Node, list[Queue]] = defaultdict(lambda: [deque() for _ in range(threads)])

    def delivery(self, thread: int) -> Callable[[Node, Array, Array], None]:
        """The function through which one thread hands over a leaf's gradient."""

        def deliver(leaf: Node, grad: Array, shared: Array) -> None:
            with self.lock:
                queues = self.waiting[leaf]
                queues[thread].append((grad, shared))
                while all(queues):
                    self.add(leaf, queues)

        return deliver

    def add(self, leaf: Node, queues: list[Queue]) -> None:
        """Add the oldest gradient of each thread that has one."""
        for queue in queues:
            if queue:
                self.totals[leaf].receive(*queue.popleft())

    def sums(self) -> dict[Node, Array]:
        """Every leaf's gradient, when all threads are done; what found no counterpart in the others comes last."""
        for leaf, queues in self.waiting.items():
            while any(queues):
                self.add(leaf, queues)
        return {leaf: total.grad for leaf, total in self.totals.items()}
