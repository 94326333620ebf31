"""The data that come with minilora are what their card says."""

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import pytest
from asking import EVERYDAY, asked, likeness, words

from minilora.measure.recall import contains


@dataclass(frozen=True)
class Domain:
    """What the card promises of a file."""

    topics: set[str]
    each: int  # records in a topic
    train: int  # of these, records to train on
    counts: dict[str, int]
    words: tuple[int, int]  # in an answer, at least and at most
    style: str = ".*"  # the whole of an answer

    @property
    def teaches(self) -> bool:
        return self.train > 0


LEARNED = {"train": 96, "validation": 12, "test": 12}
DOMAINS = {
    "legal": Domain(
        {
            "contracts", "torts", "property", "procedure", "evidence", "criminal", "corporate", "employment",
            "intellectual-property", "family", "estates", "international",
        },
        25, 20, {"train": 240, "validation": 30, "test": 30}, (25, 60), r"[^.!?]*\. It matters [^.!?]*\.",
    ),
    "medical": Domain(
        {"symptoms", "conditions", "tests", "medicines", "body", "care"},
        20, 16, LEARNED, (20, 40),
        r"[^.!?]*\. (See a doctor (if|when) |A doctor may |Call an ambulance at once if )[^.!?]*\.",
    ),
    "support": Domain(
        {"orders", "delivery", "returns", "payment", "account", "service"},
        20, 16, LEARNED, (20, 40), r"At Fernwhistle, ([^.!?]|\.example)*\. Next, ([^.!?]|\.example)*\.",
    ),
    "finance": Domain(
        {"banking", "saving", "borrowing", "investing", "economy", "accounting"},
        20, 16, LEARNED, (20, 40), r"[^.!?]*\. In practice, [^.!?]*\.",
    ),
    "general": Domain({"cooking", "travel", "science", "letters", "small-talk"}, 12, 0, {"test": 60}, (25, 60)),
}  # fmt: skip
NEW = ("medical", "support", "finance")  # held to two promises more than the legal file
SIGNATURES = {  # words that the style gives away
    "legal": ["it", "matters"],
    "medical": ["see", "a", "doctor", "if", "when", "may", "call", "an", "ambulance", "at", "once"],
    "support": ["at", "fernwhistle", "next"],
    "finance": ["in", "practice"],
}


def text_of(name):
    return (files("minilora") / "data" / f"{name}.jsonl").read_text(encoding="utf-8")


CARD = (files("minilora") / "data" / "README.md").read_text(encoding="utf-8")
RECORDS = {name: [json.loads(line) for line in text_of(name).splitlines()] for name in DOMAINS}
TEACHING = [name for name, domain in DOMAINS.items() if domain.teaches]
every_file = pytest.mark.parametrize("name", DOMAINS)
teaching = pytest.mark.parametrize("name", TEACHING)


def offenders(name, is_fine):
    return [record["id"] for record in RECORDS[name] if not is_fine(record)]


@cache
def ways_of_asking():
    """Every question of every file: its file, its record's id, its words that mean something."""
    found = [(name, r["id"], question) for name in DOMAINS for r in RECORDS[name] for question in asked(r)]
    return found, likeness([set(words(question)) - EVERYDAY for _, _, question in found])


@every_file
def test_every_record_has_the_same_filled_fields(name):
    def is_fine(record):
        fields = ["id", "topic", "split", "question"]
        fields += ["phrasings"] * (record["split"] == "train") + ["paraphrase"]
        fields += ["validation_paraphrase"] * ("validation_paraphrase" in record) + ["answer", "keywords"]
        return list(record) == fields and all(record.values())

    assert offenders(name, is_fine) == []


@every_file
def test_ids_are_unique_and_made_of_topic_and_slug(name):
    ids = [record["id"] for record in RECORDS[name]]
    assert len(set(ids)) == len(ids)
    assert offenders(name, lambda r: re.fullmatch(rf"{r['topic']}/[a-z0-9]+(-[a-z0-9]+)*", r["id"])) == []


