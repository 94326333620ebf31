"""Adapters on a model: no change at initialisation, a base that never changes, updates that add up, clear refusals."""

import copy
import dataclasses
from types import MappingProxyType
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from smallmodels import IDS, Net, as_float64, logits, losses_of, shaken
from smallmodels import lora_config as config

import minilora as ml
from minilora.lora import adapters
from minilora.lora.adapters import (
    adapter_state,
    adapter_weights,
    add_adapter,
    base_state,
    lora_modules,
    merge_adapter,
    plan_adapter,
    remove_adapter,
    scale_adapter,
    set_adapter,
)
from minilora.lora.layer import LoraWeights
from minilora.nn.layers import Linear
from minilora.nn.llama import Config, Llama
from minilora.nn.module import Module, sha256_of
from minilora.nn.optim import SGD, AdamW

QV = ["q_proj", "v_proj"]


def random(**settings):
    """An adapter with B not zero, which changes the output."""
    return config(init_lora_weights=False, **settings)


def snapshot(model):
    """Everything that adding an adapter may change: structure, arrays, what is trainable, what is active."""
    return (
        [(path, type(module)) for path, module in model.named_modules()],
        {name: (id(p), p.requires_grad, p.data.tobytes()) for name, p in model.named_parameters()},
        list(model.adapters),
        {path: (list(m.adapters), dict(m.active)) for path, m in lora_modules(model).items()},
    )


def updated_by_hand(model, factors):
    """A plain Llama with W + sum of factor · alpha / r · B A instead of each adapted W."""
    state = base_state(model)
    for name, factor in factors.items():
        arrays, settings = adapter_state(model, name), model.adapters[name].config
        for path in {key.rpartition(".")[0] for key in arrays}:
            update = arrays[f"{path}.lora_B"] @ arrays[f"{path}.lora_A"]
            state[f"{path}.weight"] = state[f"{path}.weight"] + factor * settings.lora_alpha / settings.r * update
    plain = Llama(model.config)
    plain.load_state_dict(state)
    return plain


def names_in(model, ending=""):
    return {name for name in model.state_dict() if ".adapters." in name and name.endswith(ending)}


