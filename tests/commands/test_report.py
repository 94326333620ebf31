"""The page of fixed metrics, to the last column: what stands where, signs, units, and what is left out."""

import copy
import json

import pytest

from minilora.commands.report import page, read_metrics, terminal_width

METRICS = {
    "options": {"method": "lora", "base": "models/x", "data": "own.jsonl", "out": "runs/own"},
    "steps": 40,
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
        "full_predicted": 2_000_000_000,
        "by_owner": {"program": 200_000_000, "weights": 799_950_000, "adapter": 50_000, "scratch": 0},
    },
    "adapter_bytes": 10_000_000,
    "base_bytes": 540_000_000,
}
PAGE = """\
-- LoRA fine-tuning of models/x on own.jsonl -------------------------------------------------------

Define lien. [trained, asked in other words]
  before A plant.
  after  A claim on property.

Define tort. [unseen]
  before (nothing)
  after  A wrong.

-- what it learned ---------------------------------------------------------------------------------
                                         before      after     change
loss, trained, in other words             3.000      1.500       -50%
loss, unseen                              2.500      2.600        +4%
loss, general text (forgetting)           2.000      2.000        +0%
keyword recall, in other words            12.5%      50.0%      4.0 x
keyword recall, unseen                     0.0%       6.2%

-- what it cost ------------------------------------------------------------------------------------
parameters trained   2,442,240 of 136,957,248 (1.783 %)
memory               1,000 MB predicted for a step; process peak 99.5 MB
                     program 200 MB, weights 800 MB, adapter 0.1 MB
                     full fine-tuning would hold 2,000 MB
time                 1.23 s per step, 1,235 tokens/s, 1.5 minutes for 40 steps
disk                 adapter 10.0 MB beside 540 MB of base (54 to 1)
base                 untouched: sha256 0123456789abcdef = 0123456789abcdef
audit                2 promises checked and kept: scale, base

written to runs/own; talk to it with
  minilora chat --adapter runs/own"""
TRAINED = {  # what a run of today notes besides
    "records": {"train": 240, "validation": 30, "paraphrase": 80, "unseen": 29, "general": 60},
    "train_loss": [4.0, 3.0, 3.0, 2.0, 2.0, 2.0, 1.0, 0.5],
    "validation_loss": [[2, 2.5], [4, 2.0], [8, 2.25]],
}
VALIDATED = TRAINED | {  # where trained records are validated in other words, too, and the best adapter is kept
    "validation": {"unseen": [[2, 2.5], [4, 2.25], [8, 3.0]], "paraphrase": [[2, 2.5], [4, 1.75], [8, 1.5]]},
    "kept": {"step": 4, "which": "best", "loss": 2.0},
    "last": {"loss": {"paraphrase": 1.25, "unseen": 2.75, "general": 2.5}},
}


def changed(**change):
    """The metrics with other values; a dict replaces single entries of a dict."""
    metrics = copy.deepcopy(METRICS)
    for key, value in change.items():
        metrics[key] = metrics[key] | value if isinstance(value, dict) else value
    return metrics


def test_the_page_of_an_adapter():
    assert page(METRICS).split("\n") == PAGE.split("\n")


def test_the_page_of_full_fine_tuning_says_what_is_different():
    metrics = changed(options={"method": "full"}, base_sha256=["a" * 64, "b" * 64]) | {"audit": {}}
    got, usual = page(metrics).split("\n"), PAGE.split("\n")
    assert [line for line in got if line not in usual] == [
        "-- full fine-tuning of models/x on own.jsonl -------------------------------------------------------",
        "parameters trained   all 136,957,248",
        "disk                 10.0 MB: a whole model for each version",
        "weights              changed: sha256 aaaaaaaaaaaaaaaa -> bbbbbbbbbbbbbbbb",
        "  minilora chat --base runs/own",
    ]
    missing = [line.split()[0] for line in usual if line not in got]
    assert missing == ["--", "parameters", "full", "disk", "base", "audit", "minilora"]


def learned(metrics):
    """The lines below the heading "what it learned"."""
    return page(metrics).split("-- what it learned ")[1].split("-- what it cost")[0].rstrip().split("\n")[1:]


def test_a_run_says_what_it_trained_on_and_what_became_of_its_losses():
    lines = learned(METRICS | TRAINED)
    assert (
        lines[1] == lines[8] == ""
        and lines[0] == "240 records trained, 59 held out (30 for validation, 29 unseen); 80 asked in other words"
    )
    assert lines[9:] == [
        "while it trained                          first       last     lowest    at step",
        "training, mean of 2 steps                 3.500      0.750",
        "validation, unseen                        2.500      2.250      2.000          4",
    ]


