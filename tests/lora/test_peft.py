"""Adapters on disk: PEFT's names and shapes, bit-identical round trips, and no option taken for another."""

import json
import os

import numpy as np
import pytest
from modelfiles import as_dtype, write_safetensors
from peftfiles import CONFIG, NOTES, WEIGHTS, adapted, provenance_of, record_of, refused, refused_with, rewrite
from smallmodels import IDS, as_float64, every_variant, logits, losses_of, shaken

from minilora.files.disk import ModelFileError
from minilora.files.tensors import read_tensors
from minilora.lora.adapters import adapter_state, lora_modules, remove_adapter, set_adapter
from minilora.lora.combine import combine_adapters
from minilora.lora.config import UNSUPPORTED
from minilora.lora.llamacpp import save_gguf_adapter
from minilora.lora.peft import load_adapter, peft_name, save_adapter
from minilora.lora.provenance import _ENTRIES, read_provenance
from minilora.nn.layers import Linear
from minilora.nn.module import sha256_of
from minilora.nn.optim import AdamW

# -- round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*\.(up|down)_proj"},
        {"exclude_modules": ["down_proj"], "layers_to_transform": 1},
        {"target_modules": r".*mlp.*", "layers_to_transform": [1]},
        {"rank_pattern": {"up_proj": 1}, "alpha_pattern": {"layers.0.*up_proj": 3}},
        {"use_rslora": True, "lora_alpha": 0.5, "use_dora": True},
        {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"},
        {"freeze_A": True},
    ],
    ids=str,
)
def test_an_adapter_comes_back_bit_identical_and_saving_it_again_writes_the_same_files(base, tmp_path, settings):
    model, other = adapted(base(), **settings), base()
    first = save_adapter(model, tmp_path / "first")
    load_adapter(other, first, name="again")
    assert logits(other).tobytes() == logits(model).tobytes()
    assert sha256_of(adapter_state(other, "again")) == sha256_of(adapter_state(model, "default"))
    assert len(other.trainable_parameters()) == len(model.trainable_parameters())
    scales = [{path: m.adapters[name].scale for path, m in lora_modules(x).items()}
              for x, name in ((model, "default"), (other, "again"))]  # fmt: skip
    assert scales[0] == scales[1]
    second = save_adapter(other, tmp_path / "second", name="again")
    assert (second / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()
    assert (second / NOTES).read_bytes() == (first / NOTES).read_bytes()
    assert record_of(second) | {"init_lora_weights": False} == record_of(first) and "freeze_A" not in record_of(first)


def test_one_of_several_adapters_is_saved_alone(base, tmp_path):
    model = adapted(adapted(base(), name="legal"), name="support", target_modules=["v_proj"], r=2)
    save_adapter(model, tmp_path / "support", name="support")
    assert {name.split(".")[-3] for name in read_tensors(tmp_path / "support" / WEIGHTS)} == {"v_proj"}
    set_adapter(model, "support")
    other = base()
    load_adapter(other, tmp_path / "support")
    assert logits(other).tobytes() == logits(model).tobytes()
    for unknown, known in ((model, r"'absent'.*legal, support"), (base(), "none")):
        with pytest.raises(ValueError, match=known):
            save_adapter(unknown, tmp_path / "a", name="absent")
    assert not (tmp_path / "a").exists()


@every_variant
def test_every_variant_computes_the_same_when_it_is_loaded(base, tmp_path, settings):
    model, other = shaken(adapted(base(), **({"init_lora_weights": True} | settings))), base()
    load_adapter(other, save_adapter(model, tmp_path / "a"))
    np.testing.assert_allclose(logits(other), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rsLoRA"])
def test_pissa_is_saved_as_a_plain_adapter_of_twice_the_rank_on_the_unchanged_base(base, tmp_path, rslora, dora):
    model, other = as_float64(base()), as_float64(base())
    settings = {"use_rslora": rslora, "use_dora": dora, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 5}}
    shaken(adapted(model, init_lora_weights="pissa", r=3, **settings))
    folder = save_adapter(model, tmp_path / "a")
    record = record_of(folder)
    assert (record["r"], record["rank_pattern"], record["init_lora_weights"]) == (6, {"up_proj": 4}, True)
    load_adapter(other, folder)
    np.testing.assert_allclose(logits(other), logits(model), rtol=1e-9, atol=1e-11)
    for path, module in lora_modules(model).items():
        scale = lora_modules(other)[path].adapters["default"].scale
        assert scale == pytest.approx(module.adapters["default"].scale, rel=1e-15)
    assert np.abs(logits(model) - logits(base())).max() > 1e-3


def test_pissa_of_the_full_rank_comes_back_from_its_files_though_twice_the_rank_is_more(base, tmp_path):
    model = shaken(adapted(base(), init_lora_weights="pissa", r=16))  # all that k_proj and v_proj have
    files = save_adapter(model, tmp_path / "a"), save_gguf_adapter(model, tmp_path / "a.gguf")
    for file in files:
        load_adapter(other := base(), file)
        np.testing.assert_allclose(logits(other), logits(model), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="r=17 is too large for .*k_proj"):
        adapted(base(), r=17)


# -- overwriting -------------------------------------------------------------------------------------------------------


def test_another_adapter_is_replaced_only_with_overwrite(base, tmp_path):
    model = adapted(adapted(base(), name="legal"), name="support", r=2)
    folder = save_adapter(model, tmp_path / "a", name="legal")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for place in (folder, folder / ".." / "a", os.path.relpath(folder)):
        with pytest.raises(ValueError, match="already holds an adapter: choose another folder, or overwrite=True"):
            save_adapter(model, place, name="support")
    with pytest.raises(ValueError, match="is a file: choose a folder"):
        save_adapter(model, folder / WEIGHTS, name="support", overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    other = save_adapter(model, tmp_path / "b", name="support")
    for file in (CONFIG, WEIGHTS):
        (tmp_path / f"half/{file}").mkdir(parents=True)
        (tmp_path / f"half/{file}" / file).write_bytes(before[file])
    half = [("legal", path) for path in (tmp_path / "half").iterdir()]  # copies that are not whole
    for name, place in (("legal", other), ("support", folder), *half):  # also for one that is saved elsewhere
        with pytest.raises(ValueError, match="already holds an adapter"):
            save_adapter(model, place, name=name)
    save_adapter(model, folder, name="support", overwrite=True)
    assert record_of(folder)["r"] == 2


def test_an_adapter_is_saved_again_where_it_was_saved_or_loaded_from(base, tmp_path, monkeypatch):
    model = adapted(base())
    folder = save_adapter(model, tmp_path / "a")
    other = base()
    load_adapter(other, folder)
    for again in (model, other):
        next(iter(adapter_state(again, "default").values()))[...] = 7
        save_adapter(again, folder)
        assert any((array == 7).all() for array in read_tensors(folder / WEIGHTS).values())
    import minilora as ml

    ml.audit(model, "default")  # saves it to a temporary folder
    save_adapter(model, folder)
    (folder / WEIGHTS).unlink()
    (folder / CONFIG).unlink()
    save_adapter(adapted(base()), folder)  # a folder with other files is not an adapter
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        save_adapter(model, "relative")


# -- PEFT's format -----------------------------------------------------------------------------------------------------


def test_trainable_parameters_that_no_adapter_has_are_said_not_to_be_saved_and_how_they_come_back(
    base, tmp_path, caplog
):
    model, other = adapted(adapted(base(), name="legal"), name="support"), base()
    save_adapter(model, tmp_path / "legal", name="legal")
    assert not caplog.messages
    model.score = Linear(3, 2, rng=np.random.default_rng(0))
    model.model.norm.weight.requires_grad = True
    losses_of(model, AdamW(model.trainable_parameters(), lr=0.1), 1)
    folder, own = tmp_path / "support", ("model.norm.weight", "score.weight")
    save_adapter(model, folder, name="support")
    assert caplog.messages == [
        f"{folder} holds the adapter alone, and not {own[0]} (trainable parameters of no adapter: 2): save these with "
        "np.savez, and set them before load_adapter"
    ]
    np.savez(tmp_path / "own.npz", **{name: model.state_dict()[name] for name in own})
    other.score = Linear(3, 2, rng=None)
    other.load_state_dict(other.state_dict() | dict(np.load(tmp_path / "own.npz")))
    load_adapter(other, folder)
    assert logits(other).tobytes() == logits(model).tobytes()


def test_the_weights_file_has_pefts_names_shapes_and_metadata(base, tmp_path):
    folder = save_adapter(adapted(base(), r=3), tmp_path / "a")
    matrices = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
                "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32),
                "mlp.down_proj": (32, 48)}  # fmt: skip
    expected = {}
    for layer in range(2):
        for kind, (m, n) in matrices.items():
            expected[f"base_model.model.model.layers.{layer}.{kind}.lora_A.weight"] = (3, n)
            expected[f"base_model.model.model.layers.{layer}.{kind}.lora_B.weight"] = (m, 3)
    assert {name: w.shape for name, w in read_tensors(folder / WEIGHTS).items()} == expected
    content = (folder / WEIGHTS).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"] for entry in header.values()} == {"F32"}


def test_pefts_name_for_each_part():
    names = {"lora_B": "lora_B.weight"}
    for part, name in (names | {"lora_magnitude_vector": "lora_magnitude_vector"}).items():
        assert peft_name(f"model.layers.0.x.{part}") == f"base_model.model.model.layers.0.x.{name}"


def test_the_config_is_pefts_record(base, tmp_path):
    model = adapted(base(), r=4, lora_alpha=16, use_rslora=True, rank_pattern={"up_proj": 2})
    record = record_of(save_adapter(model, tmp_path / "a", base_model="someone/model"))
    expected = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "someone/model",
        "inference_mode": True, "r": 4, "lora_alpha": 16, "use_rslora": True, "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {}, "bias": "none", "lora_dropout": 0.0, "use_dora": False, "init_lora_weights": False,
        "exclude_modules": None, "layers_to_transform": None,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    }  # fmt: skip
    assert record == expected, "PEFT computes without a key that it does not know: such a field is one of OURS"


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ({"target_modules": "q_proj", "exclude_modules": "v_proj"}, ["q_proj"]),  # PEFT takes a text for a pattern
        ({"target_modules": r".*\.q_proj"}, r".*\.q_proj"),
        ({"target_modules": r".*\.q_proj", "layers_to_transform": 1}, ["model.layers.1.self_attn.q_proj"]),
        ({"exclude_modules": ["down_proj", "mlp.gate_proj"]}, ["k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
    ],
    ids=str,
)
def test_target_modules_are_written_so_that_peft_selects_the_same(base, tmp_path, settings, written):
    model = adapted(base(), name="other", target_modules=["o_proj"])
    record = record_of(save_adapter(adapted(model, **settings), tmp_path))
    assert record["target_modules"] == written and not isinstance(record["exclude_modules"], str)


