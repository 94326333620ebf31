"""`minilora reproduce`: run the claims, keep their results, and write the page with the verdicts.

A result is kept under the claim's name, its settings and the code that decides it: a claim of which nothing has changed
is read, not run. Sentences and bands are not part of that: the verdict always follows the band as the file has it now.
The form of a claim on SmolLM2 is run and kept like a claim, and told next to the first form.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from ..experiments.claim import Claim, ClaimFile, Setting, Verdict, claim_names, read_claim, write_new
from ..experiments.memo import as_json, code_sha256, keep, path_of, recall
from ..experiments.trials import reason
from ..files.disk import write_bytes, write_json
from ..measure.environment import circumstances, here_and_now
from ..measure.statistics import Interval
from ..options import add_flags, check, from_flags, option, usage_errors
from ..pages.claims import counts, merged
from ..pages.template import TEMPLATES, template
from ..pages.text import counted, duration, shortened, terminal_width
from ..progress import log, progress
from ..train.run_folder import unwritable
from .shared import AS_JSON, Outcome

HELP = "test claims of papers about LoRA in experiments, and write a page with the verdicts"

CLAIMS_FILE, PAGE_FILE, PICTURES, KEPT = "claims.json", "README.md", "pictures", "cache"
MOST = 16  # numbers of a list, or of a group, that the page prints; claims.json holds all
NAME = 28  # columns of a claim's name

Found = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """How claims are run. Raises ValueError for values that mean nothing."""

    seeds: Sequence[int] | None = option(None, "seeds of every claim (default: the claim's own)", metavar="N")
    jobs: int | None = option(None, "runs at a time (default: as many as there are cores)", metavar="N", least=1)
    out: str | None = option(
        None, "folder of the page, its pictures, claims.json and results to reuse (default: runs/claims)"
    )
    small: bool = option(False, "each claim in its smallest form, in seconds, to try it; not on SmolLM2")
    switched: bool = option(
        False, "each claim with its cause and without it: does the verdict turn? Not for the forms on SmolLM2"
    )

    def __post_init__(self):
        if self.seeds is not None and (not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds)):
            given = " ".join(map(str, self.seeds)) or "none"
            raise ValueError(f"seeds must be different numbers from 0 on, got {given}")
        check(self)

    @property
    def folder(self) -> Path:
        """The folder of all results: `out`, or runs/claims with the form of the claims behind it."""
        return Path(self.out or f"runs/claims{'-small' * self.small}{'-switched' * self.switched}")

    def setting(self, claim: Claim) -> Setting:
        """How one claim is run."""
        seeds = tuple(claim.seeds if self.seeds is None else self.seeds)
        return Setting(self.small, self.switched, seeds, self.jobs, self.folder / KEPT, claim.base)

    def forms(self, claim: Claim) -> list[Claim]:
        """What is run of a claim. The form on SmolLM2 is run whole, with the effect as it is, or not at all."""
        return [claim] if self.small or self.switched else claim.forms

    @property
    def on(self) -> ReproduceOptions:
        """The same with every effect as it is."""
        return replace(self, switched=False)


def add(parser: argparse.ArgumentParser) -> None:
    """Names of claims, and the fields of ReproduceOptions."""
    add_flags(parser, ReproduceOptions)
    parser.add_argument("names", nargs="*", metavar="NAME", help="claims, such as planted-rank (default: all)")
    parser.add_argument("--list", action="store_true", help="list the claims, with source, base and minutes")
    parser.add_argument("--new", metavar="NAME", help="write the file of a new claim, with blanks to fill in")
    parser.add_argument(
        "--into",
        metavar="FOLDER",
        help="also update the page in this folder, such as minilora/claims, with what was run",
    )
    parser.add_argument("--json", **AS_JSON)


def run(arguments: argparse.Namespace) -> Outcome | None:
    """Run the claims that have changed, write the page, print the verdicts."""
    if arguments.new:
        with usage_errors():
            path = write_new(arguments.new)
        print(f"Written to {path}\nFill in each TODO, then: minilora reproduce {arguments.new} --small")
        return None
    options = from_flags(ReproduceOptions, arguments)
    with usage_errors():
        asked = chosen(arguments.names)
        if arguments.list and arguments.json:
            raise ValueError("--list prints text: leave out --json")
        if arguments.into and not (Path(arguments.into) / PAGE_FILE).is_file():
            raise ValueError(f"{arguments.into} has no {PAGE_FILE}: give the folder of a page, such as minilora/claims")
        if arguments.into and (options.small or options.switched):
            raise ValueError("--into takes claims in their whole form, without --small and --switched")
    if arguments.list:
        print(listing(asked, terminal_width()))
        return None
    result = reproduce(arguments.names, options)
    pages = [write_page(result, options.folder)]
    if arguments.into:
        claims = {name: found for name, found in result["claims"].items() if name in asked}
        pages.append(write_page(result | {"claims": claims}, Path(arguments.into), replace_page=False))
    written = " and ".join(map(str, pages))
    failed = failures(result)
    count = f"{len(failed)} of {counted(len(result['claims']), 'claim')}"
    why = f"{count} could not be run: {', '.join(failed)}" if failed else ""
    return Outcome(result, lambda found: f"{summary(found)}\n\nWritten to {written}", failed=why)


def chosen(names: Sequence[str]) -> list[str]:
    """The claims of these names, or all. Raises ValueError for a name that no claim has, with the nearest one."""
    known = claim_names()
    asked = [name.replace("_", "-").removesuffix(".py") for name in names]
    for name, word in zip(asked, names, strict=True):
        if name not in known:
            near = [one for one in known if name in one] or get_close_matches(name, known, 1, cutoff=0.5)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"no claim is called {word!r}{meant} (minilora reproduce --list names them)")
    return list(dict.fromkeys(asked)) or known


def listing(names: Sequence[str], width: int = 80) -> str:
    """Each claim on a line: name, source, base, minutes of one core; below it, how many they may be where the runs that
    it shares with another claim are not kept; and the sum.
    """
    lines, minutes, room = [], 0.0, max(10, width - NAME - 19)
    for name in names:
        if isinstance(file := _read(name), str):
            lines.append(f"{name:<{NAME}} {file}")
            continue
        sources = [file.CLAIM.source, "the same on SmolLM2"]
        for claim, source, shown in zip(file.CLAIM.forms, sources, (name, ""), strict=False):
            minutes += claim.minutes
            source = shortened(source, room - 1)
            lines.append(f"{shown:<{NAME}} {source:<{room}}{claim.base:<10}{claim.minutes:>4g} min")
            if other := _shared(claim):
                most = claim.minutes + other.minutes
                lines.append(f"{'':<{NAME}} up to {most:.0f} min without the runs of {claim.shares_with}")
    return "\n".join([*lines, f"{counted(len(names), 'claim')}, {minutes:.0f} minutes of one core in all"])


# -- the runs ----------------------------------------------------------------------------------------------------------


def reproduce(names: Sequence[str] = (), options: ReproduceOptions | None = None) -> dict[str, Any]:
    """Run the claims of these names, or all, and return what was found: {"claims": {name: ...}, "machine": ..., ...}.

    A claim that raises has {"failed": why} instead of numbers, and the others go on. Each result is kept as soon as it
    is there; after Ctrl-C the same command continues. Kept claims that are not named are returned as well. The result
    is also written to claims.json. Raises ValueError for an unknown name.
    """
    options, asked, found = options or ReproduceOptions(), chosen(names), dict[str, Found]()
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(options.folder, error) from error
    files = {name: _read(name) for name in claim_names()}
    ahead = {name: _ahead(name, files[name], options) for name in asked if not isinstance(files[name], str)}
    ahead = {name: forms for name, forms in ahead.items() if forms}
    seconds = {name: 60 * sum(claim.minutes for claim in forms) for name, forms in ahead.items()}
    sizes = {name: 1 if options.small else round(each) for name, each in seconds.items()}
    if ahead:
        how = "in the smallest form" if options.small else f"about {duration(sum(seconds.values()))} of one core"
        log.info("%s to run, %s%s", counted(len(ahead), "claim"), how, _and_shared(ahead, files, options))
    try:
        with progress("claims", sum(sizes.values()), "claim" if options.small else "s") as bar:
            for name in asked:
                bar.update(0, text=name)
                found[name] = _found(name, files[name], options)
                bar.update(sizes.get(name, 0))
    except KeyboardInterrupt:
        log.info("\nwhat is done is kept in %s: the same command continues from there", options.folder)
        raise
    for name in files.keys() - found.keys():
        if not isinstance(files[name], str) and not _ahead(name, files[name], options):
            found[name] = _found(name, files[name], options)
    result = {
        **here_and_now(),
        "options": asdict(options) | {"out": str(options.folder)},
        "seconds": sum(form["seconds"] for one in found.values() for form in _forms(one)),
        "claims": {name: found[name] for name in sorted(found)},
    }
    write_json(options.folder / CLAIMS_FILE, result)
    return result


def failures(result: Mapping[str, Any]) -> list[str]:
    """The names of the claims that could not be run."""
    return [name for name, one in result["claims"].items() if any("failed" in form for form in _forms(one))]


def _forms(found: Found) -> list[Found]:
    """What was found of a claim, and of its form on SmolLM2."""
    return [found, found["on_smollm2"]] if "on_smollm2" in found else [found]


def _read(name: str) -> Any:
    """A claim's file; for one that cannot be imported the reason, in a line."""
    try:
        return read_claim(name)
    except Exception as error:
        return reason(error)


