"""How cost grows: `python tests/benchmarks/growth.py FOLDER` measures, and draws growth-*.png in FOLDER.

A training step of a small model, with length, batch, rank, width and the number of adapters. Time is predicted by
counting multiplications, at the speed of one point that all sweeps pass through: where prediction and measurement part,
something other than multiplications costs time. Memory is predicted from shapes alone; measured is what NumPy holds
(through tracemalloc), without Python itself.

Many adapters on one base: memory and the time of a switch, as adapters are added. Predicted are the base, once, and
r (m + n) parameters per matrix of each adapter.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from minilora.engine import bfloat16
from minilora.files.quant import Packed, quantize
from minilora.lora.adapters import add_adapter, base_state, set_adapter
from minilora.lora.config import LoraConfig
from minilora.lora.peft import load_adapter, save_adapter
from minilora.measure.blocks import matrices
from minilora.measure.counts import count_parameters
from minilora.measure.predict import Step, predict_memory
from minilora.models.load import find, load
from minilora.models.rounded import rounded_bytes
from minilora.nn.llama import Config, Llama
from minilora.nn.module import sha256_of
from minilora.nn.optim import AdamW
from minilora.nn.parts import Batch
from minilora.nn.step import training_step
from minilora.pages.style import HALF, LORA, ink, name_lines, panels, save_themes
from minilora.progress import progress, show_progress


@dataclass(frozen=True)
class Point:
    """One training step: tokens per row, rows, rank of the adapter, width of the model, adapters it carries.

    bf16: the base's matrices are multiplied by in bfloat16.
    """

    length: int = 128
    batch: int = 4
    rank: int = 8
    width: int = 256
    adapters: int = 1
    bf16: bool = False

    def config(self) -> Config:
        """A model of four blocks with heads of 32, two query heads for each key head."""
        heads = self.width // 32
        return Config(
            vocab_size=1024,
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_hidden_layers=4,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=self.length,
        )

    def batch_of_ids(self) -> Batch:
        """Random token ids (batch, length), all scored."""
        ids = np.random.default_rng(0).integers(0, self.config().vocab_size, (self.batch, self.length))
        return Batch(ids, ids)


@dataclass(frozen=True)
class Sweep:
    """What is varied, its name on the axis, and its values."""

    label: str
    values: tuple[int, ...]


SWEEPS = {
    "length": Sweep("sequence length (tokens)", (32, 128, 256, 512, 768, 1024)),
    "batch": Sweep("batch size (sequences)", (1, 2, 4, 8, 16)),
    "rank": Sweep("rank r", (1, 8, 32, 64, 96, 128)),
    "width": Sweep("model width C", (64, 128, 256, 384, 512)),
    "adapters": Sweep("adapters in memory, one of them active", (1, 4, 8, 16)),
}


START = Point()
ROUNDS = 5


@dataclass(frozen=True)
class Cost:
    """Seconds of a step, and the most bytes held during it."""

    seconds: float
    peak_bytes: int


def measure(points: Sequence[Point], rounds: int = ROUNDS) -> list[Cost]:
    """Train a little at each point: two steps for memory, then `rounds` for time (the median), all points in turns."""
    with progress("growth", (1 + rounds) * len(points), "turn") as bar:
        steps, peaks = [], []
        _training(points[0])()  # what is imported or made at first use belongs to no point
        for point in points:
            tracemalloc.start()
            try:
                steps.append(_training(point))
                steps[-1]()  # from here on the optimizer state exists
                tracemalloc.reset_peak()
                steps[-1]()
                peaks.append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
            bar.update()
        seconds: list[list[float]] = [[] for _ in points]
        for _ in range(rounds):
            for step, own in zip(steps, seconds, strict=True):
                start = time.perf_counter()
                step()
                own.append(time.perf_counter() - start)
                bar.update()
    return [Cost(statistics.median(own), peak) for own, peak in zip(seconds, peaks, strict=True)]


def _training(point: Point) -> Callable[[], None]:
    config = point.config()
    model = Llama(config, np.random.default_rng(0))
    if point.bf16:
        state = model.state_dict()
        model.load_state_dict(
            {n: w if w.ndim == 1 else Packed(quantize(w, "BF16"), "BF16", True) for n, w in state.items()}
        )
    for i in range(point.adapters):
        add_adapter(model, LoraConfig(r=point.rank, lora_alpha=16, target_modules="all-linear"), f"adapter-{i}", seed=i)
    batch = point.batch_of_ids()
    optimizer = AdamW(model.trainable_parameters(), lr=1e-4)

    def step() -> None:
        training_step(model, optimizer, batch)

    return step


def multiplications(point: Point) -> int:
    """Multiplications of a training step, in its matmuls alone."""
    config, tokens = point.config(), point.batch * point.length
    shapes = [(m, n) for _, m, n in matrices(config)]
    frozen = sum(m * n for m, n in shapes) * config.num_hidden_layers + config.vocab_size * config.hidden_size
    low_rank = point.rank * sum(m + n for m, n in shapes) * config.num_hidden_layers
    # Attention: two products forward; backward five, since it computes the scores again. Half of each is masked.
    attention = 7 * config.num_hidden_layers * config.hidden_size * point.length / 2
    return round(tokens * (2 * frozen + 3 * low_rank + attention))  # y and dx; for thin matrices also dA, dB


def predicted_bytes(point: Point) -> int:
    """What a step holds, from shapes alone."""
    base = rounded_bytes(point.config(), "BF16") if point.bf16 else None
    memory = predict_memory(Step.of(point.config(), point.batch_of_ids(), rank=point.rank, base_bytes=base))
    return memory.total + (point.adapters - 1) * memory.adapter


def draw_growth(folder: Path, start: Point = START, sweeps: Mapping[str, Sweep] = SWEEPS) -> Iterator[Path]:
    """Measure and draw every sweep; yield each picture, `growth-<name>.png` in `folder` and one for dark pages.

    Every sweep passes through `start`, where its prediction of time gets its speed. On a machine that multiplies in
    bfloat16, each point is measured in bfloat16, too.
    """
    for name, sweep in sweeps.items():
        points = [replace(start, **{name: value}, bf16=bf16) for bf16 in _dtypes() for value in sweep.values]
        found = dict(zip(points, measure(points), strict=True))
        yield from save_themes(lambda: _drawn(sweep, start, found), folder / f"growth-{name}.png")  # noqa: B023


def _dtypes() -> tuple[bool, ...]:
    return (False, True) if bfloat16.why_not() is None else (False,)


def _drawn(sweep: Sweep, start: Point, found: dict[Point, Cost]) -> Any:
    figure, (left, right) = panels(2, width=10)
    left.set_title("Time, predicted by counting multiplications")
    right.set_title("Memory, predicted from shapes")
    names = {False: " (float32)", True: " (bfloat16)"} if any(point.bf16 for point in found) else {False: ""}
    shaped = {point: predicted_bytes(point) / 1e6 for point in found}
    for axes, label, predicted, measured in (
        (left, "time per step (ms)", _counted(start, found), {p: 1e3 * cost.seconds for p, cost in found.items()}),
        (right, "peak of a step (MB)", shaped, {p: cost.peak_bytes / 1e6 for p, cost in found.items()}),
    ):
        axes.set(xlabel=sweep.label, ylabel=label, xlim=(0, 1.03 * sweep.values[-1]))
        axes.set_ylim(0, 1.08 * max(*measured.values(), *predicted.values()))
        ends = []
        for bf16, name in names.items():
            points = [point for point in found if point.bf16 == bf16]
            ends += _lines(axes, sweep, points, measured, predicted, HALF if bf16 else LORA, name)
        name_lines(axes, ends)
    return figure


def _counted(start: Point, found: dict[Point, Cost]) -> dict[Point, float]:
    """Milliseconds by counting, at the speed that float32 and bfloat16 each have at the common point."""
    speeds = {p.bf16: multiplications(p) / cost.seconds for p, cost in found.items() if replace(p, bf16=False) == start}
    return {point: 1e3 * multiplications(point) / speeds[point.bf16] for point in found}


def _lines(
    axes: Any,
    sweep: Sweep,
    points: list[Point],
    measured: dict[Point, float],
    predicted: dict[Point, float],
    color: str,
    name: str,
) -> list[tuple[float, str, str]]:
    """Draw a series, and return what its ends are called."""
    from matplotlib.ticker import MaxNLocator

    axes.plot(sweep.values, [predicted[point] for point in points], color=color, linewidth=1.5, linestyle="--")
    axes.plot(sweep.values, [measured[point] for point in points], color=color, linewidth=0, marker="o")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    last = points[-1]
    return [(measured[last], f"measured{name}", color), (predicted[last], f"predicted{name}", color)]


# -- many adapters -----------------------------------------------------------------------------------------------------

COUNTS = {"tiny": (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000), "smollm2": (1, 2, 4, 8, 16, 32)}
NAMES = {"tiny": "tiny base", "smollm2": "SmolLM2-135M"}
MARKERS = {"tiny": "o", "smollm2": "s"}
CONFIG = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
SWITCHES = 51


@dataclass(frozen=True)
class Many:
    """What a base with so many adapters holds, what its shapes predict, and the median seconds of a switch."""

    adapters: int
    held_bytes: int
    predicted_bytes: int
    seconds: float


def measure_many(base: str, counts: Sequence[int]) -> list[Many]:
    """Add as many adapters to a base as the counts say, one after the other: once for memory, once more for seconds,
    since counting bytes takes time.
    """
    with TemporaryDirectory() as scratch, progress(f"many on {base}", 2 * len(counts), "count") as bar:
        model, _ = load(base)  # what is imported at first use belongs to no base
        known = sha256_of(base_state(model))
        add_adapter(model, CONFIG, "first")
        parameters, folder = count_parameters(model), save_adapter(model, Path(scratch), "first", base_sha256=known)
        del model

        def grown() -> Iterator[Llama]:
            model, _ = load(base)
            for i in range(max(counts)):
                load_adapter(model, folder, f"adapter-{i}", base_sha256=known)
                if i + 1 in counts:
                    gc.collect()
                    yield model
                    bar.update()

        seconds = [_switch(model) for model in grown()]
        gc.collect()
        tracemalloc.start()
        try:
            held = [tracemalloc.get_traced_memory()[0] for _ in grown()]
        finally:
            tracemalloc.stop()
    numbers = [parameters.frozen + count * parameters.trainable for count in counts]
    return [Many(*row) for row in zip(counts, held, (4 * n for n in numbers), seconds, strict=True)]


def _switch(model: Llama) -> float:
    """Between adapters far apart in the order in which they came."""
    names = list(model.adapters)
    order = (names[i * 7919 % len(names)] for i in itertools.count())
    seconds = []
    for name in itertools.islice(order, SWITCHES):
        start = time.perf_counter()
        set_adapter(model, name)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def draw_many(folder: Path, counts: Mapping[str, Sequence[int]] = COUNTS) -> list[Path]:
    """Measure, and draw `growth-many.png` in `folder` and one for dark pages. counts: by base, how many adapters."""
    series = {base: measure_many(base, each) for base, each in counts.items() if find(base) is not None}
    return save_themes(lambda: _drawn_many(series), folder / "growth-many.png")


def _drawn_many(series: Mapping[str, Sequence[Many]]) -> Any:
    figure, (left, right) = panels(2, width=10, height=4)
    most = max(each[-1].adapters for each in series.values())
    for base, found in series.items():
        x = [one.adapters for one in found]
        for axes, y in ((left, [one.held_bytes / 1e6 for one in found]), (right, [1e3 * one.seconds for one in found])):
            axes.plot(x, y, color=LORA, linewidth=0, marker=MARKERS[base])
        left.plot(x, [one.predicted_bytes / 1e6 for one in found], color=LORA, linewidth=1.2, linestyle="--")
        words = {"textcoords": "offset points", "va": "center", "color": ink(LORA)}
        left.annotate(NAMES[base], (x[-1], found[-1].held_bytes / 1e6), (8, 0), **words)
        right.annotate(NAMES[base], (x[-1], 1e3 * found[-1].seconds), (8, 0), **words)
    left.set(title="Memory; dashed: predicted from shapes", ylabel="held (MB)", yscale="log")
    right.set(title="Switching from one adapter to another", ylabel="time of a switch (ms)")
    right.set_ylim(0, 1.3e3 * max(one.seconds for found in series.values() for one in found))
    for axes in (left, right):
        axes.set(xlabel="adapters of r = 8 on one base", xscale="log", xlim=(0.8, 12 * most))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    left.yaxis.set_major_formatter("{x:,.0f}")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    show_progress()
    place = parser.parse_args().folder
    place.mkdir(parents=True, exist_ok=True)
    for path in itertools.chain(draw_growth(place), draw_many(place)):
        print(path)
