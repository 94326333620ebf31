"""Data files as rows: JSONL, a JSON list, a table with a heading, Parquet, text; one file, or one per split."""

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from ..files.disk import entries
from ..progress import log
from .formats import NAMES, listed

SPLITS = ("train", "validation", "test")
TEXT_FILE, JSON_LIST, PARQUET = "text", "JSON list", "Parquet"  # kinds of file
SPLIT_NAMES = {  # as files are called -> the split
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_NO_TEXT = {  # the first bytes of a file that is not text -> what it is, and what to do
    b"\x1f\x8b": "compressed with gzip: decompress it first (gunzip)",
    b"BZh": "compressed with bzip2: decompress it first (bunzip2)",
    b"\xfd7zXZ": "compressed with xz: decompress it first (unxz)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: decompress it first (unzstd)",
    b"ARROW1": "an Arrow file: write it as JSONL first (datasets: load_from_disk(...).to_json(...))",
    b"PK\x03\x04": "a zip archive or a file of an office program: unpack it, or save it as CSV or .txt",
    b"%PDF": "a PDF: save its text as .txt first",
    b"\xd0\xcf\x11\xe0": "a file of an older office program, such as .xls or .msg: save it as CSV UTF-8, or as .txt",
    b"SQLite f": "an SQLite database: save a table of it as CSV (sqlite3 -csv -header FILE 'SELECT ...' > rows.csv)",
}
TEXT_SUFFIXES = (".txt", ".md")
TABLES = {".csv": ",", ".tsv": "\t"}  # endings of tables, each with its usual delimiter
_JIS = re.compile(r"\x1b\$[@B]")  # to Japanese letters, in an encoding of ASCII alone
_WHITE = re.compile(r"\s*")
_KEY = re.compile(r'"([^"\\]*)"\s*:')
_WRAPPED = re.compile(  # {"version": 1, "data": before a list of records
    rf'\s*{{\s*(?:{_KEY.pattern}\s*(?:"[^"\\]*"|[-+.\w]+)\s*,\s*)*{_KEY.pattern}\s*(?=\[\s*{{)'
)
_QUOTED = re.compile(r"""(?<![^,;\t\r\n])"(?:[^"]|"")*\"""")  # a cell in quotes
_JSON = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name))  # as in a DataFrame
_LARGEST = 1 << 30  # characters of a cell: Python's limit for the whole program is 131,072 until it is raised
_LINES = 10  # lines of a text, at most, that show whether it is a table
_FIRST = 1 << 16  # characters of a file's first line that decide its kind


class DataError(ValueError):
    """A data file cannot be used. The message has a line for each kind of mistake: `file:line: reason`."""


class EmptyFileError(DataError):
    """A data file has no text."""


def files_of(path: Path) -> dict[Path, str | None]:
    """The files of a source, each with its split: a folder has a train, valid and test file. None for a single file,
    and for each file of a folder of texts.

    Raises DataError for another folder, and for two files for one split.
    """
    if not path.is_dir():
        return {path: None}
    inside = [item for item in entries(path) if item.is_file() and not item.name.startswith(".")]
    found: dict[str, Path] = {}
    for item in inside:
        split = SPLIT_NAMES.get(item.stem.lower())
        if split is None:
            continue
        if split in found:
            raise DataError(f"{path}: {found[split].name} and {item.name} are both for {split}: keep one of them")
        found[split] = item
    if inside and not found and all(item.suffix.lower() in TEXT_SUFFIXES for item in inside):
        return dict.fromkeys(inside)
    if "train" not in found:
        there = listed([item.name for item in inside]) or "no files"
        raise DataError(
            f"{path}: a folder of data needs train.jsonl (or .json, .csv, .tsv, .parquet, .txt, .md), and may have "
            f"valid and test, or has .txt and .md files alone, a text each; there are {there}"
        )
    return {found[split]: split for split in SPLITS if split in found}


