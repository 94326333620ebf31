"""Labelled data: which columns are found, what the prompt is, what is refused, and in which words."""

import csv
import json

import pytest

from minilora.data.fields import FieldTask
from minilora.data.labels import LISTED, LabelTask, doubts, variants
from minilora.data.leaks import leaks
from minilora.data.records import DataError, read_source
from minilora.data.rows import SPLITS
from minilora.data.splits import by_split, check_labels

ROWS = [("where is it", "delivery"), ("pay me", "refund"), ("not here", "delivery"), ("money back", "refund")]


def write(path, rows, text="text", label="label", **more):
    path.write_text("\n".join(json.dumps({text: a, label: b} | more) for a, b in rows), encoding="utf-8")
    return path


def texts(reading):
    return [(reading.task.text(record.prompt[-1]["content"]), record.label) for record in reading.records]


@pytest.mark.parametrize("text", ["text", "message", "prompt"])
@pytest.mark.parametrize("label", ["label", "intent", "category"])
def test_labels_are_found_by_the_names_of_the_columns_in_a_file_a_table_and_a_folder(tmp_path, text, label):
    path = write(tmp_path / "a.jsonl", ROWS, text, label, record=7)
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([(text, label), *ROWS])
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", ROWS, text, label)
    for source in (path, tmp_path / "a.csv", tmp_path / "folder"):
        reading = read_source(source)
        assert texts(reading) == ROWS and reading.task.labels == ("delivery", "refund")
        record = reading.records[0]
        assert record.messages[-1] == {"role": "assistant", "content": "delivery"}
        assert record.prompt[-1]["content"] == reading.task.prompt("where is it") and len(record.messages) == 2
    assert read_source(path).unread == {"record": 4}


def test_a_label_column_of_any_name_is_named_and_others_stay_what_they_were(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS, "body", "topic")
    assert texts(read_source(path, field={"label": "topic", "text": "body"})) == ROWS
    assert texts(read_source(write(path, ROWS, "text", "topic"), field={"label": "topic"})) == ROWS
    plain = read_source(write(path, ROWS, "text", "topic"))
    assert plain.task is None and plain.records[0].text == "where is it"
    both = read_source(write(path, ROWS, "prompt", "completion", category="x"))
    assert both.task is None and both.formats == {"prompt/completion": 4}
    chosen = read_source(write(path, ROWS, "prompt", "completion", category="x"), field={"label": "completion"})
    assert texts(chosen) == ROWS


@pytest.mark.parametrize("numbers", [(1, 0), (1.0, 0.0), ("1", "0")])
def test_whole_numbers_are_the_same_labels_however_they_are_written(tmp_path, numbers):
    path = write(tmp_path / "a.jsonl", [(text, numbers[label == "refund"]) for text, label in ROWS])
    assert read_source(path).task.labels == ("0", "1")
    assert "a.jsonl:1: label must be one text, got ['a', 'b']: for several labels, use --schema" in refusal(
        write(path, [("x", ["a", "b"]), ("y", ["a"])])
    )


def test_labels_may_be_numbers_and_their_white_space_does_not_count(tmp_path):
    reading = read_source(write(tmp_path / "a.jsonl", [("a", 1), ("b", 0), ("c", " 1 ")]))
    assert texts(reading) == [("a", "1"), ("b", "0"), ("c", "1")] and reading.task.labels == ("0", "1")


def test_the_prompt_lists_few_labels_and_not_many_and_the_text_comes_out_of_it_again():
    few, many = (LabelTask.of(f"l{i:02}" for i in range(n)) for n in (LISTED, LISTED + 1))
    assert all(label in few.template for label in few.labels)
    assert not any(label in many.template for label in many.labels)
    of_fields = FieldTask.of({"properties": {str(len(task.labels)): {"enum": [*task.labels]} for task in (few, many)}})
    assert of_fields.template.startswith(f"Extract these fields as JSON: 30 ({', '.join(few.labels)}), 31.\n")
    for task in (few, many, LabelTask.of(["a {text} b", "c"])):
        for text in ("", "hello\n{text} there", "Message: x"):
            assert task.text(task.prompt(text)) == text
        assert LabelTask.stored(task.entry()) == task == LabelTask.stored(json.loads(json.dumps(task.entry())))
    assert LabelTask.stored({"name": "legal"}) is None


@pytest.mark.parametrize(
    "data", [{"labels": ["a"]}, {"labels": ["a", 1]}, {"labels": ["a", ""]}, {"labels": ["a", "b"], "template": "x"}]
)
def test_a_stored_task_that_cannot_be_used_is_refused(data):
    with pytest.raises(ValueError, match="labels must be two texts or more, with a template that has {text}"):
        LabelTask.stored({"template": "{text}"} | data)


