"""Many adapters beside one base: memory and the time of a switch, measured as they are added.

Memory is what NumPy and Python hold (through tracemalloc), and is predicted from shapes: the base once, and for each
adapter r (m + n) numbers per matrix. Mapped adapters stay in their file, of which the system keeps in memory what is
used.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..lora.adapters import add_adapter, base_state, set_adapter
from ..lora.config import LoraConfig
from ..lora.peft import load_adapter, save_adapter
from ..measure.counts import count_parameters
from ..models.load import find, load
from ..nn.llama import Llama
from ..nn.module import sha256_of
from ..pages.style import LORA, ink, panels, save_themes

COUNTS = {"tiny": (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000), "smollm2": (1, 2, 4, 8, 16, 32)}
NAMES = {  # and by how much they stand above the end of their line, in points, where two ends are close
    ("tiny", False): ("tiny base, in memory", -10),
    ("tiny", True): ("tiny base, mapped", 0),
    ("smollm2", False): ("SmolLM2-135M, in memory", 7),
    ("smollm2", True): ("SmolLM2-135M, mapped", -5),
}
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


def measure(base: str, counts: Sequence[int], mapped: bool, done: Callable[[], object] = lambda: None) -> list[Many]:
    """Add as many adapters to a base as the counts say, one after the other: once for memory, once more for seconds,
    since counting bytes takes time.

    mapped: they stay in their file. done: called twice for each count.
    """
    with TemporaryDirectory() as scratch, _files(max(counts) if mapped else 0):
        model, _ = load(base)  # what is imported at first use belongs to no base
        known = sha256_of(base_state(model))
        add_adapter(model, CONFIG, "first")
        parameters, folder = count_parameters(model), save_adapter(model, Path(scratch), "first", base_sha256=known)
        del model

        def grown() -> Iterator[Llama]:
            model, _ = load(base)
            for i in range(max(counts)):
                load_adapter(model, folder, f"adapter-{i}", base_sha256=known, mapped=mapped)
                if i + 1 in counts:
                    gc.collect()
                    yield model
                    done()

        seconds = [_switch(model) for model in grown()]
        gc.collect()
        tracemalloc.start()
        try:
            held = [tracemalloc.get_traced_memory()[0] for _ in grown()]
        finally:
            tracemalloc.stop()
    numbers = [parameters.frozen + (0 if mapped else count * parameters.trainable) for count in counts]
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


@contextmanager
def _files(count: int) -> Iterator[None]:
    """Room for so many open files more, where the system limits them: each mapped adapter keeps one open."""
    try:
        import resource
    except ImportError:  # not on Windows, which has no such limit
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if resource.RLIM_INFINITY != before[1] < wanted:
        wanted = before[1]
    if before[0] != resource.RLIM_INFINITY and before[0] < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def turns(counts: Mapping[str, Sequence[int]] | None = None) -> int:
    """How many turns `draw` takes, for a progress bar."""
    return 4 * sum(map(len, (_here() if counts is None else counts).values()))


def draw(
    folder: Path, counts: Mapping[str, Sequence[int]] | None = None, done: Callable[[], object] = lambda: None
) -> Iterator[Path]:
    """Measure, and draw `growth-many.png` in `folder` and one for dark pages; yield each when it is there.

    counts: by base, how many adapters; a thousand on tiny, and 32 on SmolLM2 where it is on this machine, if left out.
    done: called `turns(counts)` times.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series = {
        (base, mapped): measure(base, each, mapped, done)
        for base, each in (_here() if counts is None else counts).items()
        for mapped in (False, True)
    }
    yield from save_themes(lambda: _drawn(series), folder / "growth-many.png")


def _here() -> dict[str, Sequence[int]]:
    return {name: each for name, each in COUNTS.items() if find(name) is not None}


def _drawn(series: Mapping[tuple[str, bool], Sequence[Many]]) -> Any:
    figure, (left, right) = panels(2, width=10, height=4)
    most = max(each[-1].adapters for each in series.values())
    for (base, mapped), found in series.items():
        x = [one.adapters for one in found]
        fill = "none" if mapped else LORA
        for axes, y in ((left, [one.held_bytes / 1e6 for one in found]), (right, [1e3 * one.seconds for one in found])):
            axes.plot(x, y, color=LORA, linewidth=0, marker=MARKERS[base], markerfacecolor=fill)
        left.plot(x, [one.predicted_bytes / 1e6 for one in found], color=LORA, linewidth=1.2, linestyle="--")
        words = {"textcoords": "offset points", "va": "center", "color": ink(LORA)}
        text, lift = NAMES[base, mapped]
        left.annotate(text, (x[-1], found[-1].held_bytes / 1e6), (8, lift), **words)
        if not mapped:
            right.annotate(text.partition(",")[0], (x[-1], 1e3 * found[-1].seconds), (8, 0), **words)
    left.set(title="Memory; dashed: predicted from shapes", ylabel="held (MB)", yscale="log")
    right.set(title="Switching from one adapter to another", ylabel="time of a switch (ms)")
    right.set_ylim(0, 1.3e3 * max(one.seconds for found in series.values() for one in found))
    for axes in (left, right):
        axes.set(xlabel="adapters of r = 8 beside one base", xscale="log", xlim=(0.8, 12 * most))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    left.yaxis.set_major_formatter("{x:,.0f}")
    return figure
