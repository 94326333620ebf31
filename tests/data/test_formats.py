"""Everybody's data: each format of a conversation, each kind of file, and the error for each kind of mistake."""

import csv
import gzip
import json
import math
import os
import re
import shlex
import tracemalloc
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from modelfiles import TALK

import minilora as ml
from minilora.data.formats import FORMATS, NAMES, listed
from minilora.data.prompts import read_prompts
from minilora.data.records import DataError, Record, read_records, read_source
from minilora.data.rows import dialect_of, read_rows

ASK, TELL = "What is a lien?", "A claim on property,\nheld until a debt is paid."
ASKED = ({"role": "user", "content": ASK}, {"role": "assistant", "content": TELL})
SYSTEM = {"role": "system", "content": "Be brief."}

WAYS = {  # format: a row that asks ASK and answers TELL
    "messages": {"messages": [{"role": "user", "content": ASK}, {"role": "assistant", "content": TELL}]},
    "conversations": {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": TELL}]},
    "question/answer": {"question": ASK, "answer": TELL},
    "q/a": {"q": ASK, "a": TELL},
    "instruction/output": {"instruction": ASK, "input": "", "output": TELL},
    "instruction/response": {"instruction": ASK, "response": TELL},
    "prompt/completion": {"prompt": ASK, "completion": TELL},
    "prompt/chosen/rejected": {"prompt": ASK, "chosen": TELL, "rejected": "No idea."},
}
QA = WAYS["q/a"]
WAYS_AND_TEXT = WAYS | {"text": {"text": f"{ASK} {TELL}"}}
each_way = pytest.mark.parametrize("way", WAYS)


def jsonl(path, records, encoding="utf-8"):
    path.write_text("\n".join(map(json.dumps, records)) + "\n", encoding=encoding)


def json_list(path, records, encoding="utf-8", indent=1):
    path.write_text(json.dumps(records, indent=indent), encoding=encoding)


def table(path, records, encoding="utf-8", delimiter=","):
    """A table; lists in it are JSON."""
    plain = [{k: v if isinstance(v, str | int) else json.dumps(v) for k, v in row.items()} for row in records]
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in plain for k in row)), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(plain)


def tabs(path, records, encoding="utf-8"):
    table(path, records, encoding, "\t")


KINDS = {"jsonl": (jsonl, "JSONL"), "json": (json_list, "JSON list"), "csv": (table, "CSV"), "tsv": (tabs, "TSV")}
each_kind = pytest.mark.parametrize("suffix", KINDS)


def message_of(source, **settings):
    with pytest.raises(DataError) as caught:
        read_records(source, **settings)
    return str(caught.value)


# -- formats -----------------------------------------------------------------------------------------------------------


@each_way
@each_kind
def test_every_format_in_every_kind_of_file_gives_the_same_messages(tmp_path, way, suffix):
    write, kind = KINDS[suffix]
    path = tmp_path / f"data.{suffix}"
    write(path, [WAYS[way], WAYS[way] | {"topic": "law"}])
    reading = read_source(path)
    assert [record.messages for record in reading.records] == [ASKED, ASKED]
    assert (reading.formats, reading.files) == ({way: 2}, {path: kind})
    assert set(reading.unread) == {"topic"}
    assert sorted(WAYS_AND_TEXT) == sorted(k.name for k in FORMATS if not (k.labelled or k.fields))


@each_way
def test_a_system_message_beside_a_row_comes_first_and_columns_may_have_other_names(tmp_path, way):
    jsonl(tmp_path / "data.jsonl", [WAYS[way] | {"system": "Be brief."}, WAYS[way] | {"system": ""}])
    first, second = read_records(tmp_path / "data.jsonl")
    assert first.messages == (SYSTEM, *ASKED) and second.messages == ASKED
    table(tmp_path / "data.csv", [{f"my {name}": value for name, value in WAYS[way].items()}])
    field = {name: f"my {name}" for name in WAYS[way]}
    assert [record.messages for record in read_records(tmp_path / "data.csv", field=field)] == [ASKED]


TURNS = [
    {"from": "system", "value": "Be brief."},
    {"from": "user", "value": ASK},
    {"role": "model", "content": [{"type": "text", "text": TELL}], "weight": 1},
    {"role": "human", "content": "And?"},
    {"from": "gpt", "value": "No more."},
]
AND = ({"role": "user", "content": "And?"}, {"role": "assistant", "content": "No more."})
ROWS = [  # a row, its messages
    ({"instruction": ASK, "input": "Tag", "output": TELL}, (ASKED[0] | {"content": f"{ASK}\n\nTag"}, ASKED[1])),
    ({"conversations": TURNS, "system": "not this one"}, (SYSTEM, *ASKED, *AND)),
    ({"text": "all of it", "prompt_id": "7", "prompt": "not this"} | WAYS["messages"], ASKED),
    ({"text": "all of it"} | WAYS["instruction/output"], ASKED),
    ({"Question": "not this", **WAYS["question/answer"], "ANSWER": "nor this"}, ASKED),
    ({" QUESTION": ASK, "Answer ": TELL}, ASKED),
    ({"messages": None, "question": None, "text": None, "split": None, "id": None, "system": None, **QA}, ASKED),
]  # fmt: skip


def test_the_first_of_squads_answers_is_learned_and_a_row_without_one_left_out(tmp_path):
    rows = [{"question": ASK, "answers": {"text": said, "answer_start": [0]}} for said in ([TELL, "No."], [])]
    jsonl(tmp_path / "data.jsonl", rows)
    reading = read_source(tmp_path / "data.jsonl")
    assert [record.messages for record in reading.records] == [ASKED] and not reading.unread
    jsonl(tmp_path / "data.jsonl", [rows[0] | {"answer": "An own one."}])
    assert read_records(tmp_path / "data.jsonl")[0].messages[-1]["content"] == "An own one."


