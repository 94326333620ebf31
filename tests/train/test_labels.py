"""A job on labelled data: what it learns, reports, stores and shows, and that the stored labels are used again."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
from commandline import complaint, job
from figure_check import problems
from jobs import material_of, measured, options
from planted import planted
from planted_fields import planted_fields

import minilora as ml
from minilora.cli import main
from minilora.commands.eval import page
from minilora.data.labels import LabelTask
from minilora.data.records import read_source
from minilora.data.trained import warning_of_trained
from minilora.experiments.grid import SweepOptions, as_options
from minilora.experiments.sweep import trial
from minilora.generate.conversation import Talk
from minilora.generate.streams import Sampling
from minilora.measure.labels import Labelled, calibration_error, majority, reliability
from minilora.pages.labels import DRAWN, label_lines, labels_figure, verdict
from minilora.pages.style import theme
from minilora.serve.engine import Engine
from minilora.train.job import finetune
from minilora.train.options import Options


@pytest.mark.long
def test_the_tiny_base_learns_a_label_that_one_word_decides(tmp_path):
    model, tokenizer = ml.load("tiny")
    reading = read_source(planted(tmp_path / "own.jsonl"))
    splits = ml.split_records(reading.records)
    held = Labelled(reading.task, [*splits["validation"], *splits["test"]], splits["train"])
    ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16), name="own", seed=0)
    before = held.ask(model, tokenizer)
    ml.fit(model, ml.encode_records(splits["train"], tokenizer), 60, lr=1e-2, batch_size=6)
    *_, untrained, trained = held.report({"before": before, "after": held.ask(model, tokenizer)})["rows"]
    assert untrained["accuracy"]["value"] < 0.5 and trained["accuracy"]["value"] >= 0.9
    assert trained["macro_f1"]["value"] >= 0.9 and untrained["lead"]["low"] > 0


@pytest.fixture(scope="module", autouse=True)
def no_scikit_learn():
    """It takes long to load; `tests/measure/test_labels.py` has what it learns. The majority class stands for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minilora.measure.labels.classic", majority)
        yield


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    """A run on labelled data: its folder, its data, its metrics."""
    folder = tmp_path_factory.mktemp("labels")
    data = planted(folder / "own.jsonl")
    metrics = finetune(options(home, folder / "run", data=str(data), steps=20, lr=0.03, keep="last", strength=None))
    return folder / "run", data, metrics


def test_the_metrics_have_the_report_and_the_folder_the_picture_and_the_labels(run):
    folder, data, metrics = run
    report = metrics["labels"]
    assert report == json.loads((folder / "metrics.json").read_text())["labels"] and metrics["answers"] == []
    names = [row["name"] for row in report["rows"]]
    expected = ["majority class", "TF-IDF + logistic regression", "base, zero-shot", "base, 8-shot", "LoRA"]
    assert report["rows"][1]["accuracy"] == report["rows"][0]["accuracy"]  # what stands for it was asked
    assert names == expected and report["subject"] == "LoRA" and report["records"] == 6
    assert np.sum(report["confusion"]) == 6 and len(report["mistakes"]) == 6 - np.trace(report["confusion"])
    assert (folder / "picture-labels.png").stat().st_size > 10_000
    stored = json.loads((folder / "minilora.json").read_text())["data"]
    assert LabelTask.stored(stored) == read_source(data).task
    again = Options.read(folder / "run.toml", overwrite=True)
    assert again.label is None and again.columns == {}
    assert again.strength == metrics["options"]["strength"] == 1  # the update of labels is not scaled down


@pytest.fixture
def no_second_picture(monkeypatch):
    """What `run` has drawn is not drawn again."""
    monkeypatch.setattr("minilora.train.job.task_figures", lambda metrics: {})


