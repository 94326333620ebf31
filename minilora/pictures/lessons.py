"""What lessons draw again and again: lines that carry their own labels, and LoRA's matrices in their true proportions.

Every function draws into matplotlib axes that it is given and returns nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .style import BASE, BLACK, GREY, PALE, A, B, ink


def line(
    axes: Any,
    x: Sequence[float],
    y: Sequence[float],
    label: str,
    color: str,
    at: int = -1,
    place: tuple[float, float] = (6, 0),
    **style: Any,
) -> None:
    """A line with its label written beside the point number `at`, `place` points (1/72 inch) away from it.

    style: passed on to matplotlib's `plot`. The label stands left of the point where `place` goes left.
    """
    axes.plot(x, y, color=color, **{"linewidth": 2} | style)
    side = "right" if place[0] < 0 else "left"
    axes.annotate(label, (x[at], y[at]), place, textcoords="offset points", color=ink(color), ha=side, va="center")
    axes.spines[["top", "right"]].set_visible(False)


def matrices_to_scale(axes: Any, m: int, n: int, r: int) -> None:
    """W (m, n) with A (r, n) along its upper edge and B (m, r) along its left one, one unit per number."""
    from matplotlib.patches import Rectangle

    gap = 0.04 * max(m, n)
    for corner, width, height, color, opacity in (
        ((0, 0), n, m, BASE, PALE),
        ((0, m + gap), n, r, A, 1),
        ((-gap - r, 0), r, m, B, 1),
    ):
        axes.add_patch(Rectangle(corner, width, height, facecolor=color, alpha=opacity, linewidth=0))
    axes.text(n / 2, m / 2, f"W, frozen\n{m:,} × {n:,} = {m * n:,} numbers", ha="center", va="center", fontsize="large")
    axes.text(n / 2, m + r + 1.4 * gap, f"A: {r} × {n:,} = {r * n:,} numbers", ha="center", va="bottom", color=ink(A))
    text = f"B: {m:,} × {r} = {m * r:,} numbers"
    axes.text(-1.5 * gap - r, m / 2, text, ha="right", va="center", rotation=90, color=ink(B))
    _bare(axes, (-3 * gap - r, n + gap), (-gap, m + r + 3 * gap))


def bottleneck_to_scale(axes: Any, m: int, n: int, r: int) -> None:
    """One token's way from x, n numbers, to y, m numbers: through W, and beside it through A and B, r numbers wide.

    Read from below; one unit of width per number. What comes through A and B is multiplied by the scale α/r and added.
    """
    from matplotlib.patches import Polygon, Rectangle

    step, thin, apart = 0.28 * n, 0.03 * n, 1.15 * max(m, n)
    top, side = 2 * step, 0.02 * n

    def bar(middle: float, floor: float, width: int, text: str) -> None:
        axes.add_patch(Rectangle((middle - width / 2, floor), width, thin, facecolor=BLACK, linewidth=0))
        axes.text(middle + width / 2 + side, floor + thin / 2, text, va="center")

    def funnel(middle: float, floor: float, ceiling: float, below: int, above: int, color: str) -> None:
        low, high = floor + thin, ceiling
        corners = [(middle - below / 2, low), (middle + below / 2, low), (middle + above / 2, high)]
        axes.add_patch(Polygon([*corners, (middle - above / 2, high)], facecolor=color, alpha=PALE, linewidth=0))

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": BLACK, "shrinkA": 0, "shrinkB": 0})

    middle = apart / 2
    bar(middle, -0.75 * step, n, f"x: {n:,} numbers")
    for lane in (0, apart):
        arrow((middle + 0.3 * (lane - middle), -0.75 * step + thin), (lane, 0))
    funnel(0, -thin, top, n, m, BASE)
    axes.text(0, step, "W, frozen", ha="center", va="center", fontsize="large")
    bar(0, top, m, f"x Wᵀ: {m:,}")
    funnel(apart, -thin, step, n, r, A)
    axes.text(apart, 0.35 * step, "A, down", ha="center", va="center", fontsize="large", color=ink(A))
    bar(apart, step, r, f"u = x Aᵀ: {r}")
    funnel(apart, step, top, r, m, B)
    axes.text(apart, 1.72 * step, "B, up", ha="center", va="center", fontsize="large", color=ink(B))
    bar(apart, top, m, f"u Bᵀ: {m:,}")
    for lane in (0, apart):
        arrow((lane, top + thin), (middle + 0.3 * (lane - middle), 2.75 * step))
    axes.text(middle + 0.85 * (apart - middle), 2.5 * step, "times α/r", va="center")
    bar(middle, 2.75 * step, m, f"y: {m:,} numbers")
    axes.text(middle, 2.55 * step, "+", ha="center", va="center", fontsize="xx-large")
    _bare(axes, (-0.55 * n, apart + 0.95 * n), (-0.8 * step, 2.8 * step + 2 * thin))


def _bare(axes: Any, x: tuple[float, float], y: tuple[float, float]) -> None:
    axes.set(xlim=x, ylim=y, aspect="equal")
    axes.set_axis_off()


# -- a cost along an axis ----------------------------------------------------------------------------------------------


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
    axes.annotate(text, (x[at], y[at]), offset, textcoords="offset points", color=ink(color), ha=side, va="center")
    axes.spines[["top", "right"]].set_visible(False)
