# %% [markdown]
# # Lesson 4: What is looked up?
#
# A language model turns each token (a piece of text) into a vector, one row of an array. Most layers process every row
# separately. One kind of layer lets a token take something from other tokens: attention. Without attention, the model
# would predict the word after "the" from "the" alone. What exactly does a token take, from which tokens, and what must
# it never take?
#
# | name | shape | what it is |
# |---|---|---|
# | `q` | (T, D) | queries: what each of T tokens asks for, a vector of length D |
# | `k` | (T, D) | keys: what each token can be found by |
# | `v` | (T, D) | values: what is returned when it is found |
# | `p` | (T, T) | attention weights: row t says how much token t takes from each token |

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, predict, show
from minilora.engine.attention import attention
from minilora.engine.fused import rope
from minilora.models.load import TINY
from minilora.nn.llama import Context

# %% [markdown]
# ## 1. A dictionary that gives a little of everything
#
# A Python dictionary compares your query with its keys, and returns the value of the key that is equal. Learned
# vectors are never equal. So attention makes the comparison soft: the **score** of a key is its dot product with the
# query, and **softmax** turns the scores of all keys into weights: $p_s = e^{\text{score}_s} / \sum_j
# e^{\text{score}_j}$. All weights are positive and add up to 1. Attention returns the weighted mean of the values.


# %%
def softmax(scores):
    """Softmax along the last axis. Subtracting the largest score changes no weight and prevents overflow."""
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


query = np.array([2.0, 0.0])
keys = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [-1.0, 0.0]])
values = np.array([10.0, 20.0, 30.0, 40.0])
print("scores ", keys @ query)
print("weights", softmax(keys @ query).round(3))
print(f"returned: {softmax(keys @ query) @ values:.2f}")

# %% [markdown]
# The first key has the query's direction and gets the largest weight. But the scores must not be too large.
#
# ## 2. Why the scores are divided by √D
#
# A dot product is a sum of D terms. If the elements of query and key are independent, with mean 0 and variance 1, then
# each term has variance 1. Variances of independent terms add up, so the sum has variance D, and the standard
# deviation $\sqrt D$: with D = 64, that is 8.
#
# > **Predict.** Take 16 random keys of length 64 and a random query. No key matches better than another. How large is
# > the largest weight, on average? Uniform weights would be 1/16.

# %%
predict("largest of 16 weights, random keys of length 64")

# %%
rng = np.random.default_rng(0)
D, count = 64, 16
q, k = rng.standard_normal((4000, 1, D)), rng.standard_normal((4000, count, D))
scores = (q * k).sum(axis=-1)  # (4000, 16): 4,000 lookups
claim("standard deviation of the scores", scores.std(), 7.8, 8.2)
claim("largest of 16 weights, random keys of length 64", softmax(scores).max(axis=-1).mean(), 0.82, 0.87)
claim("largest weight, scores divided by √D", softmax(scores / np.sqrt(D)).max(axis=-1).mean(), 0.23, 0.27)

# %% [markdown]
# Without the division, chance alone selects one key and excludes the others. The gradient becomes smaller, too: where
# one weight is nearly 1, softmax is saturated, and no score changes the weights by much. We measure it: what is the
# derivative of the largest weight with respect to its own score?


# %%
def slope(scores, eps=1e-4):
    """A central difference, as in lesson 1: the derivative of the largest weight with respect to its own score."""
    nudge = eps * (scores == scores.max(axis=-1, keepdims=True))
    up, down = softmax(scores + nudge), softmax(scores - nudge)
    return float(((up - down)[nudge > 0] / (2 * eps)).mean())


print(f"derivative with √D {slope(scores / np.sqrt(D)):.3f}, without {slope(scores):.3f}")
claim("derivative with √D over derivative without", slope(scores / np.sqrt(D)) / slope(scores), 1.6, 2.0)

