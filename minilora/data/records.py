"""Data files as records: conversations or texts, checked row by row before anything is trained.

A file is JSONL, a JSON list, CSV, TSV or Parquet with a row per record, in one of the formats of `formats.py`, such as
`{"question", "answer"}` or `{"messages": [{"role", "content"}, ...]}`; or it is a `.txt` or `.md` file. A row may also
have "id", "split", "phrasings", "reworded", "paraphrase", "validation_paraphrase", "keywords", and "context": a passage
that goes into the prompt, `passages.py`. A text with a label becomes a prompt that asks for the label, `labels.py`, a
text with fields one that asks for these, `fields.py`. The row of a label may have a "kind".
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..files.disk import sha256_of_file
from ..models.tokenizer import Message, Tokenizer
from ..options import short_repr, suggestion
from ..progress import log
from .fields import FieldTask, Task, field_task_of, read_schema, schema_beside
from .formats import (
    CONTEXT,
    TEXT,
    EmptyCellError,
    Format,
    as_in_a_file,
    check_field,
    conversation,
    fields_of,
    format_of,
    keys_not_read,
    listed,
    passage_of,
    rejected_of,
    rename,
    text_of,
    with_lists,
)
from .labels import task_of
from .passages import TEMPLATE, Handbook, Passage, fill, paragraphs
from .repository import fetched, is_dataset
from .rows import (
    JSON_LIST,
    PARQUET,
    SPLIT_NAMES,
    SPLITS,
    TEXT_FILE,
    DataError,
    EmptyFileError,
    files_of,
    read_rows,
)

DOMAINS = ("legal", "medical", "support", "finance")
BUILT_IN = (
    *DOMAINS,
    "general",
    *(f"{domain}-{kind}" for kind in ("labels", "fields", "pairs", "handbook") for domain in DOMAINS),
)
MEASURED = ("reworded", "paraphrase", "validation_paraphrase")  # other questions of a record, for measuring only
_SHOWN = 20  # kinds of mistakes that are listed
_NUMBERS = 5  # numbers of rows that are listed for each
_VARYING = re.compile(r"got .*|such as .*|'.*?'|\d+")  # what differs between messages about the same kind of mistake


@dataclass(frozen=True, slots=True, repr=False)
class Record:
    """A conversation, or a text if there are no messages, with what its row says about it."""

    id: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    split: str | None = None
    paraphrase: str | None = None
    keywords: tuple[str, ...] = ()
    phrasings: tuple[str, ...] = ()
    validation_paraphrase: str | None = None
    label: str | None = None  # of labelled data: the answer
    fields: Mapping[str, Any] | None = None  # of data with fields: the answer, before it became JSON
    rejected: str | None = None  # of preferences: the answer that the last message is preferred to
    reworded: str | None = None  # the question with some of the same words; `paraphrase` has hardly any
    context: str | None = None  # the passage in the prompt, which its texts include already
    kind: str | None = None  # of labelled data: how the text is written; accuracy is also reported by kind

    __repr__ = short_repr

    @property
    def prompt(self) -> list[Message]:
        """The conversation before the assistant's last answer."""
        return list(self.messages[:-1])

    @property
    def question(self) -> str:
        """The last message before that answer; of a text, nothing."""
        return self.messages[-2]["content"] if len(self.messages) > 1 else ""

    @property
    def other_questions(self) -> list[str]:
        """All other questions with the same answer, for training and for measuring."""
        measured = (getattr(self, key) for key in MEASURED)
        return [*self.phrasings, *(question for question in measured if question is not None)]

    def asked_otherwise(self) -> Record:
        """The same record with its paraphrase as the question."""
        if self.paraphrase is None:
            raise ValueError(f"record {self.id} has no paraphrase")
        return self.asked(self.paraphrase)

    def asked(self, question: str) -> Record:
        """The same record with another question and without phrasings. Its system message stays."""
        system = [message for message in self.messages[:1] if message["role"] == "system"]
        messages = (*system, {"role": "user", "content": question}, self.messages[-1])
        return replace(self, messages=messages, phrasings=())

    def open_book(self, passage: str, template: str = TEMPLATE) -> Record:
        """The same record with a passage in the prompts of its question and of all other wordings."""

        return self._reworded(lambda question: fill(passage, question, template), passage)

    def closed_book(self) -> Record:
        """The same record without its passage: the inverse of `open_book` with its own template."""
        beginning = fill(self.context or "", "")
        return self if self.context is None else self._reworded(lambda prompt: prompt.removeprefix(beginning), None)

    def _reworded(self, change: Callable[[str], str], context: str | None) -> Record:
        *before, question, answer = self.messages
        messages = (*before, {**question, "content": change(question["content"])}, answer)
        others: dict[str, Any] = {key: change(text) for key in MEASURED if (text := getattr(self, key)) is not None}
        return replace(self, messages=messages, phrasings=tuple(map(change, self.phrasings)), context=context, **others)

    def answered(self, answer: str) -> Record:
        """The same record with another answer."""
        return replace(self, messages=(*self.messages[:-1], {"role": "assistant", "content": answer}))


