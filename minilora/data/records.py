"""From files to token ids: records, conversations or plain text, checked before any training, packed without padding.

A file is JSONL, a JSON list, CSV or TSV with a row per record, in one of the ways of `formats.py`, such as
`{"question", "answer"}` or `{"messages": [{"role", "content"}, ...]}`; or it is a `.txt` file. A row may also say "id",
"split", "phrasings", "paraphrase", "validation_paraphrase", "keywords". Only the assistant's words are scored; in plain
text, everything is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.fused import NOT_SCORED
from ..models.tokenizer import Message, Tokenizer
from ..nn.parts import Sample
from .formats import TEXT, ColumnError, Format, check_field, conversation, format_of, rename, text_of, with_lists
from .rows import JSON_LIST, SPLITS, TEXT_FILE, DataError, files_of, read_rows

BUILT_IN = ("legal", "medical", "support", "finance", "general")
_SHOWN = 20  # problems listed before the rest is only counted
AT_ONCE = 256  # records whose texts are encoded together: work for all cores, in little memory


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation (or, with no messages, one text), and what is known about it."""

    id: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    split: str | None = None
    paraphrase: str | None = None
    keywords: tuple[str, ...] = ()
    phrasings: tuple[str, ...] = ()
    validation_paraphrase: str | None = None

    @property
    def prompt(self) -> list[Message]:
        """The conversation up to where the assistant gives its last answer."""
        return list(self.messages[:-1])

    @property
    def other_questions(self) -> list[str]:
        """All further ways of asking, in training and in measuring."""
        measured = (self.paraphrase, self.validation_paraphrase)
        return [*self.phrasings, *(question for question in measured if question is not None)]

    def asked_otherwise(self) -> Record:
        """The same record with the paraphrase as its question."""
        if self.paraphrase is None:
            raise ValueError(f"record {self.id} has no paraphrase")
        return self.asked(self.paraphrase)

    def asked(self, question: str) -> Record:
        """The same record with another question, and with no further phrasings. Its system message stays."""
        system = [message for message in self.messages[:1] if message["role"] == "system"]
        messages = (*system, {"role": "user", "content": question}, self.messages[-1])
        return replace(self, messages=messages, phrasings=())


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass
class Reading:
    """What was read of a source: its records; the kind of each file; how many rows were written in which way; columns
    that nothing reads, with the number of rows that have them.
    """

    records: list[Record] = field(default_factory=list)
    files: dict[Path, str] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)


def read_records(
    source: str | Path, tokenizer: Tokenizer | None = None, field: Mapping[str, str] | None = None
) -> list[Record]:
    """Read a file, a folder of train, valid and test files, or one of BUILT_IN by its name.

    tokenizer: if given, text that it cannot express is reported as well. field: where columns have other names than
    minilora's, `{"question": "q"}` reads the column q as the question.
    Raises DataError that lists every bad line at once.
    """
    return read_source(source, tokenizer, field).records


def read_source(
    source: str | Path, tokenizer: Tokenizer | None = None, field: Mapping[str, str] | None = None
) -> Reading:
    """`read_records`, with what was understood of the files on the way."""
    path = _place_of(source)
    reader = _Reader(tokenizer, dict(field or {}))
    for file, split in files_of(path).items():
        reader.read(file, split)
    return reader.finish(path)