# %% [markdown]
# The paper that introduced attention in this form gives the same reason ([Vaswani et al.
# 2017](https://arxiv.org/abs/1706.03762), section 3.2.1).
#
# ## 3. No token may look ahead
#
# A language model learns to predict the next token. If it could see that token, there would be nothing to learn. So
# attention is **causal**: token t looks only at itself and at earlier tokens. Here it is, row by row:


# %%
def look_up(q, k, v):
    """q, k, v (T, D) -> (T, D): each token takes from itself and from earlier tokens."""
    y = np.empty_like(v)
    for t in range(len(q)):
        weights = softmax(k[: t + 1] @ q[t] / np.sqrt(q.shape[1]))  # (t + 1)
        y[t] = weights @ v[: t + 1]
    return y


q, k, v = rng.standard_normal((3, 10, 8))
engine = attention(*(ml.Tensor(x[None, :, None]) for x in (q, k, v))).data[0, :, 0]  # a batch of one, with one head
claim("largest difference from minilora's attention", np.abs(look_up(q, k, v) - engine).max(), 0, 1e-12)

# %% [markdown]
# Matrix multiplications are faster than a loop, but they compute the scores of later tokens, too. A **causal mask**
# then sets these scores to $-\infty$, so that their weights are $e^{-\infty} = 0$. Another way looks just as good:
# compute the softmax of all scores, and set the weights of later tokens to 0 afterwards.
#
# > **Predict.** Now replace the key of the last token. How many of the nine earlier outputs change if the mask comes
# > before softmax? How many if it comes after?

# %%
past = np.tri(10, dtype=bool)  # row t is true up to column t


def before(q, k, v):
    return softmax(np.where(past, q @ k.T / np.sqrt(8), -np.inf)) @ v


def after(q, k, v):
    return np.where(past, softmax(q @ k.T / np.sqrt(8)), 0) @ v


other = k.copy()
other[-1] = rng.standard_normal(8)
for name, masked in {"before": before, "after": after}.items():
    moved = np.abs(masked(q, other, v) - masked(q, k, v))[:-1].max(axis=1)
    print(f"mask {name} softmax: {np.count_nonzero(moved)} of 9 earlier outputs change")
claim("largest change, mask before", np.abs(before(q, other, v) - before(q, k, v))[:-1].max(), 0, 0)
claim("largest change, mask after", np.abs(after(q, other, v) - after(q, k, v))[:-1].max(), 0.01, 10)

# %% [markdown]
# With the mask after softmax, the weights of later tokens are 0, but their scores are still in the sum by which softmax
# divides. A model trained with this mask looks ahead a little, and no picture of its weights shows it. So test the
# mask: replace a future token, and expect a change of exactly 0. This test works on any model. We try it on minilora's
# tiny one: four blocks, each with a layer of attention, trained on presidents' addresses.

# %%
model, tokenizer = ml.load("tiny")
text = "The Congress of the United States has the power to lay and collect taxes."
ids = np.array([tokenizer.encode(text)])  # (1, T)
changed = ids.copy()
changed[0, -1] = tokenizer.encode(" war")[0]
with ml.no_grad():
    move = np.abs(model(changed).data - model(ids).data)[0].max(axis=-1)  # (T): the largest change at each position
claim("change of all outputs before the replaced token", move[:-1].max(), 0, 0)
claim("change at the replaced token", move[-1], 1, 100)

# %% [markdown]
# ## 4. Position
#
# > **Predict.** Shuffle the keys of the earlier tokens, and their values in the same way. How does the output of the
# > last token change? And how does its output in a second layer, which reads the outputs of the first?

# %%
order = np.append(rng.permutation(9), 9)  # the first nine in another order
x = rng.standard_normal((10, 8))


def layers(x, depth):
    """Causal attention alone, each layer on the outputs of the one before: no parameters and no positions."""
    for _ in range(depth):
        x = look_up(x, x, x)
    return x


change = [np.abs(layers(x[order], depth)[-1] - layers(x, depth)[-1]).max() for depth in (1, 2)]
claim("change of the last output, one layer", change[0], 0, 1e-12)
claim("change of the last output, two layers", change[1], 0.001, 10)

