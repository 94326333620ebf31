# %% [markdown]
# # Lesson 11: what LoRA saves, and what it does not
#
# A popular guide sums LoRA up like this:
#
# | what hurts | what LoRA does about it |
# |---|---|
# | huge GPU memory usage | only small matrices are trained |
# | slow training | faster fine-tuning |
# | storage: large | small |
#
# Each line is a claim about a *number*, and no line gives it. In this lesson you find all three: first with a formula,
# then by measuring a model that really trains. At the end each claim gets a verdict, true, half true or "it depends",
# and you will know on what.
#
# **You need** lesson 8: LoRA leaves a matrix W of shape (m, n) as it is and learns an update B A beside it, where A has
# the shape (r, n) and B the shape (m, r). We call r the *rank*, and n or m the *width*.
#
# The lesson takes less than a minute on two cores.

# %%
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

import minilora as ml
from minilora.cost.bench import SMOLLM2
from minilora.cost.counts import lora_parameters
from minilora.cost.ledger import ledger, peak
from minilora.cost.predict import SHAPES, Step, base_parameters, predict_memory
from minilora.files.quant import BLOCK, BYTES_PER_BLOCK
from minilora.io.folder import save_folder
from minilora.pictures.lessons import FULL, LORA, curve, pairs_of_bars
from minilora.pictures.style import BLUE, GREEN, GREY

plt.rcParams["figure.dpi"] = 80

# %% [markdown]
# ## 1. Counting what learns
#
# **One matrix.** W has m n numbers. A has r n and B has m r, so the adapter of this matrix has
#
# $$r\,n + m\,r = r\,(m + n)$$
#
# numbers. The product m n has become a sum. That is the whole trick, and it has a consequence that people trip over:
# how much it saves depends on how *wide* the matrix is.

# %%
for width in (128, 576, 4096, 12288):
    whole, thin = width * width, lora_parameters([(width, width)], r=4)
    print(f"{width:>6,} x {width:>6,}: {whole:>11,} numbers, adapter {thin:>6,}, {whole / thin:>5,.0f} times fewer")

# %% [markdown]
# For a square matrix of width C the factor is C²/(2 r C) = C/(2r): *half the width, divided by the rank*. The recipe is
# the same in every row, r = 4, and yet the last row saves 96 times more than the first.
#
# **A whole model, by program.** Do not believe the formula; add an adapter and count. `tiny` is the model that comes
# with minilora. Like the LoRA paper, we adapt `q_proj` and `v_proj` in every block.

# %%
model, tokenizer = ml.load("tiny")
print("before: ", ml.count_parameters(model))

q_and_v = ["q_proj", "v_proj"]
ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules=q_and_v), name="demo", seed=0)
print("adapted:", ml.count_parameters(model))

config = model.config
q = (config.num_attention_heads * config.head_dim, config.hidden_size)  # (outputs, inputs) = (128, 128)
v = (config.num_key_value_heads * config.head_dim, config.hidden_size)  # (64, 128)
print(f"formula: {lora_parameters([q, v] * config.num_hidden_layers, r=8):,}")

# %% [markdown]
# Two things to see. `add_adapter` has frozen the base: of 1,064,064 numbers, 14,336 learn. And v is *not* square: in
# this model two query heads share one key/value head, so `v_proj` has half as many rows. A formula that assumes square
# matrices, such as "4 r C in each layer", is wrong here and in every model that shares its key/value heads.
#
# **Five models**, from 1 million to 175 billion parameters. The first two we can build and count. The others do not fit
# into a laptop, but their shapes are public, and shapes are all that the formula needs.


# %%
def llama_shapes(config):
    """(outputs, inputs) of q_proj and v_proj, in every block."""
    q = (config.num_attention_heads * config.head_dim, config.hidden_size)
    v = (config.num_key_value_heads * config.head_dim, config.hidden_size)
    return [q, v] * config.num_hidden_layers


smollm2 = ml.Llama.empty(SMOLLM2)  # the real model's shape, with zeros in place of weights, since we only count them

llama_2 = ml.Config(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
)  # fmt: skip

C, layers, tokens, positions = 1024, 24, 50257, 1024
gpt_2_medium = layers * (12 * C**2 + 13 * C) + (tokens + positions + 2) * C  # blocks with biases, two tables, a norm