def test_conversations_in_one_text_become_a_prompt_and_two_answers(tmp_path):
    begun = f"\n\nHuman: Hi: there\n\nAssistant: Yes?\n\nHuman: {ASK}\n\nAssistant: "
    jsonl(tmp_path / "data.jsonl", [{"chosen": f"{begun}{TELL}\n\nMore.", "rejected": f"{begun}No."}])
    (record,) = read_records(tmp_path / "data.jsonl")
    said = [(message["role"], message["content"]) for message in record.messages]
    before = [("user", "Hi: there"), ("assistant", "Yes?"), ("user", ASK)]
    assert said == [*before, ("assistant", f"{TELL}\n\nMore.")] and record.rejected == "No."
    row = {"prompt": "Go on:", "chosen": f"{begun}{TELL}", "rejected": f"{begun}No."}
    jsonl(tmp_path / "data.jsonl", [row])  # with a prompt they are answers
    assert read_records(tmp_path / "data.jsonl")[0].messages[-1]["content"] == row["chosen"]
    alone = {"chosen": f"{begun}{TELL}"}
    others = "\n\nHuman: Ho\n\nAssistant: No.", "No."
    both = {"chosen": f"Note.{begun}{TELL}", "rejected": f"Note.{begun}No."}
    for row in (*({**alone, "rejected": other} for other in others), both, alone):
        jsonl(tmp_path / "data.jsonl", [row])
        with pytest.raises(DataError, match="needs a column prompt"):
            read_records(tmp_path / "data.jsonl")


TURNED = [  # what follows the question in two conversations
    (f"{TELL}\n\nAssistant: Well.\n\nHuman: So.", "No."),
    ("A\n\nAssistant: B", "A\n\nHuman: C"),
    ("A\n\nHuman: b\n\nHuman: yes", "A\n\nHuman: b\n\nHuman: no"),
]


def test_an_answer_in_one_text_may_have_turns_in_it_and_without_one_the_row_is_left_out(tmp_path):
    texts = [*TURNED, ("", "No."), (TELL, "")]
    rows = [
        {"chosen": f"\n\nHuman: {ASK}\n\nAssistant: {one}", "rejected": f"\n\nHuman: {ASK}\n\nAssistant: {other}"}
        for one, other in texts
    ]
    jsonl(tmp_path / "data.jsonl", rows)
    reading = read_source(tmp_path / "data.jsonl")
    assert [(record.messages[-1]["content"], record.rejected) for record in reading.records] == TURNED
    assert all(record.prompt == [ASKED[0]] for record in reading.records)
    assert reading.left_out == {"chosen": ["line-4"], "rejected": ["line-5"]}


def test_an_instruction_has_the_answer_that_is_there_and_a_passage(tmp_path):
    jsonl(tmp_path / "data.jsonl", [{"instruction": ASK, "output": None, "response": TELL, "context": "Liens."}])
    (record,) = read_records(tmp_path / "data.jsonl")
    assert record.messages[-1] == ASKED[-1] and record.context == "Liens."


def test_each_row_of_a_file_may_have_another_format_and_further_columns(tmp_path):
    jsonl(tmp_path / "data.jsonl", [row for row, _ in ROWS])
    assert [record.messages for record in read_records(tmp_path / "data.jsonl")] == [messages for _, messages in ROWS]
    jsonl(tmp_path / "data.jsonl", WAYS_AND_TEXT.values())
    reading = read_source(tmp_path / "data.jsonl")
    assert [record.messages or record.text for record in reading.records] == [ASKED] * len(WAYS) + [f"{ASK} {TELL}"]
    assert reading.formats == dict.fromkeys(WAYS_AND_TEXT, 1)


@pytest.mark.parametrize(
    "text",
    [
        '["claim", "debt; old"]',
        "claim; debt",
        "claim, debt",
        " claim ;debt;",
        *(f"claim{each}debt" for each in "、，،；؛"),
    ],
)
def test_keywords_may_be_a_list_in_json_or_separated_by_semicolons_or_commas(tmp_path, text):
    table(tmp_path / "data.csv", [QA | {"keywords": text}])
    assert read_records(tmp_path / "data.csv")[0].keywords == ("claim", "debt; old" if "old" in text else "debt")


def test_a_table_holds_lists_as_json_and_an_empty_cell_is_nothing(tmp_path):
    facts = {"keywords": ["claim", "debt"], "phrasings": ["A lien?"], "paraphrase": "Define lien.", "split": "test"}
    table(tmp_path / "data.csv", [QA | facts, QA])
    full, bare = read_records(tmp_path / "data.csv")
    assert (full.keywords, full.phrasings, full.paraphrase) == (("claim", "debt"), ("A lien?",), "Define lien.")
    assert full.split == "test" and bare == Record("line-4", ASKED)  # its answer has two lines, as has that of line 2


def test_the_columns_of_questions_are_not_read_beside_a_text(tmp_path):
    more = {"keywords": "dark, night", "paraphrase": "How was it?", "phrasings": "", "system": "x"}
    rows = [{"text": f"It was dark, {i}."} | more for i in range(3)]
    for suffix, (write, _) in KINDS.items():
        write(tmp_path / f"data.{suffix}", rows)
        read = read_source(tmp_path / f"data.{suffix}")
        assert [replace(record, id="") for record in read.records] == [Record("", text=row["text"]) for row in rows]
        assert {"keywords", "paraphrase", "system"} <= read.unread.keys() <= rows[0].keys()


# -- columns under other names -----------------------------------------------------------------------------------------


def test_a_field_says_which_column_is_which_and_goes_before_all_others(tmp_path):
    path = tmp_path / "data.jsonl"
    jsonl(path, [{"query": ASK, "reply": TELL, "answer": "not this", "text": "nor this", "key": 7}])
    field = {"question": "query", "answer": "reply", "id": "key"}
    assert read_records(path, field=field) == [Record("7", ASKED)]
    jsonl(path, [WAYS["messages"] | {"body": "A text."}])
    assert read_records(path, field={"text": "body"}) == [Record("line-1", text="A text.")]
    jsonl(path, [QA | {name: None for name in NAMES if name not in ("q", "a")}])
    assert read_records(path, field={"q": "q", "a": "a"}) == [Record("line-1", ASKED)]


