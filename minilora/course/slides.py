"""Slides of the lessons: their questions, claims and figures, as reveal.js pages that nbconvert writes."""

import json
import re
import shutil
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from ..pages.template import template
from .pages import escaped
from .plan import LESSONS, Lesson

REVEAL = "https://unpkg.com/reveal.js@4.6.1"
CLAIM = re.compile(r"^(.+): (\S+) \(claimed: (.+)\): holds$", re.MULTILINE)
PREDICT = re.compile(r"^> \*\*Predict\.\*\*.*(?:\n>.*)*", re.MULTILINE)
MOST_CLAIMS = 5  # on a slide
CLAIMED = " (claimed: "

TEMPLATES = Path(__file__).parent / "templates"


def write_slides(source: Path, target: Path, reveal: str = REVEAL) -> list[Path]:
    """Write a page of slides for each lesson in a folder of notebooks, and an index; returns the pages.

    reveal: the address of reveal.js, or a folder that holds it (with dist/reveal.js), which is copied. Formulas are
        drawn by MathJax, from its own address.

    Raises ImportError without nbconvert, and FileNotFoundError for a folder without reveal.js.
    """
    try:
        from nbconvert.exporters import SlidesExporter
        from nbformat import from_dict
    except ImportError:
        raise ImportError("slides need nbconvert, which is not installed: pip install nbconvert") from None
    target.mkdir(parents=True, exist_ok=True)
    if "://" not in reveal:
        if not (Path(reveal) / "dist" / "reveal.js").exists():
            raise FileNotFoundError(
                f"{reveal} holds no dist/reveal.js: unpack a release of reveal.js, and name its folder"
            )
        shutil.copytree(Path(reveal) / "dist", target / "reveal.js" / "dist", dirs_exist_ok=True)
        reveal = "reveal.js"
    raw = (TEMPLATES / "slides.html.jinja").read_text("utf-8")
    exporter = SlidesExporter(raw_template=raw, reveal_url_prefix=reveal)
    written, lessons = [], []
    for lesson in LESSONS.values():
        path = source / f"{lesson.name}.ipynb"
        if not path.exists():
            continue
        notebook = reduced(json.loads(path.read_text("utf-8")), lesson)
        page, _ = exporter.from_notebook_node(from_dict(notebook), {"metadata": {"name": lesson.question}})
        written.append(target / f"{lesson.name}.html")
        written[-1].write_text(page, "utf-8")
        lessons.append(lesson)
    index = template(TEMPLATES / "slides-index.html.jinja").render(lessons=lessons)
    (target / "index.html").write_text(index, "utf-8")
    return written


def reduced(notebook: dict[str, Any], lesson: Lesson) -> dict[str, Any]:
    """A notebook of a lesson's slides, each cell marked as nbconvert wants it."""
    goals = "\n".join(f"- {outcome}" for outcome in lesson.outcomes)
    first = [f"# Lesson {lesson.number}: {lesson.question}\n\nAfter this lesson you can\n\n{goals}"]
    cells: list[dict[str, Any]] = []
    for slide in [first, *slides(notebook)]:
        for i, source in enumerate(slide):
            kind = "slide" if i == 0 else "fragment" if CLAIMED in source else "-"
            marks = {"slideshow": {"slide_type": kind}}
            cells.append({"cell_type": "markdown", "source": source, "metadata": marks, "id": f"cell-{len(cells)}"})
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def slides(notebook: dict[str, Any]) -> Iterator[list[str]]:
    """The slides of a notebook, in Markdown: a heading, then a question with claims, a figure, or the end."""
    heading = ""
    slide: list[str] = []
    for part in parts(notebook):
        if CLAIMED in part and slide and len(slide) < 2 + MOST_CLAIMS and not slide[-1].startswith("<img"):
            slide.append(part)
            continue
        if slide:
            yield slide
        slide = []
        if part.startswith("## "):
            heading = part
        else:
            slide = [heading, part]
    if slide:
        yield slide


def parts(notebook: dict[str, Any]) -> Iterator[str]:
    """What slides are made of, in order: headings, questions, claims, figures, and what to remember."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            for section in re.split(r"^(?=## )", "".join(cell["source"]), flags=re.MULTILINE):
                title, _, body = section.partition("\n")
                if title.startswith("## "):
                    yield title
                if title == "## What to remember":
                    yield "\n".join(re.findall(r"^(?:- |  ).*", body, re.MULTILINE))
                yield from (found[0] for found in PREDICT.finditer(section))
            continue
        for output in cell["outputs"]:
            for name, value, band in CLAIM.findall("".join(output.get("text", ""))):
                yield f"- {escaped(name)}: **{value}**{CLAIMED}{band})"
            if "image/png" in (data := output.get("data", {})):
                png, alt = "".join(data["image/png"]).strip(), escape("".join(data["text/plain"]))
                yield f'<img alt="{alt}" src="data:image/png;base64,{png}">'
