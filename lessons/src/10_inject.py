# %% [markdown]
# # Lesson 10: How is it put into a model?
#
# Lesson 9 adapted one layer. A model has many layers, in modules inside modules. How is an adapter **injected** into
# them, and how is it removed? And can it be **merged** into the base, so that it costs nothing at inference? Each of
# these steps can go wrong without an error message.

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, drawings, predict, show
from minilora.engine.fused import lora_linear
from minilora.models.load import TINY
from minilora.nn.layers import Linear
from minilora.pages.style import GENERAL, VALIDATION, ink

# %% [markdown]
# ## 1. Injection: replacing a layer
#
# A model is a tree of named modules, as in PyTorch. The names are those in Hugging Face's files:

# %%
model, tokenizer = ml.load("tiny")
linear = [name for name, module in model.named_modules() if isinstance(module, Linear)]
print(len(linear), "linear layers:", *linear[:4], "...", linear[-1])

# %% [markdown]
# To adapt a linear layer, replace it by a module that has **the same weight**, frozen, and in addition an A and a B.
# Here is such a module, with lesson 9's operation:


# %%
class MyLora(ml.Module):
    """y = x Wᵀ + (alpha / r)(x Aᵀ) Bᵀ around the weight of an existing layer."""

    def __init__(self, layer, r, alpha, rng):
        m, n = layer.weight.shape
        self.weight = layer.weight  # not a copy: the base's own
        self.weight.requires_grad = False
        self.A = ml.Parameter(rng.uniform(-1, 1, (r, n)).astype(np.float32) / np.float32(np.sqrt(n)))
        self.B = ml.Parameter(np.zeros((m, r), np.float32))
        self.scale = alpha / r

    def forward(self, x):
        return lora_linear(x, self.weight, self.A, self.B, scale=self.scale)


# %% [markdown]
# Injection has two steps: freeze all parameters of the model, then replace the target layers.

# %%
figure, axes = plt.subplots(figsize=(9, 3.3), layout="constrained")
drawings.injection(axes)
show(
    figure,
    alt="Left, an attention block of linear layers; right, q_proj is a LoRA layer with the same weight, A and B.",
)

# %% [markdown]
# *How to read it.* Left is the model before injection, right is the model after it. `q_proj` is a target, `k_proj` is
# not. No weight is copied, and only A and B are trainable.
#
# > **Predict.** Now we swap the two steps: we replace the layers first, then freeze all parameters. The model runs,
# > and its output is right. What happens in training?

# %%
for order in ("freeze last", "freeze first"):
    model, tokenizer = ml.load("tiny")
    rng = np.random.default_rng(0)
    if order == "freeze first":
        model.requires_grad_(False)
    for block in model.model.layers:  # q and v; in the exercises you write it for any model and any targets
        block.self_attn.q_proj = MyLora(block.self_attn.q_proj, 8, 16, rng)
        block.self_attn.v_proj = MyLora(block.self_attn.v_proj, 8, 16, rng)
    if order == "freeze last":
        model.requires_grad_(False)
    counts = ml.count_parameters(model)
    print(f"{order:<12} {counts}")
    wanted = 8 * 4 * (128 + 128 + 64 + 128) if order == "freeze first" else 0  # r (m + n), for q and v of 4 blocks
    claim(f"{order}: trainable parameters", counts.trainable, wanted, wanted)

# %% [markdown]
# If you freeze last, no parameter is trainable, and no error message reports it. So **count the trainable parameters
# before you train**: there must be exactly r (m + n) for each adapted matrix. A second mistake without an error
# message is a misspelled target. If `"v_porj"` is ignored, only half of the adapter is there and trained. minilora's
# [`find_targets`](../minilora/lora/config.py) refuses such a name:

# %%
fresh, _ = ml.load("tiny")
try:
    ml.add_adapter(fresh, ml.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_porj"]))
except ValueError as error:
    print(error)

# %% [markdown]
# ## 2. The base does not change
#
# From here on we use minilora's [`add_adapter`](../minilora/lora/adapters.py), which does the same for all 28
# matrices. We also compute a **fingerprint** of the base, the SHA-256 hash of its weights. If one bit changed, the
# hash would differ.

# %%
records = ml.split_records(ml.read_records("legal"))
samples = {split: ml.encode_records(part, tokenizer) for split, part in records.items()}
old_text = ml.encode_text((TINY / "validation.txt").read_text(encoding="utf-8"), tokenizer, max_length=256)
EVERY = 1  # in the browser: 4
input_ids = np.array([sample.ids[:64] for sample in samples["train"] if len(sample.ids) >= 64][:8])  # (8, 64)


def logits(model):
    """The model's logits for eight texts."""
    with ml.no_grad():
        return model(input_ids).data


rows = {}  # state of the model -> its validation loss on law and on the old domain


def note(name):
    rows[name] = ml.mean_loss(model, samples["validation"]), ml.mean_loss(model, old_text[::EVERY])


model, tokenizer = ml.load("tiny")
fingerprint, base_logits = ml.sha256_of(ml.base_state(model)), logits(model)
note("the base")
ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), name="legal")
ml.fit(model, samples["train"], steps=60, lr=5e-3)
note("adapter on")
with ml.disable_adapter(model):
    note("adapter off")
    claim("adapter off: logits that differ from the base's", np.count_nonzero(logits(model) != base_logits), 0, 0)