def read_rows(path: Path) -> tuple[str, Iterator[tuple[int, Any]]]:
    """The kind of a file, and its rows with their line numbers. A ValueError takes the place of an unreadable row.

    A text file is one row, {"text": ...}. Raises DataError for a file that is not text, and EmptyFileError.
    """
    head = _head(path)
    if head.startswith(b"PAR1"):
        return PARQUET, _parquet(path)
    encoding = _encoding(path, head)
    with _opened(path, encoding) as file:
        lines = iter(lambda: file.readline(_FIRST), "")  # a list may be one line of a gigabyte
        first, second = islice(chain((line.strip() for line in lines if line.strip()), ("", "")), 2)
        file.seek(0)
        start = _WRAPPED.match(beginning := file.read(_FIRST))
    if _JIS.search(beginning):
        raise DataError(f"{path}: in ISO-2022-JP, as Japanese mail is: save it as UTF-8")
    if not first:
        raise EmptyFileError(f"{path}: the file is empty")

    def reading(rows: Callable[[TextIO], Iterator[tuple[int, Any]]]) -> Iterator[tuple[int, Any]]:
        with _opened(path, encoding) as file:
            yield from rows(file)

    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        tabs = [line.count("\t") for line in beginning.splitlines()[:_LINES] if line.strip()]
        if suffix == ".txt" and len(tabs) > 2 and 0 < min(tabs) == max(tabs):
            log.warning(f"{path}: its lines have the same number of tabs, {tabs[0]}: if it is a table, call it .tsv")
        return TEXT_FILE, reading(lambda file: iter([(1, {"text": file.read()})]))
    if suffix in TABLES:
        comma = _comma(suffix, beginning)
        return suffix[1:].upper(), reading(lambda file: _table(file, comma))
    if first[0] == "[":
        return JSON_LIST, reading(_elements)
    if suffix == ".json" and first[0] == "{" and not (second and first[-1] == "}"):  # not a record per line
        if start and set(NAMES).isdisjoint(_KEY.findall(start[0])):
            return JSON_LIST, reading(lambda file: _elements(file, start.end()))
        if len(first) < _FIRST and second:
            advice = "write a list, [{...}, ...], or a record per line"
            raise DataError(f"{path}: one JSON object on several lines, without a list of records: {advice}")
    if suffix not in (".json", ".jsonl", ".ndjson") and first[0] != "{":
        raise DataError(f"{path}: what kind of file is it? Use .jsonl, .json, .csv, .tsv, .txt or .md")
    return "JSONL", reading(_lines)


def dialect_of(path: Path) -> tuple[str, str]:
    """The delimiter of a table, and an encoding with which Excel reads another file as it reads this one."""
    encoding = _encoding(path, head := _head(path))
    with _opened(path, encoding) as file:
        beginning = file.read(_FIRST)
    marked = encoding == "utf-16" or head.startswith(codecs.BOM_UTF8)
    return _comma(path.suffix.lower(), beginning), "utf-8-sig" if marked else "utf-8"


def _comma(suffix: str, beginning: str) -> str:
    """The delimiter of a table: in its first line, outside of quotes, in which a name may have commas and lines."""
    heading = re.split(r"[\r\n]", _QUOTED.sub("", beginning).lstrip(), maxsplit=1)[0]
    usual = TABLES[suffix]
    return usual if usual == "\t" and usual in heading else max(usual, *",;\t|", key=heading.count)


