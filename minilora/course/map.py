"""The map of the course: a picture of all lessons and of what each needs, drawn from the plan."""

from collections.abc import Mapping
from typing import Any

from ..pages.style import GREY, LORA, SMALLEST, panels
from .plan import LESSONS, Lesson

ROW = 0.27  # inches from one lesson to the next
BULGE = 0.48  # how far an arc's control points are to the left, as a share of its height
RIGHT = 4.3  # inches to the right of the circles


def map_figure(lessons: Mapping[int, Lesson] = LESSONS) -> Any:
    """The lessons in order, from top to bottom, as a matplotlib figure.

    Filled circles on a thick line are the essential path. An arc leads from each lesson to each that needs it; its gid
    is "lesson-1-needed-by-2". A need that is not among `lessons` is left out.
    """
    from matplotlib.patches import PathPatch, Polygon
    from matplotlib.path import Path

    heights = {number: -ROW * row for row, number in enumerate(lessons)}
    arcs = [(needed, number) for number in lessons for needed in lessons[number].needs if needed in lessons]
    left = 0.4 + 0.75 * BULGE * max((heights[a] - heights[b] for a, b in arcs), default=0)
    figure, axes = panels(width=left + RIGHT, height=ROW * (len(lessons) + 3))
    essential = [heights[number] for number in lessons if lessons[number].essential]
    axes.plot([0] * len(essential), essential, color=LORA, linewidth=3)
    for number, y in heights.items():
        lesson = lessons[number]
        color, weight = (LORA, "bold") if lesson.essential else (GREY, "normal")
        face = color if lesson.essential else axes.get_facecolor()
        axes.plot(0, y, "o", markersize=10, color=face, markeredgecolor=color, markeredgewidth=2, zorder=3)
        axes.text(0.45, y, str(number), ha="right", va="center", weight=weight)
        axes.text(0.6, y, lesson.question, va="center", weight=weight)
        axes.text(RIGHT - 0.1, y, str(sum(lesson.minutes)), ha="right", va="center")
    for needed, number in arcs:
        start, end, color = heights[needed], heights[number], LORA if lessons[number].essential else GREY
        side = -0.12 - BULGE * (start - end)
        curve = Path([(0, start), (side, start), (side, end), (-0.15, end)], [Path.MOVETO] + 3 * [Path.CURVE4])
        gid = f"lesson-{needed}-needed-by-{number}"
        axes.add_patch(PathPatch(curve, facecolor="none", edgecolor=color, linewidth=1.2, gid=gid))
        tip = [(-0.1, end), (-0.19, end + 0.04), (-0.19, end - 0.04)]
        axes.add_patch(Polygon(tip, facecolor=color, linewidth=0))
    axes.text(RIGHT - 0.1, ROW, "minutes with exercises", ha="right", va="center")
    below = min(heights.values(), default=0) - 1.5 * ROW
    legend = "Filled circles: the essential path.\nAn arc leads from a lesson to one that needs it."
    axes.text(RIGHT - 0.1, below, legend, ha="right", va="center", fontsize=SMALLEST)
    axes.set(xlim=(-left, RIGHT), ylim=(below - ROW, 1.5 * ROW))
    axes.set_axis_off()
    return figure


def map_text(lessons: Mapping[int, Lesson] = LESSONS) -> str:
    """What the map shows, in words."""
    named = (
        f"{number}. {lesson.question} ({sum(lesson.minutes)} minutes"
        + (f"; needs {', '.join(map(str, lesson.needs))})" if lesson.needs else ")")
        for number, lesson in lessons.items()
    )
    return f"The lessons in order, with arcs from each to those that need it: {' '.join(named)}"
