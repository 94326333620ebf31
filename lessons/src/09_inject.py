# %% [markdown]
# # Lesson 9: How is it put into a model?
#
# Lesson 8 has one layer. A model has many, inside modules inside modules. How does an adapter get in, how does it get
# out again, and can the two be made one, so that using it costs nothing? Four small functions answer this. Each of them
# has a way to go wrong that shows no error.

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, show
from minilora.engine.fused import lora_linear
from minilora.models.load import TINY
from minilora.nn.layers import Linear
from minilora.pages.style import GENERAL, VALIDATION, ink

# %% [markdown]
# ## 1. In: one layer takes another's place
#
# A model is a tree of modules with names, as in PyTorch and in Hugging Face's files:

# %%
model, tokenizer = ml.load("tiny")
linear = [name for name, module in model.named_modules() if isinstance(module, Linear)]
print(len(linear), "linear layers:", *linear[:4], "...", linear[-1])

# %% [markdown]
# To adapt one means to put another module in its place that holds **the very same weight**, frozen, with an A and a B
# beside it. Here it is, written out, with lesson 8's operation:


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
# And the whole injection: freeze everything, then replace what the targets name.
#
# > **Predict.** Swap the two lines in this recipe: put the new layers in first, then freeze everything. The model runs.
# > Its output is right. What happens in training?


# %%
def inject(model, targets, r, alpha, freeze_first=True):
    """Adapt every linear layer whose last name is in `targets`."""
    rng = np.random.default_rng(0)
    if freeze_first:
        model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and name.rpartition(".")[2] in targets:
            model.set_submodule(name, MyLora(module, r, alpha, rng))
    if not freeze_first:
        model.requires_grad_(False)


for freeze_first in (False, True):
    model, tokenizer = ml.load("tiny")
    inject(model, ("q_proj", "v_proj"), r=8, alpha=16, freeze_first=freeze_first)
    counts = ml.count_parameters(model)
    print("freeze first:" if freeze_first else "freeze last: ", counts)
claim("r (m + n), summed over q and v of 4 blocks", counts.trainable, 8 * 4 * (128 + 128 + 64 + 128), 14_336)

# %% [markdown]
# Frozen last, nothing learns at all, and no error says so unless somebody counts. So **count first**: r (m + n) for
# every adapted matrix, to the last number. The second quiet mistake is a misspelled target. Our function would ignore
# `"v_porj"` as long as `"q_proj"` is found; half an adapter is trained, and again nothing crashes.
# [`find_targets`](../minilora/lora/config.py) refuses it:

