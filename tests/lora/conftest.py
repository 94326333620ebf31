"""A model and an adapter folder that several of these files use."""

import numpy as np
import pytest
from peftfiles import adapted

from minilora.lora.peft import save_adapter
from minilora.nn.llama import Llama


@pytest.fixture
def base(tiny_config):
    """A function that makes the same model again, without any adapter."""
    return lambda: Llama(tiny_config, np.random.default_rng(0))


@pytest.fixture
def folder(base, tmp_path):
    return save_adapter(adapted(base(), target_modules=["q_proj", "v_proj"]), tmp_path / "adapter")
