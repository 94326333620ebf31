"""`minilora runs`: the finished fine-tuning runs of a folder, newest first."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files.disk import ModelFileError, read_json
from ..pages.text import NOTHING, change, columns, counted, megabytes, plain
from ..train.run_folder import METRICS_FILE
from .shared import AS_JSON

HELP = "list the finished runs of a folder: data, method, loss, date"
USUAL = "runs"


@dataclass(frozen=True)
class Run:
    """A finished run. loss: before and after, on paraphrased questions, or else on what its data hold out."""

    folder: Path
    created: str
    base: str
    data: str
    method: str
    r: int | None
    steps: int
    loss: tuple[float, float] | None
    bytes: int


def find_runs(folder: Path) -> list[Run]:
    """The runs in a folder, and in its folders, newest first. Files that are not metrics are passed over."""
    found = []
    for path in (*folder.glob(f"*/{METRICS_FILE}"), *folder.glob(f"*/*/{METRICS_FILE}")):  # deeper may be a whole disk
        if any(part.endswith(".partial") for part in path.parts):
            continue
        try:
            found.append(_run(path.parent, read_json(path)))
        except (ModelFileError, LookupError, TypeError, ValueError):
            continue
    return sorted(found, key=lambda run: run.created, reverse=True)


def _run(folder: Path, metrics: dict[str, Any]) -> Run:
    options, losses = metrics["options"], metrics["loss"]
    set_of_loss = next((name for name in ("paraphrase", "unseen") if name in losses), None)
    return Run(
        folder=folder,
        created=metrics["created"],
        base=options["base"],
        data=options["data"],
        method=options["method"],
        r=options.get("r") if options["method"] == "lora" else None,
        steps=metrics["steps"],
        loss=tuple(losses[set_of_loss]) if set_of_loss else None,
        bytes=metrics["adapter_bytes"],
    )


def listing(runs: Sequence[Run]) -> str:
    """The runs as a table."""
    rows = [["run", "base", "data", "method", "steps", "loss before", "after", "change", "disk", "date"]]
    for run in runs:
        losses = [plain(run.loss[0], 3), plain(run.loss[1], 3), change(*run.loss)] if run.loss else [NOTHING] * 3
        method = f"LoRA, r={run.r}" if run.method == "lora" else run.method
        row = [run.folder.as_posix(), Path(run.base).name, Path(run.data).name, method, f"{run.steps:,}"]
        rows.append([*row, *losses, megabytes(run.bytes), run.created[:10]])
    return "\n".join([*columns(rows, left=4), "", f"{counted(len(runs), 'run')}. minilora report RUN shows one."])


def add(parser: argparse.ArgumentParser) -> None:
    """The folder that holds the runs."""
    parser.add_argument("folder", nargs="?", default=USUAL, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--json", **AS_JSON)


def run(arguments: argparse.Namespace) -> None:
    """Print a line for each run. Raises ValueError where there is none."""
    folder = Path(arguments.folder)
    runs = find_runs(folder)
    if not runs:
        raise ValueError(f"{folder}: no finished runs; minilora finetune makes one in {USUAL}")
    if arguments.json:
        print(json.dumps([asdict(each) | {"folder": each.folder.as_posix()} for each in runs], indent=2))
    else:
        print(listing(runs))
