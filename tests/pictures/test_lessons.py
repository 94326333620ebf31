"""What lessons draw: true proportions, and labels on what they name."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from minilora.pictures import lessons
from minilora.pictures.check import problems
from minilora.pictures.style import BASE, FULL, LORA, ORANGE, A, B, ink, panels


@pytest.fixture
def axes():
    return Figure(figsize=(9, 4)).subplots()


def patches(axes, kind):
    return {to_hex(patch.get_facecolor()).upper(): patch for patch in axes.patches if isinstance(patch, kind)}


def texts(axes):
    return " | ".join(text.get_text() for text in axes.texts)


def test_each_matrix_is_drawn_with_its_true_height_and_width(axes):
    lessons.matrices_to_scale(axes, m=576, n=1536, r=8)
    drawn = {color: (patch.get_height(), patch.get_width()) for color, patch in patches(axes, Rectangle).items()}
    assert drawn == {BASE: (576, 1536), A: (8, 1536), B: (576, 8)}
    assert axes.get_aspect() == 1
    assert all(number in texts(axes) for number in ("884,736", "12,288", "4,608"))


def test_the_funnels_narrow_from_n_to_r_and_widen_to_m(axes):
    lessons.bottleneck_to_scale(axes, m=60, n=150, r=4)

    def widths(polygon):
        x = polygon.get_xy()
        return x[1, 0] - x[0, 0], x[2, 0] - x[3, 0]

    drawn = {color: widths(polygon) for color, polygon in patches(axes, Polygon).items()}
    wanted = {BASE: (150, 60), A: (150, 4), B: (4, 60)}
    assert drawn.keys() == wanted.keys() and all(np.allclose(drawn[color], wanted[color]) for color in wanted)
    bars = [patch.get_width() for patch in axes.patches if isinstance(patch, Rectangle)]
    assert sorted(bars) == [4, 60, 60, 60, 150] and axes.get_aspect() == 1  # u; x Wᵀ, u Bᵀ and y; x
    assert all(name in texts(axes) for name in ("x: 150", "y: 60", "u = x Aᵀ: 4", "α/r"))


@pytest.mark.parametrize("m, n, r", [(576, 1536, 8), (256, 256, 8), (128, 384, 4)])
@pytest.mark.parametrize("draw", [lessons.matrices_to_scale, lessons.bottleneck_to_scale])
def test_drawings_of_matrices_can_be_read(draw, m, n, r):
    figure, axes = panels(height=4)
    draw(axes, m, n, r)
    assert problems(figure) == []


@pytest.mark.parametrize("place, side", [((6, 0), "left"), ((-6, 0), "right")])
def test_a_line_carries_its_label_in_its_own_colour(axes, place, side):
    lessons.line(axes, [1, 2, 3], [4.0, 5.0, 6.0], "loss", ORANGE, at=1, place=place)
    (label,) = axes.texts
    assert label.get_text() == "loss" and label.xy == (2, 5.0) and label.get_ha() == side
    assert axes.lines[0].get_color() == ORANGE and label.get_color() == ink(ORANGE)


# -- what LoRA saves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset, side", [((6, 0), "left"), ((-6, 0), "right"), ((0, 6), "center")])
def test_a_curve_bears_its_name_beside_a_point_of_its_own(axes, offset, side):
    lessons.curve(axes, [1, 2, 4], [10, 20, 40], "LoRA", LORA, at=1, offset=offset)
    (name,) = axes.texts
    assert name.xy == (2, 20) and name.get_text() == "LoRA" and name.get_horizontalalignment() == side
    assert axes.lines[0].get_color() == LORA and name.get_color() == ink(LORA)


def test_a_curve_shows_what_was_measured_as_dots_without_a_line(axes):
    lessons.curve(axes, [1, 2], [10, 20], "full", FULL, measured=[11, 19], linestyle="--")
    line, dots = axes.lines
    assert line.get_linestyle() == "--" and list(line.get_ydata()) == [10, 20]
    assert dots.get_marker() == "o" and dots.get_linewidth() == 0 and list(dots.get_ydata()) == [11, 19]
