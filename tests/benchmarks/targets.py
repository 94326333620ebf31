"""The targets of speed and memory next to what was measured: Markdown from results.json; nothing is measured here."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minilora.measure.environment import circumstances

Row, Rows = dict[str, Any], dict[str, dict[str, Any]]  # a contender's results; those of a group, by name


@dataclass(frozen=True)
class Target:
    """A row: what is compared with what, and the figure that `value` computes from the contenders of a group."""

    ours: str
    other: str
    value: Callable[[Rows], float]
    target: str = ""
    stretch: str = ""
    how: str = "{:.2f}"


def seconds(row: Row) -> float:
    """The median of a contender's turns."""
    return statistics.median(row["seconds"])


def peak(row: Row) -> float:
    """The most bytes a contender's process has held."""
    return row["peak_bytes"]


def ratio(of: str, to: str, what: Callable[[Row], float] = seconds) -> Callable[[Rows], float]:
    """One contender's median seconds, or another figure of its row, against another's."""
    return lambda rows: what(rows[of]) / what(rows[to])


def speed(of: str, streams: int, to: str, to_streams: int) -> Callable[[Rows], float]:
    """Tokens per second, all streams together, against another's."""
    return lambda rows: streams / seconds(rows[of]) / (to_streams / seconds(rows[to]))


def growth(rows: Rows) -> float:
    """Memory that 1,024 tokens more cost, the second time against twice the 512 before: 1 is linear."""
    short, middle, long = (peak(rows[f"lora-{length}"]) for length in (512, 1024, 2048))
    return (long - middle) / (2 * (middle - short))


PEFT, PEFT_BF16, PEFT_COMPILED = "PEFT", "PEFT in bfloat16", "PEFT under `torch.compile`"
CHECKPOINTED = "4-bit base and `--recompute`"

TARGETS = {  # topic: (its group, its rows)
    "Time of a LoRA step": ("step", (
        Target("float32", PEFT, ratio("lora", "peft-lora"), "0.85", "0.75"),
        Target("float32 by NumPy's BLAS, as without AVX-512", PEFT, ratio("lora-numpy", "peft-lora")),
        Target("float32", PEFT_COMPILED, ratio("lora", "peft-lora-compiled")),
        Target("float32", PEFT_BF16, ratio("lora", "peft-lora-bfloat16")),
        Target("bfloat16 (`--bf16`)", PEFT_BF16, ratio("bf16", "peft-lora-bfloat16"), "0.80", "0.70"),
        Target("float32, written as `loss` and `backward()`, as in lessons", PEFT, ratio("lora-backward", "peft-lora")),
        Target("float32", "its matmuls alone", ratio("lora", "floor"), "1.40", "1.25"),
        Target("float32", "minilora's full fine-tuning", ratio("lora", "full"), "0.72", "0.68"),
    )),
    "Time of an epoch of the legal data": ("epoch", (
        Target("as `finetune` runs it: batches of 8, packed", "PEFT, batches of 4, padded",
               ratio("minilora-epoch", "peft-epoch"), "0.65", "0.55"),
        Target("batches of 4, packed", "PEFT, batches of 4, padded", ratio("minilora-epoch-4", "peft-epoch")),
    )),
    "Peak memory of a LoRA step": ("step", (
        Target("float32", PEFT, ratio("lora", "peft-lora", peak), "0.50", "0.45"),
        Target("float32", PEFT_BF16, ratio("lora", "peft-lora-bfloat16", peak)),
        Target("bfloat16", PEFT_BF16, ratio("bf16", "peft-lora-bfloat16", peak), "0.45"),
        Target("bfloat16, 4-bit base", PEFT_BF16, ratio("quantized-bf16", "peft-lora-bfloat16", peak), "0.30"),
        Target("4-bit base (`--quantized`)", PEFT, ratio("quantized", "peft-lora", peak), "0.33", "0.28"),
        Target(CHECKPOINTED, PEFT, ratio("quantized-recompute", "peft-lora", peak), "0.20", "0.15"),
    )),
    "One sequence of 2,048 tokens": ("long", (
        Target("time", PEFT, ratio("lora-2048", "peft-2048"), "0.80"),
        Target("time", PEFT_COMPILED, ratio("lora-2048", "peft-2048-compiled")),
        Target("time", PEFT_BF16, ratio("lora-2048", "peft-2048-bfloat16")),
        Target("peak memory", PEFT, ratio("lora-2048", "peft-2048", peak), "0.40", "0.25"),
        Target("peak memory", PEFT_COMPILED, ratio("lora-2048", "peft-2048-compiled", peak)),
        Target(f"peak memory, {CHECKPOINTED}", PEFT, ratio("quantized-recompute-2048", "peft-2048", peak)),
        Target("memory that tokens 1,025 to 2,048 add", "twice what tokens 513 to 1,024 add", growth, "1 (linear)"),
    )),
    "Generation, tokens per second (above 1 is faster)": ("generation", (
        Target("1 stream", "transformers, 1", speed("generate", 1, "transformers", 1), "1.2", "1.4"),
        Target("1 stream", "transformers in bfloat16, 1", speed("generate", 1, "transformers-bfloat16", 1)),
        Target("1 stream, bfloat16", "transformers in bfloat16, 1",
               speed("generate-bf16", 1, "transformers-bfloat16", 1)),
        Target("8 streams", "transformers, 1", speed("generate-8", 8, "transformers", 1), "3", "4"),
        Target("8 streams", "transformers, 8", speed("generate-8", 8, "transformers-8", 8)),
        Target("8 streams", "transformers in bfloat16, 8", speed("generate-8", 8, "transformers-8-bfloat16", 8)),
        Target("8 streams, bfloat16", "transformers in bfloat16, 8",
               speed("generate-8-bf16", 8, "transformers-8-bfloat16", 8)),
        Target("1 stream, bfloat16", "minilora in float32, 1", speed("generate-bf16", 1, "generate", 1), "1.3"),
        Target("8 streams, bfloat16", "minilora in float32, 8", speed("generate-8-bf16", 8, "generate-8", 8)),
        Target("16 streams, bfloat16", "minilora in float32, 16", speed("generate-16-bf16", 16, "generate-16", 16)),
    )),
    "Time of a step of a small network": ("mlp", (
        Target("float32", "torch", ratio("minilora-mlp", "torch-mlp"), "1.0", "0.8"),
        Target("float32", "torch under `torch.compile`", ratio("minilora-mlp", "torch-mlp-compiled")),
        Target("float32", "MyGrad", ratio("minilora-mlp", "mygrad-mlp"), "0.6", "0.5"),
        Target("float32", "HIPS autograd", ratio("minilora-mlp", "autograd-mlp")),
    )),
    "Import and loading": ("start", (
        Target("`import minilora`", "in addition to `import numpy`", lambda rows: 1e3 * seconds(rows["import"]),
               "60 ms", "30 ms", "{:.0f} ms"),
        Target("loading SmolLM2 in float32", "", lambda rows: seconds(rows["load"]), "1.2 s", "0.8 s", "{:.2f} s"),
        Target("loading SmolLM2 with a 4-bit base", "", lambda rows: seconds(rows["load-quantized"]),
               "0.3 s", "0.1 s", "{:.2f} s"),
    )),
}  # fmt: skip


