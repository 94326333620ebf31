"""Threads: gradients are added in a fixed order, one at a time, and every thread uses one core of BLAS."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from minilora.engine import parallel
from minilora.engine.tensor import Node, Tensor


def test_an_error_in_one_micro_batch_is_the_error_of_the_whole():
    def fails():
        raise ValueError("broken micro-batch")

    with pytest.raises(ValueError, match="broken micro-batch"):
        parallel.values([lambda: Tensor(1.0), fails], threads=2)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_gradients_are_added_in_the_order_of_the_threads_not_of_arrival(late):
    x = Tensor(np.array([1.0]), requires_grad=True)
    all_there = threading.Barrier(3)
    factors = [1e16, 1.0, -1e16]  # their sum depends on the order: (1e16 + 1) - 1e16 is 0, (1e16 - 1e16) + 1 is 1

    def part(i):
        y = (x * factors[i]).sum()
        all_there.wait(10)
        if i == late:
            time.sleep(0.02)
        return y

    parallel.values_and_gradients([lambda i=i: part(i) for i in range(3)], [1.0] * 3, threads=3)
    assert x.grad[0] == (1e16 + 1.0) - 1e16


def test_one_thread_at_a_time_adds_up(monkeypatch):
    """Two threads deliver to the same leaf at once: the accumulator must let in one at a time."""
    inside, most = [], []

    def slow_receive(self, grad, fresh):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.005)
        inside.pop()

    monkeypatch.setattr(Node, "receive", slow_receive)
    sums, leaf = parallel.Accumulator(2), Node([])
    for _ in range(5):  # one thread is ahead: the gradients of the other one meet these
        sums.receive(0, leaf, np.ones(1))
    both = threading.Barrier(2)

    def deliver(thread):
        both.wait(10)
        for _ in range(5):
            sums.receive(thread, leaf, np.ones(1))
            time.sleep(0.002)  # so that each meets the other at work

    threads = [threading.Thread(target=deliver, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    sums.close()
    assert len(most) == 15 and max(most) == 1


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="Windows")
@pytest.mark.parametrize("interrupts", [1, 2])
def test_after_an_interrupt_no_micro_batch_begins_and_after_two_no_gradient_comes_late(interrupts):
    """The second one ends the wait for the threads, which are still at work."""
    x, begun, going_on = Tensor(np.ones(1), requires_grad=True), [], threading.Event()
    others, main = set(threading.enumerate()), threading.main_thread().ident

    def part(i):
        begun.append(i)
        if len(begun) == 2:  # both threads are at work
            for k in range(interrupts):
                threading.Timer(0.03 + 0.06 * k, signal.pthread_kill, [main, signal.SIGINT]).start()
            if interrupts == 1:  # both threads end soon after it
                threading.Timer(0.2, going_on.set).start()
        going_on.wait(10)
        return (x * 2).sum()

    with pytest.raises(KeyboardInterrupt):
        parallel.values_and_gradients([lambda i=i: part(i) for i in range(8)], [1.0] * 8, threads=2)
    assert going_on.is_set() == (interrupts == 1)
    x.grad = None
    going_on.set()
    for thread in set(threading.enumerate()) - others:
        thread.join(10)
    assert sorted(begun) == [0, 1] and x.grad is None


# -- cores -------------------------------------------------------------------------------------------------------------


def test_each_thread_uses_one_core_and_cores_follow_blass_own_setting():
    inside = []

    def count():
        inside.append((parallel.cores(), parallel.has_one_core.get()))
        return Tensor(1.0)

    for most in (1, 2):
        with parallel._controller().limit(limits=most, user_api="blas"):
            parallel.values([count, count], threads=2)
            assert parallel.cores() == most
    assert inside == [(1, True)] * 4
    for most in (1, 2):  # a single thread may use all cores of another library, where there are several
        with parallel._controller().limit(limits=most, user_api="blas"):
            parallel.values([count], threads=1)
        assert inside[-1] == (most, most == 1)


KEEP = """
from minilora.engine.parallel import cores, keep_threads
import numpy
before = cores()
for most in (1, 2, 64):
    keep_threads(most)
    print(cores() <= min(most, before), end=" ")
