"""Adapters on a model: no change at the start, a base that never moves, mixes that add up, counts that are exact."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.cost.counts import count_parameters, lora_parameters
from minilora.engine.tensor import Tensor, no_grad
from minilora.lora.adapters import (
    adapter_state,
    add_adapter,
    base_state,
    lora_modules,
    set_adapter,
)
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoraLinear, new_weights
from minilora.nn.layers import Linear
from minilora.nn.llama import Config, Llama
from minilora.nn.module import sha256_of
from minilora.nn.optim import SGD, AdamW

IDS = np.arange(24).reshape(2, 12) * 7 % 64
QV = ["q_proj", "v_proj"]


def config(r=4, lora_alpha=8, **settings):
    return LoraConfig(r=r, lora_alpha=lora_alpha, **settings)


def random(**settings):
    """An adapter that changes the output from the start."""
    return config(init_lora_weights=False, **settings)


def logits(model):
    with no_grad():
        return model(IDS).data


def step(model, optimizer):
    optimizer.zero_grad()
    loss = model.loss(IDS, IDS)
    loss.backward()
    optimizer.step()
    return loss.item()


def as_float64(model):
    for _, parameter in model.named_parameters():
        parameter.data = parameter.data.astype(np.float64)
    return model


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
    add_adapter(tiny_model, config())
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


def test_a_name_is_given_once(tiny_model):
    add_adapter(tiny_model, random(), name="legal")
    before = snapshot(tiny_model)
    with pytest.raises(ValueError, match="'legal' already"):
        add_adapter(tiny_model, config(target_modules=["q_proj"]), name="legal")
    assert snapshot(tiny_model) == before


# -- one layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_with_a_bias_keeps_it(rng, bias):
    base = Linear(6, 5, bias=bias, rng=rng)
    if bias:
        base.bias.data = rng.standard_normal(5).astype(np.float32)
    layer, x = LoraLinear(base), Tensor(rng.standard_normal((3, 6)).astype(np.float32))
    assert layer.weight is base.weight
    np.testing.assert_array_equal(layer(x).data, base(x).data)
    share = layer.adapters["a"] = new_weights("x", base, random(r=2, lora_alpha=3), rng)
    layer.active = {"a": 0.5}
    update = 0.5 * 3 / 2 * (x.data @ share.lora_A.data.T @ share.lora_B.data.T)
    np.testing.assert_allclose(layer(x).data, base(x).data + update, rtol=1e-5, atol=1e-6)


# -- counts ------------------------------------------------------------------------------------------------------------

# matrices of the tiny model: q, o 32 x 32; k, v 16 x 32; gate, up 48 x 32; down 32 x 48
TINY = 64 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32) + 32


def test_counts_of_a_model_and_of_an_adapter_on_it(tiny_model):
    counts = count_parameters(tiny_model)
    assert (counts.total, counts.trainable, counts.frozen) == (TINY, TINY, 0)
    add_adapter(tiny_model, config(r=4))
    counts = count_parameters(tiny_model)
    adapter = 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80)
    assert (counts.total, counts.trainable, counts.frozen) == (TINY + adapter, adapter, TINY)
    assert counts.percent == pytest.approx(100 * adapter / (TINY + adapter))
    assert counts.by_module["q_proj"] == (2 * 4 * 64, 2 * 4 * 64 + 2 * 32 * 32)
    assert counts.by_module["down_proj"] == (2 * 4 * 80, 2 * 4 * 80 + 2 * 48 * 32)
    assert counts.by_module["embed_tokens"] == (0, 64 * 32)
    assert counts.by_module["norm"] == (0, 32)
    assert sum(total for _, total in counts.by_module.values()) == counts.total
    assert sum(trainable for trainable, _ in counts.by_module.values()) == counts.trainable
    assert f"{adapter:,}" in str(counts)


def test_an_untied_head_counts_and_a_tied_one_counts_once(tiny_config):
    untied = dataclasses.replace(tiny_config, tie_word_embeddings=False)
    assert count_parameters(Llama(untied)).total == TINY + 64 * 32
    assert count_parameters(Llama(tiny_config)).total == TINY


@given(st.integers(1, 16), st.sets(st.sampled_from(["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]), min_size=1))
@settings(max_examples=30, deadline=None)
def test_the_formula_counts_what_the_model_holds(r, targets):
    model = Llama(Config(64, 32, 48, 2, 4, 2))
    shapes = [
        model.get_submodule(path).weight.shape for path in add_adapter(model, config(r=r, target_modules=[*targets]))
    ]
    assert lora_parameters(shapes, r) == count_parameters(model).trainable == sum(r * (m + n) for m, n in shapes)


SMOLLM2 = Config(49152, 576, 1536, 30, 9, 3, max_position_embeddings=8192, rope_theta=100000.0)


@pytest.mark.parametrize(
    ("r", "targets", "adapter"),
    [(8, QV, 460_800), (8, "all-linear", 2_442_240), (16, "all-linear", 4_884_480)],
)
def test_the_numbers_of_smollm2(r, targets, adapter):
    model = Llama(SMOLLM2)  # zeros that nobody writes to: they cost no memory
    assert count_parameters(model).total == 134_515_008
    assert len(list(model.named_parameters())) == 272
    add_adapter(model, config(r=r, target_modules=targets))
    counts = count_parameters(model)
    assert (counts.trainable, counts.frozen) == (adapter, 134_515_008)
    if adapter == 2_442_240:
        assert f"{counts.percent:.3f}" == "1.783"


@pytest.mark.parametrize(
    ("layers", "width", "r", "adapter"),
    [
        (96, 12288, 4, 18_874_368),  # GPT-3 175B
        (96, 12288, 8, 37_748_736),
        (24, 1024, 4, 393_216),  # GPT-2 medium; the paper prints 0.35M
        (12, 768, 8, 294_912),  # RoBERTa-base
        (32, 4096, 8, 4_194_304),  # Llama-2-7B
    ],
)
def test_the_numbers_of_published_models_with_q_and_v_adapted(layers, width, r, adapter):
    assert lora_parameters([(width, width)] * 2 * layers, r) == adapter
