# %% [markdown]
# # Lesson 9: What is LoRA?
#
# Full fine-tuning (lesson 7) trains all parameters of a pretrained model and pays for each of them. LoRA (low-rank
# adaptation, [Hu et al. 2021](https://arxiv.org/abs/2106.09685)) freezes these parameters. To each large matrix it
# adds two thin ones, and trains only those. What exactly is computed, what are the gradients, and how must the
# matrices be initialised?
#
# The letters are the same in all later lessons. One row of `x` is the vector of one token.
#
# | name | shape | what it is |
# |---|---|---|
# | `x` | (T, n) | T tokens, n features each |
# | `W` | (m, n) | the pretrained matrix, frozen |
# | `A` | (r, n) | the down-projection, from n features to r |
# | `B` | (m, r) | the up-projection, from r features to m |
# | `y` | (T, m) | the output |
# | `g` | (T, m) | ∂L/∂y: the gradient of the loss L with respect to the output |

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, drawings, predict, show
from minilora.engine.fused import lora_linear

# %% [markdown]
# ## 1. An update made of two thin matrices
#
# A linear layer computes $y = x W^\top$. Fine-tuning replaces $W$ by $W + \Delta W$. The update $\Delta W$ has the
# shape of $W$, so it has as many trainable parameters as the layer. **LoRA writes the update as a product, $\Delta W =
# s\,BA$.** Here is the smallest case. One column times one row is a whole matrix:

# %%
column = np.array([[1], [2], [-1]])
row = np.array([[3, 0, 1, 5]])
print(column @ row)

# %% [markdown]
# These twelve entries are made from 3 + 4 = 7 numbers. The limitation is that every row of the result is a multiple of
# the same row. Such a matrix has **rank 1**. Now put r columns side by side and call them B, and stack r rows and call
# them A. Then $BA$ is a sum of r such matrices. Its rank is at most r, and it has r (m + n) parameters instead of m n.
# The paper's hypothesis is that a small r is enough for fine-tuning, although W itself has full rank ([lesson
# 8](08_low_rank.ipynb) tests it).
#
# **B A is never computed.** The result is the same in either order, but not the cost: $x (BA)^\top = (x A^\top)
# B^\top$. The right-hand side first projects down, from n features per token to r, and then up, from r to m. This
# order is cheap:
#
# $$u = x A^\top \qquad\qquad y = x W^\top + s\,u\,B^\top \qquad\qquad s = \alpha / r$$
#
# (In the paper a token is a column: $h = W_0 x + s\,BA\,x$.) α is a hyperparameter, `lora_alpha` in the configuration;
# lesson 12 asks what it does.
#
# > **Predict.** SmolLM2-135M has matrices of 576 × 1,536. With r = 8, how many parameters do A and B have together, as
# > a share of W? Half, a tenth, a fiftieth?

# %%
predict("parameters in A and B, in percent of W")

# %%
m, n, r = 576, 1536, 8  # down_proj in each of SmolLM2's 30 blocks
figure, axes = plt.subplots(figsize=(9, 3.6))
drawings.bottleneck_to_scale(axes, m, n, r)
show(
    figure,
    alt="The path of one token: 1,536 features through W to 576, and in parallel through A and B, 8 features wide.",
)
claim("parameters in A and B, in percent of W", 100 * r * (m + n) / (m * n), 1.90, 1.92)
print(f"multiplications for one token: W {m * n:,};  A, then B {r * (m + n):,};  to form B A {m * r * n:,}")

# %% [markdown]
# *How to read it.* Start at the bottom; all widths are to scale. On the left, the features of a token pass through W.
# On the right, the same features pass through a bottleneck of 8 and are projected up again. Both results are added.
# The update can depend on a token only through these 8 features.
#
# In minilora this is one operation, [`lora_linear`](../minilora/engine/fused.py). We try it on small random matrices.
# All their dimensions differ, so that a matrix which is transposed by mistake causes an error.

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
# Training changes A and B a little against their gradients, `dA` and `dB`. All that we need to know about how the loss
# depends on y is contained in g. Written out with indices, the layer is
#
# $$y_{ti} = \sum_j x_{tj} W_{ij} + s \sum_k u_{tk} B_{ik} \qquad\qquad u_{tk} = \sum_j x_{tj} A_{kj}$$
#
# The chain rule says: find all quantities that depend directly on a parameter. Multiply the derivative of the loss with
# respect to each of them by its derivative with respect to the parameter, and sum. $B_{ik}$ occurs in output i of every
# token, multiplied by $s\,u_{tk}$. $u_{tk}$ occurs in all outputs of its token. $A_{kj}$ occurs in $u_{tk}$ of every
# token, multiplied by $x_{tj}$:
#
# $$\frac{\partial L}{\partial B_{ik}} = \sum_t g_{ti}\,s\,u_{tk} \qquad \frac{\partial L}{\partial u_{tk}} = \sum_i
# g_{ti}\,s\,B_{ik} \qquad \frac{\partial L}{\partial A_{kj}} = \sum_t \frac{\partial L}{\partial u_{tk}}\,x_{tj}$$
#
# These three formulas are already a program: each sum is a loop.


