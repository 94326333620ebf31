"""A mixed batch: every row is what it is alone, whatever adapter or mix it has. tests/generate has rows that leave."""

import numpy as np
import pytest
from smallmodels import MIX, as_float64, chosen, logits, lora_config, shaken

import minilora as ml
from minilora.lora.adapters import is_merged, lora_modules

ROWS = np.array([[1, 2, 3, 4], [9, 8, 7, 6], [5, 5, 6, 1]])
QUERY = "model.layers.0.self_attn.q_proj"


def test_rows_of_a_mixed_batch_can_be_mixes_and_another_choice(model):
    names = ["legal", {"legal": 0.5, "support": -0.25}, {}]
    with ml.mixed_batch(model, [None]) as rows:
        rows.choose(names)
        together = model(ROWS).data
        with pytest.raises(ValueError, match="no adapter called 'nobody'"):
            rows.choose([{"legal": 0.5, "nobody": 0.5}])
        assert np.array_equal(model(ROWS).data, together)
        rows.keep(np.array([2, 1]))
        np.testing.assert_allclose(model(ROWS[[2, 1]]).data, together[[2, 1]], atol=1e-5)
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
    for net, name in ((model, "legal"), (kinds, "dora")):
        with (
            ml.mixed_batch(net, [name] * rows),
            pytest.raises(ValueError, match=f"for {rows} rows, and the batch has 3"),
        ):
            net(ROWS)


def test_each_row_of_a_mixed_batch_of_every_kind_is_what_it_is_alone(kinds):
    names = [*MIX, None, MIX]
    ids = np.arange(len(names) * 5).reshape(len(names), 5) * 11 % 64
    alone = np.concatenate([chosen(kinds, name, ids[i : i + 1]) for i, name in enumerate(names)])
    ml.set_adapter(kinds, "dora")
    with ml.mixed_batch(kinds, names):
        np.testing.assert_allclose(logits(kinds, ids), alone, rtol=1e-9, atol=1e-11)
        assert all(module.rows_differ for module in lora_modules(kinds).values())
    np.testing.assert_array_equal(logits(kinds, ids), chosen(kinds, "dora", ids))


@pytest.mark.parametrize("active", [None, "plain", {"plain": 0.5, "some": 1.0}], ids=str)
def test_adapters_that_were_made_trainable_by_hand_are_trained_in_one_mixed_batch_after_another(kinds, active):
    names = ["plain", "dora", "pissa"]
    ml.set_adapter(kinds, active)
    for name, parameter in kinds.named_parameters():
        parameter.requires_grad = any(f".adapters.{one}." in name for one in names)
    trained = kinds.trainable_parameters()
    for _ in range(2):
        ml.SGD(trained, lr=0.1).zero_grad()
        with ml.mixed_batch(kinds, [*names, None]) as rows:
            rows.choose([*names, "some"])
            kinds.loss(ROWS[[0, 1, 2, 0]], ROWS[[0, 1, 2, 0]]).backward()
        assert kinds.trainable_parameters().keys() == trained.keys()
        assert all(p.grad is not None and p.grad.any() for p in trained.values())


class Layer(ml.Module):
    """A linear layer, of which an adapter needs a module around it."""

    def __init__(self, bias):
        self.linear = ml.Linear(6, 5, bias=bias, rng=np.random.default_rng(0))

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("shape", [(), (3,), (3, 2), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "names", [["plain", {"plain": 0.5, "other": 0.5}, None, "other"], ["plain", "dora", "pissa"]], ids=str
)
def test_the_rows_of_an_input_of_any_number_of_axes_are_what_they_are_alone(rng, shape, bias, names):
    model = as_float64(Layer(bias))
    kinds = {"plain": {}, "other": {}, "dora": {"use_dora": True}}
    for seed, (name, settings) in enumerate({**kinds, "pissa": {"init_lora_weights": "pissa"}}.items()):
        ml.add_adapter(model, lora_config(**settings), name)
        shaken(model, name, seed)
    x = rng.standard_normal((len(names), *shape, 6))
    alone = []
    for row, name in zip(x, names, strict=True):
        ml.set_adapter(model, name)
        alone.append(model(ml.Tensor(row[None])).data[0])
    with ml.mixed_batch(model, names):
        np.testing.assert_allclose(model(ml.Tensor(x)).data, alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "one_update", [lambda m: ml.merge_adapter(m), lambda m: ml.delta_weight(m, QUERY)], ids=["merge", "delta_weight"]
)
def test_a_mixed_batch_has_no_one_update(model, one_update):
    with ml.mixed_batch(model, ["legal", "support"]), pytest.raises(ValueError, match="mixed batch"):
        one_update(model)
    assert not is_merged(model)
