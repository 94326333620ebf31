"""The figures of commands: they can be read, whatever was measured, and show the numbers that were."""

import numpy as np
import pytest
from comparing import metrics, result
from figure_check import problems
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from minilora.commands.compare_table import rows
from minilora.pages import style
from minilora.pages.figures import compare_figure, matrix_figure, run_figure
from minilora.pages.style import check_picture, ink, save, save_themes, theme

# -- a run -------------------------------------------------------------------------------------------------------------


def run_metrics(
    steps=120, method="lora", validation=((30, 3.07), (60, 2.95), (90, 3.02), (120, 3.02)), paraphrase=True
):
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
    "validation": {"unseen": [[30, 2.61], [60, 2.56], [120, 2.85]], "paraphrase": [[30, 2.3], [60, 1.9], [120, 1.45]]},
    "kept": {"step": 60, "which": "best", "loss": 2.23},
}


def words(axes):
    return [text.get_text() for text in axes.texts]


RUNS = {  # as in COMPARISONS and in MATRICES, what is read on a dark page below is not drawn here as well
    "README": run_metrics(),
    "full": run_metrics(method="full"),
    "one step": run_metrics(steps=1, validation=[(1, 3.6)]),
    "three steps": run_metrics(steps=3, validation=[(2, 2.9), (3, 2.9)]),
    "bare": run_metrics(steps=7, validation=[], paraphrase=False),
    "one end": run_metrics(validation=[(60, 1.4), (120, 1.33)]),  # all lines end at the same height
    "long": run_metrics(steps=4000, validation=[(step, 2.9) for step in range(40, 4001, 40)]),
    "large": run_metrics() | {"trainable_parameters": 3e8, "total_parameters": 4.345e8, "adapter_bytes": 1.2e9},
    "no numbers": run_metrics(3, validation=[(3, float("nan"))]) | {"train_loss": [3.0, float("nan"), float("inf")]},
}


def test_both_validations_are_drawn_in_their_own_line_and_what_was_kept_is_ringed():
    curves, _ = run_figure(run_metrics() | VALIDATED).axes
    _, _, unseen, ring, paraphrase, other = curves.lines
    assert list(unseen.get_ydata()) == [2.61, 2.56, 2.85] and list(paraphrase.get_ydata()) == [2.3, 1.9, 1.45]
    assert (unseen.get_linestyle(), paraphrase.get_linestyle()) == ("-", "-.")
    assert (unseen.get_color(), paraphrase.get_color()) == (style.VALIDATION, style.PARAPHRASE)
    assert [list(zip(*line.get_data(), strict=True)) for line in (ring, other)] == [[(60, 2.56)], [(60, 1.9)]]
    assert ring.get_markerfacecolor() == "none" and "ringed: 60, which was kept" in curves.get_xlabel()
    assert words(curves)[1:] == ["validation,\nparaphrased", "validation,\nunseen"]


def test_losses_stand_at_their_steps_and_fill_the_panel():
    curves, _ = run_figure(run_metrics()).axes
    every, smooth, validation, paraphrase = curves.lines
    assert list(every.get_xdata()) == list(range(1, 121)) and every.get_ydata()[0] == pytest.approx(3.5)
    first = np.mean(run_metrics()["train_loss"][:9])
    assert (smooth.get_xdata()[0], smooth.get_ydata()[0]) == (5, pytest.approx(first))
    assert list(validation.get_xdata()) == [30, 60, 90, 120] and validation.get_color() == style.VALIDATION
    assert list(paraphrase.get_xdata()) == [0, 120] and list(paraphrase.get_ydata()) == [3.616, 1.327]
    low, high = curves.get_ylim()
    assert 0.9 < low < 1.3 and 3.6 < high < 3.9


def test_steps_are_whole_numbers():
    curves, _ = run_figure(run_metrics(steps=2, validation=[])).axes
    assert all(float(tick).is_integer() for tick in curves.get_xticks())


def test_held_out_records_are_called_validation():
    curves, _ = run_figure(run_metrics()).axes
    names = ["training,\nmean of 9 steps", "paraphrased,\nbefore and after", "validation,\nunseen"]
    assert words(curves) == names and curves.get_xlabel() == "step"
    assert curves.get_ylabel() == "cross-entropy (nats per token)"
    preferences = run_figure(run_metrics() | {"options": {"method": "lora", "loss": "dpo"}})
    assert preferences.axes[0].get_ylabel() == "DPO's loss (per pair)"
    for steps, mean in ((120, 9), (3000, 30)):
        (name,) = words(run_figure(run_metrics(steps=steps, validation=[], paraphrase=False)).axes[0])
        assert name == f"training,\nmean of {mean} steps"


