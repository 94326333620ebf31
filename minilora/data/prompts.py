"""Data files as prompts: rows to predict something for, with or without the answers that training needs; and the same
rows with what was predicted.

A file is a table or has JSON rows, with a column such as text, question or messages, or it is a text file with a prompt
on each line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.tokenizer import Message
from .formats import check_field, listed, passage_of, prompt_of, rename
from .rows import TEXT_FILE, DataError, read_rows

TABLES = {".csv": ",", ".tsv": "\t"}
JSON_LINES = ".jsonl"


@dataclass(frozen=True)
class Prompt:
    """A row of a file: its line, its columns as they are, what it asks, and its passage, if it has one.

    error: why the row asks nothing, such as an empty text.
    """

    line: int
    row: Mapping[str, Any]
    messages: Sequence[Message] = ()
    passage: str | None = None
    error: str | None = None


def read_prompts(path: Path, field: Mapping[str, str] | None = None) -> list[Prompt]:
    """The prompts of a file, in its order; rows that ask nothing are there, too.

    field: the file's names of columns, by minilora's, as for `read_records`.

    Raises DataError for a file that cannot be read, for a line that is no row, and if no row asks anything.
    """
    field = field or {}
    check_field(field)
    kind, rows = read_rows(path)
    if kind == TEXT_FILE:
        lines = [line for _, row in rows for line in row["text"].splitlines()]
        rows, field = iter([(i, {"text": line}) for i, line in enumerate(lines, 1) if line.strip()]), {}
    prompts = []
    for line, raw in rows:
        if isinstance(raw, ValueError):
            raise DataError(f"{path}:{line}: {raw}")
        try:
            row = rename(raw, field)
            prompts.append(Prompt(line, raw, prompt_of(row), passage_of(row)))
        except ValueError as error:
            prompts.append(Prompt(line, raw, error=str(error)))
    if not prompts:
        raise DataError(f"{path}: there is no row in it")
    if all(prompt.error for prompt in prompts):
        raise DataError(f"{path}:{prompts[0].line}: {prompts[0].error}")
    return prompts


class Rows:
    """Rows as the text of a file: CSV or TSV with a heading, or JSON lines.

    suffix: of the file. columns: of all rows, in their order; a table has no others.
    """

    def __init__(self, suffix: str, columns: Sequence[str]):
        if suffix not in (*TABLES, JSON_LINES):
            raise ValueError(f"rows are written as {listed([*TABLES, JSON_LINES])}, got {suffix or 'no ending'}")
        self.comma, self.columns = TABLES.get(suffix), list(columns)

    def heading(self) -> str:
        """The heading of a table."""
        return "" if self.comma is None else self._line(self.columns)

    def text(self, row: Mapping[str, Any]) -> str:
        """A row. A table holds a list or an object as JSON, and nothing as an empty cell."""
        if self.comma is None:
            return _json(row) + "\n"
        return self._line([_cell(row.get(name)) for name in self.columns])

    def done(self, path: Path, prompts: Sequence[Prompt]) -> int:
        """How many rows a file has that was written before. Raises DataError unless they are the first of `prompts`."""
        count = 0
        for count, (line, row) in enumerate(read_rows(path)[1], 1):
            own = prompts[count - 1].row if count <= len(prompts) else {}
            if isinstance(row, ValueError) or not own or any(_cell(row.get(x)) != _cell(own[x]) for x in own):
                raise DataError(f"{path}:{line}: not row {count} of the file to predict for: --overwrite replaces it")
        return count

    def _line(self, cells: Sequence[str]) -> str:
        line = io.StringIO()
        csv.writer(line, delimiter=self.comma or ",", lineterminator="\n").writerow(cells)
        return line.getvalue()


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)  # dates, which a Parquet file may have, as text
