"""A run that was stopped continues as if it had not been, from a checkpoint that is there whole or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from asking import text_of
from jobs import foresee, options, trained

import minilora as ml
from minilora.files import tensors
from minilora.models.folder import save_folder
from minilora.nn.gpt2 import GPT2, GPT2Config
from minilora.train import checkpoint, job
from minilora.train.job import finetune
from minilora.train.log import read_log
from minilora.train.loop import History, Trainer
from minilora.train.material import Measured

CHECKPOINT = "run.partial/checkpoint"
posix = pytest.mark.skipif(os.name != "posix", reason="a signal of POSIX")


@pytest.fixture
def stop_at(monkeypatch):
    """Let a job be interrupted, as by Ctrl-C or `kill`, in the midst of one step."""

    def stop(step, *sent):
        class Stopped(Trainer):
            def step(self):
                if self.done + 1 == step:
                    for number in sent or [signal.SIGINT]:
                        signal.raise_signal(number)
                return super().step()

        monkeypatch.setattr(job, "Trainer", Stopped)

    return stop


run = trained


def test_a_state_is_read_as_it_was_written(tmp_path):
    history = History([1.0], [0.5], [1e-3], [0.1], 7, [(1, 2.0)], {"unseen": [(1, 2.0)]})
    before = Measured({"unseen": 1.0}, {"unseen": 0.5}, {"unseen": ["x"]}, {"base": [[0.5]]}, {"unseen": {"margin": 1}})
    state = checkpoint.State({"r": 8}, "base", "data", before, history, True, {"unseen": 3.0})
    checkpoint.save_trained(tmp_path, state)
    assert checkpoint.read_state(tmp_path) == state


def weights(folder):
    """The bytes of every file with weights or with the state of dropout, by name; those of the last adapter, too."""
    kinds = ("safetensors", "minilora.json", "adapter_config.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if str(path).endswith(kinds)}


LEARNED = ("train_loss", "validation_loss", "validation", "kept", "steps")
WAYS = {  # base, data and adapter are names in the folder `others`
    "dora, LoRA+, dropout in recomputed blocks": dict(use_dora=True, lora_plus=8.0, lora_dropout=0.3, recompute=True),
    "pissa, accumulation": dict(init_lora_weights="pissa", grad_accumulation=2, batch_size=2, schedule="linear",
                                warmup=0.3, weight_decay=0.1),
    "patience": dict(patience=2, eval_every=1, steps=12, lora_dropout=0.1),
    "best is not last, and is scaled, in bfloat16, where the machine can": dict(strength=0.5, eval_every=1, bf16=True),
    "A frozen, the last is kept": dict(freeze_A=True, lora_plus=8.0, eval_every=1, keep="last"),
    "two kinds of matrices, epochs": dict(target_modules=["q_proj", "up_proj"], use_rslora=True, steps=None, epochs=3.5,
                              batch_size=3, save_every=4),
    "full, best is not last": dict(method="full", lr=1e-2, eval_every=1),
    "full, GPT-2": dict(base="gpt2", method="full", lr=1e-2, eval_every=1, weight_decay=0.1),
    "pairs": dict(data="pairs.jsonl", loss="dpo", beta=0.3, batch_size=2),
    "pairs, the reference is an adapter": dict(data="pairs.jsonl", adapter="adapter", loss="dpo", batch_size=2),
}  # fmt: skip


@pytest.fixture(scope="module")
def others(home, tokenizer, tmp_path_factory):
    """A base of a family whose files have other shapes than the model, an adapter, and pairs of answers."""
    folder = tmp_path_factory.mktemp("others")
    config = GPT2Config(len(tokenizer), 32, 1, 4, max_position_embeddings=1024)
    save_folder(folder / "gpt2", config, GPT2(config).state_dict(), tokenizer)
    model, _ = ml.load(home / "base")
    ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=16, init_lora_weights=False))
    ml.save_adapter(model, folder / "adapter")
    (folder / "pairs.jsonl").write_text("\n".join(text_of("support-pairs").splitlines()[::50]))
    return folder


@pytest.mark.parametrize(
    "way", [*list(WAYS)[::2], *(pytest.param(w, marks=pytest.mark.long) for w in list(WAYS)[1::2])]
)
def test_a_run_that_was_stopped_twice_ends_with_the_same_bytes(way, home, others, tmp_path, stop_at, monkeypatch):
    change = dict(lr=2e-2) | WAYS[way]
    change |= {name: str(others / change[name]) for name in ("base", "data", "adapter") if name in change}
    if "eval_every" in change:
        foresee([5, 4, 3, 4, 5, 6], monkeypatch)
    straight = run(options(home, tmp_path / "straight", **change))
    chosen, resumed = (options(home, tmp_path / "run", resume=resume, **change) for resume in (False, True))
    for step, each in ((3, chosen), (4, resumed)):
        stop_at(step)
        with pytest.raises(KeyboardInterrupt):
            run(each)
        assert json.loads((tmp_path / CHECKPOINT / "state.json").read_text())["step"] == step
    monkeypatch.setattr(job, "Trainer", Trainer)
    metrics = run(resumed)
    assert {key: metrics[key] for key in LEARNED} == {key: straight[key] for key in LEARNED}
    assert weights(tmp_path / "run") == weights(tmp_path / "straight") and len(weights(tmp_path / "run")) >= 1
    logs = [[row | {"tokens_per_second": 0, "peak_memory_bytes": 0} for row in read_log(tmp_path / name / "log.csv")]
            for name in ("run", "straight")]  # fmt: skip
    assert logs[0] == logs[1] and len(logs[0]) == metrics["steps"]
    assert sorted(os.listdir(tmp_path)) == ["run", "straight"]
    if "eval_every" in change:
        kept = {"step": 6, "which": "last", "loss": 6} if "keep" in change else {"step": 3, "which": "best", "loss": 3}
        assert metrics["kept"] == kept and metrics["steps"] == (5 if way == "patience" else 6)
        assert (tmp_path / "run" / "last").is_dir() == (kept["which"] == "best")


def test_training_begins_where_the_given_adapter_ended(home, tmp_path):
    run(options(home, tmp_path / "first", lr=2e-2, r=3))
    metrics = run(options(home, tmp_path / "second", lr=1e-12, steps=1, adapter=str(tmp_path / "first"), base=None))
    assert metrics["options"]["r"] == 3 and Path(metrics["options"]["base"]).samefile(home / "base")
    states = []
    for name in ("first", "second"):
        model, _ = ml.load(home / "base")
        ml.load_adapter(model, tmp_path / name)
        states.append(ml.adapter_state(model, "default"))
    assert states[0].keys() == states[1].keys()
    assert all(np.allclose(states[0][name], states[1][name], atol=1e-9) for name in states[0])


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(home, tmp_path, stop_at, monkeypatch, said):
    """The options of a run that was interrupted in its fourth step, and what was said."""
    chosen = options(home, tmp_path / "run", lr=2e-2)
    stop_at(4)
    with pytest.raises(KeyboardInterrupt):
        run(chosen)
    monkeypatch.setattr(job, "Trainer", Trainer)
    return chosen, said()


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on_and_whom_to_talk_to(stopped, home, tmp_path):
    _, said = stopped
    folder = tmp_path / CHECKPOINT
    assert said == [
        "\nstopping after this step; Ctrl-C again stops at once",
        "stopped after 4 of 6 steps",
        f"the trained weights are in {folder}; talk to the model with: minilora chat --adapter {folder}",
        f"resume with: minilora finetune --resume --out {tmp_path / 'run'}",
    ]
    model, tokenizer = ml.load(home / "base")
    ml.load_adapter(model, folder)
    assert isinstance(ml.generate(model, tokenizer, "What is 1?"), str)
    assert len(read_log(tmp_path / "run.partial" / "log.csv")) == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGHUP", marks=posix), pytest.param("SIGUSR1", marks=posix)])
def test_kill_and_a_closed_terminal_finish_the_step_and_leave_a_checkpoint(name, home, tmp_path, stop_at, request):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # it may be ignored, as nohup does
    request.addfinalizer(lambda: signal.signal(number, before))
    stop_at(3, number, number, signal.SIGTERM)  # they come again, from the shell and from the system
    with pytest.raises(KeyboardInterrupt):
        run(options(home, tmp_path / "run"))
    assert json.loads((tmp_path / CHECKPOINT / "state.json").read_text())["step"] == 3
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_programs_own_handlers_stay(home, tmp_path, stop_at):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        stop_at(2, signal.SIGTERM)
        assert run(options(home, tmp_path / "run"))["steps"] == 6 and heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_stops_at_once_and_the_checkpoint_before_stays(first, home, tmp_path, monkeypatch):
    class Impatient(Trainer):
        def step(self):
            if self.done == 3:
                signal.raise_signal(first)
                signal.raise_signal(signal.SIGINT)
            return super().step()

    monkeypatch.setattr(job, "Trainer", Impatient)
    with pytest.raises(KeyboardInterrupt):
        run(options(home, tmp_path / "run"))
    assert json.loads((tmp_path / CHECKPOINT / "state.json").read_text())["step"] == 2  # an epoch


def test_a_ctrl_c_that_is_ignored_stays_ignored(home, tmp_path, stop_at):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop_at(2)
        assert run(options(home, tmp_path / "run"))["steps"] == 6
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interruption_of_the_measurement_afterwards_loses_nothing(home, tmp_path, monkeypatch, said):
    change = dict(lr=0.1, eval_every=1)
    foresee([5, 4, 3, 4, 5, 6], monkeypatch)
    straight = run(options(home, tmp_path / "straight", **change))
    real = job.evaluate

    def stop(*inputs):
        if inputs[3] == "after":
            raise KeyboardInterrupt
        return real(*inputs)

    monkeypatch.setattr(job, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        run(options(home, tmp_path / "run", **change))
    monkeypatch.setattr(job, "free_memory", lambda: 1)  # of which nothing is said, since no step is taken from here on
    kept = tmp_path / "run.partial"
    assert said() == [
        f"the trained weights are in {kept}; talk to the model with: minilora chat --adapter {kept}",
        f"resume with: minilora finetune --resume --out {tmp_path / 'run'}",
    ]
    assert weights(kept) == weights(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):  # once more
        run(options(home, tmp_path / "run", resume=True, **change))
    assert said()[2:] == said()[:2]

    def train_again(self):
        pytest.fail("it is trained already")

    monkeypatch.setattr(job, "evaluate", real)
    monkeypatch.setattr(Trainer, "step", train_again)
    metrics = run(options(home, tmp_path / "run", resume=True, **change))
    assert {key: metrics[key] for key in LEARNED} == {key: straight[key] for key in LEARNED}
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")
    assert sorted(os.listdir(tmp_path)) == ["run", "straight"]


def test_what_was_known_before_is_not_measured_again(home, tmp_path, stop_at, monkeypatch):
    straight = finetune(options(home, tmp_path / "straight", eval_records=2), answers=False)
    stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        finetune(options(home, tmp_path / "run", eval_records=2), answers=False)
    monkeypatch.setattr(job, "Trainer", Trainer)
    asked, real = [], job.evaluate

    def evaluate(*inputs):
        asked.append(inputs[3])
        return real(*inputs)

    monkeypatch.setattr(job, "evaluate", evaluate)
    metrics = finetune(options(home, tmp_path / "run", eval_records=2, resume=True), answers=False)
    assert asked == ["after"]
    for key in ("loss", "keyword_recall", "answers", "last", "base_sha256"):
        assert metrics[key] == straight[key]


# -- what cannot be gone on with ---------------------------------------------------------------------------------------


def test_every_other_setting_is_named(stopped):
    chosen, _ = stopped
    other = replace(chosen, resume=True, r=3, seed=5, steps=None, epochs=2.0, save_every=7)
    with pytest.raises(ValueError) as refused:
        run(other)
    assert str(refused.value) == (
        f"the run in {chosen.folder} was started with other settings: r 2, now 3; steps 6, now none; seed 0, now 5; "
        "epochs none, now 2.0; --overwrite starts again"
    )
    assert run(replace(chosen, resume=True))["steps"] == 6  # nothing is lost


def test_other_data_under_the_same_name_are_refused(stopped, home, tmp_path):
    chosen, _ = stopped
    text = (home / "data.jsonl").read_text(encoding="utf-8")
    try:
        (home / "data.jsonl").write_text(text.replace("It is 1 and hello.", "It is one and hello."), encoding="utf-8")
        then = json.loads((tmp_path / CHECKPOINT / "state.json").read_text())["data"][:16]
        with pytest.raises(ValueError, match=f"other settings: sha256 of data {then}, now (?!{then})\\w{{16}};"):
            run(replace(chosen, resume=True))
    finally:
        (home / "data.jsonl").write_text(text, encoding="utf-8")


def test_another_base_under_the_same_name_is_refused(home, tmp_path, stop_at, monkeypatch):
    shutil.copytree(home / "base", tmp_path / "base")
    chosen = options(home, tmp_path / "run", base=str(tmp_path / "base"))
    stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        run(chosen)
    state = tensors.read_tensors(tmp_path / "base" / "model.safetensors")
    state["model.norm.weight"][0] += 1
    tensors.write_tensors(tmp_path / "base" / "model.safetensors", state)
    with pytest.raises(ValueError, match=r"started with other settings: sha256 of base (\w{16}), now (?!\1)\w{16};"):
        run(replace(chosen, resume=True))


def change_state(folder, **change):
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


DAMAGED = [  # what is done to the checkpoint, what is said
    (lambda folder: shutil.rmtree(folder), "there is no checkpoint to resume; give the --out of the run that was"),
    (lambda folder: change_state(folder, format=0), r"in format 0; minilora .* reads format 3: --overwrite starts"),
    (lambda folder: change_state(folder, before=3), "not the state of a run"),
    (lambda folder: change_state(folder, history={}, options={}, format=None), "in format None"),
    (lambda folder: (folder / "state.json").write_text("{"), "not readable as JSON"),
    (lambda folder: (folder / "moments_v.safetensors").unlink(), r"moments_v\.safetensors: no such file"),
    (lambda folder: (folder / "moments_m.safetensors").write_bytes(b"x" * 99), "damaged safetensors file"),
    (
        lambda folder: tensors.write_tensors(folder / "moments_m.safetensors", {"x": np.zeros(2, np.float32)}),
        r"x \(2,\) does not fit the trainable parameters of this run",
    ),
    (lambda folder: tensors.write_tensors(folder / "adapter_model.safetensors", {}), "lora_A.weight is missing"),
]


def test_a_damaged_checkpoint_is_one_line_that_names_the_file(stopped, tmp_path):
    whole = shutil.copytree(tmp_path / CHECKPOINT, tmp_path / "whole")
    for damage, reason in DAMAGED:
        damage(tmp_path / CHECKPOINT)
        with pytest.raises(ValueError, match=reason) as refused:
            run(replace(stopped[0], resume=True))
        assert "\n" not in str(refused.value) and "run.partial" in str(refused.value)
        shutil.rmtree(tmp_path / CHECKPOINT, ignore_errors=True)
        shutil.copytree(whole, tmp_path / CHECKPOINT)


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_costs_the_new_checkpoint_and_not_the_old_one(home, tmp_path, monkeypatch, said):
    straight = run(options(home, tmp_path / "straight"))
    real, written = checkpoint.write_tensors, []

    def write(path, arrays):
        written.append(path)
        if len(written) == 6:  # of two moments for each checkpoint and a best one: in the midst of the second
            raise OSError(28, "No space left on device")
        real(path, arrays)

    monkeypatch.setattr(checkpoint, "write_tensors", write)
    with pytest.raises(OSError, match=r"^the weights of step 4 cannot be saved: .*the disk is full"):
        run(options(home, tmp_path / "run"))
    assert said()[-1] == f"resume with: minilora finetune --resume --out {tmp_path / 'run'}"
    assert json.loads((tmp_path / CHECKPOINT / "state.json").read_text())["step"] == 2
    assert [name for name in os.listdir(tmp_path / "run.partial") if name.startswith(".")] == []
    monkeypatch.setattr(checkpoint, "write_tensors", real)
    assert run(options(home, tmp_path / "run", resume=True))["train_loss"] == straight["train_loss"]
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")


@pytest.mark.parametrize(
    ("change", "often", "steps"),  # often, 1: less than an epoch
    [(dict(save_every=4), 1, [4]), ({}, 500, [2, 4, 6]), ({}, 1, [1, 2, 3, 4, 5, 6]), (dict(method="full"), 1, [])],
)
def test_a_checkpoint_is_written_every_so_many_steps(change, often, steps, home, tmp_path, monkeypatch):
    saved, real = [], checkpoint.save
    monkeypatch.setattr(job, "OFTEN", often)

    def save(partial, state, trainer, *more):
        saved.append(trainer.done)
        real(partial, state, trainer, *more)

    monkeypatch.setattr(checkpoint, "save", save)
    run(options(home, tmp_path / "run", **change))
    assert saved == steps


# -- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to begin many processes quickly")
@pytest.mark.parametrize("kills", [pytest.param(5, marks=pytest.mark.long), pytest.param(50, marks=pytest.mark.slow)])
def test_a_process_killed_again_and_again_goes_on_from_its_last_checkpoint_to_the_same_end(kills, home, tmp_path):
    shutil.copy(home / "data.jsonl", tmp_path)
    program = [sys.executable, str(Path(__file__).with_name("killed.py")), str(tmp_path), str(kills)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    killed, *steps = map(int, done.stdout.split())
    assert killed == kills and len([step for step in steps if step > 0]) > kills / 2
    assert [step for step in steps if step >= 0] == sorted(step for step in steps if step >= 0)  # nothing is lost
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight")
    log = read_log(tmp_path / "killed" / "log.csv")
    assert [int(row["step"]) for row in log] == list(range(1, 5 * kills + 1))