def _found(name: str, file: Any, options: ReproduceOptions) -> Found:
    """What was found of a claim; of its form on SmolLM2, where that is run, the same as "on_smollm2"."""
    if isinstance(file, str):
        return {"failed": file, "seconds": 0.0}
    found, *second = [_judged(name, file, claim, options) for claim in options.forms(file.CLAIM)]
    return found | ({"on_smollm2": second[0]} if second else {})


def _judged(name: str, file: Any, claim: Claim, options: ReproduceOptions) -> Found:
    """A form's words and result, and the verdict that its band gives; switched off, whether it turned as well."""
    words = ("source", "where", "says", "here", "switch", "base", "second_hand")
    found, start = {word: getattr(claim, word) for word in words}, time.perf_counter()
    try:
        found |= (record := _record(name, file, claim, options))
        band, interval = claim.band_of(options.small), Interval.of(record["numbers"]["measured"])
        verdict = band.verdict(interval)
        found |= {"power": "" if options.small else _power(claim, len(record["seeds"]))}
        found |= {"band": {"quantity": band.quantity, "text": str(band)}, "interval": asdict(interval)}
        found |= {"verdict": str(verdict), "explained": "" if options.switched else claim.explained.get(verdict, "")}
        if options.switched:
            on = claim.verdict(_record(name, file, claim, options.on)["numbers"], options.small)
            found |= {"on": str(on), "turned": on != verdict}
    except Exception as error:
        return found | {"failed": reason(error), "seconds": time.perf_counter() - start}
    return found


