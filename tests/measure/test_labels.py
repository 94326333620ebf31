"""Accuracy, macro-F1, confusion and calibration against their definitions; and the contenders of a model."""

import builtins
import math
import re
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilora.data.labels import LabelTask
from minilora.data.records import Record
from minilora.generate.labels import label_logprobs
from minilora.measure import labels as measuring
from minilora.measure import statistics
from minilora.measure.labels import (
    CLASSIC,
    MAJORITY,
    MISSING,
    SHOTS,
    THRESHOLDS,
    Labelled,
    calibration_error,
    classic,
    confusion,
    coverage,
    few_shot,
    macro_f1,
    majority,
    reliability,
)
from minilora.measure.statistics import interval_as_json, wilson
from minilora.pages.labels import label_lines

TASK = LabelTask.of(["a", "b", "c"])
PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


def records(*pairs, system=None):
    before = () if system is None else ({"role": "system", "content": system},)
    return [
        Record(
            f"r{i}",
            (*before, {"role": "user", "content": TASK.prompt(text)}, {"role": "assistant", "content": label}),
            label=label,
        )
        for i, (text, label) in enumerate(pairs)
    ]


TRAIN = records(("red one", "a"), ("red two", "a"), ("blue one", "b"), ("red", "a"), ("green", "c"), ("blue", "b"))
HELD = Labelled(TASK, records(("red", "a"), ("blue", "b"), ("two green", "c"), ("blue red", "a")), TRAIN)


def by_hand(pairs):
    """The mean of F1 over labels that occur, from precision and recall, counted one by one."""
    scores = []
    for label in sorted({x for pair in pairs for x in pair}):
        hits = sum(a == b == label for a, b in pairs)
        given_it, have_it = sum(b == label for _, b in pairs), sum(a == label for a, _ in pairs)
        precision, recall = (hits / n if n else 0 for n in (given_it, have_it))
        scores.append(2 * precision * recall / (precision + recall) if hits else 0)
    return sum(scores) / len(scores)


@given(PAIRS)
@settings(max_examples=50)
def test_macro_f1_is_its_definition_and_the_confusion_matrix_adds_up(pairs):
    truth, chosen = np.array(pairs).T
    assert macro_f1(truth, chosen, 4)[0] == pytest.approx(by_hand(pairs))
    matrix = confusion(truth, chosen, 4)
    assert matrix.sum() == len(pairs) and np.trace(matrix) == (truth == chosen).sum()
    assert all(matrix[i, j] == pairs.count((i, j)) for i in range(4) for j in range(4))
    twice = macro_f1(np.repeat(truth, 2), np.repeat(chosen, 2), 4)
    assert macro_f1(truth, chosen, 4, np.full((1, len(pairs)), 2)) == pytest.approx(twice)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40))
@example([(1.0, True)])
@settings(max_examples=50)
def test_reliability_has_every_record_in_the_bin_of_its_confidence(pairs):
    confidence, right = (np.array(each) for each in zip(*pairs, strict=True))
    bins = reliability(confidence, right)
    assert sum(one["records"] for one in bins) == len(pairs) and all(one["from"] < 1 for one in bins)
    assert sum(one["records"] * one["accuracy"] for one in bins) == pytest.approx(right.sum())
    assert all(one["from"] - 1e-9 <= one["confidence"] <= one["from"] + 0.1 + 1e-9 for one in bins)
    by_definition = 0.0
    for low in sorted({min(int(c * 10), 9) for c in confidence}):
        inside = [(c, r) for c, r in pairs if min(int(c * 10), 9) == low]
        by_definition += abs(sum(c for c, _ in inside) - sum(r for _, r in inside)) / len(pairs)
    assert calibration_error(bins) == pytest.approx(by_definition)


@given(st.lists(st.tuples(st.floats(0, 1) | st.sampled_from(THRESHOLDS), st.booleans()), min_size=1, max_size=30))
@settings(max_examples=50)
def test_coverage_counts_the_records_of_at_least_each_threshold_and_how_many_of_them_are_right(pairs):
    confidence, right = map(np.array, zip(*pairs, strict=True))
    for one, threshold in zip(coverage(confidence, right), THRESHOLDS, strict=True):
        hits = [hit for sure, hit in pairs if sure >= threshold]
        assert (one["from"], one["records"], one["coverage"]) == (threshold, len(hits), len(hits) / len(pairs))
        expected = interval_as_json(wilson(np.array(hits))) if hits else dict.fromkeys(("value", "low", "high"))
        assert one["accuracy"] == expected


