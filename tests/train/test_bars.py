"""Progress: on stderr, with the stage's name and count; nothing where nothing is to be done or to be shown."""

import pytest

from minilora.train.bars import Bars


def shown(capsys, bars, total, initial=0):
    with bars("answers before", total, "answer", initial=initial) as bar:
        bar.update(total - initial)
    out, err = capsys.readouterr()
    assert out == ""
    return err


@pytest.mark.parametrize("initial", [0, 2])
def test_a_bar_shows_stage_count_and_unit_on_stderr(initial, capsys):
    err = shown(capsys, Bars(), 3, initial)
    assert "answers before" in err and "3/3" in err and "answer/s" in err
    assert f"{initial}/3" in err


@pytest.mark.parametrize(("bars", "total"), [(Bars(quiet=True), 3), (Bars(), 0)], ids=["quiet", "nothing to do"])
def test_no_bar_is_shown(bars, total, capsys):
    assert shown(capsys, bars, total) == ""
