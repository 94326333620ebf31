"""What a reader would stumble over in a picture, found on the live figure before it is printed.

`problems(figure)` draws the figure without showing it, and looks at where everything has landed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.pages.style import BLACK, PALETTE, SMALLEST, ink

SHRINK = 0.12  # of a text's height, above and below: its box is higher than its letters


def problems(figure: Any) -> list[str]:
    """Everything that is wrong with a matplotlib figure, one line each; an empty list for a figure that can be read.

    An axis that shows numbers without saying of what (an axis that is off, or that shows names, needs no label); a text
    of less than 9 points; texts that overlap, run out of the picture or are crossed by a line; a colour that is not of
    the palette in style.py. What a colour map paints (images, values of a scatter plot) is not looked at.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    before = figure.canvas
    try:
        canvas = FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        texts = list(_texts(figure, canvas.get_renderer()))
        found = [*_without_label(figure), *_small(texts), *_overlapping(texts), *_cut_off(figure, texts)]
        found += [*_crossed(figure, texts), *_off_palette(figure, texts)]
    finally:
        figure.set_canvas(before)
    return list(dict.fromkeys(found))


def spans(axes: Any, along: int) -> set[tuple[float, float]]:
    """The ends, along x (0) or y (1), of what is drawn at one place of the other axis, as bars and bands of intervals
    are: lines, collections of lines, filled bands, rectangles.
    """
    parts = [line.get_xydata() for line in axes.lines]
    parts += [path.vertices for collection in axes.collections for path in collection.get_paths()]
    parts += [patch.get_patch_transform().transform_path(patch.get_path()).vertices for patch in axes.patches]
    found = set()
    for points in parts:
        for place in np.unique(points[:, 1 - along]):
            at = points[points[:, 1 - along] == place, along]
            found.add((round(float(at.min()), 6), round(float(at.max()), 6)))
    return found


def watch_show() -> None:
    """Let `minilora.course.show` refuse figures with problems. lessons/build.py calls this in a lesson's kernel."""
    import minilora.course

    shown = minilora.course.show

    def show(figure: Any, alt: str) -> None:
        if wrong := problems(figure):
            raise AssertionError(f"the picture: {'; '.join(wrong)}")
        shown(figure, alt)

    minilora.course.show = show


@dataclass(frozen=True)
class Placed:
    """A text that is drawn, and the box of its letters in pixels."""

    artist: Any
    box: Any

    def __str__(self) -> str:
        words = " ".join(self.artist.get_text().split())
        return f'"{words if len(words) <= 40 else words[:37] + "..."}"'


def _texts(figure: Any, renderer: Any) -> Iterator[Placed]:
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    hidden = {id(text) for axes in figure.axes for text in _not_drawn(axes)}
    for text in figure.findobj(Text):
        if not (text.get_visible() and text.get_text().strip()) or id(text) in hidden:
            continue
        box = Text.get_window_extent(text, renderer)  # of an annotation, without its arrow
        less = SHRINK * text.get_fontsize() * figure.dpi / 72
        yield Placed(text, Bbox([[box.x0, box.y0 + less], [box.x1, box.y1 - less]]))


def _not_drawn(axes: Any) -> Iterator[Any]:
    """Texts of invisible axes, of an axis that is off, and of ticks outside of the limits."""
    from matplotlib.text import Text

    if not axes.get_visible():
        yield from axes.findobj(Text)
    for axis in (axes.xaxis, axes.yaxis):
        off = not (axes.axison and axis.get_visible())
        shown = set() if off else {id(tick) for tick in _ticks(axis)}
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if id(tick) not in shown:
                yield from (tick.label1, tick.label2)
        if off:
            yield from (axis.label, axis.offsetText)


def _ticks(axis: Any) -> list[Any]:
    """Those within the limits."""
    scaled = axis.get_transform().transform  # of a logarithmic axis, the logarithm
    low, high = sorted(scaled(axis.get_view_interval()))
    near = 1e-6 * (high - low)
    ticks = (*axis.get_major_ticks(), *axis.get_minor_ticks())
    return [tick for tick in ticks if low - near <= scaled(tick.get_loc()) <= high + near]


# -- what can be wrong -------------------------------------------------------------------------------------------------


def _without_label(figure: Any) -> Iterator[str]:
    for i, axes in enumerate(figure.axes):
        where = f'panel "{axes.get_title()}"' if axes.get_title() else f"panel {i + 1}"
        if not (axes.get_visible() and axes.axison):
            continue
        for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            marks = [label for tick in _ticks(axis) for label in (tick.label1, tick.label2)]
            numbers = any(label.get_visible() and _is_number(label.get_text()) for label in marks)
            if axis.get_visible() and numbers and not axis.label.get_text().strip():
                yield f"{where}: the {name} axis shows numbers and has no label"


def _is_number(text: str) -> bool:
    bare = re.sub(r"\\(mathdefault|times|mathrm)|[${}^\s]", "", text)
    return bool(re.fullmatch(r"[-−+]?[\d.,]+(e?[-−+]?\d+)?[%kKMG]?", bare))


def _small(texts: Sequence[Placed]) -> Iterator[str]:
    for text in texts:
        if text.artist.get_fontsize() < SMALLEST - 0.01:
            yield f"{text}: {text.artist.get_fontsize():g} points; at least {SMALLEST} can be read"


def _overlapping(texts: Sequence[Placed]) -> Iterator[str]:
    low, high = np.split(np.array([text.box.extents for text in texts]).reshape(-1, 4), 2, axis=1)
    common = (np.minimum(high[:, None], high) - np.maximum(low[:, None], low) > 1).all(axis=-1)
    for one, other in np.argwhere(np.triu(common, 1)):
        yield f"{texts[one]} and {texts[other]} overlap"


