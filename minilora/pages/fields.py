"""What is printed and drawn of fields that were found: contenders, each field, and mistakes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..data.fields import as_json
from .labels import SHOWN, mistakes, shown, subject_and_others, table, verdict
from .style import GREY, LORA, literal, panels
from .text import WIDTH, counted, rule, shortened, wrapped


def field_lines(report: Mapping[str, Any], width: int = WIDTH) -> Iterator[str]:
    """A report of `WithFields` as text."""
    yield rule(f"{counted(len(report['fields']), 'field')}, {counted(report['records'], 'record')}", width)
    yield from table(
        [
            ["", "fields right, %", "whole objects right, %"],
            *([row["name"], shown(row["fields_right"]), shown(row["objects_right"])] for row in report["rows"]),
        ]
    )
    compared = _compared(report)[::-1]
    yield ""
    yield from table(
        [
            ["right, %", *(shortened(row["name"], 24) for row in compared)],
            *([name, *(shown(row["fields"][name]) for row in compared)] for name in report["fields"]),
        ]
    )
    copied = f" Copied from the text: {', '.join(report['copied'])}." if report["copied"] else ""
    yield from wrapped(
        "[low, high]: 95 % intervals, of all fields together and of differences the bootstrap's over records, else "
        f"Wilson's. Every answer, also the base's, is decoded under the schema.{copied}",
        width,
    )
    yield from ("", *wrapped(verdict(report, "fields_right", "points of fields right"), width), "")
    wrong = report["mistakes"]
    yield from mistakes(wrong, f"{counted(len(wrong), 'record')} with a mistake", "those with most first", _said, width)


def _compared(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The row of the model in question, and that of the best other contender, if there is one."""
    subject, others = subject_and_others(report)
    return [subject, *sorted(others, key=lambda row: -row["fields_right"]["value"])[:1]]


def _said(one: Mapping[str, Any]) -> str:
    pairs = ((name, *(shortened(as_json(value), 40) for value in both)) for name, both in one["wrong"].items())
    said = [f"{name} is {true}, got {got}" for name, true, got in pairs]
    more = [f"and {len(said) - SHOWN} more"] if len(said) > SHOWN else []
    return "; ".join([*said[:SHOWN], *more])


def fields_figure(report: Mapping[str, Any]) -> Any:
    """The share that is right of each field, of the model and of the best other contender, as a matplotlib figure."""
    names = [*report["fields"], "all fields"]
    figure, axes = panels(width=6.4, height=0.42 * len(names) + 1.5)
    looks = ((LORA, "o", -0.12), (GREY, "s", 0.12))
    for row, (color, marker, aside) in zip(_compared(report), looks, strict=False):
        shares = [*(row["fields"][name] for name in report["fields"]), row["fields_right"]]
        at, low, high = ([100 * (share[key] or 0) for share in shares] for key in ("value", "low", "high"))
        places = [place + aside for place in range(len(names))]
        axes.hlines(places, low, high, color=color, linewidth=1.5)
        axes.plot(at, places, color=color, marker=marker, linestyle="", label=literal(row["name"]), clip_on=False)
    axes.set_yticks(range(len(names)), [literal(shortened(name, 24)) for name in names])
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="right, %", title=f"Fields of {counted(report['records'], 'record')}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure
