"""LoraConfig: which modules are adapted, with which rank and scale, and which values are refused."""

import dataclasses
import inspect
import json
import math
import pickle
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.lora.config import UNSUPPORTED, LoraConfig, find_targets

KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PARTS = {kind: "self_attn" if i < 4 else "mlp" for i, kind in enumerate(KINDS)}
NAMES = [f"model.layers.{i}.{PARTS[kind]}.{kind}" for i in range(12) for kind in KINDS]


def config(r=4, lora_alpha=8, **settings):
    return LoraConfig(r=r, lora_alpha=lora_alpha, **settings)


def found(names=NAMES, **settings):
    return find_targets(names, config(**settings))


def of(*kinds, layers=range(12)):
    return [name for name in NAMES if name.split(".")[-1] in kinds and int(name.split(".")[2]) in layers]


def test_each_field_has_a_line_in_the_docstring():
    described = re.findall(r"^(\w+(?:, \w+)*): ", inspect.cleandoc(LoraConfig.__doc__), re.MULTILINE)
    assert {field.name for field in dataclasses.fields(LoraConfig)} - set(", ".join(described).split(", ")) == set()


# -- which modules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, NAMES),
        ({"target_modules": ("v_proj", "q_proj")}, of("q_proj", "v_proj")),
        ({"target_modules": "self_attn.q_proj"}, of("q_proj")),
        ({"target_modules": ["model.layers.3.mlp.up_proj"]}, of("up_proj", layers=[3])),
        ({"exclude_modules": "mlp.down_proj"}, of(*KINDS[:-1])),
        ({"exclude_modules": r".*down"}, NAMES),  # a pattern must match whole names
        ({"target_modules": r".*\.(q|v)_proj"}, of("q_proj", "v_proj")),
        ({"target_modules": "(?i).*q_PROJ"}, of("q_proj")),
        ({"target_modules": r"model\.layers\.1\..*"}, of(*KINDS, layers=[1])),  # not 10 or 11
        ({"target_modules": r".*mlp.*", "exclude_modules": ["down_proj"]}, of("gate_proj", "up_proj")),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, of("q_proj", layers=[0])),
        ({"target_modules": r".*layers\.1\..*", "layers_to_transform": [0, 1]}, of(*KINDS, layers=[1])),
        ({"target_modules": ["q_proj"], "exclude_modules": ["absent"]}, of("q_proj")),
    ],
    ids=str,
)
def test_targets(settings, expected):
    assert found(**settings) == expected


@given(st.sets(st.sampled_from(KINDS), min_size=1), st.sets(st.integers(0, 11), min_size=1))
def test_names_and_layers_select_their_intersection(kinds, layers):
    assert found(target_modules=sorted(kinds), layers_to_transform=sorted(layers)) == of(*kinds, layers=layers)


@given(st.sets(st.sampled_from(NAMES), min_size=1), st.sampled_from(KINDS), st.integers(0, 11))
def test_modules_named_in_full_are_adapted_in_any_block_as_in_peft(whole, kind, layer):
    expected = {*whole, *of(kind, layers=[layer])}
    assert set(found(target_modules=[*sorted(whole), kind], layers_to_transform=layer)) == expected
    names, expected = [*NAMES, "lm_head"], {*of(kind, layers=[layer]), "lm_head"}  # which is in no block
    assert set(found(names, target_modules=[kind, "lm_head"], layers_to_transform=layer)) == expected


@given(st.sets(st.integers(0, 11), min_size=1), st.sets(st.integers(12, 99) | st.integers(-9, -1), min_size=1))
def test_a_block_that_does_not_exist_is_refused_next_to_those_that_do(layers, absent):
    with pytest.raises(ValueError, match=f"there is no block {min(absent)}; numbers of their blocks: 0, 1, .*, 11"):
        found(layers_to_transform=sorted(layers | absent))


def test_all_linear_leaves_out_the_head_unless_it_is_named():
    assert found([*NAMES, "lm_head"]) == NAMES
    assert found([*NAMES, "lm_head"], target_modules=["q_proj", "lm_head"]) == [*of("q_proj"), "lm_head"]


@pytest.mark.parametrize(
    "target", [*("q_prj", "_proj", "Q_proj", "mlp", "layers.0", "q_proj$", r".*\.q", "all_linear", "proj")]
)
def test_a_target_that_matches_nothing_is_an_error_that_lists_the_modules_even_if_others_match(target):
    for targets in (target, [target], ["v_proj", target]):
        with pytest.raises(ValueError) as caught:
            found(target_modules=targets)
        assert all(part in str(caught.value) for part in (repr(target), "'q_proj'", "'.*_proj'", ", ".join(KINDS)))


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize(
    ("given", "stored"),
    [("q_proj", ["q_proj"]), (("v_proj", "q_proj"), ["v_proj", "q_proj"]), ({"v_proj", "q_proj"}, ["q_proj", "v_proj"]),
     (r".*\.q_proj", r".*\.q_proj")],
    ids=["a name", "a tuple", "a set", "a pattern"],
)  # fmt: skip
def test_names_are_stored_as_a_list_and_patterns_as_they_are(field, given, stored):
    assert getattr(config(**{field: given}), field) == stored


