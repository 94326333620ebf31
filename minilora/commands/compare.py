"""`minilora compare`: LoRA beside full fine-tuning on the same data, in the same order, each at its best learning rate.

Every run is one of `finetune`, in a process of its own, so that its peak of memory is its own: for each method a short
one at every learning rate of a grid, of which the validation loss chooses, then a longer one at the best. LoRA's update
is kept whole, where `finetune` by itself keeps a part. A finished run is kept, and not repeated when the same command
is given again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..data.records import read_records, sha256_of_data
from ..data.splits import has_validation
from ..experiments.tuned import best_rate, next_rate
from ..files.disk import read_json, remove_folder, write_json
from ..measure.environment import machine, versions
from ..models.load import load_tokenizer, sha256_of_base
from ..options import BASE, UsageError, add_flags, flag, flag_fields, from_flags, option
from ..train.options import FIELD, Options
from ..train.run_folder import METRICS_FILE
from ..version import __version__
from .apart import Run, apart
from .compare_table import METHODS, NAMES, rows
from .shared import AS_JSON, tell

COMPARISON_FILE = "compare.json"
VALIDATIONS = 6  # of a run that is compared: the points of its curve, and how finely its best is found

_SEARCH: dict[str, Any] = {"group": "learning rates"}


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What to compare on what. Raises ValueError for values that mean nothing."""

    base: str = option("smollm2", BASE)
    data: str = option("legal", Options.__dataclass_fields__["data"].metadata["help"])
    field: Mapping[str, str] | None = option(None, FIELD, metavar="NAME=COLUMN")
    out: str | None = option(None, "folder for runs, compare.json and picture (default: runs/compare-<data>[-<base>])")
    overwrite: bool = option(False, "replace finished runs that had other settings")

    steps: int = option(60, "steps of the two runs that are compared")
    batch_size: int = option(8, "records per step")
    max_length: int = option(512, "tokens per record, cut beyond")
    eval_records: int = option(40, "paraphrases measured, evenly chosen")
    seed: int = option(0, "decides the adapter's start and the order of the records")
    r: int = option(8, "rank of LoRA's update, on all linear maps")
    lora_alpha: float = option(16.0, "LoRA's scale is alpha / r")

    lora_lr: Sequence[float] = option(
        (6e-4, 2e-3, 6e-3), "learning rates tried for LoRA (default: 6e-4 2e-3 6e-3)", metavar="LR", **_SEARCH
    )
    full_lr: Sequence[float] = option(
        (6e-5, 2e-4, 6e-4), "and for full fine-tuning (default: a tenth: 6e-5 2e-4 6e-4)", metavar="LR", **_SEARCH
    )
    search_steps: int | None = option(None, "steps of each try (default: two fifths of --steps)", **_SEARCH)

    price: float = option(
        0.0425,
        "US dollars per core hour, an assumption: the on-demand price that Amazon's EC2 guide gives as its example, "
        "0.34 an hour for the 8 virtual cores of a c5.2xlarge",
    )

    def __post_init__(self):
        for method in METHODS:
            rates = self.rates(method)
            if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
                raise ValueError(f"{method}_lr must be positive numbers, got {' '.join(map(str, rates)) or 'none'}")
        if not (math.isfinite(self.price) and self.price >= 0):
            raise ValueError(f"price must be a number of dollars, got {self.price}")
        if self.search_steps is not None and self.search_steps < 1:
            raise ValueError(f"search_steps must be at least 1, got {self.search_steps}")
        for method in METHODS:
            self.run(method, self.rates(method)[0], self.steps, self.folder)  # refuses what no run can be

    @property
    def folder(self) -> Path:
        """Where everything goes: `out`, or runs/compare-<data>[-<base, if another than the default>]."""
        own = Options(base=self.base, data=self.data).folder  # runs/<data>[-<base>]
        return Path(self.out) if self.out else own.with_name(f"compare-{own.name}")

    @property
    def tries(self) -> int:
        """Steps of each try of a learning rate."""
        return self.search_steps or max(1, round(0.4 * self.steps))

    def rates(self, method: str) -> list[float]:
        """The learning rates tried for a method, in rising order, each once."""
        return sorted(set(self.lora_lr if method == "lora" else self.full_lr))

    def run(self, method: str, lr: float, steps: int, folder: Path, validations: int = 1) -> Options:
        """One run as `finetune` takes it, which validates up to so many times, the last time at its end."""
        names = ["base", "data", "field", "batch_size", "max_length", "eval_records", "seed"]
        names += ["r", "lora_alpha"] if method == "lora" else []
        settings: dict[str, Any] = {name: getattr(self, name) for name in names}
        if method == "lora":
            settings["strength"] = 1.0  # both methods as they were trained, and not a part of one of them
        settings |= {"method": method, "lr": lr, "steps": steps, "eval_every": math.ceil(steps / validations)}
        return Options(out=str(folder), overwrite=True, **settings)


