"""A trial on the tiny base: what it returns, that it leaves the base as it was, and what it refuses."""

import pytest

from minilora.experiments.tiny import VARIANTS, lora_config, samples_of, tiny_base, tiny_run
from minilora.lora.adapters import base_state
from minilora.nn.module import sha256_of

FEW = {"steps": 2, "batch_size": 1, "data": "support", "held_out": 2}


def test_a_trial_is_what_its_settings_say():
    first = tiny_run(lr=1e-2, **FEW)
    tiny_run(lr=1e-2, method="full", **FEW)
    assert tiny_run(lr=1e-2, **FEW) == first
    assert tiny_run(lr=1e-2, **FEW, seed=1)["train"] != first["train"]
    assert len(first["train"]) == 2


@pytest.mark.parametrize("more", [{"variant": name} for name in VARIANTS] + [{"method": "full"}])
def test_the_base_is_as_it_was_behind_a_trial(more):
    model, _ = tiny_base()
    before = sha256_of(base_state(model))
    result = tiny_run(lr=1e-2, **FEW, **more)
    assert sha256_of(base_state(model)) == before
    assert not model.adapters
    assert result["test"] != result["before"]["test"]


def test_full_fine_tuning_trains_every_weight():
    model, _ = tiny_base()
    assert tiny_run(lr=1e-3, method="full", **FEW)["trained"] == sum(p.size for _, p in model.named_parameters())


def test_a_rank_for_each_module():
    result = tiny_run(lr=1e-2, targets={"q_proj": 3, "v_proj": 4}, **FEW)
    assert result["trained"] == 4 * (3 * 256 + 4 * 192)


def test_lora_plus_is_lora_at_a_ratio_of_one():
    plain, same = tiny_run(lr=1e-2, **FEW), tiny_run(lr=1e-2, variant="lora+", ratio=1, **FEW)
    assert same["test"] == plain["test"]
    assert tiny_run(lr=1e-2, variant="lora+", **FEW)["test"] != plain["test"]


def test_the_curve_begins_with_the_base_and_ends_with_the_result():
    result = tiny_run(lr=1e-2, every=1, **FEW)
    assert [step for step, _ in result["curve"]] == [0, 1, 2]
    assert result["curve"][0][1] == result["before"]["validation"]
    assert result["curve"][-1][1] == result["validation"]


def test_validation_and_test_share_no_sample():
    sets = samples_of("support")
    ids = [{sample.ids for sample in sets[name]} for name in ("train", "validation", "test")]
    assert all(ids)
    assert not ids[0] & ids[1]
    assert not (ids[0] | ids[1]) & ids[2]


def test_the_adapter_of_a_variant():
    assert lora_config(8, 32, "all-linear", "pissa").init_lora_weights == "pissa"
    assert lora_config(8, 32, {"q_proj": 3}).rank_of("model.layers.0.self_attn.q_proj") == 3


@pytest.mark.parametrize("wrong", [{"method": "half"}, {"variant": "vera"}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        tiny_run(lr=1e-2, **FEW, **wrong)
