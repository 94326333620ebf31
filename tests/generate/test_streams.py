"""Many answers at a time: each is what it is alone, whoever joins, leaves or asks for another adapter."""

import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import asked
from modelfiles import CONFIG
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Core

import minilora as ml
from minilora.generate import streams as streams_module
from minilora.generate.answers import generate, generate_batch
from minilora.generate.streams import Streams, draw, penalised
from minilora.lora.adapters import adapter_state
from minilora.models.tokenizer import Tokenizer
from minilora.nn.cache import KVCache
from minilora.nn.llama import Llama

QUESTIONS = ["hello", "What is a lien?", "x", "Explain, in one short sentence, what a trust is.", "12 times 123?"]
CHOICES = [None, "legal", "support", {"legal": 0.5, "support": 0.5}, "odd"]


@pytest.fixture(scope="module")
def model(talker):
    """The talker with three adapters, one of them DoRA. None is active between the tests."""
    model = Llama(talker.config, 0)
    model.load_state_dict(talker.state_dict())
    for seed, (name, own) in enumerate({"legal": {}, "support": {"r": 4}, "odd": {"use_dora": True}}.items()):
        config = ml.LoraConfig(**{"r": 2, "lora_alpha": 4, "init_lora_weights": False, **own})
        ml.add_adapter(model, config, name=name, seed=seed)
        for key, array in adapter_state(model, name).items():
            array *= 1 if key.endswith("vector") else 0.5
    ml.set_adapter(model, None)
    return model


@pytest.fixture
def streams(model, tokenizer):
    return Streams(model, tokenizer, slots=3)


def alone(model, tokenizer, question, choice, count=12, **settings):
    """The answer of one adapter that has the model to itself."""
    ml.set_adapter(model, choice)
    try:
        return generate(model, tokenizer, question, count, **settings)
    finally:
        ml.set_adapter(model, None)


def finish(streams):
    while streams.busy:
        streams.step()


def test_a_prompt_begins_with_the_prefix_of_its_streams_and_a_prefix_is_for_the_active_adapters(model, tokenizer):
    prompt = tokenizer.encode_chat([{"role": "user", "content": "What is a lien?"}], answer_next=True)
    streams = Streams(model, tokenizer, mixed=False, prefix=prompt[:-3])
    answer = streams.add("What is a lien?", max_new_tokens=6)
    for prefix in (prompt, [*prompt[:4], prompt[4] + 1]):
        with pytest.raises(ValueError, match="not the prefix of these streams and at least one more"):
            Streams(model, tokenizer, mixed=False, prefix=prefix).add("What is a lien?")
    finish(streams)
    assert answer.text == alone(model, tokenizer, "What is a lien?", None, 6)
    with pytest.raises(ValueError, match="adapters that are active or merged: give mixed=False"):
        Streams(model, tokenizer, prefix=prompt[:-3])


# -- each is what it is alone ------------------------------------------------------------------------------------------


def test_each_answer_is_that_of_its_adapter_alone_whoever_joins_while_others_run(model, tokenizer, streams):
    rng, asks, answers = np.random.default_rng(0), [], []
    for i in range(12):  # of all lengths, at all times
        question, choice = QUESTIONS[rng.integers(5)] * int(rng.integers(1, 9)), CHOICES[i % 5]
        count = int(rng.integers(1, 15))
        asks.append((question, choice, count))
        answers.append(streams.add(question, choice, max_new_tokens=count))
        for _ in range(rng.integers(4)):
            streams.step()
    finish(streams)
    assert [answer.text for answer in answers] == [alone(model, tokenizer, *ask) for ask in asks]
    assert len({alone(model, tokenizer, "hello", choice) for choice in CHOICES}) == len(CHOICES)  # adapters matter


def test_streams_of_one_model_in_several_threads_are_what_each_is_alone(model, tokenizer):
    def answered(choice):
        streams = Streams(model, tokenizer)
        answers = [streams.add(question, choice, 12) for question in QUESTIONS]
        finish(streams)
        return [answer.text for answer in answers]

    expected = [answered(choice) for choice in CHOICES]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change places in the middle of a step
    try:
        with ThreadPoolExecutor() as pool:
            assert list(pool.map(answered, CHOICES)) == expected
    finally:
        sys.setswitchinterval(before)