# %%
def gradients(A, B, g):
    """dA and dB, one product at a time."""
    u = x @ A.T
    dB, du, dA = np.zeros_like(B), np.zeros_like(u), np.zeros_like(A)
    for t in range(T):
        for k in range(r):
            for i in range(m):
                dB[i, k] += g[t, i] * scale * u[t, k]
                du[t, k] += g[t, i] * scale * B[i, k]
            for j in range(n):
                dA[k, j] += du[t, k] * x[t, j]  # du[t, k] is complete: its loop over i is done
    return dA, dB


# %% [markdown]
# In [the exercises](exercises/09_lora.ipynb) you will write them as matrix products, together with dx, which the layer
# below needs. Two rules help. A sum over an index that two arrays share is a matrix product. And a gradient has the
# shape of its parameter, so often only one order of the factors fits.
#
# **Compared with the engine.** `lora_linear` has its own backward pass. W is passed without `requires_grad`: it is
# frozen.

# %%
dA, dB = gradients(A, B, g)
a, b = ml.Tensor(A, requires_grad=True), ml.Tensor(B, requires_grad=True)
lora_linear(ml.Tensor(x), ml.Tensor(W), a, b, scale=scale).backward(g)
claim("largest difference from the loops", max(np.abs(a.grad - dA).max(), np.abs(b.grad - dB).max()), 0, 1e-12)

# %% [markdown]
# **Compared with a measurement.** The loops and the engine could share a mistake. So we also compare with central
# differences for every entry of x, A and B, as in lesson 1. A check is useful only if it can fail, so we also try it
# on a common mistake: the scale is in the output and in dB, but is missing in dA.


# %%
@ml.op
def forgetful_lora(A):
    """The same output as a function of A, with a wrong gradient."""
    return lora_linear(x, W, A, B, scale=scale).data, lambda g: gradients(A, B, g)[0] / scale


report = ml.gradcheck(lambda x, A, B: lora_linear(x, W, A, B, scale=scale), x, A, B)
claim("lora_linear: largest relative error", report.max_relative_error, 0, 1e-6)
try:
    ml.gradcheck(forgetful_lora, A)
except ml.GradientError as error:
    print(error)

# %% [markdown]
# Divide the expected derivative by the one after "got": the quotient is the scale, 1.5. Such a quotient often shows
# what is missing.
#
# ## 3. How must A and B be initialised?
#
# Look at which matrix occurs in which gradient: dB contains A (through u), and dA contains B (through du).
#
# > **Predict.** There are four initialisations: each of A and B is random or zero. Which of them leave the output
# > unchanged *and* allow the model to learn?

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
# If both are zero, both gradients are zero, and neither matrix ever changes. If one of them is zero, the output is
# unchanged and one gradient is not zero. The paper initialises B to zero; so do minilora and
# [PEFT](https://huggingface.co/docs/peft), Hugging Face's library for **parameter-efficient fine-tuning**.
# Initialising A to zero and B at random needs smaller learning rates and is worse on average (Hayou et al. 2024). If
# both are random, the output changes at once. How bad is that? We try it on lesson 7's tiny base and 300 questions
# about law ([`legal.jsonl`](../minilora/data/README.md)).
#
# > **Predict.** Training takes 40 steps. Does the model with random A *and* B catch up?

# %%
predict("both random: loss above that of B zero after 40 steps")

# %%
model, tokenizer = ml.load("tiny")
records = ml.split_records(ml.read_records("legal"))
samples = {split: ml.encode_records(part, tokenizer) for split, part in records.items()}
input_ids = np.array([sample.ids[:64] for sample in samples["train"] if len(sample.ids) >= 64][:8])  # (8, 64)


def logits():
    """The model's logits for eight texts."""
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
claim("both random: loss above that of B zero after 40 steps", gaps[1][2] - gaps[0][2], 0.4, 1.2)

# %% [markdown]
# It does not: after 40 steps its loss is still 0.88 nats higher than with B zero. If B is zero, the update is exactly
# zero, and every bit of every output is the base's. The paper draws A from a Gaussian distribution. PEFT's default is
# `kaiming_uniform_(A, a=sqrt(5))`, a uniform distribution between $-1/\sqrt n$ and $1/\sqrt n$; minilora's is the
# same. What are the gradients of the whole model in the first training step?

# %%
ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), name="legal", seed=0)
fingerprint = ml.sha256_of(ml.base_state(model))
learning = model.trainable_parameters()
print(ml.count_parameters(model))
in_units = np.concatenate([(p.data * np.sqrt(p.shape[1])).ravel() for name, p in learning.items() if "lora_A" in name])
claim("largest entry of any A, times the square root of n", np.abs(in_units).max(), 0.999, 1)
claim("standard deviation of A, times the same (uniform: 0.577)", in_units.std(), 0.57, 0.585)
model.loss(input_ids, input_ids).backward()
dA_sizes = [np.abs(p.grad).max() for name, p in learning.items() if name.endswith("lora_A")]
dB_sizes = [np.abs(p.grad).max() for name, p in learning.items() if name.endswith("lora_B")]
claim("largest entry of any of the 28 dA", max(dA_sizes), 0, 0)
claim("dB that are not zero, of 28", sum(size > 0 for size in dB_sizes), 28, 28)
for p in learning.values():
    p.grad = None

