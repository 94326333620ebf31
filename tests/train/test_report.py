"""The page of fixed metrics, to the last column: what stands where, signs, units, and what is left out."""

import copy
import json

import pytest

from minilora.train.report import page, read_metrics

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
-- lora fine-tuning of models/x on own.jsonl -------------------------------------------------------

Define lien. [trained term, asked in other words]
  before A plant.
  after  A claim on property.

Define tort. [unseen term]
  before (nothing)
  after  A wrong.

-- what it learned ---------------------------------------------------------------------------------
                                              before       after      change
loss, trained terms in other words             3.000       1.500        -50%
loss, unseen                                   2.500       2.600         +4%
loss, general text (forgetting)                2.000       2.000         +0%
keyword recall, in other words                 12.5%       50.0%       4.0 x
keyword recall, unseen                          0.0%        6.2%

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
  minilora chat --base models/x --adapter runs/own"""


def changed(**change):
    """The metrics with other values; a dict replaces single entries of a dict."""
    metrics = copy.deepcopy(METRICS)
    for key, value in change.items():
        metrics[key] = metrics[key] | value if isinstance(value, dict) else value
    return metrics


def test_the_page_of_an_adapter():
    assert page(METRICS).split("\n") == PAGE.split("\n")


def test_the_page_of_full_fine_tuning_says_what_is_different():
    metrics = changed(options={"method": "full"}, base_sha256=["a" * 64, "b" * 64], audit={}) | {"audit": {}}
    got, usual = page(metrics).split("\n"), PAGE.split("\n")
    assert [line for line in got if line not in usual] == [
        "-- full fine-tuning of models/x on own.jsonl -------------------------------------------------------",
        "disk                 new model 10.0 MB beside 540 MB of base (54 to 1)",
        "base                 changed: sha256 aaaaaaaaaaaaaaaa -> bbbbbbbbbbbbbbbb",
        "  minilora chat --base runs/own",
    ]
    missing = [line.split()[0] for line in usual if line not in got]
    assert missing == ["--", "full", "disk", "base", "audit", "minilora"]


def test_the_usual_base_is_not_named_in_the_command():
    assert page(changed(options={"base": "smollm2"})).endswith("\n  minilora chat --adapter runs/own")


def test_what_was_not_measured_has_no_line():
    text = page(METRICS | {"loss": {"general": [2.0, 3.0]}, "keyword_recall": {}, "answers": []})
    assert "unseen" not in text and "in other words" not in text
    assert "loss, general text (forgetting)                2.000       3.000        +50%" in text


def columns(text):
    return max(map(len, text.split("\n")))


def test_the_page_fits_100_columns():
    assert columns(page(METRICS)) <= 100


@pytest.mark.parametrize("text", ["term " * 80, ""], ids=["long", "nothing"])
def test_long_questions_and_answers_and_unmeasured_memory_still_fit_the_page(text):
    answers = [dict(e, question=f"{text}?", before=text, after=text) for e in METRICS["answers"]]
    shown = page(changed(peak_memory_bytes={"measured": None}) | {"answers": answers})
    assert columns(shown) <= 100
    assert "process peak not told by this system" in shown and ("(nothing)" in shown) == (text == "")
    told = shown.split("-- what it learned")[0]
    assert told.replace("trained term", "").replace("unseen term", "").count("term") == 6 * text.count("term")


def test_only_a_path_that_is_longer_stands_on_a_longer_line():
    far = "/very" * 40
    shown = page(changed(options={"base": far, "data": far, "out": far}))
    command = f"minilora chat --base {far} --adapter {far}"  # never broken, so that it can be copied
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
