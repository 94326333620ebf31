"""Data with fields: which schemas are understood, how rows become prompts and answers, and what is refused."""

import json
import re
import warnings
from contextlib import suppress
from enum import Enum
from itertools import product
from typing import Literal

import pytest
from commandline import complaint
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.cli import main
from minilora.data.fields import FieldTask, borders, characters_of, is_copy, kind_of, numbers_in, read_schema
from minilora.data.records import read_source
from minilora.data.rows import DataError

SCHEMA = {
    "type": "object",
    "properties": {"item": {"type": ["string", "null"]}, "price": {"type": "number"}, "kind": {"enum": ["new", "old"]}},
}
ROWS = [
    {"text": f"item{i} costs {i}.5, it is {kind}", "fields": {"kind": kind, "price": i + 0.5, "item": f"item{i}"}}
    for i in range(10)
    for kind in ("new", "old")
]


def data(path, rows=ROWS, schema=SCHEMA):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    if schema is not None:
        path.with_name(f"{path.stem}.schema.json").write_text(json.dumps(schema))
    return path


def test_rows_become_prompts_that_name_the_fields_and_json_in_the_order_of_the_schema(tmp_path):
    reading = read_source(data(tmp_path / "own.jsonl"))
    first = reading.records[0]
    asked = "Extract these fields as JSON: item, price, kind (new, old).\n\nMessage: item0 costs 0.5, it is new"
    assert [m["content"] for m in first.messages] == [asked, '{"item":"item0","price":0.5,"kind":"new"}']
    assert reading.task.copied == ("item", "price") and reading.formats == {"text/fields": 20}
    assert reading.task.text(asked) == ROWS[0]["text"]


def test_the_schema_may_be_given_and_the_fields_be_json_in_a_table(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA))
    table = tmp_path / "own.csv"
    table.write_text('body,json,price,kind\n"a new one, 5","{""kind"": ""new"", ""price"": 5}",6,old\n')
    reading = read_source(table, field={"text": "body", "fields": "json"}, schema=tmp_path / "s.json")
    assert reading.records[0].messages[-1]["content"] == '{"item":null,"price":5,"kind":"new"}'
    assert reading.task.copied == ()  # one value is no evidence


def test_fields_in_columns_of_their_own_are_the_same_records(tmp_path):
    whole = read_source(data(tmp_path / "whole.jsonl"))
    rows = [{"text": row["text"], **row["fields"]} for row in ROWS]
    apart = read_source(data(tmp_path / "own.jsonl", rows))
    assert (apart.records, apart.task, apart.unread) == (whole.records, whole.task, {})
    both = [row | {"price": 0, "kind": "old"} for row in ROWS]
    assert read_source(data(tmp_path / "both.jsonl", both)).records == whole.records
    (tmp_path / "own.schema.json").unlink()
    for stored in ([], [whole.task]):  # an adapter knows the columns that it was trained on
        reading = read_source(tmp_path / "own.jsonl", stored=stored)
        assert reading.task == (stored or [None])[0] and (reading.records == whole.records) == bool(stored)
    labels = read_source(tmp_path / "own.jsonl", field={"label": "kind"}, stored=[whole.task])
    assert labels.task.labels == ("new", "old")


@pytest.mark.parametrize("change", [str.upper, str.title, " {} ".format])
def test_columns_of_fields_are_found_whatever_their_case_and_white_space_around_a_cell_does_not_count(tmp_path, change):
    whole = read_source(data(tmp_path / "whole.jsonl"))
    rows = [{"text": row["text"]} | {change(name): f" {x} " for name, x in row["fields"].items()} for row in ROWS]
    apart = read_source(data(tmp_path / "own.jsonl", rows))
    assert (apart.records, apart.task, apart.unread) == (whole.records, whole.task, {})
    exact = [row | {"ITEM": "other", "Kind": "x"} for row in ROWS]  # next to those of the field's own name
    for i, row in enumerate(exact):
        exact[i] = row | row.pop("fields")
    assert read_source(data(tmp_path / "exact.jsonl", exact)).records == whole.records
    two = {"type": "object", "properties": {name: {"type": ["string", "null"]} for name in ("item", "Item")}}
    (record,) = read_source(data(tmp_path / "two.jsonl", [{"text": "x", "Item": "a"}], two)).records
    assert record.fields == {"Item": "a"}
    text = {"type": "object", "properties": {"Text": {"type": ["string", "null"]}, **SCHEMA["properties"]}}
    (record, *_) = read_source(data(tmp_path / "text.jsonl", rows, text)).records  # the message is no field
    assert record.fields == whole.records[0].fields and record.question.endswith(ROWS[0]["text"])


