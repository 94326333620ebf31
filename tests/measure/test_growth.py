"""tests/benchmarks/growth.py counts every product, and predicts what a step holds."""

from dataclasses import replace

import pytest
from benchmarks import growth
from figure_check import problems

from minilora.measure.predict import Step, predict_memory

SMALL = growth.Point(length=8, batch=2, rank=2, width=64)


def test_multiplications_are_those_of_every_product_forward_and_backward():
    blocks, tokens = 4, 16
    matrices = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 192 * 64  # q, o; k, v; gate, up, down
    thin = 2 * (2 * 128 + 2 * 96 + 3 * 256)  # A and B of rank 2
    frozen = 2 * (blocks * matrices + 1024 * 64)  # y and dx, of the head as well
    attention = 7 * blocks * 64 * 8 / 2
    assert growth.multiplications(SMALL) == tokens * (frozen + 3 * blocks * thin + attention)
    assert growth.multiplications(replace(SMALL, batch=4, adapters=4)) == 2 * growth.multiplications(SMALL)


def test_the_prediction_is_that_of_a_step_and_of_the_adapters_that_are_not_active():
    step = predict_memory(Step.of(SMALL.config(), SMALL.batch_of_ids(), rank=SMALL.rank))
    assert growth.predicted_bytes(SMALL) == step.total
    assert growth.predicted_bytes(replace(SMALL, adapters=3)) == step.total + 2 * step.adapter


@pytest.mark.long
def test_what_is_measured_is_drawn_with_its_prediction(tmp_path):
    sweeps = {"adapters": growth.Sweep("adapters", (1, 3))}
    paths = list(growth.draw_growth(tmp_path, SMALL, sweeps))
    assert [path.name for path in paths] == ["growth-adapters.png", "growth-adapters-dark.png"]
    assert all(getattr(growth.START, name) in sweep.values for name, sweep in growth.SWEEPS.items())
    one, three = growth.measure([SMALL, replace(SMALL, adapters=3)], rounds=1)
    added = growth.predicted_bytes(replace(SMALL, adapters=3)) - growth.predicted_bytes(SMALL)
    assert added <= three.peak_bytes - one.peak_bytes < 2 * added  # and what Python needs for an adapter


@pytest.mark.long
@pytest.mark.parametrize("name", growth.SWEEPS)
def test_pictures_of_growth_can_be_read(name):
    sweep = growth.SWEEPS[name]
    points = [replace(growth.START, **{name: value}, bf16=bf16) for bf16 in (False, True) for value in sweep.values]
    seconds = {p: 0.1 + growth.multiplications(p) / (2e10 if p.bf16 else 1e10) for p in points}
    found = {p: growth.Cost(seconds[p], growth.predicted_bytes(p)) for p in points}
    figure = growth._drawn(sweep, growth.START, found)
    assert problems(figure) == []
    at = sweep.values.index(getattr(growth.START, name))
    for predicted, measured in (figure.axes[0].lines[:2], figure.axes[0].lines[2:]):
        assert predicted.get_ydata()[at] == pytest.approx(measured.get_ydata()[at])  # where the speed is taken from


@pytest.mark.long
def test_many_adapters_on_one_base_hold_what_is_predicted():
    one, four = growth.measure_many("tiny", (1, 4))
    assert four.predicted_bytes > one.predicted_bytes and one.seconds > 0
    for found in (one, four):
        assert found.held_bytes == pytest.approx(found.predicted_bytes, rel=0.2)
    assert problems(growth._drawn_many({"tiny": [one, four]})) == []
