"""`minilora reproduce`: run the claims, keep what they found, and write the page.

What a claim found is kept under its name, its settings and the code that decides it: a claim of which nothing has
changed is read, not run. Its sentences and its band are not among that: a verdict is always that of the band as it
stands in the file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..experiments.claim import Claim, ClaimFile, Setting, claim_names, read_claim
from ..experiments.memo import code_sha256
from ..files.disk import read_json, write_json
from ..measure.environment import machine, versions
from ..measure.statistics import Interval
from ..options import UsageError, add_flags, from_flags, option
from ..progress import Bars
from .shared import AS_JSON, tell

CLAIMS_FILE, KEPT = "claims.json", "cache"

Found = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """How claims are run. Raises ValueError for values that mean nothing."""

    seeds: Sequence[int] | None = option(None, "seeds of every claim (default: the claim's own)", metavar="N")
    jobs: int | None = option(None, "runs at a time (default: as many as there are cores)", metavar="N")
    out: str | None = option(None, "folder of page, pictures, claims.json and what is kept (default: runs/claims)")
    small: bool = option(False, "each claim in its smallest form: seconds")
    switched: bool = option(False, "with the effect of each claim switched off: the verdicts must turn")

    def __post_init__(self):
        if self.seeds is not None and (not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds)):
            raise ValueError(
                f"seeds must be different numbers from 0 on, got {' '.join(map(str, self.seeds)) or 'none'}"
            )
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {self.jobs}")

    @property
    def folder(self) -> Path:
        """Where everything goes: `out`, or runs/claims, with what makes it another run behind it."""
        other = "-small" * self.small + "-switched" * self.switched
        return Path(self.out or f"runs/claims{other}")

    def setting(self, claim: Claim) -> Setting:
        """How one claim is run."""
        seeds = tuple(claim.seeds if self.seeds is None else self.seeds)
        return Setting(self.small, self.switched, seeds, self.jobs, self.folder / KEPT)


def chosen(names: Sequence[str]) -> list[str]:
    """The claims of these names, or all. Raises ValueError for one that is not there, with the nearest one."""
    known = claim_names()
    asked = [name.replace("_", "-").removesuffix(".py") for name in names]
    for name, word in zip(asked, names, strict=True):
        if name not in known:
            near = [one for one in known if name in one] or get_close_matches(name, known, 1, cutoff=0.5)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"no claim is called {word!r}{meant} (minilora reproduce --list names them)")
    return list(dict.fromkeys(asked)) or known


def reproduce(
    names: Sequence[str] = (),
    options: ReproduceOptions | None = None,
    say: Callable[[str], object] = lambda line: None,
    bars: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Run the claims of these names, or all, and return what was found: {"claims": {name: ...}, "machine": ..., ...}.

    A claim that raises has {"failed": why} in place of numbers, and the others go on. Each result is kept as soon as
    it is there; after Ctrl-C the same command goes on. Claims that are not named, but kept, are returned, too. The
    result also stands in claims.json. say: hears what is to be run, and at Ctrl-C where it is kept. bars: makes
    a progress bar (progress.py). Raises ValueError for an unknown name.
    """
    options, asked, found = options or ReproduceOptions(), chosen(names), dict[str, Found]()
    options.folder.mkdir(parents=True, exist_ok=True)
    files = {name: _read(name) for name in claim_names()}
    broken = {name for name, file in files.items() if isinstance(file, str)}
    ahead = {name for name in asked if name not in broken and not _place(name, files[name], options).is_file()}
    seconds = {name: round(60 * files[name].CLAIM.minutes) for name in ahead}
    if ahead:
        say(f"{len(ahead)} of {len(asked)} claims to run, about {sum(seconds.values()) / 60:.0f} minutes of one core")
    bar = bars("claims", max(1, sum(seconds.values())), "s") if bars and ahead else None
    try:
        for name in asked:
            told = _teller(bar, name)
            found[name] = _run(name, files[name], options, told)
            if bar is not None:
                bar.update(seconds.get(name, 0))
    except KeyboardInterrupt:
        say(f"\nwhat is done is kept in {options.folder}: the same command goes on from there")
        raise
    finally:
        if bar is not None:
            bar.close()
    for name in files.keys() - found.keys() - broken:
        if (path := _place(name, files[name], options)).is_file():
            found[name] = _judged(files[name], read_json(path), options)
    result = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "options": asdict(options) | {"out": str(options.folder)},
        "seconds": sum(one["seconds"] for one in found.values()),
        "claims": {name: found[name] for name in sorted(found)},
    }
    write_json(options.folder / CLAIMS_FILE, result)
    return result


def failures(result: Mapping[str, Any]) -> list[str]:
    """The names of the claims that could not be run."""
    return [name for name, one in result["claims"].items() if "failed" in one]


