"""Data files of every kind as rows: JSONL, a JSON list, a table with a heading, a text; one file, or one per split.

A row is read when it is asked for, and none is kept: a large file is never held as a whole.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from .formats import listed

SPLITS = ("train", "validation", "test")
TEXT_FILE, JSON_LIST = "text", "JSON list"  # kinds of file
_SPLIT_NAMES = {"train": "train", **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"), "test": "test"}
_NO_TEXT = {  # how a file begins that holds no text -> what it is, and what to do
    b"\x1f\x8b": "packed with gzip: unpack it first (gunzip)",
    b"BZh": "packed with bzip2: unpack it first (bunzip2)",
    b"\xfd7zXZ": "packed with xz: unpack it first (unxz)",
    b"\x28\xb5\x2f\xfd": "packed with zstd: unpack it first (unzstd)",
    b"PAR1": 'a Parquet file: write it as JSONL first (pandas: read_parquet(...).to_json(..., "records", lines=True))',
    b"ARROW1": "an Arrow file: write it as JSONL first (datasets: load_from_disk(...).to_json(...))",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save the sheet as CSV",
    b"%PDF": "a PDF: save its text as .txt first",
}
_WHITE = re.compile(r"\s*")
_FIRST = 1 << 16  # characters of a file's first line that tell what kind it is
_CHUNK = 1 << 18  # characters of a JSON list that are read at a time


class DataError(ValueError):
    """A data file cannot be used. The message lists every bad line as `file:line: reason`."""


def files_of(path: Path) -> dict[Path, str | None]:
    """The files of a source with the split that each stands for: a file alone (None), or a folder's train, valid, test.

    Raises DataError for a folder without train, or with two files for one split.
    """
    if not path.is_dir():
        return {path: None}
    inside = sorted(item for item in path.iterdir() if item.is_file() and not item.name.startswith("."))
    found: dict[str, Path] = {}
    for item in inside:
        split = _SPLIT_NAMES.get(item.stem.lower())
        if split is None:
            continue
        if split in found:
            raise DataError(f"{path}: {found[split].name} and {item.name} both stand for {split}: keep one of them")
        found[split] = item
    if "train" not in found:
        there = listed([item.name for item in inside]) or "no files"
        raise DataError(
            f"{path}: a folder of data needs train.jsonl (or .json, .csv, .tsv, .txt), and may have valid and test; "
            f"there are {there}"
        )
    return {found[split]: split for split in SPLITS if split in found}


def read_rows(path: Path) -> tuple[str, Iterator[tuple[int, Any]]]:
    """What kind of file it is, and its rows with their line numbers; ValueError in place of a row that cannot be read.

    A text file is one row, {"text": ...}. Raises DataError for what is no text file.
    """
    encoding = _encoding(path)
    with _opened(path, encoding) as file:
        lines = iter(lambda: file.readline(_FIRST), "")  # a list may stand in one line of a gigabyte
        first = next((line.strip() for line in lines if line.strip()), "")
    if not first:
        raise DataError(f"{path}: the file is empty")
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return TEXT_FILE, _reading(path, encoding, lambda file: iter([(1, {"text": file.read()})]))
    if suffix in (".csv", ".tsv"):
        comma = "\t" if suffix == ".tsv" else max(",;\t", key=first.count)
        return suffix[1:].upper(), _reading(path, encoding, lambda file: _table(file, comma))
    if first[0] == "[":
        return JSON_LIST, _reading(path, encoding, _elements)
    if suffix == ".json" and first[0] == "{" and len(first) < _FIRST and not _is_json(first):
        raise DataError(f"{path}: one JSON object on several lines: write a list, [{{...}}, ...], or a record per line")
    if suffix not in (".json", ".jsonl", ".ndjson") and first[0] != "{":
        raise DataError(f"{path}: what kind of file is it? Use .jsonl, .json, .csv, .tsv or .txt")
    return "JSONL", _reading(path, encoding, _lines)


def _encoding(path: Path) -> str:
    """UTF-8, or what the file's first bytes say. Raises DataError for what is no text."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    for magic, what in _NO_TEXT.items():
        if head.startswith(magic):
            raise DataError(f"{path}: {what}")
    return "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def _reading(
    path: Path, encoding: str, rows: Callable[[TextIO], Iterator[tuple[int, Any]]]
) -> Iterator[tuple[int, Any]]:
    with _opened(path, encoding) as file:
        yield from rows(file)


@contextmanager
def _opened(path: Path, encoding: str) -> Iterator[TextIO]:
    try:
        with path.open(encoding=encoding, newline="") as file:
            yield file
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _lines(file: TextIO) -> Iterator[tuple[int, Any]]:
    """One JSON value per line; blank lines count and are skipped."""
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, ValueError(f"not JSON ({error})")


def _elements(file: TextIO) -> Iterator[tuple[int, Any]]:
    """The values of one JSON list, each decoded as soon as the text read so far holds it."""
    text = _Text(file)
    text.skip("[")
    if text.next() == "]":
        return
    while True:
        line = text.line
        try:
            value = text.value()
        except UnicodeError:
            raise
        except (ValueError, RecursionError) as error:
            where = line + text.text.count("\n", text.at, getattr(error, "pos", text.at))
            yield where, ValueError(f"not JSON ({getattr(error, 'msg', error)}): nothing after it was read")
            return
        yield line, value
        if (mark := text.next()) == ",":
            text.skip(",")
            continue
        if mark != "]":
            yield text.line, ValueError(f"not JSON (expected , or ] but got {mark or 'the end'})")
        return


class _Text:
    """The text of a JSON file from some place on, of which as much is held as the next value needs."""

    def __init__(self, file: TextIO):
        self.file, self.text, self.at, self.line = file, "", 0, 1
        self.decode = json.JSONDecoder().raw_decode

    def next(self) -> str:
        """The next character that is no white space, or nothing at the end."""
        while True:
            self._go(_WHITE.match(self.text, self.at).end())  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_on():
                return ""

    def skip(self, mark: str) -> None:
        """Go past a character and the white space after it."""
        self.next()
        self._go(self.at + len(mark))
        self.next()

    def value(self) -> Any:
        """The next value. Raises ValueError when what follows, to the end of the file, is none."""
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except ValueError:
                if not self._read_on():
                    raise
            else:
                if end < len(self.text) or not self._read_on():  # a number may go on
                    self._go(end)
                    return value

    def _go(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def _read_on(self) -> bool:
        more = self.file.read(max(_CHUNK, len(self.text) - self.at))  # twice as much: long values are decoded few times
        if more:
            self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)


def _table(file: TextIO, comma: str) -> Iterator[tuple[int, Any]]:
    """The rows under the heading of a table, with the line each begins in. An empty cell is None."""
    reader = csv.reader(file, delimiter=comma, strict=True)
    heading: list[str] = []
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield number, ValueError(f"not CSV ({error}): nothing after it was read; is a quote left open?")
            return
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if not heading:
            heading = [cell.strip() for cell in cells]
            if twice := sorted({name for name in heading if name and heading.count(name) > 1}):
                yield number, ValueError(f"column {twice[0]!r} stands twice in the heading: rename one")
                return
        elif len(cells) > len(heading):
            more = f"{len(cells)} cells under a heading of {len(heading)}"
            yield number, ValueError(f"{more}: a text that holds {comma!r} stands in quotes")
        else:
            yield number, dict(zip(heading, [*(cell or None for cell in cells), *[None] * len(heading)], strict=False))


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
