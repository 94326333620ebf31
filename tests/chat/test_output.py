"""Answers in a terminal: lines break between words, and nothing that the model writes steers the terminal."""

import os
import shutil

import pytest

from minilora.chat.output import Output, Screen


@pytest.fixture
def shown(monkeypatch, capsys):
    """A function that shows pieces of an answer on a terminal of some width, and returns what is on it."""

    def show(*pieces, columns=20):
        monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
        screen = Screen()
        for piece in pieces:
            screen.piece(piece)
        screen.end()
        return capsys.readouterr().out

    return show


TEXT = "An enforceable promise between two parties, that a court of law would hold them to.\n\nSo  it is."


def test_lines_break_between_words_however_the_pieces_are_cut(shown):
    whole = shown(TEXT)
    assert whole == (
        "An enforceable\npromise between two\nparties, that a\ncourt of law would\nhold them to.\n\nSo  it is.\n\n"
    )
    assert max(map(len, whole.splitlines())) < 20
    for size in (1, 2, 3, 7, 50):
        assert shown(*(TEXT[i : i + size] for i in range(0, len(TEXT), size))) == whole


def test_a_word_is_shown_as_soon_as_it_is_certain(monkeypatch, capsys):
    screen = Screen()
    seen = []
    for piece in ("one", " tw", "o", " three"):
        screen.piece(piece)
        seen.append(capsys.readouterr().out)
    assert seen == ["", "one", "", " two"]


def test_a_word_longer_than_a_line_has_one_of_its_own(shown):
    assert shown("a", " ", "b" * 30, " c") == "a\n" + "b" * 30 + "\nc\n\n"


def test_characters_that_take_two_columns_count_as_two(shown):
    assert shown("漢字漢字 漢字漢字 漢字", columns=20) == "漢字漢字 漢字漢字\n漢字\n\n"


def test_spaces_that_begin_a_line_of_the_answer_stay(shown):
    assert shown("list:\n  - one\n  - two") == "list:\n  - one\n  - two\n\n"


def test_what_would_steer_the_terminal_is_shown_as_unknown_characters(shown):
    assert shown("a\x1b[31mb\x07\x9b c") == "a\ufffd[31mb\ufffd\ufffd c\n\n"


def test_a_pipe_gets_the_answer_as_it_is(capsys):
    output = Output()
    for piece in ("one\n  ", "two ", "x" * 200):
        output.piece(piece)
    output.end()
    output.note("a note")
    captured = capsys.readouterr()
    assert captured.out == "one\n  two " + "x" * 200 + "\n" and captured.err == "a note\n"
