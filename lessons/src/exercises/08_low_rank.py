# %% [markdown]
# # Exercises 8: decomposing an update
#
# You write three short functions that use the singular value decomposition. They belong to [lesson
# 8](../08_low_rank.ipynb), and find how many rank-one terms an update needs, which product of two thin matrices
# approximates it best, and whether two updates agree.
#
# **How it works.** Replace `raise NotImplementedError` with your own code, run the cell, then the cell below it. It
# tries your function on random matrices and prints one line: `ok`, `not written yet`, or what is wrong.
#
# | name | shape | what it is |
# |---|---|---|
# | `delta`, `other` | (m, n) | updates of a matrix with n inputs and m outputs |
# | `B` | (m, r) | r columns |
# | `A` | (r, n) | r rows |
#
# `U, S, Vt = np.linalg.svd(delta, full_matrices=False)` gives the rank-one terms, largest first: term i has the
# singular value `S[i]`, the column `U[:, i]` and the row `Vt[i]`.

# %%
import numpy as np

# %% [markdown]
# ## 8.1 How many terms explain a share of the variance?
#
# Return the smallest r for which the r largest singular values explain at least `share` of the variance. For the
# singular values 3, 2, 1 the squares are 9, 4, 1, so a share of 0.6 needs one term and 0.7 needs two.


# %% points=2
def rank_for(delta, share):
    """delta (m, n), share between 0 and 1 -> r, the number of rank-one terms"""


# %% [markdown]
# ## 8.2 The best approximation of rank r
#
# A matrix of rank r is a product $BA$ of an (m, r) and an (r, n) matrix. Find the product that approximates `delta`
# best. Column i of B times row i of A must be the term of the i-th singular value. Many pairs have the same product: a
# number that divides B can multiply A. Choose the balanced pair: column i of B is as long as row i of A. (This is how
# an adapter is extracted from a fully fine-tuned model.)


# %% points=3
def best_rank_r(delta, r):
    """delta (m, n), r -> B (m, r), A (r, n)"""


# %% [markdown]
# ## 8.3 Do two updates agree?
#
# Training with two seeds gives two updates. Do they use the same directions of the input? The LoRA paper (section 7.2,
# for two adapters) compares the r input directions of each update that have the largest singular values.
# These directions are rows of length 1, so the dot product of two of them is the cosine of the angle between them.
# Square the cosines of each direction of one update with each direction of the other, sum all squares, and divide by r.
#
# The result is 1 if both sets span the same subspace, in any order, and 0 if the subspaces are orthogonal. (For two
# updates of pure noise it is about r/n, so compare each value with r/n.)


# %% points=3
def overlap(delta, other, r):
    """delta (m, n), other (m, n), r -> a number from 0 to 1"""


# %% [markdown]
# Three times `ok`? Then paste your functions into a new cell at the end of lesson 8 and try them on its `updates`. How
# many terms explain 90 % of `q_proj`, and of `gate_proj`? What is the overlap of two blocks, which were trained on the
# same texts?
