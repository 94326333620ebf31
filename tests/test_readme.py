"""The Python blocks of the README run as they are, in order, and print what the comments next to `print` say.

A block after the line `<!-- needs the real model -->` runs where the real model is at hand.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

from minilora.cli import main
from minilora.models import load as zoo
from minilora.nn.families import FAMILIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + (ROOT / "minilora/README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^(<!-- needs the real model -->\n)?```python\n(.*?)^```$", PAGES, re.MULTILINE | re.DOTALL)


def test_there_are_blocks():
    assert BLOCKS and len(BLOCKS) == PAGES.count("```python")


@pytest.mark.parametrize(
    ("needs_real", "code"),
    [pytest.param(bool(mark), code, marks=[pytest.mark.real] if mark else []) for mark, code in BLOCKS],
)
@pytest.mark.long
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
    blanks = re.compile("NN|NAME")
    assert [name for name in named if not blanks.search(name) and not (ROOT / name).exists()] == []


@pytest.mark.long
def test_the_commands_for_data_of_ones_own_run_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    """As they are in the README, in a folder with the data that they name, on the tiny base and for two steps."""
    block = README[README.index("## Use it on your own data") :].partition("```bash\n")[2].partition("```")[0]
    commands = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    rows = [f"What is term {i}?,Term {i} is the word for thing number {i}." for i in range(30)]
    (tmp_path / "mine.csv").write_text("question,answer\n" + "\n".join(rows), encoding="utf-8")
    mail = [f"message number {i},{'even' if i % 2 else 'odd'}" for i in range(30)]
    (tmp_path / "mail.csv").write_text("text,topic\n" + "\n".join(mail), encoding="utf-8")
    pairs = [{"prompt": f"Is {i} odd?", "chosen": "See.", "rejected": f"It is {i}."} for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    forms = [{"text": f"Part {i} is late.", "fields": {"part": str(i)}} for i in range(30)]
    (tmp_path / "forms.jsonl").write_text("\n".join(map(json.dumps, forms)), encoding="utf-8")
    schema = {"type": "object", "properties": {"part": {"type": "string"}}, "required": ["part"]}
    (tmp_path / "forms.json").write_text(json.dumps(schema), encoding="utf-8")
    (tmp_path / "handbook.md").write_text("# Terms\n\nTerm 1 is a word.\n\nTerm 2 is another.\n", encoding="utf-8")
    (tmp_path / "new.csv").write_text("question\nWhat is term 3?\n", encoding="utf-8")
    given = {path.name for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    for words in commands:
        if words[0] == "finetune":
            words += ["--base", "tiny", "--steps", "2", "--eval-records", "4"]
        assert main(words) == 0, capsys.readouterr().err
    assert {"out.csv", "runs"} | given == {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("page", ["README.md", "minilora/README.md", "lessons/README.md"])
def test_links_of_a_page_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)|(?:src|srcset)=\"([^\"]+)\"", (ROOT / page).read_text("utf-8"))
    named = ["".join(pair) for pair in targets]
    assert named and [name for name in named if not (ROOT / page).parent.joinpath(name).exists()] == []


def test_the_tour_has_a_row_for_each_family_and_for_no_other():
    table = (ROOT / "minilora/README.md").read_text("utf-8").partition("## Families")[2]
    rows = re.findall(r"^\| ([A-Za-z]+)[^|]*\| ([a-z\d_, ]+) \|", table, re.MULTILINE)
    assert {name for _, row in rows for name in row.split(", ")} == set(FAMILIES), "the table under Families"
    listed = (ROOT / "README.md").read_text("utf-8").partition("[Families](")[2].partition(", compared with")[0]
    assert [name for name, _ in rows if name not in listed] == [], "README.md lists the families, too"


def test_the_tour_names_every_file_of_the_package():
    """Lessons and claims are named as a group."""
    tour = (ROOT / "minilora/README.md").read_text("utf-8")
    rooms = [path for path in (ROOT / "minilora").iterdir() if path.is_dir() and any(path.glob("*.py"))]
    grouped = {"claims", "course", "commands"}
    files = [path for room in rooms if room.name not in grouped for path in room.glob("*.py")]
    names = {path.stem for path in [*files, *(ROOT / "minilora").glob("*.py")] if not path.stem.startswith("_")}
    assert {name for name in names | {f"{room.name}/" for room in rooms} if not re.search(rf"\b{name}", tour)} == set()