def test_a_field_that_no_record_fills_is_named_and_a_missing_column_is(tmp_path, caplog):
    rows = [{"text": row["text"], **row["fields"]} for row in ROWS]
    for change in ({"item": "article"}, {"price": "cost", "item": "article"}):
        path = data(tmp_path / "own.jsonl", [{change.get(name, name): x for name, x in row.items()} for row in rows])
        caplog.clear()
        if "price" not in change:  # it may not be missing
            assert {record.fields.get("item") for record in read_source(path).records} == {None}
            (line,) = [record.message for record in caplog.records]
            assert line == f"{path}: no record has a value of item: is the column there, under that name?"
        else:
            with pytest.raises(DataError, match="or a column for each field; there is no column price$"):
                read_source(path)
    listed = {"type": "object", "properties": {"tags": {"type": "array"}, **SCHEMA["properties"]}}
    bare = [row | {"fields": row["fields"] | {"tags": []}} for row in ROWS]
    for rows in (ROWS, bare):
        assert "value of tags:" in str(read_source(data(tmp_path / "own.jsonl", rows, listed)).warnings())
    one = [*ROWS, {"text": "x", "fields": ROWS[0]["fields"] | {"tags": ["a"]}}]
    assert read_source(data(tmp_path / "own.jsonl", one, listed)).warnings() == []


def test_cells_of_a_table_are_what_the_schema_says(tmp_path):
    kinds = {
        "a": "string",
        "b": "integer",
        "c": ["number", "null"],
        "d": "boolean",
        "e": "array",
        "f": ["null", "string"],
    }
    rules = {name: {"type": kind} for name, kind in kinds.items()} | {"g": {"type": "array", "items": {"enum": [1, 2]}}}
    (tmp_path / "own.schema.json").write_text(json.dumps({"properties": rules}))
    (tmp_path / "own.csv").write_text(
        'text,a,b,c,d,e,f,g\nx,5,5,,TRUE,red; a b,,"1,2"\ny,1e3,-6,.5,0,"[""A""]",null,\n'
    )
    with pytest.raises(DataError, match=r':3: c is "\.5", the schema has number or null'):
        read_source(tmp_path / "own.csv")
    (tmp_path / "own.csv").write_text((tmp_path / "own.csv").read_text().replace(".5,0", "0.5,false"))
    found = [json.loads(record.messages[-1]["content"]) for record in read_source(tmp_path / "own.csv").records]
    assert found == [
        {"a": "5", "b": 5, "c": None, "d": True, "e": ["red", "a b"], "f": None, "g": [1, 2]},
        {"a": "1e3", "b": -6, "c": 0.5, "d": False, "e": ["A"], "f": "null", "g": []},
    ]


def test_only_training_records_decide_what_is_copied(tmp_path):
    rows = [row | {"split": "train"} for row in ROWS]
    rows += [{"text": "x", "split": "test", "fields": {"item": "not there", "price": 7, "kind": "new"}}]
    assert read_source(data(tmp_path / "own.jsonl", rows)).task.copied == ("item", "price")
    rows[-1]["split"] = "train"
    assert read_source(data(tmp_path / "own.jsonl", rows)).task.copied == ()
    for few, copied in ((5, ("item", "price")), (4, ())):
        assert read_source(data(tmp_path / "own.jsonl", ROWS[:few])).task.copied == copied


