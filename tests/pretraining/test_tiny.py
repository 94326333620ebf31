"""The tiny base that comes with the package: what its card says of it is true, and it needs no network."""

import json
import re
import socket
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pretrain import score

import minilora as ml
from minilora.cli import main
from minilora.files.tensors import read_tensors
from minilora.models.load import TINY

CARD = (TINY / "README.md").read_text(encoding="utf-8")
RECORD = json.loads((TINY / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tiny():
    return ml.load("tiny")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)  # pip


def test_the_validation_loss_is_the_cards(tiny):
    got = score(*tiny, [(TINY / "validation.txt").read_text(encoding="utf-8")])
    nats, bits = map(float, re.search(r"\*\*([\d.]+) nats per token, ([\d.]+) bits per byte\*\*", CARD).groups())
    assert abs(got["nats_per_token"] - nats) < 0.01 and abs(got["bits_per_byte"] - bits) < 0.01
    assert abs(RECORD["excerpt"]["nats_per_token"] - nats) < 0.01


def test_the_cards_other_figures_are_the_records():
    figures = {f"{RECORD['parameters']:,} parameters", f"{RECORD['held_out']['nats_per_token']:.3f}",
               f"{RECORD['tokens']['trained_on']:,}", f"{RECORD['recipe']['steps']:,} steps",
               f"{RECORD['addresses']['trained']} documents", *RECORD["addresses"]["held_out"]}  # fmt: skip
    assert [figure for figure in figures if figure not in CARD] == []


def test_it_has_a_million_parameters_in_two_megabytes(tiny):
    model, tokenizer = tiny
    assert ml.count_parameters(model).total == 1_049_728
    assert {p.dtype for _, p in model.named_parameters()} == {np.dtype(np.float32)}
    assert {w.dtype for w in read_tensors(TINY / "tiny.safetensors").values()} == {np.dtype(np.float16)}
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 2.5e6
    assert len(tokenizer) == model.config.vocab_size == 2048


@settings(max_examples=30)
@given(st.text())
def test_any_text_comes_back_as_it_was(tiny, text):
    _, tokenizer = tiny
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_it_knows_the_marks_of_a_chat(tiny):
    model, tokenizer = tiny
    question = {"role": "user", "content": "What did President Lincoln say in 1862?"}
    ids = tokenizer.encode_chat([question], answer_next=True)
    text = "".join(tokenizer.core.id_to_token(i) for i in ids)
    assert text.startswith("<|im_start|>user") and "<|im_end|>" in text and text.endswith("assistantĊ")
    scores = model(np.array([ids[:-2]])).data[0, -1]  # "<|im_start|>" has just been opened a second time
    assert tokenizer.decode([scores.argmax()]).startswith("a")  # assistant


@pytest.mark.long
def test_fine_tuning_it_needs_no_network(no_network, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--base", "tiny", "--steps", "3", "--batch-size", "2", "--eval-records", "2"]
    assert main(["finetune", *flags]) == 0
    metrics = json.loads((tmp_path / "runs/legal-tiny/metrics.json").read_text())
    assert metrics["total_parameters"] == 1_049_728 + metrics["trainable_parameters"]
    assert metrics["base_sha256"][0] == metrics["base_sha256"][1]
    assert main(["chat", "--base", "tiny", "--adapter", "runs/legal-tiny", "--prompt", "What is a tort?"]) == 0
    assert main(["merge", "--base", "tiny", "--adapter", "runs/legal-tiny", "--out", "whole.gguf"]) == 0
    assert ml.load("whole.gguf")[0].config.vocab_size == 2048
