"""The figures that commands draw: a fine-tuning run, a comparison with full fine-tuning, adapters on data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .fields import fields_figure
from .labels import labels_figure
from .style import (
    BLACK,
    BLUE,
    FULL,
    LORA,
    ORANGE,
    PARAPHRASE,
    VALIDATION,
    blend,
    ink,
    literal,
    name_lines,
    panels,
    ring,
    save,
)
from .text import megabytes, percent

# -- a run -------------------------------------------------------------------------------------------------------------

SMOOTHED = 9  # steps, or of a long run a hundredth: from one batch to the next the loss changes more than by learning


def run_picture(metrics: Mapping[str, Any], path: Path) -> None:
    """Write `run_figure` of a run's metrics. path: a .png or .svg file."""
    save(run_figure(metrics), path)


def task_figures(metrics: Mapping[str, Any]) -> dict[str, Callable[[], Any]]:
    """The functions that draw the labels or the fields of a run, by what is added to the name of its picture."""
    drawn: dict[str, Callable[[Any], Any]] = {"labels": labels_figure, "fields": fields_figure}
    return {name: partial(draw, metrics[name]) for name, draw in drawn.items() if name in metrics}


def run_figure(metrics: Mapping[str, Any]) -> Any:
    """Loss curves, and bars of parameters, memory and disk next to full fine-tuning, as a matplotlib figure."""
    figure, (curves, bars) = panels(2, width=11, height=4.2, ratios=(1.25, 1))
    _run_losses(curves, metrics)
    _run_costs(bars, metrics)
    return figure


