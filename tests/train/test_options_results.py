"""The options of a job take effect: what it trains, what its files record, and how run.toml repeats it."""

import json
from argparse import Namespace
from collections import Counter
from itertools import pairwise, tee

import numpy as np
import pytest
from jobs import options, same, trained

import minilora as ml
from minilora.cli import main
from minilora.commands.shared import read_options
from minilora.files.tensors import read_tensors
from minilora.nn.optim import AdamW
from minilora.train import job
from minilora.train.log import read_log
from minilora.train.loop import Trainer


def run(home, out, **change):
    """The folder of a quick run."""
    trained(options(home, out, **(dict(steps=3) | change)))
    return out


def tensors(folder):
    return read_tensors(folder / "adapter_model.safetensors")


def column(folder, name):
    return [float(row[name]) for row in read_log(folder / "log.csv")]


@pytest.fixture(scope="module")
def plain(home, tmp_path_factory):
    """The folder of the run with three steps and no other option. Never written to."""
    return run(home, tmp_path_factory.mktemp("plain") / "run")


# -- the same in public names ------------------------------------------------------------------------------------------

ADAPTER = {  # options of the adapter, all of which are LoraConfig's
    "r": 3, "lora_alpha": 6.0, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], "use_rslora": True,
    "exclude_modules": ["down_proj"], "layers_to_transform": [1], "rank_pattern": {"q_proj": 5}, "lora_dropout": 0.5,
    "alpha_pattern": {"v_proj": 64.0}, "init_lora_weights": "gaussian", "freeze_A": True,
}  # fmt: skip
TRAINING = {  # options of training, the first five with the names of `fit`
    "warmup": 0.4, "schedule": "linear", "batch_size": 2, "grad_accumulation": 2, "seed": 3, "lr": 1e-2,
    "weight_decay": 5.0, "max_grad_norm": 1e-3, "lora_plus": 16.0, "max_length": 40,
}  # fmt: skip
FIT = ("warmup", "schedule", "batch_size", "grad_accumulation", "seed")


def rebuilt(home, steps=5, method="lora", **given):
    """The job in public names: the losses, and the arrays that it trained."""
    model, tokenizer = ml.load(home / "base")
    samples = ml.encode_records(ml.split_records(ml.read_records(home / "data.jsonl"))["train"], tokenizer)
    longest = given.get("max_length", 512)
    samples = [ml.Sample(s.ids[:longest], s.labels[:longest]) for s in samples]
    if method == "lora":
        config = {name: given[name] for name in (*ADAPTER, "use_dora") if name in given}
        ml.add_adapter(model, ml.LoraConfig(**dict(r=2, lora_alpha=16.0) | config), seed=given.get("seed", 0))
    else:
        model.requires_grad_(True)
    parameters = model.trainable_parameters()
    scale = ml.lora_plus(parameters, given["lora_plus"]) if "lora_plus" in given else None
    rate = given.get("lr", 2e-3 if method == "lora" else 2e-4)
    optimizer = AdamW(parameters, rate, weight_decay=given.get("weight_decay", 0.0), lr_scale=scale)
    norm, how = given.get("max_grad_norm", 1.0), {name: given[name] for name in FIT if name in given}
    history = ml.fit(model, samples, steps, optimizer=optimizer, max_norm=norm, **dict(batch_size=4) | how)
    return history.losses, ml.adapter_state(model, "default") if method == "lora" else model.state_dict()


WAYS = {
    "no option": {},
    "an adapter's": ADAPTER,
    "those of training": TRAINING,
    "all": ADAPTER | TRAINING,
    "dora": {"use_dora": True},
    "at random": {"init_lora_weights": False},
    "a constant rate": {"schedule": "constant", "steps": 2},
    "full": {"method": "full"},
    "full, another rate": {"method": "full", "lr": 1e-2},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_option_does_what_it_names_to_the_last_bit(way, home, tmp_path):
    metrics = trained(options(home, tmp_path / "run", **dict(steps=5, keep="last") | WAYS[way]))
    losses, weights = rebuilt(home, **WAYS[way])
    assert metrics["train_loss"] == losses
    if "method" in WAYS[way]:
        assert same(ml.load(tmp_path / "run")[0].state_dict(), weights)
    else:
        model, _ = ml.load(home / "base")
        ml.load_adapter(model, tmp_path / "run")
        assert same(ml.adapter_state(model, "default"), weights)


@pytest.fixture(scope="module")
def with_all(home):
    return rebuilt(home, **ADAPTER | TRAINING)


@pytest.mark.parametrize("name", [*ADAPTER, *TRAINING])
def test_each_option_of_the_test_above_changes_the_result(name, home, with_all):
    losses, weights = with_all
    others, without = rebuilt(home, **{key: value for key, value in (ADAPTER | TRAINING).items() if key != name})
    assert others != losses or not same(without, weights)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(3, 1), (5, 1), (2, 3), (8, 1), (20, 1)])
def test_in_whole_epochs_every_record_is_trained_equally_often(batch_size, accumulation, home, tmp_path, monkeypatch):
    taken, logged = Counter(), []

    class Counting(Trainer):
        def step(self):
            self.batches, again = tee(self.batches)
            taken.update(sample.ids for sample in next(again))
            loss = super().step()
            logged.append(job.values_of(self)["train/epoch"])
            return loss

    monkeypatch.setattr(job, "Trainer", Counting)
    sizes = dict(batch_size=batch_size, grad_accumulation=accumulation)
    metrics = trained(options(home, tmp_path / "run", steps=None, epochs=3.0, **sizes))
    assert len(taken) == metrics["records"]["train"] and set(taken.values()) == {3}
    per_epoch = metrics["steps"] / 3
    assert logged == pytest.approx([step / per_epoch for step in range(1, metrics["steps"] + 1)])
    assert [step for step, _ in metrics["validation_loss"]] == [per_epoch, 2 * per_epoch, 3 * per_epoch]