OVERLAPPING = [
    {"alpha_pattern": {"q_proj": 64.0, r"layers\.0\..*": 1.0}},
    {"rank_pattern": {"q_proj": 2, r"layers\.0\..*": 3}, "alpha_pattern": {r"layers\.0\..*": 3, "up_proj": 7}},
    {"rank_pattern": {"q_proj": 2, r"layers\.0\..*": 3}, "init_lora_weights": "pissa"},
]


@pytest.mark.parametrize("settings", OVERLAPPING, ids=str)
def test_patterns_that_match_the_same_module_mean_the_same_in_a_file_that_sorts_them(base, tmp_path, settings):
    model, other = adapted(base(), **settings), base()
    load_adapter(other, save_adapter(model, tmp_path))
    np.testing.assert_allclose(logits(other), logits(model), rtol=1e-5, atol=1e-6)


def test_patterns_that_are_in_order_are_written_as_they_are(base, tmp_path):
    ordered = {"alpha_pattern": {r"layers\.0\..*": 1.0, "q_proj": 64.0}}
    assert record_of(save_adapter(adapted(base(), **ordered), tmp_path))["alpha_pattern"] == ordered["alpha_pattern"]


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_that_may_take_for_ever_is_refused_and_others_are_not(field, base, tmp_path):
    folder, whole = save_adapter(adapted(base()), tmp_path), field.endswith("modules")
    endless = (r"([\w.]+)+!", r"(\w|\d)*!", r"(?:\w+){9,}!", ".*" * 251)
    for pattern in (r".*(q|k|v|o|gate|up|down)_pr?o+j{1}", *endless):
        change = {"target_modules": ".*_proj", field: pattern if whole else {pattern: 4}}
        if field == "exclude_modules":
            change[field] += "_no"
        if pattern in endless:
            refused_with(base(), folder, change, "is too long or repeats a group: write names of modules instead")
        else:
            rewrite(folder, change)
            load_adapter(base(), folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_saved(base, tmp_path, value):
    model = adapted(base())
    next(iter(model.trainable_parameters().values())).data[0, 0] = value
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight of adapter 'default' holds NaN or infinity: nothing"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", ["rank", "scale"])
def test_an_adapter_of_another_rank_or_scale_than_its_config_is_saved_only_as_a_new_one(base, tmp_path, change):
    """A file with one of them could not be read, and one with the other would hold another update."""
    model, other = adapted(base()), base()
    weights = lora_modules(model)["model.layers.1.mlp.up_proj"].adapters["default"]
    if change == "rank":
        weights.lora_A.data, weights.lora_B.data = weights.lora_A.data[1:], weights.lora_B.data[:, 1:]
    else:
        weights.scale *= 3
    words = (
        rf"1.mlp.up_proj of adapter 'default' has rank {weights.rank} and scale {weights.scale:g}, .* config says rank"
    )
    with pytest.raises(ValueError, match=words):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    expected = logits(model)
    combine_adapters(model, ["default"], [1.0], name="saved")
    load_adapter(other, save_adapter(model, tmp_path / "new", "saved"))
    np.testing.assert_allclose(logits(other), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
def test_adapters_in_other_float_types_are_read_as_the_models_own(base, folder, dtype):
    stored = read_tensors(folder / WEIGHTS)
    large = {name: np.full_like(w, 4096) if "layers.1" in name else w for name, w in stored.items()}  # overflows
    write_safetensors(folder / WEIGHTS, {name: as_dtype(w, dtype) for name, w in large.items()})
    expected = read_tensors(folder / WEIGHTS)
    model = base()
    load_adapter(model, folder)
    for name, w in adapter_state(model, "default").items():
        assert w.dtype == np.float32
        np.testing.assert_array_equal(w, expected[f"base_model.model.{name}.weight"].astype(np.float32))


# -- options -----------------------------------------------------------------------------------------------------------

# Keys that PEFT 0.21 writes, with a value under which they change what is computed.
REFUSED = {
    "alora_invocation_tokens": [1, 2], "arrow_config": {"top_k": 3}, "bias": "lora_only", "corda_config": {"x": 1},
    "ensure_weight_tying": True, "kasa_config": {"x": 1},
    "layer_replication": [[0, 2]], "loftq_config": {"loftq_bits": 4}, "lora_bias": True,
    "lora_ga_config": {"x": 1}, "megatron_config": {"x": 1}, "modules_to_save": ["lm_head"],
    "monteclora_config": {"x": 1}, "target_parameters": ["experts"],
    "trainable_token_indices": [5], "use_bdlora": True, "use_qalora": True, "velora_config": {"x": 1},
    "an_option_of_tomorrow": {"x": 1},
}  # fmt: skip
ACCEPTED = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "base_model_name_or_path": "someone/model",
    "megatron_core": "megatron.core", "peft_version": "0.21.2", "revision": "main", "runtime_config": {"x": 1},
    "task_type": "SEQ_2_SEQ_LM", "init_lora_weights": "eva", "eva_config": {"rho": 2}, "layers_pattern": ["layers"],
    "loftq_config": {}, "qalora_group_size": 32, "an_option_of_tomorrow": None, "a_second": False, "a_third": [],
    "bias": "none",
}  # fmt: skip
INVALID = {
    "peft_type": ["IA3", None], "r": [0, "8", None], "lora_alpha": [None, 0, "16"], "use_rslora": ["false"],
    "target_modules": [None, [], 5], "exclude_modules": [5], "layers_to_transform": ["1"],
    "rank_pattern": [["q_proj"], {"q_proj": 0}], "alpha_pattern": [3], "base_model_name_or_path": [3],
    "init_lora_weights": ["pissa_niter_16", "olora"],
}  # fmt: skip


