"""Loss and keyword recall: what is counted, what is weighed, what is asked."""

from dataclasses import replace

import numpy as np
import pytest
from jobs import asked
from smallmodels import lora_config, random_samples, shaken

import minilora as ml
from minilora.data.records import Record
from minilora.generate.answers import generate
from minilora.measure.loss import answer_all, contains, evenly, held_out, keyword_recall, mean_loss, recalls
from minilora.nn.llama import Llama
from minilora.nn.parts import common_prefix
from minilora.nn.step import losses_without_grad


def test_the_mean_loss_does_not_depend_on_how_samples_are_batched(tiny_model, rng):
    samples = random_samples(rng, (5, 20, 9, 9, 31, 12, 7))
    expected = mean_loss(tiny_model, samples, batch_size=1)
    for batch_size in (2, 3, 7, 16):
        assert mean_loss(tiny_model, samples, batch_size) == pytest.approx(expected, rel=2e-6)
    assert mean_loss(tiny_model, samples[::-1]) == pytest.approx(expected, rel=2e-6)


def test_the_mean_loss_weighs_tokens_not_samples(tiny_model, rng):
    short, long = random_samples(rng, (4, 60))
    alone = [mean_loss(tiny_model, [s]) for s in (short, long)]
    expected = np.average(alone, weights=[short.scored, long.scored])
    assert mean_loss(tiny_model, [short, long]) == pytest.approx(expected, rel=2e-6)


def test_the_loss_of_each_sample_is_its_own_in_the_order_of_the_samples(tiny_model, rng):
    samples = random_samples(rng, (5, 20, 9, 31, 12))
    found = losses_without_grad(tiny_model, samples)
    assert found == pytest.approx([mean_loss(tiny_model, [sample]) for sample in samples], rel=2e-6)
    weights = [sample.scored for sample in samples]
    assert np.average(found, weights=weights) == pytest.approx(mean_loss(tiny_model, samples), rel=2e-6)
    assert all(p.grad is None for _, p in tiny_model.named_parameters())


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


def test_evaluating_tells_progress_and_leaves_no_gradient(tiny_model, rng):
    heard = []
    mean_loss(tiny_model, random_samples(rng), batch_size=4, done=heard.append)
    assert heard == [4, 2]
    assert all(p.grad is None for _, p in tiny_model.named_parameters())


def test_evaluating_nothing_is_an_error(tiny_model):
    with pytest.raises(ValueError, match="no samples"):
        mean_loss(tiny_model, [])


WORDS = [  # text, word, is it there
    ("An enforceable promise.", "promise", True),
    ("PROMISE", "promise", True),
    ("a promise", "Promise", True),
    ("promised", "promise", False),
    ("compromise", "promise", False),
    ("promise_keeper", "promise", False),
    ("(promise)", "promise", True),
    ("good-faith", "faith", True),
    ("in good faith", "good faith", True),
    ("a.c", "a.c", True),
    ("abc", "a.c", False),
    ("", "promise", False),
]


@pytest.mark.parametrize(("text", "word", "there"), WORDS)
def test_a_keyword_counts_as_a_whole_word_in_any_case(text, word, there):
    assert contains(text, word) is there


def test_keyword_recall_is_the_mean_share_over_records_that_have_keywords():
    records = [Record("a", keywords=("one", "two")), Record("b"), Record("c", keywords=("three", "four", "five"))]
    assert keyword_recall(["One, and ones.", "two", "three four five"], records) == pytest.approx((1 / 2 + 1) / 2)


def test_keyword_recall_without_keywords_or_with_a_missing_answer_is_an_error():
    with pytest.raises(ValueError, match="no record has keywords"):
        keyword_recall(["x"], [Record("a")])
    with pytest.raises(ValueError):
        keyword_recall(["x"], [Record("a", keywords=("x",))] * 2)


QUESTIONS = ["hello", "What is a lien?", "x"]


def test_answer_all_asks_the_records_questions_and_tells_progress(talker, tokenizer):
    records, heard = [Record(q, (*asked(q), {"role": "assistant", "content": "-"})) for q in QUESTIONS], []
    assert answer_all(talker, tokenizer, records, 6, done=heard.append) == [
        generate(talker, tokenizer, q, 6) for q in QUESTIONS
    ]
    assert sum(heard) == len(QUESTIONS)


def test_a_record_of_several_turns_is_asked_with_all_of_them_before_the_last_answer(talker, tokenizer):
    turns = [*asked("hello"), {"role": "assistant", "content": "Hi."}, *asked("x")]
    record = Record("talk", (*turns, {"role": "assistant", "content": "-"}))
    (answer,) = answer_all(talker, tokenizer, [record], 8)
    assert answer == generate(talker, tokenizer, turns, 8) != generate(talker, tokenizer, turns[:1], 8)


def test_a_measured_answer_has_at_most_64_tokens(talker, tokenizer):
    question = next(q for q in QUESTIONS if len(tokenizer.encode(generate(talker, tokenizer, q, 80))) > 64)
    record = Record("x", (*asked(question), {"role": "assistant", "content": "-"}))
    assert answer_all(talker, tokenizer, [record]) == [generate(talker, tokenizer, question, 64)]


def test_samples_are_scored_sixteen_at_a_time(tiny_model, rng):
    heard = []
    mean_loss(tiny_model, random_samples(rng, [5] * 35), done=heard.append)
    assert heard == [16, 16, 3]


def test_recall_of_each_record_is_its_own():
    records = [Record("a", keywords=("one", "two")), Record("b"), Record("c", keywords=("three",))]
    assert recalls(["One, and ones.", "two", "three"], records) == pytest.approx([1 / 2, np.nan, 1], nan_ok=True)
    with pytest.raises(ValueError):
        recalls(["x"], records)


def test_held_out_is_what_was_asked_in_other_words_and_what_was_never_trained():
    said = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    train = [Record(str(i), said, paraphrase=f"p{i}" if i % 2 else None) for i in range(12)]
    sets = held_out({"train": train, "test": [Record("t", said)]}, 3)
    assert [record.prompt[-1]["content"] for record in sets["paraphrase"]] == ["p1", "p5", "p9"]
    assert [record.id for record in sets["unseen"]] == ["t"]


@pytest.mark.parametrize(("most", "expected"), [(None, 7), (7, 7), (100, 7), (6, 4), (3, 3), (1, 1)])
def test_evenly_chosen_are_at_most_so_many(most, expected):
    chosen = evenly(range(7), most)
    assert len(chosen) == expected and len(set(np.diff(chosen))) <= 1 and evenly([], most) == []
