"""What terminals are shown, and what shells read."""

import shlex

import pytest

from minilora.terminal import printable, quote

WORDS = {"runs\\mine": "runs\\mine", "C:/a-b.csv": "C:/a-b.csv", "größe": "größe", "a b": '"a b"', "Q&A": '"Q&A"',
         "": '""', "50%": '"50%"', "it's": '"it\'s"', "a,b": '"a,b"', "C:\\my dir\\": '"C:\\my dir\\\\"',
         'say "hi"': r'"say \"hi\""'}  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_quoted_as_the_systems_shell_reads_it(word):
    assert quote(word, "nt") == WORDS[word]
    assert shlex.split(quote(word, "posix")) == [word]


def test_control_characters_are_replaced_and_ends_of_lines_and_tabs_stay():
    kept = "größe\t😀\nb\r\nc"
    assert printable(kept) == kept
    assert printable("a\x1b[2J\x07\rb\x7f\x9b") == "a\ufffd[2J\ufffd\ufffdb\ufffd\ufffd"
