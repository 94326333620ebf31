"""`minilora runs`: the finished fine-tuning runs of a folder, newest first."""

import argparse
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ..files.disk import ModelFileError, read_json
from ..pages.text import NOTHING, change, columns, counted, megabytes, plain
from ..train.run_folder import METRICS_FILE
from .shared import AS_JSON

HELP = "list the finished runs of a folder: data, method, loss, date"
USUAL = "runs"

Run = dict[str, Any]  # a finished run, as `--json` prints it


def find_runs(folder: Path) -> list[Run]:
    """The run that a folder is, those in it, and in its folders, newest first. Other files are passed over."""
    found = []
    for path in chain(*(folder.glob(f"{depth}{METRICS_FILE}") for depth in ("", "*/", "*/*/"))):  # not a whole disk
        if any(part.endswith(".partial") for part in path.parts):
            continue
        try:
            found.append(_run(path.parent, read_json(path)))
        except (ModelFileError, LookupError, TypeError, ValueError):
            continue
    return sorted(found, key=lambda run: run["created"], reverse=True)


def _run(folder: Path, metrics: dict[str, Any]) -> Run:
    """loss: before and after, on paraphrased questions, or else on what its data hold out."""
    options, losses = metrics["options"], metrics["loss"]
    return {
        "folder": folder.as_posix(),
        "created": metrics["created"],
        **{name: options[name] for name in ("base", "data", "method")},
        "r": options.get("r") if options["method"] == "lora" else None,
        "steps": metrics["steps"],
        "loss": next((list(losses[name]) for name in ("paraphrase", "unseen") if name in losses), None),
        "bytes": metrics["adapter_bytes"],
    }


def listing(runs: Sequence[Run]) -> str:
    """The runs as a table."""
    rows = [["run", "base", "data", "method", "steps", "loss before", "after", "change", "disk", "date"]]
    for run in runs:
        losses = [NOTHING] * 3
        if run["loss"]:
            before, after = run["loss"]
            losses = [plain(before, 3), plain(after, 3), change(before, after)]
        method = f"LoRA, r={run['r']}" if run["method"] == "lora" else run["method"]
        row = [run["folder"], Path(run["base"]).name, Path(run["data"]).name, method, f"{run['steps']:,}"]
        rows.append([*row, *losses, megabytes(run["bytes"]), run["created"][:10]])
    return "\n".join([*columns(rows, left=4), "", f"{counted(len(runs), 'run')}. minilora report RUN shows one."])


def add(parser: argparse.ArgumentParser) -> None:
    """The folder that holds the runs."""
    parser.add_argument(
        "folder", nargs="?", default=USUAL, metavar="FOLDER", help="folder with the runs (default: %(default)s)"
    )
    parser.add_argument("--json", **AS_JSON)


def run(arguments: argparse.Namespace) -> None:
    """Print a line for each run. Raises ValueError where there is none."""
    folder = Path(arguments.folder)
    runs = find_runs(folder)
    if not runs:
        raise ValueError(f"{folder}: no finished runs; minilora finetune makes one in {USUAL}")
    print(json.dumps(runs, indent=2) if arguments.json else listing(runs))