def test_the_task_of_an_adapter_is_preferred_for_its_prompt(tmp_path):
    path = data(tmp_path / "own.jsonl")
    of_schema = FieldTask.of(SCHEMA)
    stored = FieldTask(of_schema.fields, "Which? {text}", ("item",))
    other = FieldTask.of({"properties": {"x": {"type": "string"}}})
    assert read_source(path, stored=[other, stored]).task is stored
    path.with_name("own.schema.json").unlink()
    assert read_source(path, stored=[other, stored]).task is stored
    misfit = "does not fit .*: the schema has no field '.*': it has x"
    with pytest.raises(DataError, match=misfit + r"\): give one with --schema, or put it into own\.schema\.json$"):
        read_source(path, stored=[other])
    data(path, [*ROWS, {"text": "x", "fields": {"item": "x", "price": 1, "kind": "used"}}], None)
    with pytest.raises(DataError, match=f"does not fit line-{len(ROWS) + 1}: kind is .used., the schema has one of"):
        read_source(path, stored=[stored])


@given(
    st.dictionaries(
        st.sampled_from(["a", "b c", 'd"', "\u00e9"]),
        st.sampled_from([
            {"type": "string"}, {"type": ["integer", "null"]}, {"enum": [1, None, "a"]}, {"type": "boolean"},
            {"type": "array", "items": {"type": "number"}}, {"type": "string", "pattern": "^a[bc]{2}$"},
        ]),
        min_size=1,
    )
)  # fmt: skip
@settings(max_examples=40)
def test_a_task_is_the_same_when_it_was_stored(properties):
    task = FieldTask.of({"properties": properties})
    assert FieldTask.stored(json.loads(json.dumps(task.entry()))) == task
    assert all(properties[field.name].items() <= field.rule().items() for field in task.fields)


def test_optional_fields_and_enums_of_pydantic_are_the_types_that_they_stand_for():
    pydantic = pytest.importorskip("pydantic")

    class Mood(Enum):
        GOOD, BAD = "good", "bad"

    class Message(pydantic.BaseModel):
        name: str | None = pydantic.Field(None, description="of the sender")
        mood: Mood | None = None
        last: Mood = Mood.BAD
        moods: list[Mood]
        parts: list[int | None] | None
        kind: Literal["new", None, "old"] | None = None

    moods = ["good", "bad"]
    plain = {
        "name": {"type": ["string", "null"]},
        "mood": {"type": ["string", "null"], "enum": [*moods, None]},
        "last": {"type": "string", "enum": moods},
        "moods": {"type": "array", "items": {"type": "string", "enum": moods}},
        "parts": {"type": ["array", "null"], "items": {"type": ["integer", "null"]}},
        "kind": {"type": ["string", "null"], "enum": ["new", None, "old"]},
    }
    task = FieldTask.of(Message.model_json_schema())
    assert {field.name: field.rule() for field in task.fields} == plain
    assert task == FieldTask.stored(json.loads(json.dumps(task.entry()))) == FieldTask.of({"properties": plain})


def test_what_is_stored_is_checked():
    entry = FieldTask.of(SCHEMA).entry()
    assert FieldTask.stored({"name": "legal"}) is None
    for wrong in ({"template": "x"}, {"copied": ["y"]}):
        with pytest.raises(ValueError, match="needs a template that has {text}, and copies some of its fields"):
            FieldTask.stored(entry | wrong)


