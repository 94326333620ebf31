"""Reading and encoding data: every bad line is named, and only answers are scored."""

import hashlib
import json

import pytest
from modelfiles import CONFIG, write_gguf
from tokenizers import Tokenizer as Core

from minilora.data.records import BUILT_IN, Record, read_records, sha256_of_data
from minilora.data.rows import DataError
from minilora.data.samples import encode_record, encode_records, encode_text, truncate
from minilora.engine.fused import NOT_SCORED
from minilora.models.gguf import GGUF
from minilora.models.tokenizer import Tokenizer
from minilora.nn.llama import Llama
from minilora.nn.parts import Sample

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QA = {"question": "What is a lien?", "answer": "A claim."}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Hi 12."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A function that makes a small byte-level tokenizer with this chat template."""
    path = tmp_path_factory.mktemp("tokenizer") / "m.gguf"
    return lambda template: GGUF(
        write_gguf(path, Llama(CONFIG), change={"tokenizer.chat_template": template})
    ).tokenizer()


@pytest.fixture(scope="module")
def tokenizer(build):
    return build(CHATML)


@pytest.fixture
def write(tmp_path):
    """A function that writes lines (dicts become JSON) into a file and returns its path."""

    def write(*lines, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
        return path

    return write


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_question_with_everything_known_about_it_is_read(write):
    known = {"id": "x/lien", "topic": "x", "split": "test", "paraphrase": "Define lien.", "keywords": ["claim"]}
    known |= {"phrasings": ["A lien?", "Explain lien."], "validation_paraphrase": "Lien: what?"}
    (record,) = read_records(write(QA | known))
    user, assistant = {"role": "user", "content": QA["question"]}, {"role": "assistant", "content": QA["answer"]}
    assert record == Record(
        "x/lien", (user, assistant), "", "test", "Define lien.", ("claim",), ("A lien?", "Explain lien."), "Lien: what?"
    )
    assert record.prompt == [user]
    assert record.other_questions == ["A lien?", "Explain lien.", "Define lien.", "Lien: what?"]
    assert record.asked_otherwise().messages == ({"role": "user", "content": "Define lien."}, assistant)


def test_a_record_without_paraphrase_cannot_be_asked_otherwise(write):
    (record,) = read_records(write(QA))
    with pytest.raises(ValueError, match="line-1 has no paraphrase"):
        record.asked_otherwise()


def test_a_chat_asked_otherwise_is_its_system_message_the_paraphrase_and_the_last_answer(write):
    (record,) = read_records(write({"messages": TALK, "paraphrase": "How come?", "id": "t", "keywords": ["so"]}))
    other = record.asked_otherwise()
    assert other.messages == (TALK[0], {"role": "user", "content": "How come?"}, TALK[-1])
    assert (other.id, other.keywords, record.messages) == ("t", ("so",), tuple(TALK))


def test_a_chat_is_read_with_all_its_turns_and_other_keys_dropped(write):
    (record,) = read_records(write({"messages": [m | {"name": "x"} for m in TALK]}))
    assert record.messages == tuple(TALK) and record.prompt == TALK[:-1]


def test_blank_lines_are_skipped_and_still_counted(write):
    assert [r.id for r in read_records(write(QA, "", "  ", QA))] == ["line-1", "line-4"]


def test_a_text_file_is_one_record_of_text(write):
    assert read_records(write("One.", "Two.", name="novel.txt")) == [Record("novel", (), "One.\nTwo.")]


@pytest.mark.parametrize(("name", "count"), list(zip(BUILT_IN, (300, 120, 120, 120, 60), strict=True)))
def test_built_in_data_are_read_by_name_and_fit_the_tokenizer(tokenizer, name, count):
    assert len(read_records(name, tokenizer)) == count


BAD = [  # a line, what is said of it
    ("{", "not JSON"),
    ("[1]", "expected a JSON object, got list"),
    ({}, "an empty object"),
    ({"words": "x", "n": 1}, "text; got words, n: name yours with --field question=... answer=..."),
    ({"question": "x", "n": 1}, "question/answer without answer; there are question, n: say which it is with --field"),
    ({"answer": "x"}, "question/answer without question; there are answer"),
    ({"question": "x", "answer": None}, "answer must be a non-empty text, got None"),
    ({"instruction": "x", "input": "y"}, "instruction/output without output; there are instruction, input"),
    ({"instruction": "x", "output": ""}, "output must be a non-empty text, got ''"),
    ({"text": " "}, "text must be a non-empty text"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "message 1 needs a role"),
    ({"conversations": [{"from": "human", "value": "x"}]}, "the last message must be the assistant's"),
    ({"conversations": [{"from": "human"}]}, "value must be a non-empty text, got None"),
    (QA | {"answer": " "}, "answer must be a non-empty text"),
    (QA | {"question": 5}, "question must be a non-empty text, got 5"),
    (QA | {"paraphrase": ""}, "paraphrase must be a non-empty text"),
    (QA | {"validation_paraphrase": 5}, "validation_paraphrase must be a non-empty text, got 5"),
    (QA | {"split": "dev"}, "split is 'dev', expected one of train, validation, test"),
    (QA | {"keywords": "claim"}, "keywords must be a list, such as ["),
    (QA | {"keywords": ["claim", ""]}, "keywords must be a list of words"),
    (QA | {"phrasings": "A lien?"}, "phrasings must be a list, such as ["),
    (QA | {"phrasings": ["A lien?", " "]}, "phrasings must be a list of questions"),
    ({"messages": []}, "messages must be a non-empty list"),
    ({"messages": "hello"}, "messages must be a list, such as ["),
    ({"messages": 5}, "messages must be a non-empty list, got 5"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "message 1 needs a role"),
    ({"messages": [TALK[1], "hello"]}, "message 2 needs a role"),
    ({"messages": [{"role": "assistant", "content": ""}]}, "content must be a non-empty text"),
    ({"messages": [TALK[0], *TALK[2:]]}, "the first message must be the user's"),
    ({"conversations": [{"from": "gpt", "value": "Hello!"}]}, "the first message must be the user's"),
    ({"messages": TALK[:4]}, "the last message must be the assistant's"),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=[reason[:30] for _, reason in BAD])
def test_a_bad_line_is_named_with_its_reason(write, line, reason):
    path = write(QA, line)
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}:2: ") and reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [BAD[i : i + 20] for i in range(0, len(BAD), 20)])
def test_all_bad_lines_are_reported_at_once(write, bad):
    path = write(*(line for line, _ in bad))
    with pytest.raises(DataError) as caught:
        read_records(path)
    told = str(caught.value).split("\n")
    for number, (line, (_, reason)) in enumerate(zip(told, bad, strict=True), 1):
        assert line.startswith(f"{path}:{number}: ") and reason in line


