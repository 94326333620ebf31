"""The files of data that come along have clean lines, the columns and splits of their card, and nothing twice."""

from collections import Counter

import pytest
from asking import alike_in_two_splits, rows_of, runs_in_two_splits, text_of, words

from minilora.data.records import BUILT_IN

KINDS = {  # of file -> its columns, those in which nothing occurs twice, records by split, characters at most
    "labels": (
        ["text", "label", "kind", "split", "record"], ["text", "record"],
        {"train": 1956, "validation": 150, "test": 312}, 420_000,
    ),
    "fields": (
        ["text", "fields", "split", "record"], ["text", "record"],
        {"train": 200, "validation": 50, "test": 100}, 150_000,
    ),
    "pairs": (
        ["prompt", "chosen", "rejected", "split", "id"], ["prompt", "chosen", "rejected", "id"],
        {"train": 140, "validation": 30, "test": 30}, 150_000,
    ),
    "handbook": (["id", "covers", "text"], ["id", "text"], None, 100_000),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILT_IN)
def test_lines_are_clean_and_have_the_columns_and_splits_of_the_card_and_nothing_occurs_twice(name):
    text, rows = text_of(name), rows_of(name)
    assert text.isascii() and text.endswith("}\n") and "\r" not in text
    if (kind := name.partition("-")[2]) not in KINDS:  # questions: test_domain_data.py
        return
    columns, different, splits, most = KINDS[kind]
    assert len(text) < most and all(list(row) == columns for row in rows)
    assert splits is None or Counter(row["split"] for row in rows) == splits
    texts = [value for row in rows for value in row.values() if isinstance(value, str)]
    assert all(value == " ".join(value.split()) != "" for value in texts)
    for column in different:
        count = Counter(" ".join(words(row[column])) for row in rows)
        assert [value for value, times in count.items() if times > 1] == []
    if kind in ("labels", "fields"):  # no template and no near copy spans two splits
        assert runs_in_two_splits(rows) == [] and alike_in_two_splits(rows, 0.36) == []
    elif kind == "pairs":
        assert runs_in_two_splits([row | {"text": row["prompt"]} for row in rows]) == []
