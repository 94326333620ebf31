"""`minilora data`: what minilora makes of a data file, before hours are spent on training. It needs no weights."""

import argparse
import json
import os
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ..data.fields import FieldTask, Task
from ..data.formats import TEXT, check_field, listed, with_label
from ..data.labels import LISTED, LabelTask
from ..data.leaks import NAMED, leaks, repeated
from ..data.records import Reading, Record, read_source
from ..data.rows import SPLITS
from ..data.samples import encode_records, encode_text, truncate
from ..data.splits import by_split, check_labels, describe_splits, follows_rule, is_one_text, split_text
from ..engine.fused import NOT_SCORED
from ..generate.streams import UNFINISHED
from ..measure.loss import evenly
from ..models.load import find, known_as, load_tokenizer
from ..models.tokenizer import Tokenizer
from ..models.with_adapters import DEFAULT_BASE
from ..nn.parts import Sample
from ..options import BASE, add_flags, check, from_flags, option
from ..pages.text import WIDTH, Wrapper, columns, counted, rule, shortened, terminal_width, wrapped
from ..terminal import printable, quote
from ..train.options import FIELD, LABEL, MAX_LENGTH, SCHEMA, Options

BRACKETS = ("[[", "]]")  # around what is scored
UNDERLINED = ("\x1b[1;4;32m", "\x1b[0m")  # the same in a terminal, bold and green
# Optional entries of records.
FACTS = ("phrasings", "reworded", "paraphrase", "validation_paraphrase", "keywords", "context")
COUNTED = 5_000  # records of a split whose tokens are counted; of more, a sample
_LINES = 14  # lines of an example, at most


@dataclass(frozen=True, kw_only=True)
class LookOptions:
    """How a data file is read, and whose tokens are counted. Raises ValueError for impossible values."""

    base: str = option(DEFAULT_BASE, f"the model whose tokens are counted: {BASE}", path=True)
    field: Mapping[str, str] | None = option(None, FIELD, metavar="NAME=COLUMN")
    label: str | None = option(None, LABEL, metavar="COLUMN")
    schema: str | None = option(None, f"{SCHEMA})", metavar="FILE")
    max_length: int = option(Options.max_length, MAX_LENGTH, least=8)

    def __post_init__(self):
        check_field(self.field or {})
        check(self)


# -- facts -------------------------------------------------------------------------------------------------------------


def look(source: str | Path, options: LookOptions | None = None) -> dict[str, Any]:
    """The facts about a data file that `minilora data --json` prints.

    Nothing is downloaded: without the base's tokenizer, tiny's counts the tokens. Raises DataError for a file that
    cannot be used, ModelFileError for a base without tokenizer.
    """
    options = options or LookOptions()
    short = known_as(options.base)
    tokens_of = options.base if short is None or find(short) is not None else "tiny"
    tokenizer = load_tokenizer(tokens_of)
    field = with_label(options.field, options.label)
    reading = read_source(source, tokenizer, field, schema=options.schema, warn=False)
    records, alone = reading.records, is_one_text(reading.records)
    splits = by_split(records)
    lengths = _lengths(records, splits, tokenizer, options.max_length)
    return {
        "source": str(source),
        "base": options.base,
        "tokens_of": tokens_of,
        "field": field,
        "schema": options.schema,
        "max_length": options.max_length,
        "loss": "dpo" if all(record.rejected is not None for record in records) else "sft",
        "files": {str(path): kind for path, kind in reading.files.items()},
        "formats": dict(reading.formats),
        "not_read": dict(reading.unread),
        "splits": _splits(reading, lengths),
        "records_with": {name: n for name in FACTS if (n := sum(bool(getattr(record, name)) for record in records))},
        "left_out": dict(reading.left_out),
        "warnings": [
            *reading.warnings(),
            *check_labels(splits, source),
        ],
        **_of_task(reading.task, splits),
        "lengths": lengths,
        "leaks": [{"record": x.record.id, "trained": x.trained.id, "same": x.same} for x in leaks(splits)],
        "repeated": [{"record": again.id, "first": first.id} for again, first in repeated(splits["train"])],
        "examples": [
            _example(name, record, tokenizer, options.max_length, alone)
            for name, record in (_chosen(splits) if lengths else ())
        ],
    }


def _splits(reading: Reading, lengths: Mapping[str, Mapping[str, int]]) -> str:
    """What decides which records are for validation and for the test."""
    if not follows_rule(reading.records):
        return "as the files say" if len(reading.files) > 1 else "as the records say"
    sizes = {name: lengths.get(name, {}).get("records", 0) for name in SPLITS}
    return describe_splits(sizes, text=is_one_text(reading.records))


