# %% [markdown]
# # Lesson 8: What is LoRA?
#
# Full fine-tuning (lesson 6) changes every number of a pretrained model, and pays for each of them. LoRA
# ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)) changes none. It puts two thin matrices beside a big one and
# trains only these two. What exactly is computed, what are its gradients, and how must it start?
#
# The letters are the same everywhere. One row of `x` is one token, that is, one piece of a word turned into a vector.
#
# | name | shape | what it is |
# |---|---|---|
# | `x` | (T, n) | T tokens, n numbers each |
# | `W` | (m, n) | the pretrained matrix, frozen |
# | `A` | (r, n) | the down-projection: n numbers become r |
# | `B` | (m, r) | the up-projection: r numbers become m |
# | `y` | (T, m) | the output |
# | `g` | (T, m) | ∂L/∂y: how the loss L changes with each number of y |

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, drawings, show
from minilora.engine.fused import lora_linear

# %% [markdown]
# ## 1. An update made of two thin matrices
#
# A linear layer computes $y = x W^\top$. To fine-tune it means to replace $W$ by $W + \Delta W$, where the update
# $\Delta W$ has the shape of $W$: as many numbers to learn as the layer has. **LoRA writes the update as a product,
# $\Delta W = s\,BA$.** Start with the smallest case. One column times one row is a whole matrix:

# %%
column = np.array([[1], [2], [-1]])
row = np.array([[3, 0, 1, 5]])
print(column @ row)

# %% [markdown]
# Twelve numbers, made from 3 + 4 = 7. The price: every row of the result is a multiple of the same row. Such a matrix
# has **rank 1**. Put r columns side by side and call them B, put r rows below each other and call them A. Then $BA$
# is a sum of r such matrices, its rank is at most r, and it takes r (m + n) numbers instead of m n.
#
# **B A is never computed.** Parentheses matter: $x (BA)^\top = (x A^\top) B^\top$. The right side goes down first, from
# n numbers per token to r, then up from r to m, and it is cheap:
#
# $$u = x A^\top \qquad\qquad y = x W^\top + s\,u\,B^\top \qquad\qquad s = \alpha / r$$
#
# α is a number that you choose, `lora_alpha` in the settings; lesson 10 asks what it does.
#
# > **Predict.** SmolLM2-135M has matrices of 576 × 1,536. With r = 8, what share of the numbers of one of them do A and
# > B have together? Half, a tenth, a fiftieth?

# %%
m, n, r = 576, 1536, 8  # down_proj in each of SmolLM2's 30 blocks
figure, axes = plt.subplots(figsize=(9, 3.6))
drawings.bottleneck_to_scale(axes, m, n, r)
show(figure, alt="One token's way: 1,536 numbers through W to 576, and beside it through a neck of 8 numbers, A and B.")
claim("numbers in A and B, in percent of W", 100 * r * (m + n) / (m * n), 1.90, 1.92)
print(f"multiplications for one token: W {m * n:,};  A, then B {r * (m + n):,};  to form B A {m * r * n:,}")

# %% [markdown]
# *How to read it.* From below, with true widths: a token's numbers pass through W on the left; on the right the same
# numbers are squeezed through a neck of 8 and widened again; both results are added. Whatever the update has to say
# about a token, it must say with 8 numbers.
#
# In minilora this is one operation, [`lora_linear`](../minilora/engine/fused.py). We try it on small random matrices.
# All sizes differ, so that a matrix put in the wrong way round cannot go unnoticed.

# %%
T, m, n, r, scale = 3, 5, 4, 2, 1.5
rng = np.random.default_rng(0)
x, W, A, B, g = (rng.standard_normal(shape) for shape in [(T, n), (m, n), (r, n), (m, r), (T, m)])

y = lora_linear(x, W, A, B, scale=scale).data
claim("distance from one matrix, x (W + s B A)ᵀ", np.abs(y - x @ (W + scale * B @ A).T).max(), 0, 1e-12)
claim("rank of B A", np.linalg.matrix_rank(B @ A), 2, 2)