@pytest.mark.usefixtures("no_second_picture")
def test_a_model_that_is_fine_tuned_whole_stores_its_labels_and_answers_with_them(home, run, tmp_path):
    settings = options(home, tmp_path / "full", data=str(run[1]), method="full", steps=5, lr=1e-3, keep="last")
    metrics = finetune(settings)
    model, tokenizer = ml.load(tmp_path / "full")
    task = read_source(run[1]).task
    assert LabelTask.stored(model.data) == task
    talk = Talk(model, tokenizer, Sampling())
    shown = []
    assert talk.ask("the courier lost it", shown.append) and talk.turns[0].answer in task.labels
    assert re.fullmatch(r"(bill|other|parcel) \(\d+ %; then .*\)", "".join(shown))
    (report,) = measured(home, run[1], base=str(tmp_path / "full"))["labels"].values()
    assert [row["name"] for row in report["rows"]][2:] == ["the whole model"]
    assert report["confusion"] == metrics["labels"]["confusion"]
    assert metrics["labels"]["rows"][-1]["name"] == "full fine-tuning"
    assert Engine(model, tokenizer).versions["base"].labels == task.labels
    fewer = [{"text": f"{i} on the invoice", "label": label} for i, label in enumerate(("bill", "other") * 3)]
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, fewer)))
    found = measured(home, tmp_path / "more.jsonl", base=str(tmp_path / "full"))["labels"]
    assert found["more"]["labels"] == list(task.labels)
    above = dict(base=str(tmp_path / "full"), data=str(tmp_path / "more.jsonl"), steps=1)
    finetune(options(home, tmp_path / "above", **above), measure=False, answers=False)
    assert LabelTask.stored(json.loads((tmp_path / "above" / "minilora.json").read_text())["data"]) == task


def test_a_strength_that_is_given_is_kept_and_full_fine_tuning_has_none():
    assert Options(strength=0.5).for_task().strength == 0.5 and Options().for_task().adapter_scale == 1
    assert Options(method="full").for_task().strength is None


def test_the_trained_row_is_that_of_the_adapter_and_the_base_rows_are_those_of_the_base(home, run):
    folder, data, metrics = run
    found = measured(home, data, folder)
    (report,) = found["labels"].values()
    rows = {row["name"]: row for row in report["rows"]}
    for row in metrics["labels"]["rows"]:
        again = rows["run" if row["name"] == "LoRA" else row["name"]]
        assert again["accuracy" if "accuracy" in row else "missing"] == row.get("accuracy", row.get("missing"))
        if "ece" in row:
            assert again["ece"] == pytest.approx(row["ece"], abs=1e-6)
    assert abs(rows["run"]["ece"] - rows["base, zero-shot"]["ece"]) > 1e-5
    assert report["subject"] == "run" and report["confusion"] == metrics["labels"]["confusion"]
    assert "\n".join(label_lines(report, 80)) in page(found)
    assert max(map(len, page(found).splitlines())) <= 80


def test_a_file_without_training_records_is_measured_with_the_stored_labels(home, run, tmp_path):
    rows = [{"text": "the invoice please", "label": "bill"}, {"text": "pay it now", "label": "bill"}]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = measured(home, tmp_path / "new.jsonl", run[0])["labels"]["new"]
    assert report["labels"] == ["bill", "other", "parcel"] and np.sum(report["confusion"][1:]) == 0
    assert [row["name"] for row in report["rows"]] == ["base, zero-shot", "run"]


def test_a_label_that_is_new_to_the_adapters_is_named_since_it_changes_all_prompts(home, run, tmp_path, said):
    line = "no adapter was trained on all of its labels (not on Bill, z): its prompts differ from those of training"
    for labels, known in (("bill parcel z Bill", False), ("bill parcel", True), ("other", True), ("z Bill", True)):
        rows = [{"text": f"the invoice {label}", "label": label} for label in labels.split()]
        (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, rows)))
        before = len(said())
        measured(home, tmp_path / "new.jsonl", run[0], no_recall=True)
        told = [text for text in said()[before:] if "no record names a split" not in text]
        assert told == [f"{tmp_path / 'new.jsonl'}: {line}"] * (not known), labels


