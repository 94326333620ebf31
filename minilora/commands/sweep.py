"""`minilora sweep`: many short runs of `finetune`, whose options have several values, and a row of a table for each.

    result = sweep(SweepOptions(r=[1, 4, 16], lr=[1e-3, 3e-3], seed=[0, 1, 2], steps=[60], out="runs/ranks"))

Trials run in processes, some at a time. Each is a row of `<out>/trials.csv` as soon as it ends, and what it trained is
thrown away. The same command goes on where an interrupted one ended.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..data.records import read_records, sha256_of_data
from ..data.splits import is_one_text, split_records
from ..engine.parallel import processors
from ..experiments.trials import run_trials, usual_jobs
from ..files.disk import read_json, remove_folder, replacing, write_json
from ..models.load import locate
from ..options import UsageError, add_flags
from ..progress import Bars, hide_progress
from ..train.job import finetune
from ..version import __version__
from .compare import sha256_of_base
from .shared import AS_JSON, read_options, tell
from .sweep_options import FOUND, MOST, Sweep, SweepOptions, as_options, word
from .sweep_summary import summarise

TABLE_FILE, SWEEP_FILE, PICTURE_FILE, WORK, LOCK = "trials.csv", "sweep.json", "sweep.png", ".work", ".lock"
FILES = (TABLE_FILE, SWEEP_FILE, "sweep*.png", WORK, LOCK)  # what a sweep's folder may hold
ALWAYS = ("method", "r", "target_modules", "lr", "seed")  # settings that have a column, varied or not
MEASURED = {  # column -> what it is
    "validation_loss": "the lowest of the run: of the weights that would be kept",
    "unseen_loss": "of those weights, on records never trained on",
    "paraphrase_loss": "on trained matter, asked in other words",
    "general_loss": "on what the model could do before",
    "train_loss": "mean of the last tenth of the steps",
    "steps": "taken",
    "trainable_parameters": "numbers that were trained",
    "seconds": "of training",
}
PER_RECORD, PER_BYTE = 0.02, 1.3e-9  # core seconds of a record: for any base, and for each byte of it; a rough guess


def sweep(
    options: Sweep, say: Callable[[str], None] = lambda line: None, bars: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """Make the trials that are not there yet, and return the summary, which also stands in `<out>/sweep.json`.

    say: hears what a user should know. bars: where progress is shown, on stderr if left out. Raises ValueError before
    anything runs for bad input, for more than MOST trials that nobody asked for, and for a folder that holds another
    sweep or something else.
    """
    settings = options.settings()
    told = {"options": options.told(), "minilora": __version__} | _inputs(settings, say)
    _refuse_too_many(options, settings)
    folder, work = options.folder, options.folder / WORK
    with _taken(folder):
        _make_room(folder, told, options.overwrite)
        write_json(folder / SWEEP_FILE, told)
        remove_folder(work)
        rows = read_rows(folder / TABLE_FILE)
        columns = ["trial", *(name for name in FOUND if name in {*ALWAYS, *options.varied}), *MEASURED, "failed"]
        _write_rows(folder / TABLE_FILE, columns, rows.values())
        ahead = [i for i in range(len(settings)) if i not in rows]
        jobs = min(options.jobs or usual_jobs(), max(1, len(ahead)))
        if rows and ahead:
            say(f"{folder} holds {len(rows)} of {len(settings)} trials: the others are made now")
        start = time.perf_counter()
        try:
            with (bars or Bars())("sweep", len(settings), "trial", initial=len(rows)) as bar:

                def done(position: int, found: dict[str, Any]) -> None:
                    number = ahead[position]
                    row = {"trial": number} | {name: word(settings[number].get(name)) for name in columns[1:]}
                    row |= {name: found[name] for name in found if name in columns}
                    rows[number] = row
                    with (folder / TABLE_FILE).open("a", encoding="utf-8", newline="") as file:
                        file.write(_lines(columns, [row]))
                    bar.update()

                run_trials(trial, [_told(settings[i], work / str(i)) for i in ahead], jobs, done)
        except KeyboardInterrupt:
            say(f"\n{len(rows)} of {len(settings)} trials are kept in {folder}: the same command goes on from there")
            raise
        finally:
            remove_folder(work)
        spent = {"wall_seconds": time.perf_counter() - start, "made": len(ahead), "jobs": jobs, "cores": processors()}
        found = [_numbers(rows[i]) for i in range(len(settings))]
        result = told | {"varied": options.varied, "time": spent} | summarise(settings, found, options.varied)
        write_json(folder / SWEEP_FILE, result)
    return result | {"folder": str(folder)}


def trial(setting: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """One run of finetune, without anything left of it but its numbers: the columns in MEASURED."""
    try:
        # Of a run that is over in seconds, and that nobody goes on with, no checkpoint is wanted.
        options = as_options(setting, out=folder, save_every=10**9)
        with hide_progress():
            metrics = finetune(options, answers=False)
    finally:
        remove_folder(Path(folder))
        remove_folder(Path(f"{folder}.partial"))
    if metrics["kept"]["loss"] is None or not math.isfinite(metrics["kept"]["loss"]):
        raise ValueError("no validation gave a finite loss")
    last = metrics["train_loss"][-math.ceil(metrics["steps"] / 10) :]
    found = {f"{name}_loss": after for name, (_, after) in metrics["loss"].items()}
    return found | {
        "validation_loss": metrics["kept"]["loss"],
        "train_loss": sum(last) / len(last),
        "steps": metrics["steps"],
        "trainable_parameters": metrics["trainable_parameters"],
        "seconds": metrics["training_seconds"],
    }


def _told(setting: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {"setting": setting, "folder": str(folder)}


def _inputs(settings: Sequence[Mapping[str, Any]], say: Callable[[str], None]) -> dict[str, dict[str, str]]:
    """The fingerprints of bases and data. Raises ValueError for a base that is not there, and for data that cannot be
    read or leave nothing to choose by.
    """
    bases = dict.fromkeys(one["base"] for one in settings)
    data = {one["data"]: one["field"] for one in settings}
    for name, field in data.items():
        records = read_records(name, field=field)
        if not is_one_text(records) and not split_records(records)["validation"]:
            raise ValueError(
                f'{name} has no records for validation: use 10 records or more, or name them with "split": "validation"'
            )
    return {
        "base_sha256": {name: sha256_of_base(name, say) for name in bases},
        "data_sha256": {name: sha256_of_data(name) for name in data},
    }


def _refuse_too_many(options: Sweep, settings: Sequence[Mapping[str, Any]]) -> None:
    count = len(settings)
    if count <= max(MOST, options.trials or 0):
        return
    seconds = sum(map(_guess, settings)) / min(options.jobs or processors(), processors())
    time = f"{seconds / 3600:,.0f} hours" if seconds > 2 * 3600 else f"{seconds / 60:,.0f} minutes"
    advice = f"draw some with --search random --trials 60, or give --trials {count} to make them all"
    raise ValueError(f"{count:,} trials, which take about {time} here: {advice}")


def _guess(setting: Mapping[str, Any]) -> float:
    """About how many core seconds a trial takes, by the size of its base and the records it sees."""
    path = locate(setting["base"])
    files = [path] if path.is_file() else path.glob("*.safetensors")
    size = sum(file.stat().st_size for file in files)
    if (steps := setting.get("steps")) is not None:
        seen = steps * setting["batch_size"] * setting["grad_accumulation"]
    else:
        seen = setting["epochs"] * len(split_records(read_records(setting["data"], field=setting["field"]))["train"])
    return seen * (PER_RECORD + PER_BYTE * size)


# -- the folder --------------------------------------------------------------------------------------------------------


@contextmanager
def _taken(folder: Path) -> Iterator[None]:
    """Nobody else writes there now."""
    from filelock import FileLock, Timeout

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another --out")
    if folder.is_dir():
        foreign = sorted(one.name for one in folder.iterdir() if not any(fnmatch(one.name, known) for known in FILES))
        if foreign:
            raise ValueError(f"{folder} holds {foreign[0]}, which is no file of a sweep: choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK, timeout=0) as lock:
            try:
                yield
            finally:
                with suppress(OSError):  # Windows does that as it is let go
                    Path(lock.lock_file).unlink()
    except Timeout as error:
        raise ValueError(f"{folder}: another sweep is at work there; choose another --out") from error
    except PermissionError as error:
        raise ValueError(f"{folder}: cannot write results there ({error}); choose another --out") from error


def _make_room(folder: Path, told: Mapping[str, Any], overwrite: bool) -> None:
    """Raise ValueError for the folder of another sweep, which goes with `overwrite`."""
    if overwrite:
        for path in [folder / TABLE_FILE, folder / SWEEP_FILE, *folder.glob("sweep*.png")]:
            path.unlink(missing_ok=True)
        return
    if not (folder / SWEEP_FILE).is_file():
        if (folder / TABLE_FILE).exists():
            raise ValueError(f"{folder} holds {TABLE_FILE} without {SWEEP_FILE}: choose another --out, or --overwrite")
        return
    there = read_json(folder / SWEEP_FILE)
    flat, now = _flat(there), _flat(told)
    differing = [name for name in {**flat, **now} if flat.get(name) != now.get(name)]
    if differing:
        named = ", ".join(f"{name} {_short(flat.get(name))}, now {_short(now.get(name))}" for name in differing)
        raise ValueError(f"{folder} holds another sweep ({named}): choose another --out, or --overwrite it")


def _flat(told: Mapping[str, Any]) -> dict[str, Any]:
    options = told.get("options")
    rest = {name: told.get(name) for name in ("minilora", "base_sha256", "data_sha256")}
    return {**(options if isinstance(options, dict) else {}), **rest}


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(word, value))
    if isinstance(value, dict):
        return " ".join(f"{name} {str(one)[:8]}" for name, one in value.items())
    return "not given" if value is None else str(value)


# -- the table ---------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> dict[int, dict[str, Any]]:
    """The rows of trials.csv by the trial's number; half a row, which a killed process left, is none."""
    if not path.is_file():
        return {}
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    rows = list(csv.DictReader(io.StringIO(whole)))
    try:
        return {int(row["trial"]): row for row in rows if _numbers(row)}
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not the table of a sweep: choose another --out, or --overwrite it") from error


