"""The slides of the lessons: what is on them, and the pages that `minilora course DIR --slides` writes."""

import re
import sys
from pathlib import Path

import pytest
from lessonfiles import BUILT, KEPT, LESSONS

from minilora.cli import main
from minilora.course.plan import LESSONS as PLAN
from minilora.course.slides import MOST_CLAIMS, REVEAL, reduced, slides, write_slides


@pytest.fixture
def nbconvert(monkeypatch):
    """nbconvert, with its own templates also in an environment that shares its packages with another one."""
    module = pytest.importorskip("nbconvert", reason="slides need pip install nbconvert")
    monkeypatch.setenv("JUPYTER_PATH", str(Path(module.__file__).parents[4] / "share" / "jupyter"))


ALT = "The path of one token: 1,536 features through W to 576, and in parallel through A and B, 8 features wide."


def markdown(source):
    return {"cell_type": "markdown", "source": source}


def printed(*lines):
    return {"cell_type": "code", "source": "secret = 1", "outputs": [{"text": [f"{line}\n" for line in lines]}]}


FIGURE = {
    "cell_type": "code",
    "source": "draw()",
    "outputs": [{"data": {"image/png": "abc\n", "text/plain": 'A "bar".'}}],
}


def sources(notebook):
    return list(slides(notebook))


def test_a_slide_is_a_question_with_its_claims_or_a_figure_or_what_to_remember():
    cells = [
        markdown("# Lesson 1\n\nprose\n## 1. First\n\nmore prose\n\n> **Predict.** How\n> many?\n\n> a quotation"),
        printed("a table", "a_b: 1.5 (claimed: 1 to 2): holds", "and more", "c: d: 3 (claimed: exactly that): holds"),
        FIGURE,
        markdown("*How to read it.*"),
        printed("after: 4 (claimed: at least 1): holds"),
        markdown(
            "## 2. Nothing to show\n\nprose\n\n## What to remember\n\n- One,\n  two.\n- Three.\n\nText.\n\n## Sources"
        ),
    ]
    assert sources({"cells": cells}) == [
        [
            "## 1. First",
            "> **Predict.** How\n> many?",
            "- a\\_b: **1.5** (claimed: 1 to 2)",
            "- c: d: **3** (claimed: exactly that)",
        ],
        ["## 1. First", '<img alt="A &quot;bar&quot;." src="data:image/png;base64,abc">'],
        ["## 1. First", "- after: **4** (claimed: at least 1)"],
        ["## What to remember", "- One,\n  two.\n- Three."],
    ]


def test_a_full_slide_is_followed_by_another_one():
    lines = [f"{i}: {i} (claimed: exactly that): holds" for i in range(MOST_CLAIMS + 3)]
    cells = [markdown("## 1. A\n\n> **Predict.** What?"), printed(*lines)]
    counts = [len(slide) for slide in sources({"cells": cells})]
    assert counts == [2 + MOST_CLAIMS, 1 + 3]


@pytest.mark.parametrize("name", KEPT)
def test_every_claim_figure_and_question_of_a_lesson_is_on_one_slide_and_no_code(name):
    [lesson] = [lesson for lesson in PLAN.values() if f"{lesson.name}.ipynb" == name]
    cells = reduced(BUILT[name], lesson)["cells"]
    words = "\n".join("".join(cell["source"]) for cell in BUILT[name]["cells"] if cell["cell_type"] == "markdown")
    outputs = [output for cell in BUILT[name]["cells"] for output in cell.get("outputs", [])]
    claims = sum("".join(output.get("text", "")).count(" (claimed: ") for output in outputs)
    shown = "\n".join(cell["source"] for cell in cells)
    assert shown.count(" (claimed: ") == claims and shown.count("**Predict.**") == words.count("> **Predict.**")
    assert shown.count("<img") == sum("image/png" in output.get("data", {}) for output in outputs)
    code = {line for cell in BUILT[name]["cells"] if cell["cell_type"] == "code" for line in cell["source"]}
    assert (code - {"\n"}) & set(shown.splitlines(keepends=True)) == set()
    kinds = {cell["metadata"]["slideshow"]["slide_type"] for cell in cells}
    assert kinds == {"slide", "fragment", "-"} and cells[0]["metadata"]["slideshow"]["slide_type"] == "slide"
    assert lesson.question in cells[0]["source"] and all(line in cells[0]["source"] for line in lesson.outcomes)


