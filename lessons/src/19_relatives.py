# %% [markdown]
# # Lesson 19: Who are its relatives?
#
# Since LoRA appeared, many papers have changed it and report that their variant is better. Most of them change one of
# four things. Here are four variants that are used in practice, one for each:
#
# | name | what it changes | in minilora |
# |---|---|---|
# | [rsLoRA](https://arxiv.org/abs/2312.03732) | the scale: α / √r instead of α / r | `use_rslora=True` |
# | [DoRA](https://arxiv.org/abs/2402.09353) | the form: separate magnitudes and directions | `use_dora=True` |
# | [PiSSA](https://arxiv.org/abs/2404.02948) | initialisation: the largest part of W | `init_lora_weights="pissa"` |
# | [LoRA+](https://arxiv.org/abs/2402.12354) | the learning rate: B's is larger than A's | `ml.lora_plus(...)` |
#
# What does each of them do, when is its argument right, and which one is best?

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, predict, show
from minilora.pages.style import LORA, ink

# %% [markdown]
# ## 1. What do they compute before training?
#
# In lesson 9, B is initialised to zero, so that the adapter changes nothing before it is trained. PiSSA is different.
# It decomposes W as lesson 8 did, $W = U S V^\top$, and initialises B and A with the top r singular values and their
# vectors. What is left of W, the *residual* $W - s\,B_0 A_0$, is frozen.
#
# > **Predict.** We add five adapters of rank 8 to the tiny base: plain LoRA, rsLoRA, DoRA, PiSSA, and one whose A and
# > B are both random. Which of them give the base's outputs before training: to the last bit, up to rounding, not at
# > all?

# %%
model, tokenizer = ml.load("tiny")
records = ml.split_records(ml.read_records("legal"))
samples = {split: ml.encode_records(part, tokenizer) for split, part in records.items()}
input_ids = np.array([sample.ids[:64] for sample in samples["train"] if len(sample.ids) >= 64][:4])  # (4, 64)
variants = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "both random": {"init_lora_weights": False},
}


def logits():
    """The logits of four texts."""
    with ml.no_grad():
        return model(input_ids).data


def add(name, r=8, alpha=16, seed=0):
    """Put an adapter of this kind on every linear layer; return its parameters by name."""
    config = ml.LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", **variants[name])
    ml.add_adapter(model, config, name="trial", seed=seed)
    return model.trainable_parameters()


base_logits, trainable, largest = logits(), {}, {}
for name in variants:
    parameters = add(name)
    trainable[name] = ml.count_parameters(model).trainable
    changed = logits() != base_logits
    model.loss(input_ids, input_ids).backward()
    for factor in ("lora_A", "lora_B"):
        largest[name, factor] = max(np.abs(p.grad).max() for key, p in parameters.items() if key.endswith(factor))
    low, high = (0.99 * changed.size, changed.size) if name == "both random" else (0, 0)
    claim(f"{name}: outputs that differ from the base's", np.count_nonzero(changed), low, high)
    ml.remove_adapter(model, "trial")

# %% [markdown]
# All four variants do, to the last bit; only the control, with A and B random, differs. For PiSSA this is due to
# minilora. minilora never stores the residual, but computes $x W^\top + s\,x\,(BA - B_0 A_0)^\top$, and before
# training the bracket is exactly zero. So the base's array stays unchanged, and other adapters can share it. If the
# residual is stored, as in the paper, W is restored up to rounding:

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
explained = 100 * (1 - np.square(residual).sum() / np.square(W).sum())
claim("share of W's squared Frobenius norm in A and B, in percent", explained, 75, 81)
ml.remove_adapter(model, "trial")

# %% [markdown]
# What does PiSSA gain from its initialisation? With LoRA's, A is not trained in the first step: dA contains B, and B
# is zero.

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
# ## 2. rsLoRA: which scale keeps the first step equal?
#
# Why is the update divided by r? So that you can change r without tuning the learning rate again. The rsLoRA paper
# says that dividing by r is too much: with a large rank the adapter hardly changes, and $\alpha/\sqrt r$ is right. We
# can measure this: add an adapter, take **one** step, and see how far the outputs move.
#
# The answer depends on the optimizer. *SGD* moves each parameter by the learning rate η times its gradient. *Adam*
# first divides each gradient by its usual size; in the first step only the sign of the gradient is left.
#
# > **Predict.** α is 16. How far does the first step with r = 64 move the outputs, compared with r = 1: with α / r and
# > SGD, with α / r and Adam, with α / √r and either of them?

