"""Lesson 15's exercises: an adapter that fits a machine, and the table of a run from what it wrote down."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .exercises import Draw, exercise
from .lesson11 import Shapes, ends, numbers

HEAD = "lm_head.weight"
GIB = 2**30

# -- 15.1 --------------------------------------------------------------------------------------------------------------


def listed(rng: np.random.Generator) -> Shapes:
    """What the file of a small language model lists, its head included: a model of real size, of shapes alone."""
    C, keys = int(rng.choice([512, 576, 640, 768])), int(rng.choice([128, 192, 256]))
    F, vocabulary = 64 * int(rng.integers(22, 34)), int(rng.integers(38_000, 52_000))
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, C)}
    for i in range(int(rng.integers(18, 31))):
        block = f"model.layers.{i}."
        shapes |= {f"{block}input_layernorm.weight": (C,), f"{block}post_attention_layernorm.weight": (C,)}
        shapes |= {f"{block}self_attn.{name}_proj.weight": (C, C) for name in "qo"}
        shapes |= {f"{block}self_attn.{name}_proj.weight": (keys, C) for name in "kv"}
        shapes |= {f"{block}mlp.{name}_proj.weight": (F, C) for name in ("gate", "up")}
        shapes[f"{block}mlp.down_proj.weight"] = (C, F)
    return shapes | {"model.norm.weight": (C,), HEAD: (vocabulary, C)}


def in_memory(shapes: Shapes, tied: bool) -> int:
    """Numbers of the base, the table that embedding and head share counted once."""
    return numbers(shapes) - (math.prod(shapes[HEAD]) if tied else 0)


def draw_machine(rng: np.random.Generator, tied: bool, frozen_bytes: float, ranks: tuple[int, int]) -> Draw:
    """A machine in which a rank of this range fits over a base of so many bytes a number, and a little is left over."""
    shapes, r = listed(rng), int(rng.integers(*ranks))
    activations = int(rng.integers(60, 120)) * 1_000_000
    held = frozen_bytes * in_memory(shapes, tied) + 16 * (r + 0.5) * ends(shapes) + activations
    return Draw(shapes=shapes, tied=tied, gib=held / GIB, activations=activations)


def chosen(
    unit: float = GIB,
    arrays: float = 4,
    base: float = 4,
    packed_base: float = 5 / 8,
    beside: float = 1,
    most: float = 256,
    alpha: Callable[[int], float] = lambda r: 2 * r,
    numbers_of: Callable[[Shapes, bool], int] = in_memory,
    rounded: Callable[[float], int] = math.floor,
    ways: tuple[bool, ...] = (False, True),
) -> Callable:
    """The choice where something is left out, counted in another way, or fixed."""

    def answer(shapes: Shapes, tied: bool, gib: float, activations: int) -> tuple[int, float, bool]:
        r, packed = 0, False
        for packed in ways:
            room = gib * unit - beside * activations - (packed_base if packed else base) * numbers_of(shapes, tied)
            fits = rounded(room / (4 * arrays * ends(shapes))) if arrays else (10**6 if room >= 0 else 0)
            r = int(max(0, min(most, fits)))
            if r >= 8:
                break
        return r, alpha(r), packed

    return answer


@exercise(
    "15.1",
    draw=[
        partial(draw_machine, tied=True, frozen_bytes=4, ranks=(45, 60)),
        partial(draw_machine, tied=False, frozen_bytes=5 / 8, ranks=(20, 40)),
        partial(draw_machine, tied=False, frozen_bytes=4, ranks=(3, 6)),
        partial(draw_machine, tied=True, frozen_bytes=4, ranks=(280, 320)),
    ],
    smallest=partial(draw_machine, tied=True, frozen_bytes=0.4, ranks=(0, 1)),
    returns="r, alpha, packed",
    tolerance=0,
    decisive=["for packed in (False, True):", "math.floor(room / one_rank)"],
    mistakes={
        "GB for GiB": (chosen(unit=1e9), "a GiB has 2**30 bytes: you counted GB, of 10**9, which are 7 % fewer"),
        "no activations": (chosen(beside=0), "the activations are missing: they need memory at the same time"),
        "adapter left out": (
            chosen(arrays=0),
            "the adapter's own memory is left out: 16 bytes for each of its numbers, so a rank has a price",
        ),
        "weights alone": (
            chosen(arrays=1),
            "you count the adapter's weights alone: gradient and two moments make 16 bytes a number, not 4",
        ),
        "no moments": (chosen(arrays=2), "Adam's two moments are missing: 16 bytes for a number that learns, not 8"),
        "three arrays": (chosen(arrays=3), "one array is missing: 16 bytes for a number that learns, not 12"),
        "embedding twice": (
            chosen(numbers_of=lambda shapes, tied: numbers(shapes)),
            "the embedding is counted twice: where `tied` is true, head and embedding are one table in memory",
        ),
        "never a head": (
            chosen(numbers_of=lambda shapes, tied: in_memory(shapes, True)),
            "where `tied` is false, the head is a table of its own, and memory holds it beside the embedding",
        ),
        "no tables": (
            chosen(numbers_of=lambda shapes, tied: sum(math.prod(s) for name, s in shapes.items() if "_proj" in name)),
            "the base is more than its linear layers: embedding and norms need memory, too",
        ),
        "base learns": (chosen(base=16, packed_base=16), "the base is frozen: it has neither gradients nor moments"),
        "alpha stays at 16": (
            chosen(alpha=lambda r: 16),
            "alpha stays at 16 while r changes, and the scale with it: alpha / r must be 2 for every r",
        ),
        "alpha is r": (chosen(alpha=lambda r: r), "alpha = r makes the scale 1: alpha / r must be 2"),
        "alpha is the scale": (
            chosen(alpha=lambda r: 2),
            "that is the scale: alpha is what gives it when divided by r",
        ),
        "never packed": (
            chosen(ways=(False,)),
            "where r = 8 does not fit over a base in float32, pack the base: it takes 5 bits a number then",
        ),
        "always packed": (
            chosen(ways=(True,)),
            "the base is packed though r = 8 or more fits over float32: unpacking takes time",
        ),
        "half a byte": (
            chosen(packed_base=0.5),
            "a packed number takes 5 bits and not 4: each block has a scale and a minimum beside its codes",
        ),
        "rounded up": (chosen(rounded=math.ceil), "rounded up, it does not fit: round down"),
        "no end": (chosen(most=math.inf), "r is at most 256, however large the machine"),
    },
)
def choose_config(shapes: Shapes, tied: bool, gib: float, activations: int) -> tuple[int, float, bool]:
    """The largest rank up to 256 that fits, alpha for a scale of 2, and whether the base must be packed for it."""
    return chosen()(shapes, tied, gib, activations)


# -- 15.2 --------------------------------------------------------------------------------------------------------------

Run = dict[str, Any]


def draw_run(rng: np.random.Generator, method: str) -> Draw:
    """What a run of a small model wrote down, how many versions are kept, and a price."""
    P = int(rng.integers(100, 400)) * 1_000_000
    a = int(P * rng.uniform(0.01, 0.04))
    lora = method == "lora"
    before = float(rng.uniform(3, 4))
    run = {
        "method": method,
        "base_parameters": P,
        "trained_parameters": a if lora else P,
        "peak_bytes": int(P * rng.uniform(6, 9) if lora else P * rng.uniform(18, 22)),
        "base_bytes": 4 * P,
        "version_bytes": 4 * a + 53_000 if lora else 4 * P,
        "search_seconds": float(rng.uniform(100, 900)),
        "seconds": float(rng.uniform(200, 2000)),
        "cores": int(rng.integers(2, 9)),
        "loss": [before, before * float(rng.uniform(0.7, 0.9))],
    }
    return Draw(run=run, versions=int(rng.integers(3, 30)), price=float(rng.uniform(0.02, 0.2)))


def column(**other: Callable[[Run, int, float], float]) -> Callable:
    """The column of a run, with another way to come to some of its numbers."""

    def answer(run: Run, versions: int, price: float) -> tuple[float, ...]:
        return tuple(other.get(name, way)(run, versions, price) for name, way in RIGHT.items())

    return answer


def is_lora(run: Run) -> bool:
    """Was an adapter trained, beside a frozen base?"""
    return run["method"] == "lora"


def updated(run: Run, versions: int, price: float) -> float:
    """Percent of all numbers, the adapter's included."""
    total = run["base_parameters"] + (run["trained_parameters"] if is_lora(run) else 0)
    return 100 * run["trained_parameters"] / total


