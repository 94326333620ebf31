"""The messages with labels are what their card says: counts, labels, splits apart, and hard for word counts."""

import re
from collections import Counter

import pytest
from asking import DATA, rows_of, words

from minilora.data.records import read_records
from minilora.train.material import ASKED_LABELS

CARD = (DATA / "SKILLS.md").read_text(encoding="utf-8")
LABELS = {
    "legal": "employment tenancy family inheritance consumer injury criminal debt other",
    "medical": "appointment prescription results symptom emergency medicine document billing other",
    "support": "delivery change return damage repair payment account product other",
    "finance": "card fraud transfer loan fees login account invest other",
}
KINDS = ("indirect", "ordinary")
COUNTS = {
    "indirect": {"train": 1556, "validation": 100, "test": 200},
    "ordinary": {"train": 400, "validation": 50, "test": 112},
}
LEAST = {
    "indirect": {"train": 182, "validation": 11, "test": 23},
    "ordinary": {"train": 46, "validation": 6, "test": 13},
}
OTHER = {"indirect": {"train": 100, "validation": 8, "test": 16}, "ordinary": {"train": 32, "validation": 2, "test": 8}}
each_domain = pytest.mark.parametrize("domain", LABELS)


def records_of(domain):
    return rows_of(f"{domain}-labels")


@each_domain
def test_texts_are_short_records_are_named_by_their_label_and_read_with_their_kind(domain):
    records = records_of(domain)
    assert all(record["record"].startswith(record["label"] + "/") for record in records)
    assert max(len(record["text"].split()) for record in records) <= 40
    assert [record.kind for record in read_records(f"{domain}-labels")] == [record["kind"] for record in records]


@each_domain
def test_splits_and_labels_have_the_sizes_of_the_card(domain):
    records, labels = records_of(domain), LABELS[domain].split()
    count = Counter((record["kind"], record["split"], record["label"]) for record in records)
    assert {kind for kind, _, _ in count} == set(KINDS) and {label for _, _, label in count} == set(labels)
    assert len(labels) == 9
    for kind in KINDS:
        for split, size in COUNTS[kind].items():
            assert sum(count[kind, split, label] for label in labels) == size
            assert count[kind, split, "other"] == OTHER[kind][split]
            named = [count[kind, split, label] for label in labels if label != "other"]
            assert max(named) - min(named) <= 1 and min(named) >= LEAST[kind][split]
    assert sum(size["test"] for size in COUNTS.values()) <= ASKED_LABELS  # `finetune` measures all of them
    section = CARD.partition(f"### {domain}-labels")[2].partition("\n#")[0]
    assert re.findall(r"^\| `([a-z]+)` \|", section, re.MULTILINE) == labels


@each_domain
def test_openings_come_from_no_template(domain):
    openings = Counter(tuple(words(record["text"])[:3]) for record in records_of(domain))
    (opening, times), *_ = openings.most_common(1)
    assert times <= 0.02 * openings.total(), f"{times} texts begin with {opening}"


def test_no_text_occurs_in_two_domains():
    texts = Counter(" ".join(words(r["text"])) for domain in LABELS for r in records_of(domain))
    assert {text for text, times in texts.items() if times > 1 and len(text) > 20} == set()


@pytest.mark.long
@each_domain
def test_word_counts_find_less_than_85_percent_of_the_labels(domain):
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(ngram_range=(1, 2)).fit(r["text"] for r in records_of(domain) if r["split"] == "train")

    def part(split, kinds=KINDS):
        records = [r for r in records_of(domain) if r["split"] == split and r["kind"] in kinds]
        return words.transform([record["text"] for record in records]), [record["label"] for record in records]

    fitted = (LogisticRegression(C=c, max_iter=2000).fit(*part("train")) for c in (1, 10, 100))
    best = max(fitted, key=lambda model: model.score(*part("validation")))
    for kinds in (KINDS, *((kind,) for kind in KINDS)):
        assert 1 / 9 < best.score(*part("test", kinds)) < 0.85