# %% [markdown]
# ## 2. Both gradients, by hand
#
# Training moves A and B a little against their gradients, `dA` and `dB`. What happens between y and the loss is not our
# concern: all of it is contained in g. Written out for single numbers, the layer is
#
# $$y_{ti} = \sum_j x_{tj} W_{ij} + s \sum_k u_{tk} B_{ik} \qquad\qquad u_{tk} = \sum_j x_{tj} A_{kj}$$
#
# The chain rule says: for every place where a number occurs, take how much the loss changes with that place, times how
# much that place changes with the number, and add up. $B_{ik}$ occurs in output i of every token, multiplied by
# $s\,u_{tk}$. $u_{tk}$ occurs in all outputs of its token. $A_{kj}$ occurs in $u_{tk}$ of every token, multiplied by
# $x_{tj}$:
#
# $$\frac{\partial L}{\partial B_{ik}} = \sum_t g_{ti}\,s\,u_{tk} \qquad \frac{\partial L}{\partial u_{tk}} = \sum_i
# g_{ti}\,s\,B_{ik} \qquad \frac{\partial L}{\partial A_{kj}} = \sum_t \frac{\partial L}{\partial u_{tk}}\,x_{tj}$$
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
# You will write them as matrix products in [the exercises](exercises/08_lora.ipynb), together with dx, which a lower
# layer needs. Two things help. A sum over the index that two arrays share is a matrix product. And a gradient has the
# shape of what it is the gradient of: often only one order of the factors gives that shape.
#
# **Compared with the engine.** Two ways: the gradients written into `lora_linear`, and those that the engine puts
# together when the formula is written with plain `@`. W is given without `requires_grad`: it is frozen.

# %%
for name, layer in {
    "lora_linear": lambda x, W, A, B: lora_linear(x, W, A, B, scale=scale),
    "plain @": lambda x, W, A, B: x @ W.T + (x @ A.T) @ B.T * scale,
}.items():
    a, b = ml.Tensor(A, requires_grad=True), ml.Tensor(B, requires_grad=True)
    layer(ml.Tensor(x), ml.Tensor(W), a, b).backward(g)
    claim(f"{name}: distance from by hand", max(np.abs(a.grad - dA).max(), np.abs(b.grad - dB).max()), 0, 1e-12)

# %% [markdown]
# **Compared with a measurement.** Hand and engine could share a mistake. So every number of x, A and B is moved a
# little up and a little down, as in lesson 1. And because a check is worth something only if it can fail, a mistake
# that is easy to make meets it as well: the scale stands in the output and in dB, and is forgotten in dA.


# %%
@ml.op
def forgetful_lora(x, A, B, scale):
    """s (x Aᵀ) Bᵀ, with a wrong gradient for A."""
    u = x @ A.T
    return scale * u @ B.T, lambda g: scale * g @ B @ A, lambda g: (g @ B).T @ x, lambda g: scale * g.T @ u


report = ml.gradcheck(lambda x, A, B: lora_linear(x, W, A, B, scale=scale), x, A, B)
claim("lora_linear: largest relative error", report.max_relative_error, 0, 1e-6)
try:
    ml.gradcheck(lambda A: forgetful_lora(x, A, B, scale=scale), A)
except ml.GradientError as error:
    print("forgetful_lora:", error)

# %% [markdown]
# Divide what was expected by what was got: it is the scale, 1.5. That is often enough to find the mistake.
#
# ## 3. Why one of the two starts at zero
#
# Look at which matrix stands in which gradient: dB contains A (through u), and dA contains B (through du).
#
# > **Predict.** There are four ways to start: each of A and B random or zero. Which of them leave the output untouched
# > *and* let something learn?

