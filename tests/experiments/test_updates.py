"""What is kept of a training run is what training did to the weights, and one run serves all who ask for it."""

from pathlib import Path

import numpy as np
import pytest

import minilora as ml
from minilora.claims._shared import shared_runs
from minilora.experiments import updates
from minilora.experiments.claim import Setting
from minilora.experiments.updates import base_matrices, read_update, train_update
from minilora.files.disk import ModelFileError
from minilora.files.tensors import write_tensors
from minilora.lora.spectra import row_changes

STEPS, LR = 4, 1e-2


@pytest.fixture
def train(tiny_folder, tmp_path):
    """`train_update` of the small random base, with few steps."""
    base, data = str(tiny_folder / "base"), str(tiny_folder / "data.jsonl")
    settings = {"base": base, "data": data, "method": "lora", "steps": STEPS, "lr": LR, "seed": 3, "r": 2}
    return lambda **changed: train_update(**settings | {"batch_size": 4, "folder": tmp_path} | changed)


def matrix(update):
    return update[0] @ update[1] if isinstance(update, tuple) else update


def trained(folder, method):
    """The same training by hand."""
    model, tokenizer = ml.load(folder / "base")
    if method != "full":
        ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=16.0, use_dora=method == "dora"), seed=3)
    records = ml.split_records(ml.read_records(folder / "data.jsonl"))["train"]
    history = ml.fit(model, ml.encode_records(records, tokenizer), STEPS, LR, batch_size=4, seed=3)
    return model, history.losses


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_what_is_kept_is_what_training_added(train, tiny_folder, method):
    run = train(method=method)
    model, losses = trained(tiny_folder, method)
    assert run["losses"] == losses and [*run["changes"]] == ["1", "2", "3", "4"]
    kept, base = read_update(run["file"]), base_matrices(str(tiny_folder / "base"))
    assert kept.keys() == base.keys() and {name.rpartition(".")[2] for name in kept} == set(updates.KEPT)
    for name, w in base.items():
        delta = matrix(kept[name])
        if method == "full":
            np.testing.assert_array_equal(delta, model.get_submodule(name).weight.data - w)
        else:
            np.testing.assert_allclose(delta, ml.delta_weight(model, name), atol=1e-6)
        assert np.abs(delta).max() > 1e-4
        assert run["changes"]["4"][name] == pytest.approx(row_changes(w, w + delta), rel=1e-3)  # the last of four looks
        assert method != "lora" or kept[name][0].shape[1] == kept[name][1].shape[0] == 2  # in factors


def test_one_run_serves_all_who_ask_as_long_as_seed_and_code_are_the_same(train, monkeypatch):
    first = train()
    monkeypatch.setattr(updates, "fit", None)
    assert train() == first
    with pytest.raises(TypeError):
        train(seed=4)
    monkeypatch.setattr(updates, "code_sha256", lambda file: "other")
    with pytest.raises(TypeError):
        train()


def test_full_fine_tuning_has_no_rank_to_tell_runs_apart(train, monkeypatch):
    first = train(method="full", r=2)
    monkeypatch.setattr(updates, "fit", None)
    assert train(method="full", r=64) == first


def test_a_run_that_broke_off_is_trained_again(train, tmp_path, monkeypatch):
    def full_disk(*record):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(updates, "keep", full_disk)
        with pytest.raises(OSError, match="no space"):
            train()
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".lock", ".safetensors"]
    assert len(train()["losses"]) == STEPS


def test_without_a_folder_it_lasts_as_long_as_the_process_and_a_file_that_is_gone_is_made_again(train):
    run = train(folder=None)
    assert run == train(folder=None) and read_update(run["file"])
    Path(run["file"]).unlink()
    assert train(folder=None) == run and read_update(run["file"])


@pytest.mark.parametrize(
    ("small", "size"), [(False, {"base": "smollm2"}), (True, {"base": "tiny", "steps": 16, "batch_size": 4})]
)
def test_claims_share_runs_at_each_ones_best_rate_for_the_first_seed(small, size):
    asked = []

    def each(function, trials):
        assert function is train_update
        asked.extend(trials)
        best = {"lora": 1e-2, "full": 1e-4}  # of seed 5; the other seed would choose the highest rate
        losses = [abs(np.log(t["lr"] / best[t["method"]])) if t["seed"] == 5 else -t["lr"] for t in trials]
        return [{"validation": loss, "trial": trial} for loss, trial in zip(losses, trials, strict=True)]

    contenders = {"A": {"method": "lora", "r": 4}, "all": {"method": "full"}}

    class Asked(Setting):
        attempt = lambda self, function, trials: each(function, trials)

    found = shared_runs(Asked(small, seeds=(5, 6), folder=Path("here")), contenders)
    same = {"data": "legal", "folder": str(Path("here", "updates")), **size}
    assert all(trial.items() >= same.items() for trial in asked)
    assert [one["trial"]["seed"] for one in found["A"]["runs"]] == [5, 6] and found["A"]["runs"][0]["trial"]["r"] == 4
    assert {name: one["lr"] for name, one in found.items()} == (
        {"A": 2e-2, "all": 2e-3} if small else {"A": 1e-2, "all": 1e-4}
    )


def test_another_method_and_another_file_are_refused(train, tmp_path):
    with pytest.raises(ValueError, match="method must be one of lora, dora, full, got 'pissa'"):
        train(method="pissa")
    write_tensors(tmp_path / "x.safetensors", {"model.norm.weight": np.ones(3, np.float32)})
    with pytest.raises(ModelFileError, match=r"x\.safetensors: holds no update"):
        read_update(tmp_path / "x.safetensors")
    with pytest.raises(ModelFileError, match="no such file"):
        read_update(tmp_path / "y.safetensors")
