# %% [markdown]
# # Lesson 3: What does Adam keep?
#
# A gradient says for each number in which direction the loss falls. It does not say how far to go. The plain answer is
# **SGD** (stochastic gradient descent): each number moves by its slope times one **learning rate**, the same for all.
# Nearly all language models are trained with something else, **AdamW**, which keeps two more numbers for each number
# that it trains. In this lesson you
#
# 1. see where one rate for all fails,
# 2. take Adam apart, and predict its first step,
# 3. count what it keeps, which is the larger part of what LoRA saves,
# 4. see why the W in AdamW matters,
# 5. train a small model of text with both.
#
# [The exercises](exercises/03_adam.ipynb): AdamW, and the loss of a classifier with its gradient.

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, show
from minilora.engine.fused import cross_entropy
from minilora.pages.style import BLACK, GREY, SKY, ink

# %% [markdown]
# ## 1. One rate for all
#
# Take a loss with two numbers, $L = \tfrac12 w_1^2 + \tfrac12 \cdot 100\, w_2^2$. It is a long valley: steep across,
# nearly flat along. Its slopes are $w_1$ and $100\, w_2$. With SGD, a step of rate η multiplies $w_1$ by $1 - η$ and
# $w_2$ by $1 - 100\,η$.
#
# > **Predict.** What is the largest rate at which SGD does not fly apart? And how much of its way does the slow number
# > go in one step at that rate?


# %%
def descend(make_optimizer, steps=50, scale=1.0, turn=0.0):
    """The places (steps + 1, 2) from (-8, 1) on. scale: of the loss. turn: of the valley, in radians."""
    axes = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    w = ml.Tensor(axes @ np.array([-8.0, 1.0]), requires_grad=True)
    optimizer, places = make_optimizer([w]), [w.data.copy()]
    for _ in range(steps):
        optimizer.zero_grad()
        along = ml.Tensor(axes.T) @ w
        (along * along * (0.5 * scale * np.array([1.0, 100.0]))).sum().backward()
        optimizer.step()
        places.append(w.data.copy())
    return np.array(places) @ axes


def height(places):
    return (0.5 * places**2 * [1, 100]).sum(axis=-1)


def sgd(lr):
    return lambda parameters: ml.SGD(parameters, lr=lr)


def adam(lr):
    return lambda parameters: ml.AdamW(parameters, lr=lr, weight_decay=0)


below, above = (abs(descend(sgd(lr), steps=100)[-1, 1]) for lr in (0.0199, 0.0201))
claim("the steep number after 100 steps with rate 0.0199, from 1", below, 0.3, 0.45)
claim("the steep number after 100 steps with rate 0.0201, from 1", above, 2.5, 3)

# %% [markdown]
# The border is 0.02, where $1 - 100\,η = -1$: two divided by the steepest slope's growth, 100. At that rate the slow
# number goes 2 % of its way per step. The steep direction sets the rate, and the flat one has to wait.
#
# ## 2. A rate for each number
#
# **Adam** ([Kingma and Ba 2015](https://arxiv.org/abs/1412.6980)) keeps, for each number, a running mean of its slope
# $g$, called $m$, and a running mean of the slope's square, called $v$. Step by step, with t = 1, 2, 3, ...:
#
# $$m \leftarrow β_1 m + (1 - β_1)\, g \qquad v \leftarrow β_2 v + (1 - β_2)\, g^2$$
#
# $$\hat m = \frac{m}{1 - β_1^t} \qquad \hat v = \frac{v}{1 - β_2^t} \qquad
# w \leftarrow w - η\, \frac{\hat m}{\sqrt{\hat v} + ε}$$
#
# Usual values are $β_1 = 0.9$, $β_2 = 0.999$ and $ε = 10^{-8}$. The root of $\hat v$ is about the usual size of this
# number's slope. So each number moves by η times *its slope in units of its usual slope*.
#
# > **Predict.** Three numbers have the slopes 0.000001, 1 and 1000. How far does each of them move in Adam's first
# > step, with $η = 0.01$?