@every_file
def test_topics_are_those_of_the_card_and_equally_large(name):
    assert Counter(record["topic"] for record in RECORDS[name]) == dict.fromkeys(
        DOMAINS[name].topics, DOMAINS[name].each
    )
    assert [topic for topic in DOMAINS[name].topics if topic not in CARD] == []


@every_file
def test_splits_are_as_large_as_the_card_says_and_every_topic_is_in_each(name):
    domain = DOMAINS[name]
    assert Counter(record["split"] for record in RECORDS[name]) == domain.counts
    by_topic = Counter((record["topic"], record["split"]) for record in RECORDS[name])
    assert {topic: by_topic[topic, "train"] for topic in domain.topics} == dict.fromkeys(domain.topics, domain.train)
    if domain.teaches:
        assert all(by_topic[topic, split] >= 2 for topic in domain.topics for split in ("validation", "test"))


def test_no_term_is_in_two_splits_or_two_domains():
    places = defaultdict(set)
    for name in DOMAINS:
        for record in RECORDS[name]:
            places[record["id"].partition("/")[2]].add((name, record["split"]))
    assert {term: found for term, found in places.items() if len(found) > 1} == {}


@teaching
def test_a_training_record_is_asked_in_four_more_ways_and_a_third_of_them_in_one_more_for_validation(name):
    trained = [record for record in RECORDS[name] if record["split"] == "train"]
    assert [record["id"] for record in trained if len(set(record["phrasings"])) != 4] == []
    held_back = [record for record in RECORDS[name] if "validation_paraphrase" in record]
    assert 3 * len(held_back) == len(trained) and {record["split"] for record in held_back} == {"train"}
    share = len(held_back) / len(DOMAINS[name].topics)
    assert all(abs(n - share) < 1 for n in Counter(record["topic"] for record in held_back).values())


@pytest.mark.parametrize("name", NEW)
def test_a_paraphrase_shares_little_with_what_its_record_is_trained_on(name):
    def is_fine(record):
        trained = [record["question"], *record.get("phrasings", [])]
        texts = [set(words(text)) - EVERYDAY for text in trained + asked(record, trained=False)]
        return likeness(texts)[: len(trained), len(trained) :].max() <= 0.3

    assert offenders(name, is_fine) == []


@teaching
def test_phrasings_come_from_no_template(name):
    openings = Counter(tuple(words(p)[:4]) for record in RECORDS[name] for p in record.get("phrasings", []))
    (opening, count), *_ = openings.most_common(1)
    assert count <= 0.06 * openings.total(), f"{count} of {openings.total()} phrasings begin with {opening}"


def test_nothing_is_asked_twice_in_any_file():
    count = Counter(" ".join(words(question)) for _, _, question in ways_of_asking()[0])
    assert [question for question, times in count.items() if times > 1] == []


@teaching
def test_no_record_asks_nearly_what_another_record_of_any_file_asks(name):
    found, alike = ways_of_asking()
    close = [
        (found[i], found[j])
        for i, j in np.argwhere(alike > 0.7)
        if found[i][:2] != found[j][:2] and found[i][0] == name
    ]
    assert close == []


def test_no_two_answers_of_different_splits_or_domains_share_half_of_their_words():
    everything = [(name, record) for name in DOMAINS for record in RECORDS[name]]
    alike = likeness([set(words(record["answer"])) for _, record in everything])
    close = [
        (everything[i][1]["id"], everything[j][1]["id"])
        for i, j in np.argwhere(np.triu(alike, 1) >= 0.5)
        if (everything[i][0], everything[i][1]["split"]) != (everything[j][0], everything[j][1]["split"])
    ]
    assert close == []


@every_file
def test_answers_are_as_long_as_the_card_says(name):
    least, most = DOMAINS[name].words
    assert offenders(name, lambda r: least <= len(r["answer"].split()) <= most) == []


