"""GGUF files: the model that went in comes out, and every bad file is refused in one line, without a big allocation."""

import dataclasses
import tempfile
import tracemalloc
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelfiles import CHATML, CONFIG, IDS, SPECIAL, new_llama, new_tokenizer, stored_as, write_gguf
from smallmodels import logits

from minilora.files.disk import ModelFileError
from minilora.models.gguf import GGUF, kind_of, save_gguf
from minilora.nn.llama import Llama

Q, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"


@pytest.fixture
def model(rng):
    """A small Llama whose norms are not all one, so that a swapped norm would show."""
    model = Llama(CONFIG, rng)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = rng.uniform(0.5, 1.5, parameter.shape).astype(np.float32)
        else:
            parameter.data = parameter.data * np.float32(10)  # attention far from uniform, so that positions matter
    return model


@cache
def small_file():
    """The bytes of a valid file that is as small as it can be, and where its tensor data begins."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    with tempfile.TemporaryDirectory() as folder:
        path = write_gguf(Path(folder) / "small.gguf", Llama(config, np.random.default_rng(0)), "Q8_0")
        content = path.read_bytes()
    data_size = sum(w.size for w in Llama(config).state_dict().values() if w.ndim == 2) // 32 * 34 + 3 * 32 * 4
    return content, len(content) - data_size


def read(path):
    """All that loading a model from a GGUF file does."""
    file = GGUF(path)
    return file.load(), file.tokenizer()


@contextmanager
def refused(path, *words):
    """Expect ModelFileError: one line that begins with the path and has the words; at most 32 MB allocated."""
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError) as caught:
            yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert not [word for word in words if word not in message], message
    assert peak < 32e6


# -- what goes in comes out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_a_model_read_back_has_the_very_weights_that_were_stored(model, tmp_path, kind):
    loaded = GGUF(write_gguf(tmp_path / "m.gguf", model, kind)).load()
    expected = stored_as(model.state_dict(), kind)
    assert list(loaded.state_dict()) == list(expected)
    for name, w in loaded.state_dict().items():
        assert w.dtype == np.float32
        np.testing.assert_array_equal(w, expected[name], err_msg=name)
    model.load_state_dict(expected)
    np.testing.assert_array_equal(logits(loaded, IDS), logits(model, IDS))


def test_an_untied_head_is_read(model, tmp_path, rng):
    untied = Llama(dataclasses.replace(CONFIG, tie_word_embeddings=False), rng)
    loaded = GGUF(write_gguf(tmp_path / "m.gguf", untied)).load()
    assert not loaded.config.tie_word_embeddings
    np.testing.assert_array_equal(logits(loaded, IDS), logits(untied, IDS))


def test_the_shape_is_read_from_the_metadata(model, tmp_path):
    assert GGUF(write_gguf(tmp_path / "m.gguf", model)).config() == CONFIG


@pytest.mark.parametrize("eps", [1e-5, 1.5e-5, 1e-6, 3.125e-6])
def test_the_epsilon_is_the_number_that_was_written_and_not_its_nearest_float32(model, tmp_path, eps):
    path = write_gguf(tmp_path / "m.gguf", model, change={"llama.attention.layer_norm_rms_epsilon": eps})
    assert GGUF(path).config().rms_norm_eps == eps


def test_missing_optional_metadata_has_the_formats_defaults(model, tmp_path):
    optional = ["llama.attention.head_count_kv", "llama.rope.dimension_count", "llama.rope.freq_base"]
    config = GGUF(write_gguf(tmp_path / "m.gguf", model, change=dict.fromkeys(optional))).config()
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 8, 10000.0)


def test_the_loaded_weights_do_not_depend_on_the_file(model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", model)
    loaded = GGUF(path).load()
    before = logits(loaded, IDS)
    for _, parameter in loaded.named_parameters():
        parameter.data[:] = parameter.data  # writable, so not the file's own pages
    path.unlink()
    np.testing.assert_array_equal(logits(loaded, IDS), before)


# -- the two layouts of q and k ----------------------------------------------------------------------------------------


def test_forgetting_to_reorder_q_and_k_changes_the_logits(model, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", model)
    monkeypatch.setattr("minilora.models.gguf.to_halves", lambda w, heads: w)
    wrong = logits(GGUF(path).load(), IDS)
    assert np.isfinite(wrong).all()  # this is what makes the mistake a trap
    assert abs(wrong - logits(model, IDS)).max() > 0.1


# -- bad files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [*(i / 20 for i in range(20)), 0.9999])
@pytest.mark.parametrize("part", ["header", "data"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, part, share):
    content, start = small_file()
    end = 4 + int(share * (start - 4)) if part == "header" else start + int(share * (len(content) - start))
    (tmp_path / "m.gguf").write_bytes(content[:end])
    with refused(tmp_path / "m.gguf", "cut off or damaged"):
        read(tmp_path / "m.gguf")


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_headers_are_refused_or_harmless(tmp_path_factory, data):
    content, start = bytearray(small_file()[0]), small_file()[1]
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(4, start - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content)
    try:
        model, _ = read(path)
    except ModelFileError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert model(np.zeros((1, 1), int)).shape == (1, 1, CONFIG.vocab_size)


@pytest.mark.parametrize("count", [2**31, 2**63, 2**64 - 1])
@pytest.mark.parametrize("offset", [8, 16], ids=["tensors", "metadata"])
def test_absurd_counts_in_the_header_are_refused(tmp_path, offset, count):
    content = bytearray(small_file()[0])
    content[offset : offset + 8] = count.to_bytes(8, "little")
    (tmp_path / "m.gguf").write_bytes(content)
    with refused(tmp_path / "m.gguf", "cut off or damaged"):
        read(tmp_path / "m.gguf")


@pytest.mark.parametrize("length", [2**31, 2**62, 2**64 - 1])
@pytest.mark.parametrize("key", ["tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "general.architecture"])
def test_absurd_lengths_in_the_metadata_are_refused(tmp_path, key, length):
    content = bytearray(small_file()[0])
    at = content.index(key.encode()) + len(key) + 4  # behind the key and the value's type
    at += 4 if content[at - 4] == gguf.GGUFValueType.ARRAY else 0  # behind the items' type
    content[at : at + 8] = length.to_bytes(8, "little")
    (tmp_path / "m.gguf").write_bytes(content)
    with refused(tmp_path / "m.gguf", "cut off or damaged"):
        read(tmp_path / "m.gguf")


@pytest.mark.parametrize("dims", [(2**40, 320), (2**32, 2**32), (2**63, 2), (32, 2**62), (0, 320), (32, 0), (320, 32)])
def test_absurd_dimensions_of_a_tensor_are_refused(tmp_path, dims):
    content = bytearray(small_file()[0])
    at = content.index(b"token_embd.weight") + len("token_embd.weight") + 4
    content[at : at + 16] = b"".join(d.to_bytes(8, "little") for d in dims)
    (tmp_path / "m.gguf").write_bytes(content)
    with refused(tmp_path / "m.gguf"):
        read(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", 2**32 - 1),
        ("llama.block_count", 1),
        ("llama.block_count", 3),
        ("llama.block_count", 0),
        ("llama.embedding_length", 2**31),
        ("llama.embedding_length", 64),
        ("llama.feed_forward_length", 2**31),
        ("llama.feed_forward_length", 128),
        ("llama.attention.head_count", 2**31),
        ("llama.attention.head_count", 8),
        ("llama.attention.head_count", 3),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count_kv", 3),
        ("llama.attention.head_count_kv", 1),
        ("llama.attention.head_count_kv", 0),
        ("llama.attention.head_count_kv", [2, 2]),
        ("llama.rope.dimension_count", 2**31),
        ("llama.rope.dimension_count", 7),
        ("llama.rope.freq_base", 0.0),
        ("llama.rope.freq_base", float("nan")),
        ("llama.attention.layer_norm_rms_epsilon", float("nan")),
        ("llama.attention.layer_norm_rms_epsilon", "small"),
        ("llama.context_length", 0),
        ("llama.context_length", "long"),
    ],
)
def test_metadata_that_contradicts_the_tensors_is_refused(model, tmp_path, key, value):
    path = write_gguf(tmp_path / "m.gguf", model, change={key: value})
    with refused(path):
        read(path)


@pytest.mark.parametrize(
    "key",
    ["llama.embedding_length", "llama.block_count", "llama.feed_forward_length", "llama.attention.head_count",
     "llama.context_length", "llama.attention.layer_norm_rms_epsilon"],
)  # fmt: skip
def test_missing_metadata_is_named(model, tmp_path, key):
    path = write_gguf(tmp_path / "m.gguf", model, change={key: None})
    with refused(path, key, "missing"):
        read(path)


def test_another_architecture_is_refused(model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", model, change={"general.architecture": "falcon"})
    with refused(path, "'falcon'", "'llama'"):
        read(path)


def test_an_unknown_quantisation_type_is_named_with_the_known_ones(model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", model, "Q5_0")
    with refused(path, "Q5_0", "F32, F16, Q8_0, Q4_1"):
        read(path)


def test_a_big_endian_file_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "GGUFWriter", partial(gguf.GGUFWriter, endianess=gguf.GGUFEndian.BIG))
    path = write_gguf(tmp_path / "m.gguf", model)
    with refused(path, "big-endian"):
        read(path)


@pytest.mark.parametrize("name", [EMBEDDING, Q, "model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(model, tmp_path, name):
    path = write_gguf(tmp_path / "m.gguf", model, tensors={name: None})
    with refused(path, name):
        read(path)


def test_a_tensor_that_no_llama_has_is_named(model, tmp_path):
    extra = {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", model, tensors=extra)
    with refused(path, "unexpected", "q_proj.bias"):
        read(path)


@pytest.mark.parametrize("name", [Q, "model.layers.1.self_attn.k_proj.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("shape", [(64, 64), (24, 32), (20, 32)])
def test_a_tensor_of_another_shape_is_named(model, tmp_path, name, shape):
    path = write_gguf(tmp_path / "m.gguf", model, permuted=False, tensors={name: np.ones(shape, np.float32)})
    with refused(path, name):
        read(path)


@pytest.mark.parametrize("values", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf]], ids=str)
@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_weights_that_are_no_numbers_are_named(model, tmp_path, kind, values):
    w = model.state_dict()[Q].copy()
    w[3, : len(values)] = values
    path = write_gguf(tmp_path / "m.gguf", model, kind, tensors={Q: w})
    with refused(path, Q, "NaN"):
        read(path)


@pytest.mark.parametrize("step", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_quantisation_steps_that_are_no_numbers_are_named(model, tmp_path, kind, step):
    path = write_gguf(tmp_path / "m.gguf", model, kind)
    content = bytearray(path.read_bytes())
    at = next(int(t.data_offset) for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.attn_v.weight")
    content[at : at + 2] = np.float16(step).tobytes()
    path.write_bytes(content)
    with refused(path, "model.layers.0.self_attn.v_proj.weight", "NaN"):
        read(path)


# -- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_numbers_that_the_type_cannot_hold_are_refused_by_name(kind, tmp_path):
    state = new_llama().state_dict() | {Q: np.full((32, 32), 1e9, np.float32)}
    with pytest.raises(ValueError, match=Q):
        save_gguf(tmp_path / "x.gguf", CONFIG, state, new_tokenizer(), kind)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_no_whole_blocks_are_stored_as_float16(tmp_path):
    config = dataclasses.replace(CONFIG, intermediate_size=48)
    model = Llama(config, np.random.default_rng(0))
    path = save_gguf(tmp_path / "x.gguf", config, model.state_dict(), new_tokenizer(), "Q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
    assert np.abs(logits(GGUF(path).load(), IDS) - logits(model, IDS)).max() < 0.05


def stored_kinds(path):
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(("kind", "tables"), [("F32", "F32"), ("F16", "F16"), ("Q8_0", "Q8_0"), ("Q4_1", "Q8_0")])
def test_matrices_have_the_type_that_was_asked_for_norms_are_float32_and_embedding_and_head_at_least_8_bits(
    kind, tables, tmp_path
):
    model = new_llama(tie_word_embeddings=False)
    kinds = stored_kinds(save_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), new_tokenizer(), kind))
    assert len(kinds) == 21
    for name, found in kinds.items():
        table = name in ("token_embd.weight", "output.weight")
        assert found == ("F32" if "norm" in name else tables if table else kind), name


def test_kind_of_says_what_save_gguf_does():
    matrix, table = np.zeros((4, 64)), "model.embed_tokens.weight"
    assert [kind_of(matrix, kind) for kind in ("F32", "F16", "Q8_0", "Q4_1")] == ["F32", "F16", "Q8_0", "Q4_1"]
    assert [kind_of(matrix, kind, table) for kind in ("F16", "Q4_1")] == ["F16", "Q8_0"]
    assert [kind_of(np.zeros((4, 65)), kind, table) for kind in ("F32", "Q8_0", "Q4_1")] == ["F32", "F16", "F16"]
    assert kind_of(np.zeros(64), "Q4_1") == "F32"


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_what_a_file_says_of_its_model(kind, tmp_path):
    """Key by key, as llama.cpp's converter writes them; the numbers of file types are those of its llama.h."""
    config = dataclasses.replace(CONFIG, head_dim=16, max_position_embeddings=77, rms_norm_eps=1e-6)
    state = Llama(config, np.random.default_rng(0)).state_dict()
    path = save_gguf(tmp_path / "m.gguf", config, state, new_tokenizer(pad=0, bos=""), kind)
    fields = {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
    listed = {key: fields.pop(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges")}
    assert fields == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.file_type": int(getattr(gguf.LlamaFileType, {"F32": "ALL_F32"}.get(kind, f"MOSTLY_{kind}"))),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "llama.vocab_size": 320,
        "llama.context_length": 77,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 100000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }
    assert listed["tokens"][:3] == SPECIAL and listed["merges"][0] == "h e" and listed["token_type"][:4] == [3, 3, 3, 1]


def test_an_alignment_of_the_source_is_not_copied_since_tensors_are_laid_out_anew(model, tmp_path, monkeypatch):
    class Aligned(gguf.GGUFWriter):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            self.add_custom_alignment(256)

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Aligned)
        source = GGUF(write_gguf(tmp_path / "source.gguf", model))
    assert source.metadata["general.alignment"] == 256
    path = save_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), source.tokenizer(), "F32", source)
    assert "general.alignment" not in GGUF(path).metadata
    np.testing.assert_array_equal(logits(GGUF(path).load(), IDS), logits(model, IDS))


# -- the real one ------------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_smollm2_has_the_shape_and_size_it_should_have(smollm2):
    model, tokenizer = smollm2
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.rope_theta, config.rms_norm_eps) == (49152, 100000.0, 1e-5)
    assert config.tie_word_embeddings and config.max_position_embeddings == 8192 and len(tokenizer) == 49152
    parameters = dict(model.named_parameters())
    assert len(parameters) == 272 and sum(p.size for p in parameters.values()) == 134_515_008


@pytest.mark.real
def test_smollm2_knows_the_capital_of_france_only_with_its_rows_in_order(smollm2):
    model, tokenizer = smollm2
    ids = np.array([tokenizer.encode("The capital of France is")])
    assert tokenizer.decode([model(ids, last=True).data.argmax()]) == " Paris"