def test_versions_with_other_labels_are_each_asked_as_predict_asks_them(home, run, tmp_path, said):
    rows = [{"text": f"{word} {i}", "label": label} for i, (word, label) in enumerate([("invoice", "bill")] * 9)]
    rows += [{"text": f"the courier {i}", "label": "parcel"} for i in range(9)]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, rows)))
    versions = {"old": run[0]}
    for name, labels in (("more", "bill other parcel refund"), ("fewer", "bill parcel"), ("far", "parcel a b bill c")):
        versions[name] = shutil.copytree(run[0], tmp_path / name)
        record = json.loads((run[0] / "minilora.json").read_text())
        record["data"] |= LabelTask.of(labels.split()).entry()
        (tmp_path / name / "minilora.json").write_text(json.dumps(record))

    def report(*names):
        return measured(home, tmp_path / "new.jsonl", [f"{n}={versions[n]}" for n in names])["labels"]["new"]

    line = "each adapter is asked for the labels that it was trained on, which are not the same"
    assert report("old")["labels"] == ["bill", "other", "parcel"] and not any(line in text for text in said())
    found = [report(*names) for names in (("old", "more", "fewer"), ("fewer", "more", "old"))]
    assert any(line in text for text in said())
    model, tokenizer = ml.load(str(home / "base"))
    for name in ("old", "more", "fewer"):
        ml.load_adapter(model, versions[name], name)
        ml.set_adapter(model, name)
        answers = ml.predict(model, tokenizer, [row["text"] for row in rows])
        right = np.array([answer["label"] == row["label"] for answer, row in zip(answers, rows, strict=True)])
        bins = reliability(np.array([answer["probability"] for answer in answers]), right)
        for each in found:
            assert each["adapters"] == [row["name"] for row in each["rows"] if row["name"] in versions]
            assert each["labels"] == ["bill", "other", "parcel", "refund"]
            (row,) = (row for row in each["rows"] if row["name"] == name)
            assert row["accuracy"]["value"] == right.mean()
            assert row["ece"] == pytest.approx(calibration_error(bins), abs=1e-6)
    held = Labelled(LabelTask.of(["bill", "parcel", "z"]), read_source(tmp_path / "new.jsonl").records)
    logprobs = held.ask_as(LabelTask.of(["bill", "parcel"]), model, tokenizer)
    assert np.isneginf(logprobs).sum(axis=0).tolist() == [0, 0, len(rows)]
    far = report("old", "far")  # another task, rather than another version of this one
    assert far["labels"] == report("old")["labels"] and far["rows"][-1]["ece"] == found[0]["rows"][1]["ece"]


