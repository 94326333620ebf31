"""Lesson 14's exercises: what layers keep, how much they compute, and where the saving ends."""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from .exercises import Draw, exercise, variant
from .lesson13 import draw_shapes, training_memory

# -- 14.1 --------------------------------------------------------------------------------------------------------------


def draw_layers(rng: np.random.Generator, r: int | None) -> Draw:
    """A block like a Llama's, whose sizes are all different, in another order each time."""
    C, keys, F = 24 + int(rng.integers(8)), 13 + int(rng.integers(5)), 53 + int(rng.integers(20))
    heads = C + 9 + int(rng.integers(4))
    layers = [("x", heads, C), ("x", keys, C), ("x", keys, C), ("heads", C, heads)]
    layers += [("y", F, C), ("y", F, C), ("active", C, F)]
    return Draw(layers=[layers[i] for i in rng.permutation(len(layers))], T=int(rng.integers(70, 120)), r=r)


@exercise(
    "14.1",
    draw=[
        lambda rng: draw_layers(rng, int(rng.integers(3, 9))),
        lambda rng: draw_layers(rng, None),
        lambda rng: draw_layers(rng, 0),
    ],
    returns="the bytes",
    tolerance=0,
    mistakes="""
        LoRA: x is missing; dA is (g B)ᵀ x times the scale, so A needs the x that W does not
            sum(inputs.values()) -> (0 if r else sum(inputs.values()))
        LoRA: u = x Aᵀ is missing; dB needs it, r numbers per token and layer
            + (r or 0) * len(layers) ->
        LoRA: every layer has its own A and so its own u, even where layers read the same x
            len(layers) -> len(inputs)
        layers that read the same array save it once: q, k and v share one x
            {name: n for name, m, n in layers} -> {i: n for i, (_, _, n) in enumerate(layers)}
        r = 0: these layers have no trainable parameters, so dW is not needed, and x is not saved
            return 0 -> pass
        a linear layer saves its input, n numbers per token, and not its output: y is in no gradient of it
            {name: n for name, m, n in layers} -> {i: m for i, (_, m, _) in enumerate(layers)}
        the outputs are not saved: neither dx = g W nor dW = gᵀ x needs y
            sum(inputs.values()) -> sum(inputs.values()) + sum(m for _, m, _ in layers)
        LoRA: u is x Aᵀ, r numbers per token and layer; its product with Bᵀ is not saved
            (r or 0) * len(layers) -> (sum(m for _, m, _ in layers) if r else 0)
        those are the matrices: activations have a row for each token
            -> return 4 * sum(m * n for _, m, n in layers)
        that is the number of elements saved: a float32 takes 4 bytes
            return 4 * -> return
        a float32 takes 4 bytes, not 2
            return 4 * -> return 2 *
        a float32 takes 4 bytes, not 8
            return 4 * -> return 8 *
        that is for one token: there are T of them
            4 * T * -> 4 *
    """,
)
def kept_bytes(layers, T, r=None):
    """layers: a list of (name of the input, m, n), T: tokens, r: the rank or None -> bytes of activations"""
    if r == 0:
        return 0
    inputs = {name: n for name, m, n in layers}
    return 4 * T * (sum(inputs.values()) + (r or 0) * len(layers))


variant(
    "kept_bytes",
    {
        "for the backward pass, in float32, for T tokens:": "for the backward pass, in bfloat16, for T tokens:",
        "the answer is 2,560 bytes with": "the answer is 1,280 bytes with",
        "return 4 * T": "return 2 * T",
    },
    "activations take 16 bits",
    lines={
        "return 4 * -> return 2 *": "return 2 * -> return 4 *",
        "return 4 * ->": "return 2 * ->",
        "4 * T * -> 4 *": "2 * T * -> 2 *",
        "return 4 * sum": "return 2 * sum",
        "a float32 takes 4 bytes, not 2": "a bfloat16 takes 2 bytes, not 4",
        "a float32 takes 4 bytes": "a bfloat16 takes 2 bytes",
    },
)