# %%
slopes = np.array([1e-6, 1.0, 1000.0])
w = ml.Tensor(np.zeros(3), requires_grad=True)
optimizer = adam(0.01)([w])
(w * slopes).sum().backward()
optimizer.step()
print("moved by", ", ".join(f"{move:.6f}" for move in w.data))
claim("shortest move over longest", np.abs(w.data).min() / np.abs(w.data).max(), 0.985, 1)

# %% [markdown]
# All by η, whatever the slope. (The first falls short by one percent: there ε, added below, is no longer small beside
# the slope.) So the learning rate of Adam is a **length**: the way that a number goes per step while its slope keeps
# its sign. If the loss is multiplied by 1000, SGD goes 1000 times as far. And Adam?

# %%
plain, scaled = descend(adam(0.3)), descend(adam(0.3), scale=1000.0)
claim("largest difference between Adam's paths, loss times 1000", np.abs(plain - scaled).max(), 0, 1e-6)

# %% [markdown]
# Now both in the valley, 50 steps, each with several rates.

# %%
rates = {"SGD": (sgd, (0.005, 0.01, 0.018, 0.019)), "Adam": (adam, (0.1, 0.3, 1.0))}
reached = {}
for turn, valley in ((0.0, "along the axes"), (np.pi / 4, "turned by 45 degrees")):
    for name, (make, lrs) in rates.items():
        heights = [height(descend(make(lr), turn=turn))[-1] for lr in lrs]
        reached[name, valley] = min(heights)
        told = ", ".join(f"{found:.2f} ({lr})" for found, lr in zip(heights, lrs, strict=True))
        print(f"valley {valley:<20} {name:<4}  loss after 50 steps (rate): {told}")
straight = reached["SGD", "along the axes"] / reached["Adam", "along the axes"]
claim("best of SGD over best of Adam, along the axes", straight, 5, np.inf)
turned, upright = (height(descend(adam(0.3), turn=turn))[-1] for turn in (np.pi / 4, 0))
claim("Adam with rate 0.3, turned valley over the other", turned / upright, 10, 100)

# %%
figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
x, y = np.meshgrid(np.linspace(-9, 2.5, 200), np.linspace(-1.3, 1.3, 200))
axes.contour(x, y, height(np.stack([x, y], axis=-1)), levels=[0.5, 2, 8, 20, 40, 70], colors=GREY, linewidths=0.8)
for lr, make, color, name, at, place in (
    (0.018, sgd, SKY, "SGD, rate 0.018", (-3.2, -0.2), "left"),
    (0.3, adam, BLACK, "Adam, rate 0.3", (-3.6, 0.45), "left"),
):
    path = descend(make(lr))
    axes.plot(*path.T, "o-", color=color, markersize=3, linewidth=1.2)
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 2}
    axes.text(*at, name, color=ink(color), ha=place, va="center", bbox=ground)
axes.plot(0, 0, "+", color=BLACK, markersize=14)
axes.set(xlabel="w₁, the flat direction", ylabel="w₂, the steep direction", ylim=(-1.3, 1.3), xlim=(-9, 2.5))
axes.spines[["top", "right"]].set_visible(False)
show(
    figure,
    alt="Two paths in a long valley with grey lines of equal loss. SGD jumps from side to side and creeps along; Adam "
    "goes along the valley in one long wave, and a little past the lowest point.",
)

# %% [markdown]
# *How to read it.* Both start at the upper left; each dot is one step, the cross is the lowest point. SGD jumps
# across the valley, and its dots along it get closer and closer. Adam's first steps are as long along the valley as
# across it, so it gets along from the start. Its m, a mean over past slopes, cannot turn at once: hence the wave.
#
# And the turned valley? The loss has the same shape, only that each number now is partly flat and partly steep. SGD
# does not notice: the table above has the same losses twice. Adam does, since it looks at each number alone: with
# rate 0.3 its loss is some 35 times as high as before, and higher than SGD's (with rate 1 it stays ahead). **A rate
# for each number helps where the numbers themselves differ.** Do they, in a model? Section 5 looks.
#
# ## 3. Why the hats
#
# m and v start at zero, so after one step m is only a tenth of the slope, and v a thousandth of its square. The
# divisors $1 - β^t$ mend that.
#
# > **Predict.** Without them, is Adam's first step too short or too long, and how many times?

