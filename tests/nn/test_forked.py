"""Ranks that are forked: what they send each other, and how they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minilora.engine import parallel
from minilora.nn import forked as module
from minilora.nn.forked import forked
from minilora.nn.ranks import RankError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


@pytest.fixture(autouse=True)
def threads_and_children(monkeypatch):
    """A test keeps the threads of its process; all copies have ended after it."""
    kept, copies, fork = [], [], os.fork
    monkeypatch.setattr(module, "keep_threads", kept.append)
    monkeypatch.setattr(os, "fork", lambda: copies.append(fork()) or copies[-1])
    yield kept
    for copy in copies:
        with pytest.raises(ChildProcessError):  # it has ended, and was waited for
            os.waitpid(copy, os.WNOHANG)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ranks_sum_and_share_what_each_has(count, size, dtype, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 64)  # bytes: most arrays are sent in parts
    each = np.arange(count * size, dtype=dtype).reshape(count, size)
    with forked(count) as ranks:
        own = each[ranks.number].copy()
        ranks.comm.Allreduce(None, own)
        found = [own, np.full((size, 2), ranks.number, dtype)]
        ranks.level([found[1]])
        joined = ranks.join([ranks.number, ranks.number + count])
        values = (ranks.size, ranks.sum(1, ranks.number), ranks.sum_here(2), ranks.same(ranks.number), joined)
        said = ranks.comm.allgather((*values, found[0].tolist(), found[1].max()))
    assert ranks.first and ranks.share_memory
    numbers = (count, [count, count * (count - 1) / 2], 2 * count, 0, [*range(2 * count)])
    assert said == [(*numbers, each.sum(axis=0).tolist(), 0)] * count


def test_copies_have_their_share_of_the_cores_and_print_nothing(monkeypatch, capfd, threads_and_children):
    monkeypatch.setattr(module, "processors", lambda: 5)
    with forked(2) as ranks:
        print("said once")
        ranks.same(None)
    with forked(9) as ranks:
        ranks.same(None)
    assert threads_and_children == [2, 1] and capfd.readouterr().out == "said once\n"


def test_what_was_printed_before_the_copies_were_made_is_written_once(tmp_path, monkeypatch):
    file = tmp_path / "stdout"  # of which nobody else knows: a copy that lets it go writes its buffer
    monkeypatch.setattr(sys, "stdout", open(file, "w", encoding="utf-8"))  # noqa: SIM115
    print("said before")
    with forked(3) as ranks:
        ranks.same(None)
    sys.stdout.close()
    assert file.read_text(encoding="utf-8") == "said before\n"


def test_what_a_copy_raises_is_said_where_it_is_waited_for():
    with pytest.raises(RankError, match="^no rank but the first$"), forked(3) as ranks:
        if ranks.number == 2:
            raise ValueError("no rank but the first")
        ranks.join([1])


def test_a_copy_that_is_killed_ends_the_job_and_an_error_of_the_first_rank_ends_the_copies():
    with pytest.raises(RankError, match="for want of memory: try fewer --processes"), forked(2) as ranks:
        if ranks.number:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.join([1])
    with pytest.raises(ZeroDivisionError), forked(2) as ranks:
        if ranks.first:
            raise ZeroDivisionError
        time.sleep(60)


def test_copies_leave_signals_to_the_first_rank_and_end_with_it():
    alone = os.getpid()
    with forked(3) as ranks:
        if ranks.number:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                os.kill(os.getpid(), number)
        parents = ranks.comm.allgather(os.getppid())
    assert parents[1:] == [alone] * 2


VANISHES = """
import os, time
from minilora.nn.forked import forked
with forked(3) as ranks:
    if ranks.first:
        print(*ranks.join([os.getpid()])[1:], flush=True)
        os.kill(os.getpid(), 9)
    ranks.join([os.getpid()])
    ranks.same(None)
"""


def test_copies_end_where_the_first_rank_vanishes():
    out = subprocess.run([sys.executable, "-c", VANISHES], capture_output=True, text=True, timeout=60).stdout
    until = time.monotonic() + 20
    while (left := [pid for pid in out.split() if _runs(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(out.split()) == 2 and left == []


def _runs(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # nobody has asked how it ended


def test_threads_of_another_library_are_kept_as_well(monkeypatch):
    monkeypatch.setattr(parallel, "_lent", [4])
    kept = list(parallel._kept)
    for most, found in ((3, 3), (8, 3), (1, 1)):
        parallel.keep_threads(most)
        assert parallel.cores() == found and parallel._kept == kept