models = {  # name: (width, parameters, shapes of q and v)
    "tiny": (128, base_parameters(config), llama_shapes(config)),
    "SmolLM2-135M": (576, ml.count_parameters(smollm2).total, llama_shapes(SMOLLM2)),
    "GPT-2 medium": (1024, gpt_2_medium, [(1024, 1024)] * 2 * 24),
    "Llama-2-7B": (4096, base_parameters(llama_2), llama_shapes(llama_2)),
    "GPT-3": (12288, 175_255_800_000, [(12288, 12288)] * 2 * 96),  # as the paper counts it
}
print(f"{'q + v':<13}{'width':>7}{'parameters':>18}{'learn, r = 4':>15}{'learn, r = 8':>15}{'fewer, r = 4':>15}")
for name, (width, total, shapes) in models.items():
    four, eight = lora_parameters(shapes, r=4), lora_parameters(shapes, r=8)
    print(f"{name:<13}{width:>7,}{total:>18,}{four:>15,}{eight:>15,}{total / four:>14,.0f}x")

# %% [markdown]
# minilora's own default adapts more: all seven matrices of a block (`"all-linear"`). Counted on SmolLM2:

# %%
ml.add_adapter(smollm2, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), name="demo", seed=0)
print(ml.count_parameters(smollm2))
for kind, (learn, _) in ml.count_parameters(smollm2).by_module.items():
    if learn:
        print(f"  {kind:<10}{learn:>9,}")

# %% [markdown]
# ## 2. The paper's numbers
#
# The LoRA paper ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)) prints how many parameters its adapters have. Now
# we can check them. A printed figure *comes out* if it is the formula's, rounded.

# %%
printed = [  # what, the printed figure, half a unit of its last digit, shapes, rank
    ("RoBERTa base, q + v, r = 8", 0.3e6, 0.05e6, [(768, 768)] * 2 * 12, 8),
    ("GPT-2 medium, q + v, r = 4", 0.35e6, 0.005e6, [(1024, 1024)] * 2 * 24, 4),
    ("GPT-3, q + v, r = 1", 4.7e6, 0.05e6, [(12288, 12288)] * 2 * 96, 1),
    ("GPT-3, q + v, r = 8", 37.7e6, 0.05e6, [(12288, 12288)] * 2 * 96, 8),
]
for what, millions, half_unit, shapes, r in printed:
    count = lora_parameters(shapes, r)
    verdict = "comes out" if abs(count - millions) <= half_unit else "DOES NOT COME OUT"
    print(f"{what:<27} printed {millions / 1e6:>5.2f} M   formula {count:>10,}   {verdict}")

# %% [markdown]
# Three of four come out. GPT-2 medium does not: 0.35 million printed, 393,216 by formula. We do not know why. It is a
# good reason to count for yourself: a figure that is quoted everywhere need not be right.
#
# **And the famous 10,000?** The abstract says that LoRA reduces the trainable parameters of GPT-3 "by 10,000 times".
# With the paper's own count, 175,255.8 million, and r = 4 on q and v:

# %%
gpt_3 = models["GPT-3"][1]
learn = lora_parameters(models["GPT-3"][2], r=4)
print(f"{gpt_3:,} / {learn:,} = {gpt_3 / learn:,.0f}")
print(f"stored in 2 bytes each: {2 * gpt_3 / 1e9:.1f} GB against {2 * learn / 1e6:.1f} MB")

# %% [markdown]
# 9,285, rounded up. (The paper divides 350 GB by 35 MB; the adapter really takes 37.7 MB.) The rounding is harmless.
# The trap is another one: the 10,000 belongs to *GPT-3*, not to LoRA. A block of a GPT has 12 C² numbers in its
# matrices, and its adapters on q and v have 4 r C, so
#
# $$\text{times fewer} \approx \frac{12\,C^2}{4\,r\,C} = \frac{3\,C}{r}$$
#
# *Three times the width, divided by the rank.* With C = 12,288 and r = 4 that is 9,216; the embedding, which is never
# adapted, makes it 9,285. The number of layers has cancelled: a deeper model saves nothing more, only a wider one does.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.7), layout="constrained", width_ratios=(1, 1.1))
for i, (_, total, shapes) in enumerate(models.values()):
    few = lora_parameters(shapes, r=4)
    left.plot([few, total], [i, i], color=GREY, linewidth=1)
    left.plot(few, i, "o", color=LORA, markersize=8)
    left.plot(total, i, "s", color=FULL, markersize=8)
    left.text((few * total) ** 0.5, i + 0.13, f"{total / few:,.0f} x", ha="center", color="#555555")
left.text(learn, 4.42, "LoRA, r = 4", ha="center", color=LORA)
left.text(gpt_3, 4.42, "full fine-tuning", ha="center", color=FULL)
left.set(xscale="log", xlabel="numbers that learn", yticks=range(5), yticklabels=models)
left.set(xlim=(3e3, 5e12), ylim=(-0.4, 4.8))
left.spines[["top", "right", "left"]].set_visible(False)
left.tick_params(axis="y", length=0)

