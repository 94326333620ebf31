"""A job on data with fields: what it learns, reports, stores and shows, and that the stored schema is used again."""

import json

import numpy as np
import pytest
from commandline import complaint, job
from figure_check import problems, spans
from jobs import measured, options
from planted_fields import SCHEMA, planted_fields

import minilora as ml
from minilora.cli import main
from minilora.commands.eval import page
from minilora.data.fields import FieldTask
from minilora.data.records import read_source
from minilora.measure import fields as measuring
from minilora.measure.fields import WithFields
from minilora.pages.fields import field_lines, fields_figure
from minilora.pages.style import theme
from minilora.train.job import finetune


@pytest.mark.long
def test_the_tiny_base_learns_fields_that_one_word_decides(tmp_path):
    model, tokenizer = ml.load("tiny")
    reading = read_source(planted_fields(tmp_path / "own.jsonl"))
    splits = ml.split_records(reading.records)
    held = WithFields(reading.task, splits["test"], splits["train"])
    ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16), name="own", seed=0)
    before = held.ask(model, tokenizer)
    ml.fit(model, ml.encode_records(splits["train"], tokenizer), 40, lr=1e-2, batch_size=6)
    report = held.report({"before": before, "after": held.ask(model, tokenizer)})
    _, untrained, trained = report["rows"]
    for name in ("kind", "tags"):
        assert trained["fields"][name]["value"] >= 0.9 > untrained["fields"][name]["value"]
    assert untrained["lead"]["low"] > 0


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """A random model's lists end where the tokens do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "ANSWER_TOKENS", 64)
        yield


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    """A run on data with fields: its folder, its data, its metrics."""
    folder = tmp_path_factory.mktemp("fields")
    data = planted_fields(folder / "own.jsonl")
    metrics = finetune(options(home, folder / "run", data=str(data), steps=20, lr=0.03, keep="last", strength=None))
    return folder / "run", data, metrics


def test_the_metrics_have_the_report_and_the_folder_the_picture_and_the_schema(run):
    folder, data, metrics = run
    report = metrics["fields"]
    assert report == json.loads((folder / "metrics.json").read_text())["fields"] and metrics["answers"] == []
    assert metrics["options"]["strength"] == 1  # the update is not scaled down
    names = [row["name"] for row in report["rows"]]
    assert names == ["most frequent values", "base, zero-shot", "base, 4-shot", "LoRA"] and report["records"] == 8
    assert report["copied"] == ["name", "tags"] and "labels" not in metrics
    assert (folder / "picture-fields.png").stat().st_size > 10_000
    stored = json.loads((folder / "minilora.json").read_text())["data"]
    assert FieldTask.stored(stored) == read_source(data).task


def test_eval_gives_the_numbers_of_the_run(home, run):
    folder, data, metrics = run
    found = measured(home, data, folder)
    (report,) = found["fields"].values()
    rows = {row["name"]: row for row in report["rows"]}
    for row in metrics["fields"]["rows"]:
        assert rows["run" if row["name"] == "LoRA" else row["name"]]["fields"] == row["fields"]
    assert report["mistakes"] == metrics["fields"]["mistakes"] and found["labels"] == {}
    assert "\n".join(field_lines(report, 80)) in page(found) and max(map(len, page(found).splitlines())) <= 80


def test_new_data_are_measured_and_a_chat_answers_under_the_stored_schema(home, run, tmp_path, capsys):
    (tmp_path / "new.jsonl").write_text('{"text": "pay x, gus", "fields": {"kind": "bill", "name": "gus", "tags": []}}')
    report = measured(home, tmp_path / "new.jsonl", run[0])["fields"]["new"]
    assert [row["name"] for row in report["rows"]] == ["base, zero-shot", "run"] and report["records"] == 1
    words = ["chat", "--adapter", str(run[0]), "--base", str(home / "base"), "--prompt", "pay x, gus"]
    assert main(words) == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer) == list(SCHEMA["properties"]) and {answer["name"], *answer["tags"]} <= {
        None, "pay", "x", "gus", "pay x", "x, gus", "pay x, gus", "x,", "pay x,", ",", ", gus",
    }  # fmt: skip


def test_a_schema_that_has_changed_since_training_is_named_since_it_changes_all_prompts(home, run, tmp_path, said):
    (tmp_path / "new.jsonl").write_text('{"text": "pay x, gus", "fields": {"kind": "bill"}}')
    own, one = SCHEMA["properties"], {"type": ["string", "null"]}
    for rules, same in (
        (own, True), (own | {"kind": {"enum": ["bill", "b"]}}, False), (own | {"more": one}, False),
        ({"kind": own["kind"]}, False), ({"kind": own["kind"], "more": one}, True),
    ):  # fmt: skip
        (tmp_path / "new.schema.json").write_text(json.dumps({"properties": rules}))
        before, data = len(said()), str(tmp_path / "new.jsonl")
        measured(home, data, run[0], no_recall=True)
        differ = "its prompts differ from those of training"
        told = [line for line in said()[before:] if differ in line]
        line = f"{data}: its schema is not the one that the adapter was trained on: {differ}"
        assert told == [line] * (not same), rules


def test_a_model_that_was_fine_tuned_as_a_whole_keeps_the_schema(home, run, tmp_path, capsys):
    settings = options(home, tmp_path / "full", data=str(run[1]), steps=1, method="full")
    finetune(settings, measure=False, answers=False)
    model, _ = ml.load(tmp_path / "full")
    assert FieldTask.stored(model.data) == read_source(run[1]).task
    assert main(["chat", "--base", str(tmp_path / "full"), "--prompt", "pay x, gus"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == list(SCHEMA["properties"])
    (tmp_path / "new.jsonl").write_text('{"text": "pay x, gus", "fields": {"kind": "bill", "name": "gus", "tags": []}}')
    alone = measured(home, tmp_path / "new.jsonl", base=str(tmp_path / "full"))
    assert [row["name"] for row in alone["fields"]["new"]["rows"]] == ["the whole model"]
    assert "the whole model was compared with nothing." in page(alone)


def test_a_chat_with_the_base_answers_under_a_schema_that_is_given(home, tmp_path, capsys):
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    words = ["chat", "--base", str(home / "base"), "--schema", str(tmp_path / "s.json"), "--prompt", "hello"]
    assert main(words) == 0 and list(json.loads(capsys.readouterr().out)) == list(SCHEMA["properties"])
    assert main([*words, "--max-new-tokens", "5"]) == 1
    assert "an answer under this schema may need" in complaint(capsys)
    (tmp_path / "s.json").write_text("{")
    assert main(words) == 1 and "s.json: not readable as JSON" in complaint(capsys)


def test_the_commands_take_the_schema(home, tmp_path, capsys):
    data = planted_fields(tmp_path / "own.jsonl")
    schema = data.with_suffix(".schema.json").rename(tmp_path / "other.json")
    assert main([*job(home, "--data", data, "--out", tmp_path / "run")]) == 1
    assert "data with fields need a JSON Schema: give one with --schema" in complaint(capsys)
    assert main(["data", str(data), "--base", "tiny", "--schema", str(schema)]) == 0
    out = capsys.readouterr().out
    assert "-- 3 fields, records in which each is filled ---" in out and "name     12           4     8" in out
    assert f"--schema {schema}" in " ".join(out.split())
    assert main([*job(home, "--data", home / "data.jsonl", "--schema", schema, "--out", tmp_path / "run")]) == 1
    assert "a schema is for rows with a text and its fields, and no row has them" in complaint(capsys)
    words = ["eval", "--base", "tiny", "--schema", str(schema), "--limit", "1", "--no-recall", "--data", "general"]
    assert main([*words, str(data)]) == 0 and main(words) == 1  # general has no fields, and is measured without


def report_of(subject=0.9, mistakes=7):
    share = {"value": subject, "low": subject - 0.1, "high": 1.0}
    low, none = ({"value": value, "low": value - 0.1, "high": value + 0.1} for value in (0.4, 0.2))
    rows = [
        {"name": name, "fields_right": found, "objects_right": low, "fields": {"a": found, "a long name " * 3: low},
         "lead": {"value": 0.5, "low": 0.4, "high": 0.6}}
        for name, found in (("usual", none), ("base, zero-shot", low), ("LoRA", share))
    ]  # fmt: skip
    wrong = [{"id": "x", "text": "a\nlong text " * 30, "wrong": {"a": [None, "y"]}}] * mistakes
    return {"fields": ["a", "a long name " * 3], "copied": ["a"], "records": 40, "subject": "LoRA", "rows": rows,
            "mistakes": wrong}  # fmt: skip


def test_the_page_shows_every_field_and_some_mistakes():
    text = "\n".join(field_lines(report_of(), 80))
    for line in ("2 fields, 40 records", "Copied from the text: a.", "7 records with a mistake", "and 2 more",
                 'a is null, got "y": a long text',
                 "right, % base, zero-shot LoRA", "LoRA is better than the best of the others"):  # fmt: skip
        assert line in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80 and "no mistakes" in list(field_lines(report_of(mistakes=0), 80))
    for n, end in ((6, "; and 1 more: a long"), (5, "e is 4, got 0: a long")):  # fields of a record that are wrong
        wrong = {name: [i, 0] for i, name in enumerate("abcdef"[:n])}
        one = report_of(mistakes=1)["mistakes"][0] | {"wrong": wrong}
        text = " ".join("\n".join(field_lines(report_of() | {"mistakes": [one]}, 80)).split())
        assert end in text and "f is 5" not in text


@pytest.mark.parametrize("name", ["light", "dark"])
def test_the_picture_can_be_read(name):
    with theme(name):
        figure = fields_figure(report_of())
        assert problems(figure) == []
        shares = [line.get_xdata() for line in figure.axes[0].lines]
        assert np.allclose(shares[0], [90, 40, 90]) and np.allclose(shares[1], 40)
        assert {(80, 100), (30, 50)} <= spans(figure.axes[0], 0)
        assert figure.axes[0].get_title() == "Fields of 40 records"
