# %% [markdown]
# # Exercises 14: a ledger of activations and matmuls
#
# You write three functions. They return what linear layers save for the backward pass, how much these layers compute,
# and at which length of text LoRA's saving has shrunk to a given factor. They belong to [lesson
# 14](../14_what_is_not_saved.ipynb); the last one uses what you wrote for lesson 13.
#
# **How it works.** Replace `raise NotImplementedError` with your own code, run the cell, then run the cell below it.
# It tries your function on random sizes and prints one line: `ok`, `not written yet`, or what is wrong.
#
# **The letters**: T tokens, a layer with W of shape (m, n), the rank r, x of shape (T, n), A (r, n), B (m, r).

# %%
import math

from minilora.course.mine import training_memory  # your own, from exercise 13.2

layers = [  # of one block: (what the layer reads, m, n)
    ("x", 32, 32),  # q_proj
    ("x", 16, 32),  # k_proj reads the same array
    ("x", 16, 32),  # v_proj, too
    ("heads", 32, 32),  # o_proj
]

# %% [markdown]
# ## 14.1 What do linear layers save?
#
# The lesson looked at one layer. In a block several layers read the *same* array, and an array is held once, however
# many operations save it. `layers` is a list of (name of the array that the layer reads, m, n); layers with the same
# name read the same array. Return how many bytes they save together for the backward pass, in float32, for T tokens:
#
# - `r=None`: every W is trainable;
# - `r=0`: every W is frozen, without an adapter;
# - `r >= 1`: every W is frozen, with an adapter A, B of rank r.
#
# Matrices are not activations: count only arrays with a row for each token. For the four layers above and 10 tokens,
# the answer is 2,560 bytes with `r=None`.


# %% points=2
def kept_bytes(layers, T, r=None):
    """layers: a list of (name of the input, m, n), T: tokens, r: the rank or None -> bytes of activations"""


# %% [markdown]
# ## 14.2 How much does a step compute?
#
# Count the multiply-accumulate operations (MACs) in the matmuls of one linear layer, for *one token*, in forward and
# backward pass together. A matmul of (a, b) and (b, c) takes a b c MACs. `r=None` means that W is trainable; otherwise
# W is frozen, with an adapter A, B. Now W need not be square.
#
# There is one more case, which the lesson left out. The lowest adapted layer of a model has no trainable parameter
# below it. Its dx is not needed, and no matmul computes it: `lowest=True`. Go through all matmuls one by one, and ask
# whether the result is still needed. The product B A is never formed.


# %% points=3
def step_products(m, n, r=None, lowest=False):
    """W (m, n), the rank r or None, lowest: dx is not needed -> MACs per token, forward and backward"""


# %% [markdown]
# ## 14.3 How long may a text be?
#
# Full fine-tuning holds `training_memory(shapes)` and the activations; LoRA holds `training_memory(shapes, r)` and its
# own activations. `kept_full` and `kept_lora` are the bytes of activations of the whole model *for one token*. For T
# tokens, LoRA then takes some factor less memory than full fine-tuning, and the factor shrinks as T grows. Return the
# smallest whole T for which LoRA takes *at most* `factor` times less. Return 1 if the factor is already that small for
# one token.
#
# In this sum everything is held at once. A real step of LoRA holds nearly that much. One of full fine-tuning holds
# less, since its two peaks do not meet (lesson 14), so the real number of tokens is smaller.


# %% points=3
def tokens_until(shapes, r, kept_full, kept_lora, factor):
    """shapes: a dictionary of name -> shape, r: the rank, kept: bytes per token -> the smallest T"""


# %% [markdown]
# Three times `ok`? For SmolLM2 take 0.72 MB per token for both (minilora's own activations, as `ml.predict_memory`
# counts them). From how many tokens on does LoRA of rank 8 take no more than two times less memory?