def test_a_model_that_has_answered_can_be_freed(tokenizer, no_gc):
    model = Llama(CONFIG, 0)
    streams, gone = Streams(model, tokenizer), weakref.ref(model)
    streams.add(asked("hello"), max_new_tokens=1)
    finish(streams)
    del model, streams
    assert gone() is None


def test_a_step_gives_every_running_answer_one_token_and_no_more_run_than_there_are_slots(streams, tokenizer):
    answers = [streams.add(asked("hello"), max_new_tokens=5 + i) for i in range(5)]
    assert answers[0].prompt_tokens == len(tokenizer.encode_chat(asked("hello"), answer_next=True))
    seen = []
    while streams.busy:
        before = [answer.tokens for answer in answers]
        running = list(streams.running)
        streams.step()
        assert len(streams.running) <= 3
        seen.append(len(streams.running))
        gained = [answer.tokens - n for answer, n in zip(answers, before, strict=True)]
        assert max(gained) <= 1 and all(gained[answers.index(a)] == 1 for a in running if a.finished != "stop")
    assert max(seen) == 3
    assert all(a.finished == "stop" or a.tokens == a.sampling.max_new_tokens for a in answers)


def test_prompts_are_read_in_turns_where_they_are_many(model, tokenizer, monkeypatch):
    monkeypatch.setattr(streams_module, "PREFILL", 150)
    streams = Streams(model, tokenizer, slots=8)
    answers = [streams.add("y" * 40) for _ in range(4)]
    assert 150 / 3 < answers[0].prompt_tokens < 150 / 2
    streams.step()
    assert [answer.tokens for answer in answers] == [1, 1, 0, 0]
    streams.step()
    assert [answer.tokens for answer in answers] == [2, 2, 1, 1]