def test_every_option_that_minilora_does_not_support_is_refused_with_the_reason(base, folder):
    model, before = base(), record_of(folder)
    assert UNSUPPORTED.keys() == REFUSED.keys() - {"an_option_of_tomorrow"}
    for key, value in REFUSED.items():
        rewrite(folder, before)
        advice = [] if key == "ensure_weight_tying" else ["if PEFT can merge it (merge_and_unload)"]
        refused_with(model, folder, {key: value}, f"minilora does not support {key} = ", *advice)
        (folder / CONFIG).write_text(json.dumps(before))
    rewrite(folder, {"ensure_weight_tying": True})  # PEFT merges that update twice into the shared matrix
    with pytest.raises(ModelFileError) as caught:
        load_adapter(model, folder)
    assert "merge" not in str(caught.value)
    (folder / CONFIG).write_text(json.dumps(before))
    for change in ({"peft_type": "IA3"}, {"init_lora_weights": "olora"}):
        refused_with(model, folder, change, "if PEFT can merge it (merge_and_unload)")
        (folder / CONFIG).write_text(json.dumps(before))


def test_every_invalid_value_is_refused_by_name(base, folder):
    model, before = base(), record_of(folder)
    for key, values in INVALID.items():
        for value in values:
            refused_with(model, folder, {key: value}, key.removeprefix("lora_"))
            (folder / CONFIG).write_text(json.dumps(before))
    for change in ({"r": 10**12}, {"rank_pattern": {"q_proj": 10**12}}):  # whose A would fill the memory
        refused_with(model, folder, change, "rank of 1,000,000,000,000, but no tensor of")
        (folder / CONFIG).write_text(json.dumps(before))
    refused_with(model, folder, {"target_modules": "(q"}, "regular expression")
    for key in ("r", "lora_alpha", "target_modules", "peft_type"):
        (folder / CONFIG).write_text(json.dumps({name: value for name, value in before.items() if name != key}))
        refused(model, folder, CONFIG, key)


