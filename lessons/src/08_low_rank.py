# %% [markdown]
# # Lesson 8: Is the update low rank?
#
# Full fine-tuning (lesson 7) adds an update $\Delta W$ of the same shape to every pretrained matrix $W$. LoRA, in the
# next lesson, assumes that an update of low rank is enough. You often read a stronger statement: that the update of
# full fine-tuning *has* a low rank. This can be measured. We fine-tune a model, subtract the old weights from the new
# ones, and decompose the difference.

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, predict, show
from minilora.models.load import TINY
from minilora.pages.style import FULL, GREY, ink

# %% [markdown]
# ## 1. A matrix is a sum of rank-one terms
#
# A column times a row is a matrix whose rows are all multiples of that row. Such a matrix has **rank 1**. Every matrix
# is a sum of such **rank-one terms**. The *singular value decomposition* (SVD) finds the best ones. Its first term is
# the best approximation of rank 1 (the one with the smallest squared error), the sum of the first two terms is the
# best of rank 2, and so on. Each term has a **singular value** $\sigma_i$, and they are sorted, largest first:
#
# $$\Delta W = \sigma_1\, u_1 v_1^\top + \sigma_2\, u_2 v_2^\top + \dots$$
#
# where every column $u_i$ and every row $v_i^\top$ has length 1. The terms are orthogonal, so the squares of their
# lengths add up, as in Pythagoras' theorem: the sum of the squares of all entries of $\Delta W$, its **squared
# Frobenius norm**, is $\sigma_1^2 + \sigma_2^2 + \dots$ The share of this sum that the r largest singular values
# contribute is the **share of variance explained** by r terms. The rest of the sum is the squared error of the best
# approximation of rank r.
#
# Below, two terms are hidden under a little noise.

# %%
rng = np.random.default_rng(0)
hidden = np.outer(rng.standard_normal(6), rng.standard_normal(8)) + np.outer(
    rng.standard_normal(6), rng.standard_normal(8)
)
seen = hidden + 0.05 * rng.standard_normal((6, 8))
print("singular values:", np.linalg.svd(seen, compute_uv=False).round(2))
claim("sum of squared entries minus sum of squared singular values",
      (seen**2).sum() - (np.linalg.svd(seen, compute_uv=False) ** 2).sum(), -1e-9, 1e-9)  # fmt: skip


def explained(delta, r):
    """The share of variance explained by the r largest singular values, from 0 to 1."""
    squares = np.linalg.svd(delta, compute_uv=False) ** 2
    return squares[:r].sum() / squares.sum()


claim("share explained by the first two terms", explained(seen, 2), 0.99, 1)

# %% [markdown]
# All six singular values are above zero, so strictly the *rank* is six: noise gives every matrix full rank. "Is the
# update low rank?" is therefore not a yes-or-no question. It asks how fast the singular values fall, compared with
# those of a matrix of pure noise.
#
# ## 2. The update of full fine-tuning
#
# As in lesson 7, all parameters of the tiny base are fine-tuned on the questions about law, here for 40 steps. We
# measure two losses: on law (the test set), and on old text (presidents' addresses, like those used for pretraining).

# %%
model, tokenizer = ml.load("tiny")
records = ml.split_records(ml.read_records("legal"))
law = {split: ml.encode_records(part, tokenizer) for split, part in records.items()}
old = ml.encode_text((TINY / "validation.txt").read_text(encoding="utf-8"), tokenizer, max_length=256)
EVERY = 1  # in the browser: 4


def losses():
    """On law (test set) and on old text."""
    return np.array([ml.mean_loss(model, law["test"]), ml.mean_loss(model, old[::EVERY])])


base = {name: weight.copy() for name, weight in model.state_dict().items()}
at_base = losses()
for _, parameter in model.named_parameters():
    parameter.requires_grad = True
ml.fit(model, law["train"], steps=40, lr=1e-3)
tuned = {name: weight.copy() for name, weight in model.state_dict().items()}
at_tuned = losses()
updates = {name: tuned[name] - base[name] for name in tuned if name.endswith("proj.weight")}
print(f"loss on law {at_base[0]:.2f} -> {at_tuned[0]:.2f}; on old text {at_base[1]:.2f} -> {at_tuned[1]:.2f}")
print(f"{len(updates)} updates, the first is {updates['model.layers.0.self_attn.q_proj.weight'].shape}")