def sha256_of_data(source: str | Path) -> str:
    """The SHA-256 of a source as `sha256sum` prints it; of a folder, that of the lines it prints for the files read."""
    import hashlib

    path, lines = _place_of(source), []
    for file in files_of(path):
        with file.open("rb") as opened:
            lines.append(f"{hashlib.file_digest(opened, 'sha256').hexdigest()}  {file.name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest() if path.is_dir() else lines[0].split()[0]


def _place_of(source: str | Path) -> Path:
    built_in = str(source) in BUILT_IN
    path = Path(str(files("minilora") / "data" / f"{source}.jsonl")) if built_in else Path(source)
    if not path.exists():
        raise DataError(
            f"{source}: no such data file or folder; use a .jsonl, .json, .csv, .tsv or .txt file, "
            f"a folder with a train file, or {', '.join(BUILT_IN)}"
        )
    return path


class _Reader:
    """Reads files into one Reading, and remembers every bad row until the end."""

    def __init__(self, tokenizer: Tokenizer | None, field: dict[str, str]):
        check_field(field)
        self.tokenizer, self.field = tokenizer, field
        self.reading = Reading()
        self.mapped: set[str] = set()  # names of `field` that a row had
        self.problems: list[str] = []  # the first of them
        self.bad = self.without_columns = 0

    def read(self, path: Path, split: str | None) -> None:
        """One file. split: what its rows are for, if the file says so."""
        reading = self.reading
        kind_of_file, rows = read_rows(path)
        reading.files[path] = kind_of_file
        field = {} if kind_of_file == TEXT_FILE else self.field
        seen: dict[str, int] = {}
        for position, (number, raw) in enumerate(rows, 1):
            place, name = _place_and_name(path, kind_of_file, number, position)
            if split is not None and kind_of_file != TEXT_FILE:
                name = f"{split}/{name}"  # unlike those of the folder's other files
            try:
                if isinstance(raw, ValueError):
                    raise raw
                row = rename(raw, field)
                kind = format_of(row, field)
                record = _record(kind, with_lists(row, kind), name, split)
                self._check(record)
                if record.id in seen:
                    raise ValueError(f"id {record.id!r} stands in line {seen[record.id]} already")
            except ValueError as error:
                self.bad += 1
                self.without_columns += isinstance(error, ColumnError)
                if self.bad <= _SHOWN:
                    self.problems.append(f"{place}: {error}")
                continue
            seen[record.id] = number
            self.mapped.update(field.keys() & row.keys())
            reading.formats[kind.name] += 1
            reading.unread.update(row.keys() - {*kind.needs, *kind.also})
            reading.records.append(record)

    def finish(self, source: Path) -> Reading:
        """What was read. Raises DataError for bad rows; where none has the columns it needs, in one line for all."""
        if self.bad > 1 and self.bad == self.without_columns and not self.reading.records:
            raise DataError(f"{self.problems[0]} (and so in all {self.bad} rows)")
        if self.bad:
            more = [f"and {self.bad - _SHOWN} more bad lines"] if self.bad > _SHOWN else []
            raise DataError("\n".join(self.problems + more))
        if not self.reading.records:
            raise DataError(f"{source}: there is no record in it")
        for name in self.field.keys() - self.mapped:
            raise DataError(f"{source}: field {name}={self.field[name]}: no row has a column {self.field[name]!r}")
        return self.reading

    def _check(self, record: Record) -> None:
        if self.tokenizer is not None:
            for said in (record.text, *(m["content"] for m in record.messages), *record.other_questions):
                self.tokenizer.check(said)


def _place_and_name(path: Path, kind_of_file: str, number: int, position: int) -> tuple[str, str]:
    """Where a row stands, for messages, and the id of its record if it has none of its own."""
    if kind_of_file == TEXT_FILE:
        return f"{path}", path.stem
    if kind_of_file == JSON_LIST:  # all of it may stand in one line
        return f"{path}:{number}: record {position}", f"record-{position}"
    return f"{path}:{number}", f"line-{number}"


def _record(kind: Format, row: Mapping[str, Any], name: str, split: str | None) -> Record:
    """A row as a record: its messages or its text, and what else it says. split: that of its file, if it has one."""
    own, name = row.get("split"), name if row.get("id") is None else str(row["id"])
    if own is not None and own not in SPLITS:
        raise ValueError(f"split is {own!r}, expected one of {', '.join(SPLITS)}")
    if None not in (own, split) and own != split:
        raise ValueError(f"split is {own!r} in a file of the split {split!r}")
    if kind is TEXT:
        return Record(name, text=text_of(row, "text"), split=own or split)
    messages, keywords = conversation(kind, row), row.get("keywords") or []
    if not isinstance(keywords, list) or not all(isinstance(word, str) and word for word in keywords):
        raise ValueError("keywords must be a list of words")
    phrasings = row.get("phrasings") or []
    if not isinstance(phrasings, list) or not all(isinstance(one, str) and one.strip() for one in phrasings):
        raise ValueError("phrasings must be a list of questions")
    measured = ("paraphrase", "validation_paraphrase")
    paraphrase, validation = (text_of(row, key) if row.get(key) is not None else None for key in measured)
    return Record(name, messages, "", own or split, paraphrase, tuple(keywords), tuple(phrasings), validation)


def split_records(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by split. Where none names a split, every tenth goes to "test" and the rest to "train".

    Raises DataError when nothing is left to train on.
    """
    splits = by_split(records)
    if not splits["train"]:
        raise DataError('no record is left to train on: none has "split": "train"')
    return splits


def by_split(records: Sequence[Record]) -> dict[str, list[Record]]:
    """`split_records` of records that need not be there to train on."""
    if all(record.split is None for record in records):
        records = [
            replace(record, split="test" if len(records) >= 10 and i % 10 == 9 else "train")
            for i, record in enumerate(records)
        ]
    splits: dict[str, list[Record]] = {name: [] for name in SPLITS}
    for record in records:
        splits[record.split or "train"].append(record)
    return splits


def told_of_splits(splits: Mapping[str, Sequence[Record]]) -> str:
    """How many records are trained on and how many held out, where `split_records` decided it."""
    trained, held = len(splits["train"]), sum(len(splits[name]) for name in SPLITS[1:])
    if held:
        return f"{trained} trained, {held} held out: no record names a split, so every tenth is kept to measure by"
    return f"{trained} trained, none held out: from ten records on, every tenth is kept to measure by"


# -- encoding ----------------------------------------------------------------------------------------------------------


def encode_record(record: Record, tokenizer: Tokenizer) -> Sample:
    """A conversation as token ids, with labels for the assistant's words and the token that ends them.

    A text is scored but for its first token; the token that ends an answer ends it, too.
    """
    return _encoded([record], tokenizer)[0]


def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, phrasings: bool = False, max_length: int | None = None
) -> list[Sample]:
    """Records as samples, in their order: `encode_record` of each, on all cores.

    phrasings: with the records' further ways of asking, one of which each pass of `fit` takes. max_length: texts are
    divided into samples of at most this many tokens; conversations stay whole, see `cut`.
    """
    samples: list[Sample] = []
    for i in range(0, len(records), AT_ONCE):
        wordings = [
            [record, *(record.asked(text) for text in record.phrasings if phrasings and not record.text)]
            for record in records[i : i + AT_ONCE]
        ]
        encoded = iter(_encoded([record for each in wordings for record in each], tokenizer))
        for record, *more in wordings:
            sample, others = next(encoded), tuple(next(encoded) for _ in more)
            if record.text:
                samples += _divided(sample.ids, max_length or len(sample.ids))
            else:
                samples.append(replace(sample, others=others) if others else sample)
    return samples


def _encoded(records: Sequence[Record], tokenizer: Tokenizer) -> list[Sample]:
    """`encode_record` of each; the texts of all of them are encoded at once."""
    texts = [_texts_of(record, tokenizer) for record in records]
    ids = iter(tokenizer.encode_all([text for some in texts for text in some]))
    return [
        _sample(record, some, [next(ids) for _ in some], tokenizer) for record, some in zip(records, texts, strict=True)
    ]


def _texts_of(record: Record, tokenizer: Tokenizer) -> list[str]:
    """What has to be encoded: a text; or a conversation, and for each answer all that stands before it."""
    if record.text:
        return [record.text]
    said = record.messages
    before = [said[:i] for i, message in enumerate(said) if message["role"] == "assistant"]
    return [tokenizer.render(said), *(tokenizer.render(begun, answer_next=True) for begun in before)]


def _sample(record: Record, texts: Sequence[str], encoded: Sequence[list[int]], tokenizer: Tokenizer) -> Sample:
    """A record as a sample. texts, encoded: those of `_texts_of`, and their token ids."""
    ids = encoded[0]
    if record.text:
        ids = _ended(ids, tokenizer)
        return Sample(tuple(ids), (NOT_SCORED, *ids[1:]))
    labels = [NOT_SCORED] * len(ids)
    answers = [message["content"] for message in record.messages if message["role"] == "assistant"]
    for answer, before, start in zip(answers, texts[1:], map(len, encoded[1:]), strict=True):
        # Most often the first end mark is the answer's own: no need to encode the answer to see where it ends.
        plain = tokenizer.eos not in answer and texts[0].startswith(f"{before}{answer}{tokenizer.eos}")
        end = ids.index(tokenizer.eos_id, start) if tokenizer.eos_id in ids[start:] else len(ids)
        if not plain or end == len(ids):
            said = tokenizer.encode(answer)
            if ids[start : start + len(said)] == said:  # not with a template that trims or merges
                end = start + len(said)
        end += end < len(ids) and ids[end] == tokenizer.eos_id
        labels[start:end] = ids[start:end]
    return Sample(tuple(ids), tuple(labels))


def encode_text(text: str, tokenizer: Tokenizer, max_length: int) -> list[Sample]:
    """A text as consecutive sequences of at most `max_length` tokens; every token but each first one is scored."""
    return _divided(tokenizer.encode(text), max_length)


def is_one_text(records: Sequence[Record]) -> bool:
    """Is all of it one text that names no split?"""
    return len(records) == 1 and bool(records[0].text) and records[0].split is None


def split_text(text: str, tokenizer: Tokenizer, max_length: int) -> dict[str, list[Sample]]:
    """`encode_text` by split: the last tenth of the sequences goes to "test", the rest to "train"."""
    sequences = encode_text(text, tokenizer, max_length)
    trained = len(sequences) - len(sequences) // 10
    return {"train": sequences[:trained], "validation": [], "test": sequences[trained:]}


def _divided(ids: Sequence[int], max_length: int) -> list[Sample]:
    sequences = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    return [Sample(tuple(row), (NOT_SCORED, *row[1:])) for row in sequences if len(row) > 1]


def _ended(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    return ids if ids[-1:] == [tokenizer.eos_id] else [*ids, tokenizer.eos_id]


def cut(samples: Sequence[Sample], max_length: int) -> tuple[list[Sample], int, int]:
    """Cut samples to `max_length` tokens. Returns those with something left to score, how many were cut, and how many
    of these had to be left out.
    """
    longer = sum(len(sample.ids) > max_length for sample in samples)
    short = [
        Sample(sample.ids[:max_length], sample.labels[:max_length], tuple(cut(sample.others, max_length)[0]))
        for sample in samples
    ]
    kept = [sample for sample in short if sample.scored]
    return kept, longer, len(short) - len(kept)


# -- batching ----------------------------------------------------------------------------------------------------------


def epochs(samples: Sequence[Sample], batch_size: int, seed: int) -> Iterator[list[Sample]]:
    """Batches of samples without end: every epoch all samples once, in a new order that `seed` determines.

    A sample with `others` comes as another one of them in every epoch; which is first differs by sample.
    """
    rng = np.random.default_rng(seed)
    for epoch in count():
        order = rng.permutation(len(samples))
        for i in range(0, len(order), batch_size):
            yield [samples[j].in_turn(epoch + int(j)) for j in order[i : i + batch_size]]
