# %% [markdown]
# # Exercises 21: preferences by hand
#
# You write three functions that belong to [lesson 21](../21_preferences.ipynb): the log-probability of an answer,
# DPO's loss, and a training loop with a fixed reference.
#
# **How it works.** Replace `raise NotImplementedError` with your own code, run the cell, then run the cell below it.
# It tries your function on random inputs and prints one line: `ok`, `not written yet`, or what is wrong.
#
# | name | shape | what it is |
# |---|---|---|
# | `logits` | (T, V) | the model's scores after each of T tokens, for each of V tokens |
# | `labels` | (T) | the token ids, and -100 for those that do not belong to the answer |
# | `chosen`, `rejected` | (N) | log-probabilities of N pairs of answers, by the model that is trained |
# | `ref_chosen`, `ref_rejected` | (N) | the same by the reference model |
# | `beta` | a number | how much the distance from the reference costs |

# %%
import numpy as np

# %% [markdown]
# ## 21.1 How probable is an answer?
#
# DPO compares whole answers. The log-probability of an answer is *summed over its tokens*: over all positions whose
# label is not -100. As in lesson 6, `logits[t]` are the scores for the token at position t + 1. Turn each row of scores
# into log-probabilities first; subtract the largest score of a row before you take exponentials, since scores can be
# large.


# %% points=3
def answer_log_p(logits, labels):
    """logits (T, V), labels (T) with -100 for tokens that are not scored -> the log-probability of the answer"""


# %% [markdown]
# ## 21.2 DPO's loss
#
# The log-ratio of a model is log π(chosen) - log π(rejected). The margin of a pair is beta times the difference: the
# log-ratio of the trained model minus that of the reference. The loss of a pair is $-\log \sigma(\text{margin})$.
#
# Return the *mean over all pairs*. Margins may be as low as -1,000: `np.logaddexp(0, x)` is $\log(1 + e^x)$ and does
# not overflow.


# %% points=2
def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Log-probabilities of N pairs by the trained model and by the reference, each (N); beta -> DPO's loss"""


# %% [markdown]
# ## 21.3 Training that leaves its reference alone
#
# Here is the smallest language model: one prompt, K possible answers, and a score for each of them. `scores` are its
# only parameters, and the probabilities of the answers are their softmax. So $\log\pi(\text{chosen}) -
# \log\pi(\text{rejected})$ is the difference of two scores, because softmax's denominator cancels.
#
# `pairs` is a list of (chosen, rejected), each the number of an answer from 0 to K - 1; an answer may occur in several
# pairs. Take `steps` steps of gradient descent on the *mean of the pairs' losses*, all pairs in each step. The
# reference is the model before the first step. Return the new scores, and do not change the array that you were given.


# %% points=3
def dpo_training(scores, pairs, beta, lr, steps):
    """scores (K), pairs: a list of (chosen, rejected), beta, the learning rate, steps -> the scores afterwards (K)"""


# %% [markdown]
# Three times `ok`? Compare with minilora's own: [`preference_loss`](../../minilora/engine/fused.py), and `log_ratios`
# and `with_reference` in [`preferences.py`](../../minilora/measure/preferences.py). And a question to think about: in
# 21.3, what happens to the probability of an answer that occurs in no pair?
