"""The table of families: names of tensors, what Llama's switches compute, and what is refused."""

import json
import re
from contextlib import suppress
from dataclasses import replace

import gguf
import numpy as np
import pytest
from peftfiles import adapted
from smallmodels import IDS, IN_A_LAYER, SWITCHES, in_float64, logits

from minilora.engine.backend import dense, is_packed
from minilora.lora.adapters import merge_adapter
from minilora.models.gguf import kind_of
from minilora.models.rounded import load_rounded
from minilora.nn.families import (
    ARCHITECTURES,
    FAMILIES,
    ROPE_DIVISORS,
    as_llama_cpp_has_it,
    config_from_gguf,
    config_from_json,
    config_to_gguf,
    config_to_json,
)
from minilora.nn.gemma3 import FULL, SLIDING
from minilora.nn.gpt2 import GPT2, GPT2Config
from minilora.nn.llama import Config, Llama
from minilora.nn.rope import RopeScaling
from minilora.nn.step import loss_and_grad

LLAMA = FAMILIES["llama"]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_tensor_has_llama_cpps_name_there_and_its_own_again_here(family):
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf)
    theirs = gguf.get_tensor_name_map(architecture, 13)
    for own in family.tensors.values():
        name = f"{own.format(12)}.weight"
        assert family.hugging_face_name(family.llama_cpp_name(name)) == name
        assert family.llama_cpp_name(name) == theirs.get_name(name, (".weight",))


def test_an_unknown_name_stays_as_it_is_and_is_never_written():
    for name in ("blk.0.attn_q_norm.weight", "rope_freqs.weight", "blk.attn_q.weight", "blk.1.2.attn_q.weight", "x"):
        assert LLAMA.hugging_face_name(name) == name
    with pytest.raises(KeyError):
        LLAMA.llama_cpp_name("model.layers.0.self_attn.q_norm.weight")
    assert LLAMA.hugging_face_name("blk.12.attn_q.bias") == "model.layers.12.self_attn.q_proj.bias"


# -- the switches of Llama's config ------------------------------------------------------------------------------------

PLAIN = Config(64, 32, 48, 2, 4, 2, max_position_embeddings=32)
every_switch = pytest.mark.parametrize("family", SWITCHES)


def made(family, **changes):
    """A model with large random weights and biases, in float64."""
    config = replace(PLAIN, model_type=family, **SWITCHES[family] | changes)
    model, rng = in_float64(Llama(config, 0), gain=10), np.random.default_rng(1)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data = rng.standard_normal(p.shape)
    return model


def test_every_llama_has_a_row():
    llamas = {name for name, family in FAMILIES.items() if family.model is Llama}
    assert llamas == set(SWITCHES), "SWITCHES of tests/smallmodels.py has the families that are a Llama with a switch"


@every_switch
def test_a_block_has_the_parameters_that_transformers_has(family):
    more = {"qwen2": {f"self_attn.{x}_proj.bias" for x in "qkv"}, "qwen3": {f"self_attn.{x}_norm.weight" for x in "qk"}}
    names = {f"{name}.weight" for name in IN_A_LAYER} | more.get(family, set())
    assert {name for name, _ in made(family).model.layers[1].named_parameters()} == names


@every_switch
def test_each_switch_changes_the_result(family):
    model = made(family)
    for name, value in SWITCHES[family].items():
        other, state = Llama(replace(model.config, **{name: getattr(PLAIN, name)})), model.state_dict()
        if any(key not in state or state[key].shape != w.shape for key, w in other.state_dict().items()):
            continue  # the switch adds or reshapes matrices
        other.load_state_dict({key: state[key] for key in other.state_dict()})
        assert np.abs(logits(other) - logits(model)).max() > 1e-2, (name, value)


def test_granites_multipliers_are_a_llama_with_scaled_matrices():
    model = made("granite", tie_word_embeddings=False)
    by, state = model.config, dict(model.state_dict())
    factors = {"embed_tokens": by.embedding_multiplier, "q_proj": by.attention_multiplier * by.head_dim**0.5,
               "o_proj": by.residual_multiplier, "down_proj": by.residual_multiplier,
               "lm_head": 1 / by.logits_scaling}  # fmt: skip
    for name, w in state.items():
        state[name] = w * factors.get(name.split(".")[-2], 1)
    plain = Llama.empty(replace(PLAIN, tie_word_embeddings=False))
    plain.load_state_dict(state)
    np.testing.assert_allclose(logits(model), logits(plain), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["Q8_0", "NF4"])
