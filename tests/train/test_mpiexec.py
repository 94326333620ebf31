"""`mpiexec minilora finetune` on this machine: the numbers of one process, and a rank that dies."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(find_spec("mpi4py") is None or MPIEXEC is None, reason="needs mpiexec: pip install '.[mpi]'"),
]
ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # in a container
PROGRAM = [sys.executable, "-m", "minilora"]


def mpiexec(ranks, *words, program=PROGRAM):
    """Run a command by this many ranks, or by none but this: status, stdout, stderr."""
    import minilora

    start = [MPIEXEC, "--oversubscribe", "-n", str(ranks)] if ranks else []
    path = os.pathsep.join([str(Path(minilora.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | ROOT | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
    command = [*start, *program, *map(str, words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def job(home):
    """The words of a job, but for --out."""
    training = ["--r", 2, "--steps", 6, "--batch-size", 5, "--lr", 1e-2, "--eval-every", 2, "--save-every", 2]
    return ["finetune", "--base", home / "base", "--data", home / "data.jsonl", *training, "--out"]


@pytest.fixture(scope="module")
def alone(job, tmp_path_factory):
    """The metrics of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    status, _, err = mpiexec(0, *job, folder)
    assert status == 0, err
    return metrics(folder)


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def same(found, alone):
    np.testing.assert_allclose(found["train_loss"], alone["train_loss"], rtol=1e-5)
    np.testing.assert_allclose(np.array(found["validation_loss"]), np.array(alone["validation_loss"]), rtol=1e-5)
    for name, losses in alone["loss"].items():
        np.testing.assert_allclose(found["loss"][name], losses, rtol=1e-5)
    assert found["answers"] == alone["answers"]


def runs_as_alone(alone, ranks, job, folder, *flags):
    """A job by so many ranks ends as that of one process, and the first rank alone prints."""
    status, out, err = mpiexec(ranks, *job, folder / "run", *flags)
    assert status == 0, err
    found = metrics(folder / "run")
    same(found, alone)
    assert found["ranks"] == ranks
    page = out.splitlines()
    assert sum(line.startswith("-- LoRA fine-tuning") for line in page) == 1
    assert sum(line.split()[:2] == ["processes", f"{ranks};"] for line in page) == 1
    assert "Traceback" not in err and [path.name for path in folder.iterdir()] == ["run"]


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_losses_are_those_of_one_process(ranks, job, alone, tmp_path):
    runs_as_alone(alone, ranks, job, tmp_path)


@pytest.mark.parametrize(
    ("signal", "ended", "said", "last"),
    [pytest.param("SIGKILL", None, "rank 1", 2, marks=pytest.mark.long), ("SIGINT", 130, "--resume", 4)],
)
def test_a_rank_that_dies_and_ctrl_c_end_the_job_which_another_number_of_ranks_goes_on_with(
    signal, ended, said, last, job, alone, tmp_path
):
    doomed = [sys.executable, Path(__file__).with_name("killed_rank.py"), 4, signal]
    status, out, err = mpiexec(2, *job, tmp_path / "run", program=[str(word) for word in doomed])
    assert status != 0 and ended in (None, status) and said in err and "Traceback" not in err and out.strip() == ""
    assert not (tmp_path / "run").exists()
    state = json.loads((tmp_path / "run.partial" / "checkpoint" / "state.json").read_text(encoding="utf-8"))
    assert state["step"] == last
    runs_as_alone(alone, 3, job, tmp_path, "--resume")


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (["--data", "nothing.jsonl"], 1, "minilora: nothing.jsonl: no such data file or folder"),
        pytest.param(["--r", "0"], 2, "minilora: r must be a positive integer, got 0", marks=pytest.mark.long),
        pytest.param(["--nonsense"], 2, "unknown arguments: --nonsense; minilora f", marks=pytest.mark.long),
    ],
)
def test_a_mistake_is_told_once(words, status, line, job, tmp_path):
    command = [*job, tmp_path / "run"]
    if words[0] in command:  # a flag is given once
        place = command.index(words[0])
        del command[place : place + 2]
    found, out, err = mpiexec(2, *command, *words)
    assert found == status and out.strip() == "" and "Traceback" not in err
    assert err.count(line) == 1
    assert list(tmp_path.iterdir()) == []