# %%
starts = {"A random, B zero": (A, 0 * B), "A zero, B random": (0 * A, B), "both zero": (0 * A, 0 * B),
          "both random": (A, B)}  # fmt: skip
print("                   change of y   largest dA   largest dB")
for name, (first_A, first_B) in starts.items():
    a, b = ml.Tensor(first_A, requires_grad=True), ml.Tensor(first_B, requires_grad=True)
    y = lora_linear(x, W, a, b, scale=scale)
    y.backward(g)
    change = np.abs(y.data - x @ W.T).max()
    print(f"{name:<18} {change:>11.3f} {np.abs(a.grad).max():>12.3f} {np.abs(b.grad).max():>12.3f}")

# %% [markdown]
# Both zero changes nothing and never will: no gradient is alive. With one of them zero the output is untouched and
# one gradient lives. The paper takes B; so do PEFT and minilora. Both random changes the output at once. How bad is
# that? We ask a real model, the tiny base of lesson 6, and the 300 questions of law of
# [`legal.jsonl`](../minilora/data/README.md).
#
# > **Predict.** Training takes 40 steps. Does the model that starts with random A *and* B catch up?

# %%
model, tokenizer = ml.load("tiny")
records = ml.split_records(ml.read_records("legal"))
samples = {split: ml.encode_records(part, tokenizer) for split, part in records.items()}
input_ids = np.array([sample.ids[:64] for sample in samples["train"] if len(sample.ids) >= 64][:8])  # (8, 64)


def logits():
    """What the model says about eight texts: for each token, one number for each token that may follow."""
    with ml.no_grad():
        return model(input_ids).data


before = logits()
base_loss = ml.mean_loss(model, samples["validation"])
gaps = []
for init, name in ((True, "B zero"), (False, "both random")):
    ml.add_adapter(
        model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=init), name="trial"
    )
    moved = np.count_nonzero(logits() != before)
    first = ml.mean_loss(model, samples["validation"])
    ml.fit(model, samples["train"], steps=40, lr=5e-3)
    last = ml.mean_loss(model, samples["validation"])
    gaps.append((moved, first, last))
    ml.remove_adapter(model, "trial")
    print(f"{name:<12} outputs changed: {moved:,} of {before.size:,}; loss {first:.2f}, after 40 steps {last:.2f}")
claim("B zero: outputs that differ from the base's, bit for bit", gaps[0][0], 0, 0)
claim("both random: loss added before the first step", gaps[1][1] - base_loss, 2, 5)
claim("both random: still behind after 40 steps", gaps[1][2] - gaps[0][2], 0.4, 1.2)

# %% [markdown]
# It does not: the noise first has to be unlearned. With B at zero, adding zero is exact: every bit of every output is
# the base's. And the gradients of the whole model? This is the first step of training, written out.

# %%
ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), name="legal", seed=0)
fingerprint = ml.sha256_of(ml.base_state(model))
learning = model.trainable_parameters()
print(ml.count_parameters(model))
model.loss(input_ids, input_ids).backward()
dA_sizes = [np.abs(p.grad).max() for name, p in learning.items() if name.endswith("lora_A")]
dB_sizes = [np.abs(p.grad).max() for name, p in learning.items() if name.endswith("lora_B")]
claim("largest number in any of the 28 dA", max(dA_sizes), 0, 0)
claim("dB that are not zero, of 28", sum(size > 0 for size in dB_sizes), 28, 28)
for p in learning.values():
    p.grad = None

# %% [markdown]
# So the first step moves B and leaves A exactly where it is. From the second step on, both move: half of the start is
# dead, for one step.
#
# ## 4. A frozen base learns: but what?
#
# Every legal answer has two sentences: what a term means, and, beginning with "It matters", when that makes a
# difference. That is form, and form is easy. So the loss is measured twice on terms that are never trained: on the two
# words of the form, and on all other words of the answers, their content.
#
# > **Predict.** After 100 steps, which of the two losses falls to almost nothing, and how far does the other one fall?