# %% [markdown]
# ## 3. The share explained by 8 terms
#
# We compare with noise: a matrix of random numbers, in which no direction is preferred.
#
# > **Predict.** A 128 × 128 matrix has 128 rank-one terms. For pure noise, what share of the variance do the largest 8
# > explain: 6 %, that is 8/128, or more? And what share for a real update: 30 %, 60 %, 90 %?

# %%
predict("noise of 128 x 128: top 8, in percent")
predict("attention, q and o: top 8, in percent")

# %%
print(f"{'':<10} {'shape':>11}   top 8 of the update   top 8 of noise")
top, noise = {}, {}
for name, delta in updates.items():
    kind = name.split(".")[-2]
    top.setdefault(kind, []).append(100 * explained(delta, 8))
    noise.setdefault(kind, []).append(100 * explained(rng.standard_normal(delta.shape), 8))
for kind in top:
    shape = next(delta.shape for name, delta in updates.items() if kind in name)
    low, high = min(top[kind]), max(top[kind])
    print(f"{kind:<10} {shape!s:>11} {low:>9.0f} % to {high:.0f} % {np.mean(noise[kind]):>16.0f} %")

square, mlp = ("q_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
claim("noise of 128 x 128: top 8, in percent", np.mean([noise[kind] for kind in square]), 19, 24)
claim("attention, q and o: top 8, in percent", np.mean([top[kind] for kind in square]), 50, 72)
claim("MLP: top 8, in percent", np.mean([top[kind] for kind in mlp]), 30, 48)
lift = [np.mean(top[kind]) / np.mean(noise[kind]) for kind in top]
claim("top 8, as a multiple of noise: the lowest kind of matrix", min(lift), 1.8, 2.6)
claim("top 8, as a multiple of noise: the highest", max(lift), 2.6, 3.4)

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
for axes, kind in zip(panels, ("q_proj", "gate_proj"), strict=True):
    some = [delta for name, delta in updates.items() if kind in name]
    for color, drawn in ((GREY, [rng.standard_normal(some[0].shape)]), (FULL, some)):
        for matrix in drawn:
            squares = np.linalg.svd(matrix, compute_uv=False) ** 2
            axes.plot(range(1, len(squares) + 1), 100 * squares.cumsum() / squares.sum(), color=color, linewidth=1.5)
    axes.set(xlim=(0, 128), ylim=(0, 101), xticks=[0, 8, 32, 64, 96, 128], title=f"{kind}, {some[0].shape}")
    axes.set_xlabel("rank-one terms, largest first")
panels[0].set_ylabel("variance explained (percent)")
panels[0].text(55, 24, "updates, one line per block", color=ink(FULL))
panels[0].text(55, 12, "noise of the same shape", color=ink(GREY))
show(figure, alt="Two panels of curves that rise to 100 percent: the updates' rise much faster at first than noise's.")

# %% [markdown]
# *How to read it.* The height is the share of variance explained by the largest terms, with one orange line per block.
# At 8 terms the lines of `q_proj` are three times as high as that of noise. The line of a matrix of rank r would reach
# 100 percent at r, but these lines never bend so sharply.
#
# So the popular statement is half true. The largest 8 terms explain two to three times as much as in noise, in the MLP
# as well as in attention. But they never explain nearly all of the variance, and the other terms form a long tail.
# Biderman et al. (2024) studied models a few thousand times larger, trained on code and mathematics. They found the
# same tail: to explain 90 % of the variance, an update of full fine-tuning needs 10 to 100 times the ranks that are
# usual for LoRA. How many terms are needed here? That is your first [exercise](exercises/08_low_rank.ipynb).
#
# ## 4. Does the tail matter?
#
# The share explained measures how far the parameters moved, not whether that was useful. To find out, we add only a
# part of each update to the base and measure both losses. We start with the whole update of the matrices. It leaves out
# the embedding and the norms, which full fine-tuning also changed.
#
# > **Predict.** Together, the updates of all 28 matrices change both losses. If each update keeps only its largest 8
# > terms, what percentage of the gain on law remains? And of the forgetting (the increase of the loss on old text)?

# %%
predict("the largest 8: law gained, in percent")


# %%
def largest(delta, r):
    """The sum of the r largest rank-one terms."""
    U, S, Vt = np.linalg.svd(delta, full_matrices=False)
    return sum(S[i] * np.outer(U[:, i], Vt[i]) for i in range(r))


def random_part(delta, r):
    """The update, restricted to r random directions of the input."""
    directions = np.linalg.qr(rng.standard_normal((delta.shape[1], r)))[0]
    return delta @ directions @ directions.T


def with_only(part):
    """Both losses if part(update) is added to each matrix of the base, and nothing else is changed."""
    model.load_state_dict(base | {n: (base[n] + part(delta)).astype(np.float32) for n, delta in updates.items()})
    return losses()


def report(name, part):
    """Print a row; return both changes, in percent of those of the whole updates."""
    change = 100 * (with_only(part) - at_base) / (matrices - at_base)
    print(f"{name:<28} {change[0]:>7.0f} % {change[1]:>13.0f} %")
    return change


matrices = with_only(lambda delta: delta)
gain = 100 * (at_base - matrices)[0] / (at_base - at_tuned)[0]
claim("all 28 matrices, in percent of the whole gain on law", gain, 75, 92)
print(f"\n{'in percent of the matrices':<28} {'law gained':>9} {'old text lost':>15}")
kept = {r: report(f"largest {r}", lambda delta, r=r: largest(delta, r)) for r in (1, 2, 8, 32)}
tail = report("all but the largest 8", lambda delta: delta - largest(delta, 8))
lucky = report("8 directions at random", lambda delta: random_part(delta, 8))

# %%
claim("the largest 8: law gained, in percent", kept[8][0], 70, 90)
claim("the largest 8: old text lost, in percent", kept[8][1], 35, 65)
claim("the largest one alone: law gained, in percent", kept[1][0], 27, 49)
claim("8 directions at random: law gained, in percent", lucky[0], 0, 25)

# %% [markdown]
# The 8 random directions are the control. They bring only 9 % of the gain: which directions are kept matters. Nor is
# the tail just noise: without the largest 8 terms, the rest still brings 40 % of the gain. Both parts are useful, and
# their contributions partly overlap. With only the 8 largest terms, the model keeps most of the gain on law and
# forgets half as much as with the whole update. Do not conclude too much from this: with a smaller update, a model
# always forgets less.
#
# The row "largest 1" does not show what training at rank 1 can do, either. Here an update of full rank was trained and
# then truncated. An update that has rank 1 from the first step can put its one term where it helps most: lesson 12
# trains such an update.
#
# <details><summary>The same in PyTorch</summary>
#
# ```python
# import torch
#
# delta = torch.tensor(updates["model.layers.0.self_attn.q_proj.weight"])
# U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
# first = S[0] * torch.outer(U[:, 0], Vh[0])  # the largest rank-one term
# total = torch.linalg.matrix_norm(delta) ** 2  # the squared Frobenius norm
# share = S[:8].square().sum() / total  # explained by the top 8
# rank = torch.linalg.matrix_rank(delta)
# ```
#
# </details>
#
# ## What to remember
#
# - A matrix is a sum of rank-one terms. Their squared singular values add up to its squared Frobenius norm. The sum of
#   the r largest terms is the best approximation of rank r.
# - Strictly, an update has full rank. Its singular values fall faster than those of noise, and have a long tail.
# - On this model the largest 8 terms explain between a third and four fifths of the variance of an update. They bring
#   four fifths of the gain.
# - That the update of full fine-tuning is nearly low rank is half true. LoRA only needs a weaker claim: that an update
#   of low rank is *enough*.
#
# In the code, [`delta_weight`](../minilora/lora/adapters.py) gives the update of an adapter. **Now you:** [exercises
# 8](exercises/08_low_rank.ipynb).
#
# ## Sources
#
# - Ranks 10 to 100 times those usual for LoRA, for Llama-2-7B on code and mathematics: [Biderman et al.
#   2024](https://arxiv.org/abs/2405.09673). They count the terms that explain 90 % of the variance.
# - That a few directions can be enough for fine-tuning: [Aghajanyan et al. 2020](https://arxiv.org/abs/2012.13255),
#   which LoRA's paper ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)) names as its reason.
# - The best approximation of rank r: [Eckart and Young, Psychometrika, 1936](https://doi.org/10.1007/BF02288367).