def check_records(records: Sequence[Record]) -> None:
    """Raise TypeError for what is no list of records, such as the name of a file."""
    if isinstance(records, Record):
        raise TypeError("expected a list of records, got a single Record: put it in a list")
    for record in records if isinstance(records, Sequence) else [records]:
        if not isinstance(record, Record):
            kind = type(record).__name__
            raise TypeError(f"expected records, got a {kind}: read_records makes them of a file, or of dicts")


@dataclass
class Reading:
    """What was read of a source: its records, the kind of each file, the number of rows in each format, the columns
    that minilora does not read, with the number of rows that have them, and for data with labels or fields the task;
    by needed column, the names of the rows that are left out, since it is empty there.
    """

    records: list[Record] = field(default_factory=list)
    files: dict[Path, str] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    task: Task | None = None
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def warnings(self) -> list[str]:
        """Lines about rows that are left out, and fields that no row fills."""
        count = sum(map(len, self.left_out.values()))
        what = f"{count:,} of {count + len(self.records):,} rows {'is' if count == 1 else 'are'} left out"
        where = "; ".join(f"{column} in {listed(names, _NUMBERS)}" for column, names in self.left_out.items())
        lines = [f"{what}, since a needed cell is empty: {where}"] if count else []
        if isinstance(self.task, FieldTask):
            rows = [record.fields or {} for record in self.records]
            names = [each.name for each in self.task.fields]
            if bare := [name for name in names if all(row.get(name) in (None, []) for row in rows)]:
                lines.append(f"no record has a value of {listed(bare)}: is the column there, under that name?")
        return lines

    def notes(self) -> list[str]:
        """Lines about columns that are not read, if there are any."""
        unread = [f"{name} in {count:,} record{'s' * (count != 1)}" for name, count in self.unread.items()]
        return [f"not read: {listed(unread)}"] if unread else []


def read_records(
    source: str | Path | Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer | None = None,
    field: Mapping[str, str] | None = None,
) -> list[Record]:
    """Read the records of a data set.

    source: a file; a folder of train, valid and test files, or of texts; a name on huggingface.co, or of data that come
        with minilora, such as "legal"; or rows as dicts, such as a list, a split of Hugging Face's `datasets`, or
        `frame.to_dict("records")` of a DataFrame, whose NaN, NA and NaT count as None.
    tokenizer: if given, text that it cannot encode is reported too.
    field: names of columns: `{"question": "q"}` reads the column q as the question.

    A row with an empty cell in a column that its format needs, such as the label, is left out, which is logged.

    Raises DataError with a line for each kind of mistake.
    """
    if isinstance(source, str | Path):
        return read_source(source, tokenizer, field).records
    if not isinstance(source, Iterable) or isinstance(source, Mapping) or hasattr(source, "iterrows"):
        of_frame = ': of a DataFrame, frame.to_dict("records")' if hasattr(source, "iterrows") else ""
        raise TypeError(f"expected the name of a file, or rows as dicts, got a {type(source).__name__}{of_frame}")
    reader = _Reader(tokenizer, field or {}, None, ())
    reader.read(Path("rows"), None, None, map(as_in_a_file, source))
    return reader.finish("rows", ()).records


