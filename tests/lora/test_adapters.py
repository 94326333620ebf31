"""Adapters on a model: no change at the start, a base that never moves, mixes that add up, additions that fail."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from smallmodels import EMBED, IDS, Net, as_float64, logits, shaken
from smallmodels import lora_config as config

import minilora as ml
from minilora.engine.tensor import no_grad
from minilora.lora.adapters import (
    adapter_state,
    add_adapter,
    base_state,
    install_adapter,
    lora_modules,
    merge_adapter,
    merged_state,
    plan_adapter,
    remove_adapter,
    scale_adapter,
    set_adapter,
    unmerge_adapter,
)
from minilora.lora.layer import LoraWeights
from minilora.nn.llama import Config, Llama
from minilora.nn.module import sha256_of
from minilora.nn.optim import SGD, AdamW

QV = ["q_proj", "v_proj"]


def random(**settings):
    """An adapter that changes the output from the start."""
    return config(init_lora_weights=False, **settings)


def step(model, optimizer):
    optimizer.zero_grad()
    loss = model.loss(IDS, IDS)
    loss.backward()
    optimizer.step()
    return loss.item()


def snapshot(model):
    """Everything that adding an adapter may change: structure, arrays, what is trainable, what is active."""
    return (
        [(path, type(module)) for path, module in model.named_modules()],
        {name: (id(p), p.requires_grad, p.data.tobytes()) for name, p in model.named_parameters()},
        list(model.adapters),
        {path: (list(m.adapters), dict(m.active)) for path, m in lora_modules(model).items()},
    )


def updated_by_hand(model, factors):
    """A plain Llama with W + sum of factor · alpha / r · B A in place of each adapted W."""
    state = base_state(model)
    for name, factor in factors.items():
        arrays, settings = adapter_state(model, name), model.adapters[name].config
        for path in {key.rpartition(".")[0] for key in arrays}:
            update = arrays[f"{path}.lora_B"] @ arrays[f"{path}.lora_A"]
            state[f"{path}.weight"] = state[f"{path}.weight"] + factor * settings.lora_alpha / settings.r * update
    plain = Llama(model.config)
    plain.load_state_dict(state)
    return plain


# -- the start ---------------------------------------------------------------------------------------------------------


STARTS = [
    {},
    {"r": 1, "lora_alpha": 64},
    {"target_modules": QV},
    {"use_rslora": True},
    {"init_lora_weights": "gaussian"},
    {"rank_pattern": {"down_proj": 1}, "alpha_pattern": {"up_proj": 3}},
    {"target_modules": ["v_proj"], "layers_to_transform": 1},
]


@pytest.mark.parametrize("start", STARTS, ids=str)
def test_a_fresh_adapter_leaves_the_output_bit_identical(tiny_model, start):
    before = logits(tiny_model)
    add_adapter(tiny_model, config(**start))
    assert logits(tiny_model).tobytes() == before.tobytes()


def test_a_fresh_adapter_with_b_not_zero_does_change_the_output(tiny_model):
    before = logits(tiny_model)
    add_adapter(tiny_model, random())
    assert np.abs(logits(tiny_model) - before).max() > 1e-3


@pytest.mark.parametrize("start", STARTS, ids=str)
def test_at_the_start_the_gradient_of_a_is_exactly_zero_and_that_of_b_is_not(tiny_model, start):
    add_adapter(tiny_model, config(**start))
    tiny_model.loss(IDS, IDS).backward()
    for name, parameter in tiny_model.trainable_parameters().items():
        assert parameter.grad is not None, name
        assert parameter.grad.any() == name.endswith("lora_B"), name


@pytest.mark.parametrize("optimizer", [lambda p: SGD(p, 0.1), lambda p: AdamW(p, 0.01, weight_decay=0.0)])
def test_the_first_step_moves_b_only_and_the_second_moves_a_too(tiny_model, optimizer):
    add_adapter(tiny_model, config())
    optimizer = optimizer(tiny_model.trainable_parameters())

    def moved():
        before = {name: array.copy() for name, array in tiny_model.state_dict().items()}
        step(tiny_model, optimizer)
        return {name for name, array in tiny_model.state_dict().items() if not np.array_equal(array, before[name])}

    a, b = ({name for name in adapter_arrays(tiny_model) if name.endswith(end)} for end in ("lora_A", "lora_B"))
    assert moved() == b
    assert moved() == a | b


def adapter_arrays(model):
    return {name for name in model.state_dict() if ".adapters." in name}


def test_every_b_moves_in_the_first_step(tiny_model):
    from minilora.lora.adapters import adapter_state

    ml.add_adapter(tiny_model, ml.LoraConfig(r=2, lora_alpha=4), "legal")
    before = {key: array.copy() for key, array in adapter_state(tiny_model, "legal").items()}
    optimizer = ml.AdamW(tiny_model.trainable_parameters(), lr=1e-3, weight_decay=0.0)
    tiny_model.loss(IDS, IDS).backward()
    optimizer.step()
    after = adapter_state(tiny_model, "legal")
    changed = {key for key in after if not np.array_equal(after[key], before[key])}
    assert changed == {key for key in after if key.endswith("lora_B")} and len(changed) == 14


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(tiny_config):
    def weights(seed):
        model = Llama(tiny_config)
        add_adapter(model, config(), seed=seed)
        return sha256_of(adapter_state(model, "default"))

    assert weights(1) == weights(1) != weights(2)


def test_an_adapter_follows_the_dtype_of_its_model(tiny_model):
    add_adapter(as_float64(tiny_model), config())
    assert {array.dtype for array in tiny_model.state_dict().values()} == {np.dtype(np.float64)}
    assert logits(tiny_model).dtype == np.float64


# -- the base ----------------------------------------------------------------------------------------------------------


def test_training_an_adapter_never_moves_the_base(tiny_model):
    base = tiny_model.state_dict()
    before, off = sha256_of(base), logits(tiny_model)
    add_adapter(tiny_model, config(r=4, lora_alpha=8))
    optimizer = AdamW(tiny_model.trainable_parameters(), lr=0.05)
    losses = [step(tiny_model, optimizer) for _ in range(5)]
    assert losses[-1] < losses[0] - 0.1  # it did learn
    assert sha256_of(base_state(tiny_model)) == before
    assert all(base_state(tiny_model)[name] is array for name, array in base.items())  # not even copied
    set_adapter(tiny_model, None)
    assert logits(tiny_model).tobytes() == off.tobytes()


def test_the_fingerprint_sees_a_base_that_moved(tiny_model):
    before = sha256_of(base_state(tiny_model))
    tiny_model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-6
    assert sha256_of(base_state(tiny_model)) != before


def test_base_and_adapter_share_no_names_and_miss_none(tiny_model):
    names = set(tiny_model.state_dict())
    add_adapter(tiny_model, config())
    assert set(base_state(tiny_model)) == names
    assert set(tiny_model.state_dict()) - names == adapter_arrays(tiny_model) and adapter_arrays(tiny_model)


def test_the_base_gets_no_gradient(tiny_model):
    add_adapter(tiny_model, config())
    tiny_model.loss(IDS, IDS).backward()
    with_gradient = {name for name, p in tiny_model.named_parameters() if p.grad is not None}
    assert with_gradient == adapter_arrays(tiny_model)


# -- which modules -----------------------------------------------------------------------------------------------------


def test_all_linear_finds_the_seven_matrices_of_every_block(tiny_model):
    found = add_adapter(tiny_model, config())
    assert len(found) == len(set(found)) == 14
    assert {path.rpartition(".")[2] for path in found} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [("all-linear", False), (r".*", True), (r".*embed_tokens", True), ([*EMBED, "q_proj"], True), (["q_proj"], False)],
)
def test_which_targets_reach_the_embedding(tiny_model, targets, adapted):
    assert ("model.embed_tokens" in add_adapter(tiny_model, config(target_modules=targets))) == adapted


@pytest.mark.parametrize("target", [["lm_head"], ["q_proj", "lm_head"], ("lm_head",)])
def test_a_tied_head_is_refused_with_the_reason(tiny_model, target):
    with pytest.raises(ValueError, match=r"shares its matrix with the input embedding.*leave 'lm_head' out"):
        add_adapter(tiny_model, config(target_modules=target))
    assert not tiny_model.adapters and not lora_modules(tiny_model)


def test_an_untied_head_can_be_adapted(tiny_config, rng):
    model = Llama(dataclasses.replace(tiny_config, tie_word_embeddings=False), rng)
    ids = np.arange(8)[None]
    logits, loss = model(ids).data, model.loss(ids, ids).item()
    assert add_adapter(model, config(target_modules=["lm_head"])) == ["lm_head"]
    np.testing.assert_array_equal(model(ids).data, logits)
    assert model.loss(ids, ids).item() == pytest.approx(loss, rel=1e-6)
    model.loss(ids, ids).backward()
    gradients = {name.rpartition(".")[2]: p.grad for name, p in model.trainable_parameters().items()}
    assert gradients.keys() == {"lora_A", "lora_B"} and np.abs(gradients["lora_B"]).max() > 0
    share = model.lm_head.adapters["default"]
    share.lora_B.data -= gradients["lora_B"]
    update = model.model(ids).data @ share.lora_A.data.T @ share.lora_B.data.T * (8 / 4)
    np.testing.assert_allclose(model(ids).data, logits + update, rtol=1e-4, atol=1e-6)
    assert model.loss(ids, ids).item() < loss - 1e-3


def test_patterns_reach_the_weights(tiny_model):
    add_adapter(tiny_model, config(r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 32}))
    weights = {path.rpartition(".")[2]: m.adapters["default"] for path, m in lora_modules(tiny_model).items()}
    assert [(weights[k].rank, weights[k].scale) for k in ("q_proj", "k_proj", "v_proj")] == [
        (2, 4.0),
        (4, 8.0),
        (4, 2.0),
    ]


# -- several adapters --------------------------------------------------------------------------------------------------


@pytest.fixture
def three(tiny_model):
    """A float64 model with three adapters that overlap in part, and its output before."""
    before = logits(as_float64(tiny_model))
    add_adapter(tiny_model, random(r=4, lora_alpha=2), name="legal", seed=1)
    add_adapter(tiny_model, random(r=2, lora_alpha=3, target_modules=QV), name="support", seed=2)
    add_adapter(tiny_model, random(r=3, lora_alpha=1, target_modules=["down_proj"]), name="medical", seed=3)
    return tiny_model, before


@pytest.mark.parametrize(
    "which",
    ["legal", "support", "medical", {"legal": 1.0}, {"legal": 0.7, "support": 0.3}, {"support": -1.0, "medical": 2.0},
     {"legal": 0.2, "support": 0.3, "medical": 0.5}, {"legal": 0.0}],
    ids=str,
)  # fmt: skip
def test_the_output_is_that_of_the_base_plus_the_weighted_updates(three, which):
    model, before = three
    set_adapter(model, which)
    expected = logits(updated_by_hand(model, {which: 1.0} if isinstance(which, str) else which))
    np.testing.assert_allclose(logits(model), expected, rtol=1e-10, atol=1e-12)
    assert which == {"legal": 0.0} or np.abs(expected - before).max() > 1e-3


@given(weights=st.lists(st.floats(-2, 2), min_size=3, max_size=3))
@settings(max_examples=25, deadline=None)
def test_a_mix_of_any_weights_adds_up(weights):
    shape = Config(32, 16, 16, 1, 2, 1)
    model = as_float64(Llama(shape, np.random.default_rng(0)))
    names = ["legal", "support", "medical"]
    for i, name in enumerate(names):
        add_adapter(model, random(r=i + 1, lora_alpha=2), name=name, seed=i)
    mix = dict(zip(names, weights, strict=True))
    set_adapter(model, mix)
    ids = IDS % 32
    with no_grad():
        np.testing.assert_allclose(model(ids).data, updated_by_hand(model, mix)(ids).data, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("wrong", [8.0, 8 / 4 / 4, 1.0], ids=["alpha", "alpha/r/r", "1"])
def test_a_scale_other_than_alpha_over_r_is_caught(tiny_model, wrong):
    add_adapter(as_float64(tiny_model), random(r=4, lora_alpha=8))
    expected = logits(updated_by_hand(tiny_model, {"default": 1.0}))
    for module in lora_modules(tiny_model).values():
        module.adapters["default"].scale = wrong
    assert np.abs(logits(tiny_model) - expected).max() > 1e-3


def test_no_adapter_is_the_base_to_the_last_bit(three):
    model, before = three
    for which in (None, {}):
        set_adapter(model, which)
        assert logits(model).tobytes() == before.tobytes()
        assert not model.trainable_parameters()


def test_the_latest_adapter_is_the_active_one(three):
    model, _ = three
    assert list(model.adapters) == ["legal", "support", "medical"]
    latest = logits(model)
    set_adapter(model, "medical")
    np.testing.assert_array_equal(logits(model), latest)


@pytest.mark.parametrize("which", ["legal", "support", "medical"])
def test_only_the_active_adapter_is_trainable(three, which):
    model, _ = three
    set_adapter(model, which)
    names = model.trainable_parameters()
    assert names and all(f".adapters.{which}.lora_" in name for name in names)
    assert len(names) == len(adapter_state(model, which))


def test_a_switch_among_many_touches_two_adapters_at_most(tiny_model, monkeypatch):
    for i in range(6):
        add_adapter(tiny_model, config(r=2, lora_alpha=4, target_modules="all-linear"), f"adapter-{i}")
    touched = []
    change = LoraWeights.requires_grad_
    monkeypatch.setattr(
        LoraWeights, "requires_grad_", lambda self, wanted: touched.append(self) or change(self, wanted)
    )
    set_adapter(tiny_model, "adapter-2")
    assert len(touched) == 2 * len(lora_modules(tiny_model))  # the last that was added, and the one chosen
    assert {name.rpartition(".adapters.")[2][:9] for name in tiny_model.trainable_parameters()} == {"adapter-2"}


def test_a_mix_is_for_inference(three):
    model, _ = three
    set_adapter(model, {"legal": 0.5, "support": 0.5})
    assert not model.trainable_parameters()


def test_training_one_adapter_leaves_the_others_alone(three):
    model, _ = three
    set_adapter(model, "support")
    before = {name: sha256_of(adapter_state(model, name)) for name in model.adapters}
    step(model, AdamW(model.trainable_parameters(), lr=0.01))
    after = {name: sha256_of(adapter_state(model, name)) for name in model.adapters}
    assert [name for name in before if before[name] != after[name]] == ["support"]


@pytest.mark.parametrize("which", ["absent", {"legal": 1.0, "absent": 0.1}, ""])
def test_choosing_an_adapter_that_is_not_there_is_an_error_and_changes_nothing(three, which):
    model, _ = three
    before = snapshot(model)
    with pytest.raises(ValueError, match="legal, support, medical"):
        set_adapter(model, which)
    assert snapshot(model) == before


# -- additions that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name", "message"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, "new", "v_prj"),
        ({"target_modules": ["lm_head"]}, "new", "input embedding"),
        ({"rank_pattern": {"down_proj": 33}}, "new", "r=33"),
        ({"layers_to_transform": 2}, "new", "no module"),
        ({}, "", "name"),
        ({}, "a.b", "name"),
    ],
    ids=str,
)
@pytest.mark.parametrize("others", [[], ["legal"]])
def test_an_addition_that_fails_changes_nothing(tiny_model, settings, name, message, others):
    for other in others:
        add_adapter(tiny_model, random(target_modules=QV), name=other)
    before = snapshot(tiny_model)
    with pytest.raises(ValueError, match=message):
        add_adapter(tiny_model, config(**settings), name=name)
    assert snapshot(tiny_model) == before


def test_an_adapter_that_could_not_be_added_is_not_even_planned(tiny_model):
    add_adapter(tiny_model, random(), name="legal")
    for name in ("legal", "", "a.b"):
        with pytest.raises(ValueError, match="name|already"):
            plan_adapter(tiny_model, config(), name)


def test_a_name_is_given_once(tiny_model):
    add_adapter(tiny_model, random(), name="legal")
    before = snapshot(tiny_model)
    with pytest.raises(ValueError, match="'legal' already"):
        add_adapter(tiny_model, config(target_modules=["q_proj"]), name="legal")
    assert snapshot(tiny_model) == before


@pytest.mark.parametrize(
    ("planned", "installed", "message"),
    [
        ({}, {"use_dora": True}, "ask for use_dora"),
        ({"use_dora": True}, {}, "do not ask for use_dora"),
        ({}, {"init_lora_weights": "pissa"}, "ask for init_lora_weights"),
        ({"init_lora_weights": "pissa"}, {}, "do not ask for init_lora_weights"),
    ],
)
def test_weights_of_another_variant_than_the_settings_are_refused(tiny_model, planned, installed, message):
    weights = plan_adapter(tiny_model, config(**planned), "x")
    with pytest.raises(ValueError, match=message):
        install_adapter(tiny_model, config(**installed), "x", weights)
    assert not lora_modules(tiny_model) and not tiny_model.adapters


def test_weights_for_another_kind_of_module_are_refused(tiny_model):
    of_matrix = plan_adapter(tiny_model, config(target_modules=["q_proj"]), "x")
    of_table = plan_adapter(tiny_model, config(target_modules=EMBED), "x")
    path = "model.layers.0.self_attn.q_proj"
    for weights in ({"model.embed_tokens": of_matrix[path]}, {path: of_table["model.embed_tokens"]}):
        with pytest.raises(ValueError, match="another kind"):
            install_adapter(tiny_model, config(), "x", weights)
        assert not lora_modules(tiny_model)


# -- biases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bias", "targets", "count"),
    [("none", ["q_proj", "v_proj"], 0), ("lora_only", ["q_proj", "v_proj"], 2), ("all", "all-linear", 4)],
)
@pytest.mark.parametrize("extra", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_biases_learn_as_asked_and_the_bases_stay(tiny_config, rng, bias, targets, count, extra):
    model = as_float64(Net(tiny_config, rng))
    before, digest = logits(model), sha256_of(base_state(model))
    add_adapter(model, config(bias=bias, target_modules=targets, **extra))
    np.testing.assert_allclose(logits(model), before, rtol=1e-12, atol=1e-12)
    assert len([name for name in model.trainable_parameters() if name.endswith(".bias")]) == count
    adapted = logits(shaken(model))
    merge_adapter(model)
    np.testing.assert_allclose(logits(model), adapted, rtol=1e-9, atol=1e-11)
    assert sha256_of(base_state(model)) == digest
    plain = Net(tiny_config, rng)
    plain.load_state_dict(merged_state(model))
    np.testing.assert_allclose(logits(plain), adapted, rtol=1e-9, atol=1e-11)
    unmerge_adapter(model)
    remove_adapter(model, "default")
    assert sha256_of(model.state_dict()) == digest and logits(model).tobytes() == before.tobytes()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_model_without_biases_trains_nothing_extra(tiny_model, bias):
    add_adapter(tiny_model, config(bias=bias))
    assert {name.rpartition(".")[2] for name in tiny_model.trainable_parameters()} == {"lora_A", "lora_B"}


def test_a_bias_that_no_adapter_could_own_is_refused(tiny_config, rng):
    model = Net(tiny_config, rng)
    with pytest.raises(ValueError, match=r"bias of model\.layers\.0\.mlp\.down_proj"):
        add_adapter(model, config(bias="all", target_modules=["q_proj"]))
    assert not lora_modules(model)


# -- scaling -----------------------------------------------------------------------------------------------------------


def test_a_scaled_adapter_gives_what_a_factor_gives(tiny_config):
    model = Llama(tiny_config, seed=0)
    add_adapter(model, random(target_modules=[*QV, "embed_tokens"]), "one")
    add_adapter(model, random(target_modules=QV), "other")
    others = {name: array.copy() for name, array in adapter_state(model, "other").items()}
    base = sha256_of(base_state(model))
    set_adapter(model, {"one": 0.3})
    wanted = logits(model)
    set_adapter(model, "one")
    whole = logits(model)
    scale_adapter(model, "one", 0.3)
    np.testing.assert_allclose(logits(model), wanted, rtol=1e-5, atol=1e-6)
    assert not np.allclose(whole, wanted, rtol=1e-3)
    assert all(np.array_equal(array, others[name]) for name, array in adapter_state(model, "other").items())
    assert sha256_of(base_state(model)) == base


def test_what_cannot_be_scaled_is_refused_and_stays(tiny_config):
    model = Llama(tiny_config, seed=0)
    add_adapter(model, random(use_dora=True, target_modules=QV), "dora")
    add_adapter(model, random(target_modules=QV), "plain")
    kept = {name: array.copy() for name, array in adapter_state(model, "plain").items()}
    with pytest.raises(ValueError, match="'dora' is no plain LoRA"):
        scale_adapter(model, "dora", 0.5)
    with pytest.raises(ValueError, match="factor must be a finite number, got nan"):
        scale_adapter(model, "plain", float("nan"))
    with pytest.raises(ValueError, match="nobody"):
        scale_adapter(model, "nobody", 0.5)
    merge_adapter(model)
    with pytest.raises(ValueError, match="scaling an adapter"):
        scale_adapter(model, "plain", 0.5)
    unmerge_adapter(model)
    assert all(np.array_equal(array, kept[name]) for name, array in adapter_state(model, "plain").items())
