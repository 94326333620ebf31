"""llama.cpp adapter files mean here what they mean by llama.cpp's rules; tests/parity asks llama.cpp itself."""

import json

import gguf
import numpy as np
import pytest
from cppadapters import adapted, distance, in_llama_cpp, pair, write
from modelfiles import new_llama
from smallmodels import IDS, logits

from minilora.files.disk import ModelFileError
from minilora.files.gguf import write_gguf as write_gguf_file
from minilora.files.gguf_header import read_header
from minilora.files.stored import values_of
from minilora.lora.adapters import adapter_state, lora_modules, remove_adapter
from minilora.lora.llamacpp import load_gguf_adapter, save_gguf_adapter
from minilora.lora.peft import load_adapter, save_adapter
from minilora.lora.provenance import provenance_of_base
from minilora.nn.families import FAMILIES
from minilora.nn.module import sha256_of

SETTINGS = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "every linear layer": {"target_modules": "all-linear"},
    "rsLoRA": {"use_rslora": True, "target_modules": ["q_proj", "k_proj", "down_proj"]},
    "an alpha below one": {"lora_alpha": 0.3},
    "ranks by pattern": {"rank_pattern": {"k_proj": 2, "down_proj": 7}},
    "alphas by pattern": {"alpha_pattern": {"v_proj": 3, r"layers\.0\.mlp\.up_proj": 40}},
    "ranks and alphas with rsLoRA": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 5}},
    "one block only": {"layers_to_transform": 1},
    "PiSSA": {"init_lora_weights": "pissa", "target_modules": ["q_proj", "k_proj", "up_proj"]},
    "the head": {"target_modules": ["lm_head", "q_proj"], "r": 2, "rank_pattern": {"q_proj": 4}},
}


# -- written here, computed by llama.cpp's rules -----------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_an_adapter_means_the_same_there_and_comes_back_from_its_file(settings, tmp_path):
    tied = "lm_head" not in settings.get("target_modules", ())
    model, other = adapted(new_llama(tie_word_embeddings=tied), **settings), new_llama(tie_word_embeddings=tied)
    assert distance(logits(model), logits(other)) > 0.1
    path = save_gguf_adapter(model, tmp_path / "adapter.gguf")
    assert distance(in_llama_cpp(other, path), logits(model)) < 1e-4
    load_gguf_adapter(other, path)
    assert distance(logits(other), logits(model)) < 1e-4
    for name, module in lora_modules(model).items():
        a, b = module.adapters["default"].factors()
        share = lora_modules(other)[name].adapters["default"]
        np.testing.assert_array_equal(share.lora_A.data, a)
        np.testing.assert_allclose(share.delta(), (b * module.adapters["default"].scale) @ a, rtol=1e-5, atol=1e-6)