def _cut_off(figure: Any, texts: Sequence[Placed]) -> Iterator[str]:
    whole = figure.bbox
    for text in texts:
        x0, y0, x1, y1 = text.box.extents
        if x0 < whole.x0 - 1 or y0 < whole.y0 - 1 or x1 > whole.x1 + 1 or y1 > whole.y1 + 1:
            yield f"{text} runs out of the picture"


def _crossed(figure: Any, texts: Sequence[Placed]) -> Iterator[str]:
    lines = list(_lines(figure))
    for text in texts:
        ground = text.artist.get_bbox_patch()
        if ground is not None and ground.get_visible() and _opacity(ground, ground.get_facecolor()) > 0.8:
            continue  # it stands on a ground of its own
        for artist, path, clip, name in lines:
            box = text.box if clip is None else _common(text.box, clip)
            if box is None or artist is getattr(text.artist, "arrow_patch", None):
                continue
            if path.intersects_bbox(box, filled=False):
                yield f"{text} is crossed by {name}"


def _lines(figure: Any) -> Iterator[tuple[Any, Any, Any, str]]:
    """Everything drawn as a line: the artist, its path in pixels, the box that it is clipped to (None: nowhere), and
    what to call it.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.path import Path

    for line in _all(figure, "lines"):
        clip = _clip(line)
        path = line.get_transform().transform_path(line.get_path())
        name = f'the line "{line.get_label()}"' if not line.get_label().startswith("_") else "a line"
        if line.get_linestyle() not in ("None", "none", " ", "") and line.get_linewidth() > 0:
            yield line, path, clip, name
        if line.get_marker() not in ("None", "none", " ", "", None):
            half = line.get_markersize() / 2 * line.get_figure().dpi / 72
            for x, y in path.vertices:
                corners = [(x - half, y), (x, y + half), (x + half, y), (x, y - half), (x - half, y)]
                yield line, Path(corners), clip, name.replace("line", "marks of line") if "line" in name else name
    for collection in _all(figure, "collections"):
        if isinstance(collection, LineCollection):
            for path in collection.get_paths():
                yield collection, collection.get_transform().transform_path(path), _clip(collection), "a line"
    for patch in _all(figure, "patches"):
        if _has_edge(patch):
            yield patch, patch.get_transform().transform_path(patch.get_path()), _clip(patch), "the edge of a shape"
    for text in _all(figure, "texts"):
        if (arrow := getattr(text, "arrow_patch", None)) is not None:
            yield arrow, arrow.get_transform().transform_path(arrow.get_path()), None, "an arrow"


def _off_palette(figure: Any, texts: Sequence[Placed]) -> Iterator[str]:
    from matplotlib.colors import to_hex

    ground = to_hex(figure.get_facecolor())
    seen = [color for color in PALETTE if color != BLACK or ink(BLACK, ground) == BLACK]  # no black in the dark
    allowed = {to_hex(color) for color in (*seen, *(ink(color, ground) for color in PALETTE), ground, "white")}

    def wrong(*colors: Any) -> Iterator[str]:
        for color in colors:
            if not isinstance(color, str) or color not in ("none", "None", "auto"):
                name = to_hex(color)
                if name not in allowed:
                    yield name

    def said(what: str, names: Iterator[str]) -> Iterator[str]:
        yield from (f"{what} is drawn in {name}, which is not of the palette in style.py" for name in names)

    for text in texts:
        on_image = text.artist.axes is not None and text.artist.axes.images  # its ground is the image's
        if not (on_image and to_hex(text.artist.get_color()) in (BLACK, "#ffffff")):
            yield from said(str(text), wrong(text.artist.get_color()))
    for line in _all(figure, "lines"):
        yield from said("a line", wrong(line.get_color()))
        if line.get_marker() not in ("None", "none", " ", "", None):
            yield from said("a mark", wrong(line.get_markerfacecolor(), line.get_markeredgecolor()))
    for patch in _all(figure, "patches"):
        if _opacity(patch, patch.get_facecolor()) > 0:
            yield from said("a shape", wrong(patch.get_facecolor()))
        if _has_edge(patch):
            yield from said("the edge of a shape", wrong(patch.get_edgecolor()))
    for collection in _all(figure, "collections"):
        if collection.get_array() is None:
            colors = [*collection.get_facecolor(), *collection.get_edgecolor()]
            yield from said("a shape", wrong(*(color for color in colors if color[3] > 0)))


# -- small help --------------------------------------------------------------------------------------------------------


def _all(figure: Any, kind: str) -> Iterator[Any]:
    """The visible lines, patches, collections or texts that were drawn into figure and panels; no frames, no ticks."""
    for owner in (figure, *figure.subfigs, *figure.axes):
        if owner.get_visible():
            yield from (artist for artist in getattr(owner, kind, ()) if artist.get_visible())


def _common(one: Any, other: Any) -> Any:
    """The box that two boxes share, by more than a pixel each way; or None."""
    from matplotlib.transforms import Bbox

    box = Bbox.intersection(one, other)
    return box if box is not None and box.width > 1 and box.height > 1 else None


def _clip(artist: Any) -> Any:
    return artist.axes.bbox if artist.get_clip_on() and artist.axes is not None else None


def _has_edge(patch: Any) -> bool:
    edge, face = patch.get_edgecolor(), patch.get_facecolor()
    return patch.get_linewidth() > 0 and edge[3] > 0 and tuple(edge) != tuple(face)


def _opacity(artist: Any, color: Any) -> float:
    alpha = artist.get_alpha()
    return color[3] if alpha is None else alpha * (color[3] > 0)
