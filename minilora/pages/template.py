"""Pages that are written as templates (Jinja's), with the words of text.py as filters."""

from __future__ import annotations

import json
import shlex
from functools import cache
from pathlib import Path
from typing import Any

from . import text

TEMPLATES = Path(__file__).parent / "templates"


@cache
def template(file: Path) -> Any:
    """The template in a file: `template(TEMPLATES / "card.md.jinja").render(...)`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(file.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # without autoescape: most pages are Markdown
    words = ("counted", "duration", "megabytes", "percent", "plain", "rule", "signed")
    made.filters |= {name: getattr(text, name) for name in words}
    made.filters |= {"json": lambda value: json.dumps(value, ensure_ascii=False)}
    made.filters |= {"code": code, "note": note, "quote": shlex.quote}
    made.globals["change"] = text.change
    return made.get_template(file.name)


def code(words: str) -> str:
    """Text as code in Markdown, also inside a table, whatever it contains.

    >>> code("a | b"), code("a `b`")
    ('`a \\\\| b`', '`` a `b` ``')
    """
    words = " ".join(words.split()).replace("|", "\\|")
    return f"`` {words} ``" if "`" in words else f"`{words}`"


def note(words: str, width: int) -> str:
    """Words as an indented paragraph of at most `width` columns."""
    return "".join(f"{line}\n" for line in text.wrapped(" ".join(words.split()), width, indent="  "))
