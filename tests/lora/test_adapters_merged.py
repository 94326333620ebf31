"""Adapters that are disabled, merged, combined and removed."""

import numpy as np
import pytest
from smallmodels import IDS, MIX, Net, as_float64, chosen, logits, lora_config, shaken

import minilora as ml
from minilora.lora.adapters import base_state, is_merged, lora_modules, merged_state, scale_adapter
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


class Coder(ml.Module):
    """x Wᵀ W: a matrix that two modules hold."""

    def __init__(self, shared):
        rng = np.random.default_rng(0)
        self.enc, self.dec, self.last = (Linear(4, 4, rng=rng) for _ in range(3))
        if shared == "weight":
            self.dec.weight = self.enc.weight
        elif shared == "layer":
            self.dec = self.enc
        else:
            self.table = self.enc.weight

    def forward(self, x):
        return self.last(self.dec(self.enc(x)) @ getattr(self, "table", self.dec.weight))


@pytest.mark.parametrize(
    ("shared", "targets", "words"),
    [
        ("weight", ["enc", "dec"], "enc and dec share one weight"),
        ("weight", ["enc"], "enc and dec share one weight"),
        ("weight", ["dec"], "enc and dec share one weight"),
        ("layer", ["enc", "dec"], "enc and dec share one weight"),
        ("table", ["enc"], "the model and enc share one weight"),
    ],
)
def test_an_update_is_not_merged_into_a_matrix_of_two_modules_and_works_unmerged(shared, targets, words):
    model, x = Coder(shared), ml.Tensor(np.eye(4, dtype=np.float32))
    before, digest = model(x).data, sha256_of(model.state_dict())
    for name, names in (("legal", targets), ("other", ["last"])):
        assert ml.add_adapter(model, lora_config(r=2, target_modules=names), name) == names
        shaken(model, name)
    ml.set_adapter(model, "legal")
    enc, dec = (
        getattr(model, name).weight.data + (ml.delta_weight(model, name) if name in targets else 0)
        for name in ("enc", "dec")
    )
    expected = enc.T @ dec.T @ model.enc.weight.data @ model.last.weight.data.T
    np.testing.assert_allclose(model(x).data, expected, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match=rf"^{words}, and merging would change both: use .* without merging it, or"):
        ml.merge_adapter(model)
    assert not is_merged(model)
    ml.set_adapter(model, "other")  # whose matrix is held once
    ml.merge_adapter(model)
    ml.unmerge_adapter(model)
    for name in ("legal", "other"):
        ml.remove_adapter(model, name)
    assert sha256_of(model.state_dict()) == digest and np.array_equal(model(x).data, before)


def test_a_block_with_two_names_is_adapted_scaled_merged_and_restored_once(tiny_model):
    tiny_model.model.layers[1] = tiny_model.model.layers[0]
    as_float64(tiny_model)
    before = sha256_of(tiny_model.state_dict())
    ml.add_adapter(tiny_model, lora_config())
    shaken(tiny_model)
    base, expected = chosen(tiny_model, None), chosen(tiny_model, {"default": 0.3})
    ml.set_adapter(tiny_model, "default")
    scale_adapter(tiny_model, "default", 0.3)
    np.testing.assert_allclose(logits(tiny_model), expected, rtol=1e-9, atol=1e-11)
    assert not np.allclose(base, expected, rtol=1e-3)
    ml.merge_adapter(tiny_model)
    np.testing.assert_allclose(logits(tiny_model), expected, rtol=1e-9, atol=1e-11)
    assert sha256_of(base_state(tiny_model)) == before
    ml.unmerge_adapter(tiny_model)
    ml.remove_adapter(tiny_model, "default")
    assert sha256_of(tiny_model.state_dict()) == before and tiny_model.model.layers[1] is tiny_model.model.layers[0]


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


BLOCKS = {"disabled": ml.disable_adapter, "mixed": lambda model: ml.mixed_batch(model, ["support", "support"])}
CHANGES = {
    "choosing another": lambda m: ml.set_adapter(m, "support"),
    "choosing none": lambda m: ml.set_adapter(m, None),
    "adding": lambda m: ml.add_adapter(m, ml.LoraConfig(r=1, lora_alpha=1), "third"),
    "merging another": lambda m: (ml.set_adapter(m, "support"), ml.merge_adapter(m)),
    "removing another": lambda m: ml.remove_adapter(m, "support"),
    "a block within": lambda m: [CHANGES["adding"](m) for _ in [0] if not ml.disable_adapter(m).__exit__()],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("before", ["legal", {"legal": 0.5, "support": 0.25}, None, "merged"], ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_after_a_block_the_same_is_active_trainable_and_merged_whatever_it_changed(model, block, before, change):
    merged = before == "merged"
    if merged and block == "mixed":
        pytest.skip("a mixed batch is refused while merged")
    ml.set_adapter(model, "legal" if merged else before)
    if merged:
        ml.merge_adapter(model)

    def state():
        factors = {name: adapter.factor for name, adapter in model.adapters.items() if adapter.factor is not None}
        return {**factors, "support": None}, [*model.trainable_parameters()], is_merged(model)

    outcome = state(), logits(model)
    with BLOCKS[block](model):
        change(model)
    assert state() == outcome[0]
    if "support" in model.adapters:
        np.testing.assert_array_equal(logits(model), outcome[1])


def test_what_is_removed_in_a_block_is_no_longer_merged_after_it(model):
    base = chosen(model, None)
    ml.set_adapter(model, "legal")
    ml.merge_adapter(model)
    with ml.disable_adapter(model):
        ml.remove_adapter(model, "legal")
    assert np.array_equal(logits(model), base) and not is_merged(model) and not model.trainable_parameters()


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
    assert sha256_of(kinds.state_dict()) != before
    ml.unmerge_adapter(kinds)
    assert sha256_of(kinds.state_dict()) == before


@pytest.mark.parametrize("name", ["plain", "some", "dora"])
def test_a_mix_of_what_was_saved_and_loaded_is_the_mix_of_what_was_there(kinds, tiny_config, tmp_path, name):
    expected = chosen(kinds, {name: 0.5})
    other = as_float64(Net(tiny_config, np.random.default_rng(0)))
    other.load_state_dict(base_state(kinds))
    ml.load_adapter(other, ml.save_adapter(kinds, tmp_path, name), "there")
    assert np.array_equal(chosen(other, {"there": 0.5}), expected)


# -- the update as one matrix ------------------------------------------------------------------------------------------

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("path", [QUERY, "model.layers.1.mlp.down_proj"])
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
    key = QUERY.replace("q_proj", "k_proj")
    assert ml.delta_weight(kinds, key, "some").shape == (16, 32)
    assert not ml.delta_weight(kinds, key, "some").any()
    ml.set_adapter(kinds, None)
    assert not ml.delta_weight(kinds, QUERY).any()