def test_a_stored_task_is_taken_where_it_has_all_labels_of_the_data(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    wide = LabelTask(("delivery", "other", "refund"), "{text}?")
    narrow = LabelTask(("delivery", "other"), "{text}!")
    assert read_source(path, stored=[narrow, wide]).task == wide
    assert read_source(path, stored=[wide]).records[0].prompt[-1]["content"] == "where is it?"
    assert read_source(path, stored=[narrow]).task == LabelTask.of(["delivery", "refund"])
    assert read_source(write(path, ROWS[:1]), stored=[wide]).task == wide  # one label is enough to measure on


def refusal(path, **settings):
    with pytest.raises(DataError) as caught:
        read_source(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_mistake_is_one_line_that_says_what_to_do(tmp_path):
    path = tmp_path / "a.jsonl"
    assert refusal(write(path, ROWS), field={"label": "topic"}).endswith(
        "a.jsonl:1: field label=topic: no such column; there are text, label: name the right one with --field label=..."
        " (4 rows: lines 1, 2, 3, 4)"
    )
    assert refusal(write(path, ROWS, "body", "topic"), field={"label": "topic"}).startswith(
        f"{path}:1: text/label needs a column text; there are topic, body: name the column with --field text=..."
    )
    assert "1: text must be a non-empty text, got nothing (an empty cell, or null)" in refusal(
        write(path, [(None, "a"), (" ", "b")])
    )
    assert "1: label must be a non-empty text, got nothing" in refusal(write(path, [("x", ""), ("x", None)]))
    assert "1: label must be a non-empty text, got 0.5" in refusal(write(path, [("x", 0.5), ("x", "a")]))
    alone = refusal(write(path, ROWS[::2]))
    assert alone == f"{path}: all records have the label 'delivery': at least two are needed"
    path.write_text('{"text": "a", "label": "b"}\n{"question": "c", "answer": "d"}', encoding="utf-8")
    assert "a.jsonl: no label for 1 of 2 records (line-2): give each record one" in refusal(path)


def splits_of(tmp_path, *rows):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(dict(zip(("text", "label", "split"), r, strict=True))) for r in rows))
    return by_split(read_source(path).records)


def test_a_label_that_is_never_trained_is_refused_and_one_that_is_seen_once_is_named(tmp_path):
    train = [(text, label, "train") for text, label in ROWS]
    assert check_labels(splits_of(tmp_path, *train, ("x", "refund", "test")), "mine") == []
    for split in ("validation", "test"):
        for also, more in (("xy", ", and 1 more such record:"), ("xyz", ", and 2 more such records:"), ("y", ":")):
            bad = splits_of(tmp_path, *train, *((text, "new", split) for text in also))
            words = rf"^mine: line-5 \({split}\) has the label 'new', which no training record has{more} add training"
            with pytest.raises(DataError, match=words):
                check_labels(bad, "mine")
    for odd, few in ((["refnud"], "1 label is"), (["refnud", "delivry"], "2 labels are")):
        (line,) = check_labels(splits_of(tmp_path, *train, *((f"x {label}", label, "train") for label in odd)), "mine")
        assert line == f"{few} in one training record only: {str(odd)[1:-1]}; is it a typing error?"
    alike = [
        ("x", "Delivery", "train"),
        ("y", "Delivery", "train"),
        ("z", "Ru\u0308ck", "train"),
        ("u", "R\u00fcck", "train"),
    ]
    lines = check_labels(splits_of(tmp_path, *train, *alike), "mine")
    assert (
        lines[-1]
        == "these count as different labels: 'Delivery' and 'delivery', 'Ru\\u0308ck' and 'R\u00fcck'; is it one label?"
    )
    only_tests = splits_of(tmp_path, ("x", "a", "test"), ("y", "b", "test"))
    assert check_labels(only_tests, "mine") == []


def test_labels_that_take_turns_are_named_where_the_rule_holds_out_one_of_them_alone(tmp_path):
    lines = check_labels(splits_of(tmp_path, *((f"m{i}", "ab"[i % 2], None) for i in range(20))), "mine")
    assert [line.partition(":")[0] for line in lines] == [
        "all 2 records for validation have the label 'a'",
        "all 2 records for test have the label 'b'",
    ]
    assert check_labels(splits_of(tmp_path, *((f"m{i}", "ab"[i % 3 % 2], None) for i in range(20))), "mine") == []


def test_the_rule_trains_on_the_first_record_of_a_label_that_it_would_only_hold_out(tmp_path):
    rare = {4: "b", 14: "c", 19: "b", 25: "d", 29: "d", 39: "c"}  # by number of the record
    splits = splits_of(tmp_path, *((f"m{i}", rare.get(i, "a"), None) for i in range(40)))
    held = {name: [int(record.question.rsplit("m", 1)[-1]) for record in splits[name]] for name in SPLITS}
    assert (held["validation"], held["test"]) == ([24, 34], [9, 19, 29, 39])
    assert held["train"] == [i for i in range(40) if i not in (24, 34, 9, 19, 29, 39)]
    (line,) = check_labels({name: [r for r in splits[name] if r.label != "a"] for name in SPLITS}, "mine")
    assert line == "3 labels are in one training record only: 'b', 'c', 'd'; is it a typing error?"


