"""Variants of LoRA: initialised as no change, with the right gradient, merged, and the base left alone."""

import dataclasses
import json
import re

import numpy as np
import pytest
from smallmodels import IDS, VARIANTS, Net, as_float64, every_variant, logits, one_layer, shaken
from smallmodels import lora_config as config

from minilora.engine import ops
from minilora.engine.parallel import current_micro_batch
from minilora.engine.tensor import Tensor, no_grad
from minilora.lora.adapters import (
    adapter_state,
    add_adapter,
    base_state,
    disable_adapter,
    lora_modules,
    merge_adapter,
    merged_state,
    remove_adapter,
    scale_adapter,
    unmerge_adapter,
)
from minilora.lora.combine import combine_adapters
from minilora.lora.config import FROM_BASE, LoraConfig
from minilora.lora.layer import LoraLinear, new_weights
from minilora.lora.llamacpp import save_gguf_adapter
from minilora.lora.peft import load_adapter, save_adapter
from minilora.lora.provenance import PROVENANCE_FILE
from minilora.lora.variants import Dropout, lora_plus
from minilora.nn.layers import Linear
from minilora.nn.llama import Llama
from minilora.nn.module import sha256_of
from minilora.nn.optim import AdamW

# -- what holds for all of them ----------------------------------------------------------------------------------------

# An untied head makes a difference to those of the embedding alone, and one other is tried on it.
HEADS = [(settings, tied) for settings in VARIANTS.values() for tied in (True, False)
         if tied or "target_modules" in settings or settings == {"use_dora": True}]  # fmt: skip
every_variant_and_head = pytest.mark.parametrize(("settings", "tied"), HEADS, ids=str)


def test_every_field_of_a_config_that_makes_another_adapter_has_a_row_in_the_table():
    sizes = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform"}
    tried = {(name, str(value)) for settings in VARIANTS.values() for name, value in settings.items()}
    missing = {f.name for f in dataclasses.fields(LoraConfig)} - sizes - {name for name, _ in tried}
    assert not missing, "VARIANTS of tests/smallmodels.py needs a row with it"
    assert {("init_lora_weights", name) for name in FROM_BASE} <= tried


@every_variant_and_head
def test_a_variant_starts_as_no_change_and_learns(tiny_config, rng, settings, tied):
    model = Llama(dataclasses.replace(tiny_config, tie_word_embeddings=tied), rng)
    before, digest = logits(model), sha256_of(base_state(model))
    add_adapter(model, config(**settings))
    if "pissa" in settings.values():  # two equal products cancel: to the last bit only if the library repeats itself
        np.testing.assert_allclose(logits(model), before, atol=1e-6)
    else:
        assert logits(model).tobytes() == before.tobytes()
    optimizer = AdamW(model.trainable_parameters(), lr=0.02)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model.loss(IDS, IDS)
        loss.backward()
        assert all(p.grad is not None for p in optimizer.parameters)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert np.abs(logits(model) - before).max() > 1e-3
    assert sha256_of(base_state(model)) == digest
    assert all(p.dtype == np.float32 and p.grad.dtype == np.float32 for p in optimizer.parameters)


@every_variant_and_head
def test_a_variant_merges_unmerges_and_goes_away_without_a_trace(tiny_config, rng, settings, tied):
    model = as_float64(Llama(dataclasses.replace(tiny_config, tie_word_embeddings=tied), rng))
    before, names, digest = logits(model), list(model.state_dict()), sha256_of(base_state(model))
    add_adapter(model, config(**settings))
    with pytest.raises(ValueError, match="nothing is merged"):
        merged_state(model)
    adapted = logits(shaken(model))
    assert np.abs(adapted - before).max() > 1e-3
    for _ in range(2):  # twice is once
        merge_adapter(model)
        np.testing.assert_allclose(logits(model), adapted, rtol=1e-9, atol=1e-11)
    assert sha256_of(base_state(model)) == digest
    state = merged_state(model)
    assert all(array.flags.c_contiguous for array in state.values())
    assert ("lm_head.weight" in state) == (not tied)
    plain = Llama(dataclasses.replace(tiny_config, tie_word_embeddings=tied))
    plain.load_state_dict(state)
    np.testing.assert_allclose(logits(plain), adapted, rtol=1e-9, atol=1e-11)
    for step in (lambda: None, lambda: unmerge_adapter(model)):
        step()
        with disable_adapter(model):
            assert logits(model).tobytes() == before.tobytes()
    assert logits(model).tobytes() == adapted.tobytes()
    remove_adapter(model, "default")
    assert list(model.state_dict()) == names and sha256_of(model.state_dict()) == digest
    assert not lora_modules(model) and logits(model).tobytes() == before.tobytes()


