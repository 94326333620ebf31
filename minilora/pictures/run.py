"""Pictures: drawn with matplotlib, in colours that the colour-blind can tell apart, labels on the lines themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .style import BLUE, GREEN, GREY, ORANGE


def run_picture(metrics: dict[str, Any], path: Path) -> None:
    """Draw a fine-tuning run: loss curves, and bars for parameters, memory and disk beside full fine-tuning."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _losses(curves, metrics)
    _costs(bars, metrics)
    figure.savefig(path, dpi=110)


def _losses(axes: Any, metrics: dict[str, Any]) -> None:
    losses = np.array(metrics["train_loss"])
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=BLUE, alpha=0.35, linewidth=1)
    width = max(1, min(9, len(losses) // 4))
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    middle = steps[(width - 1) // 2 :][: len(smooth)]
    axes.plot(middle, smooth, color=BLUE, linewidth=2)
    axes.annotate(
        "training", (middle[len(middle) // 3], smooth[len(middle) // 3]), (6, 8), textcoords="offset points", color=BLUE
    )
    if metrics["validation_loss"]:
        at, held_out = zip(*metrics["validation_loss"], strict=True)
        axes.plot(at, held_out, color=ORANGE, marker="o", linewidth=1.5)
        axes.annotate(
            "validation (unseen)", (at[-1], held_out[-1]), (-4, 8), textcoords="offset points", color=ORANGE, ha="right"
        )
    if "paraphrase" in metrics["loss"]:
        before, after = metrics["loss"]["paraphrase"]
        axes.plot([1, len(losses)], [before, after], color=GREEN, marker="s", linewidth=0, markersize=7)
        axes.annotate("in other words, before", (1, before), (8, -3), textcoords="offset points", color=GREEN)
        axes.annotate("and after", (len(losses), after), (-4, 8), textcoords="offset points", color=GREEN, ha="right")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title="What it learned")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)


def _costs(axes: Any, metrics: dict[str, Any]) -> None:
    memory = metrics["peak_memory_bytes"]
    lora = metrics["options"]["method"] == "lora"
    base_parameters = metrics["base_bytes"] // 4
    rows = [
        ("parameters trained", metrics["trainable_parameters"], base_parameters, lambda n: f"{n / 1e6:,.1f} M"),
        (
            "memory in training (predicted)",
            memory["predicted"],
            memory["full_predicted"],
            lambda n: f"{n / 1e6:,.0f} MB",
        ),
        ("disk per version", metrics["adapter_bytes"], metrics["base_bytes"], lambda n: f"{n / 1e6:,.1f} MB"),
    ]
    for i, (name, mine, full, show) in enumerate(rows):
        y = -i * 3
        axes.text(0, y + 0.75, name, fontweight="bold", va="center")
        axes.barh(y, 100, color=GREY, height=0.8)
        axes.text(101, y, f"{show(full)}  full", va="center", color="#555555")
        if lora:
            axes.barh(y - 0.9, 100 * mine / full, color=BLUE, height=0.8)
            axes.text(
                100 * mine / full + 1,
                y - 0.9,
                f"{show(mine)}  LoRA ({100 * mine / full:.1f} %)",
                va="center",
                color=BLUE,
            )
    axes.set(xlim=(0, 135), xticks=[], yticks=[], title="What it cost")
    axes.spines[:].set_visible(False)
