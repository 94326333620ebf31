# %% [markdown]
# # Lesson 16: Who are its relatives?
#
# Many papers have changed LoRA since it appeared, and report that their version is better. Most of them change one of
# four things. Here are four relatives that are used in practice, one for each:
#
# | name | what it changes | in minilora |
# |---|---|---|
# | [rsLoRA](https://arxiv.org/abs/2312.03732) | the scale: α / √r in place of α / r | `use_rslora=True` |
# | [DoRA](https://arxiv.org/abs/2402.09353) | the form: lengths learn apart from directions | `use_dora=True` |
# | [PiSSA](https://arxiv.org/abs/2404.02948) | the start: the largest part of W | `init_lora_weights="pissa"` |
# | [LoRA+](https://arxiv.org/abs/2402.12354) | the learning rate: B's is larger than A's | `ml.lora_plus(...)` |
#
# What does each of them do, where is it right, and which one is better?

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, show
from minilora.pages.style import LORA, ink

# %% [markdown]
# ## 1. What they have in common: they start as the base
#
# Lesson 8 starts with B at zero, so that nothing changes before something is learned. PiSSA breaks with that. It takes
# W apart as lesson 7 did, $W = U S V^\top$, and gives the r largest parts of it to B and A. What is left of W, the
# *residual* $W - s\,B_0 A_0$, is frozen.
#
# > **Predict.** Five adapters of rank 8 are put on the tiny base: plain LoRA, rsLoRA, DoRA, PiSSA, and one whose A and
# > B are both random. Whose first outputs are the base's: to the last bit, but for rounding, not at all?

# %%
model, tokenizer = ml.load("tiny")
records = ml.split_records(ml.read_records("legal"))
samples = {split: ml.encode_records(part, tokenizer) for split, part in records.items()}
input_ids = np.array([sample.ids[:64] for sample in samples["train"] if len(sample.ids) >= 64][:4])  # (4, 64)
settings = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "both random": {"init_lora_weights": False},
}


def logits():
    """What the model says about four texts."""
    with ml.no_grad():
        return model(input_ids).data


def add(name, r=8, alpha=16, seed=0):
    """Put an adapter of this kind on every linear layer; return its parameters by name."""
    config = ml.LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", **settings[name])
    ml.add_adapter(model, config, name="trial", seed=seed)
    return model.trainable_parameters()


base_logits, learning, largest = logits(), {}, {}
for name in settings:
    parameters = add(name)
    learning[name] = ml.count_parameters(model).trainable
    changed = logits() != base_logits
    model.loss(input_ids, input_ids).backward()
    for factor in ("lora_A", "lora_B"):
        largest[name, factor] = max(np.abs(p.grad).max() for key, p in parameters.items() if key.endswith(factor))
    low, high = (0.99 * changed.size, changed.size) if name == "both random" else (0, 0)
    claim(f"{name}: outputs that differ from the base's", np.count_nonzero(changed), low, high)
    ml.remove_adapter(model, "trial")

# %% [markdown]
# All four, to the last bit; only the control, random A and B, is another model. For PiSSA this is minilora's doing. It
# never stores the residual, but computes $x W^\top + s\,x\,(BA - B_0 A_0)^\top$, and at the start the bracket is a
# number minus itself. So the base's array stays whole, and other adapters can share it. With the residual stored, as
# the paper writes it, W comes back up to rounding:

# %%
matrix = "model.layers.0.self_attn.q_proj"
W = dict(model.named_modules())[matrix].weight.data
parameters = add("PiSSA")
A, B = (
    next(p.data for key, p in parameters.items() if matrix in key and key.endswith(f)) for f in ("lora_A", "lora_B")
)
s = 16 / 8  # α / r
residual = W - np.float32(s) * (B @ A)
x = np.random.default_rng(0).standard_normal((64, W.shape[1])).astype(np.float32)
gap = np.abs(x @ residual.T + np.float32(s) * (x @ A.T) @ B.T - x @ W.T).max() / np.abs(x @ W.T).max()
claim("residual stored: largest difference, as a share of the largest output", gap, 1e-8, 1e-5)
energy = 100 * (1 - np.square(residual).sum() / np.square(W).sum())
claim("energy of this W that A and B hold at the start, in percent", energy, 75, 81)
ml.remove_adapter(model, "trial")

# %% [markdown]
# What does PiSSA gain by its start? Lesson 8's start is half dead for one step: dA contains B, and B is zero.

# %%
print("              largest dA   largest dB")
for name in ("LoRA", "PiSSA"):
    print(f"{name:<12} {largest[name, 'lora_A']:>11.3f} {largest[name, 'lora_B']:>12.3f}")