def _head(path: Path) -> bytes:
    """The first bytes of a file. Raises DataError for one that cannot be read, or not twice, as a pipe."""
    if path.is_dir():
        there = listed(sorted(item.name for item in entries(path)))
        raise DataError(f"{path}: a folder, and a file is needed: name one of {there}")
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: a pipe or a device: save its rows in a file first")
    try:
        with path.open("rb") as file:
            return file.read(8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _encoding(path: Path, head: bytes) -> str:
    """UTF-8, or UTF-16 if the file's first bytes say so. Raises DataError for a file that is not text."""
    for magic, what in _NO_TEXT.items():
        if head.startswith(magic):
            raise DataError(f"{path}: {what}")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in head:
        raise DataError(f"{path}: UTF-16 without a byte order mark, or no text: save it as UTF-8")
    return "utf-8-sig"


@contextmanager
def _opened(path: Path, encoding: str) -> Iterator[TextIO]:
    try:
        with path.open(encoding=encoding, newline="") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeError as error:
        kind = encoding.removesuffix("-sig").upper()
        raise DataError(f"{path}: cannot be read as {kind} text ({error}): save it as UTF-8") from error


def _lines(file: TextIO) -> Iterator[tuple[int, Any]]:
    """One JSON value per line; blank lines are counted and skipped."""
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, _JSON.decode(line)
            except json.JSONDecodeError as error:
                yield number, ValueError(f"not JSON ({error.msg.removesuffix(' at')} at column {error.pos + 1})")
            except (ValueError, RecursionError) as error:
                yield number, ValueError(f"not JSON ({error})")


def _elements(file: TextIO, start: int = 0) -> Iterator[tuple[int, Any]]:
    """The values of the JSON list that begins at character `start`, after white space."""
    text, decode = file.read(), _JSON.raw_decode

    def after(place: int) -> int:
        """The next place that is not white space."""
        return _WHITE.match(text, place).end()  # type: ignore[union-attr]

    at = after(after(start) + 1)
    line = 1 + text.count("\n", 0, at)
    found = text[at : at + 1]
    while found != "]":
        try:
            value, end = decode(text, at)
        except (ValueError, RecursionError) as error:
            where = line + text.count("\n", at, getattr(error, "pos", at))
            yield where, ValueError(f"not JSON ({getattr(error, 'msg', error)}): nothing after it was read")
            return
        yield line, value
        mark = after(end)
        line += text.count("\n", at, mark)
        found = text[mark : mark + 1]
        if found not in (",", "]"):
            yield line, ValueError(f"not JSON (expected , or ] but got {found or 'the end'})")
            return
        at = after(mark + 1)
        line += text.count("\n", mark, at)


def _table(file: TextIO, comma: str) -> Iterator[tuple[int, Any]]:
    """The rows of a table, each with the line in which it begins, as dicts by the heading, where a name that several
    columns have is followed by their numbers. An empty cell is None; under no name it is left out.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _LARGEST))
    reader = csv.reader(file, delimiter=comma, strict=True)
    heading, named = list[str](), set[str]()
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            asked = 'is a quote left open, or one inside a text not written twice, ""?'
            yield number, ValueError(f"not CSV ({error}): nothing after it was read; {asked}")
            return
        if cells is None:
            return
        if not any(cell.strip() for cell in cells) or (not heading and cells == ["sep=", ""]):  # which is for Excel
            continue
        if not heading:
            times = Counter(cell.strip() for cell in cells)
            heading = [cell.strip() or f"column {i}" for i, cell in enumerate(cells, 1)]
            heading = [f"{name} (column {i})" if times[name] > 1 else name for i, name in enumerate(heading, 1)]
            named = {name for name, cell in zip(heading, cells, strict=True) if cell.strip()}
        elif any(cells[len(heading) :]):
            more = f"{len(cells)} cells under a heading of {len(heading)}"
            title = f"; if {heading[0][:40]!r} is a title, delete what is above the names of the columns"
            title = title if len(heading) == 1 else ""
            yield number, ValueError(f"{more}: put a text that contains {comma!r} in quotes{title}")
        else:
            whole = zip(heading, [*cells, *[""] * len(heading)], strict=False)
            row = {name: cell or None for name, cell in whole if cell or name in named}
            yield number, row


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a Parquet file as dicts, a thousand at a time. A label that is a number with a name is its name.

    Raises DataError without the library pyarrow, and for a damaged file.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{path}: a Parquet file: pip install 'minilora[hub]' to read it") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            try:
                names = _class_names(file.schema_arrow.metadata or {})
            except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
                wrong = 'the entry "huggingface" of its schema names no labels'
                raise DataError(f"{path}: {wrong} ({error}): write the file without it") from error
            for batch in file.iter_batches(1000):
                for row in batch.to_pylist():
                    number += 1
                    labels = {key: each[row[key]] for key, each in names.items() if row.get(key) in range(len(each))}
                    yield number, row | labels
    except (OSError, ArrowException) as error:
        raise DataError(f"{path}: a Parquet file that cannot be read ({' '.join(str(error).split())})") from error


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """The names of the numbers in each column of labels, as the library `datasets` stores them in a file's schema."""
    about = json.loads(metadata.get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {})
    return {key: each["names"][:] for key, each in features.items() if isinstance(each, dict) and "names" in each}