same = ml.sha256_of(ml.base_state(model)) == fingerprint
claim("fingerprint of the base unchanged after 60 steps (1: yes)", same, 1, 1)

# %% [markdown]
# ## 3. Merging
#
# Since $x W^\top + s\,(x A^\top) B^\top = x\,(W + s\,BA)^\top$, the update can be added to the weight, once and for
# all. After that the model is as fast as the base and can be saved as an ordinary model. Two earlier methods of
# parameter-efficient fine-tuning cannot be merged: adapter layers ([Houlsby et al.
# 2019](https://arxiv.org/abs/1902.00751)) come after the model's own layers and add latency, and prefix tuning ([Li
# and Liang 2021](https://arxiv.org/abs/2101.00190)) takes up a part of the context.
#
# > **Predict.** The formula is exact. Are the merged model's logits those of the model with the adapter, bit for bit?

# %%
on = logits(model)
ml.merge_adapter(model)
note("merged")
gap = np.abs(logits(model) - on).max() / np.abs(on).max()
claim("merged: largest difference, as a share of the largest logit", gap, 1e-8, 1e-5)
ml.unmerge_adapter(model)

# %% [markdown]
# They are not. float32 has 24 significant bits, and the merged model adds and rounds in a different order. The
# difference is only rounding error. Three mistakes in merging have larger effects:
#
# - Adding the transpose, $(BA)^\top$. The shapes prevent this, unless m = n. Here q_proj and o_proj are square.
# - Forgetting the scale.
# - Merging twice.
#
# > **Predict.** Which of the three does the most harm? And does a model that is merged twice still produce text?

# %%
predict("merged twice: loss added on the old domain")

# %%
module_of = dict(model.named_modules())
adapted = [name for name, module in module_of.items() if hasattr(module, "adapters") and isinstance(module, Linear)]
deltas = {name: ml.delta_weight(model, name) for name in adapted}  # s B A, one matrix (m, n) each
originals = {name: module_of[name].weight.data for name in adapted}


def weights_become(change):
    """Set every adapted weight to change(original weight, update, A, B)."""
    for name in adapted:
        weights = module_of[name].adapters["legal"]
        A, B = weights.lora_A.data, weights.lora_B.data
        module_of[name].weight.data = change(originals[name], deltas[name], A, B)


ml.set_adapter(model, None)  # the adapter is off: only the weights matter
weights_become(lambda w, delta, A, B: w + (2 * (B @ A).T if len(w) == w.shape[1] else delta))
note("transposed")
weights_become(lambda w, delta, A, B: w + B @ A)
note("scale forgotten")
weights_become(lambda w, delta, A, B: w + delta + delta)
note("merged twice")
claim("merged twice: loss added on the old domain", rows["merged twice"][1] - rows["merged"][1], 0.5, 1.2)

# %% [markdown]
# ## 4. Unmerging: is subtraction enough?
#
# > **Predict.** In exact arithmetic, W + ΔW - ΔW is W. In float32, how many of the 786,432 entries get their old value
# > back: all, nearly all, half?

# %%
predict("entries that differ after subtracting, in percent")

# %%
weights_become(lambda w, delta, A, B: (w + delta) - delta)
note("merged, then subtracted")
count = sum(int((module_of[name].weight.data != originals[name]).sum()) for name in adapted)
total = sum(w.size for w in originals.values())
print(f"{count:,} of {total:,} entries differ from the base")
claim("entries that differ after subtracting, in percent", 100 * count / total, 3, 9)
claim("fingerprint unchanged after subtracting (0: no)", ml.sha256_of(ml.base_state(model)) == fingerprint, 0, 0)
weights_become(lambda w, delta, A, B: w)
note("restored")
claim(
    "fingerprint unchanged after restoring the array (1: yes)", ml.sha256_of(ml.base_state(model)) == fingerprint, 1, 1
)

# %% [markdown]
# The entries that differ have rounding errors, which are too small to show in the loss. But if many adapters share a
# base, the base must stay the same after any number of merges. So while an update is merged, minilora keeps the base's
# array, and restores it afterwards ([`layer.py`](../minilora/lora/layer.py), `merge` and `unmerge`). Until then, the
# kept array needs additional memory for each adapted matrix.

