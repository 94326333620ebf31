"""The whole fine-tuning job, on models that train in a second."""

import json
from dataclasses import replace

import pytest
from jobs import asked, options
from modelfiles import CONFIG, TERMS

from minilora.cost.counts import count_parameters
from minilora.cost.predict import base_parameters
from minilora.io.zoo import load
from minilora.lora.adapters import adapter_state, add_adapter, base_state
from minilora.lora.config import LoraConfig
from minilora.lora.peft import load_adapter
from minilora.nn.module import sha256_of
from minilora.pictures.run import run_picture
from minilora.train import finetune as job
from minilora.train.bars import Bars
from minilora.train.data import DataError
from minilora.train.evaluate import mean_loss
from minilora.train.finetune import finetune
from minilora.train.generate import generate
from minilora.train.loop import TrainingError
from minilora.train.material import prepare
from minilora.train.report import page, read_metrics

SHAPE = replace(CONFIG, max_position_embeddings=1024)
LORA = LoraConfig(r=4, lora_alpha=8)


KEYS = {
    "trainable_parameters", "total_parameters", "base_sha256", "loss", "keyword_recall", "seconds_per_step",
    "tokens_per_second", "peak_memory_bytes", "adapter_bytes", "base_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(home):
    """(options, metrics, lines said) of a whole run with an adapter."""
    said = []
    chosen = options(home, home / "run", steps=None, epochs=3.0, lr=2e-2)
    return chosen, finetune(chosen, said.append, Bars(quiet=True)), said


def test_the_metrics_have_every_promised_key_and_are_those_on_disk(finished):
    chosen, metrics, said = finished
    assert metrics.keys() >= KEYS
    assert json.loads((chosen.folder / "metrics.json").read_text(encoding="utf-8")) == json.loads(json.dumps(metrics))
    assert set(metrics["loss"]) == {"paraphrase", "unseen", "general"}
    assert set(metrics["keyword_recall"]) == {"paraphrase", "unseen"}
    memory = metrics["peak_memory_bytes"]
    assert memory.keys() >= {"predicted", "measured", "full_predicted"}
    assert memory["predicted"] == sum(memory["by_owner"].values()) < memory["full_predicted"]
    assert said == []


def test_the_metrics_count_what_was_there(finished, home):
    chosen, metrics, _ = finished
    model, _ = load(chosen.base)
    base = count_parameters(model).total
    add_adapter(model, chosen.lora_config())
    counts = count_parameters(model)
    assert metrics["trainable_parameters"] == counts.trainable and metrics["total_parameters"] == counts.total
    assert metrics["base_bytes"] == 4 * base
    assert metrics["adapter_bytes"] == (chosen.folder / "adapter_model.safetensors").stat().st_size
    assert metrics["records"] == {"train": 8, "paraphrase": 8, "unseen": 2, "general": 60}
    assert metrics["steps"] == len(metrics["train_loss"]) == 6  # three epochs of two batches
    assert [step for step, _ in metrics["validation_loss"]] == [2, 4, 6]


def test_the_base_hash_is_the_same_before_and_after_and_that_of_the_files(finished):
    chosen, metrics, _ = finished
    before, after = metrics["base_sha256"]
    assert before == after == sha256_of(base_state(load(chosen.base)[0]))


def test_what_the_metrics_say_of_the_trained_model_is_true_of_the_saved_adapter(finished):
    chosen, metrics, _ = finished
    model, tokenizer = load(chosen.base)
    load_adapter(model, chosen.folder)
    material = prepare(chosen, tokenizer, print)
    for name, (before, after) in metrics["loss"].items():
        assert mean_loss(model, material.scored[name]) == pytest.approx(after, rel=1e-6)
        assert name == "general" or after < before
    example = metrics["answers"][0]
    assert example["set"] == "paraphrase" and example["question"] == "Define 0."
    assert example["after"] == generate(model, tokenizer, example["question"])


def columns(text):
    return max(map(len, text.split("\n")))


@pytest.fixture
def named(finished):
    """The metrics of the run, as if its folders had names of usual length."""
    metrics = finished[1]
    return metrics | {"options": metrics["options"] | {"base": "models/tiny", "data": "data.jsonl", "out": "runs/x"}}


def test_the_page_fits_100_columns_and_shows_the_key_figures(named):
    text = page(named)
    assert columns(text) <= 100
    for figure in (
        f"{named['trainable_parameters']:,} of {named['total_parameters']:,}",
        *(f"{value:.3f}" for pair in named["loss"].values() for value in pair),
        *(f"{100 * value:.1f}%" for pair in named["keyword_recall"].values() for value in pair),
        f"untouched: sha256 {named['base_sha256'][0][:16]}",
        "Define 0.",
        "lora fine-tuning of models/tiny on data.jsonl",
        "minilora chat --base models/tiny --adapter runs/x",
    ):
        assert figure in text


def test_the_page_can_be_made_again_from_the_files(finished):
    assert page(read_metrics(finished[0].folder)) == page(finished[1])


def test_the_picture_of_a_run_is_drawn(finished, tmp_path):
    run_picture(finished[1], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_run_without_validation_and_paraphrases_has_page_and_picture(home, tmp_path):
    plain = [{"question": r["question"], "answer": r["answer"]} for r in TERMS]
    (tmp_path / "plain.jsonl").write_text("\n".join(map(json.dumps, plain)), encoding="utf-8")
    metrics = finetune(options(home, tmp_path / "run", data=str(tmp_path / "plain.jsonl"), steps=1), bars=Bars(True))
    assert set(metrics["loss"]) == {"unseen", "general"} and metrics["keyword_recall"] == {}
    assert metrics["records"]["train"] == 11 and metrics["records"]["unseen"] == 1
    run_picture(metrics, tmp_path / "picture.png")
    assert "unseen" in page(metrics)


def test_plain_text_is_learned_with_its_last_tenth_held_back(home, tmp_path):
    chosen = options(home, tmp_path, data=str(home / "novel.txt"), max_length=16, lr=2e-2, steps=20)
    said = []
    metrics = finetune(chosen, said.append, Bars(quiet=True))
    assert metrics["records"]["unseen"] == (metrics["records"]["train"] + metrics["records"]["unseen"]) // 10 > 0
    assert metrics["loss"]["unseen"][1] < 0.9 * metrics["loss"]["unseen"][0]
    assert page(metrics)


def test_full_fine_tuning_writes_a_model_folder_that_loads_and_differs(home, tmp_path):
    metrics = finetune(options(home, tmp_path / "full", method="full", steps=2), bars=Bars(quiet=True))
    before, after = metrics["base_sha256"]
    model, tokenizer = load(tmp_path / "full")
    assert before != after == sha256_of(model.state_dict())
    assert tokenizer.encode_chat(asked("hello")) == load(home / "base")[1].encode_chat(asked("hello"))
    assert metrics["trainable_parameters"] == metrics["total_parameters"] == base_parameters(SHAPE)
    run_picture(metrics, tmp_path / "picture.png")
    text = page(metrics)
    assert "changed: sha256" in text and f"--base {tmp_path / 'full'}" in text


@pytest.mark.parametrize("error", [KeyboardInterrupt, TrainingError])
def test_an_adapter_is_kept_when_training_is_broken_off(home, tmp_path, monkeypatch, error):
    steps, real, said = [], job.fit, []

    def train_then_stop(*inputs, each_step, **settings):
        def count(step):
            each_step(step)
            steps.append(step)
            if step == 3:
                raise error("stop")

        real(*inputs, each_step=count, **settings)

    monkeypatch.setattr(job, "fit", train_then_stop)
    with pytest.raises(error):
        finetune(options(home, tmp_path), said.append, Bars(quiet=True))
    assert steps == [1, 2, 3] and said == [f"kept what 3 of 6 steps had learned in {tmp_path}"]
    model, _ = load(home / "base")
    load_adapter(model, tmp_path)
    assert any(array.any() for name, array in adapter_state(model, "default").items() if name.endswith("lora_B"))
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("stage", ["evaluate", "fit"])
@pytest.mark.parametrize("out", ["run", "a/b/run", "there"])
def test_an_interruption_before_the_first_step_leaves_no_folder_that_it_made(stage, out, home, tmp_path, monkeypatch):
    def stop(*inputs, **settings):
        raise KeyboardInterrupt

    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "note.txt").write_text("mine")
    monkeypatch.setattr(job, stage, stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(options(home, tmp_path / out), bars=Bars(quiet=True))
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "note.txt"]


REFUSED = [  # options, what the error says
    (dict(r=33), "r"),
    (dict(target_modules=["nonsense"]), "target 'nonsense' matches no module"),
    (dict(data="absent.jsonl"), "no such data file"),
    (dict(base="absent"), "no such model"),
    (dict(max_length=8), "nothing is left to train on within --max-length 8"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_cannot_work_is_refused_before_anything_is_written(home, tmp_path, change, reason):
    with pytest.raises(ValueError, match=reason):
        finetune(options(home, tmp_path / "out", **change), bars=Bars(quiet=True))
    assert not (tmp_path / "out").exists()


def test_bad_data_lines_stop_the_job_before_training(home, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": "x"}\n[]\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl:1: .*\n.*bad\.jsonl:2: "):
        finetune(options(home, tmp_path / "out", data=str(tmp_path / "bad.jsonl")), bars=Bars(quiet=True))
    assert not (tmp_path / "out").exists()