@pytest.fixture
def one_lesson(tmp_path):
    (tmp_path / "lessons").mkdir()
    (tmp_path / "lessons" / "09_lora.ipynb").write_bytes((LESSONS / "09_lora.ipynb").read_bytes())
    return tmp_path / "lessons"


def test_a_page_has_a_section_for_each_slide_and_its_figures_within(nbconvert, one_lesson, tmp_path):
    [page] = write_slides(one_lesson, tmp_path / "slides")
    text = page.read_text("utf-8")
    expected = 1 + len(list(slides(BUILT["09_lora.ipynb"])))
    assert len(re.findall(r"<section>\s*<section>", re.sub(r"<section +>", "<section>", text))) == expected
    assert f"{REVEAL}/dist/reveal.js" in text and "require(" not in text and "import numpy" not in text
    assert re.findall(r'<img alt="([^"]*)"', text) == [ALT]
    index = (tmp_path / "slides" / "index.html").read_text("utf-8")
    assert '<a href="09_lora.html">What is LoRA?</a>' in index and index.count("<li>") == 1


def test_reveal_js_comes_from_a_folder_that_is_copied(nbconvert, one_lesson, tmp_path):
    (tmp_path / "release" / "dist").mkdir(parents=True)
    (tmp_path / "release" / "dist" / "reveal.js").write_text("// reveal")
    [page] = write_slides(one_lesson, tmp_path / "slides", str(tmp_path / "release"))
    assert '<script src="reveal.js/dist/reveal.js">' in page.read_text("utf-8")
    assert (tmp_path / "slides" / "reveal.js" / "dist" / "reveal.js").read_text() == "// reveal"
    assert write_slides(one_lesson, tmp_path / "slides", str(tmp_path / "release")) == [page]  # anew
    with pytest.raises(FileNotFoundError, match=r"holds no dist/reveal\.js: unpack a release"):
        write_slides(one_lesson, tmp_path / "slides", str(tmp_path))


def test_without_nbconvert_the_command_says_in_one_line_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nbconvert", None)
    monkeypatch.setitem(sys.modules, "nbconvert.exporters", None)
    assert main(["course", str(tmp_path / "slides"), "--slides"]) == 1
    said = capsys.readouterr().err
    assert said == "minilora: slides need nbconvert, which is not installed: pip install nbconvert\n"
    assert not (tmp_path / "slides").exists()


def test_the_command_writes_the_slides_of_all_lessons(nbconvert, tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr("minilora.course.slides.write_slides", lambda *given: written.append(given) or [Path("a")] * 17)
    assert main(["course", str(tmp_path), "--slides", "--reveal", "https://host/reveal"]) == 0
    (source, *rest) = written[0]  # the lessons of the clone, or those of the installed package
    assert (source / "09_lora.ipynb").is_file() and rest == [tmp_path, "https://host/reveal"]
    assert capsys.readouterr().out.startswith(f"slides of 17 lessons written to {tmp_path}\nopen ")
    assert main(["course", str(tmp_path), "--slides"]) == 0 and written[1][2] == REVEAL


def test_a_place_of_reveal_js_without_slides_is_refused(tmp_path, capsys):
    assert main(["course", str(tmp_path / "new"), "--reveal", "here"]) == 1
    assert "--reveal belongs to --slides" in capsys.readouterr().err and not (tmp_path / "new").exists()
