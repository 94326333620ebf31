"""What is printed and drawn of answers with and without passages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..measure.open_book import CLOSED, FOUND, RIGHT
from .labels import shown
from .style import AMBER, BLUE, GREY, literal, panels
from .text import NARROWEST, NOTHING, columns, counted, listed, percent, plain, rule, shortened, wrapped

KINDS = {CLOSED: "no passage", RIGHT: "the right passage", FOUND: "the passage that is found"}
COLORS = {CLOSED: GREY, RIGHT: BLUE, FOUND: AMBER}


def open_book_lines(report: Mapping[str, Any], width: int = NARROWEST) -> Iterator[str]:
    """A report of `open_book_report` as text."""
    title = f"{counted(report['records'], 'question')}, {counted(report['passages'], 'passage')} of {report['context']}"
    yield rule(title, width)
    rows = [["", "prompt", "keyword recall, %", "prompt tokens", "s per answer"]]
    for row in report["rows"]:
        found, tokens = row["keyword_recall"], row["prompt_tokens"]
        counts = [NOTHING if value is None else plain(value, n) for value, n in ((tokens, 0), (row["seconds"], 2))]
        rows.append([shortened(row["name"], 20), KINDS[row["kind"]], shown(found), *counts])
    yield from columns(rows, left=2)
    hits = [f"{'first' if n == '1' else f'among the first {n}'} for {percent(h)}" for n, h in report["hits"].items()]
    yield from wrapped(f"BM25 finds the right passage {listed(hits)} of the questions.", width)


def open_book_figure(report: Mapping[str, Any]) -> Any:
    """Keyword recall of each adapter, and of the passage alone, by what its prompt held, as a matplotlib figure."""
    import matplotlib as mpl

    names = list(dict.fromkeys(row["name"] for row in report["rows"]))
    figure, axes = panels(width=9, height=0.9 + 0.75 * len(names))
    for row in report["rows"]:
        found, kind = row["keyword_recall"], row["kind"]
        place, value = names.index(row["name"]) + 0.25 * (list(KINDS).index(kind) - 1), 100 * found["value"]
        axes.barh(place, value, 0.22, color=COLORS[kind])
        low, high = (value if found[end] is None else 100 * found[end] for end in ("low", "high"))
        axes.plot([low, high], [place] * 2, color=mpl.rcParams["text.color"], linewidth=1)
        axes.text(max(value, high) + 1, place, f"{plain(value)} %, {KINDS[kind]}", va="center", fontsize=9)
    axes.set_yticks(np.arange(len(names)), [literal(shortened(name, 24)) for name in names])
    axes.invert_yaxis()
    axes.set(xlim=(0, 125), xticks=range(0, 101, 20), xlabel="keyword recall, % (lines: 95 % intervals)")
    return figure