def test_wilsons_interval_is_that_of_the_score_test_and_has_a_width_where_all_are_right():
    for right, n in ((8, 10), (0, 5), (5, 5), (37, 200)):
        found = wilson(np.arange(n) < right)
        assert found.low <= found.mean == right / n <= found.high and found.high - found.low > 0.01
        for end in {found.low, found.high} - {0.0, 1.0}:  # where the test is at its limit
            assert abs(right / n - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(1.959964, rel=1e-5)
    for n in range(1, 200):
        assert wilson(np.ones(n, bool)).high == 1 and wilson(np.zeros(n, bool)).low == 0


def test_the_majority_is_that_of_the_training_records():
    p = majority(HELD)
    assert p.shape == (4, 3) and p[0].tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6]) and (p == p[0]).all()


def test_tf_idf_learns_from_the_training_records_and_never_sees_the_prompt_around_a_text():
    pytest.importorskip("sklearn", reason="needs pip install '.[benchmarks]'")
    p = classic(HELD)
    assert p.argmax(axis=1)[:3].tolist() == [0, 1, 2] and p.sum(axis=1) == pytest.approx(np.ones(4))
    other = LabelTask(TASK.labels, "red red blue {text} green?")

    def moved(part):
        return [record.asked(other.prompt(TASK.text(record.prompt[-1]["content"]))) for record in part]

    np.testing.assert_allclose(classic(Labelled(other, moved(HELD.records), moved(TRAIN))), p)
    two = Labelled(TASK, HELD.records, TRAIN[:3] + records(("7", "a")))  # of three labels two are trained
    assert (classic(two)[:, 2] == 0).all()


def test_tf_idf_of_many_labels_and_words_keeps_the_most_frequent_words_and_its_weights_within_bounds(
    monkeypatch, caplog
):
    linear = pytest.importorskip("sklearn.linear_model", reason="needs pip install '.[benchmarks]'")
    made, make = [], linear.SGDClassifier
    monkeypatch.setattr(linear, "SGDClassifier", lambda **options: made.append(make(**options)) or made[-1])
    rng = np.random.default_rng(0)
    train = records(*((f"{label * 3} rare{i} x{rng.integers(9)}", label) for i, label in enumerate("abc" * 40)))
    task = LabelTask(("a", "b", "c", "d"), TASK.template)
    held = Labelled(task, records(("aaa", "a"), ("bbb bbb", "b"), ("ccc never", "c")), train)
    assert classic(held).argmax(axis=1).tolist() == [0, 1, 2] and not made
    monkeypatch.setattr(measuring, "WEIGHTS", 4 * 20)
    with caplog.at_level("INFO", "minilora"):
        p = classic(held)
    assert p.argmax(axis=1).tolist() == [0, 1, 2] and p.sum(axis=1) == pytest.approx(np.ones(3))
    assert made[0].coef_.size <= 4 * 20 and (p[:, 3] == 0).all() and np.array_equal(classic(held), p)
    assert "learns from 120 texts and their 20 most frequent words and pairs" in caplog.text


def test_the_words_of_tf_idf_are_scikit_learns_in_ascii_and_whole_in_every_other_script(monkeypatch):
    text = pytest.importorskip("sklearn.feature_extraction.text", reason="needs pip install '.[benchmarks]'")
    made, make = [], text.TfidfVectorizer
    monkeypatch.setattr(text, "TfidfVectorizer", lambda **options: made.append(make(**options)) or made[-1])
    train = records(
        ("商品を返品したいです。", "a"), ("もう返品できますか", "a"), ("配送先の変更", "b"), ("まだ配送中？", "b")
    )
    p = classic(Labelled(LabelTask.of("ab"), records(("急ぎの返品", "a"), ("配送が遅い", "b")), train))
    assert p.argmax(axis=1).tolist() == [0, 1] and p.max(axis=1).min() > 0.6
    ours, theirs = made[0].build_analyzer(), make(ngram_range=(1, 2)).build_analyzer()
    for ascii in ("It's a well_known x, to be SURE: 12 of 3.", "", "- a"):
        assert ours(ascii) == theirs(ascii)
    assert ours("हिन्दी में") == ["हिन्दी", "में", "हिन्दी में"] and ours("caf\u0065\u0301") == ["café"]


