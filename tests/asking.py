"""The data that come with minilora: how their records ask, and how much two ways of asking have in common."""

import json
import re
from collections import Counter, defaultdict
from functools import cache
from importlib.resources import files

import numpy as np

DATA = files("minilora") / "data"

EVERYDAY = frozenset(
    re.findall(
        r"\w+",
        """
        a about after am an and any are as at be been before by can could did do does explain for from get give had has
        have how i if in into is it its may me mean means more my no not of on one or our s should so some t tell than
        that the their them then there these they this those to up us was we were what when where which who whom whose
        why will with would you your
        """,
    )
)


def text_of(name):
    return (DATA / f"{name}.jsonl").read_text(encoding="utf-8")


@cache
def rows_of(name):
    return [json.loads(line) for line in text_of(name).splitlines()]


def words(text):
    return re.findall(r"\w+", text.lower())


def trained(record):
    """The ways in which a record asks in training."""
    return [record["question"], *record.get("phrasings", [])]


def paraphrases(record):
    """The ways in which a record asks in words that training does not have."""
    return [record[field] for field in ("paraphrase", "validation_paraphrase") if field in record]


def asked(record):
    """Every way in which a record asks."""
    return trained(record) + [record[field] for field in ("reworded",) if field in record] + paraphrases(record)


def likeness(sets, rows=slice(None)):
    """How much of two sets of words is common to both, for every pair: shared words / all words. rows: of the first."""
    number = {word: i for i, word in enumerate(sorted(set().union(*sets)))}
    table = np.zeros((len(sets), len(number)), np.float32)
    for row, chosen in zip(table, sets, strict=True):
        row[[number[word] for word in chosen]] = 1
    shared, size = table[rows] @ table.T, table.sum(1)
    return shared / np.maximum(size[rows][:, None] + size - shared, 1)


def pairs_alike(sets, least):
    """The pairs [i, j], i < j, of sets whose likeness is above `least`.

    Such sets share a word among the rarest of each: of n words, all but least * n are looked up.
    """
    count = Counter(word for one in sets for word in one)
    places = defaultdict(list)
    for i, one in enumerate(sets):
        rarest = sorted(one, key=lambda word: (count[word], word))[: len(one) - int(least * len(one))]
        others = {j for word in rarest for j in places[word]}
        yield from ([j, i] for j in others if len(one & sets[j]) > least * len(one | sets[j]))
        for word in rarest:
            places[word].append(i)


def runs(text, n=5):
    """The runs of n words of a text, in which every digit counts as the same."""
    found = words(re.sub(r"\d", "0", text))
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def runs_in_two_splits(records):
    places = {}
    for record in records:
        for run in runs(record["text"]):
            places.setdefault(run, set()).add(record["split"])
    return [" ".join(run) for run, splits in places.items() if len(splits) > 1]


def alike_in_two_splits(records, most):
    held = [i for i, record in enumerate(records) if record["split"] != "train"]
    alike = likeness([set(words(record["text"])) for record in records], held)
    splits = np.array([record["split"] for record in records])
    close = (alike > most) & (splits[held][:, None] != splits)
    return [(records[held[i]]["text"], records[j]["text"]) for i, j in np.argwhere(close)]
