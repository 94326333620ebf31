"""The panels of an experiment, held to the style of all pictures."""

import numpy as np
from figure_check import problems

from minilora.pages.rates import SHOWN, draw_rates, draw_seeds, rates_figure
from minilora.pages.style import BLACK, BLUE, GREEN, name_lines, panels

TRIED = {"LoRA": [[1e-3, 3.2], [1e-2, 3.0], [1e-1, 3.4]], "full": [[1e-4, 3.3], [1e-3, 3.1], [1e-2, None]]}


def test_the_best_rate_is_ringed_and_a_failed_one_left_out():
    figure, axes = panels(1)
    draw_rates(axes, TRIED, {"full": GREEN})
    assert [line.get_color() for line in axes.lines] == [BLUE, BLUE, GREEN, GREEN]
    rings = [line.get_xydata().tolist() for line in axes.lines if line.get_fillstyle() == "none"]
    assert rings == [[[1e-2, 3.0]], [[1e-3, 3.1]]]
    assert [len(line.get_xdata()) for line in axes.lines if line.get_fillstyle() != "none"] == [3, 2]
    figure.canvas.draw()


def test_a_row_for_each_name_with_its_mean():
    figure, axes = panels(1)
    measured = {name: [i, i + 3.0] for i, name in enumerate("abcdefg", 1)}
    draw_seeds(axes, measured, "loss")
    figure.canvas.draw()
    assert [label.get_text() for label in axes.get_yticklabels()] == list(measured)
    assert [text.get_text() for text in axes.texts] == [f"{i}.500" for i in range(2, 9)]
    assert [list(line.get_xdata()) for line in axes.lines[1::2]] == [[i + 0.5] * 2 for i in range(2, 9)]
    assert [text.xy[1] for text in axes.texts] == list(axes.get_yticks()) and axes.yaxis_inverted()  # from the top down


def test_a_contender_has_one_colour_and_one_mark_in_both_panels_and_they_are_its_own():
    names = [f"way {i}" for i in range(7)]
    tried = {name: [[1e-3, 3.0], [1e-2, 3.5]] for name in names}
    figure = rates_figure(tried, {name: [3.0, 3.1] for name in names}, "loss", {"way 1": BLACK})
    left, right = ([line for line in axes.lines if len(line.get_xdata()) > 1] for axes in figure.axes)
    styles = [(line.get_color(), line.get_marker()) for line in left]
    assert styles == [(line.get_color(), line.get_marker()) for line in right[::2]]
    assert [line.get_color() for line in right[1::2]] == [color for color, _ in styles]  # the bars at the means
    assert all(len(set(each)) == 7 for each in zip(*styles, strict=True)) and problems(figure) == []


def test_names_of_lines_that_end_at_the_top_are_apart_and_not_above_the_panel():
    figure, axes = panels(1)
    axes.set(xlabel="x", ylim=(0, 1), yticks=[])
    name_lines(axes, [(1.0, f"line {i}", BLUE) for i in range(5)])
    heights = sorted(text.xy[1] for text in axes.texts)
    assert heights[-1] <= 1.1 and min(np.diff(heights)) > 0.05 and problems(figure) == []


def test_a_run_that_diverged_does_not_flatten_the_others():
    axes = panels(1)[1]
    draw_rates(axes, TRIED | {"wild": [[1e-3, 3.05], [1e-1, 90.0]]})
    low, high = axes.get_ylim()
    assert 2.5 < low < 3.0 < 3.0 + SHOWN < high < 3.2 + SHOWN


def test_the_best_of_a_contender_that_is_far_worse_is_shown_too():
    axes = panels(1)[1]
    draw_rates(axes, TRIED | {"worse": [[1e-2, 9.0], [1e-1, 90.0]]})
    assert axes.get_ylim()[0] < 3.0 and 9.0 < axes.get_ylim()[1] < 10