def _write_rows(path: Path, columns: Sequence[str], rows: Any) -> None:
    with replacing(path) as partial:
        partial.write_text(",".join(columns) + "\n" + _lines(columns, rows), encoding="utf-8", newline="")


def _lines(columns: Sequence[str], rows: Any) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says was found, as numbers."""
    if row["failed"]:
        return {"failed": row["failed"]}
    return {name: float(row[name]) for name in MEASURED if row[name] != ""}


HELP = "try options of finetune with several values, in many short runs, and tabulate what they came to"


def add(parser: argparse.ArgumentParser) -> None:
    """The flags are the fields of SweepOptions; --config names a file of them."""
    add_flags(parser, SweepOptions)
    parser.usage = "minilora sweep [--OPTION VALUE [VALUE ...]] ... [--config FILE] [--out DIR] [--json]"
    parser.epilog = "Such as: minilora sweep --r 1 4 16 --lr 1e-3 3e-3 1e-2 --seed 0 1 2 --steps 60 --out runs/ranks"
    parser.add_argument("--config", metavar="FILE", help="a TOML file of options, whose values may be lists")
    parser.add_argument("--json", **AS_JSON)


def run(arguments: argparse.Namespace) -> None:
    """Make the trials that are not there yet, draw the picture, print the table."""
    from ..pages.style import save_themes
    from ..pages.sweep import sweep_figure
    from .report import terminal_width
    from .sweep_summary import page

    options: Sweep = read_options(SweepOptions, arguments)
    try:
        options.settings()
    except ValueError as error:
        raise UsageError(error) from error
    result = sweep(options, say=tell)
    print(json.dumps(result, indent=2) if arguments.json else page(result, terminal_width()))
    if sweep_figure(result) is not None:
        save_themes(lambda: sweep_figure(result), options.folder / PICTURE_FILE)