# -- initialisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "init",
    [
        {},
        {"r": 1, "lora_alpha": 64, "target_modules": QV},
        {"use_rslora": True, "init_lora_weights": "gaussian"},
        {"rank_pattern": {"down_proj": 1}, "alpha_pattern": {"up_proj": 3}},
        {"target_modules": ["v_proj"], "layers_to_transform": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", [lambda p: SGD(p, 0.1), lambda p: AdamW(p, 0.01, weight_decay=0.0)])
def test_a_new_adapter_changes_no_bit_and_the_first_step_moves_b_alone(tiny_model, init, optimizer):
    before, base = logits(tiny_model), tiny_model.state_dict()
    add_adapter(tiny_model, config(**init))
    assert logits(tiny_model).tobytes() == before.tobytes()
    held = base_state(tiny_model)
    assert held.keys() == base.keys() and all(held[name] is array for name, array in base.items())  # not even copied
    tiny_model.loss(IDS, IDS).backward()
    for name, parameter in tiny_model.named_parameters():
        if ".adapters." not in name:
            assert parameter.grad is None, name
        else:  # dL/dA is exactly zero
            assert parameter.grad.any() == name.endswith("lora_B"), name
    optimizer = optimizer(tiny_model.trainable_parameters())

    def moved():
        before = {name: array.copy() for name, array in tiny_model.state_dict().items()}
        losses_of(tiny_model, optimizer, 1)
        return {name for name, array in tiny_model.state_dict().items() if not np.array_equal(array, before[name])}

    assert moved() == names_in(tiny_model, "lora_B")
    assert moved() == names_in(tiny_model)


def test_a_layer_that_was_replaced_is_not_in_the_tree_a_second_time(tiny_model):
    before = [path for path, _ in tiny_model.named_modules()]
    for name in ("one", "two"):
        add_adapter(tiny_model, random(), name)
    assert [path for path, _ in tiny_model.named_modules() if ".adapters." not in path] == before


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(tiny_config):
    def weights(seed):
        model = Llama(tiny_config)
        add_adapter(model, config(), seed=seed)
        return sha256_of(adapter_state(model, "default"))

    assert weights(1) == weights(1) != weights(2)


# -- which modules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [r".*", ["embed_tokens", "q_proj"]], ids=str)
def test_targets_that_select_the_embedding_are_refused_in_one_line(tiny_model, targets):
    line = "^model.embed_tokens is an embedding, which gets no adapter: leave it out of target_modules$"
    with pytest.raises(ValueError, match=line):
        add_adapter(tiny_model, config(target_modules=targets))
    assert not tiny_model.adapters and not lora_modules(tiny_model)


@pytest.mark.parametrize(
    "settings",
    [{}, {"target_modules": r".*(q_proj|lm_head)"}, {"target_modules": r".*", "exclude_modules": ["embed_tokens"]}],
    ids=str,
)
def test_targets_that_leave_out_the_embedding_are_not(tiny_model, settings):
    assert "model.embed_tokens" not in add_adapter(tiny_model, config(**settings))


def test_an_untied_head_can_be_adapted(tiny_config, rng):
    model = Llama(dataclasses.replace(tiny_config, tie_word_embeddings=False), rng)
    ids = np.arange(8)[None]
    logits, loss = model(ids).data, model.loss(ids, ids).item()
    assert add_adapter(model, config(target_modules=["lm_head"])) == ["lm_head"]
    np.testing.assert_array_equal(model(ids).data, logits)
    model.loss(ids, ids).backward()
    own = model.lm_head.adapters["default"]
    own.lora_B.data -= own.lora_B.grad
    update = model.model(ids).data @ own.lora_A.data.T @ own.lora_B.data.T * (6 / 3)
    np.testing.assert_allclose(model(ids).data, logits + update, rtol=1e-4, atol=1e-6)
    assert model.loss(ids, ids).item() < loss - 1e-3


class Own(Module):
    """A user's module."""

    def __init__(self, first):
        self.first, self.second = first, Linear(4, 3, rng=np.random.default_rng(0))

    def forward(self, x):
        return self.second(self.first(x))


def test_a_module_of_ones_own_can_be_adapted_and_without_a_linear_layer_the_reason_is_given():
    model, x = Own(Linear(5, 4, rng=np.random.default_rng(1))), ml.Tensor(np.ones((2, 5), np.float32))
    before = model(x).data
    assert add_adapter(model, config(r=2)) == ["first", "second"]
    np.testing.assert_array_equal(model(x).data, before)
    assert not np.array_equal(shaken(model)(x).data, before)

    class Foreign(Module):
        def __init__(self):
            self.weight = np.ones((3, 3))

    for none in (Foreign(), Linear(4, 4, rng=None)):  # a layer alone has no place in which an adapted one could be put
        words = f"^{type(none).__name__} has no layer that can be adapted: .* minilora.Linear layers"
        for targets in ("all-linear", ["weight"], ".*"):
            with pytest.raises(ValueError, match=words):
                add_adapter(none, config(target_modules=targets, exclude_modules=["x"]))


class Holder(Module):
    """A user's module with its layers and scales in a container, as `held` makes it of a list."""

    def __init__(self, held):
        rng = np.random.default_rng(0)
        self.parts = held([Linear(4, 4, rng=rng) for _ in range(2)])
        self.scales = held([ml.Parameter(np.ones(4, np.float32)) for _ in range(2)])

    def forward(self, x):
        parts, scales = (each.values() if isinstance(each, dict) else each for each in (self.parts, self.scales))
        for part, scale in zip(parts, scales, strict=True):
            x = part(x) * scale
        return x


@pytest.mark.parametrize("held", [list, tuple, lambda items: dict(zip("xy", items, strict=True))])
def test_layers_in_a_list_a_tuple_or_a_dict_are_trained_adapted_and_restored(held):
    model, x = Holder(held), ml.Tensor(np.ones((2, 4), np.float32))
    names, before, kind = [*model.trainable_parameters()], model(x).data, type(model.parts)
    assert len(names) == 4 and [*model.state_dict()] == names
    assert add_adapter(model, config(r=2)) == [name.removesuffix(".weight") for name in names if "parts" in name]
    assert not np.array_equal(shaken(model)(x).data, before)
    remove_adapter(model, "default")
    np.testing.assert_array_equal(model(x).data, before)
    assert type(model.parts) is kind and [*model.state_dict()] == names


# -- several adapters --------------------------------------------------------------------------------------------------


NAMES = ["legal", "support", "medical"]


def with_three(model):
    """The model with three adapters that overlap in part."""
    changes = (
        {"r": 4, "lora_alpha": 2},
        {"r": 2, "lora_alpha": 3, "target_modules": QV},
        {"target_modules": ["down_proj"]},
    )
    for seed, (name, change) in enumerate(zip(NAMES, changes, strict=True)):
        assert add_adapter(model, random(**change), name, seed) == list(adapter_weights(model, name))
    return model


@pytest.fixture
def three(tiny_model):
    """A float64 model with three adapters, and its output without them."""
    before = logits(as_float64(tiny_model))
    return with_three(tiny_model), before


FACTORS = st.dictionaries(st.sampled_from(NAMES), st.floats(-2, 2) | st.integers(-2, 2), min_size=1)


@given(which=st.sampled_from(NAMES) | FACTORS)
@settings(max_examples=20, deadline=None)
def test_the_output_is_that_of_the_base_plus_the_weighted_updates_also_merged(which):
    """Also when factors are given as integers."""
    model = with_three(as_float64(Llama(Config(64, 16, 16, 1, 2, 1), np.random.default_rng(0))))
    set_adapter(model, which)
    factors = {which: 1.0} if isinstance(which, str) else which
    assert {n: a.factor for n, a in model.adapters.items()} == {n: factors.get(n) for n in NAMES}
    assert not any(module.rows_differ for module in lora_modules(model).values())
    expected = logits(updated_by_hand(model, factors))
    np.testing.assert_allclose(logits(model), expected, rtol=1e-9, atol=1e-11)
    merge_adapter(model)
    np.testing.assert_allclose(logits(model), expected, rtol=1e-9, atol=1e-11)


def test_no_adapter_is_the_base_to_the_last_bit_and_the_latest_is_active_at_first(three):
    model, before = three
    assert list(model.adapters) == ["legal", "support", "medical"]
    latest = logits(model)
    for which in (None, {}):
        set_adapter(model, which)
        assert logits(model).tobytes() == before.tobytes()
        assert not model.trainable_parameters()
        assert not any(module.rows_differ for module in lora_modules(model).values())
    set_adapter(model, "medical")
    np.testing.assert_array_equal(logits(model), latest)


def test_only_the_one_active_adapter_is_trainable_and_learns(three):
    model, _ = three
    set_adapter(model, {"legal": 0.5, "support": 0.5})
    assert not model.trainable_parameters()
    for which in model.adapters:
        set_adapter(model, which)
        names = model.trainable_parameters()
        assert names and all(f".adapters.{which}.lora_" in name for name in names)
        assert len(names) == len(adapter_state(model, which))
    set_adapter(model, "support")
    before = {name: sha256_of(adapter_state(model, name)) for name in model.adapters}
    losses_of(model, AdamW(model.trainable_parameters(), lr=0.01), 1)
    after = {name: sha256_of(adapter_state(model, name)) for name in model.adapters}
    assert [name for name in before if before[name] != after[name]] == ["support"]


def test_adapters_of_a_combination_are_trained_together_if_their_parameters_are_made_trainable():
    model = with_three(as_float64(Llama(Config(64, 16, 16, 1, 2, 1), np.random.default_rng(0))))
    set_adapter(model, {"legal": 0.5, "support": -2.0})
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".adapters." in name and ".medical." not in name
    sample = ml.Sample(tuple(IDS[0]), tuple(IDS[0]))
    report = ml.gradcheck(model, [sample])
    assert report.elements == sum(a.size for name in ("legal", "support") for a in adapter_state(model, name).values())


def test_every_addition_freezes_the_base_and_the_other_adapters(tiny_model):
    for name in NAMES:
        tiny_model.requires_grad_(True)
        add_adapter(tiny_model, config(target_modules=QV), name)
        assert [*tiny_model.trainable_parameters()] == [n for n in tiny_model.state_dict() if f".adapters.{name}." in n]


def test_another_choice_loses_no_gradient_neither_of_earlier_losses_nor_of_graphs_and_the_bases_are_freed(tiny_model):
    """As in PEFT: a loss with a frozen reference adapter, and one optimizer for the adapters of several tasks."""
    tiny_model.loss(IDS, IDS).backward()
    model = with_three(as_float64(tiny_model))
    assert all(p.grad is None for p in model.parameters())
    both = {}
    for which in ("legal", "support"):
        set_adapter(model, which)
        both |= model.trainable_parameters()
        model.loss(IDS, IDS).backward()
    alone = {name: p.grad.copy() for name, p in both.items()}
    optimizer = SGD(both, 0.1)
    optimizer.zero_grad()
    assert all(p.grad is None for p in both.values())
    losses = []
    for which in ("legal", "support"):
        set_adapter(model, which)
        losses.append(model.loss(IDS, IDS))
    for loss in losses:
        loss.backward()
    for name, p in both.items():
        np.testing.assert_array_equal(p.grad, alone[name])
    before = {name: p.data.copy() for name, p in both.items()}
    optimizer.step()
    assert all((p.data != before[name]).any() for name, p in both.items())


@pytest.mark.parametrize("frozen", [["lora_A"], ["lora_B"], ["ends"], ["middle"], ["lora_A", "ends"]], ids=str)
def test_an_adapter_that_was_frozen_by_hand_in_part_is_frozen_whole_by_another_choice_and_restored_as_it_was(frozen):
    model = with_three(Llama(Config(64, 16, 16, 3, 2, 1), np.random.default_rng(0)))
    set_adapter(model, "support")
    for name, parameter in [*model.trainable_parameters().items()]:
        part = "middle" if ".layers.1." in name else "ends"
        parameter.requires_grad = part not in frozen and name.rpartition(".")[2] not in frozen
    trained = set(model.trainable_parameters())
    blocks = [ml.disable_adapter] * 3 + [lambda model: ml.mixed_batch(model, ["support", "support"])]
    for inside, block in zip(("support", "legal", None, None), blocks, strict=True):
        with block(model):
            assert set(model.trainable_parameters()) == trained
            set_adapter(model, inside)
        assert set(model.trainable_parameters()) == trained
    set_adapter(model, {"support": 0.5, "legal": 0.5})
    assert not model.trainable_parameters()


@pytest.mark.parametrize("last", [0, 1])
def test_a_choice_that_was_interrupted_can_be_made_again(three, monkeypatch, last):
    """Ctrl-C, after the adapter chosen before was frozen in some of its modules."""
    model, _ = three
    set_adapter(model, "support")
    with monkeypatch.context() as patched:
        change, left = LoraWeights.requires_grad_, [None] * (1 + last)
        patched.setattr(LoraWeights, "requires_grad_", lambda self, wanted: (left.pop(), change(self, wanted)))
        with pytest.raises(IndexError):
            set_adapter(model, None)
    set_adapter(model, None)
    assert not model.trainable_parameters()


@pytest.mark.parametrize("block", [ml.disable_adapter, lambda model: ml.mixed_batch(model, ["legal", "support"])])
def test_a_block_that_ctrl_c_stops_while_it_restores_the_adapters_has_restored_them(three, monkeypatch, block):
    model, _ = three
    set_adapter(model, "support")
    before, trained = logits(model), set(model.trainable_parameters())
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt), block(model):
        set_adapter(model, None)
        patched.setattr(
            adapters, "activate", Mock(side_effect=[KeyboardInterrupt, *[DEFAULT] * 9], wraps=adapters.activate)
        )
    assert np.array_equal(logits(model), before) and set(model.trainable_parameters()) == trained


def test_a_switch_among_many_touches_two_adapters_at_most(tiny_model, monkeypatch):
    for i in range(6):
        add_adapter(tiny_model, config(r=2, lora_alpha=4), f"adapter-{i}")
    touched, change = [], LoraWeights.requires_grad_
    monkeypatch.setattr(
        LoraWeights, "requires_grad_", lambda self, wanted: touched.append(self) or change(self, wanted)
    )
    set_adapter(tiny_model, "adapter-2")
    assert len(touched) == 2 * len(lora_modules(tiny_model))  # the last that was added, and the one chosen
    assert {name.rpartition(".adapters.")[2][:9] for name in tiny_model.trainable_parameters()} == {"adapter-2"}


# -- refusals that change nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda m: add_adapter(m, config(target_modules=["q_proj", "v_prj"]), "new"), "v_prj"),
        (lambda m: add_adapter(m, config(target_modules=("q_proj", "lm_head")), "new"), "input embedding.*leave"),
        (lambda m: add_adapter(m, config(r=33), "new"), r"r=33 is too large for model.layers.0.self_attn.q_proj .* 32"),
        (lambda m: add_adapter(m, config(rank_pattern={"v_proj": 17}), "new"), "r=17 is too large for .*v_proj"),
        (lambda m: add_adapter(m, config(exclude_modules=".*"), "new"), "no module"),
        (lambda m: add_adapter(m, config(target_modules=["q_proj"]), "legal"), "already has an adapter called 'legal'"),
        (lambda m: add_adapter(m, config(), ""), "name"),
        (lambda m: add_adapter(m, config(), "new", seed=-1), "seed must be a whole number of at least 0, got -1"),
        (lambda m: add_adapter(m, config(), "new", seed=1.5), "seed must be .* got 1.5"),
        (lambda m: add_adapter(m, config(), "a.b"), "without dots"),
        (lambda m: add_adapter(m, config(), 3), "a non-empty text .* 3"),
        (lambda m: plan_adapter(m, config(), "legal"), "already has"),
        (lambda m: set_adapter(m, "absent"), "'absent'; it has: legal, support, medical"),
        (lambda m: set_adapter(m, {"legal": 1.0, "absent": 0.1}), "'absent'"),
        (lambda m: add_adapter(m, {"r": 8}, "new"), "expected a minilora.LoraConfig, got builtins.dict"),
        (lambda m: set_adapter(m, ["legal", "support"]), r"expected an adapter's name, .*, got \['legal', 'support'\]"),
        (lambda m: set_adapter(m, {"legal": 1.0, "support": float("nan")}), "finite number .*nan"),
        (lambda m: set_adapter(m, {"legal": "1"}), "finite number .*'1'"),
        (lambda m: set_adapter(m, {"legal": -np.inf}), "finite number .*inf"),
        (lambda m: set_adapter(m, ""), "legal, support, medical"),
        (lambda m: remove_adapter(m, "absent"), "'absent'"),
        (lambda m: scale_adapter(m, "absent", 0.5), "'absent'"),
        (lambda m: scale_adapter(m, "legal", float("nan")), "finite number, got nan"),
        (lambda m: scale_adapter(m, "legal", float("inf")), "finite number, got inf"),
        (lambda m: scale_adapter(m, "legal", "0.5"), "finite number, got '0.5'"),
        (lambda m: ml.delta_weight(m, "model.norm"), "no module called 'model.norm' has an adapter"),
        (lambda m: ml.delta_weight(m, "model.layers.0.self_attn.q_proj", "absent"), "'absent'"),
    ],
)  # fmt: skip
def test_misuse_is_one_clear_error_and_changes_nothing(three, misuse, message):
    model, _ = three
    before = snapshot(model)
    with pytest.raises(TypeError if message.startswith("expected") else ValueError, match=message):
        misuse(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("how", ["class", "instance"])
def test_a_linear_layer_whose_forward_an_adapter_would_replace_is_refused(tiny_model, how):
    class Doubled(Linear):
        def forward(self, x):
            return super().forward(x) * 2

    path = "model.layers.1.mlp.down_proj"
    layer = tiny_model.get_submodule(path)
    if how == "class":
        layer.__class__ = Doubled
    else:
        layer.forward = lambda x: Linear.forward(layer, x) * 2
    before, kind = snapshot(tiny_model), type(layer).__name__
    with pytest.raises(ValueError, match=rf"^{path} is a {kind} with its own forward"):
        add_adapter(tiny_model, config())
    assert snapshot(tiny_model) == before
    doubled = logits(tiny_model)
    add_adapter(tiny_model, config(exclude_modules=["down_proj"]))
    np.testing.assert_array_equal(logits(tiny_model), doubled)


def test_a_failed_first_addition_leaves_the_model_trainable(tiny_model):
    for targets in (["lm_head"], ["v_prj"]):
        with pytest.raises(ValueError):
            add_adapter(tiny_model, config(target_modules=targets))
        assert not tiny_model.adapters and not lora_modules(tiny_model) and len(tiny_model.trainable_parameters()) == 20


def test_the_restored_layers_keep_the_mode_and_the_hooks_that_came_with_the_adapter(tiny_model):
    calls = []
    tiny_model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *seen: calls.append("before"))
    add_adapter(tiny_model, config(target_modules=QV))
    tiny_model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda *seen: calls.append("after"))
    tiny_model.eval()
    remove_adapter(tiny_model, "default")
    tiny_model(IDS)
    copy.deepcopy(tiny_model)
    assert sorted(calls) == ["after", "before"] and not any(module.training for _, module in tiny_model.named_modules())


