"""Which measured records are in the training data of an adapter, by what minilora.json says of these data."""

import json

import pytest

from minilora.data import trained
from minilora.data.records import read_records, sha256_of_data
from minilora.data.trained import is_same, warning_of_change, warning_of_trained

LONG = "the same long answer to each of these questions"
ROWS = [{"topic": f"question {word}", "answer": LONG, "split": "train"} for word in ("one", "two", "three")]
TEXT = "\n".join(map(json.dumps, ROWS))


@pytest.fixture
def adapter(tmp_path):
    """A function that writes data and minilora.json, changed by `data`, and returns the folder of both."""

    def write(name="own.jsonl", text=TEXT, **data):
        (tmp_path / name).write_text(text)
        entry = {"name": str(tmp_path / name), "sha256": sha256_of_data(tmp_path / name)} | data
        (tmp_path / "minilora.json").write_text(json.dumps({"data": entry}))
        return tmp_path

    return write


def test_questions_are_compared_as_they_were_asked_in_training(adapter, tokenizer, said):
    records = read_records(adapter() / "own.jsonl", field={"question": "topic"})
    records[2] = records[2].asked("another question")
    measured = [("a", records[:1], None), ("b", [records[1].open_book("A passage."), records[2]], None)]
    start = len(said())
    for field, counts in (({"question": "topic"}, ["a: 1 of 1", "b: 1 of 2"]), ({"question": "gone"}, [])):
        lines = warning_of_trained(measured, adapter(field=field), tokenizer)
        assert [line.partition(" records")[0] for line in lines] == counts
    for sha256 in (None, "0" * 64):
        changed = adapter(field={"question": "topic"}, sha256=sha256)
        assert warning_of_trained(measured, changed, tokenizer) == []
        assert len(warning_of_change(str(changed / "own.jsonl"), changed)) == (sha256 is not None)
    assert said()[start:] == []


def test_one_text_and_data_that_would_be_fetched_are_not_read(adapter, tokenizer, monkeypatch):
    folder = adapter("own.txt", "a text that is divided into sequences")
    assert warning_of_trained([("a", read_records(folder / "own.txt"), None)], folder, tokenizer) == []
    records = read_records(adapter() / "own.jsonl", field={"question": "topic"})
    (folder / "minilora.json").write_text(json.dumps({"data": {"name": "org/set"}}))
    monkeypatch.setattr(trained, "sha256_of_data", lambda place: pytest.fail("it is fetched"))
    assert warning_of_trained([("a", records, None)], folder, tokenizer) == []


def test_data_are_the_same_where_both_places_are_one_file_whatever_it_holds(tmp_path):
    mail, other = tmp_path / "mail.jsonl", tmp_path / "other.jsonl"
    for path in (mail, other):
        path.write_text("{}")
    assert is_same(str(mail), str(tmp_path / "." / "mail.jsonl"))
    for place, source in ((None, mail), ("legal", mail), (mail, "legal"), ("legal", "legal"), (mail, other)):
        assert not is_same(place and str(place), str(source))