def test_a_flood_of_bad_lines_is_cut_short_and_counted(write):
    with pytest.raises(DataError) as caught:
        read_records(write(*["{"] * 50))
    told = str(caught.value).split("\n")
    assert len(told) == 21 and told[-1] == "and 30 more bad lines"


def test_an_id_that_stands_twice_is_reported_with_its_first_line(write):
    with pytest.raises(DataError, match=r":3: id 'a' stands in line 1 already$"):
        read_records(write(QA | {"id": "a"}, QA | {"id": "b"}, QA | {"id": "a"}))


@pytest.mark.parametrize("field", ["question", "answer", "paraphrase", "validation_paraphrase"])
def test_a_control_character_without_a_token_is_reported_if_the_tokenizer_is_known(write, tokenizer, field):
    path = write(QA, QA | {field: "ab\x1b"})
    with pytest.raises(DataError, match=r":2: character '\\x1b' at position 2"):
        read_records(path, tokenizer)
    assert len(read_records(path)) == 2


def test_a_control_character_in_plain_text_is_reported(write, tokenizer):
    with pytest.raises(DataError, match=r"a\.txt: character '\\x1b' at position 1"):
        read_records(write("a\x1b", name="a.txt"), tokenizer)


@pytest.mark.parametrize("content", ["", " \n\n\t\n"])
def test_an_empty_file_is_an_error(write, content):
    with pytest.raises(DataError, match="the file is empty"):
        read_records(write(content))


def test_a_missing_file_is_an_error_that_says_what_would_do(tmp_path):
    with pytest.raises(DataError, match=r"absent.jsonl: no such data file or folder; use a \.jsonl, .*, general$"):
        read_records(tmp_path / "absent.jsonl")


def test_a_file_that_is_not_utf8_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(QA).encode() + b"\xff\xfe")
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read as UTF-8 text"):
        read_records(tmp_path / "a.jsonl")


# -- encoding ----------------------------------------------------------------------------------------------------------


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
    assert item.scored == len(tokenizer.encode("Hi 12.So.")) + 2


