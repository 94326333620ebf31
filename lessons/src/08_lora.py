# %% [markdown]
# # Lesson 8: LoRA
#
# Fine-tuning changes a pretrained model so that it does something new. The plain way is to change every number in it.
# LoRA ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)) changes none of them. It puts two thin matrices beside a big
# one and trains only these two.
#
# In this lesson you will
#
# 1. build the update out of a **down-projection** and an **up-projection**,
# 2. derive both gradients by hand and check them twice,
# 3. see why one of the two matrices **starts at zero**,
# 4. see what the factor **α / r** is for, and what it does not do,
# 5. train a small language model with a frozen base, and read what it writes before and after.
#
# You need Python and the product of two matrices. Everything runs on a laptop, in less than a minute. When you are
# through, [the exercises](exercises/08_lora.ipynb) let you write LoRA yourself.
#
# The letters are the same everywhere. One row of `x` is one token, that is, one piece of a word turned into a vector.
#
# | name | shape | what it is |
# |---|---|---|
# | `x` | (T, n) | T tokens, n numbers each |
# | `W` | (m, n) | the pretrained matrix |
# | `A` | (r, n) | the down-projection: n numbers become r |
# | `B` | (m, r) | the up-projection: r numbers become m |
# | `y` | (T, m) | the output |
# | `g` | (T, m) | ∂L/∂y: how the loss L changes with each number of y |

# %%
import textwrap

import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.engine.fused import lora_linear
from minilora.io.zoo import TINY
from minilora.lora.adapters import lora_modules
from minilora.pictures import lessons
from minilora.pictures.style import BLUE, GREEN, ORANGE

plt.rcParams |= {"figure.dpi": 90, "figure.constrained_layout.use": True, "font.size": 10}

# %% [markdown]
# ## 1. An update made of two thin matrices
#
# A linear layer computes $y = x W^\top$. The transpose is there because W is stored as (outputs, inputs), in PyTorch as
# here. To fine-tune the layer means to replace $W$ by $W + \Delta W$, where the update $\Delta W$ has the shape of $W$:
# as many numbers to learn as the layer has.
#
# **LoRA's idea is to write the update as a product, $\Delta W = BA$.** Start with the smallest case. One column times
# one row is a whole matrix:

# %%
column = np.array([[1], [2], [-1]])
row = np.array([[3, 0, 1, 5]])
print(column @ row)

# %% [markdown]
# Twelve numbers, made from 3 + 4 = 7. The price: every row of the result is a multiple of the same row. Such a matrix
# has **rank 1**. Put r columns side by side and call them B, put r rows below each other and call them A. Then $BA$
# is a sum of r such matrices, its rank is at most r, and it takes r (m + n) numbers instead of m n.
#
# With 3 and 4 this saves little. Real matrices are larger. Here is one of SmolLM2-135M, the model of lesson 14, beside
# an A and a B of rank 8. One unit of length is one number, in both directions.

# %%
m, n, r = 576, 1536, 8  # down_proj in each of SmolLM2's 30 blocks
figure, axes = plt.subplots(figsize=(9, 3.8))
lessons.matrices_to_scale(axes, m, n, r)
plt.show()
print(f"W has {m * n:,} numbers, A and B together {r * (m + n):,}: {100 * r * (m + n) / (m * n):.1f} %")

# %% [markdown]
# *How to read it.* The grey area is what stays as it is; the two coloured lines are all that learns. They are drawn
# with their true thickness, 8 where the area is 576 high and 1,536 wide.
#
# **B A is never computed.** Parentheses matter: $x (BA)^\top = (x A^\top) B^\top$, and the right side is cheap. It goes
# down first, from n numbers per token to r, then up from r to m:
#
# $$u = x A^\top \qquad\qquad y = x W^\top + s\,u\,B^\top$$
#
# The number $s$ is a fixed scale; section 4 is about it.

# %%
figure, axes = plt.subplots(figsize=(9, 2.9))
lessons.bottleneck_to_scale(axes, m, n, r)
plt.show()
print(f"multiplications for one token: W {m * n:,}   A, then B {r * (m + n):,}")
print(f"multiplications to form B A:   {m * r * n:,}")

