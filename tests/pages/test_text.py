"""The words of a page: nothing is lost or broken by wrapping, nothing is -0, and units keep three digits."""

import re

import pytest

from minilora.pages.labels import table as label_table
from minilora.pages.text import (
    change,
    columns,
    counted,
    duration,
    interval,
    listed,
    megabytes,
    millions,
    percent,
    plain,
    rule,
    shortened,
    signed,
    width_of,
    wrapped,
)

SENTENCE = "返品は、商品の到着後３０日以内に「ﾏｲ ﾍﾟｰｼﾞ」でできます。हिन्दी में वापसी! cafe\u0301 👩\u200d💻"


def test_lines_and_columns_count_the_columns_of_a_terminal():
    for width in range(8, 40):
        lines = wrapped(SENTENCE * 2, width, indent="  ", first="a ")
        text = "".join(lines).replace(" ", "")
        assert text == ("a " + SENTENCE * 2).replace(" ", "") and not any(re.match(" *[、。」ー]", x) for x in lines)
        assert all(width - 6 <= width_of(line) <= width for line in lines[:2]), "kana, which can be broken anywhere"
        assert width_of(rule("返e\u0301", width)) == width
        cut = shortened(SENTENCE, width)
        assert width - 2 <= width_of(cut) <= width and SENTENCE.startswith(cut[:-1])
    assert [width_of(text) for text in ("３０", "ｱ", "👩\u200d💻", "कि", "naïve")] == [4, 1, 4, 2, 5]
    assert wrapped("返品です" * 2, 12) == ["返品です返品", "です"]
    table = label_table([["", "返品", "x"], ["e\u0301", "b", "返"]])
    assert [width_of(line.partition("x")[0].partition("返")[0]) for line in table] == [3, 9]
    assert [width_of(line) for line in columns([["返品", "1"], ["e\u0301", "返品"], ["loss", "22"]])] == [10, 10, 10]


def test_a_character_is_not_cut_in_the_middle():
    for text in ("e\u0301", "कि", "👩\u200d💻"):
        for width in range(1, 20):
            cut = shortened(text * 40, width)
            assert cut[-1] == "…" and cut[-2:-1] != "\u200d" and not (text == "e\u0301" and cut[-2:-1] == "e")


@pytest.mark.parametrize("write", [plain, signed, lambda x, digits: percent(x / 100, digits, sign=True)])
def test_a_number_is_printed_with_its_sign_unless_it_rounds_to_zero(rng, write):
    for x in (*rng.normal(scale=3, size=100), -0.0, 0.0, -0.004, 0.004, -1234567.8):
        for digits in (0, 1, 2):
            text = write(x, digits)
            assert float(re.sub("[+, %]", "", text)) == round(x, digits)
            zero = round(x, digits) == 0
            assert text.startswith("-") == (x < 0 and not zero)
            assert text.startswith("+") == (x > 0 and not zero and write is not plain)


def test_wrapping_loses_and_breaks_no_word(rng):
    words = ["x" * n for n in rng.integers(1, 30, 60)] + ["--lora-alpha", "/a/path-that/is-longer-than/the/line/itself"]
    for width in (20, 33):
        lines = wrapped(" ".join(words), width, indent="   ", first="a: ")
        assert " ".join(lines).split() == ["a:", *words]
        assert all(len(line) <= width or len(line.removeprefix("a: ").split()) == 1 for line in lines)
        assert lines[0].startswith("a: ") and all(line.startswith("   ") for line in lines[1:])
    assert wrapped("kept   apart", 12) == ["kept   apart"]
    assert wrapped("kept   apart", 14, first="a: ") == ["a: kept", "apart"]


def test_columns_stand_below_each_other():
    lines = columns([["", "", "loss"], ["a", "bb", "1"], ["ccc", "d", "1,234"], ["e"]], left=2)
    assert lines == ["          loss", "a    bb      1", "ccc  d   1,234", "e"]


def test_a_rule_and_a_shortened_text_have_the_width_that_was_asked_for():
    assert len(rule("a title", 80)) == 80 and len(rule("a title" * 20, 80)) > 80  # a title is never cut
    assert shortened("x" * 9, 9) == "x" * 9 and len(shortened("x" * 10, 9)) == 9
    assert shortened("a\n\n b", 9) == "a b"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (counted(0, "run"), "0 runs"), (counted(1, "run"), "1 run"), (counted(1000, "run"), "1,000 runs"),
        (listed(["a"]), "a"), (listed(["a", "b"], "or"), "a or b"), (listed([]), ""),
        (percent(0.999), "100 %"), (change(4, 3), "-25 %"), (change(0, 1), ""), (change(1, float("nan")), ""),
        (interval(0.5, 0.25, None), "0.500"), (interval(0.5, -0.25, 0.75, 1, sign=True), "+0.5 [-0.2, +0.8]"),
    ],
)  # fmt: skip
def test_words_for_numbers(given, shown):
    assert given == shown


def test_units_grow_with_what_they_measure():
    sizes = (0, 1, 4_000, 99_400, 99_600, 994_000, 996_000, 99_900_000, 99_960_000, 10**10)
    shown = [millions(size) for size in sizes]
    assert shown == ["0.0", "0.000", "0.004", "0.099", "0.10", "0.99", "1.0", "99.9", "100", "10,000"]
    assert [megabytes(size) for size in sizes] == [f"{text} MB" for text in shown]
    seconds = (0.0005, 0.0099, 0.01, 0.999, 1, 9.99, 59.9, 59.96, 3596, 3598)
    shown = ["0.5 ms", "9.9 ms", "10 ms", "999 ms", "1.00 s", "9.99 s", "59.9 s"]
    shown += ["1.0 minutes", "59.9 minutes", "1.0 hours"]
    assert [duration(each) for each in seconds] == shown
