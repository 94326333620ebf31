"""Answers: those of the plain loop, one by one, in a batch and as a stream; ends, limits, draws and refusals."""

from dataclasses import replace

import numpy as np
import pytest
from jobs import asked
from modelfiles import CONFIG

from minilora.engine.tensor import Tensor
from minilora.train.generate import generate, generate_batch

QUESTIONS = ["hello", "What is a lien?", "x", "Explain, in one short sentence, what a trust is.", "12 times 123?"]


def greedy(model, words, prompt, count):
    """The plain loop: the whole sequence again for every token."""
    ids = words.encode_chat(prompt, answer_next=True)
    start = len(ids)
    for _ in range(count):
        token = int(model(np.array([ids])).data[0, -1].argmax())
        if token == words.eos_id:
            break
        ids.append(token)
    return words.decode(ids[start:]).strip()


def test_answers_are_those_of_computing_the_whole_sequence_for_every_token(talker, words):
    for question in QUESTIONS:
        assert generate(talker, words, question, max_new_tokens=12) == greedy(talker, words, asked(question), 12)


@pytest.mark.parametrize("batch_size", [2, 32])
def test_answers_in_a_batch_are_those_given_one_by_one_and_in_order(talker, words, batch_size):
    together = generate_batch(talker, words, [asked(q) for q in QUESTIONS], 12, batch_size=batch_size)
    assert together == [generate(talker, words, q, 12) for q in QUESTIONS]
    assert len(set(together)) > 1


class Script:
    """Instead of a model: each conversation gets its own sequence of tokens, by the number of rows still alive."""

    def __init__(self, *answers, vocabulary):
        self.config, self.vocabulary = replace(CONFIG, max_position_embeddings=1024), vocabulary
        self.head_weight = Tensor(np.zeros((vocabulary, 4), np.float32))
        self.rows, self.step = list(answers), 0

    def __call__(self, tokens, cache, last):
        self.rows = [row for row in self.rows if self.step == 0 or row[self.step - 1 : self.step] != [2]]
        assert len(tokens) == len(self.rows)  # finished rows are not computed any more
        chosen = [row[self.step] for row in self.rows]
        self.step += 1
        return Tensor(np.eye(self.vocabulary, dtype=np.float32)[chosen][:, None])


def test_an_answer_ends_at_its_end_mark_and_the_others_go_on(words):
    assert words.eos_id == 2
    first, second = words.encode("ab"), words.encode("xyz12")
    model = Script([*first, 2], [*second, 2], vocabulary=len(words))
    assert generate_batch(model, words, [asked("hello"), asked("hello")], 10) == ["ab", "xyz12"]
    assert model.step == len(second) + 1


def test_an_answer_has_no_more_tokens_than_asked_for(words):
    model = Script(words.encode("abcdefgh"), vocabulary=len(words))
    assert generate(model, words, "hello", max_new_tokens=3) == "abc"


def test_a_temperature_draws_by_its_seed(talker, words):
    def answer(seed, temperature=2.0):
        return generate(talker, words, "hello", 12, temperature, seed)

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(5)}) > 1
    assert answer(1, temperature=1e-6) == answer(1, temperature=0.0) == generate(talker, words, "hello", 12)


def test_tokens_are_drawn_as_often_as_the_softmax_says():
    from minilora.train.generate import _choose

    logits, rng = np.log(np.array([0.6, 0.3, 0.1])), np.random.default_rng(0)
    drawn = np.bincount(_choose(np.tile(logits, (20000, 1)), 1.0, rng), minlength=3) / 20000
    assert np.abs(drawn - [0.6, 0.3, 0.1]).max() < 0.015
    flat = np.bincount(_choose(np.tile(logits, (20000, 1)), 2.0, rng), minlength=3) / 20000
    wanted = np.sqrt([0.6, 0.3, 0.1]) / np.sqrt([0.6, 0.3, 0.1]).sum()
    assert np.abs(flat - wanted).max() < 0.015


def test_a_conversation_too_long_for_the_model_is_an_error_before_anything_is_computed(talker, words):
    question = "x" * 1000
    longest = len(words.encode_chat(asked(question), answer_next=True))
    with pytest.raises(ValueError, match=f"{longest} tokens and an answer of 20 are more than the 1024"):
        generate(talker, words, question, max_new_tokens=20)
    assert generate_batch(talker, words, [], 20) == []


# -- an answer as a stream ---------------------------------------------------------------------------------------------


