# %% [markdown]
# # Exercises 7: taking an update apart
#
# Three short functions on the singular value decomposition. They belong to [lesson 7](../07_low_rank.ipynb): how many
# pieces an update needs, which two thin matrices come nearest to it, and whether two updates agree.
#
# **How it works.** Replace `raise NotImplementedError` by your own code, run the cell, then the cell below it. It tries
# your function on random matrices and prints one line: `ok`, `not written yet`, or what is wrong.
#
# | name | shape | what it is |
# |---|---|---|
# | `delta`, `other` | (m, n) | updates of a matrix with n inputs and m outputs |
# | `B` | (m, r) | r columns |
# | `A` | (r, n) | r rows |
#
# `U, S, Vt = np.linalg.svd(delta, full_matrices=False)` gives the pieces, largest first: piece i has the size `S[i]`,
# the column `U[:, i]` and the row `Vt[i]`.

# %%
import numpy as np

# %% [markdown]
# ## 7.1 How many pieces hold a share of the energy?
#
# Return the smallest r for which the r largest pieces hold at least `share` of the energy. For sizes 3, 2, 1 the
# energies are 9, 4, 1, so a share of 0.6 needs one piece and 0.7 needs two. Return a Python `int`.


# %% points=2
def rank_for(delta, share):
    """delta (m, n), share between 0 and 1 -> r, a number of pieces"""


# %% [markdown]
# ## 7.2 The two thin matrices that come nearest
#
# A matrix of rank r is a product $BA$ of an (m, r) and an (r, n) matrix. Find the product that is nearest to `delta`.
# Many pairs give the same product: what is taken from B can be given to A. Take the even one, in which column i of B is
# as long as row i of A. (This is how an adapter can be drawn out of a model that was fully fine-tuned.)


# %% points=3
def best_rank_r(delta, r):
    """delta (m, n), r -> B (m, r), A (r, n)"""


# %% [markdown]
# ## 7.3 Do two updates agree?
#
# Train twice with another seed, and you get two updates. Do they look at the same directions of the input? The LoRA
# paper measures it so (section 7.2, there for two adapters): take the r strongest input directions of each, which are
# rows of length 1. The product of two such rows is the cosine between them. Square the cosines of each direction of the
# one with each direction of the other, add them all up, and divide by r.
#
# The result is 1 where both span the same space, in whatever order, and 0 where they have nothing in common. (Of two
# updates made of noise it is about r/n, so a value means something only beside r/n.)


# %% points=3
def overlap(delta, other, r):
    """delta (m, n), other (m, n), r -> a number from 0 to 1"""


# %% [markdown]
# Three times `ok`? Then try them on what lesson 7 has in `updates`: paste them into a cell below its last one. How many
# pieces hold 90 % of `q_proj`, and of `gate_proj`? And the overlap of two blocks, which have learned the same texts?
