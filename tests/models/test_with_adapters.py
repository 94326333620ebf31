"""Adapters and the base they were made for: found by their folder, refused on another, loaded side by side."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from modelfiles import CONFIG, IDS, new_llama, new_tokenizer, write_gguf
from peftfiles import CONFIG as CONFIG_FILE
from peftfiles import NOTES, rewrite
from smallmodels import logits, lora_config, new_model, shaken

import minilora as ml
from minilora.files.disk import ModelFileError
from minilora.models import hub, with_adapters
from minilora.models import load as zoo
from minilora.models.folder import save_folder
from minilora.models.with_adapters import base_of, load_with_adapters, named_folders, read_combination
from minilora.nn.module import sha256_of


def make_adapter(base, folder, seed=0):
    """An adapter that changes what the base says, made for it and saved."""
    model, _ = ml.load(base)
    ml.add_adapter(model, lora_config(), seed=seed)
    return ml.save_adapter(shaken(model, seed=seed), folder, overwrite=True)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with two bases of one shape, and an adapter of the first."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("one", 0), ("two", 1)):
        save_folder(tmp_path / "models" / name, CONFIG, new_model(CONFIG, seed).state_dict(), new_tokenizer())
    make_adapter("models/one", tmp_path / "runs" / "legal")
    return tmp_path


def notes_of(folder):
    return json.loads((folder / NOTES).read_text())


def refusal(call, *words):
    with pytest.raises(ModelFileError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and not [word for word in words if word not in message], message


# -- names -------------------------------------------------------------------------------------------------------------


def test_an_adapter_is_called_as_its_folder_or_as_one_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["runs/legal", "law=runs/legal/last", "runs/legal/last", "runs/v1.2", "hers.gguf"]
    assert list(named_folders(words)) == ["legal", "law", "legal-last", "v1-2", "hers"]
    assert named_folders(["."])[tmp_path.name.replace(".", "-")] == Path(".")
    (tmp_path / "r=8").mkdir()
    assert {name: str(path) for name, path in named_folders(["r=8", "r=16"]).items()} == {"r=8": "r=8", "r": "16"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a/legal", "b/legal"], "two adapters are called 'legal'"),
        (["x=a", "x=b"], "two adapters are called 'x'"),
        (["base=runs/legal"], "'base' is the model without an adapter"),
        (["models/base"], "as NAME=DIR"),
        (["=runs/legal"], "expected an adapter as DIR or NAME=DIR"),
        (["legal="], "expected an adapter as DIR or NAME=DIR"),
        (["a.b=runs/legal"], "a name without dots"),
        ([""], "expected an adapter"),
    ],
)
def test_names_that_mean_nothing_are_refused(words, said):
    with pytest.raises(ValueError, match=said):
        named_folders(words)


def test_a_mix_names_each_adapter_once_with_a_number():
    assert read_combination("") == {} and read_combination("legal=0, r=8=.5") == {"legal": 0.0, "r=8": 0.5}
    for text in (
        "legal",
        "legal=",
        "=1",
        "legal=many",
        "legal=nan",
        "legal=inf",
        "legal=1e30",
        "legal=-101",
        "legal=1 legal=1",
    ):
        with pytest.raises(ValueError, match=f"^{text.split()[-1]}: expected NAME=FACTOR"):
            read_combination(text)


# -- what a folder says ------------------------------------------------------------------------------------------------


def test_the_notes_hold_the_bases_name_hash_and_shape(here):
    notes = notes_of(here / "runs" / "legal")
    model, _ = ml.load("models/one")
    assert notes["format"] == 1
    assert notes["base"] == {
        "name": "models/one",
        "path": "../../models/one",
        "sha256": sha256_of(model.state_dict()),
        "shape": {
            "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "vocab_size": CONFIG.vocab_size,
        },
    }  # fmt: skip


def test_peft_is_told_the_name_on_the_hub_and_both_names_load_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_gguf(tmp_path / "small.gguf", new_llama(), "Q8_0")
    source = hub.Source("none", "1", file.name, file.stat().st_size, "", "MIT", hub="maker/small-chat")
    monkeypatch.setitem(hub.SOURCES, "small", source)
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path))
    for name in ("small", "maker/small-chat"):
        folder = make_adapter(name, tmp_path / "adapter")
        assert json.loads((folder / CONFIG_FILE).read_text())["base_model_name_or_path"] == "maker/small-chat"
        assert notes_of(folder)["base"]["name"] == "small"
        assert base_of({"a": folder}) == "small"
        assert zoo.locate(name) == file
    (folder / NOTES).unlink()  # as PEFT writes it
    assert base_of({"a": folder}) == "small"
    save_folder(tmp_path / "maker" / "small-chat", CONFIG, new_llama().state_dict(), new_tokenizer())
    assert zoo.locate("maker/small-chat").is_dir()  # as in transformers


def test_the_name_of_the_real_model_on_the_hub_is_known():
    assert hub.known_as("HuggingFaceTB/SmolLM2-135M-Instruct") == hub.known_as("smollm2") == "smollm2"
    assert hub.known_as("models/one") is None


@pytest.mark.real
def test_the_real_model_is_found_by_both_names(smollm2):
    assert zoo.locate("HuggingFaceTB/SmolLM2-135M-Instruct") == zoo.locate("smollm2")
    model, _ = smollm2
    assert (model.source, model.hub_name) == ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")


def test_a_loaded_adapter_saved_again_says_what_it_learned_from(here):
    model, _ = ml.load("models/one")
    ml.load_adapter(model, "runs/legal")
    data = {"name": "legal", "sha256": "ab", "records": 240}
    ml.save_adapter(model, here / "told", data=data)
    again, _ = ml.load("models/one")
    ml.load_adapter(again, here / "told")
    assert notes_of(ml.save_adapter(again, here / "again"))["data"] == data


def test_a_hash_that_is_known_is_not_computed_again(here, monkeypatch):
    model, _ = ml.load("models/one")
    ml.load_adapter(model, "runs/legal")
    known = notes_of(here / "runs" / "legal")["base"]["sha256"]
    monkeypatch.setattr("minilora.lora.provenance.sha256_of", None)
    assert notes_of(ml.save_adapter(model, here / "again", base_sha256=known))["base"]["sha256"] == known


# -- the base is found -------------------------------------------------------------------------------------------------


def test_the_base_is_found_from_anywhere_and_when_all_has_moved(here, monkeypatch):
    expected = (here / "models" / "one").resolve()
    for place in (here, here / "runs", here / "runs" / "legal"):
        monkeypatch.chdir(place)
        assert base_of({"legal": here / "runs" / "legal"}).resolve() == expected
    monkeypatch.chdir(here)
    moved = shutil.copytree(here / "runs" / "legal", here / "far" / "away" / "legal")
    assert base_of({"legal": moved}).resolve() == expected  # as it was named, from here
    (here / "new").mkdir()
    for name in ("runs", "models"):
        shutil.move(here / name, here / "new" / name)
    assert base_of({"legal": here / "new" / "runs" / "legal"}).resolve() == (here / "new" / "models" / "one").resolve()


def test_a_base_that_is_gone_is_named_with_what_to_do(here):
    shutil.rmtree(here / "models" / "one")
    refusal(lambda: load_with_adapters({"legal": here / "runs" / "legal"}), "runs/legal", "models/one", "--base")


def test_an_adapter_that_names_no_base_is_taken_for_the_real_models(here):
    (here / "runs" / "legal" / NOTES).unlink()
    rewrite(here / "runs" / "legal", {"base_model_name_or_path": None})
    assert base_of({"legal": here / "runs" / "legal"}) == base_of({}) == "smollm2"


def test_adapters_of_two_bases_are_refused_and_a_copy_of_a_base_is_no_other(here):
    other = make_adapter("models/two", here / "runs" / "support")
    named = {"legal": here / "runs" / "legal", "support": other}
    refusal(lambda: base_of(named), "legal was made for", "models/one", "support for", "models/two", "--base")
    shutil.copytree(here / "models" / "one", here / "models" / "copy")
    make_adapter("models/copy", other, seed=1)
    assert base_of(named).name == "one"
    load_with_adapters(named)
    (here / "runs" / "support" / NOTES).unlink()  # of two places, PEFT's notes do not say whether they hold the same
    refusal(lambda: base_of(named), "models/copy")
    rewrite(here / "runs" / "support", {"base_model_name_or_path": "models/one"})
    load_with_adapters(named)


# -- loading -----------------------------------------------------------------------------------------------------------


def test_each_adapter_answers_under_its_name_and_none_is_active(here):
    other = make_adapter("models/one", here / "runs" / "support", seed=1)
    model, tokenizer = load_with_adapters({"law": here / "runs" / "legal", "support": other})
    base, _ = ml.load("models/one")
    plain = logits(base, IDS)
    assert list(model.adapters) == ["law", "support"] and len(tokenizer)
    np.testing.assert_array_equal(logits(model, IDS), plain)
    for name, folder in (("law", "legal"), ("support", "support")):
        ml.set_adapter(model, name)
        alone, _ = ml.load("models/one")
        ml.load_adapter(alone, here / "runs" / folder)
        np.testing.assert_array_equal(logits(model, IDS), logits(alone, IDS))
        assert np.abs(logits(alone, IDS) - plain).max() > 1e-3


def test_without_adapters_it_is_the_base(here):
    model, _ = load_with_adapters({}, base="models/two")
    assert not model.adapters and model.source == "models/two"


def test_another_base_of_the_same_shape_is_refused_with_both_hashes_unless_forced(here):
    named = {"legal": here / "runs" / "legal"}
    hashes = [sha256_of(ml.load(f"models/{name}")[0].state_dict()) for name in ("one", "two")]
    refusal(lambda: load_with_adapters(named, base="models/two"), "models/one", *hashes, "--force")
    model, _ = ml.load("models/two")
    refusal(lambda: ml.load_adapter(model, here / "runs" / "legal"), *hashes, "force=True")
    assert not model.adapters
    ml.load_adapter(model, here / "runs" / "legal", force=True)
    forced, _ = load_with_adapters(named, base="models/two", force=True)
    ml.set_adapter(forced, "legal")
    np.testing.assert_array_equal(logits(forced, IDS), logits(model, IDS))
    (here / "runs" / "legal" / NOTES).unlink()  # PEFT's own say nothing of a hash
    load_with_adapters(named, base="models/two")


def test_another_shape_is_refused_with_both_even_if_forced(here):
    for force in (False, True):
        refusal(
            lambda force=force: load_with_adapters({"legal": here / "runs" / "legal"}, base="tiny", force=force),
            "models/one", "width 32", "this model has", "width 128",
        )  # fmt: skip


def test_a_packed_base_is_the_base(here):
    file = write_gguf(here / "small.gguf", new_llama(), "Q8_0")
    folder = make_adapter(file, here / "runs" / "packed")
    model, _ = load_with_adapters({"packed": folder}, quantized=True)
    ml.set_adapter(model, "packed")
    assert (
        notes_of(ml.save_adapter(model, here / "again", "packed"))["base"]["sha256"]
        == notes_of(folder)["base"]["sha256"]
    )
    refusal(lambda: load_with_adapters({"packed": folder}, base="models/one"), "sha256")  # rounded numbers are others


def test_the_base_is_hashed_once_for_all_and_not_at_all_where_nothing_is_said(here, monkeypatch):
    named = {"legal": here / "runs" / "legal", "support": make_adapter("models/one", here / "support", seed=1)}
    counted = []
    monkeypatch.setattr(with_adapters, "sha256_of", lambda state: counted.append(1) or sha256_of(state))
    monkeypatch.setattr("minilora.lora.provenance.sha256_of", None)
    load_with_adapters(named)
    assert counted == [1]
    load_with_adapters(named, force=True)
    for folder in named.values():
        (folder / NOTES).unlink()
    load_with_adapters(named)
    assert counted == [1]


@pytest.mark.parametrize(
    "notes",
    [
        *('{"format": 2}', '{"base": 3}', '{"base": {"shape": 3}}', '{"data": []}', "[]", "{", '{"base": ["smollm2"]}'),
        *(f'{{"base": {{"{key}": 3}}}}' for key in ("name", "path", "sha256")),
    ],
)
def test_notes_that_are_none_are_refused_by_the_files_name(here, notes):
    (here / "runs" / "legal" / NOTES).write_text(notes)
    for base in (None, "models/one"):
        refusal(lambda base=base: load_with_adapters({"legal": here / "runs" / "legal"}, base), f"legal/{NOTES}")


def test_a_base_whose_name_is_no_text_is_refused_by_the_files_name(here):
    (here / "runs" / "legal" / NOTES).unlink()
    rewrite(here / "runs" / "legal", {"base_model_name_or_path": ["smollm2"]})
    for base in (None, "models/one"):
        refusal(
            lambda base=base: load_with_adapters({"legal": here / "runs" / "legal"}, base),
            "adapter_config.json",
            "is a list",
        )


def test_a_folder_that_is_no_adapter_is_refused_before_a_model_is_loaded(here, monkeypatch):
    monkeypatch.setattr(with_adapters, "load", None)
    refusal(lambda: load_with_adapters({"absent": here / "absent"}), "absent", CONFIG_FILE)
    refusal(lambda: load_with_adapters({"one": here / "models" / "one"}), "whole model", "--base")