# -- 14.2 --------------------------------------------------------------------------------------------------------------


def draw_matrix(rng: np.random.Generator, r: int | None, lowest: bool) -> Draw:
    """A matrix that is not square."""
    m, n = int(rng.integers(100, 200)), int(rng.integers(300, 400))
    if rng.integers(2):
        m, n = n, m
    return Draw(m=m, n=n, r=r, lowest=lowest)


@exercise(
    "14.2",
    draw=[
        lambda rng: draw_matrix(rng, int(rng.integers(3, 20)), False),
        lambda rng: draw_matrix(rng, None, False),
        lambda rng: draw_matrix(rng, int(rng.integers(3, 20)), True),
        lambda rng: draw_matrix(rng, None, True),
    ],
    smallest=lambda rng: draw_matrix(rng, 0, True),
    returns="the count",
    tolerance=0,
    mistakes="""
        dx is missing: the layers below need g W, and du A
            (2 if lowest else 3) * m -> 2 * m
            (1 if lowest else 2) -> 1
            (2 if lowest else 3) * r -> 2 * r
        LoRA: dx needs W, too: g W is a large matmul, and freezing does not avoid it
            (1 if lowest else 2) -> 1
        LoRA: dx needs A, too: du A is one more small matmul
            (2 if lowest else 3) * r -> 2 * r
        that is the forward pass alone: the backward pass has its own matmuls
            -> return m * n + (r or 0) * (m + n)
        LoRA: W is frozen, so gᵀ x is never computed
            (1 if lowest else 2) -> (2 if lowest else 3)
        LoRA: the matmuls with A and B are missing, and their gradients
            large + down + up -> large
        LoRA: A and B have matmuls in the backward pass, too: g B, duᵀ x, gᵀ u, and du A
            (2 if lowest else 3) * r -> r
            3 * r * m -> r * m
        LoRA: the forward pass has two small matmuls, x Aᵀ and u Bᵀ
            (2 if lowest else 3) * r -> (1 if lowest else 2) * r
            3 * r * m -> 2 * r * m
        LoRA: 6 r n is right where W is square and dx is needed: A has r n parameters and B has m r
            large + down + up -> large + 6 * r * n
        lowest: dx is not needed, so neither g W nor du A is computed
            -> lowest = False
        lowest, LoRA: du A is a part of dx, which is not needed
            (2 if lowest else 3) * r -> 3 * r
        lowest, LoRA: g B is still needed, since dA is made from it
            3 * r * m -> (2 if lowest else 3) * r * m
        LoRA: B A is never formed
            down + up -> down + up + m * n * r
        count multiplications only, not additions (MACs, not FLOPs)
            return (2 if -> return 2 * (2 if
            return large + down + up -> return 2 * (large + down + up)
    """,
)
def step_products(m, n, r=None, lowest=False):
    """W (m, n), the rank r or None, lowest: dx is not needed -> MACs per token, forward and backward"""
    if r is None:
        return (2 if lowest else 3) * m * n
    large = (1 if lowest else 2) * m * n  # x Wᵀ, g W
    down = (2 if lowest else 3) * r * n  # x Aᵀ, duᵀ x, du A
    up = 3 * r * m  # u Bᵀ, g B, gᵀ u
    return large + down + up


variant(
    "step_products",
    {
        "Count the multiply-accumulate operations (MACs) in": "Count the floating-point operations (FLOPs) in",
        "takes a b c MACs.": "takes 2 a b c FLOPs: a multiplication and an addition each.",
        "MACs per token": "FLOPs per token",
        "return (2 if lowest else 3) * m * n": "return 2 * (2 if lowest else 3) * m * n",
        "return large + down + up": "return 2 * (large + down + up)",
    },
    "additions are counted, too",
    lines={
        "count multiplications only, not additions (MACs, not FLOPs)": "count additions, too (FLOPs, not MACs)",
        "return (2 if -> return 2 * (2 if": "return 2 * (2 if -> return (2 if",
        "-> return 2 * (2 * (large + down + up))": "-> return large + down + up",
        "return m * n + (r or 0) * (m + n)": "return 2 * (m * n + (r or 0) * (m + n))",
    },
)


