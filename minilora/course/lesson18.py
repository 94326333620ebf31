"""Lesson 18's exercises: an adapter that fits a machine, and the table of a run from what it wrote down."""

import math
from functools import partial

import numpy as np

from .exercises import Draw, exercise, variant
from .lesson13 import Shapes, ends, numbers

HEAD = "lm_head.weight"
GIB = 2**30

# -- 18.1 --------------------------------------------------------------------------------------------------------------


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


def draw_machine(
    rng: np.random.Generator, tied: bool, frozen_bytes: float, ranks: tuple[int, int], spare: float = 0.5
) -> Draw:
    """A machine in which a rank of this range fits, over a base with this many bytes a number.

    spare: how much of one rank more would fit. With nearly 1, whoever forgets the norms gets that rank.
    """
    shapes, r = listed(rng), int(rng.integers(*ranks))
    activations = int(rng.integers(60, 120)) * 1_000_000
    base = numbers(shapes) - (math.prod(shapes[HEAD]) if tied else 0)  # what embedding and head share counts once
    held = frozen_bytes * base + 16 * (r + spare) * ends(shapes) + activations
    return Draw(shapes=shapes, tied=tied, gib=held / GIB, activations=activations)


@exercise(
    "18.1",
    draw=[
        partial(draw_machine, tied=True, frozen_bytes=4, ranks=(45, 60)),
        partial(draw_machine, tied=False, frozen_bytes=5 / 8, ranks=(20, 40)),
        partial(draw_machine, tied=False, frozen_bytes=4, ranks=(7, 8)),
        partial(draw_machine, tied=True, frozen_bytes=4, ranks=(280, 320)),
        partial(draw_machine, tied=False, frozen_bytes=4, ranks=(8, 9)),
        partial(draw_machine, tied=True, frozen_bytes=4, ranks=(60, 80), spare=0.99),
    ],
    smallest=partial(draw_machine, tied=True, frozen_bytes=0.4, ranks=(0, 1)),
    returns="r, alpha, quantized",
    tolerance=0,
)
def choose_config(shapes, tied, gib, activations):
    """shapes: a dictionary of name -> shape; tied: is the head the embedding?; gib: GiB; activations: bytes
    -> r, alpha, quantized"""
    P = sum(math.prod(shape) for name, shape in shapes.items() if not (tied and name == "lm_head.weight"))
    one_rank = 16 * sum(sum(shape) for name, shape in shapes.items() if "_proj" in name)
    for quantized in (False, True):
        room = gib * 2**30 - activations - P * (5 / 8 if quantized else 4)
        r = max(0, min(256, math.floor(room / one_rank)))
        if r >= 8:
            break
    return r, 2 * r, quantized


variant(
    "choose_config",
    {
        "but at most 256;": "but at most 128;",
        "the scale alpha / r is 2; 0": "the scale alpha / r is 4; 0",
        "min(256, ": "min(128, ",
        "return r, 2 * r, quantized": "return r, 4 * r, quantized",
    },
    "the scale and the highest rank",
    lines={
        "256": "128",
        "alpha / r must be 2": "alpha / r must be 4",
        "2 * r -> r": "4 * r -> r",
        "2 * r -> 2": "4 * r -> 4",
        "2 * r -> 16": "4 * r -> 16",
    },
)


# -- 18.2 --------------------------------------------------------------------------------------------------------------


def draw_run(rng: np.random.Generator, method: str) -> Draw:
    """What a run of a small model wrote down, how many results are kept, and a price."""
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
        "result_bytes": 4 * a + 53_000 if lora else 4 * P,
        "search_seconds": float(rng.uniform(100, 900)),
        "seconds": float(rng.uniform(200, 2000)),
        "cores": int(rng.integers(2, 9)),
        "loss": [before, before * float(rng.uniform(0.7, 0.9))],
    }
    return Draw(run=run, count=int(rng.integers(3, 30)), price=float(rng.uniform(0.02, 0.2)))


@exercise(
    "18.2",
    draw=[partial(draw_run, method="lora"), partial(draw_run, method="full")],
    returns="updated, memory, disk, dollars, change",
)
def table_from_metrics(run, count, price):
    """run: a dictionary; count: how many results are kept; price: dollars per core and hour
    -> updated, memory, disk, dollars, change"""
    lora = run["method"] == "lora"
    total = run["base_parameters"] + (run["trained_parameters"] if lora else 0)
    updated = 100 * run["trained_parameters"] / total
    memory = run["peak_bytes"] / 1e9
    disk = (count * run["result_bytes"] + (run["base_bytes"] if lora else 0)) / 1e9
    hours = (run["search_seconds"] + run["seconds"]) / 3600
    dollars = price * run["cores"] * hours
    before, after = run["loss"]
    return updated, memory, disk, dollars, 100 * (after - before) / before


variant(
    "table_from_metrics",
    {
        "- `memory`: the peak in GB, of 10⁹ bytes.": "- `memory`: the peak in GiB, of 2³⁰ bytes.",
        "- `dollars`: the cost at `price` dollars per core and hour.": (
            "- `dollars`: the cost at `price` dollars per hour, for all cores together."
        ),
        "price: dollars per core and hour": "price: dollars per hour",
        'run["peak_bytes"] / 1e9': 'run["peak_bytes"] / 2**30',
        'price * run["cores"] * hours': "price * hours",
    },
    "the unit of memory, and what the price is for",
    lines={
        '/ 2**30 -> run["peak_bytes"] / 2**30': '/ 2**30 -> run["peak_bytes"] / 1e9',
        "a GB has 10**9 bytes: you divided by 2**30, which gives GiB": "a GiB has 2**30 bytes: you divided by 10**9",
        "that is MB: a GB has 10**9 bytes": "that is MB: a GiB has 2**30 bytes",
        '* run["cores"] ->': 'price * -> price * run["cores"] *',
        "the price is for one core and hour: multiply by `cores`": "the price is for all cores: do not multiply",
    },
)