@every_switch
def test_a_quantised_base_computes_with_its_rounded_matrices_and_its_own_biases(family, kind, rng):
    config = replace(
        PLAIN, model_type=family, hidden_size=64, intermediate_size=64, **SWITCHES[family] | {"head_dim": 16}
    )
    state = {name: w.astype(np.float32) for name, w in in_float64(Llama(config, 0), gain=10).state_dict().items()}
    packed = load_rounded(config, state, state.__getitem__, kind)
    dense_one = Llama.empty(config)
    dense_one.load_state_dict({name: dense(w) for name, w in packed.state_dict().items()})
    for name, w in packed.state_dict().items():
        assert is_packed(w) == (w.ndim == 2)
        assert w.ndim == 2 or np.array_equal(w, state[name])
    np.testing.assert_allclose(logits(packed), logits(dense_one), rtol=1e-3, atol=1e-3)
    tuned = adapted(packed, target_modules="all-linear")
    assert np.isfinite(loss_and_grad(tuned, IDS, IDS).item())
    before = logits(tuned)
    merge_adapter(tuned)
    np.testing.assert_allclose(logits(tuned), before, rtol=1e-3, atol=1e-3)


# -- config.json and metadata ------------------------------------------------------------------------------------------


@every_switch
def test_a_config_comes_back_from_both_formats(family):
    config = made(family, **({"no_rope_layer_interval": 4} if family == "smollm3" else {})).config
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config
    metadata, tensors = config_to_gguf(config)
    shapes = {"token_embd.weight": (64, 32)}
    again = config_from_gguf(metadata, shapes, tensors.get(ROPE_DIVISORS))
    if family == "mistral":  # llama.cpp has no window: its context ends where the window would hide something
        assert again == replace(config, model_type="llama", sliding_window=None, max_position_embeddings=4)
    else:
        assert again == config


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_no_value_of_a_field_is_lost_in_a_file(family):
    """Each field with another value comes back from both formats, or the model is refused as none of llama.cpp's."""
    models = {"gpt2": GPT2Config(64, 12, 2, 2), "gemma3_text": config_from_json(GEMMA | {"num_hidden_layers": 6})}
    config = models.get(family.model_type) or made(family.model_type).config
    others = {bool: lambda switch: not switch, type(None): lambda none: 4, RopeScaling: lambda scaling: None}
    tried = set()
    for name, value in ((each.name, getattr(config, each.name)) for each in family.fields):
        other = others.get(type(value), lambda number: 2 * (number or 1))
        try:
            changed = replace(config, **{name: other(value)})
        except (TypeError, ValueError):  # a size that does not go with the others
            continue
        tried.add(name)
        assert config_from_json(json.loads(json.dumps(config_to_json(changed)))) == changed, name
        if ARCHITECTURES[family.gguf] is not family:  # its files come back as another family's
            continue
        try:
            metadata, tensors = config_to_gguf(changed)
        except ValueError as error:
            assert "llama.cpp" in str(error)
            continue
        head = {} if changed.tie_word_embeddings else {"output.weight": ()}
        shapes = {"token_embd.weight": (changed.vocab_size, changed.hidden_size)} | head
        assert config_from_gguf(metadata, shapes, tensors.get(ROPE_DIVISORS)) == changed, name
    assert len(tried) > 6