def test_measured_records_that_an_adapter_was_trained_on_are_named_whatever_their_labels(home, run, tmp_path, said):
    _, tokenizer = ml.load("tiny")
    splits = ml.split_records(read_source(run[1]).records)
    texts = {
        name: [LabelTask.of(["bill", "other", "parcel"]).text(r.question) for r in splits[name]] for name in splits
    }
    rows = [{"text": text, "label": "new"} for text in (*texts["train"][:2], *texts["test"][:3])]
    (tmp_path / "next.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"text": "hm", "label": "bill"}])))
    reading = read_source(tmp_path / "next.jsonl")
    (line,) = warning_of_trained([("next", reading.records, reading.task)], run[0], tokenizer)
    assert line.startswith(f"next: 2 of 6 records that are measured are in the training data of {run[0]}")
    assert warning_of_trained([("next", reading.records[2:], reading.task)], run[0], tokenizer) == []
    measured(home, tmp_path / "next.jsonl", run[0], no_recall=True)
    assert any("are in the training data of" in text for text in said())
    start = len(said())
    measured(home, tmp_path / "next.jsonl", run[0], no_recall=True, split="train")  # not what its numbers should say
    assert not any("are in the training data of" in text for text in said()[start:])


def test_an_adapter_that_is_trained_further_knows_records_that_are_held_out_now(home, run, tmp_path, said):
    before = [json.loads(line) for line in run[1].read_text().splitlines()]
    rows = [row | {"split": None} for row in before]
    (tmp_path / "next.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def lines(adapter, data):
        start = len(said())
        settings = options(home, tmp_path / "out", data=str(data), adapter=str(adapter), steps=1, overwrite=True)
        finetune(settings, measure=False, answers=False)
        return [line for line in said()[start:] if "in the training data of" in line or "has changed since" in line]

    (line,) = lines(run[0], tmp_path / "next.jsonl")
    held = ml.split_records(read_source(tmp_path / "next.jsonl").records)["test"]
    trained = {row["text"] for row in before if row["split"] == "train"}
    task = LabelTask.of(["bill", "other", "parcel"])
    known = sum(task.text(record.question) in trained for record in held)
    assert known > 0 and f": {known} of {len(held)} records that are measured are in the training data of" in line
    start = len(said())
    measured(home, tmp_path / "next.jsonl", run[0], split="test", no_recall=True)
    assert line in said()[start:]
    assert lines(run[0], run[1]) == []
    finetune(options(home, tmp_path / "own", data=str(tmp_path / "next.jsonl"), steps=1), measure=False)
    (tmp_path / "next.jsonl").write_text("\n".join(map(json.dumps, rows[1:])))
    (line,) = lines(tmp_path / "own", tmp_path / "next.jsonl")
    assert line.startswith(f"{tmp_path / 'next.jsonl'} has changed since {tmp_path / 'own'} was trained on it")


def test_the_subject_is_the_adapter_that_was_trained_on_the_set(home, run):
    own = f"mine={run[0]}"
    shutil.copytree(run[0], run[0].parent / "elsewhere", dirs_exist_ok=True)
    other = run[0].parent / "elsewhere" / "minilora.json"
    record = json.loads(other.read_text())
    gone = {"name": "gone", "path": "gone", "sha256": "0" * 64}
    other.write_text(json.dumps(record | {"data": record["data"] | gone}))
    copy = shutil.copy(run[1], other.parent / "copy.jsonl")  # the same data under another name
    for adapters, data in (([own, f"z={other.parent}"], copy), ([f"z={other.parent}", own], run[1])):
        (report,) = measured(home, data, adapters)["labels"].values()
        assert report["subject"] == "mine" and {"z", "mine"} < {row["name"] for row in report["rows"]}


def test_a_trial_measures_accuracy_on_the_validation_set(home, run, tmp_path):
    base, data = str(home / "base"), str(run[1])
    setting = SweepOptions(base=[base], data=[data], steps=[12], lr=[0.03]).settings()[0]
    found = trial(setting, str(tmp_path / "trial"))
    finetune(as_options(setting, out=str(tmp_path / "run")), measure=False)
    model, tokenizer = ml.load(base)
    ml.load_adapter(model, tmp_path / "run")
    held = material_of(as_options(setting), tokenizer).validated
    assert list(held.records) == ml.split_records(read_source(data).records)["validation"]
    right = np.argmax(held.ask(model, tokenizer), axis=1) == held.truth
    assert found["validation_accuracy"] == right.mean() and right.mean() > 0


def test_losses_alone_ask_for_no_labels(home, run):
    quick = measured(home, run[1], run[0], no_recall=True)
    assert quick["labels"] == {} and "no record of" not in page(quick)  # has keywords: labels need none


def test_data_without_labels_are_measured_for_an_adapter_of_labels_with_a_line_that_says_how_to_name_them(
    home, run, tmp_path, said
):
    def lines(rows, **change):
        path = tmp_path / "own.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        before, values = len(said()), {"adapter": run[0], "data": [path, "legal-handbook"], "limit": 2}
        measured(home, **values | change, no_recall=True)
        return [line.removeprefix(f"{path}: ") for line in said()[before:] if "no record names a split" not in line]

    texts = [{"text": f"the invoice {i}"} for i in range(12)]
    assert lines(texts) == ["to measure labels, name their column with --label"]
    named = [row | {"queue": "ab"[i % 2]} for i, row in enumerate(texts)]
    assert lines(named) == ["not read: queue in 12 records", *lines(texts)]
    assert lines(texts, adapter=[]) == lines(named, label="queue", data=tmp_path / "own.jsonl") == []


@pytest.mark.usefixtures("no_second_picture")
def test_an_adapter_that_is_trained_further_keeps_its_prompt(home, run, tmp_path):
    fewer = [{"text": f"the invoice {i}", "label": "bill"} for i in range(5)]
    fewer += [{"text": f"the courier {i}", "label": "parcel"} for i in range(5)]
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, fewer)))
    settings = options(home, tmp_path / "next", data=str(tmp_path / "more.jsonl"), steps=1, adapter=str(run[0]))
    report = finetune(settings)["labels"]
    stored = json.loads((tmp_path / "next" / "minilora.json").read_text())["data"]
    assert stored["labels"] == ["bill", "other", "parcel"]
    assert [row["name"] for row in report["rows"]][2:] == ["old adapter, zero-shot", "old adapter, 8-shot", "LoRA"]


