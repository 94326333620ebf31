"""What introductions to LoRA claim, as a table with numbers: what LoRA and full fine-tuning cost and learn.

Bands that were fixed before any run decide of each row whether its claim held. `page` prints the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..experiments.claim import FEW, LOW, SLIGHT, SPARED, Band, Verdict
from ..experiments.tuned import first_step
from ..measure.environment import circumstances
from ..measure.statistics import Interval
from ..pages.text import WIDTH, columns, counted, duration, megabytes, percent, plain, rule, wrapped
from .report import SETS

Metrics = dict[str, Any]  # of a run, as `finetune` returns them

METHODS = ("lora", "full")
NAMES = {"lora": "LoRA", "full": "full fine-tuning"}
WORDS = dict(zip(Verdict, ("held", "in part", "not held"), strict=True))
HELD, IN_PART, NOT = WORDS.values()

RULES = """
LoRA's share of full fine-tuning decides. Held: at most 1/10 of what is trained and stored, 1/3 of memory, time and
money, 1/2 of what is forgotten; at least 95 % of what is gained. In part: at most 1/2, 9/10 and 9/10; at least 80 %.
"""

CLAIMS = {
    "few": "It trains very few parameters",
    "memory": "It needs little memory, since only small matrices are trained",
    "fast": "Training is fast, and experiments are quick",
    "cheap": "It is much cheaper",
    "small": "An adapter is small, so that one base can have many",
    "learns": "It teaches a model a domain, sometimes slightly behind full fine-tuning",
    "untouched": "The base stays unchanged, and keeps what it could do",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measure of a claim. base: that of the model before training, if there is one."""

    claim: str  # a key of CLAIMS
    what: str
    unit: str  # a key of SHOWN
    lora: Any
    full: Any
    verdict: str
    base: float | None = None

    @property
    def ratio(self) -> float | None:
        """LoRA's number divided by that of full fine-tuning; if there is a base, the same of the changes from it."""
        if self.unit == "text":
            return None
        from_base = self.base or 0.0
        return (self.lora - from_base) / (self.full - from_base) if self.full != from_base else None

    def shown(self) -> dict[str, str]:
        """The numbers as the page prints them."""
        numbers = {"base": self.base, "lora": self.lora, "full": self.full}
        return {name: SHOWN[self.unit](number) for name, number in numbers.items() if number is not None}

    def to_json(self) -> dict[str, Any]:
        """All of it, with the ratio and the numbers as they are printed."""
        return asdict(self) | {"ratio": self.ratio, "shown": self.shown()}


# -- the rows ----------------------------------------------------------------------------------------------------------

OWNED = {  # name -> owners of bytes at a step's peak
    "weights and adapter": ("weights", "adapter"),
    "gradients": ("gradients",),
    "optimizer state": ("moments",),
    "scratch, program, libraries": ("scratch", "program"),
}


def rows(result: dict[str, Any]) -> list[Row]:
    """The rows of a comparison, from the metrics of its two runs."""
    lora, full = (result["runs"][method] for method in METHODS)
    hourly = result["machine"]["cores"] * result["options"]["price"]
    return [
        _row("few", "trainable parameters", "count", FEW, lora["trainable_parameters"], full["trainable_parameters"]),
        *_memory(lora["peak_memory_bytes"], full["peak_memory_bytes"], result["peak_bytes"]),
        *_time(lora, full),
        _row("cheap", "training of the run", "dollars", LOW, *(hourly * _seconds(run) / 3600 for run in (lora, full))),
        _row("small", "adapter or model on disk", "bytes", FEW, lora["adapter_bytes"], full["adapter_bytes"]),
        *_learned(lora, full),
        *_untouched(lora, full),
    ]


def _row(
    claim: str, what: str, unit: str, band: Band, lora: float, full: float, base: float | None = None, sign: int = 1
) -> Row:
    """A row whose verdict is that of LoRA's share of full fine-tuning's number; if there is a base, of its change.

    Nothing is no share of anything, and something is more than any share of nothing. sign: -1 if less is a gain.
    """
    mine, whole = (sign * (number - (base or 0)) for number in (lora, full))
    share = 0.0 if mine <= 0 else mine / whole if whole > 0 else math.inf
    verdict = WORDS[band.verdict(Interval(share, share, share, 1))]
    return Row(claim=claim, what=what, unit=unit, base=base, lora=lora, full=full, verdict=verdict)