def read_source(
    source: str | Path,
    tokenizer: Tokenizer | None = None,
    field: Mapping[str, str] | None = None,
    stored: Sequence[Task] = (),
    schema: str | Path | None = None,
    warn: bool = True,
) -> Reading:
    """`read_records`, with what was learned about the files.

    stored: the tasks of adapters that are used on data with labels or fields; the first that fits is taken.
    schema: the file with the JSON Schema of the fields, if it is not next to the data.
    warn: log the `warnings` of what was read.
    """
    places = _files(source)
    found = schema_beside(next(iter(places))) if schema is None else schema
    reader = _Reader(tokenizer, field or {}, None if found is None else read_schema(found), stored)
    splits = Counter(places.values())
    for file, split in places.items():
        alone = splits[split] == 1
        try:
            reader.read(file, split, split if alone else file.stem)
        except EmptyFileError as error:
            if alone:
                raise
            log.warning("%s, and is left out", error)
    return reader.finish(source if is_dataset(source) else path_of(source), stored, warn)


def read_handbook(source: str | Path, tokenizer: Tokenizer, limit: int, max_new_tokens: int = 0) -> Handbook:
    """The passages of a built-in handbook, of a .txt or .md file or a folder of them, a paragraph each with the heading
    before it, or of rows with a column text, which may have `questions`: those that the passage answers.

    limit: the most tokens of a prompt with a passage and of the answer after it.
    max_new_tokens: of these, those of the answer, which --max-new-tokens sets; 0 where none is generated.

    Raises DataError for a source that cannot be read, that has other rows, or has a passage that is too long.
    """
    needed = "a context is a .txt or .md file or rows with a column text"
    if (names := columns_of(source)) and TEXT.needs[0] not in {str(name).strip().lower() for name in names}:
        raise DataError(f"{source}: {needed}; there are {listed(sorted(map(str, names)))}")
    reading = read_source(source, tokenizer)
    if others := [record.id for record in reading.records if not record.text]:
        raise DataError(f"{source}: {others[0]} is not a text: {needed}")
    passages = [Passage(record.id, record.text.strip(), record.phrasings) for record in reading.records]
    if TEXT_FILE in reading.files.values():
        of_file = "{}, paragraph {}" if len(passages) > 1 else "paragraph {1}"
        passages = [
            Passage(of_file.format(whole.id, i), text)
            for whole in passages
            for i, text in enumerate(paragraphs(whole.text), 1)
        ]
    longer, room = dict[str, int](), limit - max_new_tokens
    for passage in passages:
        asked: list[Message] = [{"role": "user", "content": fill(passage.text, "?")}]
        if (length := len(tokenizer.encode_chat(asked, answer_next=True))) > room:
            longer[passage.id] = length
    if longer:
        name, *rest = longer
        before = f" before an answer of {max_new_tokens:,}" if max_new_tokens else ""
        wrong = f"makes a prompt of {longer[name]:,} tokens, and there is room for {room:,}{before}"
        fewer = ", or give fewer --max-new-tokens" if max(longer.values()) < limit else ""
        more = f", and {listed(rest, _NUMBERS)}," if rest else ""
        raise DataError(f"{source}: {name} {wrong}: divide it{more} into shorter passages{fewer}")
    return Handbook(passages, str(source))


def columns_of(source: str | Path) -> set[str]:
    """The names of the columns that the first row of a source has."""
    _, rows = read_rows(next(iter(_files(source))))
    return next(({*row} for _, row in rows if isinstance(row, Mapping)), set())


def sha256_of_data(source: str | Path) -> str:
    """The SHA-256 of a source as `sha256sum` prints it; of a folder, that of the lines it prints for the files read."""
    import hashlib

    lines = [f"{sha256_of_file(file)}  {file.name}\n" for file in _files(source)]
    several = len(lines) > 1 or (not is_dataset(source) and path_of(source).is_dir())
    return hashlib.sha256("".join(lines).encode()).hexdigest() if several else lines[0].split()[0]