def test_a_column_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    path = tmp_path / "data.csv"
    table(path, [{"Query": ASK, "reply": TELL}] * 30)
    for name, hint in (("q", ""), ("query", " (did you mean Query?)")):
        assert message_of(path, field={"question": name, "answer": "reply"}) == (
            f"{path}:2: field question={name}: no such column{hint}; there are Query, reply: name the right one with "
            "--field question=... (30 rows: lines 2, 4, 6, 8, 10 and 25 more)"
        )


@pytest.mark.parametrize(
    "heading", ["Ticket Nr.,Mail text,No.,topic", "How happy are you with us?,,x,label", "w,x,y,z"]
)
def test_the_columns_of_the_advice_have_the_longest_texts_and_can_be_read(tmp_path, heading):
    path = tmp_path / "data.csv"
    path.write_text(f"{heading}\n7,Where is my parcel?,,Lost\nThe eighth of today,Too late,,Found\n")
    said = message_of(path)
    assert "(2 rows: lines 2, 3)" in said and "\n" not in said  # one kind of mistake, whichever columns are longest
    assert ("is there no heading?" in said) == ("How happy" in said)
    for words in re.findall(r"--field (.*?)(?:, or| and --label| for a text| \(2 rows)", said):
        field = (
            {"label": heading.split(",")[-1]} if "and --label COLUMN for a text" in said and "text=" in words else {}
        )
        field |= dict(word.split("=") for word in shlex.split(words))
        first, _ = read_records(path, field=field)
        assert first.question.endswith("Where is my parcel?") and first.messages[-1]["content"] == "Lost"


def test_a_file_that_is_not_there_is_answered_with_the_one_beside_it(tmp_path):
    (tmp_path / "mails.csv").write_text("text\nhello\n")
    assert "mail.csv: no such data file or folder (did you mean mails.csv?)" in message_of(tmp_path / "mail.csv")
    assert "did you mean" not in message_of(tmp_path / "forms.jsonl")


def test_an_optional_column_need_not_be_in_every_row_but_in_one(tmp_path):
    path = tmp_path / "data.jsonl"
    jsonl(path, [QA, QA | {"words": ["claim"]}])
    assert [record.keywords for record in read_records(path, field={"keywords": "words"})] == [(), ("claim",)]
    assert message_of(path, field={"keywords": "worbs"}).endswith("field keywords=worbs: no row has a column 'worbs'")


@pytest.mark.parametrize(
    ("name", "column", "hint"),
    [
        ("qestion", "x", "did you mean question"),
        ("zzz", "x", "known: prompt, "),
        ("Frage", "q", "did you mean q=Frage"),
    ],
)
def test_a_field_that_minilora_does_not_read_is_refused(name, column, hint):
    with pytest.raises(ValueError, match=rf"field {name}={column}: minilora reads no '{name}' \({hint}"):
        read_records("legal", field={name: column})


