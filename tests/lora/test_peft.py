"""Adapters on disk: PEFT's names and shapes, nothing lost on the way, and no setting taken for another."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelfiles import as_dtype, write_safetensors
from peftfiles import CONFIG, NOTES, WEIGHTS, adapted, record_of, refused, refused_with, rewrite
from smallmodels import DTYPES, IDS, logits, tolerance

from minilora.engine.tensor import no_grad
from minilora.files.tensors import read_tensors
from minilora.lora.adapters import (
    adapter_state,
    add_adapter,
    base_state,
    lora_modules,
    merge_adapter,
    remove_adapter,
    set_adapter,
    unmerge_adapter,
)
from minilora.lora.config import LoraConfig
from minilora.lora.peft import load_adapter, peft_name, read_adapter_config, save_adapter
from minilora.nn.llama import Config, Llama
from minilora.nn.module import sha256_of
from minilora.nn.optim import AdamW

SETTINGS = [
    {},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": r".*\.(up|down)_proj"},
    {"exclude_modules": ["down_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    {"target_modules": r".*mlp.*", "layers_to_transform": [1]},
    {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 1},
        "alpha_pattern": {"layers.0.*up_proj": 3},
    },
    {"use_rslora": True, "lora_alpha": 0.5},
    {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"},
]


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_saved_adapter_comes_back_bit_identical(base, tmp_path, settings):
    model = adapted(base(), **settings)
    other = base()
    load_adapter(other, save_adapter(model, tmp_path / "a"), name="again")
    assert logits(other).tobytes() == logits(model).tobytes()
    assert sha256_of(adapter_state(other, "again")) == sha256_of(adapter_state(model, "default"))
    scales = [{path: m.adapters[name].scale for path, m in lora_modules(x).items()}
              for x, name in ((model, "default"), (other, "again"))]  # fmt: skip
    assert scales[0] == scales[1]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_saving_what_was_loaded_writes_the_same_files(base, tmp_path, settings):
    first = save_adapter(adapted(base(), **settings), tmp_path / "first")
    other = base()
    load_adapter(other, first)
    second = save_adapter(other, tmp_path / "second")
    assert (second / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()
    assert record_of(second) | {"init_lora_weights": False} == record_of(first)


@given(
    r=st.integers(1, 8),
    alpha=st.floats(0.01, 1000),
    rslora=st.booleans(),
    targets=st.sets(st.sampled_from(["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]), min_size=1),
)
@settings(max_examples=25, deadline=None)
def test_any_rank_scale_and_choice_of_modules_survives(tmp_path_factory, r, alpha, rslora, targets):
    models = [Llama(Config(64, 16, 16, 1, 2, 2), np.random.default_rng(0)) for _ in range(2)]
    add_adapter(models[0], LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=sorted(targets),
                                      init_lora_weights=False))  # fmt: skip
    load_adapter(models[1], save_adapter(models[0], tmp_path_factory.getbasetemp() / "any"))
    assert logits(models[0]).tobytes() == logits(models[1]).tobytes()


def test_a_loaded_adapter_is_active_and_can_be_trained_further(base, folder):
    model = base()
    load_adapter(model, folder, name="legal")
    assert list(model.adapters) == ["legal"]
    assert set(model.trainable_parameters()) == {name for name in model.state_dict() if ".adapters.legal." in name}
    model.loss(IDS, IDS).backward()
    assert all(p.grad.any() for p in model.trainable_parameters().values())


def test_one_of_several_adapters_is_saved_alone(base, tmp_path):
    model = adapted(adapted(base(), name="legal"), name="support", target_modules=["v_proj"], r=2)
    save_adapter(model, tmp_path / "support", name="support")
    assert {name.split(".")[-3] for name in read_tensors(tmp_path / "support" / WEIGHTS)} == {"v_proj"}
    set_adapter(model, "support")
    other = base()
    load_adapter(other, tmp_path / "support")
    assert logits(other).tobytes() == logits(model).tobytes()


def test_saving_an_adapter_that_is_not_there_is_an_error_that_makes_no_folder(base, tmp_path):
    with pytest.raises(ValueError, match=r"'legal'.*default"):
        save_adapter(adapted(base()), tmp_path / "a", name="legal")
    with pytest.raises(ValueError, match="none"):
        save_adapter(base(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"]


SMALL = Config(32, 16, 24, 2, 4, 2, max_position_embeddings=32)


@given(r=st.integers(1, 8), alpha=st.floats(0.5, 64), targets=st.sets(st.sampled_from(KINDS), min_size=1),
       dtype=DTYPES, rslora=st.booleans(), dora=st.booleans(), seed=st.integers(0, 9))  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_save_and_load_merge_and_unmerge_bring_back_every_bit(
    tmp_path_factory, r, alpha, targets, dtype, rslora, dora, seed
):
    def model():
        plain = Llama(SMALL, np.random.default_rng(1))
        for _, parameter in plain.named_parameters():
            parameter.data = parameter.data.astype(dtype)
        return plain

    def output(model):
        with no_grad():
            return model(IDS % 32).data

    here, there, folder = model(), model(), tmp_path_factory.mktemp("adapter")
    digest = sha256_of(base_state(here))
    chosen = LoraConfig(r=r, lora_alpha=alpha, target_modules=sorted(targets), use_rslora=rslora, use_dora=dora,
                        init_lora_weights=False)  # fmt: skip
    add_adapter(here, chosen, seed=seed)
    save_adapter(here, folder)
    load_adapter(there, folder)
    wanted, got = adapter_state(here, "default"), adapter_state(there, "default")
    assert wanted.keys() == got.keys() and all(got[k].tobytes() == wanted[k].tobytes() for k in wanted)
    before = output(here)
    assert before.dtype == dtype and output(there).tobytes() == before.tobytes()
    merge_adapter(there)
    scale = max(1.0, float(np.abs(before).max()))
    np.testing.assert_allclose(output(there) / scale, before / scale, **tolerance(dtype))
    unmerge_adapter(there)
    assert output(there).tobytes() == before.tobytes() and sha256_of(base_state(there)) == digest


# -- PEFT's format -----------------------------------------------------------------------------------------------------


def test_tensors_have_pefts_names_and_shapes(base, tmp_path):
    folder = save_adapter(adapted(base(), r=3), tmp_path / "a")
    shapes = {name: w.shape for name, w in read_tensors(folder / WEIGHTS).items()}
    matrices = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
                "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32),
                "mlp.down_proj": (32, 48)}  # fmt: skip
    expected = {}
    for layer in range(2):
        for kind, (m, n) in matrices.items():
            expected[f"base_model.model.model.layers.{layer}.{kind}.lora_A.weight"] = (3, n)
            expected[f"base_model.model.model.layers.{layer}.{kind}.lora_B.weight"] = (m, 3)
    assert shapes == expected


def test_the_weights_file_says_that_it_comes_from_a_tensor_library(folder):
    content = (folder / WEIGHTS).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F32"}


def test_the_config_is_pefts_record(base, tmp_path):
    model = adapted(base(), r=4, lora_alpha=16, use_rslora=True, rank_pattern={"up_proj": 2})
    record = record_of(save_adapter(model, tmp_path / "a", base_model="someone/model"))
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "someone/model",
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 16,
        "use_rslora": True,
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {},
        "bias": "none",
        "lora_dropout": 0.0,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    }
    assert {key: record[key] for key in expected} == expected


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
def test_adapters_in_other_float_types_are_read_as_the_models_own(base, folder, dtype):
    stored = {name: as_dtype(w, dtype) for name, w in read_tensors(folder / WEIGHTS).items()}
    write_safetensors(folder / WEIGHTS, stored)
    expected = read_tensors(folder / WEIGHTS)
    model = base()
    load_adapter(model, folder)
    for name, w in adapter_state(model, "default").items():
        assert w.dtype == np.float32
        np.testing.assert_array_equal(w, expected[f"base_model.model.{name}.weight"].astype(np.float32))


def test_float16_weights_may_sum_to_more_than_float16_holds(base, folder):
    large = {name: as_dtype(np.full_like(w, 4096), "F16") for name, w in read_tensors(folder / WEIGHTS).items()}
    write_safetensors(folder / WEIGHTS, large)
    model = base()
    load_adapter(model, folder)
    assert {w.max() for w in adapter_state(model, "default").values()} == {4096}


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"fan_in_fan_out": True},
        {"lora_bias": True},
        {"modules_to_save": ["embed_tokens"]},
        {"layer_replication": [[0, 1]]},
        {"layers_pattern": "h"},
        {"trainable_token_indices": [1, 2]},
        {"megatron_config": {"a": 1}},
        {"target_parameters": ["x"]},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "olora"},
        {"an_option_of_tomorrow": True},
        {"another_option": {"x": 1}},
    ],
    ids=str,
)
def test_a_setting_that_would_change_the_computation_is_refused_by_name(base, folder, change):
    refused_with(base(), folder, change, next(iter(change)))


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"r": 0},
        {"r": "8"},
        {"r": None},
        {"lora_alpha": None},
        {"lora_alpha": 0},
        {"lora_alpha": "16"},
        {"target_modules": None},
        {"target_modules": []},
        {"target_modules": 5},
        {"target_modules": "(q"},
        {"exclude_modules": 5},
        {"layers_to_transform": "1"},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"q_proj": 0}},
        {"alpha_pattern": 3},
        {"use_rslora": "false"},
    ],
    ids=str,
)
def test_a_setting_that_means_nothing_is_refused_by_name(base, folder, change):
    key = next(iter(change))
    refused_with(base(), folder, change, "regular expression" if change[key] == "(q" else key.removeprefix("lora_"))


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules", "peft_type"])
def test_a_missing_setting_is_named(base, folder, key):
    record = record_of(folder)
    del record[key]
    (folder / CONFIG).write_text(json.dumps(record))
    refused(base(), folder, CONFIG, key)


@pytest.mark.parametrize(
    "change",
    [
        {"bias": "none", "modules_to_save": None, "layers_pattern": None, "loftq_config": {}, "megatron_config": None},
        {
            "auto_mapping": None,
            "revision": None,
            "peft_version": "0.18.0",
            "inference_mode": False,
            "lora_dropout": 0.1,
        },
        {"an_option_of_tomorrow": None, "another_option": False, "a_third": []},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_settings_that_are_off_or_say_nothing_about_the_computation_are_accepted(base, folder, change):
    model = base()
    load_adapter(model, folder)
    rewrite(folder, change)
    other = base()
    load_adapter(other, folder)
    assert logits(other).tobytes() == logits(model).tobytes()


def test_alpha_of_the_file_is_divided_by_the_rank_of_the_file(folder):
    config = read_adapter_config(folder)
    assert config.scale_of("q_proj") == 8 / 4
    rewrite(folder, {"use_rslora": True})
    assert read_adapter_config(folder).scale_of("q_proj") == 8 / math.sqrt(4)


# Every key that PEFT 0.21 writes, with a value under which it does something, and what minilora does with that.
PEFT_KEYS = {
    "alora_invocation_tokens": [1, 2], "arrow_config": {"top_k": 3}, "corda_config": {"x": 1},
    "ensure_weight_tying": True, "eva_config": {"rho": 2}, "fan_in_fan_out": True, "kasa_config": {"x": 1},
    "layer_replication": [[0, 2]], "layers_pattern": "h", "loftq_config": {"loftq_bits": 4}, "lora_bias": True,
    "lora_ga_config": {"x": 1}, "megatron_config": {"x": 1}, "modules_to_save": ["lm_head"],
    "monteclora_config": {"x": 1}, "qalora_group_size": 32, "target_parameters": ["experts"],
    "trainable_token_indices": [5], "use_bdlora": True, "use_qalora": True, "velora_config": {"x": 1},
}  # fmt: skip


KEPT = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "base_model_name_or_path": "someone/model",
    "megatron_core": "megatron.core", "peft_version": "0.21.2", "revision": "main", "runtime_config": {"x": 1},
    "task_type": "SEQ_2_SEQ_LM", "init_lora_weights": "orthogonal", "layers_pattern": None, "loftq_config": {},
    "qalora_group_size": 16, "an_option_of_tomorrow": None,
}  # fmt: skip


@pytest.mark.parametrize("key", PEFT_KEYS)
def test_every_key_of_peft_that_minilora_does_not_compute_is_refused_with_the_reason(base, folder, key):
    refused_with(base(), folder, {key: PEFT_KEYS[key]}, key, "not something minilora computes: ")


@pytest.mark.parametrize("key", KEPT)
def test_every_other_key_is_kept_and_written_again(base, folder, key, tmp_path):
    rewrite(folder, {key: KEPT[key]})
    model = base()
    load_adapter(model, folder)
    assert record_of(save_adapter(model, tmp_path / "again"))[key] == KEPT[key]


def test_what_a_file_said_is_not_told_of_another_adapter(base, folder, tmp_path):
    rewrite(folder, {"base_model_name_or_path": "someone/model", "revision": "main"})
    model = base()
    load_adapter(model, folder)
    remove_adapter(model, "default")
    record = record_of(save_adapter(adapted(model), tmp_path / "again"))
    assert record["base_model_name_or_path"] is None and "revision" not in record


def test_the_base_that_is_named_when_saving_takes_the_place_of_the_one_in_the_file(base, folder, tmp_path):
    rewrite(folder, {"base_model_name_or_path": "someone/model"})
    model = base()
    load_adapter(model, folder)
    assert record_of(save_adapter(model, tmp_path / "a", base_model="x/y"))["base_model_name_or_path"] == "x/y"


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("lora_A", "lora_A.weight"),
        ("lora_B", "lora_B.weight"),
        ("lora_embedding_A", "lora_embedding_A"),
        ("lora_magnitude_vector", "lora_magnitude_vector"),
    ],
)
def test_pefts_name_for_each_part(part, name):
    assert peft_name(f"model.layers.0.x.{part}") == f"base_model.model.model.layers.0.x.{name}"


def test_all_linear_is_written_as_the_adapters_own_modules(base, tmp_path):
    model = adapted(base(), name="other", target_modules=["embed_tokens"])
    adapted(model, target_modules="all-linear", exclude_modules=["down_proj"])
    other = base()
    load_adapter(other, save_adapter(model, tmp_path / "a"))
    assert sorted(lora_modules(other)) == [path for path in sorted(lora_modules(model)) if "embed" not in path]


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"target_modules": ["embed_tokens", "q_proj"]},
                                      {"use_dora": True, "target_modules": ["embed_tokens"]}], ids=str)  # fmt: skip
def test_variants_come_back_bit_identical(base, tmp_path, settings):
    model, other = adapted(base(), **settings), base()
    load_adapter(other, save_adapter(model, tmp_path / "a"))
    assert logits(other).tobytes() == logits(model).tobytes()


def test_pissa_is_saved_as_a_plain_adapter_of_twice_the_rank_on_the_unchanged_base(base, tmp_path):
    model, other = adapted(base(), init_lora_weights="pissa", r=3), base()
    for array in adapter_state(model, "default").values():
        array *= np.float32(1.1)
    folder = save_adapter(model, tmp_path / "a")
    assert (record_of(folder)["r"], record_of(folder)["init_lora_weights"]) == (6, True)
    load_adapter(other, folder)
    np.testing.assert_allclose(logits(other), logits(model), atol=1e-5)
    assert np.abs(logits(model) - logits(base())).max() > 1e-3


# -- minilora.json, beside PEFT's files --------------------------------------------------------------------------------


def trained(model, steps):
    optimizer = AdamW(model.trainable_parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.loss(IDS, IDS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_dropout_goes_on_with_the_holes_that_would_have_come_next(base, tmp_path):
    model = adapted(base(), lora_dropout=0.5)
    trained(model, 2)
    folder = save_adapter(model, tmp_path / "a")
    other, anew = base(), base()
    load_adapter(other, folder, name="other")
    (folder / NOTES).unlink()
    load_adapter(anew, folder)
    expected = trained(model, 2)
    assert trained(other, 2) == expected
    assert trained(anew, 2) != expected


def test_the_notes_say_seed_and_draws_of_each_module(base, tmp_path):
    model = adapted(base(), lora_dropout=0.5, target_modules=["q_proj"])
    model.loss(IDS, IDS).backward()
    notes = json.loads((save_adapter(model, tmp_path / "a") / NOTES).read_text())
    assert notes.keys() == {"format", "base", "dropout"}
    assert notes["dropout"] == {
        path: {"seed": module.adapters["default"].dropout.seed, "draws": {"0": 1}}
        for path, module in lora_modules(model).items()
    }


def test_the_notes_say_nothing_of_an_adapter_that_was_there_before(base, tmp_path):
    save_adapter(adapted(base(), lora_dropout=0.5), tmp_path, data={"name": "legal"})
    assert json.loads((tmp_path / NOTES).read_text()).keys() == {"format", "base", "data", "dropout"}
    save_adapter(adapted(base()), tmp_path)
    assert json.loads((tmp_path / NOTES).read_text()).keys() == {"format", "base"}


@pytest.mark.parametrize("notes", [{}, {"base_sha256": "0"}, {"dropout": {}}, {"dropout": {"absent": 1}}], ids=str)
def test_entries_that_say_nothing_of_dropout_are_left_alone(base, tmp_path, notes):
    folder = save_adapter(adapted(base(), lora_dropout=0.5), tmp_path)
    (folder / NOTES).write_text(json.dumps(notes))
    load_adapter(base(), folder)


@pytest.mark.parametrize(
    "state",
    [None, 3, [], {"seed": 1}, {"draws": {}}, {"seed": -1, "draws": {}}, {"seed": 1.5, "draws": {}},
     {"seed": True, "draws": {}}, {"seed": 1, "draws": [1]}, {"seed": 1, "draws": {"x": 1}},
     {"seed": 1, "draws": {"0": -1}}, {"seed": 1, "draws": {"-1": 1}}, {"seed": 1, "draws": {"0": "1"}}],
    ids=str,
)  # fmt: skip
def test_a_state_of_dropout_that_is_none_is_refused_by_module(base, tmp_path, state):
    folder = save_adapter(adapted(base(), lora_dropout=0.5), tmp_path)
    path = "model.layers.0.self_attn.q_proj"
    (folder / NOTES).write_text(json.dumps({"dropout": {path: state}}))
    refused(base(), folder, NOTES, path)


@pytest.mark.parametrize("content", ["[]", "{", '{"dropout": [1]}'])
def test_notes_that_are_no_object_are_refused(base, tmp_path, content):
    folder = save_adapter(adapted(base(), lora_dropout=0.5), tmp_path)
    (folder / NOTES).write_text(content)
    refused(base(), folder, NOTES)


def test_a_name_alone_is_written_as_a_list_since_peft_takes_a_string_for_a_pattern(base, tmp_path):
    record = record_of(save_adapter(adapted(base(), target_modules="q_proj", exclude_modules="v_proj"), tmp_path))
    assert (record["target_modules"], record["exclude_modules"]) == (["q_proj"], ["v_proj"])


def test_a_pattern_with_chosen_layers_is_written_as_the_modules_it_found(base, tmp_path):
    model = adapted(base(), target_modules=r".*\.q_proj", layers_to_transform=1)
    assert record_of(save_adapter(model, tmp_path))["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    model = adapted(base(), target_modules=r".*\.q_proj")
    assert record_of(save_adapter(model, tmp_path))["target_modules"] == r".*\.q_proj"


def test_what_the_file_said_is_kept_with_the_adapter(base, folder):
    rewrite(folder, {"revision": "main"})
    model = base()
    load_adapter(model, folder, name="loaded")
    adapted(model, name="made")
    assert model.adapters["loaded"].record["revision"] == "main" and model.adapters["made"].record == {}


# -- left on disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_loads(tiny_config, tmp_path):
    """A saved adapter, and two models that have it: read, and mapped."""
    saved, *models = [Llama(tiny_config, np.random.default_rng(0)) for _ in range(3)]
    folder = save_adapter(adapted(saved), tmp_path / "adapter")
    for each, mapped in zip(models, (False, True), strict=True):
        load_adapter(each, folder, mapped=mapped)
    return folder, *models


def test_a_mapped_adapter_computes_the_same(two_loads):
    _, read, mapped = two_loads
    assert np.array_equal(logits(read), logits(mapped))


def test_a_mapped_adapter_owns_no_numbers(two_loads):
    _, read, mapped = two_loads
    assert all(isinstance(_owner(array), np.memmap) for array in adapter_state(mapped, "default").values())
    assert not any(isinstance(_owner(array), np.memmap) for array in adapter_state(read, "default").values())


def test_training_a_mapped_adapter_leaves_the_file_alone(two_loads):
    folder, _, mapped = two_loads
    file = folder / WEIGHTS
    before, state = file.read_bytes(), {k: v.copy() for k, v in adapter_state(mapped, "default").items()}
    mapped.loss(IDS, IDS).backward()
    AdamW(mapped.trainable_parameters(), lr=1e-2).step()
    assert file.read_bytes() == before
    assert all(not np.array_equal(v, state[k]) for k, v in adapter_state(mapped, "default").items())


def _owner(array):
    """What an array is a view into."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