def test_all_labels_are_logged_and_one_that_may_be_another_is_warned_of(home, tmp_path, tokenizer, said):
    data = planted(tmp_path / "own.jsonl")
    data.write_text(data.read_text() + '\n{"text": "hm", "label": "parcle", "split": "train"}')
    material = material_of(options(home, "unused", data=str(data)), tokenizer)
    assert f"{data}: 4 labels (text/label): bill, other, parcel, parcle" in said()
    assert "these count as different labels: 'parcel' and 'parcle'; is it one label?" in said()
    assert material.checked.task.labels == ("bill", "other", "parcel", "parcle") and len(material.train) == 37
    assert material.asked == material.shown == {}


def test_a_record_that_the_model_cannot_see_whole_is_named_and_not_asked(home, run, tmp_path, tokenizer, said):
    data = planted(tmp_path / "own.jsonl")
    data.write_text(data.read_text() + json.dumps({"text": "x" * 1100, "label": "bill", "split": "test"}).join("\n\n"))
    material = material_of(options(home, "x", data=str(data)), tokenizer)
    *others, long = material.checked.records
    material.refuse_what_is_longer(1024, "own", tokenizer)
    why = "with an answer they are longer than the 1024 tokens that the model can see"
    line = f"1 of 7 records are not asked, since {why}: line-49; shorten them"
    assert said()[-1] == f"own: {line}" and material.checked.records == others and len(others) == 6
    material.checked = Labelled(LabelTask.of(["bill", "other"]), [long])
    (length,) = material.checked.lengths(tokenizer)
    for limit in (length, length - 1):
        material.refuse_what_is_longer(limit, "own", tokenizer)
        assert (material.checked is None) == (limit < length)
    (report,) = measured(home, data, run[0])["labels"].values()
    assert report["records"] == 6 and f"{data}: {line}" in said()


def test_columns_that_are_not_read_are_logged_but_for_data_that_come_along(home, tmp_path, tokenizer, said):
    rows = [{"text": f"note {i}", "my topic": f"{i % 3}", "pages": i % 5, "of": [i % 2]} for i in range(62)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    material_of(options(home, "unused", data=str(tmp_path / "own.jsonl")), tokenizer)
    unread = "my topic in 62 records, pages in 62 records, of in 62 records"
    assert said()[0] == f"{tmp_path / 'own.jsonl'}: not read: {unread}"
    material_of(options(home, "unused", data="legal-handbook"), tokenizer)
    assert not any("covers" in line for line in said())


def test_the_commands_name_the_column(home, tmp_path, capsys):
    data = planted(tmp_path / "own.jsonl")
    data.write_text(data.read_text().replace('"label"', '"queue"'))
    assert main([*job(home, "--data", data, "--label", "topic", "--out", tmp_path / "run")]) == 1
    assert "field label=topic: no such column; there are text, queue, split" in complaint(capsys)
    assert main(["data", str(data), "--base", "tiny", "--label", "queue"]) == 0
    out = capsys.readouterr().out
    assert "-- 3 labels ---" in out and "bill       12           2     2" in out
    assert f"minilora finetune --data {data} --field label=queue --base tiny" in " ".join(out.split())
    words = ["eval", "--base", home / "base", "--data", data, "--label", "queue", "--confusion", tmp_path / "c.svg"]
    assert main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "c.svg").is_file() and "confusion matrix of base, 8-shot" in out and "has keywords" not in out
    words[words.index(data)] = home / "data.jsonl"
    assert main([str(word) for word in words if word not in ("--label", "queue")]) == 1
    assert complaint(capsys) == "--confusion needs labelled data: name the column of the labels with --label"