# %% [markdown]
# In one layer nothing changes: a sum does not depend on the order of its terms. For the full stop after them, "dog
# bites man" is the same as "man bites dog". In the second layer the order matters, because the causal mask depends on
# position: in the first layer, the first token saw one token, the second saw two. So causal models can learn positions
# without any encoding of them ([Haviv et al. 2022](https://arxiv.org/abs/2203.16634), [Kazemnejad et al.
# 2023](https://arxiv.org/abs/2305.19466)).
#
# Nevertheless, most models encode positions. Llama models use **rotary position embeddings** (RoPE, [Su et al.
# 2021](https://arxiv.org/abs/2104.09864)): the elements of a query or key are taken in pairs, and each pair is rotated
# by an angle proportional to the position. Per position, the first pairs turn by a large angle, the last ones by a
# small one. A dot product depends on the lengths of two vectors and on the angle between them. Rotating both vectors
# keeps their lengths, and changes the angle between them by the difference of the two rotations, which is proportional
# to the distance between the two tokens. So positions enter a score only through their distance.


# %%
def turned(x, position, D=8):
    """x (D) rotated as the query or key of a token at this position."""
    angle = position * 10000.0 ** (-np.arange(0, D, 2) / D)  # one per pair
    return rope(ml.Tensor(x[None, None, None]), np.cos(angle), np.sin(angle)).data.ravel()


def score(far, near):
    """The score of the query of one token with the key of another, both rotated by their positions."""
    return turned(q[0], far) @ turned(k[1], near)


print(f"positions 5 and 2: {score(5, 2):.6f}   105 and 102: {score(105, 102):.6f}   5 and 4: {score(5, 4):.6f}")
claim("difference after moving both by 100", abs(score(5, 2) - score(105, 102)), 0, 1e-9)
claim("difference at another distance", abs(score(5, 2) - score(5, 4)), 0.01, 10)
claim("change of a query's length by rotation", abs(np.linalg.norm(turned(q[0], 105)) - np.linalg.norm(q[0])), 0, 1e-12)
claim("score of a query twice as long, over its score", turned(2 * q[0], 5) @ turned(k[1], 2) / score(5, 2), 2, 2)

# %% [markdown]
# ## 5. What a trained head looks for
#
# A block has several **heads** (multi-head attention), each with its own queries, so that one token can look for
# several things at once. In our model four query heads share two heads of keys and values. This **grouped-query
# attention** halves the KV cache, the keys and values of earlier tokens that are stored during generation ([Ainslie et
# al. 2023](https://arxiv.org/abs/2305.13245)). Here are the attention weights of every head, computed from the model's
# own queries and keys. As a check, these weights must reproduce the output of the model's attention.


# %%
def maps(ids):
    """Attention weights of each block and head, (4, 4, T, T), and the largest error of the outputs that they give."""
    found, far = [], 0.0
    with ml.no_grad():
        x = model.model.embed_tokens(ids)  # (1, T, C)
        angles = np.arange(ids.shape[1])[None, :, None, None] * model.model.frequencies()  # (1, T, 1, D/2)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        for block in model.model.layers:
            own, h = block.self_attn, block.input_layernorm(x)
            q = rope(own.q_proj(h).reshape(1, -1, 4, 32), cos, sin).data[0]  # (T, H, D)
            k = rope(own.k_proj(h).reshape(1, -1, 2, 32), cos, sin).data[0].repeat(2, axis=1)  # each for two heads
            v = own.v_proj(h).data.reshape(-1, 2, 32).repeat(2, axis=1)  # (T, H, D)
            scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(32)
            found.append(softmax(np.where(np.tri(len(q), dtype=bool), scores, -np.inf)))
            read = np.einsum("hts,shd->thd", found[-1], v).reshape(1, -1, 128)
            far = max(far, np.abs(own.o_proj(ml.Tensor(read)).data - own(h, Context(cos, sin)).data).max())
            x = block(x, Context(cos, sin))
    return np.array(found), far


