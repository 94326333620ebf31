"""A run that is followed: what is measured at each look, by hand, and that claims ask for the same runs."""

import inspect
import json

import pytest

import minilora as ml
from minilora.claims._shared import followed_on_smollm2
from minilora.data.samples import encode_text
from minilora.experiments import followed
from minilora.experiments.claim import Setting
from minilora.experiments.followed import CONTENDERS, FULL, LORA_8, followed_run
from minilora.measure.loss import evenly, mean_loss
from minilora.models.load import TINY

FEW = {"base": "tiny", "steps": 1, "every": 1, "held_out": 2}


@pytest.fixture(scope="module")
def sets():
    """What is trained and measured, as samples of the tiny base."""
    _, tokenizer = ml.load("tiny")
    parts = ml.split_records(ml.read_records("legal"))
    sets = {name: ml.encode_records(part, tokenizer) for name, part in parts.items()}
    return sets | {"old": encode_text((TINY / "validation.txt").read_text("utf-8"), tokenizer, max_length=128)}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_each_look_has_the_losses_of_the_model_as_it_is_then(method, sets):
    found = followed_run(3e-3, method, 5, r=2, alpha=8, **FEW)
    model, _ = ml.load("tiny")
    if method == "lora":
        ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=8), seed=5)
    loss = lambda name: mean_loss(model, evenly(sets[name], 2))
    before = {name: loss(name) for name in ("validation", "old", "test")}
    seen = [(before["validation"], before["old"])]
    ml.fit(model, sets["train"], 1, 3e-3, 8, 5, each_step=lambda step: seen.append((loss("validation"), loss("old"))))
    new, old = map(list, zip(*seen, strict=True))
    assert found == {
        "new": new, "old": old, "curve": list(enumerate(new)), "validation": new[-1], "test": loss("test"),
        "before": {"test": before["test"]}, "trained": sum(p.size for p in model.trainable_parameters().values()),
    }  # fmt: skip
    assert new[0] != new[1] and old[0] != old[1] and found["test"] != before["test"]
    json.dumps(found, allow_nan=False)


def test_looks_are_so_many_steps_apart_and_the_schedule_is_that_of_fit(monkeypatch):
    def fit(model, samples, steps, lr, batch_size, seed, schedule, each_step):
        assert (len(samples), steps, lr, batch_size, seed, schedule) == (240, 5, 1e-3, 8, 3, "constant")
        for step in range(1, steps + 1):
            each_step(step)

    monkeypatch.setattr(followed, "fit", fit)
    found = followed_run(1e-3, "full", 3, **FEW | {"steps": 5, "every": 2}, schedule="constant")
    assert [step for step, _ in found["curve"]] == [0, 2, 4] and len(found["old"]) == 3


def test_the_shared_runs_have_their_own_best_rates_for_the_first_seed():
    asked = []

    def each(function, trials):
        assert function is followed_run
        asked.extend(trials)
        return [{"validation": abs(trial["lr"] / best(trial) - 1)} for trial in trials]

    best = lambda trial: 1e-3 if trial.get("method") == "full" else 3.16e-3

    class Asked(Setting):
        attempt = lambda self, function, trials: each(function, trials)

    found = followed_on_smollm2(Asked(seeds=(0, 1)), {"lora": LORA_8, "full": FULL})
    assert {name: one["lr"] for name, one in found.items()} == {"lora": 3.16e-3, "full": 1e-3}
    assert all(len(one["runs"]) == 2 and len(one["tried"]) in (3, 4) for one in found.values())
    searched = [trial for trial in asked if trial.get("seed") != 1]
    assert len(asked) - len(searched) == 2, "the second seed is run at the best rates alone"
    assert not any(trial.keys() - {"lr", "method", "r", "seed"} for trial in asked), "SmolLM2, and the whole size"
    sizes = {name: each.default for name, each in inspect.signature(followed_run).parameters.items()}
    stated = {"base": "smollm2", "r": 8, "steps": 40, "every": 10, "schedule": "cosine"}
    assert sizes.items() >= stated.items(), "what the claims say is run"
    asked.clear()
    followed_on_smollm2(Asked(small=True, seeds=(0,)), {"lora": LORA_8})
    assert asked == [{"lr": CONTENDERS[LORA_8]["lr"], **followed.FEW}] and followed.FEW["base"] == "tiny"
