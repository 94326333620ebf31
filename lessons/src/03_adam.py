# %% [markdown]
# # Lesson 3: What does Adam keep?
#
# A gradient says in which direction each parameter must move for the loss to fall, but not how far. The simplest answer
# is **SGD** (stochastic gradient descent; stochastic, because the gradient is that of a random batch). It moves each
# parameter against its gradient, multiplied by one **learning rate** for all. Nearly all language models are trained
# with another optimizer, **AdamW**. AdamW stores two more values for each trainable parameter: the **optimizer state**.
# In this lesson you
#
# 1. see where one learning rate fails, and how momentum helps,
# 2. take Adam apart, and test each of its two parts,
# 3. count the bytes of the optimizer state, the largest part of what LoRA saves,
# 4. see why the W in AdamW matters,
# 5. train a small language model, with letters as tokens.
#
# [The exercises](exercises/03_adam.ipynb): AdamW, and the loss of a classifier with its gradient.

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, predict, show
from minilora.engine.fused import cross_entropy
from minilora.measure.statistics import Interval
from minilora.pages.style import BLACK, GREY, SKY, ink

# %% [markdown]
# ## 1. One learning rate for all parameters
#
# Take a loss with two parameters, $L = \tfrac12 w_1^2 + \tfrac12 \cdot 100\, w_2^2$. It is a long valley: steep across
# ($w_2$), nearly flat along ($w_1$). The derivatives are $w_1$ and $100\, w_2$. With SGD, a step of learning rate η
# multiplies $w_1$ by $1 - η$ and $w_2$ by $1 - 100\,η$.
#
# > **Predict.** What is the largest learning rate at which SGD does not diverge? At that rate, what share of its
# > distance to 0 does $w_1$ cover in one step?


# %%
def descend(make_optimizer, steps=50, scale=1.0, turn=0.0, starts=((-8.0, 1.0),)):
    """The points (steps + 1, N, 2) from N starts. scale: a factor on the loss. turn: of the valley, in radians."""
    axes = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    w = ml.Tensor(np.array(starts) @ axes, requires_grad=True)
    optimizer, points = make_optimizer([w]), [w.data.copy()]
    for _ in range(steps):
        optimizer.zero_grad()
        along = w @ ml.Tensor(axes.T)
        (along * along * (0.5 * scale * np.array([1.0, 100.0]))).sum().backward()
        optimizer.step()
        points.append(w.data.copy())
    return np.array(points) @ axes.T


def height(points):
    return (0.5 * points**2 * [1, 100]).sum(axis=-1)


def sgd(lr, momentum=0.0):
    return lambda parameters: ml.SGD(parameters, lr=lr, momentum=momentum)


def adam(lr, beta1=0.9):
    return lambda parameters: ml.AdamW(parameters, lr=lr, betas=(beta1, 0.999), weight_decay=0)


below, above = (abs(descend(sgd(lr), steps=100)[-1, 0, 1]) for lr in (0.0199, 0.0201))
claim("w₂ after 100 steps with learning rate 0.0199, from 1", below, 0.3, 0.45)
claim("w₂ after 100 steps with learning rate 0.0201, from 1", above, 2.5, 3)

# %% [markdown]
# The limit is 0.02, where $1 - 100\,η = -1$. At that rate $w_1$ covers 2 % of its distance to 0 per step. The steep
# direction limits the learning rate for both.
#
# The oldest remedy is **momentum**. Each parameter has a velocity $u$, a decaying sum of its gradients, with a
# momentum μ between 0 and 1:
#
# $$u \leftarrow μ\, u + g \qquad w \leftarrow w - η\, u$$
#
# Along the valley gradients add up; across it they alternate in sign and cancel. The best values for this valley are
# known (10 is the square root of 100, the ratio of the coefficients of $w_2^2$ and $w_1^2$): $\sqrt{μ} = \frac{10 -
# 1}{10 + 1}$ and $η = \left(\frac{2}{10 + 1}\right)^2$, about 0.67 and 0.033.

# %%
plain, heavy = (height(descend(make))[-1, 0] for make in (sgd(0.019), sgd(0.033, momentum=0.67)))
print(f"loss after 50 steps, from 82: SGD {plain:.2f}, SGD with momentum {heavy:.5f}")
claim("SGD with momentum: loss after 50 steps", heavy, 0, 0.0005)

