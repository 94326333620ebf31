"""Adapters and the base they were made for: found by their folder, refused on another, loaded side by side."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from modelfiles import CONFIG, IDS, new_llama, new_tokenizer, write_gguf
from peftfiles import CONFIG as CONFIG_FILE
from peftfiles import NOTES, link, provenance_of, rewrite
from smallmodels import logits, lora_config, new_model, shaken

import minilora as ml
from minilora.files.disk import ModelFileError
from minilora.models import hub, with_adapters
from minilora.models import load as zoo
from minilora.models.folder import save_folder
from minilora.models.merge import export
from minilora.models.with_adapters import (
    base_of,
    load_with_adapters,
    named_folders,
    read_combination,
)
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
    assert named_folders(["law=~/legal"]) == {"law": Path.home() / "legal"}


def test_what_is_no_adapter_is_refused_before_a_base_is_loaded(here, monkeypatch, caplog):
    monkeypatch.setattr(with_adapters, "load", None)
    caplog.set_level("INFO", "minilora")
    file = here / "runs" / "legal" / "adapter_model.safetensors"
    for base in (None, "models/one"):
        refusal(partial(load_with_adapters, {"a": file}, base), f"{file} is a file", "folder of a PEFT adapter")
    for absent in (here / "absent", here / "absent.gguf"):
        refusal(partial(load_with_adapters, {"absent": absent}), str(absent), CONFIG_FILE)
    (here / "models" / "one" / "model.safetensors").rename(here / "models" / "one" / "model-1-of-1.safetensors")
    refusal(partial(load_with_adapters, {"one": here / "models" / "one"}), "whole model", "--base")
    assert not caplog.messages


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a/legal", "b/legal"], "two adapters are called 'legal', a.legal and b.legal: name them as NAME=DIR"),
        (["x=a", "x=b"], "two adapters are called 'x'"),
        (["base=runs/legal"], "'base' is the model without an adapter"),
        (["models/base"], "as NAME=DIR"),
        *(
            ([word], "expected an adapter as DIR or NAME=DIR")
            for word in ("=runs/legal", "legal=", "a.b=runs/legal", "")
        ),
    ],
)
def test_names_that_mean_nothing_are_refused(words, said):
    with pytest.raises(ValueError, match=said):
        named_folders(words)


def test_a_combination_names_each_adapter_once_with_a_number():
    assert read_combination("") == {} and read_combination("legal=0, r=8=.5") == {"legal": 0.0, "r=8": 0.5}
    assert read_combination("legal=-100 support=100") == {"legal": -100, "support": 100}
    for text in ("legal", "legal=", "=1", "legal=many", "legal=nan", "legal=inf", "legal=1e30", "legal=-101",
                 "legal=1 legal=1"):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{text.split()[-1]}: expected NAME=FACTOR"):
            read_combination(text)


# -- what a folder says ------------------------------------------------------------------------------------------------


def test_the_file_holds_the_bases_name_hash_and_shape(here):
    written = provenance_of(here / "runs" / "legal")
    model, _ = ml.load("models/one")
    assert written["format"] == 1
    assert written["base"] == {
        "name": "models/one",
        "path": "../../models/one",
        "sha256": sha256_of(model.state_dict()),
        "shape": {
            "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "vocab_size": CONFIG.vocab_size,
        },
    }  # fmt: skip


def test_peft_is_told_the_name_on_the_hub_and_both_names_load_the_model(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    file = write_gguf(tmp_path / "small.gguf", new_llama(), "Q8_0")
    source = hub.Source("none", "1", file.name, file.stat().st_size, "", "MIT", hub="maker/small-chat")
    monkeypatch.setitem(hub.SOURCES, "small", source)
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path))
    for name in ("small", "maker/small-chat"):
        folder = make_adapter(name, tmp_path / "adapter")
        assert json.loads((folder / CONFIG_FILE).read_text())["base_model_name_or_path"] == "maker/small-chat"
        assert provenance_of(folder)["base"]["name"] == "small"
        assert base_of({"a": folder}) == "small"
        assert zoo.locate(name) == file
    caplog.set_level("INFO", "minilora")
    assert base_of({"a": folder}) == "small" and not caplog.messages
    (folder / NOTES).unlink()  # as PEFT writes it, for the original
    assert base_of({"a": folder}) == "small"
    (line,) = caplog.messages
    assert f"{folder} was made for maker/small-chat, and is loaded on {file.name}, in which matrices are" in line
    assert line.endswith("--base maker/small-chat@main") and hub.known_as("maker/small-chat@main") is None
    save_folder(tmp_path / "maker" / "small-chat", CONFIG, new_llama().state_dict(), new_tokenizer())
    assert zoo.locate("maker/small-chat").is_dir()  # as in transformers


def test_the_name_of_the_real_model_on_the_hub_is_known():
    assert hub.known_as("HuggingFaceTB/SmolLM2-135M-Instruct") == hub.known_as("smollm2") == "smollm2"
    assert hub.known_as("models/one") is None


def test_a_loaded_adapter_saved_again_says_what_it_was_trained_on_and_a_known_hash_is_not_computed(here, monkeypatch):
    model, _ = ml.load("models/one")
    ml.load_adapter(model, "runs/legal")
    data, known = {"name": "legal", "sha256": "ab", "records": 240}, provenance_of(here / "runs" / "legal")["base"]
    monkeypatch.setattr("minilora.lora.provenance.sha256_of", None)
    ml.save_adapter(model, here / "told", data=data, base_sha256=known["sha256"])
    again, _ = ml.load("models/one")
    ml.load_adapter(again, here / "told", base_sha256=known["sha256"])
    written = provenance_of(ml.save_adapter(again, here / "again", base_sha256=known["sha256"]))
    assert written["data"] == data and written["base"] | {"path": ""} == known | {"path": ""}


# -- the base is found -------------------------------------------------------------------------------------------------


def test_the_base_is_found_from_anywhere_and_when_all_has_moved(here, monkeypatch):
    expected = (here / "models" / "one").resolve()
    for place in (here, here / "runs", here / "runs" / "legal"):
        monkeypatch.chdir(place)
        assert base_of({"legal": here / "runs" / "legal"}).resolve() == expected
    monkeypatch.chdir(here)
    moved = shutil.copytree(here / "runs" / "legal", here / "far" / "away" / "legal")
    assert base_of({"legal": moved}).resolve() == expected  # as it was named, from here
    (moved / NOTES).unlink()
    rewrite(moved, {"base_model_name_or_path": "../../../models/one"})  # as PEFT may name it, from the adapter's folder
    assert base_of({"legal": moved}).resolve() == expected
    shutil.copytree(here / "models", here / "runs" / "models")  # the same words lead to two places
    monkeypatch.chdir(here / "runs")
    assert base_of({"legal": here / "runs" / "legal"}).resolve() == expected  # its own path counts, wherever we are
    rewrite(moved, {"base_model_name_or_path": "models/one"})
    shutil.copytree(here / "models", moved / "models")
    monkeypatch.chdir(here)
    assert base_of({"legal": moved}).resolve() == expected  # as for PEFT, from here before the adapter's folder
    (here / "new").mkdir()
    for name in ("runs", "models"):
        shutil.move(here / name, here / "new" / name)
    assert base_of({"legal": here / "new" / "runs" / "legal"}).resolve() == (here / "new" / "models" / "one").resolve()


def test_the_base_is_found_from_a_folder_that_is_reached_by_a_link(here, tmp_path_factory, monkeypatch):
    """The relative path leads from where the folder is, not from where the link is; and so for a linked base."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (here / "far" / "away").mkdir(parents=True)
    link(elsewhere / "adapters", here / "far" / "away")
    link(here / "base", here / "models" / "one")
    for base in ("models/one", "base"):
        folder = make_adapter(base, elsewhere / "adapters" / "legal")
        assert (folder / provenance_of(folder)["base"]["path"]).samefile(here / "models" / "one")
        assert Path(base_of({"legal": here / "far" / "away" / "legal"})).samefile(here / "models" / "one")
    link(here / "far" / "legal", here / "runs" / "legal")
    monkeypatch.chdir(here / "far")
    assert base_of({"legal": here / "far" / "legal"}).samefile(here / "models" / "one")


