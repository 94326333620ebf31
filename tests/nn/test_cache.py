"""The KV cache: rows leave it, join it, and are moved; each continues as if it were alone."""

from dataclasses import replace

import numpy as np
import pytest
from smallmodels import new_model

from minilora.engine.tensor import no_grad
from minilora.nn.cache import STEP, rows_at_once
from minilora.nn.gemma3 import Gemma3, Gemma3Config
from minilora.nn.gpt2 import GPT2, GPT2Config

TEXT = np.arange(40) * 11 % 61


@pytest.fixture
def model(tiny_config):
    return new_model(tiny_config)


def read(model, *rows, capacity=24):
    """A cache that holds these rows of tokens, padded on the left to one length."""
    longest = max(map(len, rows))
    padding = np.array([longest - len(row) for row in rows])
    cache = model.new_cache(len(rows), capacity, padding)
    with no_grad():
        model(np.array([[0] * (longest - len(row)) + list(row) for row in rows]), cache)
    return cache


def assert_continues(model, cache, *rows):
    """The cache's next logits of every row are those of the whole row alone."""
    with no_grad():
        step = model(np.array([[row[-1]] for row in rows]), cache).data[:, 0]
        alone = [model(np.array([row])).data[0, -1] for row in rows]
    np.testing.assert_allclose(step, alone, rtol=1e-4, atol=1e-4)
    assert len(step) == len(rows) == cache.batch


def test_rows_that_join_are_what_they_are_alone_and_so_are_those_that_were_there(model):
    cases = [((3,), (5,)), ((5,), (3,)), ((4,), (4,)), ((6, 2), (4,)), ((2,), (3, 7)), ((3, 1), (5, 4, 2))]
    for here, there in cases:
        rows = [TEXT[i : i + n + 1] for i, n in enumerate((*here, *there))]
        cache = read(model, *(row[:-1] for row in rows[: len(here)]))
        cache.join(read(model, *(row[:-1] for row in rows[len(here) :])), room=20)
        assert cache.length == max(*here, *there)
        assert_continues(model, cache, *rows)


def test_a_cache_without_padding_has_none_noted(model):
    cache = read(model, TEXT[:4])
    cache.join(read(model, TEXT[4:8]), room=20)
    assert cache.first is None


def test_a_row_grows_up_to_what_the_model_can_see_wherever_its_padding_ends(tiny_config):
    model = new_model(replace(tiny_config, max_position_embeddings=8))
    cache, shared = read(model, TEXT[:6], TEXT[6:9]), read(model, TEXT[:3])
    for grown in (cache, after(model, shared, TEXT[3:6], TEXT[:1])):
        step = np.ones((2, 1), int)
        grown.reserve(2, room=12)
        with no_grad():
            model(step, grown), model(step, grown)  # the first row has 8 tokens, the second one less
            with pytest.raises(ValueError, match="9 tokens are more than the 8 the model can see"):
                model(step, grown)
            grown.keep([1])
            assert model(step[:1], grown).shape == (1, 1, 64) and grown.longest < 8 < grown.before + grown.length
        grown.keep([])
        assert grown.longest == grown.before + grown.length  # of no row, the tokens that each would have


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2])
def test_tokens_for_another_number_of_rows_are_refused(model, rows, tokens):
    cache = read(model, TEXT[:4], TEXT[1:5])
    with no_grad(), pytest.raises(ValueError, match=f"has 2 rows, input_ids have {rows}: make a new_cache"):
        model(np.ones((rows, tokens), int), cache)


@pytest.mark.parametrize("alive", [[0, 1, 2, 3], [0, 3, 2], [3], [3, 1], [1, 0], [3, 2, 1, 0], [2, 0]], ids=str)
def test_rows_are_kept_in_the_order_asked_for(model, alive):
    rows = [TEXT[i : i + n] for i, n in enumerate((4, 8, 3, 6))]
    cache = read(model, *(row[:-1] for row in rows))
    cache.keep(alive)
    assert_continues(model, cache, *(rows[row] for row in alive))


def test_filling_a_gap_moves_one_row_and_takes_no_memory(model):
    cache = read(model, TEXT[:4], TEXT[1:5], TEXT[2:6])
    keys, second = cache.keys[0], cache.keys[0][1].copy()
    cache.keep([2, 1])
    assert cache.keys[0] is keys and np.array_equal(keys[1], second)


@pytest.mark.parametrize("left", [1, 2])
def test_a_row_joins_where_another_has_left_although_that_was_nan(model, left):
    rows = [TEXT[i : i + n] for i, n in enumerate((4, 8, 3, 6))]
    others = [i for i in range(3) if i != left]
    cache = read(model, *(row[:-1] for row in rows[:3]), capacity=STEP)
    keys = cache.keys[0]
    for array in (*cache.keys, *cache.values):
        array[left] = np.nan
    cache.keep(others)
    cache.join(read(model, rows[3][:-1]), room=STEP)
    assert cache.keys[0] is keys
    assert_continues(model, cache, *(rows[i] for i in others), rows[3])


