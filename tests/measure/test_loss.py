"""The loss of a set: what is counted, what is weighed, which records are measured."""

from dataclasses import replace

import numpy as np
import pytest
from hearing import counts_of
from jobs import asked
from smallmodels import lora_config, random_samples, shaken

import minilora as ml
from minilora.data.records import Record
from minilora.measure import loss
from minilora.measure.loss import evenly, held_out, mean_loss, sample_losses, scored_tokens
from minilora.nn.llama import Llama
from minilora.nn.parts import Sample, common_prefix
from minilora.nn.step import losses_without_grad


def test_the_mean_loss_does_not_depend_on_how_samples_are_batched(tiny_model, rng):
    samples = random_samples(rng, (5, 20, 9, 9, 31, 12, 7))
    expected = mean_loss(tiny_model, samples, batch_size=1)
    for batch_size in (2, 3, 7, 16):
        assert mean_loss(tiny_model, samples, batch_size) == pytest.approx(expected, rel=2e-6)
    assert mean_loss(tiny_model, samples[::-1]) == pytest.approx(expected, rel=2e-6)
    unscored = Sample((5, 6, 7), (-100, -100, -100))
    assert mean_loss(tiny_model, [unscored, *samples], batch_size=1) == pytest.approx(expected, rel=2e-6)
    with pytest.raises(ValueError, match="no token is scored"):
        mean_loss(tiny_model, [unscored])


def test_the_loss_of_each_record_is_its_own_though_they_are_computed_together(talker, tokenizer):
    records = [
        Record(q, (*asked(q), {"role": "assistant", "content": q * 9})) for q in ("hello", "What?", "x", "is it")
    ]
    samples = ml.encode_records(records, tokenizer)
    assert common_prefix(samples) > 5
    expected = [mean_loss(talker, [sample]) for sample in samples]
    assert losses_without_grad(talker, samples) == pytest.approx(expected, rel=2e-6)
    assert losses_without_grad(talker, samples[:1]) == pytest.approx(expected[:1], rel=2e-6)


def test_the_loss_of_each_sample_with_a_head_of_its_own_that_has_an_adapter(tiny_config, rng):
    model = Llama(replace(tiny_config, tie_word_embeddings=False), rng)
    ml.add_adapter(model, lora_config(target_modules=["lm_head"]))
    shaken(model)
    samples = random_samples(rng, (9, 14, 11))
    expected = [mean_loss(model, [sample]) for sample in samples]
    assert losses_without_grad(model, samples) == pytest.approx(expected, rel=2e-6)


def test_evaluating_nothing_and_what_is_no_sample_is_an_error(tiny_model):
    with pytest.raises(ValueError, match="no samples"):
        mean_loss(tiny_model, [])
    with pytest.raises(TypeError, match="expected samples, got a Record: call encode_records"):
        mean_loss(tiny_model, [Record("a", text="b")])
    with pytest.raises(TypeError, match="expected a list of samples, got a ndarray"):
        mean_loss(tiny_model, np.ones((2, 3), int))


def test_samples_are_scored_sixteen_at_a_time_the_short_ones_first_and_leave_no_gradient(tiny_model, rng, monkeypatch):
    lengths, compute = [], loss.loss_without_grad
    monkeypatch.setattr(
        loss, "loss_without_grad", lambda m, batch: lengths.extend(len(one.ids) for one in batch) or compute(m, batch)
    )
    with counts_of("record") as heard:
        mean_loss(tiny_model, random_samples(rng, [9, 5, 7] * 11 + [6, 8]))
    assert heard == [16, 16, 3] and all(p.grad is None for _, p in tiny_model.named_parameters())
    assert lengths == sorted(lengths)  # little padding


def test_losses_of_records_add_up_to_the_mean_loss_of_the_set(tiny_model, rng):
    samples = random_samples(rng, 2 * (5, 20, 9, 9, 31, 12, 7, 8, 14, 11))
    with counts_of("record") as heard:
        nats = sample_losses(tiny_model, samples)
    assert heard == [16, 4] and nats.shape == (20,)
    assert nats.sum() / scored_tokens(samples).sum() == pytest.approx(mean_loss(tiny_model, samples), rel=2e-6)


def test_held_out_is_what_was_asked_in_other_words_and_what_was_never_trained():
    said = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    train = [Record(str(i), said, paraphrase=f"p{i}" if i % 2 else None, reworded=f"r{i}") for i in range(12)]
    sets = held_out({"train": train, "test": [Record("t", said)]}, 3)
    assert [record.prompt[-1]["content"] for record in sets["paraphrase"]] == ["p1", "p5", "p9"]
    assert [record.prompt[-1]["content"] for record in sets["reworded"]] == ["r0", "r4", "r8"]
    assert [record.id for record in sets["unseen"]] == ["t"]


@pytest.mark.parametrize(("most", "expected"), [(None, 7), (7, 7), (100, 7), (6, 4), (3, 3), (1, 1)])
def test_evenly_chosen_are_at_most_so_many(most, expected):
    chosen = evenly(range(7), most)
    assert len(chosen) == expected and len(set(np.diff(chosen))) <= 1 and evenly([], most) == []
