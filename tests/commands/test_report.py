"""The page of fixed metrics, to the last column: what stands where, signs, units, and what is left out."""

import copy
import json

import pytest
from commandline import columns

from minilora.cli import main
from minilora.commands.report import page, read_metrics
from minilora.pages.text import terminal_width

METRICS = {
    "options": {"method": "lora", "base": "models/x", "data": "own.jsonl", "out": "runs/own"},
    "steps": 40,
    "planned_steps": 60,
    "trainable_parameters": 2_442_240,
    "total_parameters": 136_957_248,
    "audit": {"scale": "alpha / r", "base": "same"},
    "base_sha256": ["0123456789abcdef" * 4] * 2,
    "loss": {"paraphrase": [3.0, 1.5], "unseen": [2.5, 2.6], "general": [2.0, 2.0]},
    "keyword_recall": {"paraphrase": [0.125, 0.5], "unseen": [0.0, 0.0625]},
    "answers": [
        {"set": "paraphrase", "question": "Define lien.", "before": "A plant.", "after": "A claim\non property."},
        {"set": "unseen", "question": "Define tort.", "before": "", "after": "A wrong."},
    ],
    "seconds_per_step": 1.234,
    "tokens_per_second": 1234.6,
    "training_seconds": 90.0,
    "peak_memory_bytes": {
        "predicted": 1_000_000_000,
        "measured": 99_500_000,
        "reached": "training",
        "full_predicted": 2_000_000_000,
        "by_owner": {"program": 2e8, "weights": 799_950_000, "adapter": 50_000, "moments": 2_000_000, "scratch": 0},
    },
    "adapter_bytes": 10_000_000,
    "base_bytes": 540_000_000,
}
PAGE = """\
-- LoRA fine-tuning of models/x on own.jsonl -------------------------------------------------------

Define lien. (training question, paraphrased)
  before A plant.
  after  A claim on property.

Define tort. (not in training)
  before (nothing)
  after  A wrong.

-- what it learned ---------------------------------------------------------------------------------
                                         before    after        change
loss, paraphrased questions               3.000    1.500         -50 %
loss, unseen questions                    2.500    2.600          +4 %
loss, general text (forgetting)           2.000    2.000           0 %
keyword recall, paraphrased questions    12.5 %   50.0 %  +37.5 points
keyword recall, unseen questions          0.0 %    6.2 %   +6.2 points

-- what it cost ------------------------------------------------------------------------------------
trainable parameters  2,442,240 of 136,957,248 (1.783 %)
memory of a step      1,000 MB predicted; peak of the process: 99.5 MB, while training
                      program 200 MB, weights 800 MB, adapter 0.050 MB, optimizer state 2.0 MB
                      full fine-tuning would need 2,000 MB
time                  1.23 s per step, 1,235 tokens/s; 1.5 minutes for 40 steps
disk                  adapter 10.0 MB; base in memory 540 MB (54 to 1)
base                  unchanged: sha256 0123456789abcdef = 0123456789abcdef
audit                 2 checks passed: scale, base

Saved in runs/own. To talk to it:
  minilora chat --adapter runs/own"""
TRAINED = {  # what a run of today notes besides
    "records": {"train": 240, "validation": 30, "paraphrase": 80, "unseen": 29, "general": 60},
    "train_loss": [4.0, 3.0, 3.0, 2.0, 2.0, 2.0, 1.0, 0.5],
    "validation_loss": [[2, 2.5], [4, 2.0], [8, 2.25]],
}
VALIDATED = TRAINED | {  # where paraphrases of trained records are for validation, too, and the best adapter is kept
    "validation": {"unseen": [[2, 2.5], [4, 2.25], [8, 3.0]], "paraphrase": [[2, 2.5], [4, 1.75], [8, 1.5]]},
    "kept": {"step": 4, "which": "best", "loss": 2.0},
    "last": {"loss": {"paraphrase": 1.25, "unseen": 2.75, "general": 2.5}},
}


def changed(**change):
    """The metrics with other values; a dict replaces single entries of a dict."""
    metrics = copy.deepcopy(METRICS)
    for key, value in change.items():
        metrics[key] = metrics.get(key, {}) | value if isinstance(value, dict) else value
    return metrics


def test_the_page_of_an_adapter():
    assert page(METRICS).split("\n") == PAGE.split("\n")


