# %% [markdown]
# # Exercises 12: hyperparameters that do what you think
#
# You write three short functions. They return the scale that a module gets, the rank that a budget allows, and the
# learning rate that a sweep has found, if it has found one. They belong to [lesson 12](../12_choices.ipynb).
#
# **How it works.** Replace `raise NotImplementedError` with your own code, run the cell, then the cell below it. It
# tries your function on new random inputs each time and prints one line: `ok`, `not written yet`, or what is wrong.

# %%
import numpy as np

# %% [markdown]
# ## 12.1 The scale that a module gets
#
# The update of a module is scaled by α/r, or by α/√r where `use_rslora` is set. Patterns give some modules another
# rank or another α: `rank_pattern={"v_proj": 4}` holds for each module whose name is `v_proj` or ends with `.v_proj`.
# Keys here are plain names, such as `"v_proj"` or `"layers.1.self_attn.v_proj"`; the first key that matches counts.
# `"proj"` does not match `q_proj`: only whole parts between dots are compared.
#
# Return the factor before $BA$ for the module called `name`.


# %% points=3
def scale_of(name, r, lora_alpha, use_rslora, rank_pattern, alpha_pattern):
    """name such as "model.layers.0.mlp.up_proj"; two dicts from endings of names to a rank or an alpha -> the scale"""


# %% [markdown]
# ## 12.2 The rank that a budget allows
#
# `choices` names some sets of matrices, as `{"q and v": [(128, 128), (64, 128)], ...}`: the shapes (m, n) of all
# matrices that get an adapter, in all blocks. Every choice may have at most `budget` trainable parameters. Return a
# dict with the same keys: the largest rank r, the same for all matrices of the choice, whose adapters together stay
# within the budget.
#
# A rank is a whole number. It is 0 where even rank 1 exceeds the budget. It is never larger than the smallest side of
# a matrix of the choice, since no update of that matrix can have a higher rank.


# %% points=2
def ranks_for_budget(choices, budget):
    """choices {name: [(m, n), ...]}, budget a whole number -> {name: r}"""


# %% [markdown]
# ## 12.3 What a sweep has found
#
# `losses` has a row for each seed and a column for each rate. Return the rate with the lowest mean loss over the
# seeds, as a Python number, but
#
# - a rate at which any seed diverged (its loss is `nan`, not a number) does not count, whatever the other seeds reached;
# - if the best rate is the first or the last of all `rates`, the sweep was too narrow: return `None`.
#
# The rates are sorted, lowest first. At least one of them never diverges.


# %% points=3
def best_rate(rates, losses):
    """rates: a list of k numbers, losses (seeds, k) -> the best rate, or None where it is at an edge"""


# %% [markdown]
# Three times `ok`? `scale_of` is what [`LoraConfig.scale_of`](../../minilora/lora/config.py) computes.