def _memory(lora: Metrics, full: Metrics, peaks: dict[str, int | None]) -> Iterator[Row]:
    for what, owners in OWNED.items():
        sizes = (sum(each["by_owner"].get(owner, 0) for owner in owners) for each in (lora, full))
        yield _row("memory", what, "bytes", LOW, *sizes)
    yield _row("memory", "activations", "bytes", LOW, lora["activations"], full["activations"])
    yield _row("memory", "peak of a step, predicted", "bytes", LOW, lora["predicted"], full["predicted"])
    if peaks["lora"] and peaks["full"]:
        yield _row("memory", "peak of the process", "bytes", LOW, peaks["lora"], peaks["full"])


def _time(lora: Metrics, full: Metrics) -> Iterator[Row]:
    yield _row("fast", "one step", "seconds", LOW, lora["seconds_per_step"], full["seconds_per_step"])
    mine, whole = (_seconds(run, best_validation(run)[0]) for run in (lora, full))
    yield _row("fast", "to its best validation loss", "seconds", LOW, mine, whole)
    both = max(best_validation(run)[1] for run in (lora, full))
    mine, whole = (_seconds(run, first_step(run["validation_loss"], both, between=False)) for run in (lora, full))
    yield _row("fast", f"to {both:.3f}, which both reach", "seconds", LOW, mine, whole)


def _learned(lora: Metrics, full: Metrics) -> Iterator[Row]:
    for key, unit, sign in (("loss", "nats", -1), ("keyword_recall", "share", 1)):
        for name in lora[key]:
            if name == "general":
                continue
            (before, mine), whole = lora[key][name], full[key][name][1]
            what = f"{'loss' if key == 'loss' else 'recall'}, {SETS[name]}"
            yield _row("learns", what, unit, SLIGHT, mine, whole, before, sign)


def _untouched(lora: Metrics, full: Metrics) -> Iterator[Row]:
    states = ["unchanged" if run["base_sha256"][0] == run["base_sha256"][1] else "changed" for run in (lora, full)]
    verdict = HELD if states[0] == "unchanged" else NOT
    what = "the base's weights"
    yield Row(claim="untouched", what=what, unit="text", lora=states[0], full=states[1], verdict=verdict)
    (before, mine), whole = lora["loss"]["general"], full["loss"]["general"][1]
    yield _row("untouched", "loss on general text", "nats", SPARED, mine, whole, before)


def best_validation(run: Metrics) -> tuple[int, float]:
    """The step with the lowest validation loss, and that loss."""
    step, loss = min(run["validation_loss"], key=lambda pair: pair[1])
    return step, loss


def _seconds(run: Metrics, steps: float | None = None) -> float:
    """The time of so many steps of training, or of all, without validation."""
    return run["training_seconds"] * (1 if steps is None else steps / run["steps"])


# -- the page ----------------------------------------------------------------------------------------------------------

SHOWN: dict[str, Callable[[Any], str]] = {  # unit -> how it is printed
    "count": lambda x: f"{x:,}",
    "bytes": megabytes,
    "seconds": duration,
    "dollars": lambda x: f"${x:.2g}",
    "nats": lambda x: plain(x, 3),
    "share": lambda x: percent(x, 1),
    "text": str,
}


def page(result: dict[str, Any], width: int = WIDTH) -> str:
    """The comparison as text of at most `width` columns, 80 or more."""
    options, table = result["options"], rows(result)
    steps, records = counted(options["steps"], "step"), counted(options["batch_size"], "record")
    title = f"LoRA and full fine-tuning: {options['base']} on {options['data']}, {steps} of {records}"
    lines = [rule(title, width), *_claims(table, width)]
    lines += [rule("why some claims did not hold, or only in part", width)]
    lines += [line for reason in _reasons(result, table) for line in wrapped(reason, width, indent="  ")]
    lines += [rule("how it was measured", width)]
    lines += [line for note in (*_search(result), *_method(result)) for line in wrapped(note, width, indent="  ")]
    return "\n".join(lines)


