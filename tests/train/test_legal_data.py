"""The data that come with minilora are what their card says."""

import json
import re
from collections import Counter, defaultdict
from importlib.resources import files
from itertools import combinations

import pytest

from minilora.train.evaluate import contains

TOPICS = {
    "legal": {
        "contracts", "torts", "property", "procedure", "evidence", "criminal", "corporate", "employment",
        "intellectual-property", "family", "estates", "international",
    },
    "general": {"cooking", "travel", "science", "letters", "small-talk"},
}  # fmt: skip
FIELDS = ["id", "topic", "split", "question", "paraphrase", "answer", "keywords"]


def text_of(name):
    return (files("minilora") / "data" / f"{name}.jsonl").read_text(encoding="utf-8")


RECORDS = {name: [json.loads(line) for line in text_of(name).splitlines()] for name in TOPICS}
LEGAL = RECORDS["legal"]
both = pytest.mark.parametrize("name", TOPICS)


def offenders(name, is_fine):
    return [record["id"] for record in RECORDS[name] if not is_fine(record)]


@both
def test_every_record_has_the_same_filled_fields(name):
    assert offenders(name, lambda r: list(r) == FIELDS and all(r.values())) == []


@both
def test_ids_are_unique_and_made_of_topic_and_slug(name):
    ids = [record["id"] for record in RECORDS[name]]
    assert len(set(ids)) == len(ids)
    assert offenders(name, lambda r: re.fullmatch(rf"{r['topic']}/[a-z0-9]+(-[a-z0-9]+)*", r["id"])) == []


@pytest.mark.parametrize(("name", "each"), [("legal", 25), ("general", 12)])
def test_topics_are_those_of_the_card_and_equally_large(name, each):
    assert Counter(record["topic"] for record in RECORDS[name]) == dict.fromkeys(TOPICS[name], each)


def test_legal_records_are_split_240_30_30_with_20_to_train_on_in_each_topic():
    assert Counter(record["split"] for record in LEGAL) == {"train": 240, "validation": 30, "test": 30}
    by_topic = Counter((record["topic"], record["split"]) for record in LEGAL)
    assert {topic: by_topic[topic, "train"] for topic in TOPICS["legal"]} == dict.fromkeys(TOPICS["legal"], 20)
    assert all(by_topic[topic, split] >= 2 for topic in TOPICS["legal"] for split in ("validation", "test"))


def test_general_records_are_all_for_testing():
    assert Counter(record["split"] for record in RECORDS["general"]) == {"test": 60}


def test_no_term_is_in_two_splits():
    splits = defaultdict(set)
    for record in LEGAL:
        splits[record["id"].partition("/")[2]].add(record["split"])
    assert {term: found for term, found in splits.items() if len(found) > 1} == {}


def test_no_question_or_paraphrase_stands_twice_in_either_file():
    asked = Counter(
        " ".join(re.findall(r"\w+", record[field].lower()))
        for records in RECORDS.values()
        for record in records
        for field in ("question", "paraphrase")
    )
    assert [question for question, count in asked.items() if count > 1] == []


def test_no_two_answers_of_different_splits_share_half_of_their_words():
    words = {record["id"]: set(re.findall(r"\w+", record["answer"].lower())) for record in LEGAL}
    close = [
        (a["id"], b["id"])
        for a, b in combinations(LEGAL, 2)
        if a["split"] != b["split"]
        and len(words[a["id"]] & words[b["id"]]) >= 0.5 * len(words[a["id"]] | words[b["id"]])
    ]
    assert close == []


@both
def test_answers_have_25_to_60_words(name):
    assert offenders(name, lambda r: 25 <= len(r["answer"].split()) <= 60) == []


@both
def test_three_to_five_different_keywords_stand_in_the_answer_as_whole_words(name):
    def is_fine(record):
        words = record["keywords"]
        return 3 <= len(set(words)) == len(words) <= 5 and all(
            re.search(rf"\b{re.escape(word)}\b", record["answer"], re.IGNORECASE) for word in words
        )

    assert offenders(name, is_fine) == []


@both
def test_repeating_the_question_or_the_paraphrase_earns_no_keyword(name):
    def is_fine(record):
        return not any(contains(record[f], word) for f in ("question", "paraphrase") for word in record["keywords"])

    assert offenders(name, is_fine) == []


def test_a_legal_answer_has_two_sentences_the_second_of_which_says_why_it_matters():
    def is_fine(record):
        return record["answer"].count(". It matters ") == 1 and len(re.findall(r"[.!?](?=\s|$)", record["answer"])) == 2

    assert offenders("legal", is_fine) == []


@both
def test_files_are_ascii_lines_without_stray_spaces(name):
    text = text_of(name)
    assert text.isascii() and text.endswith("}\n") and "\r" not in text
    texts = ("question", "paraphrase", "answer")
    assert offenders(name, lambda r: all(r[f] == " ".join(r[f].split()) for f in texts)) == []


def test_the_card_tells_the_counts_the_licence_and_the_limits():
    card = (files("minilora") / "data" / "README.md").read_text(encoding="utf-8")
    for fact in ("300", "240 train, 30 validation, 30 test", "60", "CC0 1.0", "Not legal advice", *TOPICS["legal"]):
        assert fact in card
