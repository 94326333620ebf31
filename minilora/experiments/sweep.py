"""A sweep: options of `finetune` with several values each, a short run for every combination, and a table of results.

    result = sweep(SweepOptions(r=[1, 4, 16], lr=[1e-3, 3e-3], seed=[0, 1, 2], steps=[60], out="runs/ranks"))

Trials run in processes, some at a time. Each is a row of `<out>/trials.csv` as soon as it ends, and what it trained is
thrown away. The same command continues an interrupted sweep, and repeats the trials that lacked memory or a file; one
with more values, such as more seeds, adds to it.
"""

import csv
import io
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ..data.formats import with_label
from ..data.records import read_source, sha256_of_data
from ..data.splits import has_validation
from ..engine.parallel import processors
from ..files.disk import locked, read_json, remove_folder, write_bytes, write_json
from ..measure.statistics import Interval
from ..models.load import load_tokenizer, sha256_of_base
from ..options import flag, refuse_other_settings
from ..pages.text import counted
from ..progress import hide_progress, log, progress
from ..terminal import quote
from ..train.job import finetune
from ..train.options import Options
from ..train.rate import rate_of
from ..train.run_folder import refuse_foreign, unwritable
from ..version import __version__
from .grid import FOUND, Sweep, SweepOptions, as_options, word
from .trials import run_trials
from .tuned import next_rate

HALF_DECADE = 10**0.5

TABLE_FILE, SWEEP_FILE, PICTURE_FILE, WORK, LOCK = "trials.csv", "sweep.json", "sweep.png", ".work", ".lock"
FILES = (TABLE_FILE, SWEEP_FILE, "sweep*.png", WORK, LOCK)  # what a sweep's folder may hold
ALWAYS = ("method", "r", "target_modules", "lr", "seed")  # options that have a column, varied or not
MEASURED = {  # column -> what it is
    "validation_loss": "the lowest of the run: of the weights that would be kept",
    "validation_accuracy": "of those weights, on the validation set, if the data have labels",
    "unseen_loss": "of those weights, on records never trained on",
    "paraphrase_loss": "on records that were trained on, with paraphrased questions",
    "general_loss": "on general questions, which shows forgetting",
    "train_loss": "mean of the last tenth of the steps",
    "steps": "taken",
    "trainable_parameters": "how many",
    "seconds": "of training",
}
AVERAGED = tuple(name for name in MEASURED if name.endswith(("_loss", "_accuracy")))


# -- the trials --------------------------------------------------------------------------------------------------------


def sweep(options: Sweep) -> dict[str, Any]:
    """Make the trials that are not there yet, and return the summary, which is written to `<out>/sweep.json` as well.

    Raises ValueError before anything runs for bad input, and for a folder that holds a sweep with other trials, or
    something else.
    """
    settings = options.settings()
    about = {"options": options.given(), "minilora": __version__} | _inputs(settings)
    folder, work = options.folder, options.folder / WORK
    columns = ["trial", *(name for name in FOUND if name in {*ALWAYS, *options.varied}), *MEASURED, "failed"]

    def row(number: int) -> dict[str, Any]:
        return {"trial": number} | _values(settings[number], columns[1:]) | found[number]

    def done(position: int, result: dict[str, Any]) -> None:
        number = ahead[position]
        found[number] = {name: result[name] for name in result if name in columns}
        if "again" in result:
            lacking.append(number)
        else:
            with (folder / TABLE_FILE).open("a", encoding="utf-8", newline="") as file:
                file.write(_lines(columns, [row(number)]))
        bar.update()

    with _alone(folder):
        found = {} if options.overwrite else _found(folder, about, settings)
        for path in folder.glob("sweep*.png"):
            path.unlink()
        write_json(folder / SWEEP_FILE, about)
        remove_folder(work)
        table = ",".join(columns) + "\n" + _lines(columns, map(row, sorted(found)))
        write_bytes(folder / TABLE_FILE, table.encode())
        ahead, lacking = [i for i in range(len(settings)) if i not in found], list[int]()
        if found and ahead:
            log.info("%s holds %d of %s; the others are run now", folder, len(found), counted(len(settings), "trial"))
        jobs, start = min(options.jobs or processors(), max(1, len(ahead))), time.perf_counter()
        try:
            with progress("sweep", len(settings), "trial", initial=len(found)) as bar:
                run_trials(trial, [{"setting": settings[i], "folder": str(work / str(i))} for i in ahead], jobs, done)
        except KeyboardInterrupt:
            kept = f"{len(found) - len(lacking)} of {counted(len(settings), 'trial')}"
            log.info("\n%s are kept in %s: the same command continues from there", kept, folder)
            raise
        finally:
            remove_folder(work)
        if lacking:
            log.info("%s lacked memory or a file: the same command tries again", counted(len(lacking), "trial"))
        spent = {"wall_seconds": time.perf_counter() - start, "made": len(ahead), "jobs": jobs, "cores": processors()}
        results = [_numbers(found[i]) for i in range(len(settings))]
        whole = about | {"varied": options.varied, "time": spent} | summarise(settings, results, options.varied)
        write_json(folder / SWEEP_FILE, whole)
    return whole | {"folder": str(folder)}


