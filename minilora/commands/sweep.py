"""`minilora sweep`: its flags, and the page that it prints."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ..experiments.grid import Sweep, SweepOptions
from ..options import add_flags, usage_errors
from ..pages.text import columns, counted, duration, interval, rule, terminal_width, wrapped
from .compare_table import NAMES
from .shared import AS_JSON, Outcome, read_options

HELP = "try options of finetune with several values, in many short runs, and tabulate the results"

SHOWN = {"validation_loss": "validation", "validation_accuracy": "accuracy", "unseen_loss": "unseen",
         "general_loss": "general"}  # fmt: skip
ROWS = 24  # of a table: the best ones
REASONS = 5  # failed trials whose reasons are printed


def add(parser: argparse.ArgumentParser) -> None:
    """The flags are the fields of SweepOptions; --config names a file of them."""
    add_flags(parser, SweepOptions)
    parser.usage = "minilora sweep [--OPTION VALUE [VALUE ...]] ... [--config FILE] [--out DIR] [--json]"
    parser.epilog = (
        "Example: minilora sweep --r 1 4 16 --lr 1e-3 3e-3 1e-2 --seed 0 1 2 --steps 60 --out runs/ranks. The same "
        "command continues an interrupted sweep; with more values, such as --seed 0 1 2 3 4, it adds the new trials."
    )
    parser.add_argument("--config", metavar="FILE", help="a TOML file of options, whose values may be lists")
    parser.add_argument("--json", **AS_JSON)


def run(arguments: argparse.Namespace) -> Outcome:
    """Make the trials that are not there yet; their picture and their table."""
    from ..experiments.sweep import PICTURE_FILE, sweep
    from ..pages.sweep import sweep_figure

    options: Sweep = read_options(SweepOptions, arguments)
    with usage_errors():
        options.settings()
    result = sweep(options)
    drawn = sweep_figure(result) is not None
    figures = {options.folder / PICTURE_FILE: lambda: sweep_figure(result)} if drawn else {}
    none = len(result["failed"]) == result["trials"]
    failed = "no trial finished: the reasons are listed above" if none else ""
    return Outcome(result, partial(page, width=terminal_width()), figures, failed)


def page(result: Mapping[str, Any], width: int) -> str:
    """The summary as text: a table of settings, the best one of each method, what failed."""
    rows, trials = result["settings"], counted(result["trials"], "trial")
    seeds = max((row["validation_loss"]["n"] for row in rows if row["validation_loss"]), default=0)
    over = f"mean and 95 % interval over {seeds} seeds" if seeds > 1 else "of one seed each, so without intervals"
    dpo = "; DPO's are per pair" if rows[0]["loss"] == "dpo" else ""
    accuracy = ", accuracy on the validation set" if any(row["validation_accuracy"] for row in rows) else ""
    lines = [rule(trials, width), f"losses in nats per token{dpo}{accuracy}, {over}", "", *_table(rows)]
    if len(rows) > ROWS:
        lines.append(f"... and {counted(len(rows) - ROWS, 'more setting')}")
    lines.append("")
    if "data" in rows[0]["varied"]:
        lines += wrapped(
            "Losses on different data cannot be compared: each has its own best, and there is no picture.", width
        )
    for group, best in result["best"].items():
        lines += _best(group, best)
    if failed := result["failed"]:
        lines += ["", f"{len(failed)} of {trials} failed"]
        lines += [f"  {_named(one)}: {one['why']}".replace("  : ", "  ") for one in failed[:REASONS]]
    if (spent := result["time"])["made"]:
        made = counted(spent["made"], "trial")
        lines += ["", f"{made} in {duration(spent['wall_seconds'])}, {spent['jobs']} at a time"]
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(rows[0]["varied"])
    measured = [name for name in SHOWN if any(row[name] for row in rows)]
    cells = [[*(name.replace("_", "-") for name in names), "parameters", *(SHOWN[name] for name in measured)]]
    for row in rows[:ROWS]:
        count = row["trainable_parameters"]
        cells.append([value or "-" for value in row["varied"].values()])
        cells[-1] += ["-" if count is None else f"{count:,.0f}", *(_shown(row, name) for name in measured)]
        cells[-1] += [f"{row['failed']} failed"] if row["failed"] else []
    return columns(cells, left=len(names))


def _shown(row: Mapping[str, Any], name: str) -> str:
    if (found := row[name]) is None:
        return "-"
    factor, digits, unit = (100, 1, " %") if name == "validation_accuracy" else (1, 3, "")
    low, high = (factor * found[key] if found["n"] > 1 else None for key in ("low", "high"))
    return interval(factor * found["mean"], low, high, digits) + unit


def _best(group: str, best: Mapping[str, Any] | None) -> Iterator[str]:
    method, *data = group.split(" on ", 1)
    if best is None:
        yield f"{' on '.join([NAMES[method], *data])}: no trial finished"
        return
    named = _named({name: value for name, value in best["varied"].items() if name != "method"})
    by = "accuracy, then validation loss" if best["validation_accuracy"] else "validation loss"
    yield f"best of {NAMES[method]}, by {by}" + (f": {named}" if named else "")
    yield "  " + ", ".join(f"{SHOWN[name]} {_shown(best, name)}" for name in SHOWN if best[name])
    yield f"  {best['command']}"
    if best["try_lr"] is not None:
        yield f"  Its learning rate is the lowest or the highest that was tried: try {best['try_lr']:g} as well."


def _named(values: Mapping[str, Any]) -> str:
    named = {name: value for name, value in values.items() if value and name not in ("trial", "why")}
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in named.items())