def streamed(ids, words):
    """The pieces of an answer that has these tokens."""
    return list(generate(Script([*ids, words.eos_id], vocabulary=len(words)), words, "hello", 64, stream=True))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_pieces_of_a_stream_are_the_answer(temperature, talker, words):
    for seed, question in enumerate(QUESTIONS):
        pieces = list(generate(talker, words, question, 20, temperature, seed, stream=True))
        assert "".join(pieces) == generate(talker, words, question, 20, temperature, seed)
        assert all(pieces)


def test_a_piece_comes_with_each_token(words):
    assert streamed(words.encode("abc"), words) == ["a", "b", "c"]


def test_a_character_of_several_tokens_comes_when_its_last_one_has(words):
    ids = words.encode("aé漢🙂b")
    assert len(ids) == 1 + 2 + 3 + 4 + 1  # a token per byte
    assert streamed(ids, words) == ["a", "é", "漢", "🙂", "b"]


def test_white_space_comes_with_what_follows_and_not_at_the_ends(words):
    assert streamed(words.encode(" \n a \n b \n "), words) == ["a", " \n b"]
    assert streamed(words.encode("  "), words) == []


def test_bytes_that_are_no_character_are_shown_as_the_whole_answer_shows_them(words):
    ids = [*words.encode("a"), words.encode("é")[0], *words.encode("b"), words.encode("é")[0]]
    whole = generate(Script([*ids, 2], vocabulary=len(words)), words, "hello")
    assert streamed(ids, words) == ["a", "\ufffdb", "\ufffd"] and whole == "a\ufffdb\ufffd"


def test_a_stream_computes_no_further_than_it_is_read(words):
    model = Script(words.encode("abcdef"), vocabulary=len(words))
    pieces = generate(model, words, "hello", stream=True)
    assert model.step == 0 and next(pieces) == "a" and model.step == 1


def test_a_model_can_be_trained_while_its_stream_is_read(talker, words):
    pieces = generate(talker, words, "hello", stream=True)
    next(pieces)
    assert (Tensor(np.ones(2), requires_grad=True) * 2).requires_grad


# -- what is refused ---------------------------------------------------------------------------------------------------

NO_CONVERSATIONS = [
    (["a"], r"message 1 must be a dict with texts \"role\" and \"content\", got 'a'"),
    ([{"from": "human", "value": "hi"}], "message 1 must be a dict"),
    ([*asked("hi"), {"role": "assistant"}], "message 2 must be a dict"),
    ([{"role": "user", "content": None}], "message 1 must be a dict"),
    ({"role": "user", "content": "hi"}, "message 1 must be a dict .* got 'role'"),
]


@pytest.mark.parametrize(("messages", "reason"), NO_CONVERSATIONS)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_no_conversation_is_refused_in_one_line(messages, reason, stream, talker, words):
    with pytest.raises(ValueError, match=reason) as caught:
        generate(talker, words, messages, stream=stream)
    assert "\n" not in str(caught.value)


def test_a_text_alone_is_no_conversation_for_the_tokenizer(words):
    with pytest.raises(ValueError, match=r"expected messages, \[\{.role.: .user., .content.: 'hi'\}\], got 'hi' alone"):
        words.encode_chat("hi")


SETTINGS = [
    ({"temperature": -1}, "temperature must be 0 or a positive number, got -1"),
    ({"temperature": float("nan")}, "temperature must be"),
    ({"temperature": float("inf")}, "temperature must be"),
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ({"seed": -1}, "seed must be at least 0, got -1"),
]


@pytest.mark.parametrize(("settings", "reason"), SETTINGS)
@pytest.mark.parametrize("stream", [False, True])
def test_settings_that_mean_nothing_are_refused_at_once(settings, reason, stream, talker, words):
    with pytest.raises(ValueError, match=reason):
        generate(talker, words, "hello", stream=stream, **settings)


def test_the_longest_conversation_that_fits_is_answered(words):
    model = Script(words.encode("a"), vocabulary=len(words))
    length = len(words.encode_chat(asked("hello"), answer_next=True))
    model.rows = [[*words.encode("a"), words.eos_id]]
    assert generate(model, words, "hello", max_new_tokens=1024 - length) == "a"
    with pytest.raises(ValueError, match=f"{length} tokens and an answer of {1025 - length} are more than the 1024"):
        generate(model, words, "hello", max_new_tokens=1025 - length)
