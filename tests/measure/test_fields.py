"""Fields: what is counted as right, and the numbers against those of plain Python."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from minilora.data.fields import FieldTask
from minilora.data.records import Record
from minilora.generate.as_trained import guide_of
from minilora.measure.fields import ANSWER_TOKENS, SHOTS, USUAL, WithFields, same, usual

TASK = FieldTask.of(
    {"properties": {"a": {"type": ["string", "null"]}, "n": {"type": ["number", "null"]}, "l": {"type": "array"}}}
)
LARGE = FieldTask.of(  # whose shortest answer has more bytes than ANSWER_TOKENS
    {"properties": TASK.schema()["properties"] | {f"another_{i}": {"type": ["string", "null"]} for i in range(12)}}
)


def record(i, a=None, n=None, members=()):
    row = {name: value for name, value in {"a": a, "n": n, "l": list(members)}.items() if value not in (None, [])}
    asked = {"role": "user", "content": TASK.prompt(f"text {i}")}
    return Record(f"r{i}", (asked, {"role": "assistant", "content": TASK.answer(row)}), fields=row)


RECORDS = [record(0, "x", 1, ["p", "q"]), record(1, None, 2.5), record(2, "y", None, ["p"]), record(3, "x", 1)]


def held(examples=(), task=TASK):
    return WithFields(task, RECORDS, examples)


@pytest.mark.parametrize(
    ("value", "other", "are"),
    [
        ("x", "x", True), ("x", "X", False), ("x", "x ", False), (1, 1.0, True), (1, True, False), (None, [], False),
        (["p", "q"], ["q", "p"], True), (["p", "p"], ["p"], False), (["p"], ["p", "p"], False), ([], [], True),
        (0, None, False), ("1", 1, False),
    ],
)  # fmt: skip
def test_values_are_the_same_letter_by_letter_and_lists_in_any_order(value, other, are):
    assert same(value, other) is are is same(other, value)


def test_the_report_counts_fields_and_objects():
    given = [{"a": "x", "n": 1, "l": ["q", "p"]}, {"a": "z", "n": 2.5}]
    given += [{"a": "y", "n": 0, "l": ["p", "q"]}, {"a": "x", "n": 1}]
    answers = [TASK.answer(fields) for fields in given]
    truth = [record.messages[-1]["content"] for record in RECORDS]
    report = held().report({"base, zero-shot": truth, "LoRA": answers})
    base, lora = report["rows"]
    assert base["fields_right"]["value"] == base["objects_right"]["value"] == 1 and base["lead"]["value"] < 0
    assert lora["fields_right"]["value"] == pytest.approx(9 / 12) and lora["objects_right"]["value"] == 0.5
    assert {name: one["value"] for name, one in lora["fields"].items()} == {"a": 0.75, "n": 0.75, "l": 0.75}
    assert lora["lead"] == {"value": 0.0, "low": 0.0, "high": 0.0} and report["subject"] == "LoRA"
    assert base["lead"]["value"] == pytest.approx(-3 / 12) and base["lead"]["low"] <= -3 / 12 <= base["lead"]["high"]
    first, second = report["mistakes"]
    assert (first["id"], first["text"]) == ("r2", "text 2")
    assert first["wrong"] == {"n": [None, 0], "l": [["p"], ["p", "q"]]}
    assert second["wrong"] == {"a": [None, "z"]}
    assert json.loads(json.dumps(report)) == report


def test_the_most_frequent_values_are_those_of_the_training_records():
    examples = [record(i, a, n) for i, (a, n) in enumerate([("x", 3), (None, 3), (None, 4)])]
    report = held(examples).report({"LoRA": usual(held(examples))})
    assert usual(held(examples)) == ['{"a":null,"n":3,"l":[]}'] * 4
    assert [row["name"] for row in report["rows"]] == [USUAL, "LoRA"]
    assert report["rows"][0]["fields"]["l"]["value"] == 0.5 and report["rows"][0]["fields"]["n"]["value"] == 0


def test_as_many_examples_as_fit_are_put_before_the_question(talker, tokenizer):
    examples = [record(i, "x" * 50) for i in range(9)]
    asked, one = (max(len(tokenizer.encode_chat(each.messages)) for each in some) for some in (RECORDS, examples))
    for task in (TASK, LARGE):
        for room, fitting in ((one - 1, 0), (2 * one - 1, 1), (2 * one, 2), (10**6, SHOTS)):
            limit = held(examples, task).tokens + asked + room
            assert held(examples, task).shots_that_fit(tokenizer, limit) == fitting
    assert held().shots_that_fit(tokenizer, 10**6) == 0 and held(examples[:2]).shots_that_fit(tokenizer, 10**6) == 2
    of_nine, of_two = (WithFields(TASK, RECORDS[:2], some) for some in (examples, [examples[0], examples[5]]))
    zero, two = (of_nine.ask(talker, tokenizer, shots) for shots in (0, 2))
    assert two == of_two.ask(talker, tokenizer, 2)  # of nine, evenly
    assert zero != two and all(list(json.loads(answer)) == ["a", "n", "l"] for answer in zero + two)


def test_every_field_can_be_filled_however_many_there_are(tokenizer):
    """The tokenizer has a token per byte."""
    assert held().tokens == ANSWER_TOKENS < LARGE.least()
    answer = LARGE.answer({field.name: [] if field.name == "l" else None for field in LARGE.fields})
    guide, left = guide_of(LARGE, tokenizer, ""), held(task=LARGE).tokens
    for token in tokenizer.encode(answer.replace("null", '"abc def"').replace('"n":"abc def"', '"n":12.5')):
        assert token in guide.allowed(left)
        guide.take(token)
        left -= 1
    assert not guide.hurried


@pytest.mark.parametrize("task", [TASK, LARGE])
def test_a_record_is_as_long_as_its_prompt_with_the_longest_answer(talker, tokenizer, monkeypatch, task):
    one = WithFields(task, RECORDS[:1])
    (longest,) = one.lengths(tokenizer)
    for limit, can in ((longest, True), (longest - 1, False)):
        monkeypatch.setattr(talker, "config", replace(talker.config, max_position_embeddings=limit))
        with nullcontext() if can else pytest.raises(ValueError, match="more than the"):
            one.ask(talker, tokenizer)


def test_answers_are_copies_where_the_task_says_so(talker, tokenizer):
    copying = WithFields(replace(TASK, copied=("a", "l")), RECORDS)
    found = [json.loads(answer) for answer in copying.ask(talker, tokenizer)]
    pieces = {None, "text", "0", "1", "2", "3", *(f"text {i}" for i in range(4))}
    assert all({one["a"], *one["l"]} <= pieces for one in found)
    assert np.all([f"{i}" in str(one) or i not in one["l"] for i, one in enumerate(found)])
