"""Progress: on stderr, with the stage's name and count; nothing where nothing is to be done or to be shown."""

import io

import pytest

from minilora.progress import Bars


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


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_bar_fits_the_terminal_and_begins_with_what_it_was_told(columns, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with Bars()("training", 120, "step") as bar:
        bar.dynamic_ncols, bar.ncols = None, columns
        bar.set_postfix({"loss": "3.412", "tokens/s": "256"}, refresh=False)
        bar.update(60)
        bar.refresh()
    shown = next(line for line in screen.getvalue().replace("\n", "").split("\r") if "3.412" in line)
    assert shown.startswith("training        loss=3.412, tokens/s=256   50%|")
    assert len(shown) <= columns and "60/120" in shown and (columns < 80 or "##" in shown)
