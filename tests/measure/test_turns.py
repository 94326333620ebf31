"""Contenders that take turns: what they answer, and that failures are one line. No timing decides a test."""

import errno
import io
import json
import os
import sys
from functools import partial
from types import SimpleNamespace

import pytest
from hearing import counts_of

from minilora.measure import turns
from minilora.measure.process import peak_memory
from minilora.measure.turns import BenchError, Contender, Timings, serve, take_turns

measures_memory = pytest.mark.skipif(peak_memory() is None, reason="this system does not know a process's peak memory")
ANSWER = """print('{"ready": true}', flush=True)
for _ in sys.stdin: print('{"seconds": 2, "peak_bytes": 3}', flush=True)"""


def saying(name, code):
    """A contender that is a line of Python."""
    return Contender(name, [sys.executable, "-c", f"import os, sys\n{code}"])


def served(monkeypatch, setup, turns=0):
    """The exit status of `serve`, and what it answers to so many turns."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n" * turns))
    monkeypatch.setattr(sys, "stdout", out)
    return serve(setup), [json.loads(line) for line in out.getvalue().splitlines()]


def test_all_take_turns_after_all_are_ready(monkeypatch):
    pauses = []
    monkeypatch.setattr(turns, "time", SimpleNamespace(sleep=pauses.append))  # not that of subprocess, which waits
    with counts_of("turn") as counted:
        results = take_turns([saying("a", ANSWER), saying("b", ANSWER)], rounds=2, pause=0.5)
    assert sum(counted) == 2 * 3 and pauses == [0.5] * 4
    assert Timings([1.0, 9.0, 2.0]).median == 2  # one slow turn decides nothing
    assert [(name, m.seconds, m.median, m.peak_bytes) for name, m in results.items()] == [
        ("a", [2, 2], 2, 3),
        ("b", [2, 2], 2, 3),
    ]


@measures_memory
def test_a_contender_warms_up_once_and_answers_each_turn(monkeypatch):
    calls = []
    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: 2 * len(calls)))
    status, answers = served(monkeypatch, lambda: lambda: calls.append(1), turns=2)
    assert (status, len(calls), answers[0]) == (0, 3, {"ready": True})
    assert len(answers) == 3 and all(turn["seconds"] == 2 and turn["peak_bytes"] > 0 for turn in answers[1:])


def test_a_step_may_time_itself_and_what_it_prints_disturbs_no_answer(monkeypatch, capfd):
    assert served(monkeypatch, lambda: lambda: 0.25, turns=1)[1][1]["seconds"] == 0.25
    assert served(monkeypatch, lambda: lambda: print("hello"), turns=1)[1][0] == {"ready": True}
    assert capfd.readouterr().err == "hello\n" * 2


def test_a_contender_that_cannot_go_on_says_why(monkeypatch):
    def setup():
        raise ValueError("no such model")

    assert served(monkeypatch, setup) == (1, [{"error": "no such model"}])


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ('print(\'{"error": "no such model"}\')', "no such model"),
        ("print('warming up', file=sys.stderr); sys.exit('out of ideas')", "ended with status 1: out of ideas"),
        ("print('{\"ready\": true}', flush=True); os._exit(3)", "ended with status 3"),
        pytest.param(
            "os.kill(os.getpid(), 9)",
            "ended by SIGKILL (was there enough memory?)",
            marks=pytest.mark.skipif(sys.platform == "win32", reason="signals"),
        ),
    ],
)
def test_a_failing_contender_is_named_with_its_reason(code, reason):
    with pytest.raises(BenchError) as failure:
        take_turns([saying("a", code)], rounds=1, pause=0)
    assert str(failure.value) == f"a: {reason}"


@pytest.mark.parametrize("error", [BrokenPipeError, partial(OSError, errno.EINVAL, "as Windows calls it")])
def test_a_contender_that_has_ended_before_its_turn_is_named_with_its_reason(error):
    def write(line):
        raise error()

    process = SimpleNamespace(stdin=SimpleNamespace(write=write), stdout=io.StringIO(), wait=lambda: 3)
    with pytest.raises(BenchError, match="^a: ended with status 3: out of ideas$"):
        turns._Talk("a", process, io.StringIO("out of ideas\n")).ask()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process id is looked up as Unix does")
def test_no_contender_outlives_the_failure_of_another(tmp_path):
    place = tmp_path / "pid"
    first = saying("first", f"open({str(place)!r}, 'w').write(str(os.getpid()))\n{ANSWER}")
    with pytest.raises(BenchError):
        take_turns([first, saying("second", "sys.exit(1)")], rounds=1, pause=0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(place.read_text()), 0)