A_TEXT = {"type": "string"}
WHOLE = [  # a schema, what is said of it
    ([], "the schema must be that of an object"),
    ({"type": "array"}, "the schema must be that of an object"),
    ({"properties": {"a": A_TEXT}, "anyOf": []}, "'anyOf' is not supported; supported: type, properties, required, "),
    ({"properties": {}}, "needs properties"),
    *((wrong, 'needs properties: an object with at least one field, as in {"type": "object", "prop') for wrong in
      ({"a": "string"}, {"a": "Ann", "b": 3.5}, {"name": "x", "schema": {}})),
    ({"properties": {"a": A_TEXT}, "$defs": []}, "$defs must be an object of rules, got []"),
    *(({"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": rule}}, said) for rule, said in (
        ({"$ref": "#/$defs/A"}, "a: $ref must name one of $defs, which refer to no others"),
        ({"type": "object", "properties": {}}, "a: the type 'object' is not supported: only one level is"))),
    ({"properties": {"a": {"$ref": ["A"]}}, "$defs": {"A": {}}}, "a: $ref must name one of $defs"),
    ({"properties": {"a": {"$ref": "#/$defs/A"} | A_TEXT}, "$defs": {"A": {}}}, "or $ref or anyOf alone"),
    *(({"properties": {f"a{i}": {"$ref": "#/$defs/A"} for i in range(40)}, "$defs": {"A": rule}}, "is too large")
      for rule in ({"enum": ["x" * 99, "y" * 999]}, {"type": ["string", "null"], "pattern": "^[ -~]{999}$"},
                   {"type": "array", "items": {"type": "string", "pattern": "^a{400}$"}})),
    ({"properties": {f"a{i}": {"type": ["string", "number", "integer", "boolean"]} for i in range(400)}},
     "the schema is too large: it allows more than 32,768 characters of names, choices and patterns"),
    ({"properties": {"a" * 32768: A_TEXT}}, "is too large"),
    ({"properties": {"a": A_TEXT}, "required": ["b"]}, "'b' is required and is none of the properties"),
    ({"properties": {"a": A_TEXT}, "required": [["a"]]}, "is required and is none of the properties"),
    ({"properties": {"a": A_TEXT}, "required": True}, "required must be a list of names, got True"),
]  # fmt: skip
RULES = [  # the rule of the field a, what is said of it
    ({"type": "object"}, "only one level is: put its properties into the schema itself"),
    ({"$ref": "#/x"}, "a: $ref must name one of $defs, which refer to no others, got '#/x'"),
    ({"anyOf": 5}, "a: 'anyOf' is not supported, except of one type and"),
    ({"anyOf": [{"type": "null"}, {"type": "null"}]}, "a: 'anyOf' is not supported, except"),
    ({"anyOf": [A_TEXT] * 2}, "a: 'anyOf' is not supported, except of one type"),
    ({"anyOf": [A_TEXT]}, "a: 'anyOf' is not supported, except of one type"),
    ({"anyOf": [{"minLength": 2}, {"type": "null"}]}, "a: 'minLength' is not supported"),
    (A_TEXT | {"minLength": 2}, "a: 'minLength' is not supported"),
    (A_TEXT | {"format": "date"}, "'format' is not supported: write a pattern, such"),
    ({"const": "x", "enum": ["x"]}, "a: 'const' is not supported; supported: type, enum"),
    (A_TEXT | {"const": 5}, "a: the choice 5 is not of the type string"),
    ({"const": {}}, "a: the type 'object' is not supported: only one level is"),
    ({"const": ["x"]}, "a needs a type other than null, or an enum"),
    ({"type": "text"}, "a: the type 'text' is not supported; supported: string, number"),
    (5, "a must be an object such as"),
    ({"type": "null"}, "a needs a type other than null"),
    ({"type": 5}, "a: type must be a text or a list of texts, got 5"),
    ({}, "a needs a type other than null, or an enum"),
    (A_TEXT | {"enum": []}, "a needs a type other than null, or an enum"),
    ({"enum": "ab"}, "a: enum must be a list, got 'ab'"),
    (A_TEXT | {"enum": ["x", 5]}, "a: the choice 5 is not of the type string"),
    ({"type": "array", "items": {"type": "array"}}, "a: a list of lists is not supported"),
    ({"type": "array", "items": {"type": "object"}}, "the schema itself, each as a list"),
    (A_TEXT | {"pattern": "^a+$"}, "a: the pattern '^a+$' is not supported"),
    (A_TEXT | {"pattern": "a"}, "a: the pattern 'a' is not supported"),
    *((A_TEXT | {"pattern": wrong}, "is not supported; supported: up to 1000") for wrong in (
        "^[z-a]$", "^[[]$", "^[a&&b]$", "^[+--]$", r"^[\p]$", "^a{999}b{2}$", f"^{'a{999}' * 99999}$", [], None)),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "said"), [*WHOLE, *(({"properties": {"a": rule}}, said) for rule, said in RULES)])
