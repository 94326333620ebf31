"""The table of every introduction to LoRA, with numbers: what LoRA and full fine-tuning cost and learn, claim by claim.

Rules fixed before any run say of each row whether its claim held. `page` prints the table.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..experiments.claim import FEW, LOW, SLIGHT, SPARED, Band, Verdict
from ..experiments.tuned import first_step
from ..measure.environment import circumstances
from ..measure.statistics import Interval
from ..pages.text import WIDTH, rule
from .report import SETS

Metrics = dict[str, Any]  # of a run, as `finetune` returns them

METHODS = ("lora", "full")
NAMES = {"lora": "LoRA", "full": "full fine-tuning"}
WORDS = dict(zip(Verdict, ("held", "in part", "did not hold"), strict=True))
HELD, IN_PART, NOT = WORDS.values()

RULES = """
Held: LoRA updates and stores at most a tenth of what full fine-tuning does, needs at most a third of its memory, time
and money, gains at least 95 % of what it gains, forgets at most half of what it forgets. In part: at most half; at most
nine tenths; at least 80 %; at most nine tenths.
"""

CLAIMS = {
    "few": "Very few parameters are updated, not all of them",
    "memory": "It needs little memory, since only small matrices are trained",
    "fast": "Training is fast, and experiments are quick",
    "cheap": "It is much cheaper",
    "small": "A version is small, so that one base can have many",
    "learns": "It teaches a model a field, sometimes slightly behind full fine-tuning",
    "untouched": "The original model stays untouched, and what it could do is kept",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measure of a claim. base: of the model before training, where there is such a number."""

    claim: str  # a key of CLAIMS
    what: str
    unit: str  # a key of SHOWN
    lora: Any
    full: Any
    verdict: str
    base: float | None = None

    @property
    def ratio(self) -> float | None:
        """LoRA's number over that of full fine-tuning; where there is a base, its change from it over the other's."""
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
    "weights, the adapter's too": ("weights", "adapter"),
    "gradients": ("gradients",),
    "optimizer state": ("moments",),
    "scratch, program, libraries": ("scratch", "program"),
}


def rows(result: dict[str, Any]) -> list[Row]:
    """The rows of a comparison, from the metrics of its two runs."""
    lora, full = (result["runs"][method] for method in METHODS)
    hourly = result["machine"]["cores"] * result["options"]["price"]
    return [
        _cost("few", "trainable parameters", "count", FEW, lora["trainable_parameters"], full["trainable_parameters"]),
        *_memory(lora["peak_memory_bytes"], full["peak_memory_bytes"], result["peak_bytes"]),
        *_time(lora, full),
        _cost("cheap", "training of the run", "dollars", LOW, *(hourly * _seconds(run) / 3600 for run in (lora, full))),
        _cost("small", "adapter or model on disk", "bytes", FEW, lora["adapter_bytes"], full["adapter_bytes"]),
        *_learned(lora, full),
        *_untouched(lora, full),
    ]


def _cost(claim: str, what: str, unit: str, rule: Band, lora: float, full: float) -> Row:
    return Row(claim=claim, what=what, unit=unit, lora=lora, full=full, verdict=_judged(rule, lora, full))


def _memory(lora: Metrics, full: Metrics, peaks: dict[str, int | None]) -> Iterator[Row]:
    for what, owners in OWNED.items():
        sizes = (sum(each["by_owner"].get(owner, 0) for owner in owners) for each in (lora, full))
        yield _cost("memory", what, "bytes", LOW, *sizes)
    yield _cost("memory", "activations", "bytes", LOW, lora["activations"], full["activations"])
    yield _cost("memory", "peak of a step, predicted", "bytes", LOW, lora["predicted"], full["predicted"])
    if peaks["lora"] and peaks["full"]:
        yield _cost("memory", "peak of the process", "bytes", LOW, peaks["lora"], peaks["full"])