# -- kinds of files ----------------------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda word: word.strip() and "\r\n" not in word
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
@given(
    st.lists(st.fixed_dictionaries({"question": words, "answer": words}), min_size=1, max_size=8),
    st.sampled_from([None, 0, 3]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_texts_come_out_of_every_kind_of_file_as_they_went_in(tmp_path, records, indent, encoding):
    for suffix, (write, _) in KINDS.items():
        path = tmp_path / f"data.{suffix}"
        write(path, records, encoding, **({"indent": indent} if suffix == "json" else {}))
        read = [{"question": r.messages[0]["content"], "answer": r.messages[1]["content"]} for r in read_records(path)]
        assert read == records, suffix


def test_lines_that_end_as_on_windows_end_as_everywhere_and_a_byte_order_mark_is_no_text(tmp_path):
    rows = [{"question": "One\r\nline?", "answer": "Two\r\n\r\nlines.", "system": "Be\r\nbrief."}]
    for suffix, (write, _) in KINDS.items():
        write(tmp_path / f"data.{suffix}", rows)
        (record,) = read_records(tmp_path / f"data.{suffix}")
        assert [m["content"] for m in record.messages] == ["Be\nbrief.", "One\nline?", "Two\n\nlines."], suffix
    (tmp_path / "novel.txt").write_bytes(b"\xef\xbb\xbfOne.\r\nTwo.\r\n")
    assert read_records(tmp_path / "novel.txt") == [Record("novel", text="One.\nTwo.\n")]


@given(name=st.text('ab ,;\t"\n', max_size=8), mark=st.sampled_from(",;\t"), quoting=st.booleans())
@example(name="A name, in\ntwo lines", mark=";", quoting=False)  # as Excel writes it
@example(name='at 5" and 7"', mark=";", quoting=True)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
def test_names_of_columns_may_have_delimiters_quotes_and_lines(tmp_path, name, mark, quoting):
    heading = ["question", "answer", f"c{name}d" if quoting else f"c\n{name}d"]  # which has quotes in any case
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=mark, quoting=csv.QUOTE_ALL if quoting else csv.QUOTE_MINIMAL).writerow(heading)
        file.write(f'"Why, Ann;"{mark}So.{mark}1\n')
    assert read_source(tmp_path / "data.csv").unread == {heading[2]: 1} and dialect_of(tmp_path / "data.csv")[0] == mark
    (tmp_path / "data.csv").write_text(f'size 5"{mark}question{mark}answer\n1{mark}Why?{mark}"So."\n')
    assert len(read_source(tmp_path / "data.csv").unread) == 1
    (tmp_path / "data.csv").write_bytes(f"\r \rquestion{mark}answer\r1, 2, 3, 4, 5;;;;{mark}So.\r".encode())
    assert dialect_of(tmp_path / "data.csv")[0] == mark


def test_spaces_around_a_heading_columns_of_nothing_and_a_line_for_excel_are_no_part_of_a_table(tmp_path):
    (tmp_path / "data.csv").write_text(
        "sep=;\n Frage ; die Antwort ;;\n\nWhy?;So.;;;;\nHow?;So.\n;;;;", encoding="utf-8"
    )
    records = read_source(tmp_path / "data.csv", field={"question": "Frage", "answer": "die Antwort"})
    assert [record.question for record in records.records] == ["Why?", "How?"] and not records.unread
    (tmp_path / "data.csv").write_text(",question,answer\n0,Why?,So.\n", encoding="utf-8")  # of a DataFrame
    assert read_source(tmp_path / "data.csv").unread == {"column 1": 1}


def test_what_begins_like_a_list_is_one_whatever_it_is_called(tmp_path):
    for name in ("data.jsonl", "data"):
        json_list(tmp_path / name, [QA] * 2)
        assert len(read_records(tmp_path / name)) == 2
    jsonl(tmp_path / "data", [QA] * 2)  # and what begins like a record, a file of records
    assert len(read_records(tmp_path / "data")) == 2
    for rows in ([QA] * 3, [{"tags": [{"x": 1}], **QA}] * 3, [{"q": "why? " * 20_000, "a": "So."}]):
        jsonl(tmp_path / "data.json", rows)
        assert len(read_records(tmp_path / "data.json")) == len(rows)


WRAPPED = [  # before and after a list of two records: is it read?
    ('{"questions": ', "}", True),
    ('{"version": 1.1, "name": "mine",\n "data": ', ', "more": [1]}', True),
    ('{"data":', "", True),
    ('{"data": [1], "records": ', "}", False),
    ('{"question": "x", "answer": "y", "sources": ', "}", False),
]


@pytest.mark.parametrize(("before", "after", "read"), WRAPPED)
def test_an_object_around_a_list_of_records_is_read_as_the_list(tmp_path, before, after, read):
    path = tmp_path / "data.json"
    path.write_text(before + json.dumps([QA, QA | {"a": 5}], indent=1) + after)
    if read:  # its second record is bad, and found where it is
        line = 1 + path.read_text()[: path.read_text().rindex("{")].count("\n")
        assert message_of(path) == f"{path}:{line}: record 2: a must be a non-empty text, got 5"
    else:
        assert message_of(path).startswith(f"{path}: one JSON object on several lines")


@pytest.mark.long
def test_a_large_file_is_read_without_holding_it_a_second_time(tmp_path):
    records = [{"question": f"{i} " * 200, "answer": f"{i}, again. " * 100} for i in range(400)]
    for suffix, (write, _) in KINDS.items():
        path = tmp_path / f"data.{suffix}"
        write(path, records, **({"indent": None} if suffix == "json" else {}))  # all in one line
        tracemalloc.start()
        read = read_records(path)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(read) == len(records) and kept > 0.9 * path.stat().st_size > 6e5
        assert peak < (2.2 if suffix == "json" else 1.5) * kept, suffix  # of a list, the text is held


@pytest.mark.parametrize("limit", [1 << 17, (1 << 31) - 1])  # Python's own, and one that another library has raised
def test_a_cell_of_a_table_may_be_as_long_as_a_text_elsewhere(tmp_path, limit):
    text = "long " * 50_000 + "end"
    table(tmp_path / "data.csv", [{"text": text}, {"text": "short"}])
    before = csv.field_size_limit(limit)
    try:
        assert [record.text for record in read_records(tmp_path / "data.csv")] == [text, "short"]
        assert csv.field_size_limit() >= limit
    finally:
        csv.field_size_limit(before)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@each_kind
def test_a_bad_row_is_named_with_the_line_it_begins_in(tmp_path, suffix):
    path, row = tmp_path / f"data.{suffix}", WAYS["question/answer"]
    KINDS[suffix][0](path, [row, row | {"split": "own"}, row | {"keywords": "[1]"}])
    lines = {"jsonl": (2, 3), "json": (6, 11), "csv": (4, 6), "tsv": (4, 6)}[suffix]
    found = message_of(path).split("\n")
    assert [line.partition(": ")[0] for line in found] == [f"{path}:{number}" for number in lines]
    assert "split is 'own'" in found[0] and "keywords must" in found[1]
    assert suffix != "json" or [line.split(": ")[1] for line in found] == ["record 2", "record 3"]


@each_kind
def test_rows_with_the_same_mistake_are_named_in_one_line(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    KINDS[suffix][0](path, [{"q": "x", "a": "y", "split": "train" if i % 3 else "x" * i} for i in range(1, 31)])
    place = {"jsonl": ":3", "json": ":12: record 3", "csv": ":4", "tsv": ":4"}[suffix]
    unit, first = "record" if suffix == "json" else "line", 4 if suffix in ("csv", "tsv") else 3
    numbers = f"{unit}s {', '.join(str(n) for n in range(first, 18, 3))}"
    message = f"{path}{place}: split is 'xxx', expected one of train, validation, test"
    assert message_of(path) == f"{message} (10 rows: {numbers} and 5 more)"


EMPTY = [None, "", " \u00a0\n", math.nan]


@pytest.mark.parametrize(  # each format, and each file with each kind of nothing
    ("way", "suffix", "empty"),
    [*((way, "jsonl", None) for way in WAYS), *product(["prompt/chosen/rejected"], KINDS, EMPTY)],
)
def test_a_row_with_nothing_in_a_needed_column_is_left_out_and_named(tmp_path, caplog, way, suffix, empty):
    path, row = tmp_path / f"data.{suffix}", {**WAYS[way], "id": "a"}
    for name in next(kind for kind in FORMATS if kind.name == way).needs:
        bare = row | {"id": "b", name: empty if suffix in ("jsonl", "json") or isinstance(empty, str) else ""}
        KINDS[suffix][0](path, [row, bare, row | {"id": "c"}])
        caplog.clear()
        reading = read_source(path)
        assert [(record.id, record.messages) for record in reading.records] == [("a", ASKED), ("c", ASKED)]
        ((column, (left,)),) = reading.left_out.items()
        assert column == name and left.endswith(("-2", "-3", "-4", "-5"))
        (line,) = [record.message for record in caplog.records]
        assert line == f"{path}: 1 of 3 rows is left out, since a needed cell is empty: {column} in {left}"
        assert read_source(path, warn=False).records == reading.records and len(caplog.records) == 1
        assert len(read_prompts(path)) == 3  # to predict for
        assert [r.id for r in read_records([row, bare, row | {"id": "c"}])] == ["a", "c"]  # rows of Python


def test_nan_of_json_is_null_as_in_a_dataframe_and_what_is_predicted_for_it_is_json(tmp_path):
    row = '{"text": "x", "n": [NaN, -Infinity], "label": NaN}'
    for name, text in (("a.jsonl", row), ("a.json", f"[\n{row}\n]")):
        (tmp_path / name).write_text(text)
        assert read_prompts(tmp_path / name)[0].row == {"text": "x", "n": [None, -math.inf], "label": None}


def test_what_is_left_out_is_named_by_the_files_own_column_and_counted(tmp_path, caplog):
    rows = [{"Body": f"text {i}", "Queue": "" if i % 3 == 2 else "ab"[i % 2]} for i in range(30)]
    table(tmp_path / "data.csv", [*rows, {"Body": "", "Queue": "a"}])
    assert len(read_records(tmp_path / "data.csv", field={"text": "Body", "label": "Queue"})) == 20
    (line,) = [record.message for record in caplog.records]
    assert line.partition(": ")[2] == (
        "11 of 31 rows are left out, since a needed cell is empty: Queue in line-4, line-7, line-10, line-13, line-16 "
        "and 5 more; Body in line-32"
    )
    table(tmp_path / "data.csv", [QA, QA | {"a": ""}, QA | {"a": ""}])
    assert len(read_records(tmp_path / "data.csv")) == 1 and "2 of 3 rows are left out" in caplog.messages[-1]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("comma", ",;\t|")
def test_a_table_may_have_any_usual_delimiter_whatever_its_ending(tmp_path, comma, suffix):
    table(path := tmp_path / f"data.{suffix}", [QA | {"n": "1,5"}], delimiter=comma)
    assert dialect_of(path)[0] == comma and read_records(path)[0].messages == ASKED
    path.write_text("text\none, two; or three\tor four | five\n")  # a column alone
    usual = {"csv": ",", "tsv": "\t"}[suffix]
    assert dialect_of(path)[0] == usual
    path.write_text(f"q{usual}a\nx{usual}1;2|3|4\n")
    assert read_records(path)[0].messages[-1]["content"] == "1;2|3|4"
    path.write_text("q;a;n, if any\nx;y;\n")
    assert dialect_of(path)[0] == ";"
    path = tmp_path / "data.tsv"
    path.write_text("q, or what, is asked\ta\nx\ty\n")  # tabs go before the others there
    assert [*next(read_rows(path)[1])[1]] == ["q, or what, is asked", "a"]


def test_columns_of_the_same_name_are_told_apart_by_their_numbers(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("q,tag,a,,tag,,tag\nwhy,x,so,,y,1,\n")
    assert [row for _, row in read_rows(path)[1]] == [
        {"q": "why", "tag (column 2)": "x", "a": "so", "tag (column 5)": "y", "column 6": "1", "tag (column 7)": None}
    ]
    assert read_records(path)[0].messages[-1]["content"] == "so"
    assert read_records(path, field={"a": "tag (column 5)"})[0].messages[-1]["content"] == "y"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "a.txt",
            "text\tlabel\na\tb\n\nc\td\n",
            "its lines have the same number of tabs, 1: if it is a table, call it",
        ),
        ("a.txt", "a\tb\nc\td\n", None),
        ("a.txt", "a\nb\nc\n", None),
        ("a.txt", "a\tb\nc\n\td\te\n", None),
        ("a.md", "a\tb\n" * 5, None),
    ],
)
def test_a_table_that_is_called_a_text_is_named(tmp_path, caplog, name, text, said):
    (tmp_path / name).write_text(text)
    read_records(tmp_path / name)
    lines = [record.message for record in caplog.records]
    assert len(lines) == (said is not None) and all(said in line for line in lines)