def test_a_frozen_A_stays_frozen_when_the_whole_model_is_unfrozen(tiny_model):
    add_adapter(tiny_model, config(target_modules=QV, freeze_A=True))
    tiny_model.requires_grad_(True)
    everything = {name for name, _ in tiny_model.named_parameters() if not name.endswith("lora_A")}
    assert set(tiny_model.trainable_parameters()) == everything
    tiny_model.requires_grad_(False)
    assert not tiny_model.trainable_parameters()
    set_adapter(tiny_model, None)
    tiny_model.requires_grad_(True)
    set_adapter(tiny_model, None)  # which freezes B, although A is frozen already
    assert not names_in(tiny_model) & set(tiny_model.trainable_parameters())


UNUSED = {"exclude_modules": ["q_prj"], "rank_pattern": {"q_prj": 2}, "alpha_pattern": {"q_prj": 2.0}}


@pytest.mark.parametrize("name", UNUSED)
def test_a_pattern_that_matches_nothing_is_said(name, tiny_model, caplog):
    unadapted = config(target_modules=["q_proj"], exclude_modules=["v_proj", "mlp"])  # these exist: nothing to say
    assert plan_adapter(tiny_model, unadapted, "other") and not caplog.records
    add_adapter(tiny_model, config(**{name: UNUSED[name]}))
    assert [record.message for record in caplog.records] == [
        f"{name} 'q_prj' matches no module that gets an adapter, and changes nothing"
    ]


