# %% [markdown]
# # Exercises 20: two choices that changed
#
# You write two functions that belong to [lesson 20](../20_what_differs.ipynb): the backward pass of LayerNorm, to
# compare with that of RMSNorm from exercise 5.2, and the base of RoPE's rotations for texts of a given length. Replace
# `raise NotImplementedError`, run the cell, then run the check below it.
#
# | name | shape | what it is |
# |---|---|---|
# | `x` | (N, C) | N tokens, a row of length C each |
# | `w` | (C) | the factors of a norm; its bias b has the same shape |
# | `g` | as the output | the gradient of the loss with respect to the output |

# %%
import numpy as np

from minilora.course.mine import numerical_gradient  # your own, from exercise 1.1

# %% [markdown]
# ## 20.1 LayerNorm against RMSNorm
#
# $$y = \frac{x - \mathrm{mean}(x)}{\mathrm{std}(x)}\,w + b \qquad\qquad \mathrm{std}(x) = \sqrt{\mathrm{var}(x) +
# \varepsilon}$$
#
# The norm is computed for each token separately; all tokens share `w` and `b`. Given `g` = ∂L/∂y, find the gradients
# of x, w and b. Compared with RMSNorm there is one more path: every element of x also changes the mean.
#
# A way to notice a mistake: y does not change when a number is added to a whole row of x. So each row of dx adds up to
# 0. And `numerical_gradient`, your own of exercise 1.1, can measure dx.


# %% points=4
def layer_norm_vjp(x, w, g, eps):
    """x (N, C), w (C), g (N, C) -> dx (N, C), dw (C), dbias (C)"""


# %% [markdown]
# ## 20.2 A RoPE of another base
#
# RoPE rotates pair number i of a head of width D, i = 0, 1, ..., D/2 - 1, by the angle $\mathrm{base}^{-2i/D}$ from
# each token to the next. A pair that makes less than one turn over the whole text has a different angle for every
# distance; the angles of a faster pair repeat.
#
# Find the base with which, over T tokens, the last `slow` pairs make less than one turn, and the pair just before them
# turns exactly once. (Over T tokens a pair turns by T times its angle.)


# %% points=4
def rope_base(D, T, slow):
    """D the head's width, T a number of tokens, slow a number of pairs -> the base"""
