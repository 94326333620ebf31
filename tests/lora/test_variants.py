"""The variants of LoRA: each starts where it should, has the right gradient, merges, and leaves the base alone."""

import dataclasses
import json

import numpy as np
import pytest
from smallmodels import EMBED, IDS, VARIANTS, as_float64, every_variant, logits, one_layer, shaken
from smallmodels import lora_config as config

from minilora.engine import ops
from minilora.engine.parallel import current_micro_batch
from minilora.engine.tensor import Tensor, no_grad
from minilora.lora.adapters import (
    adapter_state,
    add_adapter,
    base_state,
    disable_adapter,
    install_adapter,
    lora_modules,
    merge_adapter,
    merged_state,
    plan_adapter,
    remove_adapter,
    set_adapter,
    unmerge_adapter,
)
from minilora.lora.layer import LoraLinear, LoraWeights, new_weights
from minilora.lora.variants import Dropout, config_with_initial, dora_update, lora_plus, row_norms
from minilora.nn.layers import Linear
from minilora.nn.llama import Llama
from minilora.nn.module import sha256_of
from minilora.nn.optim import AdamW

# -- what holds for all of them ----------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "untied head"])
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


@every_variant
@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "untied head"])
def test_a_variant_merges_unmerges_and_goes_away_without_a_trace(tiny_config, rng, settings, tied):
    model = as_float64(Llama(dataclasses.replace(tiny_config, tie_word_embeddings=tied), rng))
    before, names, digest = logits(model), list(model.state_dict()), sha256_of(base_state(model))
    add_adapter(model, config(**settings))
    adapted = logits(shaken(model))
    assert np.abs(adapted - before).max() > 1e-3
    merge_adapter(model)
    np.testing.assert_allclose(logits(model), adapted, rtol=1e-9, atol=1e-11)
    merge_adapter(model)
    np.testing.assert_allclose(logits(model), adapted, rtol=1e-9, atol=1e-11)
    assert sha256_of(base_state(model)) == digest
    with disable_adapter(model):
        assert logits(model).tobytes() == before.tobytes()
    unmerge_adapter(model)
    assert logits(model).tobytes() == adapted.tobytes()
    with disable_adapter(model):
        assert logits(model).tobytes() == before.tobytes()
    remove_adapter(model, "default")
    assert list(model.state_dict()) == names and sha256_of(model.state_dict()) == digest
    assert not lora_modules(model) and logits(model).tobytes() == before.tobytes()


@every_variant
@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "untied head"])
def test_a_merged_variant_is_a_plain_model(tiny_config, rng, settings, tied):
    model = as_float64(Llama(dataclasses.replace(tiny_config, tie_word_embeddings=tied), rng))
    add_adapter(model, config(**settings))
    with pytest.raises(ValueError, match="nothing is merged"):
        merged_state(model)
    expected = logits(shaken(model))
    merge_adapter(model)
    state = merged_state(model)
    assert all(array.flags.c_contiguous for array in state.values())
    assert ("lm_head.weight" in state) == (not tied or "embed_tokens" in settings.get("target_modules", ()))
    plain = Llama(dataclasses.replace(tiny_config, tie_word_embeddings="lm_head.weight" not in state))
    plain.load_state_dict(state)
    np.testing.assert_allclose(logits(plain), expected, rtol=1e-9, atol=1e-11)


MIX = {"plain": 0.5, "dora": 0.7, "pissa": -0.3}


def test_variants_stand_side_by_side_and_their_updates_add_up(tiny_model):
    model = as_float64(tiny_model)
    kinds = {"plain": {}, "dora": VARIANTS["DoRA on the embedding"], "pissa": VARIANTS["PiSSA"]}
    deltas = {}
    for seed, (name, settings) in enumerate(kinds.items()):
        add_adapter(model, config(**settings), name=name, seed=seed)
        shaken(model, name, seed)
    for path, module in lora_modules(model).items():
        w = module.matrix(module.weight.data)
        deltas[path] = module.matrix(
            sum(f * module.adapters[n].delta(w) for n, f in MIX.items() if n in module.adapters)
        )
    set_adapter(model, MIX)
    mixed = logits(model)
    merge_adapter(model)
    np.testing.assert_allclose(logits(model), mixed, rtol=1e-9, atol=1e-11)
    for path, delta in deltas.items():
        got = merged_state(model)[f"{path}.weight"] - base_state(model)[f"{path}.weight"]
        np.testing.assert_allclose(got, delta, atol=1e-12)


# -- dropout -----------------------------------------------------------------------------------------------------------