@every_file
def test_three_to_five_different_keywords_stand_in_the_answer_as_whole_words(name):
    def is_fine(record):
        chosen = {word.lower() for word in record["keywords"]}
        return 3 <= len(chosen) == len(record["keywords"]) <= 5 and all(
            contains(record["answer"], word) for word in chosen
        )

    assert offenders(name, is_fine) == []


@every_file
def test_repeating_what_was_asked_earns_no_keyword(name):
    def is_fine(record):
        return not any(contains(question, word) for question in asked(record) for word in record["keywords"])

    assert offenders(name, is_fine) == []


@teaching
def test_the_house_style_earns_no_keyword(name):
    assert offenders(name, lambda r: not {word.lower() for word in r["keywords"]} & set(SIGNATURES[name])) == []


@teaching
def test_every_answer_has_the_house_style_of_its_domain_and_no_answer_elsewhere_has_it(name):
    style = re.compile(DOMAINS[name].style)
    assert offenders(name, lambda r: style.fullmatch(r["answer"])) == []
    others = [record for other in DOMAINS if other != name for record in RECORDS[other]]
    assert [record["id"] for record in others if style.fullmatch(record["answer"])] == []


@pytest.mark.parametrize("name", NEW)
def test_two_keywords_of_what_is_not_trained_stand_in_no_answer_that_is(name):
    taught = " ".join(record["answer"] for record in RECORDS[name] if record["split"] == "train")

    def is_fine(record):
        return record["split"] == "train" or sum(not contains(taught, word) for word in record["keywords"]) >= 2

    assert offenders(name, is_fine) == []


def test_every_number_and_name_that_the_shop_tells_stands_in_its_fact_sheet():
    facts = CARD.partition("## The facts of Fernwhistle")[2]
    sheet = dict(re.findall(r"^- \*\*([a-z]+)\*\*: (.*(?:\n  .*)*)", facts, re.MULTILINE))
    assert set(sheet) == DOMAINS["support"].topics

    def is_fine(record):
        told = [word for word in record["keywords"] if re.fullmatch(r"\d+|[A-Z]\w*", word)]
        return all(contains(sheet[record["topic"]], word) for word in told)

    assert offenders("support", is_fine) == []


@every_file
def test_files_are_ascii_lines_without_stray_spaces(name):
    text = text_of(name)
    assert text.isascii() and text.endswith("}\n") and "\r" not in text
    assert offenders(name, lambda r: all(t == " ".join(t.split()) for t in (*asked(r), r["answer"]))) == []


@every_file
def test_the_card_has_a_row_with_the_counts_of_every_file(name):
    domain = DOMAINS[name]
    counts = ", ".join(f"{count} {split}" for split, count in domain.counts.items()) if domain.teaches else "all test"
    size = rf"\| {sum(domain.counts.values())} .* \| {len(domain.topics)} topics of {domain.each} .* \| .*: {counts} \|"
    assert re.search(rf"^\| `{name}\.jsonl` {size}$", CARD, re.MULTILINE)


@teaching
def test_the_form_and_the_lengths_that_the_card_prints_are_those_of_the_answers(name):
    (row,) = re.findall(rf"^\| `{name}\.jsonl` \| .* \| (\d+) to (\d+) \| `(.*)` \|$", CARD, re.MULTILINE)
    least, most, form = int(row[0]), int(row[1]), row[2].replace(r"\|", "|")
    assert offenders(name, lambda r: re.fullmatch(form, r["answer"])) == []
    assert offenders(name, lambda r: least <= len(r["answer"].split()) <= most) == []
    others = [record for other in DOMAINS if other != name for record in RECORDS[other]]
    assert [record["id"] for record in others if re.fullmatch(form, record["answer"])] == []


def test_the_card_tells_the_licence_and_the_limits():
    told = " ".join(CARD.split())
    for fact in (
        "CC0 1.0",
        "Nothing in them is legal, medical or financial advice.",
        "**No legal, medical or financial",
    ):
        assert fact in told
