"""Answers under a schema: whatever the model would like to say, they parse, they fit, and they end in time."""

import json
import math
import re
import sys
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from modelfiles import CONFIG, write_gguf

import minilora as ml
from minilora.data.fields import FieldTask, as_json, is_copy, members, read_schema
from minilora.data.records import read_source
from minilora.generate.answers import generate_batch
from minilora.generate.as_trained import guide_of
from minilora.generate.schema import Guide, Language, vocabulary_of
from minilora.models.gguf import GGUF
from minilora.models.load import load_tokenizer
from minilora.nn.llama import Llama

TEXTS = ["", "a", 'The "Big\\Tent", FW12345678, 1,200.50, 3 May; caf\u00e9 \U0001f600!', "I paid 12, then 7.5.\nBob"]
SCALARS = {
    "string": {"type": "string"},
    "number": {"type": "number"},
    "integer": {"type": "integer"},
    "boolean": {"type": "boolean"},
    "code": {"type": "string", "pattern": r"^FW\d{2}[0-9]{6}$"},
    "odd": {"type": "string", "pattern": r'^"[a-c\\]{3}["\\]\.$'},
    "choice": {"enum": ["a", "ab", 'caf\u00e9 "x"', None, 1, 12, True, 1.5]},
}
scalars = st.sampled_from(list(SCALARS.values()))
rules = scalars | scalars.map(lambda rule: {"type": "array", "items": rule}) | scalars.map(
    lambda rule: rule | ({"type": [rule["type"], "null"]} if "type" in rule else {})
)  # fmt: skip
schemas = st.dictionaries(st.sampled_from(["a", "b c", 'd"', "\u00e9", "e\\"]), rules, min_size=1, max_size=4).map(
    lambda rules: {"type": "object", "properties": rules}
)


@cache
def tiny():
    return load_tokenizer("tiny")


def write(guide, tokenizer, tokens, seed, bias=0.0):
    """What a model of random taste writes. bias: how much it likes long tokens."""
    rng, ids = np.random.default_rng(seed), []
    while True:
        allowed = guide.allowed(tokens - len(ids))
        length = np.array([len(guide.vocabulary.bytes_of.get(int(i), b"")) for i in allowed])
        token = int(allowed[(rng.gumbel(size=len(allowed)) + bias * length).argmax()])
        guide.take(token)
        if token == tokenizer.eos_id:
            return ids
        ids.append(token)
        if len(ids) == tokens:
            return ids


@given(schemas, st.sampled_from(TEXTS), st.integers(0, 99), st.integers(0, 60), st.sampled_from([-1.0, 0.0, 1.0]))
@settings(max_examples=40)
def test_the_answer_parses_fits_and_ends_for_every_schema_and_any_model(schema, text, seed, more, bias):
    names = tuple(schema["properties"])
    task = FieldTask.of(schema)
    task = FieldTask(task.fields, task.template, names[: seed % (len(names) + 1)])
    guide = Guide(Language.of(task, text), vocabulary_of(tiny()))
    tokens = guide.least + more
    ids = write(guide, tiny(), tokens, seed, bias)
    assert len(ids) <= tokens
    values = json.loads(tiny().decode(ids))
    assert list(values) == list(names) and all(f.fits(values[f.name]) for f in task.fields)
    for field in task.fields:
        free = (field.items or field).choices or {"boolean"} & set((field.items or field).kinds)
        for one in [] if free or field.name not in task.copied else members(values[field.name]):
            assert is_copy(one, text) or not any(is_copy(word, text) for word in words_like(one, field, text)), one


def words_like(value, field, text):
    """What could have been copied instead of a value."""
    kind = field.items or field
    if not isinstance(value, str):
        whole = "number" not in kind.kinds
        return [float(n) for n in re.findall(r"\d+(?:\.\d+)?" if not whole else r"\d+", text.replace(",", ""))]
    return re.findall(kind.pattern[1:-1] if kind.pattern else r"\w+", text)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.booleans())
