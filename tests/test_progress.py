"""Lines and bars: on stderr where they are wanted, with the stage's name and count; silent in a library."""

import errno
import io
import logging
import sys
import threading
import time

import pytest

from minilora.nn.ranks import ALONE
from minilora.progress import Bar, hide_progress, log, progress, show_progress


@pytest.fixture
def shown():
    show_progress()
    yield
    show_progress(False)


def printed(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    return err


@pytest.mark.parametrize("initial", [0, 2])
def test_a_bar_shows_stage_count_and_unit_on_stderr(shown, initial, capsys):
    with progress("answers before", 3, "answer", initial) as bar:
        bar.update(3 - initial)
    err = printed(capsys)
    assert "answers before" in err and "3/3" in err and "answer/s" in err
    assert f"{initial}/3" in err


def work(total=3):
    with progress("training", total, "step") as bar:
        bar.update(total, loss=1.0)
        log.info("a line about %s", "it")
        log.warning("a warning")


def test_a_library_shows_nothing_and_logs_its_lines(capsys, caplog):
    with caplog.at_level(logging.INFO, "minilora"):
        work()
    assert printed(capsys) == ""
    assert [(record.name, record.message) for record in caplog.records] == [
        ("minilora", "a line about it"),
        ("minilora", "a warning"),
    ]


def test_lines_are_printed_alone_and_once(shown, capsys):
    assert show_progress() is True  # a second time changes nothing
    log.info("a line about %s", "it\x1b")
    assert printed(capsys) == "a line about it\ufffd\n"
    assert show_progress(False) is True and show_progress(False) is False
    work()
    assert "line" not in printed(capsys)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("fails", ["write", "flush"])
def test_work_goes_on_where_nothing_can_be_printed(shown, monkeypatch, number, fails):
    def fail(*inputs):
        raise OSError(number, "nobody reads it")

    monkeypatch.setattr(sys, "stderr", closed := io.StringIO())
    monkeypatch.setattr(closed, fails, fail)
    work()
    log.info("a line without a bar")
    assert ALONE.fail("why it ends", 130) == 130


def test_nothing_to_do_is_no_bar(shown, capsys):
    with progress("training", 0, "step") as bar:
        bar.update(0)
    assert printed(capsys) == ""


def test_a_line_does_not_break_the_bar(shown, capsys):
    work()
    assert "a line about it\n" in printed(capsys).replace("\r", "\n")


def test_hidden_work_shows_and_logs_nothing(shown, capsys, caplog):
    with hide_progress(), hide_progress(False):
        work()
    assert printed(capsys) == "" and not caplog.records
    with hide_progress(False):
        work()
    assert "3/3" in printed(capsys)


def test_what_is_hidden_in_one_thread_is_shown_in_another(shown, capsys):
    with hide_progress():
        thread = threading.Thread(target=log.info, args=("from a thread",))
        thread.start()
        thread.join()
    assert printed(capsys) == "from a thread\n"


def inner(unit):
    with progress("inner", 2, unit, initial=1) as bar:
        bar.update()


@pytest.mark.parametrize(("unit", "count"), [("record", "4/4"), ("step", "0/4")])
def test_inside_a_bar_the_same_unit_counts_as_a_part_of_it_and_another_is_not_shown(shown, unit, count, capsys):
    with progress("outer", 4, "record"):
        inner(unit)
        inner(unit)
    err = printed(capsys)
    assert "inner" not in err and err.replace("\r", "\n").strip().splitlines()[-1].count(count) == 1


def test_after_a_bar_inside_another_the_outer_one_goes_on(shown, capsys):
    with progress("outer", 4, "record"):
        inner("step")
        inner("record")
    with progress("next", 1, "step") as bar:
        bar.update()
    err = printed(capsys)
    assert "2/4" in err and "next" in err and "1/1" in err


class Slow:
    """A bar that loses counts when two threads update it at the same time."""

    n = 0

    def update(self, count):
        before = self.n
        time.sleep(1e-4)
        self.n = before + count


def test_threads_may_advance_one_bar():
    bar = Bar("record", Slow())
    threads = [threading.Thread(target=lambda: [bar.update() for _ in range(10)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bar.shown.n == 80


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_bar_fits_the_terminal_and_begins_with_its_values(shown, columns, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with progress("training", 120, "step") as bar:
        bar.shown.dynamic_ncols, bar.shown.ncols = None, columns
        bar.update(60, "best", loss=3.412)
        bar.shown.refresh()
    line = next(line for line in screen.getvalue().replace("\n", "").split("\r") if "3.412" in line)
    assert line.startswith("training        best, loss=3.412   50%|")
    assert len(line) <= columns and "60/120" in line and (columns < 80 or "##" in line)
