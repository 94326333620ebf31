"""The folder of a run: results gather next to it, in <folder>.partial, and replace it whole when they are complete."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType

from ..files.disk import entries, locked, put_back, remove_folder, swap_in
from ..lora.peft import CONFIG_FILE, PROVENANCE_FILE, WEIGHTS_FILE
from ..progress import log
from ..terminal import quote

METRICS_FILE, PICTURE_FILE, OPTIONS_FILE, LOG_FILE = "metrics.json", "picture.png", "run.toml", "log.csv"
MODEL_FILE = "model.safetensors"
LAST = "last"  # the folder for the last adapter, where another one was best
CHECKPOINT, STATE_FILE = "checkpoint", "state.json"

# What a finished run's folder may hold. A folder with anything else in it is not the run's to replace.
FILES = (
    CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE, "config.json", "tokenizer.json", "tokenizer_config.json", MODEL_FILE,
    METRICS_FILE, "picture*.png", "picture*.svg", OPTIONS_FILE, LOG_FILE, "README.md", LAST, "tensorboard",
    CHECKPOINT,
)  # fmt: skip


class RunFolder:
    """The folder of a run, such as runs/legal, and the one next to it that a job fills: runs/legal.partial.

        with RunFolder(Path("runs/legal")) as place:        # ValueError when something must not be lost
            ...                                             # fill place.partial
            place.finish()      # it is runs/legal now, and what was there before is gone

    Only one job at a time can have a folder. When the block ends without `finish`, `partial` is left in place if it
    holds trained weights; otherwise it is removed, with the folders that were made for it.

    overwrite: a finished run may be replaced, and an interrupted one forgotten. resume: the run in `partial` is
    continued. When the block ends without `finish` though `began` is true, a line says what is left and how to use it.
    """

    began = False  # whether this job has written or read weights

    def __init__(self, path: Path, overwrite: bool = False, resume: bool = False):
        self.path, self.overwrite, self.resume = path, overwrite, resume
        self.target = Path(os.path.realpath(path))  # of a link to a folder, the folder is replaced
        beside = path.parent if path.name and not path.is_symlink() else self.target.parent
        self.partial = beside / f"{self.target.name}.partial"

    def refuse(self) -> None:
        """Raise ValueError when something is there that the job must not replace."""
        if Path.cwd().is_relative_to(self.target):
            raise ValueError(f"{self.path} is the folder you are in, or one around it: choose another --out")
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path}: results cannot be written there (it is a file); choose another --out")
        refuse_foreign(self.path, FILES, "a run")
        if self.overwrite:
            return
        if _names(self.path):
            further = (
                f"--adapter {quote(str(self.path))} trains it further, into another --out; --overwrite replaces it"
            )
            way = further if self.resume else "--overwrite replaces it; or choose another --out"
            raise ValueError(f"{self.path} holds a finished run: {way}")
        if (learned := self.learned()) is None:
            return
        if not self._has_checkpoint():
            raise ValueError(
                f"{learned} holds the weights of a run that broke off and cannot be resumed: {_flag(learned)} "
                f"{quote(str(learned))} trains them further, into another --out; --overwrite discards them"
            )
        if not self.resume:
            raise ValueError(
                f"{self.partial} holds the weights of an interrupted run: --resume continues it, --overwrite discards "
                "it; or choose another --out"
            )

    def learned(self) -> Path | None:
        """The folder in `partial` with what was learned last, if there is one."""
        for folder in (self.partial, self.partial / CHECKPOINT):
            if any((folder / name).is_file() for name in (WEIGHTS_FILE, MODEL_FILE)):
                return folder
        return None

    def __enter__(self) -> RunFolder:
        self.made = [path for path in self.partial.parents if not path.exists()]
        running = f"{self.path}: another job is running there; choose another --out"
        self.lock = locked(self.partial.with_name(f".{self.target.name}.lock"), running)
        try:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self.lock.__enter__()
        except OSError as error:
            raise unwritable(self.path, error) from error
        try:
            put_back(self.target)  # after a job that was killed between two renames
            put_back(self.partial / CHECKPOINT)
            self.refuse()
            if not self.resume:
                remove_folder(self.partial)
                if self.partial.exists():  # another user's, for example
                    raise ValueError(f"{self.partial} cannot be removed: remove it, or choose another --out")
            self.partial.mkdir(exist_ok=self.resume)
            for left in self.partial.glob(".*"):  # half of what a killed job was writing
                remove_folder(left) if left.is_dir() else left.unlink()
        except OSError as error:
            self._leave()
            raise unwritable(self.path, error) from error
        except BaseException:
            self._leave()
            raise
        return self

    def finish(self) -> None:
        """Replace the run's folder by `partial`, and remove its checkpoint, with which it could be resumed so far."""
        swap_in(self.partial, self.target)
        remove_folder(self.target / CHECKPOINT)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        learned = self.learned()
        if learned is None:
            remove_folder(self.partial)
        elif self.began:
            chat = f"minilora chat {_flag(learned)} {quote(str(learned))}"
            log.info(f"the trained weights are in {learned}; talk to the model with: {chat}")
            if self._has_checkpoint():
                flags = "--resume --overwrite" if self.overwrite else "--resume"
                log.info(f"resume with: minilora finetune {flags} --out {quote(str(self.path))}")
        self._leave()

    def _has_checkpoint(self) -> bool:
        return (self.partial / CHECKPOINT / STATE_FILE).is_file()

    def _leave(self) -> None:
        self.lock.__exit__(None, None, None)
        with suppress(OSError):  # one of them holds something
            for path in self.made:
                path.rmdir()


def _flag(learned: Path) -> str:
    """The flag that loads what a folder holds: an adapter or a whole model."""
    return "--adapter" if (learned / WEIGHTS_FILE).is_file() else "--base"


def _names(folder: Path) -> list[str]:
    return [path.name for path in entries(folder)] if folder.is_dir() else []


def refuse_foreign(folder: Path, patterns: Iterable[str], of: str) -> None:
    """Raise ValueError if a folder of results holds anything but files with such names, which are those `of` a run."""
    if foreign := [name for name in _names(folder) if not any(fnmatch(name, known) for known in patterns)]:
        raise ValueError(f"{folder} holds {foreign[0]}, which is not a file of {of}: choose another --out")


def unwritable(path: Path, error: OSError) -> ValueError:
    """The error for a folder of results that cannot be made or written to."""
    return ValueError(f"{path}: results cannot be written there ({error.strerror or error}); choose another --out")