BROKEN = [  # a file, its content, part of the message
    ("a.json", '[{"q": "x", "a": "y"},\n]', ":2: record 2: not JSON (Expecting value): nothing after it was read"),
    ("a.json", '[\n{"q": "x", "a": "y"},\n\n{"q": "x"\n"a": "y"}]', ":5: record 2: not JSON (Expecting ',' delimiter)"),
    ("a.json", '[{"q": "x", "a": "y"}\n{"q": "x", "a": "y"}]', ":2: record 2: not JSON (expected , or ] but got {)"),
    ("a.json", '[{"q": "x", "a": "y"}\n', "not JSON (expected , or ] but got the end)"),
    ("a.json", '[{"q": "x', "not JSON (Unterminated string"),
    ("a.json", "[]", ": there is no record in it"),
    ("a.json", '{\n "data": []}', ": one JSON object on several lines, without a list of records: write"),
    ("a.json", "[1, [2]]", ":1: record 1: expected a JSON object, got int"),
    ("a.log", "# Title\n", ": what kind of file is it? Use .jsonl, .json, .csv, .tsv, .txt or .md"),
    ("a.csv", "question,answer\n", ": there is no record in it"),
    ("a.csv", "Frage;my answer\nx;3\ny;4\n", ":2: which columns are the question and the answer? There are Frage, my "
     "answer: name them, such as --field question=Frage 'answer=my answer', or --field text=Frage and --l"
     "abel COLUMN for a text with its label (2 rows: lines 2, 3)"),
    ("a.csv", "Why is it?,So.\nx,3\n", ":2: a column is called 'Why is it?': is there no heading? Put a line with n"),
    *(("a.csv", f"{each},So.\nx,3\n", f":2: a column is called '{each}': is there no heading?") for each in ("返品は？",
      "返品です。", "كم؟", "है।")),
    ("a.csv", "name\nx\n", ":2: expected columns such as question and answer, or text; there is name"),
    ("a.csv", "prompt,reply\nx,3\n", "prompt/completion needs a column completion; there are prompt, reply: name"),
    ("a.csv", "q,a\nx,y,z\n", ":2: 3 cells under a heading of 2: put a text that contains ',' in quotes"),
    ("a.csv", 'q,a\nx,"y\nz,z\n', ":2: not CSV (unexpected end of data): nothing after it was read; is a"),
    ("a.csv", "q,a,q\nx,y,z\n", ":2: q/a needs a column q; there are q (column 1), a, q (column 3): name the column"),
    ("a.csv", "Export of May\n\nq,a\nx,y\n", ":3: 2 cells under a heading of 1: put a text that contains ',' in quotes"
     "; if 'Export of May' is a title, delete what is above the names of the columns"),
    ("a.csv", "Export,,\nid,q,a\n1,x,y\n", ":2: the heading has one name, 'Export': if it is a title, delete what"),
    ("a.csv", "The export of May\nq;a\nx;y\n", "question and answer, or delete a title; or name the columns"),
    ("a.csv", 'q,a\n"say \\"x\\" now",y\n', 'is a quote left open, or one inside a text not written twice, ""?'),
    ("a.jsonl", '{"q": "x', ":1: not JSON (Unterminated string starting at column 7)"),
    ("a.csv", "chosen,rejected\nx,y\n", "prompt/chosen/rejected needs a column prompt; there are chosen, rejected: n"),
    ("a.csv", "prompt,chosen,rejected\nx,y,y\n", ":2: chosen and rejected are the same answer ('y'): there is nothing"),
    ("a.csv", "prompt,chosen,rejected\nx,y,\n", ":2: rejected must be a non-empty text, got nothing (an empty cell"),
    ("a.jsonl", '{"prompt": [], "chosen": "y", "rejected": "z"}', "the last message of the prompt must be the user's"),
    ("a.jsonl", '{"prompt": "x", "chosen": [{"role": "user", "content": "y"}], "rejected": "z"}', "chosen must be a"),
    ("a.csv", f"chosen,rejected\n\"{[*ASKED]}\",x\n", 'chosen must be a list in JSON, such as ["...", "..."], got '),
    ("a.jsonl", json.dumps({"chosen": [*ASKED], "rejected": [SYSTEM, *ASKED]}), "the same up to the last message"),
    ("a.jsonl", json.dumps({"chosen": ASKED, "rejected": [ASKED[0] | {"content": "x"}, ASKED[1]]}), "both answer one"),
    ("a.jsonl", json.dumps({"input": {"messages": ASKED[:1]}, "preferred_output": ASKED[1:]}), "a column rejected"),
    ("a.jsonl", json.dumps({"input": {}, "preferred_output": "y", "non_preferred_output": "z"}), "prompt must be a"),
    ("a.jsonl", '{"instruction": "x", "input": {"messages": []}, "output": "y"}', "input must be a non-empty text"),
    ("a.jsonl", '{"prompt": "x", "completion": []}', "completion must be a text, or a list that ends with the assis"),
    ("a.jsonl", '{"prompt": "x", "completion": 5}', "completion must be a non-empty text, got 5"),
    ("a.csv", "q,a\nx\n", ":2: a must be a non-empty text, got nothing (an empty cell, or null): fill it, or del"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}',
     ":1: message 2 calls tools, which cannot be trained here"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]}',
     ":1: the last answer has the weight 0, so nothing learns it: leave it out, with its question"),
    ("a.jsonl", json.dumps({"messages": [ASKED[0], ASKED[1] | {"weight": 0.5}]}),
     ":1: the weight of message 2 must be 0 (an answer that is not learned) or 1, got 0.5"),
    ("a.csv", "q,a,keywords\nx,y,[claim\n", """:2: keywords must be a list in JSON, such as ["...", "..."]"""),
    ("a.jsonl", '{"q": "x", "a": "y"}\n{"q": "x", "a" "y"}\n', ":2: not JSON (Expecting ':' delimiter at column 16)"),
    ("a.jsonl", "\ufeff\n \n", ": the file is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "reason"), BROKEN, ids=[reason[:40] for *_, reason in BROKEN])
def test_a_broken_file_is_answered_with_the_place(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content, encoding="utf-8")
    line = message_of(tmp_path / name).split("\n")[0]
    assert line.startswith(f"{tmp_path / name}") and reason in line


@pytest.mark.timeout(60)  # each column was compared with each: ten minutes
def test_a_heading_of_very_many_columns_is_read_in_no_time(tmp_path):
    path, names = tmp_path / "a.csv", [f"column {i}" for i in range(150_000)]
    path.write_text(f"{','.join(names)}\nx\n", encoding="utf-8")
    ((_, row),) = read_rows(path)[1]
    assert [*row] == names


FOREIGN = [  # the first bytes, the message
    (gzip.compress(b'{"q": "x", "a": "y"}'), "compressed with gzip: decompress it first"),
    (b"PAR1\x15\x04", "a Parquet file"),
    (b"PK\x03\x04\x14\x00", "a zip archive or a file of an office program: unpack it, or save it as CSV"),
    (b"BZh91AY", "compressed with bzip2"),
    (b"%PDF-1.7", "a PDF: save its text as .txt first"),
    (
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "a file of an older office program, such as .xls or .msg: save it as CSV UTF-8",
    ),
    (b"SQLite format 3\0", "an SQLite database: save a table of it as CSV"),
    (b"", "the file is empty"),
    (b'{"q": "\xe4"}', "cannot be read as UTF-8 text ("),
    ("q,返品".encode("cp932"), "cannot be read as UTF-8 text ("),
    ("q,a\n返品,x".encode("iso2022_jp"), "in ISO-2022-JP, as Japanese mail is: save it as UTF-8"),
    ("question".encode("utf-16-le"), "UTF-16 without a byte order mark, or no text: save it as UTF-8"),
    ("question".encode("utf-16-be"), "UTF-16 without a byte order mark, or no text: save it as UTF-8"),
]


@pytest.mark.parametrize(("content", "reason"), FOREIGN, ids=[reason[:20] for _, reason in FOREIGN])
def test_a_file_that_is_not_text_is_answered_with_what_to_do(tmp_path, content, reason):
    for name in ("my data.jsonl", "my data.json", "my data.csv", "my data.txt"):
        (tmp_path / name).write_bytes(content)
        line = message_of(tmp_path / name)
        assert line.startswith(f"{tmp_path / name}: {reason}") and "\n" not in line


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such file")
def test_a_device_which_may_have_no_end_is_not_read(tmp_path):
    (tmp_path / "own.csv").symlink_to(os.devnull)  # as it might be a pipe, or /dev/zero
    assert (
        message_of(tmp_path / "own.csv") == f"{tmp_path / 'own.csv'}: a pipe or a device: save its rows in a file first"
    )


# -- folders -----------------------------------------------------------------------------------------------------------


def test_of_a_list_only_what_is_left_out_is_counted():
    assert [listed("abcd", most) for most in (3, 4)] == ["a, b, c and 1 more", "a, b, c, d"]


def test_the_files_of_a_folder_are_its_splits_and_may_be_of_different_kinds(tmp_path):
    jsonl(tmp_path / "train.jsonl", [QA] * 12)
    table(tmp_path / "valid.csv", [WAYS["question/answer"]] * 2)
    json_list(tmp_path / "test.json", [WAYS["messages"] | {"id": "own"}])
    (tmp_path / "README.md").write_text("# Mine")
    (tmp_path / ".hidden").write_text("")
    (tmp_path / "valid").mkdir()
    reading = read_source(tmp_path)
    sizes = {name: len(part) for name, part in ml.split_records(reading.records).items()}
    assert sizes == {"train": 12, "validation": 2, "test": 1}
    assert [path.name for path in reading.files] == ["train.jsonl", "valid.csv", "test.json"]
    assert [reading.records[i].id for i in (0, 11, 12, 13, 14)] == [
        "train/line-1", "train/line-12", "validation/line-2", "validation/line-4", "own",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "Validation"])
