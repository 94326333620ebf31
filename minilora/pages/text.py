"""How a page is written: rules, columns and wrapped lines; numbers, bytes, durations, percent and intervals in words.

Every page that a command prints, and the model card, take these from here, so that one thing looks the same everywhere.
"""

from __future__ import annotations

import math
import re
import shutil
import textwrap
from collections.abc import Sequence
from itertools import accumulate
from unicodedata import category, east_asian_width

WIDTH = 100  # columns of a page at most
NARROWEST = 80  # columns at least: the tables need them
NOTHING = "-"  # the cell of a table where there is no number


def terminal_width() -> int:
    """Columns for a page: those of the terminal, between 80 and 100; 100 where there is no terminal."""
    return min(WIDTH, max(NARROWEST, shutil.get_terminal_size(fallback=(WIDTH, 24)).columns))


# -- lines -------------------------------------------------------------------------------------------------------------


def width_of(text: str) -> int:
    """The columns of a terminal that a text takes.

    >>> width_of("loss"), width_of("返品"), width_of("e\u0301")
    (4, 4, 1)
    """
    return len(text) if text.isascii() else sum(map(_width, text))


def _width(character: str) -> int:
    return 0 if category(character) in ("Mn", "Me", "Cf") else 1 + (east_asian_width(character) in "WF")


def padded(text: str, width: int, right: bool = False) -> str:
    """A text with the spaces after it that fill up its columns. right: before it.

    >>> padded("返品", 6), padded("返品", 6, right=True)
    ('返品  ', '  返品')
    """
    spaces = " " * (width - width_of(text))
    return spaces + text if right else text + spaces


_WIDE = "[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\uff01-\uff60\U00020000-\U0003ffff]"
_PART = re.compile(  # a wide character, or what is between such characters; with those that begin no line
    f"(?:{_WIDE}|(?:(?!{_WIDE}).)+)[、。，．：；！？」』）】〉》ー々ぁぃぅぇぉっゃゅょァィゥェォッャュョ]*", re.DOTALL
)


def breakable(word: str) -> list[str]:
    """The parts of a word between which a line may be broken.

    >>> breakable("order"), breakable("FW12です。")
    (['order'], ['FW12', 'で', 'す。'])
    """
    return _PART.findall(word)


class _Part(str):
    __slots__ = ()

    def __len__(self) -> int:
        return width_of(str(self))


class Wrapper(textwrap.TextWrapper):
    """Counts columns, not characters, and may break a line between wide characters, but not before a full stop."""

    def _split(self, text: str) -> list[str]:
        parts: list[str] = super()._split(text)  # type: ignore[misc]
        return parts if text.isascii() else [_Part(found) for part in parts for found in breakable(part)]


def rule(title: str, width: int = NARROWEST) -> str:
    """The line that begins a section of a page.

    >>> rule("cost", 20)
    '-- cost ------------'
    """
    title = f"-- {title} "
    return title + "-" * (width - width_of(title))


def wrapped(line: str, width: int = NARROWEST, indent: str = "", first: str = "") -> list[str]:
    """A line as lines of at most `width` columns. No word is broken, so that paths and flags can be copied.

    A line that fits is unchanged, with its runs of spaces. first, indent: what begins the first line and the others.

    >>> wrapped("the quick brown fox", 12, indent="  ")
    ['the quick', '  brown fox']
    """
    if width_of(first + line) <= width:
        return [first + line]
    keep = {"break_long_words": False, "break_on_hyphens": False}
    return Wrapper(width, initial_indent=first, subsequent_indent=indent, **keep).wrap(line)  # type: ignore[arg-type]


def shortened(text: str, width: int) -> str:
    """The text on one line, cut to this many columns.

    >>> shortened("runs/a-long-name", 8), shortened("a\\nb", 8)
    ('runs/a-…', 'a b')
    """
    text = " ".join(text.split())
    if width_of(text) <= width:
        return text
    fitting = sum(end < width for end in accumulate(map(_width, text)))
    return f"{text[:fitting]}…".replace("\u200d…", "…")  # no joiner without what it joins