# %% [markdown]
# So the first step changes B and leaves A exactly as it is. From the second step on, both change.
#
# ## 4. What does the adapter learn?
#
# Every answer about law has two sentences. The first says what a term means. The second begins with "It matters" and
# says when the term makes a difference. Such a form is easy to learn. So we measure two losses on the test set: on the
# two words "It matters" (the form), and on all other words of the answers (the content).
#
# > **Predict.** After 100 steps, which of the two losses will be almost zero, and how far will the other one fall?

# %%
predict("content: loss after training, as a share of before")


# %%
def keep(samples, wanted):
    """The same samples, scored only inside (wanted=True) or only outside (False) the words " It matters"."""
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
STEPS = 100  # in the browser: 60
history = ml.fit(model, samples["train"], steps=STEPS, lr=5e-3)
end = {name: ml.mean_loss(model, part) for name, part in unseen.items()}
for name in unseen:
    print(f"{name:<8} test loss {start[name]:.2f} -> {end[name]:.2f} nats per token")
claim("form: loss after training", end["form"], 0, 0.3)
claim("content: loss after training, as a share of before", end["content"] / start["content"], 0.8, 0.9)

# %% [markdown]
# The model has learned the form, but hardly the content. It has not learned law; it has learned to sound like an
# answer about law. Lesson 18 does the same with a model a hundred times larger.
#
# Has the base changed?

# %%
claim("all bytes of the base unchanged (1: yes)", ml.sha256_of(ml.base_state(model)) == fingerprint, 1, 1)
with ml.disable_adapter(model):
    claim("adapter off: outputs that differ from the base's", np.count_nonzero(logits() != before), 0, 0)
delta = ml.delta_weight(model, "model.layers.0.self_attn.q_proj")  # (α / r) B A, formed here only to look at it
claim("rank of one update", np.linalg.matrix_rank(delta), 8, 8)
stored = sum(array.nbytes for array in ml.adapter_state(model, "legal").values())
print(f"entries of this update that are not zero: {np.count_nonzero(delta):,} of {delta.size:,}")
base_bytes = sum(w.nbytes for w in ml.base_state(model).values())
print(f"to store: an adapter of {stored / 1e6:.2f} MB, in addition to a base of {base_bytes / 1e6:.2f} MB")

# %% [markdown]
# Not a single bit of the base changed. This follows from how the [engine](../minilora/engine/tensor.py) works: W has
# no `requires_grad`, so its gradient is never computed. This saves computation and memory; lessons 13 and 14 count
# both.
#
# <details><summary>The same in PyTorch</summary>
#
# ```python
# from torch import nn
#
# class LoraLinear(nn.Module):  # PEFT has such a layer: base_layer, lora_A, lora_B, scaling
#     def __init__(self, base, r, alpha):
#         super().__init__()
#         self.base, self.scale = base.requires_grad_(False), alpha / r
#         self.A = nn.Linear(base.in_features, r, bias=False)  # nn.Linear's initialisation is PEFT's
#         self.B = nn.Linear(r, base.out_features, bias=False)
#         nn.init.zeros_(self.B.weight)
#     def forward(self, x):
#         return self.base(x) + self.scale * self.B(self.A(x))
# ```
#
# </details>
#
# ## What to remember
#
# - LoRA adds $s\,(x A^\top) B^\top$ to a frozen $x W^\top$, with $s = \alpha/r$. A projects down to r features, and B
#   projects up again.
# - It has r (m + n) trainable parameters instead of m n, and never computes B A.
# - Each gradient contains the other matrix. B is initialised to zero and A at random. So the first output is the
#   base's, bit for bit; dA is zero in the first step, and dB is not.
# - The base never changes. The adapter learns the form of the answers almost completely, and little of their content.
#
# To read the code, see [`fused.py`](../minilora/engine/fused.py) (the operation),
# [`layer.py`](../minilora/lora/layer.py) (the layer), [`adapters.py`](../minilora/lora/adapters.py) (adding an adapter,
# switching it off) and [`audit.py`](../minilora/lora/audit.py) (these properties, checked for any adapter). **Now
# you:** [exercises 9](exercises/09_lora.ipynb).
#
# ## Sources
#
# - The update, its scale and its initialisation: [Hu et al. 2021](https://arxiv.org/abs/2106.09685), section 4.1.
#   PEFT's initialisation: [`init_lora_weights`](https://huggingface.co/docs/peft/package_reference/lora). A zero and B
#   random: [Hayou et al. 2024](https://arxiv.org/abs/2406.08447), abstract.
# - The 300 records: 240 for training, 30 for validation, 30 for testing ([data card](../minilora/data/README.md)).
#   SmolLM2's matrices of 576 × 1,536: its [model card](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct).
