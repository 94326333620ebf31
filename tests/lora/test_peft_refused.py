"""Adapter folders that do not fit are refused, the model stays as it was, and files appear whole or not at all."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from peftfiles import CONFIG, FIRST, NOTES, WEIGHTS, adapted, change_tensors, refused, rewrite
from smallmodels import logits

import minilora as ml
from minilora.files.disk import ModelFileError
from minilora.files.tensors import write_tensors
from minilora.lora.adapters import (
    base_state,
    set_adapter,
)
from minilora.lora.peft import save_adapter
from minilora.nn.llama import Config, Llama


@pytest.mark.parametrize("name", [f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"])
def test_a_missing_tensor_is_named(base, folder, name):
    change_tensors(folder, **{name: None})
    refused(base(), folder, str(folder / WEIGHTS), f"missing {name}")


def test_an_empty_weights_file_is_refused(base, folder):
    write_tensors(folder / WEIGHTS, {})
    refused(base(), folder, WEIGHTS, "missing", "more)")


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",  # the config does not select it
        "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",  # no such block
        f"{FIRST}.lora_magnitude_vector",
        f"{FIRST}.weight",
        "x",
    ],
)
def test_an_unexpected_tensor_is_named(base, folder, name):
    change_tensors(folder, **{name: np.ones((4, 32), np.float32)})
    refused(base(), folder, f"unexpected {name}")


@pytest.mark.parametrize("shape", [(32, 4), (5, 32), (4, 31), (128,), (1, 4, 32)])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(base, folder, shape):
    change_tensors(folder, **{f"{FIRST}.lora_A.weight": np.ones(shape, np.float32)})
    refused(base(), folder, f"{FIRST}.lora_A.weight", str(shape), "(4, 32)")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_that_are_no_numbers_are_named(base, folder, value, dtype):
    w = np.zeros((4, 32), dtype)
    w[2, 7] = value
    change_tensors(folder, **{f"{FIRST}.lora_A.weight": w})
    refused(base(), folder, f"{FIRST}.lora_A.weight", "NaN or infinity")


def test_weights_that_are_not_floating_point_are_refused(base, folder):
    change_tensors(folder, **{f"{FIRST}.lora_A.weight": np.ones((4, 32), np.int32)})
    refused(base(), folder, WEIGHTS, "I32")


def test_a_rank_other_than_that_of_the_tensors_is_refused(base, folder):
    rewrite(folder, {"r": 8})
    refused(base(), folder, "(4, 32)", "expected (8, 32)")


@pytest.mark.parametrize("targets", [["c_attn"], ["q_proj", "v_prj"], "q_prj", ["lm_head"]], ids=str)
def test_targets_that_the_model_does_not_have_are_refused(base, folder, targets):
    rewrite(folder, {"target_modules": targets})
    refused(base(), folder, error=ValueError)


def test_an_adapter_of_a_larger_model_is_refused_with_both_shapes(folder):
    small = Llama(Config(64, 16, 16, 1, 2, 2))
    refused(small, folder, "with 2 blocks, width 32", "this model has 1 blocks, width 16", "2 query heads")
    (folder / NOTES).unlink()  # as PEFT would write it
    refused(small, folder, WEIGHTS, "made for a model of width 32, this one has width 16")
    shallow = Llama(Config(64, 32, 48, 1, 4, 2))
    refused(shallow, folder, "unexpected")


def test_a_name_that_is_taken_is_refused(base, folder):
    refused(adapted(base()), folder, "already has an adapter called 'default'", error=ValueError)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"17", b'"r"', b"\xff\xfe", b"[" * 100_000, b'{"peft_type": "LORA"}']
)
def test_a_config_that_is_no_json_object_or_empty_is_refused(base, folder, content):
    (folder / CONFIG).write_bytes(content)
    refused(base(), folder, str(folder / CONFIG))


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(base, folder, file):
    (folder / file).unlink()
    refused(base(), folder, str(folder / file), "no such file")


def test_a_missing_folder_is_named(base, tmp_path):
    refused(base(), tmp_path / "absent", "absent", "no such file")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_weights_file_that_is_cut_off_is_refused(base, folder, share):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(share * len(content))])
    refused(base(), folder, WEIGHTS, "damaged")


def test_an_adapter_that_is_refused_leaves_those_that_are_there_as_they_were(base, folder):
    model = adapted(base(), name="other")
    before = logits(model)
    change_tensors(folder, x=np.ones(3, np.float32))
    refused(model, folder, "unexpected x")
    assert list(model.adapters) == ["other"] and logits(model).tobytes() == before.tobytes()


# -- files appear whole or not at all ----------------------------------------------------------------------------------


def half_of(write, position):
    """As `write`, whose argument at `position` is a path, but only half arrives there: the disk is full."""

    def broken(*arguments, **settings):
        write(*arguments, **settings)
        path = arguments[position]
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    return broken


def test_a_failed_save_leaves_the_files_of_before_and_no_debris(base, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(safetensors.numpy, "save_file", half_of(safetensors.numpy.save_file, position=1))
    with pytest.raises(OSError, match="No space"):
        save_adapter(adapted(base()), folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_failed_save_leaves_no_half_written_config(base, folder, monkeypatch):
    before = (folder / CONFIG).read_bytes()
    monkeypatch.setattr(Path, "write_text", half_of(Path.write_text, position=0))
    with pytest.raises(OSError, match="No space"):
        save_adapter(adapted(base()), folder, overwrite=True)
    assert (folder / CONFIG).read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, NOTES}


COPIES = {  # of the base's table: is it still the base's?
    "the same": (lambda table: table, True),
    "rounded to half precision": (lambda table: table.astype(np.float16).astype(np.float32), True),
    "off by a twentieth": (lambda table: table * np.float32(1.05), False),
    "another": (lambda table: table[::-1].copy(), False),
    "of another vocabulary": (lambda table: table[1:], False),
}


@pytest.mark.parametrize(("copied", "same"), COPIES.values(), ids=COPIES.keys())
def test_the_table_peft_saves_beside_an_adapted_embedding_must_be_the_bases(tiny_model, tmp_path, copied, same):
    ml.add_adapter(tiny_model, ml.LoraConfig(r=2, lora_alpha=4, target_modules=["embed_tokens"]), "words")
    ml.save_adapter(tiny_model, tmp_path, "words")
    copy = copied(base_state(tiny_model)["model.embed_tokens.weight"])
    change_tensors(tmp_path, **{"base_model.model.model.embed_tokens.base_layer.weight": copy})
    if same:
        ml.load_adapter(tiny_model, tmp_path, "loaded")
        outputs = []
        for name in ("words", "loaded"):
            set_adapter(tiny_model, name)
            outputs.append(logits(tiny_model))
        assert np.array_equal(*outputs)
    else:
        with pytest.raises(ModelFileError, match="another base"):
            ml.load_adapter(tiny_model, tmp_path, "loaded")
        assert list(tiny_model.adapters) == ["words"]
