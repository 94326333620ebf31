"""`minilora predict` and `ml.predict`: which rows are read, what is predicted for them, and what is written."""

import csv
import io
import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modelfiles import write_jsonl

import minilora as ml
from minilora.cli import main
from minilora.commands import predict as command
from minilora.data.fields import FieldTask
from minilora.data.labels import LabelTask
from minilora.data.passages import TEMPLATE, Handbook, Passage, fill
from minilora.data.prompts import TABLES, Prompt, Rows, read_prompts
from minilora.data.rows import DataError, read_rows
from minilora.generate import labels
from minilora.generate.answers import generate
from minilora.generate.conversation import Talk
from minilora.generate.labels import ranked_labels
from minilora.generate.predict import predict
from minilora.generate.streams import Sampling, Streams

LABELS = LabelTask.of(["bill", "crate", "other"])
KINDS, NAME = {"enum": ["new", "old"]}, {"type": ["string", "null"]}
FIELDS = replace(FieldTask.of({"type": "object", "properties": {"label": KINDS, "name": NAME}}), copied=("name",))
TEXTS = ["hello", 'a "b", c;\td', "é 你好\nand more", "What is a lien?", "  spaces  "]
TRAINED = {"answer": {}, "labels": LABELS.entry(), "fields": FIELDS.entry()}  # the adapter's entry "data", by its task


def room(data):
    """Tokens for an answer: fields take more."""
    return 60 if "schema" in data else 12


@pytest.fixture
def model(model):
    """The base with the adapter legal active."""
    ml.set_adapter(model, "legal")
    return model


@pytest.fixture
def trained(model, monkeypatch):
    """A function that makes the adapter legal one that was trained on this entry "data"."""
    return lambda data: monkeypatch.setattr(model.adapters["legal"], "data", data)


@pytest.fixture
def folder(shop, tmp_path, monkeypatch):
    """A function that writes the adapter legal with this entry "data", and returns the flags that name it."""
    monkeypatch.chdir(tmp_path)

    def write(data):
        shutil.copytree(shop / "legal", tmp_path / "legal", dirs_exist_ok=True)
        path = tmp_path / "legal" / "minilora.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": data}))
        return ["--base", str(shop / "base"), "--adapter", "legal", "--max-new-tokens", str(room(data))]

    return write


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in file]
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


# -- as a function -----------------------------------------------------------------------------------------------------


def test_each_text_gets_what_it_gets_alone(model, tokenizer, trained):
    assert predict(model, tokenizer, TEXTS, 12) == [{"answer": generate(model, tokenizer, x, 12)} for x in TEXTS]
    trained(TRAINED["labels"])
    found = predict(model, tokenizer, TEXTS)
    for text, one in zip(TEXTS, found, strict=True):
        label, p = ranked_labels(model, tokenizer, LABELS, LABELS.asked([{"role": "user", "content": text}]), "legal")[
            0
        ]
        assert one == {"label": label, "probability": pytest.approx(p, abs=1e-5)}
    trained(TRAINED["fields"])
    found = predict(model, tokenizer, TEXTS, 60)
    assert all(one["label"] in ("new", "old") and (one["name"] or "") in x for x, one in zip(TEXTS, found, strict=True))
    assert predict(model, tokenizer, TEXTS[3:4], 60) == found[3:4]


@pytest.mark.parametrize("count", [2, 3, 9])
def test_more_labels_follow_the_likeliest_one_with_their_probabilities(model, tokenizer, trained, count):
    trained(TRAINED["labels"])
    for text, found in zip(TEXTS, predict(model, tokenizer, TEXTS, top_k=count), strict=True):
        names, values = [*found], [*found.values()]
        assert names == ["label", "probability", "label_2", "probability_2", "label_3", "probability_3"][: 2 * count]
        expected = ranked_labels(model, tokenizer, LABELS, LABELS.asked([{"role": "user", "content": text}]), "legal")[
            :count
        ]
        assert values[::2] == [label for label, _ in expected]
        assert values[1::2] == pytest.approx([p for _, p in expected], abs=1e-5)


@pytest.mark.parametrize(("task", "count"), [("labels", 0), ("answer", 0), ("answer", 2), ("fields", 2)])
def test_a_number_of_labels_that_cannot_be_is_refused(model, tokenizer, trained, task, count):
    trained(TRAINED[task])
    with pytest.raises(ValueError, match="top_k must be 1 or more, got 0" if count < 1 else "only what was trained on"):
        predict(model, tokenizer, TEXTS, top_k=count)


