"""The many ways in which the legal records ask keep what the card promises of them.

Each promise is a function of records that lists what breaks it.
"""

import re
from collections import Counter

import numpy as np
import pytest
from asking import DATA, EVERYDAY, asked, likeness, paraphrases, rows_of, trained, words

LEARNED = [record for record in rows_of("legal") if record["split"] == "train"]


def term(record):
    return record["id"].partition("/")[2].split("-")


def meaning(record, text):
    """The words of a text that are neither everyday words nor the term's; where none is left, the empty word."""
    return set(words(text)) - EVERYDAY - {part + ending for part in term(record) for ending in ("", "s")} or {""}


def too_short_or_too_long(records):
    """Phrasings and paraphrases have 3 to 25 words."""
    return [text for record in records for text in asked(record)[1:] if not 3 <= len(text.split()) <= 25]


def asks_for_something_else(records):
    """A text names the term (its words up to their endings, or its initials), or asks what a thing is called."""

    def is_fine(record, text):
        parts = [part for part in term(record) if part == term(record)[0] or len(part) > 3]
        named = all(any(word.startswith(part[:5]) for word in words(text)) for part in parts)
        initials = "".join(part[0] for part in term(record))
        asks_for_name = {"call", "called", "name", "word"} & {*words(text)}
        return named or (len(initials) > 2 and initials in words(text)) or asks_for_name

    return [text for record in records for text in asked(record) if not is_fine(record, text)]


def nearly_equal(records):
    """No phrasing or second paraphrase has more than 70 % of its words in common with another text that asks for the
    same term, nor with one that asks for another where three words or more are left; the terms themselves do not count.
    """
    texts = [(record, text) for record in records for text in trained(record) + paraphrases(record)]
    ids = np.array([record["id"] for record, _ in texts])
    new = np.array([text not in (record["question"], record["paraphrase"]) for record, text in texts])
    left = [meaning(record, text) for record, text in texts]
    enough = np.array([len(chosen) >= 3 for chosen in left])
    compared = (ids[:, None] == ids) | (enough[:, None] & enough)
    close = (likeness(left) > 0.7) & compared & (new[:, None] | new)
    return [(texts[i][1], texts[j][1]) for i, j in np.argwhere(np.triu(close, 1))]


def near_to_what_is_trained(records):
    """A paraphrase has at most 30 % of its words in common with a phrasing, and the second with question and first."""
    close = []
    for record in records:
        pairs = [(out, text) for out in paraphrases(record) for text in record["phrasings"]]
        if "validation_paraphrase" in record:
            pairs += [(record["validation_paraphrase"], record[field]) for field in ("question", "paraphrase")]
        close += [pair for pair in pairs if likeness([meaning(record, text) for text in pair])[0, 1] > 0.3]
    return close


def openings(records):
    """How many phrasings begin with the same four words, the term with its article counted as one."""
    found = Counter()
    for record in records:
        named = re.compile(rf"(\b(a|an|the) )?\b{' '.join(term(record))}(e?s)?\b")
        for text in record["phrasings"]:
            found[" ".join(named.sub("TERM", " ".join(words(text))).split()[:4])] += 1
    return found


def worn_openings(records):
    """No opening of four words begins more than 3 % of the phrasings."""
    found = openings(records)
    return [opening for opening, count in found.items() if count > 0.03 * found.total()]


PROMISES = [too_short_or_too_long, asks_for_something_else, nearly_equal, near_to_what_is_trained, worn_openings]


@pytest.mark.parametrize("broken_by", PROMISES, ids=lambda promise: promise.__name__)
def test_the_promise_is_kept(broken_by):
    assert broken_by(LEARNED) == []


def test_the_card_names_the_most_frequent_opening_and_its_share():
    found = openings(LEARNED)
    (opening, count), *_ = found.most_common(1)
    card = " ".join((DATA / "README.md").read_text(encoding="utf-8").split())
    assert opening == "define TERM"
    assert f'"Define" with the bare term, begins {100 * count / found.total():.1f} %' in card
