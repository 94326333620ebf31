"""Several processes at one job, by MPI: `mpiexec -n 4 minilora finetune`, on one machine or on many.

Each rank, as MPI calls a process, has the whole model and reads the same data. It computes its share of every batch;
then one `Allreduce` adds up one flat array on all of them: the gradients of what is trained, the loss, and how many
tokens were scored. Each rank's mean is multiplied by its own tokens before and divided by all of them after, so that a
token counts the same wherever it was scored. That is the mean of the whole batch, as one process computes it; so the
learning rate stays what it is, and each rank takes the same step.

The numbers travel as float32, which gradients are: their sum over 64 ranks is off by some 1e-7 of it, and float64
would send twice the bytes. For an adapter these are few, which is LoRA's saving once more, here on the network.

The first rank runs a job as if it were alone. It decides, writes and speaks; the others do what it tells them (see
`follow`). A process that no mpiexec has started is a job of one rank, `ALONE`, and imports nothing for it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from enum import IntEnum
from functools import cache
from typing import Any, NoReturn, TypeVar, cast

import numpy as np

from ..engine.backend import Array
from ..engine.parallel import keep_threads, processors
from ..engine.tensor import Tensor
from .parts import Sample, spread

Item = TypeVar("Item")
Same = TypeVar("Same")
Order = IntEnum("Order", ["MEASURE", "BEGIN", "START", "STEP", "VALIDATE", "LEVEL", "SCORE", "END"])
READY = 1  # the tag of the one message by which a rank says that it has what it needs, or what it lacks
INSTALL = "pip install 'minilora[mpi]'"


class RankError(RuntimeError):
    """Another rank cannot take part: which one, and why."""


class Ranks:
    """A job of one rank: all of it is its own share, and nobody is there to be told anything.

    number: which rank this is, from 0 on. size: how many there are. mean: for `training_step`, which calls it where a
    batch is a share of a larger one.
    """

    number, size = 0, 1
    mean: Callable[[Sequence[Tensor], Array, int], Array] | None = None
    pool: Executor | None = None  # the other ranks, where they wait for trials: see `hand_out`

    def share(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """This rank's share of a batch: as many tokens as the others', as far as whole samples can be divided so."""
        return samples

    def at_once(self, count: int) -> int:
        """Of so many samples that go forward and back at a time, how many do so on each rank."""
        return -(-count // self.size)

    def bytes_per_step(self, numbers: int) -> int:
        """What a rank sends for each step when so many numbers are trained."""
        return 0

    def sum(self, *numbers: float) -> Sequence[float]:
        """Each number, added up over the ranks: the same on all of them."""
        return numbers

    def join(self, items: list[Item]) -> list[Item]:
        """A list of which each rank has every `size`-th item, from its own number on: whole again, on all of them."""
        return items

    def same(self, value: Same) -> Same:
        """What the first rank has."""
        return value

    def level(self, arrays: Sequence[np.ndarray]) -> None:
        """Let these arrays be on every rank what they are on the first."""

    def ready(self, **facts: str) -> None:
        """Wait until every rank has what it needs; facts: what must be the same on all. Raises RankError on the first
        rank where it is not, or another rank could not get so far.
        """

    def tell(self, order: Order) -> None:
        """As the first rank, let the others do this."""

    def fail(self, line: str, status: int) -> int:
        """Say why this process ends, in a line. Returns the exit status; where other ranks are, ends all of them."""
        print(line, file=sys.stderr)
        return status


ALONE = Ranks()


class Several(Ranks):
    """One of several ranks. comm: MPI's communicator. in_place: MPI.IN_PLACE. host: this machine's name.

    Small messages of lists and texts are pickled by mpi4py: they come from the job's own processes, never from a file.
    """

    met = False  # whether all ranks have said that they are ready

    def __init__(self, comm: Any, in_place: Any, host: str):
        self.comm, self.in_place, self.host = comm, in_place, host
        self.number, self.size = comm.Get_rank(), comm.Get_size()

    def share(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Whole samples, the longest first, each to the rank that has least so far; none where there are too few."""
        return [samples[i] for i in spread([len(sample.ids) for sample in samples], self.size)[self.number]]

    def bytes_per_step(self, numbers: int) -> int:
        """Four for each number, and for the loss and the count of tokens."""
        return 4 * (numbers + 2)

    def mean(self, parameters: Sequence[Tensor], loss: Array, scored: int) -> Array:
        """From the mean over this rank's share to that over the whole batch: of the loss, which is returned, and of
        every gradient, in its place. scored: the tokens of this rank's share, 0 where it has none.

        The gradients become views of the one array that was sent, each of which takes its old array's room in memory.
        """
        flat = np.empty(sum(p.size for p in parameters) + 2, np.result_type(*{p.dtype for p in parameters}))
        start = 0
        for p in parameters:
            part = flat[start : start + p.size].reshape(p.shape)
            if p.grad is None:
                part[...] = 0
            else:
                np.multiply(p.grad, scored, out=part)
            p.grad, start = part, start + p.size
        flat[-2:] = loss * scored, scored
        self.comm.Allreduce(self.in_place, flat)
        flat[:-1] /= flat[-1]
        return flat[-2]

    def sum(self, *numbers: float) -> Sequence[float]:
        """Each number, added up over the ranks, in float64."""
        together = np.array(numbers, np.float64)
        self.comm.Allreduce(self.in_place, together)
        return together.tolist()

    def join(self, items: list[Item]) -> list[Item]:
        """Every rank's items, by turns."""
        shares = self.comm.allgather(items)
        return [shares[i % self.size][i // self.size] for i in range(sum(map(len, shares)))]

    def same(self, value: Same) -> Same:
        """What the first rank has."""
        return self.comm.bcast(value, 0)

    def level(self, arrays: Sequence[np.ndarray]) -> None:
        """Send the first rank's, one by one."""
        for array in arrays:
            flat = np.ascontiguousarray(array)
            self.comm.Bcast(flat, 0)
            if flat is not array:
                array[...] = flat

    def ready(self, **facts: str) -> None:
        """The first rank hears from each other one what it has, or why it has not."""
        if self.number:
            self.comm.send(("", facts), 0, READY)
        for number in range(1, self.size if not self.number else 0):
            failure, theirs = self.comm.recv(None, number, READY)
            if failure:
                raise RankError(failure)
            if other := [name for name, fact in facts.items() if theirs[name] != fact]:
                raise RankError(f"rank {number} has another {other[0]} than rank 0: they must be the same everywhere")
        self.met = True

    def tell(self, order: Order) -> None:
        """One small message."""
        if not self.number:
            self.comm.Ibcast(np.array([order], np.int32), 0).Wait()

    def hear(self) -> Order:
        """What the first rank tells the others. Waiting for it leaves the core to others, which plain MPI does not."""
        said, wait = np.zeros(1, np.int32), 1e-4
        request = self.comm.Ibcast(said, 0)
        while not request.Test():
            time.sleep(wait)
            wait = min(1.2 * wait, 0.01)
        return Order(int(said[0]))

    @contextmanager
    def hand_out(self) -> Iterator[bool]:
        """In this block the first rank has the others as its `pool`, for `experiments.trials.run_trials`. They take its
        trials, by mpi4py.futures, as long as the first one is inside. Gives whether this is the first rank.
        """
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor

        self.met = True
        machine = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        keep_threads(_share_of_cores(max(1, machine.allreduce(int(self.number > 0)))))  # the first one only waits
        with MPICommExecutor(self.comm, 0) as pool:
            self.pool = None if pool is None else _Lent(cast(Executor, pool))
            yield not self.number

    def fail(self, line: str, status: int) -> NoReturn:
        """End the whole job, and say why, once: most often other ranks fail for the same reason."""
        if self.number:
            line = f"minilora: rank {self.number} on {self.host}: {line.strip().removeprefix('minilora: ')}"
            if not self.met:  # the first rank has failed, too, or will hear of it where it waits for the others
                self.comm.send((line.removeprefix("minilora: "), {}), 0, READY)
                while True:
                    time.sleep(1)
        print(line, file=sys.stderr, flush=True)
        self.abort(status)

    def abort(self, status: int) -> NoReturn:
        """End all ranks, at once."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        self.comm.Abort(status)
        raise SystemExit(status)  # not reached


class _Lent(Executor):
    """A pool that outlives those who use it."""

    def __init__(self, pool: Executor):
        self.pool = pool

    def submit(self, function: Callable[..., Any], /, *inputs: Any, **settings: Any) -> Future[Any]:
        return self.pool.submit(function, *inputs, **settings)


# -- which rank am I? --------------------------------------------------------------------------------------------------


def launched() -> bool:
    """Has a launcher of MPI started this process as one of several? Its environment variables tell, without MPI."""
    names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # Open MPI; MPICH, Intel, Microsoft; MVAPICH
    sizes = [os.environ[name] for name in names if name in os.environ]
    if not sizes and "PMIX_RANK" in os.environ:  # another launcher, such as Slurm's, which may not say how many
        sizes = [os.environ.get("SLURM_NTASKS", "several")]
    return any(size != "1" for size in sizes)


@cache
def world() -> Ranks:
    """All ranks of this job: `ALONE`, unless mpiexec has started this process as one of several.

    Then the cores of a machine are divided among its ranks, only the first rank prints and hears Ctrl-C, and an error
    that nobody catches ends all ranks. Raises RuntimeError when mpi4py is missing, or is of another MPI than mpiexec.
    """
    if not launched():
        return ALONE
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: it finds no library of MPI
        first = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", os.environ.get("PMIX_RANK", "0")))
        if first != "0":
            raise SystemExit(1) from error  # it would be said once by each
        raise RuntimeError(f"mpiexec has started this as one of several, which needs mpi4py: {INSTALL}") from error
    comm = MPI.COMM_WORLD
    if comm.Get_size() == 1:
        raise RuntimeError(f"mpiexec is of another MPI than mpi4py, which sees one process: {INSTALL} brings both")
    ranks = Several(comm, MPI.IN_PLACE, MPI.Get_processor_name())
    keep_threads(_share_of_cores(comm.Split_type(MPI.COMM_TYPE_SHARED).Get_size()))

    def end_all(*error: Any) -> None:
        sys.__excepthook__(*error)
        ranks.abort(1)

    sys.excepthook = end_all
    if ranks.number:
        import signal

        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    return ranks


def _share_of_cores(ranks: int) -> int:
    """How many of a machine's cores each of its ranks may use.

    Open MPI binds each of two ranks to a single core, unless told otherwise, which is made for programs that use one.
    The process that started this one is not bound, and tells what may be used.
    """
    if not hasattr(os, "sched_getaffinity"):  # macOS, Windows
        return max(1, processors() // ranks)
    allowed = os.sched_getaffinity(0)
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in os.environ:
        with suppress(OSError):
            allowed |= os.sched_getaffinity(os.getppid())
            os.sched_setaffinity(0, allowed)
    return max(1, len(allowed) // ranks)