@pytest.mark.parametrize("task", TRAINED)
def test_no_texts_have_no_predictions(model, tokenizer, trained, task):
    trained(TRAINED[task])
    assert predict(model, tokenizer, []) == []


def test_answers_are_drawn_with_the_seed(model, tokenizer):
    drawn = [predict(model, tokenizer, ["hello"], 12, 1.0, seed)[0]["answer"] for seed in (0, 1)]
    assert drawn == [generate(model, tokenizer, "hello", 12, 1.0, seed) for seed in (0, 1)] and drawn[0] != drawn[1]


def test_a_schema_goes_before_that_of_the_adapter_and_is_not_for_labels(model, tokenizer, trained):
    other = FieldTask.of({"type": "object", "properties": {"size": {"enum": ["S", "M"]}}, "required": ["size"]})
    talk = Talk(model, tokenizer, Sampling(60), schema=other)
    talk.choice = "legal"
    for task in ("answer", "fields"):
        trained(TRAINED[task])
        ml.set_adapter(model, "legal")  # which `ask` sets as well, and unsets
        (found,) = predict(model, tokenizer, ["hello"], 60, schema=FIELDS)
        assert found.keys() == {"label", "name"}
        (found,) = predict(model, tokenizer, ["hello"], 60, schema=other)
        assert found["size"] in "SM" and talk.ask("hello", print) and json.loads(talk.turns[-1].answer) == found
    trained(FIELDS.entry() | {"template": "What of hello is in {text}?", "copied": ["name"]})
    ml.set_adapter(model, "legal")
    (own,), (given,) = (predict(model, tokenizer, ["hello"], 60, schema=schema) for schema in (None, FIELDS))
    assert own == given  # the same fields: the prompt of the training
    trained(TRAINED["labels"])
    for ask in (lambda: predict(model, tokenizer, ["hello"], schema=FIELDS), lambda: talk.ask("hello", print)):
        with pytest.raises(ValueError, match="^a schema is for texts with fields, and the adapter was trained on l"):
            ask()


def test_system_prompt_and_passages_come_before_the_question(model, tokenizer, trained):
    handbook = Handbook([Passage("fees", "A lien costs 3."), Passage("tea", "We serve tea.")], "x")
    trained({"system": "Be brief."})
    question = fill("A lien costs 3.", "What is a lien?", TEMPLATE)

    def answer(system, content):
        asked = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        return generate(model, tokenizer, asked, 12)

    asked = model, tokenizer, ["What is a lien?"], 12
    assert predict(*asked) == [{"answer": answer("Be brief.", "What is a lien?")}]
    assert predict(*asked, system="Be kind.") == [{"answer": answer("Be kind.", "What is a lien?")}]
    trained({"system": "Be brief.", "context_template": TEMPLATE})
    assert predict(*asked, handbook=handbook) == [{"answer": answer("Be brief.", question), "passage": "fees"}]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["a", "  "], "text 1 is empty"),
        ([[{"role": "system", "content": "a"}, {"role": "user", "content": ""}]], "text 0 is empty"),
        (["a", []], "text 1 is empty"),
        (["a", [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]], "^text 1 must end with"),
        (["a", "x" * 1100], "tokens"),
        (["a", 1], "^text 1: expected messages, .*, got 1 alone"),
        ([["a"]], '^text 0: message 1 must be a dict with texts "role" and "content", got \'a\''),
        (["a", {"role": "user", "content": "b"}], "^text 1: expected messages"),
    ],
)
@pytest.mark.parametrize("task", TRAINED)
def test_a_text_that_cannot_be_asked_is_refused_before_work(model, tokenizer, trained, monkeypatch, texts, said, task):
    trained(TRAINED[task])
    monkeypatch.setattr(Streams, "step", None)
    monkeypatch.setattr(labels, "_of_batch", None)
    with pytest.raises(ValueError, match=said):
        predict(model, tokenizer, texts)