COUNTS = [  # data, records, the line
    (
        "own.jsonl",
        {"train": 27, "validation": 0, "unseen": 3, "general": 60},
        "27 records trained, 3 held out (unseen)",
    ),
    ("own.jsonl", {"train": 5, "general": 60}, "5 records trained, 0 held out"),
    ("a/novel.txt", {"train": 18, "unseen": 2, "general": 60}, "18 sequences trained, 2 held out (unseen)"),
]


@pytest.mark.parametrize(("data", "records", "line"), COUNTS, ids=["own", "few", "text"])
def test_the_page_counts_what_was_held_out(data, records, line):
    assert learned(changed(options={"data": data}) | {"records": records})[0] == line


def test_what_was_kept_stands_beside_the_last_step():
    lines = learned(METRICS | VALIDATED)
    assert lines[0] == "240 records trained; 30 for validation, 29 unseen; 80 asked in other words"
    assert lines[2:5] == [
        "                                         before      after     change  last step",
        "loss, trained, in other words             3.000      1.500       -50%      1.250",
        "loss, unseen                              2.500      2.600        +4%      2.750",
    ]
    assert lines[-3:] == [
        "validation, unseen                        2.500      3.000      2.250          4",
        "validation, in other words                2.500      1.500      1.500          8",
        "kept: the adapter of step 4, where their mean was lowest; the last one is in runs/own/last",
    ]


def test_where_the_best_is_the_last_there_is_nothing_beside_it():
    kept = {"kept": {"step": 8, "which": "best", "loss": 2.0}}
    lines = learned(METRICS | VALIDATED | kept)
    assert "last step" not in lines[2] and lines[-1] == "kept: the adapter of step 8, where their mean was lowest"
    told = learned(METRICS | VALIDATED | {"kept": {"step": 8, "which": "last", "loss": 2.0}})
    assert told[-1] == "kept: the adapter of step 8, the last one"
    one = learned(METRICS | VALIDATED | kept | {"validation": {"unseen": [[4, 2.25], [8, 2.0]]}})
    assert one[-1] == "kept: the adapter of step 8, where validation was lowest"
    part = learned(changed(options={"strength": 0.65}) | VALIDATED | kept)
    assert part[-1] == "kept: the adapter of step 8, where their mean was lowest, at 0.65 of its strength"
    whole = learned(changed(options={"strength": 1.0}) | VALIDATED | kept)
    assert whole[-1] == "kept: the adapter of step 8, where their mean was lowest"
    full = learned(changed(options={"method": "full"}) | VALIDATED)
    assert full[-1] == "kept: the model of step 4, where their mean was lowest; the last one is in runs/own/last"


FORGOT, HELPLESS = "It forgot some of what it could do: try ", "It learned nothing that helps: try "
ADVICE = [  # what is different, the last line
    ({}, None),
    ({"loss": {"general": [2.0, 2.2]}}, None),
    ({"loss": {"general": [2.0, 2.21]}}, FORGOT + "a lower --lr (it was 0.05) or fewer --epochs."),
    ({"loss": {"general": [2.0, 2.21]}, "options": {"strength": 0.7}},
     FORGOT + "a lower --strength (it was 0.7) or fewer --epochs."),
    ({"loss": {"general": [2.0, 2.21]}, "options": {"strength": 1.0, "use_dora": True}},  # where no other is possible
     FORGOT + "a lower --lr (it was 0.05) or fewer --epochs."),
    ({"loss": {"general": [2.0, 2.21]}, "options": {"method": "full"}},
     FORGOT + "a lower --lr (it was 0.05), fewer --epochs or --method lora."),
    ({"loss": {"paraphrase": [3.0, 3.0]}}, HELPLESS + "a lower --lr (it was 0.05)."),
    ({"loss": {"paraphrase": [3.0, float("nan")]}}, HELPLESS + "a lower --lr (it was 0.05)."),
    ({"audit_failed": "A or B receives none"}, "The audit failed (see below): try a lower --lr (it was 0.05)."),
]  # fmt: skip


