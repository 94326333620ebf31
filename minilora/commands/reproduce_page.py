"""The page of `minilora reproduce`: a table of all claims, then each with its band, numbers, picture and verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..experiments.claim import Verdict, read_claim
from ..measure.environment import circumstances
from ..pages.style import save_themes

PAGE_FILE, PICTURES = "README.md", "pictures"
MOST = 16  # numbers of a list that are printed; claims.json holds all

HEAD = """# What papers say, run here

Each claim is a sentence of a paper, a band that was fixed before the run, and what was measured. A claim is
*reproduced* when the mean over seeds is inside the band and its 95 % interval (Student's, over seeds) does not reach
what speaks against it; it is *contradicted* when the whole interval speaks against it; all else is *not at this size*.
Such a verdict is about this experiment, on small models, and not about the paper's own.
"""


def write_page(result: Mapping[str, Any], folder: Path) -> Path:
    """Draw the picture of every claim, for light and dark pages, and write the page. Returns the page's path.

    A picture that cannot be drawn is a line on the page.
    """
    pictures = folder / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, found in result["claims"].items():
        if "failed" in found:
            continue
        try:
            claim = read_claim(name)
            drawn[name] = save_themes(partial(claim.picture, found["numbers"]), pictures / f"{name}.png")
        except Exception as error:
            found["no_picture"] = f"{type(error).__name__}: {error}"
    path = folder / PAGE_FILE
    path.write_text(page(result, {name: files[0].stem for name, files in drawn.items()}), encoding="utf-8")
    return path


def page(result: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    """The page as Markdown. drawn: the stem of each claim's picture."""
    lines = [HEAD, *_circumstances(result), "", *_table(result["claims"])]
    for name, found in result["claims"].items():
        lines += ["", f"## {name}", "", *_claim(found)]
        if name in drawn:
            lines += ["", _picture(drawn[name], name, found)]
        elif "no_picture" in found:
            lines += ["", f"No picture: {found['no_picture']}"]
    return "\n".join(lines) + "\n"


def summary(result: Mapping[str, Any]) -> str:
    """The verdicts for a terminal, one claim on a line."""
    lines = []
    for name, found in result["claims"].items():
        if "failed" in found:
            lines.append(f"{name:<28} failed: {found['failed']}")
        else:
            lines.append(f"{name:<28} {found['verdict']:<17} {_interval(found)}")
    return "\n".join(lines)


def _circumstances(result: Mapping[str, Any]) -> Iterator[str]:
    options, claims = result["options"], result["claims"].values()
    if options["small"]:
        yield "**Smallest form**, with matrices or the tiny base: its verdicts are about the programs.\n"
    if options["switched"]:
        yield "**The effect of each claim is switched off**: no claim should have the verdict that it has otherwise.\n"
    days = sorted({found["created"][:10] for found in claims if "created" in found})
    when = f"; measured {days[0]} to {days[-1]}" if len(days) > 1 else ""
    yield f"{circumstances(dict(result))}{when}; {result['seconds'] / 60:.1f} minutes in all."
    counts = {verdict: sum(found.get("verdict") == verdict for found in claims) for verdict in Verdict}
    failed = sum("failed" in found for found in claims)
    said = [f"{n} {verdict}" for verdict, n in counts.items()] + ([f"{failed} failed"] if failed else [])
    yield f"{len(claims)} claims: {', '.join(said)}."


def _table(claims: Mapping[str, Any]) -> Iterator[str]:
    yield "| claim | source | measured | band | mean [95 % interval] | verdict |"
    yield "|---|---|---|---|---|---|"
    for name, found in claims.items():
        if "failed" in found:
            cells = [found.get("source", ""), "", "", "", f"failed: {found['failed']}"]
        else:
            source = f"{found['source']}, {found['where']}{' (second-hand)' * found['second_hand']}"
            band = found["band"]
            cells = [source, band["quantity"], band["text"], _interval(found), f"**{found['verdict']}**"]
        yield f"| [{name}](#{name}) | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _claim(found: Mapping[str, Any]) -> Iterator[str]:
    if "source" in found:
        yield f"**The paper** ({found['source']}, {found['where']}): {found['says']}"
        if found["second_hand"]:
            yield "\nSecond-hand: the paper itself could not be read; this is what others report of it."
        yield f"\n**Run here** ({found['base']}): {found['here']}"
        yield f"\n**Switched off**, the verdict must turn: {found['switch']}"
    if "failed" in found:
        yield f"\n**Failed**: {found['failed']}"
        return
    seeds = ", ".join(map(str, found["seeds"]))
    yield f"\n**Band** of the {found['band']['quantity']}: {found['band']['text']}"
    yield f"\n**Measured**, seeds {seeds}: {_numbers(found['numbers']['measured'])}; mean {_interval(found)}"
    yield f"\n**Verdict: {found['verdict']}**"
    if found["verdict"] != Verdict.REPRODUCED:
        yield f"\n{found['explained'] or 'Why, is not explained yet.'}"
    rows = list(_rows(found["numbers"]))
    if rows:
        yield from ("", "| number | value |", "|---|---|", *rows)


def _rows(numbers: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Numbers, and short lists of them, a row each; of what is nested, one level."""
    for key, value in numbers.items():
        name = f"{before}{key}".replace("_", " ")
        if isinstance(value, dict) and not before:
            yield from _rows(value, f"{key}: ")
        elif key != "measured" and (text := _numbers(value)):
            yield f"| {name} | {text} |"


def _numbers(value: Any) -> str:
    if isinstance(value, list):
        texts = [_numbers(one) for one in value] if 0 < len(value) <= MOST else []
        return ", ".join(texts) if all(texts) and not any(isinstance(one, list) for one in value) else ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value if isinstance(value, str) and len(value) < 60 else ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _interval(found: Mapping[str, Any]) -> str:
    one = found["interval"]
    return f"{one['mean']:.4g}" + (f" [{one['low']:.4g}, {one['high']:.4g}]" if one["n"] > 1 else "")


def _picture(stem: str, name: str, found: Mapping[str, Any]) -> str:
    alt = f"{name}: {found['band']['quantity']}, {_interval(found)}".replace('"', "'")
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{PICTURES}/{stem}-dark.png">'
    return f'<picture>{dark}<img src="{PICTURES}/{stem}.png" alt="{alt}"></picture>'
