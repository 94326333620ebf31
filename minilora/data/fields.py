"""Data with fields for each text: their schema, the prompt that asks for them, and the JSON that answers it.

A schema is a JSON Schema of one level: an object of strings, numbers, integers, booleans, choices (`enum`) and lists of
these, each of which may be null. Pydantic's forms are understood: `anyOf` of a type and null, `const`, and `$ref` to an
enum in `$defs`. The schema is stored with an adapter (`lora/provenance.py`), so that whoever uses the adapter asks as
it was trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..files.disk import read_json
from ..lora.provenance import read_provenance
from .formats import PROMPTS, listed, parts_of
from .labels import LISTED, TEXT, Asking, LabelTask
from .rows import DataError
from .words import KINDS, spelled

SCHEMA_ENDING = ".schema.json"  # support.jsonl has its schema in support.schema.json
COPIES = 5  # values of a field in the training records, at least, of which all are in their texts, for it to be copied
DIGITS, DECIMALS = 15, 6  # of a number in an answer, at most
_NUMBER = re.compile(rf"-?\d{{1,{DIGITS}}}(\.\d{{1,{DECIMALS}}})?")
_KINDS: dict[str, Any] = {  # JSON Schema's types of a value -> Python's
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "array": list,
    "null": type(None),
}
_NOTES = {"$schema", "$id", "$comment", "title", "description", "default", "examples"}  # these allow and forbid nothing
_OF_OBJECT = _NOTES | {"type", "properties", "required", "additionalProperties", "$defs"}
_OF_FIELD = _NOTES | {"type", "enum", "items", "pattern"}
_INSTEAD = {"format": r"a pattern, such as ^\d{4}-\d{2}-\d{2}$ for a date"}  # of what Pydantic writes
_PIECE = re.compile(  # of a pattern; `re` warns of [[ and of doubled signs within a class, which may become operators
    r"\[((?:\\.|[^\[\]\\^])(?:\\.|(?!--|&&|~~|\|\|)[^\]\\])*)\]|\\([dw.\-+/()])|([^\\\[\](){}.*+?|^$])"
)
_TIMES = re.compile(r"\{(\d{1,3})\}")
LONGEST = 1000  # characters that a pattern may ask for
LARGEST = 1 << 15  # size of a schema, as `Field.size` counts it
_CLASSES = {"d": "0-9", "w": "0-9A-Za-z_"}


@dataclass(frozen=True)
class Field:
    """What a field may hold.

    kinds: JSON Schema's types. choices: the only values, as JSON; none if it is free. items: of a list, its members.
    pattern: of a string, a regular expression as `characters_of` reads it.
    """

    name: str
    kinds: tuple[str, ...]
    choices: tuple[str, ...] = ()
    items: Field | None = None
    pattern: str = ""

    @classmethod
    def of(cls, name: str, rule: Any, definitions: Mapping[str, Any] | None = None) -> Field:
        """A property of a schema. Raises ValueError for one that is not supported.

        definitions: the schema's $defs, which $ref may name.
        """
        if not isinstance(rule, dict):
            raise ValueError(f"{name} must be an object such as {{'type': 'string'}}, got {rule!r}")
        if rule.keys() - _NOTES == {"$ref"}:
            named = [one for key, one in (definitions or {}).items() if rule["$ref"] == f"#/$defs/{key}"]
            if not named:
                got = f"got {rule['$ref']!r:.80}"
                raise ValueError(f"{name}: $ref must name one of $defs, which refer to no others, {got}")
            return cls.of(name, named[0])  # which may not refer to another, or to itself
        if rule.keys() - _NOTES == {"anyOf"}:
            parts = rule["anyOf"] if isinstance(rule["anyOf"], list) else []
            others = [part for part in parts if part != {"type": "null"}]
            if len(parts) != 2 or len(others) != 1:
                raise ValueError(f"{name}: 'anyOf' is not supported, except of one type and {{'type': 'null'}}")
            field = cls.of(name, others[0], definitions)
            choices = tuple(dict.fromkeys([*field.choices, "null"])) if field.choices else ()
            return replace(field, kinds=tuple(dict.fromkeys([*field.kinds, "null"])), choices=choices)
        if "const" in rule and "enum" not in rule:
            rule = {key: value for key, value in rule.items() if key != "const"} | {"enum": [rule["const"]]}
        if (other := sorted(rule.keys() - _OF_FIELD)) and rule.get("type") != "object":
            instead = f": write {_INSTEAD[other[0]]}" if other[0] in _INSTEAD else ""
            supported = "type, enum, items, pattern, or $ref or anyOf alone"
            raise ValueError(f"{name}: {other[0]!r} is not supported{instead}; supported: {supported}")
        if not isinstance(values := rule.get("enum", []), list):
            raise ValueError(f"{name}: enum must be a list, got {values!r}")
        named = rule.get("type", [kind_of(value) for value in values])
        named = [named] if isinstance(named, str) else named
        if not isinstance(named, list) or not all(isinstance(kind, str) for kind in named):
            raise ValueError(f"{name}: type must be a text or a list of texts, got {named!r}")
        kinds, choices = tuple(dict.fromkeys(named)), tuple(map(as_json, values))
        if unknown := [kind for kind in kinds if kind not in _KINDS]:
            as_lists = ", each as a list" if name.endswith(".items") else ""
            nested = f": only one level is: put its properties into the schema itself{as_lists}"
            supported = nested if unknown[0] == "object" else f"; supported: {', '.join(_KINDS)}"
            raise ValueError(f"{name}: the type {unknown[0]!r} is not supported{supported}")
        if not set(kinds) - {"null"} or ("enum" in rule and ("array" in kinds or not choices)):
            raise ValueError(f"{name} needs a type other than null, or an enum of texts, numbers and null")
        items = None
        if "array" in kinds:
            items = cls.of(f"{name}.items", rule.get("items", {"type": "string"}), definitions)
            if "array" in items.kinds:
                raise ValueError(f"{name}: a list of lists is not supported: only one level is")
        characters_of(pattern := rule.get("pattern", ""), name)
        field = cls(name, kinds, choices, items, pattern)
        if bad := [choice for choice in choices if not field.fits(json.loads(choice))]:
            raise ValueError(f"{name}: the choice {bad[0]} is not of the type {' or '.join(kinds)}")
        return field

    def rule(self) -> dict[str, Any]:
        """The property that `of` reads."""
        found: dict[str, Any] = {"type": self.kinds[0] if len(self.kinds) == 1 else list(self.kinds)}
        found |= {"enum": [json.loads(choice) for choice in self.choices]} if self.choices else {}
        found |= {"items": self.items.rule()} if self.items else {}
        return found | ({"pattern": self.pattern} if self.pattern else {})

    def size(self) -> int:
        """About the nodes of an automaton for the values: a byte of a choice counts once, a character of a pattern
        twice, any other type as 30, and a list's members twice.
        """
        if self.choices:
            return sum(len(choice.encode()) for choice in self.choices)
        members = 2 * self.items.size() if self.items else 0
        return 30 * len(self.kinds) + 2 * len(characters_of(self.pattern)) + members

    def least(self) -> int:
        """The bytes that a value has at least, as JSON."""
        of_kind = {"null": 4, "boolean": 4, "array": 2, "string": 2 + sum(map(_least_of, characters_of(self.pattern)))}
        choices = [len(choice.encode()) for choice in self.choices]
        return min(choices or [of_kind.get(kind, 1) for kind in self.kinds])

    def read(self, cell: Any) -> Any:
        """The value in a cell of a table, where numbers, booleans and lists are texts and an empty one is None. White
        space around it does not count.
        """
        cell = (cell.strip() or None) if isinstance(cell, str) else cell
        if cell is None and self.kinds == ("array",):
            return []
        if not isinstance(cell, str) or "string" in self.kinds:
            return cell
        if self.items is not None and not cell.lstrip().startswith("["):
            return [self.items.read(one) for one in parts_of(cell)]
        with suppress(ValueError, RecursionError):
            return json.loads(cell if self.items else cell.lower())  # Excel writes TRUE
        return cell

    def fits(self, value: Any) -> bool:
        """May the field have this value?"""
        kind = kind_of(value)
        if kind not in self.kinds and not (kind == "integer" and "number" in self.kinds):
            return False
        if not self.choices and is_long(value):
            return False
        if self.choices and as_json(value) not in self.choices:
            return False
        if isinstance(value, list):
            return self.items is not None and all(self.items.fits(one) for one in value)
        return kind != "string" or not self.pattern or re.fullmatch(self.pattern[1:-1], value, re.ASCII) is not None


@dataclass(frozen=True)
class FieldTask(Asking):
    """The fields to find in a text, and the template of the prompt, in which {text} is that text.

    copied: names of fields whose strings and numbers are always in the text, word for word: no others are answered.
    """

    fields: tuple[Field, ...]
    template: str
    copied: tuple[str, ...] = ()

    @classmethod
    def of(cls, schema: Any) -> FieldTask:
        """The task of a JSON Schema. As of labels, the prompt lists up to `LISTED` choices of a field.

        Raises ValueError for a schema that is not supported.

        >>> FieldTask.of({"type": "object", "properties": {"mood": {"enum": ["good", "bad"]}}}).template
        'Extract these fields as JSON: mood (good, bad).\\n\\nMessage: {text}'
        """
        if not isinstance(schema, dict) or schema.get("type", "object") != "object":
            raise ValueError('the schema must be that of an object: {"type": "object", "properties": {...}}')
        rules, other = schema.get("properties"), sorted(schema.keys() - _OF_OBJECT)
        if other and (rules or other[0].startswith("$")):
            raise ValueError(f"{other[0]!r} is not supported; supported: type, properties, required, $defs")
        if not isinstance(rules, dict) or not rules:
            like = '{"type": "object", "properties": {"name": {"type": "string"}, ...}}'
            raise ValueError(f"the schema needs properties: an object with at least one field, as in {like}")
        if not isinstance(definitions := schema.get("$defs", {}), dict):
            raise ValueError(f"$defs must be an object of rules, got {definitions!r:.80}")
        fields, size = [], 0
        for name, rule in rules.items():
            fields.append(Field.of(name, rule, definitions))
            if (size := size + len(name.encode()) + fields[-1].size()) > LARGEST:
                counted = (
                    f"{LARGEST:,} characters of names, choices and patterns (those of a pattern or list count twice)"
                )
                raise ValueError(f"the schema is too large: it allows more than {counted}: use fewer or shorter ones")
        if not isinstance(required := schema.get("required", []), list):
            raise ValueError(f"required must be a list of names, got {required!r}")
        if unknown := [name for name in required if name not in [*rules]]:
            raise ValueError(f"{unknown[0]!r} is required and is none of the properties")
        named = [
            f"{field.name} ({', '.join(choice.strip(chr(34)) for choice in field.choices)})"
            if 0 < len(field.choices) <= LISTED
            else field.name
            for field in fields
        ]
        return cls(tuple(fields), f"Extract these fields as JSON: {', '.join(named)}.\n\nMessage: {TEXT}")

    @classmethod
    def stored(cls, data: Mapping[str, Any]) -> FieldTask | None:
        """The task in an adapter's entry "data", if it was trained on fields. Raises ValueError for a bad one."""
        if "schema" not in data:
            return None
        task, template, copied = cls.of(data["schema"]), data.get("template", ""), tuple(data.get("copied", ()))
        if TEXT not in template or not all(name in [field.name for field in task.fields] for name in copied):
            raise ValueError(f"the adapter's schema needs a template that has {TEXT}, and copies some of its fields")
        return replace(task, template=template, copied=copied)

    def entry(self) -> dict[str, Any]:
        """What `stored` reads."""
        return {"schema": self.schema(), "template": self.template, "copied": list(self.copied)}

    def schema(self) -> dict[str, Any]:
        """The JSON Schema."""
        rules = {field.name: field.rule() for field in self.fields}
        return {"type": "object", "properties": rules, "required": list(rules), "additionalProperties": False}

    def least(self) -> int:
        """The bytes that an answer has at least."""
        return 1 + sum(len(as_json(field.name).encode()) + 2 + field.least() for field in self.fields)

    def gathered(self, row: Any) -> Any:
        """A row that has a column for each field that may not be missing, with all fields in one column `fields`; any
        other row, and one with such a column, as it is. A field without a column of its name has the one that differs
        in case alone.
        """
        if not isinstance(row, dict) or "fields" in row:
            return row
        names = [field.name for field in self.fields]
        alike = {str(column).strip().lower(): column for column in row if column not in names}
        alike = {name: column for name, column in alike.items() if name not in PROMPTS}
        places = {name: name if name in row else alike.get(name.lower()) for name in names}
        there = [name for name, column in places.items() if column is not None]
        if not there or self.lacking(there):
            return row
        own = {field.name: field.read(row[places[field.name]]) for field in self.fields if field.name in there}
        return {column: value for column, value in row.items() if column not in places.values()} | {"fields": own}

    def lacking(self, names: Iterable[str]) -> list[str]:
        """The fields that need a value and are not among these."""
        there = {*names}
        needed = [field.name for field in self.fields if not {"null", "array"}.intersection(field.kinds)]
        return [name for name in needed if name not in there]

    def answer(self, values: Mapping[str, Any]) -> str:
        """The fields of a text as JSON, in the order of the schema; one that is left out is null, or an empty list.

        Raises ValueError for a field that the schema does not have, and for a value that it does not allow.
        """
        names = [field.name for field in self.fields]
        if unknown := [name for name in values if name not in names]:
            raise ValueError(f"the schema has no field {unknown[0]!r}: it has {', '.join(names)}")
        whole = []
        for field in self.fields:
            value = values.get(field.name, [] if field.kinds == ("array",) else None)
            if not field.fits(value):
                kinds = " or ".join(field.kinds).replace("boolean", "boolean (true or false)")
                allowed = f"one of {', '.join(map(spelled, field.choices))}" if field.choices else kinds
                like = f" like {field.pattern}" if field.pattern else ""
                like += f" of up to {DIGITS} digits, and {DECIMALS} after the point" if is_long(value) else ""
                comma = "number" in field.kinds and re.fullmatch(r"-?[\d.]+,\d+", str(value))
                like += ", written with a decimal point" if comma else ""
                found = spelled(json.dumps(value, ensure_ascii=False)) if field.name in values else "missing"
                where = ": allow null there if texts may lack it" if value is None else ""
                raise ValueError(f"{field.name} is {found}, the schema has {allowed}{like}{where}")
            whole.append(f"{as_json(field.name)}:{as_json(value)}")
        return f"{{{','.join(whole)}}}"

    def example(self) -> str:
        """An answer as JSON, which shows the form."""
        usual = {"string": "...", "number": 1.5, "integer": 1, "boolean": True, "array": [], "null": None}
        return json.dumps({f.name: json.loads(f.choices[0]) if f.choices else usual[f.kinds[0]] for f in self.fields})

    def copying(self, pairs: Sequence[tuple[str, Mapping[str, Any]]]) -> FieldTask:
        """The task in which those fields are copied of which all values in these texts and their fields are copies."""
        copied = []
        for field in self.fields:
            kind = field.items or field
            if kind.choices or set(kind.kinds) - {"string", "number", "integer", "null"}:
                continue
            found = [(one, text) for text, values in pairs for one in members(values.get(field.name))]
            if len(found) >= COPIES and all(is_copy(one, text) for one, text in found):
                copied.append(field.name)
        return replace(self, copied=tuple(copied))


