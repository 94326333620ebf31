"""Lesson 14's exercises: what layers keep, how much they compute, and where the saving ends."""

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
    returns="the number of bytes",
    tolerance=0,
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
        "return m * n + (r or 0) * (m + n)": "return 2 * (m * n + (r or 0) * (m + n))",
    },
)


# -- 14.3 --------------------------------------------------------------------------------------------------------------


def draw_text(rng: np.random.Generator, at_once: bool = False, frozen_bytes: int = 4) -> Draw:
    """A model, its activations, and a factor between that of no tokens and that of many, which is reached soon after a
    whole number of tokens; or a factor that holds at once.
    """
    r = int(rng.integers(2, 5))
    whole = draw_shapes(rng, bool(rng.integers(2)))
    shapes = {name: shape for name, shape in whole.items() if "mlp" not in name}  # 13.2 is alike in all its variants
    kept_full, kept_lora = int(rng.integers(400, 460)), int(rng.integers(470, 560))
    full, lora = training_memory(shapes), training_memory(shapes, r, frozen_bytes)
    most = full / lora
    factor = 1 + (0.3 + 0.4 * rng.random()) * (most - 1)
    T = int((full - factor * lora) / (factor * kept_lora - kept_full)) + 0.3
    factor = most + 0.5 if at_once else (full + T * kept_full) / (lora + T * kept_lora)
    return Draw(shapes=shapes, r=r, kept_full=kept_full, kept_lora=kept_lora, factor=round(float(factor), 6))


@exercise(
    "14.3",
    draw=[draw_text, draw_text, partial(draw_text, at_once=True)],
    returns="the number of tokens",
    tolerance=0,
)
def tokens_until(shapes, r, kept_full, kept_lora, factor):
    """shapes: a dictionary of name -> shape, r: the rank, kept: bytes per token -> the smallest T"""
    full, lora = training_memory(shapes), training_memory(shapes, r)
    return max(1, math.ceil((full - factor * lora) / (factor * kept_lora - kept_full)))


HALF = "training_memory(shapes, r, frozen_bytes=2)"
variant(
    "tokens_until",
    {
        "LoRA holds `training_memory(shapes, r)` and its": f"LoRA holds `{HALF}` and its",
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