def test_every_other_option_changes_nothing_and_is_written_again(base, folder, tmp_path):
    model, other = base(), base()
    load_adapter(model, folder)
    rewrite(folder, ACCEPTED)
    load_adapter(other, folder, name="loaded")
    assert logits(other).tobytes() == logits(model).tobytes()
    again = record_of(save_adapter(other, tmp_path / "again", name="loaded"))
    assert {key: again[key] for key in ACCEPTED} == ACCEPTED
    targets = record_of(folder)["target_modules"]
    for change in ({"layers_to_transform": []}, {"target_modules": ["c_attn", *targets]}):  # for PEFT, nothing new
        rewrite(folder, change)
        load_adapter(other, folder, name=str(change))
        assert logits(other).tobytes() == logits(model).tobytes()
    named = record_of(save_adapter(other, tmp_path / "named", name="loaded", base_model="x/y"))
    assert named["base_model_name_or_path"] == "x/y"
    remove_adapter(other, "loaded")  # what a file said does not carry over to another adapter
    record = record_of(save_adapter(adapted(other, name="loaded"), tmp_path / "other", name="loaded"))
    assert record["base_model_name_or_path"] is None and "revision" not in record


# -- minilora.json -----------------------------------------------------------------------------------------------------


def trained(model, steps):
    return losses_of(model, AdamW(model.trainable_parameters(), lr=0.01), steps)


