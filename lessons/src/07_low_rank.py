# %% [markdown]
# # Lesson 7: Is the update low rank?
#
# Full fine-tuning (lesson 6) adds to every pretrained matrix $W$ an update $\Delta W$ of the same size. LoRA, in the
# next lesson, bets that a much simpler update would do. You often read a stronger sentence: that the update of full
# fine-tuning *is* simple, of low rank. That can be looked at. We fine-tune a model, subtract what it was before, and
# take the difference apart.

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, show
from minilora.models.load import TINY
from minilora.pages.style import FULL, GREY, ink

# %% [markdown]
# ## 1. A matrix is a sum of pieces
#
# A column times a row is a whole matrix, and a very simple one: each of its rows is a multiple of the same row. Such a
# matrix has **rank 1**. Every matrix is a sum of such pieces. The *singular value decomposition* (SVD) finds the best
# ones: the first piece is the nearest that a matrix of rank 1 can come, the first two together are the nearest of
# rank 2, and so on. Each piece has a size, its **singular value** $\sigma_i$, and they come sorted, largest first:
#
# $$\Delta W = \sigma_1\, u_1 v_1^\top + \sigma_2\, u_2 v_2^\top + \dots$$
#
# where every column $u_i$ and every row $v_i^\top$ has length 1. As the pieces stand at right angles to each other,
# their squares add up, as in Pythagoras' theorem: the sum of the squares of all numbers of $\Delta W$ is
# $\sigma_1^2 + \sigma_2^2 + \dots$ We call this sum the **energy**. So we can ask which share of the energy the first
# r pieces hold. What is left is the squared error of the best matrix of rank r.
#
# Below, two pieces are hidden under a little noise.

# %%
rng = np.random.default_rng(0)
hidden = np.outer(rng.standard_normal(6), rng.standard_normal(8)) + np.outer(
    rng.standard_normal(6), rng.standard_normal(8)
)
seen = hidden + 0.05 * rng.standard_normal((6, 8))
print("singular values:", np.linalg.svd(seen, compute_uv=False).round(2))
claim("energy: squares of the numbers minus squares of the sizes",
      (seen**2).sum() - (np.linalg.svd(seen, compute_uv=False) ** 2).sum(), -1e-9, 1e-9)  # fmt: skip


def share_of_top(delta, r):
    """The share of the energy that the r largest pieces hold, from 0 to 1."""
    energy = np.linalg.svd(delta, compute_uv=False) ** 2
    return energy[:r].sum() / energy.sum()


claim("share of the first two pieces", share_of_top(seen, 2), 0.99, 1)

# %% [markdown]
# All six singular values are above zero, so the *rank*, counted strictly, is six: noise makes every matrix full rank.
# "Is the update low rank?" is therefore never a question of yes or no. It asks how fast the sizes fall, compared with
# a matrix that has no structure at all.
#
# ## 2. An update to look at
#
# As in lesson 6: all numbers of the tiny base learn the questions of law, here for 40 steps. Two losses tell what that
# does: on law that it has not seen, and on old text, presidents' addresses like those it was pretrained on.

# %%
model, tokenizer = ml.load("tiny")
records = ml.split_records(ml.read_records("legal"))
law = {split: ml.encode_records(part, tokenizer) for split, part in records.items()}
old = ml.encode_text((TINY / "validation.txt").read_text(encoding="utf-8"), tokenizer, max_length=256)


def losses():
    """On law that is never trained, and on old text."""
    return np.array([ml.mean_loss(model, law["test"]), ml.mean_loss(model, old)])


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
# ## 3. How the energy is spread
#
# We need something to compare with. If $\Delta W$ were noise, every direction would be as good as any other.
#
# > **Predict.** A 128 × 128 matrix has 128 pieces. Of pure noise, which share of the energy do the largest 8 hold: 6 %,
# > that is 8/128, or more? And of a real update: 30 %, 60 %, 90 %?

# %%
print(f"{'':<10} {'shape':>11}   top 8 of the update   top 8 of noise")
top, noise = {}, {}
for name, delta in updates.items():
    kind = name.split(".")[-2]
    top.setdefault(kind, []).append(100 * share_of_top(delta, 8))
    noise.setdefault(kind, []).append(100 * share_of_top(rng.standard_normal(delta.shape), 8))
for kind in top:
    shape = next(delta.shape for name, delta in updates.items() if kind in name)
    low, high = min(top[kind]), max(top[kind])
    print(f"{kind:<10} {shape!s:>11} {low:>9.0f} % to {high:.0f} % {np.mean(noise[kind]):>16.0f} %")