@pytest.mark.parametrize(("change", "line"), ADVICE, ids=[str(row[0]) for row in ADVICE])
def test_a_run_that_went_wrong_or_forgot_says_what_to_try(change, line):
    metrics = changed(options={"lr": 0.05} | change.get("options", {}))
    for key, value in change.items():
        metrics[key] = metrics[key] | value if isinstance(value, dict) else value
    last = learned(metrics)[-1]
    assert last == line if line else last.startswith("keyword recall")


def test_a_failed_audit_is_a_line_of_the_page():
    lines = page(METRICS | {"audit_failed": "layer 0: A or B\nreceives none"}).split("\n")
    assert "audit                FAILED: layer 0: A or B receives none" in lines
    assert not any("promises" in line for line in lines)


def test_a_short_run_took_seconds():
    text = page(METRICS | {"training_seconds": 59.94, "steps": 3})
    assert "time                 1.23 s per step, 1,235 tokens/s, 59.9 seconds for 3 steps" in text


def test_losses_that_are_no_numbers_are_shown():
    inf, nan = float("inf"), float("nan")
    broken = {"train_loss": [3.0, nan], "validation": {"unseen": [[1, nan], [2, inf]]}}
    lines = learned(changed(loss={"paraphrase": [3.0, nan], "unseen": [2.5, inf]}) | broken)
    assert "loss, trained, in other words             3.000        nan" in lines
    assert "loss, unseen                              2.500        inf" in lines
    assert "training                                  3.000        nan" in lines
    assert "validation, unseen                          nan        inf" in lines


def test_what_was_not_measured_has_no_line():
    text = page(METRICS | {"loss": {"general": [2.0, 3.0]}, "keyword_recall": {}, "answers": []})
    assert "unseen" not in text and "in other words" not in text
    assert "loss, general text (forgetting)           2.000      3.000       +50%" in text


def columns(text):
    return max(map(len, text.split("\n")))


@pytest.mark.parametrize("width", [80, 100])
def test_the_page_fits_its_columns(width):
    assert columns(page(METRICS | VALIDATED, width)) == width


@pytest.mark.parametrize(("terminal", "width"), [(60, 80), (80, 80), (93, 93), (200, 100)])
def test_the_page_fits_the_terminal(terminal, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(terminal))
    assert terminal_width() == width


@pytest.mark.parametrize("text", ["term " * 80, ""], ids=["long", "nothing"])
def test_long_questions_and_answers_and_unmeasured_memory_still_fit_the_page(text):
    answers = [dict(e, question=f"{text}?", before=text, after=text) for e in METRICS["answers"]]
    shown = page(changed(peak_memory_bytes={"measured": None}) | {"answers": answers})
    assert columns(shown) <= 100
    assert "process peak not told by this system" in shown and ("(nothing)" in shown) == (text == "")
    told = shown.split("-- what it learned")[0]
    assert told.count("term") == 6 * text.count("term")


def test_only_a_path_that_is_longer_stands_on_a_longer_line():
    far = "/very" * 40
    shown = page(changed(options={"base": far, "data": far, "out": far}))
    command = f"minilora chat --adapter {far}"  # never broken, so that it can be copied
    assert {line.strip() for line in shown.split("\n") if len(line) > 100} <= {far, f"{far};", command}
    assert columns(shown.replace(far, "")) <= 100


def test_a_long_line_goes_on_below_its_text():
    audit = {f"promise-{i}": "kept" for i in range(12)}
    lines = page(METRICS | {"audit": audit}).split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("audit"))
    assert lines[first].startswith("audit                12 promises checked and kept: promise-0, promise-1")
    assert lines[first + 1].startswith(" " * 21 + "promise-") and lines[first + 2] == " " * 21 + "promise-11"


def test_the_page_can_be_made_from_the_file(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS), encoding="utf-8")
    assert read_metrics(tmp_path) == METRICS
    assert page(read_metrics(str(tmp_path))) == PAGE


def test_what_ranks_send_stands_beside_what_full_fine_tuning_would():
    sent = {"ranks": 4, "bytes_per_step": {"sent": 9_768_968, "full_sent": 538_060_040}}
    line = "ranks                4, each of which sends 9.8 MB per step; full fine-tuning would send 538 MB"
    assert page(METRICS | sent).splitlines().count(line) == 1
    full = METRICS | sent | {"options": METRICS["options"] | {"method": "full"}}
    full["bytes_per_step"] = {"sent": 538_060_040, "full_sent": 538_060_040}
    assert "ranks                4, each of which sends 538 MB per step" in page(full).splitlines()
    assert page(METRICS | sent | {"ranks": 1}) == page(METRICS)
