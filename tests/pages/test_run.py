"""The picture of a run: it can be read, however short the run, and says what the page says."""

import numpy as np
import pytest
from figure_check import problems
from matplotlib.colors import to_hex
from matplotlib.text import Text

from minilora.pages.run import run_figure, run_picture
from minilora.pages.style import FULL, LORA, PARAPHRASE, VALIDATION, ink, save_themes, theme


def metrics(steps=120, method="lora", validation=((30, 3.07), (60, 2.95), (90, 3.02), (120, 3.02)), paraphrase=True):
    """Those of the README's run, or of one like it."""
    falling = 1.3 + 2.2 * np.exp(-np.arange(steps) / 30) + 0.2 * np.sin(np.arange(steps))
    adapter = 2_442_240 if method == "lora" else 134_515_008
    return {
        "options": {"method": method},
        "train_loss": falling.tolist(),
        "validation_loss": [list(pair) for pair in validation],
        "loss": {"paraphrase": [3.616, 1.327]} if paraphrase else {"general": [3.285, 3.539]},
        "trainable_parameters": adapter,
        "total_parameters": 134_515_008 + (adapter if method == "lora" else 0),
        "peak_memory_bytes": {"predicted": 1_079e6 if method == "lora" else 2_462e6, "full_predicted": 2_462e6},
        "adapter_bytes": 4 * adapter,
        "base_bytes": 4 * 134_515_008,
    }


VALIDATED = {  # what a run notes that validates both, and kept an earlier step
    "validation": {
        "unseen": [[30, 2.61], [60, 2.56], [120, 2.85]],
        "paraphrase": [[30, 2.3], [60, 1.9], [120, 1.45]],
    },
    "kept": {"step": 60, "which": "best", "loss": 2.23},
}


def words(axes):
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize(
    "run",
    [
        metrics(),
        metrics(method="full"),
        metrics(steps=1, validation=[(1, 3.6)]),
        metrics(steps=3, validation=[(2, 2.9), (3, 2.9)]),
        metrics(steps=7, validation=[], paraphrase=False),
        metrics(validation=[(60, 1.4), (120, 1.33)]),  # all lines end at the same height
        metrics(steps=4000, validation=[(step, 2.9) for step in range(40, 4001, 40)]),
        metrics() | VALIDATED,
        metrics() | {"trainable_parameters": 3e8, "total_parameters": 4.345e8, "adapter_bytes": 1.2e9},
        metrics(steps=3, validation=[(3, float("nan"))]) | {"train_loss": [3.0, float("nan"), float("inf")]},
    ],
    ids=[
        "README",
        "full",
        "one step",
        "three steps",
        "bare",
        "one end",
        "long",
        "validated",
        "large adapter",
        "no numbers",
    ],
)
@pytest.mark.parametrize("ground", ["light", "dark"])
def test_a_run_of_any_kind_can_be_read(run, ground):
    with theme(ground):
        figure = run_figure(run)
        assert problems(figure) == []
        letters = {to_hex(text.get_color()) for text in figure.findobj(Text) if text.get_text()}
        assert letters == {ink(color) for color in letters}  # none is too pale, or too dark, for its ground


def test_both_validations_are_drawn_in_their_own_line_and_what_was_kept_is_ringed():
    curves, _ = run_figure(metrics() | VALIDATED).axes
    _, _, unseen, ring, paraphrase, other = curves.lines
    assert list(unseen.get_ydata()) == [2.61, 2.56, 2.85] and list(paraphrase.get_ydata()) == [2.3, 1.9, 1.45]
    assert (unseen.get_linestyle(), paraphrase.get_linestyle()) == ("-", "-.")
    assert (unseen.get_color(), paraphrase.get_color()) == (VALIDATION, PARAPHRASE)
    assert [list(zip(*line.get_data(), strict=True)) for line in (ring, other)] == [[(60, 2.56)], [(60, 1.9)]]
    assert ring.get_markerfacecolor() == "none" and "ringed: 60, which was kept" in curves.get_xlabel()
    assert words(curves)[1:] == ["validation,\nin other words", "validation,\nunseen"]


def test_losses_stand_at_their_steps_and_fill_the_panel():
    curves, _ = run_figure(metrics()).axes
    every, smooth, validation, paraphrase = curves.lines
    assert list(every.get_xdata()) == list(range(1, 121)) and every.get_ydata()[0] == pytest.approx(3.5)
    assert smooth.get_xdata()[0] == 5 and smooth.get_ydata()[0] == pytest.approx(np.mean(metrics()["train_loss"][:9]))
    assert list(validation.get_xdata()) == [30, 60, 90, 120] and validation.get_color() == VALIDATION
    assert list(paraphrase.get_xdata()) == [0, 120] and list(paraphrase.get_ydata()) == [3.616, 1.327]
    low, high = curves.get_ylim()
    assert 0.9 < low < 1.3 and 3.6 < high < 3.9


def test_steps_are_whole_numbers():
    curves, _ = run_figure(metrics(steps=2, validation=[])).axes
    assert all(float(tick).is_integer() for tick in curves.get_xticks())


def test_held_out_records_are_called_validation():
    curves, _ = run_figure(metrics()).axes
    names = ["training,\nmean of 9 steps", "in other words,\nbefore and after", "validation,\nunseen"]
    assert words(curves) == names and curves.get_xlabel() == "step"
    assert words(run_figure(metrics(validation=[], paraphrase=False)).axes[0]) == ["training,\nmean of 9 steps"]


def test_costs_are_those_of_the_page_and_bars_are_as_long_as_their_share():
    _, bars = run_figure(metrics()).axes
    assert words(bars) == [
        "parameters trained",
        "134.5 M, full",
        "2.4 M, LoRA (1.8 % of all)",
        "memory in training, predicted",
        "2,462 MB, full",
        "1,079 MB, LoRA (43.8 % of full)",
        "disk per version",
        "538 MB, full",
        "9.8 MB, LoRA (1.8 % of full)",
    ]
    drawn = [(to_hex(bar.get_facecolor()), bar.get_width()) for bar in bars.patches]
    assert [color for color, _ in drawn] == [FULL.lower(), LORA.lower()] * 3
    widths = [100, 100 * 2_442_240 / 134_515_008, 100, 100 * 1079 / 2462, 100, 100 * 2_442_240 / 134_515_008]
    assert [width for _, width in drawn] == pytest.approx(widths)


def test_the_share_of_a_tiny_run_is_the_page_s():
    run = metrics() | {"trainable_parameters": 73_728, "total_parameters": 1_066_368}
    assert "73,728, LoRA (6.9 % of all)" in words(run_figure(run).axes[1])


def test_full_fine_tuning_has_its_own_colour_and_is_compared_with_nothing():
    assert {line.get_color() for line in run_figure(metrics(method="full")).axes[0].lines[:2]} == {FULL}
    assert words(run_figure(metrics(method="full")).axes[1])[1::2] == [
        "134.5 M, full",
        "2,462 MB, full",
        "538 MB, full",
    ]


def test_the_picture_is_written_as_a_file(tmp_path):
    run_picture(metrics(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_pictures_for_light_and_dark_pages_stand_side_by_side(tmp_path):
    paths = save_themes(lambda: run_figure(metrics()), tmp_path / "run.svg")
    assert [path.name for path in paths] == ["run.svg", "run-dark.svg"]
    light, dark = (path.read_text(encoding="utf-8") for path in paths)
    assert "fill: #0d1117" in dark and "fill: #0d1117" not in light and "<svg" in light