def columns(rows: Sequence[Sequence[str]], left: int = 1, gap: int = 2) -> list[str]:
    """Rows of cells as lines whose columns are aligned. left: this many columns are flush left, the others
    flush right. A row may have fewer cells than another.

    >>> columns([["", "loss"], ["base", "2.5"], ["legal", "1.25"]])
    ['       loss', 'base    2.5', 'legal  1.25']
    """
    widths = [max(width_of(row[j]) for row in rows if j < len(row)) for j in range(max(map(len, rows)))]
    lines = []
    for row in rows:
        cells = [padded(cell, widths[j], right=j >= left) for j, cell in enumerate(row)]
        lines.append((" " * gap).join(cells).rstrip())
    return lines


# -- numbers -----------------------------------------------------------------------------------------------------------


def counted(number: int, one: str) -> str:
    """A number with the noun that it counts.

    >>> counted(1, "trial"), counted(1200, "trial")
    ('1 trial', '1,200 trials')
    """
    return f"{number:,} {one if number == 1 else one + 's'}"


def listed(names: Sequence[str], last: str = "and") -> str:
    """Names in a sentence.

    >>> listed(["legal"]), listed(["legal", "medical", "support"])
    ('legal', 'legal, medical and support')
    """
    return f" {last} ".join([*([", ".join(names[:-1])] if len(names) > 1 else []), *names[-1:]])


def percent(share: float, digits: int = 0, sign: bool = False) -> str:
    """A share in percent. sign: with a plus or a minus, as a change has it; what rounds to 0 has neither.

    >>> percent(0.5), percent(0.0034, 2), percent(0.21, sign=True), percent(-0.001, sign=True)
    ('50 %', '0.34 %', '+21 %', '0 %')
    """
    return f"{signed(100 * share, digits) if sign else plain(100 * share, digits)} %"


def change(before: float, after: float) -> str:
    """By how much a number has changed, in percent; nothing where that has no meaning.

    >>> change(2, 3), change(3, 2.999), change(0, 1)
    ('+50 %', '0 %', '')
    """
    return percent(after / before - 1, sign=True) if before and math.isfinite(after / before) else ""


def signed(number: float, digits: int = 0) -> str:
    """A difference, with its sign unless it rounds to 0.

    >>> signed(1.25, 1), signed(-0.04, 1)
    ('+1.2', '0.0')
    """
    text = plain(number, digits)
    return text if number <= 0 or not text.strip("0.,") else f"+{text}"


def plain(number: float, digits: int = 0) -> str:
    """A number with this many digits after the point, thousands apart, never -0.

    >>> plain(301800.4), plain(-0.2)
    ('301,800', '0')
    """
    text = f"{number:,.{digits}f}"
    return text.removeprefix("-") if not text.strip("-0.,") else text


def interval(value: float | None, low: float | None, high: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number with the bounds of its interval, where it has some. sign: it is a difference.

    >>> interval(2.5, 2.25, 2.75, 2), interval(-0.5, None, None, 1, sign=True), interval(None, None, None)
    ('2.50 [2.25, 2.75]', '-0.5', 'not finite')
    """
    if value is None:
        return "not finite"
    shown = signed if sign else plain
    bounds = "" if low is None or high is None else f" [{shown(low, digits)}, {shown(high, digits)}]"
    return shown(value, digits) + bounds


# -- units -------------------------------------------------------------------------------------------------------------


def megabytes(size: float) -> str:
    """Bytes, in millions.

    >>> megabytes(1_199_400_000), megabytes(9_768_960), megabytes(38_000)
    ('1,199 MB', '9.8 MB', '0.038 MB')
    """
    return f"{millions(size)} MB"


def millions(size: float) -> str:
    """Bytes in millions, for a column that says MB above it.

    >>> millions(1_199_400_000), millions(9_768_960), millions(0)
    ('1,199', '9.8', '0.0')
    """
    digits = 0 if size >= 99.95e6 else 1 if size >= 0.995e6 or not size else 2 if size >= 0.0995e6 else 3
    return f"{size / 1e6:,.{digits}f}"


def duration(seconds: float) -> str:
    """A time.

    >>> duration(0.0423), duration(4.2), duration(90), duration(5400)
    ('42 ms', '4.20 s', '1.5 minutes', '1.5 hours')
    """
    if seconds < 0.9995:
        return f"{1000 * seconds:.{0 if seconds >= 0.00995 else 1}f} ms"
    if seconds < 59.95:
        return f"{seconds:.{2 if seconds < 9.995 else 1}f} s"
    return f"{seconds / 60:.1f} minutes" if seconds < 3597 else f"{seconds / 3600:.1f} hours"