def _time(lora: Metrics, full: Metrics) -> Iterator[Row]:
    yield _cost("fast", "one step", "seconds", LOW, lora["seconds_per_step"], full["seconds_per_step"])
    to_best = (_seconds(run, best_validation(run)[0]) for run in (lora, full))
    yield _cost("fast", "to its best validation loss", "seconds", LOW, *to_best)
    both = max(best_validation(run)[1] for run in (lora, full))
    to_both = (_seconds(run, first_step(run["validation_loss"], both, between=False)) for run in (lora, full))
    yield _cost("fast", f"to {both:.3f}, which both reached", "seconds", LOW, *to_both)


def _learned(lora: Metrics, full: Metrics) -> Iterator[Row]:
    for key, unit, sign in (("loss", "nats", -1), ("keyword_recall", "share", 1)):
        for name in lora[key]:
            if name == "general":
                continue
            (before, mine), whole = lora[key][name], full[key][name][1]
            verdict = _judged(SLIGHT, sign * (mine - before), sign * (whole - before))
            what = f"{key.replace('_', ' ')}, {SETS[name]}"
            yield Row(claim="learns", what=what, unit=unit, base=before, lora=mine, full=whole, verdict=verdict)


def _untouched(lora: Metrics, full: Metrics) -> Iterator[Row]:
    same = [run["base_sha256"][0] == run["base_sha256"][1] for run in (lora, full)]
    states = ["as it was" if each else "changed" for each in same]
    verdict = HELD if same[0] else NOT
    yield Row(
        claim="untouched", what="the base's weights", unit="text", lora=states[0], full=states[1], verdict=verdict
    )
    (before, mine), whole = lora["loss"]["general"], full["loss"]["general"][1]
    verdict = _judged(SPARED, mine - before, whole - before)
    yield Row(
        claim="untouched", what="loss on general text", unit="nats", base=before, lora=mine, full=whole, verdict=verdict
    )


def _judged(band: Band, lora: float, full: float) -> str:
    """Whether LoRA's number, as a share of that of full fine-tuning, is in the band. Nothing is no share of anything,
    and something is more than any share of nothing."""
    share = 0.0 if lora <= 0 else lora / full if full > 0 else math.inf
    return WORDS[band.verdict(Interval(share, share, share, 1))]


def best_validation(run: Metrics) -> tuple[int, float]:
    """The step with the lowest validation loss, and that loss."""
    step, loss = min(run["validation_loss"], key=lambda pair: pair[1])
    return step, loss


def _seconds(run: Metrics, steps: float | None = None) -> float:
    """What training took, without validation: for so many steps, or for all."""
    return run["training_seconds"] * (1 if steps is None else steps / run["steps"])


# -- the page ----------------------------------------------------------------------------------------------------------

SHOWN: dict[str, Callable[[Any], str]] = {  # unit -> how it is printed
    "count": lambda x: f"{x:,}",
    "bytes": lambda x: f"{x / 1e6:,.{0 if x >= 100e6 else 1 if x >= 1e6 else 3}f} MB",
    "seconds": lambda x: f"{x:.2f} s" if x < 60 else f"{x / 60:.1f} min",
    "dollars": lambda x: f"${x:.2g}",
    "nats": lambda x: f"{x:.3f}",
    "share": lambda x: f"{100 * x:.1f} %",
    "text": str,
}


def page(result: dict[str, Any], width: int = WIDTH) -> str:
    """The comparison as text of at most `width` columns, 80 or more."""
    options, table = result["options"], rows(result)
    title = f"LoRA beside full fine-tuning: {options['base']} on {options['data']}, {options['steps']} steps of "
    title += f"{options['batch_size']} records"
    lines = [rule(title, width), _columns(width, "", "base", "LoRA", "full", "ratio", "claim")]
    for claim, says in CLAIMS.items():
        lines += [says, *(_line(row, width) for row in table if row.claim == claim)]
    lines += [rule("where the claims did not hold, or in part", width), *_reasons(result, table)]
    lines += [rule("how it was measured", width), *_search(result), *_method(result)]
    return "\n".join(fitted for line in lines for fitted in _fit(line, width))


def _line(row: Row, width: int) -> str:
    shown = {"base": "", **row.shown()}
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}" if abs(row.ratio) < 0.1 else f"{row.ratio:.2f}"
    return _columns(width, row.what, shown["base"], shown["lora"], shown["full"], ratio, row.verdict)


