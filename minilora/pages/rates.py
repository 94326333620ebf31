"""Loss against learning rate, a line for each contender, its best rate ringed; and the result of each seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .style import BLUE, PALETTE, panels, ring, write_beside

SHOWN = 1.0  # nats above the lowest loss: what lies higher is too bad to matter


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


def losses_figure(numbers: Mapping[str, Any], colors: Mapping[str, str] | None = None) -> Any:
    """`rates_figure` of what `as_numbers` stores: losses by learning rate, and the test loss of each seed."""
    return rates_figure(numbers["tried"], numbers["loss on the test"], "loss on the test, a dot per seed", colors)


def draw_rates(
    axes: Any, tried: Mapping[str, Sequence[Sequence[Any]]], colors: Mapping[str, str] | None = None
) -> None:
    """Draw [[lr, loss], ...] by name, without losses that are None. colors: by name; the palette's if left out."""
    shown: list[float] = []
    seen = -math.inf
    for (name, points), usual in zip(tried.items(), PALETTE * len(tried), strict=False):
        color = (colors or {}).get(name, usual)
        rates, losses = zip(*((lr, loss) for lr, loss in points if loss is not None), strict=True)
        axes.plot(rates, losses, color=color, marker="o", markersize=4, linewidth=1.8, label=name)
        best = losses.index(min(losses))
        ring(axes, rates[best], losses[best], color, size=10)
        shown, seen = [*shown, *losses], max(seen, losses[best])
    axes.set(xscale="log", xlabel="learning rate (ringed: the best)", ylabel="validation loss (nats per token)")
    cut_above(axes, shown, seen)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.3), ncols=3)


def cut_above(axes: Any, losses: Sequence[float], seen: float = -math.inf) -> None:
    """Let the axis show these losses, as far as they are no more than SHOWN above the lowest: one run that diverged
    would otherwise make all others look alike. seen: a loss that is shown all the same.
    """
    lowest, most = min(losses), min(max(losses), max(min(losses) + SHOWN, seen))
    room = 0.08 * (most - lowest) or SHOWN
    axes.set_ylim(lowest - room, most + room)


def draw_seeds(axes: Any, measured: Mapping[str, Sequence[float]], label: str) -> None:
    """Draw a row for each name, from the top down: a dot for each seed, a bar at their mean, the mean as a number."""
    for y, (_, values) in enumerate(measured.items()):
        mean = sum(values) / len(values)
        axes.plot(values, [y] * len(values), color=BLUE, marker="o", markersize=5, linewidth=0, alpha=0.6)
        axes.plot([mean, mean], [y - 0.3, y + 0.3], color=BLUE, linewidth=2)
        write_beside(axes, y, f"{mean:.3f}", BLUE)
    axes.set_yticks(range(len(measured)), list(measured))
    axes.set_ylim(len(measured) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=5)