def test_the_same_text_in_training_and_test_is_a_leak_and_the_same_long_label_is_none(tmp_path):
    long = "my parcel has not come yet"
    rows = [("one", long, "train"), ("two", "b", "train"), ("three", long, "test"), ("two", "b", "test")]
    (leak,) = leaks(splits_of(tmp_path, *rows))
    assert (leak.record.id, leak.trained.id) == ("line-4", "line-2")


def test_a_text_without_its_full_stop_is_the_same_text(tmp_path):
    rows = [*ROWS, ("Where is it?", "refund")]
    (line,) = check_labels(splits_of(tmp_path, *((text, label, None) for text, label in rows)), "mine")
    assert line.endswith("line-5 'refund' but line-1 'delivery'")


def test_a_text_with_two_labels_is_named_in_whatever_splits_it_is(tmp_path):
    train = [(text, label, "train") for text, label in ROWS]
    text, label = ROWS[0]
    other = next(one for _, one in ROWS if one != label)
    for split in SPLITS:
        again = (f" {text.upper()} ", other, split)
        (line,) = check_labels(splits_of(tmp_path, *train, again), "mine")
        at = len(train) + 1
        assert line == f"1 record has an earlier one's text and another label: line-{at} {other!r} but line-1 {label!r}"
        *_, line = check_labels(splits_of(tmp_path, *train, again, again), "mine")
        assert line.startswith("2 records have an earlier one's text and another label: ")
    assert check_labels(splits_of(tmp_path, *train, (text, label, "train")), "mine") == []


# -- labels that may not be what was meant -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other", ["billing", "BILLING.", "Bil ling", "Bil-ling_", "B\u00edlling", "\uff22illing", "Billing\u200b"]
)
@pytest.mark.parametrize("counts", [(9, 1), (3, 3), (1, 9)])
def test_labels_that_are_written_in_two_ways_are_one_group_whatever_their_numbers(other, counts):
    assert variants({"Billing": counts[0], other: counts[1], "Delivery": 5}) == [sorted(["Billing", other])]


@pytest.mark.parametrize("other", ["Biling", "Billling", "Billimg", "Blilling", "illing", "billin"])
def test_labels_that_differ_in_a_letter_are_one_group_where_one_is_rare(other):
    assert variants({"Billing": 8, other: 2, "Delivery": 1}) == [sorted(["Billing", other])]
    assert variants({other: 2, "Billing": 5, "BILLING": 3}) == [sorted(["Billing", "BILLING", other])]
    assert variants({"Billing": 8, other: 3}) == []


@pytest.mark.parametrize(
    "labels",
    [
        ("-1", "1"),
        ("C", "C#"),
        ("level 1", "level 2"),
        ("order10", "order1"),
        ("spam", "pam"),
        ("+", "-"),
        ("a" * 41, "a" * 42),
    ],
)
def test_labels_that_differ_in_more_than_their_writing_are_no_group(labels):
    assert variants(dict(zip(labels, (90, 1), strict=True))) == variants(dict.fromkeys(labels, 5)) == []


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["a", "b", "a; b", "c"], "'a; b': each combination"),
        (["a", "b", "b|a", "a , b"], "'b|a' and 1 more: each"),
        (["b;c", "c; b;", "d"], "'b;c' and 1 more: each"),
        (["a", "b", "c; d"], None),
        (["Food, drinks", "Food, other"], None),
        (["a;", "a"], None),
    ],
)
def test_several_labels_in_a_cell_are_named(labels, said):
    lines = [line for line in doubts(dict.fromkeys(labels, 9)) if "in a cell" in line]
    assert len(lines) == (said is not None) and all(said in line for line in lines)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((90, 10), "90 of 100 training records have the label '0'"),
        ((10, 2, 88), None),
        ((20,), None),
        ((8, 1), "1 label is in one training record only: '1'"),
        ((1,) * 10, "10 labels in 10 training records: are they answers"),
        ((2, *(1,) * 18), "19 labels in 20 training records: are they answers"),
        ((2,) * 10, None),
    ],
)
def test_labels_of_nearly_all_records_and_labels_of_hardly_any_are_named(counts, said):
    lines = doubts({str(i): n for i, n in enumerate(counts)})
    assert len(lines) == (said is not None) and all(line.startswith(said) for line in lines)


def test_two_versions_of_a_task_have_at_least_half_of_all_their_labels_in_common():
    old = LabelTask.of("abcd")
    for labels, like in (("abcd", True), ("abcde", True), ("ab", True), ("abxy", False), ("a", False), ("abcx", True)):
        new = LabelTask.of(labels)
        assert old.is_like(new) == new.is_like(old) == like, labels