def test_validation_has_many_names_and_files_may_be_texts(tmp_path, name):
    for stem in ("train", name):
        (tmp_path / f"{stem}.txt").write_text(f"This is {stem}.")
    assert read_records([QA | {"split": f"{name} "}])[0].split == "validation"
    train, validation = Record("train", text="This is train."), Record(name, text=f"This is {name}.")
    assert read_records(tmp_path) == [replace(train, split="train"), replace(validation, split="validation")]


def test_a_folder_of_texts_has_a_record_for_each_and_other_folders_have_none(tmp_path):
    for i in range(10):
        (tmp_path / f"mail{i}.{'md' if i % 2 else 'TXT'}").write_text(f"Mail {i}.")
    records = read_records(tmp_path)
    assert records == [Record(f"mail{i}", text=f"Mail {i}.") for i in range(10)]
    assert [len(part) for part in ml.split_records(records).values()] == [8, 1, 1]
    (tmp_path / "mail.eml").write_text("")
    assert ", or has .txt and .md files alone, a text each; there are mail.eml, mail0" in message_of(tmp_path)


def test_an_empty_file_of_a_folder_of_texts_is_left_out_and_one_that_is_a_split_is_refused(tmp_path, caplog):
    (tmp_path / "b.md").write_text(" \n")
    assert "b.md: the file is empty" in message_of(tmp_path)
    for name, text in (("a.md", "One."), ("c.txt", "Two."), ("d.txt", "")):
        (tmp_path / name).write_text(text)
    assert [record.id for record in read_records(tmp_path)] == ["a", "c"]
    assert caplog.messages == [f"{tmp_path / name}: the file is empty, and is left out" for name in ("b.md", "d.txt")]
    (tmp_path / "train.txt").write_text("One.")
    (tmp_path / "valid.txt").write_text("")
    assert "valid.txt: the file is empty" in message_of(tmp_path)


