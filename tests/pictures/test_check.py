"""The check of pictures: each fault is planted in a figure that can be read, and is named."""

import pytest
from matplotlib.figure import Figure

from minilora.pictures.check import problems
from minilora.pictures.style import AMBER, BASE, FULL, LORA, PALETTE, RC, ink, panels, png, save, use


@pytest.fixture
def figure():
    """A figure that can be read."""
    figure, axes = panels()
    axes.plot([0, 1, 2], [1, 2, 3], color=LORA)
    axes.annotate("LoRA", (2, 3), (-40, -4), textcoords="offset points", color=ink(LORA), ha="right", va="center")
    axes.set(xlabel="step", ylabel="loss", title="what it learned")
    return figure


def without_label(axes):
    axes.set_ylabel("")


def small(axes):
    axes.text(1.5, 1.2, "tiny", fontsize=8)


def overlapping(axes):
    axes.text(1.5, 1.2, "one")
    axes.text(1.52, 1.21, "other")


def crossed(axes):
    axes.text(1, 2, "in the way", ha="center", va="center")


def crossed_by_an_upright(axes):
    axes.vlines([1.5], 1, 3, color=FULL)
    axes.text(1.5, 1.2, "in the way", ha="center")


def crossed_by_an_edge(axes):
    axes.bar([1.5], [1.2], width=0.2, facecolor="none", edgecolor=BASE)
    axes.text(1.5, 1.2, "in the way", ha="center", va="center")


def crossed_by_a_mark(axes):
    axes.plot([1.5], [1.2], "o", color=FULL, markersize=3)
    axes.text(1.5, 1.2, "in the way", ha="center", va="center")


def crossed_by_an_arrow(axes):
    axes.annotate("from", (1.9, 1.2), (1.0, 1.2), va="center", arrowprops={"arrowstyle": "->"})
    axes.text(1.5, 1.2, "in the way", ha="center", va="center")


def cut_off(axes):
    text = axes.text(1.9, 1.2, "runs far out to the right of the picture and beyond")
    text.set_in_layout(False)


def foreign(axes):
    axes.plot([0, 1], [3, 3], color="red")


def foreign_bar(axes):
    axes.bar([1.5], [1.2], color="tab:blue")


def foreign_dots(axes):
    axes.scatter([1.5], [1.2], color="tab:green")


def foreign_words(axes):
    axes.text(1.5, 1.2, "words", color="magenta")


def pale_words(axes):
    axes.title.set_color("#bbbbbb")


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (without_label, 'panel "what it learned": the y axis shows numbers and has no label'),
        (small, '"tiny": 8 points'),
        (overlapping, '"one" and "other" overlap'),
        (crossed, '"in the way" is crossed by a line'),
        (crossed_by_an_upright, '"in the way" is crossed by a line'),
        (crossed_by_an_edge, '"in the way" is crossed by the edge of a shape'),
        (crossed_by_a_mark, '"in the way" is crossed by a mark'),
        (crossed_by_an_arrow, '"in the way" is crossed by an arrow'),
        (cut_off, "runs out of the picture"),
        (foreign, "a line is drawn in #ff0000"),
        (foreign_bar, "a shape is drawn in #1f77b4"),
        (foreign_dots, "a shape is drawn in #2ca02c"),
        (foreign_words, '"words" is drawn in #ff00ff'),
        (pale_words, '"what it learned" is drawn in #bbbbbb'),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_a_fault_is_the_one_line_that_is_listed(figure, fault, line):
    assert problems(figure) == []
    fault(figure.axes[0])
    found = problems(figure)
    assert len(found) == 1 and line in found[0], found


def test_what_cannot_be_seen_is_no_fault(figure):
    axes = figure.axes[0]
    axes.text(1, 2, "in the way", ha="center", va="center", visible=False)
    axes.plot([0, 1], [2, 2], color="red", visible=False)
    axes.text(0.5, 1.5, "on a ground of its own", ha="center", bbox={"facecolor": "white", "edgecolor": "none"})
    axes.bar([1.5], [1.2], facecolor="none", edgecolor="none")
    assert problems(figure) == []


def test_a_line_beyond_the_limits_crosses_nothing():
    figure, axes = panels()
    axes.plot([0, 10], [0.5, 0.5], color=LORA)
    axes.set(xlim=(0, 1), xlabel="x", ylabel="y")
    axes.annotate("beside", (1, 0.5), (6, 0), textcoords="offset points", va="center", annotation_clip=False)
    assert problems(figure) == []


def test_an_axis_of_names_or_one_that_is_off_needs_no_label():
    figure, (names, off, bare) = panels(3)
    names.barh(["weights", "Llama-2-7B"], [1, 2], color=LORA)
    names.set_xlabel("MB")
    off.set_axis_off()
    bare.set(xticks=[], yticks=[])
    assert problems(figure) == []


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_numbers_in_every_notation_ask_for_a_label(scale):
    figure, axes = panels()
    axes.plot([1e-3, 1e3], [1, 2], color=LORA)
    axes.set(xscale=scale, ylabel="y")
    assert problems(figure) == ["panel 1: the x axis shows numbers and has no label"]


def test_a_figure_is_given_back_as_it_was(figure):
    canvas = figure.canvas
    problems(figure)
    assert figure.canvas is canvas


def test_every_colour_of_the_palette_may_be_used_and_its_ink(figure):
    axes = figure.axes[0]
    for i, color in enumerate(PALETTE):
        axes.bar([0.1 * i], [0.5], width=0.1, color=color)
    axes.set_title("in ink", color=ink(AMBER))
    assert problems(figure) == []


# -- the style ---------------------------------------------------------------------------------------------------------


def test_pictures_have_twice_the_pixels_of_the_page(figure, tmp_path):
    save(figure, tmp_path / "picture.png")
    written = (tmp_path / "picture.png").read_bytes()
    width, height = (int.from_bytes(written[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (9 * 220, round(3.6 * 220)) and png(figure)[:24] == written[:24]


def test_notebooks_draw_in_the_same_style():
    import matplotlib as mpl

    with mpl.rc_context():
        use()
        assert {name: mpl.rcParams[name] for name in RC} == RC
        axes = Figure().subplots()
        assert axes.plot([0, 1])[0].get_color() == PALETTE[0] and not axes.spines["top"].get_visible()