def targets_tables(results: dict[str, Any]) -> str:
    """Markdown: for each topic its command, and every target next to what was measured."""
    lines = []
    for topic, (group, targets) in TARGETS.items():
        lines += ["", f"**{topic}**: `peers.py {group}`", ""]
        lines += ["| minilora | compared with | measured | target | stretch goal |", "|---|---|--:|--:|--:|"]
        for target in targets:
            try:
                measured = target.how.format(target.value(results[group]["contenders"]))
            except KeyError:  # a contender was skipped, or its group not measured
                measured = "not measured"
            lines.append(f"| {target.ours} | {target.other} | {measured} | {target.target} | {target.stretch} |")
    return "\n".join(lines[1:])


def group_table(name: str, result: dict[str, Any]) -> str:
    """Markdown: every contender of a group, and where and when it was measured."""
    scale, digits = {"s": (1, 3), "µs": (1e6, 0)}[result["unit"]]
    lines = [f"`{name}`: {result['title']}", ""]
    lines += [f"| contender | {result['unit']}, median | fastest | peak MB |", "|---|--:|--:|--:|"]
    for contender, row in result["contenders"].items():
        times = [f"{scale * s:,.{digits}f}" for s in (seconds(row), min(row["seconds"]))]
        memory = "" if contender == "import" else f"{peak(row) / 1e6:,.0f}"  # "import" starts other processes
        lines.append(f"| {contender} | {times[0]} | {times[1]} | {memory} |")
    lines += [f"| {contender} | skipped: {reason} | | |" for contender, reason in result["skipped"].items()]
    return "\n".join([*lines, "", f"{circumstances(result)}; {result['rounds']} rounds"])


def group_tables(results: dict[str, Any]) -> str:
    """Markdown: every group."""
    return "\n\n".join(group_table(name, result) for name, result in results.items())


BLOCKS = {"targets": targets_tables, "contenders": group_tables}  # what README.md says between its marks


def page(results: dict[str, Any]) -> str:
    """All blocks, as `peers.py` prints them."""
    return "\n\n".join(block(results) for block in BLOCKS.values())
