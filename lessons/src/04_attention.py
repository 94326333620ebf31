# %% [markdown]
# # Lesson 4: What is looked up?
#
# A language model turns each token into a row of numbers. Most of its layers treat every row on its own. One kind of
# layer lets a token take something from other tokens: attention. Without it, "the" in front of "power" could not know
# what stood before. What exactly is taken, from where, and what must never be?
#
# | name | shape | what it is |
# |---|---|---|
# | `q` | (T, D) | queries: what each of T tokens asks for, D numbers |
# | `k` | (T, D) | keys: what each token can be found by |
# | `v` | (T, D) | values: what is handed over when it is found |
# | `p` | (T, T) | weights: row t says how much token t takes from each token |

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, show
from minilora.engine.attention import attention
from minilora.engine.fused import rope
from minilora.models.load import TINY
from minilora.nn.llama import Context

# %% [markdown]
# ## 1. A dictionary that gives a little of everything
#
# A Python dictionary compares what you ask for with each key, and hands over the value of the one that is equal.
# Numbers that are learned are never equal. So attention makes the comparison soft: the **score** of a key is its dot
# product with the query, and the scores of all keys become weights. **Softmax** does that: $p_s = e^{\text{score}_s} /
# \sum_j e^{\text{score}_j}$. All weights are positive, and together they are 1. What is handed over is the mean of the
# values with these weights.


# %%
def softmax(scores):
    """The same along the last axis of any array; subtracting the largest changes nothing, and nothing overflows."""
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


query = np.array([2.0, 0.0])
keys = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [-1.0, 0.0]])
values = np.array([10.0, 20.0, 30.0, 40.0])
print("scores ", keys @ query)
print("weights", softmax(keys @ query).round(3))
print(f"handed over: {softmax(keys @ query) @ values:.2f}")

# %% [markdown]
# The first key points where the query points, and gets most. But a lookup that is soft can be too hard.
#
# ## 2. Why the scores are divided by √D
#
# A dot product is a sum of D terms. If the numbers of query and key are independent, of mean 0 and of spread 1, then
# each term has spread 1, and a sum of D of them has spread $\sqrt D$: with a head of width 64, that is 8. (Spread is
# the standard deviation.)
#
# > **Predict.** 16 random keys of width 64, and a random query. None of the keys is better than another. How large is
# > the largest of the 16 weights, on average? An equal share would be 1/16.

# %%
rng = np.random.default_rng(0)
D, count = 64, 16
q, k = rng.standard_normal((4000, 1, D)), rng.standard_normal((4000, count, D))
scores = (q * k).sum(axis=-1)  # (4000, 16): 4,000 lookups
claim("spread of the scores", scores.std(), 7.8, 8.2)
claim("largest weight", softmax(scores).max(axis=-1).mean(), 0.82, 0.87)
claim("largest weight, scores divided by √D", softmax(scores / np.sqrt(D)).max(axis=-1).mean(), 0.23, 0.27)

# %% [markdown]
# Without the division, chance alone picks one key and shuts out the others. It also learns worse. Where one weight is
# nearly 1, moving a score moves no weight by much, and little gradient comes back. We measure that: how far does the
# largest weight move for each unit that its score moves?


# %%
def slope(scores, eps=1e-4):
    """A central difference, as in lesson 1: how the largest weight moves with its own score."""
    nudge = eps * (scores == scores.max(axis=-1, keepdims=True))
    up, down = softmax(scores + nudge), softmax(scores - nudge)
    return float(((up - down)[nudge > 0] / (2 * eps)).mean())


print(f"slope with √D {slope(scores / np.sqrt(D)):.3f}, without {slope(scores):.3f}")
claim("times as steep with √D", slope(scores / np.sqrt(D)) / slope(scores), 1.6, 2.0)

# %% [markdown]
# The paper that introduced attention in this form gives this as its reason
# ([Vaswani et al. 2017](https://arxiv.org/abs/1706.03762), section 3.2.1).
#
# ## 3. No token may look ahead
#
# A language model learns to say which token comes next. If it could see that token, there would be nothing to learn. So
# token t looks at itself and at what came before. Here is one head, row by row:


# %%
def look_up(q, k, v):
    """q, k, v (T, D) -> (T, D): each token takes from itself and from what came before it."""
    y = np.empty_like(v)
    for t in range(len(q)):
        weights = softmax(k[: t + 1] @ q[t] / np.sqrt(q.shape[1]))  # (t + 1)
        y[t] = weights @ v[: t + 1]
    return y


q, k, v = rng.standard_normal((3, 10, 8))
engine = attention(*(ml.Tensor(x[None, :, None]) for x in (q, k, v))).data[0, :, 0]  # of one batch, the one head
claim("distance from minilora's attention", np.abs(look_up(q, k, v) - engine).max(), 0, 1e-12)

# %% [markdown]
# Whole matrices are faster than rows. Then all scores are computed, those of the future too, and the future is hidden
# by making its scores $-\infty$, for $e^{-\infty}$ is 0. There is another way that looks as good: compute the softmax
# of all scores, and set the weights of the future to 0 afterwards.
#
# > **Predict.** Now replace the key of the last token. Which of the nine earlier outputs change if the mask comes
# > before softmax? Which if it comes after?

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
# The weights of the future are gone, but the future still stands in the sum by which softmax divides. A model trained
# so looks ahead a little, and nobody sees it in a picture of the weights. Test for it instead: replace a future token,
# and ask for a change of exactly 0. That test works on a whole model, without knowing how it is made. Ours is the tiny
# one that comes with minilora: four blocks, each with attention, which has read presidents' addresses.

