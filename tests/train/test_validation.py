"""What happens besides the steps: validation, the best that is kept, the end that comes early."""

import json
from dataclasses import replace

import numpy as np
import pytest
from jobs import foresee, material_of, options, same, trained, trainer

import minilora as ml
from minilora.commands.report import page
from minilora.train import checkpoint, job, loop
from minilora.train.job import finetune
from minilora.train.loop import validate


def state_of(folder, home):
    model, _ = ml.load(home / "base")
    ml.load_adapter(model, folder)
    return ml.adapter_state(model, "default")


def after(steps, home, chosen):
    """The adapter after so many steps of the run that these options describe, trained by hand."""
    model, tokenizer = ml.load(home / "base")
    ml.add_adapter(model, chosen.lora_config(), seed=chosen.seed)
    samples = material_of(chosen, tokenizer).train
    with trainer(model, samples, chosen.steps, chosen.learning_rate, chosen.batch_size) as training:
        while training.done < steps:
            training.step()
    return ml.adapter_state(model, "default")


@pytest.fixture
def chosen(home, tmp_path):
    return options(home, tmp_path / "run", eval_every=1, lr=1e-2, eval_records=1)


def test_the_best_adapter_is_the_result_and_the_last_one_lies_beside_it(chosen, home, tmp_path, monkeypatch):
    foresee([5, 3, 4, 3, 6, 7], monkeypatch)
    metrics = finetune(replace(chosen, strength=0.5), answers=False)
    assert metrics["answers"] == [] and metrics["keyword_recall"] == {}
    assert metrics["kept"] == {"step": 2, "which": "best", "loss": 3}  # the first of equal ones
    for folder, steps in (("run", 2), ("run/last", 6)):
        half = {name: x * np.float32(0.5 if "lora_B" in name else 1) for name, x in after(steps, home, chosen).items()}
        assert same(state_of(tmp_path / folder, home), half)
    model, tokenizer = ml.load(home / "base")
    scored = material_of(chosen, tokenizer).scored
    for folder, losses in (("run", {name: pair[1] for name, pair in metrics["loss"].items()}),
                           ("run/last", metrics["last"]["loss"])):  # fmt: skip
        ml.load_adapter(model, tmp_path / folder, folder.replace("/", "-"))
        assert losses == {name: pytest.approx(ml.mean_loss(model, samples)) for name, samples in scored.items()}


def test_with_keep_last_the_last_adapter_is_the_result(chosen, home, tmp_path, monkeypatch):
    foresee([5, 3, 4, 3, 6, 7], monkeypatch)
    metrics = trained(replace(chosen, keep="last"))
    assert metrics["kept"] == {"step": 6, "which": "last", "loss": 7}
    assert same(state_of(tmp_path / "run", home), after(6, home, chosen))
    assert not (tmp_path / "run" / "last").exists()
    assert metrics["last"]["loss"] == {name: pair[1] for name, pair in metrics["loss"].items()}


def test_the_best_weights_so_far_are_written_when_they_are_found(chosen, monkeypatch):
    foresee([5, 3, 4, 3, 6, 2], monkeypatch)
    written, real = [], checkpoint.save_best

    def save_best(partial, trainer):
        written.append(trainer.done)
        real(partial, trainer)

    monkeypatch.setattr(checkpoint, "save_best", save_best)
    trained(chosen)
    assert written == [1, 2, 6]
    foresee([5, 3, 4, 3, 6, 2], monkeypatch)
    trained(replace(chosen, keep="last", overwrite=True))
    assert written == [1, 2, 6]


PATIENCE = [  # validation losses, patience, steps taken, the one that is kept
    ([5, 4, 4, 3, 3.5, 3.2], 2, 6, 4),
    ([5, 4, 4, 4, 3, 2], 2, 4, 2),
    ([5, 6, 1, 1, 1, 1], 1, 2, 1),
    ([np.nan, 6, np.nan, np.inf, 1, 1], 2, 4, 2),
    ([5, 6, 6, 6, 6, 6], None, 6, 1),
]


@pytest.mark.parametrize(("losses", "patience", "steps", "kept"), PATIENCE)
def test_training_stops_where_nothing_better_was_found(losses, patience, steps, kept, chosen, tmp_path, monkeypatch):
    foresee(losses, monkeypatch)
    metrics = trained(replace(chosen, patience=patience))
    assert (metrics["steps"], metrics["planned_steps"], metrics["kept"]["step"]) == (steps, 6, kept)
    assert len(metrics["train_loss"]) == steps


def test_where_no_validation_loss_is_a_number_none_was_lowest_and_the_last_weights_are_kept(home, chosen, monkeypatch):
    foresee([np.inf, np.nan] * 3, monkeypatch)
    metrics = trained(chosen)
    assert (metrics["kept"]["step"], metrics["kept"]["which"]) == (6, "last")
    assert "of step 6, the last one." in page(metrics) and "was lowest" not in page(metrics)
    assert same(state_of(chosen.folder, home), after(6, home, chosen)) and not (chosen.folder / "last").exists()


