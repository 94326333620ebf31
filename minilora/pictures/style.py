"""What all pictures share: one colour for one thing, letters that can be read, twice the pixels of the page.

Draw with the names of things (`LORA`, `FULL`, `A`, ...), so that a colour means the same on every page. Letters in the
colour of a line take `ink(color)`, which is dark enough to read on white. `pictures/check.py` holds a figure to it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito, Color Universal Design (2008): colours that the colour-blind can tell apart, too.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
AMBER, SKY, GREY, BLACK = "#E69F00", "#56B4E9", "#999999", "#000000"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, GREY, BLACK)

LORA, FULL, BASE = BLUE, ORANGE, GREY  # ways to train; what is frozen
A, B = GREEN, PURPLE  # the two matrices of an update, and their gradients
PARAPHRASE = SKY  # losses (that of training has the colour of the way to train): on the same in other words,
VALIDATION = AMBER  # on what was held out,
GENERAL = BLACK  # on what the model could do before
# What is predicted is a dashed line, and what is measured are dots, in the colour of the thing.

SMALLEST = 9  # points: no letter is smaller
PALE = 0.35  # opacity of what is frozen or merely passed through
DPI = 220  # pixels per inch of a figure that pages show at 110

RC: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.xmargin": 0.02,
    "figure.dpi": DPI / 2,
    "savefig.dpi": DPI,
}


def use() -> None:
    """Draw every figure from now on in this style: for notebooks and programs of your own."""
    import matplotlib as mpl
    from cycler import cycler

    mpl.rcParams.update(RC | {"figure.constrained_layout.use": True, "axes.prop_cycle": cycler(color=PALETTE)})


def panels(columns: int = 1, width: float = 9, height: float = 3.6, ratios: Sequence[float] | None = None) -> Any:
    """A figure of so many inches, and its panels side by side: (figure, axes) or (figure, array of axes)."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(1, columns, width_ratios=ratios)


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, in the resolution of all pictures."""
    figure.savefig(path, dpi=DPI, format="png")


def png(figure: Any) -> bytes:
    """The same as bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    return buffer.getvalue()


def name_lines(axes: Any, names: Sequence[tuple[float, str, str]]) -> None:
    """Names of lines, right of a panel, each as high as its line ends, or as near to that as the other names allow.

    names: (height of the end, text, colour of the line). Called when the limits of the panel are final.
    """
    low, high = axes.get_ylim()
    letters = 1.35 * axes.xaxis.label.get_fontsize() / 72  # inches from one line of letters to the next
    line = (
        letters * (high - low) / (axes.get_figure(root=True).get_figheight() - 4 * letters)
    )  # without title and ticks
    floor = low - line
    for y, text, color in sorted(names):
        half = line * (1 + text.count("\n")) / 2
        middle = max(y, floor + half)
        floor = middle + half
        at = (1.02, middle)
        axes.annotate(
            text, at, xycoords=("axes fraction", "data"), color=ink(color), va="center", annotation_clip=False
        )


def ink(color: str) -> str:
    """The same colour, as dark as letters on white need: a contrast of 4.5 to 1 (WCAG 2, criterion 1.4.3).

    >>> ink(BLUE), ink(AMBER)
    ('#0072b2', '#9d6c00')
    """
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = to_rgb(color)
    while 1.05 / (_luminance(red, green, blue) + 0.05) < 4.5:
        red, green, blue = 0.98 * red, 0.98 * green, 0.98 * blue
    return to_hex((red, green, blue))


def _luminance(*rgb: float) -> float:
    """Relative luminance of an sRGB colour, 0 (black) to 1 (white)."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
