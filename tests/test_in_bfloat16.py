"""A model that multiplies in bfloat16: near the one in float32, the same base to all who ask, and off by default."""

import json
from dataclasses import replace

import numpy as np
import pytest
from commandline import complaint, status
from jobs import options
from modelfiles import CONFIG, IDS, write_folder, write_gguf
from smallmodels import logits
from threadpoolctl import threadpool_info

import minilora as ml
from minilora.engine import bfloat16
from minilora.engine.backend import is_packed
from minilora.engine.parallel import cores, leave_cores
from minilora.files.quant import Packed, in_float32, quantize
from minilora.lora.adapters import adapter_state, base_state
from minilora.measure.process import Job, step_of
from minilora.models import load as zoo
from minilora.models.folder import load_folder
from minilora.models.with_adapters import load_with_adapters
from minilora.nn.module import sha256_of
from minilora.nn.step import loss_and_grad
from minilora.train.job import finetune
from minilora.train.options import Options

here = pytest.mark.skipif(bfloat16.why_not() is not None, reason=str(bfloat16.why_not()))
LORA = ml.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
KINDS = {
    "plain": LORA,
    "dora": replace(LORA, use_dora=True),
    "pissa": replace(LORA, init_lora_weights="pissa"),
    "embedding": replace(LORA, target_modules=["q_proj", "embed_tokens"]),
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


def test_nobody_meets_it_who_does_not_ask():
    assert not any(is_packed(w) for w in tiny().state_dict().values())
    assert not Options().bf16


def test_a_machine_that_cannot_says_so_in_one_line_and_computes_in_float32(monkeypatch, caplog):
    monkeypatch.setattr(bfloat16, "why_not", lambda: "no such thing here")
    model = tiny(dtype="bfloat16")
    assert caplog.messages == ["computing in float32, not in bfloat16: no such thing here"]
    np.testing.assert_array_equal(logits(model, IDS % 512), logits(tiny(), IDS % 512))
    assert model.rounded_to is None


@pytest.mark.parametrize(("settings", "message"), [
    (dict(dtype="float16"), "dtype must be 'float32' or 'bfloat16', got 'float16'"),
    (dict(dtype="bfloat16", device="cuda"), "dtype 'bfloat16' is for device 'cpu'"),
])  # fmt: skip
def test_other_wishes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ml.load("tiny", **settings)


@pytest.mark.parametrize(("flags", "message"), [
    (["--method", "full", "--bf16"], "bf16"),
    (["--bf16", "--device", "cuda"], "bf16 is for device 'cpu'"),
])  # fmt: skip
def test_the_command_refuses_what_means_nothing(flags, message, capsys):
    assert status("finetune", "--base", "tiny", *flags) == 2
    assert message in complaint(capsys)


@here
def test_while_another_library_multiplies_numpys_own_uses_one_core():
    def threads():
        return max(each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas")

    before, most = threads(), cores()
    for _ in range(2):
        tiny(dtype="bfloat16")
        assert (threads(), cores()) == (1, most)
    for _ in range(2):
        tiny()
        assert (threads(), cores()) == (before, most)


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
            assert np.all(abs(w.unpack() - exact[name]) <= 2.0**-8 * abs(exact[name]))


@here
def test_a_folder_in_bfloat16_is_loaded_without_a_loss(tmp_path):
    model = ml.Llama(CONFIG, 0)
    for parameter in model.named_parameters():
        parameter[1].data = bfloat16.to_float32(bfloat16.rounded(parameter[1].data))
    folder = write_folder(tmp_path / "m", model, "BF16")
    found = load_folder(folder, "BF16")
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
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "NF4"])
def test_a_packed_matrix_is_unpacked_and_then_rounded(kind, rng):
    w = Packed(quantize(rng.standard_normal((300, 1024), dtype=np.float32), kind), kind, in_bfloat16=True)
    np.testing.assert_array_equal(w.factor().bits, bfloat16.rounded(w.unpack()))
    np.testing.assert_array_equal(w.factor(17, 290).bits, bfloat16.rounded(w.unpack(17, 290)))


@here
def test_numbers_that_are_none_are_found(rng):
    w = rng.standard_normal((2100, 8), dtype=np.float32)
    assert Packed(quantize(w, "BF16"), "BF16").is_finite()
    for bad in (np.nan, np.inf, -np.inf):
        w[2099, 7] = bad
        assert not Packed(quantize(w, "BF16"), "BF16").is_finite()


