"""What was measured with each seed, a row of dots for each name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .style import BLUE, ink


def draw_seeds(axes: Any, measured: Mapping[str, Sequence[float]], label: str, color: str = BLUE) -> None:
    """Draw a row for each name, from the top down: a dot for each seed, a bar at their mean, the mean as a number."""
    for y, (_, values) in enumerate(measured.items()):
        mean = sum(values) / len(values)
        axes.plot(values, [y] * len(values), color=color, marker="o", markersize=5, linewidth=0, alpha=0.6)
        axes.plot([mean, mean], [y - 0.3, y + 0.3], color=color, linewidth=2)
        axes.annotate(
            f"{mean:.3f}", (1.02, y), xycoords=("axes fraction", "data"), color=ink(color), va="center",
            annotation_clip=False,
        )  # fmt: skip
    axes.set_yticks(range(len(measured)), list(measured))
    axes.set_ylim(len(measured) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=5)
