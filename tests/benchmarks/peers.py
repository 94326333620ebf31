"""minilora compared with torch, PEFT, transformers, MyGrad and HIPS autograd, in turns, on this machine.

    pip install '.[benchmarks]' && minilora pull smollm2
    python tests/benchmarks/peers.py                     # everything; or some groups: step epoch generation ...
    python tests/benchmarks/peers.py step --write        # and put the result into results.json and README.md

All contenders of a group are in memory at the same time: about 15 GB for `step`. Those under `torch.compile` are
compiled in their warm-up, for some minutes.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from contenders import BASE, COMPILER, CONTENDERS, RECORDS, missing
from targets import BLOCKS, page

from minilora.engine import bfloat16
from minilora.measure import bench
from minilora.measure.environment import machine, versions
from minilora.measure.turns import BenchError, Contender, take_turns
from minilora.progress import progress, show_progress

HERE = Path(__file__).parent
RESULTS, README = HERE / "results.json", HERE / "README.md"
BEGIN, END = "<!-- {}: written by peers.py --write -->", "<!-- end -->"
PACKAGES = ("torch", "transformers", "peft", "mygrad", "autograd")


def ours(mode, name=None, **settings):
    """A mode of `minilora bench`."""
    contender = bench.contender(mode, bench.Settings(BASE, **settings))
    return replace(contender, name=name or mode)


def other(name):
    """One of contenders.py, to whose command `measure` adds the folder of the model."""
    return Contender(name, [sys.executable, str(HERE / "contenders.py"), name])


@dataclass(frozen=True)
class Group:
    """What takes turns: a title, its contenders, the unit in which their times are told, and how many turns."""

    title: str
    contenders: tuple[Contender, ...]
    unit: str = "s"
    rounds: int = 7


def long(mode, length):
    """A mode with one long row."""
    return ours(mode, f"{mode}-{length}", batch_size=1, length=length)


GROUPS = {
    "step": Group(
        "a training step, 4 x 128 tokens, LoRA on every linear layer with r=8",
        (
            *map(ours, ("floor", "lora", "lora-backward", "full", "quantized", "quantized-recompute")),
            *map(ours, ("bf16", "quantized-bf16")),
            *map(other, ("lora-numpy", "peft-lora", "peft-lora-bfloat16", "peft-lora-compiled", "torch-full")),
        ),
    ),
    "epoch": Group(
        f"{RECORDS} of the 240 legal records, trained on once",
        tuple(map(other, ("minilora-epoch", "minilora-epoch-4", "peft-epoch"))),
    ),
    "generation": Group(
        f"{bench.NEW} tokens after {bench.PROMPT}, one stream and eight",
        (
            *map(ours, ("generate", "generate-8", "generate-16")),
            *map(ours, ("generate-bf16", "generate-8-bf16", "generate-16-bf16")),
            *map(other, ("transformers", "transformers-8", "transformers-bfloat16", "transformers-8-bfloat16")),
        ),
    ),
    "long": Group(
        "a LoRA step on one sequence",
        (
            *(long("lora", length) for length in (512, 1024, 2048)),
            long("quantized-recompute", 2048),
            *map(other, ("peft-2048", "peft-2048-bfloat16", "peft-2048-compiled")),
        ),
    ),
    "mlp": Group(
        "a training step of a small network, 64-128-128-10, batch 32",
        tuple(map(other, ("minilora-mlp", "torch-mlp", "torch-mlp-compiled", "mygrad-mlp", "autograd-mlp"))),
        unit="µs",
        rounds=101,  # each is a tenth of a second: a neighbour on the machine shows
    ),
    "start": Group("import on top of NumPy, loading SmolLM2", tuple(map(ours, ("import", "load", "load-quantized")))),
}


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(name: str, rounds: int, folder: str) -> dict:
    """Let the contenders of a group take turns; those whose packages are missing are skipped, with the reason."""
    group, skipped, present = GROUPS[name], {}, []
    for contender in group.contenders:
        if needs := missing(contender.name):
            how = "" if COMPILER in needs else ": pip install '.[benchmarks]'"
            skipped[contender.name] = f"needs {', '.join(needs)}{how}"
        elif re.search("bf16|bfloat16", contender.name) and (why_not := bfloat16.why_not()):  # torch then takes minutes
            skipped[contender.name] = why_not
        else:
            own = contender.name in CONTENDERS
            present.append(replace(contender, command=[*contender.command, folder]) if own else contender)

    results = take_turns(present, rounds)
    return {
        "title": group.title,
        "unit": group.unit,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions() | {package: version(package) for package in PACKAGES if find_spec(package)},
        "rounds": rounds,
        "contenders": {name: asdict(measured) for name, measured in results.items()},
        "skipped": skipped,
    }


def write(results: dict) -> None:
    """Put results into results.json and the tables into README.md, between its marks."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    for name, block in BLOCKS.items():
        before, mark, rest = text.partition(BEGIN.format(name))
        text = f"{before}{mark}\n\n{block(results)}\n\n{END}{rest.partition(END)[2]}"
    README.write_text(text, encoding="utf-8")


def main() -> int:
    """Measure the groups that were asked for, print them, and with --write keep them."""
    parser = argparse.ArgumentParser(description="minilora compared with its peers, measured in turns.")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--rounds", type=int, help="turns of each contender (default: 7, of the small network 101)")
    parser.add_argument("--write", action="store_true", help="keep the result in results.json and README.md")
    arguments = parser.parse_args()
    names = arguments.groups or list(GROUPS)
    if unknown := [name for name in names if name not in GROUPS]:
        parser.error(f"no group is called {unknown[0]!r}; known: {', '.join(GROUPS)}")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    show_progress()
    failures = []  # of some groups; the others are measured all the same
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if arguments.write and RESULTS.exists() else {}
    with tempfile.TemporaryDirectory(prefix="minilora-peers-") as folder:
        if set(names) != {"mlp"}:
            subprocess.run([*other("copy").command, folder], check=True)
        for name in names:
            rounds = arguments.rounds or GROUPS[name].rounds
            with progress(name, (1 + rounds) * len(GROUPS[name].contenders), "turn"):
                try:
                    results[name] = measure(name, rounds, folder)
                except BenchError as error:
                    failures.append(f"{name}: {error}")
            if arguments.write:
                write(results)
    print(page(results))
    for failure in failures:
        print(f"peers: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