# %% [markdown]
# ## 2. A learning rate for each parameter
#
# **Adam** stores for each parameter a running mean of its gradient $g$, called $m$, and a running mean of the squared
# gradient, called $v$. They are the first and second **moment**. In step t = 1, 2, 3, ...:
#
# $$m \leftarrow β_1 m + (1 - β_1)\, g \qquad v \leftarrow β_2 v + (1 - β_2)\, g^2$$
#
# $$\hat m = \frac{m}{1 - β_1^t} \qquad \hat v = \frac{v}{1 - β_2^t} \qquad
# w \leftarrow w - η\, \frac{\hat m}{\sqrt{\hat v} + ε}$$
#
# Usual values are $β_1 = 0.9$, $β_2 = 0.999$ and $ε = 10^{-8}$. (ε prevents a division by zero; the hats are explained
# in section 3.) So Adam has two parts: $m$ is momentum, and $\sqrt{\hat v}$, by which it is divided, is about the
# usual size of this parameter's gradient.
#
# > **Predict.** Three parameters have the gradients 0.000001, 1 and 1000. How far does each of them move in Adam's
# > first step, with $η = 0.01$?

# %%
predict("Adam's first step: shortest move over longest")

# %%
gradients = np.array([1e-6, 1.0, 1000.0])
w = ml.Tensor(np.zeros(3), requires_grad=True)
optimizer = adam(0.01)([w])
(w * gradients).sum().backward()
optimizer.step()
print("moved by", ", ".join(f"{move:.6f}" for move in w.data))
claim("Adam's first step: shortest move over longest", np.abs(w.data).min() / np.abs(w.data).max(), 0.985, 1)

# %% [markdown]
# All of them move by η, whatever the gradient. (The first moves one percent less, because of ε.) So Adam's learning
# rate is a **length**: the distance that a parameter moves per step while its gradient hardly changes. If the loss is
# multiplied by 1000, SGD moves 1000 times as far. And Adam?

# %%
once, scaled = descend(adam(0.3)), descend(adam(0.3), scale=1000.0)
claim("largest difference between Adam's paths, loss times 1000", np.abs(once - scaled).max(), 0, 1e-6)

# %% [markdown]
# Adam takes the same path. A comparison of Adam with plain SGD would mix the effects of its two parts, so we test each
# part alone. With $β_1 = 0$ Adam has no momentum. Each optimizer gets 50 steps and the best of several learning rates,
# in this valley and in the same valley turned by 45 degrees. In the turned valley, the loss is equally steep in both
# parameters. One start can flatter Adam: its first step is as long as its learning rate, so from $w_2 = 1$ a rate of 1
# reaches the bottom of the valley at once. We take 101 starts, and the median of their losses.
#
# > **Predict.** For which of the four optimizers does it matter that the valley was turned?

# %%
contenders = {
    "SGD": [sgd(lr) for lr in (0.005, 0.01, 0.018, 0.019)],
    "SGD, momentum 0.67": [sgd(lr, 0.67) for lr in (0.01, 0.02, 0.033)],
    "Adam, no momentum": [adam(lr, beta1=0.0) for lr in (0.1, 0.3, 0.5, 1.0, 2.0)],
    "Adam": [adam(lr) for lr in (0.1, 0.3, 1.0, 2.0, 3.0)],
}
starts = [-8.0, 1.0] * np.random.default_rng(0).uniform(0.5, 1.5, (101, 2))
reached = {  # the lowest loss from each start: (2 valleys, 101 starts)
    name: np.array(
        [np.min([height(descend(make, turn=turn, starts=starts))[-1] for make in makes], 0) for turn in (0, np.pi / 4)]
    )
    for name, makes in contenders.items()
}
print("lowest loss, median of the starts   along the axes    turned")
for name, losses in reached.items():
    print(f"{name:<34} {np.median(losses[0]):>15.6f} {np.median(losses[1]):>9.6f}")