def test_a_long_prompt_is_read_in_parts_and_the_others_go_on_meanwhile(model, tokenizer, monkeypatch):
    expected = alone(model, tokenizer, "y" * 300, "legal", 6), alone(model, tokenizer, "hello", "support", 20)
    monkeypatch.setattr(streams_module, "PREFILL", 100)
    streams = Streams(model, tokenizer, slots=3)
    short = streams.add("hello", "support", 20)
    streams.step()
    long, gone = streams.add("y" * 300, "legal", 6), streams.add("z" * 300)
    parts = -(-long.prompt_tokens // 100)
    for _ in range(parts - 1):
        streams.step()
    assert (short.tokens, long.tokens) == (parts, 0)
    assert streams.reading.cache.capacity == long.prompt_tokens  # the room for its answer is that of the batch it joins
    streams.step()
    assert (short.tokens, long.tokens) == (parts + 1, 1)
    streams.step()  # the third is being read
    streams.cancel(gone)
    finish(streams)
    assert (long.text, short.text) == expected and gone.text == "" and gone.tokens == 0


def test_a_prompt_that_outlives_the_last_answer_while_it_is_read_has_room(model, tokenizer, monkeypatch):
    expected = alone(model, tokenizer, "y" * 300, "legal", 40)
    monkeypatch.setattr(streams_module, "PREFILL", 100)
    streams = Streams(model, tokenizer, slots=2)
    streams.add("hello", "support", 2)
    streams.step()
    long = streams.add("y" * 300, "legal", 40)
    finish(streams)
    assert long.text == expected


def test_draws_depend_on_the_own_seed_and_not_on_the_neighbours(model, tokenizer, streams):
    settings = dict(temperature=1.5, top_p=0.9)
    answers = [streams.add("hello", "legal", 10, seed=seed, **settings) for seed in (1, 2, 1, 3, 2)]
    streams.add("x", None, 10, seed=1, **settings)
    finish(streams)
    texts = [answer.text for answer in answers]
    assert texts[0] == texts[2] and texts[1] == texts[4] and len(set(texts)) == 3
    assert texts == [alone(model, tokenizer, "hello", "legal", 10, seed=s, **settings) for s in (1, 2, 1, 3, 2)]


def test_between_steps_the_model_is_as_it_was_and_no_weight_is_copied_or_changed(model, streams):
    before = {name: (array, array.copy()) for name, array in model.state_dict().items()}
    ml.set_adapter(model, "legal")
    for choice in CHOICES:
        streams.add("hello", choice, 4)
    while streams.busy:
        streams.step()
        assert [adapter.factor for adapter in model.adapters.values()] == [1.0, None, None]
    ml.set_adapter(model, None)
    assert all(array is before[name][0] for name, array in model.state_dict().items())
    assert all(np.array_equal(array, copy) for array, copy in before.values())


# -- memory ------------------------------------------------------------------------------------------------------------


def test_the_cache_has_no_more_than_slots_times_the_longest_answer(model, tokenizer):
    streams = Streams(model, tokenizer, slots=2)
    answers = []
    for _ in range(40):  # there is always one under way: nothing starts anew
        if len(streams.running) + len(streams.waiting) < 2:
            answers.append(streams.add("hello", max_new_tokens=int(20 + len(answers) % 3)))
        streams.step()
    assert len(answers) > 2
    assert streams.cache.keys[0].shape[0] == 2
    longest = max(answer.room for answer in answers)
    assert streams.cache.capacity <= longest + streams_module.STEP
    finish(streams)
    assert streams.cache is None


def test_rows_of_the_cache_double_up_to_the_slots_and_no_further(model, tokenizer):
    streams, rows = Streams(model, tokenizer, slots=7), []
    for joining in (3, 1, 1, 2):
        for _ in range(joining):
            streams.add("hello", max_new_tokens=20)
        streams.step()
        rows.append(streams.cache.keys[0].shape[0])
    assert rows == [3, 6, 6, 7]


@pytest.mark.parametrize(("length", "others"), [(150, 6), (20, 1)])
def test_an_answer_that_outlives_others_has_room_to_its_end(model, tokenizer, length, others):
    streams = Streams(model, tokenizer, slots=2)
    long = streams.add("hello", "legal", max_new_tokens=40)
    short = [streams.add("x" * length, "support", max_new_tokens=5) for _ in range(others)]
    finish(streams)
    assert long.text == alone(model, tokenizer, "hello", "legal", 40)
    assert {answer.text for answer in short} == {alone(model, tokenizer, "x" * length, "support", 5)}


# -- ends --------------------------------------------------------------------------------------------------------------


def ended(model, tokenizer, ids, **settings):
    """An answer for which the model would write these tokens, taken one by one, and its pieces."""
    answer = Streams(model, tokenizer).add("hello", **{"max_new_tokens": 50, **settings})
    pieces = []
    for token in ids:
        answer.take(token)
        pieces.append(answer.new_text())
        if answer.finished:
            break
    return answer, pieces


@cache
def sentencepiece():
    """A tokenizer whose tokens mean other text after others: spaces at the beginning, single bytes."""
    tokens = ["<end>", "<unk>", "\u2581", "\u2581a", "b", "\ufffd"]
    tokens += [f"<0x{byte:02X}>" for byte in b"\n\xc3\xa9\xe2\x82\xac\xff"]
    core = Core(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    core.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(core, eos="<end>")


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@given(data=st.data())
@settings(max_examples=35)
def test_the_text_of_an_answer_is_that_of_all_its_tokens_after_each(tokenizer, kind, data):
    own = tokenizer if kind == "bytes" else sentencepiece()
    some = st.text("a \n\u00e9\u20ac\ufffd\U0001f600").map(own.encode) if kind == "bytes" else st.just([])
    tokens = st.lists(st.integers(0, len(own) - 1).filter(lambda i: i not in own.end_ids), max_size=12)
    ids = [token for part in data.draw(st.lists(some | tokens, max_size=4)) for token in part]
    answer = streams_module.Answer(own, [], None, streams_module.Sampling(999), np.random.default_rng(0), raw=True)
    shown = ""
    for n, token in enumerate(ids, 1):
        answer.take(token)
        shown = max(shown, own.decode(ids[:n]).rstrip("\ufffd").rstrip(), key=len)
        assert answer.text == shown
    answer.finish("stop")
    assert answer.text == own.decode(ids)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@given(data=st.data())
@settings(max_examples=35)
def test_a_text_and_its_continuation_are_the_text_of_all_their_tokens(tokenizer, kind, data):
    own = tokenizer if kind == "bytes" else sentencepiece()
    pieces = [own.encode(one) for one in "a \u00e9"] if kind == "bytes" else [[2], [3], [4], [7, 8], [9, 10, 11]]
    prompt, ids = (
        [i for piece in data.draw(st.lists(st.sampled_from(pieces), min_size=least, max_size=6)) for i in piece]
        for least in (1, 0)
    )
    answer = streams_module.Answer(own, prompt, None, streams_module.Sampling(999), np.random.default_rng(0), raw=True)
    whole, shown = own.decode([*prompt, *ids]), ""
    for token in ids:
        answer.take(token)
        shown += answer.new_text()
        assert whole.startswith(own.decode(prompt) + shown)
    answer.finish("stop")
    assert own.decode(prompt) + shown + answer.new_text() == whole


def test_an_answer_that_is_cut_ends_with_a_whole_character(model, tokenizer):
    text = "a返品é👩\u200d💻"
    ids = tokenizer.encode(text)
    for most in range(1, len(ids) + 1):
        answer, pieces = ended(model, tokenizer, ids, max_new_tokens=most)
        assert text.startswith(answer.text) and answer.text == "".join(pieces) and answer.finished == "length"
        assert len(tokenizer.encode(answer.text)) <= most < len(tokenizer.encode(answer.text)) + 4
        answer, _ = ended(model, tokenizer, ids[:most])
        answer.finish("cancelled")
        assert text.startswith(answer.text)


def test_of_a_long_answer_each_token_is_decoded_with_few_others(model, tokenizer, monkeypatch):
    counts, decode = [], Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: counts.append(len(ids)) or decode(self, ids))
    ended(model, tokenizer, tokenizer.encode("€ and é" * 5), max_new_tokens=999)
    assert max(counts) == 3  # the bytes of a character


def test_an_answer_says_how_it_ended_and_the_end_mark_is_no_part_of_it(model, tokenizer):
    for most, wanted in ((50, ("ab", "stop", 2)), (1, ("a", "length", 1))):
        answer, pieces = ended(model, tokenizer, [*tokenizer.encode("ab"), tokenizer.eos_id], max_new_tokens=most)
        assert (answer.text, answer.finished, answer.tokens) == wanted and "".join(pieces) == answer.text


@pytest.mark.parametrize(
    ("written", "stop", "text", "pieces"),
    [
        ("one\nQ: two", ["\nQ:"], "one", ["o", "n", "e", "", "", ""]),
        ("one\nQuite", ["\nQ:"], None, ["o", "n", "e", "", "", "\nQu", "i", "t", "e"]),
        ("abcabd", ["abd"], "abc", ["", "", "abc", "", "", ""]),
        ("a.b", [".", "b"], "a", ["a", ""]),
        ("a.b", ["b", "."], "a", ["a", ""]),
        ("xab", ["ab", "b", "xab"], "", ["", "", ""]),
        ("stop", ["stop"], "", ["", "", "", ""]),
        ("aEND€", ["END€"], "a", ["a", *[""] * 6]),  # between its bytes the text ends with half a character
        ("aENDé", ["END€"], None, ["a", *[""] * 4, "ENDé"]),
    ],
)
def test_a_stop_text_ends_an_answer_and_no_part_of_it_is_shown(model, tokenizer, written, stop, text, pieces):
    answer, got = ended(model, tokenizer, tokenizer.encode(written), stop=stop)
    assert got == pieces
    assert (answer.text, answer.finished) == ((text, "stop") if text is not None else (written, None))


def test_the_beginning_of_a_stop_text_is_shown_where_the_answer_ends_with_it(model, tokenizer):
    answer, pieces = ended(model, tokenizer, [*tokenizer.encode("a<"), tokenizer.eos_id], stop=["<end>"])
    assert pieces == ["a", "", "<"] and answer.text == "a<"


def test_a_text_to_continue_begins_as_the_model_expects_and_a_conversation_as_its_template_says(
    model, tokenizer, monkeypatch
):
    monkeypatch.setattr(tokenizer, "begun", lambda ids: [7, *ids])
    streams = Streams(model, tokenizer)
    assert streams.add("ab", raw=True).prompt == [7, *tokenizer.encode("ab")]
    assert streams.add("ab").prompt == tokenizer.encode_chat(asked("ab"), answer_next=True)


def test_a_cancelled_answer_frees_its_place_and_the_others_never_notice(model, tokenizer, streams):
    answers = [streams.add(question, "legal", 12) for question in QUESTIONS]
    streams.step()
    streams.step()
    streams.cancel(answers[0])
    streams.cancel(answers[4])  # still waiting
    assert answers[0].finished == answers[4].finished == "cancelled" and streams.left == 3
    assert len(streams.running) == 2 and streams.cache.batch == 2
    streams.step()
    assert len(streams.running) == 3 and answers[0].tokens == 2 and answers[4].tokens == 0
    finish(streams)
    expected = [alone(model, tokenizer, question, "legal") for question in QUESTIONS[1:4]]
    assert [answer.text for answer in answers[1:4]] == expected
    was = answers[1].finished
    streams.cancel(answers[1])
    assert answers[1].finished == was


class Failing:
    """A guide that allows every token, and fails at one."""

    least, hurried = 1, False

    def __init__(self, at, size):
        self.at, self.ids = at, np.arange(size)

    def allowed(self, left):
        self.at -= 1
        return self.ids if self.at >= 0 else 1 / 0

    def take(self, token):
        pass


@pytest.mark.parametrize("at", [0, 2])
def test_an_error_in_one_answers_guide_ends_that_answer_alone(model, tokenizer, streams, at):
    guides = [None, Failing(at, model.config.vocab_size), None, None]
    answers = [streams.add(q, "legal", 12, guide=guide) for q, guide in zip(QUESTIONS, guides, strict=False)]
    finish(streams)
    bad = answers.pop(1)
    assert (bad.finished, bad.tokens, type(bad.error)) == ("error", at, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        bad.new_text()
    expected = [alone(model, tokenizer, question, "legal") for i, question in enumerate(QUESTIONS[:4]) if i != 1]
    assert [answer.new_text() for answer in answers] == expected and not any(answer.error for answer in answers)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_adapter_that_predicts_no_number_ends_its_answer_alone(
    model, tokenizer, streams, monkeypatch, temperature, value
):
    compute = streams._compute

    def broken(answers, tokens, cache):
        logits = compute(answers, tokens, cache).copy()
        logits[[answer is bad for answer in answers], 7] = value
        return logits

    monkeypatch.setattr(streams, "_compute", broken)
    good, bad = streams.add(QUESTIONS[0], None, 5), streams.add(QUESTIONS[1], None, 5, temperature=temperature)
    finish(streams)
    assert bad.finished == "error" and good.text == alone(model, tokenizer, QUESTIONS[0], None, 5)
    with pytest.raises(ValueError, match="the model predicts NaN or infinity instead of a next token"):
        bad.new_text()


def test_an_error_in_one_answers_decoding_ends_that_answer_alone(model, tokenizer, streams, monkeypatch):
    good, bad = (streams.add(question, None, 5) for question in QUESTIONS[:2])
    monkeypatch.setattr(bad, "take", lambda token: 1 / 0)
    finish(streams)
    assert bad.finished == "error" and good.text == alone(model, tokenizer, QUESTIONS[0], None, 5)
    with pytest.raises(ZeroDivisionError):
        generate_batch(model, tokenizer, [asked("x")], 5, guides=[Failing(1, model.config.vocab_size)])


@pytest.mark.parametrize("gone", [[1], [0, 2], [0, 1, 2]])
def test_of_prompts_that_are_read_together_some_can_be_cancelled(model, tokenizer, gone, monkeypatch):
    expected = [alone(model, tokenizer, mark * 90, "legal", 6) for mark in "xyz"]
    monkeypatch.setattr(streams_module, "PREFILL", 400)
    streams = Streams(model, tokenizer, slots=3)
    answers = [streams.add(mark * 90, "legal", 6) for mark in "xyz"]
    monkeypatch.setattr(streams_module, "PREFILL", 60)  # they are read in several steps
    streams.reading = streams._begin_to_read([streams.waiting.popleft() for _ in answers])
    streams.step()
    assert streams.left == 3 and not any(answer.tokens for answer in answers)
    for i in gone:
        streams.cancel(answers[i])
    finish(streams)
    assert [a.text for a in answers] == ["" if i in gone else text for i, text in enumerate(expected)]
    assert all(answer.tokens for i, answer in enumerate(answers) if i not in gone)


# -- draws -------------------------------------------------------------------------------------------------------------


def test_a_step_that_ctrl_c_stops_in_the_model_is_repeated_by_the_next_one(model, tokenizer, streams):
    answers = [
        streams.add(q, c, 6, 0.5 * (i % 2), seed=i) for i, (q, c) in enumerate(zip(QUESTIONS, CHOICES, strict=True))
    ]
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) % 2:
            raise KeyboardInterrupt

    with model.model.register_forward_hook(interrupt):  # the cache has the keys and values of the step then
        while streams.busy:
            with suppress(KeyboardInterrupt):
                streams.step()
    for i, (question, choice, answer) in enumerate(zip(QUESTIONS, CHOICES, answers, strict=True)):
        assert answer.text == alone(model, tokenizer, question, choice, 6, temperature=0.5 * (i % 2), seed=i)
    assert len(calls) % 2 == 0 and {adapter.factor for adapter in model.adapters.values()} == {None}


@pytest.mark.parametrize("where", [(streams_module.Answer, "take"), (KVCache, "join"), (Streams, "_leave")], ids=str)
def test_after_ctrl_c_between_model_and_answers_streams_are_refused_and_write_nothing_wrong(
    streams, where, monkeypatch
):
    for question, count in zip(QUESTIONS[:3], (2, 4, 6), strict=True):
        streams.add(question, None, count)
        streams.step()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        streams.add("hello")
        patched.setattr(*where, Mock(side_effect=KeyboardInterrupt))
        finish(streams)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="interrupted half-way: make new Streams, and add the requests again"):
            streams.step()


