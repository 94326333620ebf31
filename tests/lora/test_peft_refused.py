"""Adapter folders that do not fit are refused, the model stays as it was, and files appear whole or not at all."""

import dataclasses
import shutil

import numpy as np
import pytest
from peftfiles import CONFIG, FIRST, NOTES, WEIGHTS, adapted, change_tensors, refused, rewrite
from smallmodels import logits, new_model

from minilora.files import disk
from minilora.files.tensors import read_tensors, write_tensors
from minilora.lora.adapters import base_state
from minilora.lora.peft import load_adapter, save_adapter
from minilora.nn.llama import Config, Llama

A = f"{FIRST}.lora_A.weight"


def test_tensors_that_do_not_fit_are_named(base, folder):
    model, before = base(), (folder / WEIGHTS).read_bytes()

    def refused_with(change, *words):
        (folder / WEIGHTS).write_bytes(before)
        change_tensors(folder, **change)
        refused(model, folder, *words)

    for name in (A, f"{FIRST}.lora_B.weight"):
        refused_with({name: None}, str(folder / WEIGHTS), f"missing {name}")
    for name in (
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",  # the config does not select it
        "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",  # no such block
        f"{FIRST}.lora_magnitude_vector",
        f"{FIRST}.weight",
        "x",
    ):
        refused_with({name: np.ones((4, 32), np.float32)}, f"unexpected {name}")
    for shape in ((32, 4), (5, 32), (4, 31), (128,), (1, 4, 32)):
        refused_with({A: np.ones(shape, np.float32)}, A, str(shape), "(4, 32)")
    for dtype, value in ((np.float32, np.nan), (np.float32, -np.inf), (np.float16, np.inf)):
        w = np.zeros((4, 32), dtype)
        w[2, 7] = value
        refused_with({A: w}, A, "NaN or infinity")
    refused_with({A: np.ones((4, 32), np.int32)}, WEIGHTS, "I32")
    write_tensors(folder / WEIGHTS, {"x": np.ones((4, 32), np.float32)})
    refused(model, folder, WEIGHTS, "missing", "more)")
    write_tensors(folder / WEIGHTS, {})
    refused(model, folder, f"a rank of 4, but no tensor of {WEIGHTS}")
    (folder / WEIGHTS).write_bytes(before)
    rewrite(folder, {"r": 8})
    refused(model, folder, "(4, 32)", "expected (8, 32)")


@pytest.mark.parametrize(
    ("targets", "word"),
    [
        (["c_attn"], "'c_attn' matches no module"),
        (["q_proj", "v_prj"], "unexpected base_model.model.model.layers.0.self_attn.v_proj"),
        ("q_prj", "'q_prj' matches no module"),
        (["q_proj", "lm_head"], "shares its matrix"),
    ],
    ids=str,
)
def test_targets_that_the_model_does_not_have_are_refused(base, folder, targets, word):
    rewrite(folder, {"target_modules": targets})
    refused(base(), folder, word, error=ValueError)


def test_an_adapter_of_a_larger_model_is_refused_with_both_shapes(folder):
    small = Llama(Config(64, 16, 16, 1, 2, 2))
    refused(small, folder, "with 2 blocks, width 32", "this model has 1 blocks, width 16", "2 query heads")
    (folder / NOTES).unlink()  # as PEFT would write it
    refused(small, folder, WEIGHTS, "made for a model of width 32, this one has width 16")
    refused(Llama(Config(64, 32, 48, 1, 4, 2)), folder, "unexpected")


def test_a_name_that_is_taken_is_refused(base, folder):
    refused(adapted(base()), folder, "already has an adapter called 'default'", error=ValueError)


def test_files_that_are_missing_damaged_or_cut_off_are_named(base, folder, tmp_path):
    model = base()
    refused(model, tmp_path / "absent", "absent", "no such file")
    for file, contents in (
        (CONFIG, (b"", b"{", b"[]", b"null", b"17", b'"r"', b"\xff\xfe", b"[" * 100_000, b'{"peft_type": "LORA"}')),
        (WEIGHTS, tuple((folder / WEIGHTS).read_bytes()[:n] for n in (0, 20, 2000, -4))),
    ):
        before = (folder / file).read_bytes()
        for content in contents:
            (folder / file).write_bytes(content)
            refused(model, folder, str(folder / file), *(["damaged"] if file == WEIGHTS else []))
        (folder / file).unlink()
        refused(model, folder, str(folder / file), "no such file")
        (folder / file).write_bytes(before)
    change_tensors(folder, x=np.ones(3, np.float32))
    other = adapted(base(), name="other")
    before = logits(other)
    refused(other, folder, "unexpected x")
    assert list(other.adapters) == ["other"] and logits(other).tobytes() == before.tobytes()


# -- files appear whole or not at all ----------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [1, 2], ids=["weights", "config"])
def test_a_failed_save_leaves_the_old_files_or_whole_new_ones_and_nothing_else(base, folder, monkeypatch, failing):
    flush, flushed, before = disk._flush, [], {path.name: path.read_bytes() for path in folder.iterdir()}

    def half(path):
        flushed.append(path)
        if len(flushed) == failing:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            raise OSError(28, "No space left on device")
        flush(path)

    monkeypatch.setattr(disk, "_flush", half)
    with pytest.raises(OSError, match="the disk is full"):
        save_adapter(adapted(base()), folder, overwrite=True)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after == before | {WEIGHTS: after[WEIGHTS]} and read_tensors(folder / WEIGHTS)
    assert (after == before) == (failing == 1)


def test_an_adapter_on_an_embedding_is_refused_in_one_line(base, folder):
    a, b = np.zeros((3, 64), np.float32), np.zeros((32, 3), np.float32)
    table = "base_model.model.model.embed_tokens.lora_embedding"
    change_tensors(folder, **{f"{table}_A": a, f"{table}_B": b})
    refused(base(), folder, f"{table}_A: minilora does not support adapters on embeddings", "merge_and_unload")


@pytest.mark.parametrize("tied", [True, False])
def test_the_tables_of_the_base_that_peft_saves_as_well_are_left_out(tiny_config, tmp_path, tied):
    """PEFT does it wherever its model has another vocabulary than the base's folder, and with save_embedding_layers."""
    model = new_model(dataclasses.replace(tiny_config, tie_word_embeddings=tied))
    table = base_state(model)["model.embed_tokens.weight"][1:]
    folder = save_adapter(adapted(model, target_modules=["q_proj"] if tied else ["q_proj", "lm_head"]), tmp_path)
    names = ("model.embed_tokens.weight", "lm_head.weight" if tied else "lm_head.base_layer.weight")
    change_tensors(folder, **{f"base_model.model.{name}": table for name in names})
    load_adapter(model, folder, "again")
    assert list(model.adapters) == ["default", "again"]


def test_a_pickled_adapter_and_a_folder_of_adapters_are_told_from_an_empty_one(base, folder, tmp_path):
    (outside := tmp_path / "outside").mkdir()
    refused(base(), outside, "no such file", "`minilora runs` lists")
    (outside / "checkpoint-0").mkdir()
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(folder, outside / name)
    refused(base(), outside, "no such file", "such as its checkpoint-1, checkpoint-2")
    shutil.copy(folder / WEIGHTS, folder / "adapter_model.bin")
    load_adapter(base(), folder)
    (folder / WEIGHTS).unlink()
    refused(base(), folder, "adapter_model.bin: nothing is unpickled: load it with PEFT, and save it again")
