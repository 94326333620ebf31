"""Models and an adapter folder that several of these files use."""

import numpy as np
import pytest
from modelfiles import new_llama, write_gguf
from peftfiles import adapted
from smallmodels import Net, as_float64, lora_config, shaken

import minilora as ml
from minilora.lora.peft import save_adapter
from minilora.nn.llama import Llama


@pytest.fixture
def base(tiny_config):
    """A function that makes the same model again, without any adapter."""
    return lambda: Llama(tiny_config, np.random.default_rng(0))


@pytest.fixture
def folder(base, tmp_path):
    return save_adapter(adapted(base(), target_modules=["q_proj", "v_proj"]), tmp_path / "adapter")


@pytest.fixture
def file(tmp_path):
    """The GGUF file of `new_llama()`."""
    return write_gguf(tmp_path / "base.gguf", new_llama())


@pytest.fixture
def model(tiny_model):
    """A model with two adapters."""
    for seed, name in enumerate(["legal", "support"]):
        ml.add_adapter(tiny_model, ml.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False), name, seed=seed)
    return tiny_model


@pytest.fixture
def kinds(tiny_config, rng):
    """A float64 model with biases, and an adapter of each kind that has something of its own."""
    model = as_float64(Net(tiny_config, rng))
    settings = {
        "plain": {},
        "some": {"target_modules": ["q_proj", "down_proj"]},
        "dora": {"use_dora": True, "target_modules": ["q_proj", "up_proj"]},
        "pissa": {"init_lora_weights": "pissa"},
    }
    for seed, name in enumerate(settings):
        ml.add_adapter(model, lora_config(**settings[name]), name, seed=seed)
        shaken(model, name, seed)
    return model