@pytest.mark.parametrize("family", [*SWITCHES, "my-own"])
def test_a_config_that_the_files_of_its_family_would_change_is_refused_and_those_that_have_it_are_named(family):
    always = FAMILIES[family].always if family in FAMILIES else {}
    for switches in ({}, *SWITCHES.values(), {"sliding_window": 4, "logits_scaling": 2.0}):
        with suppress(ValueError):  # fields that do not go together
            config = replace(PLAIN, model_type=family, **{"attention_multiplier": 0.3, **always, **switches})
        for changed in (config, replace(config, attention_multiplier=0.0)):
            try:
                able, record = [family], config_to_json(changed)
            except ValueError as error:
                able = str(error).partition("the model_type ")[2].split(" or ")
                for write in (config_to_gguf, lambda config: as_llama_cpp_has_it(config, {})):
                    with pytest.raises(ValueError, match=re.escape(str(error))):
                        write(changed)
                assert family not in able and (able == [""]) == ("no family has all" in str(error))
            for name in filter(None, able):
                record = config_to_json(changed := replace(changed, model_type=name))
                again = config_from_json(json.loads(json.dumps(record)))
                scale = again.attention_multiplier if not changed.attention_multiplier else 0.3  # 0: of the width
                assert again == replace(changed, attention_multiplier=scale)


def test_llama_3s_files_from_elsewhere_say_only_the_divisors():
    config = replace(PLAIN, head_dim=64, rope_theta=500000.0, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192))
    metadata, tensors = config_to_gguf(config)
    metadata.pop("minilora.rope_scaling")
    shapes, divisors = {"token_embd.weight": (64, 32)}, tensors[ROPE_DIVISORS]
    assert config_from_gguf(metadata, shapes, divisors) == config
    assert divisors.min() == 1 and divisors.max() == 32 and len(set(divisors.tolist())) == 5
    with pytest.raises(ValueError, match="not Llama 3's scaling"):
        config_from_gguf(metadata, shapes, np.linspace(1, 8, 32, dtype=np.float32))


def test_rotary_pairs_are_adjacent_where_llama_cpp_rotates_neighbours():
    """Its llama_model_rope_type: NORM for these, NEOX (halves) for Qwen2 and Qwen3."""
    permuted = {name for name in SWITCHES if FAMILIES[name].permuted}
    assert permuted == {"llama", "mistral", "granite", "smollm3"}


def test_smollm3_rotates_in_its_first_layer():
    one, rotated = (made("smollm3", num_hidden_layers=1, **all_of) for all_of in ({}, {"no_rope_layer_interval": 0}))
    np.testing.assert_array_equal(logits(one), logits(rotated))


def test_smollm3_with_another_interval_is_no_gguf_file():
    with pytest.raises(ValueError, match="no_rope_layer_interval of 4, this model has 2: write a folder"):
        config_to_gguf(made("smollm3").config)


NO_SCALING = {"rope_type": "llama3", "factor": 0, "low_freq_factor": 1, "high_freq_factor": 4,
              "original_max_position_embeddings": 8}  # fmt: skip