def test_the_page_of_full_fine_tuning_says_what_is_different():
    metrics = changed(options={"method": "full"}, base_sha256=["a" * 64, "b" * 64]) | {"audit": {}}
    got, usual = page(metrics).split("\n"), PAGE.split("\n")
    assert [line for line in got if line not in usual] == [
        "-- full fine-tuning of models/x on own.jsonl -------------------------------------------------------",
        "trainable parameters  all 136,957,248",
        "disk                  10.0 MB: a whole model",
        "weights               changed: sha256 aaaaaaaaaaaaaaaa -> bbbbbbbbbbbbbbbb",
        "  minilora chat --base runs/own",
    ]
    missing = [line.split()[0] for line in usual if line not in got]
    assert missing == ["--", "trainable", "full", "disk", "base", "audit", "minilora"]


def learned(metrics):
    """The lines below the heading "what it learned"."""
    return page(metrics).split("-- what it learned ")[1].split("-- what it cost")[0].rstrip().split("\n")[1:]


COUNTS = [  # data, records, the line
    ("own.jsonl", TRAINED["records"], "240 training records, 30 for validation, 29 for testing; "
     "80 paraphrased training questions for testing"),
    ("own.jsonl", {"train": 9, "reworded": 1, "paraphrase": 4}, "9 training records; 1 reworded training question and "
     "4 paraphrased training questions for testing"),
    ("own.jsonl", {"train": 1, "validation": 0, "unseen": 3}, "1 training record, 3 for testing"),
    ("own.jsonl", {"train": 240, "validation": 30, "validation_paraphrase": 80, "paraphrase": 80}, "240 training "
     "records, 30 for validation; 80 paraphrased training questions for testing; 80 paraphrased for validation"),
    ("a/novel.txt", {"train": 1800, "unseen": 2, "general": 60}, "1,800 training sequences, 2 for testing"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "records", "line"), COUNTS, ids=["splits", "one", "reworded", "both", "text"])
def test_the_page_counts_its_records(data, records, line):
    lines = learned(changed(options={"data": data}) | {"records": records})
    assert " ".join(lines[: lines.index("")]) == line


def test_the_page_says_of_how_many_records_a_sample_was_measured():
    sizes = {"records": {"train": 9, "validation": 2, "unseen": 3}, "sampled_from": {"unseen": 3000}}
    assert "9 training records, 2 for validation, 3 of 3,000 for testing" in page(METRICS | sizes)


def test_the_losses_during_training_have_first_last_and_lowest():
    assert learned(METRICS | TRAINED)[-3:] == [
        "during training                           first     last        lowest   at step",
        "training loss, mean of 2 steps            3.500    0.750",
        "validation loss, unseen questions         2.500    2.250         2.000         4",
    ]


def test_what_was_kept_is_compared_with_the_last_step():
    lines = learned(METRICS | VALIDATED)
    assert lines[3:5] == [
        "                                         before    after        change last step",
        "loss, paraphrased questions               3.000    1.500         -50 %     1.250",
    ]
    assert lines[-3:-1] == [
        "validation loss, paraphrased questions    2.500    1.500         1.500         8",
        "Kept: the adapter of step 4, where mean validation loss was lowest. The last one is in",
    ]


KEPT = [  # what is different -> the last sentence
    ({}, "Kept: the adapter of step 8, where mean validation loss was lowest."),
    ({"kept": {"step": 8, "which": "last", "loss": 2.0}}, "Kept: the adapter of step 8, the last one."),
    ({"validation": {"unseen": [[4, 2.25], [8, 2.0]]}},
     "Kept: the adapter of step 8, where validation loss was lowest."),
    ({"options": {"strength": 0.65}},
     "Kept: the adapter of step 8, where mean validation loss was lowest; its update is scaled by 0.65 (--strength)."),
    ({"options": {"strength": 1.0}}, "Kept: the adapter of step 8, where mean validation loss was lowest."),
    ({"options": {"method": "full"}, "kept": {"step": 4, "which": "best"}}, "Kept: the model of step 4, where mean "
     "validation loss was lowest. The last one is in runs/own/last."),
]  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), KEPT)
def test_the_page_says_what_was_kept(change, sentence):
    options = METRICS["options"] | change.get("options", {})
    metrics = METRICS | VALIDATED | {"kept": {"step": 8, "which": "best", "loss": 2.0}} | change | {"options": options}
    lines = learned(metrics)
    assert " ".join(lines[next(i for i, line in enumerate(lines) if line.startswith("Kept")) :]) == sentence
    assert ("last step" in "".join(lines)) == (metrics["kept"]["step"] < 8)


def test_a_failed_audit_is_a_line_of_the_page():
    lines = page(METRICS | {"audit_failed": "layer 0: A or B\nreceives none"}).split("\n")
    assert "audit                 FAILED: layer 0: A or B receives none" in lines
    assert not any("passed" in line for line in lines)


