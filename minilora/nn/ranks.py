"""Data parallelism over several processes, by MPI: `mpiexec -n 4 minilora finetune`, on one machine or on many.

Each rank, as MPI calls a process, has the whole model and reads the same data. It computes its share of every batch.
Then one `Allreduce` sums one flat array over the ranks: the gradients of the trainable parameters, the loss, and the
number of scored tokens. Each rank multiplies its mean by its own token count before the sum and divides by the total
after it, so every token has the same weight. The result is the mean over the whole batch, as one process computes it:
the learning rate stays the same, and every rank takes the same step.

Gradients are sent as float32: a sum over 64 ranks is off by about 1e-7 of its value, and float64 would double the
bytes. An adapter has few gradients, so LoRA saves network traffic as well as memory.

Every rank runs the same program. What only the first rank knows (Ctrl-C, the state on disk) it broadcasts with `same`.
It alone writes files and prints. A process that mpiexec did not start is a job of one rank, `ALONE`, without MPI.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NoReturn, TypeVar, cast

import numpy as np

from ..engine.backend import Array
from ..engine.parallel import keep_threads, processors
from ..engine.tensor import Tensor
from ..progress import STDERR
from .parts import Example, divided_among

Item = TypeVar("Item")
Same = TypeVar("Same")
READY = 1  # the tag of the one message in which a rank reports that it is ready, or why it is not
INSTALL = "pip install 'minilora[mpi]'"


class RankError(RuntimeError):
    """Another rank cannot take part: which one, and why."""


class Ranks:
    """A job of one rank, which does all of the work.

    number: the number of this rank, from 0. size: the number of ranks. mean: for `training_step`, which calls it where
    a batch is a share of a larger one.
    """

    number, size = 0, 1
    share_memory = False  # of the base and the data, which are then held once for all ranks
    mean: Callable[[Sequence[Tensor], Array, int], Array] | None = None
    pool: Executor | None = None  # the other ranks, while they wait for trials: see `hand_out`

    def __repr__(self) -> str:
        return f"<rank {self.number} of {self.size}>"

    @property
    def first(self) -> bool:
        """Whether this is the rank that decides, writes and prints."""
        return self.number == 0

    def share(self, samples: Sequence[Example]) -> Sequence[Example]:
        """This rank's share of a batch: about as many tokens as each of the others has."""
        return samples

    def at_once(self, count: int) -> int:
        """Divide the size of a micro-batch among the ranks, rounded up."""
        return -(-count // self.size)

    def bytes_per_step(self, parameters: int) -> int:
        """The bytes that a rank sends in each step: four for each trainable parameter, the loss and the tokens."""
        return 4 * (parameters + 2) if self.size > 1 else 0

    def sum(self, *numbers: float) -> Sequence[float]:
        """Each number, summed over the ranks: the same on all of them."""
        return numbers

    def sum_here(self, number: int) -> int:
        """A number, summed over the ranks on this machine."""
        return number

    def join(self, items: list[Item]) -> list[Item]:
        """The whole list, on every rank, where each rank has every `size`-th item, beginning with its own number."""
        return items

    def same(self, value: Same) -> Same:
        """The first rank's value, on every rank."""
        return value

    def level(self, arrays: Sequence[np.ndarray]) -> None:
        """Copy the first rank's arrays into every rank's."""

    def ready(self, **facts: str) -> None:
        """Wait until every rank has loaded what it needs. facts: what must be the same on all ranks.

        Raises RankError on the first rank where a fact differs, or where another rank could not get so far.
        """

    def fail(self, line: str, status: int) -> int:
        """Print why this process ends, in one line, and return the exit status; with several ranks, end all of them."""
        print(line, file=STDERR)
        return status


ALONE = Ranks()


class Several(Ranks):
    """One of several ranks. comm: MPI's communicator. in_place: MPI.IN_PLACE. host: the name of this machine.

    mpi4py pickles small messages of lists and texts: they come from the job's own processes, never from a file.
    """

    met = False  # whether all ranks have reported that they are ready

    def __init__(self, comm: Any, in_place: Any, host: str):
        self.comm, self.in_place, self.host = comm, in_place, host
        self.number, self.size = comm.Get_rank(), comm.Get_size()

    def share(self, samples: Sequence[Example]) -> Sequence[Example]:
        """Whole samples, possibly none: see `divided_among`."""
        return [samples[i] for i in divided_among(samples, self.size)[self.number]]

    def mean(self, parameters: Sequence[Tensor], loss: Array, scored: int) -> Array:
        """Turn means over this rank's share into means over the whole batch: the loss, which is returned, and every
        gradient, in place. scored: the number of scored tokens in this rank's share, possibly 0.

        Each gradient becomes a view of the one array that was sent.
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
        """Each number, summed over the ranks in float64."""
        together = np.array(numbers, np.float64)
        self.comm.Allreduce(self.in_place, together)
        return together.tolist()

    def sum_here(self, number: int) -> int:
        """Those whose host has the same name."""
        return sum(each for host, each in self.comm.allgather((self.host, number)) if host == self.host)

    def join(self, items: list[Item]) -> list[Item]:
        """Take one item of each rank in turn."""
        shares = self.comm.allgather(items)
        return [shares[i % self.size][i // self.size] for i in range(sum(map(len, shares)))]

    def same(self, value: Same) -> Same:
        """Broadcast the first rank's value."""
        return self.comm.bcast(value, 0)

    def level(self, arrays: Sequence[np.ndarray]) -> None:
        """Broadcast them one by one."""
        for array in arrays:
            flat = np.ascontiguousarray(array)
            self.comm.Bcast(flat, 0)
            if flat is not array:
                array[...] = flat

    def ready(self, **facts: str) -> None:
        """The first rank receives a message from each other rank: its facts, or why it failed."""
        if self.number:
            self.comm.send(("", facts), 0, READY)
        for number in range(1, self.size if not self.number else 0):
            failure, theirs = self.comm.recv(None, number, READY)
            if failure:
                raise RankError(failure)
            if other := [name for name, fact in facts.items() if theirs[name] != fact]:
                raise RankError(f"rank {number} has another {other[0]} than rank 0: they must be the same everywhere")
        self.met = True

    @contextmanager
    def hand_out(self) -> Iterator[bool]:
        """In this block, the first rank has the others as its `pool`, for `experiments.trials.run_trials`: they run its
        trials, by mpi4py.futures, until it leaves the block. Yields whether this is the first rank.
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
        """Print why the job ends, once, and end all ranks: usually the others fail for the same reason."""
        if self.number:
            line = f"minilora: rank {self.number} on {self.host}: {line.strip().removeprefix('minilora: ')}"
            if not self.met:  # the first rank has failed, too, or receives this in `ready`
                self.comm.send((line.removeprefix("minilora: "), {}), 0, READY)
                while True:
                    time.sleep(1)
        print(line, file=STDERR, flush=True)
        self.abort(status)

    def abort(self, status: int) -> NoReturn:
        """End all ranks, at once."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        self.comm.Abort(status)
        raise SystemExit(status)  # not reached


class _Lent(Executor):
    """A pool that its users do not shut down."""

    def __init__(self, pool: Executor):
        self.pool = pool

    def submit(self, function: Callable[..., Any], /, *inputs: Any, **settings: Any) -> Future[Any]:
        return self.pool.submit(function, *inputs, **settings)


# -- which rank am I? --------------------------------------------------------------------------------------------------


def launched() -> bool:
    """Whether a launcher of MPI has started this process as one of several, by its environment variables."""
    names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # Open MPI; MPICH, Intel, Microsoft; MVAPICH
    sizes = [os.environ[name] for name in names if name in os.environ]
    if not sizes and "PMIX_RANK" in os.environ:  # another launcher, such as Slurm's, which may not set the number
        sizes = [os.environ.get("SLURM_NTASKS", "several")]
    return any(size != "1" for size in sizes)


@cache
def world() -> Ranks:
    """The ranks of this job: `ALONE`, unless mpiexec has started this process as one of several.

    With several, the cores of a machine are divided among its ranks, only the first rank prints and receives Ctrl-C,
    and an uncaught error ends all ranks. Raises RuntimeError when mpi4py is missing, or belongs to another MPI than
    mpiexec.
    """
    if not launched():
        return ALONE
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: it finds no library of MPI
        first = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", os.environ.get("PMIX_RANK", "0")))
        if first != "0":
            raise SystemExit(1) from error  # the first rank prints the reason
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
    """The number of a machine's cores that each of its ranks may use.

    By default, Open MPI binds each of two ranks to a single core, which suits programs of one thread. The process that
    started this one is not bound, so its affinity shows what may be used.
    """
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in os.environ and hasattr(os, "sched_getaffinity"):  # Linux
        with suppress(OSError):
            os.sched_setaffinity(0, os.sched_getaffinity(0) | os.sched_getaffinity(os.getppid()))
    return max(1, processors() // ranks)
