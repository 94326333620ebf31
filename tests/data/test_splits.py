"""Which records are trained on and which are held out, and those that are both."""

import random
from dataclasses import replace

import pytest

from minilora.data.leaks import leaks, repeated, warning_of_leaks
from minilora.data.records import Record
from minilora.data.rows import DataError
from minilora.data.splits import describe_splits, has_validation, split_records, split_text

SYSTEM = {"role": "system", "content": "Be brief."}
SO = {"role": "assistant", "content": "So."}


def records_of(*splits):
    return [Record(f"r{i}", (), "", split) for i, split in enumerate(splits)]


def test_records_follow_the_split_they_name_and_train_without_one():
    parts = split_records(records_of("test", None, "validation", "train"))
    ids = {name: [r.id for r in part] for name, part in parts.items()}
    assert ids == {"train": ["r1", "r3"], "validation": ["r2"], "test": ["r0"]}
    with pytest.raises(DataError, match="no record is left to train on"):
        split_records(records_of("test", "validation"))


@pytest.mark.parametrize("count", [1, 9, 10, 14, 15, 25])
def test_where_none_names_a_split_the_fifth_and_the_tenth_of_every_ten_are_held_out(count):
    parts = split_records(records_of(*[None] * count))
    numbers = {name: [int(r.id[1:]) + 1 for r in part] for name, part in parts.items()}
    assert numbers["validation"] == [n for n in range(1, count + 1) if count >= 10 and n % 10 == 5]
    assert numbers["test"] == [n for n in range(1, count + 1) if count >= 10 and n % 10 == 0]
    assert sorted(n for part in numbers.values() for n in part) == [*range(1, count + 1)]


@pytest.mark.parametrize("count", [9, 10, 19, 20, 57])
def test_of_a_text_the_last_tenth_is_for_the_test_and_the_tenth_before_it_for_validation(count, tokenizer):
    text, tenth = "abc" * count, count // 10
    parts = split_text(text, tokenizer, 3)
    assert {name: len(part) for name, part in parts.items()} == {
        "train": count - 2 * tenth, "validation": tenth, "test": tenth
    }  # fmt: skip
    assert [i for part in parts.values() for s in part for i in s.ids] == tokenizer.encode(text)


def test_there_is_something_for_validation_from_ten_records_or_sequences_on(tokenizer):
    def has(records):
        return has_validation(records, lambda: tokenizer, 3)

    assert [has(records_of(*[None] * n)) for n in (9, 10)] == [False, True]
    assert [has([Record("x", text="abc" * n)]) for n in (9, 10)] == [False, True]
    assert [has(records_of("train", split)) for split in ("test", "validation")] == [False, True]


@pytest.mark.parametrize(("sizes", "text", "said"), [
    ((24, 3, 2), False, "24 records to train on, 3 for validation, 2 for the test: none names a split, so of every"),
    ((24, 3, 3), True, "24 sequences to train on, 3 for validation, 3 for the test: none names a split, so the last"),
    ((9, 0, 0), False, "all is trained on and nothing is held out: that takes 10 records, and there are 9"),
])  # fmt: skip
def test_how_many_are_held_out_is_said(sizes, text, said):
    assert describe_splits(dict(zip(("train", "validation", "test"), sizes, strict=True)), text).startswith(said)


def held_and_trained(held, trained):
    """Splits of one held-out and one trained record; each is a question and an answer, or a text."""

    def record(name, said):
        if isinstance(said, str):
            return Record(name, text=said)
        messages = ({"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]})
        return Record(name, (SYSTEM, *messages))

    return {"train": [record("t", trained)], "validation": [], "test": [record("h", held)]}


LIEN = ("What is a lien?", "It is a claim on property.")
TWICE = [
    (LIEN, LIEN, "question and answer"),
    (LIEN, ("what is\na  LIEN? ", "Something else."), "question"),
    (LIEN, ("Lien?", "It is a claim  on Property."), "answer"),
    (LIEN, ("Lien?", "It is a claim on land."), None),
    (("Is it?", "Yes, it is that."), ("Was it?", "Yes, it is that."), None),  # four words: a label
    (("Is it?", "Yes, it is that one."), ("Was it?", "Yes, it is that one."), "answer"),
    (("Is it?", "Yes."), ("Is it?", "Yes."), "question and answer"),
    ("One two.", "one  two.", "text"),
    ("One two.", "one two three.", None),
    ("One two", "one two! ?", "text"),
    ("3 + 4?", "3 - 4?", None),
    ("...", "?!", None),
    ("返品は？", "返品は", "text"),
    (LIEN, ("what is a lien", "it is a claim on property!"), "question and answer"),
    ("What is a lien?", LIEN, "question"),
]


@pytest.mark.parametrize(("held", "trained", "same"), TWICE)
def test_what_is_held_out_and_trained_on_is_found(held, trained, same):
    splits = held_and_trained(held, trained)
    found = [(item.record.id, item.trained.id, item.same) for item in leaks(splits)]
    assert found == ([] if same is None else [("h", "t", same)])


def test_many_records_are_found_as_when_each_is_compared_with_each():
    def said(question, answer, name):
        return Record(name, ({"role": "user", "content": question}, {"role": "assistant", "content": answer}))

    draw = random.Random(0)
    answers = [f"It is one of the {i}." for i in range(9)] + ["Yes.", "No."]
    train, test = (
        [said(f"What {draw.randrange(40)}?", draw.choice(answers), f"{kind}{i}") for i in range(25)] for kind in "th"
    )
    wanted = []
    for held in test:
        for same, has in (
            ("question and answer", lambda t, h: t.messages == h.messages),
            ("question", lambda t, h: t.messages[0] == h.messages[0]),
            ("answer", lambda t, h: t.messages[1] == h.messages[1] and len(t.messages[1]["content"]) > 4),
        ):
            if first := next((t for t in train if has(t, held)), None):
                wanted.append((held.id, first.id, same))
                break
    found = leaks({"train": train, "validation": [], "test": test})
    assert [(item.record.id, item.trained.id, item.same) for item in found] == wanted
    assert {same for *_, same in wanted} == {"question", "answer", "question and answer"}


def test_records_in_two_splits_are_named_in_one_line():
    assert warning_of_leaks([]) == []
    (one,) = leaks(held_and_trained(LIEN, LIEN))
    (line,) = warning_of_leaks([one])
    assert line == (
        "1 validation or test record is also in the training set, so the loss looks too good: "
        "h has the question and answer of t"
    )
    (line,) = warning_of_leaks([one] * 7)
    assert line.startswith("7 validation or test records are") and line.count("h has") == 5 and "and 2 more" in line


def test_a_record_that_repeats_an_earlier_one_is_found_with_that_one():
    one, two = (held_and_trained(LIEN, LIEN)[name][0] for name in ("train", "test"))
    other = replace(one, id="o", messages=(*one.messages[:2], SO))
    assert repeated([one, other]) == []
    assert [(r.id, earlier.id) for r, earlier in repeated([one, other, two, two])] == [("h", "t"), ("h", "t")]
