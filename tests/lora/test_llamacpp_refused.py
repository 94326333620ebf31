"""llama.cpp adapter files that do not fit, and adapters that such a file cannot hold: refused, with nothing changed."""

import gguf
import numpy as np
import peftfiles
import pytest
from cppadapters import QUERY, adapted, pair, write
from modelfiles import CONFIG, new_llama
from smallmodels import Net

import minilora as ml
from minilora.lora.llamacpp import save_gguf_adapter
from minilora.lora.mlx import save_mlx_adapter

# -- what such a file cannot say ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "DoRA's magnitudes: merge the adapter instead"),
        ({"lora_alpha": 1e-60}, "range of float32"),
        ({"lora_alpha": 1e60}, "range of float32"),
    ],
    ids=str,
)
def test_what_llama_cpp_cannot_compute_is_refused_with_the_way_out(settings, words, tmp_path):
    model = adapted(Net(CONFIG, np.random.default_rng(0)), **settings)
    with pytest.raises(ValueError, match=words):
        save_gguf_adapter(model, tmp_path / "adapter.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("save", [save_gguf_adapter, save_mlx_adapter])
def test_values_too_large_for_float16_are_refused_and_nothing_is_written(save, tmp_path):
    model = adapted(new_llama(), target_modules=["q_proj"])
    ml.scale_adapter(model, "default", 1e9)
    with pytest.raises(ValueError, match=r"lora_b holds values that are too large for float16: use --dtype float32"):
        save(model, tmp_path / "adapter.gguf", dtype="float16")
    assert list(tmp_path.iterdir()) == []
    save(model, tmp_path / "adapter.gguf")


def test_a_failed_write_leaves_the_file_of_before_and_no_debris(tmp_path, monkeypatch):
    path = save_gguf_adapter(adapted(new_llama()), tmp_path / "adapter.gguf")
    before = path.read_bytes()

    def full(self, *arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="the disk is full"):
        save_gguf_adapter(adapted(new_llama(), r=2), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# -- files that do not fit: refused, and the model stays as it was -----------------------------------------------------


def refused(path, *words):
    peftfiles.refused(new_llama(), path, path.name, *words)


def test_a_file_that_says_it_is_something_else_is_refused(rng, tmp_path):
    for change, words in (
        ({"general_type": "model"}, ("general.type", "'model'", "'adapter'")),
        ({"general_type": None}, ("general.type", "None")),
        ({"general_architecture": "qwen2"}, ("general.architecture", "'qwen2'")),
        ({"adapter_type": "control_vector"}, ("adapter.type", "'control_vector'")),
        *(({"adapter_lora_alpha": alpha}, ("adapter.lora.alpha", repr(alpha), "at least 0"))
          for alpha in (float("nan"), -1.0, float("inf"), "8")),
        ({"adapter_alora.invocation_tokens": [1, 2]}, ("alora",)),
    ):  # fmt: skip
        refused(write(tmp_path / "adapter.gguf", pair(rng), **change), *words)


WRONG = [
    ({f"{QUERY}.lora_a": None}, ("missing", f"{QUERY}.lora_a")),
    ({f"{QUERY}.lora_b": None}, ("missing", f"{QUERY}.lora_b")),
    ({f"{QUERY}.lora_b": np.ones((32, 5), np.float32)}, (f"{QUERY}.lora_a", "(4, 32)", "(5, 32)")),
    ({f"{QUERY}.lora_b": np.ones((30, 4), np.float32)}, (f"{QUERY}.lora_b", "(30, 4)", "(32, 4)")),
    ({f"{QUERY}.lora_a": np.ones((32, 4), np.float32)}, (f"{QUERY}.lora_a", "(32, 4)", "(4, 32)")),
    ({f"{QUERY}.lora_b": np.ones((128,), np.float32)}, ("lora_b", "(128,)")),
    ({f"{QUERY}.lora_b": np.ones((32, 40), np.float32)}, (f"{QUERY}.lora_a", "(4, 32)", "(40, 32)")),
    ({f"{QUERY}.lora_a": np.full((4, 32), np.nan, np.float32)}, (f"{QUERY}.lora_a", "NaN")),
    ({f"{QUERY}.lora_b": np.full((32, 4), np.inf, np.float32)}, (f"{QUERY}.lora_b", "infinity")),
    ({f"{QUERY}.lora_m": np.ones((32, 1), np.float32)}, (f"{QUERY}.lora_m", "unexpected")),
    ({"blk.0.attn_norm.weight": np.ones(32, np.float32)}, ("blk.0.attn_norm.weight", "unexpected")),
    ({"x": np.ones(32, np.float32)}, ("unexpected tensor x",)),
    ({"blk.x.attn_q.weight.lora_a": np.ones((4, 32), np.float32)}, ("unexpected", "blk.x")),
    (pair(np.random.default_rng(0), "blk.7.attn_q.weight"), ("layers.7", "matches no module")),
    (pair(np.random.default_rng(0), "blk.0.attn_qkv.weight"), ("blk.0.attn_qkv", "unexpected")),
    (pair(np.random.default_rng(0), "output.weight", m=320), ("lm_head", "shares its matrix")),
]


def test_tensors_that_do_not_fit_are_named(rng, tmp_path):
    for change, words in WRONG:
        tensors = {name: array for name, array in (pair(rng) | change).items() if array is not None}
        refused(write(tmp_path / "adapter.gguf", tensors), *words)
    refused(write(tmp_path / "adapter.gguf", {}), "without any tensor")


def test_a_missing_file_a_damaged_one_and_a_model_are_refused(file, tmp_path):
    refused(tmp_path / "absent.gguf", "no such")
    (tmp_path / "text.gguf").write_text("hello")
    refused(tmp_path / "text.gguf", "not a GGUF file")
    refused(file, "general.type", "'adapter'")
    whole = save_gguf_adapter(adapted(new_llama()), tmp_path / "whole.gguf").read_bytes()
    for share in (0.001, 0.01, 0.5, 0.99):
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[: int(share * len(whole))])
        refused(path, "")