weights, far = maps(ids)
claim("largest difference from the model's own attention", far, 0, 1e-4)

# %% [markdown]
# > **Predict.** To predict the next token, which earlier token is the most useful one to look at?

# %%
words = [tokenizer.decode([i]).replace(" ", "·") for i in ids[0]]
figure, panels = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
for axes, head, title in zip(
    panels, [(3, 0), (0, 0)], ["fourth block, first head", "first block, first head"], strict=True
):
    image = axes.imshow(weights[head], cmap="Greys", vmin=0, vmax=1)
    axes.set_title(title)
    axes.set_xticks(range(len(words)), words, rotation=90)
    axes.set_yticks(range(len(words)), words)
    axes.set(xlabel="key", ylabel="query")
figure.colorbar(image, ax=panels, label="attention weight", shrink=0.9)
show(
    figure,
    alt="Two attention maps, both empty above the diagonal: one dark just below it, one distributed over more tokens.",
)

# %% [markdown]
# *How to read it.* Each row is a token, and the shades are its attention weights for the token of each column. Each
# row adds up to 1. Above the diagonal is the future: all weights are exactly 0. On the left, many rows are darkest one
# step left of the diagonal: this head looks at the token just before (a previous-token head). On the right, the
# weights are distributed over more tokens.
#
# One sentence proves little. So we test the head on the left on three excerpts of the validation set (text that the
# model was not trained on):

# %%


unseen = tokenizer.encode((TINY / "validation.txt").read_text(encoding="utf-8"))
for start in (0, 1000, 2500):
    found, _ = maps(np.array([unseen[start : start + 128]]))
    share = np.diagonal(found[3, 0], -1).mean()  # of each token but the first: its attention weight for the one before
    claim(f"weight on the token before, text at {start}", share, 0.3, 0.6)
equal = np.mean([1 / (t + 1) for t in range(1, 128)])
print(f"with uniform weights it would be {equal:.3f}")

# %% [markdown]
# Nobody programmed this head to look at the previous token: training found it. In most of its experiments, the [LoRA
# paper](https://arxiv.org/abs/2106.09685) adapts the matrices that compute queries and values, `q_proj` and `v_proj`.
# Lesson 12 compares the choices.
#
# <details><summary>The same in PyTorch</summary>
#
# ```python
# import torch
# from torch.nn import functional as F
#
# q, k, v = (torch.from_numpy(array) for array in (q, k, v))  # (T, D)
# # The scores are divided by √D inside, and masked before softmax.
# y = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
# # Grouped-query attention: 4 query heads share 2 heads of keys and values. Heads come before tokens.
# q4 = q.reshape(1, 10, 4, 2).transpose(1, 2)  # (B, H, T, D)
# k2, v2 = (x[:, :4].reshape(1, 10, 2, 2).transpose(1, 2) for x in (k, v))  # (B, K, T, D)
# grouped = F.scaled_dot_product_attention(q4, k2, v2, is_causal=True, enable_gqa=True)
# ```
#
# </details>
#
# ## What to remember
#
# - Attention is a soft lookup: scores of a query with all keys, softmax, and the weighted mean of the values.
# - Scores are divided by √D. Otherwise chance alone selects one key, and the gradient of softmax shrinks.
# - The causal mask comes before softmax. Test it: replacing a later token must change earlier outputs by exactly 0.
# - One attention layer ignores the order of earlier tokens. RoPE rotates queries and keys, so scores depend on
#   distance.
#
# ## In the source
#
# [`textbook_attention`](../minilora/engine/attention.py) is this lesson's formula for all heads at once. Models use
# [`attention`](../minilora/engine/attention.py), with its backward pass, and [`rope`](../minilora/engine/fused.py);
# [`Attention`](../minilora/nn/llama.py) combines them.
#
# **Now you:** [exercises 4](exercises/04_attention.ipynb): the backward pass of softmax, grouped-query attention, and
# the backward pass of attention.
