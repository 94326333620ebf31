"""Answers with and without passages, from a model that repeats its prompt: what is known of them in advance."""

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
from figure_check import problems, spans

from minilora.data.passages import Handbook, Passage, fill
from minilora.data.records import Record
from minilora.lora.adapters import active_factors
from minilora.measure import open_book
from minilora.pages.open_book import open_book_figure, open_book_lines
from minilora.pages.style import theme

TEXTS = {"a": "Herons eat fish in ponds.", "b": "Owls sleep in barns.", "c": "Cats."}
BOOK = Handbook([Passage(*each) for each in TEXTS.items()], "x")


def record(name, question, answer, *keywords):
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Record(name, messages, keywords=keywords)


RECORDS = [
    record("1", "What do herons eat?", "They eat fish in ponds.", "fish", "ponds"),
    record("2", "Who sleeps, herons full of fish?", "Owls sleep in barns.", "barns", "fish"),
    record("3", "Which one?", "Cats.", "cats"),
]


@pytest.fixture
def report(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(model.adapters["legal"], "data", {"name": "legal"})
    monkeypatch.setattr(model.adapters["support"], "data", {"name": "x", "context_template": "{passage}{question}"})
    monkeypatch.setattr(open_book, "answer_all", lambda m, t, records: [r.prompt[-1]["content"] for r in records])
    monkeypatch.setattr(open_book, "time", SimpleNamespace(perf_counter=itertools.count(0, 6).__next__))
    adapters = {"base": None, "facts": "legal", "reader": "support"}
    found = open_book.open_book_report(model, tokenizer, adapters, RECORDS, BOOK)
    assert active_factors(model) == {}
    return found


def recall(report, name, kind):
    (row,) = (row for row in report["rows"] if (row["name"], row["kind"]) == (name, kind))
    return row["keyword_recall"]["value"]


def test_hits_count_the_right_passages_among_the_first(report):
    # nothing is found for question 3, whose passage is the last of three
    assert report["hits"] == {"1": pytest.approx(1 / 3), "3": pytest.approx(2 / 3)}
    assert report["records"] == 3 == report["passages"]


def test_recall_is_that_of_the_prompts_passage(report):
    closed, right, found = (recall(report, "base", kind) for kind in ("closed", "right", "found"))
    assert closed == pytest.approx((0 + 1 / 2 + 0) / 3)  # question 2 says fish
    assert right == 1.0 and found == pytest.approx((1 + 1 / 2 + 0) / 3)
    alone = recall(report, open_book.ALONE, "right"), recall(report, open_book.ALONE, "found")
    assert alone == pytest.approx(((1 + 1 / 2 + 1) / 3, (1 + 1 / 2 + 0) / 3))


def test_an_adapter_that_was_trained_without_passages_is_asked_without(report):
    assert [row["kind"] for row in report["rows"] if row["name"] == "facts"] == ["closed"]
    rows = {row["kind"]: row for row in report["rows"] if row["name"] == "base"}
    assert rows["closed"]["prompt_tokens"] < rows["right"]["prompt_tokens"] and rows["right"]["seconds"] == 6 / 3
    (reader,) = (row for row in report["rows"] if (row["name"], row["kind"]) == ("reader", "right"))
    assert reader["prompt_tokens"] < rows["right"]["prompt_tokens"]  # its own template has fewer words


def test_a_records_own_passage_is_the_right_one_and_its_question_has_none(loaded, monkeypatch):
    asked = []
    monkeypatch.setattr(
        open_book, "answer_all", lambda m, t, records: [asked.append(r.question) or "" for r in records]
    )
    own = [
        RECORDS[0].open_book("Snow."),
        RECORDS[1].open_book(" Owls sleep in barns.\n"),
        RECORDS[2].open_book("Snow."),
    ]
    book = open_book.with_own_passages(own, BOOK)
    assert [(each.id, each.text) for each in book.passages] == [*TEXTS.items(), ("", "Snow.")] and book.source == "x"
    report = open_book.open_book_report(*loaded, {"base": None}, own, book)
    questions = [each.question for each in RECORDS]
    right = [fill(text, each) for text, each in zip(("Snow.", "Owls sleep in barns.", "Snow."), questions, strict=True)]
    assert asked[:6] == questions + right
    assert recall(report, open_book.ALONE, "right") == pytest.approx((0 + 1 / 2 + 0) / 3)
    assert report["hits"] == {"1": 0.0, "3": pytest.approx(1 / 3)}


def test_the_page_and_the_picture_show_every_row(report):
    page = "\n".join(open_book_lines(report))
    assert "base" in page and "the passage alone" in page and "50.0" in page
    assert "BM25 finds the right passage first for 33 % and among the first 3 for 67 %" in " ".join(page.split())
    row = next(row for row in report["rows"] if (row["name"], row["kind"]) == ("base", "right"))
    assert re.search(rf"base +the right passage .*\] +{row['prompt_tokens']:.0f} +{row['seconds']:.2f}\n", page)
    for name in ("light", "dark"):
        with theme(name):
            figure = open_book_figure(report)
            assert problems(figure) == []
    (axes,) = figure.axes
    assert len(axes.patches) == len(report["rows"])
    assert np.isclose(np.mean([bar.get_y() + bar.get_height() / 2 for bar in axes.patches[:3]]), 0)  # at the name
    ends = [[100 * row["keyword_recall"][end] for end in ("low", "high")] for row in report["rows"]]
    assert {tuple(np.round(pair, 6)) for pair in ends} <= spans(axes, 0)