@example("a\n", True)  # the white space at the end leads to no other word
@example("\x7f", False)  # the one control character that JSON does not escape
@settings(max_examples=50)
def test_every_string_can_be_answered_letter_by_letter(text, copied):
    task = FieldTask.of({"properties": {"x": {"type": "string"}}})
    task = FieldTask(task.fields, task.template, ("x",) if copied else ())
    value = text.strip() if copied else text
    if (copied and not is_copy(value, text)) or re.search(r"[\x00-\x07\x0b\x0e-\x1f]", text):
        return
    answer = task.answer({"x": value})
    guide = Guide(Language.of(task, text), vocabulary_of(tiny()))
    for token in tiny().encode(answer):
        assert token in guide.allowed(1000)
        guide.take(token)
    assert guide.allowed(1).tolist() == [tiny().eos_id] and not guide.hurried


@given(st.floats() | st.integers() | st.decimals(-(10**15), 10**15, places=6).map(float), st.booleans())
@example(999_999_999_999_999, False)
@example(-(10**15), False)
@example(48.1371079, False)
@example(10**400, False)
@settings(max_examples=40)
def test_data_may_have_the_numbers_that_can_be_answered_and_a_choice_of_any(value, chosen):
    finite = abs(value) < math.inf
    rule = {"type": ["number", "null"]} | ({"enum": [value]} if chosen and finite else {})
    (field,) = (task := FieldTask.of({"properties": {"x": rule}})).fields
    language = Language.of(task)
    state = language.state([0])
    for byte in f'{{"x":{as_json(value) if finite else value}}}'.encode():
        state = language.after(state).get(byte, frozenset())
    assert field.fits(value) == (language.end in state)
    if not field.fits(value):
        with pytest.raises(ValueError, match="^x is .*, the schema has number or null of up to 15 digits, and 6 after"):
            task.answer({"x": value})


@given(st.text("AB1- \u00e9", max_size=12), st.sampled_from([r"^[\w-]{3}$", r"^[A-Z ]{2}\d$", r"^\w{2}$"]))
@example("AB-AB-1", r"^[\w-]{4}$")  # whose matches overlap
@settings(max_examples=50)
def test_every_copy_like_a_pattern_can_be_answered_and_is_what_data_may_have(text, pattern):
    task = FieldTask.of({"properties": {"x": {"type": "string", "pattern": pattern}}})
    task = FieldTask(task.fields, task.template, ("x",))
    parts = {text[i:j] for i in range(len(text)) for j in range(i, len(text) + 1)}
    copies = {one for one in parts if is_copy(one, text) and re.fullmatch(pattern, one, re.ASCII)}
    assert copies == {one for one in parts if is_copy(one, text) and task.fields[0].fits(one)}
    language = Language.of(task, text)
    for one in parts if copies else ():
        state = language.state([0])
        for byte in json.dumps({"x": one}, ensure_ascii=False, separators=(",", ":")).encode():
            state = language.after(state).get(byte, frozenset())
        assert (language.end in state) == (one in copies)


@pytest.mark.parametrize("pattern", ["^[ -~]{2}$", '^[a"]$', r'^["\\\\]$', "^[b-d]$", "^\u00e9$", '^"$', r"^[\w.]$"])
def test_a_pattern_allows_the_characters_of_its_class_and_no_others(pattern):
    language = Language.of(FieldTask.of({"properties": {"x": {"type": "string", "pattern": pattern}}}))
    for character in [*map(chr, range(32, 127)), "\u00e9", "\u20ac"]:
        value, state = character * (1 + ("{2}" in pattern)), language.state([0])
        for byte in json.dumps({"x": value}, ensure_ascii=False, separators=(",", ":")).encode():
            state = language.after(state).get(byte, frozenset())
        assert (language.end in state) == (re.fullmatch(pattern, value, re.ASCII) is not None)