@pytest.mark.long
@pytest.mark.parametrize("task", ["labels", "fields"])
def test_no_page_or_picture_is_steered_by_what_data_say(task, home, tmp_path, capsys, monkeypatch):
    bad = "$\\x{$\x1b[2J\x9b"  # no formula, and what clears a terminal
    data = planted(tmp_path / "own.jsonl") if task == "labels" else planted_fields(tmp_path / "own.jsonl")
    for file in tmp_path.iterdir():
        for word in ("bill", "kind", "please", "hello"):
            file.write_text(file.read_text().replace(word, json.dumps(bad + word)[1:-1]))
    monkeypatch.chdir(tmp_path)
    words = ["--adapter", "run", "--max-new-tokens", "70"]
    commands = [
        ["data", data, "--base", "tiny"], job(home, "--data", data, "--out", "run"), ["report", "run"], ["runs", "."],
        ["eval", "--adapter", "run", "--data", data, "--limit", "3"], ["predict", data, *words],
        ["chat", *words, "--prompt", "hello"],
    ]  # fmt: skip
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    for command in commands:
        assert main([*map(str, command)]) == 0
        out, err = capsys.readouterr()
        assert out and not {*out, *err} & {"\x1b", "\x9b"}, command
    assert list((tmp_path / "run").glob(f"*-{task}.png"))


# -- the page and the picture ------------------------------------------------------------------------------------------