Runner = Callable[[Run], dict[str, Any]]


def compare(
    options: CompareOptions, say: Callable[[str], None] = lambda line: None, runner: Runner | None = None
) -> dict[str, Any]:
    """Run what is not there yet, and return the comparison, which also stands in `<out>/compare.json`.

    say: hears which run comes next, and about how long all of them will take. runner: makes a run and returns the
    metrics of `finetune`, or {"failed": why} when its numbers ceased to be finite; `apart` if left out.
    Raises ValueError before anything runs for bad input, and for a folder that holds runs with other settings;
    RuntimeError when a run fails, or when no learning rate of a grid can be used.
    """
    runs = _Runs(options, _inputs(options, say), say, runner or apart)
    runs.refuse_other_settings()
    rates = {method: options.rates(method) for method in METHODS}
    tries: dict[str, dict[float, dict[str, Any]]] = {method: {} for method in METHODS}
    for turn in zip_longest(*rates.values()):
        for method, lr in zip(METHODS, turn, strict=True):
            if lr is not None and len(rates[method]) > 1:  # of one there is nothing to choose
                tries[method][lr] = runs.tried(method, lr)
    for method in METHODS:
        if (beyond := next_rate(_losses(tries[method]))) is not None:
            say(f"{NAMES[method]} is best at the edge of its grid: {beyond:g} is tried, too")
            tries[method][beyond] = runs.tried(method, beyond)
    search = {method: _outcome(method, tries[method], rates[method]) for method in METHODS}
    found = {method: runs.compared(method, search[method]["best"]) for method in METHODS}
    result = {
        "options": asdict(options) | {"out": str(options.folder), "search_steps": options.tries},
        "machine": machine(),
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "search": search,
        "runs": found,
        "peak_bytes": {method: _peak(tries[method].values(), found[method]) for method in METHODS},
        "wall_seconds": runs.seconds,
    }
    result["rows"] = [row.to_json() for row in rows(result)]
    write_json(options.folder / COMPARISON_FILE, result)
    return result


# -- learning rates ----------------------------------------------------------------------------------------------------


def _losses(tries: dict[float, dict[str, Any]]) -> dict[float, float | None]:
    """The lowest validation loss of each try."""
    found = {lr: [loss for _, loss in metrics.get("validation_loss", [])] for lr, metrics in tries.items()}
    return {lr: min(filter(math.isfinite, losses), default=None) for lr, losses in found.items()}


def _outcome(method: str, tries: dict[float, dict[str, Any]], rates: Sequence[float]) -> dict[str, Any]:
    losses = _losses(tries)
    best = best_rate(losses) if tries else rates[0]
    if best is None:
        advice = f"try lower ones with --{method}-lr"
        raise RuntimeError(f"{NAMES[method]} came to no finite loss at any of {', '.join(map(str, losses))}: {advice}")
    return {
        "best": best,
        "tried": [[lr, losses[lr]] for lr in sorted(losses)],
        "added": [lr for lr in sorted(losses) if lr not in rates],
        "at_edge": next_rate(losses) is not None,
    }


def _peak(tries: Iterable[dict[str, Any]], run: dict[str, Any]) -> int | None:
    """The peak of processes that did nothing but train, if there were any: answers take memory of their own."""
    peaks = [metrics["peak_memory_bytes"]["measured"] for metrics in tries if "failed" not in metrics]
    return max(peaks) if peaks and None not in peaks else run["peak_memory_bytes"]["measured"]