def _of_task(task: Task | None, splits: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, dict[str, int]]]:
    """How many records of each split have each label, and how many have each field filled."""
    labels = task.labels if isinstance(task, LabelTask) else ()
    fields = [field.name for field in task.fields] if isinstance(task, FieldTask) else []

    def filled(record: Record, name: str) -> bool:
        return (record.fields or {}).get(name) not in (None, [])

    return {
        "labels": {one: {k: sum(r.label == one for r in part) for k, part in splits.items()} for one in labels},
        "fields": {one: {k: sum(filled(r, one) for r in part) for k, part in splits.items()} for one in fields},
    }


def _lengths(
    records: Sequence[Record], splits: Mapping[str, Sequence[Record]], tokenizer: Tokenizer, max_length: int
) -> dict[str, dict[str, int]]:
    """Tokens of each split as in training, before conversations are truncated; of a large split, of a sample."""
    if is_one_text(records):
        parts = split_text(records[0].text, tokenizer, max_length)
        return {name: _counts(samples, len(samples), 1, max_length) for name, samples in parts.items() if samples}
    chosen = {name: evenly(part, COUNTED) for name, part in splits.items()}
    found = {}
    for name, some in chosen.items():
        if samples := encode_records(some, tokenizer, max_length=max_length):
            found[name] = _counts(samples, len(splits[name]), len(splits[name]) / len(some), max_length)
    return found


def _counts(samples: Sequence[Sample], records: int, factor: float, max_length: int) -> dict[str, int]:
    """The counts of a split. factor: the records of the split for each one that is counted."""
    tokens = [len(sample.ids) for sample in samples]
    _, longer, dropped = truncate(samples, max_length)
    marks = np.quantile(tokens, (0, 0.5, 0.9, 1), method="inverted_cdf")
    sums = {
        "samples": len(samples),
        "tokens": sum(tokens),
        "scored": sum(sample.scored for sample in samples),
        "truncated": longer,
        "dropped": dropped,
    }
    return {
        "records": records,
        "counted": round(records / factor),
        **dict(zip(("shortest", "median", "p90", "longest"), map(int, marks), strict=True)),
        **{name: round(factor * number) for name, number in sums.items()},
    }


