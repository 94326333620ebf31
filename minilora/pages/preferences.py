"""What is printed of preferences that were measured: how often each contender prefers the answer that people chose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .labels import shown, table, verdict
from .text import NOTHING, WIDTH, counted, plain, rule, shortened, wrapped


def preference_lines(report: Mapping[str, Any], width: int = WIDTH) -> Iterator[str]:
    """A report of `Preferred` as text."""
    yield rule(f"{counted(report['records'], 'pair')}: which answer is more probable", width)
    rows = [["", "chosen preferred, %", f"more than {report['reference']}, %", "log-ratio, nats"]]
    for row in report["rows"]:
        more = shown(row["shifted"]) if "shifted" in row else NOTHING
        rows.append([shortened(row["name"], 20), shown(row["chosen"]), more, plain(row["log_ratio"], 2)])
    yield from table(rows)
    yield from wrapped(
        "[low, high]: 95 % intervals, of shares Wilson's, of differences the bootstrap's. Log-ratio: the mean of log "
        "π(chosen) - log π(rejected), each summed over the answer's tokens.",
        width,
    )
    yield from ("", *wrapped(verdict(report, "chosen", "points of pairs"), width))
