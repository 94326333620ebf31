"""Context parallelism: threads that share one sequence compute what one thread computes, and none waits forever."""

import threading
import weakref
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.engine import parallel
from minilora.engine.attention import attention
from minilora.engine.context_parallel import gathered, shards
from minilora.engine.tensor import Tensor


@st.composite
def divisions(draw):
    """A number of threads, and of tokens that suffices for two parts of each."""
    count = draw(st.integers(2, 5))
    return count, draw(st.integers(2 * count, 60))


def in_threads(found, task):
    """task(shard) for each of the shards, in threads of their own."""
    results, errors = {}, []

    def work(shard):
        try:
            results[shard.number] = task(shard)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(shard,)) for shard in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not errors and len(results) == len(found)
    return [results[shard.number] for shard in found]


@pytest.mark.long
@given(divisions())
def test_every_token_is_in_one_shard_at_its_position_and_all_put_together_are_the_sequence(division):
    count, tokens = division
    found, x = shards(tokens, count), np.arange(2 * tokens).reshape(1, tokens, 2)
    own = [shard.own(x) for shard in found]
    assert sorted(n for shard in found for n in shard.positions()) == list(range(tokens))
    for shard, part in zip(found, own, strict=True):
        assert part[0, :, 0].tolist() == [2 * n for n in shard.positions()]
        assert np.array_equal(shard.in_order(own), x)


@given(st.integers(2, 8), st.integers(64, 300))
def test_all_shards_have_the_same_work_although_a_late_token_sees_more(count, least):
    tokens = count * least
    seen = [sum(n + 1 for n in shard.positions()) for shard in shards(tokens, count)]
    assert max(seen) < 1.05 * min(seen)


@given(divisions(), st.integers(1, 9), st.sampled_from([None, 1, 3, 11]), st.integers(0, 99))
def test_attention_over_shards_is_attention_over_the_sequence(division, block, window, seed):
    (count, T), rng = division, np.random.default_rng(seed)
    q, k, v, g = (rng.standard_normal((1, T, heads, 4)) for heads in (4, 2, 2, 4))

    def run(shard=None):
        x = [Tensor(a if shard is None else shard.own(a), requires_grad=True) for a in (q, k, v)]
        keys = x[1:] if shard is None else [gathered(a, shard=shard) for a in x[1:]]
        y = attention(x[0], *keys, packing=shard, block=block, window=window)
        y.backward(g if shard is None else shard.own(g))
        return [y.data, *(a.grad for a in x)]

    found = shards(T, count)
    parts = zip(*in_threads(found, run), strict=True)
    for part, expected in zip(parts, run(), strict=True):
        np.testing.assert_allclose(found[0].in_order(list(part)), expected, rtol=1e-10, atol=1e-12)


def test_gathered_keys_are_one_array_for_all_threads(rng):
    found, x = shards(12, 3), rng.standard_normal((1, 12, 2, 4))
    arrays = in_threads(found, lambda shard: gathered(Tensor(shard.own(x)), shard=shard).data)
    assert all(array is arrays[0] for array in arrays) and np.array_equal(arrays[0], x)
    kept = weakref.ref(arrays[0])
    del arrays
    assert kept() is None  # nothing but the threads holds it


def test_gradients_are_added_in_the_order_of_the_threads():
    found = shards(8, 3)
    factors = [1e16, -1e16, 1.0]  # their sum depends on the order: it is 1, and 0 from the last one to the first

    def gradient(shard):
        x = Tensor(shard.own(np.zeros((1, 8, 1, 1))), requires_grad=True)
        (gathered(x, shard=shard) * factors[shard.number]).sum().backward()
        return x.grad

    for grad in in_threads(found, gradient):
        assert (grad == 1.0).all()


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("backward", [False, True])
def test_the_error_of_one_thread_ends_all_and_is_the_one_that_is_raised(number, backward):
    found = shards(12, 3)

    def fails(g):
        raise MemoryError("no room")

    def loss(shard):
        x = Tensor(np.ones((1, 4, 1, 1)), requires_grad=True)
        if shard.number == number and not backward:
            fails(x)
        y = gathered(x, shard=shard).sum()
        if shard.number == number:
            y.node.edges = [(parent, fails, shape) for parent, _, shape in y.node.edges]
        return y

    def release():
        found[0].exchange.barrier.abort()

    with pytest.raises(MemoryError, match="no room"):
        parallel.values_and_gradients([partial(loss, shard) for shard in found], [1.0] * 3, 3, release)
