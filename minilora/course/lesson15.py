"""Lesson 15's exercises: codes and scales of blocks, levels from quantiles, and QLoRA's backward pass."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from .exercises import Draw, arrays, distinct_sizes, exercise, variant

# -- 15.1 codes and scales ---------------------------------------------------------------------------------------------


def draw_weights(rng: np.random.Generator, blocks: int | None = None) -> Draw:
    """Weights whose blocks differ in size, and none of which lies between two codes to the last bit."""
    block = int(rng.choice([16, 32]))
    m, count = (int(rng.integers(20, 30)), int(rng.integers(5, 9))) if blocks is None else (1, blocks)
    w = rng.standard_normal((m, count, block)) * rng.uniform(0.2, 3, (m, count, 1))
    x = w / (np.abs(w).max(axis=-1, keepdims=True) / 7).astype(np.float16)
    between = np.abs(x - np.floor(x) - 0.5) < 1e-4
    n = count * block
    W = np.where(between, 0.99 * w, w).astype(np.float32).reshape(m, n)
    return Draw({"m": m, "n": n, "n / block": count, "n / 2": n // 2}, W=W, block=block)


@exercise(
    "15.1",
    draw=draw_weights,
    smallest=lambda rng: draw_weights(rng, 1),
    returns="scales (m, n / block), packed (m, n / 2)",
    mistakes="""
        one scale for the whole matrix: each block has its own
            np.abs(blocks).max(axis=-1) -> np.full(blocks.shape[:2], np.abs(blocks).max())
        one scale for each row: each block of a row has its own
            np.abs(blocks).max(axis=-1) -> np.abs(blocks).max(axis=(1, 2))[:, None] + 0 * blocks[..., 0]
        the largest weight without its sign decides the scale: a block may reach farther below zero than above
            np.abs(blocks).max(axis=-1) -> blocks.max(axis=-1)
        that is max - min over 15 steps; here the scale is the largest magnitude over 7
            np.abs(blocks).max(axis=-1) / 7 -> (blocks.max(axis=-1) - blocks.min(axis=-1)) / 15
        the largest magnitude is 7 steps, not 8: rounded, 8 would become a code of 16, which has no place in 4 bits
            / 7 -> / 8
        the largest magnitude is 7 steps, not 15: codes have a sign
            / 7 -> / 15
        the scale is missing its division by 7: absmax itself is seven steps
            / 7 -> / 1
        scales are stored in float16
            .astype(np.float16) ->
        the codes belong to the stored scale: round it to float16 first, then divide by it
            blocks / scales[..., None] -> blocks / (np.abs(blocks).max(axis=-1, keepdims=True) / 7)
        round to the nearest code, not toward zero
            np.rint(blocks / scales[..., None]) -> np.trunc(blocks / scales[..., None])
        round to the nearest code, not down
            np.rint(blocks / scales[..., None]) -> np.floor(blocks / scales[..., None])
        the sign is lost: 8 is added to the signed code, not to its magnitude
            np.rint(blocks / scales[..., None]) -> np.rint(np.abs(blocks) / scales[..., None])
        a code is stored plus 8: zero is 8, not 7
            + 8 -> + 7
        a code is stored plus 8, so that it is never negative
            + 8).astype(np.uint8) -> % 16).astype(np.uint8)
        the two halves of a byte are swapped
            codes[:, 0::2] << 4 | codes[:, 1::2] -> codes[:, 1::2] << 4 | codes[:, 0::2]
        a byte holds two consecutive values, not values 16 apart as in llama.cpp
            return -> codes = codes.reshape(len(W), -1, 2, block // 2).swapaxes(2, 3).reshape(W.shape); return
        packed and scales are swapped: `return scales, packed`, in this order
            return scales, codes[:, 0::2] << 4 | codes[:, 1::2] -> return codes[:, 0::2] << 4 | codes[:, 1::2], scales
    """,
)
def quantize_int4(W, block):
    """W (m, n) float32, block divides n -> scales (m, n / block) float16, packed (m, n / 2) uint8"""
    blocks = W.reshape(len(W), -1, block)
    scales = (np.abs(blocks).max(axis=-1) / 7).astype(np.float16)
    codes = (np.rint(blocks / scales[..., None]) + 8).astype(np.uint8).reshape(W.shape)
    return scales, codes[:, 0::2] << 4 | codes[:, 1::2]


variant(
    "quantize_int4",
    {
        "value 2i in its high half and value 2i + 1 in its low half": (
            "value 2i in its low half and value 2i + 1 in its high half"
        ),
        "codes[:, 0::2] << 4 | codes[:, 1::2]": "codes[:, 1::2] << 4 | codes[:, 0::2]",
        "the byte 26": "the byte 161",
    },
    "the first of two codes is in the low half of a byte",
)


# -- 15.2 levels from quantiles ----------------------------------------------------------------------------------------


@exercise(
    "15.2",
    draw=lambda rng: Draw(bits=int(rng.integers(3, 7))),
    smallest=lambda rng: Draw(bits=2),
    returns="levels (2**bits)",
    mistakes="""
        those levels have equal steps: take quantiles, `inv_cdf`, at equal steps of probability
            levels / levels.max() -> np.concatenate([np.linspace(-1, 0, half), np.linspace(0, 1, half + 1)[1:]])
        the outermost level is 1: divide by the largest
            levels / levels.max() -> levels
        that is as many levels above zero as below, and no zero
            np.linspace(last, 0.5, half) -> np.linspace(last, 0.5, half + 1)[:-1]
        zero is there twice: both halves contain it, and one of the two leaves it out
            np.linspace(0.5, last, half + 1)[1:] -> np.linspace(0.5, last, half)
        the additional level is above zero, not below
            return levels / -> return -levels[::-1] /
        `last` is the mean of the two: you took the first, 1 - 1 / (2 (2**bits - 1))
            (1 / (2 * half - 1) + 1 / (2 * half)) / 4 -> 1 / (2 * half - 1) / 2
        `last` is the mean of the two: you took the second, 1 - 1 / (2 · 2**bits)
            (1 / (2 * half - 1) + 1 / (2 * half)) / 4 -> 1 / (2 * half) / 2
        levels rise, from -1 to 1
            return levels / -> return levels[::-1] /
        those are 16 levels, whatever bits is: there are 2**bits
            2 ** (bits - 1) -> 8
        that is the density, `pdf`: a level is a quantile, `inv_cdf`
            np.vectorize(NormalDist().inv_cdf) -> np.vectorize(NormalDist().pdf)
        the levels below zero are missing their sign
            below = -quantile -> below = quantile
    """,
)
def normal_levels(bits):
    """bits -> levels (2**bits), from -1 to 1"""
    half = 2 ** (bits - 1)
    last = 1 - (1 / (2 * half - 1) + 1 / (2 * half)) / 4
    quantile = np.vectorize(NormalDist().inv_cdf)
    below = -quantile(np.linspace(last, 0.5, half))
    above = quantile(np.linspace(0.5, last, half + 1)[1:])
    levels = np.concatenate([below, above])
    return levels / levels.max()


variant(
    "normal_levels",
    {
        "one level more above zero than below": "one level more below zero than above",
        "np.concatenate([below, above])": "-np.concatenate([below, above])[::-1]",
    },
    "the additional level is below zero",
    lines={"is above zero, not below": "is below zero, not above"},
)


# -- 15.3 QLoRA's backward pass ----------------------------------------------------------------------------------------


def draw_layer(rng: np.random.Generator, blocks: int | None = None, r: int | None = None) -> Draw:
    """A layer with a quantised W: codes, scales and levels, and an adapter."""
    blocks, block = int(rng.integers(3, 5)) if blocks is None else blocks, int(rng.integers(9, 12))
    r = int(rng.integers(2, 6)) if r is None else r
    sizes = distinct_sizes("Tm", rng, 13, 26) | {
        "n": blocks * block,
        "n / block": blocks,
        "r": r,
    }  # n: 9 to 12, or 27 on
    drawn = arrays(rng, sizes, x="T n", A="r n", B="m r", g="T m")
    codes = rng.integers(0, 16, (sizes["m"], sizes["n"]))
    scales = rng.uniform(0.5, 2, (sizes["m"], blocks))
    levels = np.sort(rng.uniform(-1, 1, 16))
    alpha = int(rng.choice([29, 31, 37, 41, 43, 47]))  # primes above every r²: all scales of LoRA differ
    quantised = {"codes": codes, "scales": scales, "levels": levels}
    return Draw(sizes, x=drawn["x"], **quantised, A=drawn["A"], B=drawn["B"], g=drawn["g"], alpha=alpha)


@exercise(
    "15.3",
    draw=draw_layer,
    smallest=lambda rng: draw_layer(rng, blocks=1, r=1),
    returns="dx (T, n), dA (r, n), dB (m, r)",
    by_hand=True,
    mistakes="""
        dx: those are the codes; W is levels[codes], times the scale of each block
            levels[codes] * np.repeat(scales, block, axis=1) -> codes
        dx: those are the codes times the scales; a code is an index into `levels`
            levels[codes] -> codes
        dx: the scales are missing: W is levels[codes], times the scale of each block
            * np.repeat(scales, block, axis=1) ->
        dx: a scale belongs to `block` consecutive weights: np.repeat, not np.tile
            np.repeat(scales, block, axis=1) -> np.tile(scales, block)
        dx: each block has its own scale, and you take one for each row
            np.repeat(scales, block, axis=1) -> scales[:, :1]
        dx: dequantising multiplies by the scale
            levels[codes] * -> levels[codes] /
        dx: W is frozen, but g goes through it to the layers below: g W is missing
            dx = g @ W + -> dx =
        dx: the path through A and B is missing
            + du @ A ->
        the scale alpha / r is missing: it is in y, so it is in the gradients
            alpha / r -> 1
        scale is alpha / r, not alpha
            alpha / r -> alpha
        scale is alpha / r, not alpha / sqrt(r), which is rsLoRA's
            alpha / r -> alpha / r**0.5
        the scale occurs once, not twice
            du.T @ x -> scale * du.T @ x
        W gets no gradient, nor do codes and scales: `return dx, dA, dB`
            return dx, dA, dB -> return dx, g.T @ x, dA, dB
        dA has the shape of W: that is gᵀ x, the gradient of W; A receives g through B, as g B
            du.T @ x -> g.T @ x
        dB has the shape of W: that is gᵀ x, the gradient of W; B receives x through A, as x Aᵀ
            scale * (g.T @ (x @ A.T)) -> g.T @ x
        dA and dB are swapped: `return dx, dA, dB`, in this order
            return dx, dA, dB -> return dx, dB, dA
        the sign is wrong: the gradient points uphill, and the optimizer subtracts it
            -> g = -g
    """,
)
def qlora_backward(x, codes, scales, levels, A, B, g, alpha):
    """codes (m, n), scales (m, n / block), levels (16), the rest as in 9.2 -> dx (T, n), dA (r, n), dB (m, r)"""
    r, block = len(A), codes.shape[1] // scales.shape[1]
    W = levels[codes] * np.repeat(scales, block, axis=1)
    scale = alpha / r
    du = scale * (g @ B)
    dx = g @ W + du @ A
    dA = du.T @ x
    dB = scale * (g.T @ (x @ A.T))
    return dx, dA, dB


variant(
    "qlora_backward",
    {"alpha / r": "alpha / r**0.5"},
    "the scale is that of rsLoRA",
)
