"""The command line on what a job left: page, audit, merged models, chat, evaluation; and the other commands."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from commandline import complaint, job, status, written

from minilora.cli import main
from minilora.engine import examples
from minilora.engine.tensor import OPS, Tensor
from minilora.files.tensors import write_tensors
from minilora.models import load as zoo
from minilora.models import with_adapters
from minilora.nn import gradcheck
from minilora.nn.module import sha256_of

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory, quick_jobs):
    """The folder of a finished run. Never written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(job(tiny_folder, "--steps", "2", "--out", folder)) == 0
    return folder


def test_a_dry_run_says_what_a_run_would_take_and_leaves_nothing(tiny_folder, tmp_path, capsys):
    assert main(job(tiny_folder, "--dry-run", "--out", "x")) == 0
    assert "would take" in (page := capsys.readouterr().out) and " for 3 steps of 4 records" in page
    assert written(tmp_path) == []


# -- report, audit, pull -----------------------------------------------------------------------------------------------


def test_memory_of_a_base_that_is_not_there_shows_no_bar(capsys):
    assert status("memory", "--base", "absent") == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("key", ["loss", "options", "base_sha256", "answers", "peak_memory_bytes", "adapter_bytes"])
def test_report_of_a_run_that_lacks_a_key_names_its_file(key, finished, tmp_path, capsys):
    metrics = json.loads((finished / "metrics.json").read_text(encoding="utf-8"))
    wrong = [{key: value} for value in (None, 3, ["a"]) if (key, value) != ("adapter_bytes", 3)]  # which may be 3
    without = {name: value for name, value in metrics.items() if name != key}
    for record in (without, *(metrics | each for each in wrong)):
        (tmp_path / "metrics.json").write_text(json.dumps(record), encoding="utf-8")
        assert status("report", ".") == 1
        assert complaint(capsys).startswith("metrics.json: not the metrics")


@pytest.mark.parametrize("words", [["report"], ["finetune", "--help"]], ids=" ".join)
def test_output_that_nobody_reads_is_no_error(words, finished):
    reading, writing = os.pipe()
    os.close(reading)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    words = [*words, str(finished)] if words == ["report"] else words
    command = [sys.executable, "-m", "minilora", *words]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("flags", [[], ["--base", "tiny"]], ids=" ".join)
@pytest.mark.parametrize(
    "words", [["audit", "absent"], ["merge", "--adapter", "absent"], ["export", "--adapter", "absent"]], ids=" ".join
)
def test_a_missing_adapter_is_status_1_before_a_model_is_looked_for(words, flags, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(with_adapters, "load", None)
    monkeypatch.setattr(zoo, "pull", None)
    out = [] if words[0] == "audit" else ["--out", "a.gguf"]
    assert status(*words, *out, *flags) == 1
    assert "absent" in (line := complaint(capsys)) and "no such file: expected the folder of a PEFT adapter" in line
    assert written(tmp_path) == []


OTHER_BASE = {"audit": [], "merge": ["--out", "m"], "export": ["--out", "a.gguf"]}


@pytest.mark.parametrize("command", OTHER_BASE)
def test_another_base_is_refused_with_both_hashes_and_taken_by_force(command, tiny_folder, finished, tmp_path, capsys):
    model, _ = zoo.load(tiny_folder / "base")
    model.model.norm.weight.data[0] += 1
    other = shutil.copytree(tiny_folder / "base", tmp_path / "other")
    write_tensors(other / "model.safetensors", model.state_dict())
    words = [command, *(["--adapter"] if command != "audit" else []), finished, *OTHER_BASE[command], "--base", other]
    assert status(*words) == 1
    line = complaint(capsys)
    for state in (model, zoo.load(tiny_folder / "base")[0]):
        assert sha256_of(state.state_dict()) in line
    assert "--force" in line and written(tmp_path) == ["other"]
    assert status(*words, "--force") == 0
    assert status(*words[:-2], "--overwrite" if OTHER_BASE[command] else "--force") == 0  # the base that it names


# -- devices and gradients ---------------------------------------------------------------------------------------------


def test_gradcheck_prints_one_line_for_every_registered_operation(capsys):
    assert status("gradcheck", "--seed", "-1") == 2
    assert "--seed must be at least 0, got '-1'" in complaint(capsys)
    assert status("gradcheck", "--seed", "1") == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(OPS)
    assert all(float(line.split()[-1]) < 1e-6 for line in lines)
    assert summary.startswith("all gradients agree") and float(summary.split()[-1]) < 1e-6


def test_gradcheck_finds_a_wrong_gradient_and_names_the_operation(capsys, monkeypatch):
    def square(x):
        return x * Tensor(x.data)  # half of the gradient is missing

    monkeypatch.setattr(examples, "OPS", {"neg": square})
    assert status("gradcheck") == 1
    assert complaint(capsys).startswith("square: ")


def test_gradcheck_of_a_model_checks_all_of_it_and_names_what_is_wrong(tiny_folder, capsys, monkeypatch):
    base = tiny_folder / "base"
    assert status("gradcheck", "--base", base) == 0
    (line,) = capsys.readouterr().out.splitlines()
    state = zoo.load(base)[0].state_dict()
    size = f"{len(state)} parameters with {sum(w.size for w in state.values()):,} elements"
    assert line.startswith(f"{base}: the gradients of {size} agree")
    assert float(line.split()[-1]) < 1e-6
    real = gradcheck.loss_without_grad
    monkeypatch.setattr(gradcheck, "loss_without_grad", lambda *a: 1.001 * real(*a))
    monkeypatch.setattr(gradcheck, "SEARCHED", 2)
    assert status("gradcheck", "--base", base) == 1
    assert "minilora: gradient of model." in capsys.readouterr().err
