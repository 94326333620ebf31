"""The page of claims, taken apart and put together again: claims that were run anew go where they belong."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .text import counted

ROW = re.compile(r"^\| \[([a-z0-9-]+)\]\(#\1\) \|.*$", re.MULTILINE)
COUNTS = re.compile(r"^\d+ claims?: .*$", re.MULTILINE)
SECTION = "\n## "


def rows_of(page: str) -> dict[str, str]:
    """The rows of the page's table, by claim."""
    return {found[1]: found[0] for found in ROW.finditer(page)}


def sections_of(page: str) -> dict[str, str]:
    """The sections of the page, by claim, without their headings."""
    parts = (part.partition("\n") for part in page.split(SECTION)[1:])
    return {name: text.strip() for name, _, text in parts}


def counts(rows: Iterable[str], verdicts: Iterable[str]) -> str:
    """How many claims there are, and with which verdict.

    >>> counts(["| **reproduced** |", "| failed: no file |"], ["reproduced", "contradicted"])
    '2 claims: 1 reproduced, 0 contradicted, 1 failed'
    """
    rows = list(rows)
    found = {verdict: sum(f"**{verdict}**" in row for row in rows) for verdict in verdicts}
    failed = len(rows) - sum(found.values())
    told = [f"{n} {verdict}" for verdict, n in found.items()] + [f"{failed} failed"] * bool(failed)
    return f"{counted(len(rows), 'claim')}: {', '.join(told)}"


def merged(page: str, part: str, verdicts: Iterable[str]) -> str:
    """The page with the rows and sections of `part`, another such page, added, or in the place of those that it has."""
    rows, sections = rows_of(page) | rows_of(part), sections_of(page) | sections_of(part)
    head = COUNTS.sub(f"{counts(rows.values(), verdicts)}.", page.partition(SECTION)[0])
    table = ROW.sub("", head).rstrip() + "".join(f"\n{rows[name]}" for name in sorted(rows))
    return "".join([table, "\n", *(f"{SECTION}{name}\n\n{sections[name]}\n" for name in sorted(sections))])
