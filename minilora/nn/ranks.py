"""Data parallelism over several processes, by MPI: `mpiexec -n 4 minilora finetune`, on one machine or on many.

Each rank, as MPI calls a process, runs the same program: it has the whole model, reads the same data, and computes its
share of every batch. Then one `Allreduce` sums one flat array over the ranks: the gradients of the trainable
parameters, the loss, and the weight of the share (its number of scored tokens). Each rank multiplies its mean by its
own weight before the sum and divides by the total after it, so every token has the same weight. The result is the mean
over the whole batch, as one process computes it: the learning rate stays the same, and every rank takes the same step.

What only the first rank knows (Ctrl-C, the state on disk) it broadcasts. It alone measures, writes files and prints. A
process that mpiexec did not start is a job of one rank, `ALONE`, without MPI.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar, cast

import numpy as np

from ..engine.backend import Array
from ..engine.parallel import keep_threads, processors
from ..engine.tensor import Tensor
from ..progress import STDERR
from .parts import Batch, Example, balanced

Same = TypeVar("Same")
INSTALL = "pip install 'minilora[mpi]'"


class Ranks:
    """The ranks of a job. comm: MPI's communicator; None is a job of one rank, which does all of the work.

    number: of this rank, from 0. size: how many there are.
    """

    def __init__(self, comm: Any = None):
        self.comm = comm
        self.number: int = 0 if comm is None else comm.Get_rank()
        self.size: int = 1 if comm is None else comm.Get_size()

    def share(self, samples: Batch | Sequence[Example]) -> Batch | Sequence[Example]:
        """This rank's share of a batch: about as many tokens as each of the others has, possibly none."""
        if self.size == 1:
            return samples
        if isinstance(samples, Batch):
            raise TypeError("several ranks share samples, not a batch: give training_step the samples")
        return [samples[i] for i in balanced([len(sample.ids) for sample in samples], self.size)[self.number]]

    def mean(self, parameters: Sequence[Tensor], loss: Array, share: Batch | Sequence[Example]) -> Array:
        """Turn means over this rank's share into means over the whole batch: the loss, which is returned, and every
        gradient, which becomes a view of the one array that was sent.
        """
        if self.size == 1:
            return loss
        weight = sum(sample.weight for sample in cast(Sequence[Example], share))
        flat = np.zeros(sum(p.size for p in parameters) + 2, np.result_type(*{p.dtype for p in parameters}))
        start = 0
        for p in parameters:
            part = flat[start : start + p.size].reshape(p.shape)
            if p.grad is not None:
                np.multiply(p.grad, weight, out=part)
            p.grad, start = part, start + p.size
        flat[-2:] = loss * weight, weight
        total = np.empty_like(flat)
        self.comm.Allreduce(flat, total)
        np.divide(total, total[-1], out=flat)
        return flat[-2]

    def same(self, value: Same) -> Same:
        """The first rank's value, on every rank."""
        return value if self.size == 1 else self.comm.bcast(value, 0)

    def level(self, arrays: Sequence[np.ndarray]) -> None:
        """Copy the first rank's arrays into every rank's."""
        for array in arrays if self.size > 1 else ():
            array[...] = self.comm.bcast(array, 0)

    def fail(self, line: str, status: int) -> int:
        """Print why this process ends, in one line, and return the exit status; with several ranks, end all of them."""
        if self.number:  # usually the first rank fails for the same reason, and ends this one meanwhile
            time.sleep(5)
            line = f"minilora: rank {self.number}: {line.strip().removeprefix('minilora: ')}"
        print(line, file=STDERR, flush=True)
        if self.size > 1:
            self.comm.Abort(status)
        return status


ALONE = Ranks()


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
    and an uncaught error ends all ranks. Raises RuntimeError where mpi4py is missing, or belongs to another MPI than
    mpiexec.
    """
    if not launched():
        return ALONE
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: it finds no library of MPI
        raise RuntimeError(f"mpiexec has started this as one of several, which needs mpi4py: {INSTALL}") from error
    comm = MPI.COMM_WORLD
    if comm.Get_size() == 1:
        raise RuntimeError(f"mpiexec is of another MPI than mpi4py, which sees one process: {INSTALL} brings both")
    if hasattr(os, "sched_setaffinity"):  # Open MPI binds each of two ranks to one core; the launcher may use more
        with suppress(OSError):
            os.sched_setaffinity(0, os.sched_getaffinity(0) | os.sched_getaffinity(os.getppid()))
    keep_threads(max(1, processors() // comm.Split_type(MPI.COMM_TYPE_SHARED).Get_size()))

    def end_all(*error: Any) -> None:
        sys.__excepthook__(*error)
        comm.Abort(1)

    sys.excepthook = end_all
    if comm.Get_rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        for number in (signal.SIGINT, signal.SIGTERM):  # the first rank takes its step to the end
            signal.signal(number, signal.SIG_IGN)
    return Ranks(comm)
