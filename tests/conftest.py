"""Fixtures shared by all tests: seeded randomness, a small random model, and the real one where it is at hand."""

import numpy as np
import pytest

from minilora.io import zoo
from minilora.nn.llama import Config, Llama


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def tiny_config():
    return Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )


@pytest.fixture
def tiny_model(tiny_config, rng):
    return Llama(tiny_config, rng)


@pytest.fixture(scope="session")
def smollm2():
    """The real model and its tokenizer, shared by the session: a test that changes it must change it back."""
    if zoo.find("smollm2") is None:
        pytest.skip("needs the real model: minilora pull smollm2")
    return zoo.load("smollm2")