claim(
    "PiSSA: largest dA of the first step, as a share of the largest dB",
    largest["PiSSA", "lora_A"] / largest["PiSSA", "lora_B"],
    0.3,
    3,
)

# %% [markdown]
# ## 2. rsLoRA: which scale keeps the step equal?
#
# Why is the update divided by r? So that you can change r without looking for a new learning rate. rsLoRA says that
# this divides too much: more rank, and the adapter hardly moves; $\alpha/\sqrt r$ is right. Whether it is can be
# measured: put an adapter on, take **one** step, see how far the outputs moved.
#
# It depends on who takes the step. *SGD* moves each number by the learning rate η times its gradient. *Adam* divides
# each gradient by its own size first; in the first step nothing is left of it but its sign.
#
# > **Predict.** α is 16. How far does the first step of r = 64 move the outputs, compared with r = 1: with α / r and
# > SGD, with α / r and Adam, with α / √r and both?

# %%
ranks = [1, 8, 64]
scales = {  # how to get each scale from the settings, as (name of the settings, alpha)
    "α": lambda r: ("LoRA", 16 * r),
    "α / √r": lambda r: ("rsLoRA", 16),
    "α / r": lambda r: ("LoRA", 16),
}
optimizers = {"SGD": lambda p: ml.SGD(p, lr=1e-4), "Adam": lambda p: ml.AdamW(p, lr=1e-5, weight_decay=0)}


def move_of_one_step(optimizer, scale, r):
    """How far one step moves the logits: the root mean square, averaged over three random starts of A."""
    lengths = []
    for seed in range(3):
        name, alpha = scales[scale](r)
        step = optimizers[optimizer](add(name, r, alpha, seed))
        model.loss(input_ids, input_ids).backward()
        step.step()
        lengths.append(np.sqrt(np.mean((logits() - base_logits) ** 2)))
        ml.remove_adapter(model, "trial")
    return float(np.mean(lengths))


moves = {}
for optimizer in optimizers:
    first = move_of_one_step(optimizer, "α", 1)  # at r = 1 the three scales are one
    for scale in scales:
        moves[optimizer, scale] = [1.0] + [move_of_one_step(optimizer, scale, r) / first for r in ranks[1:]]

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
marks, powers = {"α": "^", "α / √r": "s", "α / r": "o"}, {"SGD": (1, 0, -1), "Adam": (1, 0.5, 0)}
for axes, optimizer in zip(panels, optimizers, strict=True):
    for scale, power in zip(scales, powers[optimizer], strict=True):
        move = moves[optimizer, scale]
        axes.plot(ranks, [r**power for r in ranks], "--", color=LORA, linewidth=1)
        axes.plot(ranks, move, marks[scale], color=LORA, markersize=6, clip_on=False)
        axes.annotate(scale, (64, 64.0**power), (9, 0), textcoords="offset points", color=ink(LORA), va="center")
    axes.set(xscale="log", yscale="log", xlabel="rank r", title=f"one step of {optimizer}", xlim=(0.9, 150))
    axes.set_xticks(ranks, [str(r) for r in ranks])
    axes.set_yticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel("move of the outputs\n(times that of r = 1)")
show(figure, alt="Moves of one step against rank: with SGD the square root is flat, with Adam the plain division is")
for (optimizer, scale), low, high in zip(
    moves, (30, 0.5, 0.008, 30, 4, 0.5), (100, 1.6, 0.028, 70, 9, 1.1), strict=True
):
    claim(f"{optimizer}, {scale}: move of r = 64, times that of r = 1", moves[optimizer, scale][-1], low, high)

# %% [markdown]
# *How to read it.* A level row of marks means that the first step is as large with one rank as with another; dashed is
# what the two points below predict. With SGD, rsLoRA's **α / √r** is level and α / r falls as fast as r grows. With
# Adam, which nearly everyone uses, **α / r** is the level one. With α alone, a mistake that programs have been shipped
# with, the step grows with the rank under both.
#
# After one step A is still its random start, and B is minus η times what the optimizer makes of dB:
#
# - SGD: dB contains s, so $s\,BA = -\eta\,s^2\,g^\top x\,(A^\top A)$: two factors s, and in $A^\top A$ a sum of r
#   terms. Level if $s^2 r$ is: $s = \alpha/\sqrt r$.
# - Adam: every number of B moves by η, whatever s is. One factor s is left, and r terms. For one token, term k
#   moves output i by $-\eta\,s\,\mathrm{sign}(g_i)\,|u_k|$: the same sign for every k, so they add up. Level if $s\,r$
#   is: $s = \alpha / r$.
#
# So the proof in the rsLoRA paper, which follows gradient steps, holds where its assumption does. The first step is not
# all of training; over a long one the paper finds that large ranks learn more with $\alpha/\sqrt r$. And at *one* rank
# there is nothing to find: rsLoRA with α is LoRA with another α.

