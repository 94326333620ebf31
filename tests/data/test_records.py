"""Reading records: everything a row says is in its record, and every kind of mistake is named with its place."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from modelfiles import TALK

from minilora.data import rows
from minilora.data.prompts import read_prompts
from minilora.data.records import BUILT_IN, Record, read_records, sha256_of_data
from minilora.data.rows import DataError
from minilora.models.load import load_tokenizer

QA = {"question": "What is a lien?", "answer": "A claim."}
USER, ASSISTANT = {"role": "user", "content": QA["question"]}, {"role": "assistant", "content": QA["answer"]}


@pytest.fixture
def write(tmp_path):
    """A function that writes lines (dicts become JSON) into a file and returns its path."""

    def write(*lines, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
        return path

    return write


def message_of(path, *tokenizer):
    with pytest.raises(DataError) as caught:
        read_records(path, *tokenizer)
    return str(caught.value)


# -- what is read ------------------------------------------------------------------------------------------------------


def test_everything_that_a_row_says_is_in_its_record(write):
    known = {"id": "x/lien", "topic": "x", "split": "test", "paraphrase": "Define lien.", "keywords": ["claim"]}
    known |= {"phrasings": ["A lien?", "Explain lien."], "validation_paraphrase": "Lien: what?", "reworded": "lien?"}
    path = write(QA | known, "", "  ", {"messages": [m | {"name": "x"} for m in TALK]})
    record, talk = read_records(path)
    phrasings = ("A lien?", "Explain lien.")
    assert record == Record(
        "x/lien", (USER, ASSISTANT), "", "test", "Define lien.", ("claim",), phrasings, "Lien: what?", reworded="lien?"
    )
    assert record.prompt == [USER] and record.other_questions == [*phrasings, "lien?", "Define lien.", "Lien: what?"]
    assert eval(repr(record), {"Record": Record}) == record and "split=None" not in repr(talk)
    assert talk == Record("line-4", tuple(TALK)) and talk.prompt == TALK[:-1]
    assert read_records(write("One.", "Two.", name="novel.txt")) == [Record("novel", (), "One.\nTwo.")]


def test_prompts_of_a_text_are_its_lines_with_their_numbers(write):
    prompts = read_prompts(write("Why?", " ", "How?", name="asked.txt"))
    assert [(one.place, one.messages[-1]["content"]) for one in prompts] == [("line 1", "Why?"), ("line 3", "How?")]


def test_rows_are_read_as_those_of_a_file(write):
    rows = [QA | {"id": "a", "split": "test"}, {"messages": TALK, "id": "b"}]
    for given in (rows, iter(rows)):
        assert read_records(given) == read_records(write(*rows))
    assert read_records([{"q": "Why?", "answer": "So."}], field={"question": "q"})[0].question == "Why?"
    assert message_of([QA, {"question": "x"}, QA | {"answer": ""}]).startswith("rows: row 2: ")
    missing = [float("nan"), np.float32("nan"), type("NAType", (), {"__bool__": None})(), type("NaTType", (), {})()]
    empty = {"id": None, "split": None, "paraphrase": None, "keywords": None}
    assert read_records([QA | dict.fromkeys(empty, x) for x in missing]) == read_records([QA | empty] * 4)
    arrays = {"keywords": np.array(["claim"]), "phrasings": np.array(["A lien?"], dtype=object), "id": np.int64(7)}
    assert read_records([QA | arrays]) == read_records([QA | {name: x.tolist() for name, x in arrays.items()}])
    assert message_of([QA | {"question": missing[0]}]) == message_of([QA | {"question": None}])
    for wrong in (3, QA):
        with pytest.raises(TypeError, match="or rows as dicts, got a (int|dict)$"):
            read_records(wrong)
    with pytest.raises(TypeError, match=r'of a DataFrame, frame.to_dict\("records"\)$'):
        read_records(type("DataFrame", (list,), {"iterrows": None})(["question", "answer"]))  # pandas gives its columns
    with pytest.raises(ValueError, match="^field must be a dict such as .*, got 'question=q'$"):
        read_records("legal", field="question=q")


def test_a_record_asked_otherwise_is_its_system_message_the_paraphrase_and_the_last_answer(write):
    extra = {"id": "t", "keywords": ["so"], "phrasings": ["Why so?"]}
    record, plain = read_records(write({"messages": TALK, "paraphrase": "How come?"} | extra, QA))
    asked = (TALK[0], {"role": "user", "content": "How come?"}, TALK[-1])
    assert record.asked_otherwise() == Record("t", asked, paraphrase="How come?", keywords=("so",))
    assert plain.asked("Lien?").messages == ({"role": "user", "content": "Lien?"}, ASSISTANT)
    with pytest.raises(ValueError, match="line-2 has no paraphrase"):
        plain.asked_otherwise()


DATA = Path(rows.__file__).parent
CARDS = [(DATA / card).read_text("utf-8") for card in ("README.md", "SKILLS.md")]
SAID = re.findall(r"^\| (`[\w-]+\.jsonl`) \| ([\d,]+) \D|^(`.*jsonl`) have ([\d,]+) ", "".join(CARDS), re.MULTILINE)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_data_are_read_by_name_fit_the_tokenizer_and_are_on_a_card(name):
    found = len(read_records(name, load_tokenizer("tiny")))
    said = [count for one, n, many, each in SAID for count in [n or each] if f"`{name}.jsonl`" in one + many]
    assert said == [f"{found:,}"], f"{found} records, and a card in minilora/data has {said or 'no row for them'}"


@pytest.mark.parametrize("card", CARDS, ids=("README", "SKILLS"))
def test_the_mistakes_that_a_card_lists_are_of_records_and_passages_that_exist(card):
    lines = (line for file in DATA.glob("*.jsonl") for line in file.read_text("utf-8").splitlines())
    known = {row.get("id") or row.get("record") for row in map(json.loads, lines)}
    named = set(re.findall(r"`([\w-]+/[\w-]+)`", card.partition("## Known mistakes\n")[2].partition("\n## ")[0]))
    assert named and named - known == set()


def test_the_hash_of_data_is_what_sha256sum_prints(tmp_path):
    for name, text in (("train.jsonl", '{"q": "a", "a": "b"}\n'), ("test.jsonl", '{"q": "c", "a": "d"}\n')):
        (tmp_path / name).write_text(text, encoding="utf-8")
    one, other = (hashlib.sha256((tmp_path / f"{name}.jsonl").read_bytes()).hexdigest() for name in ("train", "test"))
    assert sha256_of_data(tmp_path / "train.jsonl") == one
    (tmp_path / "README.md").write_text("not read")
    whole = hashlib.sha256(f"{one}  train.jsonl\n{other}  test.jsonl\n".encode()).hexdigest()
    assert sha256_of_data(tmp_path) == whole and len(sha256_of_data("legal")) == 64


# -- mistakes ----------------------------------------------------------------------------------------------------------

BAD = [  # a line, part of the message
    ("{", "not JSON"),
    ("[1]", "expected a JSON object, got list"),
    ({}, "an empty object"),
    ({"words": "x", "n": 1}, "which columns are the question and the answer? There are words, n: name them, such as"),
    (
        {"n": 1, "talk": TALK},
        "which column has the messages? There are n, talk: name it, such as --field messages=talk",
    ),
    ({"question": "x", "n": 1}, "question/answer needs a column answer; there are question, n: name the column with"),
    ({"answer": "x"}, "question/answer needs a column question; there are answer"),
    ({"instruction": "x", "input": "y"}, "instruction/output needs a column output; there are instruction, input"),
    ({"text": 5}, "text must be a non-empty text"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "message 1 needs a role"),
    ({"conversations": [{"from": "human", "value": "x"}]}, "no message is the assistant's"),
    (
        {"conversations": [{"from": "human"}]},
        "value of message 1 must be a non-empty text, got nothing (an empty cell, or null)",
    ),
    (QA | {"question": 5}, "question must be a non-empty text, got 5"),
    (QA | {"paraphrase": 5}, "paraphrase must be a non-empty text"),
    (QA | {"validation_paraphrase": 5}, "validation_paraphrase must be a non-empty text, got 5"),
    (QA | {"split": "own"}, "split is 'own', expected one of train, validation, test"),
    (QA | {"keywords": 5}, "keywords must be a list of texts"),
    (QA | {"phrasings": "A lien?"}, "phrasings must be a list in JSON, such as ["),
    (QA | {"phrasings": ["A lien?", " "]}, "phrasings must be a list of texts"),
    ({"messages": []}, "messages must be a non-empty list"),
    ({"messages": "hello"}, "messages must be a list in JSON, such as ["),
    ({"messages": [TALK[1], "hello"]}, "message 2 needs a role"),
    ({"messages": [{"role": "assistant", "content": 5}]}, "content of message 1 must be a non-empty text"),
    ({"messages": [TALK[0], TALK[2], TALK[2]]}, "no message is the user's: an answer needs a question"),
    ({"messages": [TALK[2], TALK[1]]}, "no message is the user's: an answer needs a question"),
    ({"messages": TALK[:2]}, "no message is the assistant's: the answer to learn"),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=[reason[:30] for _, reason in BAD])
def test_a_bad_line_is_named_with_its_reason(write, line, reason):
    path = write(QA, line)
    message = message_of(path)
    assert message.startswith(f"{path}:2: ") and reason in message and "\n" not in message


def test_every_kind_of_mistake_has_a_line_with_its_first_place_and_the_rows_that_have_it(write):
    kinds = [
        (QA | {"answer": 1}, "answer"), ("{", "not JSON"), (QA | {"split": "x"}, "split is"), ({}, "empty object")
    ]  # fmt: skip
    path = write(*[kinds[i % 4][0] for i in range(28)])
    for i, (line, (_, reason)) in enumerate(zip(message_of(path).split("\n"), kinds, strict=True), 1):
        assert line.startswith(f"{path}:{i}: ") and reason in line
        assert line.endswith(f"(7 rows: lines {', '.join(str(n) for n in range(i, 21, 4))} and 2 more)")
    lines = message_of(write(*[{"question": "x", f"column {chr(65 + i)}": 1} for i in range(50)])).split("\n")
    assert len(lines) == 21 and lines[-1] == "and 30 more kinds of mistakes"


def test_an_id_that_another_record_has_is_reported_with_its_line(write):
    path = write(QA | {"id": "a"}, QA | {"id": "b"}, QA | {"id": "a"})
    assert message_of(path).startswith(f"{path}:3: id 'a' is already the id of line 1: give each another id, or none, ")
    assert [r.id for r in read_records(write(QA | {"id": 1, "n": 2}, QA | {"id": 1, "n": 3}), field={"id": "n"})] == [
        *"23"
    ]


def test_ids_that_the_files_of_a_folder_share_are_told_apart(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(QA | {"id": i}) + "\n" for i in (1, 2)))
    ids = [record.id for record in read_records(tmp_path)]
    assert ids == ["1", "2", "valid.jsonl/1", "valid.jsonl/2", "test.jsonl/1", "test.jsonl/2"]
    (texts := tmp_path / "texts").mkdir()
    for name in ("a.md", "a.txt"):
        (texts / name).write_text("One.")
    assert [record.id for record in read_records(texts)] == ["a", "a.txt/a"]


class Picky:
    """In place of a tokenizer: it has no token for an escape character."""

    def check(self, text):
        if "\x1b" in text:
            raise ValueError("no token")


@pytest.mark.parametrize("field", ["question", "answer", "phrasings", "paraphrase", "validation_paraphrase", "text"])
def test_text_that_the_tokenizer_cannot_encode_is_reported_if_the_tokenizer_is_known(write, field):
    bad = ["a?", "ab\x1b"] if field == "phrasings" else "ab\x1b"
    path = write(QA, ({} if field == "text" else QA) | {field: bad})
    assert message_of(path, Picky()) == f"{path}:2: no token" and len(read_records(path)) == 2
    novel = write("ab\x1b", name="novel.txt")
    assert message_of(novel, Picky()) == f"{novel}: no token"


def test_a_file_that_is_missing_is_refused_with_what_would_do(tmp_path):
    message = message_of(tmp_path / "absent.jsonl")
    assert "absent.jsonl: no such data file or folder; use a .jsonl, " in message and message.endswith(
        ", ".join(BUILT_IN)
    )
    (tmp_path / "link.csv").symlink_to("gone.csv")
    assert message_of(tmp_path / "link.csv").endswith("link.csv: a link to gone.csv, which is not there")
    assert "-: rows are read from a file, and not from a pipe: save them" in message_of("-")
    with pytest.raises(DataError, match=r"[^\n]*: a folder, and a file is needed: name one of link.csv$"):
        read_prompts(tmp_path)
    with pytest.raises(DataError, match="absent.jsonl: no such data file"):
        sha256_of_data(tmp_path / "absent.jsonl")
