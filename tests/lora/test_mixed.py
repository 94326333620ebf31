"""A mixed batch: every row is what it is alone, whatever adapter or mix it has, also when others leave."""

import numpy as np
import pytest
from smallmodels import MIX, chosen, logits

import minilora as ml
from minilora.engine.tensor import no_grad
from minilora.lora.adapters import is_merged, lora_modules

ROWS = np.array([[1, 2, 3, 4], [9, 8, 7, 6], [5, 5, 6, 1]])
QUERY = "model.layers.0.self_attn.q_proj"


def test_each_row_of_a_mixed_batch_is_what_it_is_alone(model):
    names = ["support", None, "legal"]
    alone = [chosen(model, name, ROWS[i : i + 1])[0] for i, name in enumerate(names)]
    ml.set_adapter(model, "legal")
    with ml.mixed_batch(model, names):
        together = model(ROWS).data
        assert all(module.rows_differ for module in lora_modules(model).values())
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)
    np.testing.assert_array_equal(model(ROWS).data, chosen(model, "legal", ROWS))


def test_rows_of_a_mixed_batch_can_be_mixes_and_another_choice(model):
    names = ["legal", {"legal": 0.5, "support": 0.25}, {}]
    with ml.mixed_batch(model, [None]) as rows:
        rows.choose(names)
        together = model(ROWS).data
        with pytest.raises(ValueError, match="no adapter called 'nobody'"):
            rows.choose([{"legal": 0.5, "nobody": 0.5}])
        assert np.array_equal(model(ROWS).data, together)
    alone = [chosen(model, name, ROWS[i : i + 1])[0] for i, name in enumerate(names)]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)


@pytest.mark.parametrize("mix", [{"legal": 0.0, "support": 1.0}, {"legal": 0.0}], ids=str)
def test_an_adapter_of_which_no_row_has_anything_is_none(model, mix):
    names = [mix, None, mix]
    alone = [chosen(model, name, ROWS[i : i + 1])[0] for i, name in enumerate(names)]
    with ml.mixed_batch(model, names):
        np.testing.assert_allclose(model(ROWS).data, np.stack(alone), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_mixed_batch_of_another_number_of_rows_is_refused(model, kinds, rows):
    for net, name in ((model, "legal"), (kinds, "words"), (kinds, "dora")):  # of which some adapt the embedding
        with (
            ml.mixed_batch(net, [name] * rows),
            pytest.raises(ValueError, match=f"for {rows} rows, and the batch has 3"),
        ):
            net(ROWS)


def test_a_mixed_batch_of_an_unknown_adapter_is_refused(model):
    with pytest.raises(ValueError, match="nobody"), ml.mixed_batch(model, ["nobody"]):
        pass


def test_each_row_of_a_mixed_batch_of_every_kind_is_what_it_is_alone(kinds):
    names = [*MIX, None, MIX]
    ids = np.arange(7 * 5).reshape(7, 5) * 11 % 64
    alone = np.concatenate([chosen(kinds, name, ids[i : i + 1]) for i, name in enumerate(names)])
    with ml.mixed_batch(kinds, names):
        np.testing.assert_allclose(logits(kinds, ids), alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "one_update", [lambda m: ml.merge_adapter(m), lambda m: ml.delta_weight(m, QUERY)], ids=["merge", "delta_weight"]
)
def test_a_mixed_batch_has_no_one_update(model, one_update):
    with ml.mixed_batch(model, ["legal", "support"]), pytest.raises(ValueError, match="mixed batch"):
        one_update(model)
    assert not is_merged(model)


def test_rows_can_leave_a_mixed_batch_as_in_generation(model):
    names, ids = ["support", None, "legal"], ROWS
    steps = [[0, 1, 2], [0, 2], [2]]  # which rows are there in each step

    def next_tokens(names, ids):
        """Greedy answers, one row at a time, without a cache."""
        answers = []
        for name, row in zip(names, ids, strict=True):
            for _ in steps:
                row = np.append(row, chosen(model, name, row[None])[0, -1].argmax())
            answers.append(row[len(ids[0]) :])
        return answers

    expected = next_tokens(names, ids)
    cache, tokens, present = model.new_cache(3, 10), ids, [0, 1, 2]
    with no_grad(), ml.mixed_batch(model, names) as rows:
        for i, stay in enumerate(steps):
            if stay != present:
                kept = np.array([present.index(row) for row in stay])
                cache.keep(kept)
                rows.keep(kept)
                tokens, present = tokens[kept], stay
            tokens = model(tokens, cache, last=True).data[:, -1].argmax(axis=-1)[:, None]
            assert [int(token) for token in tokens[:, 0]] == [int(expected[row][i]) for row in stay]
    assert [adapter.factor for adapter in model.adapters.values()] == [1.0, None]