# %%
rooted = ml.LoraConfig(r=64, lora_alpha=16, use_rslora=True).scale_of("any layer")
plain = ml.LoraConfig(r=64, lora_alpha=128).scale_of("any layer")
claim("scale of rsLoRA with α = 16, minus that of LoRA with α = 128, at r = 64", rooted - plain, 0, 0)

# %% [markdown]
# ## 3. DoRA: how long, and where to
#
# A row of W is an arrow: it has a length and a direction. DoRA lets both learn on their own. LoRA turns the arrow,
# $V = W + s\,BA$; then its length is set to a *magnitude* that is learned too, one number per row:
#
# $$y_i = \frac{\text{magnitude}_i}{\lVert V_i \rVert}\,(x V^\top)_i \qquad\qquad \text{magnitude} = \lVert W_i \rVert
# \text{ at the start}$$
#
# At the start the quotient is 1. The price is m more numbers per matrix, and a length in every step. The reason that
# the paper gives: it looked at how far each matrix had turned in training, and how much its lengths had changed.
# In full fine-tuning, where one was large the other was small. In LoRA both grew together.
#
# The number for that is the *correlation*: 1 if two things always grow together, -1 if one grows where the other
# shrinks, 0 if they have nothing to do with each other.
#
# > **Predict.** The paper looked at a model of pictures and words. Does a model of a million numbers do the same in 30
# > steps? Which of full fine-tuning, LoRA and DoRA come out above zero, which below?

# %%
originals = {name: array.copy() for name, array in ml.base_state(model).items() if name.endswith("_proj.weight")}
losses, together = {}, {}


def correlation(weights):
    """Between how far each of 28 matrices turned and how much its rows' lengths changed."""
    turned, longer = [], []
    for name, W in originals.items():
        V = weights[name]
        before, after = np.linalg.norm(W, axis=1), np.linalg.norm(V, axis=1)
        turned.append(np.mean(1 - (W * V).sum(axis=1) / (before * after)))  # 1 - cosine of the angle
        longer.append(np.mean(np.abs(after - before)))
    return float(np.corrcoef(turned, longer)[0, 1])


def train(name, lr):
    """30 steps of one kind at one rate; keep the loss on law that was held out, and the correlation."""
    plus = name == "LoRA+"
    parameters = add("LoRA" if plus else name)
    faster = ml.lora_plus(parameters, ratio=16) if plus else None
    optimizer = ml.AdamW(parameters, lr=lr, weight_decay=0, lr_scale=faster)
    ml.fit(model, samples["train"], steps=30, batch_size=4, optimizer=optimizer)
    losses[name, lr] = ml.mean_loss(model, samples["validation"])
    moved = {key: W + ml.delta_weight(model, key.removesuffix(".weight")) for key, W in originals.items()}
    together[name, lr] = correlation(moved)
    ml.remove_adapter(model, "trial")


full, _ = ml.load("tiny")
ml.fit(full, samples["train"], steps=30, batch_size=4, lr=1e-3)
for name in ("LoRA", "DoRA"):
    train(name, 1e-2)
claim("DoRA: numbers that learn beyond LoRA's, one per row", learning["DoRA"] - learning["LoRA"], 5120, 5120)
claim("full fine-tuning: correlation of turning and lengths", correlation(ml.base_state(full)), -0.8, -0.25)
claim("LoRA: the same", together["LoRA", 1e-2], 0.15, 0.75)
claim("DoRA: how much lower than LoRA's", together["LoRA", 1e-2] - together["DoRA", 1e-2], 0.05, 0.9)

# %% [markdown]
# It does, in signs: the paper has -0.62 for full fine-tuning and +0.83 for LoRA. DoRA comes out between the two, there
# (-0.31) and here; with three other seeds it was now above zero and now below, and always under LoRA's. So DoRA does
# change *how* an adapter moves. Whether that makes it *better* is another question.
#
# ## 4. Which one is better?
#
# LoRA+ is the simplest of all: the learning rate of B is multiplied by a number, here 16. The paper's argument is that
# in wide models A and B need steps of different size, and that B's must be the larger ones.
#
# Now the race. Four adapters of the same rank, 30 steps each, judged on terms of law that they never saw.
#
# > **Predict.** First LoRA, PiSSA and LoRA+ take the same learning rate, 0.001. Who wins, and by how much? Then each
# > takes the best of several rates. Who wins now?