def test_losses_that_are_no_numbers_are_shown():
    inf, nan = float("inf"), float("nan")
    broken = {"train_loss": [3.0, nan], "validation": {"unseen": [[1, nan], [2, inf]]}}
    lines = [line.split() for line in learned(changed(loss={"paraphrase": [3.0, nan]}) | broken)]
    assert ["loss,", "paraphrased", "questions", "3.000", "nan"] in lines
    assert ["training", "loss", "3.000", "nan"] in lines
    assert ["validation", "loss,", "unseen", "questions", "nan", "inf"] in lines


def test_what_was_not_measured_has_no_line():
    text = page(METRICS | {"loss": {"general": [2.0, 3.0]}, "keyword_recall": {}, "answers": []})
    assert "unseen" not in text and "paraphrased" not in text and "recall" not in text


@pytest.mark.parametrize("width", [80, 93, 100])
def test_the_page_fits_its_columns_whatever_was_said_and_tells_all_of_it(width):
    long = [dict(e, question="term " * 80, before="term " * 80, after="") for e in METRICS["answers"]]
    audit = {f"promise-{i}": "kept" for i in range(12)}
    shown = page(
        changed(peak_memory_bytes={"measured": None}) | VALIDATED | {"ranks": 4, "answers": long, "audit": audit}, width
    )
    assert columns(page(METRICS | VALIDATED, width)) == columns(shown) == width
    words = " ".join(shown.split())
    assert words.count("term") == 4 * 80 and "peak of the process: unknown on this system" in words
    assert "processes 4; the memory is that of the first" in words
    assert "12 checks passed: promise-0" in words and "promise-11" in words


@pytest.mark.parametrize(("terminal", "width"), [(60, 80), (80, 80), (93, 93), (200, 100)])
def test_the_page_fits_the_terminal(terminal, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(terminal))
    assert terminal_width() == width


def test_a_path_that_is_longer_is_not_broken_so_that_it_can_be_copied():
    far = "/very" * 40
    shown = page(changed(options={"base": far, "data": far, "out": far}))
    assert f"  minilora chat --adapter {far}" in shown.split("\n") and columns(shown.replace(far, "")) <= 100
    spaced = page(changed(options={"out": "my run", "context": "my passages.txt"}))
    assert spaced.endswith("\n  minilora chat --adapter 'my run' --context 'my passages.txt'")
    with pytest.raises(ValueError, match="`minilora finetune --out 'no run'` writes it"):
        read_metrics("no run")


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    """Three runs in a folder, one of them in a folder below it, and files that are no runs."""
    for i, (name, change) in enumerate(
        {"legal": {}, "deep/full": {"options": {"method": "full"}}, "text": {"loss": {}}}.items()
    ):
        metrics = changed(created=f"2026-11-2{i}T10:00:00+00:00", options={"r": 8})
        metrics |= {key: metrics[key] | value if value else value for key, value in change.items()}
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    for name, text in (("legal.partial", json.dumps(metrics)), ("other", "{}"), ("broken", "{")):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "metrics.json").write_text(text, encoding="utf-8")
    return tmp_path / "runs"


def test_runs_lists_the_finished_runs_newest_first(runs, capsys):
    assert main(["runs", str(runs)]) == 0
    head, *rows, _, last = capsys.readouterr().out.splitlines()
    assert [row.split()[0].removeprefix(f"{runs}/") for row in rows] == ["text", "deep/full", "legal"]
    assert " ".join(rows[2].split()[1:]) == "x own.jsonl LoRA, r=8 40 3.000 1.500 recall 50.0 % 10.0 MB 2026-11-20"
    assert rows[1].split()[1:4] == ["x", "own.jsonl", "full"] and rows[0].split().count("-") == 3
    assert last == "3 runs. minilora report RUN shows one." and len({len(line) for line in (head, *rows)}) == 1
    assert main(["runs", str(runs), "--json"]) == 0
    assert [each["data"] for each in json.loads(capsys.readouterr().out)] == ["own.jsonl"] * 3
    assert main(["runs", str(runs / "legal")]) == 0 and "1 run. minilora report" in capsys.readouterr().out