gain = reached["SGD"] / reached["Adam, no momentum"]
print("along the axes, from one start in ten the gain is below", f"{np.quantile(gain[0], 0.1):.0f}")
claim("loss of SGD over that of Adam without momentum, along the axes: median", np.median(gain[0]), 1000, 10_000)
claim("the same in the turned valley", np.median(gain[1]), 0.8, 1.5)
best = reached["SGD, momentum 0.67"]
claim("Adam over SGD with momentum, along the axes: median", np.median(reached["Adam"][0] / best[0]), 300, 3000)
claim("starts from which SGD with momentum beats Adam, in percent", 100 * np.mean(best < reached["Adam"]), 95, 100)
share = 100 * np.mean(best < reached["Adam, no momentum"], axis=1)
claim("the same for Adam without momentum, along the axes", share[0], 55, 90)
claim("the same in the turned valley", share[1], 100, 100)

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.9), sharey=True, layout="constrained")
x, y = np.meshgrid(np.linspace(-9, 2.5, 200), np.linspace(-4, 4, 200))
for axes, title, beta1, momentum, lr in (
    (panels[0], "without momentum", 0.0, 0.0, 0.018),
    (panels[1], "with momentum", 0.9, 0.67, 0.033),
):
    axes.contour(x, y, height(np.stack([x, y], axis=-1)), levels=[0.5, 2, 8, 20, 40, 70], colors=GREY, linewidths=0.8)
    for make, color, name, above in (
        (sgd(lr, momentum), SKY, f"SGD, rate {lr}", -3.4),
        (adam(0.3, beta1), BLACK, "Adam, rate 0.3", 3.4),
    ):
        axes.plot(*descend(make)[:, 0].T, "o-", color=color, markersize=3, linewidth=1.2)
        axes.text(2.4, above, name, color=ink(color), ha="right", va="center")
    axes.plot(0, 0, "+", color=BLACK, markersize=14)
    axes.set(title=title, xlabel="w₁, the flat direction", ylim=(-4, 4), xlim=(-9, 2.5))
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel("w₂, the steep direction")
show(
    figure,
    alt="Paths in a long valley with grey lines of equal loss. Without momentum, SGD stops halfway and Adam comes near "
    "the lowest point; with momentum, SGD swings widely and arrives, and Adam goes there in a wave.",
)

# %% [markdown]
# *How to read it.* All paths start at the upper left; each dot is one step, and the cross is the lowest point. Adam's
# first steps are as long along the valley as across it.
#
# Turning the valley matters for both forms of Adam, because they treat each parameter by itself. It does not matter for
# SGD, with or without momentum. Dividing by $\sqrt{\hat v}$ helps considerably where one direction is steep and the
# other flat; how much depends on the start. In the turned valley both parameters are alike, and Adam without momentum
# is hardly better than plain SGD. SGD with tuned momentum beats Adam in both valleys, and from most starts also Adam
# without momentum. **A learning rate for each parameter helps where gradients differ between parameters.** Do they?
# Section 5 tests this.
#
# ## 3. Bias correction, and what Adam stores
#
# m and v start at zero, so after one step m is only a tenth of the gradient, and v a thousandth of its
# square. The divisors $1 - β^t$ correct this **bias**.
#
# > **Predict.** Without the correction, is Adam's first step too short or too long, and by which factor?

# %%
predict("first step without bias correction, in units of η")

# %%
m, v = (1 - 0.9) * 1.0, (1 - 0.999) * 1.0**2  # a gradient of 1
print(f"m is {1 / m:.0f} times too small, the root of v {1 / np.sqrt(v):.1f} times")
claim("first step without bias correction, in units of η", m / np.sqrt(v), 3.16, 3.17)

# %% [markdown]
# Too long: m is ten times too small, but the root of v is nearly 32 times too small. With the correction and a
# gradient that never changes, $\hat m = g$ and $\hat v = g^2$ exactly, and t steps move the parameter by $t\,η$:

# %%
w = ml.Tensor(np.zeros(1), requires_grad=True)
optimizer = adam(0.01)([w])
for _ in range(100):
    optimizer.zero_grad()
    (w * 3.0).sum().backward()
    optimizer.step()
claim("100 steps with a constant gradient, minus the formula", w.data[0] + 100 * 0.01 * 3 / (3 + 1e-8), -1e-12, 1e-12)

# %% [markdown]
# **What it stores.** m and v have the shapes of the trainable parameters. For the tiny language model in float32:

# %%
model, _ = ml.load("tiny")
weights = model.trainable_parameters()
optimizer = ml.AdamW(weights)
sizes = {
    "parameters": sum(weight.data.nbytes for weight in weights.values()),
    "Adam's m": sum(m.nbytes for m in optimizer.m),
    "Adam's v": sum(v.nbytes for v in optimizer.v),
}
for name, size in sizes.items():
    print(f"{name:<12} {size:>10,} bytes")
with_gradients = sizes["parameters"] + sum(sizes.values())
claim("bytes per parameter, gradients included", with_gradients / ml.count_parameters(model).total, 16, 16)
claim("Adam's bytes over the model's", (sizes["Adam's m"] + sizes["Adam's v"]) / sizes["parameters"], 2, 2)