def _power(claim: Claim, seeds: int) -> str:
    """The power of the whole form's band with this number of seeds, in a sentence. Nothing for a claim without an
    effect, and for one seed of a claim that has several: one number has no interval.
    """
    if claim.effect is None or seeds == 1 < len(claim.seeds):
        return ""
    return claim.effect.told(claim.band, seeds)


def _record(name: str, file: Any, claim: Claim, options: ReproduceOptions) -> Found:
    """What is kept of this form, or what it finds now, which is then kept: numbers, seeds, seconds, machine."""
    if (record := _kept(name, file, claim, options)) is None:
        start, setting = time.perf_counter(), options.setting(claim)
        numbers = as_json(file.run(setting))
        Interval.of(numbers["measured"])
        record = keep(
            *_place(name, file, claim, options),
            numbers,
            seeds=setting.seeds,
            seconds=time.perf_counter() - start,
            **here_and_now(),
        )
    return {"numbers": record["result"]} | {k: v for k, v in record.items() if k not in ("decides", "result")}


def _ahead(name: str, file: ClaimFile, options: ReproduceOptions) -> list[Claim]:
    """Those forms of a claim that are not kept, once for each way in which they are run."""
    ways = [options, options.on] if options.switched else [options]
    forms = [(claim, way) for claim in options.forms(file.CLAIM) for way in ways]
    return [claim for claim, way in forms if _kept(name, file, claim, way) is None]


def _and_shared(ahead: Mapping[str, Sequence[Claim]], files: Mapping[str, Any], options: ReproduceOptions) -> str:
    """What the claims ahead may take besides, in words: the runs that they share with claims which are neither kept nor
    ahead. Nothing where there are none, and for the smallest forms, which take seconds.
    """
    lacking: dict[tuple[str, str], float] = {}
    for claim in [form for forms in ahead.values() for form in forms if not options.small]:
        name, form = claim.shares_with, _shared(claim)
        if form and name not in ahead and _kept(name, files[name], form, options) is None:
            lacking[name, claim.base] = 60 * form.minutes
    names = " and ".join(dict.fromkeys(name for name, _ in lacking))
    return f", and up to {duration(sum(lacking.values()))} for the runs of {names}, which are not kept" if names else ""


def _shared(claim: Claim) -> Claim | None:
    """The form of another claim whose runs this one uses as well; None where there is none that can be read."""
    file = _read(claim.shares_with) if claim.shares_with else ""
    return None if isinstance(file, str) else file.CLAIM.form_on(claim.base)


def _kept(name: str, file: ClaimFile, claim: Claim, options: ReproduceOptions) -> Found | None:
    return recall(*_place(name, file, claim, options))


