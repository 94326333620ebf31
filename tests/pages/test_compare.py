"""The picture of a comparison: it can be read, and shows the numbers of the table."""

import pytest
from comparing import metrics, result
from figure_check import problems

from minilora.commands.compare_table import rows
from minilora.pages.compare import compare_figure
from minilora.pages.style import FULL, LORA, save_themes, theme


def compared(lora=None, full=None, **change):
    found = result(lora, full, **change)
    return found | {"rows": [row.to_json() for row in rows(found)]}


SHORT = metrics(losses=(3.0,), steps=1, seconds=0.2)
SLOW = metrics(seconds=9.0, seconds_per_step=9.0)  # three times as slow as full fine-tuning


@pytest.mark.parametrize(
    "found",
    [compared(), compared(SHORT, metrics("full", (2.9,), 1, 0.4)), compared(SLOW), compared(metrics(), metrics())],
    ids=["SmolLM2", "one step", "slower", "alike"],
)
def test_a_comparison_of_any_kind_can_be_read(found):
    assert problems(compare_figure(found)) == []


def test_validation_stands_over_the_time_of_training_and_the_best_is_ringed():
    curves, _ = compare_figure(compared()).axes
    lora, ring, full, full_ring = curves.lines
    assert list(lora.get_xdata()) == [0.5, 1.0, 1.5] and list(lora.get_ydata()) == [3.2, 2.9, 3.0]
    assert list(full.get_xdata()) == pytest.approx([20 * 2.8 / 60, 40 * 2.8 / 60, 2.8])
    assert (lora.get_color(), full.get_color()) == (LORA, FULL)
    assert (list(ring.get_xdata()), list(full_ring.get_ydata())) == ([1.0], [2.8])
    assert curves.get_xlabel() == "minutes of training"
    assert compare_figure(compared(SHORT, SHORT)).axes[0].get_xlabel() == "seconds of training"


def test_bars_are_lora_s_share_and_carry_the_numbers_of_the_table():
    _, bars = compare_figure(compared()).axes
    names = [label.get_text() for label in bars.get_yticklabels()]
    widths = dict(zip(names, (bar.get_width() for bar in bars.patches), strict=True))
    assert widths["parameters updated"] == pytest.approx(100 * 2_442_240 / 134_515_008)
    assert widths["time of a step"] == pytest.approx(100 * 1.5 / 2.8)
    assert "1.8 %: 2,442,240 of 134,515,008" in [text.get_text() for text in bars.texts]
    assert "54 %: 1.50 s of 2.80 s" in [text.get_text() for text in bars.texts]


def test_where_the_system_tells_no_peak_there_is_no_bar():
    _, bars = compare_figure(compared(peak_bytes={"lora": None, "full": None})).axes
    assert "peak memory, measured" not in [label.get_text() for label in bars.get_yticklabels()]


def test_pictures_for_light_and_dark_pages_stand_side_by_side(tmp_path):
    light, dark = save_themes(lambda: compare_figure(compared()), tmp_path / "picture.svg")
    assert (light.name, dark.name) == ("picture.svg", "picture-dark.svg")
    assert "fill: #0d1117" in dark.read_text() and "fill: #0d1117" not in light.read_text()


def test_a_dark_picture_can_be_read():
    with theme("dark"):
        assert problems(compare_figure(compared())) == []
