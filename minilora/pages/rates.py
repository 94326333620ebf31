"""Loss against learning rate, a line for each contender, its best rate ringed; and the result of each seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .style import PALETTE, panels, ring, write_beside

MARKS = "osD^v<>P"  # so that a contender is not known by its colour alone
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
    draw_seeds(right, by_seed, label, colors)
    return figure


def losses_figure(numbers: Mapping[str, Any], colors: Mapping[str, str] | None = None) -> Any:
    """`rates_figure` of what `as_numbers` stores: losses by learning rate, and the test loss of each seed."""
    return rates_figure(
        numbers["tried"], numbers["loss on the test"], "test loss (nats per token), a mark per seed", colors
    )


def draw_rates(
    axes: Any, tried: Mapping[str, Sequence[Sequence[Any]]], colors: Mapping[str, str] | None = None
) -> None:
    """Draw [[lr, loss], ...] by name, without losses that are None. colors: by name; the palette's if left out."""
    shown: list[float] = []
    seen = -math.inf
    for (name, points), (color, mark) in zip(tried.items(), _marked(tried, colors), strict=True):
        rates, losses = zip(*((lr, loss) for lr, loss in points if loss is not None), strict=True)
        axes.plot(rates, losses, color=color, marker=mark, markersize=4, linewidth=1.8, label=name)
        best = losses.index(min(losses))
        ring(axes, rates[best], losses[best], color, size=10)
        shown, seen = [*shown, *losses], max(seen, losses[best])
    axes.set(xscale="log", xlabel="learning rate (ringed: the best)", ylabel="validation loss (nats per token)")
    cut_above(axes, shown, seen)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def cut_above(axes: Any, losses: Sequence[float], seen: float = -math.inf) -> None:
    """Let the axis show these losses, as far as they are no more than SHOWN above the lowest: one run that diverged
    would otherwise make all others look alike. seen: a loss that is shown all the same.
    """
    lowest, most = min(losses), min(max(losses), max(min(losses) + SHOWN, seen))
    room = 0.08 * (most - lowest) or SHOWN
    axes.set_ylim(lowest - room, most + room)


def draw_seeds(
    axes: Any, measured: Mapping[str, Sequence[float]], label: str, colors: Mapping[str, str] | None = None
) -> None:
    """Draw a row for each name, from the top down: a mark for each seed, a bar at their mean, the mean as a number.

    Names in the same order have the colours and marks of `draw_rates`.
    """
    for y, (values, (color, mark)) in enumerate(zip(measured.values(), _marked(measured, colors), strict=True)):
        mean = sum(values) / len(values)
        axes.plot(values, [y] * len(values), color=color, marker=mark, markersize=5, linewidth=0, alpha=0.6)
        axes.plot([mean, mean], [y - 0.3, y + 0.3], color=color, linewidth=2)
        write_beside(axes, y, f"{mean:.3f}", color)
    axes.set_yticks(range(len(measured)), list(measured))
    axes.set_ylim(len(measured) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=5)


def _marked(names: Iterable[str], colors: Mapping[str, str] | None) -> list[tuple[str, str]]:
    """The colour and the mark of each name: those of its place, or the colour that is given for it."""
    return [
        ((colors or {}).get(name, PALETTE[i % len(PALETTE)]), MARKS[i % len(MARKS)]) for i, name in enumerate(names)
    ]
