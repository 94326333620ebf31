"""Data files as prompts: rows to predict something for, with or without the answers that training needs; and the same
rows with what was predicted.

A file is a table or has JSON rows, with a column such as text, question or messages, or it is a text file with a prompt
on each line.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.tokenizer import Message
from .formats import check_field, listed, passage_of, prompt_of, rename
from .rows import PARQUET, TABLES, TEXT_FILE, DataError, EmptyFileError, dialect_of, read_rows

JSON_LINES = ".jsonl"


@dataclass(frozen=True)
class Prompt:
    """A row of a file: its place, such as "line 2", its columns as they are, what it asks, and its passage, if any.

    error: why the row asks nothing, such as an empty text.
    """

    place: str
    row: Mapping[str, Any]
    messages: Sequence[Message] = ()
    passage: str | None = None
    error: str | None = None


def read_prompts(path: Path, field: Mapping[str, str] | None = None) -> list[Prompt]:
    """The prompts of a file, in its order; rows that ask nothing are there, too.

    field: the file's names of columns, by minilora's, as for `read_records`.

    Raises DataError for a file that cannot be read, for a line that is not a row, and if no row asks anything.
    """
    field = field or {}
    check_field(field)
    kind, rows = read_rows(path)
    if kind == TEXT_FILE:
        ends = "\r\n|\r|\n"  # of lines of a file; str.splitlines has others, such as U+2028
        lines = [line for _, row in rows for line in re.split(ends, row["text"])]
        rows, field = iter([(i, {"text": line}) for i, line in enumerate(lines, 1) if line.strip()]), {}
    at, unit = (f"{path}: row ", "row") if kind == PARQUET else (f"{path}:", "line")
    prompts, first = list[Prompt](), 0
    for number, raw in rows:
        if isinstance(raw, ValueError):
            raise DataError(f"{at}{number}: {raw}")
        first = first or number
        try:
            row = rename(raw, field)
            prompts.append(Prompt(f"{unit} {number}", raw, prompt_of(row), passage_of(row)))
        except ValueError as error:
            prompts.append(Prompt(f"{unit} {number}", raw, error=str(error)))
    if not prompts:
        raise DataError(f"{path}: there is no row in it")
    if all(prompt.error for prompt in prompts):
        raise DataError(f"{at}{first}: {prompts[0].error}")
    return prompts


class Rows:
    """Rows as the text of a file: CSV or TSV with a heading, or JSON lines.

    suffix: of the file. columns: of all rows, in their order; a table has no others. like: a table, of which one with
    the same ending gets the delimiter and the encoding, so that Excel opens both alike.
    """

    def __init__(self, suffix: str, columns: Sequence[str], like: Path | None = None):
        if suffix not in (*TABLES, JSON_LINES):
            raise ValueError(f"rows are written as {listed([*TABLES, JSON_LINES])}, got {suffix or 'no ending'}")
        self.comma, self.encoding, self.columns = TABLES.get(suffix), "utf-8", list(columns)
        if self.comma is not None and like is not None and like.suffix.lower() == suffix:
            self.comma, self.encoding = dialect_of(like)

    def heading(self) -> str:
        """The heading of a table."""
        return "" if self.comma is None else self._line(self.columns)

    def text(self, row: Mapping[str, Any]) -> str:
        """A row. A table holds a list or an object as JSON, and nothing as an empty cell."""
        if self.comma is None:
            return _json(row) + "\n"
        return self._line([_cell(row.get(name)) for name in self.columns])

    def done(self, path: Path, prompts: Sequence[Prompt]) -> int:
        """How many rows a file has that was written before. Half a row at its end, which a full disk or a killed
        process leaves, is removed. Raises DataError unless the other rows are the first of `prompts`, with the same
        columns.
        """
        content, count = path.read_bytes(), 0
        end = content.rfind(b"\n") + 1
        while self.comma is not None and content.count(b'"', 0, end) % 2:  # a line break inside quotes
            end = content.rfind(b"\n", 0, end - 1) + 1
        os.truncate(path, end)
        try:
            for count, (line, row) in enumerate(read_rows(path)[1], 1):
                own = prompts[count - 1].row if count <= len(prompts) else {}
                if isinstance(row, ValueError) or not own or any(_cell(row.get(x)) != _cell(own[x]) for x in own):
                    where = f"{path}:{line}: not row {count} of the file to predict for"
                    raise DataError(f"{where}: delete it and what follows, or --overwrite replaces the file")
                missing = self.comma is not None and any(name not in row for name in self.columns)
                if missing or any(name not in self.columns for name in row):
                    there = f"has the columns {listed([*row])}, and now they are {listed(self.columns)}"
                    raise DataError(f"{path} {there}: --overwrite replaces it")
        except EmptyFileError:
            return 0
        except DataError:  # another file: it stays as it was
            with path.open("ab") as file:
                file.write(content[end:])
            raise
        return count

    def _line(self, cells: Sequence[str]) -> str:
        line = io.StringIO()
        csv.writer(line, delimiter=self.comma or ",").writerow(cells)  # it quotes what has a character of its "\r\n"
        return line.getvalue().removesuffix("\r\n") + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return _json(value) if isinstance(value, int | float | list | dict) else str(value)  # dates as they are


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)  # dates, which a Parquet file may have, as text