def test_costs_are_those_of_the_page_and_bars_are_as_long_as_their_share():
    _, bars = run_figure(run_metrics()).axes
    assert words(bars) == [
        "trainable parameters",
        "134.5 M, full",
        "2.4 M, LoRA (1.8 % of all)",
        "memory in training, predicted",
        "2,462 MB, full",
        "1,079 MB, LoRA (43.8 % of full)",
        "disk per adapter",
        "538 MB, full",
        "9.8 MB, LoRA (1.8 % of full)",
    ]
    drawn = [(to_hex(bar.get_facecolor()), bar.get_width()) for bar in bars.patches]
    assert [color for color, _ in drawn] == [style.FULL.lower(), style.LORA.lower()] * 3
    widths = [100, 100 * 2_442_240 / 134_515_008, 100, 100 * 1079 / 2462, 100, 100 * 2_442_240 / 134_515_008]
    assert [width for _, width in drawn] == pytest.approx(widths)


def test_few_parameters_are_written_in_full():
    run = run_metrics() | {"trainable_parameters": 73_728, "total_parameters": 1_066_368}
    assert "73,728, LoRA (6.9 % of all)" in words(run_figure(run).axes[1])


def test_full_fine_tuning_has_its_own_colour_and_is_compared_with_nothing():
    assert {line.get_color() for line in run_figure(run_metrics(method="full")).axes[0].lines[:2]} == {style.FULL}
    costs = words(run_figure(run_metrics(method="full")).axes[1])
    assert costs[1::2] == ["134.5 M, full", "2,462 MB, full", "538 MB, full"]


# -- LoRA compared with full fine-tuning -------------------------------------------------------------------------------


def compared(lora=None, full=None, **change):
    found = result(lora, full, **change)
    return found | {"rows": [row.to_json() for row in rows(found)]}


SHORT = metrics(losses=(3.0,), steps=1, seconds=0.2)
SLOW = metrics(seconds=9.0, seconds_per_step=9.0)  # three times as slow as full fine-tuning


COMPARISONS = {
    "one step": compared(SHORT, metrics("full", (2.9,), 1, 0.4)),
    "slower": compared(SLOW),
    "alike": compared(metrics(), metrics()),
}


def test_validation_stands_over_the_time_of_training_and_the_best_is_ringed():
    curves, _ = compare_figure(compared()).axes
    lora, ring, full, full_ring = curves.lines
    assert list(lora.get_xdata()) == [0.5, 1.0, 1.5] and list(lora.get_ydata()) == [3.2, 2.9, 3.0]
    assert list(full.get_xdata()) == pytest.approx([20 * 2.8 / 60, 40 * 2.8 / 60, 2.8])
    assert (lora.get_color(), full.get_color()) == (style.LORA, style.FULL)
    assert (list(ring.get_xdata()), list(full_ring.get_ydata())) == ([1.0], [2.8])
    assert curves.get_xlabel() == "minutes of training"
    assert compare_figure(compared(SHORT, SHORT)).axes[0].get_xlabel() == "seconds of training"


def test_bars_are_lora_s_share_and_carry_the_numbers_of_the_table():
    _, bars = compare_figure(compared()).axes
    names = [label.get_text() for label in bars.get_yticklabels()]
    widths = dict(zip(names, (bar.get_width() for bar in bars.patches), strict=True))
    assert widths["trainable parameters"] == pytest.approx(100 * 2_442_240 / 134_515_008)
    assert widths["time of a step"] == pytest.approx(100 * 1.5 / 2.8)
    assert "1.8 %: 2,442,240 of 134,515,008" in [text.get_text() for text in bars.texts]
    assert "54 %: 1.50 s of 2.80 s" in [text.get_text() for text in bars.texts]
    assert list(bars.lines[0].get_xdata()) == [100, 100] and bars.lines[0].get_color() == style.FULL


def test_where_the_system_tells_no_peak_there_is_no_bar():
    _, bars = compare_figure(compared(peak_bytes={"lora": None, "full": None})).axes
    assert "peak memory, measured" not in [label.get_text() for label in bars.get_yticklabels()]


# -- adapters on data sets ---------------------------------------------------------------------------------------------


def interval(value, half):
    return {"value": value, "low": value - half, "high": value + half}


def matrix(adapters=("legal", "support"), data=("legal", "support", "general"), recall=True):
    """Every adapter is 2 nats and 30 points better on its own data, and a little worse on all others."""
    sets = {}
    for name in data:
        for kind in ("all",) if name == "general" else ("paraphrase", "unseen"):
            sets[name if kind == "all" else f"{name}/{kind}"] = {"data": name, "kind": kind}
    scores = {}
    for name, about in sets.items():
        scores[name] = {}
        for adapter in ("base", *adapters):
            own = adapter == about["data"]
            loss = 3.5 if adapter == "base" else 1.5 if own else 3.75
            scores[name][adapter] = {"loss": interval(loss, 0.1)}
            if recall:
                scores[name][adapter]["keyword_recall"] = interval(0.1 + 0.3 * own, 0.05)
    return {"adapters": {name: {"trained_on": name} for name in adapters}, "sets": sets, "scores": scores}