def test_dropout_continues_with_the_masks_that_would_have_come_next(base, tmp_path):
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


def test_the_file_says_seed_and_draws_of_each_module_and_nothing_of_an_adapter_that_was_there_before(base, tmp_path):
    model = adapted(base(), lora_dropout=0.5, target_modules=["q_proj"])
    model.loss(IDS, IDS).backward()
    written = provenance_of(save_adapter(model, tmp_path / "a", data={"name": "legal"}))
    assert written.keys() == {"format", "base", "data", "dropout"}
    assert written["dropout"] == {
        path: {"seed": module.adapters["default"].dropout.seed, "draws": {"0": 1}}
        for path, module in lora_modules(model).items()
    }
    again = provenance_of(save_adapter(adapted(base()), tmp_path / "a", overwrite=True))
    assert again.keys() == {"format", "base"}


@pytest.mark.parametrize("record", [{}, {"base_sha256": "0"}, {"dropout": {}}, {"dropout": {"absent": 1}}], ids=str)
def test_entries_that_say_nothing_of_dropout_are_ignored(base, tmp_path, record):
    folder = save_adapter(adapted(base(), lora_dropout=0.5), tmp_path)
    (folder / NOTES).write_text(json.dumps(record))
    load_adapter(base(), folder)


STATES = [None, 3, [], {"seed": 1}, {"draws": {}}, *({"seed": seed, "draws": {}} for seed in (-1, 1.5, True))]
STATES += [{"seed": 1, "draws": draws} for draws in ([1], {"x": 1}, {"0": -1}, {"-1": 1}, {"0": "1"})]