def test_without_scikit_learn_the_row_says_how_to_get_it(monkeypatch):
    load = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    report = HELD.report({"it": np.zeros((4, 3))})
    assert report["rows"][1] == {"name": CLASSIC, "missing": MISSING} and "scikit-learn" in MISSING


@pytest.mark.parametrize(
    ("train", "why"),
    [
        ([("red one", "a"), ("blue", "a")], "the training records have one label"),
        ([("1", "a"), ("2", "b"), ("\U0001f600", "c")], "the training texts have no words of two or more characters"),
    ],
)
def test_a_baseline_that_cannot_be_trained_says_why_in_its_row(train, why):
    pytest.importorskip("sklearn", reason="needs pip install '.[benchmarks]'")
    report = Labelled(TASK, HELD.records, records(*train)).report({"it": np.zeros((4, 3))})
    assert report["rows"][1] == {"name": CLASSIC, "missing": why} and [*report["rows"][2:]] != []
    assert why in "\n".join(label_lines(report))


def test_examples_are_of_every_label_in_turn():
    assert [r.id for r in few_shot(TRAIN, 5)] == ["r0", "r2", "r4", "r1", "r5"]
    assert few_shot(TRAIN, 0) == [] and len(few_shot(TRAIN, 99)) == len(TRAIN)


def test_examples_stand_before_the_question_and_after_the_system_prompt(talker, tokenizer):
    held = Labelled(TASK, records(("x", "a"), ("yy", "b"), system="Be brief."), TRAIN)
    talks = [
        [record.messages[0], *TRAIN[0].messages, *TRAIN[2].messages, record.messages[1]] for record in held.records
    ]
    np.testing.assert_allclose(held.ask(talker, tokenizer, 2), label_logprobs(talker, tokenizer, talks, TASK.labels))
    alone = [list(record.messages[:-1]) for record in held.records]
    np.testing.assert_allclose(held.ask(talker, tokenizer), label_logprobs(talker, tokenizer, alone, TASK.labels))


def test_only_as_many_examples_are_given_as_fit(talker, tokenizer):
    short = [len(tokenizer.encode_chat(list(record.messages))) for record in few_shot(TRAIN, SHOTS)]
    longest = max(len(tokenizer.encode_chat(list(record.messages))) for record in HELD.records)
    for n in range(len(TRAIN) + 1):
        limit = longest + 1 + sum(short[:n])
        assert HELD.shots_that_fit(tokenizer, limit) == n and HELD.shots_that_fit(tokenizer, limit - 1) == max(0, n - 1)
    assert HELD.shots_that_fit(tokenizer, longest) == 0
    many = Labelled(TASK, HELD.records, TRAIN * 4)
    assert many.shots_that_fit(tokenizer, 10**6) == SHOTS
    n = HELD.shots_that_fit(tokenizer, 700)
    assert np.shape(HELD.ask(talker, tokenizer, n)) == (4, 3)


def test_a_record_is_as_long_as_its_prompt_with_the_longest_label(talker, tokenizer, monkeypatch):
    task = LabelTask.of(["a", "b b b b"])
    held = Labelled(task, [Record("r", (*records(("x", "a"))[0].messages[:-1], {"role": "assistant", "content": "a"}))])
    (length,) = held.lengths(tokenizer)
    for limit, can in ((length, True), (length - 2, False)):  # the newline after the end token is not asked for
        monkeypatch.setattr(talker, "config", replace(talker.config, max_position_embeddings=limit))
        with nullcontext() if can else pytest.raises(ValueError, match="a message with its label has"):
            held.ask(talker, tokenizer)


