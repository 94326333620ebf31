"""What lessons say in words: no number without its origin, no link that leads nowhere, no picture without a text."""

import ast
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from lessonfiles import BUILT, KEPT, LESSONS

PAGES = [*sorted(LESSONS.glob("*.md")), LESSONS / "src" / "TEMPLATE.md"]

NUMBER = re.compile(r"(?<![\w.,-])\d[\d,_]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w]|\.\d|-bit)")
ANY_NUMBER = re.compile(r"(?<![A-Za-z_])\d[\d,_]*(?:\.\d+)?(?:e[-+]?\d+)?")
FREE = [  # what is no claim: formulas, code, addresses, numbers of headings and of lessons, shapes, a lesson's head
    r"```.*?```", r"\$\$.*?\$\$", r"\$[^$]*\$", r"`[^`]*`", r"\]\([^)]*\)", r"https?://\S+", r"^#+ \d+\.",
    r"\b(?:[Ll]essons?|[Ee]xercises?|[Ss]ections?|[Ss]teps?|[Tt]ables?|[Ff]igures?)\s+\d[\d.]*"
    r"(?:(?:,| and| to)\s+\d[\d.]*)*", r"\(\d+(?:, \d+)+\)", r"\d[\d,]* × \d[\d,]*",
    r"^\*\d+ minutes\b.*$",
]  # fmt: skip
SOURCES = re.compile(r"^## Sources\b.*", re.MULTILINE | re.DOTALL)


def value(text):
    return float(text.rstrip(",.").replace(",", "").replace("_", ""))


def words(notebook):
    return "\n\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")


def origins(notebook):
    """All numbers that stand in code, in an output, or under Sources."""
    texts = SOURCES.findall(words(notebook))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            texts.append("".join(cell["source"]))
            for output in cell["outputs"]:
                texts.append("".join(output.get("text") or output.get("data", {}).get("text/plain", "")))
    return sorted({value(number) for text in texts for number in ANY_NUMBER.findall(text)})


def comes_from(text, known):
    """Is it one of the known numbers, rounded as it is written, or in percent?"""
    number = value(text)
    plain = text.replace(",", "").rstrip(".")
    if "." in plain:
        slack = 0.5 * 10.0 ** -len(plain.partition(".")[2])
    else:
        zeros = len(plain) - len(plain.rstrip("0")) if number else 0
        slack = min(0.5 * 10.0**zeros, 0.05 * number) if zeros else 0.5
    return any(abs(factor * a - number) <= slack * (1 + 1e-9) for a in known for factor in (1, 100, 0.01))


def without_origin(notebook):
    """The numbers in the words of a lesson that are neither computed nor cited, each with what stands around it."""
    known, text = origins(notebook), SOURCES.sub("", words(notebook))
    for pattern in FREE:
        text = re.sub(pattern, " ", text, flags=re.MULTILINE | (re.DOTALL if pattern[0] in "`\\" else 0))
    found = []
    for match in NUMBER.finditer(text):
        number = match[0].rstrip(",.")
        if ("." not in number and value(number) <= 10) or re.fullmatch(r"(?:19|20)\d\d", number):
            continue
        if not comes_from(number, known):
            around = " ".join(text[max(0, match.start() - 40) : match.end() + 25].split())
            found.append(f"{number}: ...{around}...")
    return found


def test_every_number_in_the_text_is_computed_in_code_or_cited():
    found = {name: without_origin(BUILT[name]) for name in KEPT}
    assert {name: numbers for name, numbers in found.items() if numbers} == {}


def test_every_number_under_sources_has_its_citation():
    for text in (text for name in KEPT for text in SOURCES.findall(words(BUILT[name]))):
        entries = [entry for entry in re.split(r"^[-*] ", text, flags=re.MULTILINE)[1:] if NUMBER.search(entry)]
        assert [entry for entry in entries if "](" not in entry] == []


def notebook_of(markdown, code="", printed=""):
    cells = [{"cell_type": "markdown", "source": markdown}]
    cells.append({"cell_type": "code", "source": code, "outputs": [{"text": printed}]})
    return {"cells": cells}