widths = np.array([64, 16384])
for r, style in ((1, ":"), (4, "-"), (8, "--"), (64, "-.")):
    curve(right, widths, 3 * widths / r, f"r = {r}", BLUE, offset=(5, 0), linestyle=style, linewidth=1.3)
for name, (width, total, shapes) in models.items():
    ratio = total / lora_parameters(shapes, r=4)
    right.plot(width, ratio, "o", color="black", markersize=5)
    place, side = ((7, -11), "left") if name == "GPT-2 medium" else ((-6, 6), "right")
    right.annotate(name, (width, ratio), place, textcoords="offset points", ha=side, fontsize=9)
right.axhline(10_000, color=FULL, linewidth=1)
right.text(70, 11_500, "10,000 x", color=FULL)
right.set(xscale="log", yscale="log", xlabel="width C", ylabel="times fewer numbers that learn")
right.set(xlim=(60, 45_000), ylim=(2, 90_000))
plt.show()

# %% [markdown]
# **How to read it.** Left: the distance between the two ends of a line is the saving, and it grows from 146 for the
# tiny model to 9,285 for GPT-3. Right: the lines are 3C/r. The dots are the five models at r = 4; they lie on its line,
# or above it where a large embedding counts in the whole. To reach 10,000 with r = 4, a model must be 13,333 wide. Even
# r = 1, the least there is, needs a width of 3,333. **No model that fits a laptop comes near 10,000, and that is no
# failure of yours.**

# %% [markdown]
# ## 3. From numbers to bytes: never more than four times
#
# Training with Adam keeps four arrays for every number that learns: the **weight** itself, its **gradient**, and Adam's
# two **moments**, which are running means of the gradient and of its square. In float32 each takes 4 bytes, together
# 16. A number that is *frozen* needs only the first. With P numbers in the base and a in the adapter:
#
# $$\text{full fine-tuning: } 16\,P \text{ bytes} \qquad\qquad \text{LoRA: } 4\,P + 16\,a \text{ bytes}$$
#
# Look at the second formula for a while. The adapter may be as small as you like, 4 P stays: **the frozen weights still
# have to be there**, since every token passes through them. With an adapter of nothing at all the factor is 16 P / 4 P
# = 4, and freezing cannot do better. (With plain SGD, which keeps no moments, it would be 8 P / 4 P = 2.)

# %%
print(f"{'q + v, r = 8':<14}{'full':>13}{'LoRA':>13}{'times fewer numbers learn':>28}{'times less memory':>20}")
for name, (_, P, shapes) in models.items():
    a = lora_parameters(shapes, r=8)
    full, lora = 16 * P, 4 * P + 16 * a
    print(f"{name:<14}{full / 1e6:>10,.0f} MB{lora / 1e6:>10,.0f} MB{P / a:>27,.0f}x{full / lora:>19.2f}x")

P, a = ml.count_parameters(smollm2).frozen, ml.count_parameters(smollm2).trainable
full, lora = 16 * P, 4 * P + 16 * a
print(
    f"\nSmolLM2, all-linear: {full / 1e6:,.0f} MB in full, {lora / 1e6:,.0f} MB with LoRA, {full / lora:.2f} times less"
)

# %% [markdown]
# The last two columns are the heart of this lesson. In GPT-3, 4,643 times fewer numbers learn, and memory shrinks by
# 4.00. SmolLM2 has 292 in one column and 3.95 in the other. Who reads "10,000 times fewer parameters" and expects
# 10,000 times less memory has mixed up the two.
#
# The paper does not hide it. For GPT-3 it reports 1.2 TB of memory for full fine-tuning and 350 GB with LoRA: 3.4 times
# less. And 350 GB is 175 billion times 2 bytes: what is left is the frozen model itself, in 16 bits.

# %% [markdown]
# ## 4. Activations: what freezing does not save
#
# There is one thing more to hold, and it is behind most complaints that "LoRA did not save memory": the
# **activations**. Going backward needs numbers that going forward has computed, so operations keep them. Take a linear
# layer, with g for the gradient that arrives at y:
#
# $$y = x W^\top \qquad dx = g\,W \qquad dW = g^\top x$$
#
# dW needs x. Freeze W, and nobody asks for dW any more: the engine drops it, and x with it. So far, so good. But LoRA
# adds a matrix that learns, and it learns *from the same x*:
#
# $$dA = \tfrac{\alpha}{r}\,(g\,B)^\top x$$
#
# **Freezing W lets go of x; training A takes it back.** And what is not linear, the norms, attention and the activation
# function, keeps what it needs in any case, because the gradient has to pass through it on its way to the first block.
#
# Let us look. A random model is enough, since bytes do not depend on what the numbers are. `ledger` follows the graph
# from a loss and adds up every array that it holds.


