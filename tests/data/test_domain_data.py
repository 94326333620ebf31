"""The data that come with minilora are what their card says."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from asking import DATA, EVERYDAY, asked, likeness, pairs_alike, paraphrases, rows_of, runs, trained, words

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
        20, 16, LEARNED, (20, 42), r"[A-Z][^.!?]*\. At Fernwhistle, ([^.!?]|\.example)*\. Next, ([^.!?]|\.example)*\.",
    ),
    "finance": Domain(
        {"banking", "saving", "borrowing", "investing", "economy", "accounting"},
        20, 16, LEARNED, (20, 40), r"[^.!?]*\. In practice, [^.!?]*\.",
    ),
    "general": Domain({"cooking", "travel", "science", "letters", "small-talk"}, 12, 0, {"test": 60}, (25, 60)),
}  # fmt: skip
NEW = ("medical", "support", "finance")  # held to two promises more than the legal file
PHRASINGS = {"legal": 4, **dict.fromkeys(NEW, 12)}
SIGNATURES = {  # words that the style gives away
    "legal": ["it", "matters"],
    "medical": ["see", "a", "doctor", "if", "when", "may", "call", "an", "ambulance", "at", "once"],
    "support": ["at", "fernwhistle", "next"],
    "finance": ["in", "practice"],
}


CARD = (DATA / "README.md").read_text(encoding="utf-8")
RECORDS = {name: rows_of(name) for name in DOMAINS}
TEACHING = [name for name, domain in DOMAINS.items() if domain.teaches]
every_file = pytest.mark.parametrize("name", DOMAINS)
teaching = pytest.mark.parametrize("name", TEACHING)


def ways_of_asking():
    """Every question of every file: its file, its record's id, its text."""
    return [(name, r["id"], question) for name in DOMAINS for r in RECORDS[name] for question in asked(r)]


# -- what holds of each record: a promise of the card is a function of a file's name and one of its records ------------


def same_fields(name, record):
    fields = ["id", "topic", "split", "question"]
    fields += ["phrasings"] * (record["split"] == "train") + ["reworded"] * ("reworded" in record) + ["paraphrase"]
    fields += ["validation_paraphrase"] * ("validation_paraphrase" in record) + ["answer", "keywords"]
    return list(record) == fields and all(record.values())


def id_of_topic_and_slug(name, record):
    return re.fullmatch(rf"{record['topic']}/[a-z0-9]+(-[a-z0-9]+)*", record["id"])


def more_phrasings(name, record):
    return record["split"] != "train" or not DOMAINS[name].teaches or len(set(record["phrasings"])) == PHRASINGS[name]


def paraphrase_unlike_what_is_trained(name, record):
    known = trained(record)
    texts = [set(words(text)) - EVERYDAY for text in known + paraphrases(record)]
    return name not in NEW or likeness(texts)[: len(known), len(known) :].max() <= 0.3


def reworded_in_some_of_the_same_words(name, record):
    if "reworded" not in record:
        return True
    known, text = trained(record), record["reworded"]
    shared = {*words(record["question"])} & {*words(text)} - EVERYDAY
    alike = likeness([set(words(one)) for one in (text, *known)])[0, 1:].max()
    return shared and alike <= 0.67 and not any(runs(text) & runs(one) for one in known)


def length_of_answer(name, record):
    least, most = DOMAINS[name].words
    return least <= len(record["answer"].split()) <= most


def keywords_in_answer(name, record):
    chosen = {word.lower() for word in record["keywords"]}
    in_answer = all(contains(record["answer"], word) for word in chosen)
    return 3 <= len(chosen) == len(record["keywords"]) <= 5 and in_answer


def no_keyword_for_repeating_the_question(name, record):
    return not any(contains(question, word) for question in asked(record) for word in record["keywords"])


def no_keyword_for_the_house_style(name, record):
    return not {word.lower() for word in record["keywords"]} & set(SIGNATURES.get(name, ()))


