"""Loss against learning rate, a line for each contender, its best rate ringed; and beside it what each seed gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .seeds import draw_seeds
from .style import PALETTE, panels

SHOWN = 1.0  # nats above the lowest loss; what lies higher is too bad to matter


def rates_figure(
    tried: Mapping[str, Sequence[Sequence[Any]]],
    by_seed: Mapping[str, Sequence[float]],
    label: str,
    colors: Mapping[str, str] | None = None,
) -> Any:
    """Two panels: `draw_rates` of what was tried, and `draw_seeds` of what was measured, as a matplotlib figure."""
    figure, (left, right) = panels(2, width=11, ratios=(1.3, 1))
    figure.get_layout_engine().set(wspace=0.08)
    draw_rates(left, tried, colors)
    draw_seeds(right, by_seed, label)
    return figure


def draw_rates(
    axes: Any, tried: Mapping[str, Sequence[Sequence[Any]]], colors: Mapping[str, str] | None = None
) -> None:
    """Draw [[lr, loss], ...] of each name, losses that are None left out. colors: by name, else the palette's."""
    shown: list[float] = []
    for (name, points), usual in zip(tried.items(), PALETTE * len(tried), strict=False):
        color = (colors or {}).get(name, usual)
        rates, losses = zip(*((lr, loss) for lr, loss in points if loss is not None), strict=True)
        axes.plot(rates, losses, color=color, marker="o", markersize=4, linewidth=1.8, label=name)
        best = losses.index(min(losses))
        ring = {"marker": "o", "markersize": 10, "fillstyle": "none", "linewidth": 0, "clip_on": False}
        axes.plot(rates[best], losses[best], color=color, **ring)
        shown += losses
    axes.set(xscale="log", xlabel="learning rate (ringed: the best)", ylabel="validation loss (nats per token)")
    lowest, highest = min(shown), max(shown)
    room = 0.08 * min(highest - lowest, SHOWN) or SHOWN
    axes.set_ylim(lowest - room, min(highest, lowest + SHOWN) + room)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.3), ncols=3)
