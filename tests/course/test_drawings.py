"""What lessons draw: true proportions, and labels on what they name."""

import numpy as np
import pytest
from figure_check import problems
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from minilora.course import drawings
from minilora.pages.style import BASE, ORANGE, A, B, ink, panels, theme


@pytest.fixture
def axes():
    return Figure(figsize=(9, 4)).subplots()


def patches(axes, kind):
    return {to_hex(patch.get_facecolor()).upper(): patch for patch in axes.patches if isinstance(patch, kind)}


def texts(axes):
    return " | ".join(text.get_text() for text in axes.texts)


def test_the_funnels_narrow_from_n_to_r_and_widen_to_m(axes):
    drawings.bottleneck_to_scale(axes, m=60, n=150, r=4)

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
def test_the_drawing_of_the_bottleneck_can_be_read(m, n, r):
    figure, axes = panels(height=4)
    drawings.bottleneck_to_scale(axes, m, n, r)
    assert problems(figure) == []


@pytest.mark.parametrize("ground", ["light", "dark"])
def test_injection_freezes_both_weights_and_adds_a_and_b_to_one_layer(ground):
    with theme(ground):
        figure, axes = panels()
        drawings.injection(axes)
        assert problems(figure) == []
    words = [text.get_text() for text in axes.texts]
    counts = {"q_proj: MyLora": 1, "k_proj: Linear": 2, "A": 1, "B": 1, "same array": 2}
    assert {word: words.count(word) for word in counts} == counts
    left = [text.get_position()[0] for text in axes.texts if text.get_text() == "W, trainable"]
    right = [text.get_position()[0] for text in axes.texts if text.get_text() == "W, frozen"]
    assert len(left) == len(right) == 2 and max(left) < min(right)


@pytest.mark.parametrize("ground", ["light", "dark"])
def test_a_llama_has_a_norm_before_each_part_of_a_block_and_at_the_end(ground):
    with theme(ground):
        figure, axes = panels(height=2)
        drawings.llama(axes, blocks=30)
        assert problems(figure) == []
    words = sorted((text.get_position()[0], text.get_text().split("\n")[0]) for text in axes.texts if text.get_text())
    order = ["token IDs", "embedding", "norm", "attention", "+", "a block (30 of them)", "norm", "MLP", "+", "norm"]
    assert [word for _, word in words] == [*order, "embedding", "logits"]


@pytest.mark.parametrize("place, side", [((6, 0), "left"), ((-6, 0), "right")])
def test_a_line_carries_its_label_in_its_own_colour(axes, place, side):
    drawings.line(axes, [1, 2, 3], [4.0, 5.0, 6.0], "loss", ORANGE, at=1, place=place)
    (label,) = axes.texts
    assert label.get_text() == "loss" and label.xy == (2, 5.0) and label.get_ha() == side
    assert axes.lines[0].get_color() == ORANGE and label.get_color() == ink(ORANGE)
