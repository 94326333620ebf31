"""`minilora data`: what is understood of a data file, before hours are spent on it. It needs no weights."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from ..data.formats import TEXT, check_field
from ..data.leaks import NAMED, leaks
from ..data.records import Reading, Record, read_source
from ..data.rows import SPLITS
from ..data.samples import AT_ONCE, encode_records, encode_text, truncate
from ..data.splits import by_split, describe_splits, follows_rule, is_one_text, split_text
from ..engine.fused import NOT_SCORED
from ..models.load import load_tokenizer
from ..models.tokenizer import Tokenizer
from ..nn.parts import Sample
from ..options import BASE, add_flags, from_flags, option
from ..progress import Bars
from ..train.options import FIELD, Options
from .shared import tell

WIDTH = 100
BRACKETS = ("[[", "]]")  # around what is scored
UNDERLINED = ("\x1b[1;4m", "\x1b[0m")  # the same in a terminal
FACTS = ("phrasings", "paraphrase", "validation_paraphrase", "keywords")  # what records may carry
_QUICK = 2000  # records that take no time to speak of
_LINES = 14  # of an example, at most


@dataclass(frozen=True, kw_only=True)
class LookOptions:
    """By whose tokens a data file is measured, and how it is read. Raises ValueError for values that mean nothing."""

    base: str = option(Options.base, f"whose tokens are counted: {BASE}")
    field: Mapping[str, str] | None = option(None, FIELD, metavar="NAME=COLUMN")
    max_length: int = option(Options.max_length, "tokens per record, cut beyond")

    def __post_init__(self):
        check_field(self.field or {})
        if self.max_length < 8:
            raise ValueError(f"max_length must be at least 8, got {self.max_length}")


# -- looking -----------------------------------------------------------------------------------------------------------


def look(
    source: str | Path,
    options: LookOptions | None = None,
    say: Callable[[str], None] = lambda line: None,
    bars: Bars | None = None,
) -> dict[str, Any]:
    """What is understood of a data file, as facts that JSON can hold: what `minilora data --json` prints.

    say: hears of a tokenizer that has to be downloaded. bars: where progress is shown. Raises DataError for a file that
    cannot be used, ModelFileError for a base without tokenizer.
    """
    options = options or LookOptions()
    tokenizer = load_tokenizer(options.base)
    reading = read_source(source, tokenizer, options.field)
    splits = by_split(reading.records)
    bars = bars or Bars(quiet=len(reading.records) < _QUICK)
    lengths = _lengths(reading, splits, tokenizer, options.max_length, bars)
    return {
        "source": str(source),
        "base": options.base,
        "field": dict(options.field or {}),
        "max_length": options.max_length,
        "files": {str(path): kind for path, kind in reading.files.items()},
        "formats": dict(reading.formats),
        "not_read": dict(reading.unread),
        "held_out": _held_out(reading, lengths),
        "records_with": _carried(reading.records),
        "lengths": lengths,
        "twice": [{"held_out": t.record.id, "trained": t.trained.id, "same": t.same} for t in leaks(splits)],
        "examples": [
            _example(name, record, tokenizer, options.max_length, is_one_text(reading.records))
            for name, record in (_chosen(splits) if lengths else ())
        ],
    }


def _held_out(reading: Reading, lengths: Mapping[str, Mapping[str, int]]) -> str:
    """What decides which records are for validation and for the test."""
    if not follows_rule(reading.records):
        return "as the files say" if len(reading.files) > 1 else "as the records say"
    sizes = {name: lengths.get(name, {}).get("samples", 0) for name in SPLITS}
    return describe_splits(sizes, text=is_one_text(reading.records))


def _carried(records: Sequence[Record]) -> dict[str, int]:
    counts = {name: sum(bool(getattr(record, name)) for record in records) for name in FACTS}
    return {name: count for name, count in counts.items() if count}


def _lengths(
    reading: Reading, splits: Mapping[str, Sequence[Record]], tokenizer: Tokenizer, max_length: int, bars: Bars
) -> dict[str, dict[str, int]]:
    """Tokens of each split as training would have them: texts divided, conversations not yet cut."""
    counted = {name: _Lengths(max_length) for name in SPLITS}
    if is_one_text(reading.records):
        for name, samples in split_text(reading.records[0].text, tokenizer, max_length).items():
            counted[name].add(samples)
    else:
        with bars("tokens", len(reading.records), "record") as bar:
            for name, records in splits.items():
                for i in range(0, len(records), AT_ONCE):
                    some = records[i : i + AT_ONCE]
                    counted[name].add(encode_records(some, tokenizer, max_length=max_length))
                    bar.update(len(some))
    return {name: lengths.facts() for name, lengths in counted.items() if lengths.tokens}


class _Lengths:
    """Counts of a split's samples, of which none is kept."""

    def __init__(self, max_length: int):
        self.max_length = max_length
        self.tokens: list[int] = []
        self.scored = self.cut = self.lost = 0

    def add(self, samples: Sequence[Sample]) -> None:
        _, longer, lost = truncate(samples, self.max_length)
        self.tokens += [len(sample.ids) for sample in samples]
        self.scored += sum(sample.scored for sample in samples)
        self.cut += longer
        self.lost += lost

    def facts(self) -> dict[str, int]:
        marks = np.quantile(self.tokens, (0, 0.5, 0.9, 1), method="inverted_cdf")
        return {
            "samples": len(self.tokens),
            **dict(zip(("shortest", "median", "p90", "longest"), map(int, marks), strict=True)),
            "tokens": sum(self.tokens),
            "scored": self.scored,
            "cut": self.cut,
            "lost": self.lost,
        }


