"""GGUF files: the model that went in comes out, and every bad file is refused in one line, without a big allocation."""

import dataclasses
import tempfile
import tracemalloc
from contextlib import contextmanager
from functools import cache
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
from minilora.nn.families import FAMILIES
from minilora.nn.llama import Llama

Q, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"


@pytest.fixture
def model():
    return new_llama()


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


def test_an_untied_head_is_read(tmp_path, rng):
    untied = Llama(dataclasses.replace(CONFIG, tie_word_embeddings=False), rng)
    loaded = GGUF(write_gguf(tmp_path / "m.gguf", untied)).load()
    assert not loaded.config.tie_word_embeddings
    np.testing.assert_array_equal(logits(loaded, IDS), logits(untied, IDS))


def test_the_shape_is_read_from_the_metadata_or_has_the_formats_defaults(model, tmp_path):
    path = tmp_path / "m.gguf"
    assert GGUF(write_gguf(path, model)).config() == CONFIG
    for eps in (1e-5, 1.5e-5, 1e-6, 3.125e-6):  # the number that was written, and not its nearest float32
        write_gguf(path, model, change={"llama.attention.layer_norm_rms_epsilon": eps})
        assert GGUF(path).config().rms_norm_eps == eps
    optional = ["llama.attention.head_count_kv", "llama.rope.dimension_count", "llama.rope.freq_base"]
    config = GGUF(write_gguf(path, model, change=dict.fromkeys(optional))).config()
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 8, 10000.0)