def trial(setting: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """One run of finetune, of which only the numbers stay: the columns in MEASURED."""
    try:
        with hide_progress():  # and no checkpoint: a run of seconds is not continued
            metrics = finetune(as_options(setting, out=folder, save_every=10**9), answers=False)
    finally:
        remove_folder(Path(folder))
        remove_folder(Path(f"{folder}.partial"))
    if metrics["kept"]["loss"] is None or not math.isfinite(metrics["kept"]["loss"]):
        raise ValueError("no validation gave a finite loss")
    last = metrics["train_loss"][-math.ceil(metrics["steps"] / 10) :]
    found = {f"{name}_loss": after for name, (_, after) in metrics["loss"].items()}
    if "labels" in metrics:
        found["validation_accuracy"] = metrics["labels"]["rows"][-1]["accuracy"]["value"]
    return found | {
        "validation_loss": metrics["kept"]["loss"],
        "train_loss": sum(last) / len(last),
        "steps": metrics["steps"],
        "trainable_parameters": metrics["trainable_parameters"],
        "seconds": metrics["training_seconds"],
    }


def _inputs(settings: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The fingerprints of bases and data. Raises ValueError for a base that is missing, and for data that cannot be
    read or hold no records out for validation.
    """
    bases = dict.fromkeys(one["base"] for one in settings)
    data = {one["data"]: one for one in settings}
    for name, one in data.items():
        field = with_label(one["field"], one["label"])
        records = read_source(name, field=field, schema=one["schema"]).records
        if not has_validation(records, partial(load_tokenizer, one["base"]), one["max_length"]):
            advice = 'use 10 records or more, or name some with "split": "validation"'
            raise ValueError(f"{name} has nothing for validation, by which trials are compared: {advice}")
    sources = dict.fromkeys([*data, *(name for one in settings for name in one.get("mix") or ())])
    return {
        "base_sha256": {name: sha256_of_base(name) for name in bases},
        "data_sha256": {name: sha256_of_data(name) for name in sources},
    }


# -- the folder --------------------------------------------------------------------------------------------------------


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """In this block no other sweep writes to the folder. Raises ValueError where it is not a sweep's to write to."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another --out")
    refuse_foreign(folder, FILES, "a sweep")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK, f"{folder}: another sweep is running there; choose another --out"):
            yield
    except OSError as error:
        raise unwritable(folder, error) from error


def _found(folder: Path, about: Mapping[str, Any], settings: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, str]]:
    """What the folder's table says of these trials, by number. Raises ValueError where it has others as well."""
    if not (folder / SWEEP_FILE).is_file():
        if (folder / TABLE_FILE).exists():
            raise ValueError(f"{folder} holds {TABLE_FILE} without {SWEEP_FILE}: choose another --out, or --overwrite")
        return {}
    rows, there = read_rows(folder / TABLE_FILE), read_json(folder / SWEEP_FILE)
    then, now = ({**one.get("options", {}), **{key: one.get(key) for key in about if key != "options"}}
                 for one in (there, about))  # fmt: skip
    try:
        before = SweepOptions(**there["options"]).settings()
        kept = all({**now[key], **then[key]} == now[key] for key in ("base_sha256", "data_sha256"))
    except (KeyError, TypeError, ValueError):  # a file of another version
        before, kept = [], False
    numbers = {json.dumps(one): i for i, one in enumerate(settings)}
    order = [numbers.get(json.dumps(one)) for one in before]
    if not kept or None in order or then["minilora"] != now["minilora"]:
        refuse_other_settings(str(folder), then, now, "choose another --out, or --overwrite it")
    return {order[i]: row for i, row in rows.items() if i < len(order)}  # type: ignore[misc]


def read_rows(path: Path) -> dict[int, dict[str, str]]:
    """What trials.csv says was found, by the trial's number; half a row, from a process that was killed, is ignored."""
    if not path.is_file():
        return {}
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    rows = csv.DictReader(io.StringIO(whole))
    try:
        found = {int(row["trial"]): {name: row[name] for name in (*MEASURED, "failed")} for row in rows}
        return {i: row for i, row in found.items() if _numbers(row)}
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: not the table of a sweep: choose another --out, or --overwrite it") from error


