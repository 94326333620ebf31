"""A device does what the host does: every operation, training, generation, adapters and their files, in one suite.

It runs twice: on a strict stand-in for CuPy, which computes as NumPy does, so that the very bits must come out; and on
a GPU, where there is one, within rounding.
"""

import copy
import itertools
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import strictarray
from smallmodels import IDS, VARIANTS, logits, new_model, random_samples, sent

from minilora.engine.attention import Packing, attention
from minilora.engine.backend import array_module, to_device, to_numpy
from minilora.engine.examples import EXAMPLES
from minilora.engine.tensor import OPS, Tensor, no_grad
from minilora.generate.answers import generate_batch
from minilora.generate.streams import Streams
from minilora.lora.adapters import add_adapter, base_state, disable_adapter, merge_adapter, set_adapter, unmerge_adapter
from minilora.lora.audit import audit
from minilora.lora.combine import combine_adapters
from minilora.lora.config import LoraConfig
from minilora.lora.peft import load_adapter, save_adapter
from minilora.measure.loss import mean_loss
from minilora.models import load as zoo
from minilora.nn.module import sha256_of
from minilora.train.loop import fit

LORA = {"r": 4, "lora_alpha": 8}


@dataclass(frozen=True)
class Device:
    """Where the other side computes. exact: does it give the very bits of the host?"""

    library: str
    exact: bool

    def send(self, x):
        """An array of the host, on the device; anything else as it is."""
        return to_device(x, "cuda") if isinstance(x, np.ndarray) else x

    def holds(self, arrays):
        return all(array_module(x).__name__ == self.library for x in arrays)

    def move(self, model):
        """The model with every array on the device, those of its adapters included."""
        for _, parameter in model.named_parameters():
            parameter.data = to_device(parameter.data, "cuda")
        for _, module in model.named_modules():
            if getattr(module, "initial", None) is not None:
                module.initial = tuple(to_device(array, "cuda") for array in module.initial)
        return model

    def assert_same(self, there, here, rtol=1e-4, atol=1e-4):
        there = np.asarray(to_numpy(there))
        assert there.dtype == np.asarray(here).dtype and there.shape == np.shape(here)
        tolerance = {"rtol": 0, "atol": 0} if self.exact else {"rtol": rtol, "atol": atol}
        np.testing.assert_allclose(there, here, **tolerance)