Task = LabelTask | FieldTask


def as_json(value: Any) -> str:
    """Compact JSON: what a model writes, and what values are compared by. A whole number has no decimals."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return f"[{','.join(map(as_json, value))}]"
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def kind_of(value: Any) -> str:
    """JSON Schema's type of a value, "integer" for a whole number; "object" for one that no field can have."""
    found = [kind for kind in ("null", "boolean", "integer", "number", "string", "array") if
             isinstance(value, _KINDS[kind])]  # fmt: skip
    return "integer" if isinstance(value, float) and value.is_integer() else (found or ["object"])[0]


def is_long(value: Any) -> bool:
    """Is it a number that no answer can have?"""
    return kind_of(value) in ("integer", "number") and not _NUMBER.fullmatch(json.dumps(value))


def members(value: Any) -> list[Any]:
    """The values in a field: those of a list, or the one that it has, if any."""
    return value if isinstance(value, list) else [] if value is None else [value]


# -- copies ------------------------------------------------------------------------------------------------------------


def borders(text: str) -> list[bool]:
    """Whether each place in a text, before the first character to after the last, is at the border of a word, or of any
    character where words have no spaces between them.
    """
    kinds = zip(text, pairwise(text.translate(KINDS)), strict=False)
    inside = [b == "M" or (a in "wM" and b == "w") or character == "\u200d" for character, (a, b) in kinds]
    return [True, *(not within for within in inside), True][: len(text) + 1]