def _lines(columns: Sequence[str], rows: Any) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says was found, as numbers."""
    if row.get("failed"):
        return {"failed": row["failed"]}
    return {name: float(row[name]) for name in MEASURED if row.get(name, "") != ""}


# -- the summary -------------------------------------------------------------------------------------------------------


def summarise(
    settings: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], varied: Sequence[str]
) -> dict[str, Any]:
    """The trials by setting, all but the seed, the best first; the best of each method on each data set; what failed.

    found: for each trial its numbers, or {"failed": why}. Every loss and accuracy is a mean with its 95 % interval over
    seeds, cut where no loss or accuracy can be; for one seed it is that number alone. Settings are sorted by accuracy
    on the validation set, if the data have labels, and where it is equal by validation loss; the others are reported.
    """
    groups: dict[str, list[int]] = {}
    for i, setting in enumerate(settings):
        groups.setdefault(json.dumps({k: v for k, v in setting.items() if k != "seed"}), []).append(i)
    rows = [_summary([settings[i] for i in group], [found[i] for i in group], varied) for group in groups.values()]
    rows.sort(key=lambda row: (_data(row), *_rank(row)))
    failed = [(i, one["failed"]) for i, one in enumerate(found) if "failed" in one]
    return {
        "trials": len(settings),
        "failed": [{"trial": i, "why": why} | _values(settings[i], varied) for i, why in failed],
        "settings": rows,
        "best": {
            " on ".join(filter(None, group)): _best(*group, rows)
            for group in dict.fromkeys((row["method"], _data(row)) for row in rows)
        },
    }


def _data(row: Mapping[str, Any]) -> str:
    """The data of a setting, if there are several: their losses cannot be compared."""
    return row["varied"].get("data", "")


def _rank(row: Mapping[str, Any]) -> tuple[float, float]:
    """What settings on the same data are sorted by, the best one first."""
    loss, accuracy = row["validation_loss"], row["validation_accuracy"]
    return -round(accuracy["mean"], 9) if accuracy else 0.0, loss["mean"] if loss else math.inf


def _summary(
    settings: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], varied: Sequence[str]
) -> dict[str, Any]:
    """One setting, over all its seeds: its options and its results."""
    whole, setting = [one for one in found if "failed" not in one], settings[0]
    finished = [setting for setting, one in zip(settings, found, strict=True) if "failed" not in one] or settings
    row: dict[str, Any] = {
        "varied": _values(setting, [name for name in varied if name != "seed"]),
        "method": setting["method"],
        "loss": setting["loss"],
        "r": setting.get("r"),
        "target_modules": word(setting.get("target_modules")),
        "lr": _rate(setting),
        "command": _command(finished[0], averaged=len(finished) > 1),
        "failed": len(found) - len(whole),
    }
    for name in AVERAGED:
        values = [one[name] for one in whole if name in one]
        row[name] = asdict(Interval.of(values).within(0, 1 if "accuracy" in name else math.inf)) if values else None
    for name in ("trainable_parameters", "seconds"):
        row[name] = sum(one[name] for one in whole) / len(whole) if whole else None
    return row


def _values(setting: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """What a table shows of these options of a trial, with the learning rate that is in effect."""
    values = {**setting, "lr": _rate(setting)}
    return {name: word(values.get(name)) for name in names}


def _rate(setting: Mapping[str, Any]) -> float:
    return setting["lr"] or as_options(setting).on_base(rate_of(setting["base"])).learning_rate


def _best(method: str, data: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The best of a method's settings on these data in which no seed failed; and the learning rate to try next, if the
    best one is the lowest or highest of those that were tried.
    """
    own = [row for row in rows if (row["method"], _data(row)) == (method, data) and row["validation_loss"]]
    if not own:
        return None
    best = next((row for row in own if not row["failed"]), own[0])
    others = {name: value for name, value in best["varied"].items() if name != "lr"}
    places = {row["lr"]: i for i, row in [*enumerate(own)][::-1] if others.items() <= row["varied"].items()}
    return best | {"try_lr": next_rate(places, nearest=1.5, farthest=HALF_DECADE)}


def _command(setting: Mapping[str, Any], averaged: bool) -> str:
    """The command that repeats a trial. averaged: the result is a mean over seeds, and the command names none."""
    words = ["minilora", "finetune"]
    for name, value in as_options(setting).__dict__.items():
        if (averaged and name == "seed") or value == Options.__dataclass_fields__[name].default:
            continue
        words.append(flag(name))
        if isinstance(value, Mapping):
            words += [f"{key}={one}" for key, one in value.items()]
        elif isinstance(value, (list, tuple)):
            words += map(str, value)
        elif value is not True:  # a switch is its name alone
            words.append(word(value))
    return " ".join(map(quote, words))
