# %% [markdown]
# # Lesson 14: Where does it fail?
#
# The usual list of LoRA's limits has two lines: "a slight drop in performance, sometimes" and "not ideal for extremely
# complex transformations". When is sometimes, and what is complex? Here are three tasks on which we know the answer
# beforehand: one that LoRA solves exactly, one that it cannot solve, and one in between, on a real model.

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, show
from minilora.engine.fused import lora_linear
from minilora.pages.style import LORA, ink

# %% [markdown]
# ## 1. A task that needs four directions
#
# We do not look for a task, we make one. A frozen matrix $W$ is given, and a teacher computes $y = x\,(W +
# \Delta)^\top$ with a secret change $\Delta$. LoRA sees x and y, and is to find $\Delta$. As we choose $\Delta$, we
# choose how hard that is.
#
# Every matrix is a sum of pieces of rank 1, each a column times a row; the sizes $\sigma_1 \ge \sigma_2 \ge \dots$ of
# these pieces are the matrix's singular values (lesson 7 takes a matrix apart in this way). The squared sizes add up to
# the sum of all squared numbers, the **energy**. And the theorem of Eckart and Young says that no matrix of rank r
# comes nearer to $\Delta$ than its r largest pieces do. So what LoRA of rank r must leave over is known before any
# training:
#
# $$\text{smallest error with rank } r \;=\; \sigma_{r+1}^2 + \sigma_{r+2}^2 + \dots$$
#
# That is so where all directions of the input are equally common, as we arrange below. (Where they are not, see the
# [exercises](exercises/14_limits.ipynb).) The first teacher has four pieces, of nearly equal size.
#
# > **Predict.** Draw the error against the rank, for r = 1 to 8. Where does it bend? Does r = 8 do better than r = 4?

# %%
T, m, n = 128, 48, 64
rng = np.random.default_rng(0)
x = np.linalg.qr(rng.standard_normal((T, n)))[0] * np.sqrt(T)  # all directions of the n inputs are equally common
W = rng.standard_normal((m, n)) / np.sqrt(n)


def learn(delta, r, steps=300, lr=0.05):
    """Train A and B on the teacher's answers; returns the error that is left, in percent of the error at the start."""
    A = ml.Parameter(rng.uniform(-1, 1, (r, n)) / np.sqrt(n))
    B = ml.Parameter(np.zeros((m, r)))
    optimizer = ml.AdamW({"A": A, "B": B}, lr=lr, weight_decay=0.0)
    wanted, errors = x @ (W + delta).T, []
    for step in range(steps):
        wrong = lora_linear(x, W, A, B, scale=1.0) - wanted
        error = (wrong * wrong).sum() * (1 / T)
        errors.append(float(error.data))
        optimizer.lr = lr * (1 - step / steps)
        error.backward()
        optimizer.step()
        A.grad = B.grad = None
    return 100 * errors[-1] / errors[0]


def least(delta, r):
    """The error that no matrix of rank r can avoid, in percent."""
    energy = np.linalg.svd(delta, compute_uv=False) ** 2
    return 100 * energy[r:].sum() / energy.sum()


columns, rows = (np.linalg.qr(rng.standard_normal((size, 4)))[0] for size in (m, n))
four = columns @ np.diag([4, 3.5, 3, 2.5]) @ rows.T
found = {r: learn(four, r) for r in (1, 2, 3, 4, 5, 6, 8)}
for r, error in found.items():
    print(f"r = {r}: {error:7.3f} % of the error is left; at least {least(four, r):6.3f} %")
above = [found[r] / least(four, r) - 1 for r in (1, 2, 3)]
claim("r = 1 to 3: how far above the least, in percent of it", 100 * max(above), -0.1, 1)
claim("r = 4: error left, in percent", found[4], 0, 0.01)

