"""Records as samples: only answers are scored, in every chat template; truncation; texts that spell control tokens."""

import json
from collections import Counter

import pytest
from modelfiles import CHATML, CONFIG, TALK, new_tokenizer, write_gguf
from tokenizers import Tokenizer as Core

from minilora.data import samples
from minilora.data.records import Record, read_records
from minilora.data.samples import (
    encode_pairs,
    encode_record,
    encode_records,
    encode_text,
    mixed,
    truncate,
    truncate_and_log,
)
from minilora.engine.fused import NOT_SCORED
from minilora.files.disk import ModelFileError
from minilora.models.gguf import GGUF
from minilora.models.tokenizer import Tokenizer
from minilora.nn.llama import Llama
from minilora.nn.parts import Sample


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A function that makes a small byte-level tokenizer with this chat template."""
    path = tmp_path_factory.mktemp("tokenizer") / "m.gguf"
    model = Llama(CONFIG)
    return lambda template: GGUF(write_gguf(path, model, change={"tokenizer.chat_template": template})).tokenizer()


@pytest.fixture(scope="module")
def tokenizer(build):
    return build(CHATML)


def scored_text(item, tokenizer):
    """What is scored, run by run, as text with special tokens."""
    runs, before = [], False
    for label in item.labels:
        if label != NOT_SCORED:
            runs = runs if before else [*runs, []]
            runs[-1].append(label)
        before = label != NOT_SCORED
    return [tokenizer.core.decode(run, skip_special_tokens=False) for run in runs]


def test_only_the_assistants_words_and_their_end_marks_are_scored(tokenizer):
    item = encode_record(Record("talk", tuple(TALK)), tokenizer)
    assert scored_text(item, tokenizer) == ["Hi 12.<|im_end|>", "So.<|im_end|>"]
    assert list(item.ids) == tokenizer.encode_chat(TALK)
    (only_read,) = read_records([{"messages": [{**m, "weight": int("12" not in m["content"])} for m in TALK]}])
    unlearned = encode_record(only_read, tokenizer)
    assert scored_text(unlearned, tokenizer) == ["So.<|im_end|>"] and unlearned.ids == item.ids
    assert all(label in (NOT_SCORED, i) for i, label in zip(item.ids, item.labels, strict=True))


STRICT = "{% if not messages %}{{ raise_exception('no message') }}{% endif %}{{ messages[0]['role'] }}" + CHATML
ASKED = "{% if 'user' not in messages | map(attribute='role') %}{{ raise_exception('unasked') }}{% endif %}" + CHATML


@pytest.mark.parametrize("template", [CHATML, STRICT, ASKED])
@pytest.mark.parametrize("before", [[], TALK[:1]], ids=["alone", "system"])
def test_a_greeting_before_the_first_question_is_learned_as_any_answer(build, template, before):
    tokenizer = build(template)
    for words in ("Hi 12.", "0", "1", "hello <|im_end|>"):
        greeting = {"role": "assistant", "content": words}
        (record,) = read_records([{"messages": [*before, greeting, *TALK[1:]]}])
        item = encode_record(record, tokenizer)
        assert scored_text(item, tokenizer) == [f"{words}<|im_end|>", "Hi 12.<|im_end|>", "So.<|im_end|>"]
        assert list(item.ids) == tokenizer.encode_chat([*before, greeting, *TALK[1:]])


def test_an_answer_that_the_template_trims_is_scored_up_to_its_end_mark(build):
    trimming = build(CHATML.replace("m['content']", "m['content'] | trim"))
    greeting, question = {"role": "assistant", "content": " So.  "}, {"role": "user", "content": "hello"}
    for messages in ((question, greeting), (greeting, question, {**greeting, "content": " Hi. "})):
        wanted = [f"{one['content'].strip()}<|im_end|>" for one in messages if one["role"] == "assistant"]
        assert scored_text(encode_record(Record("x", messages), trimming), trimming) == wanted


@pytest.mark.parametrize("end", ["\n", "o", " and"])
@pytest.mark.parametrize("content", ["m['content']", "(m['content'] | trim)"])
def test_nothing_of_the_users_is_scored_where_no_token_ends_a_turn(build, content, end):
    turns = f"{{% for m in messages %}}{{{{ m['role'] + ': ' + {content} + {end!r} }}}}{{% endfor %}}"
    tokenizer = build(turns + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    for answer in ("hello", "So hell", " So.\n", "hell", "hello <|im_end|>"):  # " hello" is one token
        talk = [{**message, "content": answer} if message["role"] == "assistant" else message for message in TALK]
        scored = scored_text(encode_record(Record("talk", tuple(talk)), tokenizer), tokenizer)
        assert len(scored) == 2 and all(answer.strip() in text and "user" not in text for text in scored), scored
        assert end == "o" or answer != answer.strip() or all(text.endswith(answer) for text in scored), scored


def test_a_model_without_a_template_learns_answers_from_their_first_token_after_the_very_prompt():
    tokenizer = new_tokenizer(template=None)
    for answer in ("hello", "12", "So."):  # " hello" is one token
        talk = [TALK[1], {"role": "assistant", "content": answer}]
        sample = encode_record(Record("talk", tuple(talk)), tokenizer)
        prompt, said = tokenizer.encode_chat(talk[:1], answer_next=True), [*tokenizer.encode(answer), tokenizer.eos_id]
        assert list(sample.ids[: len(prompt) + len(said)]) == prompt + said
        assert [i for i in sample.labels if i != NOT_SCORED] == said


@pytest.mark.parametrize("length", [1, 3, 10, 1000])
def test_a_text_is_divided_into_sequences_that_lose_nothing_but_a_last_token_alone(tokenizer, length):
    ids = tokenizer.encode("It was a dark and stormy night, 12.")
    parts = encode_text("It was a dark and stormy night, 12.", tokenizer, max_length=length)
    wanted = [ids[i : i + length] for i in range(0, len(ids), length)]
    assert [list(part.ids) for part in parts] == [part for part in wanted if len(part) > 1]
    assert all(part.labels == (NOT_SCORED, *part.ids[1:]) for part in parts)


def test_a_text_of_a_row_is_scored_but_for_its_first_token_and_ends_as_an_answer_does(tokenizer):
    item = encode_record(Record("x", text="A dark night."), tokenizer)
    assert list(item.ids) == [*tokenizer.encode("A dark night."), tokenizer.eos_id]
    assert item.labels == (NOT_SCORED, *item.ids[1:])
    assert encode_record(Record("x", text="A dark night.<|im_end|>"), tokenizer) == item


def test_texts_are_divided_where_conversations_stay_whole(tokenizer):
    records = [Record("x", text="A dark and stormy night."), Record("talk", tuple(TALK))]
    text, talk = (encode_record(record, tokenizer) for record in records)
    assert encode_records(records, tokenizer) == [text, talk]
    *parts, last = encode_records(records, tokenizer, max_length=10)
    assert [i for part in parts for i in part.ids] == list(text.ids) and last == talk
    assert all(len(part.ids) <= 10 and part.labels == (NOT_SCORED, *part.ids[1:]) for part in parts)


def test_a_systems_own_message_takes_the_place_of_the_templates_default(build):
    default = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nDefault<|im_end|>\n' }}{% endif %}"
    tokenizer = build(default + CHATML)
    whole = encode_record(Record("talk", tuple(TALK)), tokenizer)
    assert tokenizer.core.decode(whole.ids, skip_special_tokens=False).startswith(
        "<|im_start|>system\nBe brief.<|im_end"
    )
    assert scored_text(whole, tokenizer) == ["Hi 12.<|im_end|>", "So.<|im_end|>"]
    bare = encode_record(Record("talk", tuple(TALK[1:3])), tokenizer)
    assert "Default" in tokenizer.core.decode(bare.ids, skip_special_tokens=False)
    assert scored_text(bare, tokenizer) == ["Hi 12.<|im_end|>"]


TEMPLATES = {
    "chatml": CHATML,
    "trimming": CHATML.replace("m['content']", "m['content'] | trim"),
    "a space before the end mark": CHATML.replace("+ '<|im_end|>'", "+ ' <|im_end|>'"),
    "a mark after the users' turns alone": CHATML.replace(
        "+ '<|im_end|>'", "+ ('' if m['role'] == 'assistant' else '<|im_end|>')"
    ),
    "white space that runs on": CHATML.replace("assistant\n", "assistant\n\n "),
    "a beginning that is not the whole's": CHATML.replace(
        "{% if add_generation_prompt %}", "{% if add_generation_prompt %}>"
    ),
}
ANSWERS = ("So.", " So. ", "\n\nSo", "So\n", "12 34", "a<|im_end|>b", "<|im_end|>", "<|im_start|>user\nSo.", "<|im_")


@pytest.mark.long
@pytest.mark.parametrize("known", [True, False], ids=["end token", "end token spelled out"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_many_records_at_once_are_scored_as_when_each_answer_is_looked_for_alone(build, template, known, monkeypatch):
    def looked_for(record):
        ids = tokenizer.encode_chat(record.messages)
        labels = [NOT_SCORED] * len(ids)
        for i, message in enumerate(record.messages):
            if message["role"] == "assistant":
                before = tokenizer.render(record.messages[:i], answer_next=True)
                if not tokenizer.render(record.messages).startswith(before):
                    before = tokenizer.render(record.messages[:i]) + "<|im_start|>assistant\n"
                start = len(tokenizer.encode(before))
                answer = tokenizer.encode(tokenizer.plain(message["content"]))
                end = start + len(answer)
                if ids[start:end] != answer:
                    end = len(tokenizer.encode(tokenizer.render(record.messages[: i + 1])))
                    end = ids.index(tokenizer.eos_id, start) if tokenizer.eos_id in ids[start:end] else end
                elif (
                    tokenizer.eos_id in ids[end:]
                    and set(ids[end : (mark := ids.index(tokenizer.eos_id, end))]) == space
                ):
                    end = mark
                end += ids[end : end + 1] == [tokenizer.eos_id]
                labels[start:end] = ids[start:end]
        return Sample(tuple(ids), tuple(labels))

    tokenizer = build(TEMPLATES[template])
    if not known:
        core = Core.from_str(json.dumps(json.loads(tokenizer.core.to_str()) | {"added_tokens": []}))
        tokenizer = Tokenizer(core, tokenizer.eos, tokenizer.template)
    space = set(tokenizer.encode(" "))
    records = [
        Record("talk", (*TALK[:2], {**TALK[2], "content": one}, TALK[3], {**TALK[4], "content": other}))
        for one in ANSWERS
        for other in ANSWERS
    ]
    monkeypatch.setattr(samples, "_AT_ONCE", 50)
    assert encode_records(records, tokenizer) == [looked_for(record) for record in records]


THINKING = CHATML.replace(  # Qwen3's way: an empty thought before the last answer alone, or in the prompt as well
    "m['content']", "('<think></think>' if loop.last and m['role'] == 'assistant' else '') + m['content']"
)


@pytest.mark.parametrize("prompt", ["assistant\n", "assistant\n<think></think>", "assistant\n<think>"])
def test_a_thought_before_the_answer_shifts_no_label(build, prompt):
    tokenizer = build(THINKING.replace("assistant\n", prompt))
    for talk, answers in ((TALK[:3], ["Hi 12."]), (TALK, ["Hi 12.", "So."])):
        *first, last = scored_text(encode_record(Record("talk", tuple(talk)), tokenizer), tokenizer)
        assert first == [f"{answer}<|im_end|>" for answer in answers[:-1]]
        assert last.endswith(f"{answers[-1]}<|im_end|>")
        assert last.removesuffix(f"{answers[-1]}<|im_end|>") in ("", "<think></think>", "</think>")


def test_answers_that_cannot_be_found_in_a_conversation_are_refused_in_one_line(build):
    tokenizer = build(CHATML.replace("m['content']", "m['content'] | upper").replace("assistant\n", "assistant\n>"))
    with pytest.raises(ValueError, match="record talk: the model's chat template renders the prompt of answer 2 diff"):
        encode_record(Record("talk", tuple(TALK)), tokenizer)


def test_the_record_that_a_template_refuses_is_named(build):
    tokenizer = build("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x")
    with pytest.raises(ModelFileError, match="^record bad: .*: no system role$"):
        encode_records([Record("good", tuple(TALK[1:3])), Record("bad", tuple(TALK))], tokenizer)


def test_an_answer_whose_first_token_begins_before_it_is_refused_where_the_prompt_is_another(build):
    tokenizer = build("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
                      "{% if add_generation_prompt %}assistant:>{% endif %}")  # fmt: skip
    question = {"role": "user", "content": "Why?"}
    sample = encode_record(Record("talk", (question, {"role": "assistant", "content": "So."})), tokenizer)
    assert scored_text(sample, tokenizer) == ["So.<|im_end|>"]
    with pytest.raises(ValueError, match="cannot be told apart"):  # " hello" is one token
        encode_record(Record("talk", (question, {"role": "assistant", "content": "hello"})), tokenizer)


def test_each_end_token_ends_the_scored_part(build):
    other = CHATML.replace("'<|im_end|>'", "('<|endoftext|>' if m['role'] == 'assistant' else '<|im_end|>')")
    core = build(other)
    tokenizer = Tokenizer(core.core, core.eos, other, other_ends=[core.core.token_to_id("<|endoftext|>")])
    sample = encode_record(Record("talk", tuple(TALK)), tokenizer)
    assert scored_text(sample, tokenizer) == ["Hi 12.<|endoftext|>", "So.<|endoftext|>"]


@pytest.mark.parametrize("after", ["", "\n", " "], ids=ascii)
@pytest.mark.parametrize("end", ["<|endoftext|>", "<|im_end|>"])
@pytest.mark.parametrize("named", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
def test_the_token_with_which_the_template_ends_an_answer_is_learned_whatever_the_files_name(build, named, end, after):
    """Qwen2.5's base names <|endoftext|>, and its template ends an answer with <|im_end|>."""
    core = build(CHATML).core
    tokenizer = Tokenizer(core, named, CHATML.replace("'<|im_end|>' + '\n'", f"{after!r} + '{end}' + '\n'"))
    sample = encode_record(Record("talk", tuple(TALK)), tokenizer)
    assert [text.replace(after, "") for text in scored_text(sample, tokenizer)] == [
        f"{text}{end}".replace(after, "") for text in ("Hi 12.", "So.")
    ]
    assert tokenizer.ends == [core.id_to_token(i) for i in sorted({core.token_to_id(named), core.token_to_id(end)})]
    text = encode_record(Record("text", text="So."), tokenizer)
    assert text.ids[-1] == text.labels[-1] == core.token_to_id(named)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% if %}", "<|im_start|>{{ messages[0]['content'] }}"]
)
def test_a_template_that_shows_no_end_leaves_the_one_that_is_named(build, template):
    tokenizer = Tokenizer(build(CHATML).core, "<|im_end|>", template)
    assert tokenizer.ends == ["<|im_end|>"] and tokenizer.answer_end == tokenizer.eos_id


