"""Pairs to memorise, and the bits that are stored of them, where both are known by hand."""

import numpy as np
import pytest

from minilora.experiments.recall import RESERVED, bits_stored, random_pairs


def test_keys_are_different_and_keys_and_values_share_no_token():
    keys, values = random_pairs(40, 40, 8, 60, seed=0)
    assert len(set(keys.tolist())) == len(values) == 40 and len(set(values.tolist())) <= 8
    assert not set(keys.tolist()) & set(values.tolist())
    assert min(*keys, *values) >= RESERVED and max(*keys, *values) < 60
    again, other = random_pairs(40, 40, 8, 60, seed=0), random_pairs(40, 40, 8, 60, seed=1)
    assert np.array_equal(keys, again[0]) and np.array_equal(values, again[1])
    assert not np.array_equal(keys, other[0]) and not np.array_equal(values, other[1])
    assert len(set(random_pairs(200, 200, 8, 300, seed=0)[1].tolist())) == 8  # every value is drawn


@pytest.mark.parametrize("sizes", [(0, 4, 4, 60), (5, 4, 4, 60), (4, 4, 4, 10)])
def test_too_few_keys_or_tokens_are_refused(sizes):
    with pytest.raises(ValueError, match="expected 1 to 4 pairs"):
        random_pairs(*sizes, seed=0)


def test_bits_by_hand():
    answers, sure = np.array([1, 2, 2, 0]), np.full((4, 4), -60.0)
    sure[np.arange(4), answers] = 60
    assert bits_stored(sure, answers, 4) == (pytest.approx(8), 8)
    assert bits_stored(np.zeros((4, 4)), answers, 4)[0] == pytest.approx(0, abs=1e-9)
    halves = np.where((np.arange(4) == answers[:, None]) | (np.arange(4) == 3), 0.0, -60)  # 1 bit of 2 is known
    assert bits_stored(halves, answers, 4)[0] == pytest.approx(4)
    assert bits_stored(-sure, answers, 4)[0] == 0  # what is wrong stores nothing
