"""The pictures of lesson 11: labels and marks stand where their numbers are."""

import pytest
from matplotlib.figure import Figure

from minilora.pictures.lessons import FULL, LORA, curve, pairs_of_bars


@pytest.fixture
def axes():
    return Figure().subplots()


def test_each_row_has_a_bar_of_full_fine_tuning_above_one_of_lora_and_their_numbers(axes):
    pairs_of_bars(axes, {"weights": (4.0, 4.5), "gradients": (4.0, 0.5)}, form="{:.1f} MB")
    bars = [(bar.get_y(), bar.get_width(), bar.get_facecolor()) for bar in axes.patches]
    assert [width for _, width, _ in bars] == [4.0, 4.5, 4.0, 0.5]
    assert bars == sorted(bars, reverse=True)  # from top to bottom
    assert bars[0][2] == bars[2][2] != bars[1][2] == bars[3][2]
    assert [text.get_text() for text in axes.texts] == ["4.0 MB", "4.5 MB", "4.0 MB", "0.5 MB"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["weights", "gradients"]


def test_what_was_measured_is_a_stroke_across_its_own_bar_and_pushes_the_number_aside(axes):
    pairs_of_bars(axes, {"weights": (4.0, 2.0)}, {"weights": (5.0, 1.0)})
    assert [list(stroke.get_xdata()) for stroke in axes.lines] == [[5.0, 5.0], [1.0, 1.0]]
    for stroke, bar, text in zip(axes.lines, axes.patches, axes.texts, strict=True):
        low, high = stroke.get_ydata()
        assert (low, high) == pytest.approx((bar.get_y(), bar.get_y() + bar.get_height()))
        assert low < text.get_position()[1] < high
    assert axes.texts[0].get_position()[0] > 5.0 and 2.0 < axes.texts[1].get_position()[0] < 4.0


@pytest.mark.parametrize("offset, side", [((6, 0), "left"), ((-6, 0), "right"), ((0, 6), "center")])
def test_a_curve_bears_its_name_beside_a_point_of_its_own(axes, offset, side):
    curve(axes, [1, 2, 4], [10, 20, 40], "LoRA", LORA, at=1, offset=offset)
    (name,) = axes.texts
    assert name.xy == (2, 20) and name.get_text() == "LoRA" and name.get_horizontalalignment() == side
    assert name.get_color() == axes.lines[0].get_color() == LORA


def test_a_curve_shows_what_was_measured_as_dots_without_a_line(axes):
    curve(axes, [1, 2], [10, 20], "full", FULL, measured=[11, 19], linestyle="--")
    line, dots = axes.lines
    assert line.get_linestyle() == "--" and list(line.get_ydata()) == [10, 20]
    assert dots.get_marker() == "o" and dots.get_linewidth() == 0 and list(dots.get_ydata()) == [11, 19]