# %%
m, v = (1 - 0.9) * 1.0, (1 - 0.999) * 1.0**2  # a slope of 1
print(f"m is {1 / m:.0f} times too small, the root of v {1 / np.sqrt(v):.1f} times")
claim("first step without the divisors, in units of η", m / np.sqrt(v), 3.16, 3.17)

# %% [markdown]
# Too long: m is ten times too small, but the root of v is nearly 32 times too small. Three times the rate at the
# moment when least is known. With the divisors and a slope that never changes, $\hat m = g$ and $\hat v = g^2$
# exactly, and t steps go $t\,η$:

# %%
w = ml.Tensor(np.zeros(1), requires_grad=True)
optimizer = adam(0.01)([w])
for _ in range(100):
    optimizer.zero_grad()
    (w * 3.0).sum().backward()
    optimizer.step()
claim("100 steps at a constant slope, minus the formula", w.data[0] + 100 * 0.01 * 3 / (3 + 1e-8), -1e-12, 1e-12)

# %% [markdown]
# **What it keeps.** m and v have the shape of what is trained. For the tiny language model in float32:

# %%
model, _ = ml.load("tiny")
weights = model.trainable_parameters()
optimizer = ml.AdamW(weights)
sizes = {
    "the numbers": sum(weight.data.nbytes for weight in weights.values()),
    "Adam's m": sum(m.nbytes for m in optimizer.m),
    "Adam's v": sum(v.nbytes for v in optimizer.v),
}
for name, size in sizes.items():
    print(f"{name:<12} {size:>10,} bytes")
with_gradients = sizes["the numbers"] + sum(sizes.values())
claim("bytes per number, gradients included", with_gradients / ml.count_parameters(model).total, 16, 16)
claim("Adam's bytes over the model's", (sizes["Adam's m"] + sizes["Adam's v"]) / sizes["the numbers"], 2, 2)

# %% [markdown]
# Adam keeps twice the model, and the gradient is as large as the model: four times the model in all, 16 bytes for each
# number. LoRA trains few numbers, so three of these four parts nearly vanish. [Lesson 11](11_how_much_smaller.ipynb)
# makes the bill.
#
# ## 4. The W in AdamW
#
# **Weight decay** pulls all numbers a little toward zero. The old way adds $λ w$ to the gradient, as if the loss had
# a term $\tfrac{λ}{2} w^2$; this is called L2. AdamW ([Loshchilov and Hutter 2019](https://arxiv.org/abs/1711.05101))
# leaves the gradient alone and multiplies w by $1 - η λ$ in each step. With SGD both are the same.
#
# > **Predict.** Numbers start at 1; their slopes are pure noise, of size 0.01, 1 or 100. With $η = 0.01$ and $λ =
# > 0.1$, AdamW's factor after 100 steps is $0.999^{100}$, about 0.90. With L2 inside Adam: which of the three shrink?


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
# With L2 the decay is divided by $\sqrt{\hat v}$ like everything in the gradient: numbers with large slopes hardly
# shrink, numbers with small ones shrink fast. AdamW treats all alike.
#
# ## 5. Letters
#
# Now a model of text, the smallest there is: given a letter, which one comes next? It has a table W of 27 rows and
# columns, for the letters and a blank that stands for all else. A row holds one number per possible next letter; these
# numbers are called **logits**. To make probabilities of a row, take $e^z$ of each and divide by their sum: this is
# **softmax**. The loss is the mean of $-\ln p$, where p is the probability that was given to the letter that really
# came: **cross-entropy**. A model that knows nothing gives each letter 1/27.
#
# > **Predict.** What is its loss then? And which letters' rows will SGD learn late?

