"""How the cost of a training step grows: measured on a small model, with the prediction drawn beside.

Time is predicted by counting multiplications, at the speed of one point that all sweeps pass through: where the lines
part, something else than multiplications costs time, or saves it. Memory is predicted from shapes, without any
measurement; what is measured is what NumPy holds (through tracemalloc), so Python itself is left out.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..engine import bfloat16
from ..files.quant import Packed, quantize
from ..lora.adapters import add_adapter
from ..lora.config import LoraConfig
from ..measure.predict import SHAPES, Step, predict_memory
from ..models.rounded import rounded_bytes
from ..nn.llama import Config, Llama
from ..nn.optim import AdamW
from ..nn.parts import Batch
from ..nn.step import training_step
from ..pages.style import HALF, LORA, name_lines, panels, save_themes


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


def measure(points: Sequence[Point], rounds: int = ROUNDS, done: Callable[[], object] = lambda: None) -> list[Cost]:
    """Train a little at each point: two steps for memory, then `rounds` for time (the median), all points in turns.

    done: called after each point's two steps and after each of its turns, 1 + rounds times per point.
    """
    steps, peaks = [], []
    _training(points[0])()  # what is imported or made at first use belongs to no point
    for point in points:
        tracemalloc.start()
        try:
            steps.append(_training(point))
            steps[-1]()  # from here on Adam's moments exist
            tracemalloc.reset_peak()
            steps[-1]()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        done()
    seconds: list[list[float]] = [[] for _ in points]
    for _ in range(rounds):
        for step, own in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            own.append(time.perf_counter() - start)
            done()
    return [Cost(statistics.median(own), peak) for own, peak in zip(seconds, peaks, strict=True)]


def _training(point: Point) -> Callable[[], None]:
    config = point.config()
    model = Llama(config, np.random.default_rng(0))
    if point.bf16:
        state = model.state_dict()
        model.load_state_dict({n: w if w.ndim == 1 else Packed(quantize(w, "BF16"), "BF16") for n, w in state.items()})
    for i in range(point.adapters):
        add_adapter(model, LoraConfig(r=point.rank, lora_alpha=16, target_modules="all-linear"), f"adapter-{i}", seed=i)
    batch = point.batch_of_ids()
    optimizer = AdamW(model.trainable_parameters(), lr=1e-4)

    def step() -> None:
        training_step(model, optimizer, batch)

    return step


def multiplications(point: Point) -> int:
    """Multiplications of a training step, in its matrix products alone."""
    config, tokens = point.config(), point.batch * point.length
    shapes = [shape(config) for shape in SHAPES.values()]
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


def draw_all(
    folder: Path,
    start: Point = START,
    sweeps: Mapping[str, Sweep] = SWEEPS,
    done: Callable[[], object] = lambda: None,
) -> Iterator[Path]:
    """Measure and draw every sweep; yield each picture, `growth-<name>.png` in `folder` and one for dark pages, when it
    is there.

    Every sweep passes through `start`, where its prediction of time gets its speed. Where the machine has products in
    bfloat16, each point is measured with them, too. done: called `turns(sweeps)` times.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, sweep in sweeps.items():
        points = [replace(start, **{name: value}, bf16=bf16) for bf16 in _dtypes() for value in sweep.values]
        found = dict(zip(points, measure(points, done=done), strict=True))
        yield from save_themes(lambda: _drawn(sweep, start, found), folder / f"growth-{name}.png")  # noqa: B023


def turns(sweeps: Mapping[str, Sweep] = SWEEPS) -> int:
    """How many turns `draw_all` takes, for a progress bar."""
    return (1 + ROUNDS) * len(_dtypes()) * sum(len(sweep.values) for sweep in sweeps.values())


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