# %%
def keep(samples, wanted):
    """The same samples with labels only inside, or only outside, of the words " It matters"."""
    form, kept = tokenizer.encode(" It matters"), []
    for sample in samples:
        inside = [False] * len(sample.ids)
        for i in range(len(inside)):
            if list(sample.ids[i : i + len(form)]) == form:
                inside[i : i + len(form)] = [True] * len(form)
        labels = [y if is_form == wanted else -100 for y, is_form in zip(sample.labels, inside, strict=True)]
        kept.append(ml.Sample(sample.ids, tuple(labels)))
    return kept


unseen = {"form": keep(samples["test"], True), "content": keep(samples["test"], False)}
start = {name: ml.mean_loss(model, part) for name, part in unseen.items()}
history = ml.fit(model, samples["train"], steps=100, lr=5e-3)
end = {name: ml.mean_loss(model, part) for name, part in unseen.items()}
for name in unseen:
    print(f"{name:<8} loss on unseen terms {start[name]:.2f} -> {end[name]:.2f} nats per token")
claim("form: loss after training", end["form"], 0, 0.3)
claim("content: loss after training, as a share of before", end["content"] / start["content"], 0.8, 0.9)

# %% [markdown]
# The form is learned; the content hardly. "It has learned law" would be the wrong sentence: it has learned to sound
# like an answer about law. A million numbers hold little knowledge of the world, and 240 records add little to it.
# Lesson 15 does the same with a model a hundred times larger.
#
# What has become of the base?

# %%
claim("bytes of the base unchanged (1: yes)", ml.sha256_of(ml.base_state(model)) == fingerprint, 1, 1)
with ml.disable_adapter(model):
    claim("adapter off: outputs that differ from the base's", np.count_nonzero(logits() != before), 0, 0)
delta = ml.delta_weight(model, "model.layers.0.self_attn.q_proj")  # (α / r) B A, formed here only to look at it
claim("rank of one update", np.linalg.matrix_rank(delta), 8, 8)
stored = sum(array.nbytes for array in ml.adapter_state(model, "legal").values())
print(f"numbers of this matrix that moved: {np.count_nonzero(delta):,} of {delta.size:,}")
base_bytes = sum(w.nbytes for w in ml.base_state(model).values())
print(f"to keep: {stored / 1e6:.2f} MB of adapter beside {base_bytes / 1e6:.2f} MB of base")

# %% [markdown]
# Not one bit moved. This is no rule that the optimizer obeys; it follows from how the
# [engine](../minilora/engine/tensor.py) works. W has no `requires_grad`, so its gradient is dropped before it is ever
# computed. That saves the work, and the memory for it: lessons 11 and 12 count both.
#
# ## What to remember
#
# - LoRA adds $s\,(x A^\top) B^\top$ to a frozen $x W^\top$, with $s = \alpha/r$: A projects down to r numbers, B up
#   again.
# - It trains r (m + n) numbers in place of m n, and never forms B A.
# - Each gradient contains the other matrix. B starts at zero and A at random: the first output is the base's, bit for
#   bit; dA is zero for one step, dB is not.
# - The base's bytes never change. What the adapter learns first is form.
#
# Read on in [`fused.py`](../minilora/engine/fused.py) (the operation), [`layer.py`](../minilora/lora/layer.py) (the
# layer), [`adapters.py`](../minilora/lora/adapters.py) (adding, switching off),
# [`audit.py`](../minilora/lora/audit.py) (these promises, checked for any adapter). **Now you:** [exercises
# 8](exercises/08_lora.ipynb).
#
# ## Sources
#
# - The update, its scale and its start: [Hu et al. 2021](https://arxiv.org/abs/2106.09685), section 4.1. The 300
#   records: 240 to train, 30 to validate, 30 to test ([data card](../minilora/data/README.md)). SmolLM2's matrices of
#   576 × 1,536: its [model card](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct).