# %% [markdown]
# *How to read it.* From below: a token's numbers on the left pass through W. On the right the same numbers are
# squeezed through a neck of 8, then widened to 576 again. Both results are added. Whatever the update has to say
# about a token, it must say with 8 numbers.
#
# In minilora this is one operation, [`lora_linear`](../minilora/engine/fused.py). We try it on small random matrices.
# All sizes differ, so that a matrix put in the wrong way round cannot go unnoticed.

# %%
T, m, n, r = 3, 5, 4, 2
scale = 1.5
rng = np.random.default_rng(0)
x, W, A, B, g = (rng.standard_normal(shape) for shape in [(T, n), (m, n), (r, n), (m, r), (T, m)])

y = lora_linear(x, W, A, B, scale=scale).data
print("y has shape", y.shape)
print("the same as with one matrix W + s B A:", np.allclose(y, x @ (W + scale * B @ A).T))
print("rank of B A:", np.linalg.matrix_rank(B @ A))

# %% [markdown]
# ## 2. Both gradients, by hand
#
# Training moves A and B a little against their gradients, ∂L/∂A and ∂L/∂B: `dA` and `dB` for short. What
# happens between y and the loss, layer after layer, is not our concern. All of it is contained in
# $g = \partial L / \partial y$, which has the shape of y and is given to us.
#
# **First, index by index.** One output number, for token t and output i, is
#
# $$y_{ti} = \sum_j x_{tj} W_{ij} + s \sum_k u_{tk} B_{ik} \qquad\qquad u_{tk} = \sum_j x_{tj} A_{kj}$$
#
# *The gradient of B.* Where does $B_{ik}$ occur? In output i, for every token t, multiplied by $s\,u_{tk}$. The chain
# rule says: for every place where it occurs, take how much the loss changes with that place, times how much that place
# changes with $B_{ik}$, and add up.
#
# $$\frac{\partial L}{\partial B_{ik}} = \sum_t g_{ti}\; s\,u_{tk}$$
#
# *The gradient of u.* A acts only through u, so we stop there on the way. $u_{tk}$ occurs in all outputs i of its
# token:
#
# $$\frac{\partial L}{\partial u_{tk}} = \sum_i g_{ti}\; s\,B_{ik}$$
#
# *The gradient of A.* $A_{kj}$ occurs in $u_{tk}$, for every token t, multiplied by $x_{tj}$:
#
# $$\frac{\partial L}{\partial A_{kj}} = \sum_t \frac{\partial L}{\partial u_{tk}}\; x_{tj}$$
#
# These three lines are a program already: each sum is a loop.

# %%
u = x @ A.T
dB, du, dA = np.zeros_like(B), np.zeros_like(u), np.zeros_like(A)

for t in range(T):
    for k in range(r):
        for i in range(m):
            dB[i, k] += g[t, i] * scale * u[t, k]
            du[t, k] += g[t, i] * scale * B[i, k]
        for j in range(n):
            dA[k, j] += du[t, k] * x[t, j]  # du[t, k] is complete: its loop over i is done

# %% [markdown]
# **Then, as matrices.** A sum over the index that two arrays share is a matrix product. In $\sum_t g_{ti} u_{tk}$ the
# shared index is t, the first one of both. A product sums over the last index of its left side and the first of its
# right side, so g must be transposed: $g^\top u$. In the same way
#
# $$dB = s\, g^\top u \qquad\qquad du = s\, g B \qquad\qquad dA = du^\top x$$
#
# If you do not remember on which side a transposed matrix goes, let the shapes decide: dB must come out as (m, r), and
# (m, T) times (T, r) is the only product of g and u that does.

# %%
print("dB:", np.allclose(dB, scale * g.T @ u), " dA:", np.allclose(dA, (scale * g @ B).T @ x))

# %% [markdown]
# **Compared with the engine.** `ml.Tensor` remembers how it was computed, and `backward` walks that way back. We let it
# differentiate `lora_linear`, where the gradients above are written into the operation, and the same formula written
# with plain `@`, where the engine puts them together from the rules for one product. W is given without
# `requires_grad`: it is frozen.

# %%
for name, layer in {
    "lora_linear": lambda x, W, A, B: lora_linear(x, W, A, B, scale=scale),
    "plain @    ": lambda x, W, A, B: x @ W.T + (x @ A.T) @ B.T * scale,
}.items():
    a, b = ml.Tensor(A, requires_grad=True), ml.Tensor(B, requires_grad=True)
    layer(ml.Tensor(x), ml.Tensor(W), a, b).backward(g)
    print(name, " dA as by hand:", np.allclose(a.grad, dA), "  dB as by hand:", np.allclose(b.grad, dB))

