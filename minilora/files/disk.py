"""Files on disk: the one error for a bad file, JSON in and out, and writes that happen whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class ModelFileError(ValueError):
    """A model or adapter file is missing, damaged, or does not fit. The message names the file and what was expected.

    It is one line, whatever names from a damaged file or a library's own message bring with them.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ModelFileError naming the file when it is missing, no JSON, or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, record: Mapping[str, Any], indent: int = 2, sort_keys: bool = False) -> None:
    """Write a JSON object. The file appears whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(record, indent=indent, sort_keys=sort_keys) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to: what is there at the end of the block takes the place of `path` in one step.

    When the block fails, `path` stays as it was and nothing is left beside it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
