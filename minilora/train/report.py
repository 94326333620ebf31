"""One page that tells what a fine-tuning run learned, forgot and cost, from its metrics."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .finetune import METRICS_FILE
from .options import Options

WIDTH = 100
INDENT = " " * 21  # where the values of the last section begin
LOSSES = {
    "paraphrase": "loss, trained terms in other words",
    "unseen": "loss, unseen",
    "general": "loss, general text (forgetting)",
}
RECALLS = {"paraphrase": "keyword recall, in other words", "unseen": "keyword recall, unseen"}


def read_metrics(folder: str | Path) -> dict[str, Any]:
    """The metrics of a finished run. Raises ValueError that names the file when it is missing or unusable."""
    path = Path(folder) / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `minilora finetune --out {folder}` writes it")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    try:
        page(metrics)  # whatever is missing, it would miss
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path}: not the metrics of a fine-tuning run") from error
    return metrics


def page(metrics: dict[str, Any]) -> str:
    """The report as text of at most 100 columns; only a path or a word that is longer stands on a longer line."""
    options = metrics["options"]
    title = _rule(f"{options['method']} fine-tuning of {options['base']} on {options['data']}")
    lines = [title, *_answers(metrics), "", *_learned(metrics), "", *_cost(metrics)]
    lines += ["", f"written to {options['out']}; talk to it with"]
    return "\n".join([fitted for line in lines for fitted in _fit(line)] + [_command(options)])


def _answers(metrics: dict[str, Any]) -> Iterator[str]:
    for example in metrics["answers"]:
        kind = "unseen term" if example["set"] == "unseen" else "trained term, asked in other words"
        yield ""
        yield from textwrap.wrap(f"{example['question']} [{kind}]", WIDTH)
        yield from (_answer("before", example["before"]), _answer("after", example["after"]))


def _learned(metrics: dict[str, Any]) -> Iterator[str]:
    yield from (_rule("what it learned"), f"{'':<40}{'before':>12}{'after':>12}{'change':>12}")
    for name, (before, after) in metrics["loss"].items():
        yield f"{LOSSES[name]:<40}{before:>12.3f}{after:>12.3f}{100 * (after / before - 1):>+11.0f}%"
    for name, (before, after) in metrics["keyword_recall"].items():
        change = f"{after / before:.1f} x" if before else ""
        yield f"{RECALLS[name]:<40}{100 * before:>11.1f}%{100 * after:>11.1f}%{change:>12}".rstrip()


def _cost(metrics: dict[str, Any]) -> Iterator[str]:
    lora = metrics["options"]["method"] == "lora"
    trainable, total = metrics["trainable_parameters"], metrics["total_parameters"]
    memory = metrics["peak_memory_bytes"]
    measured = "not told by this system" if memory["measured"] is None else _mb(memory["measured"])
    yield _rule("what it cost")
    yield f"parameters trained   {trainable:,} of {total:,} ({100 * trainable / total:.3f} %)"
    yield f"memory               {_mb(memory['predicted'])} predicted for a step; process peak {measured}"
    owners = ", ".join(f"{name} {_mb(n)}" for name, n in memory["by_owner"].items() if n)
    yield from textwrap.wrap(owners, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
    if lora:
        yield f"{INDENT}full fine-tuning would hold {_mb(memory['full_predicted'])}"
    speed, seconds = metrics["tokens_per_second"], metrics["seconds_per_step"]
    minutes = f"{metrics['training_seconds'] / 60:.1f} minutes for {metrics['steps']} steps"
    yield f"time                 {seconds:.2f} s per step, {speed:,.0f} tokens/s, {minutes}"
    saved, base = metrics["adapter_bytes"], metrics["base_bytes"]
    what = "adapter" if lora else "new model"
    yield f"disk                 {what} {_mb(saved)} beside {_mb(base)} of base ({base / saved:,.0f} to 1)"
    before, after = metrics["base_sha256"]
    state, sign = ("untouched", "=") if before == after else ("changed", "->")
    yield f"base                 {state}: sha256 {before[:16]} {sign} {after[:16]}"
    if promises := metrics["audit"]:
        yield f"audit                {len(promises)} promises checked and kept: {', '.join(promises)}"


def _command(options: dict[str, Any]) -> str:
    """What to type next, on a line of its own, never broken, so that it can be copied."""
    if options["method"] != "lora":
        return f"  minilora chat --base {options['out']}"
    base = "" if options["base"] == Options.base else f" --base {options['base']}"
    return f"  minilora chat{base} --adapter {options['out']}"


def _fit(line: str) -> list[str]:
    if len(line) <= WIDTH or "\n" in line:
        return [line]
    return textwrap.wrap(line, WIDTH, subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False)


def _rule(title: str) -> str:
    return f"-- {title} ".ljust(WIDTH, "-")


def _answer(label: str, text: str) -> str:
    indent = f"  {label:<7}"
    return textwrap.fill(
        " ".join(text.split()) or "(nothing)", WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent)
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 100e6 else f"{size / 1e6:,.0f} MB"