# %% [markdown]
# **Compared with a measurement.** By hand and engine could share a mistake. A derivative can also be measured, without
# any rule: move one number a little up and a little down, and see what the loss does. As loss we take $L = \sum g\,y$,
# whose derivative by y is g.


# %%
def loss(A):
    return (g * lora_linear(x, W, A, B, scale=scale).data).sum()


eps = 1e-5
nudge = np.zeros_like(A)
nudge[1, 2] = eps  # one element of A
print(f"measured {(loss(A + nudge) - loss(A - nudge)) / (2 * eps):.6f}    by hand {dA[1, 2]:.6f}")

# %% [markdown]
# `ml.gradcheck` does this for every number of every input, here x, A and B, and stops with an error where one differs
# by more than a millionth. The numbers are in float64; in float32 the measurement itself would be too coarse.

# %%
report = ml.gradcheck(lambda x, A, B: lora_linear(x, W, A, B, scale=scale), x, A, B)
print(report.elements, "derivatives measured, all within a millionth:", report.max_relative_error < 1e-6)

# %% [markdown]
# A check is worth something only if it can fail. So let it meet a mistake that is easy to make: the scale is in the
# output and in dB, and forgotten in dA. Nothing crashes with such a mistake. Adam would even hide it, since it divides
# each gradient by its own size.


# %%
@ml.op
def forgetful_lora(x, A, B, scale):
    """s (x Aᵀ) Bᵀ, with a wrong gradient for A."""
    u = x @ A.T
    return scale * u @ B.T, lambda g: scale * g @ B @ A, lambda g: (g @ B).T @ x, lambda g: scale * g.T @ u


def update(A):
    return forgetful_lora(x, A, B, scale=scale)


try:
    ml.gradcheck(update, A)
except ml.GradientError as error:
    print(textwrap.fill(f"caught: {error}", 100))

# %% [markdown]
# Divide what was expected by what was got: it is the scale, 1.5. That is often enough to find the mistake.
#
# ## 3. Why B starts at zero
#
# Look at the two gradients again, and at which matrix stands in which:
#
# $$dB = s\,g^\top (x A^\top) \qquad\qquad dA = s\,(g B)^\top x$$
#
# The gradient of B contains A, and the gradient of A contains B. There are four ways to start:

# %%
starts = {
    "A random, B zero": (A, 0 * B),
    "A zero, B random": (0 * A, B),
    "both zero": (0 * A, 0 * B),
    "both random": (A, B),
}
print("                   change of y   largest dA   largest dB")
for name, (first_A, first_B) in starts.items():
    a, b = ml.Tensor(first_A, requires_grad=True), ml.Tensor(first_B, requires_grad=True)
    y = lora_linear(x, W, a, b, scale=scale)
    change = np.abs(y.data - x @ W.T).max()
    y.backward(g)
    print(f"{name:<18} {change:>11.3f} {np.abs(a.grad).max():>12.3f} {np.abs(b.grad).max():>12.3f}")

# %% [markdown]
# - **Both random** changes the output at once. The model would have to unlearn that noise first.
# - **Both zero** changes nothing, and never will: both gradients are zero, so neither matrix ever moves.
# - **One of them zero** is what we want: the output is untouched, and one gradient is alive. The paper takes B, and so
#   do PEFT and minilora. Once B has moved, dA is alive as well.
#
# Now the same in a real language model: minilora's own tiny base, about a million numbers, trained on the addresses
# of the presidents of the United States. `ml.add_adapter` freezes it and puts an A and a B beside every matrix inside
# its four blocks.

# %%
model, tokenizer = ml.load("tiny")
records = ml.split_records(ml.read_records("legal"))  # questions and answers about terms of law: section 5
samples = {split: ml.encode_records(part, tokenizer) for split, part in records.items()}
long_enough = [sample for sample in samples["train"] if len(sample.ids) >= 64][:8]
input_ids = np.array([sample.ids[:64] for sample in long_enough])  # (8, 64): eight texts of 64 tokens
labels = np.array([sample.labels[:64] for sample in long_enough])  # -100 where a token is not scored: the question


