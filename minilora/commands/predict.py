"""`minilora predict`: the label, the fields or the answer for every row of a file, next to the row's own columns."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from ..data.fields import read_schema
from ..data.formats import CONTEXT as PASSAGES
from ..data.formats import PROMPTS, listed
from ..data.labels import LabelTask
from ..data.prompts import JSON_LINES, TABLES, Prompt, Rows, read_prompts
from ..data.records import path_of
from ..files.disk import locked
from ..generate.as_trained import task_for
from ..generate.predict import added_names, predict
from ..lora.adapters import set_adapter
from ..lora.provenance import read_provenance
from ..options import add_flags, from_flags, option
from ..pages.text import counted
from ..progress import hide_progress, log, progress
from ..terminal import printable
from .asking import Asking, read_context
from .shared import OVERWRITE, Instead, adapters

HELP = "write a label, fields or an answer for every row of a file"
AT_ONCE = 192  # rows whose predictions are written together
SHOWN = 3  # rows without a prediction that are named
ESCAPED = "backslashreplace"  # half of a surrogate pair, which JSON can hold, as JSON writes it
PREFIX = "predicted_"  # of the columns that are added
ASKED = (*PROMPTS, "input", "system", *PASSAGES)  # columns that make the prompt


@dataclass(frozen=True, kw_only=True)
class PredictOptions(Asking):
    """What predicts, how it is asked, and where that goes. Raises ValueError for values that are not possible."""

    out: str | None = option(
        None,
        "a new .csv, .tsv or .jsonl file (default: printed, as a table for a table, else as JSON lines)",
        metavar="FILE",
    )
    resume: bool = option(False, "continue the file of --out after the rows that it has")
    top_k: int = option(1, "labels of each row, the likeliest first, each with its probability", least=1, metavar="N")
    field: Mapping[str, str] | None = option(
        None,
        "names of your columns, such as text=body (default: those of the adapter's training)",
        metavar="NAME=COLUMN",
    )

    def __post_init__(self):
        super().__post_init__()
        if len(self.adapter) > 1:
            raise ValueError("one adapter at a time: predict with the next one for the file that --out wrote")
        if self.out is not None:
            Rows(Path(self.out).suffix.lower(), ())  # refuses other endings
        elif self.resume:
            raise ValueError("--resume continues a file: give it with --out")


def add(parser: argparse.ArgumentParser) -> None:
    """The file, and the flags that are the fields of PredictOptions."""
    parser.add_argument("file", metavar="FILE", help="a table, JSON rows, or a text file with a question on each line")
    add_flags(parser, PredictOptions)
    parser.epilog = (
        "Cells of a table are written as the data and the model have them. A spreadsheet takes one that begins with =, "
        "+, - or @ for a formula and may run it: import tables of untrusted texts as text."
    )
    parser.add_argument("--overwrite", **OVERWRITE)
    instead = "name the file alone, as in minilora predict FILE"
    parser.add_argument("--data", nargs=1, action=Instead, const=instead, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> None:
    """Predict for all rows, and write each with its own columns and the predicted ones, in their order.

    Raises RuntimeError at the end if rows have no prediction.
    """
    options = from_flags(PredictOptions, arguments)
    path, out = path_of(arguments.file), None if options.out is None else Path(options.out)
    if out is None:
        return _predict(options, path, None)
    _refuse_unwritable(out, path, options.resume or arguments.overwrite)
    lock = out.with_name(f".{out.name}.lock")
    with locked(lock, f"{out}: another predict is writing there; choose another --out"):
        _predict(options, path, out)


def _predict(options: PredictOptions, path: Path, out: Path | None) -> None:
    """`run`, where nothing else writes to `out`."""
    named = adapters(options.adapter)
    choice = next(iter(named), None)
    prompts = read_prompts(path, _columns(options, named))
    schema = None if options.schema is None else read_schema(options.schema)
    model, tokenizer = options.load(named, options.base)
    set_adapter(model, choice)
    handbook = read_context(options.context, model, tokenizer, options.max_new_tokens)
    own = list(dict.fromkeys(name for prompt in prompts for name in prompt.row))
    task = task_for(model, choice, schema)
    columns = [*added_names(task, options.top_k), *(["passage"] if handbook is not None and task is None else [])]
    added = [f"{PREFIX}{name}" for name in columns]
    if taken := [name for name in added if name in own]:
        raise ValueError(f"{path} has a column {taken[0]} already: rename it or leave it out")
    suffix = (path if out is None else out).suffix.lower()
    rows = Rows(suffix if out or suffix in TABLES else JSON_LINES, [*own, *added], path)
    done = rows.done(out, prompts) if out is not None and options.resume and out.exists() else 0
    unit = "record" if isinstance(task, LabelTask) else "answer"

    def each(part: Sequence[Prompt]) -> list[dict[str, Any] | str]:
        """The prediction for each row, or why there is none: found by halves, so that no other row suffers."""
        wrong = next((prompt.error for prompt in part if prompt.error), None)
        if wrong is None:
            try:
                texts, passages = [prompt.messages for prompt in part], [prompt.passage for prompt in part]
                how = (options.max_new_tokens, options.temperature, options.seed, options.system, handbook, schema)
                return [*predict(model, tokenizer, texts, *how, passages, options.top_k)]
            except ValueError as error:
                wrong = str(error)
        if len(part) == 1:
            bar.update()
            return [wrong]
        half = len(part) // 2
        return each(part[:half]) + each(part[half:])

    began, first, failed, labels = time.monotonic(), done, defaultdict[str, list[str]](list), Counter[str]()
    strange = list[str]()  # places of questions that share no word with any passage
    hidden = out is None and sys.stdout.isatty()  # the rows show how far it is
    try:
        with hide_progress(hidden), progress("predicting", len(prompts), unit, done) as bar:  # `predict` counts, too
            for start in range(done, len(prompts), AT_ONCE):
                part = prompts[start : start + AT_ONCE]
                text = "" if start else rows.heading()
                for prompt, found in zip(part, each(part), strict=True):
                    if isinstance(found, str):
                        failed[found].append(prompt.place)
                        found = {}
                    if isinstance(task, LabelTask) and found:
                        labels.update([found["label"]])
                        found = {name: round(x, 4) if isinstance(x, float) else x for name, x in found.items()}
                    if handbook is not None and "passage" in found and not handbook.has_words_of(prompt.messages[-1:]):
                        strange.append(prompt.place)
                    text += rows.text({**prompt.row, **{f"{PREFIX}{name}": value for name, value in found.items()}})
                _write(out, rows.encoding, text, start > 0)
                done = start + len(part)
    except BaseException:
        if out is not None and done:
            log.info(f"{done:,} of {len(prompts):,} rows are in {out}: the same command with --resume continues")
        raise
    log.info(f"{counted(done - first, 'row')} in {time.monotonic() - began:.0f} s")
    if strange:
        share = (
            f"{len(strange):,} of {counted(done - first, 'row')} share no word with any passage of {options.context}"
        )
        log.warning(f"{path}: {share}, such as {strange[0]}: the passage of each may not be about it")
    if labels:
        log.info(listed([f"{label} {count:,}" for label, count in labels.most_common()]))
    if failed:
        why = [f"{listed(places, SHOWN)}: {reason}" for reason, places in failed.items()]
        more = f"; and {len(why) - SHOWN:,} more kinds of mistakes" if len(why) > SHOWN else ""
        count = f"{sum(map(len, failed.values())):,} of {len(prompts):,} rows have no prediction"
        raise RuntimeError(f"{count}: {'; '.join(why[:SHOWN])}{more}")


def _refuse_unwritable(out: Path, source: Path, replaced: bool) -> None:
    """Raise OSError, before anything is computed, if rows cannot be written there. replaced: if a file is there."""
    if out.exists() and out.samefile(source):
        raise FileExistsError(f"{out} is the file to predict for: choose another --out")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent}")
    if (there := out.exists()) and not (replaced or out.is_dir()):
        raise FileExistsError(f"{out} is there already: --resume continues it, --overwrite replaces it")
    out.open("a").close()
    if not there:
        out.unlink()


def _columns(options: PredictOptions, named: Mapping[str, Path]) -> dict[str, str]:
    """The columns of the prompt under other names: those given, or those of the adapter's or whole model's training."""
    if options.field:
        return dict(options.field)
    trained = [*named.values()] or [Path(options.base or "")]
    stored = [read_provenance(folder).get("data", {}).get("field") or {} for folder in trained]
    return {name: str(column) for each in stored for name, column in each.items() if name in ASKED}


def _write(out: Path | None, encoding: str, text: str, more: bool) -> None:
    """Write rows to a file, after those that it has, or print them. Raises OSError that says how to continue."""
    if out is None:
        if isinstance(sys.stdout, TextIOWrapper) and not sys.stdout.isatty():  # the bytes of a file, on Windows, too
            sys.stdout.reconfigure(encoding="utf-8", errors=ESCAPED, newline="\n")
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()
        return
    try:
        mode = "r+" if more else "w"  # an error if it was moved away
        with out.open(mode, encoding=encoding, errors=ESCAPED, newline="") as file:
            file.seek(0, os.SEEK_END)
            file.write(text)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{out}: {error.strerror}; --resume continues after its last whole row") from error
