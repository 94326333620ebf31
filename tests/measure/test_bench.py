"""The modes of the benchmark do what they are called, and the floor counts every matrix."""

from dataclasses import replace

import numpy as np
import pytest
from modelfiles import CONFIG

from minilora.engine.backend import is_packed
from minilora.lora.adapters import add_adapter
from minilora.lora.config import LoraConfig
from minilora.measure import bench
from minilora.measure.blocks import matrices
from minilora.measure.counts import count_parameters
from minilora.measure.environment import versions
from minilora.measure.predict import base_parameters
from minilora.nn.llama import Llama

TINY = replace(CONFIG, max_position_embeddings=bench.PROMPT + bench.NEW)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tiny model with random weights, in 4 and 8 bits."""
    path = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    bench.write_random(str(path), TINY)
    return path


def test_both_ways_of_a_step_train_alike(file):
    """`loss_and_grad` in micro-batches, and `loss` and `backward()` of the whole batch."""
    trained = {}
    for whole in (False, True):
        model = Llama(TINY, 0)
        add_adapter(model, LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))
        step = bench._training(model, bench.Settings(str(file), batch_size=8, length=40), whole)
        step(), step()
        trained[whole] = {name: p.data for name, p in model.trainable_parameters().items()}
    for name, one in trained[False].items():
        np.testing.assert_allclose(one, trained[True][name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("mode", "packed", "recomputes"),
    [
        ("lora", False, False),
        ("lora-backward", False, False),
        ("quantized", True, False),
        ("recompute", False, True),
        ("quantized-recompute", True, True),
        ("full", False, False),
    ],
)
def test_a_mode_trains_the_model_it_names(file, monkeypatch, mode, packed, recomputes):
    seen = []
    monkeypatch.setattr(bench, "_training", lambda model, settings, whole=False: seen.append((model, whole)))
    bench.MODES[mode].setup(bench.Settings(str(file), r=2))
    ((model, whole),) = seen
    counts = count_parameters(model)
    assert model.model.recompute is recomputes and whole is (mode == "lora-backward")
    assert is_packed(model.model.layers[0].self_attn.q_proj.weight.data) is packed
    adapter = 2 * sum(m + n for _, m, n in matrices(TINY)) * TINY.num_hidden_layers
    assert counts.trainable == (base_parameters(TINY) if mode == "full" else adapter)


def test_the_floor_counts_every_matrix_there_and_back(file):
    products = base_parameters(TINY) - TINY.hidden_size * (2 * TINY.num_hidden_layers + 1)  # all but the norms
    assert bench.floor_arithmetic(bench.Settings(str(file), batch_size=2, length=8)) == 2 * 2 * 16 * products


@pytest.mark.parametrize("mode", ["generate", "generate-8", "load", "load-quantized", "import", "floor"])
def test_a_mode_can_take_its_step(file, mode):
    own = bench.MODES[mode].setup(bench.Settings(str(file), batch_size=1, length=4))()
    assert own > 0 if mode == "import" else own is None


@pytest.mark.parametrize(("blas", "told"), [({"name": "a", "version": "1"}, "a 1"), ({"name": "auto"}, "none")])
def test_a_numpy_without_blas_as_in_a_browser_has_its_versions_too(monkeypatch, blas, told):
    monkeypatch.setattr("numpy.show_config", lambda mode: {"Build Dependencies": {"blas": blas}})
    assert versions()["blas"] == told