def test_names_shapes_types_and_metadata_are_llama_cpps(tmp_path):
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "down_proj"], "layers_to_transform": 1}
    path = save_gguf_adapter(adapted(new_llama(), "law", **settings), tmp_path / "adapter.gguf", "law")
    reader = gguf.GGUFReader(path)
    assert {t.name: (t.data.shape, t.tensor_type.name) for t in reader.tensors} == {
        "blk.1.attn_q.weight.lora_a": ((3, 32), "F32"),
        "blk.1.attn_q.weight.lora_b": ((32, 3), "F32"),
        "blk.1.attn_k.weight.lora_a": ((3, 32), "F32"),
        "blk.1.attn_k.weight.lora_b": ((16, 3), "F32"),
        "blk.1.ffn_down.weight.lora_a": ((3, 64), "F32"),
        "blk.1.ffn_down.weight.lora_b": ((32, 3), "F32"),
    }
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "law",
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
        "minilora.base": json.dumps(provenance_of_base(new_llama(), path)),
    }
    assert reader.fields["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]


def test_the_alpha_that_is_written_and_what_is_folded_into_b(tmp_path):
    for change, alpha in (
        ({}, 8),
        ({"use_rslora": True}, 16),  # 8 * sqrt(4)
        ({"rank_pattern": {"q_proj": 2}}, 8),  # divided by each module's own rank
        ({"alpha_pattern": {"q_proj": 3}}, 8),  # what most modules have; q's B carries 3 / 8, and no other B a factor
    ):
        model = adapted(new_llama(), **change)
        path = (
            tmp_path / f"{'-'.join(change) or 'plain'}.gguf"
        )  # not one file twice: the reader keeps it mapped, as Windows minds
        reader = gguf.GGUFReader(save_gguf_adapter(model, path))
        assert reader.fields["adapter.lora.alpha"].contents() == alpha
        stored, state = {t.name: t.data for t in reader.tensors}, adapter_state(model, "default")
        for name, key in (("attn_v.weight.lora_b", "v_proj.lora_B"), ("attn_q.weight.lora_a", "q_proj.lora_A")):
            np.testing.assert_array_equal(stored[f"blk.0.{name}"], state[f"model.layers.0.self_attn.{key}"])


def test_a_float64_adapter_is_written_in_float32(tmp_path):
    model = new_llama()
    for parameter in dict(model.named_parameters()).values():
        parameter.data = parameter.data.astype(np.float64)
    adapted(model)
    path = save_gguf_adapter(model, tmp_path / "adapter.gguf")
    assert {t.tensor_type.name for t in gguf.GGUFReader(path).tensors} == {"F32"}
    assert distance(in_llama_cpp(new_llama(), path), logits(model)) < 1e-4


def test_a_file_of_another_base_is_refused_and_one_that_names_none_is_not(tmp_path):
    path = save_gguf_adapter(adapted(new_llama()), tmp_path / "adapter.gguf")
    other = new_llama()
    next(other.parameters()).data += 1
    before = logits(other)
    for load in (load_gguf_adapter, load_adapter):
        with pytest.raises(ModelFileError, match="made for the base that it was trained on|made for another base"):
            load(other, path)
    with pytest.raises(ModelFileError, match="sha256 0: "):
        load_adapter(new_llama(), path, base_sha256="0")  # as it was computed before
    assert not other.adapters and logits(other).tobytes() == before.tobytes()
    load_adapter(other, path, force=True)
    remove_adapter(other, "default")
    header = read_header(path)
    kept = {key: field for key, field in header.fields.items() if not key.startswith(("minilora.", "general.arch"))}
    tensors = {tensor.name: (values_of(tensor), "F32") for tensor in header.tensors}
    write_gguf_file(tmp_path / "theirs.gguf", {"general.architecture": "llama"} | kept, tensors)
    load_adapter(other, tmp_path / "theirs.gguf")


# -- there and back ----------------------------------------------------------------------------------------------------


def test_a_plain_adapter_crosses_peft_and_llama_cpp_bit_for_bit(tmp_path):
    model, middle, other = adapted(new_llama()), new_llama(), new_llama()
    load_adapter(middle, save_adapter(model, tmp_path / "peft"))
    load_adapter(other, save_gguf_adapter(middle, tmp_path / "adapter.gguf"))  # the very function that reads folders
    assert logits(other).tobytes() == logits(model).tobytes()
    assert sha256_of(adapter_state(other, "default")) == sha256_of(adapter_state(model, "default"))
    first, second = (
        save_adapter(m, tmp_path / f"{i}") / "adapter_model.safetensors" for i, m in enumerate((model, other))
    )
    assert first.read_bytes() == second.read_bytes()


def test_a_read_adapter_can_be_trained_saved_again_and_removed(tmp_path):
    model = new_llama()
    load_gguf_adapter(model, save_gguf_adapter(adapted(new_llama()), tmp_path / "first.gguf"), name="again")
    model.loss(IDS, IDS).backward()
    assert all(p.grad.any() for p in model.trainable_parameters().values())
    second = save_gguf_adapter(model, tmp_path / "second.gguf", name="again")
    tensors = [
        {t.name: t.data.tobytes() for t in gguf.GGUFReader(tmp_path / f"{n}.gguf").tensors} for n in ("first", "second")
    ]
    assert second.is_file() and tensors[0] == tensors[1]
    remove_adapter(model, "again")
    assert logits(model).tobytes() == logits(new_llama()).tobytes()


@pytest.mark.parametrize("alpha", [8.0, 0.0, None, 1.5])
def test_files_of_others_are_scaled_by_llama_cpps_rule(alpha, rng, tmp_path):
    tensors = pair(rng) | pair(rng, "blk.1.attn_k.weight", m=16, r=2) | pair(rng, "blk.1.ffn_down.weight", n=64, r=7)
    path = write(tmp_path / "adapter.gguf", tensors, adapter_lora_alpha=alpha)
    model = new_llama()
    load_gguf_adapter(model, path)
    assert distance(logits(model), in_llama_cpp(new_llama(), path)) < 1e-3
    assert distance(logits(model), logits(new_llama())) > 0.1


@pytest.mark.parametrize(("kind", "limit"), [("F16", 1e-2), ("Q8_0", 0.5)])
def test_files_in_fewer_bits_are_read(kind, limit, rng, tmp_path):
    tensors = pair(rng, r=32)
    models = [new_llama(), new_llama()]
    for model, stored in zip(models, ("F32", kind), strict=True):
        load_gguf_adapter(model, write(tmp_path / f"{stored}.gguf", tensors, stored))
    assert 0 < distance(logits(models[0]), logits(models[1])) < limit * np.abs(logits(models[0])).max()


def test_every_matrix_of_a_model_file_can_be_adapted_under_its_name_there(file):
    names = {t.name for t in gguf.GGUFReader(file).tensors if t.data.ndim == 2}
    model = adapted(new_llama(), target_modules="all-linear")
    modules = {FAMILIES["llama"].llama_cpp_name(f"{path}.weight") for path in lora_modules(model)}
    assert modules == names - {"token_embd.weight"}
