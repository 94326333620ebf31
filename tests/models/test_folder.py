"""Hugging Face folders: config.json with one or several safetensors files, and every way in which they can be wrong."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
from modelfiles import (
    CHATML,
    CONFIG,
    IDS,
    as_dtype,
    new_llama,
    new_tokenizer,
    write_folder,
    write_safetensors,
)
from smallmodels import logits

from minilora.files.disk import ModelFileError
from minilora.files.quant import quantize
from minilora.files.tensors import write_tensors
from minilora.measure.ledger import peak
from minilora.models.folder import FILES, load_folder, read_config, save_folder
from minilora.models.rounded import rounded_bytes
from minilora.models.tokenizer import from_folder
from minilora.nn.families import FAMILIES
from minilora.nn.gpt2 import GPT2, GPT2Config
from minilora.nn.llama import Llama
from minilora.nn.module import sha256_of

Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(rng):
    return Llama(CONFIG, rng)


def refused(folder, *words):
    """Load the folder and expect ModelFileError, in one line that names the folder and has the words."""
    with pytest.raises(ModelFileError) as caught:
        load_folder(folder)
    message = str(caught.value)
    assert message.count(str(folder)) == 1 and "\n" not in message
    assert not [word for word in words if word not in message], message


# -- what goes in comes out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_a_model_read_back_has_the_very_weights_that_were_stored(model, tmp_path, dtype, shards):
    loaded = load_folder(write_folder(tmp_path / "m", model, dtype, shards=shards))
    assert loaded.config == CONFIG
    for name, w in model.state_dict().items():
        if dtype == "F16":
            w = w.astype(np.float16).astype(np.float32)
        elif dtype == "BF16":
            w = (w.view(np.uint32) & 0xFFFF0000).view(np.float32)
        got = loaded.state_dict()[name]
        assert got.dtype == np.float32 and got.flags.writeable
        np.testing.assert_array_equal(got, w, err_msg=name)


def test_dtypes_may_be_mixed_in_one_file_which_goes_before_the_parts_of_an_index(model, tmp_path):
    """As in transformers: the index of an older model may have been left there, with its files or without."""
    folder = write_folder(tmp_path / "m", model)
    (folder / INDEX).write_text(json.dumps({"weight_map": {Q: "model-00001-of-00002.safetensors"}}))
    kinds = ["F32", "F16", "BF16"]
    state = {name: np.full_like(w, 0.5 + i / 8) for i, (name, w) in enumerate(model.state_dict().items())}
    mixed = {name: as_dtype(w, kinds[i % 3]) for i, (name, w) in enumerate(state.items())}  # exact in all three
    write_safetensors(folder / "model.safetensors", mixed)
    for name, w in load_folder(folder).state_dict().items():
        np.testing.assert_array_equal(w, state[name], err_msg=name)


def test_what_a_file_may_hold_besides_is_read_or_skipped(model, tmp_path, rng):
    """A tied embedding stored twice, tables that are computed and not trained; and an untied head."""
    extra = {"lm_head.weight": model.head_weight.data, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, "f4")}
    for dtype in ("F32", "BF16"):
        loaded = load_folder(write_folder(tmp_path / dtype, model, dtype, tensors=extra))
        assert list(loaded.state_dict()) == list(model.state_dict())
    untied = Llama(dataclasses.replace(CONFIG, tie_word_embeddings=False), rng)
    loaded = load_folder(write_folder(tmp_path / "m", untied))
    np.testing.assert_array_equal(logits(loaded, IDS), logits(untied, IDS))


def test_a_head_that_is_not_the_embedding_that_it_is_tied_to_is_refused(tmp_path, rng):
    """transformers would not tie them. 1,024 rows are compared at once."""
    gpt2 = GPT2(GPT2Config(1025, 4, 1, 2, 4, 8), rng)
    folder = save_folder(tmp_path, gpt2.config, gpt2.state_dict(), new_tokenizer())
    stored, head = FAMILIES["gpt2"].to_hugging_face(gpt2.state_dict()), gpt2.head_weight.data
    write_tensors(folder / "model.safetensors", stored | {"lm_head.weight": head.copy()})
    assert load_folder(folder).state_dict().keys() == gpt2.state_dict().keys()
    for other in (head + np.eye(1025, 4, -1024, "f4"), head[:-1], head.astype(np.float16)):
        write_tensors(folder / "model.safetensors", stored | {"lm_head.weight": other})
        refused(folder, "tie_word_embeddings true", "than transformer.wte.weight")


# -- config.json -------------------------------------------------------------------------------------------------------


def test_config_json_is_read_with_hugging_faces_defaults(model, tmp_path):
    for change, field, value in [
        ({"num_key_value_heads": None}, "num_key_value_heads", 4),
        ({"head_dim": 16}, "head_dim", 16),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}, "rope_theta", 5000.0),
        ({"rope_theta": None}, "rope_theta", 10000.0),
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"rope_type": "default"}}, "rope_theta", 100000.0),
        ({"rope_scaling": None}, "rope_theta", 100000.0),
        ({"rms_norm_eps": None}, "rms_norm_eps", 1e-6),
        ({"tie_word_embeddings": None}, "tie_word_embeddings", False),
        ({"max_position_embeddings": None}, "max_position_embeddings", 2048),
        ({"torch_dtype": "bfloat16", "use_cache": True}, "hidden_size", 32),
    ]:
        assert getattr(read_config(write_folder(tmp_path / "m", model, change=change)), field) == value, change


LLAMA3 = {"rope_type": "llama3", "factor": 8.0}
BOUNDS = {"low_freq_factor": 4, "high_freq_factor": 1, "original_max_position_embeddings": 32}
UNSUPPORTED = [
    ({"rope_scaling": LLAMA3}, "rope_scaling"),
    ({"rope_scaling": LLAMA3 | BOUNDS}, "low_freq_factor"),
    ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping (here 30.0)"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}, "'linear'"),
    ({"rope_scaling": "linear"}, "rope"),
    *(
        ({"tie_word_embeddings": value}, f"tie_word_embeddings must be true or false, got {value!r}")
        for value in ("false", 0)
    ),
    *(({field: True}, field) for field in ("attention_bias", "mlp_bias")),
    *(({"model_type": value}, repr(value)) for value in ("falcon", None)),
    *(({field: None}, field) for field in ("hidden_size", "vocab_size", "num_hidden_layers")),
    *(({"hidden_size": value}, "hidden_size") for value in ("32", 32.0, -32)),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_key_value_heads": 3}, "heads"),
    ({"head_dim": 7}, "head_dim"),
    *(({"rms_norm_eps": value}, "rms_norm_eps") for value in ("tiny", float("nan"))),
    *(({"rope_theta": value}, "rope_theta") for value in ([1e4], -1.0)),
]


def test_a_config_that_minilora_does_not_support_is_refused(model, tmp_path):
    folder = write_folder(tmp_path / "m", model)
    record = json.loads((folder / "config.json").read_text())
    for change, word in UNSUPPORTED:
        changed = {key: value for key, value in (record | change).items() if value is not None}
        (folder / "config.json").write_text(json.dumps(changed))
        refused(folder, "config.json", word)


@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_json_that_is_broken_or_no_object_is_refused(model, tmp_path, file):
    folder = write_folder(tmp_path / "m", model, shards=2)
    for content in (b"", b"{", b"[1, 2]", b"null", b'"llama"', b"\xff\xfe\x00", b"PK\x03\x04", b"[" * 100_000):
        (folder / file).write_bytes(content)
        refused(folder, file)


@pytest.mark.parametrize("file", ["config.json", "model-00001-of-00002.safetensors", INDEX])
def test_a_missing_file_is_named(model, tmp_path, file):
    folder = write_folder(tmp_path / "m", model, shards=2)
    (folder / file).unlink()
    refused(folder, "model.safetensors" if file == INDEX else file, "no such file")


def test_a_folder_of_pickles_and_one_without_tokenizer_are_told_what_to_do(model, tmp_path):
    folder = write_folder(tmp_path / "m", model)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "holds pytorch_model.bin and no safetensors", "convert")
    (folder / "config.json").unlink()
    refused(folder, "config.json: no such file")
    with pytest.raises(ModelFileError, match=r"^[^\n]*tokenizer.json: no such file: copy the tokenizer [^\n]*$"):
        from_folder(folder)


@pytest.mark.long
def test_absurd_sizes_are_refused_before_anything_is_allocated(model, tmp_path):
    changes = [{"num_hidden_layers": 10**9}, {"hidden_size": 2**31}, {"vocab_size": 2**40}, {"head_dim": 2**30}]
    changes += [{"num_attention_heads": 2**30, "num_key_value_heads": 2**30, "head_dim": 2}]
    for change in changes:
        folder = write_folder(tmp_path / "m", model, change=change)
        assert peak(partial(refused, folder, "claimed")) < 32e6


# -- weights -----------------------------------------------------------------------------------------------------------


def test_tensors_that_are_missing_unexpected_of_another_shape_or_not_finite_are_named(model, tmp_path):
    state, folder = model.state_dict(), tmp_path / "m"
    for name in (Q, UP, "model.embed_tokens.weight", "model.norm.weight"):
        refused(write_folder(folder, model, tensors={name: None}), "missing", name)
    for name in ("model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "x"):
        refused(write_folder(folder, model, tensors={name: np.ones(3, np.float32)}), "unexpected", name)
    for name in (Q, "model.norm.weight"):
        for shape in ((64,), (31, 32), (1, 32, 32)):
            write_folder(folder, model, tensors={name: np.ones(shape, np.float32)})
            refused(folder, name, str(shape), str(state[name].shape))
    for dtype, value in (("F32", np.nan), ("F16", np.inf), ("BF16", np.nan)):
        w = state[Q].copy()
        w[1, 2] = value
        refused(write_folder(folder, model, dtype, tensors={Q: w}), Q, "NaN")
    refused(write_folder(folder, model, change={"tie_word_embeddings": False}), "missing", "lm_head.weight")


def test_an_index_that_leads_out_of_the_folder_or_has_no_usable_weight_map_is_refused(model, tmp_path):
    folder = write_folder(tmp_path / "m", model, shards=2)
    write_folder(tmp_path, model)  # there is something to find
    index = json.loads((folder / INDEX).read_text())
    for name in ("../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""):
        (folder / INDEX).write_text(json.dumps(index | {"weight_map": index["weight_map"] | {Q: name}}))
        refused(folder, INDEX, "is outside the folder")
    for weight_map in (None, [], "model.safetensors", {Q: 3}, {}):
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        refused(folder)


# -- writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tied", "pad", "bos"), [(True, 1, "<|im_start|>"), (False, 2, ""), (False, 0, "")])
def test_what_is_saved_says_what_transformers_reads_and_comes_back(tied, pad, bos, tmp_path):
    model = new_llama(tie_word_embeddings=tied, head_dim=16, rms_norm_eps=1e-6, max_position_embeddings=77)
    tokenizer = new_tokenizer(pad=pad, bos=bos)
    folder = save_folder(tmp_path / "a" / "m", model.config, model.state_dict(), tokenizer)
    assert {path.name for path in folder.iterdir()} == set(FILES)
    own = [field.name for field in FAMILIES["llama"].fields]
    assert json.loads((folder / "config.json").read_text()) == {name: getattr(model.config, name) for name in own} | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_interleaved": False,
        "rope_scaling": None,
        "hidden_act": "silu",
        "dtype": "float32",
        "eos_token_id": 2,
        "pad_token_id": pad,
    }
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"][pad],
        "bos_token": bos or None,
        "chat_template": CHATML,
    }
    loaded, theirs = load_folder(folder), from_folder(folder)
    assert loaded.config == model.config
    np.testing.assert_array_equal(logits(loaded, IDS), logits(model, IDS))
    assert (theirs.eos_id, theirs.pad_id, theirs.bos, theirs.template) == (2, pad, bos, CHATML)


# -- quantised on loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_matrices_in_16_bits_are_quantised_as_if_they_had_been_widened_first(model, tmp_path, dtype):
    folder = write_folder(tmp_path / "m", model, dtype)
    plain = load_folder(folder)
    rounded = load_folder(folder, "Q8_0")
    assert rounded.unrounded_sha256 == sha256_of(plain.state_dict())
    assert rounded_bytes(plain.config, "Q8_0") == sum(w.nbytes for w in rounded.state_dict().values())
    for name, w in plain.state_dict().items():
        if w.ndim == 2:
            np.testing.assert_array_equal(rounded.state_dict()[name].raw, quantize(w, "Q8_0"))


@pytest.mark.long
@pytest.mark.parametrize("dtype", [pytest.param("F32", marks=pytest.mark.long), "BF16"])
def test_no_more_than_one_tensor_is_in_memory_beyond_the_model(tmp_path, rng, dtype, monkeypatch):
    """Of two files, in float32 and quantised. To quantise a tensor takes five times its size."""
    changes = dict(vocab_size=512, hidden_size=64, intermediate_size=768, num_hidden_layers=16, head_dim=16)
    model = Llama(dataclasses.replace(CONFIG, **changes), rng)
    folder = write_folder(tmp_path / "m", model, dtype, shards=2)
    for place in ("folder", "rounded"):  # zeros count, though they take no memory until written
        monkeypatch.setattr(f"minilora.models.{place}.empty_model", lambda config: model)
    for how in ({}, {"kind": "Q8_0"}, {"kind": "BF16"}):
        load_folder(folder, **how)  # imports
        most = peak(partial(load_folder, folder, **how))
        arrays = model.state_dict().values()
        own = sum(w.nbytes for w in arrays)
        assert most < own + 4 * 6 * max(w.size for w in arrays) + 200_000, how
