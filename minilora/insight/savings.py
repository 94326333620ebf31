"""Pictures of what LoRA saves: two jobs side by side, owner by owner, and a cost along an axis.

Each function draws into axes that it is given; nothing is computed here but where a label goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .plots import BLUE, GREY, ORANGE

FULL, LORA = ORANGE, BLUE


def pairs_of_bars(
    axes: Any,
    rows: Mapping[str, tuple[float, float]],
    measured: Mapping[str, tuple[float, float]] | None = None,
    form: str = "{:,.1f} MB",
) -> None:
    """For each row, from top to bottom, a bar of full fine-tuning and below it one of LoRA, each with its number.

    rows: name -> (full, LoRA). measured: the same, drawn as black strokes across the bars that they belong to.
    """
    longest = max(max(pair) for pair in rows.values())
    for i, (name, pair) in enumerate(rows.items()):
        for j, (value, color) in enumerate(zip(pair, (FULL, LORA), strict=True)):
            y, right = -i - 0.36 * j, value
            axes.barh(y, value, height=0.34, color=color)
            if measured is not None:
                seen = measured[name][j]
                axes.plot([seen, seen], [y - 0.17, y + 0.17], color="black", linewidth=2, solid_capstyle="butt")
                right = max(value, seen)
            axes.text(right + 0.012 * longest, y, form.format(value), va="center", color=color, fontsize=9)
    axes.set(xlim=(0, 1.22 * longest), yticks=[-i - 0.18 for i in range(len(rows))], yticklabels=list(rows))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def curve(
    axes: Any,
    x: Sequence[float],
    y: Sequence[float],
    text: str,
    color: str = GREY,
    measured: Sequence[float] | None = None,
    at: int = -1,
    offset: tuple[float, float] = (0, 6),
    **line: Any,
) -> None:
    """A line that bears its name beside point `at`; what was measured at the same x, as dots.

    offset: of the name, in typographic points; it ends at its point where the offset leads to the left.
    line: further settings of the line, as `linestyle`.
    """
    axes.plot(x, y, color=color, **{"linewidth": 2} | line)
    if measured is not None:
        axes.plot(x, measured, color=color, marker="o", linewidth=0, markersize=6)
    side = "right" if offset[0] < 0 else "center" if offset[0] == 0 else "left"
    axes.annotate(text, (x[at], y[at]), offset, textcoords="offset points", color=color, ha=side, va="center")
    axes.spines[["top", "right"]].set_visible(False)
