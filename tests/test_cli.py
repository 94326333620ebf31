"""The command line: what it prints and writes, its exit status, and that every mistake is answered in one line."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from modelfiles import TERMS

from minilora import __version__
from minilora.cli import main
from minilora.engine.tensor import OPS, Tensor
from minilora.insight import opcheck
from minilora.io import zoo
from minilora.lora.formats import load_adapter
from minilora.nn.llama import Llama
from minilora.nn.tensorfile import read_tensors
from minilora.train import generate as talk
from minilora.train.data import DataError

COMMANDS = ["finetune", "chat", "audit", "report", "pull", "gradcheck"]
LONG = "x" * 1200  # more tokens than the small model can see


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MINILORA_TRACEBACK", raising=False)


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """The folder of a run that has learned its few answers. Never written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(job(tiny_folder, "--steps", "40", "--lr", "0.05", "--r", "8", "--out", folder)) == 0
    return folder


def job(home, *flags):
    """The arguments of a quick finetune; a flag given again takes the place of the one here."""
    usual = ["--base", home / "base", "--data", home / "data.jsonl", "--r", 4, "--steps", 3, "--batch-size", 4]
    return [str(word) for word in ["finetune", *usual, *flags]]


def status(*words):
    """The exit status of a command, also where argparse ends the program itself."""
    try:
        return main([str(word) for word in words])
    except SystemExit as end:
        return end.code


def complaint(capsys):
    """The one line on stderr that says what went wrong; nothing else may be there, and nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("minilora: ") and err.endswith("\n") and err.count("\n") == 1
    return err.removeprefix("minilora: ").strip()


def last_line(capsys):
    """The last line on stderr, after progress bars."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.splitlines()[-1]


def written(folder):
    return sorted(path.name for path in folder.iterdir())


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_help_names_every_command(capsys):
    assert status("--help") == 0
    out = capsys.readouterr().out
    assert [name for name in COMMANDS if f"    {name} " not in out] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert status(command, "--help") == 0
    assert f"usage: minilora {command}" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys):
    assert status("--version") == 0
    assert capsys.readouterr().out == f"minilora {__version__}\n"


REFUSED_BY_PARSER = [[], ["nonsense"], ["finetune", "--nonsense"], ["finetune", "--r", "many"], ["report", "a", "b"],
                     ["finetune", "--method", "magic"], ["chat", "--device", "tpu"], ["finetune", "--target-modules"]]  # fmt: skip


@pytest.mark.parametrize("words", REFUSED_BY_PARSER, ids=" ".join)
def test_arguments_that_do_not_parse_are_status_2_with_the_usage(words, capsys):
    assert status(*words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: minilora") and "error: " in err.splitlines()[-1]


REFUSED = [  # command, flag, value, the name that the message begins with
    ("finetune", "--r", "0", "r must"),
    ("finetune", "--r", "-1", "r must"),
    ("finetune", "--lora-alpha", "0", "lora_alpha"),
    ("finetune", "--lora-alpha", "nan", "lora_alpha"),
    ("finetune", "--lr", "0", "lr must"),
    ("finetune", "--lr", "-1e-3", "lr must"),
    ("finetune", "--lr", "inf", "lr must"),
    ("finetune", "--epochs", "0", "epochs must"),
    ("finetune", "--epochs", "nan", "epochs must"),
    ("finetune", "--steps", "0", "steps must"),
    ("finetune", "--batch-size", "0", "batch_size must"),
    ("finetune", "--eval-records", "0", "eval_records must"),
    ("finetune", "--max-length", "7", "max_length must"),
    ("finetune", "--seed", "-1", "seed must"),
    ("chat", "--max-new-tokens", "0", "--max-new-tokens must"),
    ("chat", "--temperature", "-1", "--temperature must"),
    ("chat", "--temperature", "nan", "--temperature must"),
    ("chat", "--seed", "-1", "--seed must"),
]


@pytest.mark.parametrize(("command", "flag", "value", "start"), REFUSED)
def test_values_that_mean_nothing_are_status_2_before_a_model_is_loaded(
    command, flag, value, start, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(zoo, "load", None)
    assert status(command, f"{flag}={value}") == 2
    line = complaint(capsys)
    assert line.startswith(start) and value.removeprefix("-").split("e")[0] in line
    assert written(tmp_path) == []


# -- finetune: what cannot work ----------------------------------------------------------------------------------------

FAILS = [  # flags, what the line says
    (["--data", "absent.jsonl"], "absent.jsonl: no such data file"),
    (["--data", "."], ".: no such data file"),
    (["--data", "empty.jsonl"], "empty.jsonl: the file is empty"),
    (["--data", "binary.jsonl"], "binary.jsonl: cannot be read as UTF-8 text"),
    (["--data", "untrained.jsonl"], "no record is left to train on"),
    (["--data", "long.jsonl"], "long.jsonl: record x/0: a question of 1228 tokens and an answer of 64 are more than"),
    (["--data", "wordy.jsonl", "--max-length", "4096"], "a record has 1246 tokens, the model can see 1024"),
    (["--max-length", "8"], "nothing is left to train on within --max-length 8"),
    (["--base", "absent"], "absent: no such model"),
    (["--base", "absent.gguf"], "absent.gguf"),
    (["--target-modules", "q_proj", "v_prj"], "'v_prj' matches no module; there are: q_proj, k_proj, v_proj"),
    (["--target-modules", "lm_head"], "lm_head shares its matrix"),
    (["--r", "33"], "r=33 is larger than model.layers.0.self_attn.q_proj (32 x 32)"),
    (["--out", "empty.jsonl"], "empty.jsonl: cannot write results there"),
    (["--out", "empty.jsonl/run"], "empty.jsonl/run: cannot write results there"),
    (["--device", "cuda"], "pip install 'minilora[gpu]'"),
]


@pytest.mark.parametrize(("flags", "reason"), FAILS, ids=[" ".join(flags) for flags, _ in FAILS])
def test_a_job_that_cannot_work_is_status_1_in_one_line_and_writes_nothing(
    flags, reason, tiny_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if it were not installed
    texts = {"empty": [], "untrained": [TERMS[11]], "long": [TERMS[0] | {"paraphrase": LONG}, *TERMS[1:]],
             "wordy": [TERMS[0] | {"answer": LONG}, *TERMS[1:]]}  # fmt: skip
    for name, records in texts.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    before = written(tmp_path)
    told = ["--max-length", "2048"] if "long.jsonl" in flags else []  # else the answer is cut, which is told as well
    if told:
        reason = "a record has "
    assert status(*job(tiny_folder, "--out", "run", *flags)) == 1
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert line.startswith("minilora: ") and reason in line
    assert out == "" and written(tmp_path) == before