def house_style(name, record):
    return re.fullmatch(DOMAINS[name].style, record["answer"])


def two_keywords_that_training_does_not_show(name, record):
    return name not in NEW or record["split"] == "train" or has_two_new_keywords(name, record)


def has_two_new_keywords(name, record):
    return sum(not contains(taught(name), word) for word in record["keywords"]) >= 2


def facts_of_the_sheet(name, record):
    stated = [word for word in record["keywords"] if re.fullmatch(r"\d+|[A-Z]\w*", word)]
    return name != "support" or all(contains(fact_sheet()[record["topic"]], word) for word in stated)


def no_stray_spaces(name, record):
    return all(text == " ".join(text.split()) for text in (*asked(record), record["answer"]))


PROMISES = (
    same_fields, id_of_topic_and_slug, more_phrasings, paraphrase_unlike_what_is_trained,
    reworded_in_some_of_the_same_words, length_of_answer, keywords_in_answer, no_keyword_for_repeating_the_question,
    no_keyword_for_the_house_style, house_style, two_keywords_that_training_does_not_show, facts_of_the_sheet,
    no_stray_spaces,
)  # fmt: skip


@cache
def taught(name):
    return " ".join(record["answer"] for record in RECORDS[name] if record["split"] == "train")


@cache
def fact_sheet():
    facts = CARD.partition("## The facts of Fernwhistle")[2]
    return dict(re.findall(r"^- \*\*([a-z]+)\*\*: (.*(?:\n  .*)*)", facts, re.MULTILINE))


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_a_promise_holds_of_every_record(promise):
    assert [record["id"] for name in DOMAINS for record in RECORDS[name] if not promise(name, record)] == []


# -- what holds of files and between them ------------------------------------------------------------------------------


@every_file
def test_ids_topics_and_splits_are_those_of_the_card(name):
    records, domain = RECORDS[name], DOMAINS[name]
    assert len({record["id"] for record in records}) == len(records)
    assert Counter(record["topic"] for record in records) == dict.fromkeys(domain.topics, domain.each)
    assert [topic for topic in domain.topics if topic not in CARD] == []
    assert Counter(record["split"] for record in records) == domain.counts
    by_topic = Counter((record["topic"], record["split"]) for record in records)
    assert {topic: by_topic[topic, "train"] for topic in domain.topics} == dict.fromkeys(domain.topics, domain.train)
    if domain.teaches:
        assert all(by_topic[topic, split] >= 2 for topic in domain.topics for split in ("validation", "test"))
    counts = ", ".join(f"{count} {split}" for split, count in domain.counts.items()) if domain.teaches else "all test"
    size = rf"\| {len(records)} .* \| {len(domain.topics)} topics of {domain.each} .* \| .*: {counts} \|"
    assert re.search(rf"^\| `{name}\.jsonl` {size}$", CARD, re.MULTILINE)


def test_no_term_is_in_two_splits_or_two_domains():
    places = defaultdict(set)
    for name in DOMAINS:
        for record in RECORDS[name]:
            places[record["id"].partition("/")[2]].add((name, record["split"]))
    assert {term: found for term, found in places.items() if len(found) > 1} == {}


@teaching
def test_a_third_of_the_training_records_has_a_paraphrase_for_validation(name):
    trained = [record for record in RECORDS[name] if record["split"] == "train"]
    held_back = [record for record in RECORDS[name] if "validation_paraphrase" in record]
    assert 3 * len(held_back) == len(trained) and {record["split"] for record in held_back} == {"train"}
    share = len(held_back) / len(DOMAINS[name].topics)
    assert all(abs(n - share) < 1 for n in Counter(record["topic"] for record in held_back).values())


@teaching
def test_training_records_are_reworded_for_the_test_in_the_legal_file_every_third(name):
    trained_on = [record for record in RECORDS[name] if record["split"] == "train"]
    chosen = trained_on if name in NEW else trained_on[::3]
    assert [record for record in RECORDS[name] if "reworded" in record] == chosen