def revision_of_data(source: str | Path) -> str | None:
    """The revision of a data set on huggingface.co; None for other data."""
    return fetched(str(source))[0] if is_dataset(source) else None


def _files(source: str | Path) -> dict[Path, str | None]:
    """The files of a source, each with its split."""
    return fetched(str(source))[1] if is_dataset(source) else files_of(path_of(source))


def path_of(source: str | Path) -> Path:
    """The file or folder of a source: a path, or one of BUILT_IN by its name. Raises DataError if there is none."""
    built_in = str(source) in BUILT_IN
    path = Path(str(files("minilora") / "data" / f"{source}.jsonl")) if built_in else Path(source)
    if path.is_symlink() and not path.exists():
        raise DataError(f"{source}: a link to {path.readlink()}, which is not there")
    if str(source) == "-":
        raise DataError(
            "-: rows are read from a file, and not from a pipe: save them first, with an ending such as .csv"
        )
    if not path.exists():
        meant = suggestion(path.name, [*BUILT_IN, *(beside.name for beside in path.parent.glob("*"))])
        raise DataError(
            f"{source}: no such data file or folder{meant}; use a .jsonl, .json, .csv, .tsv, .parquet, .txt or .md "
            f"file, a folder with a train file or of texts, a name on huggingface.co, or {', '.join(BUILT_IN)}"
        )
    return path


