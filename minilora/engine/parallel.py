"""One loss over several cores: the micro-batches of a batch go forward and back in threads, some at a time.

NumPy frees Python's lock while it computes, so threads do run at the same time. Spreading a batch instead of each
operation keeps every operation as plain as it is written, and the elementwise work runs on all cores, too; the matrix
library, which would use all cores for every product, is told to use one in each thread.

The micro-batches' graphs meet only in the parameters. There, gradients are added in an order that is fixed beforehand
and never in the order of arrival, so that the same batch gives the same bits.
"""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar, copy_context
from functools import cache
from threading import Lock
from typing import Any

import numpy as np

from .backend import Array
from .tensor import Node, Tensor, walk_back

current_micro_batch: ContextVar[int] = ContextVar("current_micro_batch", default=0)  # for random numbers of its own
has_one_core: ContextVar[bool] = ContextVar("has_one_core", default=False)  # is this one of several threads at work?


# How a matrix library is told, before it is loaded, how many threads it may use.
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def processors() -> int:
    """How many processors this process may use, for whatever it does."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores() -> int:
    """How many threads a matrix product may use just now: OPENBLAS_NUM_THREADS and its like are respected."""
    if _left:
        return _left[0]
    libraries = _controller().select(user_api="blas").info()
    return max((library["num_threads"] for library in libraries), default=0) or processors()


def keep_threads(most: int) -> None:
    """From now on let matrix products use so many threads, or what OPENBLAS_NUM_THREADS and its like allow."""
    told = any(name in os.environ for name in THREADS)
    _controller().limit(limits=min(most, cores()) if told else most, user_api="blas")


def leave_cores(to_another: bool) -> None:
    """Leave the cores to products of another library (bfloat16.py), or take them back; here products use one meanwhile.

    The threads of both libraries stay awake for a while when they have nothing to do, and keep the others waiting.
    """
    if to_another and not _left:
        _left.append(cores())
        _controller().limit(limits=1, user_api="blas")
    elif not to_another and _left:
        _controller().limit(limits=_left.pop(), user_api="blas")


_left: list[int] = []  # how many cores were left to another library


@cache
def _controller() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def values(functions: Sequence[Callable[[], Tensor]], threads: int) -> list[Array]:
    """What each function() gives, computed in `threads` threads. For a loss without gradients."""
    return _in_threads(lambda i, thread: functions[i]().data, len(functions), threads)


def values_and_gradients(
    functions: Sequence[Callable[[], Tensor]], weights: Sequence[float], threads: int
) -> list[Array]:
    """What each function() gives, a scalar, while the gradients of Σ weight · function() are added to every `.grad`.

    Every function goes forward and back at once, in one of `threads` threads: what it keeps for backward exists only as
    long as it runs, and never for all of them. The result is the same in every run, to the last bit. Raises
    RuntimeError when a function depends on nothing trainable.
    """
    meeting = Meeting(threads)

    def forward_and_back(i: int, thread: int) -> Array:
        y = functions[i]()
        for leaf, grad in walk_back(y, np.full_like(y.data, weights[i])):
            meeting.receive(thread, leaf, grad)
        return y.data

    found = _in_threads(forward_and_back, len(functions), threads)
    meeting.close()
    return found


def _in_threads(task: Callable[[int, int], Array], count: int, threads: int) -> list[Array]:
    """What task(i, thread) gives for every i < count. Task i runs in thread i % threads, each thread's in order."""
    from concurrent.futures import ThreadPoolExecutor

    found: list[Array] = [None] * count

    def work(thread: int) -> None:
        has_one_core.set(threads > 1)
        for i in range(thread, count, threads):
            current_micro_batch.set(i)
            found[i] = task(i, thread)

    contexts = [copy_context() for _ in range(threads)]  # no_grad() and the like hold in every thread
    with _controller().limit(limits=1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(contexts[t].run, work, t) for t in range(threads)]:
            done.result()
    return found


class Meeting:
    """Where the threads' gradients of the same parameter wait for each other, to be added to it in order.

    The first gradients that each thread has for a parameter are added up in the order of the threads, then the second
    ones, and so on.
    """

    def __init__(self, threads: int):
        self.lock = Lock()
        self.waiting: dict[Node, list[deque[Array]]] = defaultdict(lambda: [deque() for _ in range(threads)])

    def receive(self, thread: int, leaf: Node, grad: Array) -> None:
        """Take a gradient that one thread has found."""
        with self.lock:
            queues = self.waiting[leaf]
            queues[thread].append(grad)
            while all(queues):
                self._add(leaf, queues)

    def close(self) -> None:
        """When all threads are done: add what found no counterpart in the others."""
        for leaf, queues in self.waiting.items():
            while any(queues):
                self._add(leaf, queues)

    def _add(self, leaf: Node, queues: list[deque[Array]]) -> None:  # the oldest gradient of each thread that has one
        for queue in queues:
            if queue:
                leaf.receive(queue.popleft(), fresh=True)