def test_columns_that_are_not_read_are_named_in_their_order_unless_they_are_empty(tmp_path):
    names = [f"column-{i}" for i in range(9)]
    table(tmp_path / "data.csv", [QA | dict.fromkeys(names, "x") | {"empty": ""}])
    assert list(read_source(tmp_path / "data.csv").unread) == names


def test_a_folder_without_train_is_answered_with_what_is_there(tmp_path):
    assert message_of(tmp_path).endswith(", a text each; there are no files")
    for name in ("a.csv", "test.jsonl", "train.jsonl.gz", ".hidden", "desktop.ini"):
        (tmp_path / name).write_text("")
    line = message_of(tmp_path)
    assert line.startswith(f"{tmp_path}: a folder of data needs train.jsonl (or .json, .csv, .tsv, .parquet, .txt, ")
    assert line.endswith("there are a.csv, test.jsonl, train.jsonl.gz")


def test_two_files_for_one_split_and_a_record_that_contradicts_its_file_are_refused(tmp_path):
    for name in ("train", "val"):
        jsonl(tmp_path / f"{name}.jsonl", [QA | {"split": "train"}, QA | {"split": "test"}])
    assert message_of(tmp_path).split("\n") == [
        f"{tmp_path / 'train.jsonl'}:2: split is 'test' in a file of the split 'train'",
        f"{tmp_path / 'val.jsonl'}:1: split is 'train' in a file of the split 'validation' (2 rows: lines 1, 2)",
    ]
    jsonl(tmp_path / "valid.csv", [QA])
    assert message_of(tmp_path) == f"{tmp_path}: val.jsonl and valid.csv are both for validation: keep one of them"


