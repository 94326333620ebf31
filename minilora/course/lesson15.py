"""Lesson 15's exercises: codes and scales of blocks, levels from quantiles, and QLoRA's backward pass."""

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
)
def normal_levels(bits):
    """bits -> levels (2**bits) in float64, from -1 to 1"""
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
    r = int(rng.choice([2, 5])) if r is None else r  # never the number of blocks
    sizes = distinct_sizes("Tm", rng, 13, 26)  # n: 9 to 12, or 27 on
    sizes |= {"n": blocks * block, "n / block": blocks, "r": r}
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


variant("qlora_backward", {"alpha / r": "alpha / r**0.5"}, "the scale is that of rsLoRA")