def test_a_schema_that_is_not_supported_is_refused_in_one_line(schema, said, tmp_path, capsys):
    with pytest.raises(ValueError) as error:
        FieldTask.of(schema)
    assert said in str(error.value) and "\n" not in str(error.value)
    if isinstance(schema, dict):
        path = data(tmp_path / "own.jsonl", schema=schema)
        assert main(["data", str(path), "--base", "tiny"]) == 1
        assert complaint(capsys).startswith(f"{tmp_path / 'own.schema.json'}: ")


@given(st.text(max_size=9) | st.integers(-99, 99) | st.booleans(), st.booleans())
@settings(max_examples=25)
def test_const_is_an_enum_of_one_value(value, typed):
    title = {"title": "A"} | ({"type": kind_of(value)} if typed else {})
    one, same = title | {"const": value}, title | {"enum": [value]}
    for wrap in (lambda rule: rule, lambda rule: {"anyOf": [rule, {"type": "null"}]}):
        assert FieldTask.of({"properties": {"a": wrap(one)}}) == FieldTask.of({"properties": {"a": wrap(same)}})
    named = {"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": one}}
    assert FieldTask.of(named) == FieldTask.of({"properties": {"a": same}})
    assert one["const"] == value  # a caller's schema stays as it is


@given(st.text("a[&~|-^+\\d]", max_size=7))
def test_no_pattern_makes_python_warn(inside):
    re.purge()  # a pattern warns once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with suppress(ValueError):
            characters_of(f"^[{inside}]$")
            re.compile(f"[{inside}]")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a", "fields": {"price": "5", "kind": "new"}}], ':1: price is "5", the schema has number'),
        (
            [{"text": "a", "fields": {"price": "1.200,50", "kind": "new"}}],
            ':1: price is "1.200,50", the schema has number, written with a decimal point',
        ),
        (
            [{"text": "a", "fields": {"price": 5, "kind": "1,5"}}],
            ':1: kind is "1,5", the schema has one of "new", "old"',
        ),
        (
            [{"text": "a", "fields": {"price": 5}}],
            ':1: kind is missing, the schema has one of "new", "old": allow null there if texts may lack it',
        ),
        (
            [{"text": "a", "fields": {"price": None, "kind": "new"}}],
            ":1: price is null, the schema has number: allow nu",
        ),
        (
            [{"text": "a", "fields": {"price": 5, "kind": "ne\u0301w"}}],
            r':1: kind is "ne\u0301w", the schema has one of "new", "old"',
        ),
        ([{"text": "a", "fields": {"cost": 5}}], ":1: the schema has no field 'cost': it has item, price, kind"),
        ([{"text": "a", "fields": None}], ":1: fields must be a JSON object, got nothing (an empty cell, or null)"),
        ([{"text": "a", "fields": "x"}], ":1: fields must be a JSON object with the fields of the text, got 'x'"),
        ([{"text": "a", "fields": {}}], ":1: fields must be a JSON object with the fields of the text, got {}"),
        ([{"text": "", "fields": {"price": 5, "kind": "new"}}], ":1: text must be a non-empty text"),
        ([*ROWS, {"text": "no fields here"}], "no fields for 1 of 21 records (line-21)"),
        (
            [{"text": "a", "item": "b"}],
            'no row has them: write {"text": "...", "fields": {"item": "...", "price": 1.5, "kind": "new"}}, or a c',
        ),
        ([{"text": "a", "price": 5, "kind": "big"}], ':1: kind is "big", the schema has one of "new"'),
    ],
)
def test_rows_that_contradict_the_schema_are_refused_with_their_line(rows, said, tmp_path):
    with pytest.raises(DataError) as error:
        read_source(data(tmp_path / "own.jsonl", rows))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert ("decimal" in said) == ("decimal" in str(error.value))