def test_only_the_likeliest_tokens_that_have_the_probability_together_are_drawn(rng):
    logits = np.log(np.array([0.05, 0.5, 0.15, 0.3]))
    cases = [(0.4, {1}), (0.51, {1, 3}), (0.79, {1, 3}), (0.9, {1, 2, 3}), (1 - 1e-16, {0, 1, 2, 3}), (1, {0, 1, 2, 3})]
    for top_p, allowed in cases:
        assert {draw(logits, 1.0, top_p, rng) for _ in range(300)} == allowed
    logits = np.log(np.array([0.6, 0.4], np.float32))  # of the probabilities that the temperature makes
    for temperature, top_p, allowed in ((1.0, 0.6, {0}), (10.0, 0.6, {0, 1}), (5e-324, 0.6, {0}), (5e-324, 1, {0})):
        assert {draw(logits, temperature, top_p, rng) for _ in range(100)} == allowed


def test_a_repetition_penalty_is_of_the_tokens_that_are_there_alone(rng):
    for penalty in (0.5, 1.0, 1.3):
        logits = rng.normal(size=9).astype(np.float32)
        before, seen = logits.copy(), [7, 2, 2, 0]
        found = penalised(logits, seen, penalty)
        assert np.array_equal(logits, before) and found.dtype == np.float32
        wanted = [(x * penalty if x < 0 else x / penalty) if i in seen else x for i, x in enumerate(before)]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_what_was_said_is_not_said_again_under_a_large_penalty_and_neighbours_say_what_they_did(
    model, tokenizer, streams
):
    for temperature in (0.0, 1.5):
        answer = streams.add("hello", "legal", 12, temperature, seed=1, repetition_penalty=1e9, top_logprobs=0)
        other = streams.add("hello", "legal", 12)
        finish(streams)
        assert len({*answer.ids} - {*answer.prompt}) == len(answer.ids) > 8, "the logits of this model have both signs"
        assert other.text == alone(model, tokenizer, "hello", "legal", 12)
        ml.set_adapter(model, "legal")
        assert answer.text == generate(model, tokenizer, "hello", 12, temperature, seed=1, repetition_penalty=1e9)
        with ml.no_grad():
            logits = model(np.array([answer.prompt + answer.ids])).data[0, len(answer.prompt) - 1 : -1]
        own = (logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))[range(len(answer.ids)), answer.ids]
        assert [told for (_, told), _ in answer.logprobs] == pytest.approx(own, abs=1e-3)


