"""Hugging Face folders: config.json with one or several safetensors files, and every way in which they can be wrong."""

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest
from modelfiles import CHATML, CONFIG, IDS, as_dtype, new_llama, new_tokenizer, write_folder, write_safetensors
from smallmodels import logits

from minilora.files.disk import ModelFileError
from minilora.models.folder import FILES, load_folder, read_config, save_folder
from minilora.models.tokenizer import from_folder
from minilora.nn.llama import Llama

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
    assert str(folder) in message and "\n" not in message
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


def test_dtypes_may_be_mixed_in_one_file(model, tmp_path):
    folder = write_folder(tmp_path / "m", model)
    kinds = ["F32", "F16", "BF16"]
    state = {name: np.full_like(w, 0.5 + i / 8) for i, (name, w) in enumerate(model.state_dict().items())}
    mixed = {name: as_dtype(w, kinds[i % 3]) for i, (name, w) in enumerate(state.items())}  # exact in all three
    write_safetensors(folder / "model.safetensors", mixed)
    for name, w in load_folder(folder).state_dict().items():
        np.testing.assert_array_equal(w, state[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_tied_embedding_that_is_stored_twice_is_read_once(model, tmp_path, dtype):
    twice = {"lm_head.weight": model.head_weight.data}
    loaded = load_folder(write_folder(tmp_path / "m", model, dtype, tensors=twice))
    assert list(loaded.state_dict()) == list(model.state_dict())


def test_an_untied_head_is_read(tmp_path, rng):
    untied = Llama(dataclasses.replace(CONFIG, tie_word_embeddings=False), rng)
    loaded = load_folder(write_folder(tmp_path / "m", untied))
    np.testing.assert_array_equal(logits(loaded, IDS), logits(untied, IDS))


def test_tables_that_are_computed_and_not_learned_are_skipped(model, tmp_path):
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    loaded = load_folder(write_folder(tmp_path / "m", model, tensors=table))
    np.testing.assert_array_equal(logits(loaded, IDS), logits(model, IDS))


# -- config.json -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"num_key_value_heads": None}, "num_key_value_heads", 4),
        ({"head_dim": 16}, "head_dim", 16),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}, "rope_theta", 5000.0),
        ({"rope_theta": None}, "rope_theta", 10000.0),
        ({"rope_scaling": None}, "rope_theta", 100000.0),
        ({"rms_norm_eps": None}, "rms_norm_eps", 1e-6),
        ({"tie_word_embeddings": None}, "tie_word_embeddings", False),
        ({"max_position_embeddings": None}, "max_position_embeddings", 2048),
        ({"torch_dtype": "bfloat16", "use_cache": True}, "hidden_size", 32),
    ],
)
def test_config_json_is_read_with_hugging_faces_defaults(model, tmp_path, change, field, value):
    assert getattr(read_config(write_folder(tmp_path / "m", model, change=change)), field) == value


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_scaling"),
        ({"rope_scaling": "linear"}, "rope"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "mistral"}, "'mistral'"),
        ({"model_type": None}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": 32.0}, "hidden_size"),
        ({"hidden_size": -32}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": [1e4]}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
    ],
)
def test_a_config_that_minilora_cannot_compute_is_refused(model, tmp_path, change, word):
    refused(write_folder(tmp_path / "m", model, change=change), "config.json", word)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1, 2]", b"null", b'"llama"', b"\xff\xfe\x00", b"PK\x03\x04", b"[" * 100_000]
)
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_json_that_is_broken_or_no_object_is_refused(model, tmp_path, file, content):
    folder = write_folder(tmp_path / "m", model, shards=2)
    (folder / file).write_bytes(content)
    refused(folder, file)


@pytest.mark.parametrize(
    "file", ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
)
def test_a_missing_file_is_named(model, tmp_path, file):
    folder = write_folder(tmp_path / "m", model, shards=2)
    (folder / file).unlink()
    refused(folder, file, "no such file")


