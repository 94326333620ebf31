"""A process that does one thing: its result, its failures, and its memory."""

import contextlib
import io
import mmap
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from minilora.engine.backend import release_memory
from minilora.measure import process
from minilora.measure.process import added_memory, apart, free_memory, peak_memory, program_memory
from minilora.progress import log, show_progress


@pytest.fixture
def here(monkeypatch):
    """`apart` finds the functions of this file: it runs the process in the folder of tests/."""
    monkeypatch.chdir(Path(__file__).parents[2])


def answer(number, words):
    """Run by its own process: returns something else each time if it is called twice."""
    answer.calls = getattr(answer, "calls", 0) + 1
    print("not an answer")
    log.info("working")
    return {"sum": number + answer.calls, "words": words[::-1], "process": peak_memory() is not None}


def fail(kind):
    errors = {"value": ValueError("no such\nmodel"), "interrupted": KeyboardInterrupt()}
    raise (errors | {"memory": MemoryError(), "asked": MemoryError("Unable to allocate 9 MiB")})[kind]


class Here(SimpleNamespace):
    """In place of `subprocess.Popen`: does here what the process would do."""

    def __init__(self, command, **how):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            super().__init__(returncode=process.main(*command[-2:]))
        self.communicate = lambda: (out.getvalue(), None)

    __enter__, __exit__ = lambda self: self, lambda self, *error: None


def leave():
    import os

    os._exit(9)


def stay():
    print("here", flush=True)
    time.sleep(100)


@pytest.mark.long
def test_a_function_is_called_in_a_process_of_its_own(here, capfd):
    assert apart(answer, 41, "abc") == {"sum": 42, "words": "cba", "process": peak_memory() is not None}
    out, err = capfd.readouterr()
    assert out == "" and err == "not an answer\n"  # and no line: nothing is shown here
    assert not hasattr(answer, "calls")
    show_progress()
    try:
        apart(answer, 41, "abc")
    finally:
        show_progress(False)
    assert capfd.readouterr().err == "not an answer\nworking\n"


@pytest.mark.parametrize(
    ("kind", "error", "words", "place"),
    [
        ("value", RuntimeError, "no such\nmodel", Here),
        ("memory", MemoryError, "^$", Here),
        ("asked", MemoryError, "^Unable to allocate 9 MiB$", Here),
        ("interrupted", KeyboardInterrupt, "^$", Here),
        pytest.param("value", RuntimeError, "no such\nmodel", subprocess.Popen, marks=pytest.mark.long),
    ],
)
def test_a_failure_comes_back_as_its_reason(here, monkeypatch, kind, error, words, place):
    monkeypatch.setattr(process.subprocess, "Popen", place)
    with pytest.raises(error, match=words):
        apart(fail, kind)


def test_an_answer_that_nobody_waits_for_any_longer_ends_the_process_without_a_traceback(here, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Mock(write=Mock(side_effect=BrokenPipeError)))
    monkeypatch.setattr(process.os, "_exit", ended := Mock())
    process.main(f"{__name__}:fail", '{"arguments": ["value"], "shown": false}')
    ended.assert_called_once_with(1)


@pytest.mark.long
def test_a_process_that_is_killed_is_an_error(here):
    with pytest.raises(RuntimeError, match="ended with status 9; is there enough memory"):
        apart(leave)


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="Windows does not tell that a parent has ended")
def test_a_process_ends_with_the_one_that_started_it(here):
    code = f"from minilora.measure.process import apart; from {__name__} import stay; apart(stay)"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as first:
        while first.stderr.readline() != "here\n":
            assert first.poll() is None
        first.kill()
        began = time.monotonic()
        first.stderr.read()  # until both have ended
    assert time.monotonic() - began < 50


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_peak_of_the_process_is_at_least_what_it_just_held_and_the_programs_share_is_less():
    if peak_memory() is None:
        pytest.skip("this system does not know it")
    held = np.ones(20_000_000)
    assert peak_memory() >= held.nbytes
    assert 0 < program_memory(held.nbytes) < peak_memory() - held.nbytes / 2


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells it there")
def test_the_system_tells_the_peak_in_kilobytes_of_1024_bytes():
    resource = pytest.importorskip("resource")
    told = peak_memory()
    lines = Path("/proc/self/status").read_text().splitlines()
    assert told == pytest.approx(1024 * int(next(line for line in lines if "VmHWM" in line).split()[1]), rel=1e-3)
    assert told <= 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.02  # it counts pages in lots