# %%
fresh, _ = ml.load("tiny")
try:
    ml.add_adapter(fresh, ml.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_porj"]))
except ValueError as error:
    print(error)

# %% [markdown]
# ## 2. The base stays what it is, to the last bit
#
# From here on minilora's [`add_adapter`](../minilora/lora/adapters.py) does the same for all 28 matrices. A fingerprint
# of the base is taken: the SHA-256 over the bytes of its weights. One changed bit would give another one.

# %%
records = ml.split_records(ml.read_records("legal"))
samples = {split: ml.encode_records(part, tokenizer) for split, part in records.items()}
old_text = ml.encode_text((TINY / "validation.txt").read_text(encoding="utf-8"), tokenizer, max_length=256)
input_ids = np.array([sample.ids[:64] for sample in samples["train"] if len(sample.ids) >= 64][:8])  # (8, 64)


def logits(model):
    """What the model says about eight texts."""
    with ml.no_grad():
        return model(input_ids).data


rows = {}  # what the model is -> its loss on law and on the old domain


def note(name):
    rows[name] = ml.mean_loss(model, samples["validation"]), ml.mean_loss(model, old_text)


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
# ## 3. Merged: two matrices become one
#
# $x W^\top + s\,(x A^\top) B^\top = x\,(W + s\,BA)^\top$. So the update can be added into the weight, once, and from
# then on the model is as fast as the base and can be saved as an ordinary model.
#
# > **Predict.** The formula is exact. Are the merged model's logits the same numbers, bit for bit?

# %%
on = logits(model)
ml.merge_adapter(model)
note("merged")
gap = np.abs(logits(model) - on).max() / np.abs(on).max()
claim("merged: largest difference, as a share of the largest logit", gap, 1e-8, 1e-5)
ml.unmerge_adapter(model)

# %% [markdown]
# Not bit for bit: float32 has 24 bits for a number, and now the sums are rounded in another order. The difference is
# rounding and nothing else. The three mistakes with merging are larger, and each has been shipped by somebody:
#
# - $AB$ for $BA$: the shapes stop that, unless m = n. Here q_proj is square.
# - The scale forgotten.
# - Merged twice, because a flag said "not merged yet".
#
# > **Predict.** Which of the three does most harm? And can a model that is merged twice still answer?

# %%
module_of = dict(model.named_modules())
adapted = [name for name, module in module_of.items() if hasattr(module, "adapters") and isinstance(module, Linear)]
deltas = {name: ml.delta_weight(model, name) for name in adapted}  # s B A, one matrix (m, n) each
originals = {name: module_of[name].weight.data for name in adapted}


def weights_become(change):
    """Set every adapted weight to change(its original, its update, its A, its B)."""
    for name in adapted:
        weights = module_of[name].adapters["legal"]
        A, B = weights.lora_A.data, weights.lora_B.data
        module_of[name].weight.data = change(originals[name], deltas[name], A, B)


ml.set_adapter(model, None)  # the adapter is off: only what is in the weights counts
weights_become(lambda w, delta, A, B: w + (2 * (B @ A).T if len(w) == w.shape[1] else delta))
note("A B for B A, where it fits")
weights_become(lambda w, delta, A, B: w + B @ A)
note("scale forgotten")
weights_become(lambda w, delta, A, B: w + delta + delta)
note("merged twice")
claim("merged twice: loss added on the old domain", rows["merged twice"][1] - rows["merged"][1], 0.5, 1.2)

# %% [markdown]
# ## 4. Out: why subtracting is not undoing
#
# > **Predict.** W + ΔW - ΔW is W. In float32, what share of the 786,432 numbers comes back as it was: all, nearly all,
# > half?

# %%
weights_become(lambda w, delta, A, B: (w + delta) - delta)
note("merged, then subtracted")
count = sum(int((module_of[name].weight.data != originals[name]).sum()) for name in adapted)
total = sum(w.size for w in originals.values())
print(f"{count:,} of {total:,} numbers are not what they were")
claim("numbers that did not come back, in percent", 100 * count / total, 3, 9)
claim("fingerprint unchanged after subtracting (0: no)", ml.sha256_of(ml.base_state(model)) == fingerprint, 0, 0)
weights_become(lambda w, delta, A, B: w)
note("put back")
claim("fingerprint unchanged after putting back (1: yes)", ml.sha256_of(ml.base_state(model)) == fingerprint, 1, 1)

# %% [markdown]
# Each of these numbers is off by a rounding, and no loss would show it. But a base that many adapters share must be the
# same base for all of them, today and after a thousand switches. So minilora keeps the base's own array while an update
# is merged, and puts it back ([`layer.py`](../minilora/lora/layer.py), `merge` and `unmerge`). It costs the memory of
# the adapted matrices for as long as the merge lasts.

# %%
figure, axes = plt.subplots(figsize=(9, 3.9), layout="constrained")
names = list(rows)
for column, (color, text) in enumerate([(VALIDATION, "law, terms never seen"), (GENERAL, "the old domain")]):
    values = [pair[column] for pair in rows.values()]
    axes.plot(values, range(len(names)), "o", color=color, markersize=7)
    axes.annotate(text, (values[0], -0.6), ha="left" if column else "center", color=ink(color), annotation_clip=False)
axes.set_yticks(range(len(names)), names)
axes.set(xlabel="loss (nats per token)", ylim=(len(names) - 0.5, -1.1))
axes.grid(axis="y", alpha=0.3)
axes.tick_params(axis="y", length=0)
show(
    figure,
    alt="Loss on law and on the old domain for nine states of the model; merged equals on, merged twice is worse",
)
for name, (law, old) in rows.items():
    print(f"{name:<27} law {law:.3f}   old domain {old:.3f}")

# %% [markdown]
# *How to read it.* One row per state of the model, further left is better. The states that must agree do: off, put
# back and the base; merged and on. What is wrong is plausible all the same: every one of these models talks, and is
# another one than was trained. Here α / r is 2, so that the forgotten scale halves the
# update: less is learned, and less forgotten.
#
# All of this can be checked in one call, on any adapter you will ever train:

# %%
ml.set_adapter(model, "legal")
report = ml.audit(model, "legal")
print(len(report.checks), "promises kept:", ", ".join(check for check, found in report.checks))

# %% [markdown]
# ## What to remember
#
# - Injecting is replacing modules. The new one holds the base's own weight, frozen; freeze first, inject then, count.
# - Name the targets, and let a name that matches nothing be an error.
# - Merging is W + (α/r) B A, right up to rounding. Do it once; B A, not A B; with the scale.
# - To undo a merge, put the old array back. Subtracting leaves thousands of numbers a little wrong.
# - A frozen base is a promise that a hash can hold you to.
#
# **Now you:** [exercises 9](exercises/09_inject.ipynb): write merging and injecting yourself. At the end your own
# layer, from lesson 8, trains the tiny base.
#
# ## Sources
#
# - A float32 number has 24 significant bits: [IEEE 754](https://doi.org/10.1109/IEEESTD.2019.8766229).
