"""The targets of speed and memory beside what was measured: Markdown out of results.json; nothing is measured here."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minilora.measure.environment import circumstances

Row, Rows = dict[str, Any], dict[str, dict[str, Any]]  # a contender's results; those of a group, by name


@dataclass(frozen=True)
class Target:
    """A promise about one group; `value` computes the figure from the rows of its contenders."""

    what: str
    group: str
    target: str
    stretch: str
    value: Callable[[Rows], float]
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


TARGETS = (
    Target("LoRA step, all-linear r=8, against torch + PEFT", "step", "0.85", "0.75", ratio("lora", "peft-lora")),
    Target("the same, NumPy's BLAS alone, as without AVX-512", "step", "", "",
           ratio("lora-numpy", "peft-lora")),
    Target("the same, torch under `torch.compile`", "step", "", "", ratio("lora", "peft-lora-compiled")),
    Target("the same, torch in bfloat16", "step", "", "", ratio("lora", "peft-lora-bfloat16")),
    Target("the same, both in bfloat16 (`--bf16`)", "step", "0.80", "0.70", ratio("bf16", "peft-lora-bfloat16")),
    Target("LoRA step as a lesson writes it, `loss` and `backward()`, against torch + PEFT", "step", "", "",
           ratio("lora-backward", "peft-lora")),
    Target("LoRA step against the matrix products alone", "step", "1.40", "1.25", ratio("lora", "floor")),
    Target("an epoch of the legal data as `finetune` runs it, against torch + PEFT (batches of 4, padded)", "epoch",
           "0.65", "0.55", ratio("minilora-epoch", "peft-epoch")),
    Target("the same with batches of 4 on both sides", "epoch", "", "", ratio("minilora-epoch-4", "peft-epoch")),
    Target("LoRA step against minilora's own full fine-tuning", "step", "0.72", "0.68", ratio("lora", "full")),
    Target("peak memory of the process against torch + PEFT, dense base", "step", "0.50", "0.45",
           ratio("lora", "peft-lora", peak)),
    Target("the same, torch in bfloat16", "step", "", "", ratio("lora", "peft-lora-bfloat16", peak)),
    Target("the same, both in bfloat16", "step", "0.45", "", ratio("bf16", "peft-lora-bfloat16", peak)),
    Target("the same, packed base", "step", "0.30", "", ratio("quantized-bf16", "peft-lora-bfloat16", peak)),
    Target("the same against torch in float32, packed base", "step", "0.33", "0.28",
           ratio("quantized", "peft-lora", peak)),
    Target("the same, packed base and recomputed", "step", "0.20", "0.15",
           ratio("quantized-recompute", "peft-lora", peak)),
    Target("one sequence of 2,048 tokens: peak memory against torch + PEFT", "long", "0.40", "0.25",
           ratio("lora-2048", "peft-2048", peak)),
    Target("the same, packed base and recomputed", "long", "", "",
           ratio("quantized-recompute-2048", "peft-2048", peak)),
    Target("the same: time", "long", "", "", ratio("lora-2048", "peft-2048")),
    Target("the same, torch under `torch.compile`: time", "long", "", "", ratio("lora-2048", "peft-2048-compiled")),
    Target("the same, torch under `torch.compile`: peak memory", "long", "", "",
           ratio("lora-2048", "peft-2048-compiled", peak)),
    Target("the same, torch in bfloat16: time", "long", "", "", ratio("lora-2048", "peft-2048-bfloat16")),
    Target("memory for tokens 1,025 to 2,048 against twice that for 513 to 1,024", "long", "1 (linear)", "", growth),
    Target("generation, one stream, tokens/s against transformers", "generation", "1.2", "1.4",
           speed("generate", 1, "transformers", 1)),
    Target("the same, transformers in bfloat16", "generation", "", "",
           speed("generate", 1, "transformers-bfloat16", 1)),
    Target("the same, both in bfloat16", "generation", "", "",
           speed("generate-bf16", 1, "transformers-bfloat16", 1)),
    Target("generation in bfloat16, one stream, against minilora in float32", "generation", "1.3", "",
           speed("generate-bf16", 1, "generate", 1)),
    Target("the same, eight streams", "generation", "", "", speed("generate-8-bf16", 8, "generate-8", 8)),
    Target("the same, sixteen streams", "generation", "", "", speed("generate-16-bf16", 16, "generate-16", 16)),
    Target("generation, eight streams, against transformers with one", "generation", "3", "4",
           speed("generate-8", 8, "transformers", 1)),
    Target("the same against transformers with eight", "generation", "", "",
           speed("generate-8", 8, "transformers-8", 8)),
    Target("the same, transformers in bfloat16", "generation", "", "",
           speed("generate-8", 8, "transformers-8-bfloat16", 8)),
    Target("the same, both in bfloat16", "generation", "", "",
           speed("generate-8-bf16", 8, "transformers-8-bfloat16", 8)),
    Target("small-MLP step against torch eager", "mlp", "1.0", "0.8", ratio("minilora-mlp", "torch-mlp")),
    Target("the same, torch under `torch.compile`", "mlp", "", "", ratio("minilora-mlp", "torch-mlp-compiled")),
    Target("the same against MyGrad", "mlp", "0.6", "0.5", ratio("minilora-mlp", "mygrad-mlp")),
    Target("the same against HIPS autograd", "mlp", "", "", ratio("minilora-mlp", "autograd-mlp")),
    Target("`import minilora` on top of `import numpy`", "start", "60 ms", "30 ms",
           lambda rows: 1e3 * seconds(rows["import"]), "{:.0f} ms"),
    Target("loading SmolLM2, dense", "start", "1.2 s", "0.8 s", lambda rows: seconds(rows["load"]), "{:.2f} s"),
    Target("loading SmolLM2, packed", "start", "0.3 s", "0.1 s",
           lambda rows: seconds(rows["load-quantized"]), "{:.2f} s"),
)  # fmt: skip


def targets_table(results: dict[str, Any]) -> str:
    """Markdown: every target beside what was measured, and the command that measures it."""
    lines = ["| what | target | stretch | measured | measure it |", "|---|---|---|---|---|"]
    for target in TARGETS:
        try:
            measured = target.how.format(target.value(results[target.group]["contenders"]))
        except KeyError:  # a contender was skipped, or its group not measured
            measured = "not measured"
        lines.append(f"| {target.what} | {target.target} | {target.stretch} | {measured} | `peers.py {target.group}` |")
    return "\n".join(lines)


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


def page(results: dict[str, Any]) -> str:
    """What README.md says between its marks: the targets, then every group."""
    return "\n\n".join([targets_table(results), *(group_table(name, result) for name, result in results.items())])