# %%
class Job:
    """A random model, an optimizer and a batch. r: the rank of its adapter; None is full fine-tuning."""

    def __init__(self, config, r=None, targets="all-linear", batch=4, length=128):
        self.model = ml.Llama(config, np.random.default_rng(0))
        if r is not None:
            lora = ml.LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets)
            ml.add_adapter(self.model, lora, name="demo", seed=0)
        self.optimizer = ml.AdamW(self.model.trainable_parameters(), lr=1e-4)
        self.ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length))

    def step(self):
        """Forward, backward, Adam."""
        self.optimizer.zero_grad()
        self.model.loss(self.ids, self.ids).backward()
        self.optimizer.step()


small = ml.Config(
    vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=4,
)  # fmt: skip
jobs = {"full": Job(small), "all-linear": Job(small, r=8), "q + v": Job(small, r=8, targets=q_and_v)}

kept = {}
for name, job in jobs.items():
    kept[name] = ledger(job.model, job.optimizer, loss=job.model.loss(job.ids, job.ids))

print(f"{'activations (MB)':<24}" + "".join(f"{name:>12}" for name in kept))
operations = sorted({op for memory in kept.values() for op in memory.by_operation})
for op in sorted(operations, key=lambda op: -kept["full"].by_operation.get(op, 0)):
    print(f"{op:<24}" + "".join(f"{memory.by_operation.get(op, 0) / 1e6:>12.2f}" for memory in kept.values()))
print(f"{'together':<24}" + "".join(f"{memory.activations / 1e6:>12.2f}" for memory in kept.values()))

# %% [markdown]
# Read the last row first. Full fine-tuning keeps 24.75 MB, LoRA on all linear layers 24.68 MB: **no saving**. With q
# and v alone it is 22.25 MB, a tenth less.
#
# Now the rows. The largest, `swiglu` and `attention`, are the same in all three columns: they have no weights to
# freeze. `linear` is the x that full fine-tuning keeps for dW. In the middle column it has become `lora_linear`: the
# same x, kept for dA, and in addition r numbers per token and matrix, x Aᵀ, kept for dB. (It is only 2 MB because the
# inputs of most matrices come from a norm or from `swiglu`, and are computed again from what those keep.) A little is
# gained at both ends of the model: nothing learns before the first adapter, so the first norm keeps nothing, and the
# loss need not keep what the head would learn from.
#
# All of it grows with the number of tokens: here 512 tokens, 48 KB for each.
#
# *What minilora's own training does:* `ml.loss_and_grad` cuts a batch into micro-batches and takes each one forward
# *and* backward before the next, so that the activations of all never exist together. Here we use `model.loss` and
# `.backward()`, to see them. Micro-batches help with many short texts; one long text cannot be cut.

# %% [markdown]
# ## 5. The whole bill, predicted and measured
#
# Every entry can be known before anything runs: weights, gradients and moments from the count of parameters,
# activations from shapes and the number of tokens. `predict_memory` does this sum. Beside it we put what a real step
# holds: `ledger` for each owner, and `peak`, which watches every array that NumPy asks for and remembers the most.


# %%
def predicted(config, r=None, targets=tuple(SHAPES), batch=4, length=128, **options):
    """The memory of a step on `batch` rows of tokens, in which all but the first of each row are scored."""
    tokens, scored = batch * length, batch * (length - 1)
    return predict_memory(Step(config, tokens, scored, rank=r, targets=targets, rows=batch, **options))


def measured_peak(job):
    """What the job holds between two steps, and the most that a step adds to it."""
    job.optimizer.zero_grad()
    with threadpool_limits(1):  # one thread computes: bytes do not depend on it, and nothing has to wait for a second
        return ledger(job.model, job.optimizer).total + peak(job.step)


# %% tags=["measured"]
forecast, held = {}, {}
for name, r in (("full", None), ("all-linear", 8)):
    memory, job = predicted(small, r), jobs[name]
    gradients = 4 * ml.count_parameters(job.model).trainable
    forecast[name] = [memory.weights + memory.adapter, memory.moments, gradients, memory.activations, memory.total]
    most = measured_peak(job)
    after = ledger(job.model, job.optimizer)
    held[name] = [after.weights + after.adapter, after.moments, after.gradients, kept[name].activations, most]

