"""One page that tells what a fine-tuning run learned, forgot and cost, from its metrics."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files.disk import read_json
from ..pages.run import megabytes, smoothed, validation_losses
from ..train.run_folder import METRICS_FILE
from .shared import AS_JSON, Instead

WIDTH = 100  # columns, at most
NARROWEST = 80  # where the tables still fit
INDENT = " " * 21  # where the values of the last section begin
KINDS = {"paraphrase": "trained, asked in other words", "train": "trained", "unseen": "unseen"}  # of questions
LOSSES = {
    "paraphrase": "loss, trained, in other words",
    "unseen": "loss, unseen",
    "general": "loss, general text (forgetting)",
}
RECALLS = {"paraphrase": "keyword recall, in other words", "unseen": "keyword recall, unseen"}
VALIDATIONS = {"unseen": "validation, unseen", "paraphrase": "validation, in other words"}
FORGOTTEN = 0.1  # a loss on general text that rises by more than this share is worth a word


def read_metrics(folder: str | Path) -> dict[str, Any]:
    """The metrics of a finished run. Raises ValueError that names the file when it is missing or unusable."""
    path = Path(folder) / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `minilora finetune --out {folder}` writes it")
    metrics = read_json(path)
    try:
        page(metrics)  # whatever is missing, it would miss
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path}: not the metrics of a fine-tuning run") from error
    return metrics


def terminal_width() -> int:
    """Columns for a page: those of the terminal, 80 to 100; 100 where there is none."""
    return min(WIDTH, max(NARROWEST, shutil.get_terminal_size(fallback=(WIDTH, 24)).columns))


def page(metrics: Mapping[str, Any], width: int = WIDTH) -> str:
    """The report as text of at most `width` columns (80 or more); only a path or a word that is longer stands on a
    longer line.
    """
    options = metrics["options"]
    method = {"lora": "LoRA", "full": "full"}[options["method"]]
    title = rule(f"{method} fine-tuning of {options['base']} on {options['data']}", width)
    lines = [title, *_answers(metrics, width), "", *_learned(metrics, width), "", *_cost(metrics, width)]
    lines += ["", f"written to {options['out']}; talk to it with"]
    return "\n".join([fitted for line in lines for fitted in _fit(line, width)] + [_command(options)])


def _answers(metrics: Mapping[str, Any], width: int) -> Iterator[str]:
    for example in metrics["answers"]:
        yield ""
        yield from textwrap.wrap(f"{example['question']} [{KINDS[example['set']]}]", width)
        yield from (_answer("before", example["before"], width), _answer("after", example["after"], width))


# -- what it learned ---------------------------------------------------------------------------------------------------


def _learned(metrics: Mapping[str, Any], width: int) -> Iterator[str]:
    yield rule("what it learned", width)
    if "records" in metrics:
        yield from (_counted(metrics), "")
    last = metrics.get("last", {}).get("loss", {}) if _kept_earlier(metrics) else {}
    yield _row("", "before", "after", "change", *["last step"] * bool(last))
    for name, (before, after) in metrics["loss"].items():
        cells = [f"{before:.3f}", f"{after:.3f}", _percent(before, after)]
        yield _row(LOSSES[name], *cells, *([f"{last[name]:.3f}"] if name in last else []))
    for name, (before, after) in metrics["keyword_recall"].items():
        change = f"{after / before:.1f} x" if before else ""
        yield _row(RECALLS[name], f"{100 * before:.1f}%", f"{100 * after:.1f}%", change)
    if metrics.get("train_loss"):
        yield from ("", *_course(metrics))
    if advice := _advice(metrics):
        yield from ("", *textwrap.wrap(advice, width, break_on_hyphens=False))


def _counted(metrics: Mapping[str, Any]) -> str:
    """`27 records trained, 3 held out (unseen); 10 asked in other words`."""
    records = metrics["records"]
    what = "sequences" if metrics["options"]["data"].endswith(".txt") else "records"
    apart = {why: records[name] for name, why in {"validation": "for validation", "unseen": "unseen"}.items()
             if records.get(name)}  # fmt: skip
    line, each = f"{records['train']} {what} trained", ", ".join(f"{n} {why}" for why, n in apart.items())
    if "paraphrase" in validation_losses(metrics):  # of those for validation, some are trained ones in other words
        line += f"; {each}"
    else:
        line += f", {sum(apart.values())} held out"
        line += f" ({each if len(apart) > 1 else next(iter(apart))})" if apart else ""
    return line + (f"; {records['paraphrase']} asked in other words" if records.get("paraphrase") else "")


def _course(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Losses on the way: at first, at last, and for validation the lowest and its step."""
    width, smooth = smoothed(metrics["train_loss"])
    curves = validation_losses(metrics)
    yield _row("while it trained", "first", "last", *["lowest", "at step"] * bool(curves))
    of = "" if width == 1 else f", mean of {width} steps"
    yield _row(f"training{of}", f"{smooth[0]:.3f}", f"{smooth[-1]:.3f}")
    for name, curve in curves.items():
        lowest = min((point for point in curve if math.isfinite(point[1])), key=lambda point: point[1], default=None)
        at = [f"{lowest[1]:.3f}", f"{lowest[0]}"] if lowest else []
        yield _row(VALIDATIONS[name], f"{curve[0][1]:.3f}", f"{curve[-1][1]:.3f}", *at)
    if kept := metrics.get("kept"):
        what = "adapter" if metrics["options"]["method"] == "lora" else "model"
        lowest_of = "their mean" if len(curves) > 1 else "validation"
        why = f"where {lowest_of} was lowest" if kept["which"] == "best" else "the last one"
        line = f"kept: the {what} of step {kept['step']}, {why}"
        if (strength := metrics["options"].get("strength") or 1) != 1:
            line += f", at {strength:g} of its strength"
        aside = Path(metrics["options"]["out"]) / "last"
        yield line + (f"; the last one is in {aside}" if _kept_earlier(metrics) else "")


