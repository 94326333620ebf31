"""Samples are drawn in batches, epoch after epoch."""

from itertools import islice

import pytest
from smallmodels import random_samples

from minilora.data.samples import epochs
from minilora.engine.fused import NOT_SCORED
from minilora.nn.parts import Sample


def sample(*ids, unscored):
    return Sample(ids, (*[NOT_SCORED] * unscored, *ids[unscored:]))


@pytest.mark.parametrize("batch_size", [1, 3, 5, 20])
def test_every_epoch_has_every_sample_once(batch_size):
    samples = [sample(0, n, n, unscored=2) for n in range(1, 11)]  # the scored token tells which sample it is
    per_epoch = -(-len(samples) // batch_size)
    batches = epochs(samples, batch_size, seed=3)
    orders = []
    for _ in range(3):
        orders.append([s.labels[-1] for batch in islice(batches, per_epoch) for s in batch])
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


def test_the_order_of_an_epoch_depends_on_the_seed_alone(rng):
    samples = random_samples(rng, range(4, 24))

    def order(seed):
        return list(islice(epochs(samples, 4, seed), 12))

    assert order(1) == order(1)
    assert order(1) != order(2)
