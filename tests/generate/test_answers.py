"""Answers: those of the plain loop, one by one, in a batch and as a stream; ends, limits, draws and refusals."""

from dataclasses import replace

import numpy as np
import pytest
from jobs import asked
from modelfiles import CONFIG

from minilora.engine.tensor import Tensor
from minilora.generate import answers, streams
from minilora.generate.answers import generate, generate_batch
from minilora.generate.streams import draw
from minilora.nn import cache
from minilora.nn.llama import Llama
from minilora.nn.parts import same_beginning
from minilora.progress import progress

QUESTIONS = ["hello", "What is a lien?", "x", "Explain, in one short sentence, what a trust is.", "12 times 123?"]


def greedy(model, tokenizer, prompt, count):
    """The plain loop: the whole sequence again for every token."""
    ids = tokenizer.encode_chat(prompt, answer_next=True)
    start = len(ids)
    for _ in range(count):
        token = int(model(np.array([ids])).data[0, -1].argmax())
        if token == tokenizer.eos_id:
            return tokenizer.decode(ids[start:]).strip()
        ids.append(token)
    return tokenizer.decode(ids[start:]).rstrip("\ufffd").strip()  # cut, maybe within a character


def test_answers_are_those_of_computing_the_whole_sequence_for_every_token(talker, tokenizer):
    for question in QUESTIONS:
        assert generate(talker, tokenizer, question, max_new_tokens=12) == greedy(
            talker, tokenizer, asked(question), 12
        )


@pytest.mark.parametrize(("batch_size", "temperature"), [(2, 1.5), (32, 0.0)])
def test_answers_in_a_batch_are_those_given_one_by_one_and_in_order(talker, tokenizer, batch_size, temperature):
    together = generate_batch(talker, tokenizer, [asked(q) for q in QUESTIONS], 12, temperature, 3, batch_size)
    assert together == [generate(talker, tokenizer, q, 12, temperature, 3) for q in QUESTIONS]
    assert len(set(together)) > 1


@pytest.mark.parametrize(("room_for", "at_once"), [(2, 2), (0.5, 1)])
def test_a_batch_whose_cache_would_be_too_large_is_computed_in_parts(room_for, at_once, talker, tokenizer, monkeypatch):
    talks, rows = [asked(q * 3) for q in QUESTIONS], []
    whole = generate_batch(talker, tokenizer, talks, 12)
    room = max(len(tokenizer.encode_chat(talk, answer_next=True)) for talk in talks) + 11
    of_one_row = sum(array.nbytes for array in talker.new_cache(1, room)._arrays())
    monkeypatch.setattr(cache, "BYTES_AT_ONCE", int(room_for * of_one_row))
    compute = streams.Streams._compute
    monkeypatch.setattr(streams.Streams, "_compute", lambda *a: rows.append(len(a[2])) or compute(*a))
    assert generate_batch(talker, tokenizer, talks, 12) == whole and max(rows) == at_once < len(talks)


def test_progress_counts_answers_as_they_end_and_not_prompts(talker, tokenizer, monkeypatch):
    monkeypatch.setattr(streams, "PREFILL", 10)
    counts = []
    with progress("answers", 2, "answer") as bar:
        bar.update = counts.append
        generate_batch(talker, tokenizer, [asked("x" * 100), asked("y" * 90)], 5)
    assert sum(counts[1:]) == 2 and len(counts) > 20 and not any(counts[:10])


@pytest.mark.parametrize(("shared", "once"), [(16, True), (15, False)])
def test_a_beginning_that_all_prompts_share_is_computed_once(shared, once, talker, tokenizer, monkeypatch):
    talks = [asked("x" * shared + question) for question in ("What is bail?", "Who pays?", "Hm")]
    own = same_beginning([tokenizer.encode_chat(talk, answer_next=True) for talk in talks])
    monkeypatch.setattr(answers, "SHARED", own if once else own + 1)
    longest = max(len(tokenizer.encode_chat(talk, answer_next=True)) for talk in talks)
    monkeypatch.setattr(streams, "PREFILL", 3 * (longest - own * once))
    computed, compute = [], streams.Streams._compute
    monkeypatch.setattr(streams.Streams, "_compute", lambda *a: computed.append(a[2].shape) or compute(*a))
    assert generate_batch(talker, tokenizer, talks, 6) == [generate(talker, tokenizer, talk, 6) for talk in talks]
    assert ((1, own) in computed) == once
    assert (3, longest - own * once) in computed


def test_a_beginning_that_all_prompts_share_is_held_once(talker, tokenizer, monkeypatch):
    talks = [asked("x" * 90 + question) for question in ("What is bail?", "Who pays?", "Hm", "Is it so?", "Why?")]
    prompts = [tokenizer.encode_chat(talk, answer_next=True) for talk in talks]
    own = max(map(len, prompts)) - same_beginning(prompts) + 6
    rows, new_cache, whole = [], talker.new_cache, [generate(talker, tokenizer, talk, 6) for talk in talks]
    monkeypatch.setattr(cache, "BYTES_AT_ONCE", 4 * sum(array.nbytes for array in new_cache(1, own)._arrays()))
    monkeypatch.setattr(talker, "new_cache", lambda *a: rows.append(a[:2]) or new_cache(*a))
    assert generate_batch(talker, tokenizer, talks, 6) == whole
    assert max(rows)[0] == 4 and max(room for count, room in rows if count > 1) < own


