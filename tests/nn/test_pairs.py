"""DPO: the loss of pairs is that of equation 7, whole, in micro-batches and on several threads."""

from dataclasses import replace

import numpy as np
import pytest
from smallmodels import as_float64

from minilora.engine.tensor import no_grad
from minilora.lora.adapters import add_adapter, disable_adapter
from minilora.lora.config import LoraConfig
from minilora.measure.loss import mean_loss
from minilora.measure.preferences import log_ratios, preferences, with_reference
from minilora.nn import step
from minilora.nn.llama import Llama
from minilora.nn.optim import SGD
from minilora.nn.parts import LEAST, Pair, Sample, divided_samples, micro_batches, pack, packed_length
from minilora.nn.step import training_step


def sample(rng, asked, answered):
    ids = (1, 2, 3, 4, *rng.integers(5, 60, asked + answered).tolist())
    return Sample(ids, (*[-100] * (4 + asked), *ids[4 + asked :]))


@pytest.fixture
def pairs(rng):
    """Pairs of several lengths, each with another reference and beta. Both answers of the last have the same prompt."""
    sizes = [(3, 20, 25), (30, 12, 5), (8, 40, 31), (2, 1, 9), (17, 26, 26)]
    both = [(sample(rng, a, c), sample(rng, a, r)) for a, c, r in sizes]
    long = sample(rng, LEAST + 1, 15)
    ids = (*long.ids[:-15], *rng.integers(5, 60, 20).tolist())
    both.append((long, Sample(ids, (*[-100] * (len(ids) - 20), *ids[-20:]))))
    return [Pair(*each, reference=rng.normal(), beta=rng.uniform(0.1, 0.9)) for each in both]


def adapted(config, **settings):
    model = as_float64(Llama(config, 0))
    add_adapter(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **settings), "own", seed=1)
    return as_float64(model)


def log_p(model, one):
    """log π(answer), from the logits of the whole sequence: no packing, no fused loss."""
    with no_grad():
        logits = model(np.array([one.ids])).data[0]
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(logits[i - 1, token] for i, token in enumerate(one.labels) if token != -100)


def by_hand(model, pairs):
    margins = [p.beta * (log_p(model, p.chosen) - log_p(model, p.rejected) - p.reference) for p in pairs]
    return np.mean([np.log1p(np.exp(-margin)) for margin in margins])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("at_once", [None, 1, 3])
def test_loss_and_gradient_are_those_of_equation_7(tiny_config, pairs, rng, monkeypatch, threads, at_once):
    monkeypatch.setattr(step, "cores", lambda: threads)
    model = adapted(replace(tiny_config, vocab_size=64))
    parameters = model.trainable_parameters()
    loss, _ = training_step(model, SGD(parameters, lr=0.0), pairs, at_once=at_once)
    assert loss == pytest.approx(by_hand(model, pairs), rel=1e-9)
    direction = {name: rng.standard_normal(p.shape) for name, p in parameters.items()}
    slope, eps = sum((p.grad * direction[name]).sum() for name, p in parameters.items()), 1e-6
    ends = []
    for sign in (1, -1):
        for name, p in parameters.items():
            p.data += sign * eps * direction[name]
        ends.append(by_hand(model, pairs))
        for name, p in parameters.items():
            p.data -= sign * eps * direction[name]
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * eps), rel=1e-5)


def test_each_pair_has_the_same_weight_in_a_mean_however_long_it_is(tiny_config, pairs):
    model = adapted(replace(tiny_config, vocab_size=64))
    assert mean_loss(model, pairs, batch_size=2) == pytest.approx(by_hand(model, pairs), rel=1e-9)
    assert mean_loss(model, pairs) == pytest.approx(np.mean([by_hand(model, [pair]) for pair in pairs]), rel=1e-9)


def test_a_packed_row_of_pairs_holds_both_answers_of_each(pairs):
    row = pack(pairs)
    assert row.input_ids.size == packed_length(pairs)
    scored = sum(label != -100 for pair in pairs for label in pair.labels)
    assert row.scored == scored == sum(pair.scored for pair in pairs) and row.weight == len(pairs)


def test_micro_batches_hold_each_pair_whole_and_have_about_as_many_tokens(rng):
    pairs = [Pair(sample(rng, 60, 20), sample(rng, 60, n)) for n in (20, 160, 20, 160)]
    for batch in (pairs, pack(pairs)):
        found = micro_batches(batch, 2)
        assert len(found) > 1 and sorted(p.rejected.scored for each in found for p in each.pairs) == [20, 20, 160, 160]
    prefix = tuple(range(80))  # held once in a row, so it counts for neither answer of a pair

    def begun(own):
        return Sample((*prefix, *[7] * own), (*[-100] * 81, *[7] * (own - 1)))

    parts = divided_samples([Pair(begun(100), begun(100)), *[Pair(begun(5), begun(5))] * 9], 2)
    assert sorted(map(len, parts)) == [1, 9]


def test_pairs_without_a_reference_are_not_trained_and_not_measured(tiny_config, pairs):
    model = adapted(replace(tiny_config, vocab_size=64))
    without = [pairs[0], replace(pairs[1], reference=None)]
    assert repr(without[1]).endswith(f"reference none, beta {pairs[1].beta:g})")
    for measure in (mean_loss, preferences):
        with pytest.raises(ValueError, match="a pair has no reference: call with_reference"):
            measure(model, without)


def test_the_reference_is_the_model_before_training_and_its_loss_is_log_2(tiny_config, pairs):
    model = adapted(replace(tiny_config, vocab_size=64))
    ratios = [log_p(model, pair.chosen) - log_p(model, pair.rejected) for pair in pairs]
    np.testing.assert_allclose(log_ratios(model, pairs), ratios, rtol=1e-9)
    referred = with_reference(model, pairs)
    assert [pair.beta for pair in referred] == [pair.beta for pair in pairs]
    assert mean_loss(model, referred) == pytest.approx(np.log(2), rel=1e-9)
    assert preferences(model, referred)["margin"] == pytest.approx(0, abs=1e-9)
    with disable_adapter(model):
        assert not np.allclose(log_ratios(model, pairs), ratios)


@pytest.mark.parametrize("beta", [0, -0.1, float("nan"), float("inf"), "0.1", None, True])
def test_a_beta_that_is_no_number_above_zero_is_refused(pairs, beta):
    with pytest.raises(ValueError, match=rf"^beta must be a number above 0, got {beta!r}$"):
        replace(pairs[0], beta=beta)


def test_the_page_of_preferences_counts_pairs_and_shifts(tiny_config, pairs):
    model = adapted(replace(tiny_config, vocab_size=64))
    ratios = log_ratios(model, pairs)
    shifts = np.where(ratios > 0, [-1, -2, -3, -4, -5, -6], [1, 2, 3, 4, 5, 6])  # away from what is preferred
    shifted = [replace(p, reference=r - d, beta=0.5) for p, r, d in zip(pairs, ratios, shifts, strict=True)]
    found = preferences(model, shifted)
    assert found["loss"] == pytest.approx(mean_loss(model, shifted), rel=1e-9)
    assert 0 < found["chosen"] == np.mean(ratios > 0) != found["accuracy"] == np.mean(shifts > 0)
    assert found["margin"] == pytest.approx(0.5 * shifts.mean())