def test_patience_needs_something_to_go_by(home, tmp_path):
    with pytest.raises(ValueError, match=r"novel\.txt: no records are held out for validation, so leave out patience"):
        trained(options(home, tmp_path / "run", data=str(home / "novel.txt"), max_length=512, patience=1))
    assert list(tmp_path.iterdir()) == []


def test_without_validation_the_last_adapter_is_kept(home, tmp_path):
    chosen = options(home, tmp_path / "run", data=str(home / "novel.txt"), max_length=512)
    metrics = trained(chosen)
    assert metrics["kept"] == {"step": 6, "which": "last", "loss": None} and metrics["validation"] == {}


@pytest.mark.parametrize(
    ("change", "often", "at"),
    [
        ({}, 500, [2, 4, 5]),
        ({}, 1, [1, 2, 3, 4, 5]),  # epochs are longer
        (dict(eval_every=3), 1, [3, 5]),
        (dict(eval_every=9), 500, [5]),
    ],
)
def test_validation_comes_every_so_many_steps_or_every_epoch_and_at_the_end_and_gives_its_memory_back(
    change, often, at, home, tmp_path, monkeypatch
):
    released = []
    monkeypatch.setattr(job, "OFTEN", often)
    monkeypatch.setattr(loop, "release_memory", lambda: released.append(None))
    metrics = trained(options(home, tmp_path / "run", steps=5, eval_records=1, **change))
    assert [step for step, _ in metrics["validation_loss"]] == at and len(released) == len(at)


def test_each_set_counts_the_same_however_long_it_is(home):
    model, tokenizer = ml.load(home / "base")
    records = ml.read_records(home / "data.jsonl")
    chosen = {"unseen": records[:1], "paraphrase": records[1:]}
    sets = {name: ml.encode_records(some, tokenizer) for name, some in chosen.items()}
    model.requires_grad_(True)
    training = trainer(model, sets["unseen"], 1)
    validate(training, sets)
    losses = {name: ml.mean_loss(model, samples) for name, samples in sets.items()}
    assert training.history.validation == [(0, (losses["unseen"] + losses["paraphrase"]) / 2)]
    assert training.history.validation_sets == {name: [(0, loss)] for name, loss in losses.items()}
    assert losses["unseen"] != losses["paraphrase"]


def test_what_is_trained_and_asked_in_other_words_is_validated_beside_what_is_unseen(home, tmp_path):
    rows = [json.loads(line) for line in (home / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows[:3]:
        row["validation_paraphrase"] = f"And {row['id']}?"
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    chosen = options(home, tmp_path / "run", data=str(tmp_path / "data.jsonl"), steps=4, keep="last")
    metrics = trained(chosen)
    counts = metrics["records"]
    assert (counts["train"], counts["validation"], counts["validation_paraphrase"]) == (8, 2, 3)
    model, tokenizer = ml.load(home / "base")
    ml.load_adapter(model, tmp_path / "run")
    records = ml.read_records(tmp_path / "data.jsonl")
    sets = {
        "unseen": [record for record in records if record.split == "validation"],
        "paraphrase": [record.asked(record.validation_paraphrase) for record in records[:3]],
    }
    assert metrics["validation"].keys() == sets.keys()
    for name, chosen_records in sets.items():
        assert [step for step, _ in metrics["validation"][name]] == [2, 4]
        wanted = ml.mean_loss(model, ml.encode_records(chosen_records, tokenizer))
        assert metrics["validation"][name][-1][1] == pytest.approx(wanted)


# -- what must not cost the page ---------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_learning_rate_that_is_far_too_high_ends_with_metrics_and_says_which_promise_is_broken(tmp_path):
    short = {"steps": 12, "eval_records": 2, "max_length": 64}
    chosen = ml.Options(base="tiny", data="support", out=str(tmp_path / "run"), lr=5.0, **short)
    metrics = finetune(chosen, measure=False, answers=False)
    assert metrics["steps"] == 12 and (tmp_path / "run" / "metrics.json").is_file()
    assert bool(metrics["audit"]) != ("audit_failed" in metrics)


def test_a_failed_audit_is_a_line_of_the_metrics(home, tmp_path, monkeypatch):
    def fail(*inputs, **settings):
        raise ml.AuditError("gradient: A or B of x receives none")

    monkeypatch.setattr("minilora.train.metrics.audit", fail)
    metrics = finetune(options(home, tmp_path / "run", eval_records=1), measure=False, answers=False)
    assert metrics["audit"] == {} and metrics["audit_failed"] == "gradient: A or B of x receives none"
    assert metrics["base_sha256"][0] == metrics["base_sha256"][1]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
