# %% [markdown]
# # Exercises 15: quantise by hand
#
# You write three functions that belong to [lesson 15](../15_how_few_bits.ipynb): a matrix as codes and scales in
# bytes, the levels of NF4 and of its relatives with fewer bits, and the backward pass of a layer whose W is quantised.
#
# **How it works.** Replace `raise NotImplementedError` with your own code, run the cell, then run the cell below it.
# It tries your function on random arrays and prints one line: `ok`, `not written yet`, or what is wrong.
#
# | name | shape | what it is |
# |---|---|---|
# | `W` | (m, n) | a matrix; a block is `block` consecutive values of a row |
# | `scales` | (m, n / block) | one for each block |
# | `codes` | (m, n) | for each value an integer |
# | `levels` | (2**bits) | what a code stands for, from -1 to 1 |
# | `x`, `g` | (T, n), (T, m) | the input of the layer, and ∂L/∂y |
# | `A`, `B`, `alpha` | (r, n), (m, r), a number | the adapter; its scale is alpha / r |

# %%
from statistics import NormalDist

import numpy as np

import minilora as ml

# %% [markdown]
# ## 15.1 Codes and scales
#
# Quantise W to INT4, block-wise, as bytes. The scale of a block is its largest magnitude divided by 7, stored in
# float16. A code is the nearest integer to value / *stored* scale, from -7 to 7. The code plus 8 is stored, which is
# never negative, and two codes share a byte: byte i of a row has value 2i in its high half and value 2i + 1 in its low
# half.
#
# An example with `block=2`: from the row (-3.5, 1.0) you get the scale 0.5 and the codes -7 and 2, stored as 1 and 10,
# which give the byte 26. No block consists of zeros alone.


# %% points=3
def quantize_int4(W, block):
    """W (m, n) float32, block divides n -> scales (m, n / block) float16, packed (m, n / 2) uint8"""


# %% [markdown]
# ## 15.2 Levels from quantiles
#
# NF4 has 16 levels. Build them for any number of bits, with QLoRA's rule:
#
# - There are 2**bits levels. Zero is one of them, and there is one level more above zero than below it.
# - The levels at and above zero are quantiles of the standard normal distribution, at probabilities with equal steps
#   from 0.5 to `last`. Those at and below zero are quantiles at equal steps from 1 - `last` to 0.5. (By symmetry, the
#   quantile at 1 - p is that at p with a minus.)
# - `last` is the mean of $1 - \frac{1}{2\,(2^{\text{bits}} - 1)}$ and $1 - \frac{1}{2 \cdot 2^{\text{bits}}}$, because
#   the quantile at 1 is infinite.
# - All are divided by the largest, so that the levels rise from -1 to 1.
#
# `NormalDist().inv_cdf(p)` is the quantile of one probability p.


# %% points=2
def normal_levels(bits):
    """bits -> levels (2**bits) in float64, from -1 to 1"""


# %% [markdown]
# ## 15.3 The backward pass of QLoRA
#
# A layer has a quantised W and an adapter: $y = x\,\tilde W^\top + s\,(x A^\top) B^\top$ with s = alpha / r. Dequantise
# W: value j of row i is the level of its code, times the scale of its block. Then return the gradients of the layer
# with respect to x, A and B. In lesson 9 you did this with a W in floats. What changes?


# %% points=3
def qlora_backward(x, codes, scales, levels, A, B, g, alpha):
    """codes (m, n), scales (m, n / block), levels (16), the rest as in 9.2 -> dx (T, n), dA (r, n), dB (m, r)"""


# %% [markdown]
# ## Your levels in a model
#
# You do not write anything here. In the lesson, the loss did not show a difference between NF4 and equal steps. Does
# it show one between your levels and equal steps with fewer bits? The matrices of the tiny base are rounded to both,
# in blocks of 64.


# %%
def add_to_the_loss(levels, model, samples):
    """What rounding the base's matrices to these levels adds to its loss."""
    before = ml.mean_loss(model, samples)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            blocks = parameter.data.reshape(-1, 64)
            scale = np.abs(blocks).max(axis=1, keepdims=True)
            nearest = np.abs(blocks[..., None] / scale[..., None] - levels).argmin(axis=-1)
            parameter.data = np.asarray(levels[nearest] * scale, np.float32).reshape(parameter.data.shape)
    return ml.mean_loss(model, samples) - before


try:
    for bits in (4, 3, 2):
        mine, equal = normal_levels(bits), np.linspace(-1, 1, 2**bits - 1)
        costs = []
        for levels in (mine, equal):
            model, tokenizer = ml.load("tiny")
            samples = ml.encode_records(ml.read_records("general"), tokenizer)
            costs.append(add_to_the_loss(levels, model, samples))
        print(f"{bits} bits: my levels add {costs[0]:.3f} to the loss, equal steps {costs[1]:.3f}")
except NotImplementedError:
    print("write 15.2 first, then run this cell again")

# %% [markdown]
# A question to think about: with 8 bits, the levels of 15.2 have nearly six times the squared error of equal steps.
# Where do they leave a gap?