def _kept_earlier(metrics: Mapping[str, Any]) -> bool:
    """Is what was kept that of an earlier step than the last?"""
    return "kept" in metrics and metrics["kept"]["step"] < len(metrics["train_loss"])


def _advice(metrics: Mapping[str, Any]) -> str:
    """What to try where a run went wrong, or forgot a lot of what the base could do; else nothing."""
    options, losses = metrics["options"], metrics["loss"]
    lower = f"a lower --lr (it was {options['lr']:g})" if "lr" in options else "a lower --lr"
    learned = [losses[name] for name in ("paraphrase", "unseen") if name in losses]
    if "audit_failed" in metrics:
        return f"The audit failed (see below): try {lower}."
    if learned and not learned[0][1] < learned[0][0]:  # nor where it is no number
        return f"It learned nothing that helps: try {lower}."
    if "general" in losses and not losses["general"][1] <= (1 + FORGOTTEN) * losses["general"][0]:
        ways = [lower, "fewer --epochs"]
        if options["method"] == "full":
            ways.append("--method lora")
        elif options.get("strength") and not options.get("use_dora") and options.get("init_lora_weights") != "pissa":
            ways[0] = f"a lower --strength (it was {options['strength']:g})"
        return f"It forgot some of what it could do: try {', '.join(ways[:-1])} or {ways[-1]}."
    return ""


# -- what it cost ------------------------------------------------------------------------------------------------------