def test_an_invalid_file_is_refused_by_entry(base, tmp_path):
    """Also a later format, an earlier one and one that is not a number."""
    folder, model = save_adapter(adapted(base(), lora_dropout=0.5), tmp_path), base()
    module = "model.layers.0.self_attn.q_proj"
    cases = [(json.dumps({"dropout": {module: state}}), f"dropout of {module} needs a seed") for state in STATES]
    cases += [(content, NOTES) for content in ("[]", "{", "null")]
    cases += [(json.dumps({"format": f}), f"format is {f!r}, this minilora reads 1") for f in (0, 2, "x", None, 1.5)]
    cases += [(json.dumps({key: [1]}), f"{key} is a list, expected an object") for key in ("base", "data", "dropout")]
    cases += [(json.dumps({"base": {key: 3}}), f"{key} of the base is a int, expected a text")
              for key in ("name", "path", "sha256", "rounded_to", "unrounded_sha256")]  # fmt: skip
    cases += [(json.dumps({"config": {"freeze_A": 1}}), "freeze_A of the config is a int, expected true or false")]
    cases += [(json.dumps({"base": {"shape": "x"}}), "shape of the base is a str, expected an object")]
    cases += [(json.dumps({"data": {key: 3}}), f"{key} of the data is a int, expected a text")
              for key in ("name", "path", "sha256", "system", "split")]  # fmt: skip
    for content, words in cases:
        (folder / NOTES).write_text(content)
        refused(model, folder, NOTES, words)


def test_an_entry_that_is_null_is_as_if_left_out(base, tmp_path):
    folder = save_adapter(adapted(base()), tmp_path)
    (folder / NOTES).write_text(json.dumps({part: dict.fromkeys(keys) for part, keys in _ENTRIES.items()}))
    assert read_provenance(folder) == {part: {} for part in _ENTRIES}
    load_adapter(base(), folder)


def test_a_file_of_peft_in_which_the_order_of_patterns_counts_is_named(base, folder, caplog):
    """PEFT sorts them on saving; what its own reading gives is then another model than was trained."""
    (folder / NOTES).unlink()
    for patterns, told in (
        ({"q_proj": 3, "v_proj": 5}, False),
        ({"q_proj": 3, r"layers\.0\..*q_proj": 3}, False),  # both say the same
        ({"up_proj": 3, r".*up_proj": 5}, False),  # of a module without an adapter
        ({"q_proj": 3, r"layers\.0\..*q_proj": 5}, True),
        ({".*proj": 3, "q_proj": 3, "self_attn.q_proj": 5}, True),
    ):
        rewrite(folder, {"alpha_pattern": patterns})
        caplog.clear()
        load_adapter(base(), folder)
        lines = [line for line in caplog.messages if "matches no module" not in line]
        assert [("several keys of alpha_pattern" in line) for line in lines] == [True] * told
    rewrite(folder, {"rank_pattern": {"q_proj": 4, ".*q_proj": 5}, "alpha_pattern": {}})
    caplog.clear()
    load_adapter(base(), folder)
    assert "several keys of rank_pattern match one module" in caplog.text
    patterns = {"q_proj": 3, "self_attn.q_proj": 5}
    save_adapter(other := adapted(base(), alpha_pattern=patterns), folder, overwrite=True)
    caplog.clear()
    load_adapter(base(), folder)  # minilora's own file means what was trained
    assert not caplog.messages and other.adapters["default"].config.alpha_pattern == patterns
