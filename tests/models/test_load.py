"""Loading by name, from a GGUF file and from a Hugging Face folder; what cannot be read is one line."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from modelfiles import CONFIG, new_llama, new_tokenizer, write_folder, write_gguf
from tokenizers import AddedToken

from minilora.engine import bfloat16
from minilora.files.disk import ModelFileError
from minilora.generate.answers import generate
from minilora.models.folder import save_folder
from minilora.models.load import load, load_tokenizer, sha256_of_base
from minilora.models.merge import save_model
from minilora.models.tokenizer import Tokenizer
from minilora.nn.llama import Llama
from minilora.nn.module import sha256_of


@pytest.fixture
def places(rng, tmp_path):
    """A model, and the file and folder that hold it."""
    model = Llama(CONFIG, rng)
    file, folder = write_gguf(tmp_path / "m.gguf", model), write_folder(tmp_path / "folder", model)
    load_tokenizer(file).core.save(str(folder / "tokenizer.json"))
    return model, file, folder


def test_the_fingerprint_of_a_base_is_that_of_the_digests_of_its_files_by_name(tmp_path):
    for name in ("b", "a", ".DS_Store"):
        (tmp_path / name).write_text(name)
    a, b = (hashlib.sha256(name).digest() for name in (b"a", b"b"))
    assert sha256_of_base(tmp_path / "a") == hashlib.sha256(a).hexdigest()
    assert sha256_of_base(tmp_path) == hashlib.sha256(a + b).hexdigest()


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_file_and_a_folder_give_the_model_and_its_tokenizer(places, kind, recompute, monkeypatch):
    """With recompute=True the model recomputes its blocks, and computes the same. In bfloat16 oneDNN has the cores."""
    model, *paths = places
    ids, left = np.arange(10)[None], []
    monkeypatch.setattr("minilora.models.load.leave_cores", left.append)
    for path in paths:
        loaded, tokenizer = load(kind(path), recompute=recompute)
        np.testing.assert_array_equal(loaded(ids).data, model(ids).data)
        assert loaded.model.recompute is recompute and loaded.source == str(path) and loaded.hub_name is None
        assert tokenizer.decode(tokenizer.encode("hello 12")) == "hello 12"
        assert load_tokenizer(path).encode("hello 12") == tokenizer.encode("hello 12")
    load(paths[0], dtype="bfloat16")
    assert left == [False, False, bfloat16.why_not() is None]


@pytest.mark.parametrize("function", [load, load_tokenizer])
@pytest.mark.parametrize("name", ["smollm3", "model.bin", ""])
def test_a_name_that_is_no_model_is_refused_with_what_there_is(tmp_path, monkeypatch, name, function):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelFileError, match=r"smollm2|config\.json|tokenizer\.json"):
        function(name)


@pytest.mark.parametrize("name", ["sha256-0a1b", "M.GGUF"])
def test_a_gguf_file_is_known_by_its_first_bytes_under_any_name(tmp_path, name):
    """Ollama's files are called so."""
    model, change = new_llama(), {"minilora.data": json.dumps({"system": "Be kind."})}
    path, usual = (write_gguf(tmp_path / each, model, change=change) for each in (name, "m.gguf"))
    (loaded, tokenizer), (expected, _) = load(path), load(usual)
    assert sha256_of(loaded.state_dict()) == sha256_of(expected.state_dict()) and loaded.data == expected.data != {}
    assert load_tokenizer(path).encode("hello 12") == tokenizer.encode("hello 12")


@pytest.mark.parametrize("function", [load, load_tokenizer, sha256_of_base])
def test_a_folder_of_gguf_files_is_refused_with_the_name_of_one(tmp_path, function):
    """LM Studio keeps models so."""
    path = write_gguf(tmp_path / "m-Q8_0.gguf", new_llama())
    with pytest.raises(ModelFileError, match=f"without config.json; expected .* such as {re.escape(str(path))}"):
        function(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # now it is a model's folder with other files in it
    if function is not sha256_of_base:
        with pytest.raises(ModelFileError, match=r"config\.json: model_type|tokenizer\.json: no such file"):
            function(tmp_path)


@pytest.mark.parametrize(("kind", "words"), [("adapter", "give it with --adapter"), ("mmproj", "get the model's file")])
def test_a_gguf_file_of_another_kind_is_refused_with_what_it_is(tmp_path, kind, words):
    path = write_gguf(tmp_path / "m.gguf", new_llama(), change={"general.type": kind, "general.architecture": "clip"})
    with pytest.raises(ModelFileError, match=f"general.type is '{kind}', expected 'model': {words}"):
        load(path)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"device": "tpu"}, ValueError, "'tpu'"),
        ({"dtype": "float16"}, ValueError, "'float32' or 'bfloat16', got 'float16'"),
        ({"dtype": "bfloat16", "device": "cuda"}, ValueError, "leave out one of the two"),
        ({"quantized": "nf5"}, ValueError, "one of true, false, nf4, .*got 'nf5'"),
        ({"quantized": True}, ModelFileError, "no quantised matrices"),
    ],
    ids=str,
)
def test_an_option_that_means_nothing_is_refused(places, settings, error, words):
    for path in places[1:]:
        with pytest.raises(error, match=words):
            load(path, **settings)


@pytest.mark.parametrize("special", [True, False])
def test_a_control_token_that_the_model_does_not_have_is_no_reason_to_refuse_it(tmp_path, rng, special):
    """Gemma 3's text models have no row for the tokenizer's <image_soft_token>."""
    tokenizer = new_tokenizer()
    size = len(tokenizer)
    tokenizer.core.add_tokens([AddedToken("<image>", special=special, normalized=False)])
    model = Llama(dataclasses.replace(CONFIG, vocab_size=size), rng)
    folder = save_folder(
        tmp_path / "m", model.config, model.state_dict(), Tokenizer(tokenizer.core, "<|im_end|>", pad_id=size)
    )
    if not special:
        with pytest.raises(ModelFileError, match=f"has {size + 1} tokens, but the model has only {size}"):
            load(folder)
        return
    loaded, again = load(folder)
    assert again.pad_id == again.eos_id  # which no token attends to
    answer = generate(loaded, again, "Is <image> a word?", 2)
    save_model(loaded, again, tmp_path / "m.gguf")
    assert generate(*load(tmp_path / "m.gguf"), "Is <image> a word?", 2) == answer
    for changed in ({"eos": "<image>"}, {"eos": "<|im_end|>", "other_ends": [size]}):
        assert not Tokenizer(again.core, **changed).fits(size), changed


@pytest.mark.parametrize(
    ("method", "name", "place"),
    [
        ("open", "m.gguf", "m.gguf"),
        ("read_text", "config.json", "folder"),
        ("read_text", "tokenizer_config.json", "folder"),
        ("read_text", "chat_template.jinja", "folder"),
        ("is_file", "model.safetensors", "folder"),
    ],
)
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")], ids=str)
def test_a_file_that_cannot_be_read_is_one_line_whichever_library_reads_it(
    places, monkeypatch, method, name, place, error
):
    (places[2] / "chat_template.jinja").write_text("{{ messages }}")
    (places[2] / "tokenizer_config.json").write_text("{}")
    path, real = places[1].parent / place, getattr(Path, method)

    def unreadable(self, *arguments, **settings):
        if self.name == name:
            raise type(error)(*error.args, str(self))
        return real(self, *arguments, **settings)

    monkeypatch.setattr(Path, method, unreadable)
    with pytest.raises(ModelFileError) as caught:
        load(path)
    message = str(caught.value)
    assert name in message and error.strerror in message and "\n" not in message