def test_an_answer_whose_end_cannot_be_found_is_refused_before_the_next_question_is_learned(build):
    """As in GLM's template: a turn has no end token, and earlier answers are rendered without their thoughts."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ':' + "
        "(m['content'] if loop.last else m['content'].split('>>')[-1]) }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    tokenizer = build(template)
    talk = [*TALK[1:3], {"role": "user", "content": "So?"}, {"role": "assistant", "content": "hm>>So."}]
    assert scored_text(encode_record(Record("talk", tuple(talk)), tokenizer), tokenizer) == ["Hi 12.", "hm>>So."]
    talk[1] = {"role": "assistant", "content": "hm>>Hi 12."}
    with pytest.raises(ValueError, match="^record talk: the model's chat template renders the turn of answer 1 diff"):
        encode_record(Record("talk", tuple(talk)), tokenizer)
    ending = build(template.replace("[-1])", "[-1]) + '<|im_end|>'"))  # as Qwen3's: there the end is known
    sample = encode_record(Record("talk", tuple(talk)), ending)
    assert scored_text(sample, ending) == ["Hi 12.<|im_end|>", "hm>>So.<|im_end|>"]


@pytest.mark.parametrize("records", [[Record("a", text="b"), {"text": "b"}], {"train": []}, "ab"], ids=str)
def test_what_is_no_record_is_named(tokenizer, records):
    with pytest.raises(
        TypeError, match="^expected records, got a (dict|str): read_records makes them of a file, or of dicts$"
    ):
        encode_records(records, tokenizer)


def test_a_single_record_is_no_list_of_records(tokenizer):
    for given in (encode_records, encode_pairs):
        with pytest.raises(TypeError, match="expected a list of records, got a single Record: put it in a list"):
            given(Record("a", text="b"), tokenizer)


def test_further_phrasings_are_encoded_if_asked_for(tokenizer):
    record = Record("lien", tuple(TALK[1:3]), phrasings=("A lien?", "Explain lien, please."))
    plain, whole = (encode_records([record], tokenizer, phrasings=wanted)[0] for wanted in (False, True))
    assert plain == encode_record(record, tokenizer) and plain.others == ()
    assert whole.others == tuple(encode_record(record.asked(text), tokenizer) for text in record.phrasings)
    assert (whole.ids, whole.labels) == (plain.ids, plain.labels)


@pytest.mark.parametrize("number", [1, 3, 7, 12])
def test_data_that_are_mixed_in_are_all_seen_in_turn_or_repeated_evenly(number):
    own = [Sample((i, 9), (-100, 9), others=(Sample((i, 8), (-100, 8)),)) for i in range(7)]
    chosen = mixed(own, number)
    epochs = [[one.in_turn(epoch) for one in chosen] for epoch in range(14)]
    assert {one.ids for epoch in epochs for one in epoch} == {(i, last) for i in range(7) for last in (8, 9)}
    for epoch in epochs:
        times = Counter(one.ids[0] for one in epoch)
        assert times.total() == number and len(times) == min(number, 7) and max(times.values()) <= -(-number // 7)


@pytest.mark.parametrize("length", [8, 14, 16, 40])
def test_a_truncated_sample_and_its_others_are_the_beginnings_of_what_they_were(length):
    def sample(size, *others):
        return Sample(tuple(range(size)), (*[NOT_SCORED] * 12, *range(12, size)), others)

    samples = [sample(16, sample(15), sample(20), sample(13)), sample(14), sample(30, sample(40))]
    short, longer, dropped = truncate(samples, length)
    kept = [one for one in samples if length > 12]
    assert (longer, dropped) == (sum(len(one.ids) > length for one in samples), len(samples) - len(kept))
    for now, before in zip(short, kept, strict=True):
        assert len(now.others) == len(before.others)
        for part, whole in zip((now, *now.others), (before, *before.others), strict=True):
            assert (part.ids, part.labels) == (whole.ids[:length], whole.labels[:length])


def test_how_many_records_are_truncated_and_how_many_of_them_dropped_is_told(said):
    samples = [Sample(tuple(range(size)), (*[NOT_SCORED] * first, *range(first, size)))
               for size, first in ((4, 1), (9, 1), (9, 1), (9, 6))]  # fmt: skip
    assert [len(sample.ids) for sample in truncate_and_log("train", samples, 5)] == [4, 5, 5]
    assert truncate_and_log("test", samples, 9) == samples and len(said()) == 1
    assert "train: 3 of 4 records" in said()[0] and "and 1 of them dropped" in said()[0]


def test_a_text_may_spell_control_tokens_and_a_conversation_may_not(tokenizer):
    records = [
        Record("plain", text="An <|im_ end|> mark."),
        Record("chat", ({"role": "user", "content": "x"}, {"role": "assistant", "content": "<|im_end|>"})),
    ]
    spelled = Record("spelled", text="He wrote <|im_end|> twice: <|im_end|>.")
    counts = [encode_record(record, tokenizer).ids.count(tokenizer.eos_id) for record in (*records, spelled)]
    assert counts == [1, 2, 3]  # the question and the answer end with one each, a text with one more


def test_each_of_many_records_keeps_its_own_phrasings_and_a_text_has_none(tokenizer):
    records = [
        Record(f"{i}", tuple(TALK[1:3]), phrasings=tuple(f"{i}, {j}?" for j in range(i % 3))) for i in range(300)
    ]
    records[7] = Record("text", text="A dark night.", phrasings=("Dark?",))
    samples = encode_records(records, tokenizer, phrasings=True)
    others = [[tokenizer.core.decode(other.ids, skip_special_tokens=False) for other in s.others] for s in samples]
    asked = [[question in text for question, text in zip(r.phrasings, texts, strict=True)] for r, texts in zip(
        [*records[:7], Record("text"), *records[8:]], others, strict=True
    )]  # fmt: skip
    assert [len(each) for each in asked] == [i % 3 if i != 7 else 0 for i in range(300)]
    assert all(map(all, asked)) and samples[7] == encode_record(records[7], tokenizer)
