# %% [markdown]
# # Exercises 8: LoRA by hand
#
# Three short functions, each a few lines of NumPy. Together they are LoRA: how it computes, how it learns and how it
# starts. They belong to [lesson 8](../08_lora.ipynb). You need Python and the product of two matrices.
#
# **How it works.** Replace `raise NotImplementedError` by your own code, run the cell, then run the cell below it. It
# tries your function on random matrices and prints one line: `ok`, `not written yet`, or what is wrong. Try as often as
# you like; the matrices are new every time.
#
# **The letters** are the same everywhere: one row of `x` is one token.
#
# | name | shape | what it is |
# |---|---|---|
# | `x` | (T, n) | T tokens, n numbers each |
# | `W` | (m, n) | the pretrained matrix, frozen |
# | `A` | (r, n) | the down-projection: n numbers become r |
# | `B` | (m, r) | the up-projection: r numbers become m |
# | `alpha` | a number | how much the update counts; the scale is alpha / r |
# | `y` | (T, m) | the output |
# | `g` | (T, m) | ∂L/∂y: how the loss changes with each number of y |

# %%
import numpy as np

import minilora as ml

# %% [markdown]
# ## 8.1 The forward pass
#
# A linear layer computes $y = x W^\top$. LoRA leaves $W$ as it is and adds an update of low rank:
#
# $$y = x W^\top + \frac{\alpha}{r}\,(x A^\top)\,B^\top$$
#
# The rank $r$ is not among the arguments, but a shape tells it. Use only `@`, `.T`, `+`, `*` and `/`: then the function
# works on NumPy arrays and on minilora's tensors alike, and the engine can differentiate it.


# %% points=2
def lora_forward(x, W, A, B, alpha):
    """x (T, n), W (m, n), A (r, n), B (m, r) -> y (T, m)"""


# %% [markdown]
# ## 8.2 The backward pass, by hand
#
# Training moves A and B against their gradients, and the layer below wants the gradient of its output, which is x. Derive
# all three from $g = \partial L/\partial y$ with pencil and paper, then write them down, with `@` and `.T` alone. You need
# one rule:
#
# > If $y = x W^\top$, then $\partial L/\partial W = g^\top x$ and $\partial L/\partial x = g\,W$.
#
# Apply it twice. Call the narrow middle $u = x A^\top$, of shape (T, r). The update is a linear layer with input $u$
# and matrix $B$, and $u$ is a linear layer with input $x$ and matrix $A$. What is the gradient of $u$? And x is used in
# two places: what happens to the gradients that come back from both?
#
# Two ways to notice a mistake before the check does: a gradient has the shape of what it is the gradient of, and where
# B is zero, `dA` must come out as zero. The scale is alpha / r, as above.


# %% points=4
def lora_backward(x, W, A, B, g, alpha):
    """x (T, n), W (m, n), A (r, n), B (m, r), g (T, m) -> dx (T, n), dA (r, n), dB (m, r), all NumPy arrays"""


# %% [markdown]
# ## 8.3 A start that changes nothing, and still learns
#
# Before the first step the adapted model must compute exactly what the base computes, or training would begin by
# repairing damage. Yet something must be able to move. Return three tensors, ready to train:
#
# - `W`: the base's numbers, frozen: it asks for no gradient.
# - `A`: random, from `rng.standard_normal`, divided by $\sqrt{n}$.
# - `B`: zero.
#
# `ml.Tensor(array)` is a frozen tensor, `ml.Tensor(array, requires_grad=True)` one that learns. A question to ask
# yourself when it works: exercise 8.2 gives you `dA` and `dB` at this start. Which of them is zero? What would happen if
# A were zero, too?


# %% points=2
def inject(W, r, rng):
    """W (m, n) a NumPy array, r the rank, rng a NumPy generator -> W (m, n), A (r, n), B (m, r), all ml.Tensor"""


# %% [markdown]
# Three times `ok`? Then you have written LoRA. minilora's own version is
# [`lora_linear`](../../minilora/engine/fused.py): the same three products, written to keep little in memory.
