"""A base whose answers differ from question to question, and two adapters of it, as folders and loaded."""

from dataclasses import replace

import numpy as np
import pytest
from modelfiles import CONFIG, new_tokenizer

import minilora as ml
from minilora.io.folder import save_folder
from minilora.io.versions import load_versions
from minilora.lora.adapters import adapter_state

NAMES = ["legal", "support"]


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """A folder with base/, legal/ and support/. Never written to."""
    folder = tmp_path_factory.mktemp("shop")
    config = replace(CONFIG, max_position_embeddings=1024)
    model = ml.Llama(config, np.random.default_rng(4))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data *= 30 if "self_attn" in name else 5  # its attention decides
    save_folder(folder / "base", config, model.state_dict(), new_tokenizer(digits=False, merges=[]))
    model, _ = ml.load(folder / "base")
    for seed, name in enumerate(NAMES):
        ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False), name=name, seed=seed)
        for array in adapter_state(model, name).values():
            array *= 0.5
        ml.save_adapter(model, folder / name, name=name)
    return folder


@pytest.fixture(scope="session")
def loaded(shop):
    """The base with both adapters, and its tokenizer."""
    return load_versions({name: shop / name for name in NAMES}, shop / "base")


@pytest.fixture
def model(loaded):
    """The base with both adapters; none is active at the beginning."""
    ml.set_adapter(loaded[0], None)
    return loaded[0]


@pytest.fixture(scope="session")
def tokenizer(loaded):
    return loaded[1]
