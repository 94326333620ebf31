"""The check of pictures: each fault is planted in a figure that can be read, and is named."""

import numpy as np
import pytest
from figure_check import problems
from matplotlib.colors import to_rgb

from minilora.pages.style import (
    AMBER,
    BASE,
    BLACK,
    BLUE,
    FULL,
    LORA,
    PALETTE,
    SKY,
    ink,
    panels,
    save,
    save_themes,
    theme,
)


@pytest.fixture
def figure():
    """A figure that can be read."""
    figure, axes = panels()
    axes.plot([0, 1, 2], [1, 2, 3], color=LORA)
    axes.annotate("LoRA", (2, 3), (-40, -4), textcoords="offset points", color=ink(LORA), ha="right", va="center")
    axes.set(xlabel="step", ylabel="loss", title="what it learned")
    return figure


def words(axes, x=1.5, y=1.2):
    axes.text(x, y, "in the way", ha="center", va="center")


CROSSING = {  # what crosses the words "in the way" -> how it is drawn
    "a line": lambda a: a.vlines([1.5], 1, 3, color=FULL),
    "the edge of a shape": lambda a: a.bar([1.5], [1.2], width=0.2, facecolor="none", edgecolor=BASE),
    "a mark": lambda a: a.plot([1.5], [1.2], "o", color=FULL, markersize=3),
    "an arrow": lambda a: a.annotate("from", (1.9, 1.2), (1.0, 1.2), va="center", arrowprops={"arrowstyle": "->"}),
}
FAR = "runs far out to the right of the picture and beyond"
FAULTS = {  # what is drawn -> the line that names it
    "without label": (lambda a: a.set_ylabel(""), 'panel "what it learned": the y axis shows numbers and has no label'),
    "small": (lambda a: a.text(1.5, 1.2, "tiny", fontsize=8), '"tiny": 8 points'),
    "overlapping": (lambda a: (a.text(1.5, 1.2, "one"), a.text(1.52, 1.21, "other")), '"one" and "other" overlap'),
    "line": (lambda a: words(a, 1, 2), '"in the way" is crossed by a line'),
    "cut off": (lambda a: a.text(1.9, 1.2, FAR).set_in_layout(False), "runs out of the picture"),
    "foreign line": (lambda a: a.plot([0, 1], [3, 3], color="red"), "a line is drawn in #ff0000"),
    "foreign bar": (lambda a: a.bar([1.5], [1.2], color="tab:blue"), "a shape is drawn in #1f77b4"),
    "foreign dots": (lambda a: a.scatter([1.5], [1.2], color="tab:green"), "a shape is drawn in #2ca02c"),
    "foreign words": (lambda a: a.text(1.5, 1.2, "words", color="magenta"), '"words" is drawn in #ff00ff'),
    "pale words": (lambda a: a.title.set_color("#bbbbbb"), '"what it learned" is drawn in #bbbbbb'),
} | {
    what: (lambda a, draw=draw: (draw(a), words(a)), f'"in the way" is crossed by {what}')
    for what, draw in CROSSING.items()
}


@pytest.mark.long
@pytest.mark.parametrize(("fault", "line"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_the_one_line_that_is_listed(figure, fault, line):
    fault(figure.axes[0])
    found = problems(figure)
    assert len(found) == 1 and line in found[0], found


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_numbers_in_every_notation_ask_for_a_label(scale):
    figure, axes = panels()
    axes.plot([1e-3, 1e3], [1, 2], color=LORA)
    axes.set(xscale=scale, ylabel="y")
    assert problems(figure) == ["panel 1: the x axis shows numbers and has no label"]


def test_every_colour_of_the_palette_may_be_used_and_its_ink(figure):
    axes = figure.axes[0]
    for i, color in enumerate(PALETTE):
        axes.bar([0.1 * i], [0.5], width=0.1, color=color)
    axes.set_title("in ink", color=ink(AMBER))
    assert problems(figure) == []


# -- the style ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture_is_written_as_its_name_ends_and_the_same_twice(kind, figure, tmp_path):
    paths = [tmp_path / f"{name}.{kind}" for name in "ab"]
    for path in paths:
        save(figure, path)
    one, other = (path.read_bytes() for path in paths)
    assert one == other and one.lstrip()[:5] == {"png": b"\x89PNG\r", "svg": b"<?xml"}[kind]
    assert b"<dc:date>" not in one  # nor do they differ from day to day
    if kind == "png":  # twice the pixels of the page
        assert [int.from_bytes(one[i : i + 4], "big") for i in (16, 20)] == [9 * 220, round(3.6 * 220)]
    with pytest.raises(ValueError, match="a theme is light or dark, got 'night'"), theme("night"):
        pass


def lines_and_letters():
    figure, axes = panels()
    axes.plot([0, 1], [1, 2], color=BLUE)
    axes.plot([0, 1], [2, 1], color=ink(BLACK))
    axes.set(xlabel="step", ylabel="loss")
    axes.set_title("what it learned", color=ink(BLUE))
    return figure


def luminance(pixel):
    return float(np.dot([0.2126, 0.7152, 0.0722], pixel[:3]))


@pytest.mark.long
def test_each_page_has_its_own_ground_and_letters_that_can_be_read_on_it(tmp_path):
    from matplotlib.image import imread

    light, dark = save_themes(lines_and_letters, tmp_path / "a.png")
    assert [light.name, dark.name] == ["a.png", "a-dark.png"]
    on_white, on_black = imread(light), imread(dark)
    assert luminance(on_white[0, 0]) == pytest.approx(1) and luminance(on_black[0, 0]) < 0.1
    assert on_black[..., :3].max() > 0.9 and on_white[..., :3].min() < 0.1  # letters


def test_a_figure_for_a_dark_page_passes_and_black_lines_on_it_do_not():
    with theme("dark"):
        figure = lines_and_letters()
        assert problems(figure) == []
        figure.axes[0].plot([0, 1], [1.5, 1.5], color=BLACK)
        assert problems(figure) == ["a line is drawn in #000000, which is not of the palette in style.py"]


@pytest.mark.parametrize("ground", ["#ffffff", "#0d1117"])
def test_ink_can_be_read_on_its_ground(ground):
    def contrast(color):
        linear = [
            [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(name)]
            for name in (color, ground)
        ]
        low, high = sorted(map(luminance, linear))
        return (high + 0.05) / (low + 0.05)

    assert all(contrast(ink(color, ground)) >= 4.5 for color in PALETTE)
    assert contrast(ink(BLACK, ground)) > 12 and (ink(SKY, ground) == SKY.lower()) == (ground != "#ffffff")


def test_letters_on_an_image_have_its_cells_for_a_ground():
    with theme("dark"):
        figure, axes = panels()
        axes.imshow([[0.0, 1.0]], cmap="cividis")
        axes.text(1, 0, "0.50", color="black", ha="center")
        axes.set(xticks=[], yticks=[])
        assert problems(figure) == []
