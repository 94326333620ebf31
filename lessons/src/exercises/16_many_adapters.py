# %% [markdown]
# # Exercises 16: several adapters as one, and one for each row
#
# You write three functions. The first joins adapters into one, the second computes a layer with a weighted combination
# of adapters, and the third a batch in which every row has its own adapter. They belong to [lesson
# 16](../16_many_adapters.ipynb).
#
# **How it works.** Replace `raise NotImplementedError` with your own code, run the cell, then run the cell below it.
# It tries your function on random matrices and prints one line: `ok`, `not written yet`, or what is wrong.
#
# An adapter is a dictionary, like the layer in exercises 10; ranks may differ:
#
# | key | what it is |
# |---|---|
# | `A`, `B` | (r, n), (m, r) |
# | `alpha` | a number; the scale is alpha / r |
#
# Its update is scale · B A, a matrix (m, n) that is never formed on this page.

# %%
import numpy as np

import minilora as ml

# %% [markdown]
# ## 16.1 Several adapters as one
#
# `adapters` is a list, and `weights` a list of numbers of the same length; the weights need not add up to 1. Return
# one A of shape (R, n) and one B of shape (m, R), with R the sum of the ranks, so that $B A$ is **exactly** the
# weighted sum of all updates. The new adapter is used with the scale 1, so it must contain every factor: A stays
# unchanged, and weights and scales go into B.
#
# How can you put an (m, 2) and an (m, 3) matrix together, so that their product with the right (5, n) matrix is the
# sum of both updates?


# %% points=3
def cat(adapters, weights):
    """adapters: a list of {"A", "B", "alpha"}; weights: a list of numbers -> A (R, n), B (m, R)"""


# %% [markdown]
# ## 16.2 A weighted combination without a new adapter
#
# Compute what a layer returns after `ml.set_adapter(model, {"legal": 0.5, "support": 0.5})`: the base's output, plus
# each adapter's update of it, times its weight. The weights can change with every call, so nothing is joined, and no
# matrix of W's shape is formed.


# %% points=2
def mix(x, W, adapters, weights):
    """x (T, n), W (m, n), adapters: a list of {"A", "B", "alpha"}, weights: a list of numbers -> y (T, m)"""


# %% [markdown]
# ## 16.3 An adapter for each row
#
# N users ask at the same time, T tokens each: `x` has the shape (N, T, n). Row i gets the adapter called `names[i]`;
# if that is `None`, it gets the base alone. `adapters` is a dictionary: name -> adapter. Several rows may get the same
# adapter, and some adapters may not be used at all.
#
# The matmul with W is most of the work and the same for all: do it once, for all rows. Return y (N, T, m).


# %% points=3
def answer_rows(x, W, adapters, names):
    """x (N, T, n), W (m, n), adapters: {name: {"A", "B", "alpha"}}, names: N names or None -> y (N, T, m)"""


# %% [markdown]
# ## Your `cat` in a model
#
# You do not write anything here. Two random adapters of rank 1 are added to the tiny base. Your `cat` joins them in
# each of its 28 matrices, and the resulting third adapter is compared with the library's weighted combination of the
# two.


# %%
def join_mine(weights=(0.7, 0.5)):
    """Join two adapters of the tiny base with my own cat; print how far the logits are from those of the mix."""
    model, _ = ml.load("tiny")
    for seed, (name, r, alpha) in enumerate((("one", 1, 4), ("two", 1, 4), ("joined", 2, 2))):
        config = ml.LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", init_lora_weights=False)
        ml.add_adapter(model, config, name=name, seed=seed)
    own = {name: ml.adapter_state(model, name) for name in ("one", "two", "joined")}
    for key, joined in own["joined"].items():
        module, _, factor = key.rpartition(".")
        pair = [{"A": own[n][f"{module}.lora_A"], "B": own[n][f"{module}.lora_B"], "alpha": 4} for n in ("one", "two")]
        joined[:] = cat(pair, weights)[factor == "lora_B"]  # A comes first
    ids = np.arange(3, 35)[None]  # (1, 32)
    logits = {}
    for choice in ("joined", "mixed"):
        ml.set_adapter(model, "joined" if choice == "joined" else dict(zip(("one", "two"), weights, strict=True)))
        with ml.no_grad():
            logits[choice] = model(ids).data
    gap = np.abs(logits["joined"] - logits["mixed"]).max() / np.abs(logits["mixed"]).max()
    print(f"joined by my cat, against the mix: the logits differ by {gap:.0e} of the largest")


try:
    join_mine()
except NotImplementedError:
    print("write 16.1 first, then run this cell again")
