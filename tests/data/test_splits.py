"""Which records are trained on and which are held out, and those that are both."""

import random
from dataclasses import replace

import pytest

from minilora.data.leaks import told_of_twice, twice
from minilora.data.records import Record
from minilora.data.rows import DataError
from minilora.data.splits import split_records, told_of_splits

SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = {"role": "user", "content": "hello"}
SO = {"role": "assistant", "content": "So."}


def records_of(*splits):
    return [Record(f"r{i}", (), "", split) for i, split in enumerate(splits)]


def test_records_follow_the_split_they_name_and_train_without_one():
    parts = split_records(records_of("test", None, "validation", "train"))
    ids = {name: [r.id for r in part] for name, part in parts.items()}
    assert ids == {"train": ["r1", "r3"], "validation": ["r2"], "test": ["r0"]}


@pytest.mark.parametrize(("count", "tested"), [(1, []), (9, []), (10, ["r9"]), (25, ["r9", "r19"])])
def test_where_none_names_a_split_every_tenth_is_for_testing(count, tested):
    parts = split_records(records_of(*[None] * count))
    assert [r.id for r in parts["test"]] == tested
    assert len(parts["train"]) == count - len(tested) and parts["validation"] == []


def test_nothing_left_to_train_on_is_an_error():
    with pytest.raises(DataError, match="no record is left to train on"):
        split_records(records_of("test", "validation"))


@pytest.mark.parametrize(
    ("count", "told"), [(30, "27 trained, 3 held out: no record names"), (9, "9 trained, none held out: from ten")]
)
def test_how_many_are_held_out_is_told(count, told):
    assert told_of_splits(split_records(records_of(*[None] * count))).startswith(told)


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
    (("Is it?", "Yes."), ("Is it?", "Yes."), "question and answer"),
    ("One two.", "one  two.", "question"),
    ("One two.", "one two three.", None),
    ("What is a lien?", LIEN, "question"),
]


@pytest.mark.parametrize(("held", "trained", "same"), TWICE)
def test_what_is_held_out_and_trained_on_is_found(held, trained, same):
    splits = held_and_trained(held, trained)
    found = [(item.record.id, item.trained.id, item.same) for item in twice(splits)]
    assert found == ([] if same is None else [("h", "t", same)])


def test_of_several_trained_records_the_one_that_has_most_in_common_is_named():
    splits = held_and_trained(LIEN, LIEN)
    (same,), (held,) = splits["train"], splits["test"]
    asked, answered = (replace(same, id=name, messages=messages) for name, messages in (
        ("asked", (*same.messages[:2], SO)), ("answered", (HELLO, same.messages[-1])),
    ))  # fmt: skip
    for trained in ([asked, answered, same], [same, asked, answered], [answered, same]):
        assert [item.trained.id for item in twice({**splits, "train": trained})] == ["t"]
    assert [item.same for item in twice({**splits, "train": [answered, asked]})] == ["question"]
    assert twice({**splits, "train": [replace(held, messages=(SYSTEM, HELLO, SO))]}) == []


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
    found = twice({"train": train, "validation": [], "test": test})
    assert [(item.record.id, item.trained.id, item.same) for item in found] == wanted
    assert {same for *_, same in wanted} == {"question", "answer", "question and answer"}


def test_records_in_two_splits_are_named_in_one_line():
    assert told_of_twice([]) == []
    (one,) = twice(held_and_trained(LIEN, LIEN))
    (line,) = told_of_twice([one])
    assert line.startswith("1 held-out record says what is trained on, too: h has the question and answer of t; ")
    (line,) = told_of_twice([one] * 7)
    assert line.startswith("7 held-out records say") and line.count("h has") == 5 and "and 2 more; " in line
