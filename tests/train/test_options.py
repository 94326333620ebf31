"""The options of the jobs: defaults, and what they refuse."""

from dataclasses import FrozenInstanceError, asdict
from pathlib import Path

import pytest

from minilora.lora.config import LoraConfig
from minilora.train.options import ChatOptions, Options


def test_the_defaults_are_these():
    assert asdict(Options()) == dict(
        base="smollm2", data="legal", field=None, method="lora", out=None, overwrite=False, r=8, lora_alpha=16.0,
        target_modules="all-linear", epochs=4.0, steps=None, lr=None, batch_size=8, max_length=512, eval_records=80,
        seed=0, quantized=False, recompute=False, device="cpu",
    )  # fmt: skip
    assert asdict(ChatOptions()) == dict(
        base="smollm2", adapter=None, quantized=False, prompt=None, max_new_tokens=128, temperature=0.0, seed=0,
        device="cpu",
    )  # fmt: skip


RATES = [({}, 2e-3), (dict(method="full"), 2e-4), (dict(lr=0.5), 0.5), (dict(method="full", lr=0.5), 0.5)]


@pytest.mark.parametrize(("change", "rate"), RATES)
def test_each_method_has_a_learning_rate_of_its_own(change, rate):
    assert Options(**change).learning_rate == rate


PLACES = [  # options, where results go
    ({}, "runs/legal"),
    (dict(method="full"), "runs/legal-full"),
    (dict(data="my/notes.v2.jsonl"), "runs/notes.v2"),
    (dict(data="my/notes.v2"), "runs/notes.v2"),  # a folder
    (dict(base="tiny"), "runs/legal-tiny"),
    (dict(base="models/Llama-3.2-1B", method="full"), "runs/legal-Llama-3.2-1B-full"),
    (dict(base="models/x.gguf", data="support"), "runs/support-x"),
    (dict(base="tiny", out="there"), "there"),
]


@pytest.mark.parametrize(("change", "folder"), PLACES)
def test_the_folder_for_results_tells_data_base_and_method(change, folder):
    assert Options(**change).folder == Path(folder)


def test_data_in_the_folder_one_is_in_give_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Options(data=".").folder == Path("runs", tmp_path.name)


REFUSED = [  # options, what the one line says
    (dict(method="dora"), "method must be 'lora' or 'full', got 'dora'"),
    (dict(method="full", quantized=True), "packed weights cannot be trained: leave out quantized, or use method lora"),
    (dict(device="tpu"), "device must be 'cpu' or 'cuda', got 'tpu'"),
    (dict(epochs=0), "epochs must be a positive number, got 0"),
    (dict(epochs=float("nan")), "epochs must be a positive number, got nan"),
    (dict(lr=0.0), r"lr must be a positive number, got 0\.0"),
    (dict(lr=float("inf")), "lr must be a positive number, got inf"),
    (dict(lr=-1.0), r"lr must be a positive number, got -1\.0"),
    (dict(batch_size=0), "batch_size must be at least 1, got 0"),
    (dict(steps=0), "steps must be at least 1, got 0"),
    (dict(max_length=7), "max_length must be at least 8, got 7"),
    (dict(eval_records=0), "eval_records must be at least 1, got 0"),
    (dict(seed=-1), "seed must be at least 0, got -1"),
    (dict(r=0), "r must be a positive integer, got 0"),
    (dict(lora_alpha=0.0), "lora_alpha: alpha must be a positive number, got 0.0"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[str(change) for change, _ in REFUSED])
def test_options_that_mean_nothing_are_refused_in_one_line(change, reason):
    with pytest.raises(ValueError, match=f"^{reason}$"):
        Options(**change)


def test_the_least_that_is_allowed_is_allowed():
    Options(steps=1, batch_size=1, eval_records=1, max_length=8, seed=0, r=1, epochs=1e-9, lr=1e-9)
    ChatOptions(max_new_tokens=1, temperature=0.0, seed=0)


@pytest.mark.parametrize("change", [dict(max_new_tokens=0), dict(temperature=-0.1), dict(seed=-1)])
def test_a_chat_that_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match=f"^{next(iter(change))} must be"):
        ChatOptions(**change)


FOLDERS = [
    ({}, "runs/legal"),
    (dict(data="medical"), "runs/medical"),
    (dict(method="full"), "runs/legal-full"),
    (dict(data="a/b.jsonl"), "runs/b"),
    (dict(data="a/b.jsonl", method="full"), "runs/b-full"),
    (dict(out="here"), "here"),
    (dict(out="here", method="full"), "here"),
]


@pytest.mark.parametrize(("change", "folder"), FOLDERS)
def test_results_go_where_the_data_say_unless_told(change, folder):
    assert Options(**change).folder.as_posix() == folder


def test_the_adapter_is_the_one_asked_for():
    asked = Options(r=3, lora_alpha=5.0, target_modules=["q_proj"]).lora_config()
    assert asked == LoraConfig(r=3, lora_alpha=5.0, target_modules=["q_proj"])


@pytest.mark.parametrize(("options", "name"), [(Options(), "r"), (ChatOptions(), "seed")])
def test_options_that_were_checked_stay_as_they_are(options, name):
    with pytest.raises(FrozenInstanceError):
        setattr(options, name, 0)