def test_the_loaded_weights_do_not_depend_on_the_file(model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", model)
    loaded = GGUF(path).load()
    before = logits(loaded, IDS)
    for _, parameter in loaded.named_parameters():
        parameter.data[:] = parameter.data  # writable, so not the file's own pages
    path.unlink()
    np.testing.assert_array_equal(logits(loaded, IDS), before)


# -- bad files ---------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=60, deadline=None)
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


def test_absurd_counts_lengths_and_dimensions_are_refused(tmp_path):
    """Of the tensors and entries in the header, of an array and a text in the metadata, and of a tensor."""
    content, path = small_file()[0], tmp_path / "m.gguf"
    places = [8, 16]
    for key in ("tokenizer.ggml.tokens", "general.architecture"):
        at = content.index(key.encode()) + len(key) + 4  # behind the key and the value's type
        places.append(at + (4 if content[at - 4] == gguf.GGUFValueType.ARRAY else 0))  # behind the items' type
    spoiled = [(at, (number,)) for at in places for number in (2**31, 2**63, 2**64 - 1)]
    at = content.index(b"token_embd.weight") + len("token_embd.weight") + 4
    spoiled += [(at, dims) for dims in ((2**40, 320), (2**32, 2**32), (2**63, 2), (32, 2**62), (0, 320), (320, 32))]
    for at, numbers in spoiled:
        raw = b"".join(number.to_bytes(8, "little") for number in numbers)
        path.write_bytes(content[:at] + raw + content[at + len(raw) :])
        with refused(path):
            read(path)


CONTRADICTIONS = {
    "llama.block_count": [2**32 - 1, 1, 3, 0],
    "llama.embedding_length": [2**31, 64],
    "llama.feed_forward_length": [2**31, 128],
    "llama.attention.head_count": [2**31, 8, 3, 0],
    "llama.attention.head_count_kv": [3, 1, 0, [2, 2]],
    "llama.rope.dimension_count": [2**31, 7, float("inf")],
    "llama.rope.freq_base": [0.0, float("nan")],
    "llama.attention.layer_norm_rms_epsilon": [float("nan"), "small"],
    "llama.context_length": [0, "long"],
}
OPTIONAL = ("llama.attention.head_count_kv", "llama.rope.dimension_count", "llama.rope.freq_base")


@pytest.mark.parametrize("key", CONTRADICTIONS)
def test_metadata_that_are_missing_or_contradict_the_tensors_are_refused(model, tmp_path, key):
    path = tmp_path / "m.gguf"
    for value in CONTRADICTIONS[key]:
        with refused(write_gguf(path, model, change={key: value})):
            read(path)
    if key not in OPTIONAL:
        with refused(write_gguf(path, model, change={key: None}), key, "missing"):
            read(path)


def test_another_architecture_is_refused(model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", model, change={"general.architecture": "falcon"})
    with refused(path, "'falcon'", "minilora reads gemma3, gpt2, granite, llama, "):
        read(path)


def test_a_tensor_that_nobody_dequantises_is_refused_by_name(model, tmp_path):
    for kind in (np.int32, np.int8, np.float64):
        path = write_gguf(tmp_path / "m.gguf", model, tensors={"model.norm.weight": np.ones(32, kind)})
        name = {"int32": "I32", "int8": "I8", "float64": "F64"}[kind.__name__]
        with refused(path, f"tensor output_norm.weight is stored as {name}, which neither"):
            read(path)


def test_tensors_that_do_not_fit_are_named(model, tmp_path):
    path, key = tmp_path / "m.gguf", "model.layers.1.self_attn.k_proj.weight"
    cases = [(name, None) for name in (EMBEDDING, Q, "model.layers.1.mlp.down_proj.weight", "model.norm.weight")]
    cases += [(name, np.ones(shape, np.float32)) for name in (Q, key) for shape in ((64, 64), (24, 32), (20, 32))]
    cases += [("model.layers.0.self_attn.q_proj.bias", np.zeros(32, np.float32))]  # no Llama has it
    for name, w in cases:
        write_gguf(path, model, permuted=False, tensors={name: w})
        with refused(path, name):
            read(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_weights_and_quantisation_steps_that_are_not_finite_are_named(model, tmp_path, kind, value):
    path = write_gguf(tmp_path / "m.gguf", model, kind)
    content = bytearray(path.read_bytes())
    at = next(int(t.data_offset) for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.attn_v.weight")
    for number, type in zip((value, -value), [np.float32 if kind == "F32" else np.float16] * 2, strict=True):
        raw = type(number).tobytes()  # of a block in Q4_1, the step and the minimum
        content[at : at + len(raw)] = raw
        at += len(raw)
        path.write_bytes(content)
        with refused(path, "model.layers.0.self_attn.v_proj.weight", "NaN"):
            read(path)


# -- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_values_that_the_type_cannot_hold_are_refused_by_name(kind, tmp_path):
    state = new_llama().state_dict() | {Q: np.full((32, 32), 1e9, np.float32)}
    with pytest.raises(ValueError, match=Q):
        save_gguf(tmp_path / "x.gguf", CONFIG, state, new_tokenizer(), kind)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_tensors_have_the_type_that_kind_of_gives(kind, tmp_path, caplog):
    """Norms are F32, embedding and head have at least 8 bits, and rows of no whole blocks have 16, with a warning."""
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False, intermediate_size=48)
    state = Llama(config, np.random.default_rng(0)).state_dict()
    path = save_gguf(tmp_path / "m.gguf", config, state, new_tokenizer(), kind)
    kinds = {FAMILIES["llama"].hugging_face_name(t.name): t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds == {name: kind_of(w, kind, name) for name, w in state.items()}
    for name, found in kinds.items():
        table, broken = name in (EMBEDDING, "lm_head.weight"), "down_proj" in name and kind[0] == "Q"
        expected = "F32" if "norm" in name else "F16" if broken else "Q8_0" if table and kind == "Q4_1" else kind
        assert found == expected, name
    error = np.abs(GGUF(path).load().state_dict()["model.layers.1.mlp.down_proj.weight"]
                   - state["model.layers.1.mlp.down_proj.weight"]).max()  # fmt: skip
    assert error < 1e-4
    said = f"2 matrices become F16, not {kind}: their rows are not a multiple of 32"
    assert caplog.messages == [said] * (kind[0] == "Q")


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


def test_a_window_that_llama_cpp_does_not_have_ends_the_context_and_says_so(tmp_path, caplog):
    config = dataclasses.replace(CONFIG, model_type="mistral", sliding_window=7)
    path = save_gguf(tmp_path / "m.gguf", config, Llama(config).state_dict(), new_tokenizer(), "F32")
    assert "the context of the file is 7 tokens" in caplog.text
    assert GGUF(path).config() == dataclasses.replace(CONFIG, max_position_embeddings=7)


# -- the real one ------------------------------------------------------------------------------------------------------


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.real
def test_smollm2_knows_the_capital_of_france_only_with_its_rows_in_order(smollm2):
    model, tokenizer = smollm2
    ids = np.array([tokenizer.encode("The capital of France is")])
    assert tokenizer.decode([model(ids, last=True).data.argmax()]) == " Paris"