# %% [markdown]
# The optimizer state is twice as large as the model. With the gradients, training needs four times the bytes of the
# model, 16 for each parameter. LoRA has few trainable parameters, so three of these four parts nearly vanish (all but
# the parameters themselves). [Lesson 13](13_how_much_smaller.ipynb) adds up the memory.
#
# ## 4. The W in AdamW
#
# **Weight decay** pulls all parameters a little toward zero. The older way adds $λ w$ to the gradient, as if the loss
# had a term $\tfrac{λ}{2} w^2$; this is L2 regularisation. AdamW leaves the gradient unchanged and multiplies w by
# $1 - η λ$ in each step. With SGD both are the same.
#
# > **Predict.** Parameters start at 1; their gradients are pure noise, of size 0.01, 1 or 100. With $η = 0.01$ and $λ =
# > 0.1$, AdamW's factor after 100 steps is $0.999^{100}$, about 0.90. With L2 inside Adam, which of the three shrink?


# %%
def mean_after(size, l2, lr=0.01, decay=0.1, seed=0):
    rng = np.random.default_rng(seed)
    w = ml.Tensor(np.ones(2000), requires_grad=True)
    optimizer = ml.AdamW([w], lr=lr, weight_decay=0 if l2 else decay)
    for _ in range(100):
        w.grad = size * rng.standard_normal(2000) + (decay * w.data if l2 else 0)
        optimizer.step()
    return w.data.mean()


for size in (0.01, 1.0, 100.0):
    print(f"noise of {size:>6}: L2 inside Adam {mean_after(size, True):.3f}   AdamW {mean_after(size, False):.3f}")
claim("AdamW, noise of 100", mean_after(100, False), 0.89, 0.92)
claim("L2, noise of 100", mean_after(100, True), 0.985, 1.01)
claim("L2, noise of 0.01", mean_after(0.01, True), 0.1, 0.4)

# %% [markdown]
# With L2, the decay is part of the gradient and is divided by $\sqrt{\hat v}$ with it. Parameters with large gradients
# hardly shrink, and those with small ones shrink fast. AdamW shrinks all by the same factor.
#
# ## 5. Letters
#
# Now the smallest model of text: given a letter, which one comes next? Its parameters are a table W of 27 rows and 27
# columns: one for each letter, and one for a blank, which replaces all other characters. A row belongs to the current
# letter, and holds a score for each possible next letter: the **logits**. **Softmax** turns them into probabilities:
# take $e^z$ of each, and divide by their sum. The loss is the mean of $-\ln p$, where p is the predicted probability
# of the letter that came: **cross-entropy**. Its exponential is the **perplexity**.
#
# > **Predict.** What is the loss of a uniform guess? Which rows of the table will plain SGD learn last?

# %%
text = " ".join(message["content"] for record in ml.read_records("legal") for message in record.messages).lower()
LETTERS = " abcdefghijklmnopqrstuvwxyz"
ids = np.array([max(LETTERS.find(letter), 0) for letter in text])
one_hot, after_q = np.eye(27), ids[:-1] == LETTERS.index("q")
print(f"{len(ids):,} letters, {after_q.sum()} of them q; first: {text[:40]!r}")


def loss_on(W, where):
    return float(cross_entropy(ml.Tensor(W[ids[:-1][where]]), ids[1:][where]).data)


def learn(make_optimizer, seed, steps=50):
    """The loss on the whole text, and on the letters after a q alone. The batch size is 2,000 letters."""
    rng = np.random.default_rng(seed)
    W = ml.Tensor(np.zeros((27, 27)), requires_grad=True)
    optimizer = make_optimizer([W])
    for _ in range(steps):
        at = rng.integers(len(ids) - 1, size=2000)
        optimizer.zero_grad()
        cross_entropy(ml.Tensor(one_hot[ids[at]]) @ W, ids[at + 1]).backward()
        optimizer.step()
    return loss_on(W.data, slice(None)), loss_on(W.data, after_q)


uniform = loss_on(np.zeros((27, 27)), slice(None))
claim("loss of a uniform guess, minus ln 27", uniform - np.log(27), -1e-9, 1e-9)
print(f"ln 27 = {np.log(27):.3f}; perplexity {np.exp(uniform):.1f}")