def test_all_linear_stays_itself_and_numbers_of_layers_become_a_list():
    chosen = config(target_modules="all-linear", layers_to_transform=range(2))
    assert (chosen.target_modules, chosen.layers_to_transform) == ("all-linear", [0, 1])
    assert config(layers_to_transform=3).layers_to_transform == 3


def test_a_config_shows_what_is_not_the_default_and_can_be_read_back():
    assert repr(config(r=8, lora_alpha=16)) == "LoraConfig(r=8, lora_alpha=16, target_modules='all-linear')"
    full = config(target_modules=["q_proj"], use_dora=True, rank_pattern={"q_proj": 2}, lora_dropout=0.1)
    assert eval(repr(full), {"LoraConfig": LoraConfig}) == full
    assert "use_dora=True" in repr(full) and "freeze_A" not in repr(full)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_the_task_type_of_a_config_of_peft_changes_nothing(task_type):
    assert config(task_type=task_type) == config() == dataclasses.replace(config(), task_type=task_type)


OFF = {"inference_mode": False, "fan_in_fan_out": False, "layers_pattern": "layers", "peft_type": "LORA",
       **dict.fromkeys(UNSUPPORTED), "use_qalora": False, "loftq_config": {}, "revision": "main"}  # fmt: skip


@pytest.mark.parametrize("settings", [OFF, *({name: value} for name, value in OFF.items())], ids=str)
def test_fields_of_peft_that_change_nothing_are_accepted_and_not_stored(settings):
    made = config(**settings)
    assert made == config() and vars(made) == vars(config()) and repr(made) == repr(config())
    assert dataclasses.replace(made, r=2) == config(r=2) == dataclasses.replace(config(), r=2, **settings)
    assert pickle.loads(pickle.dumps(made)) == made
    assert inspect.signature(LoraConfig).parameters.keys() == {*vars(made), "task_type"}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_any_other_value_of_a_field_of_peft_is_refused_with_the_reason(name):
    words = re.escape(f"minilora does not support {name} = ['x']: {UNSUPPORTED[name]}")
    for make in (config, lambda **settings: dataclasses.replace(config(), **settings)):
        with pytest.raises(ValueError, match=f"^{words}$"):
            make(**OFF | {name: ["x"]})


def test_another_method_of_peft_and_a_name_that_nobody_has_are_refused():
    with pytest.raises(ValueError, match="^peft_type must be 'LORA', .* got 'IA3'"):
        config(peft_type="IA3")
    for value in (False, True):
        with pytest.raises(TypeError, match="use_doraa"):
            config(use_doraa=value)


def test_values_of_numpy_are_stored_as_those_of_python():
    plain = {"r": 4, "lora_alpha": 8.0, "lora_dropout": 0.5, "use_dora": True, "layers_to_transform": [0, 2]}
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 1.5}}
    scalars = {name: np.asarray(value)[()] for name, value in plain.items()}
    made = config(**scalars, rank_pattern={"q_proj": np.int32(2)}, alpha_pattern={"q_proj": np.float32(1.5)})
    assert made == config(**plain, **patterns) and json.loads(json.dumps(vars(made))) == vars(made)