REFUSED = [
    ({"model_type": "falcon"}, "'falcon', minilora reads gemma3_text, gpt2, granite, llama, "),
    ({"model_type": "gpt_neox"}, "minilora reads"),
    ({"rope_scaling": NO_SCALING}, "factor must be a positive number, got 0"),
    ({"quantization_config": {"quant_method": "gptq"}}, "give such a file, or the original model, with --quantized"),
    ({"use_rope": False}, "does not know the field use_rope (here False)"),
    ({"attention_bias": True}, "attention_bias: True, only False"),
    ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
    ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
    ({"model_type": "mistral", "layer_types": ["full_attention"]}, "layer_types"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be a positive integer"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 0, 0, 1]}, "no_rope_layers"),
    ({"model_type": "granite", "residual_multiplier": 0}, "residual_multiplier must be a positive number"),
    ({"model_type": "granite", "attention_multiplier": "x"}, "attention_multiplier"),
    ({"model_type": "granitemoehybrid"}, "minilora reads"),
    ({"model_type": "olmo2"}, "minilora reads"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_would_change_the_result_is_refused(change, message):
    family = change.get("model_type", "llama")
    known = {"model_type": family, **FAMILIES[family].always} if family in FAMILIES else {}
    record = config_to_json(replace(PLAIN, **known))
    with pytest.raises(ValueError) as caught:
        config_from_json(record | change)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_multiplier_that_granite_does_not_give_is_one_as_in_transformers():
    said = config_to_json(made("granite").config)
    config = config_from_json({key: value for key, value in said.items() if key not in SWITCHES["granite"]})
    assert all(getattr(config, name) == 1 for name in SWITCHES["granite"])


PUBLISHED = {  # what the hub's config.json files hold besides shapes
    "llama": {"_name_or_path": "x", "attention_dropout": 0.0, "is_llama_config": True, "pretraining_tp": 1,
              "rope_interleaved": False, "rope_scaling": None, "transformers.js_config": {}, "use_cache": True,
              "quantization_config": None},
    "qwen2": {"max_window_layers": 21, "sliding_window": 32768, "use_sliding_window": False, "torch_dtype": "bfloat16",
              "use_mrope": False, "_attn_implementation_autoset": True},
    "qwen3": {"max_window_layers": 28, "sliding_window": None, "rope_scaling": None, "attention_bias": False},
    "mistral": {"sliding_window": 4096, "transformers_version": "4.34.0.dev0"},
    "granite": {"attention_dropout": 0.1, "mlp_bias": False, "rope_scaling": None},
    "smollm3": {"max_window_layers": 28, "no_rope_layers": [1, 1, 1, 0, 1], "pretraining_tp": 2},
    "gpt2": {"_num_labels": 1, "gradient_checkpointing": False, "id2label": {"0": "LABEL_0"}, "n_special": 0,
             "label2id": {"LABEL_0": 0}, "output_past": True, "predict_special_tokens": True},
}  # fmt: skip


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_fields_of_published_models_are_known(family):
    said = {
        "llama": {"rope_scaling": None},
        "smollm3": {"no_rope_layer_interval": 4},
        "mistral": {"sliding_window": 4096},
    }
    llama = replace(PLAIN, model_type=family, **SWITCHES.get(family, {}) | said.get(family, {}))
    config = GPT2Config(64, 32, 2, 4) if family == "gpt2" else llama
    assert config_from_json(config_to_json(config) | PUBLISHED[family]) == config


def test_unknown_metadata_and_heads_of_two_widths_are_refused():
    metadata, _ = config_to_gguf(PLAIN)
    shapes = {"token_embd.weight": (64, 32)}
    assert config_from_gguf(metadata | {"general.name": "x", "llama.rope.scaling.type": "none"}, shapes) == PLAIN
    unknown = {"expert_count": 8, "rope.scaling.type": "yarn", "attn_softcapping": 30.0, "rope.dimension_count": 4,
               "attention.value_length": 4}  # fmt: skip
    for key, value in unknown.items():
        with pytest.raises(ValueError, match=key.replace(".", r"\.")) as caught:
            config_from_gguf(metadata | {f"llama.{key}": value}, shapes)
        assert "block_count" not in str(caught.value)  # what is wrong is named, and nothing else
    granite, _ = config_to_gguf(replace(PLAIN, model_type="granite"))
    assert ARCHITECTURES["granite"].model_type == "granite" and ARCHITECTURES["llama"].model_type == "llama"
    with pytest.raises(ValueError, match="finetuned"):  # Granite's way to say that nothing is rotated
        config_from_gguf(granite | {"granite.rope.scaling.finetuned": False}, shapes)


@pytest.mark.parametrize("bare", [False, True], ids=["whole names", "names of old checkpoints"])
def test_a_checkpoint_of_gpt2_is_transposed_there_and_back_without_its_buffers(bare):
    model = GPT2(GPT2Config(11, 6, 1, 2, 5, 8, tie_word_embeddings=False))
    family, own = FAMILIES["gpt2"], model.state_dict()
    stored = family.to_hugging_face(own)
    assert stored["transformer.h.0.attn.c_attn.weight"].shape == (6, 18)
    assert stored["transformer.h.0.mlp.c_proj.weight"].shape == (5, 6)
    assert stored["transformer.wpe.weight"].shape == (8, 6)
    stored |= {"transformer.h.0.attn.bias": np.ones((1, 1, 8, 8)), "transformer.h.0.attn.masked_bias": np.ones(())}
    if bare:
        stored = {name.removeprefix("transformer."): w for name, w in stored.items()}
    again = family.from_hugging_face(stored)
    assert again.keys() == own.keys()
    assert all(np.array_equal(w, own[name]) for name, w in again.items())


def test_a_gguf_of_gemma_without_the_base_of_its_rotations_is_refused():
    metadata, _ = config_to_gguf(config_from_json(GEMMA))
    del metadata["gemma3.rope.freq_base"]  # llama.cpp takes 10,000, and transformers 1,000,000
    with pytest.raises(ValueError, match="gemma3.rope.freq_base is missing"):
        config_from_gguf(metadata, {"token_embd.weight": (64, 32)})


def test_gemmas_norms_are_stored_with_one_added_and_come_back():
    family, config, w = FAMILIES["gemma3_text"], config_from_json(GEMMA), np.array([0.25, -0.5], np.float32)
    stored = family.to_llama_cpp("model.layers.0.self_attn.q_norm.weight", w, config)
    np.testing.assert_array_equal(stored, [1.25, 0.5])
    np.testing.assert_array_equal(family.from_llama_cpp("model.layers.0.self_attn.q_norm.weight", stored, config), w)
    assert family.to_llama_cpp("model.layers.0.self_attn.q_proj.weight", w, config) is w
    fine = {"model.norm.weight": np.array([1e-9, 0.3], np.float32)}  # 1 + 1e-9 is 1 in float32
    rounded = as_llama_cpp_has_it(config, fine)["model.norm.weight"]
    np.testing.assert_array_equal(rounded, [0, np.float32(1.3) - np.float32(1)])


@pytest.mark.parametrize("kind", ["Q4_1", "NF4"])
def test_tables_keep_eight_bits_in_every_family(kind):
    model = GPT2(GPT2Config(11, 64, 1, 2, 64, 8))
    state = model.state_dict()
    if kind == "NF4":
        small = load_rounded(model.config, state, state.__getitem__, kind).state_dict()
        kinds = {name: w.kind for name, w in small.items() if w.ndim == 2}
    else:
        kinds = {name: kind_of(w, kind, name) for name, w in state.items() if w.ndim == 2}
    assert {name for name, own in kinds.items() if own == "Q8_0"} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    assert len(kinds) == 6


GEMMA = {"model_type": "gemma3_text", "vocab_size": 11, "hidden_size": 6, "intermediate_size": 5,
         "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip


def test_the_forms_of_gemmas_config_say_the_same():
    old = GEMMA | {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "sliding_window_pattern": 2}
    rope = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in ((FULL, 5e5), (SLIDING, 2e4))}
    new = GEMMA | {"rope_parameters": rope, "layer_types": [SLIDING, FULL] * 2}
    assert config_from_json(old) == config_from_json(new) == config_from_json(config_to_json(config_from_json(new)))
    with pytest.raises(ValueError, match="scaled rotations of Gemma 3"):
        config_from_json(GEMMA | {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 8.0}}})
    with pytest.raises(ValueError, match="rope_scaling"):
        config_from_json(GEMMA | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})


