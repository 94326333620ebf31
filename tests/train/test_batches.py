"""Samples are drawn in batches, epoch after epoch."""

from itertools import groupby, islice

import numpy as np
import pytest
from smallmodels import random_samples

from minilora.data.samples import epochs, steps_per_epoch
from minilora.engine.fused import NOT_SCORED
from minilora.nn.parts import Sample


def sample(*ids, unscored):
    return Sample(ids, (*[NOT_SCORED] * unscored, *ids[unscored:]))


@pytest.mark.parametrize("batch_size", [1, 3, 5, 20])
def test_every_epoch_has_every_sample_once(batch_size):
    samples = [sample(0, n, n, unscored=2) for n in range(1, 11)]  # the scored token tells which sample it is
    batches = epochs(samples, batch_size, seed=3)
    orders = []
    for _ in range(3):
        orders.append([s.labels[-1] for batch in islice(batches, steps_per_epoch(samples, batch_size)) for s in batch])
    assert all(sorted(order) == list(range(1, 11)) for order in orders)
    assert orders[0] != orders[1]


def test_every_epoch_asks_in_other_words_until_all_were_taken():
    samples = [
        Sample((1, n, 0), (NOT_SCORED, NOT_SCORED, n), tuple(sample(0, n, m, unscored=2) for m in (10 + n, 20 + n)))
        for n in range(1, 6)
    ]
    batches = epochs(samples, 5, seed=0)
    seen = [{s.ids: s.labels[-1] for s in next(batches)}.values() for _ in range(4)]
    by_record = [{word % 10: word // 10 for word in words} for words in seen]  # record -> which of its three wordings
    assert all(set(turn) == {1, 2, 3, 4, 5} for turn in by_record)
    for n in range(1, 6):
        turns = [turn[n] for turn in by_record]
        assert sorted(turns[:3]) == [0, 1, 2] and turns[3] == turns[0]
    assert len(set(by_record[0].values())) == 3  # in one epoch, all kinds of questions are asked


@pytest.mark.parametrize(("batch_size", "runs"), [(1, 12), (5, 6), (8, 3), (24, 1)])
def test_samples_that_begin_with_the_same_document_follow_one_another_up_to_half_a_batch(batch_size, runs):
    owners = [0] * 12 + [1] * 3 + list(range(10, 29))  # documents; the last ones have one sample each
    samples = [sample(*[owner] * 80, n, n, unscored=81) for n, owner in enumerate(owners)]
    batches, found = epochs(samples, batch_size, seed=3), []
    for _ in range(9):
        order = [s.labels[-1] for batch in islice(batches, steps_per_epoch(samples, batch_size)) for s in batch]
        assert sorted(order) == list(range(len(samples)))
        in_turn = [owner for owner, _ in groupby(owners[n] for n in order)]
        found.append(in_turn.count(0))
        assert batch_size < 8 or in_turn.count(1) == 1
    assert (runs if batch_size > 1 else 5) <= max(found) <= runs  # fewer where two runs meet by chance
    alone = [sample(n, n, n, unscored=2) for n in range(len(samples))]  # without documents the order is the generator's
    first = islice(epochs(alone, batch_size, 3), steps_per_epoch(alone, batch_size))
    assert [s.labels[-1] for batch in first for s in batch] == np.random.default_rng(3).permutation(len(alone)).tolist()


def test_the_order_of_an_epoch_depends_on_the_seed_alone(rng):
    samples = random_samples(rng, range(4, 24))

    def order(seed):
        return list(islice(epochs(samples, 4, seed), 12))

    assert order(1) == order(1)
    assert order(1) != order(2)