@pytest.mark.parametrize(
    ("rule", "shortest"),
    [
        ({"type": "string"}, '""'), ({"type": ["string", "null"], "pattern": "^[a-c]{9}$"}, "null"),
        ({"type": "string", "pattern": "^[ -~]{400}x$"}, f'"{"a" * 400}x"'), ({"type": "boolean"}, "true"),
        ({"type": "string", "pattern": '^["\\\\]"[a"]\u00e9$'}, '"\\"\\"a\u00e9"'),
        ({"type": ["boolean", "number"]}, "1"), ({"type": "integer"}, "1"), ({"enum": ["abc", "\u00e9"]}, '"\u00e9"'),
        ({"type": "array", "items": {"type": "string", "pattern": "^a{99}$"}}, "[]"),
    ],
)  # fmt: skip
def test_size_and_shortest_answer_are_known_before_the_automaton_is_built(rule, shortest):
    task = FieldTask.of({"properties": {"x\u00e9": rule, "y": {"type": "string"}}})
    language = Language.of(task)
    least = len(f'{{"x\u00e9":{shortest},"y":""}}'.encode())
    assert task.least() == Guide(language, vocabulary_of(tiny())).least == least
    assert len(language.edges) < 2 * sum(len(field.name) + field.size() for field in task.fields)


def test_few_of_the_tokens_that_states_allow_are_kept(monkeypatch):
    task = FieldTask.of({"properties": {"x": {"type": "string", "pattern": "^[a-z]{100}$"}}})
    ids, kept = tiny().encode(task.answer({"x": "ab" * 50})), []
    for limit in (10**9, 2000):
        monkeypatch.setattr(sys.modules[Guide.__module__], "KEPT", limit)
        guide = Guide(Language.of(task), vocabulary_of(tiny()))
        allowed = []
        for token in ids:
            allowed.append(guide.allowed(1000).tolist())
            guide.take(token)
            kept.append(sum(len(found) for found, _ in guide.language.tokens.values()))
        assert all(token in some for token, some in zip(ids, allowed, strict=True))
    assert max(kept[len(ids) :]) <= 2000 + max(map(len, allowed)) < max(kept)


@pytest.mark.parametrize("value", [0, -1, 12.5, 1200, -0.001, 999999999999999, True, False, None])
def test_numbers_and_truths_are_those_of_json(value):
    task = FieldTask.of({"properties": {"x": {"type": ["number", "boolean", "null"]}}})
    guide = Guide(Language.of(task), vocabulary_of(tiny()))
    for token in tiny().encode(task.answer({"x": value})):
        assert token in guide.allowed(1000)
        guide.take(token)
    for wrong in ("01", "1.", "-", ".5", "+1", "1e5", "--1"):
        guide = Guide(Language.of(task), vocabulary_of(tiny()))
        with pytest.raises(KeyError):
            for token in tiny().encode(f'{{"x":{wrong}}}'):
                guide.take(token)


@pytest.mark.parametrize("domain", ["legal", "medical", "support", "finance"])
def test_the_trained_answers_of_the_skills_can_be_given(domain):
    reading = read_source(f"{domain}-fields")
    for record in reading.records[::60]:
        guide = guide_of(reading.task, tiny(), reading.task.text(record.question))
        for token in tiny().encode(record.messages[-1]["content"]):
            assert token in guide.allowed(300)
            guide.take(token)
        assert guide.allowed(1).tolist() == [tiny().eos_id]


def test_a_token_that_leaves_no_time_to_end_is_left_out_and_that_is_told(tokenizer):
    task = FieldTask.of({"properties": {"x": {"type": "string"}, "y": {"enum": ["long choice"]}}})
    guide = Guide(Language.of(task), vocabulary_of(tokenizer))
    assert guide.least == len('{"x":"","y":"long choice"}')
    for token in tokenizer.encode('{"x":"'):
        guide.take(token)
    left = guide.least
    assert tokenizer.encode("a")[0] in guide.allowed(left + 4) and not guide.hurried
    assert tokenizer.encode("a")[0] in guide.allowed(left + 1)
    assert guide.allowed(left).tolist() == tokenizer.encode('"') and guide.hurried