def numbers_in(text: str) -> list[float]:
    """The numbers in a text, in digits; a comma before three digits divides thousands. After a letter there is no
    number, but the code of something. Longer numbers than 15 digits, and 6 after the point, are left out.

    >>> numbers_in("2 of A51 for $1,200.50, in 1999, as order 12345678901234567")
    [2, 1200.5, 1999]
    """
    plain = re.sub(r"(\d),(?=\d{3}(?!\d))", r"\1", text)
    whole = re.findall(r"(?<![A-Za-z\d])\d+(?:\.\d+)?", plain)
    found = [float(number) for number in whole if _NUMBER.fullmatch(number)]
    return [int(number) if number.is_integer() else number for number in found]


def is_copy(value: Any, text: str) -> bool:
    """Is a value in a text: its words, from border to border, or its number?"""
    if not isinstance(value, str):
        return value in numbers_in(text)
    edge, end = borders(text), len(value)
    starts = (found.start() for found in re.finditer(f"(?={re.escape(value)})", text))
    return value.strip() == value != "" and any(edge[i] and edge[i + end] for i in starts)


# -- schemas in files and patterns -------------------------------------------------------------------------------------


def characters_of(pattern: Any, name: str = "pattern") -> list[frozenset[str]]:
    """The characters that a pattern allows at each place; empty for no pattern.

    Raises ValueError for one that is not a row of characters and classes such as [A-Z] and \\d, each with {n} or not.

    >>> characters_of("^a[01]{2}$") == [{"a"}, {"0", "1"}, {"0", "1"}]
    True
    """
    places: list[frozenset[str]] = []
    body = pattern[1:-1] if isinstance(pattern, str) and pattern[:1] == "^" and pattern[-1:] == "$" else None
    at = 0
    while body is not None and at < len(body) and len(places) <= LONGEST and (piece := _PIECE.match(body, at)):
        group, escaped, plain = piece.groups()
        if group or escaped in _CLASSES:
            group = re.sub(r"\\([dw])", lambda found: _CLASSES[found[1]], group or f"\\{escaped}")
            allowed = _class(group)
        else:
            allowed = frozenset(escaped or plain)
        at = piece.end()
        if times := _TIMES.match(body, at):
            at = times.end()
        places += [allowed] * (int(times[1]) if times else 1)
    if pattern != "" and (body is None or at < len(body) or not all(places) or len(places) > LONGEST):
        like = (
            f"up to {LONGEST} characters and ASCII classes such as [A-Z] and \\d, each with {{n}} or not, from ^ to $"
        )
        raise ValueError(f"{name}: the pattern {pattern!r:.80} is not supported; supported: {like}")
    return places


