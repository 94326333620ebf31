"""Intervals over seeds and over records: compared with tables, formulas, known coverage, and what pairing must do."""

import math

import numpy as np
import pytest

from minilora.measure.statistics import RESAMPLES, Interval, Resampled, student


def resampled(*amounts, weights=None, seed=0):
    table = np.array(amounts, float)
    return Resampled(table, np.ones(table.shape[1]) if weights is None else np.array(weights, float), seed)


def test_the_interval_of_a_ratio_is_that_of_the_delta_method(rng):
    tokens = rng.integers(5, 40, 1000)
    nats = 2 * tokens + rng.normal(scale=9, size=1000)
    found, ratio = resampled(nats, weights=tokens).mean(0), nats.sum() / tokens.sum()
    assert found.mean == pytest.approx(ratio)
    half = 1.96 * (nats - ratio * tokens).std() / tokens.mean() / math.sqrt(1000)
    assert (found.low, found.high) == pytest.approx((ratio - half, ratio + half), abs=0.06 * half)


def test_a_paired_difference_is_narrower_than_one_of_records_that_have_nothing_in_common(rng):
    hard = rng.normal(size=80)
    one, other = hard + rng.normal(scale=0.1, size=80), hard + 0.5 + rng.normal(scale=0.1, size=80)
    paired = resampled(one, other).difference(0, 1)
    unpaired = resampled(one, rng.permutation(other)).difference(0, 1)
    assert paired.mean == pytest.approx(unpaired.mean) == pytest.approx(np.mean(one - other))
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 4
    half = 1.96 * (one - other).std() / math.sqrt(80)
    assert (paired.low, paired.high) == pytest.approx((paired.mean - half, paired.mean + half), abs=0.15 * half)


def test_the_seed_alone_decides_the_draws_whatever_version_is_next_to_it(rng):
    x = rng.random(30)
    assert resampled(x).mean(0) == resampled(x).mean(0) != resampled(x, seed=1).mean(0)
    own, beside = resampled(x).mean(0), resampled(rng.random(30), x).mean(1)
    assert (beside.low, beside.mean, beside.high) == pytest.approx((own.low, own.mean, own.high), rel=1e-12)


def test_as_many_draws_are_made_however_many_are_held_at_a_time(monkeypatch, rng):
    monkeypatch.setattr("minilora.measure.statistics._AT_ONCE", 70)
    found = resampled(rng.random(30))
    assert found.draws.shape == (RESAMPLES, 1) and np.isfinite(found.draws).all() and len(set(found.draws[:, 0])) > 1900


def test_one_record_has_no_interval():
    found = resampled([2.0], [3.0]).difference(0, 1)
    assert found.mean == -1 and math.isnan(found.low) and math.isnan(found.high)
    assert resampled([2.0, 4.0]).mean(0) == Interval(3.0, 2.0, 4.0, 2)


def test_an_interval_goes_through_a_function_that_rises():
    assert Interval(1, 0, 2, 5).map(math.exp) == Interval(math.e, 1, math.exp(2), 5)


# -- Student's ---------------------------------------------------------------------------------------------------------

# From NIST/SEMATECH, e-Handbook of Statistical Methods, 1.3.6.7.2 (two-sided); the last is of the normal distribution.
TABLES = {
    0.95: {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 10: 2.228, 29: 2.045, 10_000: 1.960},
    0.99: {1: 63.657, 2: 9.925, 3: 5.841, 10: 3.169},
}


@pytest.mark.parametrize("share", TABLES)
def test_students_t_is_that_of_the_tables(share):
    table = TABLES[share]
    assert [student(freedom, share) for freedom in table] == pytest.approx([*table.values()], abs=6e-4)


@pytest.mark.parametrize("given", [(0, 0.95), (2, 0), (2, 1)])
def test_what_has_no_t_is_refused(given):
    with pytest.raises(ValueError, match="at least 1"):
        student(*given)


def test_an_interval_by_hand():
    found = Interval.of([1, 2, 3, 4])  # deviation √(5/3), t 3.182, n 4
    assert (found.mean, found.n) == (2.5, 4)
    assert found.high - 2.5 == pytest.approx(3.1824 * math.sqrt(5 / 3) / 2, abs=1e-3)
    assert 2.5 - found.low == pytest.approx(found.high - 2.5)
    assert Interval.of([2]) == Interval(2, 2, 2, 1)
    assert Interval.of([2, 2, 2]) == Interval(2, 2, 2, 3)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_no_interval_without_finite_numbers(values):
    with pytest.raises(ValueError, match="finite"):
        Interval.of(values)
