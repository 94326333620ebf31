"""`minilora memory`: the memory of a training step by owner, predicted and measured."""

import argparse
from typing import Any

from ..measure.memory import Job, report
from ..measure.predict import Memory
from ..options import add_flags, from_flags
from ..pages.text import NOTHING, columns, counted, millions, percent, wrapped
from .shared import AS_JSON, Outcome

HELP = "run a training step, and compare its memory (weights, activations and so on) with the prediction"

OWNERS = {  # field of Memory -> its name and a note
    "program": ("program", "Python and libraries; measured"),
    "weights": ("weights", "of the base"),
    "adapter": ("adapter", "A and B"),
    "gradients": ("gradients", "one per trainable parameter"),
    "moments": ("optimizer state", "two per trainable parameter"),
    "activations": ("activations", "saved for the backward pass:"),
    "scratch": ("scratch", "logits and other temporary arrays"),
}


def add(parser: argparse.ArgumentParser) -> None:
    """The flags are the fields of Job."""
    add_flags(parser, Job)
    parser.add_argument("--json", **AS_JSON)


def run(arguments: argparse.Namespace) -> Outcome:
    """Where a step's bytes go, predicted and measured."""
    result = report(from_flags(Job, arguments))
    return Outcome(result, page)


def page(result: dict[str, Any]) -> str:
    """What `report` returned, in 80 columns: a row per owner, such as weights or gradients."""
    job, peak = Job(**result["job"]), result["process_peak"]
    predicted, measured = Memory(**result["predicted"]), Memory(**result["measured"])
    what = f"LoRA of rank {job.r} on {', '.join(job.targets or ['all linear layers'])}"
    what = "all parameters" if job.rank is None else what
    extras = [f"quantized {job.quantized}" if isinstance(job.quantized, str) else "quantized"] * bool(job.quantized)
    extras += ["bf16"] * job.bf16 + ["recompute"] * job.recompute
    words = [what, f"{job.batch_size} x {job.length} tokens", counted(result["threads"], "thread"), *extras]
    rows, notes = [["", "predicted", "measured"]], [""]
    for owner, (name, note) in OWNERS.items():
        both = [getattr(memory, owner) for memory in (predicted, measured)]
        if any(both):
            rows.append([name, *map(millions, both)])
            notes.append(note)
        if owner == "activations":
            for operation, size in sorted(measured.by_operation.items(), key=lambda item: -item[1]):
                rows.append([f"  {operation}", millions(predicted.by_operation.get(operation, 0)), millions(size)])
                notes.append("")
    # In full fine-tuning with one micro-batch per thread, gradients grow while activations are freed: each is measured
    # where it is largest, and their sum is more than is ever held.
    apart = job.rank is None and result["rounds"] == 1
    rows.append(["sum", millions(predicted.total), NOTHING if apart else millions(measured.total)])
    notes.append("never all of it at the same time" if apart else "")
    if peak is not None:
        rows.append(["peak of the process", "", millions(peak)])
        notes.append(f"the prediction is off by {percent(predicted.total / peak - 1, 1, sign=True)}")
    shown = columns(rows)
    room = max(map(len, shown))
    lines = [f"{line:<{room}}   {note}".rstrip() for line, note in zip(shown, notes, strict=True)]
    heads = wrapped(f"Memory of a training step of {job.base} at its peak, in MB (millions of bytes):")
    heads += wrapped("; ".join(words))
    lines += [] if peak is not None else ["The peak of the process is unknown on this system."]
    return "\n".join([*heads, "", *lines])