# -- refused -----------------------------------------------------------------------------------------------------------

REFUSED = [
    (dict(adapter="nobody"), "no adapter called 'nobody'; it has: legal, support, odd"),
    (dict(adapter={"legal": 0.5, "nobody": 0.5}), "no adapter called 'nobody'"),
    (dict(max_new_tokens=0), "max_new_tokens must be a whole number of at least 1, got 0"),
    (dict(max_new_tokens=5.0), "max_new_tokens must be a whole number of at least 1, got 5.0"),
    (dict(temperature="1"), "temperature must be 0 or a positive number, got '1'"),
    (dict(top_p=None), "top_p must"),
    (dict(messages=None), "expected messages, .*, got None alone"),
    (dict(temperature=-1), "temperature must be 0 or a positive number, got -1"),
    (dict(temperature=float("nan")), "temperature must be"),
    (dict(temperature=float("inf")), "temperature must be"),
    (dict(top_p=0), "top_p must lie above 0 and be at most 1, got 0"),
    (dict(top_p=1.5), "top_p must"),
    (dict(top_p=float("nan")), "top_p must"),
    *((dict(repetition_penalty=p), "repetition_penalty must be a positive number, got") for p in (0, -1, None, np.inf)),
    (dict(seed=-1), "seed must"),
    (dict(stop=[""]), "stop must be texts that are not empty"),
    (dict(max_new_tokens=1020), "tokens and an answer of 1020 are more than the 1024 the model can see"),
    (dict(messages=[{"role": "user"}]), "message 1 must be a dict"),
    (dict(messages=[]), "a conversation without a message has no answer"),
    *((dict(top_logprobs=n), f"top_logprobs must be a whole number of at least 0, got {n}") for n in (-1, 1.5)),
]