def test_a_folder_without_weights_is_refused(model, tmp_path):
    folder = write_folder(tmp_path / "m", model)
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors", "no such file")


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 2**31},
        {"vocab_size": 2**40},
        {"intermediate_size": 2**40},
        {"head_dim": 2**30},
        {"num_attention_heads": 2**30, "num_key_value_heads": 2**30, "head_dim": 2},
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_allocated(model, tmp_path, change):
    folder = write_folder(tmp_path / "m", model, change=change)
    tracemalloc.start()
    try:
        refused(folder, "claimed")
        assert tracemalloc.get_traced_memory()[1] < 32e6
    finally:
        tracemalloc.stop()


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [Q, UP, "model.embed_tokens.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(model, tmp_path, name):
    refused(write_folder(tmp_path / "m", model, tensors={name: None}), "missing", name)


def test_a_head_is_required_where_it_is_not_tied(model, tmp_path):
    refused(write_folder(tmp_path / "m", model, change={"tie_word_embeddings": False}), "missing", "lm_head.weight")


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "x"])
def test_an_extra_tensor_is_named(model, tmp_path, name):
    refused(write_folder(tmp_path / "m", model, tensors={name: np.ones(3, np.float32)}), "unexpected", name)


@pytest.mark.parametrize("name", [Q, UP, "model.norm.weight"])
@pytest.mark.parametrize("shape", [(32,), (64,), (31, 32), (32, 65), (1, 32, 32)])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(model, tmp_path, name, shape):
    expected = model.state_dict()[name].shape
    if shape != expected:
        folder = write_folder(tmp_path / "m", model, tensors={name: np.ones(shape, np.float32)})
        refused(folder, name, str(shape), str(expected))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_named(model, tmp_path, dtype, value):
    w = model.state_dict()[Q].copy()
    w[1, 2] = value
    refused(write_folder(tmp_path / "m", model, dtype, tensors={Q: w}), Q, "NaN")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_an_index_that_leads_out_of_the_folder_is_refused(model, tmp_path, name):
    folder = write_folder(tmp_path / "m", model, shards=2)
    write_folder(tmp_path, model)  # there is something to find
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][Q] = name
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, INDEX)


@pytest.mark.parametrize("weight_map", [None, [], "model.safetensors", {Q: 3}, {}])
def test_an_index_without_a_usable_weight_map_is_refused(model, tmp_path, weight_map):
    folder = write_folder(tmp_path / "m", model, shards=2)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder)


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99999])
def test_a_file_cut_off_anywhere_is_refused(model, tmp_path, share):
    folder = write_folder(tmp_path / "m", model)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: int(share * len(content))])
    refused(folder, "model.safetensors", "damaged")


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("content", [b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}", b"\x02" + bytes(7) + b"[]"])
def test_a_damaged_header_is_refused(model, tmp_path, dtype, content):
    folder = write_folder(tmp_path / "m", model, dtype)
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "model.safetensors", "damaged")


@pytest.mark.parametrize("dtype", ["I64", "U8", "BOOL", "F8_E4M3"])
def test_weights_that_are_not_floating_point_are_refused(model, tmp_path, dtype):
    folder = write_folder(tmp_path / "m", model)
    size = 8 if dtype == "I64" else 1
    write_safetensors(folder / "model.safetensors", {Q: (dtype, (2, 2), bytes(4 * size))})
    refused(folder, "model.safetensors", dtype)


# -- writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, 1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_says_what_transformers_reads_and_comes_back(tied, pad, tmp_path):
    model = new_llama(tie_word_embeddings=tied, head_dim=16, rms_norm_eps=1e-6, max_position_embeddings=77)
    tokenizer = new_tokenizer(pad=pad)
    folder = save_folder(tmp_path / "a" / "m", model.config, model.state_dict(), tokenizer)
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert json.loads((folder / "config.json").read_text()) == dataclasses.asdict(model.config) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "dtype": "float32",
        "eos_token_id": 2,
        "pad_token_id": pad,
    }
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"][pad],
        "bos_token": "<|im_start|>",
        "chat_template": CHATML,
    }
    loaded, theirs = load_folder(folder), from_folder(folder)
    assert loaded.config == model.config
    np.testing.assert_array_equal(logits(loaded, IDS), logits(model, IDS))
    assert (theirs.eos_id, theirs.pad_id, theirs.bos, theirs.template) == (2, pad, "<|im_start|>", CHATML)


def test_a_tokenizer_without_a_first_token_says_so(tmp_path):
    folder = save_folder(tmp_path, CONFIG, Llama(CONFIG).state_dict(), new_tokenizer(bos=""))
    assert json.loads((folder / "tokenizer_config.json").read_text())["bos_token"] is None
    assert from_folder(folder).bos == ""
