"""Training over a packed base: the same numbers as over the dense one, and bytes that never change."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import strictarray
from modelfiles import CHATML, CONFIG, IDS, write_folder, write_gguf
from smallmodels import logits

from minilora.cli import main
from minilora.engine import fused
from minilora.engine.backend import is_packed
from minilora.engine.gradcheck import gradcheck
from minilora.engine.tensor import Tensor, no_grad
from minilora.files.disk import ModelFileError
from minilora.files.gguf import to_halves
from minilora.files.quant import Packed, quantize
from minilora.lora.adapters import adapter_state, add_adapter, base_state, merge_adapter, merged_state, unmerge_adapter
from minilora.lora.audit import audit
from minilora.lora.config import LoraConfig
from minilora.lora.peft import load_adapter, save_adapter
from minilora.measure.counts import count_parameters
from minilora.models import load as zoo
from minilora.models.folder import save_folder
from minilora.models.gguf import GGUF, save_gguf
from minilora.nn import module
from minilora.nn.llama import Llama
from minilora.nn.module import Parameter, sha256_of
from minilora.nn.optim import AdamW
from minilora.train.options import Options

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q, V = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight"
CONFIGS = {
    "plain": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    "dropout": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.3),
    "dora": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True),
    "pissa": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="pissa"),
    "embedding": LoraConfig(r=4, lora_alpha=8, target_modules=[*ALL, "embed_tokens"], use_dora=True),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One small model as a GGUF file of each kind."""
    folder, model = tmp_path_factory.mktemp("quantized"), Llama(CONFIG, np.random.default_rng(0))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data *= np.float32(10)  # attention far from uniform
    return {kind: write_gguf(folder / f"{kind}.gguf", model, kind) for kind in ("F32", "F16", "Q8_0", "Q4_1")}


@pytest.fixture(params=["Q8_0", "Q4_1"])
def file(files, request):
    return files[request.param]


def both(file):
    """The same file, loaded dense and packed."""
    return zoo.load(file)[0], zoo.load(file, quantized=True)[0]


