"""A quantised base, from a GGUF file or rounded on loading: it computes what its values compute, and never changes."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import strictarray
from modelfiles import CHATML, CONFIG, IDS, RANDOM, STEPS, new_llama, new_tokenizer, write_folder, write_gguf
from smallmodels import logits, losses_of

from minilora.cli import main
from minilora.commands.shared import Loading
from minilora.engine import fused
from minilora.engine.backend import is_packed
from minilora.engine.tensor import no_grad
from minilora.files.disk import ModelFileError
from minilora.files.gguf import to_halves
from minilora.files.quant import ROUNDED, dequantize, quantize
from minilora.lora.adapters import adapter_state, add_adapter, base_state, merge_adapter, merged_state, unmerge_adapter
from minilora.lora.audit import audit
from minilora.lora.config import LoraConfig
from minilora.lora.peft import load_adapter, save_adapter
from minilora.measure.counts import count_parameters
from minilora.measure.memory import Job, shape_of
from minilora.models import load as zoo
from minilora.models.folder import save_folder
from minilora.models.gguf import GGUF, save_gguf
from minilora.models.merge import merge
from minilora.nn import module
from minilora.nn.llama import Llama
from minilora.nn.module import Parameter, sha256_of
from minilora.nn.optim import AdamW
from minilora.options import PACKED
from minilora.train.options import Options

Q, V = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight"
PLAIN = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
CONFIGS = {
    "plain": PLAIN,
    "dropout": replace(PLAIN, lora_dropout=0.3),
    "dora": replace(PLAIN, use_dora=True),
    "pissa": replace(PLAIN, init_lora_weights="pissa"),
}
WIDE = replace(CONFIG, hidden_size=64, intermediate_size=128, head_dim=16)  # rows of whole blocks of 64
FILES, KINDS = ("F16", *STEPS), tuple(kind.lower() for kind in ROUNDED)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small model as a GGUF file of each kind."""
    folder = tmp_path_factory.mktemp("quantized")
    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "gain": 1}
    return {
        kind: write_gguf(folder / f"{kind}.gguf", new_llama(**(wide if kind in RANDOM else {})), kind)
        for kind in ("F32", *FILES)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model as a Hugging Face folder."""
    state = new_llama(**vars(WIDE)).state_dict()
    return save_folder(tmp_path_factory.mktemp("rounded") / "base", WIDE, state, new_tokenizer())


@pytest.fixture
def both(files, folder):
    """A function: the same model dense and packed, of a GGUF file's kind or of a folder rounded to a kind."""

    def load(kind):
        if kind in FILES:
            return zoo.load(files[kind])[0], zoo.load(files[kind], quantized=True)[0]
        packed = zoo.load(folder, quantized=kind)[0]
        dense = Llama.empty(packed.config)
        dense.load_state_dict({name: values(w) for name, w in packed.state_dict().items()})
        return dense, packed

    return load


def values(w):
    return w.unpack() if is_packed(w) else w


def trained(model, config, steps=2):
    """The losses of a few steps of AdamW, and the adapter after them."""
    add_adapter(model, config, seed=3)
    losses = losses_of(model.train(), AdamW(model.trainable_parameters(), lr=1e-2), steps, IDS)
    model.eval()
    return losses, {name: w.copy() for name, w in adapter_state(model, "default").items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, w in found.items():
        np.testing.assert_array_equal(values(w), values(expected[name]), err_msg=name)


# -- what is loaded ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FILES)
def test_matrices_hold_the_bytes_of_the_file_and_norms_are_float32(both, files, kind):
    source, (dense, packed) = GGUF(files[kind]), both(kind)
    for name, w in packed.state_dict().items():
        stored = source.tensors[name]
        if w.ndim == 1:
            assert w.dtype == np.float32 and type(w) is np.ndarray
        else:
            assert (w.kind, w.nbytes) == (stored.kind, stored.nbytes)
    np.testing.assert_array_equal(packed.state_dict()[V].raw, source.tensors[V].raw())
    np.testing.assert_array_equal(packed.state_dict()[Q].raw, to_halves(source.tensors[Q].raw(), 4))
    assert_equal(packed.state_dict(), dense.state_dict())
    assert count_parameters(packed).total == count_parameters(dense).total
    assert {name for name in packed.trainable_parameters() if "norm" not in name} == set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_or_file_is_rounded_as_it_is_loaded(folder, kind, tmp_path):
    model, original = zoo.load(folder, quantized=kind)[0], zoo.load(folder)[0].state_dict()
    for name, w in model.state_dict().items():
        if w.ndim == 1:
            np.testing.assert_array_equal(w, original[name])
        else:
            assert w.kind == ("Q8_0" if "embed_tokens" in name else kind.upper())
            np.testing.assert_array_equal(w.raw, quantize(original[name], w.kind))
    assert sha256_of(base_state(model)) != model.unrounded_sha256 == sha256_of(original)
    held = sum(w.nbytes for w in model.state_dict().values())
    assert shape_of(str(folder), kind) == (model.config, held) and held < sum(w.nbytes for w in original.values())
    file = write_gguf(tmp_path / "m.gguf", zoo.load(folder)[0], "F32")
    there = zoo.load(file, quantized=kind)[0]
    assert sha256_of(there.state_dict()) == sha256_of(model.state_dict())
    assert there.unrounded_sha256 == model.unrounded_sha256


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_what_a_file_stores_in_the_kind_that_is_asked_for_is_not_quantised_again(files, kind, tmp_path):
    """Codes need not reach the largest one: with an importance matrix llama.cpp chooses other steps."""
    content, tensor = bytearray(files[kind].read_bytes()), GGUF(files[kind]).tensors[V]
    size, steps = STEPS[kind]
    for block in range(tensor.offset, tensor.offset + tensor.nbytes, size):
        codes = slice(block + steps[-1] + 2, block + size)
        content[codes] = bytes(byte & 0x33 for byte in content[codes])
    (tmp_path / "m.gguf").write_bytes(content)
    stored, asked = (zoo.load(tmp_path / "m.gguf", quantized=each)[0] for each in (True, kind.lower()))
    raw = GGUF(tmp_path / "m.gguf").tensors[V].raw()
    assert (quantize(dequantize(raw, kind), kind) != raw).any()
    for model in (stored, asked):
        np.testing.assert_array_equal(model.state_dict()[V].raw, raw)
    assert asked.unrounded_sha256 == sha256_of(zoo.load(tmp_path / "m.gguf")[0].state_dict())


def test_a_matrix_that_the_file_has_in_float32_is_no_quantised_one_that_becomes_float32(tmp_path, monkeypatch, caplog):
    """llama.cpp writes GPT-2's positions so."""
    monkeypatch.setattr(
        "minilora.models.gguf.kind_of", lambda w, kind, name: "F32" if w.ndim < 2 or name == V else kind
    )
    path = save_gguf(tmp_path / "m.gguf", CONFIG, new_llama().state_dict(), new_tokenizer(), "Q8_0")
    state = zoo.load(path, quantized=True)[0].state_dict()
    assert not is_packed(state[V]) and is_packed(state[Q]) and not caplog.messages


def test_the_model_does_not_depend_on_its_file(files, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(files["Q4_1"].read_bytes())
    model = zoo.load(path, quantized=True)[0]
    before = logits(model, IDS)
    path.write_bytes(bytes(len(path.read_bytes())))
    np.testing.assert_array_equal(logits(model, IDS), before)


def test_damaged_steps_are_named_when_the_matrix_stays_packed(files, tmp_path):
    content, source = bytearray(files["Q4_1"].read_bytes()), GGUF(files["Q4_1"])
    at = int(source.tensors[V].offset)
    content[at : at + 2] = np.float16(np.nan).tobytes()
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelFileError, match=rf"{V} holds NaN"):
        GGUF(tmp_path / "m.gguf").load(quantized=True)


def test_what_cannot_be_packed_is_refused_in_one_line(files, folder, tmp_path, rng, capsys):
    narrow = write_folder(tmp_path / "base", Llama(CONFIG, rng))
    for place in (files["F32"], narrow):
        with pytest.raises(ModelFileError, match="holds no quantised matrices"):
            zoo.load(place, quantized=True)
    for call in (lambda: zoo.load(narrow, quantized="nf4"), lambda: shape_of(str(narrow), "nf4")):
        with pytest.raises(ValueError, match=r"_proj.weight: a row of 32 values cannot be stored as NF4") as caught:
            call()
        assert str(narrow) in str(caught.value) and "\n" not in str(caught.value)
    for call in (
        lambda: Options(quantized="nf5"),
        lambda: zoo.load(folder, quantized="nf5"),
        lambda: shape_of("tiny", Job(quantized="nf5").quantized),
    ):
        with pytest.raises(ValueError, match="one of true, false, nf4, fp4, int4, q8_0, q4_1, got 'nf5'"):
            call()
    assert PACKED["choices"] == (True, False, *KINDS) and all(kind in PACKED["help"] for kind in KINDS)
    for kind in (True, "nf4"):
        with pytest.raises(ValueError, match="quantized means nothing with method full"):
            Options(method="full", quantized=kind)
    assert main(["finetune", "--method", "full", "--quantized"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# -- what is computed --------------------------------------------------------------------------------------------------

SHOWN = ("Q4_1", "Q6_K")  # blocks of 32 and of 256 values; the other kinds with -m long
OTHERS = [kind for kind in (*FILES, "fp4", "int4") if kind not in SHOWN]
CASES = [("nf4", config) for config in CONFIGS] + [(kind, "plain") for kind in SHOWN]
CASES += [pytest.param(kind, "plain", marks=pytest.mark.long) for kind in OTHERS]
OF_FILES = [*SHOWN, *(pytest.param(kind, marks=pytest.mark.long) for kind in OTHERS if kind in FILES)]


@pytest.mark.parametrize(("kind", "config"), CASES)
def test_training_merging_and_auditing_over_a_packed_base_equal_those_over_a_dense_one_bit_for_bit(both, kind, config):
    dense, model = both(kind)
    np.testing.assert_array_equal(logits(model, IDS), logits(dense, IDS))
    arrays, digest = dict(model.state_dict()), sha256_of(base_state(model))
    assert digest == sha256_of(dense.state_dict())
    (dense_losses, expected), (losses, adapter) = (trained(each, CONFIGS[config]) for each in (dense, model))
    assert losses == dense_losses and losses[1] < losses[0]
    assert_equal(adapter, expected)
    unmerged = logits(model, IDS)
    for each in (dense, model):
        merge_adapter(each)
    assert_equal(merged_state(model), merged_state(dense))
    np.testing.assert_allclose(logits(model, IDS), unmerged, atol=1e-3)
    unmerge_adapter(model)
    np.testing.assert_array_equal(logits(model, IDS), unmerged)
    assert f"sha256 {digest[:16]}" in dict(audit(model, "default").checks)["base"]
    after = base_state(model)
    assert sha256_of(after) == digest and all(after[name] is w for name, w in arrays.items())


def test_another_byte_is_another_hash_whatever_is_hashed_at_a_time(both, monkeypatch):
    dense, packed = (model.state_dict() for model in both("Q4_1"))
    digest = sha256_of(dense)
    monkeypatch.setattr(module, "_HASHED", 100)  # a few rows at a time
    assert sha256_of(packed) == sha256_of(dense) == digest
    packed[V].raw[0, 5] ^= 1
    assert sha256_of(packed) != digest


def test_a_packed_matrix_cannot_be_made_trainable(both):
    _, model = both("Q8_0")
    before, w = set(model.trainable_parameters()), dict(model.named_parameters())[V]
    for attempt in (
        lambda: setattr(w, "requires_grad", True),
        lambda: model.requires_grad_(True),
        lambda: Parameter(w.data),
    ):
        with pytest.raises(ValueError, match="packed matrix is frozen: load the model without quantized, "):
            attempt()
    assert set(model.trainable_parameters()) == before and w.grad is None


@pytest.mark.parametrize("kind", OF_FILES)
def test_on_a_device_the_bytes_are_moved_and_the_logits_are_the_hosts(files, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", strictarray)
    dense, there = zoo.load(files[kind])[0], zoo.load(files[kind], quantized=True, device="cuda")[0]
    assert {type(w.raw) for w in there.state_dict().values() if is_packed(w)} == {strictarray.ndarray}
    np.testing.assert_allclose(logits(there, IDS), logits(dense, IDS), rtol=1e-5, atol=1e-5)
    losses, _ = trained(there, CONFIGS["plain"])
    assert losses == pytest.approx(trained(dense, CONFIGS["plain"])[0], rel=1e-5)


# -- files out of it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F16", "Q4_1", "Q6_K", "nf4"])
def test_an_adapter_saved_over_one_base_loads_over_the_other_and_the_base_is_written_as_its_values(
    both, kind, folder, tmp_path
):
    dense, packed = both(kind)
    trained(packed, CONFIGS["dora"])
    save_adapter(packed, tmp_path / "adapter")
    load_adapter(dense, tmp_path / "adapter")
    np.testing.assert_array_equal(logits(dense, IDS), logits(packed, IDS))
    again = both(kind)[1]
    load_adapter(again, tmp_path / "adapter")
    np.testing.assert_array_equal(logits(again, IDS), logits(packed, IDS))
    _, tokenizer = zoo.load(folder)
    save_folder(tmp_path / "hf", packed.config, base_state(packed), tokenizer)
    save_gguf(tmp_path / "m.gguf", packed.config, base_state(packed), tokenizer, "F32")
    for place in (tmp_path / "hf", tmp_path / "m.gguf"):
        assert_equal(zoo.load(place)[0].state_dict(), base_state(packed))


def test_an_adapter_trained_over_a_rounded_base_belongs_to_the_base_before_rounding_too(folder, tmp_path):
    model, _ = zoo.load(folder, quantized="nf4")
    trained(model, PLAIN)
    save_adapter(model, tmp_path / "rounded")
    note = json.loads((tmp_path / "rounded" / "minilora.json").read_text())["base"]
    assert note["rounded_to"] == "nf4" and note["sha256"] == sha256_of(base_state(model))
    for quantized in (False, "nf4", "fp4"):
        loaded, _ = Loading(quantized=quantized).load({"one": tmp_path / "rounded"}, folder)
        assert "one" in loaded.adapters
    place, own = str(tmp_path / "rounded"), ["--base", str(folder)]
    assert main(["audit", place, *own]) == 0
    assert main(["merge", "--adapter", place, *own, "--out", str(tmp_path / "m")]) == 0  # has no --quantized
    assert main(["export", "--adapter", place, *own, "--out", str(tmp_path / "e.gguf")]) == 0
    dense, _ = zoo.load(folder)
    trained(dense, PLAIN)
    save_adapter(dense, tmp_path / "dense")
    load_adapter(zoo.load(folder, quantized="nf4")[0], tmp_path / "dense")
    dense.model.embed_tokens.weight.data[0, 0] += 1
    with pytest.raises(ModelFileError, match="same shape"):
        load_adapter(dense, tmp_path / "rounded", name="other")
    report = merge(folder, tmp_path / "rounded", tmp_path / "whole")
    assert report.rounded_to == "nf4" and "trained on it quantised to nf4" in str(report)


# -- whole jobs --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_job_over_a_rounded_base(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Llama(replace(WIDE, max_position_embeddings=1024), np.random.default_rng(1))
    base = str(write_gguf(tmp_path / "base.gguf", model, "F32", change={"tokenizer.chat_template": CHATML}))
    job = ["finetune", "--base", base, "--data", str(tiny_folder / "data.jsonl"), "--steps", "2", "--r", "2"]
    assert main([*job, "--eval-records", "1", "--recompute", "--quantized", "nf4", "--out", "run"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["options"]["quantized"] == "nf4" and metrics["options"]["recompute"]
    assert metrics["base_sha256"][0] == metrics["base_sha256"][1]
    packed = zoo.load(base, quantized="nf4")[0].state_dict()
    assert metrics["base_bytes"] == sum(w.nbytes for w in packed.values())
    assert 'quantized = "nf4"' in (tmp_path / "run/run.toml").read_text()
    assert "rounded to nf4; or of the same weights before rounding" in (tmp_path / "run" / "README.md").read_text()
    capsys.readouterr()
    assert main(["audit", "run", "--base", base, "--quantized", "nf4"]) == 0
    assert metrics["base_sha256"][0][:16] in capsys.readouterr().out
    assert main(["chat", "--base", base, "--adapter", "run", "--prompt", "hello", "--max-new-tokens", "2"]) == 0


@pytest.mark.long
@pytest.mark.real
def test_smollm2_takes_the_bytes_of_its_file_and_computes_what_the_dense_model_computes(smollm2):
    dense, tokenizer = smollm2
    packed, _ = zoo.load("smollm2", quantized=True)
    source, state = GGUF(zoo.find("smollm2")), packed.state_dict()
    assert sum(w.nbytes for w in state.values()) == sum(t.nbytes for t in source.tensors.values()) == 96_576_768
    assert sum(is_packed(w) for w in state.values()) == 211
    ids = np.array([tokenizer.encode("The capital of France is Paris.")])
    with no_grad():
        hidden = dense.model(ids)
        np.testing.assert_allclose(packed.model(ids).data, hidden.data, rtol=1e-3, atol=1e-3)  # a few rows: on codes
        expected = fused.linear_cross_entropy(hidden, dense.head_weight, np.r_[ids[0, 1:], -100]).item()
    add_adapter(packed, LoraConfig(r=8, lora_alpha=16))
    loss = packed.loss(ids, ids)
    loss.backward()
    # The packed head is multiplied some rows at a time: not every processor then adds in the order of one product.
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert all(p.grad.any() for name, p in packed.trainable_parameters().items() if name.endswith("lora_B"))
    assert all(base_state(packed)[name] is w for name, w in state.items())
