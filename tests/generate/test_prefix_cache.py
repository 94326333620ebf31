"""Prefix caching: what is known is not computed again, and nobody's answer changes."""

import numpy as np
import pytest
from jobs import asked

import minilora as ml
from minilora.engine.tensor import no_grad
from minilora.generate import streams as streams_module
from minilora.generate.answers import generate
from minilora.generate.conversation import Talk
from minilora.generate.prefix_cache import PrefixCache
from minilora.generate.streams import Sampling, Streams
from minilora.nn.llama import Llama

CHOICES = [None, "legal", {"legal": 0.5, "support": 0.5}]


@pytest.fixture(scope="module")
def model(talker):
    """The talker with two adapters, none of them active between the tests."""
    model = Llama(talker.config, 0)
    model.load_state_dict(talker.state_dict())
    for seed, name in enumerate(("legal", "support")):
        ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False), name=name, seed=seed)
    ml.set_adapter(model, None)
    return model


@pytest.fixture
def known():
    return PrefixCache()


def row_of(model, tokens):
    """The row that these tokens leave in the KV cache."""
    cache = model.new_cache(1, len(tokens))
    with no_grad():
        model(np.array([tokens]), cache)
    return cache


def run(streams, *asks):
    answers = [streams.add(messages, choice, max_new_tokens=count) for messages, choice, count in asks]
    while streams.busy:
        streams.step()
    return answers


def test_every_turn_of_every_conversation_is_answered_as_by_a_model_that_knows_nothing(model, tokenizer, known):
    rng, talks = np.random.default_rng(0), {i: asked("Explain: " + "x" * 30 * i) for i in range(4)}
    streams, cached = Streams(model, tokenizer, slots=3, known=known), 0
    for _ in range(3):  # turns
        asks = {i: (talk, CHOICES[(i + rng.integers(2)) % 3], int(rng.integers(2, 9))) for i, talk in talks.items()}
        answers = run(streams, *asks.values())
        plain = run(Streams(model, tokenizer, slots=1), *asks.values())
        assert [one.text for one in answers] == [one.text for one in plain]
        assert all(0 <= one.cached < one.prompt_tokens for one in answers) and not any(one.cached for one in plain)
        cached += sum(one.cached for one in answers)
        for i, answer in zip(talks, answers, strict=True):
            said = {"role": "assistant", "content": answer.text or "-"}
            talks[i] = [*talks[i], said, {"role": "user", "content": "and?"}]
    assert cached > 0


def test_a_turn_that_continues_computes_its_new_tokens_alone(model, tokenizer, known, monkeypatch):
    sizes, compute = [], Streams._compute
    monkeypatch.setattr(Streams, "_compute", lambda *a: sizes.append(a[2].shape) or compute(*a))
    monkeypatch.setattr(streams_module, "PREFILL", 40)
    streams, talk = Streams(model, tokenizer, slots=2, known=known), asked("What is a lien? " * 9)
    (first,) = run(streams, (talk, None, 3))
    assert len(sizes) > 4 and first.cached == 0  # in parts
    sizes.clear()
    (again,) = run(streams, (talk, None, 3))
    assert (again.text, again.cached, sizes[0]) == (first.text, again.prompt_tokens - 1, (1, 1))
    sizes.clear()
    other, more = run(streams, (talk, "legal", 3), (asked("What is a lien? " * 9 + "?"), None, 3))
    assert other.cached == 0 < more.cached < more.prompt_tokens - 1  # an adapter's keys and values are its own


def test_what_is_known_joins_a_few_at_a_time(model, tokenizer, known, monkeypatch):
    sizes, compute = [], Streams._compute
    monkeypatch.setattr(Streams, "_compute", lambda *a: sizes.append(a[2].shape) or compute(*a))
    asks = [(asked("x" * 90 + letter), None, 2) for letter in "abcdef"]
    answers = run(Streams(model, tokenizer, slots=6, known=known), *asks)
    monkeypatch.setattr(streams_module, "JOINING", 2 * answers[0].prompt_tokens)
    for group, slots in ((2, 6), (1, 1)):
        sizes.clear()
        again = run(Streams(model, tokenizer, slots=slots, known=known), *asks)
        assert [one.text for one in again] == [one.text for one in answers] and sizes[0] == (group, 1)
        assert all(one.cached == one.prompt_tokens - 1 for one in again)


def test_an_answer_that_is_cancelled_leaves_what_was_computed(model, tokenizer, known):
    streams = Streams(model, tokenizer, slots=2, known=known)
    answer = streams.add("hello " * 9, None, 50)
    for _ in range(4):
        streams.step()
    streams.cancel(answer)
    count, row = known.longest(None, [*answer.prompt, *answer.ids, 5])
    assert count == row.length == answer.prompt_tokens + answer.tokens - 1  # the last one was not computed with yet


def test_the_ones_used_last_are_kept_within_the_bytes(model):
    rows = [row_of(model, [i] * 10) for i in range(4)]
    known = PrefixCache(3 * rows[0].nbytes)
    for i in range(3):
        known.keep(None, [i] * 10, rows[i])
    assert known.longest(None, [0] * 20)[0] == 10  # now it was used last
    known.keep("legal", [3] * 10, rows[3])
    assert [known.longest(None, [i] * 20)[0] for i in range(3)] == [10, 0, 10]
    assert known.longest(None, [3] * 20) == (0, None) and known.longest("legal", [3] * 20) == (10, rows[3])
    known.keep(None, [9] * 31, row_of(model, [9] * 31))  # too long for it: the others stay
    assert known.longest(None, [9] * 31) == (0, None) and known.longest(None, [0] * 20)[0] == 10


def test_a_longer_row_takes_the_place_of_its_own_beginning_alone(model, known):
    for who, tokens in ((None, [1, 2]), ("legal", [1, 2]), (None, [1, 3]), (None, [1, 2, 4])):
        known.keep(who, [*tokens, 7], row_of(model, tokens))
    assert list(known.kept) == [((("legal", 1.0),), (1, 2)), ((), (1, 3)), ((), (1, 2, 4))]
    assert known.longest(None, [1, 2, 4])[0] == 2 and known.longest(None, [1]) == (0, None)


def test_what_an_adapter_computed_is_forgotten_alone(model, known):
    for who in CHOICES:
        known.keep(who, [1, 2], row_of(model, [1, 2]))
    known.forget("support")
    assert [known.longest(who, [1, 2, 3])[0] for who in CHOICES] == [2, 2, 0]
    known.forget("legal")
    assert [known.longest(who, [1, 2, 3])[0] for who in CHOICES] == [2, 0, 0]
    known.forget()
    assert not known.kept


def test_a_talk_knows_what_it_said_until_another_answers(model, tokenizer, monkeypatch):
    sizes, compute = [], Streams._compute
    monkeypatch.setattr(Streams, "_compute", lambda *a: sizes.append(a[2].shape[1]) or compute(*a))
    talk = Talk(model, tokenizer, Sampling(6))

    def ask(question):
        sizes.clear()
        talk.ask(question, lambda piece: None)
        return sizes[0]

    first = ask("What is a lien? " * 6)
    assert ask("and?") < first / 2
    talk.choose("legal")
    assert ask("and?") > first
    said = [message for turn in talk.turns[:2] for message in turn.messages()]
    assert talk.turns[2].answer == generate(model, tokenizer, [*said, *asked("and?")], 6)
    assert ask("and then?") < first / 2
    talk.choose(None)
