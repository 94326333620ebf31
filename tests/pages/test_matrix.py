"""The heat map of versions and data sets: it can be read, and every cell says what was measured."""

import numpy as np
import pytest
from figure_check import problems
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from minilora.pages.matrix import matrix_figure
from minilora.pages.style import BLUE, ORANGE, save_themes, theme


def interval(value, half):
    return {"value": value, "low": value - half, "high": value + half}


def result(adapters=("legal", "support"), data=("legal", "support", "general"), recall=True):
    """Every adapter is 2 nats and 30 points better on its own data, and a little worse on all others."""
    sets = {}
    for name in data:
        for kind in ("all",) if name == "general" else ("paraphrase", "unseen"):
            sets[name if kind == "all" else f"{name}/{kind}"] = {"data": name, "kind": kind}
    scores = {}
    for name, about in sets.items():
        scores[name] = {}
        for version in ("base", *adapters):
            own = version == about["data"]
            loss = 3.5 if version == "base" else 1.5 if own else 3.75
            scores[name][version] = {"loss": interval(loss, 0.1)}
            if recall:
                scores[name][version]["keyword_recall"] = interval(0.1 + 0.3 * own, 0.05)
    return {"adapters": {name: {"trained_on": name} for name in adapters}, "sets": sets, "scores": scores}


FOUR = ("legal", "medical", "support", "finance")


@pytest.mark.parametrize(
    "measured",
    [
        result(),
        result(recall=False),
        result(("legal",), ("legal",)),
        result((), ("general",)),
        result(FOUR, (*FOUR, "general")),
        result(("an-adapter-with-a-long-name", *FOUR, "linear", "svd"), ("questions-of-customers", "general")),
    ],
    ids=["two", "loss alone", "one", "base alone", "four", "long names"],
)
def test_a_matrix_of_any_size_can_be_read(measured):
    assert problems(matrix_figure(measured)) == []


def test_a_matrix_can_be_read_on_a_dark_page():
    with theme("dark"):
        figure = matrix_figure(result())
        assert problems(figure) == []
    base = panel(figure, "Loss").images[0].to_rgba(0)
    assert max(base[:3]) < 0.1  # no change is the page's own ground


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title().startswith(title))


def contents(axes):
    """The words of each cell, by column and row."""
    cells = {}
    for text in axes.texts:
        x, y = text.get_position()
        cells.setdefault((round(x), round(y)), []).append(text.get_text())
    return {place: " ".join(filter(None, words)) for place, words in cells.items()}


def test_a_cell_says_value_and_interval_of_its_row_and_column():
    axes = panel(matrix_figure(result()), "Loss")
    cells = contents(axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["base", "legal", "support"]
    assert axes.get_xticklabels()[2].get_text() == "support\nin other words"
    assert cells[2, 2] == "1.50 1.40 to 1.60" and cells[2, 1] == "3.75 3.65 to 3.85" and len(cells) == 15
    recall = panel(matrix_figure(result()), "Keyword")
    assert contents(recall)[0, 1] == "40 35 to 45"


@pytest.mark.parametrize("title", ["Loss", "Keyword"])
def test_better_than_the_base_is_blue_and_worse_is_orange_in_both_panels(title):
    measured = result()
    measured["scores"]["general"]["legal"]["keyword_recall"] = interval(0.02, 0.01)
    image = panel(matrix_figure(measured), title).images[0]
    better, same, worse = (
        image.cmap(image.norm(image.get_array()[row, column])) for row, column in ((1, 0), (0, 0), (1, 4))
    )

    def nearer(color, one, other):
        return np.linalg.norm(np.subtract(color[:3], to_rgb(one))) < np.linalg.norm(
            np.subtract(color[:3], to_rgb(other))
        )

    assert nearer(better, BLUE, ORANGE) and nearer(worse, ORANGE, BLUE) and min(same) > 0.98


def test_a_frame_marks_the_data_that_an_adapter_was_trained_on():
    axes = panel(matrix_figure(result()), "Loss")
    framed = {(round(p.get_x() + 0.48), round(p.get_y() + 0.48)) for p in axes.patches if isinstance(p, Rectangle)}
    assert framed == {(0, 1), (1, 1), (2, 2), (3, 2)}


def test_what_is_not_finite_or_was_not_measured_is_a_dash():
    measured = result()
    measured["scores"]["general"]["legal"]["loss"] = {"value": None, "low": None, "high": None}
    measured["scores"]["general"]["support"]["loss"] = {"value": 2.0, "low": None, "high": None}
    figure = matrix_figure(measured)
    cells = contents(panel(figure, "Loss"))
    assert cells[4, 1] == "-" and cells[4, 2] == "2.00" and problems(figure) == []


def test_pictures_for_light_and_dark_pages_stand_side_by_side(tmp_path):
    light, dark = save_themes(lambda: matrix_figure(result()), tmp_path / "both.svg")
    assert "fill: #0d1117" in dark.read_text() and "fill: #0d1117" not in light.read_text()