def logits():
    """What the model says about the eight texts: for each token, one number for each token that may follow."""
    with ml.no_grad():
        return model(input_ids).data


before = logits()
ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), name="legal", seed=0)
print(ml.count_parameters(model))
print(f"outputs: {before.size:,}, different from the base's: {np.count_nonzero(logits() != before)}")
print("the same bytes:", logits().tobytes() == before.tobytes())

# %% [markdown]
# Not "nearly the same": adding zero is exact, so that every bit is as it was. And the gradients?

# %%
model.loss(input_ids, labels).backward()
shares = [module.adapters["legal"] for module in lora_modules(model).values()]
print("adapted matrices:", len(shares))
print("largest |dA| in any of them: ", max(np.abs(share.lora_A.grad).max() for share in shares))
print("every one has some dB:       ", all(share.lora_B.grad.any() for share in shares))

# %% [markdown]
# So the first step moves B and leaves A exactly where it is. From the second step on, both move. Here are the first
# fifteen steps, written out: this is all there is to a training loop. (`ml.loss_and_grad` is `model.loss` and
# `backward()` in one: it cuts the batch into small ones and computes them on all cores.)

# %%
optimizer = ml.AdamW(model.trainable_parameters(), lr=2e-3, weight_decay=0.0)
first_A = shares[0].lora_A.data.copy()
sizes = {"A": [], "B": []}
for step in range(15):
    optimizer.zero_grad()
    ml.loss_and_grad(model, input_ids, labels)
    for name in sizes:
        gradients = [getattr(share, f"lora_{name}").grad for share in shares]
        sizes[name].append(np.sqrt(sum((gradient**2).sum() for gradient in gradients)))
    optimizer.step()
    if step == 0:
        print("after one step: A moved:", (shares[0].lora_A.data != first_A).any(), end="")
        print(", B moved:", shares[0].lora_B.data.any())

# %%
figure, axes = plt.subplots(figsize=(7, 3.2))
steps = range(1, 16)
lessons.line(axes, steps, sizes["B"], "dB", BLUE, marker="o", markersize=4)
lessons.line(axes, steps, sizes["A"], "dA", ORANGE, marker="o", markersize=4)
axes.set(xlabel="step", ylabel="length of the gradient\n(all 28 matrices together)", xlim=(0, 16.5))
axes.set_ylim(bottom=0)
plt.show()
print(f"dA in step 1: {sizes['A'][0]:.3f}, in step 2: {sizes['A'][1]:.3f}; dB in step 1: {sizes['B'][0]:.3f}")

# %% [markdown]
# *How to read it.* The orange line starts at zero, exactly, and leaves it with the second step. The blue line was never
# at zero. So a start at zero is not a dead start: half of it is dead, for one step.
#
# ## 4. What α / r is for
#
# The scale in front of the update is $s = \alpha / r$. The number α is chosen by you, like a learning rate, and
# `lora_alpha` is its name in the settings. But why divide it by r?
#
# The paper gives a practical reason: so that you can try another r without looking for a new learning rate. Whether it
# does that can be measured. We add an adapter to the tiny model, take **one** step, and see how far the outputs moved.
# Then again with another r, another scale and another optimizer, each time from three random starts. α is always 16.

# %%
ml.remove_adapter(model, "legal")
ranks = [1, 4, 16, 64]
scalings = {  # how to get each scale from minilora's settings, which always divide by r or by its root
    "α": lambda r: ml.LoraConfig(r=r, lora_alpha=16 * r),
    "α / √r": lambda r: ml.LoraConfig(r=r, lora_alpha=16, use_rslora=True),
    "α / r": lambda r: ml.LoraConfig(r=r, lora_alpha=16),
}
optimizers = {"SGD": lambda p: ml.SGD(p, lr=1e-4), "Adam": lambda p: ml.AdamW(p, lr=1e-5)}


def move_of_one_step(config, make_optimizer):
    """How far one step moves the logits: the root mean square, averaged over three random starts of A."""
    lengths = []
    for seed in range(3):
        ml.add_adapter(model, config, name="trial", seed=seed)
        optimizer = make_optimizer(model.trainable_parameters())
        ml.loss_and_grad(model, input_ids, labels)
        optimizer.step()
        lengths.append(np.sqrt(np.mean((logits() - before) ** 2)))
        ml.remove_adapter(model, "trial")
    return float(np.mean(lengths))


