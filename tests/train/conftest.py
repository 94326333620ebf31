"""Fixtures of the jobs' tests: a tokenizer, and a model that talks."""

from dataclasses import replace

import numpy as np
import pytest
from modelfiles import CONFIG

from minilora.io.zoo import load
from minilora.nn.llama import Llama

SHAPE = replace(CONFIG, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def words(tiny_folder):
    return load(tiny_folder / "base")[1]


@pytest.fixture(scope="module")
def talker():
    """A random model whose answers differ from question to question. Read-only."""
    model = Llama(SHAPE, np.random.default_rng(4))
    for name, p in model.named_parameters():
        if "norm" not in name:
            p.data *= 30 if "self_attn" in name else 5  # its attention decides
    return model