owners = [
    "weights",
    "Adam's moments",
    "gradients,\nafter backward",
    "activations,\nbefore backward",
    "most at any\nmoment",
]
bars, strokes = (
    {owner: (bill["full"][i] / 1e6, bill["all-linear"][i] / 1e6) for i, owner in enumerate(owners)}
    for bill in (forecast, held)
)
figure, axes = plt.subplots(figsize=(8, 4.1), layout="constrained")
pairs_of_bars(axes, bars, strokes)
axes.set_xlabel("MB; bars and numbers: predicted, black strokes: measured")
axes.text(40, 0, "full fine-tuning", color=FULL, va="center", fontweight="bold")
axes.text(40, -0.36, "LoRA on all linear layers, r = 8", color=LORA, va="center", fontweight="bold")
plt.show()

for name in held:
    print(f"{name:<11} at most {held[name][-1] / 1e6:.1f} MB measured, {forecast[name][-1] / 1e6:.1f} MB predicted")

# %% [markdown]
# **How to read it.** Two pairs of bars differ as promised, moments and gradients: with LoRA they nearly vanish. Two
# pairs do not differ: the weights are there either way, and so are the activations. That is why the last pair differs
# by a factor of 1.7 and not by 4, and far from the 24 times by which fewer numbers learn.
#
# The last pair is not the sum of the others. On the way back activations go while gradients come, so not all is held at
# once; on the other hand, it contains the *scratch* arrays that live only while an operation runs, such as the scores
# of all 2,048 words for a block of tokens. Where the strokes end the bars, the prediction is exact; for the most at any
# moment it is a good estimate.

# %% [markdown]
# ## 6. Against width, rank and context length
#
# One bill says little. What happens when the model gets wider, the rank larger, the text longer? Lines are predicted,
# dots are measured.


# %%
def sweep(axes, label, values, settings, unit):
    """Draw memory against `values`; settings(value) gives a model's shape, the rank, and the length of a row."""
    measured = []
    for i, (name, color) in enumerate((("full fine-tuning", FULL), ("LoRA", LORA))):
        said, found = [], []
        for value in values:
            config, rank, length = settings(value)
            r = rank if name == "LoRA" else None
            said.append(predicted(config, r, length=length, batch=2).total / 1e6)
            found.append(measured_peak(Job(config, r, length=length, batch=2)) / 1e6)
        curve(axes, values, said, name, color, measured=found, at=-2, offset=(8, -10) if i else (-6, 15))
        measured.append(found)
    axes.set(xlabel=label, ylabel="most that is held (MB)", ylim=(0, None), xlim=(0, None))
    for value, full, lora in zip(values, *measured, strict=True):
        print(f"{unit:<7}{value:>4}  {full:>6.1f} MB in full  {lora:>6.1f} MB with LoRA  {full / lora:.2f} times less")