@lru_cache(maxsize=LONGEST)
def _class(group: str) -> frozenset[str]:
    """The printable characters of ASCII that a class allows; none for one such as [z-a]."""
    with suppress(re.error):
        return frozenset(re.findall(f"[{group}]", "".join(map(chr, range(32, 127)))))
    return frozenset()


@lru_cache(maxsize=LONGEST)
def _least_of(allowed: frozenset[str]) -> int:
    """The bytes of the shortest of these characters in a JSON string."""
    return min(len(as_json(one).encode()) for one in allowed) - 2


def read_schema(path: str | Path) -> FieldTask:
    """The task of a JSON Schema in a file. Raises ValueError for one that cannot be used."""
    schema = read_json(Path(path))
    try:
        return FieldTask.of(schema)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def schema_beside(data: Path) -> Path | None:
    """The file with the schema of a data file, if there is one next to it."""
    path = data.with_name(data.stem + SCHEMA_ENDING)
    return path if path.is_file() else None


# -- the task of data --------------------------------------------------------------------------------------------------


def field_task_of(
    texts: Sequence[tuple[str, str, Mapping[str, Any] | None, bool]],
    source: object,
    schema: FieldTask | None,
    stored: Sequence[Task],
    columns: Iterable[str] = (),
) -> FieldTask | None:
    """The task of records, or None if none of them has fields.

    texts: of each record its id, text and fields, and whether it may be trained on.
    schema: given for the data, or found next to them; without one, the first of `stored` that allows all fields is
    taken. A stored task with the same fields is preferred to a new one, for its prompt.
    columns: those that were not read, which may be those of fields.

    Raises DataError where only some records have fields, and where there is no schema for them.
    """
    found = [(text, fields) for _, text, fields, trained in texts if fields is not None and trained]
    without = [name for name, _, fields, _ in texts if fields is None]
    if len(without) == len(texts):
        if schema is not None:
            like = f'{{"text": "...", "fields": {schema.example()}}}, or a column for each field'
            lacking = schema.lacking({*columns})
            some = f"; there is no column {listed(lacking)}" if lacking != schema.lacking(()) else ""
            raise DataError(
                f"{source}: a schema is for rows with a text and its fields, and no row has them: write {like}{some}"
            )
        return None
    if without:
        bare = f"no fields for {len(without):,} of {len(texts):,} records ({listed(without, 5)})"
        raise DataError(f"{source}: {bare}: give each record its fields, or leave those out")
    known, misfit = [task for task in stored if isinstance(task, FieldTask)], ""
    if schema is not None:
        return next((task for task in known if task.fields == schema.fields), schema.copying(found))
    for task in known:
        try:
            for name, _, fields, _ in texts:  # noqa: B007 (the error names it)
                task.answer(fields or {})
            return task
        except ValueError as error:
            misfit = f" (that of the adapter does not fit {name}: {error})"
    beside = Path(str(source)).with_suffix(SCHEMA_ENDING).name
    needed = f"data with fields need a JSON Schema{misfit}"
    raise DataError(f"{source}: {needed}: give one with --schema, or put it into {beside}")


def stored_tasks(folders: Iterable[Path]) -> list[Task]:
    """The tasks that adapters in these folders were trained on, as far as they were."""
    return [task for folder in folders if (task := stored_task(read_provenance(folder).get("data", {}))) is not None]


def stored_task(data: Mapping[str, Any]) -> Task | None:
    """The task in an adapter's entry "data": its labels or its fields. Raises ValueError for a bad one."""
    return LabelTask.stored(data) or FieldTask.stored(data)
