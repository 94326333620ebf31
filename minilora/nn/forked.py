"""Ranks without MPI: `minilora finetune --processes 2` divides the work of a job among processes on this machine.

Threads of one process wait for each other where Python's lock (the GIL) admits one at a time; processes do not. They
are forked when the base and the data are loaded, so that memory holds these once: Linux copies a page when a process
writes to it, and nothing writes to a frozen weight.

Objects go through pipes between the first rank and each other one, sums through memory that all of them share.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ..engine.parallel import keep_threads, processors
from ..progress import hide_progress
from .ranks import RankError, Ranks, Several

AT_ONCE = 1 << 22  # bytes of an array that are summed together
ENDED = "another process of this job ended, which may be for want of memory: try fewer --processes"


class Communicator:
    """What `Several` needs of MPI's: methods of the same names, which all ranks call.

    pipes: of the first rank to each other one; of each other one to the first. slots: shared memory, (ranks, bytes).
    """

    def __init__(self, number: int, pipes: Sequence[Connection], slots: np.ndarray):
        self.number, self.pipes, self.slots = number, pipes, slots

    def Get_rank(self) -> int:
        """The number of this rank."""
        return self.number

    def Get_size(self) -> int:
        """The number of ranks."""
        return len(self.slots)

    def allgather(self, value: Any) -> list[Any]:
        """The values of all ranks, on each of them. The first one collects and distributes them."""
        if self.number:
            self._send(0, value)
            return self._receive(0)
        values = [value, *(self._receive(i) for i in range(len(self.pipes)))]
        for i in range(len(self.pipes)):
            self._send(i, values)
        return values

    def bcast(self, value: Any, root: int) -> Any:
        """The first rank's value, on all ranks."""
        return self.allgather(None if self.number else value)[root]

    def Bcast(self, array: np.ndarray, root: int) -> None:
        """Copy the first rank's array into those of the others."""
        array[...] = self.bcast(array, root)

    def Allreduce(self, in_place: Any, array: np.ndarray) -> None:
        """Sum a flat array over the ranks, in their order, in place: part by part, as large as the memory for it."""
        slots = self.slots.view(array.dtype)  # (ranks, elements of a part)
        for start in range(0, len(array), slots.shape[1]):
            part = array[start : start + slots.shape[1]]
            slots[self.number, : len(part)] = part
            self.allgather(None)  # all have written
            np.sum(slots[:, : len(part)], axis=0, out=part)
            self.allgather(None)  # all have read

    def _send(self, pipe: int, value: Any) -> None:
        try:
            self.pipes[pipe].send(value)
        except OSError as error:
            raise RankError(ENDED) from error

    def _receive(self, pipe: int) -> Any:
        try:
            value = self.pipes[pipe].recv()
        except (EOFError, OSError) as error:
            raise RankError(ENDED) from error
        if isinstance(value, _Failure):
            raise RankError(value.why)
        return value


@dataclass(frozen=True)
class _Failure:
    """What a rank sends, instead of what is expected of it, before it ends."""

    why: str


class Forked(Several):
    """One of several ranks that hold the base and the data once, together."""

    share_memory = True

    def __init__(self, number: int, pipes: Sequence[Connection], slots: np.ndarray):
        super().__init__(Communicator(number, pipes, slots), None, "this machine")


@contextmanager
def forked(count: int) -> Iterator[Ranks]:
    """In this block the job has `count` ranks: this process, the first one, and copies of it, which end with the block.

    Each has its share of the cores. The copies print nothing; what one of them raises is a RankError in the first rank,
    if that waits for it.
    """
    slots = np.frombuffer(mmap.mmap(-1, count * AT_ONCE), np.uint8).reshape(count, AT_ONCE)
    pipes, copies = list[Connection](), list[int]()
    sys.stdout.flush()  # or each copy writes what waits there, too
    keep_threads(max(1, processors() // count))
    try:
        for number in range(1, count):
            mine, theirs = Pipe()
            with warnings.catch_warnings():  # of other threads: those of BLAS libraries, which are idle
                warnings.simplefilter("ignore", DeprecationWarning)
                process = os.fork()
            if process == 0:
                mine.close()  # or `theirs` would not see that the first rank has ended
                with _as_copy(theirs):
                    yield Forked(number, [theirs], slots)
            theirs.close()
            pipes.append(mine)
            copies.append(process)
        yield Forked(0, pipes, slots)
    finally:
        for process in copies:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


@contextmanager
def _as_copy(pipe: Connection) -> Iterator[None]:
    """The last block of a copy, in which it prints nothing and leaves signals to the first rank."""
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        with hide_progress():
            yield
        status = 0
    except BaseException as error:
        with suppress(OSError):
            pipe.send(_Failure(str(error) or type(error).__name__))
    finally:
        os._exit(status)
