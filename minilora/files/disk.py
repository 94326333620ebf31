"""Files on disk: the error for a bad file, JSON, and writes that happen completely or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def _machine() -> str:
    """What is the same for processes that know each other by their numbers: on one machine, and in one container."""
    try:
        inside = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not on Linux
        inside = 0
    name = os.uname().nodename if os.name == "posix" else ""
    return f"{zlib.crc32(f'{name} {inside}'.encode()):08x}"


_PROCESS = f"{os.getpid()}-{os.urandom(4).hex()}"  # a container may give the same number again
_MACHINE = _machine()
_DAY = 24 * 3600


class ModelFileError(ValueError):
    """A model or adapter file is missing, damaged, or does not fit. The message names the file and what was expected.

    It is one line, even if a name in a damaged file or a library's message contains line breaks.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """A block that reads `path` or files in it: any OSError is raised as a ModelFileError that names the path."""
    try:
        yield
    except OSError as error:
        raise ModelFileError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error


@contextmanager
def locked(path: Path, otherwise: str) -> Iterator[None]:
    """A block that no other process is in with the same path, which is a file that exists meanwhile. Raises ValueError
    with the message `otherwise` where one is.
    """
    from filelock import FileLock, Timeout

    try:
        with FileLock(path, timeout=0):
            try:
                yield
            finally:
                with suppress(OSError):  # Windows deletes it when it is released
                    path.unlink()
    except Timeout as error:
        raise ValueError(otherwise) from error


OF_FILE_MANAGERS = (".DS_Store", "Thumbs.db", "desktop.ini")  # Finder and Explorer leave them in folders


def _unfinished(name: str) -> re.Pattern[str]:
    """What a file or folder with a name like this is called while it is written: see `_aside`."""
    return re.compile(rf"\.{name}\.[0-9a-f]{{8}}\.((\d+)-[0-9a-f]{{8}})-([0-9a-f]{{8}})\.partial")


_ANY_UNFINISHED = _unfinished(".+")