def test_with_a_schema_the_fields_are_read_and_rows_that_have_labels_alone_are_refused(tmp_path):
    both = [one | {"label": f"kind {i % 2}"} for i, one in enumerate(ROWS)]
    (tmp_path / "both").mkdir()
    reading, alone = read_source(data(tmp_path / "both" / "own.jsonl", both)), read_source(data(tmp_path / "own.jsonl"))
    assert reading.task == alone.task and [one.messages for one in reading.records] == [
        one.messages for one in alone.records
    ]
    assert reading.unread["label"] == len(ROWS)
    labels = [{"text": one["text"], "label": one["label"]} for one in both]
    for rows, field in ((labels, None), (both, {"label": "label"})):  # who names the labels wants them
        with pytest.raises(DataError, match="a schema is for rows with a text and its fields, and no row has them"):
            read_source(data(tmp_path / "own.jsonl", rows), field=field)


def test_a_file_that_is_no_schema_is_refused_in_one_line(tmp_path):
    path = tmp_path / "s.json"
    path.write_text("\ufeff" + json.dumps(SCHEMA), encoding="utf-8")  # as Notepad may write it
    assert read_schema(path) == FieldTask.of(SCHEMA)
    for text, said in (("{", "not readable as JSON"), ("[]", "expected a JSON object"), ("{}", "needs properties")):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_schema(path)
    with pytest.raises(ValueError, match="no such file"):
        read_schema(tmp_path / "none.json")


def test_without_columns_of_fields_a_text_is_a_text(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"text": "one"}\n{"text": "two"}')
    reading = read_source(tmp_path / "own.jsonl")
    assert reading.task is None and [record.text for record in reading.records] == ["one", "two"]


@pytest.mark.parametrize(
    ("value", "text", "copied"),
    [
        ("tent", "my tent!", True), ("ten", "my tent", False), ("ent", "my tent", False), ("my", "my tent", True),
        (" my", "my tent", False), ("", "my", False), ("a-b", "(a-b)", True), ("x.", "x. y", True),
        ("ab", "aab ab", True), (5, "5 of 10", True), (1, "5 of 10", False), (1200, "for 1,200", True),
        (1200.5, "1,200.50 it was", True), (200, "for 1,200", False), (12, "in 12,13", True),
        (1234567, "no. 1234567", True),
    ],
)  # fmt: skip
def test_a_copy_is_whole_words_or_a_number(value, text, copied):
    assert is_copy(value, text) == copied


@given(st.text(max_size=6))
def test_borders_and_numbers_are_those_of_the_text(text):
    assert len(borders(text)) == len(text) + 1 and borders(text)[0] and borders(text)[-1]
    assert all(isinstance(number, int | float) and number >= 0 for number in numbers_in(text))
    parts = [text[i:j] for i in range(len(text)) for j in range(i, len(text) + 1)]
    assert all(part and part == part.strip() for part in parts if is_copy(part, text))


def test_a_number_is_found_whole_or_not_at_all():
    for before, after in product(range(1, 18), range(9)):
        number = before * "7" + "." * (after > 0) + after * "7"
        found = [float(number)] if before <= 15 and after <= 6 else []
        assert numbers_in(f"order {number} of A51, paid on 2.3.24") == [*found, 2.3, 24]


def test_kinds_are_those_of_json_schema():
    kinds = {None: "null", True: "boolean", 0: "integer", 5.0: "integer", 0.5: "number", "x": "string"}
    assert {value: kind_of(value) for value in kinds} == kinds and kind_of([]) == "array" and kind_of({}) == "object"
    assert characters_of("") == [] and characters_of(r"^\d\.$") == [set("0123456789"), {"."}]
