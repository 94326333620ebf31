"""Lesson 18's exercises: an adapter that fits a machine, and the table of a run from what it wrote down."""

from __future__ import annotations

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


def in_memory(shapes: Shapes, tied: bool) -> int:
    """Numbers of the base, the table that embedding and head share counted once."""
    return numbers(shapes) - (math.prod(shapes[HEAD]) if tied else 0)


def draw_machine(rng: np.random.Generator, tied: bool, frozen_bytes: float, ranks: tuple[int, int]) -> Draw:
    """A machine in which a rank of this range fits over a base of so many bytes a number, and a little is left over."""
    shapes, r = listed(rng), int(rng.integers(*ranks))
    activations = int(rng.integers(60, 120)) * 1_000_000
    held = frozen_bytes * in_memory(shapes, tied) + 16 * (r + 0.5) * ends(shapes) + activations
    return Draw(shapes=shapes, tied=tied, gib=held / GIB, activations=activations)


@exercise(
    "18.1",
    draw=[
        partial(draw_machine, tied=True, frozen_bytes=4, ranks=(45, 60)),
        partial(draw_machine, tied=False, frozen_bytes=5 / 8, ranks=(20, 40)),
        partial(draw_machine, tied=False, frozen_bytes=4, ranks=(3, 6)),
        partial(draw_machine, tied=True, frozen_bytes=4, ranks=(280, 320)),
    ],
    smallest=partial(draw_machine, tied=True, frozen_bytes=0.4, ranks=(0, 1)),
    returns="r, alpha, quantized",
    tolerance=0,
    mistakes="""
        a GiB has 2**30 bytes: you counted GB, of 10**9, which are 7 % fewer
            2**30 -> 10**9
        the activations are missing: they need memory at the same time
            - activations ->
        the adapter's memory is left out: each of its parameters takes 16 bytes
            math.floor(room / one_rank) -> 256 * (room >= 0)
        you count the adapter's weights alone: with gradient and optimizer state a parameter takes 16 bytes, not 4
            16 * -> 4 *
        the optimizer state is missing, Adam's two moments: 16 bytes per trainable parameter, not 8
            16 * -> 8 *
        one array is missing: 16 bytes per trainable parameter, not 12
            16 * -> 12 *
        the embedding is counted twice: where `tied` is true, head and embedding are one table in memory
            if not (tied and name == "lm_head.weight") ->
        where `tied` is false, the head is a separate table, in memory in addition to the embedding
            tied and name -> name
        the base is more than its linear layers: embedding and norms need memory, too
            not (tied and name == "lm_head.weight") -> "_proj" in name
        the base is frozen: it has neither gradients nor optimizer state
            (5 / 8 if quantized else 4) -> 16
        alpha stays at 16 while r changes, and the scale with it: alpha / r must be 2 for every r
            2 * r -> 16
        alpha = r makes the scale 1: alpha / r must be 2
            2 * r -> r
        that is the scale: alpha divided by r is the scale
            2 * r -> 2
        where r = 8 does not fit with a base in float32, quantise the base: a parameter then takes 5 bits
            (False, True) -> (False,)
        the base is quantised although r = 8 or more fits with float32: dequantising takes time
            (False, True) -> (True,)
        a quantised parameter takes 5 bits and not 4: each block also has a scale and a minimum
            5 / 8 -> 1 / 2
        rounded up, it does not fit: round down
            math.floor -> math.ceil
        r is at most 256, however large the machine
            min(256, math.floor(room / one_rank)) -> math.floor(room / one_rank)
    """,
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
        "the scale alpha / r is 2. Our": "the scale alpha / r is 4. Our",
        "min(256, ": "min(128, ",
        "return r, 2 * r, quantized": "return r, 4 * r, quantized",
    },
    "the scale and the highest rank",
    lines={
        "256": "128",
        "alpha / r must be 2": "alpha / r must be 4",
        "        2 * r -> 16": "4 * r -> 16",
        "2 * r -> r": "4 * r -> r",
        "2 * r -> 2": "4 * r -> 4",
        "2 * r -> 16": "4 * r -> 16",
    },
)


# -- 18.2 --------------------------------------------------------------------------------------------------------------


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


@exercise(
    "18.2",
    draw=[partial(draw_run, method="lora"), partial(draw_run, method="full")],
    returns="updated, memory, disk, dollars, change",
    mistakes="""
        the adapter is missing in the total: while it trains, the model has base_parameters and the adapter's
            + (run["trained_parameters"] if lora else 0) ->
        full fine-tuning trains the base itself: there is no adapter to add
            (run["trained_parameters"] if lora else 0) -> run["trained_parameters"]
        in percent: times 100
            updated = 100 * -> updated =
        that is how many times fewer are trained: return the percentage that is trained
            100 * run["trained_parameters"] / total -> run["base_parameters"] / run["trained_parameters"]
        a GB has 10**9 bytes: you divided by 2**30, which gives GiB
            run["peak_bytes"] / 1e9 -> run["peak_bytes"] / 2**30
        that is MB: a GB has 10**9 bytes
            run["peak_bytes"] / 1e9 -> run["peak_bytes"] / 1e6
        a GB has 10**9 bytes: these are GiB, of 2**30
            if lora else 0)) / 1e9 -> if lora else 0)) / 2**30
        the base is left out: an adapter is useless without it, and the base is needed once
            + (run["base_bytes"] if lora else 0) ->
        all adapters share one base: it is needed once, not once per adapter
            (run["base_bytes"] if -> (versions * run["base_bytes"] if
        a version of full fine-tuning is a whole model: it needs no base in addition
            (run["base_bytes"] if lora else 0) -> run["base_bytes"]
        that is one version: `versions` of them are kept
            versions * run -> run
        the price is for one core and hour: multiply by `cores`
            * run["cores"] ->
        the search for a learning rate is left out, but it costs money, too
            (run["search_seconds"] + run["seconds"]) -> run["seconds"]
        those are core minutes: an hour has 3,600 seconds
            / 3600 -> / 60
        the price is per hour, and you used it per second: divide by 3,600
            / 3600 ->
        in dollars, not in cents
            dollars = price -> dollars = 100 * price
        in percent of the loss before: you divided by the loss after
            / before -> / after
        the sign: after minus before, so that a loss that fell has a negative change
            after - before -> before - after
        that is the change in nats: return it in percent of the loss before
            100 * (after - before) / before -> after - before
        that is how much of the loss is left: return by how much it changed
            (after - before) / before -> after / before
    """,
)
def table_from_metrics(run, versions, price):
    """run: a dictionary; versions: how many are kept; price: dollars per core and hour
    -> updated, memory, disk, dollars, change"""
    lora = run["method"] == "lora"
    total = run["base_parameters"] + (run["trained_parameters"] if lora else 0)
    updated = 100 * run["trained_parameters"] / total
    memory = run["peak_bytes"] / 1e9
    disk = (versions * run["version_bytes"] + (run["base_bytes"] if lora else 0)) / 1e9
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
