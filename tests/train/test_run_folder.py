"""A run's folder is one unit: it appears whole or not at all, and nothing that stands there is lost unasked."""

import errno
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from commandline import written
from helpers.refusals import refused
from jobs import options, trained

from minilora.files import disk
from minilora.train import job, run_folder
from minilora.train.job import finetune
from minilora.train.run_folder import RunFolder


def tree(folder):
    """Everything in a folder, hidden entries too: contents by relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def run(tmp_path):
    """The place of a finished run, runs/x."""
    with RunFolder(tmp_path / "runs" / "x") as place:
        (place.partial / "adapter_model.safetensors").write_text("old")
        place.finish()
    return tmp_path / "runs" / "x"


def fill(place, text="new"):
    (place.partial / "adapter_model.safetensors").write_text(text)
    (place.partial / "metrics.json").write_text(text)


def test_until_it_is_finished_the_old_run_stands_whole_and_then_the_new_one(run):
    with RunFolder(run, overwrite=True) as place:
        fill(place)
        assert tree(run) == {"adapter_model.safetensors": b"old"}
        assert place.partial == run.with_name("x.partial")
        place.finish()
    assert tree(run) == {"adapter_model.safetensors": b"new", "metrics.json": b"new"}
    assert os.listdir(run.parent) == ["x"]


def test_a_finished_run_is_not_replaced_unasked(run):
    for call in (RunFolder(run).refuse, RunFolder(run).__enter__):
        refused(call, run, "finished run", "--overwrite", "--out")
    refused(RunFolder(run, resume=True).refuse, run, f"--adapter {run}", "--overwrite", "--out")
    assert tree(run.parent) == {"x": None, "x/adapter_model.safetensors": b"old"}


def test_below_a_file_no_folder_of_results_can_be_made(run):
    out = run / "adapter_model.safetensors" / "x"
    refused(RunFolder(out).__enter__, out, "cannot be written", "--out")
    assert tree(run) == {"adapter_model.safetensors": b"old"}


def test_an_unfinished_run_that_cannot_be_removed_is_named(run, monkeypatch):
    left = run.with_name("y.partial")
    left.mkdir()
    monkeypatch.setattr(run_folder, "remove_folder", lambda folder: None)  # another user's
    refused(RunFolder(run.with_name("y"), overwrite=True).__enter__, left, "cannot be removed", "--out")
    assert left.is_dir() and os.listdir(run.parent).count(".y.lock") == 0


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_things_in_it_is_never_replaced(overwrite, run):
    (run / "notes.txt").write_text("mine")
    refused(RunFolder(run, overwrite).refuse, run, "notes.txt", "--out")


def test_what_a_file_manager_left_in_a_folder_keeps_no_run_out_of_it(run):
    (run / ".DS_Store").write_text("")
    RunFolder(run, overwrite=True).refuse()
    (run / "adapter_model.safetensors").unlink()
    RunFolder(run).refuse()


@pytest.mark.parametrize("out", [".", "..", "../here", "../../"])
def test_the_folder_one_is_in_is_never_replaced(out, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(RunFolder(Path(out), overwrite=True).refuse, Path(out), "folder you are in", "--out")


@pytest.mark.skipif(os.name == "nt", reason="Windows lets only some users make links")
def test_of_a_link_the_folder_is_replaced_and_the_link_stays(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    with RunFolder(tmp_path / "link", overwrite=True) as place:
        assert place.partial == run.with_name("x.partial")  # on the disk of the folder, not of the link
        fill(place)
        place.finish()
    assert (tmp_path / "link").is_symlink() and len(tree(run)) == 2 and os.listdir(run.parent) == ["x"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("where", ["", "checkpoint"])
def test_what_was_learned_stays_aside_and_is_named_when_the_job_ends_early(error, where, run, said):
    with pytest.raises(error), RunFolder(run, True) as place:
        place.began = True
        (place.partial / where).mkdir(exist_ok=True)
        (place.partial / where / "adapter_model.safetensors").write_text("half")
        if where:
            (place.partial / where / "state.json").write_text("{}")
        raise error
    kept = place.partial / where
    assert said() == [
        f"the trained weights are in {kept}; talk to the model with: minilora chat --adapter {kept}",
        *([f"resume with: minilora finetune --resume --overwrite --out {run}"] if where else []),
    ]
    assert tree(run) == {"adapter_model.safetensors": b"old"} and sorted(os.listdir(run.parent)) == ["x", "x.partial"]


def test_the_commands_that_are_named_can_be_copied_whatever_the_folder_is_called(tmp_path, said):
    with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path / "my run") as place:
        place.began = True
        (place.partial / "checkpoint").mkdir()
        for name in ("adapter_model.safetensors", "state.json"):
            (place.partial / "checkpoint" / name).touch()
        raise KeyboardInterrupt
    chat, resume = (shlex.split(line.partition("with: ")[2]) for line in said())
    assert chat == ["minilora", "chat", "--adapter", str(place.partial / "checkpoint")]
    assert resume == ["minilora", "finetune", "--resume", "--out", str(tmp_path / "my run")]


def test_where_nothing_was_learned_nothing_stays(tmp_path, said):
    with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path / "a" / "b" / "x") as place:
        (place.partial / "log.csv").write_text("step")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [] and said() == []


def save_state(place):
    (place.partial / "checkpoint").mkdir()
    (place.partial / "checkpoint" / "state.json").write_text("{}")


@pytest.fixture
def interrupted(tmp_path):
    with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path / "x") as place:
        fill(place, "half")
        save_state(place)
        raise KeyboardInterrupt
    return tmp_path / "x"


@pytest.mark.parametrize("fails", ["_flush", "_flush_entries"])
def test_a_run_can_be_resumed_until_it_is_finished_and_then_its_checkpoint_is_gone(fails, run, monkeypatch):
    def full(*paths):
        raise OSError(errno.ENOSPC, "the disk is full")

    with pytest.raises(OSError), RunFolder(run, overwrite=True) as place:
        fill(place)
        save_state(place)
        with monkeypatch.context() as patch:
            patch.setattr(disk, fails, full)
            place.finish()
    assert tree(run) == {"adapter_model.safetensors": b"old"}
    with RunFolder(run, overwrite=True, resume=True) as place:
        assert (place.partial / "checkpoint" / "state.json").is_file()
        place.finish()
    assert tree(run) == {"adapter_model.safetensors": b"new", "metrics.json": b"new"}


def test_a_job_that_was_killed_just_after_it_finished_is_no_obstacle(run):
    (run / "checkpoint").mkdir()
    RunFolder(run, overwrite=True).refuse()


def test_what_an_interrupted_run_learned_is_not_forgotten_unasked(interrupted):
    refused(RunFolder(interrupted).refuse, "x.partial", "--resume", "--overwrite")
    with RunFolder(interrupted, overwrite=True) as place:
        assert list(place.partial.iterdir()) == []


@pytest.mark.parametrize(("file", "flag"), [("adapter_model.safetensors", "adapter"), ("model.safetensors", "base")])
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_without_a_checkpoint_is_not_said_to_be_resumable(interrupted, file, flag, resume):
    partial = interrupted.with_name("x.partial")
    (partial / "checkpoint" / "state.json").unlink()
    (partial / "adapter_model.safetensors").replace(partial / file)
    before = tree(partial)
    call = RunFolder(interrupted, resume=resume).__enter__
    assert "--resume" not in refused(call, "cannot be resumed", f"--{flag} {partial}", "--out", "--overwrite")
    assert tree(partial) == before


def test_what_a_killed_job_was_writing_is_removed_and_the_rest_is_not(interrupted):
    partial = interrupted.with_name("x.partial")
    for name in (".metrics.json.12345678.partial", ".checkpoint.12345678.partial/state.json"):
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_text("half")
    with RunFolder(interrupted, resume=True) as place:
        left = {"adapter_model.safetensors", "metrics.json", "checkpoint", "checkpoint/state.json"}
        assert set(tree(place.partial)) == left


def test_a_second_job_is_refused_and_the_first_is_not_disturbed(tmp_path):
    code = (
        "import pathlib, sys; from minilora.train.run_folder import RunFolder\n"
        "with RunFolder(pathlib.Path(sys.argv[1])): print('here', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "here\n"
        refused(RunFolder(tmp_path / "x", overwrite=True).__enter__, tmp_path / "x", "another job", "--out")
        assert (tmp_path / "x.partial").is_dir()
        first.stdin.close()  # it ends
        assert first.wait(60) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_a_job_that_was_killed_is_no_obstacle(tmp_path):
    code = (
        "import os, sys, pathlib; from minilora.train.run_folder import RunFolder\n"
        "with RunFolder(pathlib.Path(sys.argv[1])): os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=False, timeout=60)
    assert done.returncode == 9 and (tmp_path / "x.partial").is_dir()
    with RunFolder(tmp_path / "x") as place:
        fill(place)
        place.finish()
    assert os.listdir(tmp_path) == ["x"]


def test_a_job_killed_between_the_two_renames_leaves_the_old_run_to_be_put_back(run, monkeypatch):
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) > 1:
            raise KeyboardInterrupt
        real(source, target)

    with pytest.raises(KeyboardInterrupt), RunFolder(run, overwrite=True) as place:
        fill(place)
        monkeypatch.setattr(disk, "put_back", lambda path: None)  # no time for it
        monkeypatch.setattr(os, "replace", replace)
        place.finish()
    monkeypatch.undo()
    assert not run.exists() and len(os.listdir(run.parent)) == 2
    with RunFolder(run, overwrite=True):
        assert tree(run) == {"adapter_model.safetensors": b"old"}


# -- the job -----------------------------------------------------------------------------------------------------------


def test_a_finished_run_holds_only_files_that_overwriting_knows_and_is_refused_before_a_base_is_loaded(
    home, tmp_path, monkeypatch
):
    chosen = options(home, tmp_path / "run", method="full", steps=1, eval_records=1)
    finetune(chosen)
    trained(replace(chosen, method="lora", strength=1.0, overwrite=True))  # nothing of the model stays
    assert {"metrics.json", "adapter_model.safetensors"} < set(written(tmp_path / "run"))
    assert not {"model.safetensors", "picture.png"} & set(written(tmp_path / "run"))
    monkeypatch.setattr(job, "load", None)
    with pytest.raises(ValueError, match="holds a finished run"):
        trained(chosen)
    assert os.listdir(tmp_path) == ["run"]
