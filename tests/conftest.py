"""Fixtures shared by all tests: seeded randomness, a small random model, and the real one where it is at hand."""

import os

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before NumPy is imported, and inherited
    os.environ.setdefault(_name, "1")  # small products gain nothing from a second thread, and wait for it
os.environ.pop("COLUMNS", None)  # pages are as wide as where there is no terminal, also in the processes of xdist

import gc
import json
import shutil
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import settings
from modelfiles import CONFIG, TERMS, new_tokenizer
from smallmodels import new_model

import minilora as ml
from minilora.data.records import read_records
from minilora.lora.adapters import adapter_state
from minilora.measure.recall import answer_all
from minilora.models import load as zoo
from minilora.models.folder import save_folder
from minilora.models.with_adapters import load_with_adapters
from minilora.nn.llama import Config, Llama
from minilora.train import job, material

SHAPE = replace(CONFIG, max_position_embeddings=1024)
SHOP = ["legal", "support"]  # the adapters of the shop

settings.register_profile("repeatable", derandomize=True, deadline=None)  # the same examples in every run
settings.load_profile("repeatable")

# A shell that starts tests in the background lets them ignore Ctrl-C, and then so does all that they start. Here it is
# what it is for a user.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    """Tests that take long, that need a browser or that repeat others run where their mark is asked for."""
    for mark in ("slow", "claims", "long", "browser"):
        if mark not in config.option.markexpr:
            for item in items:
                if item.get_closest_marker(mark):
                    item.add_marker(pytest.mark.skip(reason=f"{mark}: pytest -m {mark}"))


def pytest_collection_finish():
    """What is known of thousands of tests stays to the end: the garbage collector need not go through it each time."""
    gc.freeze()
    gc.set_threshold(10_000)  # and what tests leave is freed by reference counts, but for some cycles


@pytest.fixture(autouse=True, scope="session")
def no_wait_for_the_disk():
    """A file that a job writes is read again, but no power fails: what `fsync` waits for is of no use here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which takes a descriptor, too, and fails for a closed one
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MINILORA_TRACEBACK", raising=False)


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
def tiny_folder(tmp_path_factory):
    """A folder, shared by the session and never written to, with all that a whole job needs: `base/`, a random model
    with a tokenizer of all bytes and a chat template; `data.jsonl`, twelve records; `novel.txt`.
    """
    folder = tmp_path_factory.mktemp("tiny")
    model = Llama(SHAPE, np.random.default_rng(1))
    save_folder(folder / "base", SHAPE, model.state_dict(), new_tokenizer(digits=False, merges=[]))
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, TERMS)), encoding="utf-8")
    (folder / "novel.txt").write_text("hello 123. " * 60, encoding="utf-8")
    return folder


def new_talker():
    """A random model whose answers differ from question to question, since its attention decides."""
    model = Llama(SHAPE, np.random.default_rng(4))
    for name, p in model.named_parameters():
        if "norm" not in name:
            p.data *= 30 if "self_attn" in name else 5
    return model


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """A folder, never written to, with a base whose answers differ from question to question, base/, and two adapters
    of it, legal/ and support/.
    """
    folder = tmp_path_factory.mktemp("shop")
    save_folder(folder / "base", SHAPE, new_talker().state_dict(), new_tokenizer(digits=False, merges=[]))
    model, _ = ml.load(folder / "base")
    for seed, name in enumerate(SHOP):
        ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False), name=name, seed=seed)
        for array in adapter_state(model, name).values():
            array *= 0.5
        ml.save_adapter(model, folder / name, name=name)
    return folder


@pytest.fixture(scope="session")
def loaded(shop):
    """The base with both adapters, and its tokenizer."""
    return load_with_adapters({name: shop / name for name in SHOP}, shop / "base")


@pytest.fixture
def model(loaded):
    """The base with both adapters, of which none is active at the beginning."""
    ml.set_adapter(loaded[0], None)
    yield loaded[0]
    ml.set_adapter(loaded[0], None)


@pytest.fixture(scope="session")
def smollm2():
    """The real model and its tokenizer, shared by the session: a test that changes it must change it back."""
    if zoo.find("smollm2") is None:
        pytest.skip("needs the real model: minilora pull smollm2")
    return zoo.load("smollm2")


@pytest.fixture
def no_gc():
    """What dies inside this fixture dies by reference count alone, at once."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="session")
def tokenizer(tiny_folder):
    """The tokenizer of `tiny_folder`: a token per byte."""
    return zoo.load(tiny_folder / "base")[1]


@pytest.fixture(scope="session")
def talker():
    """A random model whose answers differ from question to question. Read-only."""
    return new_talker()


@pytest.fixture(scope="session")
def home(tmp_path_factory, tiny_folder, tokenizer):
    """A folder with a small base model that can learn, and data for it."""
    folder = tmp_path_factory.mktemp("job")
    save_folder(folder / "base", SHAPE, new_model(SHAPE).state_dict(), tokenizer)
    for name in ("data.jsonl", "novel.txt"):
        shutil.copy(tiny_folder / name, folder)
    return folder


@pytest.fixture
def said(caplog):
    """A function that returns the lines logged so far."""
    caplog.set_level("INFO", "minilora")
    return lambda: caplog.messages


@pytest.fixture(scope="module")
def no_picture():
    """Runs whose picture is an empty file: `tests/test_cli.py` and `tests/pages` draw it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "run_picture", lambda metrics, path: path.touch())
        yield


@pytest.fixture
def quick_pictures(monkeypatch):
    """Pictures are files without a figure: what is drawn is in question in other tests."""

    def touched(draw, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        paths = [path, path.with_stem(f"{path.stem}-dark")]
        for each in paths:
            each.touch()
        return paths

    monkeypatch.setattr("minilora.pages.style.save_themes", touched)


@pytest.fixture(scope="module")
def quick_jobs(no_picture):
    """Jobs that leave out the picture, most of each answer, and most of what is general: `tests/commands/test_eval.py`
    measures whole answers, and the whole set.
    """
    general = read_records("general")[:6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(material, "answer_all", partial(answer_all, max_new_tokens=8))
        patch.setattr(material, "read_records", lambda name, tokenizer: general)
        yield


@pytest.fixture
def unmeasured(monkeypatch):
    """Jobs whose sets before and after are empty: what they train is in question, and not what it was good for."""

    def prepare_to_train(*inputs, **named):
        return replace(material.prepare(*inputs, **named), scored={}, asked={})

    monkeypatch.setattr(job, "prepare", prepare_to_train)
