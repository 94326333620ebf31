"""The picture of a fine-tuning run: what it learned, step by step, and what it cost beside full fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .style import FULL, LORA, PARAPHRASE, VALIDATION, ink, name_lines, panels, save

SMOOTHED = 9  # steps: what one step's records happen to be moves the loss more than learning does


def run_picture(metrics: Mapping[str, Any], path: Path) -> None:
    """Write `run_figure` of a run's metrics. path: a .png or .svg file."""
    save(run_figure(metrics), path)


def run_figure(metrics: Mapping[str, Any]) -> Any:
    """Loss curves, and bars of parameters, memory and disk beside full fine-tuning, as a matplotlib figure."""
    figure, (curves, bars) = panels(2, width=11, height=4.2, ratios=(1.25, 1))
    _losses(curves, metrics)
    _costs(bars, metrics)
    return figure


def smoothed(losses: Sequence[float]) -> tuple[int, Any]:
    """How many steps are averaged, and the mean over each so many steps in a row."""
    width = max(1, min(SMOOTHED, len(losses) // 4))
    return width, np.convolve(losses, np.ones(width) / width, mode="valid")


def validation_losses(metrics: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) by what is validated: "unseen" records, "paraphrase": trained ones in other words. None empty."""
    curves = metrics.get("validation") or {"unseen": metrics.get("validation_loss", [])}
    return {name: [(step, loss) for step, loss in curve] for name, curve in curves.items() if curve}


# What is validated: name, colour, mark and line, so that two curves are told apart without their colours.
VALIDATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "unseen": ("validation,\nunseen", VALIDATION, {"marker": "o", "markersize": 5, "linewidth": 1.5}),
    "paraphrase": (
        "validation,\nin other words",
        PARAPHRASE,
        {"marker": "s", "markersize": 5, "linewidth": 1.5, "linestyle": "-."},
    ),
}


def _losses(axes: Any, metrics: Mapping[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    losses, color = np.array(metrics["train_loss"]), LORA if metrics["options"]["method"] == "lora" else FULL
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=color, alpha=0.45, linewidth=1)
    width, smooth = smoothed(metrics["train_loss"])
    # Where it ends, a line has its name; of the marks before and after training, the latter.
    names = [(smooth[-1], "training" if width == 1 else f"training,\nmean of {width} steps", color)]
    axes.plot(steps[(width - 1) // 2 :][: len(smooth)], smooth, color=color, linewidth=2, marker="." * (width == 1))
    curves = validation_losses(metrics)
    kept = metrics["kept"]["step"] if curves and "kept" in metrics else None
    for what, curve in curves.items():
        name, of_curve, style = VALIDATIONS[what]
        axes.plot(*zip(*curve, strict=True), color=of_curve, **style)
        names.append((curve[-1][1], name, of_curve))
        if kept in (ring := dict(curve)):
            axes.plot([kept], [ring[kept]], "o", markersize=12, markerfacecolor="none", color=of_curve)
    if "paraphrase" in metrics["loss"] and "paraphrase" not in curves:
        before_and_after = metrics["loss"]["paraphrase"]
        axes.plot([0, len(losses)], before_and_after, color=PARAPHRASE, marker="s", markersize=7, linewidth=0)
        names.append((before_and_after[1], "in other words,\nbefore and after", PARAPHRASE))
    where = "step" if kept is None else f"step (ringed: {kept}, which was kept)"
    axes.set(xlabel=where, ylabel="cross-entropy (nats per token)", title="What it learned")
    axes.set_xlim(-0.02 * len(losses), 1.02 * len(losses))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    name_lines(axes, [name for name in names if np.isfinite(name[0])])


def _costs(axes: Any, metrics: Mapping[str, Any]) -> None:
    memory, total, trained = metrics["peak_memory_bytes"], metrics["total_parameters"], metrics["trainable_parameters"]
    lora = metrics["options"]["method"] == "lora"
    base = total - trained if lora else total
    rows = [
        ("parameters trained", trained, base, total, _millions),
        ("memory in training, predicted", memory["predicted"], memory["full_predicted"], None, megabytes),
        ("disk per version", metrics["adapter_bytes"], 4 * base, None, megabytes),
    ]
    for i, (name, mine, full, whole, show) in enumerate(rows):
        y = -3 * i
        axes.text(0, y + 0.75, name, fontweight="bold", va="center")
        longest = max(mine, full)  # an adapter of a high rank on a small model is more than the model
        axes.barh(y, 100 * full / longest, color=FULL, height=0.8)
        axes.text(100 * full / longest + 2, y, f"{show(full)}, full", va="center", color=ink(FULL))
        if lora:
            end = 100 * mine / longest
            axes.barh(y - 0.9, end, color=LORA, height=0.8)
            share = f"{100 * mine / (whole or full):.1f} % of {'all' if whole else 'full'}"
            axes.text(end + 2, y - 0.9, f"{show(mine)}, LoRA ({share})", va="center", color=ink(LORA))
    axes.set(xlim=(0, 160), ylim=(-7.6, 1.6), xticks=[], yticks=[], title="What it cost")
    axes.spines[:].set_visible(False)


def _millions(number: float) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number:,}"


def megabytes(size: float) -> str:
    """Bytes as a page shows them: `9.8 MB`, `1,199 MB`."""
    return f"{size / 1e6:,.{0 if size >= 100e6 else 1}f} MB"