def test_padding_that_all_rows_have_is_given_back(model):
    rows = [TEXT[:9], TEXT[1:5], TEXT[2:8]]
    cache = read(model, *(row[:-1] for row in rows))
    cache.keep([1, 2])
    cache.trim()
    assert cache.length == 5 and cache.first.tolist() == [2, 0]
    assert_continues(model, cache, *rows[1:])
    cache.keep([1])
    cache.trim()
    assert cache.first is None or not cache.first.any()
    alone = read(model, TEXT[:9][:-1], TEXT[1:5][:-1])
    alone.keep([1])
    alone.trim()
    assert alone.length == 3 and alone.first is None
    assert_continues(model, alone, TEXT[1:5])


def test_room_is_made_for_the_longest_and_never_taken_from_others(model):
    cache = read(model, TEXT[:4], capacity=5)
    cache.join(read(model, TEXT[3:5]), room=100)
    assert cache.capacity >= 100
    before = cache.capacity
    cache.join(read(model, TEXT[3:5]), room=10)
    assert cache.capacity == before
    with pytest.raises(ValueError, match="room for 2 tokens cannot hold a row of 4"):
        cache.join(read(model, TEXT[3:5]), room=2)
    with pytest.raises(ValueError, match="the cache has room for 5 tokens, got 7"):
        read(model, TEXT[:7], capacity=5)


def test_rows_double_up_to_the_most_there_will_be_and_an_empty_cache_takes_new_ones(model):
    cache = read(model, TEXT[:4])
    for rows, expected in ((2, 2), (3, 3), (3, 3)):
        cache.join(read(model, TEXT[3:6]), room=20, most=3)
        assert (cache.batch, len(cache.keys[0])) == (rows, expected)
        if cache.batch == 3:
            cache.keep([0, 1])
    unlimited = read(model, TEXT[:4], TEXT[:4])
    unlimited.join(read(model, TEXT[3:6]), room=20)
    assert len(unlimited.keys[0]) == 4
    cache = read(model, TEXT[:4], TEXT[:2])
    cache.keep([])
    cache.trim()
    cache.join(read(model, TEXT[3:6]), room=20)
    assert_continues(model, cache, TEXT[3:7])


def after(model, one, *rows):
    """A cache that holds these rows, padded on the left, after those of the cache `one`, which are held once."""
    longest = max(map(len, rows))
    padding = np.array([longest - len(row) for row in rows])
    cache = model.new_cache(len(rows), longest, padding, one)
    with no_grad():
        model(np.array([[0] * int(n) + list(row) for n, row in zip(padding, rows, strict=True)]), cache)
    return cache


FAMILIES = {
    "llama": lambda config: new_model(config),
    "mistral": lambda config: new_model(replace(config, sliding_window=5)),
    "gpt2": lambda config: GPT2(GPT2Config(64, 6, 2, 2, max_position_embeddings=40), np.random.default_rng(0)),
    "gemma3": lambda config: Gemma3(Gemma3Config(64, 6, 5, 2, 2, 1, 4, 40, sliding_window=4), np.random.default_rng(0)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_after_a_beginning_held_once_are_what_they_are_alone(family, tiny_config):
    model, beginning = FAMILIES[family](tiny_config), TEXT[:9]
    for _, p in model.named_parameters():
        p.data += 0.3 * np.random.default_rng(p.size).standard_normal(p.shape).astype(p.dtype)
    rows = [TEXT[i : i + n] for i, n in enumerate((4, 8, 3, 6, 2))]
    whole, one = [np.concatenate((beginning, row)) for row in rows], read(model, beginning, capacity=12)
    cache = after(model, one, *(row[:-1] for row in rows[:3]))
    assert (cache.length, cache.before, cache.capacity) == (7, 9, 7)
    cache.reserve(3, 12)
    assert_continues(model, cache, *whole[:3])
    joined = after(model, one, *(row[:-1] for row in rows[:3]))
    joined.keep([2, 0])
    joined.join(after(model, one, *(row[:-1] for row in rows[3:])), room=STEP)
    joined.trim()
    assert_continues(model, joined, whole[2], whole[0], *whole[3:])


def test_a_beginning_held_once_leaves_room_for_more_rows_at_a_time(model, monkeypatch):
    one = read(model, TEXT[:20])
    bytes_of = lambda cache: sum(array.nbytes for array in cache._arrays())
    monkeypatch.setattr("minilora.nn.cache.BYTES_AT_ONCE", 3 * bytes_of(model.new_cache(1, 24)))
    assert rows_at_once(model.new_cache(1, 24)) == 3 and rows_at_once(model.new_cache(1, 4, None, one)) == 18