square, feed = ("q_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
claim("noise of 128 x 128: top 8, in percent", np.mean([noise[kind] for kind in square]), 19, 24)
claim("attention, q and o: top 8, in percent", np.mean([top[kind] for kind in square]), 50, 72)
claim("feed-forward: top 8, in percent", np.mean([top[kind] for kind in feed]), 30, 48)

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
for axes, kind in zip(panels, ("q_proj", "gate_proj"), strict=True):
    some = [delta for name, delta in updates.items() if kind in name]
    for color, drawn in ((GREY, [rng.standard_normal(some[0].shape)]), (FULL, some)):
        for matrix in drawn:
            energy = np.linalg.svd(matrix, compute_uv=False) ** 2
            axes.plot(range(1, 129), 100 * energy.cumsum() / energy.sum(), color=color, linewidth=1.5)
    axes.set(xlim=(0, 128), ylim=(0, 101), xticks=[0, 8, 32, 64, 96, 128], title=f"{kind}, {some[0].shape}")
    axes.set_xlabel("largest pieces kept")
panels[0].set_ylabel("percent of the energy")
panels[0].text(55, 24, "updates, a line per block", color=ink(FULL))
panels[0].text(55, 12, "noise of the same shape", color=ink(GREY))
show(figure, alt="Two panels of curves that rise to 100 percent: the updates' rise much faster at first than noise's.")

# %% [markdown]
# *How to read it.* For each number of pieces kept, the share of the energy that they hold; one orange line per block.
# At 8 pieces the lines of `q_proj` stand three times as high as noise. But there is no corner after which nothing
# comes, as there would be at r for a matrix of rank r.
#
# So the popular sentence is half true. The largest 8 pieces hold two to three times the energy that noise would give
# them, in the feed-forward matrices as well as in attention. But nowhere do they hold nearly all, and the rest is
# spread over a long tail. Biderman et al. (2024) looked at models a few thousand times larger, which learned to program
# and to calculate, and found the same tail: an update of full fine-tuning needs 10 to 100 times the ranks that people
# usually give to LoRA. How many pieces hold 90 % here? That is your first [exercise](exercises/07_low_rank.ipynb).
#
# ## 4. Does the tail matter?
#
# Energy counts how far numbers moved, not whether that was of use. To find out, we put only a part of each update back
# into the base and measure both losses. First the whole of the matrices: what is left out then are the embedding and
# the norms, which full fine-tuning moved as well.
#
# > **Predict.** Of the gain on law that the 28 matrices bring, which share survives if each keeps only its largest 8
# > pieces? And of the loss on old text, the forgetting?


# %%
def largest(delta, r):
    """The sum of the r largest pieces."""
    U, S, Vt = np.linalg.svd(delta, full_matrices=False)
    return sum(S[i] * np.outer(U[:, i], Vt[i]) for i in range(r))


def random_part(delta, r):
    """What the update does in r directions drawn at random."""
    directions = np.linalg.qr(rng.standard_normal((delta.shape[1], r)))[0]
    return delta @ directions @ directions.T


def with_only(part):
    """Both losses when each matrix is moved by part(update), and all else is the base's."""
    model.load_state_dict(base | {n: (base[n] + part(delta)).astype(np.float32) for n, delta in updates.items()})
    return losses()


def report(name, part):
    """Print a row; returns both changes in percent of what all matrices change."""
    change = 100 * (with_only(part) - at_base) / (matrices - at_base)
    print(f"{name:<28} {change[0]:>7.0f} % {change[1]:>13.0f} %")
    return change


matrices = with_only(lambda delta: delta)
gain = 100 * (at_base - matrices)[0] / (at_base - at_tuned)[0]
claim("all 28 matrices, in percent of all that was gained on law", gain, 75, 92)
print(f"\n{'in percent of the matrices':<28} {'law gained':>9} {'old text lost':>15}")
kept = {r: report(f"largest {r}", lambda delta, r=r: largest(delta, r)) for r in (1, 2, 8, 32)}
tail = report("all but the largest 8", lambda delta: delta - largest(delta, 8))
lucky = report("8 directions at random", lambda delta: random_part(delta, 8))

# %%
claim("the largest 8: law gained", kept[8][0], 70, 90)
claim("the largest 8: old text lost", kept[8][1], 35, 65)
claim("the largest one alone: law gained", kept[1][0], 27, 49)
claim("8 directions at random: law gained", lucky[0], 0, 25)

# %% [markdown]
# The 8 directions drawn at random are the control: it is not enough that there are 8, they must be the largest. And
# the tail is no dirt either. Without the largest 8 the rest still brings 40 % of the gain: both parts know something,
# and in part the same. With the 8 alone the model has most of what it gained on law, and has forgotten half as much.
# Do not read too much into that: a smaller update forgets less in any case.
#
# It would also be a mistake to conclude from "the largest one alone" what training with rank 1 can do. Here an update
# of full rank was trained, and then cut. An update that has rank 1 from the first step can place its one piece where
# that helps most: lesson 10 trains one.
#
# ## What to remember
#
# - A matrix is a sum of pieces of rank 1, and their squared sizes add up to its energy. The largest r pieces are the
#   best matrix of rank r.
# - Strictly counted, an update has full rank. Its pieces fall faster than those of noise, and have a long tail.
# - On this model the largest 8 pieces hold between a third and four fifths of the energy, and four fifths of the gain.
# - That full fine-tuning is nearly low rank is half true. That an update of low rank is *enough* is another claim, and
#   LoRA needs only that one.
#
# Read on in [`adapters.py`](../minilora/lora/adapters.py), where [`delta_weight`](../minilora/lora/adapters.py) gives
# the update of an adapter. **Now you:** [exercises 7](exercises/07_low_rank.ipynb).
#
# ## Sources
#
# - Ranks 10 to 100 times those usual for LoRA, for Llama-2-7B on code and mathematics: [Biderman et al.
#   2024](https://arxiv.org/abs/2405.09673). Theirs are counted for 90 % of the variance.
# - That few directions can be enough to fine-tune in: [Aghajanyan et al. 2020](https://arxiv.org/abs/2012.13255), which
#   LoRA's paper ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)) names as its reason.
# - The best matrix of rank r: [Eckart and Young, Psychometrika, 1936](https://doi.org/10.1007/BF02288367).
