"""`minilora report`: one page on what a fine-tuning run learned, forgot and cost, from its metrics."""

import argparse
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..data.rows import TEXT_SUFFIXES
from ..files.disk import read_json
from ..options import UsageError, nearest
from ..pages.fields import field_lines
from ..pages.figures import smoothed, validation_losses
from ..pages.labels import label_lines
from ..pages.text import (
    WIDTH,
    change,
    counted,
    duration,
    listed,
    megabytes,
    percent,
    plain,
    rule,
    signed,
    terminal_width,
    wrapped,
)
from ..terminal import quote
from ..train.run_folder import METRICS_FILE
from .shared import AS_JSON, Instead, Outcome

INDENT = " " * 22  # where the values of the last section begin
KINDS = {"paraphrase": "training question, paraphrased", "train": "training question", "unseen": "not in training"}
SETS = {
    "reworded": "reworded questions",
    "paraphrase": "paraphrased questions",
    "unseen": "unseen questions",
    "general": "general text (forgetting)",
}


def read_metrics(folder: str | Path) -> dict[str, Any]:
    """The metrics of a finished run. Raises ValueError that names the file when it is missing or unusable."""
    path = Path(folder) / METRICS_FILE
    if not path.is_file():
        from ..experiments.sweep import SWEEP_FILE, TABLE_FILE

        if (path.parent / SWEEP_FILE).is_file():
            shows = f"its trials are in {TABLE_FILE}, and the same `minilora sweep` command prints its page again"
            raise ValueError(f"{folder} is the folder of a sweep: {shows}")
        raise ValueError(f"{path}: no such file; `minilora finetune --out {quote(str(folder))}` writes it")
    metrics = read_json(path)
    try:
        page(metrics)  # it fails where a value is missing
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path}: not the metrics of a fine-tuning run") from error
    return metrics


def page(metrics: Mapping[str, Any], width: int = WIDTH) -> str:
    """The report as text of at most `width` columns (80 or more). A path or a word that is longer is not broken."""
    options = metrics["options"]
    method = {"lora": "LoRA", "full": "full"}[options["method"]]
    how = " by DPO" if options.get("loss") == "dpo" else ""
    title = rule(f"{method} fine-tuning{how} of {options['base']} on {options['data']}", width)
    labels = ["", *label_lines(metrics["labels"], width)] if "labels" in metrics else []
    labels += ["", *field_lines(metrics["fields"], width)] if "fields" in metrics else []
    lines = [title, *_answers(metrics, width), "", *_learned(metrics, width), *labels, "", *_cost(metrics, width)]
    flag = "adapter" if options["method"] == "lora" else "base"  # an adapter names its base
    use = "To ask it about one text, or about every row of a file:" if labels else "To talk to it:"
    lines += ["", *wrapped(f"Saved in {options['out']}. {use}", width)]
    context = f" --context {quote(options['context'])}" if options.get("context") else ""
    whose = f"--{flag} {quote(options['out'])}{context}"
    return "\n".join([*lines, f"  minilora chat {whose}", *[f"  minilora predict FILE {whose}"] * bool(labels)])


def _answers(metrics: Mapping[str, Any], width: int) -> Iterator[str]:
    for example in metrics["answers"]:
        yield from ("", *wrapped(f"{' '.join(example['question'].split())} ({KINDS[example['set']]})", width))
        for when in ("before", "after"):
            answer = " ".join(example[when].split()) or "(nothing)"
            yield from wrapped(answer, width, first=f"  {when:<7}", indent=" " * 9)


# -- what it learned ---------------------------------------------------------------------------------------------------


def _learned(metrics: Mapping[str, Any], width: int) -> Iterator[str]:
    yield rule("what it learned", width)
    if "records" in metrics:
        yield from (*wrapped(_records(metrics), width), "")
    last = metrics.get("last", {}).get("loss", {}) if _kept_earlier(metrics) else {}
    yield _row("", "before", "after", "change", *["last step"] * bool(last))
    for name, (before, after) in metrics["loss"].items():
        cells = [plain(before, 3), plain(after, 3), change(before, after)]
        kind = "DPO loss" if name in metrics.get("preferences", {}) else "loss"
        yield _row(f"{kind}, {SETS[name]}", *cells, *([plain(last[name], 3)] if name in last else []))
    for name, found in metrics.get("preferences", {}).items():
        (before, after), margin = found["chosen"], found["margin"][1]
        points = f"{signed(100 * (after - before), 1)} points"
        yield _row(f"chosen preferred, {SETS[name]}", percent(before, 1), percent(after, 1), points)
        yield _row("  more than before, share of pairs", "", percent(found["accuracy"][1], 1))
        yield _row("  margin (nats, times beta)", "", plain(margin, 3))
    for name, (before, after) in metrics["keyword_recall"].items():
        points = f"{signed(100 * (after - before), 1)} points"
        yield _row(f"keyword recall, {SETS[name]}", percent(before, 1), percent(after, 1), points)
    if metrics.get("train_loss"):
        yield from ("", *_course(metrics, width))