@pytest.mark.parametrize("copied", [False, True])
def test_a_batch_of_a_model_gives_objects_that_fit(talker, tokenizer, copied):
    items = {"type": "array", "items": {"enum": ["u", "v"]}}
    task = FieldTask.of({"properties": {"x": {"type": ["string", "null"]}, "n": {"type": "number"}, "k": items}})
    task = FieldTask(task.fields, task.template, ("x", "n") if copied else ())
    texts = ["abc 12 de", "x" * 90, "7"]
    talks = [[{"role": "user", "content": task.prompt(text)}] for text in texts]
    answers = generate_batch(talker, tokenizer, talks, 60, guides=[guide_of(task, tokenizer, text) for text in texts])
    alone = [generate_batch(talker, tokenizer, [talk], 60, guides=[guide_of(task, tokenizer, text)])[0]
             for talk, text in zip(talks, texts, strict=True)]  # fmt: skip
    assert answers == alone  # with and without a shared beginning
    for answer, text in zip(answers, texts, strict=True):
        values = json.loads(answer)
        assert task.answer(values) == answer
        assert not copied or values["x"] is None or values["x"] in text
    least = len('{"x":"","n":1,"k":[]}' if not copied else '{"x":"7","n":7,"k":[]}')
    streams, guide = ml.Streams(talker, tokenizer), guide_of(task, tokenizer, "7")
    with pytest.raises(ValueError, match=f"may need {least} tokens, one for each byte, and has {least - 1}: allow"):
        streams.add("x", max_new_tokens=least - 1, guide=guide)
    assert streams.add("x", max_new_tokens=least, guide=guide)


@pytest.mark.parametrize(
    "rule", [{"\U000e0067": {"type": "string"}}, {"a": {"enum": ["\U000e0067"]}}, {"a": {"pattern": "^\U000e0067$"}}]
)
def test_a_schema_with_a_character_that_no_token_has_is_refused_before_anything_is_computed(rule, tmp_path):
    """No token could follow then, and the step of all answers would fail."""
    tokenizer = GGUF(write_gguf(tmp_path / "m.gguf", Llama(CONFIG))).tokenizer()  # without some bytes, as SmolLM2's
    task = FieldTask.of({"properties": {name: {"type": "string", **one} for name, one in rule.items()}})
    with pytest.raises(ValueError, match="no token of this model can express the character"):
        guide_of(task, tokenizer, "")


def test_an_answer_that_had_to_end_was_cut(talker, tokenizer):
    task = FieldTask.of({"properties": {"x": {"type": "string"}}})
    streams = ml.Streams(talker, tokenizer)
    short, _ = (streams.add("x", None, n, guide=guide_of(task, tokenizer, "")) for n in (12, 200))
    while streams.busy:
        streams.step()
    assert short.finished == "length" and len(json.loads(short.text)["x"]) >= 1
    task = FieldTask.of({"properties": {"x": {"enum": ["a"]}}})
    whole = streams.add("x", None, 12, guide=guide_of(task, tokenizer, ""))
    while streams.busy:
        streams.step()
    assert (whole.text, whole.finished) == ('{"x":"a"}', "stop")
    hurried = streams.add("x", None, 12, guide=guide_of(task, tokenizer, ""))
    hurried.guide.hurried = True  # the end token came all the same, since one token had several bytes
    for token in [*tokenizer.encode('{"x":"a"}'), tokenizer.eos_id]:
        hurried.take(token)
    assert (hurried.text, hurried.finished) == ('{"x":"a"}', "length")


def test_a_schema_of_the_real_size_takes_little_time_per_token(tmp_path):
    tokenizer, (record, *_) = tiny(), read_source("legal-fields").records
    task = read_schema(ml.__path__[0] + "/data/legal-fields.schema.json")
    guide = guide_of(task, tokenizer, "")
    for token in tokenizer.encode(record.messages[-1]["content"]):
        guide.allowed(300)
        guide.take(token)
    states = len(guide.language.tokens)
    again = guide_of(task, tokenizer, "other text")
    assert again.language is guide.language and states < 150  # nothing is computed twice


def test_strings_are_valid_utf8_and_have_only_the_escapes_of_json():
    wide = [*range(0x80, 0x800), *range(0x800, 0x110000, 0x40)]  # all pairs of first bytes
    begun = {chr(c).encode()[:2] for c in wide if not 0xD800 <= c < 0xE000}
    language = Language.of(FieldTask.of({"properties": {"x": {"type": "string"}}}))
    state = language.state([0])
    for byte in b'{"x":"':
        state = language.after(state)[byte]
    found = {bytes([a, b]) for a, after in language.after(state).items() for b in language.after(after) if a >= 0x80}
    assert found == begun
    assert set(language.after(language.after(state)[ord("\\")])) == set(b'"\\/bfnrt')
