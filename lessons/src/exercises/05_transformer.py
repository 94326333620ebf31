# %% [markdown]
# # Exercises 5: a Llama, counted and taken apart
#
# You write three functions that belong to [lesson 5](../05_transformer.ipynb): one counts a model's parameters, two
# are the backward passes of the norm and of the MLP's gate. Replace `raise NotImplementedError`, run the cell, then
# run the check below it.
#
# | name | shape | what it is |
# |---|---|---|
# | `x` | (N, C) | N tokens, a row of length C each |
# | `w` | (C) | the parameters of a norm |
# | `gate`, `up` | (N, F) | the two inputs of an MLP's gate |
# | `g` | as the output | the gradient of the loss with respect to the output |

# %%
import numpy as np

import minilora as ml
from minilora.course.mine import numerical_gradient  # your own, from exercise 1.1

# %% [markdown]
# ## 5.1 Count it before it exists
#
# `config` is an `ml.Config`. Its fields, in the letters of the lesson: `vocab_size` V, `hidden_size` C,
# `intermediate_size` F, `num_hidden_layers`, `num_attention_heads` H, `num_key_value_heads` K, `head_dim` D,
# `tie_word_embeddings`. Compute the number of parameters from these fields alone: the check refuses an answer that
# builds a model. Try it on a model that you know from the lesson: `count_llama(ml.load("tiny")[0].config)`.


# %% points=2
def count_llama(config):
    """config: an ml.Config -> the number of parameters of the Llama that it describes"""


# %% [markdown]
# ## 5.2 The backward pass of RMSNorm
#
# $$y = \frac{x}{\mathrm{rms}(x)}\,w \qquad\qquad \mathrm{rms}(x) = \sqrt{\mathrm{mean}(x^2) + \varepsilon}$$
#
# The norm is computed for each token separately; all tokens share `w`. Given `g` = ∂L/∂y, find the gradients of x and
# w. Take care: every element of x changes y in two ways, directly and through the rms of the whole row. Write $i = 1 /
# \mathrm{rms}(x)$ and first find how $i$ changes with one element of x.
#
# A way to notice a mistake: with ε = 0, y does not change when x is scaled. So the gradient has no component along x:
# each row of `dx * x` adds up to 0.


# %% points=3
def rms_norm_vjp(x, w, g, eps):
    """x (N, C), w (C), g (N, C) -> dx (N, C), dw (C)"""


# %% [markdown]
# ## 5.3 The backward pass of the gate
#
# $$y = \mathrm{silu}(\mathit{gate})\,\mathit{up} \qquad\qquad \mathrm{silu}(z) = z\,\sigma(z) \qquad\qquad \sigma(z) =
# \frac{1}{1 + e^{-z}}$$
#
# All of this is elementwise. You need $\sigma'(z) = \sigma(z)(1 - \sigma(z))$ and the product rule, twice.


# %% points=3
def swiglu_vjp(gate, up, g):
    """gate, up, g (N, F) -> dgate (N, F), dup (N, F)"""


# %% [markdown]
# ## All of them at once
#
# Three times `ok`? Then run the cell and call `distance()`: it compares your formula for dx with the gradient that your
# `numerical_gradient` of lesson 1 measures. Below 1e-8 they agree.


# %%
def distance():
    """The largest difference between rms_norm_vjp's dx and the gradient that numerical_gradient measures."""
    x, g = np.random.default_rng().standard_normal((2, 4, 6))
    w = np.arange(1.0, 7.0)

    def loss(x):
        return (g * x * w / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5)).sum()

    return np.abs(rms_norm_vjp(x, w, g, 1e-5)[0] - numerical_gradient(loss, x)).max()


# %% [markdown]
# Compare with minilora's own [`rms_norm` and `swiglu`](../../minilora/engine/fused.py). Both save only their inputs
# and compute the rest again in the backward pass, which costs a few FLOPs and saves memory.