# %%
text = " ".join(message["content"] for record in ml.read_records("legal") for message in record.messages).lower()
LETTERS = " abcdefghijklmnopqrstuvwxyz"
ids = np.array([max(LETTERS.find(letter), 0) for letter in text])
one_hot, after_q = np.eye(27), ids[:-1] == LETTERS.index("q")
print(f"{len(ids):,} letters, {after_q.sum()} of them q; first: {text[:40]!r}")


def loss_on(W, where):
    return float(cross_entropy(ml.Tensor(W[ids[:-1][where]]), ids[1:][where]).data)


def learn(make_optimizer, seed, steps=50):
    """The loss on the whole text, and on what follows a q alone, after some steps on 2,000 random letters each."""
    rng = np.random.default_rng(seed)
    W = ml.Tensor(np.zeros((27, 27)), requires_grad=True)
    optimizer = make_optimizer([W])
    for _ in range(steps):
        at = rng.integers(len(ids) - 1, size=2000)
        optimizer.zero_grad()
        cross_entropy(ml.Tensor(one_hot[ids[at]]) @ W, ids[at + 1]).backward()
        optimizer.step()
    return loss_on(W.data, slice(None)), loss_on(W.data, after_q)


nothing = loss_on(np.zeros((27, 27)), slice(None))
claim("loss of a model that knows nothing, minus ln 27", nothing - np.log(27), -1e-9, 1e-9)
print(f"ln 27 = {np.log(27):.3f}")

# %%
best = {}
for name, make, lrs in (("SGD", sgd, (10, 30, 60, 200)), ("Adam", adam, (0.03, 0.1, 0.3, 1))):
    for lr in lrs:
        found = np.mean([learn(make(lr), seed) for seed in range(3)], axis=0)
        best[name] = min(best.get(name, (9, 9)), tuple(found))
        print(f"{name:<4} rate {lr:<5} loss on all {found[0]:.3f}   after a q {found[1]:.3f}")
sure = {name: np.exp(-found[1]) for name, found in best.items()}
claim("SGD at its best rate, after a q", best["SGD"][1], 0.5, 2.5)
claim("Adam at its best rate, after a q", best["Adam"][1], 0, 0.3)
claim("best of SGD minus best of Adam, on all letters", best["SGD"][0] - best["Adam"][0], 0.01, 0.06)
print("probability of what follows a q:", ", ".join(f"{name} {p:.2f}" for name, p in sure.items()))

# %% [markdown]
# Each at the rate that is best for it on all letters (mean of three runs): Adam gives what follows a q, nearly always
# u, a probability of 0.91, SGD of 0.25 (the last line, as a mean over the logarithms). The slopes of q's row are
# small because q is rare, and SGD's steps are as small as that. A larger rate would teach it q, and spoil the
# frequent letters: see SGD with rate 200. On all letters together the difference is small, some 1 % of the loss,
# since q is rare. [Kunstner and others](https://arxiv.org/abs/2402.19449) find the same for words in large language
# models, where most words are rare, and take it for a key reason of Adam's success there.
#
# ## What to remember
#
# - SGD has one rate for all numbers, and the steepest direction sets it.
# - Adam divides each slope by its usual size: its learning rate is a length, and the scale of the loss does not
#   matter.
# - For that it keeps **two numbers for each trained number**: with weights and gradients, 16 bytes in float32.
# - The divisors $1 - β^t$ matter in the first steps; weight decay stays outside of the gradient.
# - Cross-entropy is the mean of $-\ln p$ of what really came: ln V for who knows nothing about V possibilities.
#
# Read on in the source: [`AdamW`](../minilora/nn/optim.py), and
# [`cross_entropy`](../minilora/engine/fused.py).
#
# ## Sources
#
# - Adam, its usual values and the divisors: [Kingma and Ba 2015](https://arxiv.org/abs/1412.6980).
# - Decoupled weight decay: [Loshchilov and Hutter 2019](https://arxiv.org/abs/1711.05101).
# - Rare words as a reason for Adam: [Kunstner and others 2024](https://arxiv.org/abs/2402.19449). No figure is from
#   there.