def _records(metrics: Mapping[str, Any]) -> str:
    """`240 training records, 30 for validation, 30 for testing; 80 paraphrased training questions for testing`."""
    records = metrics["records"]
    what = "sequence" if metrics["options"]["data"].endswith(TEXT_SUFFIXES) else "record"
    others = [f"{count:,} of {name}" for name, count in metrics.get("mixed", {}).items()]
    parts = [listed([counted(records["train"], f"training {what}"), *others])]
    uses = {"validation": "validation", "unseen": "testing"}
    whole = {name: f" of {count:,}" for name, count in metrics.get("sampled_from", {}).items()}
    parts += [f"{records[name]:,}{whole.get(name, '')} for {use}" for name, use in uses.items() if records.get(name)]
    kinds = {"reworded": "reworded", "paraphrase": "paraphrased"}
    also = [counted(records[name], f"{kind} training question") for name, kind in kinds.items() if records.get(name)]
    asked = [f"{' and '.join(also)} for testing"] if also else []
    if count := records.get("validation_paraphrase"):
        asked.append(f"{count:,} paraphrased for validation")
    return "; ".join([", ".join(parts), *asked])


def _course(metrics: Mapping[str, Any], width: int) -> Iterator[str]:
    """Losses during training: the first, the last, and of validation the lowest and its step."""
    over, smooth = smoothed(metrics["train_loss"])
    curves = validation_losses(metrics)
    yield _row("during training", "first", "last", *["lowest", "at step"] * bool(curves))
    of = "" if over == 1 else f", mean of {over} steps"
    yield _row(f"training loss{of}", plain(smooth[0], 3), plain(smooth[-1], 3))
    for name, curve in curves.items():
        lowest = min((point for point in curve if math.isfinite(point[1])), key=lambda point: point[1], default=None)
        at = [plain(lowest[1], 3), f"{lowest[0]:,}"] if lowest else []
        yield _row(f"validation loss, {SETS[name]}", plain(curve[0][1], 3), plain(curve[-1][1], 3), *at)
    if kept := metrics.get("kept"):
        lora = metrics["options"]["method"] == "lora"
        mean = "mean validation loss" if len(curves) > 1 else "validation loss"
        why = f"where {mean} was lowest" if kept["which"] == "best" else "the last one"
        line = f"Kept: the {'adapter' if lora else 'model'} of step {kept['step']:,}, {why}"
        if (strength := metrics["options"].get("strength") or 1) != 1:
            line += f"; its update is scaled by {strength:g} (--strength)"
        last = f" The last one is in {Path(metrics['options']['out']) / 'last'}."
        yield from wrapped(f"{line}.{last if _kept_earlier(metrics) else ''}", width)


def _kept_earlier(metrics: Mapping[str, Any]) -> bool:
    """Is what was kept that of an earlier step than the last?"""
    return "kept" in metrics and metrics["kept"]["step"] < len(metrics["train_loss"])


# -- what it cost ------------------------------------------------------------------------------------------------------


def rehearsal(metrics: Mapping[str, Any], width: int = WIDTH) -> str:
    """What `rehearse` returned, as text."""
    options, steps, seconds = metrics["options"], metrics["planned_steps"], metrics["seconds_per_step"]
    predicted, free = metrics["peak_memory_bytes"]["predicted"], metrics["free_memory_bytes"]
    rows = {
        "data": _records(metrics),
        "trainable parameters": _trainable(metrics),
        "memory of a step": f"{megabytes(predicted)} predicted" + (f", {megabytes(free)} free" if free else ""),
        "time": f"{duration(seconds)} per step; {duration(steps * seconds)} for {counted(steps, 'step')} of "
        f"{counted(options['batch_size'] * options['grad_accumulation'], 'record')}, plus evaluation",
        "results": str(options["out"]),
    }
    title = rule(f"what fine-tuning {options['base']} on {options['data']} would take", width)
    lines = [line for name, value in rows.items() for line in _cell(name, value, width)]
    return "\n".join([title, *lines])


def _cell(name: str, value: str, width: int) -> list[str]:
    return wrapped(value, width, first=f"{name:<22}", indent=INDENT)


