"""LoraConfig: which modules are adapted, with which rank and scale, and which settings are refused."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.lora.config import LoraConfig, find_targets

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
    ids=["a name", "a tuple", "a set", "a pattern"],
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