def test_between_two_drives_the_path_is_absolute(here, monkeypatch):
    """Windows has no relative path from one drive to another."""

    def relpath(path, start):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr("os.path.relpath", relpath)
    folder = make_adapter("models/one", here / "runs" / "other")
    assert provenance_of(folder)["base"]["path"] == (here / "models" / "one").resolve().as_posix()
    assert base_of({"other": folder}).samefile(here / "models" / "one")


def test_a_base_that_is_gone_is_named_with_what_to_do(here):
    shutil.rmtree(here / "models" / "one")
    refusal(lambda: load_with_adapters({"legal": here / "runs" / "legal"}), "runs/legal", "models/one", "--base")


def test_an_exported_adapter_finds_its_base_also_when_both_were_moved(here):
    export(None, here / "runs" / "legal", here / "files" / "legal.gguf")
    assert base_of({"legal": here / "files" / "legal.gguf"}).samefile(here / "models" / "one")
    (here / "elsewhere").mkdir()
    for name in ("models", "files"):
        (here / name).rename(here / "elsewhere" / name)
    moved = here / "elsewhere" / "files" / "legal.gguf"
    assert base_of({"legal": moved}).samefile(here / "elsewhere" / "models" / "one")
    shutil.rmtree(here / "elsewhere" / "models")
    refusal(lambda: load_with_adapters({"legal": moved}), "legal.gguf", "models/one", "--base")


