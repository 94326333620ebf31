"""The picture of a comparison: how soon LoRA and full fine-tuning learn, and LoRA's share of each cost."""

from __future__ import annotations

from typing import Any

from .style import FULL, LORA, ink, name_lines, panels

COSTS = {  # what a row of the table measures -> its name beside a bar
    "parameters updated": "parameters updated",
    "gradients": "gradients",
    "Adam's moments": "Adam's moments",
    "activations": "activations",
    "peak of a step, predicted": "peak memory, predicted",
    "peak of its process, measured": "peak memory, measured",
    "one step": "time of a step",
    "to its best validation loss": "time to its best",
    "a version on disk": "a version on disk",
}


def compare_figure(result: dict[str, Any]) -> Any:
    """Validation loss against time of training, and bars of LoRA's share of each cost, as a matplotlib figure."""
    figure, (curves, bars) = panels(2, width=11, height=4.2, ratios=(1, 1.1))
    _validation(curves, result)
    _shares(bars, {row["what"]: row for row in result["rows"]})
    return figure


def _validation(axes: Any, result: dict[str, Any]) -> None:
    longest = max(run["training_seconds"] for run in result["runs"].values())
    unit, seconds = ("minutes", 60) if longest > 120 else ("seconds", 1)
    names = []
    for method, name, color, marker in (("lora", "LoRA", LORA, "o"), ("full", "full\nfine-tuning", FULL, "s")):
        run = result["runs"][method]
        pace = run["training_seconds"] / run["steps"] / seconds
        times, losses = zip(*((step * pace, loss) for step, loss in run["validation_loss"]), strict=True)
        axes.plot(times, losses, color=color, marker=marker, markersize=5, linewidth=2, clip_on=False)
        best = losses.index(min(losses))
        ring = {"marker": marker, "markersize": 11, "fillstyle": "none", "linewidth": 0, "clip_on": False}
        axes.plot(times[best], losses[best], color=color, **ring)
        names.append((losses[-1], name, color))
    axes.set(xlabel=f"{unit} of training", ylabel="validation loss (nats per token)")
    axes.set_title("How soon it learns (ringed: the best)")
    axes.set_xlim(left=0)
    axes.margins(y=0.12)
    name_lines(axes, names)


def _shares(axes: Any, table: dict[str, Any]) -> None:
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
    axes.set_xticks(range(0, int(top) + 1, 25 if top < 150 else 50))
    axes.set(xlabel="LoRA's share of what full fine-tuning takes (%)", title="What it costs")
    axes.set(xlim=(0, 2.3 * top), ylim=(len(shown) - 0.4, -1.5))
    axes.tick_params(axis="y", length=0)
    axes.spines["bottom"].set_bounds(0, top)