moves = {
    (name, label): [move_of_one_step(config(r), make_optimizer) for r in ranks]
    for name, make_optimizer in optimizers.items()
    for label, config in scalings.items()
}

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
for axes, name in zip(panels, optimizers, strict=True):
    for label, color in zip(scalings, (GREEN, ORANGE, BLUE), strict=True):
        relative = [move / moves[name, label][0] for move in moves[name, label]]
        lessons.line(axes, ranks, relative, label, color, marker="o", markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="rank r", title=f"one step of {name}", xlim=(0.9, 140))
    axes.set_xticks(ranks, [str(r) for r in ranks])
    axes.set_yticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    axes.minorticks_off()
panels[0].set_ylabel("move of the outputs (times that of r = 1)")
plt.show()
for (name, label), move in moves.items():
    print(f"{name:<4}  {label:<6}  r = 64 moves the outputs {move[-1] / move[0]:.3g} times as far as r = 1")

# %% [markdown]
# *How to read it.* A flat line means that the first step is as large with one rank as with another. On the right,
# with **Adam**, the flattest line is **α / r**: whatever r you choose, the first step is of about the same size. With
# α alone it grows almost as fast as r. On the left, with **SGD**, it is α / √r that stays flat, and α / r falls as
# fast as r grows.
#
# So "α / r keeps the update's size" is true for Adam, which nearly everyone uses, and wrong for SGD. The reason is
# short. After one step with learning rate η, A is still its random start, and the update is
#
# - SGD: $B = -\eta\,dB$, and $dB$ contains $s$. So $s B A = -\eta\,s^2\,g^\top x\,(A^\top A)$: two factors s, and a
#   sum of r terms in $A^\top A$. It stays the same if $s^2 r$ does: $s = \alpha / \sqrt r$.
# - Adam: it divides each gradient by its own size, so that every number of B moves by η, whatever s is. Then $s B A$
#   has one factor s, and again a sum of r terms. They do not cancel: for a single token, term k changes output i by
#   $-\eta\,s\,\mathrm{sign}(g_i)\,|u_k|$, which has the same sign for every k. The sum stays the same if $s\,r$ does:
#   $s = \alpha / r$.
#
# The first step is not the whole training. With α / r, a larger rank means smaller shares for each of its r terms, and
# [rsLoRA](https://arxiv.org/abs/2312.03732) argues that in the long run α / √r is the better scale for large ranks. So
# let us also train for a little while, always with the same learning rate.
#
# What we measure is the loss on texts that are not trained: the mean of $-\ln p$, where p is the probability that the
# model gave to the token that really came next. A loss of 4 means a probability of $e^{-4}$, about 1 in 55.

# %%
losses = {}
print("loss after 20 steps (lower is better)")
print("scale " + "".join(f"{f'r={r}':>9}" for r in (1, 8, 64)))
for label, config in scalings.items():
    for r in (1, 8, 64):
        ml.add_adapter(model, config(r), name="trial", seed=0)
        ml.fit(model, samples["train"], steps=20, lr=5e-3, batch_size=4)
        losses[label, r] = ml.mean_loss(model, samples["validation"])
        ml.remove_adapter(model, "trial")
    print(f"{label:<6}" + "".join(f"{losses[label, r]:>9.3f}" for r in (1, 8, 64)))
untrained = ml.mean_loss(model, samples["validation"])
share = (untrained - losses["α / r", 1]) / (untrained - losses["α / r", 64])
print(f"the base, without training: {untrained:.3f}")
print(f"with α / r, r = 1 has come {100 * share:.0f} % of the way that r = 64 has come")

# %% [markdown]
# Read along the lines; r = 1 is the same in all, since there the three scales are equal. With α / r the ranks end
# close together: the learning rate that suits one suits the others. With α alone it does not carry over: at rank 64
# the steps are far too long. The steps of α / √r are of a size between. Where they end lower than those of α / r,
# that is no proof of a better scale: these are 20 steps at one learning rate, and a larger one would lengthen the
# steps of α / r as well.
#
# The last line is LoRA's central claim in small: on a simple task a rank of 1 does most of what a rank of 64 can.
# Lesson 10 asks how far that goes, and lesson 13 shows a task where it fails.
#
# So with Adam, α acts like a second learning rate. The paper says so, sets α to the first r it tries, and leaves it
# there. What trips people up is to leave out the division. Such code works at the rank it was tuned for and fails at
# another; it has been published more than once.
#
# ## 5. A frozen base learns something new
#
# Now train for real. The base has read presidents. The new domain is law: 300 short records in
# [`legal.jsonl`](../minilora/data/README.md), each with a question about one term and an answer that always begins by
# saying what the term is and goes on with why it matters. 240 of them are for training. The others are terms that
# the model never sees, to find out what it learned beyond reciting.