def test_one_text_is_no_list(model, tokenizer):
    with pytest.raises(TypeError, match="list of texts, got a single str"):
        predict(model, tokenizer, "hello")
    with pytest.raises(TypeError, match="list of texts, got a generator"):
        predict(model, tokenizer, (text for text in ["a"]))
    with pytest.raises(TypeError, match="list of passages, got a single str"):
        predict(model, tokenizer, ["a", "b"], passages="xy")


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_passages_than_texts_is_refused(model, tokenizer, count):
    with pytest.raises(ValueError, match=f"a passage, or None, for each of 2 texts, got {count} passages"):
        predict(model, tokenizer, ["a", "b"], passages=np.array([None] * count))
    assert predict(model, tokenizer, ["a"], 2, passages=[None]) == predict(model, tokenizer, ["a"], 2)


# -- as a command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "suffix", "top_k"),
    [
        ("fields", ".csv", 1),
        ("fields", ".jsonl", 1),
        ("labels", ".csv", 1),
        ("labels", ".tsv", 2),
        ("labels", ".jsonl", 3),
        ("answer", ".csv", 1),
    ],
)
def test_rows_keep_their_columns_and_order(
    folder, tmp_path, model, tokenizer, trained, task, suffix, top_k, monkeypatch, capsys
):
    monkeypatch.setattr(command, "AT_ONCE", 2)
    trained(TRAINED[task])
    flags, columns = [*folder(TRAINED[task]), "--top-k", str(top_k)], {"id": 7, "text": "", "note": "a\tb, c"}
    rows = [columns | {"text": text} for text in TEXTS]
    out = tmp_path / f"out{suffix}"
    assert main(["predict", write_jsonl(tmp_path / "in.jsonl", rows), *flags, "--out", str(out)]) == 0
    expected = [
        row | {f"predicted_{name}": value for name, value in found.items()}
        for row, found in zip(rows, predict(model, tokenizer, TEXTS, room(TRAINED[task]), top_k=top_k), strict=True)
    ]
    for one, right in zip(read(out), expected, strict=True):
        assert list(one) == list(right)
        for name, value in right.items():
            value = f"{value:.4f}".rstrip("0") if isinstance(value, float) else value
            assert str(one[name]) == ("" if value is None and suffix != ".jsonl" else str(value))
    err = capsys.readouterr().err
    assert "| 5/5 [" in err and re.search(r"^5 rows in \d\d? s$", err, re.M)
    for label, count in Counter(row.get("predicted_label") for row in expected if task == "labels").items():
        assert f"{label} {count}" in err