def _cost(metrics: Mapping[str, Any], width: int) -> Iterator[str]:
    lora = metrics["options"]["method"] == "lora"
    trainable, total = metrics["trainable_parameters"], metrics["total_parameters"]
    memory = metrics["peak_memory_bytes"]
    measured = "not told by this system" if memory["measured"] is None else megabytes(memory["measured"])
    yield rule("what it cost", width)
    share = f"{trainable:,} of {total:,} ({100 * trainable / total:.3f} %)" if lora else f"all {total:,}"
    yield f"parameters trained   {share}"
    yield f"memory               {megabytes(memory['predicted'])} predicted for a step; process peak {measured}"
    owners = ", ".join(f"{name} {megabytes(n)}" for name, n in memory["by_owner"].items() if n)
    yield from textwrap.wrap(owners, width, initial_indent=INDENT, subsequent_indent=INDENT)
    if lora:
        yield f"{INDENT}full fine-tuning would hold {megabytes(memory['full_predicted'])}"
    speed, seconds = metrics["tokens_per_second"], metrics["seconds_per_step"]
    whole = metrics["training_seconds"]
    took = f"{whole / 60:.1f} minutes" if whole >= 60 else f"{whole:.1f} seconds"
    yield f"time                 {seconds:.2f} s per step, {speed:,.0f} tokens/s, {took} for {metrics['steps']} steps"
    if (ranks := metrics.get("ranks", 1)) > 1:
        sent = metrics["bytes_per_step"]
        beside = f"; full fine-tuning would send {megabytes(sent['full_sent'])}" if lora else ""
        yield f"ranks                {ranks}, each of which sends {megabytes(sent['sent'])} per step{beside}"
    saved, base = metrics["adapter_bytes"], metrics["base_bytes"]
    before, after = metrics["base_sha256"]
    if lora:
        beside = f"{megabytes(base)} of base ({base / saved:,.0f} to 1)"
        yield f"disk                 adapter {megabytes(saved)} beside {beside}"
        state, sign = ("untouched", "=") if before == after else ("changed", "->")
        yield f"base                 {state}: sha256 {before[:16]} {sign} {after[:16]}"
    else:
        yield f"disk                 {megabytes(saved)}: a whole model for each version"
        state = "the same as before" if before == after else "changed"
        yield f"weights              {state}: sha256 {before[:16]} {'=' if before == after else '->'} {after[:16]}"
    if reason := metrics.get("audit_failed"):
        yield f"audit                FAILED: {' '.join(reason.split())}"
    elif promises := metrics["audit"]:
        yield f"audit                {len(promises)} promises checked and kept: {', '.join(promises)}"


def _command(options: Mapping[str, Any]) -> str:
    """What to type next, on a line of its own, never broken, so that it can be copied. An adapter knows its base."""
    return f"  minilora chat --{'adapter' if options['method'] == 'lora' else 'base'} {options['out']}"


# -- lines -------------------------------------------------------------------------------------------------------------


def _row(label: str, *cells: str) -> str:
    return (f"{label:<36}" + "".join(f"{cell:>11}" for cell in cells)).rstrip()


def _percent(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.0f}%" if math.isfinite(after / before) else ""


def _fit(line: str, width: int) -> Sequence[str]:
    if len(line) <= width or "\n" in line:
        return [line]
    return textwrap.wrap(line, width, subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False)


def rule(title: str, width: int) -> str:
    """The line that a section of a page begins with."""
    return f"-- {title} ".ljust(width, "-")


def _answer(label: str, text: str, width: int) -> str:
    indent = f"  {label:<7}"
    return textwrap.fill(
        " ".join(text.split()) or "(nothing)", width, initial_indent=indent, subsequent_indent=" " * len(indent)
    )


HELP = "show the page of a finished run again"


def add(parser: argparse.ArgumentParser) -> None:
    """The folder of a run."""
    parser.add_argument("run_folder", nargs="?", default="runs/legal", metavar="RUN", help="default: %(default)s")
    parser.add_argument("--json", **AS_JSON)
    parser.add_argument(
        "--picture", metavar="FILE", help="draw it: a .png or .svg file, and NAME-dark beside it for dark pages"
    )
    parser.add_argument("--memory", nargs=0, action=Instead, const="use minilora memory", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> None:
    """Print the page or the metrics of a finished run, or draw its pictures."""
    metrics = read_metrics(arguments.run_folder)
    if arguments.picture:
        from ..pages.run import run_figure
        from ..pages.style import save_themes

        print(*save_themes(lambda: run_figure(metrics), Path(arguments.picture)), sep="\n")
        return
    print(json.dumps(metrics, indent=2) if arguments.json else page(metrics, terminal_width()))