def test_a_scale_that_follows_from_the_width_of_heads_is_stored_as_transformers_reads_it():
    granite = config_to_json(replace(PLAIN, model_type="granite", head_dim=16))
    assert granite["attention_multiplier"] == 0.25  # 0 would be 0 there
    gemma = config_from_json(GEMMA | {"num_hidden_layers": 6, "head_dim": 10, "query_pre_attn_scalar": 10})
    from_gguf = config_from_gguf(config_to_gguf(gemma)[0], {"token_embd.weight": (11, 6)})
    for config in (config_from_json(GEMMA), from_gguf):  # a float is refused there
        stored = config_to_json(config)["query_pre_attn_scalar"]
        assert (type(stored), stored) == (int, config.head_dim)


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": 10**9}, {"num_hidden_layers": "4"}, {"num_hidden_layers": None}, {"layer_types": 5},
     {"sliding_window_pattern": 0}, {"sliding_window_pattern": [6]}, {"rope_parameters": 5},
     {"rope_parameters": {FULL: 5}}, {"model_type": "smollm3", "no_rope_layers": "0101"},
     {"model_type": "smollm3", "no_rope_layers": 5}], ids=str,
)  # fmt: skip
def test_values_of_another_type_and_absurd_numbers_are_refused_at_once(change):
    with pytest.raises(ValueError):
        config_from_json(GEMMA | change)


def test_a_gemma_of_absurdly_many_layers_is_no_config():
    with pytest.raises(ValueError, match="no model has 1000000000 layers"):
        replace(config_from_json(GEMMA), num_hidden_layers=10**9, layer_types=())