def _columns(width: int, name: str, base: str, lora: str, full: str, ratio: str, verdict: str) -> str:
    """They fill 80 columns; what there is beyond stands between them."""
    more = (width - 80) // 5
    sizes = zip((base, lora, full, ratio), (7, 10, 12, 6), strict=True)
    return f"  {name:<30}" + "".join(f"{cell:>{size + more}}" for cell, size in sizes) + " " * (1 + more) + verdict


def _reasons(result: dict[str, Any], table: list[Row]) -> Iterator[str]:
    """One sentence for each claim that did not hold in all of its rows."""
    lora, full = (result["runs"][method] for method in METHODS)
    missed = {row.claim for row in table if row.verdict != HELD}
    memory, owners = lora["peak_memory_bytes"], [run["peak_memory_bytes"]["by_owner"] for run in (lora, full)]
    freed, total = (SHOWN["bytes"](each["gradients"] + each["moments"]) for each in owners)
    stays = SHOWN["bytes"](owners[0]["weights"] + memory["activations"])
    faster = full["seconds_per_step"] / lora["seconds_per_step"]
    reasons = {
        "few": "An update of rank r has r (m + n) numbers where a matrix has m n: few, where matrices are wide.",
        "memory": f"Memory: freezing takes gradients and Adam's moments from {total} to {freed}. It saves neither "
        f"weights nor activations ({stays}): every layer still passes a gradient on, and keeps what that takes. (Where "
        "the peak of full fine-tuning comes at the end of the way back, its activations are gone by then.)",
        "fast": "Speed: full fine-tuning multiplies matrices three times in a step where LoRA does so twice, and small "
        "ones besides: 1.5 times the work at most. The rest is Adam, which visits every number that is trained. Here a "
        f"step of LoRA is {faster:.2f} times as fast. Fewer parameters do not learn in fewer steps.",
        "cheap": "Money: on one machine it is time. Where LoRA is much cheaper, it runs on a machine that full "
        "fine-tuning does not fit.",
        "small": "Disk: an adapter is r (m + n) numbers for each matrix of m n: small, where matrices are wide.",
        "learns": "Learning: LoRA gained less than 95 % of what full fine-tuning gained, or nothing.",
        "untouched": "Forgetting: with the adapter on; without it the model is the base, to the last bit.",
    }
    yield from (reasons[claim] for claim in CLAIMS if claim in missed)


def _search(result: dict[str, Any]) -> Iterator[str]:
    steps, found = result["options"]["search_steps"], result["search"]
    for method in METHODS:
        tried, best = found[method]["tried"], found[method]["best"]
        if not tried:
            yield f"Learning rate of {NAMES[method]}: {best:g}, as it was given."
            continue
        losses = ", ".join(f"{lr:g}: {'broke off' if loss is None else f'{loss:.3f}'}" for lr, loss in tried)
        line = f"Learning rate of {NAMES[method]}: {best:g}, by the validation loss after {steps} steps ({losses})."
        if found[method]["at_edge"]:
            line += f" It is at the edge of what was tried: a wider grid may find a better one (--{method}-lr)."
        elif found[method]["added"]:
            line += " The grid was extended by one, since its best was at the edge."
        yield line


def _method(result: dict[str, Any]) -> Iterator[str]:
    runs, options = result["runs"], result["options"]
    (step, loss), (step_full, loss_full) = (best_validation(runs[method]) for method in METHODS)
    yield f"Best validation loss: LoRA {loss:.3f} after {step} steps, full {loss_full:.3f} after {step_full}."
    yield f"Dollars: {options['price']:g} a core hour, an assumption; training alone, without the search."
    yield "LoRA's update is kept whole, where finetune keeps a part of it, which forgets less (--strength)."
    yield "One seed, both in the same order. Ratio: LoRA / full; where there is a base, of the changes from it."
    yield " ".join(RULES.split())
    yield "Not measured here: very complex changes, larger models, GPUs."
    yield f"{circumstances(result)}; {result['wall_seconds'] / 60:.1f} min in all."
    yield f"Written to {options['out']}: the runs, compare.json, picture.png."


def _fit(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    return textwrap.wrap(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