def trained(model, config, steps=2):
    """The losses of a few steps of AdamW, and the adapter that came out of them."""
    add_adapter(model, config, seed=3)
    optimizer, losses = AdamW(model.trainable_parameters(), lr=1e-2), []
    model.train()
    for _ in range(steps):
        loss = model.loss(IDS, IDS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses, {name: w.copy() for name, w in adapter_state(model, "default").items()}


# -- what is loaded ----------------------------------------------------------------------------------------------------


def test_matrices_hold_the_bytes_of_the_file_and_norms_are_float32(file):
    source, (_, packed) = GGUF(file), both(file)
    for name, w in packed.state_dict().items():
        stored = source.tensors[name]
        if w.ndim == 1:
            assert w.dtype == np.float32 and type(w) is np.ndarray
        else:
            assert (w.kind, w.nbytes) == (stored.tensor_type.name, stored.n_bytes)
    np.testing.assert_array_equal(packed.state_dict()[V].raw, source.tensors[V].data)
    np.testing.assert_array_equal(packed.state_dict()[Q].raw, to_halves(np.array(source.tensors[Q].data), 4))


def test_packed_weights_are_the_dense_ones_and_count_as_many(file):
    dense, packed = both(file)
    for name, w in dense.state_dict().items():
        other = packed.state_dict()[name]
        np.testing.assert_array_equal(other.unpack() if is_packed(other) else other, w, err_msg=name)
    assert count_parameters(packed).total == count_parameters(dense).total
    assert {name for name in packed.trainable_parameters() if "norm" not in name} == set()


def test_the_model_does_not_depend_on_its_file(files, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(files["Q4_1"].read_bytes())
    model = zoo.load(path, quantized=True)[0]
    before = logits(model, IDS)
    path.write_bytes(bytes(len(path.read_bytes())))
    np.testing.assert_array_equal(logits(model, IDS), before)


def test_damaged_steps_are_named_when_the_matrix_stays_packed(files, tmp_path):
    content, source = bytearray(files["Q4_1"].read_bytes()), GGUF(files["Q4_1"])
    at = int(source.tensors[V].data_offset)
    content[at : at + 2] = np.float16(np.nan).tobytes()
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelFileError, match=rf"{V} holds NaN"):
        GGUF(tmp_path / "m.gguf").load(quantized=True)


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_a_file_without_packed_matrices_is_refused(files, kind):
    with pytest.raises(ModelFileError, match=rf"{kind}.gguf: the file holds no quantised matrices, only .*{kind}"):
        zoo.load(files[kind], quantized=True)


def test_a_hugging_face_folder_is_refused(tmp_path, rng):
    with pytest.raises(ModelFileError, match="holds no quantised matrices"):
        zoo.load(write_folder(tmp_path / "base", Llama(CONFIG, rng)), quantized=True)


# -- what is computed --------------------------------------------------------------------------------------------------


def test_logits_and_loss_are_the_dense_models_bit_for_bit(file):
    dense, packed = both(file)
    np.testing.assert_array_equal(logits(packed, IDS), logits(dense, IDS))
    assert packed.loss(IDS, IDS).item() == dense.loss(IDS, IDS).item()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_training_steps_over_packed_weights_are_those_over_dense_ones_bit_for_bit(file, config):
    (dense_losses, dense), (packed_losses, packed) = (trained(model, config) for model in both(file))
    assert packed_losses == dense_losses and packed_losses[1] < packed_losses[0]
    assert packed.keys() == dense.keys()
    for name, w in packed.items():
        np.testing.assert_array_equal(w, dense[name], err_msg=name)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_bytes_of_the_base_are_the_same_after_training_merging_and_auditing(file, config):
    _, model = both(file)
    arrays, digest = dict(model.state_dict()), sha256_of(base_state(model))
    trained(model, config)
    beside_it = logits(model, IDS)
    merge_adapter(model)
    np.testing.assert_allclose(logits(model, IDS), beside_it, atol=1e-3)
    assert sha256_of(base_state(model)) == digest
    unmerge_adapter(model)
    np.testing.assert_array_equal(logits(model, IDS), beside_it)
    assert f"sha256 {digest[:16]}" in dict(audit(model, "default").checks)["base"]
    after = base_state(model)
    assert sha256_of(after) == digest and all(after[name] is w for name, w in arrays.items())


def test_a_packed_model_has_the_hash_of_its_numbers_and_another_byte_is_another(file, monkeypatch):
    dense, packed = (model.state_dict() for model in both(file))
    digest = sha256_of(dense)
    assert sha256_of(packed) == digest
    monkeypatch.setattr(module, "_HASHED", 100)  # a few rows at a time
    assert sha256_of(packed) == sha256_of(dense) == digest
    packed[V].raw[0, 5] ^= 1
    assert sha256_of(packed) != digest


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_gradients_through_a_packed_matrix_agree_with_measured_ones(kind, rng):
    w = Packed(quantize(rng.standard_normal((6, 32), dtype=np.float32), kind), kind)
    x, a, b = rng.standard_normal((2, 3, 32)), rng.standard_normal((2, 32)), rng.standard_normal((6, 2))
    labels = np.array([[1, 5, -100], [0, 0, 3]])
    gradcheck(lambda x: fused.linear(x, w), x)
    gradcheck(lambda x, a, b: fused.lora_linear(x, w, a, b, scale=2.0), x, a, b)
    gradcheck(lambda x: fused.linear_cross_entropy(x, w, labels), x)


def test_a_head_of_more_rows_than_are_unpacked_at_a_time_gives_the_dense_loss_and_gradient(rng):
    w = Packed(quantize(rng.standard_normal((20000, 32), dtype=np.float32), "Q8_0"), "Q8_0")
    labels = rng.integers(0, 20000, (1, 9))
    results = []
    for matrix in (w, w.unpack()):
        x = Tensor(np.random.default_rng(1).standard_normal((1, 9, 32)), requires_grad=True)
        loss = fused.linear_cross_entropy(x, matrix, labels)
        loss.backward()
        results.append((loss.item(), x.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-9, atol=1e-12)


def test_a_packed_matrix_cannot_be_made_trainable(file):
    _, model = both(file)
    before = set(model.trainable_parameters())
    w = dict(model.named_parameters())[V]
    for attempt in (
        lambda: setattr(w, "requires_grad", True),
        lambda: model.requires_grad_(True),
        lambda: Parameter(w.data),
    ):
        with pytest.raises(ValueError, match="packed matrix is frozen: load the model without quantized, "):
            attempt()
    assert set(model.trainable_parameters()) == before and w.grad is None


def test_on_a_device_the_bytes_are_moved_and_the_logits_are_the_hosts(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", strictarray)
    dense, there = zoo.load(file)[0], zoo.load(file, quantized=True, device="cuda")[0]
    assert {type(w.raw) for w in there.state_dict().values() if is_packed(w)} == {strictarray.ndarray}
    np.testing.assert_allclose(logits(there, IDS), logits(dense, IDS), rtol=1e-5, atol=1e-5)
    losses, _ = trained(there, CONFIGS["plain"])
    assert losses == pytest.approx(trained(dense, CONFIGS["plain"])[0], rel=1e-5)


# -- files out of it ---------------------------------------------------------------------------------------------------


def test_an_adapter_saved_over_one_base_loads_over_the_other(file, tmp_path):
    dense, packed = both(file)
    trained(packed, CONFIGS["embedding"])
    save_adapter(packed, tmp_path / "adapter")
    load_adapter(dense, tmp_path / "adapter")
    np.testing.assert_array_equal(logits(dense, IDS), logits(packed, IDS))
    loaded = zoo.load(file, quantized=True)[0]
    load_adapter(loaded, tmp_path / "adapter")
    np.testing.assert_array_equal(logits(loaded, IDS), logits(packed, IDS))


def test_a_packed_model_is_written_as_the_numbers_it_stands_for(file, tmp_path):
    dense, (packed, tokenizer) = zoo.load(file)[0], zoo.load(file, quantized=True)
    save_folder(tmp_path / "hf", packed.config, packed.state_dict(), tokenizer)
    save_gguf(tmp_path / "m.gguf", packed.config, packed.state_dict(), tokenizer, "F32")
    for place in (tmp_path / "hf", tmp_path / "m.gguf"):
        loaded = zoo.load(place)[0].state_dict()
        for name, w in dense.state_dict().items():
            np.testing.assert_array_equal(loaded[name], w, err_msg=name)


def test_an_update_merged_into_packed_weights_is_the_one_merged_into_dense_ones(file):
    states = []
    for model in both(file):
        trained(model, CONFIGS["embedding"])
        merge_adapter(model)
        states.append(merged_state(model))
    dense, packed = states
    for name, w in dense.items():
        other = packed[name]
        np.testing.assert_array_equal(other.unpack() if is_packed(other) else other, w, err_msg=name)


# -- the command line --------------------------------------------------------------------------------------------------


def test_packed_weights_and_full_fine_tuning_exclude_each_other(capsys):
    with pytest.raises(ValueError, match="packed weights cannot be trained"):
        Options(method="full", quantized=True)
    assert main(["finetune", "--method", "full", "--quantized"]) == 2
    complaint = capsys.readouterr().err.strip()
    assert complaint == "minilora: --quantized means nothing with --method full: leave out one of the two"


def test_the_whole_job_runs_over_a_packed_base(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Llama(replace(CONFIG, max_position_embeddings=1024), np.random.default_rng(1))
    base = str(write_gguf(tmp_path / "base.gguf", model, "Q8_0", change={"tokenizer.chat_template": CHATML}))
    job = ["finetune", "--base", base, "--data", str(tiny_folder / "data.jsonl"), "--steps", "2", "--r", "2", "--out"]
    assert main([*job, "packed", "--quantized", "--recompute"]) == 0
    metrics = json.loads((tmp_path / "packed" / "metrics.json").read_text())
    assert metrics["options"]["quantized"] and metrics["options"]["recompute"]
    assert metrics["base_sha256"][0] == metrics["base_sha256"][1]
    packed = zoo.load(base, quantized=True)[0]
    assert metrics["base_bytes"] == sum(w.nbytes for w in packed.state_dict().values())
    assert metrics["base_bytes"] < sum(w.nbytes for w in model.state_dict().values()) / 3
    assert main(["audit", "packed", "--base", base, "--quantized"]) == 0
    assert metrics["base_sha256"][0][:16] in capsys.readouterr().out
    answers = []
    for flags in (["--quantized"], []):
        assert main(["chat", "--base", base, "--adapter", "packed", "--prompt", "hello", *flags]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


# -- the real one ------------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_smollm2_takes_the_bytes_of_its_file_and_computes_what_the_dense_model_computes(smollm2):
    dense, tokenizer = smollm2
    packed, _ = zoo.load("smollm2", quantized=True)
    source, state = GGUF(zoo.find("smollm2")), packed.state_dict()
    assert sum(w.nbytes for w in state.values()) == sum(t.n_bytes for t in source.tensors.values()) == 96_576_768
    assert sum(is_packed(w) for w in state.values()) == 211
    ids = np.array([tokenizer.encode("The capital of France is Paris.")])
    with no_grad():
        np.testing.assert_array_equal(packed.model(ids).data, dense.model(ids).data)
    # The packed head is multiplied some rows at a time: not every processor then adds in the order of one product.
    np.testing.assert_allclose(logits(packed, ids), logits(dense, ids), atol=2e-4)
    digest = sha256_of(base_state(packed))
    assert digest == sha256_of(base_state(dense))
    add_adapter(packed, LoraConfig(r=8, lora_alpha=16))
    loss = packed.loss(ids, ids)
    loss.backward()
    with no_grad():
        assert loss.item() == pytest.approx(dense.loss(ids, ids).item(), rel=1e-6)
    assert all(p.grad.any() for name, p in packed.trainable_parameters().items() if name.endswith("lora_B"))
    assert sha256_of(base_state(packed)) == digest