def _claims(table: Sequence[Row], width: int) -> Iterator[str]:
    """Each claim, and below it its rows."""
    cells = [["", "base", "LoRA", "full", "ratio"]]
    for row in table:
        ratio = "" if row.ratio is None else plain(row.ratio, 3 if abs(row.ratio) < 0.1 else 2)
        shown = {"base": "", **row.shown()}
        cells.append([f"  {row.what}", shown["base"], shown["lora"], shown["full"], ratio])
    head, *lines = columns(cells, gap=2 if width >= 88 else 1)
    room = max(map(len, [head, *lines]))
    yield f"{head:<{room}}  claim"
    for claim, says in CLAIMS.items():
        yield says
        yield from (
            f"{line:<{room}}  {row.verdict}" for row, line in zip(table, lines, strict=True) if row.claim == claim
        )


def _reasons(result: dict[str, Any], table: Sequence[Row]) -> Iterator[str]:
    """A paragraph for each claim that did not hold in all of its rows."""
    lora, full = (result["runs"][method] for method in METHODS)
    missed = {row.claim for row in table if row.verdict != HELD}
    memory, owners = lora["peak_memory_bytes"], [run["peak_memory_bytes"]["by_owner"] for run in (lora, full)]
    freed, total = (megabytes(each["gradients"] + each["moments"]) for each in owners)
    stays = megabytes(owners[0]["weights"] + memory["activations"])
    faster = plain(full["seconds_per_step"] / lora["seconds_per_step"], 2)
    reasons = {
        "few": "Parameters: an update of rank r has r (m + n) parameters for a matrix with m n. That is few if "
        "matrices are wide.",
        "memory": f"Memory: freezing reduces gradients and optimizer state from {total} to {freed}. Weights and "
        f"activations stay ({stays}): every layer still passes a gradient on, and saves what its backward pass needs. "
        "(Full fine-tuning may reach its peak at the end of the backward pass, when its activations are freed.)",
        "fast": "Speed: full fine-tuning multiplies matrices three times in a step, LoRA twice, and small ones in "
        "addition: at most 1.5 times the work. The rest is AdamW, which updates every trainable parameter. Here a step "
        f"of LoRA is {faster} times as fast. Fewer trainable parameters do not learn in fewer steps.",
        "cheap": "Money: on one machine, money is time. LoRA is much cheaper if it runs on a smaller machine, one that "
        "is too small for full fine-tuning.",
        "small": "Disk: an adapter is r (m + n) numbers for each matrix of m n. That is small if matrices are wide.",
        "learns": "Learning: LoRA gained less than 95 % of what full fine-tuning gained, or nothing.",
        "untouched": "Forgetting: measured with the adapter active; without it, the model is the base, bit by bit.",
    }
    yield from (reasons[claim] for claim in CLAIMS if claim in missed)


def _search(result: dict[str, Any]) -> Iterator[str]:
    steps, found = result["options"]["search_steps"], result["search"]
    for method in METHODS:
        tried, best = found[method]["tried"], found[method]["best"]
        if not tried:
            yield f"Learning rate of {NAMES[method]}: {best:g}, as given."
            continue
        losses = ", ".join(f"{lr:g}: {'diverged' if loss is None else plain(loss, 3)}" for lr, loss in tried)
        chosen = f"by the validation loss after {counted(steps, 'step')} ({losses})"
        line = f"Learning rate of {NAMES[method]}: {best:g}, {chosen}."
        if found[method]["at_edge"]:
            line += f" It is at the edge of what was tried: a wider grid may find a better one (--{method}-lr)."
        elif found[method]["added"]:
            line += " The grid was extended by one, since its best was at the edge."
        yield line


def _method(result: dict[str, Any]) -> Iterator[str]:
    runs, options = result["runs"], result["options"]
    (step, loss), (step_full, loss_full) = (best_validation(runs[method]) for method in METHODS)
    lora, full = (
        f"LoRA {plain(loss, 3)} after {counted(step, 'step')}",
        f"full {plain(loss_full, 3)} after {step_full:,}",
    )
    yield f"Best validation loss: {lora}, {full}."
    yield f"Dollars: {options['price']:g} per core hour, an assumption; training alone, without the search."
    yield "LoRA's update is not scaled down after training, as finetune does by default to forget less (--strength)."
    yield "One seed, the same order of records. Ratio: LoRA / full; if there is a base, of the changes from it."
    yield " ".join(RULES.split())
    yield "Not measured here: very different tasks, larger models, GPUs."
    yield f"{circumstances(result)}; {duration(result['wall_seconds'])} in all."
    yield f"Written to {options['out']}: the runs, compare.json, picture.png."
