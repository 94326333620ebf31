"""The learning rate for a base follows from the size of its weights, where none is given."""

from dataclasses import replace

import numpy as np
import pytest
from jobs import options

import minilora as ml
from minilora.experiments.grid import SweepOptions
from minilora.experiments.sweep import sweep
from minilora.nn.layers import Linear
from minilora.nn.llama import Llama
from minilora.train import rate
from minilora.train.job import finetune
from minilora.train.options import RATE, Options
from minilora.train.rate import rate_of, usual_rate


def scaled(config, factor):
    """A model whose matrices have the root mean square 0.2 times `factor`, and whose other weights are large."""
    model, rng = Llama(config, np.random.default_rng(0)), np.random.default_rng(1)
    for name, p in model.named_parameters():
        p.data[...] = 9.0
        if "proj" in name:
            p.data[...] = rng.choice([-0.2, 0.2], p.shape) * factor
    return model


@pytest.mark.parametrize(("factor", "expected"), [(1, 2e-3), (0.2, 4e-4), (0.1, 2e-4), (0.08, 2e-4), (0, RATE)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_rate_is_a_hundredth_of_the_root_mean_square_of_the_matrices_and_of_nothing_else(
    tiny_config, factor, expected, tied
):
    model = scaled(replace(tiny_config, tie_word_embeddings=tied), factor)
    assert usual_rate(model) == expected
    ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False))
    assert usual_rate(model) == expected


def test_every_matrix_counts_alike(tiny_config):
    model = scaled(tiny_config, 1)
    *_, last = (module for name, module in model.named_modules() if isinstance(module, Linear) and "proj" in name)
    last.weight.data[...] = 20.0
    assert usual_rate(model) == float(f"{np.sqrt(20**2 / 14 + 0.2**2 * 13 / 14) / 100:.0e}") > 2e-2


@pytest.mark.real
@pytest.mark.parametrize("quantized", [False, pytest.param("nf4", marks=pytest.mark.long)])
def test_the_rate_that_was_measured_on_smollm2_is_the_one_of_its_weights(smollm2, quantized):
    model = ml.load("smollm2", quantized)[0] if quantized else smollm2[0]
    assert usual_rate(model) == rate_of("smollm2") == rate_of("tiny") == RATE


@pytest.mark.parametrize(
    "change", [{}, {"method": "full"}, {"loss": "dpo"}, {"method": "full", "loss": "dpo"}], ids=str
)
def test_full_fine_tuning_and_dpo_take_a_tenth(change):
    tenths = len(change)
    assert Options(**change).on_base(3e-4).lr == pytest.approx(3e-4 / 10**tenths)
    assert Options(**change).learning_rate == pytest.approx(RATE / 10**tenths)
    assert Options(lr=0.5, **change).on_base(3e-4).lr == 0.5


def test_a_job_says_the_rate_and_writes_it_down_unless_one_is_given(home, tmp_path, said, caplog, monkeypatch):
    monkeypatch.setattr("minilora.train.job.usual_rate", lambda model: 3e-4)
    line = "learning rate 0.0003, which follows from the size of the base's weights (--lr: another)"
    for lr, expected in ((None, 3e-4), (7e-4, 7e-4)):
        chosen = replace(options(home, tmp_path / "run", steps=1, overwrite=True), lr=lr)
        metrics = finetune(chosen, measure=False, answers=False)
        assert metrics["options"]["lr"] == Options.read(tmp_path / "run" / "run.toml").lr == expected
        assert (line in said()) == (lr is None)
        caplog.clear()
    chosen = Options(base="tiny", data=str(home / "data.jsonl"), out=str(tmp_path / "tiny"), steps=1)
    assert finetune(chosen, measure=False, answers=False)["options"]["lr"] == RATE


def test_a_sweep_says_the_rate_of_each_base(home, tmp_path, monkeypatch):
    rate_of.cache_clear()
    monkeypatch.setattr(rate, "usual_rate", lambda model: 3e-4)
    base, data = [str(home / "base")], [str(home / "data.jsonl")]
    result = sweep(SweepOptions(base=base, data=data, steps=[1], r=[1, 2], jobs=1, out=str(tmp_path)))
    assert [row["lr"] for row in result["settings"]] == [3e-4, 3e-4]
    rate_of.cache_clear()
