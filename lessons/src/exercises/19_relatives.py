# %% [markdown]
# # Exercises 19: DoRA and PiSSA by hand
#
# You write three functions that belong to [lesson 19](../19_relatives.ipynb). Each turns one formula of a paper into a
# few lines. Where it can be avoided, they form no second matrix of W's shape.
#
# **How it works.** Replace `raise NotImplementedError` with your own code, run the cell, then run the cell below it.
# It tries your function on random matrices and prints one line: `ok`, `not written yet`, or what is wrong.
#
# | name | shape | what it is |
# |---|---|---|
# | `x` | (T, n) | T tokens, n features each |
# | `W` | (m, n) | the pretrained matrix, frozen |
# | `A`, `B` | (r, n), (m, r) | the adapter |
# | `alpha` | a number | the scale is s = alpha / r |
# | `magnitude` | (m) | DoRA's: the length that each row of the matrix gets |
# | `g` | (T, m) | ∂L/∂y |

# %%
import numpy as np

from minilora.course.mine import lora_backward, lora_forward  # your own, from exercises 9.1 and 9.2

# %% [markdown]
# ## 19.1 How long is each row?
#
# DoRA divides by the norm of each row of $V = W + s\,BA$, in every step. The lesson forms V to find it. Find the norms
# without V: you may compute no array of W's shape, not even `W * W`.
#
# A row of V is $w + s\,bA$, with $w$ a row of W and $b$ a row of B. Write down the square of its length: $|w + u|^2 =
# |w|^2 + 2\,w \cdot u + |u|^2$. For the first term, `np.einsum("mn,mn->m", W, W)` adds up the squares of each row
# without storing them. In the other two terms, place the parentheses so that no array has W's shape, as in lesson 9.


# %% points=3
def dora_norm(W, A, B, alpha):
    """W (m, n), A (r, n), B (m, r) -> the lengths of the rows of W + (alpha / r) B A (m)"""


# %% [markdown]
# ## 19.2 PiSSA's initialisation
#
# Take W apart with `U, S, Vt = np.linalg.svd(W, full_matrices=False)`; the largest singular values come first. Choose A
# and B so that $s\,BA$ is the best approximation of W of rank r, and so that both contribute equally: column k of B
# times row k of A, scaled by s, is the term of the k-th singular value, and both are equally long. What is left of W is
# the residual, so that residual $+\,s\,BA$ is W.


# %% points=2
def pissa_start(W, r, alpha):
    """W (m, n), r the rank -> A (r, n), B (m, r), residual (m, n)"""


# %% [markdown]
# ## 19.3 DoRA's gradients, by hand
#
# DoRA's output i is that of LoRA, $y_i = (x V^\top)_i$, times $\text{magnitude}_i / \text{norms}_i$, where the norms
# are those of 19.1. What are the gradients of the magnitudes, of A and of B? As in the paper, treat the norms as
# constants in the gradient, although they depend on A and B.
#
# You have all the parts: your `dora_norm` from above, and `lora_forward` and `lora_backward` from lesson 9. Which array
# must `lora_backward` get as its g?


# %% points=3
def dora_backward(x, W, A, B, magnitude, g, alpha):
    """x (T, n), W (m, n), A (r, n), B (m, r), magnitude (m), g (T, m) -> dmagnitude (m), dA (r, n), dB (m, r)"""


# %% [markdown]
# Three times `ok`? Compare with minilora's own: `row_norms`, `dora_update` and `pissa_initial` in
# [`variants.py`](../../minilora/lora/variants.py). And a question to think about: where B is zero and the magnitudes
# are the lengths of W's rows, which of your three gradients are zero?
