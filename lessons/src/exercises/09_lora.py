# %% [markdown]
# # Exercises 9: LoRA by hand
#
# You write three short functions, each a few lines of NumPy. Together they are LoRA: its forward pass, its backward
# pass and its initialisation. They belong to [lesson 9](../09_lora.ipynb). You need Python and matrix multiplication.
#
# **How it works.** Replace `raise NotImplementedError` with your own code, run the cell, then run the cell below it.
# It tries your function on random matrices and prints one line: `ok`, `not written yet`, or what is wrong. Try as
# often as you like; the matrices are new every time.
#
# **The letters** are the same in all later lessons. One row of `x` is one token.
#
# | name | shape | what it is |
# |---|---|---|
# | `x` | (T, n) | T tokens, n features each |
# | `W` | (m, n) | the pretrained matrix, frozen |
# | `A` | (r, n) | the down-projection, from n features to r |
# | `B` | (m, r) | the up-projection, from r features to m |
# | `alpha` | a number | a hyperparameter; the scale of the update is alpha / r |
# | `y` | (T, m) | the output |
# | `g` | (T, m) | ∂L/∂y: the gradient of the loss with respect to the output |

# %%
import numpy as np

import minilora as ml

# %% [markdown]
# ## 9.1 The forward pass
#
# A linear layer computes $y = x W^\top$. LoRA leaves $W$ as it is, and adds an update of low rank to the layer:
#
# $$y = x W^\top + \frac{\alpha}{r}\,(x A^\top)\,B^\top$$
#
# The rank $r$ is not an argument, but you can read it from a shape. Use only `@`, `.T`, `+`, `*` and `/`. Then the
# function works on NumPy arrays and on minilora's tensors, and the engine can differentiate it.


# %% points=2
def lora_forward(x, W, A, B, alpha):
    """x (T, n), W (m, n), A (r, n), B (m, r) -> y (T, m)"""


# %% [markdown]
# ## 9.2 The backward pass, by hand
#
# Training changes A and B against their gradients, and the layer below needs the gradient of its output, which is our
# x. Derive the gradients of x, A and B from $g = \partial L/\partial y$ with pencil and paper. Then write them as code
# with matrix products only. You need one rule:
#
# > If $y = x W^\top$, then $\partial L/\partial W = g^\top x$ and $\partial L/\partial x = g\,W$.
#
# Apply it twice. Let $u = x A^\top$, of shape (T, r). The update is a linear layer with input $u$ and matrix $B$, and
# $u$ is a linear layer with input $x$ and matrix $A$. What is the gradient of $u$? x is used twice: what happens to the
# two gradients that come back to it?
#
# You can find mistakes before you run the check: each gradient has the shape of its variable, and if B is zero, `dA`
# must be zero. The scale is alpha / r, as above.


# %% points=4
def lora_backward(x, W, A, B, g, alpha):
    """x (T, n), W (m, n), A (r, n), B (m, r), g (T, m) -> dx (T, n), dA (r, n), dB (m, r), all NumPy arrays"""


# %% [markdown]
# ## 9.3 An initialisation that changes nothing, and still learns
#
# Before the first step the adapted model must compute exactly what the base computes. Otherwise training would first
# have to repair the damage. But at least one gradient must not be zero. Return three tensors, ready to train:
#
# - `W`: the base's weight, frozen (without `requires_grad`).
# - `A`: random, from `rng.standard_normal`, divided by $\sqrt{n}$.
# - `B`: zero.
#
# `ml.Tensor(array)` is a frozen tensor, and `ml.Tensor(array, requires_grad=True)` is a trainable one. When it works,
# use exercise 9.2 to compute `dA` and `dB` at this initialisation. Which of them is zero? What would happen if A were
# zero, too?


# %% points=2
def inject(W, r, rng):
    """W (m, n) a NumPy array, r the rank, rng a NumPy generator -> W (m, n), A (r, n), B (m, r), all ml.Tensor"""


# %% [markdown]
# Three times `ok`? Then you have written LoRA. minilora's own version is
# [`lora_linear`](../../minilora/engine/fused.py): the same three matrix products, written to save few activations.