def test_dropout_keeps_its_share_and_the_mean():
    drop = Dropout(0.25, seed=1)
    y = drop(Tensor(np.ones((200, 100), np.float32))).data
    assert y.dtype == np.float32
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (y == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert y.mean() == pytest.approx(1, abs=0.01)


def test_dropout_makes_other_holes_each_time_and_the_same_ones_from_the_same_seed():
    x = Tensor(np.ones((8, 8)))
    one, two, other = Dropout(0.5, 1), Dropout(0.5, 1), Dropout(0.5, 2)
    first, second = one(x).data, one(x).data
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(two(x).data, first)
    np.testing.assert_array_equal(two(x).data, second)
    assert not np.array_equal(other(x).data, first)


def test_each_micro_batch_has_its_own_holes():
    x, drop = Tensor(np.ones((8, 8))), Dropout(0.5, 1)
    holes = []
    for part in (0, 1, 2, 0):
        token = current_micro_batch.set(part)
        holes.append(drop(x).data.tobytes())
        current_micro_batch.reset(token)
    assert len(set(holes)) == 4
    assert drop.state() == {"seed": 1, "draws": {"0": 2, "1": 1, "2": 1}}


def test_a_restored_dropout_goes_on_where_the_other_stood():
    x, one, two = Tensor(np.ones((8, 8))), Dropout(0.5, 7), Dropout(0.5, 8)
    one(x)
    two.restore(json.loads(json.dumps(one.state())))
    np.testing.assert_array_equal(two(x).data, one(x).data)


def test_with_dropout_dora_corrects_the_product_of_what_it_sees(rng):
    """The input of the whole correction has holes, as in PEFT, and the frozen product has none."""
    layer, weights = one_layer(rng, use_dora=True, init_lora_weights=False, lora_dropout=0.5)
    weights.lora_magnitude_vector.data = rng.uniform(0.5, 2, 5)
    x = rng.standard_normal((4, 6))
    holes = Dropout(0.5, weights.dropout.seed)(Tensor(np.ones_like(x))).data
    expected = x @ layer.weight.data.T + (x * holes) @ weights.delta(layer.weight.data).T
    np.testing.assert_allclose(layer(Tensor(x)).data, expected, rtol=1e-11)


def test_dropout_acts_in_training_only(tiny_model):
    plain = Llama(tiny_model.config)
    plain.load_state_dict(tiny_model.state_dict())
    add_adapter(plain, config(init_lora_weights=False), seed=4)
    add_adapter(tiny_model, config(init_lora_weights=False, lora_dropout=0.5), seed=4)
    expected = plain.loss(IDS, IDS).item()
    assert tiny_model.loss(IDS, IDS).item() != expected
    with no_grad():
        assert tiny_model.loss(IDS, IDS).item() == expected
    tiny_model.eval()
    assert tiny_model.loss(IDS, IDS).item() == expected
    tiny_model.train()
    assert tiny_model.loss(IDS, IDS).item() != expected


def test_an_adapter_added_in_evaluation_mode_does_not_drop(tiny_model):
    tiny_model.eval()
    add_adapter(tiny_model, config(lora_dropout=0.5, init_lora_weights=False))
    assert tiny_model.loss(IDS, IDS).item() == tiny_model.loss(IDS, IDS).item()


def test_training_with_dropout_can_be_repeated(tiny_config):
    def losses(seed):
        model = Llama(tiny_config, np.random.default_rng(0))
        add_adapter(model, config(lora_dropout=0.5, init_lora_weights=False), seed=seed)
        return [model.loss(IDS, IDS).item() for _ in range(3)]

    assert losses(1) == losses(1)
    assert len({*losses(1), *losses(2)}) == 6


def test_each_layer_has_its_own_holes(tiny_model):
    add_adapter(tiny_model, config(lora_dropout=0.5))
    seeds = [module.adapters["default"].dropout.seed for module in lora_modules(tiny_model).values()]
    assert len(set(seeds)) == len(seeds)


def test_dropout_does_not_change_how_an_adapter_starts(tiny_config):
    def fingerprint(p):
        model = Llama(tiny_config)
        add_adapter(model, config(lora_dropout=p), seed=3)
        return sha256_of(adapter_state(model, "default"))

    assert fingerprint(0.0) == fingerprint(0.5)


def test_only_the_low_rank_branch_sees_the_holes(rng):
    layer, share = one_layer(rng, init_lora_weights=False, lora_dropout=0.5)
    x = rng.standard_normal((4, 6))
    holes = Dropout(0.5, share.dropout.seed)(Tensor(np.ones_like(x))).data
    expected = x @ layer.weight.data.T + (x * holes) @ share.delta().T
    np.testing.assert_allclose(layer(Tensor(x)).data, expected, rtol=1e-12)


# -- DoRA --------------------------------------------------------------------------------------------------------------


def test_the_norms_are_those_of_the_matrix_that_is_never_formed(rng):
    w, a, b = rng.standard_normal((7, 9)), rng.standard_normal((2, 9)), rng.standard_normal((7, 2))
    np.testing.assert_allclose(row_norms(w, a, b, 0.7), np.linalg.norm(w + 0.7 * b @ a, axis=1), rtol=1e-13)
    single = [x.astype(np.float32) for x in (w, a, b)]
    got = row_norms(*single, 0.7)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.linalg.norm(w + 0.7 * b @ a, axis=1), rtol=1e-6)