def smoothed(losses: Sequence[float]) -> tuple[int, Any]:
    """The number of steps that are averaged, and the moving average over this many."""
    width = max(1, min(max(SMOOTHED, len(losses) // 100), len(losses) // 4))
    return width, np.convolve(losses, np.ones(width) / width, mode="valid")


def validation_losses(metrics: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) by validation set: "unseen" records; "paraphrase", training questions paraphrased. None is empty."""
    curves = metrics.get("validation") or {"unseen": metrics.get("validation_loss", [])}
    return {name: [(step, loss) for step, loss in curve] for name, curve in curves.items() if curve}


# Validation set -> name, colour, marker and line: two curves can be told apart without their colours.
VALIDATIONS = {
    "unseen": ("validation,\nunseen", VALIDATION, "o-"),
    "paraphrase": ("validation,\nparaphrased", PARAPHRASE, "s-."),
}


def _run_losses(axes: Any, metrics: Mapping[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    losses, color = np.array(metrics["train_loss"]), LORA if metrics["options"]["method"] == "lora" else FULL
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=color, alpha=0.45, linewidth=1)
    width, smooth = smoothed(metrics["train_loss"])
    # A line is named where it ends; of the marks before and after training, the latter.
    names = [(smooth[-1], "training" if width == 1 else f"training,\nmean of {width} steps", color)]
    axes.plot(steps[(width - 1) // 2 :][: len(smooth)], smooth, color=color, linewidth=2, marker="." * (width == 1))
    curves = validation_losses(metrics)
    kept = metrics["kept"]["step"] if curves and "kept" in metrics else None
    for what, curve in curves.items():
        name, of_curve, style = VALIDATIONS[what]
        axes.plot(*zip(*curve, strict=True), style, color=of_curve, markersize=5, linewidth=1.5)
        names.append((curve[-1][1], name, of_curve))
        if kept in (losses_at := dict(curve)):
            ring(axes, kept, losses_at[kept], of_curve, size=12)
    if "paraphrase" in metrics["loss"] and "paraphrase" not in curves:
        before_and_after = metrics["loss"]["paraphrase"]
        axes.plot([0, len(losses)], before_and_after, color=PARAPHRASE, marker="s", markersize=7, linewidth=0)
        names.append((before_and_after[1], "paraphrased,\nbefore and after", PARAPHRASE))
    where = "step" if kept is None else f"step (ringed: {kept}, which was kept)"
    loss = "DPO's loss (per pair)" if metrics["options"].get("loss") == "dpo" else "cross-entropy (nats per token)"
    axes.set(xlabel=where, ylabel=loss, title="What it learned")
    axes.set_xlim(-0.02 * len(losses), 1.02 * len(losses))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    name_lines(axes, [name for name in names if np.isfinite(name[0])])


def _run_costs(axes: Any, metrics: Mapping[str, Any]) -> None:
    memory, total, trained = metrics["peak_memory_bytes"], metrics["total_parameters"], metrics["trainable_parameters"]
    lora = metrics["options"]["method"] == "lora"
    base = total - trained if lora else total
    rows = [
        ("trainable parameters", trained, base, total, _parameters),
        ("memory in training, predicted", memory["predicted"], memory["full_predicted"], None, megabytes),
        ("disk per adapter", metrics["adapter_bytes"], 4 * base, None, megabytes),
    ]
    for i, (name, mine, full, whole, show) in enumerate(rows):
        y = -3 * i
        axes.text(0, y + 0.75, name, fontweight="bold", va="center")
        longest = max(mine, full)  # an adapter of a high rank may be larger than a small model
        axes.barh(y, 100 * full / longest, color=FULL, height=0.8)
        axes.text(100 * full / longest + 2, y, f"{show(full)}, full", va="center", color=ink(FULL))
        if lora:
            end = 100 * mine / longest
            axes.barh(y - 0.9, end, color=LORA, height=0.8)
            share = f"{percent(mine / (whole or full), 1)} of {'all' if whole else 'full'}"
            axes.text(end + 2, y - 0.9, f"{show(mine)}, LoRA ({share})", va="center", color=ink(LORA))
    axes.set(xlim=(0, 160), ylim=(-7.6, 1.6), xticks=[], yticks=[], title="What it cost")
    axes.spines[:].set_visible(False)


def _parameters(number: float) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number:,}"


# -- LoRA compared with full fine-tuning -------------------------------------------------------------------------------

COSTS = {  # row of the table -> its name next to a bar
    "trainable parameters": "trainable parameters",
    "gradients": "gradients",
    "optimizer state": "optimizer state",
    "activations": "activations",
    "peak of a step, predicted": "peak memory, predicted",
    "peak of the process": "peak memory, measured",
    "one step": "time of a step",
    "to its best validation loss": "time to its best",
    "adapter or model on disk": "size on disk",
}


def compare_figure(result: dict[str, Any]) -> Any:
    """Validation loss over training time, and bars of LoRA's share of each cost, as a matplotlib figure."""
    figure, (curves, bars) = panels(2, width=11, height=4.2, ratios=(1, 1.1))
    _compare_losses(curves, result)
    _compare_costs(bars, {row["what"]: row for row in result["rows"]})
    return figure


def _compare_losses(axes: Any, result: dict[str, Any]) -> None:
    longest = max(run["training_seconds"] for run in result["runs"].values())
    unit, seconds = ("minutes", 60) if longest > 120 else ("seconds", 1)
    names = []
    for method, name, color, marker in (("lora", "LoRA", LORA, "o"), ("full", "full\nfine-tuning", FULL, "s")):
        run = result["runs"][method]
        pace = run["training_seconds"] / run["steps"] / seconds
        times, losses = zip(*((step * pace, loss) for step, loss in run["validation_loss"]), strict=True)
        axes.plot(times, losses, color=color, marker=marker, markersize=5, linewidth=2, clip_on=False)
        best = losses.index(min(losses))
        ring(axes, times[best], losses[best], color, marker)
        names.append((losses[-1], name, color))
    axes.set(xlabel=f"{unit} of training", ylabel="validation loss (nats per token)")
    axes.set_title("How soon it learns (ringed: the best)")
    axes.set_xlim(left=0)
    axes.margins(y=0.12)
    name_lines(axes, names)


def _compare_costs(axes: Any, table: dict[str, Any]) -> None:
    shown = [(name, table[what]) for what, name in COSTS.items() if what in table]
    top = max(1.0, *(row["ratio"] for _, row in shown)) * 100
    for y, (_, row) in enumerate(shown):
        share = 100 * row["ratio"]
        axes.barh(y, share, color=LORA, height=0.7)
        numbers = f"{row['shown']['lora']} of {row['shown']['full']}"
        text = f"{share:.{0 if share >= 10 else 1}f} %: {numbers}"
        axes.text(1.04 * top, y, text, va="center", color=ink(LORA))
    axes.plot([100, 100], [-0.6, len(shown) - 0.4], color=FULL, linewidth=2)
    axes.text(100, -0.7, "full fine-tuning", ha="center", va="bottom", color=ink(FULL))
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.set_xticks(range(0, int(top) + 1, 25 if top < 150 else 50 if top < 250 else 100))
    axes.set(xlabel="LoRA's share of what full fine-tuning takes (%)", title="What it costs")
    axes.set(xlim=(0, 2.3 * top), ylim=(len(shown) - 0.4, -1.5))
    axes.tick_params(axis="y", length=0)
    axes.spines["bottom"].set_bounds(0, top)


# -- adapters on data sets ---------------------------------------------------------------------------------------------

MEASURES = {  # name -> title, label of the colour bar, is more better, factor, format, smallest span of the colours
    "loss": ("Loss, nats per token: lower is better", "change from the base, nats", False, 1, "{:.2f}", 0.5),
    "keyword_recall": ("Keyword recall, %: higher is better", "change from the base, points", True, 100, "{:.0f}", 10),
}
SECOND_LINES = {"reworded": "reworded", "paraphrase": "paraphrased", "unseen": "unseen"}  # a set's second line


def matrix_figure(result: Mapping[str, Any]) -> Any:
    """What `minilora eval` measured, as a matplotlib figure: a row for each adapter, a column for each data set; the
    loss, and below it keyword recall if it was measured.

    Colour is the difference from the first row, the base: blue is better, orange is worse. It grows with the root of
    the difference, so that a little forgetting can be seen next to much learning. A frame marks the sets of the data
    that an adapter was trained on.
    """
    scores = result["scores"]
    shown = [name for name in MEASURES if any(name in one for found in scores.values() for one in found.values())]
    adapters = list(next(iter(scores.values())))
    columns = 1.05 if max(map(len, result["sets"])) < 20 else 1.5
    width = 1.9 + max(map(len, adapters)) * 0.08 + columns * len(scores)
    figure, axes = panels(width=max(width, 4), height=len(shown) * (1.3 + 0.5 * max(2, len(adapters))), rows=len(shown))
    for each, name in zip([axes] if len(shown) == 1 else axes, shown, strict=True):
        _matrix_panel(figure, each, result, adapters, name)
    return figure


def _matrix_panel(figure: Any, axes: Any, result: Mapping[str, Any], adapters: list[str], measure: str) -> None:
    import matplotlib as mpl
    from matplotlib.colors import FuncNorm, LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    title, words, more_is_better, factor, form, least = MEASURES[measure]
    sets = result["sets"]
    scores, own = result["scores"], {name: one.get("trained_on") for name, one in result["adapters"].items()}
    values = np.full((len(adapters), len(sets)), np.nan)
    for j, found in enumerate(scores.values()):
        for i, adapter in enumerate(adapters):
            value = found[adapter].get(measure, {}).get("value")
            values[i, j] = np.nan if value is None else factor * value
    change = values - values[0]
    most = max(least, np.nanmax(np.abs(change), initial=0))
    ground = mpl.rcParams["figure.facecolor"]
    colors: list[Any] = [blend(ground, ORANGE), ground, blend(ground, BLUE)][:: 1 if more_is_better else -1]
    even = FuncNorm((lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x * x), -most, most)
    image = axes.imshow(change, LinearSegmentedColormap.from_list("change", colors), even, aspect="auto")
    for j, (name, found) in enumerate(scores.items()):
        for i, adapter in enumerate(adapters):
            value, bounds = _matrix_cell(found[adapter].get(measure), factor, form)
            axes.text(j, i - 0.17 * bool(bounds), value, ha="center", va="center", fontweight="bold")
            axes.text(j, i + 0.22, bounds, ha="center", va="center", fontsize=9)
            if own.get(adapter) == sets[name]["data"]:
                axes.add_patch(
                    Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, fill=False, edgecolor=ink(BLACK), linewidth=1.8)
                )
    axes.set_xticks(range(len(sets)), [literal(_matrix_name(name, one)) for name, one in sets.items()])
    axes.set_yticks(range(len(adapters)), [*map(literal, adapters)])
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set_title(title)
    if len(adapters) == 1:
        return  # the base alone: no colours to explain
    ticks = [-most, -most / 4, 0, most / 4, most]
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=12, label=words)
    bar.set_ticks(ticks, labels=[form.replace(":", ":+").format(x) if x else "0" for x in ticks])
    bar.outline.set_visible(False)


def _matrix_cell(found: Mapping[str, float | None] | None, factor: float, form: str) -> tuple[str, str]:
    """The value, and the interval."""
    if found is None or found["value"] is None:
        return "-", ""
    bounds = [form.format(factor * x) for x in (found["low"], found["high"]) if x is not None]
    return form.format(factor * found["value"]), " to ".join(bounds)


def _matrix_name(name: str, about: Mapping[str, Any]) -> str:
    stem, _, kind = name.rpartition("/") if about["kind"] in SECOND_LINES else (name, "", "")
    return f"{stem}\n{SECOND_LINES[kind]}" if kind else stem
