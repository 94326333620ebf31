# %% [markdown]
# # Exercises 6: what a training step scores, holds and adds up
#
# Three functions that belong to [lesson 6](../06_full_fine_tuning.ipynb). Replace `raise NotImplementedError`, run the
# cell, then run the check below it.
#
# | name | shape | what it is |
# |---|---|---|
# | `logits` | (T, V) | row t: the scores of all V tokens after token t has been read |
# | `ids` | (T) | the tokens of a conversation, as numbers |
# | `is_answer` | (T) | True where a token belongs to an answer |
# | `labels` | (B, T) | the ids, and -100 where a token is not scored |

# %%
import numpy as np

# %% [markdown]
# ## 6.1 Only answers count
#
# A model should learn to answer, not to ask. So only tokens of answers are scored. Return the mean of $-\log p$ over
# them, where p is the probability that the model gave to the token before it read it; `log` is the natural logarithm.
#
# You get the scores of all places. Three things are yours to get right: which row of `logits` tells about which token,
# which tokens count, and by how many to divide. A conversation may have several answers, and the first token of each is
# scored, too. Token 0 is never an answer.


# %% points=3
def answer_loss(logits, ids, is_answer):
    """logits (T, V), ids (T) integers, is_answer (T) booleans -> the loss, a number"""


# %% [markdown]
# ## 6.2 Any optimizer, and some parameters frozen
#
# The lesson counts the bytes of full fine-tuning with AdamW. Now some parameters are frozen, and the optimizer may be
# another one. `shapes` has the shape of each parameter by its name, `frozen` lists names that do not learn, `optimizer`
# is one of
#
# - `"SGD"`, which keeps nothing between two steps,
# - `"momentum"`, which keeps a running mean of the gradients,
# - `"AdamW"`, which keeps running means of the gradients and of their squares.
#
# Return the bytes of weights, gradients and what the optimizer keeps. All numbers are float32.


# %% points=2
def training_bytes(shapes, frozen, optimizer):
    """shapes {name: (m, n) or (n,)}, frozen [name, ...], optimizer a name -> bytes, an integer"""


# %% [markdown]
# ## 6.3 A step on a batch that is too large
#
# What operations keep for the way back grows with the number of tokens. If a batch does not fit, it is cut into parts,
# and gradients are collected: each `backward()` *adds* to the gradients that are there. Then one step is taken. Done
# rightly, weights and loss come out as if the whole batch had been computed at once.
#
# `parts` is a list of pairs (input_ids, labels). `model.loss(input_ids, labels)` is a tensor: the **mean** over the
# scored tokens of that part; `.item()` is its value as a number. The loss of the whole batch is the mean over all its
# scored tokens, and parts do not score equally many. `labels[:, 1:] != -100` says which are scored (the first token of
# a row has nothing before it, and never is). Gradients of an earlier step may still be there. Return the loss of the
# whole batch as a number.


# %% points=3
def step_in_parts(model, parts, optimizer):
    """one step of the optimizer on all parts together -> the loss of the whole batch, a number"""


# %% [markdown]
# Three times `ok`? minilora's [`loss_and_grad`](../../minilora/nn/step.py) does what you did in 6.3, one part per core.
# Try `training_bytes` on the shapes of the tiny model, with nothing frozen, and compare with the lesson's ledger.