def _trainable(metrics: Mapping[str, Any]) -> str:
    trainable, total = metrics["trainable_parameters"], metrics["total_parameters"]
    if metrics["options"]["method"] == "full":
        return f"all {total:,}"
    return f"{trainable:,} of {total:,} ({percent(trainable / total, 3)})"


def _cost(metrics: Mapping[str, Any], width: int) -> Iterator[str]:
    def row(name: str, value: str) -> list[str]:
        return _cell(name, value, width)

    lora = metrics["options"]["method"] == "lora"
    memory = metrics["peak_memory_bytes"]
    measured = "unknown on this system"
    if memory["measured"] is not None:
        measured = megabytes(memory["measured"])
        measured += f", while {memory['reached']}" if "reached" in memory else ""
    yield rule("what it cost", width)
    yield from row("trainable parameters", _trainable(metrics))
    yield from row("memory of a step", f"{megabytes(memory['predicted'])} predicted; peak of the process: {measured}")
    owners = [f"{OWNERS.get(name, name)} {megabytes(n)}" for name, n in memory["by_owner"].items() if n]
    yield from row("", ", ".join(owners))
    if lora:
        yield from row("", f"full fine-tuning would need {megabytes(memory['full_predicted'])}")
    seconds, steps = metrics["seconds_per_step"], counted(metrics["steps"], "step")
    speed = f"{duration(seconds)} per step, {metrics['tokens_per_second']:,.0f} tokens/s"
    yield from row("time", f"{speed}; {duration(metrics['training_seconds'])} for {steps}")
    if (ranks := metrics.get("ranks", 1)) > 1:
        yield from row("processes", f"{ranks}; the memory is that of the first")
    saved, base = metrics["adapter_bytes"], metrics["base_bytes"]
    before, after = metrics["base_sha256"]
    same, sign = before == after, "=" if before == after else "->"
    if lora:
        yield from row(
            "disk", f"adapter {megabytes(saved)}; base in memory {megabytes(base)} ({base / saved:,.0f} to 1)"
        )
        yield from row("base", f"{'unchanged' if same else 'CHANGED'}: sha256 {before[:16]} {sign} {after[:16]}")
    else:
        yield from row("disk", f"{megabytes(saved)}: a whole model")
        yield from row("weights", f"{'unchanged' if same else 'changed'}: sha256 {before[:16]} {sign} {after[:16]}")
    if reason := metrics.get("audit_failed"):
        yield from row("audit", f"FAILED: {' '.join(reason.split())}")
    elif promises := metrics["audit"]:
        yield from row("audit", f"{counted(len(promises), 'check')} passed: {', '.join(promises)}")


OWNERS = {"moments": "optimizer state"}  # of memory -> its name, where it is another


def _row(label: str, *cells: str) -> str:
    sized = zip(cells, (9, 9, 14, 10), strict=False)
    return (f"{label:<38}" + "".join(f"{cell:>{width}}" for cell, width in sized)).rstrip()


# -- the command -------------------------------------------------------------------------------------------------------

HELP = "show the page of a finished run again"
USUAL = "runs/legal"


def add(parser: argparse.ArgumentParser) -> None:
    """The folder of a run."""
    parser.add_argument(
        "run_folder", nargs="?", default=USUAL, metavar="RUN", help="folder of the run (default: %(default)s)"
    )
    parser.add_argument("--json", **AS_JSON)
    parser.add_argument(
        "--picture",
        metavar="FILE",
        help="draw its figure: a .png or .svg file, and NAME-dark next to it for dark pages",
    )
    parser.add_argument("--memory", nargs=0, action=Instead, const="use minilora memory", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> Outcome | None:
    """The page of a finished run, or the list of a folder of runs; with --picture only draw the run's figures."""
    from .runs import find_runs, listing

    folder = Path(arguments.run_folder)
    if arguments.picture and arguments.json:
        raise UsageError("--picture draws and --json prints: leave out one of the two")
    if not arguments.picture and not (folder / METRICS_FILE).is_file() and (found := find_runs(folder)):
        return Outcome(found, listing)
    if not folder.is_dir() and (
        near := nearest(folder.name, [Path(each["folder"]).name for each in find_runs(folder.parent)])
    ):
        raise UsageError(f"{folder}: no such run; did you mean {folder.parent / near}? `minilora runs` lists all")
    metrics = read_metrics(folder)
    if arguments.picture:
        from ..pages.figures import run_figure, task_figures
        from ..pages.style import save_themes

        path = Path(arguments.picture)
        print(*save_themes(lambda: run_figure(metrics), path), sep="\n")
        for name, draw in task_figures(metrics).items():
            print(*save_themes(draw, path.with_stem(f"{path.stem}-{name}")), sep="\n")
        return None
    return Outcome(metrics, partial(page, width=terminal_width()))