# %%
ranks = [1, 8, 64]
SEEDS = range(3)  # in the browser: range(1)
scales = {  # how to get each scale, as (name of the variant, alpha)
    "α": lambda r: ("LoRA", 16 * r),
    "α / √r": lambda r: ("rsLoRA", 16),
    "α / r": lambda r: ("LoRA", 16),
}
optimizers = {"SGD": lambda p: ml.SGD(p, lr=1e-4), "Adam": lambda p: ml.AdamW(p, lr=1e-5, weight_decay=0)}


def move_of_one_step(optimizer, scale, r):
    """How far one step moves the logits: the root mean square, averaged over random initialisations of A."""
    lengths = []
    for seed in SEEDS:
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
# *How to read it.* If the marks are level, the first step is equally large at all ranks. Dashed lines are the
# predictions that are derived below. With SGD, rsLoRA's **α / √r** is level, and with α / r the step shrinks in
# proportion to 1 / r. With Adam, which nearly everyone uses, **α / r** is the level one. With α alone, the step
# grows with the rank under both.
#
# After one step A is still at its random initialisation, and B is minus η times what the optimizer makes of dB:
#
# - SGD: dB contains s, so $s\,BA = -\eta\,s^2\,g^\top x\,(A^\top A)$: two factors s, and in $A^\top A$ a sum of r
#   terms. The move is the same at all ranks if $s^2 r$ is: $s = \alpha/\sqrt r$.
# - Adam: every entry of B moves by η, whatever s is. One factor s is left, and r terms. For one token, term k moves
#   output i by $-\eta\,s\,\mathrm{sign}(g_i)\,|u_k|$: the same sign for every k, so the terms add up. The move is the
#   same at all ranks if $s\,r$ is: $s = \alpha / r$.
#
# So the proof in the rsLoRA paper, which follows plain gradient steps, holds for the optimizer that it assumes. The
# first step is not the whole training: over a long one the paper finds that large ranks learn more with $\alpha/\sqrt
# r$. At *one* rank there is no difference to find: rsLoRA is LoRA with another α.

# %%
rooted = ml.LoraConfig(r=64, lora_alpha=16, use_rslora=True).scale_of("any layer")
plain = ml.LoraConfig(r=64, lora_alpha=128).scale_of("any layer")
claim("scale of rsLoRA with α = 16, minus that of LoRA with α = 128, at r = 64", rooted - plain, 0, 0)

# %% [markdown]
# ## 3. DoRA: magnitude and direction
#
# A row of W is a vector with a length and a direction. DoRA trains both separately. An update as in LoRA changes the
# direction, $V = W + s\,BA$; then the length is set to a *magnitude* that is trained too, one parameter per row:
#
# $$y_i = \frac{\text{magnitude}_i}{\lVert V_i \rVert}\,(x V^\top)_i \qquad\qquad \text{magnitude} = \lVert W_i \rVert
# \text{ at initialisation}$$
#
# (The paper speaks of columns; PEFT, too, has one magnitude per output.) At initialisation the quotient is 1. The cost
# is m more parameters per matrix, and the norms of all rows in every step. The paper gives this reason: it measured
# how far the direction of each matrix had changed in training, and how much its magnitudes had. In full fine-tuning,
# one change was small where the other was large. In LoRA, both were large together.
#
# A *correlation* measures this: it is 1 if two quantities always grow together, -1 if one grows where the other
# shrinks, 0 if they are unrelated.
#
# > **Predict.** The paper looked at a vision-language model. Does a model of a million parameters do the same in 30
# > steps? Which of full fine-tuning, LoRA and DoRA come out above zero, which below?

# %%
predict("full fine-tuning: correlation of direction and magnitude")

# %%
originals = {name: array.copy() for name, array in ml.base_state(model).items() if name.endswith("_proj.weight")}
losses = {}


def correlation(weights):
    """Between change of direction and change of magnitude, over 28 matrices."""
    turned, longer = [], []
    for name, W in originals.items():
        V = weights[name]
        before, after = np.linalg.norm(W, axis=1), np.linalg.norm(V, axis=1)
        turned.append(np.mean(1 - (W * V).sum(axis=1) / (before * after)))  # 1 - cosine of the angle
        longer.append(np.mean(np.abs(after - before)))
    return float(np.corrcoef(turned, longer)[0, 1])


def train(name, lr, seed=0):
    """30 steps of one kind at one rate; keep the loss of the first seed on the validation set; the correlation."""
    plus = name == "LoRA+"
    parameters = add("LoRA" if plus else name, seed=seed)
    faster = ml.lora_plus(parameters, ratio=16) if plus else None
    optimizer = ml.AdamW(parameters, lr=lr, weight_decay=0, lr_scale=faster)
    ml.fit(model, samples["train"], steps=30, batch_size=4, optimizer=optimizer, seed=seed)
    losses.setdefault((name, lr), ml.mean_loss(model, samples["validation"]))
    moved = {key: W + ml.delta_weight(model, key.removesuffix(".weight")) for key, W in originals.items()}
    ml.remove_adapter(model, "trial")
    return correlation(moved)


