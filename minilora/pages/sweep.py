"""The picture of a sweep: loss against learning rate, against rank, and against the number of trained parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .rates import SHOWN, cut_above
from .style import FULL, LORA, name_lines, panels

LOSS = "validation loss (nats per token)"
MARKS = "osD^v<>P"
Row = Mapping[str, Any]


def sweep_figure(result: Mapping[str, Any]) -> Any:
    """What a sweep found, as a matplotlib figure; None where none of the three was varied.

    result: as `minilora.experiments.sweep.sweep` returns it. In each panel a line joins settings of one kind, with all
    other options at their best; bands and bars are 95 % intervals over seeds.
    """
    rows = [row for row in result["settings"] if row["validation_loss"]]
    kinds = [draw for draw, key in _PANELS if len({row[key] for row in rows if row[key] is not None}) > 1]
    if not kinds:
        return None
    figure, axes = panels(len(kinds), width=1.2 + 4.6 * len(kinds), height=4.2)
    for each, draw in zip([axes] if len(kinds) == 1 else axes, kinds, strict=True):
        draw(each, rows)
    return figure


def _against_rate(axes: Any, rows: Sequence[Row]) -> None:
    lines = _lines(rows, lambda row: (row["method"], row["r"]), "lr")
    names, lowest = [], min(map(_mean, rows))
    for line, (color, opacity, mark) in zip(lines, _looks(lines), strict=True):
        _bars(axes, line, "lr", color, opacity, mark)
        row = line[0]
        end = min(_mean(line[-1]), lowest + SHOWN)
        names.append((end, "full" if row["method"] == "full" else f"r = {row['r']}", color))
    _scaled(axes, [row["lr"] for line in lines for row in line], 10)
    near = [row["validation_loss"] for line in lines for row in line if _mean(row) <= lowest + SHOWN]
    cut_above(axes, [*map(_mean, rows), *(each[end] for each in near for end in ("low", "high"))])
    axes.set(xlabel="learning rate", ylabel=LOSS, title="Learning rate, for each rank")
    name_lines(axes, names)


def _against_rank(axes: Any, rows: Sequence[Row]) -> None:
    lora, full = [row for row in rows if row["method"] == "lora"], [row for row in rows if row["method"] == "full"]
    lines = _lines(lora, lambda row: (row["method"], row["target_modules"]), "r")
    ranks = [row["r"] for line in lines for row in line]
    names = []
    for line, (color, opacity, mark) in zip(lines, _looks(lines), strict=True):
        _band(axes, line, "r", color, opacity, mark)
        names.append(
            (_mean(line[-1]), line[0]["target_modules"].replace(",", "\n") if len(lines) > 1 else "LoRA", color)
        )
    if full:
        best = min(full, key=_mean)["validation_loss"]
        axes.axhspan(best["low"], best["high"], color=FULL, alpha=0.15, linewidth=0)
        axes.axhline(best["mean"], color=FULL, linewidth=2)
        names.append((best["mean"], "full", FULL))
    _scaled(axes, ranks, 2)
    axes.set(xlabel="rank r", ylabel=LOSS, title="Rank, each at its best")
    name_lines(axes, names)


def _against_parameters(axes: Any, rows: Sequence[Row]) -> None:
    lines = _lines(rows, lambda row: (row["method"], row["target_modules"]), "trainable_parameters")
    names = []
    for line, (color, opacity, mark) in zip(lines, _looks(lines), strict=True):
        _bars(axes, line, "trainable_parameters", color, opacity, mark)
        lora = line[0]["target_modules"].replace(",", "\n") if len(lines) > 2 else "LoRA"
        names.append((_mean(line[-1]), "full" if line[0]["method"] == "full" else lora, color))
    _scaled(axes, [row["trainable_parameters"] for line in lines for row in line], 10)
    axes.set(xlabel="trainable parameters", ylabel=LOSS, title="Trainable parameters, each at its best")
    name_lines(axes, names)


_PANELS = ((_against_rate, "lr"), (_against_rank, "r"), (_against_parameters, "trainable_parameters"))


# -- lines -------------------------------------------------------------------------------------------------------------


def _lines(rows: Sequence[Row], kind: Callable[[Row], Any], x: str) -> list[list[Row]]:
    """The rows of each kind, in the order of x, and of those with the same x the best one."""
    best: dict[Any, dict[Any, Row]] = {}
    for row in rows:
        line = best.setdefault(kind(row), {})
        if row[x] not in line or _mean(row) < _mean(line[row[x]]):
            line[row[x]] = row
    order = sorted(best, key=lambda key: (key[0] == "full", *(str(part).rjust(8) for part in key[1:])))
    return [[best[key][at] for at in sorted(best[key])] for key in order]


def _mean(row: Row) -> float:
    return row["validation_loss"]["mean"]


def _looks(lines: Sequence[Sequence[Row]]) -> list[tuple[str, float, str]]:
    """Colour, opacity and mark of each line: LoRA's grow darker from the first to the last."""
    lora = sum(line[0]["method"] == "lora" for line in lines)
    looks = [(LORA, 0.4 + 0.6 * (i + 1) / lora, MARKS[i % len(MARKS)]) for i in range(lora)]
    return looks + [(FULL, 1.0, "s")] * (len(lines) - lora)


def _band(axes: Any, line: Sequence[Row], x: str, color: str, opacity: float, mark: str) -> None:
    at = [row[x] for row in line]
    axes.fill_between(at, *_ends(line), color=color, alpha=0.15 * opacity, linewidth=0)
    axes.plot(at, [_mean(row) for row in line], color=color, alpha=opacity, marker=mark, markersize=5, linewidth=2)


def _bars(axes: Any, line: Sequence[Row], x: str, color: str, opacity: float, mark: str) -> None:
    at = [row[x] for row in line]
    axes.vlines(at, *_ends(line), color=color, alpha=0.6 * opacity, linewidth=1.2)
    axes.plot(at, [_mean(row) for row in line], color=color, alpha=opacity, marker=mark, markersize=5, linewidth=2)


def _ends(line: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row["validation_loss"]["low"] for row in line], [row["validation_loss"]["high"] for row in line]


def _scaled(axes: Any, values: Sequence[float], base: int) -> None:
    """A logarithmic axis whose ticks are the values themselves, where these are few."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    axes.set_xscale("log", base=base)
    axes.margins(x=0.06, y=0.08)
    few = sorted(set(values))
    if len(few) <= (7 if base == 2 else 5 if few[-1] < 1 else 0):
        axes.xaxis.set_major_locator(FixedLocator(few))
    else:
        axes.xaxis.set_major_locator(LogLocator(base, subs=(1.0, 3.0) if base == 10 else (1.0,)))
    axes.xaxis.set_major_formatter(lambda x, position: _short(x))
    axes.xaxis.set_minor_locator(NullLocator())


def _short(x: float) -> str:
    return f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x >= 1e4 else f"{x:g}"
