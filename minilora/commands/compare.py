"""`minilora compare`: LoRA and full fine-tuning on the same data, in the same order, each at its best learning rate.

Every run is one of `finetune`, in its own process, so that its peak memory is its own. For each method a short run
tries every learning rate of a grid, of which the validation loss chooses, and a longer run follows at the best one. A
finished run is kept, and not repeated when the same command is given again.
"""

import argparse
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..data.formats import with_label
from ..data.records import read_records, sha256_of_data
from ..data.splits import has_validation
from ..experiments.memo import as_json, remember
from ..experiments.tuned import best_rate, next_rate
from ..files.disk import read_json, remove_folder, write_json
from ..measure.environment import here_and_now
from ..measure.process import apart
from ..models.load import load_tokenizer, sha256_of_base
from ..options import BASE, add_flags, check, from_flags, option, refuse_other_settings
from ..pages.text import counted, listed
from ..progress import log
from ..train.job import finetune
from ..train.loop import TrainingError
from ..train.options import FIELD, LABEL, MAX_LENGTH, RATE, Options
from ..train.rate import rate_of
from ..train.run_folder import METRICS_FILE
from ..version import __version__
from .compare_table import METHODS, NAMES, page, rows
from .shared import AS_JSON, Outcome

COMPARISON_FILE = "compare.json"
VALIDATIONS = 6  # of a run that is compared: the points of its curve

_SEARCH: dict[str, Any] = {"group": "learning rates"}


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What to compare on what. Raises ValueError for values that mean nothing."""

    base: str = option("smollm2", BASE, path=True)
    data: str = option("legal", Options.__dataclass_fields__["data"].metadata["help"], path=True)
    field: Mapping[str, str] | None = option(None, FIELD, metavar="NAME=COLUMN")
    label: str | None = option(None, LABEL, metavar="COLUMN")
    out: str | None = option(None, "folder for runs, compare.json and picture (default: runs/compare-<data>[-<base>])")
    overwrite: bool = option(False, "replace finished runs that had other options")

    steps: int = option(60, "steps of the two runs that are compared")
    batch_size: int = option(8, "records per step")
    max_length: int = option(512, MAX_LENGTH)
    eval_records: int = option(40, "records of each set that are measured, evenly chosen")
    seed: int = option(0, "seed of the adapter's initialisation and of the order of the records")
    r: int = option(8, "rank of LoRA's update, on all linear layers")
    lora_alpha: float = option(16.0, "LoRA's update is multiplied by alpha / r")

    lora_lr: Sequence[float] | None = option(
        None,
        "learning rates tried for LoRA (default: 0.3, 1 and 3 times that of minilora finetune; on smollm2 6e-4 2e-3 "
        "6e-3)",
        metavar="LR",
        **_SEARCH,
    )
    full_lr: Sequence[float] | None = option(
        None, "learning rates tried for full fine-tuning (default: a tenth of LoRA's default)", metavar="LR", **_SEARCH
    )
    search_steps: int | None = option(
        None, "steps with each of these learning rates (default: two fifths of --steps)", least=1, **_SEARCH
    )

    price: float = option(
        0.0425,
        "US dollars per core hour, an assumption: the on-demand price that Amazon's EC2 guide gives as its example, "
        "0.34 an hour for the 8 virtual cores of a c5.2xlarge",
        least=0,
    )

    def __post_init__(self):
        check(self)
        for method in METHODS:
            rates = self._given(method)
            if rates is not None and not (rates and all(math.isfinite(rate) and rate > 0 for rate in rates)):
                raise ValueError(f"{method}_lr must be positive numbers, got {' '.join(map(str, rates)) or 'none'}")
            self.run(method, RATE if rates is None else rates[0], compared=True)  # refuses what no run can be

    @property
    def folder(self) -> Path:
        """Where everything is written: `out`, or runs/compare-<data>[-<base, if it is not the default>]."""
        own = Options(base=self.base, data=self.data).folder  # runs/<data>[-<base>]
        return Path(self.out) if self.out else own.with_name(f"compare-{own.name}")

    @property
    def tries(self) -> int:
        """Steps of each try of a learning rate."""
        return self.search_steps or max(1, round(0.4 * self.steps))

    def rates(self, method: str) -> list[float]:
        """The learning rates tried for a method, in rising order: those given, or three around the base's default."""
        given = self._given(method)
        if given is None:
            usual = Options(base=self.base, method=method).on_base(rate_of(self.base)).learning_rate
            given = [float(f"{times * usual:.2g}") for times in (0.3, 1, 3)]
        return sorted(set(given))

    def _given(self, method: str) -> Sequence[float] | None:
        return self.lora_lr if method == "lora" else self.full_lr

    def run(self, method: str, lr: float, compared: bool) -> Options:
        """One run as `finetune` takes it: a run that is compared, or a try, which validates once, at its end."""
        names = ["base", "data", "field", "label", "batch_size", "max_length", "eval_records", "seed"]
        names += ["r", "lora_alpha"] if method == "lora" else []
        settings: dict[str, Any] = {name: getattr(self, name) for name in names}
        if method == "lora":
            settings["strength"] = 1.0  # full fine-tuning keeps its whole update, too
        steps, validations = (self.steps, VALIDATIONS) if compared else (self.tries, 1)
        settings |= {"method": method, "lr": lr, "steps": steps, "eval_every": math.ceil(steps / validations)}
        folder = self.folder if compared else self.folder / "search"
        return Options(out=str(folder / f"{method}-{lr:g}"), overwrite=True, **settings)


