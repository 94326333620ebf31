# %% [markdown]
# # Exercises 7: the loss, the memory and the gradients of a training step
#
# You write three functions and a test that belong to [lesson 7](../07_full_fine_tuning.ipynb). Replace `raise
# NotImplementedError`, run the cell, then run the check below it.
#
# | name | shape | what it is |
# |---|---|---|
# | `logits` | (T, V) | row t: the scores of all V tokens (the logits), computed after token t has been read |
# | `ids` | (T) | the tokens of a conversation, as integers |
# | `is_answer` | (T) | True where a token belongs to an answer |
# | `labels` | (B, T) | the ids, and -100 where a token is not scored |

# %%
import numpy as np

# %% [markdown]
# ## 7.1 Only answers count
#
# A model must learn to answer, not to ask. So only tokens of answers are scored. Return their cross-entropy: the mean
# of $-\log p$ with the natural logarithm. Here p is the probability that the model gave to a scored token before
# reading it.
#
# You are given the logits at all positions. Three things must be right: which row of `logits` predicts which token,
# which tokens are scored, and by what number to divide. A conversation may have several answers, and the first token
# of each is scored, too. Token 0 is never part of an answer.


# %% points=2
def answer_loss(logits, ids, is_answer):
    """logits (T, V), ids (T) integers, is_answer (T) booleans -> the loss, a number"""


# %% [markdown]
# ## 7.2 Any optimizer, and some parameters frozen
#
# The lesson counts the bytes of full fine-tuning with AdamW. Now some parameters are frozen, and the optimizer may be
# another one. `shapes` maps the name of each parameter to its shape, `frozen` lists the names of frozen parameters, and
# `optimizer` is one of
#
# - `"SGD"`, which has no optimizer state,
# - `"momentum"`, which keeps a decaying sum of the gradients,
# - `"AdamW"`, which keeps running means of the gradients and of their squares.
#
# Return the bytes of weights, gradients and optimizer state. Everything is stored in float32.


# %% points=1
def training_bytes(shapes, frozen, optimizer):
    """shapes {name: (m, n) or (n,)}, frozen [name, ...], optimizer a name -> bytes, an integer"""


# %% [markdown]
# ## 7.3 A step on a batch that is too large
#
# The activations saved for the backward pass grow with the number of tokens. If a batch does not fit into memory, it is
# split into micro-batches. Each `backward()` *adds* to the gradients that are already there (**gradient
# accumulation**), and the optimizer takes one step at the end. Done correctly, the weights and the loss are the same as
# if the whole batch had been computed at once.
#
# `parts` is a list of micro-batches, pairs (input_ids, labels). `model.loss(input_ids, labels)` is a tensor: the
# **mean** over the scored tokens of that micro-batch; `.item()` is its value as a number. The loss of the whole batch
# is the mean over all its scored tokens, and the micro-batches have different numbers of them. `labels[:, 1:] != -100`
# marks the scored tokens (the first token of a row has no token before it and is never scored). Gradients of an earlier
# step may still be there. Return the loss of the whole batch as a number.


# %% points=3
def step_in_parts(model, parts, optimizer):
    """one step of the optimizer on all parts together -> the loss of the whole batch, a number"""


# %% [markdown]
# ## 7.4 A bug hunt: a test for a training loop
#
# Now you write a **test** instead of the code. It is called with `training(weights, frozen, lr, beta, decay)`, which returns a
# run. `weights` is a dictionary of arrays, and `frozen` a list of names. A run has
#
# - `run.weights`: a dictionary with the current arrays. The arrays that were passed never change.
# - `run.step(parts)`: one step. `parts` is a list of micro-batches of equal size, each a dictionary with the gradients of *all*
#   weights; g is their mean. A weight that is not frozen has a momentum m, which begins at 0: first $m \leftarrow \beta m + g$,
#   then the weight becomes (1 - lr · decay) times itself, minus lr · m. Frozen weights stay as they are.
# - `run.save()` returns what a run needs to continue later. Call `new.resume(saved)` on a new run, which was started
#   with the same arguments: it then continues exactly where the saved run was.
#
# The check runs your test on the right version and on six broken ones. Each broken version has one mistake. Your test
# must pass on the right one, and should fail (with an `AssertionError`, or any other error) on all six. The line says
# how many your test caught, and what a version that it missed gets wrong. You do not see the versions: think of what
# must hold, and assert it.


# %% points=2
def test_training(training):
    """training(weights, frozen, lr, beta, decay) -> a run: passes if it is right, raises AssertionError if not"""


# %% [markdown]
# Three times `ok`? minilora's [`loss_and_grad`](../../minilora/nn/step.py) does what you did in 7.3, with one
# micro-batch per CPU core. Try `training_bytes` on the shapes of the tiny model, with nothing frozen, and
# compare with the bytes that the lesson measured: after `import minilora as ml` and `model, _ = ml.load("tiny")`,
# `{name: p.shape for name, p in model.named_parameters()}` gives the shapes.