@pytest.mark.long
def test_the_peak_is_this_process_own_and_not_that_of_the_program_that_started_it():
    if peak_memory() is None:
        pytest.skip("this system does not know it")
    held = np.ones(25_000_000)
    assert apart(peak_memory) < held.nbytes


def test_where_the_system_has_no_proc_the_peak_is_that_of_getrusage_and_where_it_has_neither_it_is_unknown(monkeypatch):
    monkeypatch.setattr(process, "Path", lambda path: Path("/absent"))
    told = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=5000))
    monkeypatch.setitem(sys.modules, "resource", told)
    for system, unit in (("darwin", 1), ("linux", 1024)):  # macOS tells bytes
        monkeypatch.setattr(sys, "platform", system)
        assert (peak_memory(), program_memory(7)) == (5000 * unit, 5000 * unit - 7)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory() is None and program_memory(7) is None


OUTSIDE = 4_000_000  # bytes that the machine has left
LIMITS = [  # files in /sys/fs/cgroup and their text, bytes that are left
    ({"memory.max": 900, "memory.current": 700, "memory.stat": "anon 9\ninactive_file 50\nactive_file 4"}, 254),
    ({"memory.max": 90, "memory.current": 99, "memory.stat": "inactive_file 0\nactive_file 0"}, 0),
    ({"memory.max": "max", "memory.current": 1, "memory.stat": ""}, OUTSIDE),
    ({"memory.max": 10**15, "memory.current": 0, "memory.stat": "inactive_file 0\nactive_file 0"}, OUTSIDE),
    ({}, OUTSIDE),
]


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="Linux alone has /proc")
@pytest.mark.parametrize(("files", "left"), LIMITS)
def test_free_memory_is_what_the_containers_limit_leaves_and_cached_files_are_free(files, left, tmp_path, monkeypatch):
    files = {
        "proc/meminfo": f"MemFree: 1 kB\nMemAvailable: {OUTSIDE // 1024} kB\n",
        "proc/self/statm": "9 2 1",
    } | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(process, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert free_memory() == 2 * os.sysconf("SC_PAGE_SIZE") + (left if left < OUTSIDE else OUTSIDE // 1024 * 1024)
    (tmp_path / "proc/meminfo").unlink()
    assert free_memory() is None


def freed():
    """Run by its own process: what it holds, in MB, after it has freed 100 MB, and after it has given them back."""
    arrays = [np.ones(8000) for _ in range(1600)]  # 64 kB each
    last = arrays.pop()
    del arrays
    before = program_memory(0)
    release_memory()
    return [before / 1e6, program_memory(0) / 1e6, last.size]


@pytest.mark.long
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps nothing, or cannot be told")
def test_freed_memory_is_given_back_to_the_system(here):
    before, after, _ = apart(freed)
    assert after < before - 90


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not say what a process holds now")
def test_added_memory_is_what_is_still_held_afterwards(monkeypatch):
    size, kept = 1 << 26, []

    def filled():  # straight from the system, which gets it back at once
        area = mmap.mmap(-1, size)
        np.frombuffer(area, np.uint8)[:] = 1
        return area

    assert 0.9 * size < added_memory(lambda: kept.append(filled())) < 1.5 * size
    assert added_memory(lambda: filled().close()) < size / 2
    assert added_memory(kept.clear) == 0
    monkeypatch.setattr(process, "_held_now", lambda: None)
    assert added_memory(lambda: kept.append(3)) == 0 and kept == [3]
