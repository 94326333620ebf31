"""Sixteen levels: what they are, how numbers become codes and back, and a model that is rounded as it is loaded."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import strictarray
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from modelfiles import CONFIG, IDS, new_tokenizer, write_folder, write_gguf
from smallmodels import logits

from minilora.cli import main
from minilora.engine import fused
from minilora.engine.backend import is_packed
from minilora.engine.gradcheck import gradcheck
from minilora.files import levels
from minilora.files.disk import ModelFileError
from minilora.files.quant import ROUNDED, Packed, bytes_of_row, codes_of, dequantize, quantize
from minilora.lora.adapters import adapter_state, add_adapter, base_state
from minilora.lora.audit import audit
from minilora.lora.config import LoraConfig
from minilora.lora.peft import load_adapter, save_adapter
from minilora.measure.process import Job, shape_of
from minilora.models import load as zoo
from minilora.models.folder import save_folder
from minilora.models.merge import merge
from minilora.models.with_adapters import load_with_adapters
from minilora.nn.llama import Llama
from minilora.nn.module import sha256_of
from minilora.nn.optim import AdamW
from minilora.options import PACKED
from minilora.train.options import Options

KINDS = ("NF4", "FP4", "INT4")
each_kind = pytest.mark.parametrize("kind", KINDS)
WIDE = dataclasses.replace(CONFIG, hidden_size=64, intermediate_size=128, head_dim=16)
ADAPTER = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
PUBLISHED = [  # NF4 as bitsandbytes has it: functional.py, get_4bit_type
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


# -- levels ------------------------------------------------------------------------------------------------------------


def test_the_levels_of_nf4_are_the_published_ones():
    np.testing.assert_allclose(levels.LEVELS["NF4"], PUBLISHED, rtol=0, atol=1e-6)


@each_kind
def test_levels_ascend_from_minus_one_to_one_with_an_exact_zero(kind):
    own = levels.LEVELS[kind]
    assert len(own) == 16 and own[0] == -1 and own[-1] == 1 and 0 in own and (np.diff(own) >= 0).all()
    assert len(set(own.tolist())) == (16 if kind == "NF4" else 15)


def test_fp4_and_int4_are_the_numbers_of_their_formats():
    assert (levels.LEVELS["FP4"][7:15] * 6).tolist() == pytest.approx([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert (levels.LEVELS["INT4"][:15] * 7).tolist() == pytest.approx(list(range(-7, 8)))


# -- codes -------------------------------------------------------------------------------------------------------------


def test_a_block_is_a_scale_and_two_codes_to_a_byte_the_first_in_the_high_half():
    w = np.zeros((1, 64), np.float32)
    w[0, :4] = [2, -2, 0, 2 * PUBLISHED[10]]
    raw = quantize(w, "NF4")
    assert raw.shape == (1, 36) and raw[0, :4].view(np.float32)[0] == 2
    assert raw[0, 4:7].tolist() == [0xF0, 0x7A, 0x77]
    assert codes_of(raw, "NF4")[0, :5].tolist() == [15, 0, 7, 10, 7]


@each_kind
def test_a_byte_stands_for_two_levels(kind):
    raw = np.zeros((8, 36), np.uint8)
    raw[:, :4] = np.float32([3]).view(np.uint8)
    raw[:, 4:] = np.arange(256, dtype=np.uint8).reshape(8, 32)
    w = dequantize(raw, kind).reshape(256, 2)
    own = levels.LEVELS[kind] * np.float32(3)
    np.testing.assert_array_equal(w, [(own[byte >> 4], own[byte & 15]) for byte in range(256)])


@each_kind
@given(data=st.data(), rows=st.integers(1, 3), blocks=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_every_number_becomes_the_nearest_level_of_its_block_and_stays_there(kind, data, rows, blocks):
    numbers = st.floats(-1e4, 1e4, width=32, allow_subnormal=False) | st.floats(-2, 2, width=32)
    w = data.draw(arrays(np.float32, (rows, 64 * blocks), elements=numbers))
    raw = quantize(w, kind)
    back = dequantize(raw, kind)
    each, got = w.reshape(-1, 64).astype(np.float64), back.reshape(-1, 64)
    scale = np.abs(each).max(axis=1, keepdims=True)
    nearest = np.abs(each[:, :, None] - levels.LEVELS[kind] * scale[:, :, None]).min(axis=2)
    assert (np.abs(got - each) <= nearest + 1e-6 * scale).all()
    largest = np.abs(each) == scale
    np.testing.assert_allclose(got[largest], each[largest], rtol=1e-6)
    np.testing.assert_array_equal(quantize(back, kind), raw)


def test_of_normal_numbers_nf4_loses_least(rng):
    w = rng.standard_normal((64, 1024), dtype=np.float32)
    lost = {kind: float(np.square(dequantize(quantize(w, kind), kind) - w).mean()) for kind in KINDS}
    assert lost["NF4"] < 0.9 * lost["FP4"] and lost["NF4"] < 0.9 * lost["INT4"]


@each_kind
def test_half_a_byte_and_a_share_of_the_scale_for_each_number(kind):
    w = np.ones((3, 192), np.float32)
    assert bytes_of_row(192, kind) / 192 == quantize(w, kind).nbytes / w.size == 0.5 + 4 / 64 == 0.5625


@each_kind
def test_rows_that_are_no_whole_blocks_are_refused_in_one_line(kind):
    for width in (32, 65):
        with pytest.raises(ValueError, match=rf"^a row of {width} values cannot be stored as {kind}: .* 64$"):
            quantize(np.zeros((2, width), np.float32), kind)
    with pytest.raises(ValueError, match="not a multiple of 36"):
        Packed(np.zeros((2, 35), np.uint8), kind)


@each_kind
def test_a_packed_matrix_unpacks_whole_in_slices_by_rows_and_on_a_device(kind, rng, monkeypatch):
    raw = quantize(rng.standard_normal((150, 2112), dtype=np.float32), kind)
    w, packed, ids = dequantize(raw, kind), Packed(raw, kind), rng.integers(0, 150, (3, 5))
    assert packed.shape == w.shape and packed.nbytes == w.size * 9 // 16 and packed.is_finite()
    for got, expected in ((packed.unpack(), w), (packed.unpack(7, 99), w[7:99]), (packed[ids], w[ids])):
        np.testing.assert_array_equal(got, expected)
    monkeypatch.setitem(sys.modules, "cupy", strictarray)
    there = packed.to("cuda")
    assert type(there.raw) is strictarray.ndarray and there.is_finite()
    np.testing.assert_array_equal(there.unpack().get(), w)


@each_kind
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_noticed_in_the_scale(kind, value):
    w = np.ones((2, 64), np.float32)
    w[1, 5] = value
    assert not Packed(quantize(w, kind), kind).is_finite()


# -- products and models -----------------------------------------------------------------------------------------------


@each_kind
def test_gradients_through_a_packed_matrix_agree_with_measured_ones(kind, rng):
    w = Packed(quantize(rng.standard_normal((6, 64), dtype=np.float32), kind), kind)
    x, a, b = rng.standard_normal((2, 3, 64)), rng.standard_normal((2, 64)), rng.standard_normal((6, 2))
    gradcheck(lambda x: fused.linear(x, w), x)
    gradcheck(lambda x, a, b: fused.lora_linear(x, w, a, b, scale=2.0), x, a, b)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder whose matrices have rows of whole blocks."""
    model = Llama(WIDE, np.random.default_rng(0))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data *= np.float32(10)
    return save_folder(tmp_path_factory.mktemp("rounded") / "base", WIDE, model.state_dict(), new_tokenizer())


