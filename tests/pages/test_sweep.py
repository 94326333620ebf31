"""The picture of a sweep: it can be read, has a panel for what was varied, and shows the numbers of the table."""

import numpy as np
import pytest
from figure_check import problems, spans

from minilora.pages.rates import SHOWN
from minilora.pages.style import FULL, LORA, theme
from minilora.pages.sweep import sweep_figure


def row(loss, method="lora", r=8, lr=1e-3, targets="all-linear", half=0.05, parameters=None):
    count = parameters or (500_000 if method == "full" else 2_000 * r)
    interval = {"mean": loss, "low": loss - half, "high": loss + half, "n": 3}
    told = {"method": method, "loss": "sft", "r": r if method == "lora" else None, "lr": lr, "target_modules": targets}
    return told | {"validation_loss": interval, "trainable_parameters": count}


RANKS = [
    row(3 - 0.1 * i - 0.2 * j, r=r, lr=lr) for i, r in enumerate((1, 4, 16, 64)) for j, lr in enumerate((1e-3, 1e-2))
]
BOTH = [*RANKS, row(2.5, "full", half=0.1), row(2.9, "full", lr=1e-2)]
GROUPS = [
    row(2.5 - 0.1 * i - 0.1 * j, r=r, targets=name, parameters=1000 * r * (i + 1))
    for i, name in enumerate(("qv", "attention", "mlp", "q_proj,o_proj"))
    for j, r in enumerate((1, 8))
]


def drawn(rows):
    return sweep_figure({"settings": rows})


@pytest.mark.long
@pytest.mark.parametrize(("rows", "ground"), [(RANKS, "light"), (BOTH, "light"), (GROUPS, "light"), (BOTH, "dark")])
def test_any_sweep_can_be_read(rows, ground):
    with theme(ground):
        assert problems(drawn(rows)) == []


def test_what_was_not_varied_has_no_panel():
    def titles(rows):
        return [axes.get_xlabel() for axes in drawn(rows).axes]

    assert {axes.get_ylabel() for axes in drawn(BOTH).axes} == {"validation loss (nats per token)"}
    assert drawn([each | {"loss": "dpo"} for each in RANKS]).axes[0].get_ylabel() == "validation loss (DPO's, per pair)"
    assert titles(BOTH) == ["learning rate", "rank r", "trainable parameters"]
    assert titles([row(2.0), row(1.9, lr=1e-2)]) == ["learning rate"]
    assert titles([row(2.0), row(1.9, "full")]) == ["trainable parameters"]
    assert drawn([each | {"varied": {"data": "legal"}} for each in RANKS]) is None  # other records, another loss
    assert drawn([row(2.0)]) is None and drawn([row(2.0) | {"validation_loss": None}]) is None


def test_a_line_shows_the_best_of_what_it_does_not_tell_apart():
    rates, ranks, sizes = drawn(BOTH).axes
    assert [list(line.get_ydata()) for line in rates.lines][1] == pytest.approx([2.9, 2.7])
    assert list(ranks.lines[0].get_xdata()) == [1, 4, 16, 64]
    assert list(ranks.lines[0].get_ydata()) == pytest.approx([2.8, 2.7, 2.6, 2.5])
    assert ranks.lines[1].get_ydata()[0] == 2.5 and ranks.lines[1].get_color() == FULL
    assert list(sizes.lines[0].get_xdata()) == [2000, 8000, 32000, 128000] and sizes.lines[0].get_color() == LORA


def test_every_interval_is_drawn():
    best = [each for each in BOTH if each["lr"] == (1e-2 if each["method"] == "lora" else 1e-3)]
    for axes, rows in zip(drawn(BOTH).axes, (BOTH, best, best), strict=True):
        ends = [[each["validation_loss"][end] for end in ("low", "high")] for each in rows]
        assert {tuple(np.round(pair, 6)) for pair in ends} <= spans(axes, 1)
        assert axes.get_ylim()[0] < np.min(ends) < np.max(ends) < axes.get_ylim()[1]


def test_a_learning_rate_at_which_training_diverges_does_not_flatten_the_curve():
    rates = drawn([*RANKS, row(60.0, r=1, lr=1.0), row(80.0, r=4, lr=1.0)]).axes[0]
    low, high = rates.get_ylim()
    assert 2.0 < low < 2.5 and 3.0 < high < 4.0  # losses from 2.5 to 3.0, and at most one nat more


@pytest.mark.parametrize(("decades", "ticks"), [(3, 7), (4, 5)])
def test_the_names_of_learning_rates_are_apart_over_any_number_of_decades(decades, ticks):
    figure = drawn([row(3 - 0.01 * k, lr=float(f"{10 ** (k / 2 - 5):.3g}")) for k in range(2 * decades + 1)])
    axes = figure.axes[0]
    shown = [x for x in axes.get_xticks() if axes.get_xlim()[0] <= x <= axes.get_xlim()[1]]
    assert problems(figure) == [] and len(shown) == ticks


def test_the_best_loss_is_shown_however_wide_its_interval_over_two_seeds():
    best = row(1.1, half=2.0)
    best["validation_loss"]["low"] = 0.0  # as `Interval.within` cuts it
    low, high = drawn([best, row(1.3, lr=1e-2), row(60.0, lr=1.0)]).axes[0].get_ylim()
    assert low < 0 and 1.3 < high < 1.1 + 2 * SHOWN