# -- runs --------------------------------------------------------------------------------------------------------------


class _Runs:
    """The runs of a comparison: made, kept, found again. `seconds`: what all of them took, whenever that was."""

    def __init__(
        self, options: CompareOptions, inputs: dict[str, str], say: Callable[[str], None], runner: Runner
    ) -> None:
        self.options, self.inputs, self.say, self.runner = options, inputs, say, runner
        self.seconds = 0.0
        self.done: list[tuple[Run, float]] = []
        self.ahead = [self._search(method, lr) for method in METHODS for lr in _several(options.rates(method))]
        self.ahead += [self._compared(method, options.rates(method)[0]) for method in METHODS]  # at some rate

    def tried(self, method: str, lr: float) -> dict[str, Any]:
        """The metrics of a try, {"failed": why} where training broke off."""
        return self._metrics(self._search(method, lr))

    def compared(self, method: str, lr: float) -> dict[str, Any]:
        """The metrics of one of the two runs that are compared. Raises RuntimeError where training broke off."""
        run = self._compared(method, lr)
        metrics = self._metrics(run)
        if "failed" in metrics:
            raise RuntimeError(f"{run}: {metrics['failed']}; choose with --{method}-lr")
        return metrics

    def refuse_other_settings(self) -> None:
        """Raise ValueError for the folder of another run, and for records of runs with other settings.

        With `overwrite` such records go, and what they are of.
        """
        folder = self.options.folder
        if (folder / METRICS_FILE).exists():
            raise ValueError(f"{folder} holds a run of minilora finetune: choose another --out")
        for path in sorted([*folder.glob("*-*.json"), *folder.glob("search/*-*.json")]):
            method = path.name.partition("-")[0]
            if method not in METHODS:
                continue
            make = self._search if path.parent != folder else self._compared
            there = read_json(path).get("settings", {})
            wanted = self._settings(make(method, there.get("lr") or 1.0))
            differing = sorted(key for key in there.keys() | wanted.keys() if there.get(key) != wanted.get(key))
            if not differing:
                continue
            if not self.options.overwrite:
                named = ", ".join(f"{key} {_short(there.get(key))}, now {_short(wanted.get(key))}" for key in differing)
                raise ValueError(
                    f"{path} is of a run with other settings ({named}): choose another --out, or --overwrite it"
                )
            path.unlink()
            remove_folder(path.with_suffix(""))

    def _search(self, method: str, lr: float) -> Run:
        folder = self.options.folder / "search" / f"{method}-{lr:g}"
        return Run(self.options.run(method, lr, self.options.tries, folder), measure=False)

    def _compared(self, method: str, lr: float) -> Run:
        folder = self.options.folder / f"{method}-{lr:g}"
        return Run(self.options.run(method, lr, self.options.steps, folder, VALIDATIONS), measure=True)

    def _metrics(self, run: Run) -> dict[str, Any]:
        """What a run found: read where it is there, made and kept where it is not."""
        self.ahead = self._without(run)
        if run.record.is_file():
            record = read_json(run.record)
        else:
            place = f"run {len(self.done) + 1} of {len(self.done) + 1 + len(self.ahead)}"
            self.say(f"{place}: {run}{self._time_left(run)}")
            start = time.perf_counter()
            try:
                metrics = self.runner(run)
            except KeyboardInterrupt:
                self.say(f"\nfinished runs are kept in {self.options.folder}: the same command goes on from there")
                raise
            if not run.measure:  # the numbers are wanted, the weights are not
                remove_folder(run.options.folder)
                remove_folder(run.options.folder.with_name(f"{run.options.folder.name}.partial"))  # of one broken off
            run.record.parent.mkdir(parents=True, exist_ok=True)
            record = {"settings": self._settings(run), "seconds": time.perf_counter() - start, "metrics": metrics}
            write_json(run.record, record)
        self.done.append((run, record["seconds"]))
        self.seconds += record["seconds"]
        return record["metrics"]

    def _settings(self, run: Run) -> dict[str, Any]:
        """All that decides what a run finds, as JSON keeps it."""
        settings = asdict(run.options) | {"measure": run.measure, "minilora": __version__} | self.inputs
        del settings["out"]
        return json.loads(json.dumps(settings))

    def _without(self, run: Run) -> list[Run]:
        """The runs ahead without this one, or, where its learning rate is not known ahead, without one of its kind."""
        kind = (run.options.method, run.measure)
        for i, each in enumerate(self.ahead):
            if (each.options.method, each.measure) == kind:
                return self.ahead[:i] + self.ahead[i + 1 :]
        return self.ahead

    def _time_left(self, run: Run) -> str:
        """In words, by the time that the same method's steps have taken so far; nothing while that is not known."""
        left = 0.0
        for each in (run, *self.ahead):
            known = [(run.options.steps or 1, seconds) for run, seconds in self.done if _kin(run, each)]
            if not known:
                return ""
            steps, seconds = (sum(column) for column in zip(*known, strict=True))
            left += seconds * (each.options.steps or 1) / steps
        return f"; all of it will be done in about {math.ceil(left / 60)} min"


