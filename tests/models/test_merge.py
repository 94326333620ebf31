"""Merged models as files: they compute the same, appear whole or not at all, and their losses are reported."""

import json
import os
import weakref
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from modelfiles import CHATML, CONFIG, IDS, new_llama, new_tokenizer, write_gguf
from peftfiles import link
from smallmodels import logits

from minilora.cli import main
from minilora.engine.backend import is_packed
from minilora.files.disk import ModelFileError
from minilora.files.gguf_header import read_header
from minilora.lora.adapters import adapter_state, add_adapter, merge_adapter, set_adapter, unmerge_adapter
from minilora.lora.config import LoraConfig
from minilora.lora.peft import load_adapter, save_adapter
from minilora.lora.provenance import read_provenance
from minilora.models import load as zoo
from minilora.models import merge as merging
from minilora.models.folder import save_folder
from minilora.models.gguf import GGUF
from minilora.models.merge import export, merge, save_model
from minilora.models.with_adapters import load_with_adapters
from minilora.nn.gemma3 import Gemma3, Gemma3Config
from minilora.nn.module import Module

QUERY = "model.layers.0.self_attn.q_proj.weight"
TEXTS = ["hello 12 hello", "  naïve\n\n<|im_start|>user 345<|im_end|>", "東京 ½²", ""]