# %%
figure, axes = plt.subplots(figsize=(9, 3.9), layout="constrained")
names = list(rows)
for column, (color, text) in enumerate([(VALIDATION, "law"), (GENERAL, "the old domain")]):
    values = [pair[column] for pair in rows.values()]
    axes.plot(values, range(len(names)), "o", color=color, markersize=7)
    axes.annotate(text, (values[0], -0.6), ha="left" if column else "center", color=ink(color), annotation_clip=False)
axes.set_yticks(range(len(names)), names)
axes.set(xlabel="validation loss (nats per token)", ylim=(len(names) - 0.5, -1.1))
axes.grid(axis="y", alpha=0.3)
axes.tick_params(axis="y", length=0)
show(
    figure,
    alt="Loss on law and on the old domain for nine states of the model; merged equals on, merged twice is worse",
)
for name, (law, old) in rows.items():
    print(f"{name:<27} law {law:.3f}   old domain {old:.3f}")

# %% [markdown]
# *How to read it.* There is one row per state of the model; further left is better. The states that must agree do
# agree: "adapter off" and "restored" with "the base", and "merged" with "adapter on". Merging twice does the most harm.
# All the wrong models still have plausible losses, but none of them is the model that was trained. Here α / r is 2, so
# forgetting the scale halves the update: the model is then worse at law, and has forgotten less.
#
# One call makes all of these checks for any adapter:

# %%
ml.set_adapter(model, "legal")
report = ml.audit(model, "legal")
print(len(report.checks), "checks passed:", ", ".join(check for check, found in report.checks))

# %% [markdown]
# ## 5. Are its gradients right?
#
# Lesson 1 changed one element after another and measured how the result changes. Here 77,824 parameters are trained,
# and each would need two forward passes. Instead, change all elements of one matrix at once, along a random direction
# $v$ (lesson 1's directional derivative): for A, the loss then changes at the rate $\langle dA, v \rangle = \sum
# dA_{ij} v_{ij}$, and likewise for B. This is one number per matrix, and a mistake in dA almost surely changes it.
# Would the check find a small mistake? `slightly_wrong` does nothing in the forward pass, and makes the gradient 1 %
# too large. We put it in front of one of the 28 layers.
#
# > **Predict.** How many forward passes check the A and B of all 28 layers? And what does the check report?

# %%
predict("forward passes that check all gradients of the adapter")

# %%
print(ml.gradcheck(model, samples["train"][:2]))
claim("forward passes that check all gradients of the adapter", 2 * len(model.trainable_parameters()), 112, 112)


@ml.op
def slightly_wrong(x):
    """y = x, with a wrong VJP."""
    return x.copy(), lambda g: 1.01 * g


layer = model.model.layers[2].mlp.down_proj
layer.forward = lambda x: type(layer).forward(layer, slightly_wrong(x))
try:
    ml.gradcheck(model, samples["train"][:2])
except ml.GradientError as error:
    print(error)
del layer.forward

# %% [markdown]
# Two for each A and each B: 112. The loss of this model is right, so it does not show the mistake. But the check finds
# it. The element that it prints is 1 % too large; along the random direction, the error is 1.6 % of the norm of the
# whole gradient. The check also names the last parameter whose gradient is wrong, B of up_proj: the mistake is between
# this layer and down_proj, whose gradients are right. Run this check whenever you have written an operation or a layer.
#
# <details><summary>The same in PyTorch</summary>
#
# ```python
# import torch
# from peft import LoraConfig, get_peft_model
# from transformers import AutoModelForCausalLM
#
# # A and B are both random, as if they had been trained. The base is frozen first.
# config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
# model = get_peft_model(AutoModelForCausalLM.from_pretrained("tiny"), config)
# ids = torch.tensor(input_ids)
# on = model(ids).logits
# with model.disable_adapter():
#     off = model(ids).logits
# merged = model.merge_and_unload()(ids).logits  # of an ordinary model again
# ```
#
# </details>
#
# ## What to remember
#
# - Injection replaces modules. The new module has the base's own weight, frozen. Freeze first, then inject, then count
#   the trainable parameters.
# - Name the targets, and raise an error if a name matches no layer.
# - Merging computes W + (α/r) B A, which is exact up to rounding. Merge once, with the scale, and not transposed.
# - To undo a merge, restore the old array. Subtraction leaves rounding errors in thousands of entries.
# - A hash (fingerprint) of the base proves that it has not changed.
# - One random direction per matrix checks the gradients of a whole model.
#
# **Now you:** [exercises 10](exercises/10_inject.ipynb): write merging and injection yourself. At the end, your own
# layer from exercises 9 is injected into the tiny base and trained.
#
# ## Sources
#
# - A float32 number has 24 significant bits: [IEEE 754](https://doi.org/10.1109/IEEESTD.2019.8766229).