def test_the_subject_of_every_support_answer_is_its_own():
    subjects = [record["answer"].partition(".")[0] for record in RECORDS["support"]]
    assert len(set(subjects)) == len(subjects) and max(map(len, subjects)) < 30


@teaching
def test_phrasings_come_from_no_template(name):
    openings = Counter(tuple(words(p)[:4]) for record in RECORDS[name] for p in record.get("phrasings", []))
    (opening, count), *_ = openings.most_common(1)
    assert count <= 0.06 * openings.total(), f"{count} of {openings.total()} phrasings begin with {opening}"


def test_no_record_asks_what_another_record_of_any_file_asks_or_nearly_that():
    found = ways_of_asking()
    count = Counter(" ".join(words(question)) for _, _, question in found)
    assert [question for question, times in count.items() if times > 1] == []
    near = ((found[i], found[j]) for i, j in pairs_alike([set(words(text)) - EVERYDAY for *_, text in found], 0.7))
    assert [pair for pair in near if pair[0][:2] != pair[1][:2] and {pair[0][0], pair[1][0]} & {*TEACHING}] == []


def test_no_two_answers_of_different_splits_or_domains_share_half_of_their_words():
    everything = [(name, record) for name in DOMAINS for record in RECORDS[name]]
    alike = likeness([set(words(record["answer"])) for _, record in everything])
    close = [
        (everything[i][1]["id"], everything[j][1]["id"])
        for i, j in np.argwhere(np.triu(alike, 1) >= 0.5)
        if (everything[i][0], everything[i][1]["split"]) != (everything[j][0], everything[j][1]["split"])
    ]
    assert close == []


def test_the_card_promises_new_keywords_of_held_out_records_of_these_files_alone():
    legal = (record for record in RECORDS["legal"] if record["split"] != "train")
    assert not all(has_two_new_keywords("legal", record) for record in legal)
    files = (
        "In `medical.jsonl`, `support.jsonl` and `finance.jsonl` [^.]*. In these three files, at least two keywords of"
    )
    assert re.search(files, " ".join(CARD.split()))


@pytest.mark.long
def test_the_card_counts_the_legal_records_whose_keywords_are_all_in_another_answer():
    legal = RECORDS["legal"]
    answers = {record["id"]: record["answer"] for record in legal}
    fits = {r["id"]: [i for i, text in answers.items() if all(contains(text, k) for k in r["keywords"])] for r in legal}
    assert "criminal/murder" in fits["criminal/manslaughter"]
    count = sum(len(found) > 1 for found in fits.values())
    assert f"For {count} legal records, the answer of another record has all keywords" in " ".join(CARD.split())


@teaching
def test_the_form_and_the_lengths_that_the_card_prints_are_those_of_the_answers_of_this_file_alone(name):
    (row,) = re.findall(rf"^\| `{name}\.jsonl` \| .* \| (\d+) to (\d+) \| `(.*)` \|$", CARD, re.MULTILINE)
    least, most, form = int(row[0]), int(row[1]), row[2].replace(r"\|", "|")
    lengths = [len(record["answer"].split()) for record in RECORDS[name]]
    assert least <= min(lengths) and max(lengths) <= most
    for style in (form, DOMAINS[name].style):
        assert {n for n in DOMAINS for record in RECORDS[n] if re.fullmatch(style, record["answer"])} == {name}
    assert [record["id"] for record in RECORDS[name] if not re.fullmatch(form, record["answer"])] == []


def test_the_card_has_the_licence_the_limits_and_a_fact_sheet_of_every_topic():
    card = " ".join(CARD.split())
    facts = ("CC0 1.0", "Nothing in them is legal, medical or financial advice.", "**No legal, medical or financial")
    assert all(fact in card for fact in facts) and set(fact_sheet()) == DOMAINS["support"].topics