def test_an_adapter_that_names_no_base_is_taken_for_one_of_the_real_model(here, caplog):
    caplog.set_level("INFO", "minilora")
    (here / "runs" / "legal" / NOTES).unlink()
    rewrite(here / "runs" / "legal", {"base_model_name_or_path": None})
    assert base_of({}) == "smollm2" and not caplog.messages
    assert base_of({"legal": here / "runs" / "legal"}) == "smollm2"
    assert caplog.messages == [f"{here / 'runs' / 'legal'} names no base: smollm2 is taken, or another with --base"]


def test_adapters_of_two_bases_are_refused_and_a_copy_of_a_base_is_the_same(here):
    legal, support = here / "runs" / "legal", make_adapter("models/two", here / "runs" / "support")
    named = {"legal": legal, "support": support}
    with pytest.raises(
        ModelFileError, match="^legal was made for .*models/one, support for .*models/two, but .*--base$"
    ):
        base_of(named)
    shutil.copytree(here / "models" / "one", here / "models" / "copy")
    make_adapter("models/copy", support, seed=1)
    assert base_of(named).name == "one"
    load_with_adapters(named)
    for folder, place in ((support, "models/copy"), (legal, "models/one")):  # as PEFT writes them, without a hash: one
        (folder / NOTES).unlink()  # of them, then both, which could be any two bases
        rewrite(folder, {"base_model_name_or_path": place})
        refusal(lambda: base_of(named), "legal was made for", "models/copy")
    rewrite(support, {"base_model_name_or_path": "models/one"})
    assert Path(base_of(named)).name == "one"


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
    said = "made for models/one with sha256 {}; this model has the same shape, but sha256 {}".format(*hashes)
    refusal(lambda: load_with_adapters(named, base="models/two"), said, "--force")
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
        loading = partial(load_with_adapters, {"legal": here / "runs" / "legal"}, base="tiny", force=force)
        refusal(loading, "models/one", "width 32", "this model has", "width 128")


def test_a_packed_base_is_the_base(here):
    file = write_gguf(here / "small.gguf", new_llama(), "Q8_0")
    folder = make_adapter(file, here / "runs" / "packed")
    model, _ = load_with_adapters({"packed": folder}, quantized=True)
    ml.set_adapter(model, "packed")
    again = ml.save_adapter(model, here / "again", "packed")
    assert provenance_of(again)["base"]["sha256"] == provenance_of(folder)["base"]["sha256"]
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


def test_a_damaged_file_is_refused_by_its_name_with_and_without_a_base(here):
    legal = here / "runs" / "legal"
    (legal / NOTES).write_text('{"base": {"name": 3}}')
    for base in (None, "models/one"):
        refusal(partial(load_with_adapters, {"legal": legal}, base), f"legal/{NOTES}")
    (legal / NOTES).unlink()
    rewrite(legal, {"base_model_name_or_path": ["smollm2"]})
    for base in (None, "models/one"):
        refusal(partial(load_with_adapters, {"legal": legal}, base), CONFIG_FILE, "is a list")


def test_a_base_on_the_hub_is_named_with_the_revision_of_pefts_config(here):
    folder = here / "runs" / "legal"
    (folder / NOTES).unlink()
    for revision, name in ((None, "org/base"), ("v2", "org/base@v2")):
        rewrite(folder, {"base_model_name_or_path": "org/base", "revision": revision})
        refusal(partial(base_of, {"legal": folder}), f"made for the base {name}, which is not here: give its folder")
