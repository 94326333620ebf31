# %% [markdown]
# # Exercises 4: attention and its backward pass
#
# You write three functions: the backward pass of softmax, grouped-query attention, and the backward pass of attention,
# which uses the first function. They belong to [lesson 4](../04_attention.ipynb). Replace `raise NotImplementedError`,
# run the cell, then run the check below it.
#
# | name | shape | what it is |
# |---|---|---|
# | `q` | (T, D), or (T, H, D) | queries: what each of T tokens asks for, in H heads of width D |
# | `k`, `v` | (S, D), or (S, K, D) | keys and values of S tokens, in K heads |
# | `p` | (T, S) | attention weights: row t says how much token t takes from each token s |
# | `g` | as the result | the gradient of the loss with respect to the result |

# %%
import numpy as np

from minilora.course.mine import numerical_gradient  # your own, from exercise 1.1

# %% [markdown]
# ## 4.1 The backward pass of softmax
#
# A row of scores $s$ becomes a row of probabilities, $p_i = e^{s_i} / \sum_j e^{s_j}$. Given `p` and `g` = ∂L/∂p,
# return ∂L/∂s. You need two derivatives, from the quotient rule: how does $p_i$ change with its own score $s_i$, and
# how with another one, $s_j$? Each score changes all probabilities of its row: add up the contributions of all of
# them.
#
# A way to notice a mistake: if you add 1 to all scores of a row, p does not change. So each row of your result adds up
# to zero.


# %% points=2
def softmax_vjp(p, g):
    """p (T, S) probabilities, each row a softmax, g (T, S) -> the gradient of the scores (T, S)"""


# %% [markdown]
# ## 4.2 Grouped-query attention with a KV cache
#
# The lesson's function has one head, and as many queries as keys. A real model differs in two ways.
#
# - **Grouped queries.** There are H query heads and only K heads of keys and values; H is a multiple of K. Neighbours
#   share: with H = 6 and K = 2, heads 0, 1, 2 read key head 0, and heads 3, 4, 5 read key head 1.
# - **A KV cache.** During generation, keys and values of earlier tokens are saved. So there are S keys and only T ≤ S
#   queries: those of the *last* T tokens. Query 0 is not token 0.
#
# The rest is as in the lesson: scores divided by $\sqrt D$, the causal mask, softmax, and a weighted sum of values.


# %% points=3
def grouped_attention(q, k, v):
    """q (T, H, D), k (S, K, D), v (S, K, D) -> y (T, H, D)"""


# %% [markdown]
# ## 4.3 The backward pass of attention
#
# One causal head with as many queries as keys: $p = \mathrm{softmax}(q k^\top / \sqrt D)$ with a causal mask, and $y =
# p\,v$. From `g` = ∂L/∂y find the gradients of q, k and v. First compute p. Then go backwards, one matrix
# multiplication at a time: from y to p and v, from p to the scores with **your** `softmax_vjp`, from the scores to q
# and k. Apart from `softmax_vjp`, you need only this rule:
#
# > If $y = a\,b$, then $\partial L/\partial a = g\,b^\top$ and $\partial L/\partial b = a^\top g$.
#
# The mask needs no extra step: where a weight is zero, your `softmax_vjp` returns zero.


# %% points=3
def attention_vjp(q, k, v, g):
    """q, k, v, g (T, D) -> dq, dk, dv (T, D) each"""


# %% [markdown]
# ## All of it at once
#
# Three times `ok`? Then run the cell and call `distance()`. It compares the dq of your `attention_vjp`, which uses
# your `softmax_vjp`, with the gradient that your `numerical_gradient` of lesson 1 measures on your
# `grouped_attention`. Below 1e-8, your four functions agree.


# %%
def distance():
    """The largest difference between attention_vjp's dq and the gradient measured on grouped_attention."""
    q, k, v, g = np.random.default_rng().standard_normal((4, 7, 5))

    def loss(q):
        return (g * grouped_attention(q[:, None], k[:, None], v[:, None])[:, 0]).sum()  # one head

    return np.abs(attention_vjp(q, k, v, g)[0] - numerical_gradient(loss, q)).max()


# %% [markdown]
# minilora's own [`attention`](../../minilora/engine/attention.py) does the same with one difference: it never stores
# all attention weights (T, S), and computes them again in the backward pass.