@here
def test_memory_is_predicted_with_half_the_bytes():
    sizes = {bf16: step_of(Job(base="tiny", bf16=bf16)).base_bytes for bf16 in (False, True)}
    held = sum(w.nbytes for w in tiny(dtype="bfloat16").state_dict().values())
    assert sizes == {False: None, True: held}


# -- what is computed --------------------------------------------------------------------------------------------------


@here
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pissa"])  # the start of PiSSA is another
@pytest.mark.parametrize("quantized", [False, "q8_0"])
def test_loss_and_gradients_are_near_those_in_float32(kind, quantized):
    results = []
    for dtype in ("float32", "bfloat16"):
        model = tiny(quantized=quantized, dtype=dtype)
        ml.add_adapter(model, KINDS[kind], seed=1)
        for name, w in adapter_state(model, "default").items():
            w *= 1 if "magnitude" in name else 0.1
        results.append(gradients(model))
    (loss, grads), (close, near) = results
    assert close == pytest.approx(loss, rel=5e-3) and close != loss
    assert_alike(near, grads)


@here
def test_products_in_float32_can_be_asked_for():
    model, plain = tiny(dtype="bfloat16"), tiny()
    for name, w in base_state(model).items():
        base_state(plain)[name][...] = w.unpack() if is_packed(w) else w
    with in_float32(base_state(model).values()):
        np.testing.assert_allclose(logits(model, IDS % 512), logits(plain, IDS % 512), atol=1e-4)
    assert abs(logits(model, IDS % 512) - logits(plain, IDS % 512)).max() > 1e-3


@here
@pytest.mark.parametrize("recompute", [False, True])
def test_the_same_step_gives_the_same_bits(recompute):
    def once():
        model = tiny(dtype="bfloat16", recompute=recompute)
        ml.add_adapter(model, LORA, seed=1)
        return gradients(model)

    (loss, grads), (again, more) = once(), once()
    assert loss == again
    np.testing.assert_array_equal(grads, more)


@here
def test_recomputing_changes_nothing():
    kept, recomputed = (tiny(dtype="bfloat16", recompute=recompute) for recompute in (False, True))
    for model in (kept, recomputed):
        ml.add_adapter(model, LORA, seed=1)
    np.testing.assert_array_equal(gradients(kept)[1], gradients(recomputed)[1])


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
    other = logits(model, rows[:1])[0]  # b is chosen still: another adapter is further away than rounding
    assert abs(other - alone[0]).max() > 0.1 * scale


@here
def test_matrices_are_frozen_and_training_leaves_them_alone():
    model, tokenizer = ml.load("tiny", dtype="bfloat16")
    with pytest.raises(ValueError, match="packed matrix is frozen: load the model without quantized, and in float32"):
        model.requires_grad_(True)
    samples = ml.encode_records(ml.split_records(ml.read_records("legal"))["train"][:16], tokenizer)
    before = sha256_of(base_state(model))
    ml.add_adapter(model, ml.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    start = ml.mean_loss(model, samples)
    ml.fit(model, samples, steps=6, lr=5e-3)
    assert ml.mean_loss(model, samples) < start - 0.2
    assert sha256_of(base_state(model)) == before


# -- one base to all who ask -------------------------------------------------------------------------------------------


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
    with caplog.at_level("INFO", "minilora"):
        for made in ("float32", "bfloat16"):
            for dtype in ("float32", "bfloat16"):
                model, _ = load_with_adapters({made: tmp_path / made}, dtype=dtype)
                assert set(model.adapters) == {made}
    assert caplog.messages == []


@here
def test_a_job_ends_twice_with_the_same_bytes_and_says_what_its_base_was(tiny_folder, tmp_path):
    for name in ("one", "two"):
        metrics = finetune(options(tiny_folder, tmp_path / name, bf16=True))
        assert "audit_failed" not in metrics
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    note = json.loads((tmp_path / "one" / "minilora.json").read_text())["base"]
    assert note["rounded_to"] == "bf16"
    assert note["unrounded_sha256"] == sha256_of(base_state(ml.load(tiny_folder / "base")[0]))
    assert "rounded to bf16;" in " ".join((tmp_path / "one" / "README.md").read_text().split())
