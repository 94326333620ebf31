"""Reading and batching data: every bad line is named, only answers are scored, packing changes no number."""

import hashlib
import json
from itertools import islice

import numpy as np
import pytest
from modelfiles import CONFIG, write_gguf

from minilora.engine.fused import NOT_SCORED
from minilora.engine.tensor import no_grad
from minilora.io.gguf import GGUF
from minilora.nn.llama import Llama
from minilora.nn.parts import Sample, common_prefix, pack
from minilora.train.data import (
    BUILT_IN,
    DataError,
    Record,
    cut,
    encode_record,
    encode_records,
    encode_text,
    epochs,
    read_records,
    sha256_of_data,
)

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


def sample(*ids, unscored):
    return Sample(ids, (*[NOT_SCORED] * unscored, *ids[unscored:]))


def random_samples(rng, sizes, shared=0):
    start = rng.integers(0, 64, shared).tolist()
    return [sample(*start, *rng.integers(0, 64, n - shared).tolist(), unscored=shared + 2) for n in sizes]


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


def test_cutting_tells_how_many_were_cut_and_how_many_were_lost():
    samples = [sample(*range(n), unscored=4) for n in (4 + 1, 8, 9, 20)] + [sample(*range(12), unscored=8)]
    kept, longer, dropped = cut(samples, 8)
    assert [len(s.ids) for s in kept] == [5, 8, 8, 8] and kept[3] == sample(*range(8), unscored=4)
    assert (longer, dropped) == (3, 1)


# -- packing -----------------------------------------------------------------------------------------------------------


PREFIXES = [  # samples, how many tokens they share
    ([sample(1, 2, 3, 4, unscored=3)], 0),
    ([sample(1, 2, 3, 4, unscored=3), sample(1, 2, 9, 4, unscored=3)], 2),
    ([sample(1, 2, 3, 4, unscored=3), sample(1, 2, 3, 5, unscored=3)], 2),  # one unscored token is left to each
    ([sample(1, 2, 3, 4, unscored=3), sample(5, 2, 3, 4, unscored=3)], 0),
    ([sample(1, 2, 3, 4, 5, unscored=4), sample(1, 2, 3, 4, 5, unscored=2)], 1),
    ([sample(1, 2, unscored=1), sample(1, 3, unscored=1)], 0),
    ([sample(1, 2, unscored=0), sample(1, 2, unscored=0)], 0),
]


@pytest.mark.parametrize(("samples", "shared"), PREFIXES)
def test_the_common_beginning_leaves_each_sample_an_unscored_token_of_its_own(samples, shared):
    assert common_prefix(samples) == shared


def test_a_packed_row_has_the_common_beginning_once_and_positions_as_in_separate_rows():
    batch = pack([sample(1, 2, 3, 4, unscored=3), sample(1, 2, 5, 6, 7, unscored=3)])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch.labels.tolist() == [[*[NOT_SCORED] * 3, 4, NOT_SCORED, 6, 7]]
    assert batch.packing.positions() == [0, 1, 2, 3, 2, 3, 4]
    assert batch.scored == 3


@pytest.mark.parametrize("shared", [0, 1, 6])
def test_the_packed_loss_is_the_token_weighted_loss_of_separate_rows(tiny_model, rng, shared):
    samples = random_samples(rng, (9, 14, 30, 11), shared)
    batch = pack(samples)
    assert batch.input_ids.size == sum(len(s.ids) for s in samples) - 3 * common_prefix(samples)
    assert common_prefix(samples) >= shared
    with no_grad():
        packed = tiny_model.loss(batch.input_ids, batch.labels, batch.packing).item()
        alone = [tiny_model.loss(np.array([s.ids]), np.array([s.labels])).item() for s in samples]
    expected = np.average(alone, weights=[s.scored for s in samples])
    assert packed == pytest.approx(expected, rel=2e-6)
    assert batch.scored == sum(s.scored for s in samples)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 20])
def test_every_epoch_has_every_sample_once(batch_size):
    samples = [sample(0, n, n, unscored=2) for n in range(1, 11)]  # the scored token tells which sample it is
    per_epoch = -(-len(samples) // batch_size)
    batches = epochs(samples, batch_size, seed=3)
    orders = []
    for _ in range(3):
        orders.append([s.labels[-1] for batch in islice(batches, per_epoch) for s in batch])
    assert all(sorted(order) == list(range(1, 11)) for order in orders)
    assert orders[0] != orders[1]


def test_every_epoch_asks_in_other_words_until_all_were_taken():
    samples = [
        Sample((1, n, 0), (NOT_SCORED, NOT_SCORED, n), tuple(sample(0, n, m, unscored=2) for m in (10 + n, 20 + n)))
        for n in range(1, 6)
    ]
    batches = epochs(samples, 5, seed=0)
    seen = [{s.ids: s.labels[-1] for s in next(batches)}.values() for _ in range(4)]
    by_record = [{word % 10: word // 10 for word in words} for words in seen]  # record -> which of its three wordings
    assert all(set(turn) == {1, 2, 3, 4, 5} for turn in by_record)
    for n in range(1, 6):
        turns = [turn[n] for turn in by_record]
        assert sorted(turns[:3]) == [0, 1, 2] and turns[3] == turns[0]
    assert len(set(by_record[0].values())) == 3  # in one epoch, all kinds of questions are asked


def test_further_phrasings_are_encoded_if_asked_for_and_cut_like_the_rest(write, tokenizer):
    (record,) = read_records(write(QA | {"phrasings": ["A lien?", "Explain lien."]}))
    plain, whole = (encode_records([record], tokenizer, phrasings=wanted)[0] for wanted in (False, True))
    assert plain == encode_record(record, tokenizer) and plain.others == ()
    assert whole.others == tuple(encode_record(record.asked(text), tokenizer) for text in record.phrasings)
    assert (whole.ids, whole.labels) == (plain.ids, plain.labels)
    (short,), longer, dropped = cut([whole], len(plain.ids) - 1)
    assert longer == 1 and dropped == 0 and all(len(s.ids) <= len(plain.ids) - 1 for s in (short, *short.others))


def test_the_order_of_an_epoch_depends_on_the_seed_alone(rng):
    samples = random_samples(rng, range(4, 24))

    def order(seed):
        return list(islice(epochs(samples, 4, seed), 12))

    assert order(1) == order(1)
    assert order(1) != order(2)


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