@pytest.fixture(params=["stand-in", pytest.param("GPU", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Make "cuda" mean the stand-in, or find a GPU; prints the card."""
    if request.param == "stand-in":
        monkeypatch.setitem(sys.modules, "cupy", strictarray)
        return Device("strictarray", exact=True)
    cupy = pytest.importorskip("cupy", reason="needs CuPy: pip install 'minilora[gpu]'")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"needs a GPU: {error}")
    if not count:
        pytest.skip("needs a GPU: CuPy finds none")
    print(cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())
    return Device("cupy", exact=False)


def trained(config, device, variant):
    """A model on a device or on the host after three steps, and their history; variant: None trains all weights."""
    model = new_model(config)
    if device:
        device.move(model)
    if variant is not None:
        add_adapter(model, LoraConfig(**LORA, **variant), seed=0)
    return model, fit(model, random_samples(np.random.default_rng(1)), 3, lr=1e-2, batch_size=3)


KINDS = [{}, *VARIANTS.values()]
each_variant = pytest.mark.parametrize("variant", KINDS, ids=str)


# -- operations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("name", list(OPS))
def test_every_operation_and_its_gradient_agree(device, name, dtype, tolerance):
    arrays, settings = EXAMPLES[name](np.random.default_rng(0))

    def computed(send):
        inputs = [Tensor(send(x.astype(dtype)), requires_grad=True) for x in arrays]
        settings_there = {key: sent(send, value) for key, value in settings.items()}
        with strictarray.counting() as crossings:
            y = OPS[name](*inputs, **settings_there)
            g = np.random.default_rng(1).standard_normal(y.shape).astype(dtype)
            y.backward(send(np.asarray(g)))
        return [y.data, *(x.grad for x in inputs)], [each for each in crossings if each != "asarray"]

    (here, _), (there, crossings) = computed(lambda x: x), computed(device.send)
    assert device.holds(there)
    if device.exact:  # nothing is copied to the host, except how many labels are scored
        assert crossings == (["nonzero"] if "cross_entropy" in name else [])
    for mine, other in zip(here, there, strict=True):
        assert mine.dtype == dtype
        device.assert_same(other, mine, tolerance, tolerance * max(1.0, float(np.abs(mine).max())))


@pytest.mark.parametrize("settings", [{"first": np.array([3])}, {"packing": Packing(2, (4, 7, 8)), "block": 2}])
def test_attention_of_left_padded_prompts_and_packed_rows_agrees(device, rng, settings):
    qkv = [rng.standard_normal((1, 8, heads, 4)) for heads in (4, 2, 2)]
    there = attention(*map(device.send, qkv), **{key: device.send(x) for key, x in settings.items()})
    device.assert_same(there.data, attention(*qkv, **settings).data, 1e-12, 1e-12)


def test_arrays_of_the_device_leave_operators_with_tensors_to_tensors(device):
    x = device.send(np.float32([1, 2]))
    t = Tensor(device.send(np.float32([3, 4])), requires_grad=True)
    for y in (x + t, x * t, x - t, x / t):
        assert type(y) is Tensor and y.requires_grad


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [*KINDS, None], ids=str)
def test_training_steps_agree_and_an_adapter_saved_from_the_device_loads_on_either_with_the_same_logits(
    device, tiny_config, variant, tmp_path
):
    (here, expected), (there, history) = (trained(tiny_config, where, variant) for where in (None, device))
    if variant and "lora_dropout" in variant and not device.exact:  # a GPU draws other holes: another generator
        assert np.isfinite(history.losses).all()
    else:
        device.assert_same(np.array(history.losses), np.array(expected.losses))
        arrays, wanted = ({name: p.data for name, p in model.trainable_parameters().items()} for model in (there, here))
        assert device.holds(arrays.values())
        for name, array in arrays.items():
            device.assert_same(array, wanted[name], rtol=1e-4, atol=2e-3)
    if variant is None:
        return
    for model, name in ((here, "here"), (there, "there")):
        save_adapter(model, tmp_path / name)
    if device.exact:
        for file in (tmp_path / "here").iterdir():
            assert file.read_bytes() == (tmp_path / "there" / file.name).read_bytes()
    for other in (new_model(tiny_config), device.move(new_model(tiny_config))):
        load_adapter(other, tmp_path / "there")
        np.testing.assert_allclose(logits(other), logits(there), rtol=1e-4, atol=1e-4)  # PiSSA's file holds A, B anew
    assert device.holds(other.state_dict().values())


def test_batches_that_are_accumulated_agree_with_one_large_batch(device, tiny_config):
    def run(**settings):
        model = device.move(new_model(tiny_config))
        add_adapter(model, LoraConfig(**LORA), seed=0)
        return fit(model, random_samples(np.random.default_rng(1)), 3, lr=1e-2, **settings)

    whole, parts = run(batch_size=4), run(batch_size=1, grad_accumulation=4)
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-4)
    np.testing.assert_allclose(parts.norms, whole.norms, rtol=1e-2)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_in_a_training_step_the_batch_goes_to_the_device_and_only_loss_and_norm_come_home(device, tiny_config, method):
    if not device.exact:
        pytest.skip("only the stand-in counts its crossings")
    model = device.move(new_model(tiny_config))
    if method == "lora":
        add_adapter(model, LoraConfig(**LORA), seed=0)
    marks = []
    fit(model, random_samples(np.random.default_rng(1)), 4, lr=1e-2, batch_size=3,
        each_step=lambda step: marks.append(len(strictarray.crossings)))  # fmt: skip
    per_step = [strictarray.crossings[i:j] for i, j in itertools.pairwise(marks)]
    assert per_step == [["asarray"] * 3 + ["float"] * 2] * 3


# -- using what was trained --------------------------------------------------------------------------------------------


def test_evaluation_agrees(device, tiny_config):
    samples = random_samples(np.random.default_rng(1))
    here, there = new_model(tiny_config), device.move(new_model(tiny_config))
    losses = [np.array(mean_loss(model, samples, batch_size=4)) for model in (there, here)]
    device.assert_same(*losses, rtol=1e-5, atol=0)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generation_writes_the_same_answers(device, tiny_folder, temperature):
    talks = [[{"role": "user", "content": text}] for text in ("hello", "a longer question than that", "x")]
    answers = []
    for where in ("cpu", "cuda"):
        model, words = zoo.load(tiny_folder / "base", device=where)
        model.requires_grad_(False)
        answers.append(generate_batch(model, words, talks, 6, temperature, seed=3))
    assert device.holds(model.state_dict().values())
    assert answers[0] == answers[1]


@pytest.mark.parametrize("use_dora", [False, True])
def test_streams_with_mixed_adapters_write_the_same_answers(device, tiny_folder, use_dora):
    asks = [("hello", "one", 9), ("a longer question than that", None, 3), ("x", {"one": 0.5, "two": 0.25}, 6),
            ("again", "two", 8), ("what?", "one", 2)]  # fmt: skip
    answers = []
    for where in ("cpu", "cuda"):
        model, words = zoo.load(tiny_folder / "base", device=where)
        for seed, name in enumerate(("one", "two")):
            config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, use_dora=use_dora)
            add_adapter(model, config, name=name, seed=seed)
        streams = Streams(model, words, slots=2)  # some join while others run, and rows move
        running = [streams.add(text, choice, count) for text, choice, count in asks]
        while streams.busy:
            streams.step()
        answers.append([answer.text for answer in running])
    assert device.holds(model.state_dict().values())
    assert answers[0] == answers[1] and len(set(answers[0])) > 1


@each_variant
def test_merge_unmerge_mix_and_disable(device, tiny_config, variant):
    model = device.move(new_model(tiny_config))
    before = logits(model)
    add_adapter(model, LoraConfig(**LORA, **variant), name="one", seed=1)
    add_adapter(model, LoraConfig(r=2, lora_alpha=2, init_lora_weights=False), name="two", seed=2)
    digest = sha256_of(base_state(model))
    set_adapter(model, {"one": 0.5, "two": 0.5})
    beside_the_base = logits(model)
    merge_adapter(model)
    np.testing.assert_allclose(logits(model), beside_the_base, rtol=1e-4, atol=1e-4)
    unmerge_adapter(model)
    assert np.array_equal(logits(model), beside_the_base)
    with disable_adapter(model):
        assert np.array_equal(logits(model), before)
    assert device.holds(model.state_dict().values()) and sha256_of(base_state(model)) == digest


def test_adapters_are_combined(device, tiny_config):
    model = device.move(new_model(tiny_config))
    for seed, name in enumerate(("one", "two")):
        add_adapter(model, LoraConfig(r=2, lora_alpha=2, init_lora_weights=False), name=name, seed=seed)
    assert combine_adapters(model, ["one", "two"], [0.7, 0.3]).error < 1e-5
    assert device.holds(model.state_dict().values()) and np.isfinite(logits(model)).all()


def test_an_adapter_is_audited(device, tiny_config):
    model, _ = trained(tiny_config, device, {})
    assert len(audit(model, "default").checks) >= 8


def test_ids_may_be_lists_host_arrays_or_device_arrays(device, tiny_config):
    here, there = new_model(tiny_config), device.move(new_model(tiny_config))
    for ids in (IDS, IDS.tolist(), device.send(IDS)):
        device.assert_same(there.loss(ids, ids).data, here.loss(IDS, IDS).data)


@pytest.mark.real
@pytest.mark.gpu
def test_the_real_model_agrees(device, request):
    if device.exact:
        pytest.skip("the stand-in shows nothing here that the small model does not")
    model, words = request.getfixturevalue("smollm2")
    ids = np.array([words.encode("A contract is a promise that the law will enforce.")])
    other = device.move(copy.deepcopy(model))
    with no_grad():
        here, there = model(ids).data, to_numpy(other(device.send(ids)).data)
    print(f"largest difference of logits: {np.abs(here - there).max():.1e}, of {np.abs(here).max():.1f}")
    np.testing.assert_allclose(there, here, atol=1e-3 * np.abs(here).max())