def adapted(model, size=0.2, **settings):
    """The model with an adapter that changes its output."""
    add_adapter(model, LoraConfig(**({"r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings)))
    for array in adapter_state(model, "default").values():
        array *= np.float32(size)
    return model


def saved(model, folder):
    """The model's adapter as PEFT would write it: for any base that it fits, packed ones, too."""
    save_adapter(model, folder)
    (folder / "minilora.json").unlink()
    return folder


@pytest.fixture
def folder(tmp_path):
    return save_folder(tmp_path / "base", CONFIG, new_llama().state_dict(), new_tokenizer())


@pytest.fixture
def adapter(tmp_path):
    return saved(adapted(new_llama()), tmp_path / "adapter")


def expected_logits(base, adapter):
    """Of base and adapter side by side, and of the two merged in memory."""
    model, _ = zoo.load(base)
    load_adapter(model, adapter)
    beside = logits(model, IDS)
    merge_adapter(model)
    return beside, logits(model, IDS)


# -- merge -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["hf", "gguf"])
@pytest.mark.parametrize("base", ["folder", "F32", "Q8_0", "Q4_1"])
def test_a_merged_model_in_float32_has_the_merged_logits_bit_for_bit(base, format, folder, adapter, tmp_path):
    path = folder if base == "folder" else write_gguf(tmp_path / "base.gguf", new_llama(), base)
    out = tmp_path / ("my model.gguf" if format == "gguf" else "merged")
    report = merge(path, adapter, out, kind="F32")
    beside, inside = expected_logits(path, adapter)
    model, tokenizer = zoo.load(out)
    assert logits(model, IDS).tobytes() == inside.tobytes() and report.logit_error == 0
    assert np.abs(inside - beside).max() < 1e-3
    assert np.abs(inside - logits(zoo.load(path)[0], IDS)).max() > 0.1
    assert "bit for bit" in str(report)
    original = zoo.load(path)[1]
    for text in TEXTS if path.is_dir() else TEXTS[:1]:
        assert tokenizer.encode(text) == original.encode(text)
    assert (tokenizer.eos, tokenizer.bos, tokenizer.pad_id, tokenizer.template) == (
        original.eos,
        original.bos,
        original.pad_id,
        original.template,
    )


def test_what_a_file_of_the_family_rounds_is_no_difference(rng, tmp_path):
    tokenizer = new_tokenizer()
    model = Gemma3(Gemma3Config(len(tokenizer), 32, 48, 2, 2, 1, 8), rng)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):  # with one added, and subtracted as it is read
            p.data = rng.normal(0, 0.1, p.shape).astype(np.float32)
    base = save_folder(tmp_path / "base", model.config, model.state_dict(), tokenizer)
    report = merge(base, saved(adapted(model), tmp_path / "adapter"), tmp_path / "merged.gguf", kind="F32")
    assert report.logit_error < 1e-3


def test_a_model_with_a_layer_that_no_file_of_its_family_has_is_not_saved(tmp_path):
    class Held(Module):
        def __init__(self, base):
            self.base = base

    model, path = new_llama(), "model.layers.0.mlp.up_proj"
    model.set_submodule(path, Held(model.get_submodule(path)))
    with pytest.raises(ValueError, match=rf"^{path}.base.weight is not a parameter of a llama model"):
        save_model(model, new_tokenizer(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["folder", "model.gguf"])
def test_a_model_in_memory_is_saved_as_it_computes(name, tied, tmp_path):
    model, tokenizer = new_llama(tie_word_embeddings=tied), new_tokenizer()
    save_model(model, tokenizer, tmp_path / name, "F32")
    np.testing.assert_array_equal(logits(zoo.load(tmp_path / name)[0], IDS), logits(model, IDS))
    adapted(model, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="not merged: call merge_adapter"):
        save_model(model, tokenizer, tmp_path / "other")
    merge_adapter(model)
    with pytest.raises(ValueError, match="exists: choose"):
        save_model(model, tokenizer, tmp_path / name)
    if name == "folder":
        (tmp_path / name / ".DS_Store").write_text("")  # Finder has shown it
    save_model(model, tokenizer, tmp_path / name, "F16", overwrite=True)
    merged = logits(model, IDS)
    np.testing.assert_allclose(logits(zoo.load(tmp_path / name)[0], IDS), merged, atol=1e-2 * np.abs(merged).max())


@pytest.mark.parametrize(
    ("name", "kind", "limit"),
    [("merged", "f16", 2e-3), ("m.gguf", "F16", 2e-3), ("m.gguf", "Q8_0", 5e-2), ("m.gguf", "Q4_1", 0.5)],
)
def test_other_types_stay_within_their_rounding_and_report_it(name, kind, limit, folder, adapter, tmp_path):
    """The report has the largest difference of a logit, over 32 tokens."""
    report = merge(folder, adapter, tmp_path / name, kind=kind)
    ids = (np.arange(32) * 7919 % CONFIG.vocab_size).reshape(2, 16)
    model, _ = zoo.load(folder)
    load_adapter(model, adapter)
    merge_adapter(model)
    expected, got = logits(model, ids), logits(zoo.load(report.path)[0], ids)
    assert report.logit_error == pytest.approx(np.abs(got - expected).max(), rel=1e-5)
    assert report.largest_logit == pytest.approx(np.abs(expected).max(), rel=1e-5)
    assert 0 < report.logit_error < limit * report.largest_logit and f"{report.logit_error:.2g}" in str(report)
    files = list(report.path.iterdir()) if name == "merged" else [report.path]
    assert report.bytes == sum(file.stat().st_size for file in files) and report.matrices == 14
    if name == "merged":
        assert json.loads((report.path / "config.json").read_text())["dtype"] == "float16"
        return
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(report.path).tensors}
    assert kinds["blk.0.ffn_up.weight"] == kind and kinds["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize(("tied", "targets", "count"), [(True, ["q_proj"], 2), (False, ["lm_head"], 1)], ids=str)
def test_only_adapted_matrices_are_counted(tied, targets, count, tmp_path):
    base = new_llama(tie_word_embeddings=tied)
    file = write_gguf(tmp_path / "base.gguf", base, "Q4_1")
    adapter = saved(adapted(new_llama(tie_word_embeddings=tied), target_modules=targets), tmp_path / "adapter")
    for name in ("merged", "merged.gguf"):
        report = merge(file, adapter, tmp_path / name, kind="F32")
        model, _ = zoo.load(report.path)
        assert model.config.tie_word_embeddings == tied and report.logit_error == 0
        assert report.matrices == count
        np.testing.assert_allclose(logits(model, IDS), expected_logits(file, adapter)[0], atol=2e-4)


def test_what_a_gguf_base_says_is_copied_with_its_types(tmp_path, adapter):
    """All but how an adapter was trained that was merged into it before."""
    change = {"general.name": "Small", "llama.vocab_size": 320, "tokenizer.chat_template": CHATML}
    change["minilora.data"] = json.dumps({"system": "Be kind."})
    file = write_gguf(tmp_path / "base.gguf", new_llama(), "Q8_0", change=change)
    out = merge(file, adapter, tmp_path / "merged.gguf").path
    old, new = (
        {k: (f.contents(), f.types) for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
        for path in (file, out)
    )
    assert new.pop("general.file_type")[0] == 1 and new.pop("general.quantization_version")[0] == 2
    assert new.pop("general.type")[0] == "model" and old.pop("minilora.data")
    assert new == old


@pytest.mark.parametrize("stored", [None, CHATML])
@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_llama_cpp_gets_the_chat_template_that_minilora_asks_with(kind, stored, adapter, tmp_path):
    """In the merged file; next to an adapter's file, if the base's files have none."""
    if kind == "gguf":
        base = write_gguf(tmp_path / "base.gguf", new_llama(), change={"tokenizer.chat_template": stored})
    else:
        base = save_folder(tmp_path / "base", CONFIG, new_llama().state_dict(), new_tokenizer())
        settings = json.loads((base / "tokenizer_config.json").read_text()) | {"chat_template": stored}
        (base / "tokenizer_config.json").write_text(json.dumps(settings))
    template = zoo.load(base)[1].template
    out = merge(base, adapter, tmp_path / "merged.gguf").path
    assert GGUF(out).metadata["tokenizer.chat_template"] == template
    report = export(base, adapter, tmp_path / "lora.gguf")
    beside = tmp_path / "lora.jinja"
    assert report.template == (None if stored else beside) and beside.exists() == (stored is None)
    assert (f"--jinja --chat-template-file {beside}" in str(report)) == beside.exists()
    if beside.exists():
        assert beside.read_text() == template


@pytest.mark.parametrize("write", [merge, export])
def test_what_a_user_edited_next_to_a_file_is_written_over_only_when_asked(write, folder, adapter, tmp_path):
    (tmp_path / "m.jinja").write_text("mine")
    with pytest.raises(ValueError, match="m.jinja exists: choose another name, or --overwrite"):
        write(folder, adapter, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("m.")] == ["m.jinja"]
    assert (tmp_path / "m.jinja").read_text() == "mine"
    assert write(folder, adapter, tmp_path / "m.gguf", overwrite=True).path.exists()


def test_a_file_of_any_name_is_merged_as_the_gguf_file_that_it_is(adapter, tmp_path):
    bases = [write_gguf(tmp_path / name, new_llama(), "Q8_0") for name in ("base.gguf", "sha256-0a1b")]
    one, other = (merge(base, adapter, tmp_path / f"{base.name}-merged.gguf").path.read_bytes() for base in bases)
    assert one == other


ASKED = {"labels": ["a", "b"], "schema": {}, "context_template": "x", "system": "Be kind."}


@pytest.mark.parametrize(
    "data",
    [{}, {"records": 3}, *({key: value} for key, value in ASKED.items()), ASKED],
    ids=str,
)
def test_what_is_written_knows_how_its_adapter_was_trained_and_says_which_programs_do_not(
    data, folder, adapter, tmp_path
):
    files = {"path": "../mine.csv", "context_path": "../book.txt"} if data else {}
    data = data | files
    (adapter / "minilora.json").write_text(json.dumps({"format": 1, "data": data}))
    for write, name, other in (
        (merge, "merged", "transformers does"),
        (merge, "merged.gguf", "llama.cpp does"),
        (export, "adapter.gguf", "llama.cpp does"),
    ):
        out = tmp_path / "a" / name
        lines = str(write(folder, adapter, out)).splitlines()
        model = zoo.load(out)[0] if write is merge else load_with_adapters({"a": out}, folder)[0]
        stored = model.data if write is merge else model.adapters["a"].data
        assert stored | files == data
        for key, file in files.items():
            assert os.path.normpath(out / stored[key]) == os.path.normpath(adapter / file)
        told = [i for i, line in enumerate(lines) if f"; {other} not read that:" in line]
        assert bool(told) == (not data.keys().isdisjoint(ASKED))
        if told:
            words = {"labels": "labels", "schema": "fields", "context_template": "passage"}
            words["system"] = "system prompt"
            assert {key for key, word in words.items() if word in lines[told[0]]} == data.keys() & ASKED.keys()
            for_mlx = export(folder, adapter, tmp_path / f"mlx {name}".replace(".", " "), format="mlx")
            assert "mlx-lm does not read that:" in str(for_mlx)


@pytest.mark.parametrize("name", ["saved", "saved.gguf"])
def test_a_model_that_is_saved_from_memory_knows_how_it_was_trained(name, folder, adapter, tmp_path):
    data, out = {"labels": ["a", "b"], "path": "../mine.csv"}, tmp_path / "there" / name

    def known(model):
        save_model(model, new_tokenizer(), out, overwrite=True)
        return zoo.load(out)[0].data

    def leads(stored):
        return stored | {"path": os.path.normpath(out / stored["path"])}

    (adapter / "minilora.json").write_text(json.dumps({"format": 1, "data": data}))
    there = data | {"path": os.path.normpath(adapter / data["path"])}
    two = load_with_adapters({"a": adapter, "b": adapter}, folder)[0]
    set_adapter(two, "a")
    merge_adapter(two)
    assert leads(known(two)) == there
    merge(folder, adapter, tmp_path / "whole")
    whole = zoo.load(tmp_path / "whole")[0]
    assert leads(known(whole)) == there
    adapted(whole)
    merge_adapter(whole)  # an adapter of which nothing is known
    assert leads(known(whole)) == there
    unmerge_adapter(two)
    set_adapter(two, {"a": 0.5, "b": 0.5})
    merge_adapter(two)
    assert known(two) == known(zoo.load(folder)[0]) == {}


@pytest.mark.parametrize(
    ("stored", "words"),
    [("{", "not readable as JSON"), (3, "not readable as JSON"), ("[]", "data is a list, expected an object"),
     ('{"system": 3}', "system of the data is a int, expected a text")],
)  # fmt: skip
def test_a_file_that_says_nonsense_of_its_training_is_refused(stored, words, tmp_path):
    path = write_gguf(tmp_path / "base.gguf", new_llama(), change={"minilora.data": stored})
    with pytest.raises(ModelFileError, match=f"base.gguf: .*{words}"):
        zoo.load(path)


@pytest.mark.parametrize("stored", ["Q4_1", "Q5_1", "MXFP4"])
def test_matrices_that_the_adapter_leaves_alone_keep_their_packed_bytes(stored, tmp_path, caplog):
    """In the merged file, of several kinds, those that minilora cannot keep packed are named."""
    adapter = saved(adapted(new_llama(), target_modules=["q_proj"]), tmp_path / "adapter")
    file = write_gguf(tmp_path / "base.gguf", new_llama(), stored)
    for kind in ("Q8_0", "Q4_1"):
        out = merge(file, adapter, tmp_path / f"{kind}.gguf", kind=kind).path
        old, new = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (file, out))
        for name, tensor in old.items():
            if "attn_q" in name:
                assert new[name].tensor_type.name == kind
            else:
                assert new[name].data.tobytes() == tensor.data.tobytes(), name
                assert new[name].tensor_type == tensor.tensor_type
        caplog.clear()
        matrices = [w for w in zoo.load(out, quantized=True)[0].state_dict().values() if w.ndim == 2]
        assert sum(map(is_packed, matrices)) == (len(matrices) if stored == "Q4_1" else 2)
        said = f"{out}: 13 of 15 matrices become float32, because minilora does not keep {stored} in memory: get "
        assert [message[: len(said)] for message in caplog.messages] == [said] * (stored != "Q4_1")
    if stored != "Q4_1":
        with pytest.raises(
            ModelFileError, match=f"no quantised matrices that can stay so in memory, only F32, {stored}"
        ):
            zoo.load(file, quantized=True)


def test_what_the_base_was_quantised_to_in_training_is_reported_but_not_bfloat16(folder, adapter, tmp_path):
    reports = []
    for rounded in (None, "bf16", "nf4"):
        (adapter / "minilora.json").write_text(json.dumps({"base": {"rounded_to": rounded} if rounded else {}}))
        for format in ("gguf", "mlx"):
            exported = export(folder, adapter, tmp_path / f"{rounded}{'.gguf' * (format == 'gguf')}", format=format)
            assert ("was trained on it quantised to nf4" in str(exported)) == (rounded == "nf4")
        reports.append(merge(folder, adapter, tmp_path / "merged", overwrite=True))
    plain, half, packed = map(str, reports)
    assert half == plain and "was trained on it quantised to nf4" in packed


# -- export ------------------------------------------------------------------------------------------------------------


def test_an_exported_adapter_can_be_merged_and_both_ways_agree(folder, adapter, tmp_path, capsys):
    out = tmp_path / "adapter.gguf"
    assert main(["export", "--base", str(folder), "--adapter", str(adapter), "--out", str(out)]) == 0
    assert f"{out.stat().st_size / 1e6:,.1f} MB, 14 matrices" in capsys.readouterr().out
    words = ["export", "--base", folder, "--adapter", adapter, "--out", tmp_path / "half.gguf", "--dtype", "float16"]
    assert main([str(word) for word in words]) == 0
    assert {tensor.kind for tensor in read_header(tmp_path / "half.gguf").tensors} == {"F16"}
    first = tmp_path / "first.gguf"
    words = ["merge", "--base", folder, "--adapter", adapter, "--out", first, "--type", "f32"]
    assert main([str(word) for word in words]) == 0 and f"{first}: F32, " in capsys.readouterr().out
    second = merge(folder, out, tmp_path / "second.gguf", kind="F32").path
    assert first.read_bytes() == second.read_bytes()


def test_an_exported_adapter_names_its_base_as_it_was_called_not_where_it_is_here(tmp_path, monkeypatch):
    """Otherwise it does not find a named base on another machine, where that has another path."""
    monkeypatch.chdir(tmp_path)
    save_adapter(adapted(zoo.load("tiny")[0]), "adapter")
    for base in (None, "tiny"):
        out = export(base, "adapter", "lora.gguf", overwrite=True).path
        entry = read_provenance(out)["base"]
        assert entry == read_provenance(Path("adapter"))["base"] and entry["name"] == "tiny" and "path" not in entry


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "flags", "words"),
    [
        ("merged", ["--type", "q8_0"], ("hf", "Q8_0", "F32, F16")),
        ("merged.gguf", ["--format", "hf", "--type", "q8_0"], ("Q8_0",)),
        ("merged.gguf", ["--format", "hf"], ("merged.gguf", "folder", "choose another name")),
        ("merged", ["--format", "gguf"], ("merged", "must end in .gguf")),
    ],
)
def test_a_type_or_a_name_that_the_format_does_not_have_is_a_wrong_argument(
    out, flags, words, folder, adapter, tmp_path, capsys
):
    arguments = ["merge", "--base", str(folder), "--adapter", str(adapter), "--out", str(tmp_path / out), *flags]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words)
    assert not (tmp_path / out).exists()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def spellings(path, monkeypatch):
    """Other names for one place: with dots, relative, and through a link."""
    name = path.with_name(f"link-{path.name}")
    link(name, path)
    monkeypatch.chdir(path.parent)
    return [path, path.parent / "adapter" / ".." / path.name, path.name, name]


@pytest.mark.parametrize("overwrite", [False, True])
def test_base_and_adapter_are_not_written_over_under_any_spelling(overwrite, folder, adapter, tmp_path, monkeypatch):
    base = write_gguf(tmp_path / "base.gguf", new_llama())
    packed_adapter = export(folder, adapter, tmp_path / "adapter.gguf").path
    before = contents(tmp_path)
    for place, writes, given, what in (
        (folder, [merge], (folder, adapter), "base"),
        (base, [merge, export], (base, adapter), "base"),
        (packed_adapter, [merge, export], (base, packed_adapter), "adapter"),
    ):
        for spelling in spellings(place, monkeypatch):
            for write in writes:
                with pytest.raises(ValueError, match=f"is the {what} itself"):
                    write(*given, spelling, overwrite=overwrite)
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_are_never_written_over(overwrite, folder, adapter, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "folder.gguf").mkdir()
    other = save_adapter(adapted(new_llama()), tmp_path / "other")
    before = contents(tmp_path)
    for out in (other, tmp_path / "full", folder / "config.json"):  # next to an adapter, transformers would add that
        with pytest.raises(ValueError, match="new or empty"):
            merge(folder, adapter, out, overwrite=overwrite)
    for write in (merge, export):
        with pytest.raises(ValueError, match="is a folder"):
            write(folder, adapter, tmp_path / "folder.gguf", overwrite=overwrite)
    with pytest.raises(ValueError, match="must end in .gguf"):
        export(folder, adapter, tmp_path / "adapter.bin", overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_model_that_is_there_is_written_over_only_when_asked(folder, adapter, tmp_path):
    for write, name, word in (
        (merge, "m.gguf", "another name"),
        (export, "a.gguf", "another name"),
        (merge, "m", "new"),
        (partial(export, format="mlx"), "mlx", "new"),
    ):
        out = write(folder, adapter, tmp_path / name).path
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=f"exists: choose.*{word}.*--overwrite"):
            write(folder, adapter, out)
        assert contents(tmp_path) == before
        if out.is_dir():  # what holds other files would be replaced whole
            to_mlx = write is merge
            other, what = (partial(export, format="mlx"), "an adapter of") if to_mlx else (merge, "a whole model")
            with pytest.raises(ValueError, match=f"exists: choose.*replaces only {what}"):
                other(folder, adapter, out, overwrite=True)
        (out if out.is_file() else next(out.glob("*config.json"))).write_bytes(b"old")
        write(folder, adapter, out, overwrite=True)
        assert contents(tmp_path) == before


# -- files appear whole or not at all ----------------------------------------------------------------------------------


def test_a_failed_merge_leaves_no_folder_and_no_file(folder, adapter, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minilora.models.folder.write_tensors", full)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    for name in ("merged", "merged.gguf"):
        with pytest.raises(OSError, match="the disk is full"):
            merge(folder, adapter, tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before


def test_folders_on_the_way_are_made_and_an_empty_one_is_filled(folder, adapter, tmp_path):
    (tmp_path / "merged").mkdir()
    for write, name in ((merge, "merged"), (merge, "new/m"), (merge, "x/new/m.gguf"), (export, "y/new/a.gguf")):
        assert write(folder, adapter, tmp_path / name).path.exists()


@pytest.mark.parametrize("name", ["merged", "merged.gguf"])
def test_numbers_too_large_for_float16_are_refused_by_name_and_nothing_is_written(name, tmp_path, adapter):
    model = new_llama()
    dict(model.named_parameters())["model.layers.1.mlp.down_proj.weight"].data[3, 4] = 1e6
    base = save_folder(tmp_path / "base", CONFIG, model.state_dict(), new_tokenizer())
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight.*too large for (float|F)16"):
        merge(base, adapter, tmp_path / name, kind="F16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


# -- what is written is read back --------------------------------------------------------------------------------------


def spoil(path, place):
    """Change one number of a written file, as a bad disk would: a float32 that stays finite."""
    path = path / "model.safetensors" if path.is_dir() else path
    content = bytearray(path.read_bytes())
    number = np.frombuffer(content, np.float32, 1, len(content) - place)
    content[len(content) - place : len(content) - place + 4] = (number + np.float32(5)).tobytes()
    path.write_bytes(content)


def after(monkeypatch, name, then):
    """Let a function of merge.py do its work, and then something to the file that it returns."""
    write = getattr(merging, name)
    monkeypatch.setattr(merging, name, lambda *a, **k: (path := write(*a, **k), then(path))[0])


@pytest.mark.parametrize(("name", "function"), [("merged", "save_folder"), ("merged.gguf", "save_gguf")])
def test_a_float32_model_that_reads_back_otherwise_is_refused(name, function, folder, adapter, tmp_path, monkeypatch):
    after(monkeypatch, function, lambda path: spoil(path, place=4000))
    with pytest.raises(ModelFileError, match=r"merged.*model\..*in the written file differs") as caught:
        merge(folder, adapter, tmp_path / name, kind="F32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"), [("merged", "F32"), ("merged", "F16"), ("merged.gguf", "F32"), ("m.gguf", "Q4_1")]
)
def test_no_model_is_in_memory_next_to_another_one_that_is_written_or_read(
    name, kind, folder, adapter, tmp_path, monkeypatch
):
    """They may be too large for that."""
    held = {"base": [], "merged": []}
    load, write, read = merging.load_with_adapters, merging._write, merging._read

    def loaded(*given, **how):
        model, tokenizer = load(*given, **how)
        held["base"] = [weakref.ref(model), *(weakref.ref(p.data) for n, p in model.named_parameters() if n == QUERY)]
        return model, tokenizer

    def written(out, format, kind, config, state, *rest):
        assert len(held["base"]) == 2 and not any(each() is not None for each in held["base"])
        held["merged"] = [weakref.ref(w) for w in state.values()]
        write(out, format, kind, config, state, *rest)

    def read_back(out):
        assert len(held["merged"]) > 9 and not any(each() is not None for each in held["merged"])
        return read(out)

    monkeypatch.setattr(merging, "load_with_adapters", loaded)
    monkeypatch.setattr(merging, "_write", written)
    monkeypatch.setattr(merging, "_read", read_back)
    assert merge(folder, adapter, tmp_path / name, kind=kind).path.exists()


def test_an_exported_adapter_that_reads_back_otherwise_shows_in_the_check(folder, adapter, tmp_path, monkeypatch):
    honest = export(folder, adapter, tmp_path / "honest.gguf")
    assert honest.logit_error < 1e-5
    after(monkeypatch, "save_gguf_adapter", lambda path: spoil(path, place=400))
    spoiled = export(folder, adapter, tmp_path / "spoiled.gguf")
    assert spoiled.logit_error > 0.1
    assert f"{spoiled.logit_error:.2g}" in str(spoiled)