OTHERS = [  # what a program other than minilora may write
    {"created": 5}, {"created": None}, {"steps": "x"}, {"adapter_bytes": None}, {"loss": {"paraphrase": [None, 1]}},
    {"loss": {"paraphrase": [1]}}, {"options": None}, {"options": {"method": "lora", "base": None, "data": "x"}},
    {"options": {"method": [], "base": "x", "data": "x"}}, {"keyword_recall": {"paraphrase": ["a", "b"]}},
]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_runs_passes_over_a_file_with_values_of_another_kind(runs, capsys, other):
    metrics = json.loads((runs / "legal" / "metrics.json").read_text("utf-8")) | other
    (runs / "other" / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    assert main(["runs", str(runs)]) == 0 and "\n3 runs. " in capsys.readouterr().out


ROWS = [{"name": "base"}, {"name": "LoRA", "accuracy": {"value": 0.25}, "fields_right": {"value": 0.75}}]
KINDS = [  # options, other metrics, what the list says of data and method, and of the result
    ({}, {"loss": {"unseen": [2, 1]}}, "own.jsonl LoRA, r=8", "2.000 1.000 recall 6.2 %"),
    ({"mix": {"a/b.csv": 0.1, "legal": 0.2}}, {}, "own.jsonl + b.csv + legal LoRA, r=8", "recall"),
    ({}, {"labels": {"subject": "LoRA", "rows": ROWS}}, "own.jsonl LoRA, r=8", "accuracy 25.0 %"),
    ({}, {"fields": {"subject": "LoRA", "rows": ROWS}, "loss": {}}, "own.jsonl LoRA, r=8", "- - fields right 75.0 %"),
    ({"loss": "dpo"}, {"preferences": {"unseen": {"chosen": [0.5, 0.875]}}, "loss": {"unseen": [0.7, 0.6]}},
     "own.jsonl LoRA, r=8, DPO", "0.700 0.600 preferred 87.5 %"),
    ({}, {"keyword_recall": {}}, "own.jsonl LoRA, r=8", "3.000 1.500 - 10.0 MB"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "more", "what", "result"), KINDS)
def test_the_list_says_of_each_kind_of_run_what_was_learned_and_how_well(tmp_path, capsys, options, more, what, result):
    metrics = changed(created="2026-11-20T10:00:00+00:00", options={"r": 8} | options) | more
    (tmp_path / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    assert main(["runs", str(tmp_path)]) == 0
    row = " ".join(capsys.readouterr().out.splitlines()[1].split())
    assert f" x {what} 40 " in row and result in row


def test_a_folder_without_runs_is_an_error(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 1 and "no finished runs" in capsys.readouterr().err


def test_the_folder_of_a_sweep_is_named_as_one(tmp_path, capsys):
    (tmp_path / "sweep.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 1
    told = "its trials are in trials.csv, and the same `minilora sweep` command prints its page again"
    assert capsys.readouterr().err == f"minilora: {tmp_path} is the folder of a sweep: {told}\n"


def test_report_shows_a_run_lists_a_folder_of_runs_and_suggests_one(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "85")
    assert main(["report", str(runs / "legal")]) == 0
    assert capsys.readouterr().out == page(read_metrics(str(runs / "legal")), 85) + "\n"
    assert main(["report", str(runs / "legal"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read_metrics(str(runs / "legal"))
    assert main(["report", str(runs)]) == 0 and "3 runs." in capsys.readouterr().out
    assert main(["report", str(runs), "--json"]) == 0
    assert [each["steps"] for each in json.loads(capsys.readouterr().out)] == [40] * 3
    assert main(["report", str(runs), "--picture", "x.png"]) == 1
    assert f"{runs / 'metrics.json'}: no such file" in capsys.readouterr().err
    assert main(["report", str(runs / "legal"), "--json", "--picture", "x.png"]) == 2
    assert "--picture draws and --json prints" in capsys.readouterr().err
    assert main(["report", str(runs / "legl")]) == 2
    assert f"did you mean {runs / 'legal'}?" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_an_error_in_one_line(runs, capsys):
    assert main(["report", str(runs / "legal"), "--picture", str(runs)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "a picture is a .png or an .svg file" in line


def test_preferences_are_three_rows():
    found = {"chosen": [0.5, 0.875], "accuracy": [0.0, 0.75], "margin": [0.0, 1.25]}
    text = page(changed(options={"loss": "dpo"}) | {"preferences": {"unseen": found}})
    assert text.startswith("-- LoRA fine-tuning by DPO of models/x on own.jsonl --")
    assert "\nDPO loss, unseen questions" in text and "\nloss, general text" in text  # they have different units
    rows = {line[:38].strip(): line[38:].split() for line in text.splitlines()}
    assert rows["chosen preferred, unseen questions"] == ["50.0", "%", "87.5", "%", "+37.5", "points"]
    assert rows["more than before, share of pairs"] == ["75.0", "%"] and rows["margin (nats, times beta)"] == ["1.250"]
