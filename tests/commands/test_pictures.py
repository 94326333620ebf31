"""Every picture that a command draws is written, for light pages and dark ones where there are two."""

import json

import pytest
from commandline import status
from matplotlib.figure import Figure

RESULT = {"sets": {}, "scores": {}, "labels": {"own": {}}, "fields": {}, "open_book": {"own": {}}}
PICTURES = [  # the command; what computes its result; what it writes
    ("compare --out x --json", "commands.compare.compare", "x/picture.png x/picture-dark.png"),
    ("eval --matrix m.svg --confusion c.png --context b.md --passages p.png --json", "commands.eval.evaluate_adapters",
     "m.svg c.png p.png"),
    ("report x --picture r.svg", "commands.report.read_metrics",
     "r.svg r-dark.svg r-labels.svg r-labels-dark.svg r-fields.svg r-fields-dark.svg"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "computes", "files"), PICTURES)
def test_every_picture_of_a_command_is_written(command, computes, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"minilora.{computes}", lambda *given: RESULT)
    for name in ("compare_figure", "matrix_figure", "run_figure", "labels_figure", "fields_figure"):
        monkeypatch.setattr(f"minilora.pages.figures.{name}", lambda found: Figure((1, 1)))
    for name in ("labels.labels_figure", "open_book.open_book_figure"):
        monkeypatch.setattr(f"minilora.pages.{name}", lambda found: Figure((1, 1)))
    assert status(*command.split()) == 0
    assert "--json" not in command or json.loads(capsys.readouterr().out) == RESULT
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")} == set(files.split())