def compare(options: CompareOptions) -> dict[str, Any]:
    """Make the runs that are missing, and return the comparison, which is also written to `<out>/compare.json`.

    Raises ValueError before anything runs for bad input, and for a folder that holds runs with other settings;
    RuntimeError when a run fails, or when training diverges at every learning rate of a grid.
    """
    runs = _Runs(options, _inputs(options))
    runs.refuse_other_settings()
    rates = {method: options.rates(method) for method in METHODS}
    tries: dict[str, dict[float, dict[str, Any]]] = {method: {} for method in METHODS}
    for turn in zip_longest(*rates.values()):
        for method, lr in zip(METHODS, turn, strict=True):
            if lr is not None and len(rates[method]) > 1:  # a single rate needs no choice
                tries[method][lr] = runs.found(method, lr, compared=False)
    for method in METHODS:
        if (beyond := next_rate(_losses(tries[method]))) is not None:
            log.info(f"{NAMES[method]}: the best learning rate is at the edge of the grid: trying {beyond:g} as well")
            runs.total += 1
            tries[method][beyond] = runs.found(method, beyond, compared=False)
    search = {method: _outcome(method, tries[method], rates[method]) for method in METHODS}
    found = {method: runs.found(method, search[method]["best"], compared=True) for method in METHODS}
    result: dict[str, Any] = {
        "options": asdict(options) | {"out": str(options.folder), "search_steps": options.tries},
        **here_and_now(),
        "search": search,
        "runs": found,
        "peak_bytes": {method: _peak(tries[method].values(), found[method]) for method in METHODS},
        "wall_seconds": sum(seconds for _, seconds in runs.done),
    }
    result["rows"] = [row.to_json() for row in rows(result)]
    write_json(options.folder / COMPARISON_FILE, result)
    return result


def _losses(tries: Mapping[float, Mapping[str, Any]]) -> dict[float, float | None]:
    """The lowest validation loss of each try."""
    found = {lr: [loss for _, loss in metrics.get("validation_loss", [])] for lr, metrics in tries.items()}
    return {lr: min((loss for loss in losses if loss is not None), default=None) for lr, losses in found.items()}


def _outcome(method: str, tries: Mapping[float, Mapping[str, Any]], rates: Sequence[float]) -> dict[str, Any]:
    losses = _losses(tries)
    best = best_rate(losses) if tries else rates[0]
    if best is None:
        advice = f"try lower ones with --{method}-lr"
        raise RuntimeError(f"{NAMES[method]} diverges at each of {listed([f'{lr:g}' for lr in losses])}: {advice}")
    return {
        "best": best,
        "tried": [[lr, losses[lr]] for lr in sorted(losses)],
        "added": [lr for lr in sorted(losses) if lr not in rates],
        "at_edge": next_rate(losses) is not None,
    }


def _peak(tries: Iterable[Mapping[str, Any]], run: Mapping[str, Any]) -> int | None:
    """The peak of processes that only trained, if there were any: generating answers takes memory, too."""
    peaks = [metrics["peak_memory_bytes"]["measured"] for metrics in tries if "failed" not in metrics]
    return max(peaks) if peaks and None not in peaks else run["peak_memory_bytes"]["measured"]


# -- runs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What to run. compared: losses, recall and answers before and after are wanted, and not validation alone."""

    options: Options
    compared: bool

    def __str__(self) -> str:
        steps = counted(self.options.steps or 0, "step")
        return f"{NAMES[self.options.method]}, learning rate {self.options.lr:g}, {steps}"

    @property
    def record(self) -> Path:
        """The file of its result, next to its folder."""
        return self.options.folder.with_name(f"{self.options.folder.name}.json")


