"""log.csv: a row for each step of a run, which can be read while the run continues."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files.disk import replacing
from .loop import History

COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes")


class Log:
    """The CSV file of a run, with a row for each step in its history.

    In a resumed run, the rows of steps after the checkpoint are removed, since these steps are repeated. Each row is
    written at once, so a killed run has its log as well. While another program keeps the file to itself, as Excel does
    on Windows, rows wait for the next one.
    """

    def __init__(self, path: Path, history: History):
        self.path, self.history, self.tokens = path, history, history.tokens
        self.waiting: list[Iterable[Any]] = []
        if not history.losses:
            path.unlink(missing_ok=True)
            return
        with replacing(path) as partial:
            _append(partial, *(row.values() for row in read_log(path) if int(row["step"]) <= len(history.losses)))

    def row(self, memory: int | None) -> None:
        """Write the row of the last step, with all digits, and with the gradient norm before clipping.

        memory: the peak memory of the process in bytes, if it is known.
        """
        history = self.history
        tokens, self.tokens = history.tokens - self.tokens, history.tokens
        speed = f"{tokens / history.seconds[-1]:.1f}"
        last = (len(history.losses), history.losses[-1], history.rates[-1], history.norms[-1], speed, memory)
        self.waiting.append(last)
        with suppress(PermissionError):
            _append(self.path, *self.waiting)
            self.waiting.clear()


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a log, without a last one that is incomplete; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["step"].isdigit() and None not in row.values()]


def _append(path: Path, *rows: Iterable[Any]) -> None:
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows] if new else rows)
