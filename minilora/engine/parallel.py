"""One loss on several cores: forward and backward passes of a batch's micro-batches, one in each thread at a time.

NumPy releases the GIL while it computes, so threads do run at the same time. Dividing the batch instead of each
operation keeps the operations simple, and their elementwise work runs on all cores, too. The BLAS library would use
all cores for every matmul; here it is limited to one in each thread.

The micro-batches' graphs share only the parameters. Their gradients are added in a fixed order, never in the order of
arrival, so that the same batch gives the same bits.
"""

from __future__ import annotations

import math
import os
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar, copy_context
from functools import cache
from pathlib import Path
from threading import Event, Lock
from typing import Any

from .backend import Array, array_module
from .tensor import Node, Tensor, backward_pass

current_micro_batch: ContextVar[int] = ContextVar("current_micro_batch", default=0)  # each draws its own dropout
has_one_core: ContextVar[bool] = ContextVar("has_one_core", default=False)  # True in each of several threads

# Environment variables that limit the threads of a BLAS library when it is loaded.
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def processors() -> int:
    """How many processors this process may use: a container's quota, such as 1.5 processors, counts as 2. Only Linux
    knows; elsewhere it is all of the machine's. It is 1 in a browser, where no thread can be started.
    """
    if sys.platform == "emscripten":
        return 1
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min(bound, _quota()))


@cache
def _quota() -> float:
    """The processors' time that a container may use, such as 1.5; infinity without a quota."""
    with suppress(OSError, ValueError):  # no container, or "max"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        return quota / period
    return math.inf


def cores() -> int:
    """How many threads a matmul may use now: OPENBLAS_NUM_THREADS and its like are respected.

    So they are with a library that threadpoolctl does not know, as Accelerate on macOS.
    """
    if _lent:
        return _lent[0]
    libraries = _controller().select(user_api="blas").info()
    if known := max((library["num_threads"] for library in libraries), default=0):
        return known
    given = [os.environ.get(name, "") for name in THREADS]
    return min([processors(), *(int(value) for value in given if value.isdigit() and int(value))])


def keep_threads(most: int) -> None:
    """Let matmuls use `most` threads from now on, unless OPENBLAS_NUM_THREADS or its like say how many."""
    if not any(name in os.environ for name in THREADS):
        _controller().limit(limits=most, user_api="blas")


def leave_cores(to_another: bool) -> None:
    """Leave the cores to the matmuls of another library (bfloat16.py), or take them back. NumPy's use one meanwhile.

    Idle threads of both libraries spin for a while, and would keep those of the other library waiting.
    """
    if to_another and not _lent:
        _lent.append(cores())
        _controller().limit(limits=1, user_api="blas")
    elif not to_another and _lent:
        _controller().limit(limits=_lent.pop(), user_api="blas")


_lent: list[int] = []  # the number of cores lent to another library by leave_cores, if they are


@cache
def _controller() -> Any:
    from threadpoolctl import ThreadpoolController

    controller = ThreadpoolController()
    if _quota() < math.inf and not any(name in os.environ for name in THREADS):  # BLAS libraries know none
        controller.limit(limits=processors(), user_api="blas")
    return controller


def values(functions: Sequence[Callable[[], Tensor]], threads: int) -> list[Array]:
    """The value of each function(), computed in `threads` threads. For a loss without gradients."""
    return _in_threads(lambda i, thread: functions[i]().data, len(functions), threads)


def values_and_gradients(
    functions: Sequence[Callable[[], Tensor]], weights: Sequence[float], threads: int
) -> list[Array]:
    """The value of each function(), a scalar; the gradients of Σ weight · function() are added to every `.grad`.

    Each function runs its forward and backward pass in one of `threads` threads, so that its saved activations exist
    only while it runs, never those of all functions. The result is the same in every run, to the last bit. Raises
    RuntimeError if a function depends on nothing trainable.
    """
    sums = Accumulator(threads)

    def forward_and_backward(i: int, thread: int) -> Array:
        y = functions[i]()
        for leaf, grad in backward_pass(y, array_module(y.data).full_like(y.data, weights[i])):
            sums.receive(thread, leaf, grad)
        return y.data

    try:
        found = _in_threads(forward_and_backward, len(functions), threads)
    except BaseException:
        sums.abandon()
        raise
    sums.close()
    return found


def _in_threads(task: Callable[[int, int], Array], count: int, threads: int) -> list[Array]:
    """task(i, thread) for every i < count. Task i runs in thread i % threads; the tasks of a thread run in order.

    When the caller is interrupted (Ctrl-C), no further task begins.
    """
    from concurrent.futures import ThreadPoolExecutor

    found: list[Array] = [None] * count
    interrupted, alone = Event(), threads > 1 or cores() == 1

    def work(thread: int) -> None:
        has_one_core.set(alone)
        for i in range(thread, count, threads):
            if interrupted.is_set():
                return
            current_micro_batch.set(i)
            found[i] = task(i, thread)

    contexts = [copy_context() for _ in range(threads)]  # so that no_grad() and the like apply in every thread
    if threads == 1:  # a matmul may use all cores
        contexts[0].run(work, 0)
        return found
    with _controller().limit(limits=1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        try:
            for future in [pool.submit(contexts[t].run, work, t) for t in range(threads)]:
                future.result()
        except BaseException:
            interrupted.set()
            raise
    return found


class Accumulator:
    """Accumulates the threads' gradients of each parameter in a fixed order.

    The first gradient that each thread has for a parameter is added in the order of the threads, then the second one,
    and so on. Gradients that come early wait.
    """

    def __init__(self, threads: int):
        self.lock, self.abandoned = Lock(), False
        self.waiting: dict[Node, list[deque[Array]]] = defaultdict(lambda: [deque() for _ in range(threads)])

    def receive(self, thread: int, leaf: Node, grad: Array) -> None:
        """Take a gradient that one thread has found."""
        with self.lock:
            queues = self.waiting[leaf]
            queues[thread].append(grad)
            while all(queues) and not self.abandoned:
                self._add(leaf, queues)

    def abandon(self) -> None:
        """Add no more gradients: after two interrupts a thread may still be at work, when others are trained."""
        with self.lock:
            self.abandoned = True

    def close(self) -> None:
        """After all threads have ended: add the gradients that no other thread has a counterpart for."""
        for leaf, queues in self.waiting.items():
            while any(queues):
                self._add(leaf, queues)

    def _add(self, leaf: Node, queues: list[deque[Array]]) -> None:  # the oldest gradient of each thread that has one
        for queue in queues:
            if queue:
                leaf.receive(queue.popleft(), fresh=True)