# %% [markdown]
# Training finds the best matrix of each rank, to the digits printed, although nobody showed it the pieces. It stops
# exactly where the theorem says. With r = 4 the task is solved, and every rank above 4 is only spent.
#
# ## 2. A task that needs all of them
#
# The second teacher has a $\Delta$ of random numbers. No direction is more important than another.
#
# > **Predict.** At which rank does *this* line bend? How much of the error is left at r = 8, and at which rank does
# > LoRA train as many numbers as $\Delta$ has, 48 × 64?

# %%
full = rng.standard_normal((m, n))
hard = {r: learn(full, r) for r in (1, 2, 4, 8, 16, 24, 32, 40, 48)}

figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
for axes, delta, errors, title in (
    (panels[0], four, found, "a change of rank 4"),
    (panels[1], full, hard, "a change of full rank"),
):
    ranks = range(max(errors) + 1)
    axes.plot(ranks, [least(delta, r) for r in ranks], color=LORA, linestyle="dashed", linewidth=1.5)
    axes.plot(list(errors), list(errors.values()), color=LORA, linestyle="none", marker="o")
    axes.set(title=title, xlabel="rank r", ylim=(-3, 103))
panels[0].set_ylabel("error left, in percent")
panels[1].text(22, 62, "dashed: predicted\ndots: trained", color=ink(LORA))
show(figure, alt="Left the error falls steeply to zero at rank 4 and stays there; right it falls slowly up to rank 48.")

# %% [markdown]
# *How to read it.* The dashed line is what rank r must leave over, the dots are what training left. On the left there
# is an elbow at 4, the rank of the task; on the right there is none.

# %%
above = [hard[r] / least(full, r) - 1 for r in hard if r < 48]
claim("full rank: how far above the least, in percent of it", 100 * max(above), -0.1, 3)
claim("full rank: error left at r = 8, in percent", hard[8], 50, 65)
print(f"numbers in the change: {m * n:,}; in A and B with r = 27: {27 * (m + n):,}, with r = 28: {28 * (m + n):,}")

# %% [markdown]
# With r = 8 more than half of the error stays, and no learning rate, no patience and no α will remove it. To remove it
# all takes r = 48, the full rank. From r = 28 on, A and B hold more numbers than $\Delta$: LoRA then costs *more* than
# full fine-tuning, and can do less.
#
# That is what "complex" means: **not many numbers that change, but many directions, all of which matter.**
#
# ## 3. A real model: style is cheap, facts are not
#
# Which of the two is a real task? Two of them, on the tiny base. The first is that of lesson 10: questions of law, of
# which a model of this size learns mostly the style. The second is made to be hard: eight rows of 16 words drawn at
# random, to be learned by heart. Nothing in them follows from anything else, so each word must be stored.
#
# > **Predict.** Full fine-tuning learns the random words perfectly, in 100 steps. What does rank 1 on q and v do, which
# > has a six-hundredth of the numbers? And rank 16?

# %%
model, tokenizer = ml.load("tiny")
words = rng.integers(3, model.config.vocab_size, (8, 17)).tolist()
by_heart = [ml.Sample(tuple(row), (-100, *row[1:])) for row in words]  # the first word of each row is given
law = {split: ml.encode_records(part, tokenizer) for split, part in ml.split_records(ml.read_records("legal")).items()}


def trial(config, train, test, lr, **settings):
    """The loss after training and the count of numbers that learned; config None: all of the model."""
    trained = model if config else ml.load("tiny")[0]
    if config:
        ml.add_adapter(trained, config, name="trial")
    else:
        for _, parameter in trained.named_parameters():
            parameter.requires_grad = True
    learning = ml.count_parameters(trained).trainable
    ml.fit(trained, train, lr=lr, **settings)
    loss = ml.mean_loss(trained, test)
    if config:
        ml.remove_adapter(trained, "trial")
    return loss, learning


def lora(r, targets):
    return ml.LoraConfig(r=r, lora_alpha=16, target_modules=targets)