def wide(width):
    """The small model at another width."""
    return replace(small, hidden_size=width, intermediate_size=3 * width, head_dim=width // 8)


# %% tags=["measured"]
figure, (a, b, c) = plt.subplots(1, 3, figsize=(10.5, 3.3), layout="constrained")
sweep(a, "width C  (256 tokens, r = 8)", (64, 128, 256, 384, 512), lambda C: (wide(C), 8, 128), "width")
sweep(b, "rank r  (C = 256, 256 tokens)", (1, 8, 32, 64, 128), lambda r: (small, r, 128), "rank")
sweep(c, "tokens in each of two rows  (C = 256, r = 8)", (32, 128, 256, 512), lambda T: (small, 8, T), "tokens")
plt.show()

# %% [markdown]
# **How to read it.** Left: weights grow with the square of the width, activations with the width, so the wider the
# model, the more is saved, and at width 64 it is little. Middle: the rank costs memory in a straight line, and at
# r = 128 the adapter is so large that LoRA holds as much as full fine-tuning. Right: more text lifts both by the same
# amount per token; the distance stays about the same, and the *factor* between them melts. Where the blue
# line of the middle picture runs above its dots, the prediction is cautious: it adds the gradients of the whole adapter
# to all activations, and the two never meet in full.

# %% [markdown]
# ## 7. Where the saving shrinks, and two more levers
#
# Now the real model. We do not run it here; its shapes are enough for the prediction, and you have seen how good that
# is. If you have the model, `minilora memory` prints prediction and measurement side by side.
#
# How does the factor depend on the number of tokens whose activations are held at the same time?

# %%
head = ("full", "all-linear", "times less", "q + v", "times less")
print(f"{'SmolLM2, r = 8':<16}" + "".join(f"{text:>13}" for text in head))
for tokens in (64, 512, 2048, 8192):
    full = predicted(SMOLLM2, batch=1, length=tokens).total
    lora = predicted(SMOLLM2, 8, batch=1, length=tokens).total
    few = predicted(SMOLLM2, 8, q_and_v, batch=1, length=tokens).total
    row = f"{full / 1e6:>10,.0f} MB{lora / 1e6:>10,.0f} MB{full / lora:>13.2f}{few / 1e6:>10,.0f} MB{full / few:>13.2f}"
    print(f"{tokens:>5,} tokens    {row}")

per_token = predicted(SMOLLM2, 8, batch=1, length=2048).activations / 2048
weights = 4 * base_parameters(SMOLLM2)
print(f"\nactivations: {per_token / 1e6:.2f} MB per token; {weights / per_token:.0f} tokens weigh as much as the model")

# %% [markdown]
# At 64 tokens the factor is close to the 3.73 of section 3. At 8,192 tokens, SmolLM2's whole context, it is 1.2: the
# activations, which nobody froze, are most of the bill. Who fine-tunes a *small* model on *long* texts will say that
# LoRA saves nothing, and be nearly right.
#
# A detail worth understanding: up to 512 tokens, full fine-tuning does not pay for activations at all. Its worst moment
# is the end of the way back, when all gradients are there and the activations are gone. LoRA has no large gradients to
# hide behind, and pays from the first token.
#
# Two levers reach what freezing leaves:
#
# - **Recomputation** (`ml.load(..., recompute=True)`, [Chen et al. 2016](https://arxiv.org/abs/1604.06174)): keep only
#   the input of each block, and compute the block a second time on the way back.
# - **Packed weights** (`ml.load("smollm2", quantized=True)`, the idea of [QLoRA](https://arxiv.org/abs/2305.14314)):
#   leave the frozen matrices in 4 and 8 bits, as their file holds them, and unpack each when a product needs it. This
#   is possible only *because* they are frozen: nobody has to write a small change into four bits.

# %%
numbers = {
    "Q4_1": SMOLLM2.num_hidden_layers * sum(m * n for m, n in (shape(SMOLLM2) for shape in SHAPES.values())),
    "Q8_0": SMOLLM2.vocab_size * SMOLLM2.hidden_size,  # the embedding
}
norms = 4 * (base_parameters(SMOLLM2) - sum(numbers.values()))
packed = norms + sum(n // BLOCK * BYTES_PER_BLOCK[kind] for kind, n in numbers.items())
print(f"weights: {packed / 1e6:.1f} MB packed in place of {4 * base_parameters(SMOLLM2) / 1e6:.1f} MB\n")

lengths = np.array([64, 128, 256, 512, 1024, 2048, 4096, 8192])
ways = {  # name: (color, line, rank, options, points by which its name is raised in the left and the right picture)
    "full fine-tuning": (FULL, "-", None, {}, 7, 0),
    "LoRA": (LORA, "-", 8, {}, 0, -7),
    "LoRA, packed": (LORA, "--", 8, {"base_bytes": packed}, -10, 6),
    "LoRA, recomputed": (GREEN, "-", 8, {"recompute": True}, 0, 0),
    "LoRA, both": (GREEN, "--", 8, {"recompute": True, "base_bytes": packed}, 0, 0),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.7), layout="constrained")
for name, (color, line, r, options, low, high) in ways.items():
    total = np.array([predicted(SMOLLM2, r, batch=1, length=int(n), **options).total for n in lengths]) / 1e6
    curve(left, lengths, total, name, color, offset=(5, low), linestyle=line)
    if r is None:
        full = total
    else:
        curve(right, lengths, full / total, name, color, offset=(5, high), linestyle=line)
    print(f"{name:<18}{total[lengths == 2048][0]:>7,.0f} MB at 2,048 tokens{total[-1]:>9,.0f} MB at 8,192 tokens")
for axes in (left, right):
    axes.set(xscale="log", yscale="log", xlabel="tokens held at the same time", xlim=(60, 60_000))
    axes.set_xticks([64, 256, 1024, 8192], ["64", "256", "1,024", "8,192"])
left.set_yticks([100, 300, 1000, 3000, 8000], ["100 MB", "300 MB", "1 GB", "3 GB", "8 GB"])
left.set_ylabel("most that is held")
right.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
right.set_ylabel("times less than full fine-tuning")
for axes in (left, right):
    axes.minorticks_off()
plt.show()

# %% [markdown]
# **How to read it.** Left, and both axes are logarithmic: plain LoRA (blue) approaches full fine-tuning as texts get
# long. Packing alone (dashed blue) lowers the left end, where weights dominate; recomputing alone (green) lowers the
# right end, where activations do. Right: only together do they keep the factor high over the whole range. It is
# *LoRA with both levers* that fits a large model into a small machine, not freezing alone.
#
# To be fair, full fine-tuning may recompute, too. It cannot pack: its weights have to change. Both levers cost time;
# `minilora bench` measures how much on your machine.

# %% [markdown]
# ## 8. Is it faster?
#
# First by counting. Most of a step's time goes into matrix products, and full fine-tuning has three of the same size
# for each W: x Wᵀ on the way forward, g W for dx, and gᵀ x for dW. LoRA does without dW. In return it has six thin
# products, two forward and four backward, each of which costs r/C of a large one if W is square and C wide:
#
# $$\frac{\text{LoRA}}{\text{full fine-tuning}} \approx \frac{2 + 6\,r/C}{3}$$
#
# Three readings. If C is much larger than r, this is 2/3: by leaving out products, **LoRA can be at most 1.5 times
# faster**. If C = 6 r, it is 1, and nothing is gained. Below that LoRA is *slower*. So r = 8 should pay from a width of
# about 48, and r = 32 from about 192.
#
# That was arithmetic. A clock also sees what is not in it: Adam, which visits every number that learns (this speaks for
# LoRA), and the fixed cost of starting many small operations (this speaks against it). So we measure. All jobs of a
# width take turns, so that a busy moment of the machine hits them all.


# %%
def counted(config, r=None):
    """Multiplications per token in the products with weights of a whole step; the head has no adapter."""
    blocks = [shape(config) for shape in SHAPES.values()] * config.num_hidden_layers
    large = sum(m * n for m, n in blocks) + config.vocab_size * config.hidden_size
    return 3 * large if r is None else 2 * large + 3 * lora_parameters(blocks, r)


def time_in_turns(jobs, rounds):
    """The median seconds of a step of each job; one step each to warm up."""
    for job in jobs.values():
        job.step()
    seconds = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job.step()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in seconds.items()}