def bytes_kept(run: Run, versions: int, bases: float = 1) -> float:
    """Bytes of so many versions; with LoRA of the base, too."""
    return versions * run["version_bytes"] + (bases * run["base_bytes"] if is_lora(run) else 0)


def core_hours(run: Run) -> float:
    """Of search and run."""
    return run["cores"] * (run["search_seconds"] + run["seconds"]) / 3600


def change(run: Run, versions: int, price: float) -> float:
    """Of the loss, in percent of what it was."""
    before, after = run["loss"]
    return 100 * (after - before) / before


RIGHT: dict[str, Callable[[Run, int, float], float]] = {
    "updated": updated,
    "memory": lambda run, versions, price: run["peak_bytes"] / 1e9,
    "disk": lambda run, versions, price: bytes_kept(run, versions) / 1e9,
    "dollars": lambda run, versions, price: price * core_hours(run),
    "change": change,
}


@exercise(
    "15.2",
    draw=[partial(draw_run, method="lora"), partial(draw_run, method="full")],
    returns="updated, memory, disk, dollars, change",
    decisive=['(run["search_seconds"] + run["seconds"]) / 3600', 'versions * run["version_bytes"] +'],
    mistakes={
        "adapter left out": (
            column(updated=lambda run, v, p: 100 * run["trained_parameters"] / run["base_parameters"]),
            "the adapter is left out of the whole: while it trains, the model has base_parameters and the adapter's",
        ),
        "adapter counted for full": (
            column(
                updated=lambda run, v, p: (
                    100 * run["trained_parameters"] / (run["trained_parameters"] + run["base_parameters"])
                )
            ),
            "full fine-tuning trains the base itself: there is no adapter beside it to be counted",
        ),
        "a share": (column(updated=lambda *given: updated(*given) / 100), "in percent: times 100"),
        "times fewer": (
            column(updated=lambda run, v, p: run["base_parameters"] / run["trained_parameters"]),
            "that is how many times fewer learn: asked is how many percent of all learned",
        ),
        "GiB for GB": (
            column(memory=lambda run, v, p: run["peak_bytes"] / GIB),
            "a GB has 10**9 bytes: you divided by 2**30, which gives GiB",
        ),
        "MB for GB": (column(memory=lambda run, v, p: run["peak_bytes"] / 1e6), "that is MB: a GB has 10**9 bytes"),
        "disk in GiB": (
            column(disk=lambda run, v, p: bytes_kept(run, v) / GIB),
            "a GB has 10**9 bytes: these are GiB, of 2**30",
        ),
        "base left out": (
            column(disk=lambda run, v, p: bytes_kept(run, v, bases=0) / 1e9),
            "the base is left out: an adapter is worth nothing without it, and it is needed once",
        ),
        "a base for each": (
            column(disk=lambda run, v, p: bytes_kept(run, v, bases=v) / 1e9),
            "all adapters share one base: it is needed once, and not for each version",
        ),
        "base for full": (
            column(disk=lambda run, v, p: (v * run["version_bytes"] + run["base_bytes"]) / 1e9),
            "a version of full fine-tuning is a whole model: it needs no base beside it",
        ),
        "one version": (
            column(disk=lambda run, v, p: bytes_kept(run, 1) / 1e9),
            "that is one version: `versions` of them are kept",
        ),
        "cores forgotten": (
            column(dollars=lambda run, v, price: price * core_hours(run) / run["cores"]),
            "the price is for one core and hour: all `cores` were paid for",
        ),
        "search left out": (
            column(dollars=lambda run, v, price: price * run["cores"] * run["seconds"] / 3600),
            "the search for a learning rate is left out, and it was paid for, too",
        ),
        "minutes": (
            column(dollars=lambda run, v, price: 60 * price * core_hours(run)),
            "those are core minutes: an hour has 3,600 seconds",
        ),
        "seconds": (
            column(dollars=lambda run, v, price: 3600 * price * core_hours(run)),
            "the price is for an hour, and you took it for a second: divide by 3,600",
        ),
        "cents": (column(dollars=lambda run, v, price: 100 * price * core_hours(run)), "in dollars, not in cents"),
        "of what it is now": (
            column(change=lambda run, v, p: 100 * (run["loss"][1] - run["loss"][0]) / run["loss"][1]),
            "in percent of the loss before: you divided by the loss after",
        ),
        "gain": (
            column(change=lambda *given: -change(*given)),
            "the sign: after less before, so that a loss that fell has a change below zero",
        ),
        "in nats": (
            column(change=lambda run, v, p: run["loss"][1] - run["loss"][0]),
            "that is the change in nats: asked is how many percent of the loss before",
        ),
        "what is left": (
            column(change=lambda run, v, p: 100 * run["loss"][1] / run["loss"][0]),
            "that is how much of the loss is left: asked is by how much it changed",
        ),
    },
)
def table_from_metrics(run: Run, versions: int, price: float) -> tuple[float, ...]:
    """The column of a run: percent updated, GB of memory and of disk, dollars, change of the loss in percent."""
    return column()(run, versions, price)
