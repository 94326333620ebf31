"""`minilora bench`: time and memory of every way to run a model, measured in turns on this machine."""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..engine import bfloat16
from ..measure.bench import MODES, NEW, PROMPT, Settings, contender, floor_arithmetic, write_random
from ..measure.environment import circumstances, here_and_now
from ..measure.process import apart
from ..measure.turns import Timings, take_turns
from ..options import UsageError, add_flags, from_flags, usage_errors
from ..pages.text import columns, millions, plain, wrapped
from ..progress import progress
from .shared import AS_JSON, Outcome

HELP = "measure the time and memory of training steps, generation and loading on this machine"


def add(parser: argparse.ArgumentParser) -> None:
    """The flags are the fields of Settings, which modes run, and how often."""
    add_flags(parser, Settings)
    parser.add_argument(
        "--random-weights", action="store_true", help="random weights in SmolLM2's shape, without a download"
    )
    parser.add_argument(
        "--modes", nargs="+", action="extend", metavar="MODE", help=f"of {', '.join(MODES)} (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each mode (default: %(default)s)")
    parser.add_argument("--json", **AS_JSON)


def run(arguments: argparse.Namespace) -> Outcome:
    """A table of modes, measured in turns."""
    if arguments.random_weights and "base" in arguments:
        raise UsageError("--random-weights takes the shape of SmolLM2: leave out --base")
    settings, modes = from_flags(Settings, arguments), arguments.modes or list(MODES)
    with usage_errors():
        check(modes, arguments.rounds)
    if arguments.random_weights:
        with tempfile.TemporaryDirectory(prefix="minilora-bench-") as folder:
            path = str(Path(folder) / "random.gguf")
            apart(write_random, path)  # this process stays small
            result = measure(replace(settings, base=path), modes, arguments.rounds)
        result["settings"]["base"] = "random weights"
    else:
        result = measure(settings, modes, arguments.rounds)
    return Outcome(result, page)


def check(modes: Sequence[str], rounds: int) -> None:
    """Raise ValueError for a mode that does not exist, or for no round at all."""
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ValueError(f"no mode is called {unknown[0]!r}; known: {', '.join(MODES)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")


def impossible(modes: Sequence[str], settings: Settings) -> dict[str, str]:
    """Those of `modes` that cannot run, with the reason: a Hugging Face folder holds no quantised matrices, and not
    every machine multiplies in bfloat16. Raises ValueError if that is all of them.
    """
    found, why_not = {}, bfloat16.why_not()
    if settings.path().is_dir():
        found = {mode: f"{settings.base} holds no quantised matrices" for mode in modes if MODES[mode].quantized}
    found |= {mode: why_not for mode in modes if MODES[mode].bf16 and why_not}
    if modes and len(found) == len(modes):
        raise ValueError("; ".join(f"{reason}, which {mode} needs" for mode, reason in found.items()))
    return found


def measure(settings: Settings, modes: Sequence[str] = tuple(MODES), rounds: int = 7) -> dict[str, Any]:
    """Measure `modes`, those of a group in turns, and return all that `minilora bench --json` prints.

    Modes that the base cannot run are left out. Raises ValueError for an unknown mode, BenchError when a mode fails.
    """
    check(modes, rounds)
    settings.path()  # pulled once, not by every process
    left_out = impossible(modes, settings)
    modes = [mode for mode in modes if mode not in left_out]
    results: dict[str, Timings] = {}
    with progress("bench", len(modes) * (1 + rounds), "turn"):
        for group in dict.fromkeys(mode.group for mode in MODES.values()):
            chosen = [contender(name, settings) for name in MODES if name in modes and MODES[name].group == group]
            results |= take_turns(chosen, rounds)
    first = results["floor"].median if "floor" in results else None
    return {
        **here_and_now(),
        "settings": asdict(settings) | {"rounds": rounds},
        "left_out": left_out,
        "floor_gflops": floor_arithmetic(settings) / first / 1e9 if first else None,
        "modes": {name: _row(name, results[name], settings, first) for name in results},
    }


def _row(name: str, measured: Timings, settings: Settings, floor_seconds: float | None) -> dict[str, Any]:
    mode, median = MODES[name], measured.median
    tokens = mode.tokens(settings)
    return {
        "seconds": median,
        "fastest": min(measured.seconds),
        "ratio_to_floor": median / floor_seconds if floor_seconds and mode.group == "training" else None,
        "tokens_per_second": tokens / median if tokens else None,
        "peak_memory_bytes": measured.peak_bytes if mode.group != "import" else None,  # another process was measured
    }


def page(result: dict[str, Any]) -> str:
    """What `measure` returned, in 80 columns."""
    settings = result["settings"]
    what = (
        f"{settings['base']}: {settings['batch_size']} x {settings['length']} tokens per step, all-linear "
        f"r={settings['r']}; generation of {NEW} tokens after {PROMPT}; median of {settings['rounds']}, in turns"
    )
    rows = [["mode", "", "seconds", "x floor", "tokens/s", "peak, MB"]]
    for name, row in result["modes"].items():
        numbers = (row["seconds"], 3), (row["ratio_to_floor"], 2), (row["tokens_per_second"], 0)
        cells = ["" if number is None else plain(number, digits) for number, digits in numbers]
        rows.append(
            [name, MODES[name].what, *cells, millions(row["peak_memory_bytes"]) if row["peak_memory_bytes"] else ""]
        )
    lines = [*wrapped(circumstances(result)), *wrapped(what), "", *columns(rows, left=2)]
    for reason in dict.fromkeys(result["left_out"].values()):
        names = ", ".join(mode for mode, why in result["left_out"].items() if why == reason)
        lines += wrapped(f"left out: {names}: {reason}")
    if result["floor_gflops"]:
        lines += ["", f"The floor, the matmuls alone, runs at {plain(result['floor_gflops'])} GFLOP/s."]
    return "\n".join(lines)