def test_labels_are_the_ids_themselves_where_they_are_scored(tokenizer):
    item = encode_record(Record("talk", tuple(TALK)), tokenizer)
    assert {a - b for a, b in zip(item.ids, item.labels, strict=True) if b != NOT_SCORED} == {0}
    assert len(item.ids) == len(item.labels)


def test_an_answer_that_the_template_trims_is_scored_up_to_its_end_mark(build):
    trimming = build(CHATML.replace("m['content']", "m['content'] | trim"))
    messages = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": " So.  "})
    assert scored_text(encode_record(Record("x", messages), trimming), trimming) == ["So.<|im_end|>"]


def test_text_is_cut_into_sequences_that_lose_nothing_and_score_all_but_their_first_token(tokenizer):
    text = "It was a dark and stormy night." * 3
    parts = encode_text(text, tokenizer, max_length=10)
    assert tokenizer.decode([i for part in parts for i in part.ids]) == text
    assert all(len(part.ids) == 10 for part in parts[:-1])
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


def test_a_last_sequence_of_one_token_is_left_out_since_nothing_in_it_is_scored(tokenizer):
    assert [len(part.ids) for part in encode_text("abcdefg", tokenizer, max_length=3)] == [3, 3]


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


@pytest.mark.parametrize("known", [True, False], ids=["end mark known", "end mark spelled out"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_many_records_at_once_are_scored_as_when_each_answer_is_looked_for_alone(build, template, known):
    def looked_for(record):
        ids = tokenizer.encode_chat(record.messages)
        labels = [NOT_SCORED] * len(ids)
        for i, message in enumerate(record.messages):
            if message["role"] == "assistant":
                start = len(tokenizer.encode_chat(record.messages[:i], answer_next=True))
                answer = tokenizer.encode(tokenizer.plain(message["content"]))
                end = start + len(answer)
                if ids[start:end] != answer:
                    end = ids.index(tokenizer.eos_id, start) if tokenizer.eos_id in ids[start:] else len(ids)
                end += ids[end : end + 1] == [tokenizer.eos_id]
                labels[start:end] = ids[start:end]
        return Sample(tuple(ids), tuple(labels))

    tokenizer = build(TEMPLATES[template])
    if not known:
        core = Core.from_str(json.dumps(json.loads(tokenizer.core.to_str()) | {"added_tokens": []}))
        tokenizer = Tokenizer(core, tokenizer.eos, tokenizer.template)
    records = [
        Record("talk", (*TALK[:2], {**TALK[2], "content": one}, TALK[3], {**TALK[4], "content": other}))
        for one in ANSWERS
        for other in ANSWERS
    ]
    assert encode_records(records * 4, tokenizer) == [looked_for(record) for record in records] * 4


def test_further_phrasings_are_encoded_if_asked_for_and_cut_like_the_rest(write, tokenizer):
    (record,) = read_records(write(QA | {"phrasings": ["A lien?", "Explain lien."]}))
    plain, whole = (encode_records([record], tokenizer, phrasings=wanted)[0] for wanted in (False, True))
    assert plain == encode_record(record, tokenizer) and plain.others == ()
    assert whole.others == tuple(encode_record(record.asked(text), tokenizer) for text in record.phrasings)
    assert (whole.ids, whole.labels) == (plain.ids, plain.labels)
    (short,), longer, dropped = truncate([whole], len(plain.ids) - 1)
    assert longer == 1 and dropped == 0 and all(len(s.ids) <= len(plain.ids) - 1 for s in (short, *short.others))


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


def test_the_hash_of_data_is_what_sha256sum_prints(tmp_path):
    for name, text in (("train.jsonl", '{"q": "a", "a": "b"}\n'), ("test.jsonl", '{"q": "c", "a": "d"}\n')):
        (tmp_path / name).write_text(text, encoding="utf-8")
    one, other = (hashlib.sha256((tmp_path / f"{name}.jsonl").read_bytes()).hexdigest() for name in ("train", "test"))
    assert sha256_of_data(tmp_path / "train.jsonl") == one
    whole = hashlib.sha256(f"{one}  train.jsonl\n{other}  test.jsonl\n".encode()).hexdigest()
    assert sha256_of_data(tmp_path) == whole
    (tmp_path / "README.md").write_text("not read")
    assert sha256_of_data(tmp_path) == whole
    with pytest.raises(DataError, match="no such data file"):
        sha256_of_data(tmp_path / "absent.jsonl")
    assert len(sha256_of_data("legal")) == 64
