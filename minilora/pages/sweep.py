"""The picture of a sweep: loss against learning rate, against rank, and against the number of trained parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .rates import MARKS, SHOWN, cut_above
from .style import FULL, LORA, name_lines, panels

LOSS = {"sft": "validation loss (nats per token)", "dpo": "validation loss (DPO's, per pair)"}
Row = Mapping[str, Any]


def sweep_figure(result: Mapping[str, Any]) -> Any:
    """What a sweep found, as a matplotlib figure; None where none of the three was varied, or the data were.

    result: as `minilora.experiments.sweep.sweep` returns it. In each panel a line joins settings of one kind, with all
    other options at their best; bands and bars are 95 % intervals over seeds.
    """
    rows = [row for row in result["settings"] if row["validation_loss"]]
    kinds = [draw for draw, key in _PANELS if len({row[key] for row in rows if row[key] is not None}) > 1]
    if not kinds or "data" in rows[0].get("varied", {}):
        return None
    figure, axes = panels(len(kinds), width=1.2 + 4.6 * len(kinds), height=4.2)
    for each, draw in zip([axes] if len(kinds) == 1 else axes, kinds, strict=True):
        draw(each, rows)
        each.set_ylabel(LOSS[rows[0]["loss"]])
    return figure


def _against_rate(axes: Any, rows: Sequence[Row]) -> None:
    names = _lines(axes, rows, "r", "lr", lambda row: f"r = {row['r']}")
    most = min(map(_mean, rows)) + SHOWN
    near = [row["validation_loss"] for row in rows if _mean(row) <= most]
    cut_above(axes, [*map(_mean, rows), *(each[end] for each in near for end in ("low", "high"))], most)
    axes.set(xlabel="learning rate", title="Learning rate, for each rank")
    name_lines(axes, [(min(end, most), name, color) for end, name, color in names])


def _against_rank(axes: Any, rows: Sequence[Row]) -> None:
    lora, full = [row for row in rows if row["method"] == "lora"], [row for row in rows if row["method"] == "full"]
    names = _lines(axes, lora, "target_modules", "r", _targets(lora), bars=False)
    if full:
        best = min(full, key=_mean)["validation_loss"]
        axes.axhspan(best["low"], best["high"], color=FULL, alpha=0.15, linewidth=0)
        axes.axhline(best["mean"], color=FULL, linewidth=2)
        names.append((best["mean"], "full", FULL))
    axes.set(xlabel="rank r", title="Rank, each at its best")
    name_lines(axes, names)


def _against_parameters(axes: Any, rows: Sequence[Row]) -> None:
    names = _lines(axes, rows, "target_modules", "trainable_parameters", _targets(rows))
    axes.set(xlabel="trainable parameters", title="Trainable parameters, each at its best")
    name_lines(axes, names)


_PANELS = ((_against_rate, "lr"), (_against_rank, "r"), (_against_parameters, "trainable_parameters"))


# -- lines -------------------------------------------------------------------------------------------------------------


def _lines(
    axes: Any, rows: Sequence[Row], kind: str, x: str, name: Callable[[Row], str], bars: bool = True
) -> list[tuple[float, str, str]]:
    """Draw a line for each method and kind, through the best row at each x, with bars or a band for the intervals.

    Returns what `name_lines` takes: where each line ends, its name and its colour.
    """
    best: dict[tuple[Any, Any], dict[Any, Row]] = {}
    for row in rows:
        own = best.setdefault((row["method"], row[kind]), {})
        own[row[x]] = min(own.get(row[x], row), row, key=_mean)
    order = sorted(best, key=lambda key: (key[0] == "full", str(key[1]).rjust(8)))
    several, names = sum(method == "lora" for method, _ in best), []
    for i, key in enumerate(order):
        at = sorted(best[key])
        line = [best[key][value] for value in at]
        color, opacity, mark = FULL, 1.0, "s"
        if i < several:  # LoRA's lines grow darker from the first to the last
            color, opacity, mark = LORA, 0.4 + 0.6 * (i + 1) / several, MARKS[i % len(MARKS)]
        low, high = ([row["validation_loss"][end] for row in line] for end in ("low", "high"))
        if bars:
            axes.vlines(at, low, high, color=color, alpha=0.6 * opacity, linewidth=1.2)
        else:
            axes.fill_between(at, low, high, color=color, alpha=0.15 * opacity, linewidth=0)
        means = [_mean(row) for row in line]
        axes.plot(at, means, color=color, alpha=opacity, marker=mark, markersize=5, linewidth=2)
        names.append((means[-1], name(line[0]) if i < several else "full", color))
    _scaled(axes, [row[x] for row in rows], 2 if x == "r" else 10)
    return names


def _targets(rows: Sequence[Row]) -> Callable[[Row], str]:
    """How a line of LoRA is called: by its modules, where there are several choices of them."""
    several = len({row["target_modules"] for row in rows if row["method"] == "lora"}) > 1
    return lambda row: row["target_modules"].replace(",", "\n") if several else "LoRA"


def _mean(row: Row) -> float:
    return row["validation_loss"]["mean"]


def _scaled(axes: Any, values: Sequence[float], base: int) -> None:
    """A logarithmic axis whose ticks are the values themselves, where these are few."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    axes.set_xscale("log", base=base)
    axes.margins(x=0.06, y=0.08)
    few = sorted(set(values))
    if len(few) <= (7 if base == 2 else 5 if few[-1] < 1 else 0):
        axes.xaxis.set_major_locator(FixedLocator(few))
    else:
        near = base == 10 and few[-1] < 2000 * few[0]  # over more decades, such names would overlap
        axes.xaxis.set_major_locator(LogLocator(base, subs=(1.0, 3.0) if near else (1.0,)))
    axes.xaxis.set_major_formatter(lambda x, _: _short(x))
    axes.xaxis.set_minor_locator(NullLocator())


def _short(x: float) -> str:
    return f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x >= 1e4 else f"{x:g}"