@every_variant
def test_what_takes_a_variant_apart_keeps_its_update_or_refuses_it(tiny_config, rng, tmp_path, settings):
    untied = dataclasses.replace(tiny_config, tie_word_embeddings=False)  # llama.cpp's files have no other embedding
    model = Llama(untied, rng)
    plain, base = dict(model.state_dict()), logits(model)
    add_adapter(model, config(**settings))
    expected = logits(shaken(model))

    def computed(how):
        other = Llama(untied)
        other.load_state_dict(plain)
        load_adapter(other, save_adapter(model, tmp_path / "adapter", overwrite=True))
        try:
            how(other)
        except ValueError as error:
            assert re.search(r"\b(DoRA|PiSSA)\b", str(error)), error
            return None
        return logits(other)

    def without_notes(other):  # what PEFT reads
        (tmp_path / "adapter" / PROVENANCE_FILE).unlink()
        load_adapter(other, tmp_path / "adapter", "peft")

    def by_llama_cpp(other):
        load_adapter(other, save_gguf_adapter(model, tmp_path / "adapter.gguf"), "cpp")

    def scaled(other):
        scale_adapter(other, "default", 1e-9)

    for how in (without_notes, by_llama_cpp, lambda other: combine_adapters(other, ["default"], [1.0]), scaled):
        found, wanted = computed(how), base if how is scaled else expected
        if found is None:
            assert how is not without_notes
        else:
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


# -- dropout -----------------------------------------------------------------------------------------------------------