FOUR = ("legal", "medical", "support", "finance")


MATRICES = {
    "loss alone": matrix(recall=False),
    "one": matrix(("legal",), ("legal",)),
    "base alone": matrix((), ("general",)),
    "long names": matrix(("an-adapter-with-a-long-name", *FOUR), ("questions-of-customers", "general")),
}


def test_no_change_has_the_colour_of_the_page():
    with theme("dark"):
        base = panel(matrix_figure(matrix()), "Loss").images[0].to_rgba(0)
    assert max(base[:3]) < 0.1


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
    axes = panel(matrix_figure(matrix()), "Loss")
    cells = contents(axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["base", "legal", "support"]
    assert axes.get_xticklabels()[2].get_text() == "support\nparaphrased"
    assert cells[2, 2] == "1.50 1.40 to 1.60" and cells[2, 1] == "3.75 3.65 to 3.85" and len(cells) == 15
    recall = panel(matrix_figure(matrix()), "Keyword")
    assert contents(recall)[0, 1] == "40 35 to 45"
    worst, *_, best = (label.get_text() for label in recall.figure.axes[-1].get_yticklabels())
    assert worst[0] == "-" and best[0] == "+" and worst[1:] == best[1:]


@pytest.mark.parametrize("title", ["Loss", "Keyword"])
def test_better_than_the_base_is_blue_and_worse_is_orange_in_both_panels(title):
    measured = matrix()
    measured["scores"]["general"]["legal"]["keyword_recall"] = interval(0.02, 0.01)
    image = panel(matrix_figure(measured), title).images[0]
    assert image.norm.vmax == -image.norm.vmin == np.abs(image.get_array()).max()  # the largest change, up or down
    colors = image.cmap(image.norm(image.get_array()))
    better, same, worse = colors[1, 0], colors[0, 0], colors[1, 4]

    def nearest(color):
        return min((style.BLUE, style.ORANGE), key=lambda name: np.linalg.norm(color[:3] - to_rgb(name)))

    assert (nearest(better), nearest(worse)) == (style.BLUE, style.ORANGE) and min(same) > 0.98


def test_a_frame_marks_the_data_that_an_adapter_was_trained_on():
    axes = panel(matrix_figure(matrix()), "Loss")
    framed = {(round(p.get_x() + 0.48), round(p.get_y() + 0.48)) for p in axes.patches if isinstance(p, Rectangle)}
    assert framed == {(0, 1), (1, 1), (2, 2), (3, 2)}


def test_what_is_not_finite_or_was_not_measured_is_a_dash():
    measured = matrix()
    measured["scores"]["general"]["legal"]["loss"] = {"value": None, "low": None, "high": None}
    measured["scores"]["general"]["support"]["loss"] = {"value": 2.0, "low": None, "high": None}
    figure = matrix_figure(measured)
    cells = contents(panel(figure, "Loss"))
    assert cells[4, 1] == "-" and cells[4, 2] == "2.00" and problems(figure) == []


# -- all of them -------------------------------------------------------------------------------------------------------


ALL = {
    "run": lambda: run_figure(run_metrics() | VALIDATED),
    "matrix": lambda: matrix_figure(matrix()),
    "compare": lambda: compare_figure(compared()),
}


KINDS = {run_figure: RUNS, compare_figure: COMPARISONS, matrix_figure: MATRICES}


@pytest.mark.long
@pytest.mark.parametrize(("draw", "name"), [(draw, name) for draw, kinds in KINDS.items() for name in kinds])
def test_a_figure_of_any_kind_can_be_read(draw, name):
    assert problems(draw(KINDS[draw][name])) == []


@pytest.mark.long
@pytest.mark.parametrize("draw", ALL.values(), ids=ALL)
def test_on_a_dark_page_no_letter_is_too_dark(draw):
    with theme("dark"):
        figure = draw()
        assert problems(figure) == []
        letters = {to_hex(text.get_color()) for text in figure.findobj(Text) if text.get_text()}
        assert letters == {ink(color) for color in letters}


def test_a_full_disk_costs_no_picture_that_is_there(tmp_path, monkeypatch):
    figure, path = run_figure(run_metrics()), tmp_path / "picture.png"
    path.write_bytes(b"old")

    def half(to, **settings):
        to.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", half)
    with pytest.raises(OSError, match=r"picture\.png: the disk is full"):
        save(figure, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_picture_that_cannot_be_written_is_refused_before_it_is_drawn(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    refused = (("x.pdf", "a .png or an .svg"), ("file/x.png", "no picture can be"), ("folder.png", "no picture"))
    for path, words in refused:
        with pytest.raises(ValueError, match=words):
            save_themes(None, tmp_path / path)
    check_picture(tmp_path / "new" / "deep" / "x.SVG")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "file", "folder.png", "new"]

    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"x\.png: no picture can be written there \(Permission denied\)"):
        save_themes(None, tmp_path / "x.png")
