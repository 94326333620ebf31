"""MPI's communicator between threads, so that ranks can be tested in one process."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

from minilora.engine.parallel import _controller
from minilora.nn.ranks import Ranks


class Comm:
    """What `Ranks` asks of MPI's communicator, between threads. sent: the bytes of every Allreduce."""

    def __init__(self, size, number=0, slots=None, barrier=None):
        self.number, self.slots, self.sent, self.ended = number, slots or [None] * size, [], []
        self.barrier = barrier or threading.Barrier(size, timeout=60)

    def Get_rank(self):
        return self.number

    def Get_size(self):
        return len(self.slots)

    def Allreduce(self, own, total):
        self.sent.append(own.nbytes)
        total[...] = sum(self.of_all(own))

    def bcast(self, value, root):
        return self.of_all(value)[root]

    def of_all(self, value):
        self.slots[self.number] = value
        self.barrier.wait()
        values = copy.deepcopy(self.slots)
        self.barrier.wait()
        return values

    def Abort(self, status):
        self.ended.append(status)


def in_ranks(size, function):
    """What function(ranks) returns on each rank."""
    first = Comm(size)
    everyone = [Ranks(Comm(size, i, first.slots, first.barrier)) for i in range(size)]
    with _controller().limit(limits=1, user_api="blas"), ThreadPoolExecutor(size) as pool:
        return list(pool.map(function, everyone))
