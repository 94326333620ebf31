"""The command line: what it prints and writes, its exit status, and that every mistake is answered in one line."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import pytest
from commandline import LONG, complaint, instead, job, status, written
from modelfiles import TERMS

from minilora import __version__, commands
from minilora.cli import build_parser, main
from minilora.commands import NAMES
from minilora.data.rows import DataError
from minilora.files.tensors import read_tensors
from minilora.models import load as zoo
from minilora.nn import step
from minilora.options import ELSEWHERE
from minilora.progress import show_progress
from minilora.train import job as finetune

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_help_names_every_command(capsys):
    assert status("--help") == 0
    out = capsys.readouterr().out
    assert [name for name in NAMES if f"\n    {name} " not in out and f"\n    {name}\n" not in out] == []


def test_every_file_that_is_a_command_is_one():
    files = Path(commands.__file__).parent.glob("*.py")
    found = {path.stem for path in files if "\nHELP = " in path.read_text("utf-8")}
    assert (odd := found ^ {*NAMES}) == set(), f"{odd}: NAMES in minilora/commands/__init__.py and the files differ"


def test_the_version_is_the_packages(capsys):
    assert status("--version") == 0
    assert capsys.readouterr().out == f"minilora {__version__}\n"
    assert not show_progress(False)  # a program that calls main is as silent as before


def test_python_that_a_command_starts_runs_no_file_of_the_folder_one_is_in(monkeypatch, tmp_path):
    Path("this.py").write_text("print('anybody')")

    def ran(first):
        monkeypatch.setenv("PYTHONSAFEPATH", "")  # is restored afterwards
        monkeypatch.setattr(sys, "path", [first, *sys.path])
        with pytest.raises(SystemExit):
            main()
        return subprocess.run([sys.executable, "-m", "this"], capture_output=True, text=True).stdout

    monkeypatch.setattr(sys, "argv", ["minilora", "--version"])
    assert "anybody" not in ran(str(tmp_path / "bin"))
    assert "anybody" in ran(os.getcwd())  # as `python -m minilora` does: this process imports from there itself


REFUSED = [  # words, how the one line begins
    ("", "which command? Start with: minilora finetune; "),
    ("nonsense", "there is no command 'nonsense'; minilora --help lists all commands"),
    ("fintune --r 8", "there is no command 'fintune' (did you mean finetune?); "),
    ("fuse --adapter x", "there is no command 'fuse' (did you mean merge?); "),
    ("finetune --nonsense", "unknown arguments: --nonsense; minilora finetune --help lists all flags"),
    ("report a b", "unknown arguments: b; minilora report --help lists all flags"),
    ("finetune --data legal --rank 4", "unknown arguments: --rank 4 (did you mean --r?); "),
    ("finetune --data a --data b", "--data is given twice: give it once; "),
    ("chat --prompt a --adapter x --prompt=b", "--prompt is given twice: give it once; "),
    (
        "finetune --dry-run --resume",
        "--resume means nothing with --dry-run, which takes the first steps: leave out one ",
    ),
    ("finetune --r many", "--r: expected a whole number, got 'many'; "),
    ("finetune --r=0", "r must be a positive integer, got 0"),
    ("finetune --lora-alpha nan", "lora_alpha"),
    ("finetune --method magic", "--method must be one of lora, full, got 'magic'; "),
    ("finetune --lr=-1e-3", "--lr must be a number above 0, got '-1e-3'; "),
    ("finetune --quantized nf3", "--quantized must be one of true, false, nf4, "),
    ("chat --temperature=-1", "temperature must"),
    ("eval --limit 0", "--limit must"),
    ("finetune --method full --quantized", "--quantized means nothing with --method full"),
    ("finetune --steps 3 --epochs 1", "--epochs means nothing with --steps 3"),
    ("memory --method full --r 4", "--r means nothing with --method full"),
    ("report --memory --batch-size 4", "minilora report has no --memory: use minilora memory"),
    ("audit --adapter runs/legal", "minilora audit has no --adapter: give the folder without a flag"),
    ("audit base=runs/legal", "base=runs/legal: 'base' is the model without an adapter"),
    ("merge --adapter a --adapter b --out c", "one adapter at a time: a, b are 2"),
    ("export --adapter =a --out c.gguf", "=a: expected an adapter as DIR or NAME=DIR"),
]


@pytest.mark.parametrize(("words", "start"), REFUSED, ids=[words for words, _ in REFUSED])
def test_arguments_that_mean_nothing_are_status_2_in_one_line_before_a_model_is_loaded(
    words, start, capsys, monkeypatch, tmp_path
):
    for module in (zoo, finetune):
        monkeypatch.setattr(module, "load", None)
    assert status(*words.split()) == 2
    assert complaint(capsys).startswith(start) and written(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "meant"),
    [("finetune my.csv", "data"), ("chat mine", "adapter"), ("finetune mine", "adapter"), ("eval texts", "data")],
)
def test_a_file_or_folder_without_its_flag_is_answered_with_the_flag(words, meant, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my.csv", "mine/adapter_config.json", "texts/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert status(*words.split()) == 2
    path = words.split()[1]
    assert complaint(capsys).startswith(f"unknown arguments: {path} (did you mean --{meant} {path}?); ")


def all_options():
    """The fields that are flags, of all commands."""
    found = [each for name in NAMES for each in vars(import_module(f"minilora.commands.{name}")).values()]
    return [item for each in filter(is_dataclass, found) for item in fields(each) if "help" in item.metadata]


def test_every_command_and_every_flag_has_a_help_text_without_a_full_stop():
    (commands,) = (action.choices for action in build_parser()._actions if action.choices)
    texts = {(name, each.dest): each.help for name, one in commands.items() for each in one._actions}
    texts |= {(name, "HELP"): import_module(f"minilora.commands.{name}").HELP for name in NAMES}
    assert [place for place, text in texts.items() if not text or text.endswith(".")] == []


def test_every_option_is_read_somewhere():
    files = Path(commands.__file__).parents[1].rglob("*.py")
    read = {word for path in files for word in re.findall(r"(?<=\w\.)\w+|(?<=\[\")\w+(?=\"])", path.read_text("utf-8"))}
    assert {item.name for item in all_options()} - read == set(), "options without effect"


OF_PIP, OF_OTHERS = {"--upgrade", "--no-deps", "--quiet", "--dest"}, {"--version", "--directory", "--variant"}
OF_LLAMA_CPP = {"--jinja", "--chat-template-file", "--grammar", "--json-schema", "--temp"}


def test_every_command_and_every_flag_that_a_text_of_ours_names_exists():
    (commands,) = (action.choices for action in build_parser()._actions if action.choices)
    known = {flag for one in commands.values() for each in one._actions for flag in each.option_strings}
    known |= {*ELSEWHERE, *OF_PIP, *OF_OTHERS, *OF_LLAMA_CPP}
    root, unknown = Path(__file__).parents[1], set()
    for path in (*root.glob("minilora/**/*.py"), *root.glob("minilora/**/*.jinja"), root / "README.md"):
        text = path.read_text("utf-8")
        named = re.findall(r"`minilora ([a-z]+)|\bminilora ([a-z]+)(?= --)", text)
        flags = re.findall(r"(?<![\w-])--[a-z][a-z\d-]+", text) if path.name not in ("lab.py", "card.md.jinja") else []
        unknown |= {(path.name, word) for pair in named for word in pair if word and word not in NAMES}
        unknown |= {(path.name, flag) for flag in flags if flag not in known}
    assert unknown == set()


LIMITS = {"seed": (0, None), "queue": (0, None), "price": (0, None), "weight_decay": (0, None), "port": (0, 65535),
          "warmup": (0, 1), "length": (2, None), "context_length": (2, None), "max_length": (8, None)}  # fmt: skip


def test_a_count_is_at_least_1_a_measure_above_0_a_share_at_most_1_as_well_and_other_limits_are_those_named_here():
    items = all_options()
    for item in (item for item in items if item.metadata.keys() & {"least", "most", "above"}):
        limits = tuple(item.metadata.get(name) for name in ("least", "most", "above"))
        usual = {(1, None, None), (None, None, 0), (None, 1, 0)}
        assert limits in ({(*LIMITS[item.name], None)} if item.name in LIMITS else usual), item.name
    assert LIMITS.keys() <= {item.name for item in items}


def test_a_flag_that_takes_several_values_may_be_given_again():
    (commands,) = (action.choices for action in build_parser()._actions if action.choices)
    several = [each for one in commands.values() for each in one._actions if each.option_strings and each.nargs == "+"]
    assert several and {type(each).__name__ for each in several} == {"_ExtendAction"}


def test_what_other_programs_call_a_flag_is_answered_by_every_command_that_has_it(capsys):
    (commands,) = (action.choices for action in build_parser()._actions if action.choices)
    known = {name: {flag for each in one._actions for flag in each.option_strings} for name, one in commands.items()}
    asked = [(name, word, meant) for name in known for word, meant in ELSEWHERE.items() if meant in known[name]]
    assert {meant for _, _, meant in asked} == set(ELSEWHERE.values())
    assert not any(flags & ELSEWHERE.keys() for flags in known.values())
    first = {word: name for name, word, _ in reversed(asked)}
    for name, word, meant in asked:
        with_underscores = f"--{word[2:].replace('-', '_')}"  # as in Hugging Face's scripts
        for spelled in {word, with_underscores} if name == first[word] else {word}:
            assert status(name, spelled, "8") == 2
            assert f"(did you mean {meant}" in complaint(capsys)


# -- finetune: what cannot work ----------------------------------------------------------------------------------------

FAILS = [  # flags, what the line says
    (["--data", "absent.jsonl"], "absent.jsonl: no such data file"),
    (["--data", "legl"], "legl: no such data file or folder (did you mean legal?); "),
    (["--data", "long.jsonl"], "long.jsonl: record x/0: a question of 1219 tokens and an answer of 64"),
    (["--data", "wordy.jsonl", "--max-length", "4096"], "the model can see 1024: use --max-length 1024"),
    (["--max-length", "8"], "nothing is left to train on within --max-length 8"),
    (["--base", "tny"], "tny: no such model (did you mean tiny?); use tiny, "),
    (["--target-modules", "q_proj", "v_prj"], "target 'v_prj' matches no module"),
    (["--r", "33"], "r=33 is too large for model.layers.0.self_attn.q_proj (32 x 32)"),
    (["--out", "wordy.jsonl"], "wordy.jsonl: results cannot be written there (it is a file)"),
    (["--out", "wordy.jsonl/run"], "wordy.jsonl/run: results cannot be written there"),
    (["--device", "cuda"], "pip install 'minilora[gpu]'"),
    (["--resume"], "run.partial: there is no checkpoint to resume; give the --out of the run that was interrupted"),
]


@pytest.mark.parametrize(("flags", "reason"), FAILS, ids=[" ".join(flags) for flags, _ in FAILS])
def test_a_job_that_cannot_work_is_status_1_in_one_line_and_writes_nothing(
    flags, reason, tiny_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if it were not installed
    texts = {"long": [TERMS[0] | {"paraphrase": LONG}, *TERMS[1:]], "wordy": [TERMS[0] | {"answer": LONG}, *TERMS[1:]]}
    for name, records in texts.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    before = written(tmp_path)
    assert status(*job(tiny_folder, *instead({"--out": "run"}, *flags))) == 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[-1].startswith("minilora: ") and reason in lines[-1]
    assert all("truncated" in line for line in lines[:-1])
    assert out == "" and written(tmp_path) == before


# -- finetune: what works, and what breaks on the way ------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "folder", "weights"),
    [
        ("lora", "runs/data-base", "adapter_model.safetensors"),
        pytest.param("full", "runs/data-base-full", "model.safetensors", marks=pytest.mark.long),
    ],
)
def test_a_finished_job_writes_its_results_and_the_command_on_its_page_works(
    method, folder, weights, tiny_folder, tmp_path, capsys
):
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    assert status(*job(tiny_folder, "--base", "base", "--data", "data.jsonl", "--method", method)) == 0
    out, err = capsys.readouterr()
    results = tmp_path / folder
    assert {weights, "metrics.json", "picture.png", "README.md"} <= set(written(results))
    assert not [name for name in written(results) if "partial" in name or "writable" in name]
    assert (results / "picture.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((results / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["steps"] == len(metrics["train_loss"]) == 3
    assert (
        f"{'LoRA' if method == 'lora' else method} fine-tuning of base on data.jsonl" in out
        and "what it learned" in out
    )
    assert "training" in err and "Traceback" not in err
    assert status("report", folder) == 0 and capsys.readouterr().out == out
    assert status("chat", *out.split("minilora chat")[1].split(), "--prompt", "What is 1?") == 0


def break_at_the_third_step(monkeypatch, how):
    """how: is given the loss of that training step and returns another, or raises."""
    steps, real = [], step.add_gradients

    def loss_and_grad(*inputs):
        loss = real(*inputs)
        steps.append(loss)
        return how(loss) if len(steps) == 3 else loss

    monkeypatch.setattr(step, "add_gradients", loss_and_grad)


@pytest.mark.usefixtures("unmeasured")
def test_a_job_that_breaks_in_training_says_why_and_keeps_its_adapter(tiny_folder, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        break_at_the_third_step(patch, lambda loss: loss * float("nan"))
        assert status(*job(tiny_folder, "--steps", 5, "--lr", "0.01", "--out", "run")) == 1
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert [line for line in err.splitlines() if line and "|" not in line][-3:-1] == [
        "stopped after 2 of 5 steps",
        "the trained weights are in run.partial; talk to the model with: minilora chat --adapter run.partial",
    ]
    reason = "minilora: the loss became nan at step 3 of 5: try a lower learning rate"
    assert err.splitlines()[-1].startswith(reason) and written(tmp_path) == ["run.partial"]
    tensors = read_tensors(tmp_path / "run.partial" / "adapter_model.safetensors")
    assert all(w.any() for w in tensors.values())
    words = ["chat", "--base", tiny_folder / "base", "--adapter", "run.partial", "--prompt", "What is 1?"]
    assert status(*words, "--max-new-tokens", 2) == 0


@pytest.mark.usefixtures("unmeasured")
def test_a_run_goes_on_with_what_it_was_told_when_it_began(tiny_folder, tmp_path, capsys, monkeypatch):
    def interrupt(loss):
        signal.raise_signal(signal.SIGINT)
        return loss

    told = ["--steps", 5, "--lr", "0.01", "--lora-dropout", "0.1", "--r", 2]
    with monkeypatch.context() as patch:
        break_at_the_third_step(patch, interrupt)
        assert status(*job(tiny_folder, *told, "--out", "run")) == 130
    line, last = capsys.readouterr().err.splitlines()[-3], "resume with: minilora finetune --resume --out run"
    assert line == last
    assert status("finetune", "--resume", "--out", "run", "--r", 3, "--seed", 4) == 1
    assert complaint(capsys).startswith("the run in run was started with other settings: r 2, now 3; seed 0, now 4; ")
    assert status(*job(tiny_folder, *told, "--out", "run")) == 1
    assert complaint(capsys).startswith("run.partial holds the weights of an interrupted run: --resume continues it")
    assert status("finetune", "--resume", "--out", "run") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    options = {name: metrics["options"][name] for name in ("steps", "lr", "lora_dropout", "r", "batch_size")}
    assert options == dict(steps=5, lr=0.01, lora_dropout=0.1, r=2, batch_size=4)
    assert metrics["steps"] == 5 and written(tmp_path) == ["run"]


def test_what_the_encoding_of_the_output_lacks_is_escaped(tmp_path, monkeypatch):
    rows = [{"question": f"\u00bfQu\u00e9 {i}?", "answer": f"{i}"} for i in range(3)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for flags, there in (([], b"\\xbfQu\\xe9 0?"), (["--json"], b"\\u00bfQu\\u00e9 0?")):
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # as a pipe may be
        monkeypatch.setattr("sys.stdout", out)
        assert main(["data", "own.jsonl", "--base", "tiny", *flags]) == 0
        assert there in out.buffer.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full: Linux")
def test_output_that_cannot_be_written_is_called_by_its_name(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        job = [sys.executable, "-m", "minilora", "data", "legal"]
        done = subprocess.run(job, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "minilora: standard output: No space left on device\n")


def test_a_toy_is_called_a_toy(tmp_path, capsys):
    assert status("finetune", "--base", "tiny", "--data", "absent.jsonl") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("tiny is a toy model") and "absent.jsonl: no such data file" in lines[-1]


def test_where_bfloat16_would_be_faster_a_large_base_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetune.bfloat16, "hint", lambda: "faster: --bf16")
    words = ["finetune", "--base", "tiny", "--data", "absent.jsonl"]
    for large, flags, told in ((0, [], True), (1e9, [], False), (0, ["--method", "full"], False)):
        monkeypatch.setattr(finetune, "LARGE", large)
        assert status(*words, *flags) == 1
        assert ("faster: --bf16" in capsys.readouterr().err) == told


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("broken"),
        AssertionError("no"),
        OSError("full"),
        OSError(28, "full"),
        OSError(30, "Read-only", "a/b"),
        ValueError("a\x1b[2J"),
    ],
)
def test_whatever_ends_a_job_is_told_in_one_line(error, tiny_folder, capsys, monkeypatch):
    def stop(*inputs):
        raise error

    monkeypatch.setattr(finetune, "load", stop)
    assert status(*job(tiny_folder)) == 1
    line = "a/b: Read-only" if "a/b" in str(error) else str(error)
    assert complaint(capsys) == line.replace("\x1b", "\ufffd")


def test_in_an_archive_minilora_says_so_and_not_that_its_own_models_are_unknown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("minilora.cli.__file__", str(tmp_path / "minilora.whl" / "minilora" / "cli.py"))
    assert status("--version") == 0 and capsys.readouterr().out
    assert status("data", "legal") == 1
    assert complaint(capsys).endswith("cannot run from inside an archive: unpack it, or install it with pip")


@pytest.mark.parametrize(("error", "said"), [("", ""), ("Unable to allocate 9 MiB", " (Unable to allocate 9 MiB)")])
def test_lack_of_memory_is_called_so(error, said, tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "load", Mock(side_effect=MemoryError(error) if error else MemoryError))
    assert status(*job(tiny_folder)) == 1
    lacking = f"there is not enough memory{said}: end other programs, "
    assert complaint(capsys) == f"{lacking}try --quantized or --recompute, or use a smaller model or batch"
    assert status(*job(tiny_folder), "--recompute") == 1
    assert complaint(capsys) == f"{lacking}try --quantized, or use a smaller model or batch"
    monkeypatch.setattr("minilora.commands.pull.run", Mock(side_effect=MemoryError(error) if error else MemoryError))
    assert status("pull") == 1
    assert complaint(capsys) == f"{lacking}or use a smaller model or batch"


def test_where_the_system_starts_no_thread_a_way_out_is_named(tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "load", Mock(side_effect=RuntimeError("can't start new thread")))  # Python's own
    assert status(*job(tiny_folder)) == 1
    assert re.match("can't start new thread: .*OMP_NUM_THREADS=1$", complaint(capsys))


@pytest.mark.parametrize("words", [["data", "a\udcff.csv"], ["finetune", "--base", "tiny", "--out", "\ud800"]])
def test_a_name_that_no_file_of_text_can_hold_is_refused_before_work(words, capsys):
    assert status(*words) == 2
    assert complaint(capsys).startswith(f"{words[-1]!a} is not text in {sys.getfilesystemencoding()}: rename")


def test_where_the_folder_one_is_in_was_removed_a_command_says_so(capsys, monkeypatch):
    monkeypatch.setattr(os, "getcwd", Mock(side_effect=FileNotFoundError(errno.ENOENT, "No such file or directory")))
    assert status("data", "legal") == 1
    monkeypatch.undo()
    assert complaint(capsys) == "the folder you are in was removed: change to another one (cd)"


@pytest.mark.parametrize("file", [None, "a.csv"])
def test_on_windows_output_that_nobody_reads_is_an_invalid_argument_of_no_file(file, tiny_folder, capsys, monkeypatch):
    def stop(*inputs):
        monkeypatch.setattr(sys, "platform", "win32")
        raise OSError(errno.EINVAL, "Invalid argument", *([file] if file else []))

    monkeypatch.setattr(finetune, "load", stop)
    assert status(*job(tiny_folder)) == (1 if file else 0)
    monkeypatch.undo()
    err = capsys.readouterr().err
    assert err.endswith("minilora: a.csv: Invalid argument\n") if file else "Invalid argument" not in err


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_a_stream_that_whoever_started_the_program_closed_is_no_fault(tiny_folder, monkeypatch, stream):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    monkeypatch.setattr(sys, stream, None)  # as Python has it after `>&-`
    assert status("chat", "--base", tiny_folder / "base", "--max-new-tokens", 3) == 0
    getattr(sys, stream).close()


def test_the_traceback_is_shown_to_those_who_ask_for_it(tiny_folder, monkeypatch):
    monkeypatch.setenv("MINILORA_TRACEBACK", "1")
    with pytest.raises(DataError, match="absent"):
        main(job(tiny_folder, "--data", "absent"))