together = {"full": [], "LoRA": [], "DoRA": []}
for seed in SEEDS:
    full, _ = ml.load("tiny")
    ml.fit(full, samples["train"], steps=30, batch_size=4, lr=1e-3, seed=seed)
    together["full"].append(correlation(ml.base_state(full)))
    for name in ("LoRA", "DoRA"):
        together[name].append(train(name, 1e-2, seed))
for name, found in together.items():
    print(f"{name}: correlation, seed by seed:", ", ".join(f"{one:+.2f}" for one in found))
claim("DoRA: trainable parameters beyond LoRA's, one per row", trainable["DoRA"] - trainable["LoRA"], 5120, 5120)
claim("full fine-tuning: correlation of direction and magnitude", np.mean(together["full"]), -0.8, -0.25)
claim("LoRA: the same", np.mean(together["LoRA"]), 0.15, 0.75)
claim("DoRA: the same", np.mean(together["DoRA"]), -0.4, 0.4)
claim("DoRA: how much lower than LoRA's, least", min(np.subtract(together["LoRA"], together["DoRA"])), 0.05, 0.9)

# %% [markdown]
# For full fine-tuning and LoRA the signs agree with the paper, which has -0.62 and +0.83. DoRA comes out between the
# two with every seed, as in the paper (-0.31), but here its sign depends on the seed. So DoRA does change *how*
# an adapter changes the weights. Whether that makes it *better* is another question.
#
# ## 4. Which one is better?
#
# LoRA+ is the simplest variant: it multiplies the learning rate of B by a factor, here 16. The paper argues that in
# wide models A and B need different learning rates, and that B's must be the larger one.
#
# Now we compare them. Four adapters of the same rank are trained for 30 steps each, with one seed, and evaluated on
# legal terms from the validation set.
#
# > **Predict.** First LoRA, PiSSA and LoRA+ use the same learning rate, 0.001. Which of them is best, and by how much?
# > Then each uses its best of several rates. Which is best now?

# %%
predict("at 0.001: PiSSA ahead of LoRA by")

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
claim("plain LoRA: gain of its best rate over 0.001", losses["LoRA", 1e-3] - best["LoRA"], 0.2, 0.6)

# %% [markdown]
# If we had stopped at the column of 0.001, we could have written a paper: both newcomers clearly beat LoRA. But the
# table shows that 0.001 is far too small for plain LoRA, a tenth of its best rate. For LoRA+ it is the best rate, and
# PiSSA's best rate is only three times as high. With its own learning rate, LoRA is no longer behind; DoRA, run at
# LoRA's best rate only, ends level with it. **Here the learning rate matters more than the variant.** (For LoRA, PiSSA
# and LoRA+ the best rate is not at the edge of the table, where a better one could lie just outside.)
#
# This is one seed of one task, one small model, one rank and few steps. One seed cannot rank variants whose best
# losses differ by less than 0.1 nats; lesson 11 shows how to measure such differences. Nor does our result refute
# papers that trained models thousands of times larger: PiSSA reports 72.86 against 67.7 % on school mathematics, LoRA+
# 1 to 2 % and up to twice the speed. It shows which question to ask about each paper: was the baseline's learning rate
# tuned, too?
#
# <details><summary>The same in PyTorch</summary>
#
# ```python
# import torch
# from peft import LoraConfig, get_peft_model
# from peft.optimizers import create_loraplus_optimizer
# from transformers import AutoModelForCausalLM
#
# models = {}
# for name, options in variants.items():  # section 1's: the options are PEFT's
#     config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **options)
#     models[name] = get_peft_model(AutoModelForCausalLM.from_pretrained("tiny"), config)
# optimizer = create_loraplus_optimizer(models["LoRA"], torch.optim.AdamW,
#                                       lr=1e-3, loraplus_lr_ratio=16)
# ```
#
# </details>
#
# ## What to remember
#
# - Scale, form, initialisation, learning rate: a variant of LoRA changes one of these. All four here start as the
#   base.
# - α / √r keeps the size of the first step equal over ranks for SGD, α / r for Adam. At one rank, rsLoRA is another α.
# - DoRA separates magnitude from direction, with one more parameter per row. It changes the weights a little more like
#   full fine-tuning.
# - PiSSA starts with the largest part of W, so that neither gradient is zero in the first step. LoRA+ gives B a larger
#   rate.
# - Compare each method at its own best learning rate, or you compare learning rates.
#
# Read on in [`variants.py`](../minilora/lora/variants.py), where each of them is a few lines, and in
# [`LoraConfig`](../minilora/lora/config.py). **Now you:** [exercises 19](exercises/19_relatives.ipynb).
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