def test_dora_computes_the_papers_formula(rng):
    layer, share = one_layer(rng, use_dora=True, init_lora_weights=False)
    share.lora_magnitude_vector.data = rng.uniform(0.5, 2, 5)
    x = rng.standard_normal((4, 6))
    v = layer.weight.data + 3 * share.lora_B.data @ share.lora_A.data  # alpha / r = 6 / 2
    w = share.lora_magnitude_vector.data[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)
    np.testing.assert_allclose(layer(Tensor(x)).data, x @ w.T, rtol=1e-12)
    np.testing.assert_allclose(share.delta(layer.weight.data), w - layer.weight.data, atol=1e-13)


def test_the_magnitudes_start_as_the_lengths_of_the_rows(tiny_model):
    add_adapter(tiny_model, config(use_dora=True))
    for path, module in lora_modules(tiny_model).items():
        magnitude = adapter_state(tiny_model, "default")[f"{path}.lora_magnitude_vector"]
        assert magnitude.shape == (module.out_features,)
        np.testing.assert_allclose(magnitude, np.linalg.norm(module.weight.data, axis=1), rtol=1e-6)


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


def test_a_magnitude_forgotten_or_a_norm_of_the_base_alone_would_be_noticed(rng):
    layer, share = one_layer(rng, use_dora=True, init_lora_weights=False)
    x = Tensor(rng.standard_normal((4, 6)))
    right = layer(x).data
    share.norms = lambda w: np.linalg.norm(w, axis=1)
    assert np.abs(layer(x).data - right).max() > 1e-2


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


def test_the_update_of_dora_needs_the_matrix_and_says_so(rng):
    _, share = one_layer(rng, use_dora=True)
    with pytest.raises(ValueError, match="base's matrix"):
        share.delta()


def test_dora_update_adds_nothing_where_the_lengths_are_the_norms(rng):
    product, norms = Tensor(rng.standard_normal((3, 5))), rng.uniform(1, 2, 5)
    assert not dora_update(product, Tensor(np.zeros((3, 5))), Tensor(norms), norms).data.any()


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


def test_pissa_trains_as_if_the_residual_were_the_frozen_base(rng):
    layer, share = one_layer(rng, init_lora_weights="pissa")
    residual = layer.weight.data - share.scale * share.lora_B.data @ share.lora_A.data
    share.lora_A.data += 0.1
    other = LoraLinear(Linear(6, 5))
    other.weight.data = residual
    other.adapters["a"] = LoraWeights(share.lora_A.data.copy(), share.lora_B.data.copy(), share.scale)
    other.active = {"a": 1.0}
    x, g = rng.standard_normal((4, 6)), rng.standard_normal((4, 5))
    inputs = [Tensor(x, requires_grad=True) for _ in range(2)]
    ys = [one(i) for one, i in zip((layer, other), inputs, strict=True)]
    for y in ys:
        y.backward(g)
    np.testing.assert_allclose(ys[0].data, ys[1].data, rtol=1e-11)
    np.testing.assert_allclose(inputs[0].grad, inputs[1].grad, rtol=1e-11)
    for name in ("lora_A", "lora_B"):
        np.testing.assert_allclose(getattr(share, name).grad, getattr(other.adapters["a"], name).grad, rtol=1e-11)


def test_at_the_start_of_pissa_both_gradients_are_there(tiny_model):
    add_adapter(tiny_model, config(init_lora_weights="pissa"))
    tiny_model.loss(IDS, IDS).backward()
    assert all(p.grad.any() for p in tiny_model.trainable_parameters().values())