class _Reader:
    """Reads files into one Reading, and collects every bad row."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        field: Mapping[str, str],
        schema: FieldTask | None,
        stored: Sequence[Task],
    ):
        check_field(field)
        self.tokenizer, self.field, self.schema = tokenizer, field, schema
        known = stored if schema is None else [schema]
        self.tasks = [task for task in known if isinstance(task, FieldTask) and "label" not in field]
        self.reading = Reading()
        self.mapped: set[str] = set()  # names of `field` that a row had
        self.problems: dict[tuple[Path, str], tuple[str, str, list[int]]] = {}  # message, unit, numbers of rows
        self.empty: dict[tuple[Path, str], tuple[str, str, list[int]]] = {}  # the same of rows that are left out
        self.ids: set[str] = set()  # of the records of all files

    def read(
        self, path: Path, split: str | None, prefix: str | None, given: Iterable[Mapping[str, Any]] | None = None
    ) -> None:
        """Read one file. split: what its rows are for, if the file says so. prefix: of the names of its rows. given:
        its rows, which need not be read then."""
        reading = self.reading
        kind_of_file, rows = read_rows(path) if given is None else (PARQUET, enumerate(given, 1))
        reading.files[path] = kind_of_file
        is_text = kind_of_file == TEXT_FILE
        field = {} if is_text else self.field
        seen: dict[str, int] = {}
        unit = {JSON_LIST: "record", PARQUET: "row"}.get(kind_of_file, "line")  # all of a list may be one line
        before = f"{prefix}/" if prefix else ""  # in names, unlike those of the folder's other files
        for position, (line, raw) in enumerate(rows, 1):
            number = position if unit == "record" else line
            name = path.stem if is_text else f"{before}{unit}-{number}"
            try:
                if isinstance(raw, ValueError):
                    raise raw
                for task in self.tasks:
                    raw = task.gathered(raw)
                row = rename(raw, field)
                with_schema = self.schema is not None and "fields" in row  # which a column of labels is not
                kind = format_of(row, {"fields": "fields", **field} if with_schema else field)
                record = _record(kind, with_lists(row, kind), name, split)
                if self.schema is not None and record.fields is not None:
                    record = record.answered(self.schema.answer(record.fields))
                said = [message["content"] for message in record.messages]
                said = [record.text, *said, record.rejected or "", *record.other_questions]
                if self.tokenizer is not None:
                    for text in said:
                        self.tokenizer.check(text)
                if record.id in seen:
                    again = f"id {record.id!r} is already the id of {unit} {seen[record.id]}"
                    raise ValueError(f"{again}: give each another id, or none, or name its column with --field id=...")
            except ValueError as error:
                found = self.problems
                if isinstance(error, EmptyCellError):
                    reading.left_out[field.get(error.column, error.column)].append(name)
                    found = self.empty
                at = {"line": f":{line}", "row": f": row {line}", "record": f":{line}: record {position}"}[unit]
                key = path, _VARYING.sub("", str(error))
                message = f"{path}{'' if is_text else at}: {error}"
                found.setdefault(key, (message, unit, []))[2].append(number)
                continue
            seen[record.id] = number
            if record.id in self.ids:  # of another file: passages and answers are found by the id
                record = replace(record, id=f"{path.name}/{record.id}")
            self.ids.add(record.id)
            self.mapped.update(field.keys() & row.keys())
            reading.formats[kind.name] += 1
            read = {*kind.needs, *kind.also}
            reading.unread.update(column for column, value in row.items() if value is not None and column not in read)
            reading.unread.update(keys_not_read(with_lists(row, kind), kind))
            reading.records.append(record)

    def finish(self, source: str | Path, stored: Sequence[Task], warn: bool = True) -> Reading:
        """What was read. Raises DataError if a row is bad, if there is none, or if `field` names an unknown column."""
        if problems := self.problems or ({} if self.reading.records else self.empty):
            lines = [
                message + (f" ({len(rows):,} rows: {unit}s {listed(rows, _NUMBERS)})" if len(rows) > 1 else "")
                for message, unit, rows in problems.values()
            ]
            more = [f"and {len(lines) - _SHOWN} more kinds of mistakes"] if len(lines) > _SHOWN else []
            raise DataError("\n".join(lines[:_SHOWN] + more))
        if not self.reading.records:
            raise DataError(f"{source}: there is no record in it")
        for name in self.field.keys() - self.mapped:
            raise DataError(f"{source}: field {name}={self.field[name]}: no row has a column {self.field[name]!r}")
        reading = self.reading
        labels = [(r.id, r.label) for r in reading.records]
        texts = [(r.id, r.question, r.fields, r.split in (None, SPLITS[0])) for r in reading.records]
        labelled = task_of(labels, source, stored) if self.schema is None else None
        reading.task = task = labelled or field_task_of(texts, source, self.schema, stored, reading.unread)
        if task is not None:
            reading.records = [record.asked(task.prompt(record.question)) for record in reading.records]
        if isinstance(task, FieldTask):
            reading.records = [record.answered(task.answer(record.fields or {})) for record in reading.records]
        for line in reading.warnings() if warn else ():
            log.warning(f"{source}: {line}")
        return reading


def _record(kind: Format, row: Mapping[str, Any], name: str, split: str | None) -> Record:
    """A row as a record. name: its id if the row has none. split: that of its file, if the file has one."""
    said, name = row.get("split"), name if row.get("id") is None else str(row["id"])
    own = None if said is None else SPLIT_NAMES.get(str(said).strip().lower())
    if said is not None and own is None:
        raise ValueError(f"split is {said!r}, expected one of {', '.join(SPLITS)}")
    if None not in (own, split) and own != split:
        raise ValueError(f"split is {own!r} in a file of the split {split!r}")
    lists = {key: (key in kind.also and row.get(key)) or [] for key in ("keywords", "phrasings", "questions")}
    for key, texts in lists.items():
        if not isinstance(texts, list) or not all(isinstance(one, str) and one.strip() for one in texts):
            raise ValueError(f"{key} must be a list of texts")
    keywords, phrasings, questions = map(tuple, lists.values())
    if kind is TEXT:
        return Record(name, text=text_of(row, "text"), split=own or split, phrasings=questions)
    messages = conversation(kind, row)
    measured: dict[str, Any] = {key: text_of(row, key) for key in MEASURED if row.get(key) is not None}
    record = Record(
        name,
        messages,
        split=own or split,
        keywords=keywords,
        phrasings=phrasings,
        label=messages[-1]["content"] if kind.labelled else None,
        fields=fields_of(row) if kind.fields else None,
        rejected=rejected_of(row) if kind.preferred else None,
        kind=str(row["kind"]) if kind.labelled and row.get("kind") is not None else None,
        **measured,
    )
    passage = passage_of(row) if CONTEXT[0] in kind.also else None
    return record if passage is None else record.open_book(passage)
