"""log.csv: a row for each step of a run, there to be read while it goes on."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files.disk import replacing
from .loop import History

COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes")


class Log:
    """The CSV file of a run, which grows by one row for each step that its history gets.

    It begins with what the history holds already: in a run that goes on from a checkpoint, rows of later steps, which
    are about to be taken again, are cut off. A row is handed to the system at once: also a killed run has its log.
    """

    def __init__(self, path: Path, history: History):
        self.path, self.history, self.tokens = path, history, history.tokens
        if not history.losses:
            path.unlink(missing_ok=True)
            return
        with replacing(path) as partial:
            _append(partial, *(row.values() for row in read_log(path) if int(row["step"]) <= len(history.losses)))

    def row(self, memory: int | None) -> None:
        """Write the row of the last step, each number with all its digits; the gradient's norm is that before clipping.

        memory: the most bytes that the process has held so far, if that is known.
        """
        history = self.history
        tokens, self.tokens = history.tokens - self.tokens, history.tokens
        speed = f"{tokens / history.seconds[-1]:.1f}"
        _append(
            self.path, (len(history.losses), history.losses[-1], history.rates[-1], history.norms[-1], speed, memory)
        )


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a log as they are written, without a last one that is broken; none of a file that is not there."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["step"].isdigit() and None not in row.values()]


def _append(path: Path, *rows: Iterable[Any]) -> None:
    new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows] if new else rows)
