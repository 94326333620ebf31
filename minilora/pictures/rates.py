"""Loss against learning rate, a line for each contender, its best rate ringed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .style import PALETTE, name_lines


def draw_rates(
    axes: Any, tried: Mapping[str, Sequence[Sequence[Any]]], colors: Mapping[str, str] | None = None
) -> None:
    """Draw [[lr, loss], ...] of each name, losses that are None left out. colors: by name, else the palette's."""
    names = []
    for (name, points), usual in zip(tried.items(), PALETTE * len(tried), strict=False):
        color = (colors or {}).get(name, usual)
        rates, losses = zip(*((lr, loss) for lr, loss in points if loss is not None), strict=True)
        axes.plot(rates, losses, color=color, marker="o", markersize=4, linewidth=1.8, clip_on=False)
        best = losses.index(min(losses))
        ring = {"marker": "o", "markersize": 10, "fillstyle": "none", "linewidth": 0, "clip_on": False}
        axes.plot(rates[best], losses[best], color=color, **ring)
        names.append((losses[-1], name, color))
    axes.set(xscale="log", xlabel="learning rate (ringed: the best)", ylabel="validation loss (nats per token)")
    axes.margins(y=0.12)
    name_lines(axes, names)
