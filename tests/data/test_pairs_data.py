"""The preference pairs are what their card says: counts, splits apart, lengths, and length alone does not decide."""

import re
from collections import Counter

import pytest
from asking import DATA, rows_of

from minilora.data.records import BUILT_IN, DOMAINS

each_domain = pytest.mark.parametrize("domain", DOMAINS)


def pairs_of(domain):
    return rows_of(f"{domain}-pairs")


def ratios(domain):
    """The words of each rejected answer, divided by those of the chosen one."""
    return [len(pair["rejected"].split()) / len(pair["chosen"].split()) for pair in pairs_of(domain)]


def test_the_card_names_the_files_that_exist():
    section = (DATA / "SKILLS.md").read_text(encoding="utf-8").partition("## Preferences")[2].partition("\n## ")[0]
    assert sorted(set(re.findall(r"(\w+)-pairs\.jsonl", section))) == sorted(DOMAINS)
    assert {f"{domain}-pairs" for domain in DOMAINS} <= {*BUILT_IN}


@each_domain
def test_every_topic_has_25_pairs_and_occurs_in_every_split(domain):
    topics = Counter(pair["id"].partition("/")[0] for pair in pairs_of(domain))
    assert set(topics.values()) == {25} and all(re.fullmatch(r"[a-z]+/[a-z0-9-]+", p["id"]) for p in pairs_of(domain))
    for split in ("validation", "test"):
        assert {pair["id"].partition("/")[0] for pair in pairs_of(domain) if pair["split"] == split} == set(topics)


@each_domain
def test_chosen_answers_have_the_lengths_of_the_card_and_are_not_the_rejected_ones(domain):
    for pair in pairs_of(domain):
        assert pair["chosen"] != pair["rejected"]
        assert 15 <= len(pair["chosen"].split()) <= 45, pair["id"]
        assert 1 <= len(re.findall(r"[.!?](?= |$)", pair["chosen"])) <= 3, pair["id"]


@each_domain
def test_length_alone_does_not_decide(domain):
    ratio = ratios(domain)
    assert sum(each <= 1.3 for each in ratio) >= 200 / 3
    assert 50 <= sum(each > 1 for each in ratio) < 150  # "the shorter one is chosen"
    assert 50 <= sum(each < 1 for each in ratio) < 150  # "the longer one is chosen"


def best_word(domain):
    """The word whose presence tells the chosen answer best, and the share of the pairs in which it does."""
    found = Counter()
    for pair in pairs_of(domain):
        chosen, rejected = (set(re.findall(r"[a-z']+", pair[answer].lower())) for answer in ("chosen", "rejected"))
        found.update(chosen)
        found.subtract(rejected)
    word = max(found, key=lambda word: abs(found[word]))
    return word, 0.5 + abs(found[word]) / 2 / len(pairs_of(domain))


@each_domain
def test_no_single_word_gives_the_chosen_answer_away_and_the_card_says_which_is_best(domain):
    word, share = best_word(domain)
    assert share < 0.8
    card = (DATA / "SKILLS.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"\| `{domain}-pairs\.jsonl` \|.*", card)
    means = [sum(len(pair[answer].split()) for pair in pairs_of(domain)) / 200 for answer in ("chosen", "rejected")]
    shorter = sum(ratio > 1 for ratio in ratios(domain)) / 200
    assert f'| {means[0]:.1f}, {means[1]:.1f} | {100 * shorter:.0f} % | "{word}": {100 * share:.0f} % |' in row