class Script(Llama):
    """Instead of a model: each conversation gets its own sequence of tokens, by the number of rows still alive."""

    head_weight = None

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


def test_an_answer_ends_at_its_end_mark_and_the_others_go_on(tokenizer):
    assert tokenizer.eos_id == 2
    first, second = tokenizer.encode("ab"), tokenizer.encode("xyz12")
    model = Script([*first, 2], [*second, 2], vocabulary=len(tokenizer))
    assert generate_batch(model, tokenizer, [asked("hello"), asked("world")], 10) == ["ab", "xyz12"]
    assert model.step == len(second) + 1


def test_an_answer_has_no_more_tokens_than_asked_for_and_a_stream_computes_no_further_than_it_is_read(tokenizer):
    model = Script(tokenizer.encode("abcdefgh"), vocabulary=len(tokenizer))
    pieces = generate(model, tokenizer, "hello", max_new_tokens=3, stream=True)
    assert model.step == 0 and next(pieces) == "a" and model.step == 1
    assert "".join(pieces) == "bc"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature):
    p, rng = np.array([0.6, 0.3, 0.1]), np.random.default_rng(0)
    drawn = np.bincount([draw(np.log(p), temperature, 1.0, rng) for _ in range(8000)], minlength=3) / 8000
    assert np.abs(drawn - p ** (1 / temperature) / (p ** (1 / temperature)).sum()).max() < 0.02


def test_a_conversation_is_answered_if_it_fits_and_refused_before_anything_is_computed_if_not(tokenizer):
    model = Script([*tokenizer.encode("a"), tokenizer.eos_id], vocabulary=len(tokenizer))
    length = len(tokenizer.encode_chat(asked("hello"), answer_next=True))
    with pytest.raises(ValueError, match=f"{length} tokens and an answer of {1025 - length} are more than the 1024"):
        generate(model, tokenizer, "hello", max_new_tokens=1025 - length)
    assert model.step == 0 and generate(model, tokenizer, "hello", max_new_tokens=1024 - length) == "a"
    assert generate_batch(model, tokenizer, [], 20) == []


# -- an answer as a stream ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_pieces_of_a_stream_are_the_answer(temperature, talker, tokenizer):
    for seed, question in enumerate(QUESTIONS):
        pieces = list(generate(talker, tokenizer, question, 20, temperature, seed, stream=True))
        assert "".join(pieces) == generate(talker, tokenizer, question, 20, temperature, seed)
        assert all(pieces)


@pytest.mark.parametrize(
    ("written", "pieces"),
    [
        ("abc", ["a", "b", "c"]),
        ("aé漢🙂b", ["a", "é", "漢", "🙂", "b"]),  # of 1, 2, 3, 4 and 1 tokens
        (" \n a \n b \n ", ["a", " \n b"]),  # white space comes with what follows, and not at the ends
        ("  ", []),
        ("a\udcc3b\udcc3", ["a", "\ufffdb", "\ufffd"]),  # the first half of a character alone
    ],
)
def test_a_piece_comes_as_soon_as_its_text_is_certain(tokenizer, written, pieces):
    half = tokenizer.encode("é")[:1]
    ids = [i for c in written for i in (half if c == "\udcc3" else tokenizer.encode(c))]
    script = lambda: Script([*ids, tokenizer.eos_id], vocabulary=len(tokenizer))
    assert list(generate(script(), tokenizer, "hello", 64, stream=True)) == pieces
    assert generate(script(), tokenizer, "hello", 64) == "".join(pieces)


def test_a_model_can_be_trained_while_its_stream_is_read(talker, tokenizer):
    pieces = generate(talker, tokenizer, "hello", stream=True)
    next(pieces)
    assert (Tensor(np.ones(2), requires_grad=True) * 2).requires_grad


# -- what is refused ---------------------------------------------------------------------------------------------------

NO_CONVERSATIONS = [
    (["a"], r"message 1 must be a dict with texts \"role\" and \"content\", got 'a'"),
    ([{"from": "human", "value": "hi"}], "message 1 must be a dict"),
    ([*asked("hi"), {"role": "assistant"}], "message 2 must be a dict"),
    ([{"role": "user", "content": None}], "message 1 must be a dict"),
    ([], "a conversation without a message has no answer: give"),
    ((), "a conversation without a message has no answer: give"),
    ({"role": "user", "content": "hi"}, "expected messages, .*, got {'role': .* alone"),
]


@pytest.mark.parametrize(("messages", "reason"), NO_CONVERSATIONS)
def test_what_is_no_conversation_is_refused_in_one_line(messages, reason, talker, tokenizer):
    for stream in (False, True):  # at once, not when the stream is read
        with pytest.raises(ValueError, match=reason) as caught:
            generate(talker, tokenizer, messages, stream=stream)
        assert "\n" not in str(caught.value)
