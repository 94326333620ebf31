"""What introductions to LoRA claim, as a table with numbers: what LoRA and full fine-tuning cost and learn.

Bands that were fixed before any run decide of each row whether its claim held. `page` prints the table.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..experiments.claim import FEW, LOW, SLIGHT, SPARED, Band, Verdict
from ..experiments.tuned import first_step
from ..measure.environment import circumstances
from ..measure.statistics import Interval
from ..pages.template import TEMPLATES, template
from ..pages.text import WIDTH, columns, duration, megabytes, percent, plain
from .report import SETS

Metrics = dict[str, Any]  # of a run, as `finetune` returns them

METHODS = ("lora", "full")
NAMES = {"lora": "LoRA", "full": "full fine-tuning"}
WORDS = dict(zip(Verdict, ("held", "in part", "not held"), strict=True))
HELD, IN_PART, NOT = WORDS.values()

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
    """The time of this many steps of training, or of all, without validation."""
    return run["training_seconds"] * (1 if steps is None else steps / run["steps"])


# -- the page ----------------------------------------------------------------------------------------------------------

SHOWN: dict[str, Callable[[Any], str]] = {  # unit -> how it is printed
    "count": lambda x: f"{x:,}",
    "bytes": megabytes,
    "seconds": duration,
    "dollars": lambda x: f"${plain(x, max(0, 1 - math.floor(math.log10(x or 10))))}",  # two digits, or all whole ones
    "nats": lambda x: plain(x, 3),
    "share": lambda x: percent(x, 1),
    "text": str,
}


def page(result: dict[str, Any], width: int = WIDTH) -> str:
    """The comparison as text of at most `width` columns, 80 or more."""
    table, (lora, full) = rows(result), (result["runs"][method]["peak_memory_bytes"] for method in METHODS)
    freed, total = (each["by_owner"]["gradients"] + each["by_owner"]["moments"] for each in (lora, full))
    text = template(TEMPLATES / "compare.txt.jinja").render(
        result,
        best={method: best_validation(result["runs"][method]) for method in METHODS},
        circumstances=circumstances(result),
        freed=freed,
        missed={row.claim for row in table if row.verdict != HELD},
        names=NAMES,
        stays=lora["by_owner"]["weights"] + lora["activations"],
        table=list(_claims(table, width)),
        total=total,
        width=width,
    )
    return text.rstrip("\n")


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