"""


@pytest.fixture
def controller(monkeypatch):
    """A BLAS library that does not say how many threads it uses, and lists the limits that it is given."""
    fake = SimpleNamespace(limits=[], select=lambda user_api: SimpleNamespace(info=list))
    fake.limit = lambda limits, user_api: fake.limits.append(limits)
    monkeypatch.setattr(parallel, "_controller", lambda: fake)
    for name in parallel.THREADS:
        monkeypatch.delenv(name, raising=False)
    return fake


@pytest.mark.parametrize("name", parallel.THREADS)
def test_threads_are_as_many_as_the_environment_says(name, monkeypatch, controller):
    parallel.keep_threads(4)
    monkeypatch.setenv(name, "2")
    parallel.keep_threads(3)
    assert controller.limits == [4]


@pytest.mark.parametrize("name", parallel.THREADS)
def test_with_a_library_that_tells_nothing_the_threads_are_those_that_were_asked_for(name, monkeypatch, controller):
    """NumPy's wheels for macOS have Accelerate, which threadpoolctl does not know."""
    monkeypatch.setattr(parallel, "processors", lambda: 8)
    for value, cores in (("abc", 8), ("", 8), ("0", 8), ("99", 8), ("3", 3)):
        monkeypatch.setenv(name, value)
        assert parallel.cores() == cores


def test_cores_are_left_to_another_library_once_and_taken_back_once(monkeypatch, controller):
    monkeypatch.setattr(parallel, "processors", lambda: 6)
    for to_another, threads in ((False, None), (True, 1), (True, 1), (False, 6), (False, 6), (True, 1), (False, 6)):
        parallel.leave_cores(to_another)
        assert controller.limits[-1:] == ([threads] if threads else []) and parallel.cores() == 6
    assert controller.limits == [1, 6, 1, 6]


def test_with_openblas_num_threads_matmuls_use_no_more():
    environment = {k: v for k, v in os.environ.items() if k not in parallel.THREADS} | {"OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", KEEP], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True"] * 3


@pytest.mark.parametrize(
    ("allowed", "machine", "expected"), [({3}, 8, 1), ({0, 5}, 8, 2), (None, 8, 8), (None, None, 1)]
)
def test_processors_are_those_this_process_may_use_or_where_no_system_call_tells_all_of_them(
    monkeypatch, controller, allowed, machine, expected
):
    """sched_getaffinity is Linux's alone."""
    monkeypatch.setattr(os, "cpu_count", lambda: machine)
    if allowed is None:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    else:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed, raising=False)
    assert parallel.processors() == parallel.cores() == expected
    monkeypatch.setattr("sys.platform", "emscripten")
    assert parallel.processors() == 1  # a browser's Python cannot start a thread


def test_with_one_thread_none_is_started(monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", None)
    w = Tensor(np.ones(2), requires_grad=True)
    functions = [lambda: (w * w).sum(), lambda: w.sum()]
    assert parallel.values(functions, 1) == [2, 2]
    assert parallel.values_and_gradients(functions, [1.0, 1.0], 1) == [2, 2]
    np.testing.assert_array_equal(w.grad, [3, 3])


@pytest.mark.parametrize(
    ("text", "quota", "expected"),
    [("150000 100000", 1.5, 2), ("400000 200000", 2, 2), ("30000 100000", 0.3, 1), ("9900000 100000", 99, 8),
     ("max 100000", math.inf, 8), (None, math.inf, 8)],
)  # fmt: skip
def test_a_container_has_as_many_processors_as_its_quota_rounded_up(text, quota, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "Path", lambda path: tmp_path / path.lstrip("/"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    if text is not None:
        (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup/cpu.max").write_text(f"{text}\n")
    parallel._quota.cache_clear()
    try:
        assert (parallel._quota(), parallel.processors()) == (quota, expected)
    finally:
        parallel._quota.cache_clear()


SCRIPT = """
import sys
from minilora.engine import parallel
from threadpoolctl import threadpool_info
parallel._quota = lambda: float(sys.argv[1])
parallel.cores()
print([each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"])
"""


def test_matmuls_use_no_more_threads_than_the_quota_unless_their_number_is_given():
    def threads(quota, **given):
        environment = {k: v for k, v in os.environ.items() if k not in parallel.THREADS} | given
        command = [sys.executable, "-c", SCRIPT, str(quota)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    assert threads(1) == "[1]"
    assert threads(1, OPENBLAS_NUM_THREADS="2") == threads("inf", OPENBLAS_NUM_THREADS="2")
