"""Trials in processes: order, shares, failures and interruptions; and results that are kept."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trying

from minilora.experiments import trials
from minilora.experiments.trials import run_trials
from minilora.train.loop import TrainingError


def test_results_stand_in_the_order_of_the_trials_and_are_told_as_they_end(tmp_path):
    told, until = [], tmp_path / "the second has ended"

    def done(i, result):
        told.append((i, result["twice"]))
        until.touch()

    found = run_trials(trying.double, [{"x": 1, "until": str(until)}, {"x": 2}, {"x": 3}], 2, done)
    assert [one["twice"] for one in found] == [2, 4, 6]
    assert sorted(told) == [(0, 2), (1, 4), (2, 6)] and told[0] == (1, 4)
    assert os.getpid() not in {one["process"] for one in found}


@pytest.mark.parametrize(("trials", "jobs"), [([{"x": 1}, {"x": 2}], 1), ([{"x": 1}], 4), ([], 4)])
def test_one_job_or_one_trial_is_this_process(trials, jobs):
    found = run_trials(trying.double, trials, jobs)
    assert [one["process"] for one in found] == [os.getpid()] * len(trials)


@pytest.mark.long
@pytest.mark.parametrize(("cores", "share"), [(4, 2), (1, 1)])
def test_each_process_has_its_share_of_the_cores(monkeypatch, cores, share):
    monkeypatch.setattr(trials, "processors", lambda: cores)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    told = run_trials(trying.threads, [{}, {}], 2)
    assert {one["told"] for one in told} == {str(share)}
    assert {one["cores"] for one in told} <= {share, os.cpu_count()}  # the library makes no more than there are
    assert os.environ.get("OPENBLAS_NUM_THREADS") is None and os.environ["OMP_NUM_THREADS"] == "7"


def test_fewer_threads_that_are_asked_for_stay_fewer(monkeypatch):
    monkeypatch.setattr(trials, "processors", lambda: 8)
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", lambda jobs, **how: ThreadPoolExecutor(1))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    assert {one["told"] for one in run_trials(trying.threads, [{}, {}], 2)} == {"1"}


def test_of_a_fault_in_a_function_its_kind_is_told_and_where_it_is_on_request(monkeypatch, capsys):
    found = run_trials(trying.odd, [{"x": 0}, {"x": 1}], 1)
    assert [one["failed"].partition(":")[0] for one in found] == ["KeyError", "TypeError"]
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("MINILORA_TRACEBACK", "1")
    run_trials(trying.odd, [{"x": 0}], 1)
    assert "in odd" in capsys.readouterr().err


@pytest.mark.long
def test_a_process_that_ends_is_a_failed_trial_and_no_other_is_lost():
    found = run_trials(trying.ended, [{"x": x} for x in range(4)], 2)
    assert [one.get("x") for one in found] == [0, None, 2, 3] and "its process ended" in found[1]["failed"]
    assert found[1]["again"] is True


INTERRUPTED = """
import sys, trying
from minilora.experiments.trials import run_trials
if __name__ == "__main__":
    trials = [dict(folder=sys.argv[1], number=number) for number in (0, 1, 1, 1)]
    run_trials(trying.endless, trials, 2, lambda i, result: print("done", i, flush=True))
"""


def gone(process):
    """Whether a process ends, within a while."""
    for _ in range(200):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{process}/stat").is_file() and ") Z " in Path(f"/proc/{process}/stat").read_text():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="signals of another kind")
@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(9, id="SIGKILL")])
def test_an_interruption_ends_all_processes_and_what_is_done_was_told(tmp_path, sent):
    script, work = tmp_path / "script.py", tmp_path / "work"
    script.write_text(INTERRUPTED)
    work.mkdir()
    paths = os.pathsep.join([str(Path(trying.__file__).parent), str(Path(trials.__file__).parents[2])])
    with subprocess.Popen(
        [sys.executable, script, work],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == "done 0\n"
        while len(list(work.iterdir())) < 2:
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
    assert out == "" and process.returncode != 0
    assert err.count("Traceback") == (1 if sent == signal.SIGINT else 0)  # the script's own KeyboardInterrupt
    assert all(gone(int(path.name)) for path in work.iterdir())


# -- results that are kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.long)])
def test_what_was_found_is_found_again_but_not_a_failure_after_which_the_others_go_on(jobs, tmp_path):
    calls = tmp_path / "calls"
    calls.mkdir()
    settings = [{"x": x, "folder": str(calls)} for x in (-1, 2, 3)]
    first = run_trials(trying.counted, settings, jobs, folder=tmp_path / "c")
    assert first == [{"failed": "x must be at least 0"}, {"x": 2, "both": [2, 2]}, {"x": 3, "both": [3, 3]}]
    told = []
    assert run_trials(trying.counted, settings, jobs, lambda *one: told.append(one), tmp_path / "c") == first
    assert sorted(told) == list(enumerate(first))
    assert len(list(calls.iterdir())) == 4  # the failed one again
    run_trials(trying.counted, [{"x": 4, "folder": str(calls)}], folder=tmp_path / "c")
    assert len(list(calls.iterdir())) == 5


def test_other_code_or_another_function_is_another_trial(tmp_path, monkeypatch):
    def trial(code, function):
        monkeypatch.setattr(trials, "code_sha256", lambda file: code)
        return run_trials(function, [{"x": 1}], folder=tmp_path)[0]

    first = trial("one", trying.double)
    assert trial("one", trying.double) == first and len(list(tmp_path.iterdir())) == 1
    trial("other", trying.double)
    trial("one", trying.same)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("kind", [ValueError, OSError, RuntimeError, TrainingError])
def test_an_error_for_people_is_told_without_its_kind(kind):
    def trial():
        raise kind("so it\nis")

    assert [one["failed"] for one in run_trials(trial, [{}], 1)] == ["so it is"]
