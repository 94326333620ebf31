# %% [markdown]
# # Exercises 13: a budget of parameters and bytes
#
# You write three functions that answer what everyone asks before a training job: how many parameters are trainable,
# how much memory does training take, and which rank is the largest that I can afford? They belong to [lesson
# 13](../13_how_much_smaller.ipynb).
#
# **How it works.** Replace `raise NotImplementedError` with your own code, run the cell, then run the cell below it.
# It tries your function on small models of random shape and prints one line: `ok`, `not written yet`, or what is
# wrong.
#
# **What you are given** is always `shapes`, a dictionary with the name and shape of every parameter of a model. Here
# is one, with a single block where real models have dozens:

# %%
import math

shapes = {
    "model.embed_tokens.weight": (120, 32),  # the embedding: one row of 32 values for each of 120 tokens
    "model.layers.0.input_layernorm.weight": (32,),
    "model.layers.0.self_attn.q_proj.weight": (32, 32),  # attention: four matrices, (outputs, inputs)
    "model.layers.0.self_attn.k_proj.weight": (16, 32),
    "model.layers.0.self_attn.v_proj.weight": (16, 32),
    "model.layers.0.self_attn.o_proj.weight": (32, 32),
    "model.layers.0.post_attention_layernorm.weight": (32,),
    "model.layers.0.mlp.gate_proj.weight": (64, 32),  # the MLP: three more
    "model.layers.0.mlp.up_proj.weight": (64, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 64),
    "model.norm.weight": (32,),
    "lm_head.weight": (120, 32),  # the head; a model that uses its embedding twice has none
}

# %% [markdown]
# ## 13.1 How many parameters are trainable?
#
# LoRA adds two small matrices to each matrix W of shape (m, n) that it adapts: A of shape (r, n) and B of shape (m,
# r). Count them for an adapter on *all linear layers* of the blocks, whose names contain `_proj`. Embedding, head and
# norms get none.
#
# For the shapes above and r = 2, the count is 1,024. For SmolLM2-135M and r = 8 it is 2,442,240.


# %% points=2
def adapter_parameters(shapes, r):
    """shapes: a dictionary of name -> shape, r: the rank -> how many parameters all A and B have together"""


# %% [markdown]
# ## 13.2 How much memory does training take, with any optimizer and any frozen base?
#
# Predict the bytes that a training step holds in three places. The lesson did it for Adam in float32. Now the
# optimizer may store any number of arrays, and the frozen base any number of bytes per weight:
#
# - **weights**: a trainable parameter takes 4 bytes, a frozen one takes `frozen_bytes`: 4 in float32, 2 in 16 bits, less
#   if it is quantised;
# - **gradients**: 4 bytes for each *trainable* parameter;
# - **optimizer state**: the optimizer stores `moments` values of 4 bytes for each trainable parameter. Adam stores 2,
#   SGD with momentum 1, AMSGrad 3.
#
# `r` is the rank of an adapter on *all linear layers*; with `r=None` there is no adapter, nothing is frozen and the
# whole model is trained. The result must be exact. Call your `adapter_parameters`; `math.prod(shape)` is the number of
# values in an array of this shape.
#
# Activations come on top. They depend on the number of tokens: that is lesson 14.


# %% points=4
def training_memory(shapes, r=None, frozen_bytes=4, moments=2):
    """shapes: a dictionary of name -> shape, r: the rank, None for full fine-tuning -> bytes"""


# %% [markdown]
# ## 13.3 What can I afford?
#
# Now solve for the rank. Your machine has `budget` bytes for weights, gradients and optimizer state, with Adam and
# everything in float32. Return the largest rank that fits (a rank that takes exactly `budget` bytes fits), and 0 if
# not even r = 1 fits. Call what you wrote above. Note that increasing r by one always costs the same amount of memory.


# %% points=2
def largest_rank(shapes, budget):
    """shapes: a dictionary of name -> shape, budget: bytes -> the largest r that fits, 0 if none does"""


# %% [markdown]
# Three times `ok`? Try them on a real model: `model, tokenizer = ml.load("smollm2")` (after `import minilora as ml`)
# and `{name: p.shape for name, p in model.named_parameters()}` gives its shapes. Full fine-tuning should come to 2,152
# MB. What do you get for LoRA with r = 8, and which rank fits into a gigabyte? How many bytes does a frozen weight
# have to take for r = 8 to fit into 200 MB?
