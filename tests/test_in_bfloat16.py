"""A model that multiplies in bfloat16: near the one in float32, the same base to all who ask, and off by default."""

import json
from dataclasses import replace

import numpy as np
import pytest
from commandline import complaint, status
from modelfiles import CONFIG, IDS, write_folder, write_gguf
from smallmodels import logits
from threadpoolctl import threadpool_info

import minilora as ml
from minilora.engine import bfloat16
from minilora.engine.backend import is_packed
from minilora.engine.parallel import cores, leave_cores
from minilora.files.quant import Packed, in_float32, quantize
from minilora.lora.adapters import adapter_state, base_state
from minilora.measure.memory import Job, step_of
from minilora.models import load as zoo
from minilora.models.folder import load_folder
from minilora.models.with_adapters import load_with_adapters
from minilora.nn.module import sha256_of
from minilora.nn.step import loss_and_grad
from minilora.train.options import Options

here = pytest.mark.skipif(bfloat16.why_not() is not None, reason=str(bfloat16.why_not()))
LORA = ml.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
KINDS = {
    "plain": LORA,
    "dora": replace(LORA, use_dora=True),
    "pissa": replace(LORA, init_lora_weights="pissa"),
}


def tiny(**settings):
    return ml.load("tiny", **settings)[0]


def gradients(model):
    """The loss of a batch, and all gradients as one vector."""
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (4, 80))
    loss = loss_and_grad(model, ids, ids).item()
    return loss, np.concatenate([p.grad.reshape(-1) for p in model.trainable_parameters().values()])


def assert_alike(found, expected):
    """Two vectors of the same direction, within 4 degrees, and of the same length, within 5 %."""
    lengths = np.linalg.norm(found), np.linalg.norm(expected)
    assert found @ expected / np.prod(lengths) > 0.9976
    assert lengths[0] == pytest.approx(lengths[1], rel=0.05)


@pytest.fixture(autouse=True)
def cores_given_back():
    yield
    leave_cores(False)


# -- not asked for, and where it cannot be -----------------------------------------------------------------------------


def test_a_machine_that_cannot_says_so_in_one_line_and_computes_in_float32(monkeypatch, caplog):
    monkeypatch.setattr(bfloat16, "why_not", lambda: "no such thing here")
    model, plain = tiny(dtype="bfloat16"), tiny()
    assert caplog.messages == ["computing in float32, not in bfloat16: no such thing here"]
    np.testing.assert_array_equal(logits(model, IDS % 512), logits(plain, IDS % 512))
    assert model.rounded_to is None
    assert not any(is_packed(w) for w in plain.state_dict().values()) and not Options().bf16  # unless asked for


def test_other_dtypes_devices_and_methods_are_refused(capsys):
    for settings, message in (
        (dict(dtype="float16"), "dtype must be 'float32' or 'bfloat16', got 'float16'"),
        (dict(dtype="bfloat16", device="cuda"), "dtype 'bfloat16' is for device 'cpu'"),
    ):
        with pytest.raises(ValueError, match=message):
            ml.load("tiny", **settings)
    for flags, message in ((["--method", "full"], "bf16"), (["--device", "cuda"], "bf16 is for device 'cpu'")):
        assert status("finetune", "--base", "tiny", "--bf16", *flags) == 2
        assert message in complaint(capsys)