# %%
tried = {  # rates around each one's best, 0.001 among them; DoRA at LoRA's best only
    "LoRA": (1e-3, 1e-2, 3e-2),
    "DoRA": (1e-2,),
    "PiSSA": (1e-3, 3e-3, 1e-2),
    "LoRA+": (3e-4, 1e-3, 3e-3),
}
for name, rates in tried.items():
    for lr in rates:
        if (name, lr) not in losses:
            train(name, lr)
print(f"loss of the base: {ml.mean_loss(model, samples['validation']):.3f}")
columns = sorted({lr for _, lr in losses})
print("rate      " + "".join(f"{lr:>9g}" for lr in columns))
best = {}
for name, rates in tried.items():
    print(f"{name:<10}" + "".join(f"{losses[name, lr]:>9.3f}" if lr in rates else " " * 9 for lr in columns))
    best[name] = min(losses[name, lr] for lr in rates)
at_edge = sum(
    best[name] in (losses[name, tried[name][0]], losses[name, tried[name][-1]]) for name in best if name != "DoRA"
)
claim("of LoRA, PiSSA and LoRA+: how many are best at an edge of their rates", at_edge, 0, 0)
claim("at 0.001: PiSSA ahead of LoRA by", losses["LoRA", 1e-3] - losses["PiSSA", 1e-3], 0.08, 0.3)
claim("at 0.001: LoRA+ ahead of LoRA by", losses["LoRA", 1e-3] - losses["LoRA+", 1e-3], 0.15, 0.5)
claim("each at its best rate: LoRA ahead of PiSSA by", best["PiSSA"] - best["LoRA"], -0.02, 0.15)
claim("each at its best rate: LoRA ahead of LoRA+ by", best["LoRA+"] - best["LoRA"], -0.02, 0.15)
claim("each at its best rate: LoRA ahead of DoRA by", best["DoRA"] - best["LoRA"], -0.05, 0.05)
claim("plain LoRA: what its best rate is worth, against 0.001", losses["LoRA", 1e-3] - best["LoRA"], 0.2, 0.6)

# %% [markdown]
# Had we stopped at the column of 0.001, we would have a paper: both newcomers beat LoRA clearly. But what the column
# shows is that 0.001 is too small for plain LoRA, and not for the others: LoRA+ is best there, PiSSA near its best.
# Give LoRA a rate of its own, and the lead is gone; DoRA, tried at LoRA's best rate only, ends level with it. **Here
# the rate is worth more than the relative.** (None of LoRA, PiSSA and LoRA+ is best at an edge of its rates, where a
# better one could lie just outside the table.)
#
# This is one task, one small model, one rank and few steps. It does not refute papers that trained models thousands
# of times larger: PiSSA reports 72.86 against 67.7 % on school mathematics, LoRA+ 1 to 2 % and up to twice the speed.
# What it says is which question to ask of each of them: was the old method given a rate of its own?
#
# ## What to remember
#
# - Scale, form, start, learning rate: a relative of LoRA changes one of these. All four here start as the base.
# - α / √r keeps the first step's size over ranks for SGD, α / r for Adam. At one rank, rsLoRA is another α.
# - DoRA separates length from direction, one more number per row, and moves a little more like full fine-tuning.
# - PiSSA starts with the largest part of W, so that both gradients live from the first step. LoRA+ speeds up B.
# - Compare each method at its own best learning rate, or you compare rates.
#
# Read on in [`variants.py`](../minilora/lora/variants.py), where each of them is a few lines, and in
# [`LoraConfig`](../minilora/lora/config.py). **Now you:** [exercises 16](exercises/16_relatives.ipynb).
#
# ## Sources
#
# - [Kalajdzievski 2023](https://arxiv.org/abs/2312.03732), rsLoRA: the theorem on the scale and its proof, which
#   follows plain gradient steps; more rank learns more: its abstract.
# - [Liu et al. 2024](https://arxiv.org/abs/2402.09353), DoRA: -0.62, +0.83 and -0.31 are in its section on the weight
#   decomposition (VL-BART, query matrices, several moments of training); ours are over all 28 matrices, at the end.
# - [Meng, Wang & Zhang 2024](https://arxiv.org/abs/2404.02948), PiSSA: 72.86 and 67.7 % are Mistral-7B on GSM8K, from
#   the abstract.
# - [Hayou, Ghosh & Yu 2024](https://arxiv.org/abs/2402.12354), LoRA+: 1 to 2 % and about 2 times, from the abstract.