def test_dropout_keeps_its_share_and_the_mean():
    y = Dropout(0.25, seed=1)(Tensor(np.ones((200, 100), np.float32))).data
    assert y.dtype == np.float32
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (y == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert y.mean() == pytest.approx(1, abs=0.01)


def masks(drop, parts=(0,)):
    """The next mask of each micro-batch."""
    found = []
    for part in parts:
        token = current_micro_batch.set(part)
        found.append(drop(Tensor(np.ones((8, 8)))).data.tobytes())
        current_micro_batch.reset(token)
    return found


def test_masks_differ_between_draws_micro_batches_and_seeds_and_are_the_same_again_or_continue():
    one, two, other = Dropout(0.5, 1), Dropout(0.5, 1), Dropout(0.5, 2)
    first = masks(one, (0, 1, 2, 0))
    assert first == masks(two, (0, 1, 2, 0)) and len({*first, *masks(other)}) == 5
    assert one.state() == {"seed": 1, "draws": {"0": 2, "1": 1, "2": 1}}
    other.restore(json.loads(json.dumps(one.state())))
    assert masks(other, (1, 0)) == masks(one, (1, 0))


@pytest.mark.parametrize(
    "state", [{"seed": -1, "draws": {}}, {"seed": 1, "draws": {"0": -1}}, {"seed": 2.0, "draws": {"0": 1}}, {"seed": 1}]
)
def test_a_refused_state_changes_nothing(state):
    drop = Dropout(0.5, 7)
    masks(drop, (0, 1, 1))
    before = drop.state()
    with pytest.raises((ValueError, KeyError)):
        drop.restore(state)
    assert drop.state() == before == {"seed": 7, "draws": {"0": 1, "1": 2}}


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("init", [False, "pissa"])
@pytest.mark.parametrize("factors", [{"a": 1.0}, {"a": 1.0, "b": 0.5}], ids=str)
def test_only_the_correction_sees_dropout_and_the_frozen_product_does_not(rng, dora, init, factors):
    """With DoRA it is the input of the whole correction, as in PEFT. PiSSA's frozen product is that of the residual."""
    settings = {"use_dora": dora, "init_lora_weights": init}
    made = {name: one_layer(rng, lora_dropout=0.5 if name == "a" else 0.3, **settings) for name in factors}
    layer, _ = made["a"]
    layer.adapters, layer.active = {name: share for name, (_, share) in made.items()}, factors
    for parameter in (p for share in layer.adapters.values() for p in share.trainable_parameters().values()):
        parameter.data *= rng.uniform(0.5, 2, parameter.shape)
    x = rng.standard_normal((4, 6))
    expected = x @ layer.weight.data.T
    for name, share in layer.adapters.items():
        seen = x * Dropout(share.dropout.p, share.dropout.seed)(Tensor(np.ones_like(x))).data
        expected += factors[name] * seen @ share.delta(layer.weight.data).T
        if share.initial is not None:
            expected -= factors[name] * (x - seen) @ (share.scale * share.initial[1] @ share.initial[0]).T
    np.testing.assert_allclose(layer(Tensor(x)).data, expected, rtol=1e-11)


def test_dropout_acts_in_training_only_and_changes_nothing_else(tiny_config):
    models = [Llama(tiny_config, np.random.default_rng(0)) for _ in range(4)]
    models[3].eval()
    for model, p, seed in zip(models, (0, 0.5, 0.5, 0.5), (4, 4, 5, 4), strict=True):
        add_adapter(model, config(init_lora_weights=False, lora_dropout=p), seed=seed)
        assert {module.training for _, module in model.named_modules()} == {model is not models[3]}
    plain, drops, other, added_in_eval = models
    assert sha256_of(adapter_state(plain, "default")) == sha256_of(adapter_state(drops, "default"))
    seeds = [module.adapters["default"].dropout.seed for module in lora_modules(drops).values()]
    assert len(set(seeds)) == len(seeds)
    expected, loss = plain.loss(IDS, IDS).item(), lambda model: model.loss(IDS, IDS).item()
    with no_grad():
        assert loss(drops) == expected
    assert loss(drops.eval()) == loss(added_in_eval) == expected
    losses = [loss(drops.train()) for _ in range(3)]
    assert len({expected, *losses, loss(other)}) == 5
    again = Llama(tiny_config, np.random.default_rng(0))
    add_adapter(again, config(init_lora_weights=False, lora_dropout=0.5), seed=4)
    assert [loss(again) for _ in range(3)] == losses


# -- DoRA --------------------------------------------------------------------------------------------------------------


def test_the_norm_takes_no_part_in_the_gradient(rng):
    """The gradient of A is that of the formula with ‖V‖ as a constant; letting the norm take part gives another."""
    layer, share = one_layer(rng, use_dora=True, init_lora_weights=False)
    share.lora_magnitude_vector.data *= 1.5
    x, g = rng.standard_normal((4, 6)), rng.standard_normal((4, 5))
    layer(Tensor(x)).backward(g)

    def by_hand(detached):
        w, a = Tensor(layer.weight.data), Tensor(share.lora_A.data, requires_grad=True)
        v = w + Tensor(share.lora_B.data) @ a * share.scale
        norms = ops.sqrt((v * v).sum(axis=1, keepdims=True))
        y = x @ (v * share.lora_magnitude_vector.data[:, None] / (norms.detach() if detached else norms)).T
        y.backward(g)
        return a.grad

    np.testing.assert_allclose(share.lora_A.grad, by_hand(detached=True), rtol=1e-10)
    assert np.abs(share.lora_A.grad - by_hand(detached=False)).max() > 1e-2
    with pytest.raises(ValueError, match="base's matrix"):
        share.delta()


def test_a_row_of_zeros_stays_finite(rng):
    base = Linear(6, 5, rng=rng)
    base.weight.data[2] = 0
    layer = LoraLinear(base)
    share = layer.adapters["a"] = new_weights("x", base, config(r=2, use_dora=True), rng)
    layer.active = {"a": 1.0}
    x = Tensor(rng.standard_normal((4, 6)).astype(np.float32))
    y = layer(x)
    np.testing.assert_array_equal(y.data, base(x).data)
    y.backward(np.ones_like(y.data))
    assert all(np.isfinite(p.grad).all() for p in (share.lora_A, share.lora_B, share.lora_magnitude_vector))


# -- PiSSA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_pissa_starts_with_the_best_approximation_of_the_matrix(rng, shape, rslora):
    layer, share = one_layer(rng, *shape, init_lora_weights="pissa", use_rslora=rslora)
    s = np.linalg.svd(layer.weight.data, compute_uv=False)
    rest = layer.weight.data - share.scale * share.lora_B.data @ share.lora_A.data
    np.testing.assert_allclose(np.linalg.norm(rest), np.linalg.norm(s[2:]), rtol=1e-10)  # Eckart & Young
    balance = np.linalg.norm(share.lora_A.data, axis=1), np.linalg.norm(share.lora_B.data, axis=0)
    np.testing.assert_allclose(*balance, rtol=1e-10)  # the singular values are shared evenly
    np.testing.assert_allclose(balance[0] ** 2 * share.scale, s[:2], rtol=1e-10)


# -- LoRA+ -------------------------------------------------------------------------------------------------------------


def test_the_rates_of_lora_plus_by_kind_of_parameter(tiny_config, rng):
    model = Net(tiny_config, rng)
    add_adapter(model, config(target_modules=["q_proj"], use_dora=True))
    scales = lora_plus(model.trainable_parameters(), 4.0)
    assert {name.rpartition(".")[2]: scale for name, scale in scales.items()} == {
        "lora_A": 1.0, "lora_B": 4.0, "lora_magnitude_vector": 4.0,
    }  # fmt: skip
    assert set(lora_plus(model.trainable_parameters()).values()) == {1.0, 16.0}


def test_what_lora_plus_cannot_use_is_refused(tiny_model):
    with pytest.raises(ValueError, match="lora_B"):
        lora_plus(tiny_model.trainable_parameters())
    add_adapter(tiny_model, config())
    for ratio in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="ratio"):
            lora_plus(tiny_model.trainable_parameters(), ratio)