# %%
example = records["train"][0]
print(example.messages[0]["content"])
print(textwrap.fill(example.messages[1]["content"], 100))
print({split: len(part) for split, part in records.items()})

# %% [markdown]
# What does the base answer? `ml.generate` takes, again and again, the token that the model finds likeliest, and is cut
# off after 64. The model is very small: expect the sound of the presidents rather than sense, and expect it to go round
# in circles.

# %% tags=["measured"]
questions = ["What is a contract?", records["test"][0].messages[0]["content"], "What is a tax?"]


def show_answers():
    for question in questions:
        answer = ml.generate(model, tokenizer, question, max_new_tokens=64)
        print(question)
        print(textwrap.fill(answer, 100, initial_indent="    ", subsequent_indent="    "), "\n")


show_answers()

# %% [markdown]
# Before training we take a fingerprint of the base: the SHA-256 over the bytes of all its weights. If a single bit of
# a million numbers changes, the fingerprint becomes another one.

# %%
ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), name="legal", seed=0)
fingerprint = ml.sha256_of(ml.base_state(model))
print("base before:", fingerprint[:32])
print(ml.count_parameters(model))
print("learns:", sorted({name.rpartition(".")[2] for name in model.trainable_parameters()}))

# %% [markdown]
# Three things are measured on the way: the loss on what is trained, on terms never seen, and on the *old* domain,
# parts of presidential addresses that the base never saw either. minilora's [`fit`](../minilora/train/loop.py) is the
# loop of section 3, with a learning rate that rises and falls again, and a limit on the length of the gradient.

# %%
old_domain = ml.encode_text((TINY / "validation.txt").read_text(encoding="utf-8"), tokenizer, max_length=256)
curve = []


def measure(step):
    if step % 30 == 0:
        curve.append((step, ml.mean_loss(model, samples["validation"]), ml.mean_loss(model, old_domain)))


measure(0)
history = ml.fit(model, samples["train"], steps=120, lr=5e-3, batch_size=8, seed=0, each_step=measure)

# %%
at, unseen, old = zip(*curve, strict=True)
smooth = np.convolve(history.losses, np.ones(10) / 10, mode="valid")  # each point is the mean of ten steps
figure, axes = plt.subplots(figsize=(8, 3.6))
lessons.line(axes, np.arange(10, 121), smooth, "training (mean of 10 steps)", BLUE)
lessons.line(axes, at, unseen, "law, terms never seen", GREEN, marker="o", markersize=4)
lessons.line(axes, at, old, "old domain: presidents", ORANGE, marker="o", markersize=4)
axes.set(xlabel="step", ylabel="loss (nats per token)", xlim=(0, 170), xticks=range(0, 121, 30))
plt.show()
print("             law, unseen    presidents")
print(f"step 0       {unseen[0]:>11.3f} {old[0]:>13.3f}")
print(f"step {at[-1]}     {unseen[-1]:>11.3f} {old[-1]:>13.3f}")

# %% [markdown]
# *How to read it.* The green line falls: the model has learned something about law that it was never shown, above all
# how such an answer is built. The blue line ends below it, since the training texts are also partly remembered. The
# orange line rises: **with the adapter on, the model has become worse at what it could do before.** A frozen base
# does not protect from that. What it gives is a way back, as we shall see.

# %% tags=["measured"]
show_answers()

# %% [markdown]
# Read the answers for their form, not for advice. The presidents are gone. Most answers now begin like a definition
# and go on to say why it matters. The content is nonsense: a million numbers hold little knowledge of the world, and
# 240 records add little to it. Lesson 14 does the same with a model a hundred times larger.
#
# The form can be counted. All 30 test questions are about terms that were not trained:

# %% tags=["measured"]
after = ml.answer_all(model, tokenizer, records["test"])
with ml.disable_adapter(model):
    without = ml.answer_all(model, tokenizer, records["test"])