# -- 14.3 --------------------------------------------------------------------------------------------------------------


def draw_text(rng: np.random.Generator, at_once: bool = False, frozen_bytes: int = 4) -> Draw:
    """A model, its activations, and a factor between that of no tokens and that of many; or one that holds at once."""
    r = int(rng.integers(2, 5))
    whole = draw_shapes(rng, bool(rng.integers(2)))
    shapes = {name: shape for name, shape in whole.items() if "mlp" not in name}  # 13.2 is alike in all its variants
    kept_full, kept_lora = int(rng.integers(400, 460)), int(rng.integers(470, 560))
    most = training_memory(shapes) / training_memory(shapes, r, frozen_bytes)
    factor = most + 0.5 if at_once else 1 + (0.3 + 0.4 * rng.random()) * (most - 1)
    return Draw(shapes=shapes, r=r, kept_full=kept_full, kept_lora=kept_lora, factor=round(float(factor), 3))


@exercise(
    "14.3",
    draw=[draw_text, draw_text, partial(draw_text, at_once=True)],
    returns="the number of tokens",
    tolerance=0,
    mistakes="""
        full fine-tuning has activations, too: they grow with the text on both sides
            kept_lora - kept_full -> kept_lora
        LoRA's activations are `kept_lora` for each token, and you take those of full fine-tuning for both
            -> kept_lora = kept_full
        full fine-tuning's activations are `kept_full` for each token, and you take LoRA's for both
            -> kept_full = kept_lora
        kept_full and kept_lora are swapped
            -> kept_full, kept_lora = kept_lora, kept_full
        LoRA: that is the frozen base alone; the adapter is missing: training_memory(shapes, r)
            training_memory(shapes, r) -> training_memory(shapes, 0)
        full fine-tuning: gradients and optimizer state are missing: training_memory(shapes) has them
            training_memory(shapes), -> training_memory(shapes, 0),
        rounded down, LoRA still takes more than `factor` times less: round up
            math.ceil -> math.floor
        a number of tokens is whole: round up
            math.ceil -> float
        one less is enough already
            math.ceil( -> 2 + math.floor(
        where the factor is that small for one token already, the answer is 1
            max(1, math.ceil( -> (math.ceil(
        a text has at least one token: the answer is 1, not 0
            max(1 -> max(0
    """,
)
def tokens_until(shapes, r, kept_full, kept_lora, factor):
    """shapes: a dictionary of name -> shape, r: the rank, kept: bytes per token -> the smallest T"""
    full, lora = training_memory(shapes), training_memory(shapes, r)
    return max(1, math.ceil((full - factor * lora) / (factor * kept_lora - kept_full)))


HALF = "training_memory(shapes, r, frozen_bytes=2)"
variant(
    "tokens_until",
    {
        "LoRA holds `training_memory(shapes, r)` and its": f"LoRA holds\n`{HALF}` and its",
        "training_memory(shapes), training_memory(shapes, r)": f"training_memory(shapes), {HALF}",
    },
    "LoRA's base takes 16 bits",
    draw=[partial(draw_text, frozen_bytes=2, at_once=at_once) for at_once in (False, False, True)],
    lines={
        "training_memory(shapes, r)": HALF,
        "training_memory(shapes, 0)": "training_memory(shapes, 0, frozen_bytes=2)",
        "(shapes), -> training_memory(shapes, 0, frozen_bytes=2),": "(shapes), -> training_memory(shapes, 0),",
    },
)
