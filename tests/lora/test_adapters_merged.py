"""Adapters that are disabled, merged, combined and removed."""

import numpy as np
import pytest
from smallmodels import IDS, MIX, Net, as_float64, chosen, logits

import minilora as ml
from minilora.lora.adapters import base_state, is_merged, lora_modules, merged_state
from minilora.nn.layers import Linear
from minilora.nn.module import sha256_of


@pytest.mark.parametrize(
    "misuse",
    [
        lambda m: ml.set_adapter(m, "support"),
        lambda m: ml.remove_adapter(m, "legal"),
        lambda m: ml.add_adapter(m, ml.LoraConfig(r=1, lora_alpha=1), "third"),
        lambda m: ml.combine_adapters(m, ["legal", "support"], [1, 1], name="third"),
        lambda m: ml.mixed_batch(m, ["legal"]).__enter__(),
    ],
)
def test_while_merged_everything_else_is_refused_and_changes_nothing(model, misuse):
    ml.set_adapter(model, "legal")
    ml.merge_adapter(model)
    before, inside = list(model.state_dict()), logits(model)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        misuse(model)
    assert list(model.state_dict()) == before and list(model.adapters) == ["legal", "support"]
    assert np.array_equal(logits(model), inside) and is_merged(model)


def test_merging_nothing_is_an_error(model):
    ml.set_adapter(model, None)
    with pytest.raises(ValueError, match="nothing to merge"):
        ml.merge_adapter(model)


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_is_the_base_inside_the_block_and_as_a_statement_until_one_is_chosen(model, merged):
    base = chosen(model, None)
    expected = chosen(model, "legal")
    if merged:
        ml.merge_adapter(model)
        expected = model(IDS).data
    with ml.disable_adapter(model):
        assert np.array_equal(model(IDS).data, base)
    assert np.array_equal(model(IDS).data, expected) and is_merged(model) == merged
    with pytest.raises(KeyError), ml.disable_adapter(model):
        raise KeyError
    assert np.array_equal(logits(model), expected)
    ml.disable_adapter(model)
    assert np.array_equal(logits(model), base) and not is_merged(model)
    assert all(adapter.factor is None for adapter in model.adapters.values())
    np.testing.assert_allclose(chosen(model, "legal"), expected, atol=1e-5)


def test_removed_adapters_leave_the_plain_layers(model, rng):
    base = chosen(model, None)
    ml.set_adapter(model, {"legal": 0.5, "support": 0.5})
    ml.remove_adapter(model, "legal")
    assert list(model.adapters) == ["support"]
    assert all(dict(module.active) == {"support": 0.5} for module in lora_modules(model).values())
    ml.remove_adapter(model, "support")
    assert lora_modules(model) == {}
    assert type(model.model.layers[0].mlp.up_proj) is Linear
    assert np.array_equal(model(IDS).data, base)
    with pytest.raises(ValueError, match="no adapter called 'legal'; it has: none"):
        ml.remove_adapter(model, "legal")


# -- what a model says of its adapters ---------------------------------------------------------------------------------


def test_a_model_says_what_adapters_it_has_and_how_much_of_each_takes_part(model):
    assert list(model.adapters) == ["legal", "support"]
    assert model.adapters["legal"].config == ml.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)
    assert [adapter.factor for adapter in model.adapters.values()] == [None, 1.0]
    ml.set_adapter(model, {"support": 0.25, "legal": 0.5})
    assert [adapter.factor for adapter in model.adapters.values()] == [0.5, 0.25]
    assert "'legal': <active x 0.5: LoraConfig(r=2, lora_alpha=4" in str(model.adapters)
    ml.set_adapter(model, "legal")
    assert "'support': <off: LoraConfig(" in str(model.adapters)
    with ml.mixed_batch(model, ["legal", None, None]):
        assert "'legal': <in a mixed batch: " in str(model.adapters)


def test_the_order_in_which_a_mix_is_written_does_not_change_a_bit(model):
    one = chosen(model, {"legal": 0.3, "support": 0.6})
    assert np.array_equal(chosen(model, {"support": 0.6, "legal": 0.3}), one)


# -- mixes of every kind -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [MIX, *({name: 0.5} for name in MIX)], ids=str)
def test_half_an_update_is_half_beside_the_weights_and_merged_into_them(kinds, which):
    before, mixed = sha256_of(kinds.state_dict()), chosen(kinds, which)
    ml.merge_adapter(kinds)
    np.testing.assert_allclose(logits(kinds), mixed, rtol=1e-9, atol=1e-11)
    state, base = merged_state(kinds), base_state(kinds)
    for key in (key for key in state if key.endswith(".bias")):
        adapters = lora_modules(kinds)[key.removesuffix(".bias")].adapters
        own = {name: adapters[name].bias for name in which if name in adapters}
        trained = [which[name] * (bias.data - base[key]) for name, bias in own.items() if bias is not None]
        np.testing.assert_allclose(state[key] - base[key], sum(trained), atol=1e-12)
    assert sha256_of(kinds.state_dict()) != before
    ml.unmerge_adapter(kinds)
    assert sha256_of(kinds.state_dict()) == before  # weights and biases


@pytest.mark.parametrize("name", ["plain", "bias", "words", "dora"])
def test_a_mix_of_what_was_saved_and_loaded_is_the_mix_of_what_was_there(kinds, tiny_config, tmp_path, name):
    expected = chosen(kinds, {name: 0.5})
    other = as_float64(Net(tiny_config, np.random.default_rng(0)))
    other.load_state_dict(base_state(kinds))
    ml.load_adapter(other, ml.save_adapter(kinds, tmp_path, name), "there")
    assert np.array_equal(chosen(other, {"there": 0.5}), expected)


# -- the update as one matrix ------------------------------------------------------------------------------------------

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("path", [QUERY, "model.embed_tokens", "model.layers.1.mlp.down_proj"])
@pytest.mark.parametrize("merged", [False, True])
def test_the_update_of_a_module_is_what_merging_adds_to_its_weight(kinds, path, merged):
    ml.set_adapter(kinds, MIX)
    alone = {name: ml.delta_weight(kinds, path, name) for name in MIX}
    ml.merge_adapter(kinds)
    added = merged_state(kinds)[f"{path}.weight"] - base_state(kinds)[f"{path}.weight"]
    if not merged:
        ml.unmerge_adapter(kinds)
    np.testing.assert_allclose(ml.delta_weight(kinds, path), added, atol=1e-12)
    np.testing.assert_allclose(sum(MIX[name] * alone[name] for name in MIX), added, atol=1e-12)
    for name in MIX:
        assert np.array_equal(ml.delta_weight(kinds, path, name), alone[name])  # active or not, merged or not


def test_the_update_of_a_plain_adapter_is_scale_b_a_and_zero_where_it_is_not(kinds):
    weights = lora_modules(kinds)[QUERY].adapters["plain"]
    np.testing.assert_allclose(ml.delta_weight(kinds, QUERY, "plain"), 2 * weights.lora_B.data @ weights.lora_A.data)
    assert ml.delta_weight(kinds, QUERY, "words").shape == (32, 32)
    assert not ml.delta_weight(kinds, QUERY, "words").any()
    ml.set_adapter(kinds, None)
    assert not ml.delta_weight(kinds, QUERY).any()
