"""`finetune` with several processes that it forks itself: the numbers of one process, and ones that die."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import minilora as ml
from minilora.cli import main
from minilora.nn.ranks import Ranks
from minilora.train import job as job_module
from minilora.train import options as module
from minilora.train.job import finetune
from minilora.train.options import Options

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


@pytest.fixture(scope="module")
def job(home):
    """The words of a job, but for --out."""
    training = ["--r", 2, "--steps", 6, "--batch-size", 5, "--lr", 1e-2, "--eval-every", 2, "--save-every", 2]
    return [*map(str, ["finetune", "--base", home / "base", "--data", home / "data.jsonl", *training, "--out"])]


@pytest.fixture(scope="module")
def alone(job, tmp_path_factory):
    """The metrics of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    status, _, err = run(*job, str(folder))
    assert status == 0, err
    return metrics(folder)


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def run(*words, program=("-m", "minilora")):
    """Run a command in a process of its own: status, stdout, stderr."""
    path = os.pathsep.join([str(Path(ml.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *program, *words], env=env, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


@on_linux
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_job_ends_as_that_of_one_process_and_the_first_one_alone_writes(count, job, alone, tmp_path):
    status, out, err = run(*job, str(tmp_path / "run"), "--processes", str(count))
    assert status == 0, err
    found = metrics(tmp_path / "run")
    for name in ("train_loss", "validation_loss"):
        np.testing.assert_allclose(np.array(found[name]), np.array(alone[name]), rtol=1e-5)
    for name, losses in alone["loss"].items():
        np.testing.assert_allclose(found["loss"][name], losses, rtol=1e-5)
    memory = found["peak_memory_bytes"]
    assert found["answers"] == alone["answers"] and found["ranks"] == count
    assert memory["measured"] < memory["of_all_ranks"] < count * 1.5 * memory["measured"]
    (line,) = [" ".join(line.split()) for line in out.splitlines() if line.startswith("processes ")]
    assert line.startswith(f"processes {count}, which hold {memory['of_all_ranks'] / 1e6:.0f} MB at most; each sends ")
    assert out.count("-- LoRA fine-tuning") == 1 and "Traceback" not in err
    assert err.count("loss before") == 2  # 0 % and 100 % of the first one's progress bar
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("method", "share_memory", "shared"), [("lora", True, 70), ("full", True, 30), ("lora", False, 30)]
)
def test_what_processes_share_counts_once_in_what_all_hold(method, share_memory, shared, monkeypatch):
    for name, value in (("base_bytes", 70), ("mapped_bytes", 30)):
        monkeypatch.setattr(job_module, name, lambda model, value=value: value)
    ranks = SimpleNamespace(share_memory=share_memory, sum_here=lambda own: 3 * own)
    job = object.__new__(job_module.Job)
    vars(job).update(ranks=ranks, options=SimpleNamespace(method=method), model=None)
    assert job.shared == shared  # full fine-tuning writes to every weight, so each process gets its own copy
    assert job.of_all_ranks(100) == 3 * (100 - shared) + shared
    assert job.of_all_ranks(shared) == shared


@on_linux
@pytest.mark.parametrize(
    ("signal", "ended", "said", "last"),
    [("SIGKILL", 1, "minilora: another process of this job ended", 2), ("SIGINT", 130, "--resume", 4)],
)
def test_what_was_stopped_goes_on_with_another_number_of_processes(signal, ended, said, last, job, alone, tmp_path):
    doomed = str(Path(__file__).with_name("killed_rank.py"))
    status, out, err = run(*job, str(tmp_path / "run"), "--processes", "2", program=(doomed, "4", signal))
    assert status == ended and said in err and "Traceback" not in err and out.strip() == ""
    assert not (tmp_path / "run").exists()
    state = json.loads((tmp_path / "run.partial" / "checkpoint" / "state.json").read_text(encoding="utf-8"))
    assert state["step"] == last
    assert main([*job, str(tmp_path / "run"), "--resume", "--processes", "1"]) == 0
    np.testing.assert_allclose(metrics(tmp_path / "run")["train_loss"], alone["train_loss"], rtol=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--processes", "2", "--device", "cuda"], "processes are for device 'cpu': leave out one of the two"),
    ],
)
def test_what_several_processes_cannot_do_is_said_in_one_line(words, said, job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module.sys, "platform", "linux")
    assert main([*job, str(tmp_path / "run"), *words]) in (1, 2)
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and [*tmp_path.iterdir()] == []


def test_elsewhere_than_on_linux_and_under_mpiexec_they_are_refused(job, tmp_path, monkeypatch):
    options = Options(data=job[4], base=job[2], out=str(tmp_path / "run"), processes=2)
    ranks = Ranks()
    ranks.size = 2
    with pytest.raises(ValueError, match="mpiexec has started several processes already: leave out processes"):
        finetune(options, ranks=ranks)
    monkeypatch.setattr(module.sys, "platform", "darwin")
    with pytest.raises(ValueError, match="processes are for Linux; elsewhere: mpiexec -n 2 minilora finetune"):
        Options(processes=2)
    assert Options(processes=1).processes == 1