tries = {
    "q and v, r = 1": (lora(1, ["q_proj", "v_proj"]), 1e-2),
    "q and v, r = 16": (lora(16, ["q_proj", "v_proj"]), 1e-2),
    "all linear, r = 16": (lora(16, "all-linear"), 1e-2),
    "full fine-tuning": (None, 2e-3),
}
print(f"before: loss {ml.mean_loss(model, by_heart):.2f}")
learned = {}
for name, (config, lr) in tries.items():
    learned[name], numbers = trial(config, by_heart, by_heart, lr, steps=100)
    print(f"{name:<18} {numbers:>9,} numbers: loss {learned[name]:.3f} on the random words")

claim("full fine-tuning: loss", learned["full fine-tuning"], 0, 0.05)
claim("q and v, r = 1: loss", learned["q and v, r = 1"], 4.3, 6.5)
claim("q and v, r = 16: loss", learned["q and v, r = 16"], 1, 4)
claim("all linear, r = 16: loss", learned["all linear, r = 16"], 0, 1.2)

# %% [markdown]
# A loss of 5 says that the right word gets a probability of e⁻⁵, less than one in a hundred. So rank 1 on q and v has
# hardly begun, in the same 100 steps, and rank 16 there is not done either. The cure is known from lesson 10: room in
# all matrices. It is the same method, with more numbers in more places.
#
# And on law?

# %%
settings = {"steps": 40, "batch_size": 4}
pay = trial(lora(8, "all-linear"), law["train"], law["validation"], 1e-2, **settings)
whole = trial(None, law["train"], law["validation"], 1e-3, **settings)
before = ml.mean_loss(model, law["validation"])
print(f"loss on unseen law: before {before:.2f}, LoRA with r = 8 {pay[0]:.2f}, full fine-tuning {whole[0]:.2f}")
claim("price of LoRA on law, in nats per token", pay[0] - whole[0], 0.02, 0.2)
claim("price, in percent of what full fine-tuning gains", 100 * (pay[0] - whole[0]) / (before - whole[0]), 3, 28)

# %% [markdown]
# A "slight drop", then, and here is its size: about a tenth of the gain. Rank hardly buys it back: in lesson 10, r = 64
# was better than r = 8 by less than the noise. Part of it is what LoRA does not touch at all. Full fine-tuning changes
# the embedding, too, and in lesson 7 a sixth of its gain lay outside the 28 matrices.
#
# Others measured this on larger models. Biderman et al. (2024) found that LoRA falls short of full fine-tuning where
# there is much to learn, billions of tokens of code and mathematics, and that it forgets less. Schulman et al.
# (2025) found no difference on small sets of instructions, and one where a set has more to store than the adapter has
# room. We did *not* see less forgetting on the tiny base: lesson 6 compares both at
# the same loss on law, and LoRA has forgotten about as much, or slightly more.
#
# How can you tell which kind your task is? Train twice, with r and with 4 r. Is the loss *on the training texts* lower
# with 4 r? Then rank was missing. Is it the same, and still high? Then it is something else: the rate, the matrices, or
# the data.
#
# ## What to remember
#
# - LoRA of rank r finds the best update of rank r, and what it must leave over is known: the tail of the energy.
# - Where a task needs k directions, r = k solves it, and more rank does nothing. Where it needs all, no small r will
#   do.
# - Style is cheap: rank 1 goes far. Facts that follow from nothing must be stored, and need numbers to be stored in.
# - Compare r with 4 r before you blame the rank.
#
# Read on in [`fused.py`](../minilora/engine/fused.py) (the layer that was trained here) and
# [`optim.py`](../minilora/nn/optim.py). **Now you:** [exercises 14](exercises/14_limits.ipynb).
#
# ## Sources
#
# - The best matrix of rank r: [Eckart and Young, Psychometrika, 1936](https://doi.org/10.1007/BF02288367).
# - LoRA learns less on code and mathematics, and forgets less: [Biderman et al.
#   2024](https://arxiv.org/abs/2405.09673), Llama-2-7B.
# - No difference on small sets, and a limit of capacity: [Schulman et al.
#   2025](https://thinkingmachines.ai/blog/lora/).