def test_of_many_labels_the_most_frequent_are_counted(folder, tmp_path, monkeypatch, capsys):
    names = [*"abcdefghijklmn", "n", "n", "b"]
    monkeypatch.setattr(command, "predict", lambda *given: [{"label": name, "probability": 0.5} for name in names])
    rows = write_jsonl(tmp_path / "in.jsonl", [{"text": "x"}] * len(names))
    assert main(["predict", rows, *folder(TRAINED["labels"])]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("n 3, b 2, a 1, c 1, d 1, e 1, f 1, g 1, h 1, i 1, j 1, k 1 and 2 more")


def test_a_row_without_a_prediction_does_not_harm_the_others(folder, tmp_path, capsys):
    flags = folder(TRAINED["labels"])
    rows = [{"text": text} for text in ("hello", "", "x" * 1100, "tea")]
    assert main(["predict", write_jsonl(tmp_path / "in.jsonl", rows), *flags]) == 1
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in found] == [row["text"] for row in rows]
    assert ["predicted_label" in row for row in found] == [True, False, False, True]
    assert "2 of 4 rows have no prediction: line 2: text must be" in err and "line 3: a message with its label" in err
    assert "| 4/4 [" in err
    good = write_jsonl(tmp_path / "good.jsonl", [rows[0], rows[3]])
    assert main(["predict", good, *flags]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [found[0], found[3]]


def test_rows_without_a_prediction_are_named_once_for_each_reason(folder, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = __import__("pyarrow").Table.from_pylist([{"text": x, "on": date(2026, 1, 2)} for x in ("a", *[None] * 5)])
    parquet.write_table(table, tmp_path / "in.parquet")
    assert main(["predict", "in.parquet", *folder(TRAINED["labels"]), "--out", "out.csv"]) == 1
    assert "5 of 6 rows have no prediction: row 2, row 3, row 4 and 2 more: text must be" in capsys.readouterr().err
    assert [row["on"] for row in read(tmp_path / "out.csv")] == ["2026-01-02"] * 6
    assert main(["predict", "in.parquet", *folder(TRAINED["labels"]), "--out", "out.csv", "--resume"]) == 0
    assert main(["predict", "in.parquet", *folder(TRAINED["labels"]), "--field", "text=on"]) == 1
    assert "in.parquet: row 1: text must be" in capsys.readouterr().err


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("comma", ",;\t")
def test_a_table_is_written_as_excel_reads_the_table_it_was_made_of(folder, tmp_path, capsys, monkeypatch, mark, comma):
    monkeypatch.setattr(command, "AT_ONCE", 1)
    words, lines = [], [f"text{comma}n", f"hello{comma}1", f"é{comma}2"]
    (tmp_path / "in.csv").write_text("".join(f"{mark if i == 0 else ''}{x}\n" for i, x in enumerate(lines)), "utf-8")
    words = ["predict", "in.csv", *folder(TRAINED["labels"])]
    assert main([*words, "--out", "out.csv"]) == 0
    written = (tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()
    assert [line.rsplit(comma, 2)[0] for line in written] == [mark + lines[0], *lines[1:]]
    (tmp_path / "part.csv").write_text("\n".join([*written[:2], ""]), encoding="utf-8")
    assert main([*words, "--out", "part.csv", "--resume"]) == 0
    assert (tmp_path / "part.csv").read_bytes() == (tmp_path / "out.csv").read_bytes()
    assert main([*words, "--out", "out.tsv"]) == 0
    assert (tmp_path / "out.tsv").read_text(encoding="utf-8").startswith("text\tn\tpredicted_label")
    capsys.readouterr()
    assert main(words) == 0 and capsys.readouterr().out == "\n".join([*written, ""]).removeprefix(mark)


def test_no_bar_is_shown_between_rows_on_a_terminal(folder, tmp_path, capsys, monkeypatch):
    path, flags = write_jsonl(tmp_path / "in.jsonl", [{"text": "hello"}]), folder(TRAINED["labels"])
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda shown=terminal: shown)
        assert main(["predict", path, *flags]) == 0
        err = capsys.readouterr().err
        assert ("1/1" in err) != terminal and "1 row in " in err
    assert main(["predict", path, *flags, "--out", "a.csv"]) == 0 and "1/1" in capsys.readouterr().err


def test_rows_with_other_columns_are_not_continued(folder, tmp_path, capsys):
    path, written = write_jsonl(tmp_path / "in.jsonl", [{"text": "hello"}] * 2), {}
    for task in TRAINED:
        assert main(["predict", path, *folder(TRAINED[task]), "--out", f"{task}.csv"]) == 0
        assert main(["predict", path, *folder(TRAINED[task]), "--out", f"{task}.jsonl"]) == 0
    for file in sorted(tmp_path.glob("[alf]*.[cj]*")):
        written[file] = b"".join(file.read_bytes().splitlines(keepends=True)[:2])
        for task in {*TRAINED} - {file.stem}:
            file.write_bytes(written[file])
            assert main(["predict", path, *folder(TRAINED[task]), "--out", file.name, "--resume"]) == 1
            assert file.read_bytes() == written[file]
            assert "has the columns text, predicted_" in capsys.readouterr().err
    assert len(written) == 6
    (tmp_path / "prices.md").write_text("It costs 3.")
    (tmp_path / "answer.csv").write_bytes(written[tmp_path / "answer.csv"])
    words = ["predict", path, *folder({}), "--out", "answer.csv", "--resume", "--context", "prices.md"]
    assert main(words) == 1 and "and now they are text, predicted_answer, predicted_passage" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--resume"], ["--overwrite"]])
@pytest.mark.parametrize(
    ("out", "said"), [("in.csv", "is the file to"), (".jsonl/", "irectory"), ("a" * 300, "too long")]
)
def test_a_place_that_cannot_be_written_is_refused_before_work(folder, tmp_path, capsys, monkeypatch, out, said, flags):
    (tmp_path / "in.csv").write_text("text\nhello\n")
    (tmp_path / "b.jsonl").mkdir()
    words = ["predict", "in.csv", *folder(TRAINED["labels"]), *flags]
    monkeypatch.setattr(command.PredictOptions, "load", None)
    assert main([*words, "--out", {"in.csv": "in.csv", ".jsonl/": "b.jsonl"}.get(out, f"{out}.csv")]) == 1
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and (tmp_path / "in.csv").read_text() == "text\nhello\n"


def test_nothing_is_left_where_nothing_was_predicted(folder, tmp_path):
    (tmp_path / "in.csv").write_text("text\n \n")
    assert main(["predict", "in.csv", *folder(TRAINED["labels"]), "--out", "out.csv"]) == 1
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_what_was_interrupted_is_resumed(folder, tmp_path, capsys, monkeypatch, suffix):
    monkeypatch.setattr(command, "AT_ONCE", 2)
    words = ["predict", write_jsonl(tmp_path / "in.jsonl", [{"text": x} for x in TEXTS]), *folder(TRAINED["labels"])]
    assert main([*words, "--out", f"whole{suffix}"]) == 0
    calls = []

    def until_interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict(*args)

    monkeypatch.setattr(command, "predict", until_interrupted)
    out = [*words, "--out", f"part{suffix}"]
    assert main(out) == 130 and len(read(tmp_path / f"part{suffix}")) == 2
    assert f"2 of 5 rows are in part{suffix}: the same command with --resume continues" in capsys.readouterr().err
    assert main([*out, "--resume"]) == 0 and len(calls) == 4  # two batches of the three rows that were left
    whole, part = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("whole", "part"))
    assert whole == part
    assert main(out) == 1
    assert "is there already: --resume continues it, --overwrite replaces it" in capsys.readouterr().err
    write_jsonl(tmp_path / "in.jsonl", [{"text": "other"}, *({"text": x} for x in TEXTS)])
    assert main([*out, "--resume"]) == 1 and "not row 1 of the file to predict for" in capsys.readouterr().err
    assert (tmp_path / f"part{suffix}").read_bytes() == whole
    assert main([*out, "--overwrite"]) == 0 and len(read(tmp_path / f"part{suffix}")) == 6
    whole = (tmp_path / f"part{suffix}").read_bytes()
    (tmp_path / f"part{suffix}").write_bytes(whole[:-3])  # as a full disk leaves it
    assert main([*out, "--resume"]) == 0 and (tmp_path / f"part{suffix}").read_bytes() == whole


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a full device")
def test_a_full_disk_is_one_line_that_says_how_to_continue(folder, tmp_path, capsys):
    (tmp_path / "in.csv").write_text("text\na\n")
    (tmp_path / "out.csv").symlink_to("/dev/full")
    assert main(["predict", "in.csv", *folder(TRAINED["labels"]), "--out", "out.csv", "--overwrite"]) == 1
    line = "minilora: out.csv: No space left on device; --resume continues after its last whole row"
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_rows_do_not_follow_others_that_were_moved_away(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "AT_ONCE", 2)
    (tmp_path / "in.csv").write_text("text\n" + "a\n" * 4)

    def moved(*args):
        (tmp_path / "out.csv").unlink(missing_ok=True)
        return predict(*args)

    monkeypatch.setattr(command, "predict", moved)
    assert main(["predict", "in.csv", *folder(TRAINED["labels"]), "--out", "out.csv"]) == 1
    assert "out.csv: No such file or directory" in capsys.readouterr().err and not (tmp_path / "out.csv").exists()


def test_one_command_at_a_time_writes_to_a_file(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "AT_ONCE", 2)
    words = ["predict", write_jsonl(tmp_path / "in.jsonl", [{"text": x} for x in TEXTS]), *folder(TRAINED["labels"])]
    found, whole = [], [*words, "--out", "out.jsonl"]

    def with_a_second(*args):
        monkeypatch.setattr(command, "predict", predict)
        found.append((main(whole), capsys.readouterr().err.split("minilora: ")[-1]))
        return predict(*args)

    monkeypatch.setattr(command, "predict", with_a_second)
    assert main(whole) == 0 and len(read(tmp_path / "out.jsonl")) == len(TEXTS)
    assert found == [(1, "out.jsonl: another predict is writing there; choose another --out\n")]
    assert [path.name for path in tmp_path.glob("*out*")] == ["out.jsonl"] and main([*whole, "--overwrite"]) == 0


def test_a_table_is_printed_as_a_table_and_lines_as_json(folder, tmp_path, capsys):
    flags = folder(TRAINED["labels"])
    (tmp_path / "in.csv").write_text("text,n\nhello,1\n")
    assert main(["predict", "in.csv", *flags]) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading == "text,n,predicted_label,predicted_probability" and row.startswith("hello,1,")
    (tmp_path / "in.txt").write_text("hello\r\n\ntea,\u2028please\x85\x0b.\n", encoding="utf-8")
    assert main(["predict", "in.txt", *flags]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.rstrip().split("\n")]
    assert [row["text"] for row in rows] == ["hello", "tea,\u2028please\x85\x0b."]


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_rows_in_a_pipe_are_those_of_a_file_whatever_its_encoding(folder, tmp_path, monkeypatch, suffix, terminal):
    flags, path = folder(TRAINED["labels"]), str(tmp_path / f"in{suffix}")
    rows = [{"text": "łódź 😀\nGröße", "n": "1" if suffix == ".csv" else "\ud83d"}, {"text": "tea", "n": "2"}]
    if suffix == ".csv":
        Path(path).write_text('text,n\n"łódź 😀\nGröße",1\ntea,2\n', "utf-8", newline="\n")
    else:
        Path(path).write_text("\n".join(map(json.dumps, rows)))
    pipe = io.TextIOWrapper(io.BytesIO(), "cp1252", "backslashreplace", newline="\r\n")  # as Windows makes one
    pipe.isatty = lambda: terminal
    monkeypatch.setattr("sys.stdout", pipe)
    assert main(["predict", path, *flags]) == main(["predict", path, *flags, "--out", f"out{suffix}"]) == 0
    same = pipe.buffer.getvalue() == (tmp_path / f"out{suffix}").read_bytes()
    assert same != terminal and (pipe.encoding == "cp1252") == terminal
    found = [{name: row[name] for name in ("text", "n")} for row in read(tmp_path / f"out{suffix}")]
    assert found == rows


def test_columns_have_the_names_of_training(folder, tmp_path, capsys):
    flags = folder(TRAINED["labels"] | {"field": {"text": "body", "label": "topic"}})
    path = write_jsonl(tmp_path / "in.jsonl", [{"body": "hello", "text": "another column"}])
    said = []
    for more in ([], ["--field", "text=body"], ["--field", "text=text"]):
        assert main(["predict", path, *flags, *more]) == 0
        said.append(json.loads(capsys.readouterr().out)["predicted_probability"])
    assert said[0] == said[1] != said[2]


def test_a_passage_in_a_row_is_read_as_in_training(folder, tmp_path, capsys, model, tokenizer):
    row = {"question": "How much?", "context": "It costs 3."}
    path, flags = write_jsonl(tmp_path / "in.jsonl", [row]), folder({"context_template": TEMPLATE})
    (tmp_path / "prices.md").write_text("How much it costs.")
    asked = fill(row["context"], row["question"], TEMPLATE)
    for more in ([], ["--context", "prices.md"]):  # its own passage goes before those of a handbook
        assert main(["predict", path, *flags, *more]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found == row | {"predicted_answer": generate(model, tokenizer, asked, 12)}


@pytest.mark.parametrize("data", [{"context_template": TEMPLATE}, {"name": "x"}], ids=str)
def test_questions_that_share_no_word_with_any_passage_are_counted(folder, tmp_path, capsys, data):
    """Also where an earlier turn does; not those with their own passage, and none where no passage is read."""
    turns = zip(("user", "assistant", "user"), ("It costs?", "It costs 3.", "Zebra?"), strict=True)
    rows = [{"question": text} for text in ("Costs?", "zebra", "What is it?")] + [{"question": "zebra", "context": "3"}]
    rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    (tmp_path / "prices.md").write_text("It costs 3.")
    path, flags = write_jsonl(tmp_path / "in.jsonl", rows), folder(data)
    assert main(["predict", path, *flags[:-1], "2", "--context", "prices.md"]) == 0
    said = f"{path}: 3 of 5 rows share no word with any passage of prices.md, such as line 2: the passage of each may"
    assert (said in capsys.readouterr().err) == ("name" not in data)


@pytest.mark.parametrize(
    "data", [*TRAINED.values(), {"system": "Be kind."}, {"context_template": TEMPLATE}, {}], ids=str
)
def test_a_merged_model_predicts_as_its_adapter(folder, tmp_path, capsys, data):
    data = data | {"field": {"text": "body", "label": "topic"}, "path": "../mine.csv"} if data else data
    base, flags = folder(data)[1], folder(data)[4:]
    path, found = write_jsonl(tmp_path / "in.jsonl", [{"body": "hello", "context": "It costs 3."}]), []
    named = ["--field", "text=body"] if not data else []
    for _ in range(2):
        assert main(["merge", "--base", base, "--adapter", "legal", "--out", "deep/merged", "--overwrite"]) == 0
    for words in (["--base", base, "--adapter", "legal"], ["--base", "deep/merged"]):
        capsys.readouterr()
        assert main(["predict", path, *words, *flags, *named]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0].keys() == found[1].keys() and (found[0] == found[1] or "predicted_probability" in found[0])
    known = tmp_path / "deep" / "merged" / "minilora.json"
    assert known.exists() == bool(data)
    if data:
        stored = json.loads(known.read_text())["data"]
        assert (known.parent / stored["path"]).resolve() == (tmp_path / "mine.csv").resolve()
        assert stored | {"path": data["path"]} == data


def test_flags_decide_how_rows_are_asked(folder, tmp_path, capsys, model, tokenizer):
    path, flags = write_jsonl(tmp_path / "in.jsonl", [{"text": "How much?"}]), folder({"context_template": TEMPLATE})
    (tmp_path / "prices.md").write_text("It costs 3.")
    more = ["--system", "Be kind.", "--temperature", "1", "--seed", "3", "--context", "prices.md"]
    assert main(["predict", path, *flags, *more]) == 0
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": fill("It costs 3.", "How much?")}]
    answer = generate(model, tokenizer, asked, 12, 1.0, 3)
    found = json.loads(capsys.readouterr().out)
    assert found == {"text": "How much?", "predicted_answer": answer, "predicted_passage": "paragraph 1"}


def test_a_schema_gives_the_columns(folder, tmp_path, capsys):
    flags = [*folder({})[:-1], "60", "--schema", str(tmp_path / "own.json")]
    (tmp_path / "in.csv").write_text("text\nhello\n")
    (tmp_path / "own.json").write_text(json.dumps(FIELDS.schema()))
    assert main(["predict", str(tmp_path / "in.csv"), *flags]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "text,predicted_label,predicted_name"


@pytest.mark.parametrize(
    ("rows", "flags", "said"),
    [
        ([{"a": "x", "b": "y"}], [], "in.jsonl:1: which column is the text? There are a, b: name it, such as --field"),
        ([{"text": "x", "predicted_label": "y"}], [], "in.jsonl has a column predicted_label already: rename it"),
        ([{"text": "x"}], ["--out", "a.xlsx"], "rows are written as .csv, .tsv, .jsonl, got .xlsx"),
        ([{"text": "x"}], ["--out", "no/a.csv"], "no/a.csv: there is no folder no"),
        ([{"text": "x"}], ["--resume"], "--resume continues a file: give it with --out"),
        ([{"text": "x"}], ["--adapter", "b"], "one adapter at a time: predict with the next one for the file that"),
        ([{"text": "x"}], ["--data", "b"], "minilora predict has no --data: name the file alone, as in minilora p"),
        ([{"What is a lien?": "x"}], [], "in.jsonl:1: a column is called 'What is a lien?': is there no heading?"),
        ([{"text": "x"}], ["--field", "txt=x"], "minilora reads no 'txt' (did you mean text?)"),
        ([{"text": "x"}], ["--schema", "s.json", "--context", "c.md"], "--schema means nothing with --context"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(folder, tmp_path, capsys, rows, flags, said):
    words = ["predict", write_jsonl(tmp_path / "in.jsonl", rows), *folder(TRAINED["labels"]), *flags]
    assert main(words) in (1, 2)
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "last"),
    [
        ({"text": "a"}, "a"),
        ({"message": "a", "label": "x"}, "a"),
        ({"question": "a", "answer": "x", "text": "b"}, "a"),
        ({"q": "a"}, "a"),
        ({"instruction": "a", "input": "b", "output": "x"}, "a\n\nb"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "x"}, "a"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]}, "a"),
        ({"messages": '[{"role": "user", "content": "a"}]'}, "a"),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}]}, "a"),
        ({"Question": "a", "system": "s"}, "a"),
    ],
)
def test_the_prompt_of_a_row_is_found_with_and_without_an_answer(tmp_path, row, last):
    write_jsonl(tmp_path / "in.jsonl", [row])
    (prompt,) = read_prompts(tmp_path / "in.jsonl")
    assert prompt.row == row and prompt.messages[-1] == {"role": "user", "content": last}
    has_system = "system" in row or "conversations" in row
    assert [m["role"] for m in prompt.messages] == ["system", "user"][not has_system :]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the file is empty"),
        ('{"text": "a"}\n{"text": ', "in.jsonl:2: not JSON"),
        ('{"text": ""}', "in.jsonl:1: text must be a non-empty text"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "the last message must be the user's|user's"),
    ],
)
def test_a_file_without_a_prompt_is_refused(tmp_path, content, said):
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(ml.DataError, match=said):
        read_prompts(tmp_path / "in.jsonl")