@pytest.mark.parametrize(("request_", "reason"), REFUSED, ids=str)
def test_a_request_that_cannot_be_is_refused_at_once_and_the_others_go_on(request_, reason, streams):
    answer = streams.add("hello", max_new_tokens=2)
    with pytest.raises(ValueError, match=reason) as caught:
        streams.add(**{"messages": "hello", **request_})
    assert "\n" not in str(caught.value) and list(streams.waiting) == [answer]


def test_streams_need_a_place(model, tokenizer):
    for slots in (0, 1.5, float("nan"), "2", None):
        with pytest.raises(ValueError, match=f"slots must be a whole number of at least 1, got {slots!r}"):
            Streams(model, tokenizer, slots=slots)


def test_a_merged_model_is_refused_where_adapters_are_mixed_and_serves_as_it_is(model, tokenizer):
    ml.set_adapter(model, "legal")
    expected = generate(model, tokenizer, "hello", 8)
    ml.merge_adapter(model)
    try:
        with pytest.raises(ValueError, match="unmerge_adapter"):
            Streams(model, tokenizer).add("hello", "legal")
        as_it_is = Streams(model, tokenizer, mixed=False)
        answer = as_it_is.add("hello", max_new_tokens=8)
        finish(as_it_is)
        assert answer.text == expected
        with pytest.raises(ValueError, match="active on the model, not 'legal'"):
            as_it_is.add("hello", "legal")
    finally:
        ml.unmerge_adapter(model)
        ml.set_adapter(model, None)