@pytest.mark.parametrize(
    "text, found",
    [
        ("It falls to 3.26.", []),  # printed as 3.2581
        ("It falls to 3.25.", ["3.25"]),
        ("That is 41 % of it.", []),  # 0.413
        ("That is 43 % of it.", ["43"]),
        ("About 134,500,000 parameters.", []),  # 134,515,008 in code
        ("Some 10,000 times fewer.", ["10,000"]),  # 9,285 is printed
        ("GPT-3 has 175,255 million.", []),  # cited
        ("In 2021, lesson 14 and section 3.2 of SmolLM2-135M say `99`, $x^{77}$, (64, 48), 4 × 72, 16-bit and 8.", []),
        ("# Lesson 88: a title", []),
        ("## 12. A heading with 55", ["55"]),
        ("Times 1,234 and 56.7.", ["1,234", "56.7"]),
    ],
)
def test_the_reader_of_numbers_finds_what_has_no_origin(text, found):
    sources = "\n\n## Sources\n\n- GPT-3: 175,255 million ([Hu et al.](https://arxiv.org/abs/2106.09685))"
    notebook = notebook_of(text + sources, "n = 134_515_008", "loss 3.2581, share 0.413, times 9,285")
    assert [line.partition(":")[0] for line in without_origin(notebook)] == found


# -- links -------------------------------------------------------------------------------------------------------------


@cache
def defined(path):
    """The names that a Python file defines at any depth, with their lines."""
    names = {}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = node.lineno
        elif isinstance(node, ast.Assign):
            names |= {target.id: node.lineno for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = node.lineno
    return names


def dead_links(text, folder):
    """Relative links that lead nowhere: no such file, a name in backticks that it does not define, another line."""
    dead = []
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        place, _, anchor = target.partition("#")
        path = folder / place
        if not path.exists():
            dead.append(target)
        elif path.suffix == ".py":
            names, wanted = defined(path), re.fullmatch(r"`(\w+)`", label)
            lines = [int(n) for n in re.findall(r"L(\d+)", anchor)]
            if (wanted and wanted[1] not in names) or (wanted and lines and names[wanted[1]] != lines[0]):
                dead.append(f"{label} in {target}")
            elif lines and max(lines) > len(path.read_text("utf-8").splitlines()):
                dead.append(target)
    return dead


def test_no_link_of_a_notebook_or_page_is_dead():
    texts = {LESSONS / name: words(notebook) for name, notebook in BUILT.items()}
    texts |= {page: page.read_text("utf-8") for page in PAGES}
    assert [(path.name, link) for path, text in texts.items() for link in dead_links(text, path.parent)] == []


def test_jupyterlab_is_started_where_it_opens_what_lessons_link_to():
    """It opens no file outside of the folder that it is started with."""
    linked = [
        (LESSONS / name).parent / to for name in BUILT for to in re.findall(r"\]\((\.\.[^)#]+)", words(BUILT[name]))
    ]
    for page in (LESSONS.parent / "README.md", LESSONS / "README.md"):
        (folder,) = re.findall(
            r"^(?:pip .* && )?jupyter lab *([^#\n]*?) *(?:#.*)?$", page.read_text("utf-8"), re.MULTILINE
        )
        root = (LESSONS.parent / folder).resolve()
        assert linked and [path for path in linked if not path.resolve().is_relative_to(root)] == [], page


@pytest.mark.parametrize(
    "link, dead",
    [
        ("[`dead_links`](test_prose.py)", False),
        ("[`lively_links`](test_prose.py)", True),
        ("[this file](test_prose.py#L9999)", True),
        ("[`dead_links`](test_prose.py#L1)", True),
        ("[another](nowhere.py)", True),
        ("[a paper](https://arxiv.org/abs/2106.09685)", False),
    ],
)
def test_the_reader_of_links_finds_the_dead_ones(link, dead):
    assert bool(dead_links(link, Path(__file__).parent)) is dead


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_every_picture_has_a_text_and_a_sentence_how_to_read_it():
    for cell, below in pairwise(cell for name in KEPT for cell in (*BUILT[name]["cells"], None)):
        if cell is None:
            continue
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                assert len(output["metadata"]["image/png"]["alt"].split()) >= 4, "show(figure, alt=...) draws it"
                assert below and below["cell_type"] == "markdown", "a sentence says how to read it"
                assert "read it" in "".join(below["source"]), "it starts with *How to read it.*"
