"""log.csv: a row for each step, digits and all, and what a run that continues leaves of it."""

import csv
from unittest.mock import Mock

import pytest

from minilora.train.log import COLUMNS, Log, read_log
from minilora.train.loop import History


def take(history, log, loss, memory=123):
    """A step of half a second, of ten tokens more than the step before."""
    history.losses.append(loss)
    history.seconds.append(0.5)
    history.rates.append(loss / 7)
    history.norms.append(loss / 3)
    history.tokens += 10 * len(history.losses)
    log.row(memory)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.csv"


def losses(path):
    return [float(row["loss"]) for row in read_log(path)]


def test_each_row_stands_in_the_file_at_once_with_all_digits(path):
    history = History()
    log = Log(path, history)
    for i, loss in enumerate((0.1 + 0.2, 1 / 3), 1):
        take(history, log, loss)
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == i and tuple(rows[0]) == COLUMNS
        row = rows[-1]
        assert [float(row[name]) for name in COLUMNS] == [i, loss, loss / 7, loss / 3, 20.0 * i, 123]


def test_what_is_not_known_of_memory_is_left_empty(path):
    history = History()
    take(history, Log(path, history), 1.0, memory=None)
    assert read_log(path)[0]["peak_memory_bytes"] == ""


def test_rows_wait_while_another_program_keeps_the_file_to_itself(path, monkeypatch):
    history = History()
    log = Log(path, history)
    take(history, log, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(type(path), "open", Mock(side_effect=PermissionError(13, "Excel on Windows")))
        take(history, log, 2.0)
        take(history, log, 3.0)
    assert losses(path) == [1.0]
    take(history, log, 4.0)
    take(history, log, 5.0)
    assert losses(path) == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_new_run_begins_a_new_log(path):
    for loss in (1.0, 2.0):
        history = History()
        take(history, Log(path, history), loss)
    assert losses(path) == [2.0]
    Log(path, History())
    assert read_log(path) == []


def test_a_run_that_goes_on_cuts_the_steps_that_it_takes_again(path):
    history = History()
    log = Log(path, history)
    for loss in (1.0, 2.0, 3.0, 4.0):
        take(history, log, loss)
    with path.open("a", encoding="utf-8") as file:
        file.write("5,0.7")  # the process was killed here
    before = path.read_text(encoding="utf-8").splitlines()
    again = History(losses=[1.0, 2.0], seconds=[0.5, 0.5], rates=[0, 0], norms=[0, 0], tokens=30)  # the checkpoint's
    log = Log(path, again)
    assert path.read_text(encoding="utf-8").splitlines() == before[:3]
    take(again, log, 3.0)
    assert path.read_text(encoding="utf-8").splitlines() == before[:4]  # tokens/s, too: those of one step
    assert [item.name for item in path.parent.iterdir()] == ["log.csv"]


def test_a_run_that_goes_on_without_its_log_has_a_header_and_what_follows(path):
    history = History(losses=[1.0], seconds=[0.5], rates=[0.1], norms=[0.2], tokens=10)
    log = Log(path, history)
    assert read_log(path) == []
    take(history, log, 2.0)
    assert losses(path) == [2.0] and read_log(path)[0]["step"] == "2"