def report_of(n, records=40, lead=(0.1, 0.02, 0.2)):
    """A report with `n` labels, of which some are confused."""
    labels = [f"label\nnumber {i}" for i in range(n)]
    counts = np.eye(n, dtype=int) * (records // n)
    counts[0, 1] += records - counts.sum()
    interval = {"value": 0.5, "low": 0.4, "high": 0.6}
    bins = [
        {"from": start, "records": count, "confidence": start + 0.05, "accuracy": right}
        for start, count, right in ((0.5, 6, 1.0), (0.9, records - 6, 0.5))
    ]
    rows = [
        {"name": name, "accuracy": interval, "macro_f1": interval, "ece": 0.45, "reliability": bins,
         "lead": dict(zip(("value", "low", "high"), lead, strict=True)),
         "coverage": [{"from": 0.5, "coverage": 1.0, "accuracy": interval},
                      {"from": 0.95, "coverage": 0.125, "accuracy": interval | {"value": 0.987}},
                      {"from": 0.99, "coverage": 0.0, "accuracy": dict.fromkeys(interval)}]}
        for name in ("base, zero-shot", "LoRA")
    ]  # fmt: skip
    mistakes = [{"id": "x", "text": "a\nlong text " * 30, "label": "a\n1", "chosen": "b", "confidence": 0.9}] * 7
    return {"labels": labels, "records": records, "subject": "LoRA", "rows": rows, "confusion": counts.tolist(),
            "mistakes": mistakes}  # fmt: skip


def test_the_page_shows_the_matrix_of_few_labels_and_the_confusions_of_many():
    few, many = ("\n".join(label_lines(report_of(n, 46), 80)) for n in (4, 40))
    assert "confusion matrix of LoRA" in few and " 1 label number 0  11   2   .   ." in few
    assert "the most frequent confusions of LoRA" in many and "  6  label number 0 taken for label number 1" in many
    for text in (few, many):
        assert "90-100" in text and "7 mistakes, the most confident first" in text and "and 2 more" in text
        assert text.count("a 1 was taken for b (90 %): a long text") == 5 and max(map(len, text.splitlines())) <= 80
        assert re.search(rf"\nrecords +6 +{46 - 6}\nof them right, % +100 +50\n", text)
        shares = r"\nthreshold, % +50 +95 +99\nanswered, % +100.0 +12.5 +0.0\nof them right, % +50.0 +98.7 +-\n"
        assert re.search(shares, text)
    assert "accuracy by kind" not in few and "0 taken for label number 0" not in many
    assert "no mistakes" in list(label_lines(report_of(4) | {"mistakes": []}))
    older = report_of(4, 46)
    for row in older["rows"]:
        del row["coverage"]
    assert "\n".join(label_lines(older, 80)) == re.sub(r"if only labels.+\n(.+\n){3}\n", "", few)
    short = report_of(4)["mistakes"][0] | {"text": "x"}
    assert "  a 1 was taken for b (90 %): x" in list(label_lines(report_of(4) | {"mistakes": [short]}))


@pytest.mark.parametrize(
    ("lead", "words"),
    [
        ((0.1, 0.02, 0.2), "LoRA is better than the best of the others, base, zero-shot: +10.0 [+2.0, +20.0] points"),
        ((0.1, -0.02, 0.2), "LoRA is not clearly better than base, zero-shot: +10.0 [-2.0, +20.0] points of accuracy."),
        ((-0.1, -0.2, 0.0), "LoRA is not clearly better than base, zero-shot: -10.0 [-20.0, 0.0] points of accuracy."),
        ((-0.1, -0.2, -0.05), "LoRA is worse than base, zero-shot: -10.0 [-20.0, -5.0] points of accuracy. "
                              "Use base, zero-shot."),
        ((0.1, None, None), "LoRA is not clearly better than base, zero-shot: +10.0 points of accuracy."),
    ],
)  # fmt: skip
def test_the_verdict_says_who_is_better(lead, words):
    assert verdict(report_of(4, lead=lead)).startswith(words)


def test_the_verdict_compares_with_every_other_adapter():
    report = report_of(4)
    report["rows"][0]["accuracy"] = {"value": 0.6, "low": 0.5, "high": 0.7}
    report["rows"][1:1] = [report["rows"][0] | {"name": name, "accuracy": {"value": 0.1}} for name in ("v1", "v2", "x")]
    report["rows"][2]["lead"] = {"value": -0.1, "low": -0.2, "high": 0.1}
    report["rows"][3]["lead"] = {"value": -0.1, "low": -0.2, "high": -0.05}
    alone = verdict(report)
    more = verdict(report | {"adapters": ["v1", "v2", "x", "LoRA"]}).removeprefix(alone)
    assert alone.endswith("base, zero-shot: +10.0 [+2.0, +20.0] points of accuracy.") and more == (
        " LoRA is better than v1: +10.0 [+2.0, +20.0] points of accuracy."
        " LoRA is not clearly better than v2: -10.0 [-20.0, +10.0] points of accuracy."
        " LoRA is worse than x: -10.0 [-20.0, -5.0] points of accuracy."
    )
    best = verdict(report | {"adapters": ["base, zero-shot"]})
    assert best == alone  # nobody twice


@pytest.mark.parametrize(("n", "name"), [(2, "light"), (16, "dark")])
def test_the_picture_can_be_read(n, name):
    with theme(name):
        figure = labels_figure(report_of(n, 45))
        assert problems(figure) == []
        assert {text.get_text() for text in figure.axes[0].texts} == {
            str(c) for c in np.unique(report_of(n, 45)["confusion"]) if c
        }
        assert np.allclose(np.nansum(figure.axes[0].images[0].get_array(), axis=1), 1)  # of each label's records
        assert np.allclose(figure.axes[1].lines[1].get_xydata(), [[55, 100], [95, 50]])
        assert np.diff(figure.axes[1].collections[0].get_sizes()) > 0  # there are more records
        assert [text.get_text() for text in figure.axes[1].texts] == ["ECE 45.0 points"]
        named = [
            [text.get_text() for text in axis.get_ticklabels()] for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis)
        ]
        assert named[0] == named[1] and len(set(named[0])) == n


def test_of_very_many_labels_those_with_the_most_mistakes_are_drawn():
    report = report_of(200, 410)
    report["confusion"][150][170] = 3  # after 10 of the first label that were given the second one
    report["confusion"][160][160] = 4  # more frequent, and always right
    figure = labels_figure(report)
    drawn = [int(text.get_text().split()[-1]) for text in figure.axes[0].yaxis.get_ticklabels()]
    assert problems(figure) == [] and max(figure.get_size_inches()) < 30
    assert drawn == sorted(drawn) and len(drawn) == DRAWN and {0, 1, 150, 160, 170} < set(drawn)
    place = drawn.index(150), drawn.index(170)
    assert figure.axes[0].images[0].get_array()[place] == 3 / 5  # a share of all of its records
    assert f"{DRAWN} of 200 labels" in figure.axes[0].get_title()
