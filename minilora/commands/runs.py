"""`minilora runs`: the finished fine-tuning runs of a folder, newest first."""

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ..files.disk import ModelFileError, read_json
from ..pages.labels import subject_and_others
from ..pages.text import NOTHING, columns, counted, megabytes, percent, plain
from ..train.run_folder import METRICS_FILE
from .shared import AS_JSON, Outcome

HELP = "list the finished runs of a folder: data, method, loss, result, date"
USUAL = "runs"

Run = dict[str, Any]  # a finished run, as `--json` prints it


def find_runs(folder: Path) -> list[Run]:
    """The run that a folder is, those in it, and in its folders, newest first. Other files are passed over."""
    found = []
    for path in chain(*(folder.glob(f"{depth}{METRICS_FILE}") for depth in ("", "*/", "*/*/"))):  # not a whole disk
        if any(part.endswith(".partial") for part in path.parts):
            continue
        try:
            run = _run(path.parent, read_json(path))
            listing([run])  # a value that no table can show is another program's
            found.append(run)
        except (ModelFileError, AttributeError, LookupError, TypeError, ValueError):
            continue
    return sorted(found, key=lambda run: run["created"], reverse=True)


def _run(folder: Path, metrics: dict[str, Any]) -> Run:
    """loss: before and after, on paraphrased questions, or else on what its data hold out."""
    options, losses = metrics["options"], metrics["loss"]
    of = next((name for name in ("paraphrase", "unseen") if name in losses), "")
    return {
        "folder": folder.as_posix(),
        "created": metrics["created"],
        **{name: options[name] for name in ("base", "data", "method")},
        "mix": list(options.get("mix") or ()),
        "objective": options.get("loss", "sft"),
        "r": options.get("r") if options["method"] == "lora" else None,
        "steps": metrics["steps"],
        "loss": list(losses[of]) if of else None,
        "result": _result(metrics, of),
        "bytes": metrics["adapter_bytes"],
    }


def _result(metrics: dict[str, Any], of: str) -> tuple[str, float] | None:
    """The measure that suits its kind of data, by name, and its share after training. of: the set of questions."""
    for key, share, name in (("labels", "accuracy", "accuracy"), ("fields", "fields_right", "fields right")):
        if key in metrics:
            return name, subject_and_others(metrics[key])[0][share]["value"]
    if of in metrics.get("preferences", {}):
        return "preferred", metrics["preferences"][of]["chosen"][1]
    return ("recall", metrics["keyword_recall"][of][1]) if of in metrics["keyword_recall"] else None


def listing(runs: Sequence[Run]) -> str:
    """The runs as a table."""
    rows = [["run", "base", "data", "method", "steps", "loss before", "after", "result", "disk", "date"]]
    for run in runs:
        losses = [NOTHING] * 3
        if run["loss"]:
            before, after = run["loss"]
            losses[:2] = plain(before, 3), plain(after, 3)
        if run["result"]:
            losses[2] = f"{run['result'][0]} {percent(run['result'][1], 1)}"
        method = f"LoRA, r={run['r']}" if run["method"] == "lora" else run["method"]
        method += ", DPO" * (run["objective"] == "dpo")
        data = " + ".join(Path(name).name for name in (run["data"], *run["mix"]))
        row = [run["folder"], Path(run["base"]).name, data, method, f"{run['steps']:,}"]
        rows.append([*row, *losses, megabytes(run["bytes"]), run["created"][:10]])
    return "\n".join([*columns(rows, left=4), "", f"{counted(len(runs), 'run')}. minilora report RUN shows one."])


def add(parser: argparse.ArgumentParser) -> None:
    """The folder that holds the runs."""
    parser.add_argument(
        "folder", nargs="?", default=USUAL, metavar="FOLDER", help="folder with the runs (default: %(default)s)"
    )
    parser.add_argument("--json", **AS_JSON)


def run(arguments: argparse.Namespace) -> Outcome:
    """A line for each run. Raises ValueError where there is none."""
    folder = Path(arguments.folder)
    runs = find_runs(folder)
    if not runs:
        raise ValueError(f"{folder}: no finished runs; minilora finetune makes one in {USUAL}")
    return Outcome(runs, listing)
