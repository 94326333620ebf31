# %% [markdown]
# # Exercises 11: your own claim
#
# You write three functions that belong to [lesson 11](../11_how_do_you_know.ipynb): an interval, a verdict, and a
# claim that is tested with both. The last one runs in simulated worlds whose true gain is known.
#
# **How it works.** Replace `raise NotImplementedError` with your own code, run the cell, then run the cell below it.
# It tries your function on random inputs and prints one line: `ok`, `not written yet`, or what is wrong.
#
# | name | what it is |
# |---|---|
# | `a`, `b` | arrays (n): the losses of two methods, one number per seed, in the same order of seeds |
# | `interval` | `(mean, low, high)` |
# | `band` | values that support the claim; in 11.2 `(low, high)`, and `high` may be infinite |
# | `against` | values below this one contradict the claim |

# %%
import numpy as np

from minilora.measure.statistics import student  # student(freedom): Student's t for 95 %, by degrees of freedom

# %% [markdown]
# ## 11.1 How sure is a difference?
#
# By how much does b lie below a? Each pair had the same seed: the same initialisation, the same batches. Return the
# mean of the difference $d = a - b$, and the two ends of its 95 % interval, $\bar d \pm t \cdot \text{SE}$.
#
# SE is the *standard error*: the standard deviation of d, divided by the square root of their number. The standard
# deviation is that of a sample, which divides by n - 1 and not by n. And t is Student's t for n - 1 degrees of freedom,
# because the mean uses up one of the n.


# %% points=3
def paired_interval(a, b):
    """a (n), b (n) -> mean, low, high of a - b, as three numbers"""


# %% [markdown]
# ## 11.2 One of three verdicts
#
# Turn an interval into a verdict, one of three texts:
#
# - `"reproduced"`: the mean lies in the band, and no part of the interval lies below `against`.
# - `"contradicted"`: the whole interval lies below `against`.
# - `"not at this size"`: all else.
#
# Before you write it, draw the number line with `against` and the band, and put intervals in five places.


# %% points=2
def verdict(interval, band, against):
    """interval (mean, low, high), band (low, high), against: a number -> one of the three texts"""


# %% [markdown]
# ## 11.3 Your own claim
#
# A paper has a sentence: *"new" ends at least `claimed` nats below "old"*. You are given only a way to train,
# `run(method, lr, seed)`, which returns `{"validation": loss, "test": loss}` for the method `"old"` or `"new"`; a list
# of learning rates, and a list of seeds. Write the experiment that decides whether the sentence holds. It has three
# parts, and you return all of them:
#
# 1. **The band**, `(low, against)`: where the sentence begins to hold, and the value below which it is clearly wrong
#    (new is behind old). It is fixed by the sentence, whatever is measured later.
# 2. **The differences**, one number per seed, positive where new is ahead. Give each method its own best rate: one
#    rate for all seeds, the one with the lowest mean loss. Of the two sets, one is for choosing and the other for
#    measuring.
# 3. **The verdict**: from your `paired_interval` and your `verdict`; the band has no upper end (`np.inf`).
#
# The check plants six worlds. In some the gain is real, in others it may be chance, or new is worse. In one there is
# hardly any gain, but the first rate of the list may suit the new method alone. Your experiment does not know which,
# and must find out.


# %% points=3
def my_claim(run, rates, seeds, claimed):
    """run(method, lr, seed) -> {"validation": ..., "test": ...} -> band (low, against), differences (n), verdict"""


# %% [markdown]
# Three times `ok`? Compare with minilora's own: `Interval` in [`statistics.py`](../../minilora/measure/statistics.py),
# and `Band` in [`claim.py`](../../minilora/experiments/claim.py). And a question to think about: in a world where new
# is ahead by exactly `claimed`, how often does your experiment say `reproduced`, however many seeds it has?