# %%
contenders = {
    "SGD": {lr: sgd(lr) for lr in (30, 60, 90, 200)},
    "SGD, momentum 0.9": {lr: sgd(lr, 0.9) for lr in (10, 20, 30)},
    "Adam, no momentum": {lr: adam(lr, beta1=0.0) for lr in (0.1, 0.2, 0.3)},
    "Adam": {lr: adam(lr) for lr in (0.1, 0.2, 0.3)},
}
best = {}
for name, makes in contenders.items():
    for lr, make in makes.items():
        losses = np.array([learn(make, seed) for seed in range(3)])  # (3 seeds, 2): on all letters, and after a q
        print(f"{name:<18} rate {lr:<4} loss on all {losses[:, 0].mean():.3f}   after a q {losses[:, 1].mean():.3f}")
        if name not in best or losses[:, 0].mean() < best[name][:, 0].mean():
            best[name] = losses
after = {name: losses[:, 1].mean() for name, losses in best.items()}
print("probability of what follows a q:", ", ".join(f"{name} {np.exp(-loss):.2f}" for name, loss in after.items()))
claim("after a q: SGD over SGD with momentum", after["SGD"] / after["SGD, momentum 0.9"], 3, 20)
claim("after a q: SGD with momentum over Adam", after["SGD, momentum 0.9"] / after["Adam"], 5, 60)
lead = Interval.of(best["SGD, momentum 0.9"][:, 0] - best["Adam"][:, 0])
print(f"all letters, SGD with momentum minus Adam: {lead.mean:.3f}, 95 % interval {lead.low:.3f} to {lead.high:.3f}")
claim("lower end of that interval", lead.low, 0.001, 0.02)

# %% [markdown]
# (The **95 % confidence interval** is computed from the seeds. Where it excludes 0, the difference is more than chance.
# [Lesson 11](11_how_do_you_know.ipynb) explains it.)
#
# A q is nearly always followed by a u. At the learning rate that is best on all letters, Adam gives the letter after a
# q a probability of 0.99, and plain SGD gives it 0.25 (geometric means). The gradients of q's row are small because q
# is rare, and so are SGD's steps. With a larger rate SGD would learn q's row, but spoil those of frequent letters: see
# its rate of 200.
#
# Momentum explains a large part of the difference: with it, SGD reaches 0.83. The division by $\sqrt{\hat v}$ adds the
# rest. On all letters Adam leads by less than 1 % of the loss. Kunstner et al. (2024) find the same for rare words in
# language models, and name this as a main reason for Adam's success there.
#
# <details><summary>The same in PyTorch</summary>
#
# ```python
# import torch
# from torch.nn import functional as F
#
# W = torch.zeros(27, 27, dtype=torch.float64, requires_grad=True)
# before, after = torch.from_numpy(ids[:-1]), torch.from_numpy(ids[1:])
# optimizer = torch.optim.AdamW([W], lr=0.2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
# for step in range(50):
#     optimizer.zero_grad()
#     F.cross_entropy(W[before], after).backward()  # of the logits: softmax is part of it
#     optimizer.step()
# m, v = optimizer.state[W]["exp_avg"], optimizer.state[W]["exp_avg_sq"]
# ```
#
# </details>
#
# ## What to remember
#
# - SGD has one learning rate for all parameters, and the steepest direction limits it. Momentum speeds up the other
#   directions.
# - Adam is momentum divided by the usual size of each gradient: its learning rate is a length. Compare it with SGD
#   with momentum, not with plain SGD.
# - Adam stores **two moments for each trainable parameter**: with weights and gradients, 16 bytes in float32.
# - Bias correction matters in the first steps. In AdamW, weight decay is not part of the gradient.
# - Cross-entropy is the mean of $-\ln p$ of the right token. Guessing uniformly among V tokens costs ln V.
#
# Read on in the source: [`AdamW`](../minilora/nn/optim.py), and
# [`cross_entropy`](../minilora/engine/fused.py).
#
# ## Sources
#
# - Momentum, and its best values for such a valley: [Polyak 1964](https://doi.org/10.1016/0041-5553(64)90137-5).
# - Adam, its usual values and bias correction: [Kingma and Ba 2015](https://arxiv.org/abs/1412.6980).
# - Decoupled weight decay: [Loshchilov and Hutter 2019](https://arxiv.org/abs/1711.05101).
# - Rare words as a reason for Adam: [Kunstner et al. 2024](https://arxiv.org/abs/2402.19449). No figure is from there.
