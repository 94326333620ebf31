"""The page of claims, taken apart and put together again: claims that were run anew go where they belong."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .text import counted

ROW = re.compile(r"^\| \[([a-z0-9-]+)\]\(#\1\) \|.*$", re.MULTILINE)
COUNTS = re.compile(r"^\d+ claims?: .*$", re.MULTILINE)
HEAD = re.compile(r"^\| claim \|.*\n\|[-|]+\|$", re.MULTILINE)
BORDER = re.compile(r"(?<!\\)\|")  # of a cell: not a | of its words
SECTION = "\n## "


def rows_of(page: str) -> dict[str, str]:
    """The rows of the page's table, by claim."""
    return {found[1]: found[0] for found in ROW.finditer(page)}


def sections_of(page: str) -> dict[str, str]:
    """The sections of the page, by claim, without their headings."""
    parts = (part.partition("\n") for part in page.split(SECTION)[1:])
    return {name: text.strip() for name, _, text in parts}


def counts(rows: Iterable[str], verdicts: Iterable[str]) -> str:
    """How many claims there are, and with which verdict; and the same of those that have a form on SmolLM2.

    >>> counts(["| **reproduced** | |", "| failed: no file | 2 *reproduced* |"], ["reproduced", "contradicted"])
    '2 claims: 1 reproduced, 0 contradicted, 1 failed; on SmolLM2 1 of them: 1 reproduced, 0 contradicted'
    """
    rows, verdicts = list(rows), list(verdicts)
    second = [row for row in rows if any(f" *{verdict}*" in row for verdict in (*verdicts, "failed"))]
    told = f"{counted(len(rows), 'claim')}: {_told(rows, verdicts, '**')}"
    return f"{told}; on SmolLM2 {len(second)} of them: {_told(second, verdicts, '*')}" if second else told


def _told(rows: list[str], verdicts: list[str], mark: str) -> str:
    found = {verdict: sum(f" {mark}{verdict}{mark}" in row for row in rows) for verdict in verdicts}
    failed = len(rows) - sum(found.values())
    return ", ".join([f"{n} {verdict}" for verdict, n in found.items()] + [f"{failed} failed"] * bool(failed))


def merged(page: str, part: str, verdicts: Iterable[str]) -> str:
    """The page with the rows and sections of `part`, another such page, added, or in the place of those that it has.

    The first paragraph and the table's head are those of `part`. Rows of an older page, which had fewer columns, get
    empty cells at their end.
    """
    rows, sections = rows_of(page) | rows_of(part), sections_of(page) | sections_of(part)
    columns = "".join(HEAD.findall(part))
    width = len(BORDER.findall(columns.partition("\n")[0]))
    rows = {name: row + "  |" * (width - len(BORDER.findall(row))) for name, row in rows.items()}
    head = COUNTS.sub(f"{counts(rows.values(), verdicts)}.", page.partition(SECTION)[0])
    head = "\n\n".join([*part.split("\n\n")[:2], *HEAD.sub(columns, head).split("\n\n")[2:]])
    table = ROW.sub("", head).rstrip() + "".join(f"\n{rows[name]}" for name in sorted(rows))
    return "".join([table, "\n", *(f"{SECTION}{name}\n\n{sections[name]}\n" for name in sorted(sections))])