def train(given: dict[str, Any], measure: bool, lines: bool) -> dict[str, Any]:
    """The metrics of a run, {"failed": why} if training diverged: for a process that does nothing else.

    lines: whether it logs what it finds in its data, as the runs before it did.
    """
    if not lines:
        log.setLevel(logging.ERROR)
    try:
        metrics = finetune(Options(**given), measure)
    except TrainingError as error:
        return {"failed": str(error)}
    metrics["validation_loss"] = [(step, loss) for step, loss in metrics["validation_loss"] if math.isfinite(loss)]
    if not metrics["validation_loss"]:
        return {"failed": "no validation gave a finite loss"}
    return json.loads(json.dumps(metrics), parse_constant=lambda name: None)  # NaN and infinity are None


class _Runs:
    """The runs of a comparison: made, kept, found again. done: each with its seconds, whenever it was made."""

    def __init__(self, options: CompareOptions, inputs: dict[str, str]) -> None:
        self.options, self.inputs = options, inputs
        self.done: list[tuple[Run, float]] = []
        rates = {method: len(options.rates(method)) for method in METHODS}
        self.total = len(METHODS) + sum(n for n in rates.values() if n > 1)

    def found(self, method: str, lr: float, compared: bool) -> dict[str, Any]:
        """The metrics of a try or, if `compared`, of a run that is compared: read if they are kept, or made and kept.

        {"failed": why} for a try in which training diverged; a run that is compared raises RuntimeError.
        """
        run = Run(self.options.run(method, lr, compared), compared)
        record = remember(run.record, self._decides(run), lambda: self._made(run))
        self.done.append((run, record["seconds"]))
        if compared and "failed" in record["result"]:
            raise RuntimeError(f"{run}: {record['result']['failed']}; choose with --{method}-lr")
        return record["result"]

    def refuse_other_settings(self) -> None:
        """Raise ValueError for the folder of another run, and for records of runs with other settings.

        With `overwrite` such records are removed, with their runs.
        """
        folder = self.options.folder
        if (folder / METRICS_FILE).exists():
            raise ValueError(f"{folder} holds a run of minilora finetune: choose another --out")
        for path in sorted([*folder.glob("*-*.json"), *folder.glob("search/*-*.json")]):
            method = path.name.partition("-")[0]
            if method not in METHODS:
                continue
            then = read_json(path).get("decides", {})
            compared = path.parent == folder
            try:
                now = self._decides(Run(self.options.run(method, then.get("lr") or 1.0, compared), compared))
                refuse_other_settings(f"the run of {path}", then, now, "choose another --out, or --overwrite it")
            except ValueError:
                if not self.options.overwrite:
                    raise
                path.unlink()
                remove_folder(path.with_suffix(""))

    def _made(self, run: Run) -> dict[str, Any]:
        log.info(f"run {len(self.done) + 1} of {self.total}: {run}")
        try:
            metrics = apart(train, asdict(run.options), run.compared, not self.done)
        except KeyboardInterrupt:
            log.info(f"finished runs are kept in {self.options.folder}: the same command continues from there")
            raise
        except (RuntimeError, MemoryError) as error:
            raise type(error)(f"{run}: {error}".rstrip(": ")) from error
        if not run.compared:  # the numbers are wanted, the weights are not
            for name in (run.options.folder.name, f"{run.options.folder.name}.partial"):  # .partial: it diverged
                remove_folder(run.options.folder.with_name(name))
        return metrics

    def _decides(self, run: Run) -> dict[str, Any]:
        """All that decides what a run finds."""
        settings = asdict(run.options) | {"measure": run.compared, "minilora": __version__} | self.inputs
        del settings["out"]
        return as_json(settings)


def _inputs(options: CompareOptions) -> dict[str, str]:
    """The fingerprints of base and data. Raises ValueError for data without a validation set."""
    records = read_records(options.data, field=with_label(options.field, options.label))
    if not has_validation(records, lambda: load_tokenizer(options.base), options.max_length):
        advice = 'learning rates are chosen on it: use 10 records or more, or name some with "split": "validation"'
        raise ValueError(f"{options.data} has nothing for validation; {advice}")
    return {"base_sha256": sha256_of_base(options.base), "data_sha256": sha256_of_data(options.data)}


# -- the command -------------------------------------------------------------------------------------------------------

HELP = "compare LoRA with full fine-tuning: parameters, memory, time, loss, forgetting"


def add(parser: argparse.ArgumentParser) -> None:
    """The flags are the fields of CompareOptions."""
    add_flags(parser, CompareOptions)
    parser.add_argument("--json", **AS_JSON)


def run(arguments: argparse.Namespace) -> Outcome:
    """Make the runs that are missing; their picture and their table."""
    from ..pages.figures import compare_figure
    from ..pages.text import terminal_width

    options = from_flags(CompareOptions, arguments)
    result = compare(options)
    figures = {options.folder / "picture.png": lambda: compare_figure(result)}
    return Outcome(result, partial(page, width=terminal_width()), figures)
