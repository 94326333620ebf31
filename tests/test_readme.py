"""The Python blocks of the README run as they stand, in order, and print what the comments beside `print` say.

A block after the line `<!-- needs the real model -->` runs where the real model is at hand.
"""

import re
from pathlib import Path

import pytest

from minilora.models import load as zoo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^(<!-- needs the real model -->\n)?```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_there_are_blocks():
    assert BLOCKS and len(BLOCKS) == README.count("```python")


@pytest.mark.parametrize(
    ("needs_real", "code"),
    [pytest.param(bool(mark), code, marks=[pytest.mark.real] if mark else []) for mark, code in BLOCKS],
)
def test_a_block_runs_in_an_empty_folder_and_prints_what_it_says(needs_real, code, tmp_path, monkeypatch, capsys):
    if needs_real and zoo.find("smollm2") is None:
        pytest.skip("needs the real model: minilora pull smollm2")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    for promised in re.findall(r"^ *print\(.*\)  # (.+)$", code, re.MULTILINE):
        assert promised in printed


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:minilora|tests|lessons|\.ci)/[\w./-]+)`", text)
    assert len(named) >= 3
    assert [name for name in named if "NN" not in name and not (ROOT / name).exists()] == []
