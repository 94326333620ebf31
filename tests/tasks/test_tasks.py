"""Every task: the same samples from the same seed, a ceiling that knowing reaches, a chance that guessing gets."""

import re

import numpy as np
import pytest
from oracles import Guesser, Oracle, answers
from smallmodels import SMALL

import minilora as ml
from minilora.engine.tensor import Tensor
from minilora.tasks.copying import Copying
from minilora.tasks.modular import Modular
from minilora.tasks.recall import Recall
from minilora.tasks.regular import LANGUAGES, Regular
from minilora.tasks.style import ENDING, OPENING, STYLES, Style
from minilora.tasks.task import MARKS

V = 64
KINDS = {
    "recall": (Recall, {"pairs": 60, "values": 16, "key_symbols": 10}),
    "modular": (Modular, {"p": 11}),
    "copy": (Copying, {"trained": 90, "tested": 30}),
    "reverse": (Copying, {"trained": 90, "tested": 30, "reverse": True}),
    **{name: (Regular, {"language": name, "trained": 90, "tested": 30}) for name in LANGUAGES},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def tiny():
    return ml.load("tiny")


def made(kind, **change):
    make, settings = KINDS[kind]
    return make(**{"vocab_size": V, **settings, **change})


@each_kind
def test_a_seed_determines_the_samples(kind):
    task = made(kind, seed=3)
    assert (task.train, task.test) == (made(kind, seed=3).train, made(kind, seed=3).test)
    assert task.train != made(kind, seed=4).train
    assert all(0 <= i < V for sample in [*task.train, *task.test] for i in sample.ids)


@each_kind
def test_knowing_reaches_the_ceiling_and_does_not_pass_it(kind):
    task = made(kind)
    measured = task.measure(Oracle([*task.train, *task.test], V))
    assert measured["score"] == pytest.approx(measured["ceiling"])
    assert measured["score"] <= measured["ceiling"]


@each_kind
def test_guessing_gets_the_chance(kind):
    task = made(kind)
    measured = task.measure(Guesser(task.value_tokens if kind == "recall" else answers(task.train), V))
    spread = 0.0 if kind in LANGUAGES or kind == "recall" else 3 * (measured["chance"] / 60) ** 0.5
    assert measured["score"] == pytest.approx(measured["chance"], abs=spread + 1e-6 * measured["ceiling"])
    assert measured["chance"] < measured["ceiling"]


@each_kind
def test_nothing_that_is_asked_was_trained(kind):
    task = made(kind)
    questions = [{sample.ids for sample in part} for part in (task.train, task.test)]
    if kind == "recall":  # what is learned by heart is what is asked
        assert questions[0] == questions[1]
    else:
        assert not questions[0] & questions[1]
    assert len(questions[0]) == len(task.train) and len(questions[1]) == len(task.test)


@each_kind
def test_a_random_llama_learns_it_and_is_measured(kind):
    task = made(kind)
    config = ml.Config(**{**vars(SMALL), "vocab_size": V, "head_dim": 0, "max_position_embeddings": 64})
    model = ml.Llama(config, 0)
    before, loss = task.measure(model), ml.mean_loss(model, task.test)
    ml.fit(model, task.train, steps=20, lr=2e-2)
    after = task.measure(model)
    assert ml.mean_loss(model, task.test) < loss
    assert all(0 <= each["score"] <= each["ceiling"] for each in (before, after))


def test_a_task_is_the_same_for_the_tiny_base(tiny):
    model, _ = tiny
    for make, settings in KINDS.values():
        task = make(vocab_size=model.config.vocab_size, **settings)
        measured = task.measure(model)
        assert 0 <= measured["score"] < 0.6 * measured["ceiling"]


def test_bits_that_are_stored_are_counted():
    task = made("recall")
    halfway = task.measure(Oracle(task.train[:30], V))
    assert task.bits == 60 * 4  # one of 16 is 4 bits
    assert halfway["score"] == pytest.approx(task.bits - 30 * 6)  # those not known are guessed among 64, 6 bits
    assert halfway["accuracy"] == pytest.approx(0.5, abs=0.05)
    assert "bits_per_parameter" not in halfway


def test_bits_are_counted_per_trainable_parameter():
    model = ml.Llama(ml.Config(**{**vars(SMALL), "vocab_size": V, "head_dim": 0}), 0)
    task = made("recall", pairs=8)
    ml.fit(model, task.train, steps=60, lr=3e-2, warmup=0.0)
    measured = task.measure(model)
    assert measured["score"] > 8
    assert measured["bits_per_parameter"] == measured["score"] / ml.count_parameters(model).trainable


def test_sums_are_right():
    task = Modular(vocab_size=V, p=7)
    number = {sample.ids[1]: None for sample in task.train + task.test}
    assert len(number) == 7 and len(task.train) + len(task.test) == 49 and len(task.train) == round(49 / 2)
    table = {sample.ids[1:3]: sample.ids[-1] for sample in task.train + task.test}
    zero = next(n for n in number if all(table[n, m] == m for m in number))
    for a in number:
        assert table[zero, a] == table[a, zero] == a
        assert {table[a, b] for b in number} == set(number)  # each row says each number once
        assert all(table[a, b] == table[b, a] for b in number)


def test_copies_are_the_same_and_reverses_from_the_end():
    for reverse in (False, True):
        for sample in Copying(vocab_size=V, reverse=reverse, trained=20, tested=5).train:
            length = sample.labels.count(-100) - 2  # but for start and answer marks
            said = sample.ids[1 : 1 + length]
            assert 4 <= length <= 8 and sample.ids[2 + length :] == (said[::-1] if reverse else said)


def test_a_knower_of_the_automaton_has_the_entropy_as_its_loss():
    task = made("pairs")

    def knower(ids):
        logits = np.full((*ids.shape, V), -50.0)
        for row, out in zip(ids, logits, strict=True):
            for t, tokens in enumerate(task.allowed(row[1:])):
                out[t, tokens] = 0.0
        return Tensor(logits)

    measured = task.measure(knower)
    assert measured["loss"] == pytest.approx(measured["entropy"]) == pytest.approx(np.log(2) / 2)
    assert measured["score"] == pytest.approx(1.0)


def test_the_language_is_what_its_name_says():
    texts = {}
    for name in LANGUAGES:
        task = made(name)
        symbol = {token: letter for letter, token in task.token.items()}
        texts[name] = ["".join(symbol[i] for i in sample.ids[1:]) for sample in task.train]
    assert all(re.fullmatch("(ab|ba)*", text) for text in texts["pairs"])
    assert all("bb" not in text for text in texts["no bb"])
    assert all(re.fullmatch("(aaa|b)*a{0,2}", text) for text in texts["threes"])
    opened = [np.cumsum([1 if letter == "(" else -1 for letter in text]) for text in texts["depth 3"]]
    assert all(depths.min() >= 0 and depths.max() <= 3 for depths in opened)


def test_a_language_of_your_own():
    task = Regular(vocab_size=V, language={0: {"x": 1, "y": 0}, 1: {"z": 0}}, length=12, trained=8, tested=4)
    assert len(task.token) == 3 and len(task.train) == 8


# -- the style ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_answers_in_a_style_are_noticed_and_plain_ones_are_not(style, tiny):
    task = Style(tiny[1], style=style, trained=12, tested=6)
    plain = [record.messages[-1]["content"] for record in task.records["test"]]
    assert task.share([task.said(answer) for answer in plain]) == 1.0
    assert task.share(plain) == 0.0
    assert len(task.train) == 12 and len(task.test) == 6
    assert not {s.ids for s in task.train} & {s.ids for s in task.test}
    assert task.train == Style(tiny[1], style=style, trained=12, tested=6).train


def test_the_trained_answers_are_in_the_style(tiny):
    _, tokenizer = tiny
    said = {}
    for style in STYLES:
        labels = Style(tokenizer, style=style, trained=1, tested=1).train[0].labels
        said[style] = tokenizer.decode([i for i in labels if i >= 0])
    assert said["capitals"].removesuffix("<|im_end|>").isupper()
    assert said["opening"].startswith(OPENING)
    assert said["ending"].removesuffix("<|im_end|>").endswith(ENDING)


def test_a_style_is_measured_and_learned(tiny):
    model, tokenizer = ml.load("tiny")
    task = Style(tokenizer, trained=32, tested=4, tokens=6)
    assert task.measure(model) == {"score": 0.0, "ceiling": 1.0, "chance": 0.0}
    ml.add_adapter(model, ml.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), name="style", seed=0)
    ml.fit(model, task.train, steps=12, lr=1e-2, batch_size=4)
    assert task.measure(model)["score"] == 1.0


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "settings", "what"),
    [
        (Recall, {"pairs": 0}, "pairs must be a whole number from 1 on, got 0"),
        (Recall, {"values": 1}, "values must be a whole number from 2 on, got 1"),
        (Recall, {"pairs": 2.5}, "pairs must be a whole number"),
        (Recall, {"seed": -1}, "seed must be a whole number from 0 on"),
        (Recall, {"pairs": 101, "key_symbols": 10}, "2 of 10 symbols make 100"),
        (Recall, {"values": 60}, "need a vocab_size of at least 95, got 64"),
        (Modular, {"p": 21}, "p must be a prime number, got 21"),
        (Modular, {"p": 1}, "p must be a whole number from 2 on, got 1"),
        (Modular, {"p": 67}, "need a vocab_size of at least 70, got 64"),
        *((Modular, {"share": share}, "share must leave some") for share in (0, 1, 0.0001, -1, float("nan"))),
        (Copying, {"shortest": 5, "longest": 4}, "longest must be a whole number from 5 on, got 4"),
        (Copying, {"symbols": 2, "longest": 4}, "are too many of up to 4 out of 2 symbols"),
        (Copying, {"symbols": 62}, "need a vocab_size of at least 65, got 64"),
        (Regular, {"language": "german"}, "language must be one of pairs, no bb"),
        (Regular, {"language": {0: {"a": 1}}}, "comes to state 1, in which no symbol is allowed"),
        (Regular, {"length": 4}, "are too many of the 4 with 4 symbols"),
        (Regular, {"language": {}}, "comes to state 0"),
        (Regular, {"tested": 0}, "tested must be a whole number from 1 on"),
    ],
)
def test_what_makes_no_task_is_refused_in_one_line(make, settings, what):
    with pytest.raises(ValueError, match=re.escape(what)) as refused:
        make(vocab_size=V, **settings)
    assert "\n" not in str(refused.value)


def test_a_vocabulary_of_marks_alone_is_refused():
    with pytest.raises(ValueError, match="need a vocab_size of at least"):
        Modular(vocab_size=MARKS, p=2)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"style": "rude"}, "style must be one of capitals, opening, ending, got 'rude'"),
        ({"trained": 0}, "trained must be a whole number from 1 on"),
    ],
)
def test_a_style_that_is_none_is_refused(settings, what, tiny):
    with pytest.raises(ValueError, match=what):
        Style(tiny[1], **settings)


def test_data_without_a_test_split_are_refused(tiny, tmp_path):
    file = tmp_path / "few.jsonl"
    file.write_text('{"question": "a?", "answer": "b."}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="no record to ask"):
        Style(tiny[1], data=file)
