"""Lessons and exercises for a reader: copied out of the package, without outputs."""

import hashlib
import json
import posixpath
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..files.disk import write_bytes
from ..pages.template import template
from ..terminal import quote
from . import mine
from .pages import course_map

TEMPLATES = Path(__file__).parent / "templates"
IN_BROWSER = re.compile(r"^(\w+ = )(.+?)(  # )in the browser: (.+)$", re.MULTILINE)
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)[^)\s]*\)")  # to a file


def notebooks() -> Path:
    """The folder of lessons, in the installed package or in the clone. Raises FileNotFoundError without one."""
    package = Path(__file__).parents[1]
    for folder in (package / "course" / "notebooks", package.parent / "lessons"):
        if any(folder.glob("[0-9]*.ipynb")):
            return folder
    raise FileNotFoundError("this installation holds no lessons: install minilora again, or take them from a clone")


def copy_course(target: Path, site: str = "") -> str:
    """Write lessons, exercises, an empty mine.py and a README.md into a folder; returns what was done, in lines.

    A notebook of an earlier version that the reader has not touched is replaced. Any other file that is there and
    differs is left alone: it may be the reader's work. site: the URL of a folder that
    `minilora site --course` wrote: notebooks that run there get a link to it below their title.
    """
    if site and not site.startswith(("http://", "https://")):
        raise ValueError(f"--site takes the URL of a page that `minilora site --course` wrote, got {site!r}")
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file: name a folder for the course")
    source = notebooks()
    paths = {path.relative_to(source).as_posix(): path for path in sorted(source.rglob("[0-9]*.ipynb"))}
    paths = {name: path for name, path in paths.items() if not {".ipynb_checkpoints", "src"} & {*path.parts}}
    names = {*paths, "README.md", "exercises/mine.py"}
    texts = {name: to_read(path.read_text("utf-8"), name, names, site) for name, path in paths.items()}
    texts["README.md"] = template(TEMPLATES / "README.md.jinja").render(table=course_map(source))
    texts["exercises/mine.py"] = mine.HEAD
    written, kept = 0, []
    for name, text in texts.items():
        path = target / name
        if path.exists():
            there = path.read_text("utf-8")
            if there == text or name == "exercises/mine.py":
                continue
            if not untouched(there):
                kept.append(name)
                continue
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, text.encode())
        written += 1
    lines = [f"{written} files written to {target}" if written else f"nothing to write: {target} holds the course"]
    if kept:
        lines.append(f"left as they are, since they differ: {', '.join(kept)} (delete or rename one to get it anew)")
    return "\n".join([*lines, f"begin with: jupyter lab {quote(str(target / min(paths)))}"])


def to_read(text: str, name: str, names: Collection[str], site: str = "") -> str:
    """A notebook as a reader gets it: without outputs, so that no answer is below a question before it is asked.

    name, names: as for `without_links`. site: as for `copy_course`.
    """
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
        else:
            cell["source"] = without_links("".join(cell["source"]), name, names).splitlines(keepends=True)
    if site and not notebook["metadata"].get("minilora", {}).get("needs_model"):
        title, *rest = notebook["cells"][0]["source"]
        link = f"[Open in the browser]({site.rstrip('/')}/course/lab/index.html?path={name})\n"
        notebook["cells"][0]["source"] = [title.rstrip() + "\n", "\n", link, *rest]
    notebook.setdefault("metadata", {}).setdefault("minilora", {})["as_copied"] = digest(notebook)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def digest(notebook: Any) -> str:
    """A hash of what a reader may change in a notebook: the cells, with their outputs."""
    cells = [(cell["cell_type"], "".join(cell["source"]), cell.get("outputs")) for cell in notebook["cells"]]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()[:16]


def untouched(text: str) -> bool:
    """Is this a notebook in which `copy_course` wrote all that it holds?"""
    try:
        notebook = json.loads(text)
        return bool(notebook["metadata"]["minilora"]["as_copied"] == digest(notebook))
    except (ValueError, LookupError, TypeError):  # no notebook, or a copy that an earlier version made
        return False


def without_links(text: str, name: str, names: Collection[str] = ()) -> str:
    """Markdown without links to files that are not there: each becomes the name of the file.

    name: where the text goes, from the folder of the course. names: what else is there.
    """

    def linked(found: re.Match[str]) -> str:
        file = posixpath.normpath(posixpath.join(posixpath.dirname(name), found[2]))
        return found[0] if file in names else f"{found[1]} (`{file.removeprefix('../')}`)"

    return LINK.sub(linked, text)


def smaller(code: str) -> str:
    """The code of a cell with the values that it has in the browser: `SEEDS = 3  # in the browser: 1`."""
    return IN_BROWSER.sub(r"\1\4\3elsewhere: \2", code)
