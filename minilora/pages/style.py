"""The style of all figures: one colour for one thing, and legible text, on light pages and on dark ones.

Draw with the names of things (`LORA`, `FULL`, `A`, ...), so that a colour means the same on every page. Text in the
colour of a line, and black lines, take `ink(color)`, which is legible on the current background.
`tests/figure_check.py` holds every figure to it.

save_themes(lambda: run_figure(metrics), Path("picture.svg"))    # picture.svg, and picture-dark.svg for dark pages
"""

from __future__ import annotations

import errno
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files.disk import replacing
from ..terminal import printable

# Okabe and Ito, Color Universal Design (2008): colours that the colour-blind can tell apart, too.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
AMBER, SKY, GREY, BLACK = "#E69F00", "#56B4E9", "#999999", "#000000"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, GREY, BLACK)

LORA, FULL, BASE = BLUE, ORANGE, GREY  # ways to train; frozen parameters
A, B = GREEN, PURPLE  # the two matrices of an update, and their gradients
HALF = PURPLE  # bfloat16, compared with float32
PARAPHRASE = SKY  # losses (training loss has the colour of the way to train): on paraphrased training questions,
VALIDATION = AMBER  # on the validation set,
GENERAL = BLACK  # on general text
# A prediction is a dashed line, and measurements are dots, in the colour of the thing.

SMALLEST = 9  # points: no text is smaller
STRONGEST = 0.75  # opacity of the strongest colour of a heat map: text stays legible on it
PALE = 0.35  # opacity of what is frozen, or only passed through
DPI = 220  # pixels per inch of a figure that pages show at 110

RC: dict[Any, Any] = {
    "font.size": 10, "axes.titlesize": "medium", "axes.spines.top": False, "axes.spines.right": False,
    "axes.xmargin": 0.02, "figure.dpi": DPI / 2, "savefig.dpi": DPI,
}  # fmt: skip
GROUNDS = {"light": ("#ffffff", BLACK), "dark": ("#0d1117", "#e6edf3")}  # background and text; as on GitHub's dark page


@contextmanager
def theme(name: str) -> Iterator[None]:
    """Figures drawn and saved in this block are for light pages, or for dark ones. name: "light" | "dark"."""
    import matplotlib as mpl

    if name not in GROUNDS:
        raise ValueError(f"a theme is light or dark, got {name!r}")
    ground, letters = GROUNDS[name]
    grounds = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), ground)
    of_letters = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with mpl.rc_context(RC | grounds | dict.fromkeys(of_letters, letters)):
        yield


def panels(
    columns: int = 1, width: float = 9, height: float = 3.6, ratios: Sequence[float] | None = None, rows: int = 1
) -> Any:
    """A figure of this size in inches, and its panels: (figure, axes) or (figure, array of axes)."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, width_ratios=ratios)


def literal(text: str) -> str:
    """A text of a user as matplotlib shows it letter by letter: what is between two `$` would be read as a formula."""
    return printable(text).replace("$", r"\$")


def check_picture(path: Path) -> None:
    """Raise ValueError for a picture that `save` could not write: before the work whose result it shows.

    The folder is made if it is missing.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"{path}: a picture is a .png or an .svg file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"{path}: no picture can be written there ({error.strerror}): choose another file") from error


def save(figure: Any, path: Path) -> None:
    """Write a figure as a .png or .svg file, completely or not at all; the same figure gives the same bytes.

    Letters that no font has are boxes. Raises ValueError as `check_picture`.
    """
    import matplotlib as mpl

    check_picture(path)
    kind = path.suffix.lower().removeprefix(".")
    with warnings.catch_warnings(), mpl.rc_context({"svg.hashsalt": "minilora"}):
        warnings.filterwarnings("ignore", "Glyph .* missing from ")
        with replacing(path) as partial:
            figure.savefig(partial, dpi=DPI, format=kind, metadata={"Date": None} if kind == "svg" else {})


def save_themes(draw: Callable[[], Any], path: Path) -> list[Path]:
    """Write the figure that `draw` makes, once for light pages and once for dark ones. Returns both files.

    path: of the light one, a .png or .svg file; the dark one is NAME-dark, next to it.
    """
    check_picture(path)
    paths = {"light": path, "dark": path.with_stem(f"{path.stem}-dark")}
    for name, each in paths.items():
        with theme(name):
            save(draw(), each)
    return list(paths.values())


def name_lines(axes: Any, names: Sequence[tuple[float, str, str]]) -> None:
    """Write the names of lines to the right of a panel, each at the height where its line ends, or close to it.

    names: (height of the end, text, colour of the line). Call it once the limits of the panel are final.
    """
    low, high = axes.get_ylim()
    letters = 1.35 * axes.xaxis.label.get_fontsize() / 72  # inches from one line of letters to the next
    inside = axes.get_figure().get_figheight() - 4 * letters  # without title and ticks
    line = letters * (high - low) / inside
    ordered = sorted(names)
    halves = [line * (1 + text.count("\n")) / 2 for _, text, _ in ordered]
    heights: list[float] = []
    floor = low - line
    for (y, _, _), half in zip(ordered, halves, strict=True):  # upwards: none on another
        heights.append(max(y, floor + half))
        floor = heights[-1] + half
    ceiling = high + line
    for i in reversed(range(len(ordered))):  # downwards: none above the panel
        heights[i] = min(heights[i], ceiling - halves[i])
        ceiling = heights[i] - halves[i]
    for (_, text, color), height in zip(ordered, heights, strict=True):
        write_beside(axes, height, text, color)


def write_beside(axes: Any, y: float, text: str, color: str) -> None:
    """Write a text to the right of a panel, at the height y."""
    place = ("axes fraction", "data")
    axes.annotate(text, (1.02, y), xycoords=place, color=ink(color), va="center", annotation_clip=False)


def ring(axes: Any, x: float, y: float, color: str, marker: str = "o", size: float = 11) -> None:
    """Draw a ring around a point of a line, to say that it is the best."""
    axes.plot(x, y, color=color, marker=marker, markersize=size, fillstyle="none", linewidth=0, clip_on=False)


def ink(color: str, ground: str | None = None) -> str:
    """The same colour with the contrast that text needs, 4.5 to 1 (WCAG 2, criterion 1.4.3): darker on a light
    background, lighter on a dark one, where black becomes the colour of the text.

    ground: the background; if left out, that of the current theme.

    >>> ink(BLUE), ink(AMBER), ink(BLUE, "#0d1117")
    ('#0072b2', '#9d6c00', '#2285bc')
    """
    import matplotlib as mpl
    from matplotlib.colors import to_hex, to_rgb

    below = _luminance(*to_rgb(mpl.rcParams["figure.facecolor"] if ground is None else ground))
    dark = below < 0.18  # where black and white stand out alike
    if dark and to_hex(color) == BLACK:
        return GROUNDS["dark"][1]
    rgb = to_rgb(color)
    while max(one := _luminance(*rgb), below) + 0.05 < 4.5 * (min(one, below) + 0.05):
        red, green, blue = (1 - 0.98 * (1 - x) if dark else 0.98 * x for x in rgb)
        rgb = (red, green, blue)
    return to_hex(rgb)


def blend(ground: str, color: str) -> tuple[float, ...]:
    """The strongest colour of a heat map, on which text is legible."""
    from matplotlib.colors import to_rgb

    return tuple(STRONGEST * x + (1 - STRONGEST) * y for x, y in zip(to_rgb(color), to_rgb(ground), strict=True))


def _luminance(*rgb: float) -> float:
    """Relative luminance of an sRGB colour, 0 (black) to 1 (white)."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