def _kin(run: Run, other: Run) -> bool:
    return run.options.method == other.options.method


def _several(rates: list[float]) -> list[float]:
    return rates if len(rates) > 1 else []


def _short(value: Any) -> str:
    return f"{value[:8]}..." if isinstance(value, str) and len(value) == 64 else str(value)


def _inputs(options: CompareOptions, say: Callable[[str], None]) -> dict[str, str]:
    """The fingerprints of base and data. Raises ValueError for data that leave nothing to choose learning rates by."""
    records = read_records(options.data, field=options.field)
    if not has_validation(records, load_tokenizer(options.base), options.max_length):
        advice = 'learning rates are chosen on it: use 10 records or more, or name some with "split": "validation"'
        raise ValueError(f"{options.data} has nothing for validation; {advice}")
    return {"base_sha256": sha256_of_base(options.base), "data_sha256": sha256_of_data(options.data)}


HELP = "measure LoRA beside full fine-tuning, claim by claim"


def add(parser: argparse.ArgumentParser) -> None:
    """The flags are the fields of CompareOptions; with --domains those of DomainsOptions."""
    from .domains import DomainsOptions

    add_flags(parser, CompareOptions)
    parser.add_argument("--json", **AS_JSON)
    four = parser.add_argument_group("four domains")
    told = "instead, train legal, medical, support and finance, and measure each adapter on all of them"
    four.add_argument("--domains", action="store_true", help=told)
    least = f"records of each set that are measured (default: {DomainsOptions.limit})"
    four.add_argument("--limit", type=int, default=argparse.SUPPRESS, help=least)


def run(arguments: argparse.Namespace) -> None:
    """Make the runs that are not there yet, draw the picture, print the table."""
    from ..pages.figures import compare_figure
    from ..pages.style import save_themes
    from ..pages.text import terminal_width
    from .compare_table import page

    if arguments.domains:
        return _run_domains(arguments)
    if "limit" in arguments:
        raise UsageError("--limit means nothing without --domains: leave out one, or give both")
    options = from_flags(CompareOptions, arguments)
    result = compare(options, say=tell)
    save_themes(lambda: compare_figure(result), options.folder / "picture.png")
    print(json.dumps(result, indent=2) if arguments.json else page(result, terminal_width()))


def _run_domains(arguments: argparse.Namespace) -> None:
    from ..pages.figures import matrix_figure
    from ..pages.style import save_themes
    from ..pages.text import terminal_width
    from .domains import PICTURE_FILE, DomainsOptions, compare_domains, domains_page, drawn

    own = {item.name for item in flag_fields(DomainsOptions)}
    if other := [item.name for item in flag_fields(CompareOptions) if item.name in arguments and item.name not in own]:
        raise UsageError(f"{flag(other[0])} means nothing with --domains: leave out one of the two")
    options = from_flags(DomainsOptions, arguments)
    result = compare_domains(options)
    save_themes(lambda: matrix_figure(drawn(result)), options.folder / PICTURE_FILE)
    print(json.dumps(result, indent=2) if arguments.json else domains_page(result, terminal_width()))