def _chosen(splits: Mapping[str, Sequence[Record]]) -> list[tuple[str, Record]]:
    """Three records to show: the first and the middle one of the training set, the first of the test set."""
    train = [("train", record) for record in splits["train"]]
    held = [(name, record) for name in ("test", "validation") for record in splits[name]]
    chosen = [*train[:1], *train[len(train) // 2 :][: len(train) > 1], *held, *train[1:]]
    return list({record.id: (name, record) for name, record in chosen[:4]}.values())[:3]


def _example(split: str, record: Record, tokenizer: Tokenizer, max_length: int, alone: bool) -> dict[str, Any]:
    """A record as the model sees it: runs of text, each with whether it is scored. Of a text, the beginning.

    alone: the record is the only text of its file, and no end token is appended.
    """
    begun = replace(record, text=record.text[: 20 * max_length])  # more than fits: a book need not be encoded
    if alone:
        sample = encode_text(begun.text, tokenizer, max_length)[0]
    else:
        sample = encode_records([begun], tokenizer, max_length=max_length)[0]
    pairs = list(zip(sample.ids, sample.labels, strict=True))[:max_length]
    ids, scored = [i for i, _ in pairs], [label != NOT_SCORED for _, label in pairs]
    ends = [n for n in range(1, len(ids) + 1) if scored[n - 1 : n] != scored[n : n + 1]]
    texts = [tokenizer.core.decode(ids[:n], skip_special_tokens=False).rstrip(UNFINISHED) for n in ends]
    runs = [
        {"text": text[len(before) :], "scored": scored[n - 1]}  # half a character belongs to the run of its end
        for before, text, n in zip(["", *texts], texts, ends, strict=False)
    ]
    tokens = len(sample.ids)
    about = {"id": record.id, "split": split, "tokens": tokens, "truncated": tokens - len(pairs)}
    return about | {"runs": runs, "rejected": record.rejected}


# -- the page ----------------------------------------------------------------------------------------------------------


def page(seen: Mapping[str, Any], width: int = WIDTH, marks: tuple[str, str] = BRACKETS) -> str:
    """The facts of `look` as text of at most `width` columns, but no fewer than 70.

    marks: put around the scored text, BRACKETS or UNDERLINED.
    """
    width = max(70, min(width, WIDTH))
    lines = [rule(seen["source"], width)]
    for name, text in _understood(seen):
        lines += wrapped(text, width, indent=" " * 13, first=f"{name:<13}")
    lines += ["", rule(f"tokens, as {seen['tokens_of']} counts them", width), *_table(seen)]
    for note in _notes(seen):
        lines += wrapped(note, width)
    for kind, more in (("label", ""), ("field", ", records in which each is filled")):
        if found := seen[f"{kind}s"]:
            names, shown = list(next(iter(found.values()))), [*found.items()]
            if kind == "label" and len(found) > LISTED:
                shown = sorted(shown, key=lambda each: -sum(each[1].values()))[:LISTED]
                more = f", the {LISTED} most frequent (--json has all)"
            rows = [[shortened(one, 40), *map(str, counts.values())] for one, counts in shown]
            lines += ["", rule(f"{counted(len(found), kind)}{more}", width), *columns([["", *names], *rows])]
    lines = [*map(printable, lines)]
    invisible = sum(map(len, marks)) if marks == UNDERLINED else 0  # they take no column
    lines += ["", rule(f"as the model sees them, {marks[0]}scored{marks[1]}", width + invisible)]
    lines += _examples(seen, width, marks)
    if (train := seen["lengths"].get("train")) is None:
        return "\n".join([*lines, "there is no training record"])
    if train["dropped"] == train["samples"]:
        return "\n".join([*lines, f"nothing is left to train on: --max-length {train['longest']} would drop nothing"])
    return "\n".join([*lines, "train on it with", f"  {_next(seen)}"])


def _understood(seen: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    kinds = ", ".join(dict.fromkeys(seen["files"].values()))
    yield "format", f"{_by_name(seen['formats'])} ({kinds})"
    if len(seen["files"]) > 1:
        yield "files", listed([Path(name).name for name in seen["files"]])
    if seen["field"]:
        yield "field", ", ".join(f"{name} is the column {column}" for name, column in seen["field"].items())
    yield "splits", seen["splits"]
    if seen["records_with"]:
        yield "also there", _by_name(seen["records_with"])
    if seen["not_read"]:
        yield "not read", _by_name(seen["not_read"])
    yield from (("warning", line) for line in seen["warnings"])
    if len(seen["lengths"]) > 1:
        found = [f"{leak['record']} has the {leak['same']} of {leak['trained']}" for leak in seen["leaks"]]
        what = f"{counted(len(found), 'validation or test record')} also in the training set:"
        yield from _named("leaks", what, found)
    found = [f"{one['record']} repeats {one['first']}" for one in seen["repeated"]]
    if found:
        yield from _named("duplicates", f"{counted(len(found), 'training record')} with an earlier one's text:", found)


def _named(title: str, what: str, found: Sequence[str]) -> Iterator[tuple[str, str]]:
    """An entry of the page that names the first few of what was found."""
    yield title, what if found else "none"
    yield from (("", line) for line in found[:NAMED])
    if len(found) > NAMED:
        yield "", f"and {len(found) - NAMED:,} more"


def _by_name(counts: Mapping[str, int]) -> str:
    return listed([f"{name} in {counted(count, 'record')}" for name, count in counts.items()])


def _table(seen: Mapping[str, Any]) -> Iterator[str]:
    what = "samples" if TEXT.name in seen["formats"] else "records"
    yield f"{'':<11}{what:>9}{'median':>8}{'90 %':>7}{'longest':>9}{'in all':>12}{'scored':>8}"
    for name, n in seen["lengths"].items():
        shares = f"{n['tokens']:>12,}{100 * n['scored'] / n['tokens']:>6.0f} %"
        yield f"{name:<11}{n['samples']:>9,}{n['median']:>8,}{n['p90']:>7,}{n['longest']:>9,}{shares}"


def _notes(seen: Mapping[str, Any]) -> Iterator[str]:
    """What must be known of the table."""
    if seen["tokens_of"] != seen["base"]:
        more = "it counts about 1.5 times as many in English" if seen["base"] == DEFAULT_BASE else "theirs differ"
        yield f"{seen['base']} is not on this machine, so tiny's tokenizer counts: {more}"
    if sampled := [f"{n['counted']:,} of {name}" for name, n in seen["lengths"].items() if n["counted"] < n["records"]]:
        yield f"estimated from a sample of the records: {', '.join(sampled)}"
    limit = f"--max-length {seen['max_length']}"
    longer = ", ".join(f"{n['truncated']:,} of {name}" for name, n in seen["lengths"].items() if n["truncated"])
    dropped = ", ".join(f"{n['dropped']:,} of {name}" for name, n in seen["lengths"].items() if n["dropped"])
    if longer:
        lost = f"; dropped, since nothing of the answer is left: {dropped}" if dropped else ""
        yield f"longer than {limit}, and truncated: {longer}{lost}"
    else:
        divided = "; texts are divided into samples of that length" if TEXT.name in seen["formats"] else ""
        yield f"none{' of the sample' * bool(sampled)} is longer than {limit}: nothing is truncated{divided}"


def _examples(seen: Mapping[str, Any], width: int, marks: tuple[str, str]) -> Iterator[str]:
    for example in seen["examples"]:
        yield f"{printable(example['id'])} ({example['split']}, {example['tokens']:,} tokens)"
        lines = list(_broken(example["runs"], width - 2 - sum(map(len, BRACKETS))))
        while lines and not lines[-1]:  # of a text that begins with much white space, all are empty
            lines.pop()
        if len(lines) > _LINES:
            gone = len(lines) - _LINES + 1
            lines[_LINES // 2 : _LINES // 2 + gone] = [[(f"... {gone} lines ...", False)]]
        if example["truncated"]:
            lines.append([(f"... truncated here, {example['truncated']:,} tokens before its end", False)])
        for line in lines:
            yield ("  " + "".join(f"{marks[0]}{text}{marks[1]}" if scored else text for text, scored in line)).rstrip()
        if example["rejected"] is not None:
            rejected = list(_broken([{"text": f"rejected: {example['rejected']}", "scored": False}], width - 2))
            yield from ("  " + "".join(text for text, _ in line) for line in rejected[:3])
            if len(rejected) > 3:
                yield f"  ... {len(rejected) - 3} lines ..."
        yield ""


def _next(seen: Mapping[str, Any]) -> str:
    """The command that trains on these data."""
    field = "".join(f" {quote(f'{name}={column}')}" for name, column in seen["field"].items())
    field = f" --field{field}" if field else ""
    field += f" --schema {quote(seen['schema'])}" if seen["schema"] else ""
    base = "" if seen["base"] == DEFAULT_BASE else f" --base {quote(seen['base'])}"
    base += "" if seen["loss"] == Options.loss else f" --loss {seen['loss']}"
    length = "" if seen["max_length"] == Options.max_length else f" --max-length {seen['max_length']}"
    return f"minilora finetune --data {quote(seen['source'])}{field}{base}{length}"


def _broken(runs: Sequence[Mapping[str, Any]], width: int) -> Iterator[list[tuple[str, bool]]]:
    """Runs of text as lines of at most `width` columns, each a list of parts that are scored or not."""
    text = "".join(_visible(run["text"]) for run in runs)
    scored = [run["scored"] for run in runs for _ in _visible(run["text"])]
    wrapper = Wrapper(width, expand_tabs=False, replace_whitespace=False, drop_whitespace=False, break_on_hyphens=False)
    at = 0
    for paragraph in text.split("\n"):
        for i, line in enumerate(wrapper.wrap(paragraph) or [""]):
            pairs = list(zip(line, scored[at:], strict=False))
            at += len(line)
            start = len(line) - len(line.lstrip()) if i else 0  # the space at which the line was broken
            pairs = pairs[start : len(line.rstrip())]
            yield [("".join(c for c, _ in part), truth) for truth, part in groupby(pairs, lambda pair: pair[1])]
        at += 1  # the newline


def _visible(text: str) -> str:
    """A text in which control characters, which would change the terminal, are escaped."""
    return "".join(
        c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf") else c.encode("unicode_escape").decode()
        for c in text
    )


# -- the command -------------------------------------------------------------------------------------------------------

HELP = "check a data file: its format, splits, duplicates, lengths in tokens, and what is scored"


def add(parser: argparse.ArgumentParser) -> None:
    """A data file, and the fields of LookOptions."""
    add_flags(parser, LookOptions)
    parser.add_argument("source", metavar="FILE", help="a file, a folder or a name, as --data of finetune takes it")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Print the page; in a terminal the scored text is underlined."""
    seen = look(arguments.source, from_flags(LookOptions, arguments))
    if arguments.json:
        print(json.dumps(seen, indent=2))
        return
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    plain |= sys.platform == "win32" and "WT_SESSION" not in os.environ  # cmd.exe alone prints the codes as they are
    print(page(seen, terminal_width(), BRACKETS if plain else UNDERLINED))
