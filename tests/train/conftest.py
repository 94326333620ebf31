"""Fixtures of the jobs' tests: a tokenizer, a model that talks, and all that a whole job needs. Never written to."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from modelfiles import CONFIG
from models import new_model

from minilora.io.folder import save_folder
from minilora.io.zoo import load
from minilora.nn.llama import Llama
from minilora.train import finetune as job
from minilora.train.material import prepare

SHAPE = replace(CONFIG, max_position_embeddings=1024)


@pytest.fixture(scope="session")
def tokenizer(tiny_folder):
    """The tokenizer of `tiny_folder`: a token per byte."""
    return load(tiny_folder / "base")[1]


@pytest.fixture(scope="session")
def talker():
    """A random model whose answers differ from question to question. Read-only."""
    model = Llama(SHAPE, np.random.default_rng(4))
    for name, p in model.named_parameters():
        if "norm" not in name:
            p.data *= 30 if "self_attn" in name else 5  # its attention decides
    return model


@pytest.fixture(scope="session")
def home(tmp_path_factory, tiny_folder, tokenizer):
    """A folder with a small base model that can learn, and data for it."""
    folder = tmp_path_factory.mktemp("job")
    save_folder(folder / "base", SHAPE, new_model(SHAPE).state_dict(), tokenizer)
    for name in ("data.jsonl", "novel.txt"):
        shutil.copy(tiny_folder / name, folder)
    return folder


@pytest.fixture
def unmeasured(monkeypatch):
    """Jobs whose sets before and after are empty: what they train is in question, and not what it was good for."""

    def prepare_to_train(*inputs):
        return replace(prepare(*inputs), scored={}, asked={})

    monkeypatch.setattr(job, "prepare", prepare_to_train)
