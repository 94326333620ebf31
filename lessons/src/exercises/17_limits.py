# %% [markdown]
# # Exercises 17: what a rank cannot do
#
# You write three functions: the smallest error of an adapter of rank r on given tokens, the rank that a task needs,
# and a training loop that reaches this smallest error. They belong to [lesson 17](../17_limits.ipynb).
#
# **How it works.** Replace `raise NotImplementedError` with your own code, run the cell, then the cell below it. It
# tries your function on random matrices and prints one line: `ok`, `not written yet`, or what is wrong.
#
# | name | shape | what it is |
# |---|---|---|
# | `x` | (T, n) | T tokens, each a vector of length n |
# | `delta` | (m, n) | the change of W that the task needs |
# | `W`, `A`, `B` | (m, n), (r, n), (m, r) | the frozen matrix, and the adapter |
# | `y` | (T, m) | the target outputs of the layer |

# %%
import numpy as np

from minilora.course.mine import lora_backward, lora_forward  # your own, from exercises 9.1 and 9.2

# %% [markdown]
# ## 17.1 The smallest possible error
#
# In the lesson all directions of the input were equally common. Real tokens are not like that: a direction of `delta`
# that no token uses costs nothing, and one that all use costs much. So look at the output of the layer. On these
# tokens the task needs the change $x\,\Delta^\top$, a (T, m) matrix. An adapter of rank r can only add a matrix of
# rank r or less to the output. Which theorem of the lesson applies, and to which matrix?
#
# Return the smallest possible error: squares summed over the outputs, averaged over the T tokens.


# %% points=3
def floor(x, delta, r):
    """x (T, n), delta (m, n), r -> the smallest possible mean squared error"""


# %% [markdown]
# ## 17.2 The rank that a task needs
#
# Without an update (r = 0) there is some error. Return the smallest r whose smallest possible error is at most `share`
# times the error without an update. With `share=0.1`, the update must remove nine tenths of the error. Your `floor` may
# help.


# %% points=2
def smallest_r(x, delta, share):
    """x (T, n), delta (m, n), share between 0 and 1 -> the smallest rank that is enough"""


# %% [markdown]
# ## 17.3 Train to this error
#
# Train an adapter with plain gradient descent, using the two functions that you wrote in exercises 9: no engine, no
# optimizer. The loss is that of 17.1,
#
# $$L = \frac{1}{T} \sum_{t,i} (\hat y_{ti} - y_{ti})^2$$
#
# where $\hat y$ is the output of `lora_forward`. You need $g = \partial L/\partial \hat y$ for `lora_backward`. Then A
# and B each take a step with learning rate `lr` against their gradients, both computed from the same g and from A and B as
# they were before the step. Repeat `steps` times. Do not change the arrays that are passed; W is frozen. (The check uses
# adapters of rank 1.)


# %% points=3
def descend(x, W, y, A, B, alpha, lr, steps):
    """x (T, n), W (m, n), y (T, m), A (r, n), B (m, r) -> A (r, n), B (m, r) after the last step"""


# %% [markdown]
# Three times `ok`? Then compare theory and training. Make a `delta` of rank 3, a random `x` and
# `y = x @ (W + delta).T`, descend with r = 1, 2, 3 for a few thousand steps, and compare the remaining error with
# `floor`. Which rank reaches its smallest error faster? Why is a learning rate that is right for one x too large for
# another?