for name, answers in {"adapter on ": after, "adapter off": without}.items():
    print(f"{name}  answers with 'It matters': {sum('It matters' in answer for answer in answers)} of {len(answers)}")

# %% [markdown]
# **And the base?** Its fingerprint after 120 steps, and its outputs with the adapter switched off:

# %%
print(
    "base after: ",
    ml.sha256_of(ml.base_state(model))[:32],
    " unchanged:",
    ml.sha256_of(ml.base_state(model)) == fingerprint,
)
with ml.disable_adapter(model):
    print(f"adapter off: {np.count_nonzero(logits() != before)} of {before.size:,} outputs differ from the base's")

# %% [markdown]
# Not one bit moved. This is no rule that the optimizer obeys; it follows from how the engine works. W has no
# `requires_grad`, so its gradient is [dropped before it is ever computed](../minilora/engine/tensor.py). That saves
# the work, and the memory for it. Lesson 11 counts both.
#
# So what did training produce? An update of every number of every adapted matrix, of rank 8 at most. Take one of them:

# %%
name, module = next(iter(lora_modules(model).items()))
delta = module.adapters["legal"].delta()  # (α / r) B A, formed here only to look at it
singular = np.linalg.svd(delta, compute_uv=False)
print(f"{name}: {np.count_nonzero(delta):,} of {delta.size:,} numbers move")
print("rank of the update:", np.linalg.matrix_rank(delta))
print("its singular values:", singular[:9].round(3), "...")
print(f"size beside W: {np.linalg.norm(delta) / np.linalg.norm(module.weight.data):.3f}")
stored = sum(array.nbytes for array in ml.adapter_state(model, "legal").values())
base = sum(array.nbytes for array in ml.base_state(model).values())
print(f"to keep or send: {stored / 1e6:.2f} MB of adapter beside {base / 1e6:.2f} MB of base")

# %% [markdown]
# A singular value tells how strong one of the directions is that a matrix acts in. Rounding aside, exactly eight are
# not zero, one for each column of B: the neck of section 1, found again in the result. Low rank does not mean small,
# though: "size beside W" compares the two matrices by the root of the sum of their squares.
#
# In a model this small, the adapter is no small part of the whole. Its size grows with m + n, the model's with m n,
# so the share shrinks as the matrices grow: 1.9 % of the matrix drawn in section 1.
#
# All the promises of this lesson can be checked in one call, on any adapter you will ever train:

# %%
report = ml.audit(model, "legal")
print(len(report.checks), "promises kept:", ", ".join(check for check, found in report.checks))

# %% [markdown]
# ## What to remember
#
# - LoRA adds $\frac{\alpha}{r}(x A^\top) B^\top$ to a frozen $x W^\top$. A projects down to r numbers, B projects up
#   again.
# - It trains r (m + n) numbers in place of m n, and never forms B A.
# - $dB = s\,g^\top (x A^\top)$ and $dA = s\,(g B)^\top x$: each contains the other matrix.
# - B starts at zero and A at random. The first output is the base's, bit for bit; dA is zero for one step, dB is not.
# - Under Adam, α / r keeps the first step about equal for all ranks. Under SGD it does not: there α / √r does.
# - The base's bytes never change. The model's behaviour does, on old tasks as well, while the adapter is on.
#
# ## Where it stands
#
# | | file |
# |---|---|
# | the operation and its gradients | [`minilora/engine/fused.py`](../minilora/engine/fused.py), `lora_linear` |
# | the layer and its start | [`minilora/lora/layer.py`](../minilora/lora/layer.py) |
# | the settings and the scale | [`minilora/lora/config.py`](../minilora/lora/config.py) |
# | adding, switching off and removing | [`minilora/lora/adapters.py`](../minilora/lora/adapters.py) |
# | measured derivatives | [`minilora/engine/gradcheck.py`](../minilora/engine/gradcheck.py) |
# | the promises, checked | [`minilora/lora/audit.py`](../minilora/lora/audit.py) |
# | the paper | [LoRA: Low-Rank Adaptation of Large Language Models](https://arxiv.org/abs/2106.09685), section 4 |
#
# **Now you:** [exercises 8](exercises/08_lora.ipynb). Write the forward pass, both gradients and the start yourself; a
# checker tells you, in one line, what is right and what is not.
