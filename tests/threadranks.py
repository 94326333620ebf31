"""Ranks without MPI: threads that talk to each other through a communicator of a few lines."""

import copy
import queue
import threading
from concurrent.futures import ThreadPoolExecutor

from minilora.engine.parallel import _controller
from minilora.nn.ranks import Several


class Job:
    """What the communicators of one job share. sent: the bytes of every Allreduce, as the first rank called it."""

    def __init__(self, size):
        self.size, self.slots, self.sent, self.ended = size, [None] * size, [], []
        self.barrier = threading.Barrier(size, timeout=120)
        self.posts = {(i, j): queue.Queue() for i in range(size) for j in range(size)}


class Comm:
    """What `Several` asks of MPI's communicator."""

    def __init__(self, job, number):
        self.job, self.number = job, number

    def Get_rank(self):
        return self.number

    def Get_size(self):
        return self.job.size

    def allgather(self, value):
        self.job.slots[self.number] = value
        self.job.barrier.wait()
        values = list(self.job.slots)
        self.job.barrier.wait()
        return values

    def Allreduce(self, in_place, array):
        if not self.number:
            self.job.sent.append(array.nbytes)
        total = sum(self.allgather(array.copy()))
        array[...] = total

    def bcast(self, value, root):
        return copy.deepcopy(self.allgather(value)[root])

    def Bcast(self, array, root):
        array[...] = self.allgather(array.copy())[root]

    def send(self, value, to, tag):
        self.job.posts[self.number, to].put(value)

    def recv(self, buffer, source, tag):
        return self.job.posts[source, self.number].get(timeout=120)

    def Abort(self, status):
        self.job.ended.append((self.number, status))
        self.job.barrier.abort()


def in_ranks(size, function, *inputs):
    """What function(ranks, *inputs) returns on each rank; the first error that is not of a rank that waited for it."""
    job = Job(size)
    everyone = [Several(Comm(job, number), None, f"host{number}") for number in range(size)]

    def run(ranks):
        try:
            return function(ranks, *inputs)
        except BaseException:
            job.barrier.abort()
            raise

    with _controller().limit(limits=1, user_api="blas"), ThreadPoolExecutor(size) as pool:
        running = [pool.submit(run, ranks) for ranks in everyone]
        errors = [done.exception() for done in running]
    for error in sorted(filter(None, errors), key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [done.result() for done in running], job
