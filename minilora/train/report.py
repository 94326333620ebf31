"""One page that tells what a fine-tuning run learned, forgot and cost, from its metrics."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from .finetune import METRICS_FILE

WIDTH = 100


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
    lora = options["method"] == "lora"
    lines = [_rule(f"{options['method']} fine-tuning of {options['base']} on {options['data']}")]
    for example in metrics["answers"]:
        kind = "unseen term" if example["set"] == "unseen" else "trained term, asked in other words"
        lines += ["", *textwrap.wrap(f"{example['question']} [{kind}]", WIDTH)]
        lines += [_answer("before", example["before"]), _answer("after", example["after"])]
    lines += ["", _rule("what it learned"), f"{'':<40}{'before':>12}{'after':>12}{'change':>12}"]
    names = {
        "paraphrase": "loss, trained terms in other words",
        "unseen": "loss, unseen",
        "general": "loss, general text (forgetting)",
    }
    for name, (before, after) in metrics["loss"].items():
        lines.append(f"{names[name]:<40}{before:>12.3f}{after:>12.3f}{100 * (after / before - 1):>+11.0f}%")
    names = {"paraphrase": "keyword recall, in other words", "unseen": "keyword recall, unseen"}
    for name, (before, after) in metrics["keyword_recall"].items():
        change = f"{after / before:.1f} x" if before else ""
        lines.append(f"{names[name]:<40}{100 * before:>11.1f}%{100 * after:>11.1f}%{change:>12}")

    trainable, total = metrics["trainable_parameters"], metrics["total_parameters"]
    memory = metrics["peak_memory_bytes"]
    measured = "not told by this system" if memory["measured"] is None else _mb(memory["measured"])
    saved, base = metrics["adapter_bytes"], metrics["base_bytes"]
    unchanged = metrics["base_sha256"][0] == metrics["base_sha256"][1]
    lines += ["", _rule("what it cost")]
    lines.append(f"parameters trained   {trainable:,} of {total:,} ({100 * trainable / total:.3f} %)")
    lines.append(f"memory               {_mb(memory['predicted'])} predicted for a step; process peak {measured}")
    owners = ", ".join(f"{name} {_mb(n)}" for name, n in memory["by_owner"].items() if n)
    lines += textwrap.wrap(owners, WIDTH, initial_indent=" " * 21, subsequent_indent=" " * 21)
    if lora:
        lines.append(f"                     full fine-tuning would hold {_mb(memory['full_predicted'])}")
    speed, seconds = metrics["tokens_per_second"], metrics["seconds_per_step"]
    lines.append(
        f"time                 {seconds:.2f} s per step, {speed:,.0f} tokens/s, "
        f"{metrics['training_seconds'] / 60:.1f} minutes for {metrics['steps']} steps"
    )
    what = "adapter" if lora else "new model"
    lines.append(f"disk                 {what} {_mb(saved)} beside {_mb(base)} of base ({base / saved:,.0f} to 1)")
    state = "untouched: sha256" if unchanged else "changed: sha256"
    hashes = " = ".join(h[:16] for h in metrics["base_sha256"])
    lines.append(f"base                 {state} {hashes if unchanged else hashes.replace(' = ', ' -> ')}")
    if metrics["audit"]:
        lines.append(
            f"audit                {len(metrics['audit'])} promises checked and kept: {', '.join(metrics['audit'])}"
        )
    flag = f"--adapter {options['out']}" if lora else f"--base {options['out']}"
    base_flag = "" if options["base"] == "smollm2" or not lora else f" --base {options['base']}"
    command = f"  minilora chat{base_flag} {flag}"  # on a line of its own, never broken, so that it can be copied
    lines += ["", f"written to {options['out']}; talk to it with"]
    return "\n".join([part for line in lines for part in _fit(line)] + [command])


def _fit(line: str) -> list[str]:
    if len(line) <= WIDTH or "\n" in line:
        return [line]
    return textwrap.wrap(line, WIDTH, subsequent_indent=" " * 21, break_long_words=False, break_on_hyphens=False)


def _rule(title: str) -> str:
    return f"-- {title} ".ljust(WIDTH, "-")


def _answer(label: str, text: str) -> str:
    indent = f"  {label:<7}"
    return textwrap.fill(
        " ".join(text.split()) or "(nothing)", WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent)
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 100e6 else f"{size / 1e6:,.0f} MB"