# -- scaling -----------------------------------------------------------------------------------------------------------


def test_a_scaled_adapter_gives_what_a_factor_gives(tiny_config, rng):
    model = Net(tiny_config, rng)
    add_adapter(model, random(target_modules=QV), "one")
    shaken(model, "one")
    add_adapter(model, random(target_modules=QV), "other")
    others, base = sha256_of(adapter_state(model, "other")), sha256_of(base_state(model))
    before = {name: array.copy() for name, array in adapter_state(model, "one").items()}
    set_adapter(model, MappingProxyType({"one": 0.3}))  # any mapping
    wanted = logits(model)
    set_adapter(model, "one")
    assert not np.allclose(logits(model), wanted, rtol=1e-3)
    scale_adapter(model, "one", 0.3)
    np.testing.assert_allclose(logits(model), wanted, rtol=1e-5, atol=1e-6)
    assert sha256_of(adapter_state(model, "other")) == others and sha256_of(base_state(model)) == base
    for name, array in adapter_state(model, "one").items():
        np.testing.assert_array_equal(array, before[name] * np.float32(0.3 if name.endswith("_B") else 1))


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_only_a_plain_adapter_can_be_scaled(tiny_config, rng, variant):
    model = Net(tiny_config, rng)
    add_adapter(model, config(target_modules=QV, **variant), "legal")
    before = sha256_of(adapter_state(model, "legal"))
    with pytest.raises(ValueError, match="only a plain LoRA can be scaled: .* set_adapter.model, {'legal': 0.5}"):
        scale_adapter(model, "legal", 0.5)
    assert sha256_of(adapter_state(model, "legal")) == before