@given(st.lists(st.text('ab\r\n",;\t ', max_size=5), min_size=1, max_size=3), st.sampled_from([*TABLES, ".jsonl"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_the_rows_that_were_written_are_read_again_whatever_is_in_a_cell(tmp_path, cells, suffix):
    rows, out = Rows(suffix, ["text", "b"]), tmp_path / f"out{suffix}"
    prompts = [Prompt("", {"text": cell, "b": "x"}) for cell in cells]
    text = rows.heading() + "".join(rows.text(prompt.row) for prompt in prompts)
    out.write_text(text, encoding="utf-8", newline="")
    assert rows.done(out, prompts) == len(prompts) and not text.endswith("\r\n")


CELLS = st.lists(st.text('ab\r\n",\xe9', max_size=5), min_size=1, max_size=3)


@given(CELLS, st.sampled_from([".csv", ".jsonl"]), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_a_file_that_ends_at_any_byte_is_continued_after_its_last_whole_row(tmp_path, cells, suffix, data):
    rows, out = Rows(suffix, ["text", "b", "c"]), tmp_path / f"out{suffix}"
    prompts = [Prompt("", {"text": cell, "b": "x"}) for cell in cells]
    parts = [rows.heading().encode(), *(rows.text({**prompt.row, "c": "é"}).encode() for prompt in prompts)]
    whole = b"".join(parts)
    out.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    size, done = out.stat().st_size, rows.done(out, prompts)
    assert out.read_bytes() == (b"".join(parts[: done + 1]) if done or size >= len(parts[0]) else b"")
    assert done == len(prompts) or size < len(b"".join(parts[: done + 2]))


def test_a_file_that_is_not_continued_stays_as_it_was(tmp_path):
    (tmp_path / "out.csv").write_text("text\nother\nwithout an end")
    with pytest.raises(DataError, match="not row 1"):
        Rows(".csv", ["text"]).done(tmp_path / "out.csv", [Prompt("", {"text": "a"})])
    assert (tmp_path / "out.csv").read_text() == "text\nother\nwithout an end"


@pytest.mark.parametrize("comma", ",;\t")
def test_rows_have_the_delimiter_of_the_table_their_own_cells_as_they_are_and_lists_as_json(tmp_path, comma):
    (tmp_path / "in.csv").write_text(f"text{comma}n\na{comma}1.5\n")
    prompts = read_prompts(tmp_path / "in.csv")
    rows = Rows(".csv", [*prompts[0].row, "p", "i", "of"], tmp_path / "in.csv")
    added = {"p": 0.25, "i": 1, "of": [0.5]}
    text = rows.heading() + "".join(rows.text({**prompt.row, **added}) for prompt in prompts)
    (tmp_path / "out.csv").write_text(text)
    for prompt, (_, row) in zip(prompts, read_rows(tmp_path / "out.csv")[1], strict=True):
        assert row == {**prompt.row, "p": "0.25", "i": "1", "of": "[0.5]"}
    assert rows.done(tmp_path / "out.csv", prompts) == len(prompts)
    assert Rows(".tsv", ["p"], tmp_path / "in.csv").text(added) == "0.25\n"


def test_a_table_holds_lists_as_json_and_nothing_as_an_empty_cell():
    rows, day = Rows(".csv", ["a", "b", "c"]), date(2026, 1, 2)
    text = rows.heading() + rows.text({"a": ["x", "ü", day], "b": None, "c": day})
    assert text == 'a,b,c\n"[""x"", ""ü"", ""2026-01-02""]",,2026-01-02\n'
    assert Rows(".jsonl", []).text({"a": day, "b": "ü"}) == '{"a": "2026-01-02", "b": "ü"}\n'