def listing(width: int = 80) -> str:
    """Every claim on a line: name, source, base, minutes of one core; and the sum."""
    lines, total = [], 0.0
    for name in claim_names():
        file = _read(name)
        if isinstance(file, str):
            lines.append(f"{name:<28} {file}")
            continue
        claim, total = file.CLAIM, total + file.CLAIM.minutes
        room = max(10, width - 28 - 1 - 10 - 8)
        source = claim.source if len(claim.source) < room else claim.source[: room - 4] + "..."
        lines.append(f"{name:<28} {source:<{room}}{claim.base:<10}{claim.minutes:>4g} min")
    return "\n".join([*lines, f"{len(lines)} claims, {total:.0f} minutes of one core in all"])


# -- one claim ---------------------------------------------------------------------------------------------------------


def _read(name: str) -> Any:
    """A claim's file; one that cannot be imported is the reason, in a line."""
    try:
        return read_claim(name)
    except Exception as error:
        return _reason(error)


def _run(name: str, file: Any, options: ReproduceOptions, told: Callable[[str], object]) -> Found:
    """What is kept of this claim, or what it finds now, which is then kept."""
    if isinstance(file, str):
        return {"failed": file, "seconds": 0.0}
    path, start = _place(name, file, options), time.perf_counter()
    try:
        if path.is_file():
            return _judged(file, read_json(path), options)
        told("")
        numbers = json.loads(json.dumps(file.run(options.setting(file.CLAIM)), allow_nan=False))
        Interval.of(numbers["measured"])
    except Exception as error:
        return _words(file.CLAIM) | {"failed": _reason(error), "seconds": time.perf_counter() - start}
    record = {
        "numbers": numbers,
        "seeds": list(options.setting(file.CLAIM).seeds),
        "seconds": time.perf_counter() - start,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return _judged(file, record, options)


def _judged(file: ClaimFile, record: Found, options: ReproduceOptions) -> Found:
    """The record with the claim's words, and the verdict that its band gives today."""
    claim = file.CLAIM
    band, verdict = claim.band_of(options.small), claim.verdict(record["numbers"], options.small)
    return _words(claim) | record | {
        "band": {"quantity": band.quantity, "text": str(band)},
        "interval": asdict(Interval.of(record["numbers"]["measured"])),
        "verdict": str(verdict),
        "explained": claim.explained.get(verdict, ""),
    }  # fmt: skip


def _words(claim: Claim) -> Found:
    names = ("source", "where", "says", "here", "switch", "base", "second_hand")
    return {name: getattr(claim, name) for name in names}


def _reason(error: Exception) -> str:
    if os.environ.get("MINILORA_TRACEBACK"):
        traceback.print_exception(error)
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _place(name: str, file: ClaimFile, options: ReproduceOptions) -> Path:
    """Where the numbers of a claim are kept, under all that decides them."""
    path = Path(str(file.__file__))  # type: ignore[attr-defined]
    setting = options.setting(file.CLAIM)
    told = [name, setting.small, setting.switched, list(setting.seeds), code_sha256(path)]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    return options.folder / KEPT / f"{name}-{digest[:20]}.json"


def _teller(bar: Any, name: str) -> Callable[[str], object]:
    def told(line: str) -> None:
        if bar is not None:
            bar.set_postfix_str(f"{name} {line}".strip(), refresh=False)
            bar.update(0)  # which shows it when its time has come

    return told


HELP = "run what papers say about LoRA, claim by claim, and write a page with the verdicts"


def add(parser: argparse.ArgumentParser) -> None:
    """Names of claims, and the fields of ReproduceOptions."""
    add_flags(parser, ReproduceOptions)
    parser.add_argument("names", nargs="*", metavar="NAME", help="claims, such as planted-rank (default: all)")
    parser.add_argument("--list", action="store_true", help="name all claims, with source, base and minutes")
    parser.add_argument("--json", **AS_JSON)


def run(arguments: argparse.Namespace) -> None:
    """Run the claims that have changed, write the page, print the verdicts."""
    from .report import terminal_width
    from .reproduce_page import summary, write_page

    if arguments.list:
        print(listing(terminal_width()))
        return
    options = from_flags(ReproduceOptions, arguments)
    try:
        chosen(arguments.names)
    except ValueError as error:
        raise UsageError(error) from error
    result = reproduce(arguments.names, options, say=tell, bars=Bars())
    path = write_page(result, options.folder)
    print(json.dumps(result, indent=2) if arguments.json else f"{summary(result)}\n\nWritten to {path}")
    if failed := failures(result):
        raise RuntimeError(f"{len(failed)} of {len(result['claims'])} claims could not be run: {', '.join(failed)}")
