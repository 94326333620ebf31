"""Predictions: the range in which readers expect a number before the lesson measures it, and how often they were right.

A lesson asks with `predict(NAME)`, in its own cell. The reader adds a range, and the later `claim(NAME, ...)` says
whether the number was inside it. Both are kept at the end of mine.py, from where `minilora progress` reads them.
"""

import ast
import math
from pathlib import Path
from typing import Any

from .compare import digits, is_number
from .mine import FILE, HEAD, PREDICTED

MEANT = 0.8  # the share of ranges that should contain the number
HEADING = "# predictions: the range that you were 80 % sure of, and what was measured"
ASKED: dict[str, float | None] = {}  # in this session: the names that were asked for, and what was measured first

Known = dict[str, Any]  # low, high and value, as far as they are known
Kept = dict[str, Known]  # by name


def predict(name: str, low: float | None = None, high: float | None = None) -> None:
    """Keep a range for the number that `claim(name, ...)` measures below. Without a range, ask for one.

    low, high: the ends of a range that you are 80 % sure of; equal if you know the number. The last range before the
        number is measured counts. Whatever is wrong is printed in one line, and never stops a notebook.
    """
    path = place()
    ASKED.setdefault(name, None)
    try:
        kept = read(path)
    except (OSError, ValueError) as error:
        print(error)
        return
    known = kept.get(name, {})
    value = known.get("value", ASKED[name])
    if low is None and high is None:
        print(said(known) if "low" in known else "no guess yet: add the two ends of a range that you are 80 % sure of")
    elif low is None or high is None or not (is_number(low) and is_number(high) and -math.inf < low <= high < math.inf):
        print(f"a guess is two numbers, the smaller one first: predict({name!r}, low, high); got {low!r} and {high!r}")
    elif value is not None and (known.get("low"), known.get("high")) != (low, high):
        before = f"; {said(known)}" if "low" in known else ""
        print(f"it was measured before, as {digits(value)}, so this guess does not count{before}")
    else:
        kept[name] = known | {"low": float(low), "high": float(high)}
        print(write(path, kept) or said(kept[name]))


def measured(name: str, value: float) -> None:
    """Compare a number that a lesson has measured with the reader's guess, if there is one."""
    if name not in ASKED or not math.isfinite(value):
        return
    path = place()
    if ASKED[name] is None:
        ASKED[name] = float(value)
    try:
        kept = read(path)
    except (OSError, ValueError):  # `predict` has said so
        return
    known = kept.setdefault(name, {})
    if "value" not in known and path.exists():  # a notebook that is only run leaves no file behind
        known["value"] = ASKED[name]
        write(path, kept)
    if "low" in known:
        print(f"{said(known)}: {missed(known) or 'right'}")


def said(known: Known) -> str:
    """A guess, in words."""
    low, high = known["low"], known["high"]
    return f"your guess: {digits(low)}" + (f" to {digits(high)}" if low < high else "")


def missed(known: Known) -> str:
    """By how much a guess missed the number, in words; nothing if it did not."""
    value, end = known["value"], nearest(known)
    if digits(value) == digits(end):  # as they are printed: nobody guesses the last bit
        return ""
    ratio = value / end if end else 0
    if ratio > 1.1 or 0 < ratio < 0.9:
        factor, word = (ratio, "larger") if ratio > 1 else (1 / ratio, "smaller")
        return f"missed; {digits(value)} is {factor:.1f} times {word} than {digits(end)}"
    return f"missed; {digits(value)} is off by {digits(abs(value - end))}"


def nearest(known: Known) -> float:
    """The number of a range that is nearest to what was measured."""
    return min(max(known["value"], known["low"]), known["high"])


def summary(path: Path) -> list[str]:
    """How well calibrated the guesses in a mine.py are, in lines; none if there are no guesses."""
    if not path.exists():
        return []
    try:
        kept = read(path)
    except (OSError, ValueError) as error:
        return [str(error)]
    known = {name: one for name, one in kept.items() if "low" in one and "value" in one}
    if not known:
        return []
    wrong = {name: one for name, one in known.items() if missed(one)}
    right, count = len(known) - len(wrong), len(known)
    off = (right - MEANT * count) / math.sqrt(MEANT * (1 - MEANT) * count)  # in standard deviations of a binomial
    verdict = "as they should be"
    if count < 5:
        verdict = "too few to say more"
    elif abs(off) >= 1:
        verdict = f"{'a little ' if abs(off) < 2 else ''}too {'narrow' if off < 0 else 'wide'}"
    lines = [f"predictions: {right} of {count} inside your ranges, {100 * MEANT:.0f} % are meant to be: {verdict}"]
    furthest = sorted(wrong, key=lambda name: -distance(wrong[name]))[:3]
    return lines + [f"     {name}: {said(wrong[name])}, {missed(wrong[name])}" for name in furthest]


def distance(known: Known) -> float:
    """How far off a guess is, relative to the larger of number and guess."""
    value, end = known["value"], nearest(known)
    return abs(value - end) / max(abs(value), abs(end))


def place() -> Path:
    """The mine.py for a notebook in the current folder: that of the exercises, where they are below."""
    here, below = Path(FILE), Path("exercises") / FILE
    return below if below.parent.is_dir() and not here.exists() else here


def read(path: Path) -> Kept:
    """The predictions in a mine.py, which is not run. Raises ValueError with one line if they cannot be read."""
    try:
        section = PREDICTED.search(path.read_text("utf-8")) if path.exists() else None
        kept: Any = ast.literal_eval(section[0].partition("=")[2].strip()) if section else {}
        for one in kept.values():
            if not set(one) <= {"low", "high", "value"} or ("low" in one) != ("high" in one):
                raise TypeError
            if not all(map(is_number, one.values())):
                raise TypeError
    except (SyntaxError, ValueError, TypeError, AttributeError):
        line = f"the predictions in {path} cannot be read: fix what is below `{HEADING[:13]}`, or delete it"
        raise ValueError(line) from None
    return kept


def write(path: Path, kept: Kept) -> str:
    """Put the predictions at the end of a mine.py, which is made if it is not there. Returns why not, or nothing."""
    rows = "".join(f"    {name!r}: {one!r},\n" for name, one in kept.items())
    try:
        text = path.read_text("utf-8") if path.exists() else HEAD
        path.write_text(f"{PREDICTED.sub('', text).rstrip()}\n\n\n{HEADING}\nPREDICTIONS = {{\n{rows}}}\n", "utf-8")
    except OSError as error:
        return f"the guess is not kept: {error}"
    return ""