@pytest.mark.parametrize(
    ("names", "settings", "words"),
    [
        (NAMES, {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, r"exclude_modules=\['q_proj'\] leaves"),
        (NAMES, {"exclude_modules": ".*"}, r"exclude_modules='.\*' leaves no module of q_proj, .*down_proj to adapt"),
        (NAMES, {"layers_to_transform": 12}, "layers_to_transform=12 leaves no module .* blocks: 0, 1, 2, .*, 11"),
        (NAMES, {"layers_to_transform": []}, r"layers_to_transform=\[\] leaves no module"),
        (NAMES, {"target_modules": r".*layers\.0\..*", "layers_to_transform": [1]}, "of their blocks: 0$"),
        (["lm_head"], {}, "'all-linear' leaves out the head, and the model has only lm_head"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_a_selection_of_nothing_is_an_error_with_its_own_reason(names, settings, words):
    with pytest.raises(ValueError, match=words):
        found(names, **settings)


# -- rank and scale ----------------------------------------------------------------------------------------------------


@given(r=st.integers(1, 64), alpha=st.floats(0.1, 100), other=st.integers(1, 64), rslora=st.booleans())
def test_the_scale_is_alpha_over_the_rank_of_the_module_or_over_its_root_with_rslora(r, alpha, other, rslora):
    chosen = config(r=r, lora_alpha=alpha, use_rslora=rslora, rank_pattern={"q_proj": other})
    for name, rank in (("layers.0.q_proj", other), ("layers.0.k_proj", r)):
        assert chosen.scale_of(name) == alpha / (math.sqrt(rank) if rslora else rank)


PATTERNS = [*KINDS, "mlp.down_proj", "self_attn", "layers.1", "layers.1.mlp", "model", "proj", "q_proj|up_proj"]
PATTERNS += [r"layers\.[0-3]\.mlp\.up_proj", r"layers\.1\..*", "model.layers.11.self_attn.q_proj"]


@given(st.sampled_from(PATTERNS))
def test_patterns_apply_to_names_that_end_with_a_whole_match(pattern):
    """As PEFT does: "self_attn" or "layers.1" selects no module whose name continues after it."""
    chosen = config(r=4, lora_alpha=8, rank_pattern={pattern: 2}, alpha_pattern={pattern: 5.0})
    for name in NAMES:
        endings = [name[i:] for i in range(len(name)) if i == 0 or name[i - 1] == "."]
        matches = any(re.fullmatch(pattern, ending) for ending in endings)
        assert (chosen.rank_of(name), chosen.alpha_of(name)) == ((2, 5.0) if matches else (4, 8)), name


def test_the_first_matching_pattern_counts():
    assert config(rank_pattern={"q_proj": 1, ".*_proj": 2}).rank_of("layers.0.q_proj") == 1


# -- values that mean nothing ------------------------------------------------------------------------------------------


def test_alpha_has_no_default_fields_have_names_only_and_nothing_changes_later():
    with pytest.raises(TypeError, match="lora_alpha"):
        LoraConfig(r=8)
    with pytest.raises(TypeError):
        LoraConfig(8, 16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().r = 16


NAN, INF = float("nan"), float("inf")
WRONG = {  # field: values, and the words of the error
    "r": ([0, -1, 8.0, "8", True, None], "r must be"),
    "rank_pattern": ([["q_proj"], "q_proj", 3], "rank_pattern must be a dict"),
    "alpha_pattern": ([["q_proj"], "q_proj", 3], "alpha_pattern must be a dict"),
    "lora_alpha": ([0, -16, "16", None, True, NAN, INF], "alpha must be a positive number"),
    "target_modules": ([[], "", None, 5, ["q_proj", 3]], "target_modules"),
    "exclude_modules": ([5, [5]], "exclude_modules must be one str"),
    "layers_to_transform": (["1", 1.5, [0, None], True, [1, False]], "layers_to_transform must be one int"),
    "lora_dropout": ([1.0, -0.1, "0.1", True, NAN], "lora_dropout must be a number"),
    "bias": ([True, "all", "lora_only"], "minilora does not support bias = .*: trained biases"),
    "use_rslora": (["false", 1], "use_rslora must be True or False"),
    "use_dora": ([1, None], "use_dora must be True or False"),
    "freeze_A": (["true", 1], "freeze_A must be True or False"),
    "init_lora_weights": (["pizza", "olora", 1, None], "init_lora_weights must be"),
    "task_type": (["SEQ_CLS", "", 0], "task_type must be 'CAUSAL_LM'"),
}


@pytest.mark.parametrize("field", WRONG)
def test_an_invalid_value_is_refused_with_the_name_of_its_field(field):
    values, words = WRONG[field]
    for value in values:
        with pytest.raises(ValueError, match=words):
            config(**{field: value})


@pytest.mark.parametrize(
    "settings",
    [{"rank_pattern": {"q_proj": 0}}, {"rank_pattern": {"q_proj": 2.5}}, {"alpha_pattern": {"q_proj": 0}},
     {"rank_pattern": {"q_proj(": 2}}, {"alpha_pattern": {"q_proj[": 1}}, {"target_modules": "(q_proj"},
     {"exclude_modules": "*q_proj"}, {"rank_pattern": {"(?i)q_proj": 2}}, {"alpha_pattern": {"q_proj)|(x": 2}},
     {"rank_pattern": {"q_proj{99999999999999}": 2}}, {"target_modules": f"q_proj{'(' * 5000}{')' * 5000}"}],
    ids=str,
)  # fmt: skip
def test_an_invalid_pattern_is_refused_by_name(settings):
    with pytest.raises(ValueError, match="q_proj"):
        config(**settings)
