"""`minilora predict`: the label, the fields or the answer for every row of a file, next to the row's own columns."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.fields import FieldTask, Task, read_schema
from ..data.formats import CONTEXT as PASSAGES
from ..data.formats import PROMPTS
from ..data.labels import LabelTask
from ..data.passages import fill
from ..data.prompts import JSON_LINES, TABLES, Prompt, Rows, read_prompts
from ..data.records import path_of
from ..generate.conversation import MAX_NEW_TOKENS, template_of
from ..generate.fields import task_of_adapters
from ..generate.predict import predict
from ..generate.quotes import refuse_without_passages
from ..generate.streams import check_settings
from ..lora.adapters import set_adapter
from ..lora.provenance import read_provenance
from ..models.tokenizer import Message
from ..options import BASE, add_flags, check, from_flags, option
from ..pages.text import counted
from ..progress import log, progress
from .shared import CONTEXT, OVERWRITE, Loading, adapters, read_context

HELP = "write a label, fields or an answer for every row of a file"
AT_ONCE = 192  # rows whose predictions are written together
SHOWN = 3  # rows without a prediction that are named
PREFIX = "predicted_"  # of the columns that are added
ASKED = (*PROMPTS, "input", "system", *PASSAGES)  # columns that make the prompt


@dataclass(frozen=True, kw_only=True)
class PredictOptions(Loading):
    """What predicts, and how it is asked. Raises ValueError for values that are not possible."""

    adapter: str | None = option(
        None, "folder of an adapter, such as runs/mine (default: the base alone)", metavar="DIR"
    )
    base: str | None = option(None, f"{BASE} (default: the one that the adapter's folder names)", path=True)
    out: str | None = option(
        None,
        "a new .csv, .tsv or .jsonl file (default: printed, as CSV for a table, else as JSON lines)",
        metavar="FILE",
    )
    resume: bool = option(False, "continue the file of --out after the rows that it has")
    field: Mapping[str, str] | None = option(
        None, "names of your columns, such as text=body (default: those of the adapter's training)"
    )
    system: str | None = option(
        None, "the system prompt (default: the one that the adapter was trained under, if any)", metavar="TEXT"
    )
    context: str | None = option(None, CONTEXT, metavar="FILE")
    schema: str | None = option(
        None,
        "JSON Schema of fields to find in every text (default: that of the adapter)",
        metavar="FILE",
        only={"context": None},
    )
    max_new_tokens: int = option(MAX_NEW_TOKENS, "tokens of an answer, at most")
    temperature: float = option(0.0, "0 takes the most likely token (greedy); above 0, tokens are sampled")
    seed: int = option(0, "seed of the sampling, for a temperature above 0")

    def __post_init__(self):
        check(self)
        check_settings(self.max_new_tokens, self.temperature, self.seed)
        if self.out is not None:
            Rows(Path(self.out).suffix.lower(), ())  # refuses other endings
        elif self.resume:
            raise ValueError("--resume continues a file: give it with --out")


def add(parser: argparse.ArgumentParser) -> None:
    """The file, and the flags that are the fields of PredictOptions."""
    parser.add_argument("file", metavar="FILE", help="a table, JSON rows, or a text file with a question on each line")
    add_flags(parser, PredictOptions)
    parser.add_argument("--overwrite", **OVERWRITE)


def run(arguments: argparse.Namespace) -> None:
    """Predict for all rows, and write each with its own columns and the predicted ones, in their order.

    Raises RuntimeError at the end if rows have no prediction.
    """
    options = from_flags(PredictOptions, arguments)
    named = adapters([options.adapter] if options.adapter else [])
    choice = next(iter(named), None)
    path, out = path_of(arguments.file), None if options.out is None else Path(options.out)
    if out is not None and not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent}")
    if out is not None and out.exists() and not (options.resume or arguments.overwrite):
        raise FileExistsError(f"{out} is there already: --resume continues it, --overwrite replaces it")
    prompts = read_prompts(path, _columns(options, named))
    schema = None if options.schema is None else read_schema(options.schema)
    model, tokenizer = options.load(named, options.base)
    set_adapter(model, choice)
    room = model.config.max_position_embeddings - options.max_new_tokens
    handbook = read_context(options.context, model, tokenizer, room)
    refuse_without_passages(model, choice, handbook)
    own = list(dict.fromkeys(name for prompt in prompts for name in prompt.row))
    task = task_of_adapters(model, choice) or schema
    added = _added(task, handbook is not None)
    if taken := [name for name in added if name in own]:
        raise ValueError(f"{path} has a column {taken[0]} already: rename it or leave it out")
    suffix = (path if out is None else out).suffix.lower()
    rows = Rows(suffix if out or suffix in TABLES else JSON_LINES, [*own, *added])
    done = rows.done(out, prompts) if out is not None and options.resume and out.exists() else 0
    template, unit = template_of(model, choice), "record" if isinstance(task, LabelTask) else "answer"

    def asked(prompt: Prompt) -> Sequence[Message]:
        """The messages of a row, with its passage, if it has one and the adapter was trained to read some."""
        *before, question = prompt.messages
        if prompt.passage is None or template is None:
            return prompt.messages
        return [*before, {**question, "content": fill(prompt.passage, question["content"], template)}]

    def each(part: Sequence[Prompt]) -> list[dict[str, Any] | str]:
        """The prediction for each row, or why there is none: found by halves, so that no other row suffers."""
        if len(part) == 1 and part[0].error:
            return [part[0].error]
        if not any(prompt.error for prompt in part):
            try:
                drawn = (options.max_new_tokens, options.temperature, options.seed)
                return [*predict(model, tokenizer, [*map(asked, part)], *drawn, options.system, handbook, schema)]
            except ValueError as error:
                if len(part) == 1:
                    return [str(error)]
        half = len(part) // 2
        return each(part[:half]) + each(part[half:])

    began, first, failed, labels = time.monotonic(), done, list[str](), Counter[str]()
    try:
        with progress("predicting", len(prompts), unit, done):  # `predict` counts what it has computed
            for start in range(done, len(prompts), AT_ONCE):
                part = prompts[start : start + AT_ONCE]
                text = "" if start else rows.heading()
                for prompt, found in zip(part, each(part), strict=True):
                    if isinstance(found, str):
                        failed.append(f"line {prompt.line}: {found}")
                        found = {}
                    if isinstance(task, LabelTask) and found:
                        labels.update([found["label"]])
                        found |= {"probability": round(found["probability"], 4)}
                    text += rows.text({**prompt.row, **{f"{PREFIX}{name}": value for name, value in found.items()}})
                _write(out, text, start > 0)
                done = start + len(part)
    except BaseException:
        if out is not None and done:
            log.info(f"{done:,} of {len(prompts):,} rows are in {out}: the same command with --resume continues")
        raise
    log.info(f"{counted(done - first, 'row')} in {time.monotonic() - began:.0f} s")
    if labels:
        log.info(", ".join(f"{label} {count:,}" for label, count in labels.most_common()))
    if failed:
        named_rows = "; ".join(failed[:SHOWN]) + (f"; and {len(failed) - SHOWN:,} more" if len(failed) > SHOWN else "")
        raise RuntimeError(f"{len(failed):,} of {len(prompts):,} rows have no prediction: {named_rows}")


def _columns(options: PredictOptions, named: Mapping[str, Path]) -> dict[str, str]:
    """The columns of the prompt under other names: those given, or those of the adapter's training."""
    if options.field:
        return dict(options.field)
    stored = [read_provenance(folder).get("data", {}).get("field") or {} for folder in named.values()]
    return {name: str(column) for each in stored for name, column in each.items() if name in ASKED}


def _added(task: Task | None, passages: bool) -> list[str]:
    """The columns that a task adds to each row."""
    if isinstance(task, FieldTask):
        names = [field.name for field in task.fields]
    else:
        names = ["answer", *(["passage"] if passages else [])] if task is None else ["label", "probability"]
    return [f"{PREFIX}{name}" for name in names]


def _write(out: Path | None, text: str, more: bool) -> None:
    """Write rows to a file, after those that it has, or print them."""
    if out is None:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    with out.open("a" if more else "w", encoding="utf-8", newline="") as file:
        file.write(text)