@here
def test_while_another_library_multiplies_numpys_own_uses_one_core():
    def threads():
        return max(each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas")

    before, most = threads(), cores()
    for dtype, expected in (("bfloat16", 1), ("bfloat16", 1), ("float32", before), ("float32", before)):
        tiny(dtype=dtype)
        assert (threads(), cores()) == (expected, most)


# -- what is loaded ----------------------------------------------------------------------------------------------------


@here
def test_matrices_are_the_nearest_bfloat16s_and_norms_are_float32():
    model, exact = tiny(dtype="bfloat16"), tiny().state_dict()
    for name, w in model.state_dict().items():
        if w.ndim == 1:
            np.testing.assert_array_equal(w, exact[name])
        else:
            assert (w.kind, w.nbytes) == ("BF16", exact[name].nbytes // 2)
            np.testing.assert_array_equal(w.unpack(), bfloat16.to_float32(bfloat16.rounded(exact[name])))
    held = sum(w.nbytes for w in model.state_dict().values())
    steps = {bf16: step_of(Job(base="tiny", bf16=bf16)) for bf16 in (False, True)}
    assert (steps[False].base_bytes, steps[True].base_bytes) == (None, held)  # as memory is predicted
    assert not steps[False].unpacks and not steps[True].unpacks


@here
def test_a_folder_in_bfloat16_is_loaded_without_a_loss(tmp_path):
    model = ml.Llama(CONFIG, 0)
    for _, parameter in model.named_parameters():
        parameter.data = bfloat16.to_float32(bfloat16.rounded(parameter.data))
    found = load_folder(write_folder(tmp_path / "m", model, "BF16"), "BF16")
    assert found.unrounded_sha256 == sha256_of(base_state(model)) == sha256_of(base_state(found))


@here
def test_packed_matrices_stay_as_their_file_holds_them(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", ml.Llama(CONFIG, 0), "Q4_1")
    packed, plain = zoo.load(path, quantized=True, dtype="bfloat16")[0], zoo.load(path, quantized=True)[0]
    for name, w in packed.state_dict().items():
        if is_packed(w):
            assert w.in_bfloat16 and w.kind != "BF16"
            np.testing.assert_array_equal(w.raw, plain.state_dict()[name].raw)
    assert packed.rounded_to is None
    assert sha256_of(base_state(packed)) == sha256_of(base_state(plain))
    assert not np.array_equal(logits(packed, IDS), logits(plain, IDS))


@here
@pytest.mark.parametrize("kind", ["BF16", "Q4_1", "Q8_0", "NF4"])
def test_a_packed_matrix_is_dequantised_and_then_rounded_and_is_finite_if_its_values_are(kind, rng):
    w = rng.standard_normal((2100, 64), dtype=np.float32)
    w[5, 5] = 3e38 if kind == "BF16" else 1
    packed = Packed(quantize(w, kind), kind, in_bfloat16=True)
    np.testing.assert_array_equal(packed.factor().stored, bfloat16.rounded(packed.unpack()))
    np.testing.assert_array_equal(packed.factor(17, 2090).stored, bfloat16.rounded(packed.unpack(17, 2090)))
    assert packed.is_finite()
    for bad in (np.nan, np.inf, -np.inf) if kind == "BF16" else ():
        w[2099, 7] = bad
        assert not Packed(quantize(w, kind), kind).is_finite()


# -- what is computed --------------------------------------------------------------------------------------------------


@here
@pytest.mark.parametrize(  # PiSSA's initial A and B differ
    ("kind", "quantized"), [("plain", False), ("dora", "q8_0")]
)
def test_loss_and_gradients_are_near_those_in_float32_and_the_same_bits_in_each_run(kind, quantized):
    results = []
    for settings in (dict(), dict(dtype="bfloat16"), dict(dtype="bfloat16", recompute=True)):
        model = tiny(quantized=quantized, **settings)
        ml.add_adapter(model, KINDS[kind], seed=1)
        for name, w in adapter_state(model, "default").items():
            w *= 1 if "magnitude" in name else 0.1
        results.append(gradients(model))
    (loss, grads), (close, near), (again, same) = results
    assert close == pytest.approx(loss, rel=5e-3) and close != loss
    assert_alike(near, grads)
    assert again == close
    np.testing.assert_array_equal(same, near)


@here
def test_matmuls_in_float32_can_be_asked_for():
    model, plain = tiny(dtype="bfloat16"), tiny()
    for name, w in base_state(model).items():
        base_state(plain)[name][...] = w.unpack() if is_packed(w) else w
    with in_float32(base_state(model).values()):
        np.testing.assert_allclose(logits(model, IDS % 512), logits(plain, IDS % 512), atol=1e-4)
    assert abs(logits(model, IDS % 512) - logits(plain, IDS % 512)).max() > 1e-3


@here
def test_rows_of_a_mixed_batch_are_near_what_they_are_alone():
    model = tiny(dtype="bfloat16")
    for seed, name in enumerate(("a", "b")):
        ml.add_adapter(model, LORA, name=name, seed=seed)
    rows, names = np.arange(12).reshape(3, 4), ["a", None, "b"]
    alone = []
    for i, name in enumerate(names):
        ml.set_adapter(model, name)
        alone.append(logits(model, rows[i : i + 1])[0])
    with ml.mixed_batch(model, names):
        together = logits(model, rows)
    scale = abs(np.stack(alone)).max()
    assert abs(together - np.stack(alone)).max() < 0.03 * scale
    other = logits(model, rows[:1])[0]  # b is still active: another adapter is further away than rounding
    assert abs(other - alone[0]).max() > 0.1 * scale


@here
def test_matrices_are_frozen_and_training_leaves_them_alone():
    model, tokenizer = ml.load("tiny", dtype="bfloat16")
    with pytest.raises(ValueError, match="packed matrix is frozen: load the model without quantized, and with dtype="):
        model.requires_grad_(True)
    samples = ml.encode_text("The contract is void. " * 20, tokenizer, 40)
    before = sha256_of(base_state(model))
    ml.add_adapter(model, ml.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    history = ml.fit(model, samples, steps=5, lr=5e-3, batch_size=2)
    assert history.losses[-1] < history.losses[0] - 0.2
    assert sha256_of(base_state(model)) == before


# -- one base for adapters of both -------------------------------------------------------------------------------------


@here
@pytest.mark.parametrize("kind", KINDS)
def test_every_promise_of_an_adapter_is_kept(kind):
    model = tiny(dtype="bfloat16")
    ml.add_adapter(model, KINDS[kind], seed=1)
    for name, w in adapter_state(model, "default").items():
        w *= 0.1 if "magnitude" not in name and kind != "pissa" else 1
    report = ml.audit(model, "default")
    assert "merged = unmerged" in dict(report.checks)["merge"]
    assert all(w.in_bfloat16 for w in base_state(model).values() if is_packed(w))


@here
def test_adapters_cross_between_both(tmp_path, caplog):
    for dtype in ("float32", "bfloat16"):
        model = tiny(dtype=dtype)
        ml.add_adapter(model, LORA, seed=1)
        ml.save_adapter(model, tmp_path / dtype)
    note = json.loads((tmp_path / "bfloat16" / "minilora.json").read_text())["base"]
    assert note["rounded_to"] == "bf16" and note["unrounded_sha256"] == sha256_of(base_state(tiny()))
    with caplog.at_level("INFO", "minilora"):
        for made in ("float32", "bfloat16"):
            for dtype in ("float32", "bfloat16"):
                model, _ = load_with_adapters({made: tmp_path / made}, dtype=dtype)
                assert set(model.adapters) == {made}
    assert caplog.messages == []
