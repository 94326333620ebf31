"""What the trials of a sweep say together: means and intervals over seeds, the best of each method, the page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..measure.statistics import Interval
from ..options import flag
from ..train.options import Options
from .compare import next_rate
from .compare_table import NAMES
from .report import rule
from .sweep_options import as_options, word

LOSSES = {
    "validation_loss": "validation",
    "unseen_loss": "unseen",
    "general_loss": "general",
}
ROWS = 24  # of a table: the best ones


def summarise(
    settings: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], varied: Sequence[str]
) -> dict[str, Any]:
    """The trials by setting, all but the seed, the best first; the best of each method; what failed.

    found: of each trial its numbers, or {"failed": why}. Every loss is a mean with the ends of its 95 % interval over
    seeds, of one seed that number alone. What chooses is the validation loss; the others are reported.
    """
    groups: dict[str, list[int]] = {}
    for i, setting in enumerate(settings):
        groups.setdefault(json.dumps({k: v for k, v in setting.items() if k != "seed"}), []).append(i)
    rows = [_row([settings[i] for i in group], [found[i] for i in group], varied) for group in groups.values()]
    rows.sort(key=lambda row: (row["validation_loss"] is None, (row["validation_loss"] or {"mean": 0})["mean"]))
    return {
        "trials": len(settings),
        "failed": [
            {"trial": i, "why": one["failed"]} | _shown(settings[i], varied)
            for i, one in enumerate(found)
            if "failed" in one
        ],
        "settings": rows,
        "best": {method: _best(method, rows) for method in dict.fromkeys(row["method"] for row in rows)},
    }


def _row(
    settings: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], varied: Sequence[str]
) -> dict[str, Any]:
    """One setting, of all its seeds: what it was told, and what it came to."""
    whole = [one for one in found if "failed" not in one]
    setting = settings[0]
    row: dict[str, Any] = {
        "told": _shown(setting, [name for name in varied if name != "seed"]),
        "method": setting["method"],
        "r": setting.get("r"),
        "target_modules": word(setting.get("target_modules")),
        "lr": as_options(setting).learning_rate,
        "command": _command(setting),
        "failed": len(found) - len(whole),
    }
    for name in (*LOSSES, "paraphrase_loss", "train_loss"):
        values = [one[name] for one in whole if name in one]
        row[name] = asdict(Interval.of(values)) if values else None
    for name in ("trainable_parameters", "seconds"):
        row[name] = sum(one[name] for one in whole) / len(whole) if whole else None
    return row


def _shown(setting: Mapping[str, Any], varied: Sequence[str]) -> dict[str, str]:
    return {name: word(setting.get(name)) if name in setting else "" for name in varied}


def _best(method: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The best of a method's settings, as far as none of its seeds failed; and which learning rate should be tried
    besides, where the best one is the first or last of those that were.
    """
    own = [row for row in rows if row["method"] == method and row["validation_loss"]]
    if not own:
        return None
    best = next((row for row in own if not row["failed"]), own[0])
    others = {name: value for name, value in best["told"].items() if name != "lr"}
    tried = {row["lr"]: row for row in own if others.items() <= row["told"].items()}
    return best | {"try_lr": next_rate({lr: row["validation_loss"]["mean"] for lr, row in tried.items()})}


def _command(setting: Mapping[str, Any]) -> str:
    words = ["minilora", "finetune"]
    for name, value in as_options(setting).__dict__.items():
        default = Options.__dataclass_fields__[name].default
        if name == "seed" or value == default:
            continue
        words.append(flag(name))
        if isinstance(value, Mapping):
            words += [f"{key}={one}" for key, one in value.items()]
        elif isinstance(value, (list, tuple)):
            words += map(str, value)
        elif value is not True:  # of a switch the name is all
            words.append(word(value))
    return shlex.join(words)


# -- the page ----------------------------------------------------------------------------------------------------------


def page(result: Mapping[str, Any], width: int) -> str:
    """The summary as text: a table of settings, the best one of each method, what failed."""
    rows = result["settings"]
    seeds = max(((row["validation_loss"] or {"n": 0})["n"] for row in rows), default=0)
    over = f"mean and 95 % interval over {seeds} seeds" if seeds > 1 else "of one seed each, so without intervals"
    lines = [rule(f"{result['trials']} trials", width), f"losses in nats per token, {over}", ""]
    lines += _table(rows)
    if len(rows) > ROWS:
        lines.append(f"... and {len(rows) - ROWS} more settings")
    lines.append("")
    for method, best in result["best"].items():
        lines += _told_of_best(method, best)
    if result["failed"]:
        lines += ["", f"{len(result['failed'])} of {result['trials']} trials failed"]
        lines += [f"  {_named(one)}: {one['why']}" for one in result["failed"][:5]]
    spent = result["time"]
    if spent["made"]:
        lines += ["", f"{spent['made']} trials in {_time(spent['wall_seconds'])}, {spent['jobs']} at a time"]
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    names = list(rows[0]["told"])
    losses = [name for name in LOSSES if any(row[name] for row in rows)]
    cells = [[name.replace("_", "-") for name in names] + ["parameters", *(LOSSES[name] for name in losses)]]
    for row in rows[:ROWS]:
        count = row["trainable_parameters"]
        cells.append([value or "-" for value in row["told"].values()])
        cells[-1] += ["-" if count is None else f"{count:,.0f}", *(_loss(row[name]) for name in losses)]
        if row["failed"]:
            cells[-1].append(f"{row['failed']} failed")
    widths = [max(len(row[j]) for row in cells if j < len(row)) for j in range(max(map(len, cells)))]
    for line in cells:
        yield "  ".join(
            f"{cell:<{widths[j]}}" if j < len(names) else f"{cell:>{widths[j]}}" for j, cell in enumerate(line)
        ).rstrip()


def _loss(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['mean']:.3f}" + (f" ({found['low']:.3f} to {found['high']:.3f})" if found["n"] > 1 else "")


def _told_of_best(method: str, best: Mapping[str, Any] | None) -> Iterator[str]:
    if best is None:
        yield f"{NAMES[method]}: no trial came to its end"
        return
    named = _named(best["told"], but=("method",))
    yield f"best of {NAMES[method]}, by validation loss" + (f": {named}" if named else "")
    yield "  " + ", ".join(f"{LOSSES[name]} {_loss(best[name])}" for name in LOSSES if best[name])
    yield f"  {best['command']}"
    if best["try_lr"] is not None:
        yield f"  its learning rate is the last of those that were tried: try {best['try_lr']:g}, too"


def _named(told: Mapping[str, Any], but: Sequence[str] = ("trial", "why")) -> str:
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in told.items() if value and name not in but)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