@given(
    said=st.lists(st.text("abc", min_size=1), min_size=4, max_size=8, unique=True),
    system=st.booleans(),
    keys=st.sampled_from([("role", "content"), ("content", "role"), ("from", "value"), ("value", "from")]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
def test_preferences_and_completions_in_all_forms_of_trl_are_the_same_records(tmp_path, said, system, keys):
    *asked, chosen, rejected = said[: len(said) - (len(said) + 1) % 2]  # an odd number of turns before two answers
    prompt = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(asked)]
    prompt = [SYSTEM, *prompt] if system else prompt
    one, other = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    whole = {"chosen": prompt + one, "rejected": prompt + other}
    forms = [
        {"prompt": prompt, "chosen": one, "rejected": other},
        {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        whole,
        whole | {"prompt": asked[-1], "messages": prompt + one},  # as in UltraFeedback
        {
            "input": {"messages": prompt, "tools": []},
            "preferred_output": one,
            "non_preferred_output": other,
        },  # OpenAI's
        {"prompt": prompt, "completion": one},
        {"prompt": prompt, "completion": chosen},
        {"messages": [turn | {"tool_calls": None} for turn in prompt + one]},  # as datasets writes it
    ]
    jsonl(tmp_path / "data.jsonl", forms)
    reading = read_source(tmp_path / "data.jsonl")
    records = reading.records
    assert "input" not in reading.unread
    assert [record.messages for record in records] == [(*prompt, *one)] * len(forms)
    assert [record.rejected for record in records] == [rejected] * 5 + [None] * 3
    for form, record in zip(forms, records, strict=True):
        if "input" not in form:
            named = {name: "role" if name in ("role", "from") else "content" for name in keys}
            turns = lambda one, named=named: {name: one[named[name]] for name in named} if "role" in one else one
            table(tmp_path / "data.csv", [json.loads(json.dumps(form), object_hook=turns)])  # with lists as JSON
            (same,) = read_records(tmp_path / "data.csv")
            assert (same.messages, same.rejected) == (record.messages, record.rejected)
            (asked_alone,) = read_prompts(tmp_path / "data.csv")
            assert asked_alone.messages == prompt
    jsonl(tmp_path / "data.jsonl", [{"prompt": '[{"id": 1}]', "completion": '["role"]'}])  # texts
    assert [m["content"] for m in read_records(tmp_path / "data.jsonl")[0].messages] == ['[{"id": 1}]', '["role"]']
    jsonl(tmp_path / "data.jsonl", [{"good": whole["chosen"], "bad": whole["rejected"]}])
    (renamed,) = read_records(tmp_path / "data.jsonl", field={"chosen": "good", "rejected": "bad"})
    assert (renamed.messages, renamed.rejected) == (records[0].messages, rejected)


@given(said=st.lists(st.text("abc", min_size=1), min_size=2, max_size=6, unique=True), at=st.integers(1, 5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
def test_a_conversation_is_the_same_wherever_it_is_divided_in_prompt_and_answer(tmp_path, said, at):
    talk = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said[: len(said) // 2 * 2])
    ]
    prompt, answer = talk[: min(at, len(talk) - 1)], talk[min(at, len(talk) - 1) :]
    other = [*answer[:-1], {"role": "assistant", "content": "other"}]
    rows = [{"prompt": prompt, "completion": answer}, {"prompt": prompt, "chosen": answer, "rejected": other}]
    rows += [{"prompt": prompt, "completion": prompt + answer}]  # with the prompt in both
    jsonl(tmp_path / "data.jsonl", rows)
    assert [list(record.messages) for record in read_records(tmp_path / "data.jsonl")] == [talk] * 3


def test_what_messages_have_besides_is_named_unless_it_is_empty(tmp_path):
    empty = {"name": None, "tool_calls": [], "reasoning_content": "", "extra": {}, "weight": 1}
    rows = [{key: [dict(turn) | empty for turn in ASKED]} for key in ("messages", "conversations")]
    rows += [{"prompt": [dict(ASKED[0]) | empty], "completion": [dict(ASKED[1]) | empty]}]
    jsonl(tmp_path / "data.jsonl", rows)
    assert read_source(tmp_path / "data.jsonl").notes() == []
    for row in rows:
        for turns in row.values():
            turns[-1]["reasoning_content"] = "Liens are claims."  # which Qwen3's template would render
    rows[0]["messages"][0]["train"] = False
    jsonl(tmp_path / "data.jsonl", rows)
    reading = read_source(tmp_path / "data.jsonl")
    assert reading.unread == {"reasoning_content of messages": 3, "train of messages": 1}
    assert reading.notes() == ["not read: train of messages in 1 record, reasoning_content of messages in 3 records"]


def as_sharegpt(talk):
    return [{"from": turn["role"], "value": turn["content"]} for turn in talk]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("tail", [TALK[1:2], TALK[:2], TALK[1:2] * 2], ids=["user", "system", "two"])
def test_what_nobody_has_answered_at_the_end_of_a_conversation_is_left_out_and_named(tmp_path, suffix, tail):
    path = tmp_path / f"data.{suffix}"
    rows = [{"messages": TALK}, {"messages": TALK + tail}, {"conversations": as_sharegpt(TALK + tail)}]
    rows += [{"prompt": TALK[:2], "completion": TALK[2:] + tail}]
    for row in rows:
        KINDS[suffix][0](
            path, [{name: turns if suffix == "jsonl" else json.dumps(turns) for name, turns in row.items()}]
        )
        reading = read_source(path)
        assert [list(record.messages) for record in reading.records] == [TALK]
        assert reading.unread == ({"messages after the last answer": 1} if row is not rows[0] else {})


@pytest.mark.parametrize("empty", [None, "", " \n"], ids=repr)
@pytest.mark.parametrize("at", range(len(TALK)))
def test_a_conversation_with_nothing_in_a_message_is_left_out_and_one_without_a_system_prompt_is_not(
    tmp_path, caplog, at, empty
):
    talk = [turn if i != at else turn | {"content": empty} for i, turn in enumerate(TALK)]
    for row in ({"messages": talk}, {"conversations": as_sharegpt(talk)}):
        caplog.clear()
        jsonl(tmp_path / "data.jsonl", [{"messages": TALK}, row])
        found = [list(record.messages) for record in read_records(tmp_path / "data.jsonl")]
        assert found == [TALK, *[TALK[1:]] * (at == 0)]  # an empty column `system` is none, either
        key = "content" if "messages" in row else "value"
        left = f"1 of 2 rows is left out, since a needed cell is empty: {key} in line-2"
        assert [message.partition(": ")[2] for message in caplog.messages] == [left] * (at > 0)


@each_way
def test_a_row_whose_columns_are_all_empty_is_told_what_they_need(tmp_path, way):
    jsonl(tmp_path / "data.jsonl", [dict.fromkeys(WAYS[way])])
    needed = next(kind for kind in FORMATS if kind.name == way).needs[0]
    line = message_of(tmp_path / "data.jsonl")
    assert f"data.jsonl:1: {needed} must be " in line and line.count("\n") == 0