# %% tags=["measured"]
widths, ranks = (32, 64, 128, 256, 512), (8, 32)
measured, by_count = {r: [] for r in ranks}, {r: [] for r in ranks}
print(f"{'width':>5}{'full':>12}{'LoRA r = 8':>14}{'LoRA r = 32':>14}")
for width in widths:
    shape = replace(
        wide(width), num_hidden_layers=2, vocab_size=256, head_dim=32,
        num_attention_heads=width // 32, num_key_value_heads=max(1, width // 64),
    )  # fmt: skip
    contest = {r: Job(shape, r, length=64) for r in (None, *ranks)}
    seconds = time_in_turns(contest, rounds=max(9, 2000 // width))
    for r in ranks:
        measured[r].append(seconds[r] / seconds[None])
        by_count[r].append(counted(shape, r) / counted(shape))
    print(f"{width:>5}{1e3 * seconds[None]:>9.1f} ms{1e3 * seconds[8]:>11.1f} ms{1e3 * seconds[32]:>11.1f} ms")

figure, axes = plt.subplots(figsize=(7.5, 3.7), layout="constrained")
for r, color, place in ((32, GREEN, (8, 9)), (8, LORA, (8, -22))):
    curve(axes, widths, by_count[r], f"r = {r}, counted", color, at=0, offset=place, linestyle="--", linewidth=1.3)
    curve(axes, widths, measured[r], f"r = {r}, measured", color, offset=(8, 9 if r == 32 else -4), marker="o")
axes.axhline(1, color=FULL, linewidth=1.5)
axes.text(1030, 1.03, "full fine-tuning", color=FULL, ha="right")
axes.axhline(2 / 3, color=GREY, linewidth=1)
axes.text(31, 0.57, "2/3: two products instead of three", color="#555555")
axes.set(xscale="log", xlabel="width C", ylabel="step time (full fine-tuning = 1)", xlim=(30, 1050), ylim=(0, 2))
axes.set_xticks(widths, [str(width) for width in widths])
axes.minorticks_off()
plt.show()

# %% [markdown]
# **How to read it.** Below the orange line LoRA is faster. Both measured lines fall with the width, as the count says,
# and r = 32 is slower than r = 8. At the left, LoRA gains nothing or loses. But it does not lose as much as the count
# says for r = 32: in so narrow a model, matrix products are only a part of a step. At the right LoRA needs about two
# thirds of the time; where it needs even less, that is Adam, which need not visit what is frozen.
#
# These are times, so yours will differ, most of all at the left, where a step is over in milliseconds. For comparison:
# for GPT-3 the paper reports 43.1 tokens per second with LoRA against 32.5, which is 1.33 times faster.
# `minilora bench` measures SmolLM2 on your machine.

# %% [markdown]
# ## 9. Bytes on disk
#
# The last claim is the simplest. A fine-tuned copy of a model is a whole model; an adapter is a file of the numbers
# that learned. We write both and look at the files.

# %%
with tempfile.TemporaryDirectory() as folder:
    whole = save_folder(Path(folder) / "whole", config, ml.load("tiny")[0].state_dict(), tokenizer)
    thin = ml.save_adapter(model, Path(folder) / "thin", name="demo")
    real = ml.save_adapter(smollm2, Path(folder) / "real", name="demo")
    files = {
        "tiny: a whole copy": whole / "model.safetensors",
        "tiny: adapter, q + v, r = 8": thin / "adapter_model.safetensors",
        "SmolLM2: adapter, all-linear, r = 8": real / "adapter_model.safetensors",
    }
    sizes = {name: path.stat().st_size for name, path in files.items()}
for name, size in sizes.items():
    print(f"{name:<36}{size:>12,} bytes")

copy = 4 * base_parameters(SMOLLM2)
adapter = sizes["SmolLM2: adapter, all-linear, r = 8"]
print(f"{'SmolLM2: a whole copy, computed':<36}{copy:>12,} bytes, {copy / adapter:.0f} adapters")
adapters = copy + 100 * adapter
print(f"\n100 versions of SmolLM2: {100 * copy / 1e9:.1f} GB as copies, {adapters / 1e9:.2f} GB as a base and adapters")

# %% [markdown]
# A file holds 4 bytes for each number that learned, and the names of the tensors: 2,442,240 numbers make 9,768,960
# bytes of SmolLM2's adapter, names the other 54,256. There is no catch in it, but a condition: **an adapter without its
# base is worth nothing**, so the base has to be there, once. And it is the *number of versions* that counts. Somebody
# with a single version, and with the base as the 98 MB file in which it is distributed, stores 98 + 10 MB. That is a
# fine thing to have, and no revolution.

# %% [markdown]
# ## 10. The verdicts
#
# **"Huge GPU memory: only small matrices are trained." Half true.** In SmolLM2, 1.8 % of the numbers learn (all-linear,
# r = 8). Memory shrinks 3.6 times with 64 tokens and 1.2 times with 8,192. Weights, gradients and moments together
# shrink at most 4 times, activations not at all. Recomputation and packed weights do the rest.
#
# **"Slow training: faster." It depends** on width and rank. By counting products, LoRA is at most 1.5 times as fast,
# and there is nothing to gain below C = 6 r. The paper measured 1.33 times.
#
# **"Storage: large / small." True,** for each version beyond the base, which must be kept once. SmolLM2: 55 times
# smaller (all-linear, r = 8) or 292 times (q + v, r = 8). GPT-3: 9,285 times (q + v, r = 4).
#
# ## What to remember
#
# 1. An adapter of an (m, n) matrix has r (m + n) numbers. A model whose q and v are adapted learns about 3C/r times
#    fewer: the saving is *width over rank*. 10,000 needs GPT-3's width.
# 2. Adam keeps four arrays per number that learns, and one per number that is frozen. Freezing therefore saves at most
#    a factor of 4, however few numbers learn.
# 3. Activations are not saved by freezing. They grow with the text, and at the end of a long context they are most of
#    the bill. Recomputation reaches them; packed weights reach the rest.
# 4. Two products instead of three: at most 1.5 times faster, less with a large rank or a narrow model.
# 5. Disk is where LoRA keeps its promise without an "if": versions cost what learned, and nothing more.
#
# **Now you:** [exercises 11](exercises/11_what_lora_saves.ipynb) ask you to count an adapter, to predict the memory of
# a training step within 1 %, and to find the largest rank that fits a budget.
#
# **In the source:** [`cost/counts.py`](../minilora/cost/counts.py) counts,
# [`cost/predict.py`](../minilora/cost/predict.py) predicts and [`cost/ledger.py`](../minilora/cost/ledger.py)
# measures; [`engine/fused.py`](../minilora/engine/fused.py) says of each operation what it keeps;
# [`engine/tensor.py`](../minilora/engine/tensor.py) drops what frozen inputs do not need;
# [`engine/recompute.py`](../minilora/engine/recompute.py) and [`files/quant.py`](../minilora/files/quant.py) are the
# two levers.
#
# **Papers:** LoRA ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)), Adam with weight decay
# ([Loshchilov & Hutter 2019](https://arxiv.org/abs/1711.05101)), recomputation
# ([Chen et al. 2016](https://arxiv.org/abs/1604.06174)), QLoRA
# ([Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)).