def test_training_pissa_does_not_move_what_it_started_from(tiny_model):
    add_adapter(tiny_model, config(init_lora_weights="pissa"))
    share = next(iter(lora_modules(tiny_model).values())).adapters["default"]
    initial = [array.copy() for array in share.initial]
    shaken(tiny_model)
    assert not np.array_equal(share.lora_A.data, initial[0])
    np.testing.assert_array_equal(share.initial[0], initial[0])
    np.testing.assert_array_equal(share.initial[1], initial[1])


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rsLoRA"])
def test_pissa_becomes_a_plain_adapter_of_twice_the_rank(tiny_model, rslora, dora):
    model = as_float64(tiny_model)
    patterns = {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 5.0}}
    add_adapter(model, config(init_lora_weights="pissa", use_rslora=rslora, use_dora=dora, **patterns))
    expected = logits(shaken(model))
    old = model.adapters["default"].config
    new = config_with_initial(old)
    assert (new.r, new.rank_pattern, new.init_lora_weights) == (6, {"up_proj": 4}, True)
    weights = plan_adapter(model, new, "plain")
    for path, share in weights.items():
        own = lora_modules(model)[path].adapters["default"]
        assert share.scale == pytest.approx(own.scale, rel=1e-15)
        a, b = own.factors()
        assert (a.shape, b.shape) == (share.lora_A.shape, share.lora_B.shape)
        share.lora_A.data, share.lora_B.data = a, b
        if dora:
            share.lora_magnitude_vector.data = own.lora_magnitude_vector.data
    install_adapter(model, new, "plain", weights)
    np.testing.assert_allclose(logits(model), expected, rtol=1e-9, atol=1e-11)
    assert config_with_initial(new) is new


# -- LoRA+ -------------------------------------------------------------------------------------------------------------


def test_with_lora_plus_b_moves_faster_than_a(tiny_model):
    model = as_float64(tiny_model)
    add_adapter(model, config(init_lora_weights=False, use_dora=True))
    parameters = model.trainable_parameters()
    before = {name: p.data.copy() for name, p in parameters.items()}
    optimizer = AdamW(parameters, lr=1e-3, weight_decay=0.0, eps=1e-30, lr_scale=lora_plus(parameters, ratio=8))
    model.loss(IDS, IDS).backward()
    optimizer.step()
    for name, p in parameters.items():  # the first step of Adam is as long as the learning rate
        length = 1e-3 if name.endswith("lora_A") else 8e-3
        np.testing.assert_allclose(np.abs(p.data - before[name]), length, rtol=1e-6, err_msg=name)


def test_lora_plus_leaves_the_factors_of_an_embedding_at_the_plain_rate(tiny_model):
    add_adapter(tiny_model, config(target_modules=[*EMBED, "q_proj"]))
    scales = lora_plus(tiny_model.trainable_parameters(), 4.0)
    assert {name.rpartition(".")[2]: scale for name, scale in scales.items()} == {
        "lora_A": 1.0, "lora_B": 4.0, "lora_embedding_A": 1.0, "lora_embedding_B": 1.0,
    }  # fmt: skip


def test_a_ratio_of_one_is_plain_adamw(tiny_config):
    def trained(**settings):
        model = Llama(tiny_config, np.random.default_rng(0))
        add_adapter(model, config())
        parameters = model.trainable_parameters()
        if settings:
            settings = {"lr_scale": lora_plus(parameters, settings["ratio"])}
        optimizer = AdamW(parameters, lr=0.01, **settings)
        model.loss(IDS, IDS).backward()
        optimizer.step()
        return sha256_of(adapter_state(model, "default"))

    assert trained(ratio=1.0) == trained() != trained(ratio=2.0)


@pytest.mark.parametrize("ratio", [0, -1.0, float("inf"), float("nan")])
def test_a_ratio_that_means_nothing_is_refused(tiny_model, ratio):
    add_adapter(tiny_model, config())
    with pytest.raises(ValueError, match="ratio"):
        lora_plus(tiny_model.trainable_parameters(), ratio)


def test_lora_plus_without_an_adapter_is_refused(tiny_model):
    with pytest.raises(ValueError, match="lora_B"):
        lora_plus(tiny_model.trainable_parameters())


def test_a_learning_rate_for_a_name_that_is_not_there_is_refused(tiny_model):
    add_adapter(tiny_model, config())
    for parameters in (tiny_model.trainable_parameters(), list(tiny_model.trainable_parameters().values())):
        with pytest.raises(ValueError, match="'absent'"):
            AdamW(parameters, lr_scale={"absent": 2.0})


# -- settings and weights that do not fit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_dropout": 1.0},
        {"lora_dropout": -0.1},
        {"lora_dropout": "0.1"},
        {"lora_dropout": True},
        {"lora_dropout": float("nan")},
        {"bias": True},
        {"bias": "some"},
        {"use_dora": 1},
        {"use_dora": None},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": 1},
        {"init_lora_weights": None},
    ],
    ids=str,
)
def test_a_setting_that_means_nothing_is_refused_by_name(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        config(**settings)