def report_of(*chosen, held=HELD):
    """A report of models that choose these labels, with a confidence of about 0.8."""
    sure = {f"model {i}": np.log(np.where(np.eye(3)[list(each)] == 1, 0.8, 0.1)) for i, each in enumerate(chosen)}
    return held.report(sure)


def test_a_report_is_of_the_last_model_and_compares_it_with_all():
    report = report_of((0, 0, 0, 0), (0, 1, 1, 0))
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows)[:2] == [MAJORITY, CLASSIC] and report["subject"] == "model 1" and report["records"] == 4
    assert report["confusion"] == [[2, 0, 0], [0, 1, 0], [0, 1, 0]] and report["labels"] == ["a", "b", "c"]
    assert rows["model 1"]["accuracy"]["value"] == 0.75 and rows["model 0"]["accuracy"]["value"] == 0.5
    assert rows["model 0"]["lead"]["value"] == 0.25 and rows["model 1"]["lead"]["value"] == 0
    low, value, high = (rows["model 1"]["macro_f1"][key] for key in ("low", "value", "high"))
    assert value == pytest.approx((1 + 2 / 3 + 0) / 3) and low < value < high
    (mistake,) = report["mistakes"]
    expected = {"id": "r2", "text": "two green", "label": "c", "chosen": "b", "confidence": pytest.approx(0.8)}
    assert mistake == expected
    assert rows["model 1"]["ece"] == pytest.approx(0.05)
    assert [one["records"] for one in rows["model 1"]["coverage"]] == [4 * (x < 0.85) for x in THRESHOLDS]


def test_without_training_records_only_models_are_compared_and_a_single_record_has_no_bootstrap_interval():
    report = report_of((0, 1, 2, 0), held=Labelled(TASK, HELD.records))
    assert [row["name"] for row in report["rows"]] == ["model 0"] and report["mistakes"] == []
    (row,) = report_of((0,), held=Labelled(TASK, HELD.records[:1]))["rows"]
    assert row["macro_f1"] == {"value": 1.0, "low": None, "high": None}
    assert row["lead"] == {"value": 0.0, "low": None, "high": None} and 0 < row["accuracy"]["low"] < 1


def test_every_interval_of_a_report_has_its_seed(monkeypatch):
    seeds, draw = [], statistics.bootstrap
    for place in (statistics, measuring):
        monkeypatch.setattr(place, "bootstrap", lambda n, of, seed=0: seeds.append(seed) or draw(n, of, seed))
    HELD.report({"it": np.log([[0.2, 0.5, 0.3]] * 4)}, 7)
    assert len(seeds) > 2 and set(seeds) == {7}


def test_accuracy_is_also_reported_by_kind_if_every_record_has_one_of_a_few(monkeypatch):
    def of_kinds(*kinds):
        told = [replace(record, kind=kind) for record, kind in zip(HELD.records, kinds, strict=True)]
        return report_of((0, 1, 1, 0), held=Labelled(TASK, told))

    report = of_kinds("plain", "plain", "hard", "hard")
    (row,) = report["rows"]
    assert report["kinds"] == {"hard": 2, "plain": 2}
    assert {kind: found["value"] for kind, found in row["accuracy_of_kind"].items()} == {"hard": 0.5, "plain": 1}
    assert row["accuracy_of_kind"]["hard"]["low"] == wilson(np.array([True, False])).low
    page = "\n".join(label_lines(report))
    assert re.search(r"accuracy by kind, %  hard \(2\) +plain \(2\)\nmodel 0 +50.0 \[\S+ \S+\] +100.0 \[", page)
    assert of_kinds("plain", "plain", "hard", None)["kinds"] == of_kinds(*["plain"] * 4)["kinds"] == {}
    monkeypatch.setattr(measuring, "KINDS", 3)
    assert len(of_kinds(*"aabc")["kinds"]) == 3 and of_kinds(*"abcd")["kinds"] == {}


def test_mistakes_begin_with_the_most_confident():
    sure = np.log([[0.2, 0.5, 0.3], [0.5, 0.4, 0.1], [0.9, 0.05, 0.05], [0.6, 0.2, 0.2]])
    assert [one["confidence"] for one in HELD.report({"it": sure})["mistakes"]] == pytest.approx([0.9, 0.5, 0.5])
