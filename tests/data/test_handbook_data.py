"""The handbooks are what their card says: every fact once, with its keywords, paraphrased from the answer's."""

import re
from collections import Counter

import pytest
from asking import DATA, rows_of, runs

from minilora.data.records import read_handbook, read_records
from minilora.measure.recall import contains
from minilora.models.load import load_tokenizer

CARD = (DATA / "README.md").read_text(encoding="utf-8")
DOMAINS = [name for name in ("legal", "medical", "support", "finance") if (DATA / f"{name}-handbook.jsonl").is_file()]
each_domain = pytest.mark.parametrize("domain", DOMAINS)
SHARED = 8  # words in a row that no passage has in common with an answer


def passages(domain):
    return rows_of(f"{domain}-handbook")


def records(domain):
    return {record["id"]: record for record in rows_of(domain)}


def test_the_card_names_the_files_that_exist():
    section = CARD.partition("## Handbooks")[2].partition("\n## ")[0]
    assert sorted(set(re.findall(r"`(\w+)-handbook\.jsonl`", section))) == sorted(DOMAINS) != []


@each_domain
def test_every_passage_has_the_id_and_the_length_of_the_card(domain):
    for passage in passages(domain):
        assert re.fullmatch(r"[a-z-]+/[a-z0-9-]+", passage["id"])
        assert 3 <= len(passage["covers"]) <= 5 and 80 <= len(passage["text"].split()) <= 180


@each_domain
def test_every_record_is_covered_once_by_a_passage_of_its_topic(domain):
    covered = Counter(record for passage in passages(domain) for record in passage["covers"])
    assert covered == dict.fromkeys(records(domain), 1)
    assert all(
        name.startswith(passage["id"].partition("/")[0] + "/")
        for passage in passages(domain)
        for name in passage["covers"]
    )


@each_domain
def test_a_passage_contains_the_keywords_of_its_records(domain):
    missing = [
        (passage["id"], name, word)
        for passage in passages(domain)
        for name in passage["covers"]
        for word in records(domain)[name]["keywords"]
        if not contains(passage["text"], word)
    ]
    assert missing == []


@each_domain
def test_no_passage_shares_eight_words_in_a_row_with_an_answer(domain):
    answered = set().union(*(runs(record["answer"], SHARED) for record in records(domain).values()))
    assert [passage["id"] for passage in passages(domain) if runs(passage["text"], SHARED) & answered] == []


@each_domain
def test_question_and_answer_together_find_the_passage_that_covers_them(domain):
    handbook = read_handbook(f"{domain}-handbook", load_tokenizer("tiny"), 2000)
    covered_by = {name: passage["id"] for passage in passages(domain) for name in passage["covers"]}
    found = [handbook.right(record.messages).id == covered_by[record.id] for record in read_records(domain)]
    assert sum(found) >= 0.98 * len(found)
