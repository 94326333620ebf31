"""Files on disk: the one error for a bad file, JSON in and out, and writes that happen whole or not at all."""

from __future__ import annotations

import json
import os
import re
import stat
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
    """A path to write a file to: what is there at the end of the block takes the place of `path` in one step.

    When the block fails, `path` stays as it was and nothing is left beside it. After a crash of the whole machine, too,
    `path` is the old file or the new one. A new file has the permissions that the umask gives, whatever the library
    that wrote it thinks of them; one that takes the place of another has the other's. Raises FileNotFoundError where
    the folder is not there.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    partial = _aside(path, "partial")
    mode = path.stat().st_mode if path.exists() else _mode_of_new_file(partial)
    try:
        yield partial
        _flush(partial)
        partial.chmod(stat.S_IMODE(mode))
        os.replace(partial, path)
        _flush_entries(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new, empty folder to fill: at the end of the block it takes the place of `path`, whole.

    What stood at `path` before, a folder or nothing, is gone then, and not a moment earlier: when the block fails, it
    is there as it was. A process killed between the two renames leaves it under another name, and the next
    `replacing_folder` of this path puts it back first. Raises NotADirectoryError when `path` is a file.
    """
    path = Path(os.path.realpath(path))  # of a link to a folder, the folder is replaced
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: choose a folder")
    put_back(path)
    partial = _aside(path, "partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        swap_in(partial, path)
    finally:
        remove_folder(partial)


def swap_in(folder: Path, path: Path) -> None:
    """Let a folder that is full take the place of `path`, as at the end of `replacing_folder`."""
    for inner, _, names in os.walk(folder):
        for name in names:
            _flush(Path(inner, name))
        _flush_entries(Path(inner))
    try:
        if path.exists():
            os.replace(path, _aside(path, "old"))
        os.replace(folder, path)
        _flush_entries(path.parent)
    finally:
        put_back(path)


def _aside(path: Path, ending: str) -> Path:
    """A name beside `path` that nobody else uses."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.{ending}")


def put_back(path: Path) -> None:
    """After a process that was killed in `replacing_folder` or `swap_in`: what was moved aside from `path` goes back
    there, or, where its successor has arrived, away.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.old")
    for old in path.parent.iterdir() if path.parent.is_dir() else ():
        if not pattern.fullmatch(old.name):
            continue
        if path.exists():
            remove_folder(old)
        else:
            os.replace(old, path)


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it, as far as that is possible."""
    import shutil  # imported where it is used, since every program imports this file

    shutil.rmtree(folder, ignore_errors=True)


def _mode_of_new_file(path: Path) -> int:
    """The mode of a file made here: asked of the system, since reading the umask means setting it for all threads."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = path.stat().st_mode
    path.unlink()
    return mode


def _flush(path: Path) -> None:
    """Wait until the bytes of a file are on the disk, and not in the system's memory alone."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _flush_entries(folder: Path) -> None:
    """Wait until the names in a folder are on the disk. Windows has no such call, and needs none."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