def _place(name: str, file: ClaimFile, claim: Claim, options: ReproduceOptions) -> tuple[Path, dict[str, Any]]:
    """Where the numbers of a form are kept, and all that decides them."""
    code = code_sha256(Path(str(file.__file__)))  # type: ignore[attr-defined]
    setting = options.setting(claim)
    decides = {"small": setting.small, "switched": setting.switched, "seeds": list(setting.seeds), "code": code}
    decides |= {"base": setting.base}
    return path_of(options.folder / KEPT, name, decides), decides


# -- the page ----------------------------------------------------------------------------------------------------------


def write_page(result: Mapping[str, Any], folder: Path, replace_page: bool = True) -> Path:
    """Draw the picture of every claim, for light and dark pages, and write the page. Returns the page's path.

    replace_page: False keeps the claims that the page in this folder has besides.

    For a picture that cannot be drawn, the page has a line with the reason.
    """
    from ..pages.style import save_themes

    pictures = folder / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, one in result["claims"].items():
        for stem, found in zip((name, f"{name}-smollm2"), _forms(one), strict=False):
            if "failed" in found:
                continue
            try:
                draw = partial(read_claim(name).picture, found["numbers"])
                drawn[stem] = save_themes(draw, pictures / f"{stem}.png")[0].stem
            except Exception as error:
                found["no_picture"] = f"{type(error).__name__}: {error}"
    path = folder / PAGE_FILE
    text = page(result, drawn)
    write_bytes(path, (text if replace_page else merged(path.read_text("utf-8"), text, Verdict)).encode())
    return path


def summary(result: Mapping[str, Any]) -> str:
    """The verdicts for a terminal, one form of a claim on a line."""
    lines = []
    for name, one in result["claims"].items():
        for shown, found in zip((name, "  on SmolLM2"), _forms(one), strict=False):
            if "failed" in found:
                lines.append(f"{shown:<{NAME}} failed: {found['failed']}")
            else:
                turned = f"  {_turned(found)}" if "turned" in found else ""
                lines.append(f"{shown:<{NAME}} {found['verdict']:<17} {_interval(found)}{turned}")
    return "\n".join(lines)


def page(result: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    """The page as Markdown. drawn: the stem of each claim's picture."""
    claims = list(result["claims"].values())
    rows = [f" {_verdict(found, '**')} | {_on_smollm2(found)}" for found in claims]
    forms = [form for found in claims for form in _forms(found)]
    return template(TEMPLATES / "claims.md.jinja").render(
        result,
        circumstances=circumstances(dict(result)),
        days=sorted({found["created"][:10] for found in forms if "created" in found}),
        drawn=drawn,
        interval=_interval,
        numbers=_numbers,
        on_smollm2=_on_smollm2,
        pictures=PICTURES,
        table=_table,
        turned=sum(found.get("turned", False) for found in claims),
        turning=_turned,
        verdict=_verdict,
        verdicts=counts(rows, Verdict),
    )


def _verdict(found: Mapping[str, Any], mark: str) -> str:
    """The verdict between marks of Markdown, by which `counts` tells the two forms apart; or why there is none."""
    if "failed" in found:
        return f"{'failed' if mark == '**' else '*failed*'}: {found['failed']}"
    return f"{mark}{found['verdict']}{mark}"


def _on_smollm2(found: Mapping[str, Any]) -> str:
    """What the table says of a claim's form on SmolLM2; nothing where it has none, or where it is left out."""
    if (form := found.get("on_smollm2")) is None:
        return ""
    return f"{'' if 'failed' in form else _interval(form)} {_verdict(form, '*')}".lstrip()


def _turned(found: Mapping[str, Any]) -> str:
    """Whether the verdict turned when the effect was switched off."""
    if found["turned"]:
        return f"(turned, as it must: {found['on']} with the effect on)"
    return "(did not turn, though it must: this experiment does not show the effect)"


def _table(found: Found) -> Iterator[str]:
    """Numbers, and short lists of them, a row each, under the table's head; both forms of a claim side by side."""
    forms = [form for form in _forms(found) if "numbers" in form]
    columns = [dict(_rows(form["numbers"])) for form in forms]
    heads = [form["base"] for form in forms] if "on_smollm2" in found else ["value"]
    if names := dict.fromkeys(name for column in columns for name in column):
        yield f"| number | {' | '.join(heads)} |\n|{'---|' * (1 + len(heads))}"
    for name in names:
        yield f"| {name} | {' | '.join(column.get(name, '') for column in columns)} |"


def _rows(numbers: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Names and values; what is nested, one level deep. Of many in a group, such as one for every layer, nothing."""
    for key, value in numbers.items():
        name = f"{before}{key}".replace("_", " ")
        if isinstance(value, dict):
            if not before and len(value) <= MOST:
                yield from _rows(value, f"{key}: ")
        elif key != "measured" and (text := _numbers(value)):
            yield name, text


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
