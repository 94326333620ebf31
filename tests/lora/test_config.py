"""LoraConfig: which modules are adapted, with which rank and scale, and which settings are refused."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.lora.adapters import add_adapter, lora_modules
from minilora.lora.config import LoraConfig, find_targets
from minilora.lora.layer import new_weights
from minilora.nn.layers import Linear
from minilora.nn.llama import Llama

KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PARTS = {kind: "self_attn" if i < 4 else "mlp" for i, kind in enumerate(KINDS)}
NAMES = [f"model.layers.{i}.{PARTS[kind]}.{kind}" for i in range(12) for kind in KINDS]


def config(r=4, lora_alpha=8, **settings):
    return LoraConfig(r=r, lora_alpha=lora_alpha, **settings)


def found(names=NAMES, **settings):
    return find_targets(names, config(**settings))


def of(*kinds, layers=range(12)):
    return [name for name in NAMES if name.split(".")[-1] in kinds and int(name.split(".")[2]) in layers]


# -- which modules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, NAMES),
        ({"target_modules": "all-linear"}, NAMES),
        ({"target_modules": ["q_proj"]}, of("q_proj")),
        ({"target_modules": ["v_proj", "q_proj"]}, of("q_proj", "v_proj")),
        ({"target_modules": ("q_proj", "v_proj")}, of("q_proj", "v_proj")),
        ({"target_modules": ["self_attn.q_proj"]}, of("q_proj")),
        ({"target_modules": ["model.layers.3.mlp.up_proj"]}, of("up_proj", layers=[3])),
        ({"target_modules": "q_proj"}, of("q_proj")),
        ({"target_modules": "self_attn.q_proj"}, of("q_proj")),
        ({"target_modules": "model.layers.3.mlp.up_proj"}, of("up_proj", layers=[3])),
        ({"exclude_modules": "mlp.down_proj"}, of(*[kind for kind in KINDS if kind != "down_proj"])),
        ({"exclude_modules": r".*down"}, NAMES),  # a pattern must match whole names
        ({"target_modules": r".*\.(q|v)_proj"}, of("q_proj", "v_proj")),
        ({"target_modules": r"model\.layers\.1\..*"}, of(*KINDS, layers=[1])),  # not 10 or 11
        ({"target_modules": r".*mlp.*", "exclude_modules": ["down_proj"]}, of("gate_proj", "up_proj")),
        ({"exclude_modules": r".*\.(mlp|self_attn\.[kvo]_proj).*"}, of("q_proj")),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, of("q_proj", layers=[1])),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, of("q_proj", layers=[0])),
        ({"layers_to_transform": [0, 11]}, of(*KINDS, layers=[0, 11])),
        ({"target_modules": ["q_proj"], "exclude_modules": ["absent"]}, of("q_proj")),
    ],
    ids=str,
)
def test_targets(settings, expected):
    assert found(**settings) == expected


def test_all_linear_leaves_the_head_out():
    assert found([*NAMES, "lm_head"]) == NAMES


def test_a_head_that_is_named_is_adapted():
    assert found([*NAMES, "lm_head"], target_modules=["q_proj", "lm_head"]) == [*of("q_proj"), "lm_head"]


@pytest.mark.parametrize("target", ["q_prj", "proj", "_proj", "Q_proj", "q_proj ", "mlp", "layers.0", ""])
@pytest.mark.parametrize("others", [[], ["v_proj"]])
def test_a_misspelled_target_is_an_error_that_lists_what_there_is_even_if_others_match(target, others):
    with pytest.raises(ValueError) as caught:
        found(target_modules=[*others, target])
    assert repr(target) in str(caught.value) and ", ".join(KINDS) in str(caught.value)


@pytest.mark.parametrize("pattern", [r".*\.q", "all_linear", r"layers\.0.*", r"q_proj$", "proj"])
def test_a_string_that_matches_nothing_is_an_error_that_says_both_forms_and_lists_what_there_is(pattern):
    with pytest.raises(ValueError) as caught:
        found(target_modules=pattern)
    message = str(caught.value)
    assert repr(pattern) in message and "'q_proj'" in message and "'.*_proj'" in message and "q_proj, k_proj" in message


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize(
    ("given", "kept"),
    [("q_proj", ["q_proj"]), (("v_proj", "q_proj"), ["v_proj", "q_proj"]), ({"v_proj", "q_proj"}, ["q_proj", "v_proj"]),
     (r".*\.q_proj", r".*\.q_proj")],
    ids=str,
)  # fmt: skip
def test_names_are_kept_as_a_list_and_patterns_as_they_are(field, given, kept):
    assert getattr(config(**{field: given}), field) == kept


def test_all_linear_stays_itself_and_numbers_of_layers_become_a_list():
    chosen = config(target_modules="all-linear", layers_to_transform=range(2))
    assert (chosen.target_modules, chosen.layers_to_transform) == ("all-linear", [0, 1])
    assert config(layers_to_transform=3).layers_to_transform == 3


def test_a_config_shows_what_is_not_the_default_and_can_be_read_back():
    short = config(r=8, lora_alpha=16)
    assert repr(short) == "LoraConfig(r=8, lora_alpha=16, target_modules='all-linear')"
    full = config(target_modules=["q_proj"], use_dora=True, rank_pattern={"q_proj": 2}, lora_dropout=0.1)
    assert eval(repr(full), {"LoraConfig": LoraConfig}) == full
    assert "use_dora=True" in repr(full) and "bias" not in repr(full)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        {"exclude_modules": ".*"},
        {"layers_to_transform": 12},
        {"layers_to_transform": []},
        {"target_modules": r".*layers\.0\..*", "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_a_selection_that_leaves_nothing_is_an_error(settings):
    with pytest.raises(ValueError, match="no module"):
        found(**settings)


@given(st.sets(st.sampled_from(KINDS), min_size=1), st.sets(st.integers(0, 11), min_size=1))
def test_names_and_layers_select_their_intersection(kinds, layers):
    assert found(target_modules=sorted(kinds), layers_to_transform=sorted(layers)) == of(*kinds, layers=layers)


def test_all_linear_finds_the_seven_matrices_of_every_block(tiny_model):
    assert add_adapter(tiny_model, config()) == of(*KINDS, layers=[0, 1])


# -- the head ----------------------------------------------------------------------------------------------------------


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


# -- rank and scale ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": 8, "lora_alpha": 16}, 2.0),
        ({"r": 16, "lora_alpha": 16}, 1.0),
        ({"r": 16, "lora_alpha": 8}, 0.5),
        ({"r": 4, "lora_alpha": 0.5}, 0.125),
        ({"r": 16, "lora_alpha": 8, "use_rslora": True}, 2.0),
        ({"r": 2, "lora_alpha": 1, "use_rslora": True}, 1 / math.sqrt(2)),
    ],
    ids=str,
)
def test_the_scale_is_alpha_over_r_or_over_its_root_with_rslora(settings, scale):
    assert LoraConfig(**settings).scale_of("model.layers.0.mlp.up_proj") == pytest.approx(scale, rel=1e-15)


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("down_proj", of("down_proj")),
        ("mlp.down_proj", of("down_proj")),
        ("q_proj|v_proj", of("q_proj", "v_proj")),
        (r"layers\.[0-3]\.mlp\.up_proj", of("up_proj", layers=range(4))),
        (r"layers\.1\..*", of(*KINDS, layers=[1])),
        ("model.layers.11.self_attn.q_proj", of("q_proj", layers=[11])),
        ("proj", []),
        ("absent", []),
    ],
)
def test_patterns_change_rank_and_alpha_of_names_that_end_so(pattern, matching):
    both = config(r=4, lora_alpha=8, rank_pattern={pattern: 2}, alpha_pattern={pattern: 5.0})
    assert [name for name in NAMES if both.rank_of(name) == 2] == matching
    assert [name for name in NAMES if both.alpha_of(name) == 5.0] == matching
    assert {both.scale_of(name) for name in matching} <= {2.5}
    assert {both.scale_of(name) for name in NAMES if name not in matching} <= {2.0}


def test_rslora_takes_the_root_of_the_rank_that_a_pattern_gives():
    assert config(use_rslora=True, rank_pattern={"q_proj": 16}).scale_of("layers.0.q_proj") == 2.0


def test_the_first_matching_pattern_counts():
    assert config(rank_pattern={"q_proj": 1, ".*_proj": 2}).rank_of("layers.0.q_proj") == 1


def test_patterns_reach_the_weights(tiny_model):
    add_adapter(tiny_model, config(r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 32}))
    weights = {path.rpartition(".")[2]: m.adapters["default"] for path, m in lora_modules(tiny_model).items()}
    assert [(weights[k].rank, weights[k].scale) for k in ("q_proj", "k_proj", "v_proj")] == [
        (2, 4.0),
        (4, 8.0),
        (4, 2.0),
    ]


@pytest.mark.parametrize(("settings", "rank"), [({"r": 33}, 33), ({"r": 1, "rank_pattern": {"v_proj": 17}}, 17)])
def test_a_rank_above_what_a_matrix_can_have_is_refused_by_name(tiny_model, settings, rank):
    with pytest.raises(ValueError, match=rf"r={rank} is larger than model\.layers\.0\.self_attn\.[qv]_proj .* at most"):
        add_adapter(tiny_model, config(**settings))
    assert not lora_modules(tiny_model) and len(tiny_model.trainable_parameters()) == 20


def test_the_full_rank_of_a_matrix_is_allowed(tiny_model):
    add_adapter(tiny_model, config(r=32, target_modules=["q_proj"]))
    assert lora_modules(tiny_model)["model.layers.0.self_attn.q_proj"].adapters["default"].rank == 32


# -- settings that mean nothing ----------------------------------------------------------------------------------------


def test_alpha_has_no_default():
    with pytest.raises(TypeError, match="lora_alpha"):
        LoraConfig(r=8)


def test_fields_have_names_only():
    with pytest.raises(TypeError):
        LoraConfig(8, 16)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"r": 0}, "r must be"),
        ({"r": -1}, "r must be"),
        ({"r": 8.0}, "r must be"),
        ({"r": "8"}, "r must be"),
        ({"r": True}, "r must be"),
        ({"r": None}, "r must be"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj"),
        ({"rank_pattern": {"q_proj": 2.5}}, "q_proj"),
        ({"rank_pattern": {"(": 2}}, "regular expression"),
        ({"lora_alpha": 0}, "alpha"),
        ({"lora_alpha": -16}, "alpha"),
        ({"lora_alpha": "16"}, "alpha"),
        ({"lora_alpha": None}, "alpha"),
        ({"lora_alpha": True}, "alpha"),
        ({"lora_alpha": float("nan")}, "alpha"),
        ({"lora_alpha": float("inf")}, "alpha"),
        ({"alpha_pattern": {"q_proj": 0}}, "q_proj"),
        ({"alpha_pattern": {"[": 1}}, "regular expression"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ""}, "target_modules is empty"),
        ({"target_modules": None}, "target_modules is empty"),
        ({"target_modules": "(q_proj"}, "regular expression"),
        ({"exclude_modules": "*"}, "regular expression"),
        ({"target_modules": 5}, "target_modules"),
        ({"target_modules": ["q_proj", 3]}, "target_modules"),
        ({"exclude_modules": 5}, "exclude_modules"),
        ({"layers_to_transform": "1"}, "layers_to_transform"),
        ({"layers_to_transform": 1.5}, "layers_to_transform"),
        ({"layers_to_transform": [0, None]}, "layers_to_transform"),
        ({"use_rslora": "false"}, "use_rslora"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"init_lora_weights": "pizza"}, "init_lora_weights"),
        ({"init_lora_weights": None}, "init_lora_weights"),
    ],
    ids=str,
)
def test_a_setting_that_means_nothing_is_refused_by_name(settings, word):
    with pytest.raises(ValueError) as caught:
        config(**settings)
    assert word in str(caught.value)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", [["q_proj"], "q_proj", 3])
def test_a_pattern_that_is_no_dict_is_refused_by_name(field, value):
    with pytest.raises((TypeError, ValueError), match=field):
        config(**{field: value})


def test_a_config_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().r = 16


# -- how an adapter starts ---------------------------------------------------------------------------------------------


def started(init, r=16, n=400, m=300):
    share = new_weights("x", Linear(n, m), config(r=r, init_lora_weights=init), np.random.default_rng(0))
    assert share.lora_A.shape == (r, n) and share.lora_B.shape == (m, r)
    assert share.lora_A.dtype == share.lora_B.dtype == np.float32
    return share.lora_A.data, share.lora_B.data


def test_a_is_uniform_within_one_over_the_root_of_the_width_and_b_is_zero():
    a, b = started(True)
    assert not b.any()
    assert np.abs(a).max() <= 0.05 and np.abs(a).max() > 0.0499  # 1 / sqrt(400)
    assert a.std() == pytest.approx(0.05 / math.sqrt(3), rel=0.03)


def test_gaussian_a_has_deviation_one_over_r_and_b_is_zero():
    a, b = started("gaussian")
    assert not b.any()
    assert a.std() == pytest.approx(1 / 16, rel=0.03) and np.abs(a).max() > 3 / 16


def test_without_initialisation_both_are_random():
    a, b = started(False)
    assert a.std() > 0 and b.std() > 0