# %%
model, tokenizer = ml.load("tiny")
text = "The Congress of the United States has the power to lay and collect taxes."
ids = np.array([tokenizer.encode(text)])  # (1, T)
changed = ids.copy()
changed[0, -1] = tokenizer.encode(" war")[0]
with ml.no_grad():
    move = np.abs(model(changed).data - model(ids).data)[0].max(axis=-1)  # (T): the largest change at each place
claim("change of all outputs before the replaced token", move[:-1].max(), 0, 0)
claim("change at the replaced token", move[-1], 1, 100)

# %% [markdown]
# ## 4. Where something stands
#
# > **Predict.** Shuffle the keys of the earlier tokens, and their values with them. What does the last token find then?

# %%
order = np.append(rng.permutation(9), 9)  # the first nine in another order
claim("change of the last output", np.abs(look_up(q, k[order], v[order])[-1] - look_up(q, k, v)[-1]).max(), 0, 1e-12)

# %% [markdown]
# The same: a sum does not know the order of its terms. For attention alone, "dog bites man" is "man bites dog". So the
# position must be put into queries and keys. Llama models do it by turning them: the numbers of a query are taken in
# pairs, and each pair is rotated by an angle that grows with the position ([Su et al.
# 2021](https://arxiv.org/abs/2104.09864)). A dot product of two arrows depends on the angle between them alone. So a
# score comes to depend on how far apart two tokens are, not on where they stand.


# %%
def turned(x, position, D=8):
    """x (D) rotated as a token at this position."""
    angle = position * 10000.0 ** (-np.arange(0, D, 2) / D)  # one for each pair
    return rope(ml.Tensor(x[None, None, None]), np.cos(angle), np.sin(angle)).data.ravel()


def score(far, near):
    """Of the query of one token with the key of another, both turned to their positions."""
    return turned(q[0], far) @ turned(k[1], near)


print(f"places 5 and 2: {score(5, 2):.6f}   105 and 102: {score(105, 102):.6f}   5 and 4: {score(5, 4):.6f}")
claim("difference after moving both by 100", abs(score(5, 2) - score(105, 102)), 0, 1e-9)
claim("difference at another distance", abs(score(5, 2) - score(5, 4)), 0.01, 10)

# %% [markdown]
# ## 5. What a trained head looks for
#
# A block has several **heads**: small attentions side by side, each with its own queries, so that one token can look
# for several things at once. In our model four query heads share two heads of keys and values, two and two; that halves
# what must be kept of earlier tokens while the model writes ([Ainslie et al. 2023](https://arxiv.org/abs/2305.13245)).
# Here are the weights of every head, computed from the model's own queries and keys. As a check, they must lead to what
# the model's attention really puts out.


# %%
def maps(ids):
    """Weights of each block and head, (4, 4, T, T), and how far their output is from the model's own."""
    found, far = [], 0.0
    with ml.no_grad():
        x = model.model.embed_tokens(ids)  # (1, T, C)
        cos, sin = model.model.angles(ids, None, None)
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
claim("distance from the model's own attention", far, 0, 1e-4)

# %% [markdown]
# > **Predict.** Which earlier token is the most useful one to look at, to say what comes next?

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
    axes.set(xlabel="looked at", ylabel="looking")
figure.colorbar(image, ax=panels, label="weight", shrink=0.9)
show(
    figure, alt="Two maps of weights, both empty above the diagonal: one dark just below the diagonal, one spread out."
)

# %% [markdown]
# *How to read it.* Each row is a token, and its shades say how much it takes from the token of each column; a row adds
# up to 1. Above the diagonal all is white, and exactly 0: that is the future. On the left, many rows are darkest one
# step left of the diagonal: this head looks for the token just before. On the right the weight is spread over more.
#
# One sentence proves little. So the same head, on three pieces of text that the model never saw in training:

# %%


unseen = tokenizer.encode((TINY / "validation.txt").read_text(encoding="utf-8"))
for start in (0, 1000, 2500):
    found, _ = maps(np.array([unseen[start : start + 128]]))
    share = np.diagonal(found[3, 0], -1).mean()  # of each token but the first, its weight on the one before
    claim(f"weight on the token before, text at {start}", share, 0.3, 0.6)
equal = np.mean([1 / (t + 1) for t in range(1, 128)])
print(f"with equal weights it would be {equal:.3f}")

# %% [markdown]
# Nobody told it to. Queries and keys that find the token before made the loss smaller, and gradients led there. Two of
# the matrices that make queries, keys and values, `q_proj` and `v_proj`, are the ones that the
# [LoRA paper](https://arxiv.org/abs/2106.09685) adapts in most of its experiments; lesson 10 tries which is best.
#
# ## What to remember
#
# - Attention is a soft lookup: scores of a query with all keys, softmax, and the mean of the values with these weights.
# - Scores are divided by √D, or chance alone makes them so large that one key takes all and little is learned.
# - The future is hidden before softmax. The test: a replaced future token changes the past by exactly 0.
# - Attention does not know order. Turning queries and keys by their position makes scores depend on distance.
#
# ## Where it stands
#
# [`textbook_attention`](../minilora/engine/attention.py) is this lesson's formula for all heads at once;
# [`attention`](../minilora/engine/attention.py) the one that models use, with its gradients by hand;
# [`rope`](../minilora/engine/fused.py) turns; [`Attention`](../minilora/nn/llama.py) puts them together.
#
# **Now you:** [exercises 4](exercises/04_attention.ipynb): what softmax does with a gradient, heads that share keys,
# and the way back through all of it.