def test_a_part_of_an_epoch_is_rounded_up(home, tmp_path):
    assert trained(options(home, tmp_path / "run", steps=None, epochs=1.1, batch_size=3))["steps"] == 4  # of 3.3


def test_recomputing_takes_less_memory_for_the_same_numbers(home, tmp_path, plain):
    metrics = trained(options(home, tmp_path / "run", steps=3, recompute=True))
    assert column(tmp_path / "run", "loss") == column(plain, "loss")
    held = metrics["peak_memory_bytes"]["by_owner"]["activations"]
    assert held < json.loads((plain / "metrics.json").read_text())["peak_memory_bytes"]["by_owner"]["activations"]


def test_the_saved_adapter_and_validation_have_the_adapter_scale_of_strength(home, tmp_path, plain):
    metrics = trained(options(home, tmp_path / "run", steps=3, strength=0.5))
    assert column(tmp_path / "run", "loss") == column(plain, "loss")  # training is the same
    whole, half = tensors(plain), tensors(tmp_path / "run")
    for name, array in whole.items():
        np.testing.assert_array_equal(half[name], array * np.float32(0.5) if "lora_B" in name else array)
    model, tokenizer = ml.load(home / "base")
    ml.load_adapter(model, tmp_path / "run")
    held_out = ml.encode_records(ml.split_records(ml.read_records(home / "data.jsonl"))["validation"], tokenizer)
    assert metrics["validation_loss"][-1][1] == pytest.approx(ml.mean_loss(model, held_out), rel=1e-5)
    assert metrics["options"]["strength"] == 0.5


def test_an_adapter_that_cannot_be_scaled_is_refused_before_it_is_trained(home, tmp_path, monkeypatch):
    run(home, tmp_path / "first", steps=1, use_dora=True)
    monkeypatch.setattr(Trainer, "run", None)  # nothing is trained
    with pytest.raises(ValueError, match="only a plain LoRA can be scaled"):
        run(home, tmp_path / "on", adapter=str(tmp_path / "first"), strength=0.5, r=8)
    assert not list(tmp_path.glob("on*"))


# -- the files of a run ------------------------------------------------------------------------------------------------


def test_the_log_has_a_row_for_each_step_with_the_numbers_of_the_metrics(plain):
    metrics = json.loads((plain / "metrics.json").read_text(encoding="utf-8"))
    assert column(plain, "step") == [1, 2, 3] and column(plain, "loss") == metrics["train_loss"]
    assert all(speed > 0 for speed in column(plain, "tokens_per_second"))
    memory = column(plain, "peak_memory_bytes")
    peaks = [metrics["base_bytes"], *memory, metrics["peak_memory_bytes"]["measured"]]
    assert all(first <= 1.01 * then for first, then in pairwise(peaks))  # the system does not count exactly


FLAGS = """--r 3 --lora-alpha 6 --target-modules q_proj v_proj up_proj --exclude-modules v_proj --layers-to-transform
0 1 --rank-pattern q_proj=2 --alpha-pattern up_proj=5 --lora-dropout 0.2 --use-rslora --use-dora
--init-lora-weights gaussian --lora-plus 4 --steps 3 --lr 0.003 --warmup 0.3 --schedule linear --weight-decay 0.1
--max-grad-norm 0.5 --batch-size 2 --grad-accumulation 2 --max-length 60 --seed 3 --eval-records 1 --recompute"""


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("flags", [FLAGS, "--epochs 0.5 --method full"], ids=["lora", "full"])
def test_the_file_of_a_run_repeats_it_to_the_last_byte_from_any_folder(flags, home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(home)
    job = ["finetune", "--base", "./base", "--data", "data.jsonl"]
    assert main([*job, *flags.split(), "--out", str(tmp_path / "one")]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", "--config", "one/run.toml", "--out", str(tmp_path / "two")]) == 0
    capsys.readouterr()
    one, two = ((tmp_path / name) for name in ("one", "two"))
    files = [path.name for path in one.glob("*.safetensors")] + [path.name for path in one.glob("adapter_*.json")]
    assert files
    for name in set(files) - {"adapter_config.json"}:
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert [column(one, name) for name in ("loss", "lr")] == [column(two, name) for name in ("loss", "lr")]
    texts = [(folder / "run.toml").read_text(encoding="utf-8").replace(str(folder), "") for folder in (one, two)]
    assert texts[0] == texts[1]


def test_flags_take_precedence_over_a_file_and_a_file_over_what_a_resumed_run_began_with(plain, tmp_path):
    (tmp_path / "x.toml").write_text("r = 5", encoding="utf-8")
    chosen = read_options(ml.Options, Namespace(config=tmp_path / "x.toml", seed=7), {"r": 3, "seed": 1, "lr": 0.1})
    assert (chosen.r, chosen.seed, chosen.lr) == (5, 7, 0.1)
    chosen = read_options(ml.Options, Namespace(config=plain / "run.toml", steps=1, method="full"), {})
    assert (chosen.method, chosen.steps, chosen.learning_rate) == ("full", 1, 2e-4)  # the method's own rate
    assert chosen.batch_size == 4