def unpacked(model):
    """A dense model of the numbers that a packed one stands for."""
    dense = Llama.empty(model.config)
    dense.load_state_dict({name: w.unpack() if is_packed(w) else w for name, w in model.state_dict().items()})
    return dense


def trained(model, steps=2):
    add_adapter(model, ADAPTER, seed=3)
    optimizer, losses = AdamW(model.trainable_parameters(), lr=1e-2), []
    for _ in range(steps):
        loss = model.loss(IDS, IDS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, adapter_state(model, "default")


@pytest.mark.parametrize("quantized", ["nf4", "fp4", "int4", "q8_0", "q4_1"])
def test_a_folder_is_rounded_as_it_is_loaded_and_computes_what_its_numbers_compute(quantized, folder):
    model, _ = zoo.load(folder, quantized=quantized)
    original = zoo.load(folder)[0].state_dict()
    for name, w in model.state_dict().items():
        kind = "Q8_0" if "embed_tokens" in name else quantized.upper()
        if w.ndim == 1:
            np.testing.assert_array_equal(w, original[name])
        else:
            assert w.kind == kind
            np.testing.assert_array_equal(w.raw, quantize(original[name], kind))
    dense = unpacked(model)
    np.testing.assert_array_equal(logits(model, IDS), logits(dense, IDS))
    assert sha256_of(base_state(model)) == sha256_of(dense.state_dict()) != model.unrounded_sha256
    assert model.unrounded_sha256 == sha256_of(original)
    held = sum(w.nbytes for w in model.state_dict().values())
    assert shape_of(str(folder), quantized) == (model.config, held) and held < sum(w.nbytes for w in original.values())
    (losses, adapter), (dense_losses, expected) = trained(model), trained(dense)
    assert losses == dense_losses and losses[1] < losses[0]
    for name, w in adapter.items():
        np.testing.assert_array_equal(w, expected[name], err_msg=name)


def test_a_gguf_file_is_rounded_too(tmp_path, folder):
    dense = zoo.load(folder)[0]
    file = write_gguf(tmp_path / "m.gguf", dense, "F32")
    there, here = zoo.load(file, quantized="nf4")[0], zoo.load(folder, quantized="nf4")[0]
    assert sha256_of(there.state_dict()) == sha256_of(here.state_dict())
    assert there.unrounded_sha256 == here.unrounded_sha256


def test_an_adapter_that_learned_over_a_rounded_base_belongs_to_the_base_before_rounding_too(folder, tmp_path, caplog):
    model, _ = zoo.load(folder, quantized="nf4")
    trained(model)
    assert "base" in dict(audit(model, "default").checks)
    save_adapter(model, tmp_path / "learned")
    note = json.loads((tmp_path / "learned" / "minilora.json").read_text())["base"]
    assert note["rounded_to"] == "nf4" and note["sha256"] == sha256_of(base_state(model))
    with caplog.at_level("INFO", "minilora"):
        for quantized in (False, "nf4", "fp4"):
            loaded, _ = load_with_adapters({"learned": tmp_path / "learned"}, folder, quantized)
            assert "learned" in loaded.adapters
    assert caplog.messages == ["learned was trained on its base quantised to nf4, which --quantized nf4 gives"] * 2
    dense, _ = zoo.load(folder)
    trained(dense)
    save_adapter(dense, tmp_path / "dense")
    load_adapter(zoo.load(folder, quantized="nf4")[0], tmp_path / "dense")
    dense.model.embed_tokens.weight.data[0, 0] += 1
    with pytest.raises(ModelFileError, match="same shape"):
        load_adapter(dense, tmp_path / "learned", name="other")


def test_merging_says_over_what_the_adapter_learned_and_what_four_bits_would_keep(folder, tmp_path):
    model, _ = zoo.load(folder, quantized="nf4")
    trained(model)
    save_adapter(model, tmp_path / "learned")
    report = merge(folder, tmp_path / "learned", tmp_path / "whole")
    assert report.rounded_to == "nf4" and report.requantised.kind == "NF4" and report.requantised.matrices == 14
    assert "trained on it quantised to nf4" in str(report) and "if stored as NF4" in str(report)


def test_a_matrix_that_cannot_be_rounded_is_named_in_one_line(tmp_path, rng):
    narrow = write_folder(tmp_path / "base", Llama(CONFIG, rng))
    for call in (lambda: zoo.load(narrow, quantized="nf4"), lambda: shape_of(str(narrow), "nf4")):
        with pytest.raises(ValueError, match=r"_proj.weight: a row of 32 values cannot be stored as NF4") as caught:
            call()
        assert str(narrow) in str(caught.value) and "\n" not in str(caught.value)


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_flag_knows_every_kind():
    assert PACKED["choices"] == (True, False, *(kind.lower() for kind in ROUNDED))
    assert all(kind.lower() in PACKED["help"] for kind in ROUNDED)


def test_an_unknown_kind_is_refused(capsys, folder):
    with pytest.raises(SystemExit) as ended:
        main(["finetune", "--quantized", "nf5"])
    assert ended.value.code == 2 and "nf5" in capsys.readouterr().err
    for call in (
        lambda: Options(quantized="nf5"),
        lambda: zoo.load(folder, quantized="nf5"),
        lambda: shape_of("tiny", Job(quantized="nf5").quantized),
    ):
        with pytest.raises(ValueError, match="true, false or one of nf4, fp4, int4, q8_0, q4_1, got 'nf5'"):
            call()


def test_full_fine_tuning_of_a_rounded_base_is_refused():
    with pytest.raises(ValueError, match="packed weights cannot be trained"):
        Options(method="full", quantized="nf4")


def test_a_job_over_the_rounded_tiny_base(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = str(tiny_folder / "data.jsonl")
    job = ["finetune", "--base", "tiny", "--data", data, "--steps", "2", "--r", "2", "--eval-records", "1"]
    assert main([*job, "--quantized", "nf4", "--out", "run"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["options"]["quantized"] == "nf4" and 'quantized = "nf4"' in (tmp_path / "run/run.toml").read_text()
    assert metrics["base_bytes"] == shape_of("tiny", "nf4")[1] < shape_of("tiny", "q8_0")[1]
    assert "rounded to nf4; or the same before rounding" in (tmp_path / "run" / "README.md").read_text()
    assert main(["audit", "run", "--quantized", "nf4"]) == 0
    assert main(["chat", "--adapter", "run", "--prompt", "hello", "--max-new-tokens", "2"]) == 0
    assert "--quantized nf4" in capsys.readouterr().err