def entries(folder: Path) -> list[Path]:
    """What a folder holds, but for files of file managers and unfinished ones, in the same order on every system.

    Paths alone would be in another order on Windows, where they are compared without case.
    """
    names = (path.name for path in folder.iterdir() if path.name not in OF_FILE_MANAGERS)
    return [folder / name for name in sorted(names) if not _ANY_UNFINISHED.fullmatch(name)]


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, as `sha256sum` prints it."""
    import hashlib  # here, so that `import minilora` is quick

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ModelFileError that names the file if it is missing, no JSON, or no object."""
    try:
        if path.exists() and not path.is_file():  # a link in a folder from elsewhere may lead to one without an end
            raise ValueError("a folder, a pipe or a device")
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # Notepad may write a BOM
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, record: Mapping[str, Any], indent: int = 2, sort_keys: bool = False) -> None:
    """Write a JSON object. The file appears completely or not at all."""
    write_bytes(path, (json.dumps(record, indent=indent, sort_keys=sort_keys) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, which appears completely or not at all: see `replacing`."""
    with replacing(path, len(content)) as partial:
        partial.write_bytes(content)


@contextmanager
def replacing(path: Path, size: int | None = None) -> Iterator[Path]:
    """A temporary path to write a file to: at the end of the block the file replaces `path` in one step.

    If the block fails, `path` stays as it was and the temporary file is removed. Even after a crash of the machine,
    `path` is the old file or the new one. A new file has the permissions that the umask gives, whatever library wrote
    it; a file that replaces another has that file's. A link is replaced by the file, and what it leads to stays: it may
    be shared, as Hugging Face's cache is. size: how many bytes will be written, for the error message.

    Raises FileNotFoundError if there is no such folder, and OSError that says how much space is needed and free if the
    disk is full. Errors name `path`, not the temporary file.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    remove_unfinished(path)
    partial = _partial(path)
    with _errors_about(path, partial, size):
        try:
            mode = path.stat().st_mode if path.exists() else _mode_of_new_file(partial)
            yield partial
            _flush(partial)
            partial.chmod(stat.S_IMODE(mode))
            os.replace(partial, path)
            _flush_entries(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new, empty folder to fill: at the end of the block it replaces `path`.

    If the block fails, `path` stays as it was. If the process is killed between the two renames, the old folder is left
    under another name, and the next `replacing_folder` of this path puts it back first. Raises NotADirectoryError if
    `path` is a file, and OSError as `replacing` does.
    """
    path = Path(os.path.realpath(path))  # of a link to a folder, the folder is replaced
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: choose a folder")
    put_back(path)
    remove_unfinished(path)
    partial = _partial(path)
    with _errors_about(path, partial):
        try:
            partial.mkdir(parents=True)
            yield partial
            swap_in(partial, path)
        finally:
            remove_folder(partial)


@contextmanager
def _errors_about(path: Path, partial: Path, size: int | None = None) -> Iterator[None]:
    """A block whose errors name `path`, not the temporary `partial`, and say in one line that the disk is full."""
    import shutil  # imported here, since every command imports this file

    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) == errno.ENOSPC
        if full or re.search(r"\d+ requested and \d+ written", str(error)):  # NumPy says no more
            free = shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free
            needed = "" if size is None else f"{size:,} bytes are needed, "
            raise OSError(
                f"{path}: the disk is full: {needed}{free:,} bytes are free; nothing unfinished is left"
            ) from error
        if isinstance(error, OSError) and error.filename:
            named = str(error.filename).replace(str(partial), str(path))
            raise OSError(error.errno, error.strerror, named) from error
        error.args = tuple(x.replace(str(partial), str(path)) if isinstance(x, str) else x for x in error.args)
        raise


def swap_in(folder: Path, path: Path) -> None:
    """Replace `path` by a folder that is complete, as at the end of `replacing_folder`."""
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
    """A new name next to `path`."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.{ending}")


def _partial(path: Path) -> Path:
    """A new name next to `path` for what this process writes there."""
    return _aside(path, f"{_PROCESS}-{_MACHINE}.partial")


def put_back(path: Path) -> None:
    """Clean up after a process that was killed in `replacing_folder` or `swap_in`: the old folder is moved back to
    `path`, or removed if the new one is there.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.old")
    for old in path.parent.iterdir() if path.parent.is_dir() else ():
        if not pattern.fullmatch(old.name):
            continue
        if path.exists():
            remove_folder(old)
        else:
            os.replace(old, path)


def scratch_folder(path: Path) -> Path:
    """Make a new folder next to `path`, for what is needed to write it; whoever asks for it removes it.

    If the process is killed, the next writer of `path` removes the folder. Raises OSError where it cannot be made.
    """
    folder = _partial(path)
    folder.mkdir()
    return folder


def remove_unfinished(path: Path) -> None:
    """Remove what a process that was killed while it wrote `path` left: in one of the functions above.

    That of a process that is still running stays (Windows does not tell which ones are), and what may not be removed.
    Whether one runs on another machine, which shares the disk, cannot be known: what it wrote is removed after a day.
    """
    pattern = _unfinished(re.escape(path.name))
    with suppress(OSError):  # another user's, in a shared folder, or a folder that may not be listed
        for left in path.parent.iterdir() if os.name == "posix" else ():
            found = pattern.fullmatch(left.name)
            if found and found[1] != _PROCESS and _is_over(left, int(found[2]), found[3]):
                remove_folder(left) if left.is_dir() else left.unlink()


def _is_over(left: Path, process: int, machine: str) -> bool:
    """Whether nobody writes this any longer: a file or folder of a process with this number, on this machine."""
    if machine != _MACHINE:
        return time.time() - left.stat().st_mtime > _DAY
    return process == os.getpid() or not _is_running(process)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # a signal that does nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def remove_folder(folder: Path) -> None:
    """Remove a folder and everything in it, as far as possible."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _mode_of_new_file(path: Path) -> int:
    """The mode of a new file. It is made to find out, since reading the umask means setting it for all threads."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = path.stat().st_mode
    path.unlink()
    return mode


def _flush(path: Path) -> None:
    """Wait until the bytes of a file are on the disk, not just in the system's memory."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _flush_entries(folder: Path) -> None:
    """Wait until the names in a folder are on the disk. Windows has no such call and needs none."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