def _chosen(splits: Mapping[str, Sequence[Record]]) -> list[tuple[str, Record]]:
    """Three records to look at: the first and the middle one of those to train on, the first that is held out."""
    train = [("train", record) for record in splits["train"]]
    held = [(name, record) for name in ("test", "validation") for record in splits[name]]
    chosen = [*train[:1], *train[len(train) // 2 :][: len(train) > 1], *held, *train[1:]]
    return list({record.id: (name, record) for name, record in chosen[:4]}.values())[:3]


def _example(split: str, record: Record, tokenizer: Tokenizer, max_length: int, alone: bool) -> dict[str, Any]:
    """A record as the model would see it: runs of text, each with whether it is scored. Of a text, its beginning.

    alone: it is the one text of its file, which no token ends.
    """
    begun = replace(record, text=record.text[: 20 * max_length])  # more than fits: no need to encode a book
    if alone:
        sample = encode_text(begun.text, tokenizer, max_length)[0]
    else:
        sample = encode_records([begun], tokenizer, max_length=max_length)[0]
    pairs = list(zip(sample.ids, sample.labels, strict=True))[:max_length]
    runs = [
        {"text": tokenizer.core.decode([i for i, _ in run], skip_special_tokens=False), "scored": scored}
        for scored, run in groupby(pairs, lambda pair: pair[1] != NOT_SCORED)
    ]
    return {
        "id": record.id,
        "split": split,
        "tokens": len(sample.ids),
        "cut": len(sample.ids) - len(pairs),
        "runs": runs,
    }


# -- the page ----------------------------------------------------------------------------------------------------------


def page(seen: Mapping[str, Any], width: int = WIDTH, marks: tuple[str, str] = BRACKETS) -> str:
    """What `look` saw as text of at most `width` columns, but no less than 70.

    marks: put around what is scored, BRACKETS or UNDERLINED.
    """
    width = max(70, min(width, WIDTH))
    understood = [line for name, text in _understood(seen) for line in _entry(name, text, width)]
    counts = [*_table(seen), *textwrap.wrap(_cuts(seen), width, break_on_hyphens=False)]
    unseen = sum(map(len, marks)) if marks == UNDERLINED else 0  # of the last title: they take no column
    return "\n".join(
        [
            *(_rule(seen["source"], width), *understood, ""),
            *(_rule(f"tokens, as {seen['base']} counts them", width), *counts, ""),
            _rule(f"as the model sees them, {marks[0]}scored{marks[1]}", width + unseen),
            *_examples(seen, width, marks),
            *(
                ("train on it with", f"  {_next(seen)}")
                if "train" in seen["lengths"]
                else ("none is to be trained on",)
            ),
        ]
    )


def _rule(title: str, width: int) -> str:
    return f"-- {title} ".ljust(width, "-")


def _understood(seen: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    kinds = ", ".join(dict.fromkeys(seen["files"].values()))
    yield "format", f"{_counted(seen['formats'])} ({kinds})"
    if len(seen["files"]) > 1:
        yield "files", ", ".join(Path(name).name for name in seen["files"])
    if seen["field"]:
        yield "field", ", ".join(f"{name} is the column {column}" for name, column in seen["field"].items())
    yield "held out", seen["held_out"]
    if seen["records_with"]:
        yield "also there", _counted(seen["records_with"])
    if seen["not_read"]:
        yield "not read", _counted(seen["not_read"])
    again = seen["twice"]
    if again or len(seen["lengths"]) > 1:
        yield "in 2 splits", "nothing" if not again else f"{len(again):,} held out and trained on as well:"
    for found in again[:NAMED]:
        yield "", f"{found['held_out']} has the {found['same']} of {found['trained']}"
    if len(again) > NAMED:
        yield "", f"and {len(again) - NAMED:,} more"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} in {count:,} record{'s' * (count > 1)}" for name, count in counts.items())


def _entry(name: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(f"{name:<13}{text}", width, subsequent_indent=" " * 13, break_on_hyphens=False)


def _table(seen: Mapping[str, Any]) -> Iterator[str]:
    what = "samples" if TEXT.name in seen["formats"] else "records"
    yield f"{'':<11}{what:>9}{'median':>8}{'90 %':>7}{'longest':>9}{'in all':>12}{'scored':>8}"
    for name, n in seen["lengths"].items():
        shares = f"{n['tokens']:>12,}{100 * n['scored'] / n['tokens']:>6.0f} %"
        yield f"{name:<11}{n['samples']:>9,}{n['median']:>8,}{n['p90']:>7,}{n['longest']:>9,}{shares}"


def _cuts(seen: Mapping[str, Any]) -> str:
    limit = f"--max-length {seen['max_length']}"
    cut, lost = ({name: n[key] for name, n in seen["lengths"].items() if n[key]} for key in ("cut", "lost"))
    if not cut:
        divided = "; texts are divided there" if TEXT.name in seen["formats"] else ""
        return f"none is longer than {limit}: nothing is cut{divided}"
    told = f"longer than {limit}, and cut: {', '.join(f'{n:,} of {name}' for name, n in cut.items())}"
    if lost:
        told += (
            f"; without any of the answer, and left out: {', '.join(f'{n:,} of {name}' for name, n in lost.items())}"
        )
    return told


def _examples(seen: Mapping[str, Any], width: int, marks: tuple[str, str]) -> Iterator[str]:
    for example in seen["examples"]:
        yield f"{example['id']} ({example['split']}, {example['tokens']:,} tokens)"
        lines = list(_broken(example["runs"], width - 2 - sum(map(len, BRACKETS))))
        while not lines[-1]:
            lines.pop()
        if len(lines) > _LINES:
            gone = len(lines) - _LINES + 1
            lines[_LINES // 2 : _LINES // 2 + gone] = [[(f"... {gone} lines ...", False)]]
        if example["cut"]:
            lines.append([(f"... cut here, {example['cut']:,} before its end", False)])
        for line in lines:
            yield ("  " + "".join(f"{marks[0]}{text}{marks[1]}" if scored else text for text, scored in line)).rstrip()
        yield ""


def _next(seen: Mapping[str, Any]) -> str:
    """What to type next."""
    field = "".join(f" {quote(f'{name}={column}')}" for name, column in seen["field"].items())
    base = "" if seen["base"] == Options.base else f" --base {quote(seen['base'])}"
    length = "" if seen["max_length"] == Options.max_length else f" --max-length {seen['max_length']}"
    return f"minilora finetune --data {quote(seen['source'])}{' --field' * bool(field)}{field}{base}{length}"


def _broken(runs: Sequence[Mapping[str, Any]], width: int) -> Iterator[list[tuple[str, bool]]]:
    """Runs of text as lines of at most `width` characters, each a list of pieces that are scored or not."""
    text = "".join(_visible(run["text"]) for run in runs)
    scored = [run["scored"] for run in runs for _ in _visible(run["text"])]
    wrapper = textwrap.TextWrapper(
        width, expand_tabs=False, replace_whitespace=False, drop_whitespace=False, break_on_hyphens=False
    )
    at = 0
    for paragraph in text.split("\n"):
        for i, line in enumerate(wrapper.wrap(paragraph) or [""]):
            pairs = list(zip(line, scored[at:], strict=False))
            at += len(line)
            start = len(line) - len(line.lstrip()) if i else 0  # the space at which the line was broken
            pairs = pairs[start : len(line.rstrip())]
            yield [("".join(c for c, _ in piece), truth) for truth, piece in groupby(pairs, lambda pair: pair[1])]
        at += 1  # the line's end


def _visible(text: str) -> str:
    """A text in which control characters, which would change the terminal, are written out."""
    return "".join(
        c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf") else c.encode("unicode_escape").decode()
        for c in text
    )


HELP = "show what is understood of a data file: format, lengths, what is cut, what is scored"


def add(parser: argparse.ArgumentParser) -> None:
    """A data file, and the fields of LookOptions."""
    add_flags(parser, LookOptions)
    parser.add_argument("source", metavar="FILE", help="a data file, a folder of train, valid and test, or legal")
    parser.add_argument("--json", action="store_true", help="the facts as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Print what is understood; in a terminal what is scored is underlined."""
    seen = look(arguments.source, from_flags(LookOptions, arguments), say=tell)
    if arguments.json:
        print(json.dumps(seen, indent=2, ensure_ascii=False))
        return
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    print(page(seen, shutil.get_terminal_size((WIDTH, 24)).columns, BRACKETS if plain else UNDERLINED))
