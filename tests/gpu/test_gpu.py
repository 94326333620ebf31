"""CPU against GPU: every operation, a training step, generation, an adapter's file. The same code, other arithmetic."""

import copy

import numpy as np
import pytest

from minilora.engine.backend import array_module, to_device, to_numpy
from minilora.engine.examples import EXAMPLES
from minilora.engine.fused import NOT_SCORED
from minilora.engine.tensor import OPS, Tensor, no_grad
from minilora.io import zoo
from minilora.lora.adapters import adapter_state, add_adapter, base_state, merge_adapter, unmerge_adapter
from minilora.lora.audit import audit
from minilora.lora.config import LoraConfig
from minilora.lora.peft import load_adapter, save_adapter
from minilora.nn.llama import Llama
from minilora.nn.module import sha256_of
from minilora.nn.parts import Sample
from minilora.train.evaluate import mean_loss
from minilora.train.generate import generate_batch
from minilora.train.loop import fit

pytestmark = pytest.mark.gpu

IDS = np.arange(24).reshape(2, 12) * 7 % 64
VARIANTS = [{}, {"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "pissa"},
            {"target_modules": ["embed_tokens", "v_proj"]}]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def gpu():
    """CuPy, where it can compute; prints the card that gave the numbers."""
    cupy = pytest.importorskip("cupy", reason="needs CuPy: pip install 'minilora[gpu]'")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"needs a GPU: {error}")
    if not count:
        pytest.skip("needs a GPU: CuPy finds none")
    print(cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())
    return cupy


def new_model(config, device):
    model = Llama(config, np.random.default_rng(0))
    model.model.embed_tokens.weight.data *= 10  # so that its logits say something
    for _, parameter in model.named_parameters():
        parameter.data = to_device(parameter.data, device)
    return model


def samples():
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 64, n).tolist() for n in (12, 9, 15, 10, 8, 14)]
    return [Sample(tuple(row), (NOT_SCORED, NOT_SCORED, *row[2:])) for row in rows]


def trained(config, device, steps=5, **lora):
    model = new_model(config, device)
    add_adapter(model, LoraConfig(r=4, lora_alpha=8, **lora), seed=0)
    return model, fit(model, samples(), steps, lr=1e-2, batch_size=3)


def logits(model, device):
    with no_grad():
        return to_numpy(model(to_device(IDS, device)).data)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("name", list(OPS))
def test_every_operation_and_its_gradient_agree(name, dtype, tolerance):
    arrays, settings = EXAMPLES[name](np.random.default_rng(0))

    def computed(device):
        inputs = [Tensor(to_device(x.astype(dtype), device), requires_grad=True) for x in arrays]
        options = {k: to_device(v, device) if isinstance(v, np.ndarray) else v for k, v in settings.items()}
        y = OPS[name](*inputs, **options)
        g = np.random.default_rng(1).standard_normal(y.shape).astype(dtype)
        y.backward(to_device(np.asarray(g), device))
        return [to_numpy(y.data), *(to_numpy(x.grad) for x in inputs)]

    for here, there in zip(computed("cpu"), computed("cuda"), strict=True):
        assert here.dtype == there.dtype == dtype and here.shape == there.shape
        np.testing.assert_allclose(there, here, rtol=tolerance, atol=tolerance * max(1.0, float(np.abs(here).max())))


@pytest.mark.parametrize("lora", VARIANTS, ids=str)
def test_training_steps_agree(tiny_config, lora):
    (here, expected), (there, history) = (trained(tiny_config, device, **lora) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(history.losses, expected.losses, rtol=1e-4)
    wanted = adapter_state(here, "default")
    for name, array in adapter_state(there, "default").items():
        assert array_module(array).__name__ == "cupy"
        np.testing.assert_allclose(to_numpy(array), wanted[name], atol=2e-3, err_msg=name)


def test_the_base_does_not_move_and_a_fresh_adapter_changes_no_bit(tiny_config):
    model = new_model(tiny_config, "cuda")
    before, digest = logits(model, "cuda"), sha256_of(base_state(model))
    add_adapter(model, LoraConfig(r=4, lora_alpha=8))
    assert np.array_equal(logits(model, "cuda"), before)
    fit(model, samples(), 3, lr=1e-2, batch_size=3)
    assert sha256_of(base_state(model)) == digest and not np.array_equal(logits(model, "cuda"), before)


def test_evaluation_agrees(tiny_config):
    losses = [mean_loss(new_model(tiny_config, device), samples(), 4) for device in ("cpu", "cuda")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generation_agrees(tiny_folder, temperature):
    talks = [[{"role": "user", "content": text}] for text in ("hello", "a longer question than that", "x")]
    answers = []
    for device in ("cpu", "cuda"):
        model, words = zoo.load(tiny_folder / "base", device=device)
        answers.append(generate_batch(model, words, talks, 6, temperature, seed=3))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("lora", VARIANTS, ids=str)
def test_an_adapter_trained_on_the_gpu_is_saved_and_gives_the_same_logits_on_the_cpu(tiny_config, lora, tmp_path):
    model, _ = trained(tiny_config, "cuda", **lora)
    save_adapter(model, tmp_path)
    other = new_model(tiny_config, "cpu")
    load_adapter(other, tmp_path)
    np.testing.assert_allclose(logits(other, "cpu"), logits(model, "cuda"), atol=1e-4)


@pytest.mark.parametrize("lora", VARIANTS, ids=str)
def test_merge_and_unmerge(tiny_config, lora):
    model, _ = trained(tiny_config, "cuda", **lora)
    before, digest = logits(model, "cuda"), sha256_of(base_state(model))
    merge_adapter(model)
    np.testing.assert_allclose(logits(model, "cuda"), before, atol=1e-4)
    unmerge_adapter(model)
    assert sha256_of(base_state(model)) == digest and np.array_equal(logits(model, "cuda"), before)


def test_the_audit_passes(tiny_config):
    model, _ = trained(tiny_config, "cuda")
    assert audit(model, "default").checks


def test_dropout_runs(tiny_config):
    _, history = trained(tiny_config, "cuda", lora_dropout=0.3)  # other holes than on the CPU: another generator
    assert np.isfinite(history.losses).all()


@pytest.mark.real
def test_the_real_model_agrees(smollm2):
    model, words = smollm2
    ids = np.array([words.encode("A contract is a promise that the law will enforce.")])
    other = copy.deepcopy(model)
    for _, parameter in other.named_parameters():
        parameter.data = to_device(parameter.data, "cuda")
    with no_grad():
        here, there = model(ids).data, to_numpy(other(to_device(ids, "cuda")).data)
    print(f"largest difference of logits: {np.abs(here - there).max():.1e}, of {np.abs(here).max():.1f}")
    np.testing.assert_allclose(there, here, atol=1e-3 * np.abs(here).max())
