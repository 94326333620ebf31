# %% [markdown]
# # Lesson 11: what LoRA saves, and what it does not
#
# A popular guide to LoRA sums it up in a table:
#
# | what hurts | what LoRA does about it |
# |---|---|
# | huge GPU memory | only small matrices are trained |
# | slow training | faster fine-tuning |
# | storage: large | small |
#
# Each line is a claim about a *number*, and none of them gives the number. In this lesson you count and measure all
# three, first with a formula, then on a model that really trains. At the end each claim gets a verdict: true, half
# true, or "it depends", and you will know on what.
#
# **You need** lesson 8: LoRA leaves a matrix W of shape (m, n) as it is and learns an update B A beside it, with A of
# shape (r, n) and B of shape (m, r). We call r the *rank* and n or m the *width*.
#
# The lesson takes less than a minute on two cores. Cells marked *measured* will show other numbers on your machine.

# %%
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.insight.bench import SMOLLM2
from minilora.insight.counts import lora_parameters
from minilora.insight.ledger import ledger, peak
from minilora.insight.memory import SHAPES, base_parameters, predict_memory
from minilora.insight.plots import BLUE, GREEN, GREY
from minilora.insight.savings import FULL, LORA, QV, curve, pairs_of_bars
from minilora.io.export import save_folder
from minilora.nn.quant import BLOCK, BYTES_PER_BLOCK

# %% [markdown]
# ## 1. Counting what learns
#
# **One matrix.** W has m·n numbers. A has r·n and B has m·r, so an adapter of this matrix has
#
# $$r\,n + m\,r = r\,(m + n)$$
#
# numbers. The product m·n has become a sum. That is the whole trick, and it has a consequence that people trip over: how
# much it saves depends on how *wide* the matrix is.

# %%
for width in (128, 576, 4096, 12288):
    whole, thin = width * width, lora_parameters([(width, width)], r=4)
    print(
        f"a {width:>6,} x {width:>6,} matrix: {whole:>11,} numbers, its adapter of rank 4 {thin:>7,}: 1/{whole / thin:,.0f}"
    )

# %% [markdown]
# For a square matrix the factor is C²/(2 r C) = C/(2r): *half the width, divided by the rank*. The recipe is the same in
# every row, and the saving differs by a factor of 96.

# %% [markdown]
# **A whole model, by program.** Nothing has to be believed here: add an adapter and count. `tiny` is the model that comes
# with minilora. We adapt the matrices `q_proj` and `v_proj` of every block, as the LoRA paper did, and compare the count
# with the formula.

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
# Two things to see. `add_adapter` has frozen the base: of 1,065,000-odd numbers, 14,336 learn. And v is *not* square:
# in this model two query heads share one key/value head, so `v_proj` has half as many rows. Formulas that assume square
# matrices ("4·r·C per layer") are wrong for most models made since 2023.

# %% [markdown]
# **Five models.** From 1 million to 175 billion parameters. For the first two we count arrays; the others do not fit into
# a laptop, but their shapes are public, and a shape is all that the formula needs.


# %%
def llama_shapes(config):
    """(outputs, inputs) of q_proj and v_proj, in every block."""
    q = (config.num_attention_heads * config.head_dim, config.hidden_size)
    v = (config.num_key_value_heads * config.head_dim, config.hidden_size)
    return [q, v] * config.num_hidden_layers


def gpt_parameters(width, layers, positions, vocab=50257):
    """A GPT-2 or GPT-3: 12 C² + 13 C in each block, two tables of width C, a last norm."""
    return layers * (12 * width**2 + 13 * width) + (vocab + positions + 2) * width


llama_2 = ml.Config(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
)  # fmt: skip
smollm2 = ml.Llama(SMOLLM2)  # the real model's shape; its weights stay zero, we only count them

models = {  # name: (width, parameters, shapes of q and v)
    "tiny": (128, base_parameters(config), llama_shapes(config)),
    "SmolLM2-135M": (576, ml.count_parameters(smollm2).total, llama_shapes(SMOLLM2)),
    "GPT-2 medium": (1024, gpt_parameters(1024, 24, 1024), [(1024, 1024)] * 2 * 24),
    "Llama-2-7B": (4096, base_parameters(llama_2), llama_shapes(llama_2)),
    "GPT-3": (12288, 175_255_800_000, [(12288, 12288)] * 2 * 96),  # the paper's count
}
print(
    f"{'q + v adapted':<14}{'width':>7}{'parameters':>18}{'learn, r = 4':>14}{'learn, r = 8':>14}{'fewer by, r = 4':>17}"
)
for name, (width, total, shapes) in models.items():
    four, eight = lora_parameters(shapes, r=4), lora_parameters(shapes, r=8)
    print(f"{name:<14}{width:>7,}{total:>18,}{four:>14,}{eight:>14,}{total / four:>16,.0f}x")

# %% [markdown]
# The program agrees with the formula for SmolLM2 as well, and for the recipe that this package uses by default, adapters
# on all seven matrices of a block (`"all-linear"`):

# %%
ml.add_adapter(smollm2, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), name="demo", seed=0)
print(ml.count_parameters(smollm2))
for kind, (learn, _) in ml.count_parameters(smollm2).by_module.items():
    if learn:
        print(f"  {kind:<10} {learn:>9,}")

# %% [markdown]
# ## 2. The paper's numbers
#
# The LoRA paper ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)) prints how many parameters its adapters have. We can
# now check them. A printed figure *comes out* if it is what the formula gives, rounded.

# %%
printed = [  # model, targets and rank, the printed figure, half a unit of its last digit, shapes, rank
    ("RoBERTa base, q + v, r = 8", 0.3e6, 0.05e6, [(768, 768)] * 2 * 12, 8),
    ("GPT-2 medium, q + v, r = 4", 0.35e6, 0.005e6, [(1024, 1024)] * 2 * 24, 4),
    ("GPT-3, q + v, r = 1", 4.7e6, 0.05e6, [(12288, 12288)] * 2 * 96, 1),
    ("GPT-3, q + v, r = 8", 37.7e6, 0.05e6, [(12288, 12288)] * 2 * 96, 8),
]
for name, figure, half_unit, shapes, r in printed:
    count = lora_parameters(shapes, r)
    verdict = "comes out" if abs(count - figure) <= half_unit else "DOES NOT COME OUT"
    print(f"{name:<27} printed {figure / 1e6:>6.2f} M   formula {count:>10,}   {verdict}")

# %% [markdown]
# Three of four come out. The one that does not is GPT-2 medium: printed 0.35 M, by formula 393,216. We do not know why, and
# that is the point of counting for yourself: a figure that is quoted everywhere need not be a figure that is right.
#
# **And the famous 10,000?** The abstract says that LoRA reduces trainable parameters "by 10,000 times" for GPT-3. With the
# paper's own counts, 175,255.8 million and r = 4 on q and v:

# %%
gpt_3 = models["GPT-3"][1]
learn = lora_parameters([(12288, 12288)] * 2 * 96, r=4)
print(f"{gpt_3:,} / {learn:,} = {gpt_3 / learn:,.0f}")
print(f"stored in 2 bytes each: {2 * gpt_3 / 1e9:.1f} GB against {2 * learn / 1e6:.1f} MB")

# %% [markdown]
# 9,285, rounded up. (The paper divides 350 GB by 35 MB; the adapter really takes 37.7 MB.) That is honest rounding. The
# trap is another one: the 10,000 is a property of *GPT-3*, not of LoRA. A block of a GPT has 12 C² numbers, its q and v
# adapters have 4 r C, so
#
# $$\text{fewer by} \approx \frac{12\,C^2}{4\,r\,C} = \frac{3\,C}{r}$$
#
# *three times the width, divided by the rank*. With C = 12,288 and r = 4 that is 9,216, and the embedding makes it 9,285.
# The layers have cancelled: a deeper model saves nothing more, only a wider one does.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9), layout="constrained", width_ratios=(1, 1.1))
for i, (name, (_, total, shapes)) in enumerate(models.items()):
    few = lora_parameters(shapes, r=4)
    left.plot([few, total], [i, i], color=GREY, linewidth=1)
    left.plot(few, i, "o", color=LORA, markersize=8)
    left.plot(total, i, "s", color=FULL, markersize=8)
    left.text((few * total) ** 0.5, i + 0.13, f"{total / few:,.0f} x", ha="center", color="#555555")
left.text(lora_parameters(models["GPT-3"][2], r=4), 4.3, "adapter, r = 4", ha="center", color=LORA)
left.text(gpt_3, 4.3, "all parameters", ha="center", color=FULL)
left.set(
    xscale="log", xlabel="numbers that learn", yticks=range(5), yticklabels=models, ylim=(-0.4, 4.7), xlim=(3e3, 3e12)
)
left.spines[["top", "right", "left"]].set_visible(False)
left.tick_params(axis="y", length=0)

widths = np.array([64, 16384])
for r, style in ((1, ":"), (4, "-"), (8, "--"), (64, "-.")):
    curve(right, widths, 3 * widths / r, f"r = {r}", BLUE, offset=(5, 0), linestyle=style, linewidth=1.3)
for name, (width, total, shapes) in models.items():
    ratio = total / lora_parameters(shapes, r=4)
    right.plot(width, ratio, "o", color="black", markersize=5)
    right.annotate(name, (width, ratio), (-6, 6), textcoords="offset points", ha="right", fontsize=9)
right.axhline(10_000, color=FULL, linewidth=1)
right.text(70, 11_500, "10,000 x", color=FULL)
right.set(
    xscale="log", yscale="log", xlabel="width C", ylabel="fewer by this factor", xlim=(60, 45_000), ylim=(2, 90_000)
)
plt.show()

# %% [markdown]
# **How to read it.** Left: both ends of each line grow to the right, but the distance between them, the saving, grows too:
# from 146 for the tiny model to 9,285 for GPT-3. Right: the lines are 3C/r; the dots are the five models at r = 4 and lie
# on its line or a little above, where large embeddings, which get no adapter, count in the whole. To reach 10,000 with
# r = 4, a model must be 13,333 wide. Even r = 1, the least there is, needs a width of 3,333. **No model on your laptop
# comes near 10,000, and that is no failure of yours.**

# %% [markdown]
# ## 3. From numbers to bytes: the factor of four
#
# Training with Adam keeps four arrays for every number that learns:
#
# 1. the **weight** itself,
# 2. its **gradient**,
# 3. and 4. Adam's two **moments**: running means of the gradient and of its square.
#
# In float32 each takes 4 bytes, 16 together. A number that is *frozen* needs only the first: it has no gradient and no
# moments. With P numbers in the base and a in the adapter:
#
# $$\text{full fine-tuning: } 16\,P \qquad\qquad \text{LoRA: } 4\,P + 16\,a$$
#
# Look at the second formula for a while. The adapter may be as small as you like, 4 P stays: **the frozen weights still have
# to be there**, since every token passes through them. So the best that freezing can do, for an adapter of nothing at all,
# is 16 P / 4 P = 4.

# %%
print(f"{'r = 8, q + v':<14}{'full':>12}{'LoRA':>12}{'fewer numbers learn':>22}{'less memory':>14}")
for name, (_, P, shapes) in models.items():
    a = lora_parameters(shapes, r=8)
    full, lora = 16 * P, 4 * P + 16 * a
    print(f"{name:<14}{full / 1e6:>9,.0f} MB{lora / 1e6:>9,.0f} MB{P / a:>21,.0f}x{full / lora:>13.2f}x")

P, a = ml.count_parameters(smollm2).frozen, ml.count_parameters(smollm2).trainable
full, lora = 16 * P, 4 * P + 16 * a
print(
    f"\nSmolLM2 with an adapter on all linear layers: {full / 1e6:,.0f} MB -> {lora / 1e6:,.0f} MB, {full / lora:.2f}x"
)

# %% [markdown]
# The last two columns are the heart of this lesson. 4,643 times fewer numbers learn in GPT-3, and the memory shrinks by
# **4.00**. SmolLM2 saves 292 times in one column and 3.95 times in the other. Whoever reads "10,000 times fewer
# parameters" and expects 10,000 times less memory has mixed them up.
#
# The paper does not hide it: it reports 1.2 TB of memory for full fine-tuning of GPT-3 and 350 GB with LoRA, which is a
# factor of 3.4. And 350 GB is 175 billion times 2 bytes: what is left is the frozen model itself, in 16 bits.

# %% [markdown]
# ## 4. Activations: what freezing does not save
#
# There is one more thing to hold, and it is the reason for most disappointed questions about LoRA's memory: the
# **activations**. Backward needs numbers that forward has computed, so the operations keep them until then. Take a linear
# layer, with g for the gradient that arrives at y:
#
# $$y = x W^\top \qquad dx = g\,W \qquad dW = g^\top x$$
#
# dW needs x. Freeze W, and nobody asks for dW any more: the engine drops it, and x with it. So far, so good. But LoRA adds
# a matrix that learns, and it learns *from the same x*:
#
# $$dA = \tfrac{\alpha}{r}\,(g\,B)^\top x$$
#
# **Freezing W lets go of x; training A takes it back.** And the operations without weights, the normalisation, attention
# and the activation function, keep what they need in any case, because dx has to pass through every layer on its way down
# to the first adapter.
#
# Let us look. `ledger` follows the graph of a loss and adds up every array that it holds, by owner.


# %%
class Job:
    """A random model, an optimizer and a batch. r: the adapter's rank; None is full fine-tuning."""

    def __init__(self, config, r=None, targets="all-linear", batch=4, length=128):
        self.model = ml.Llama(config, np.random.default_rng(0))
        if r is not None:
            ml.add_adapter(self.model, ml.LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets), name="a", seed=0)
        self.optimizer = ml.AdamW(self.model.trainable_parameters(), lr=1e-4)
        self.ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length))

    def step(self):
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
    job.model.divides = False  # see below
    kept[name] = ledger(job.model, job.optimizer, loss=job.model.loss(job.ids, job.ids))

print(f"{'activations in MB':<24}" + "".join(f"{name:>12}" for name in kept))
operations = {op for memory in kept.values() for op in memory.by_operation}
for op in sorted(operations, key=lambda op: -kept["full"].by_operation.get(op, 0)):
    print(f"{op:<24}" + "".join(f"{memory.by_operation.get(op, 0) / 1e6:>12.2f}" for memory in kept.values()))
print(f"{'all':<24}" + "".join(f"{memory.activations / 1e6:>12.2f}" for memory in kept.values()))

# %% [markdown]
# TEXT4
#
# (`divides = False` in the code: minilora usually cuts a batch into parts and takes each part forward *and* backward at
# once, so that the activations of one part exist at a time. We switch that off, to see those of a whole batch.)

# %% [markdown]
# ## 5. The whole bill, predicted and measured
#
# Every entry can be known before anything runs: weights, gradients and moments from the count of parameters, activations
# from shapes and the number of tokens. `predict_memory` does this sum. Beside it we put what a real step holds: `ledger`
# for each owner, and `peak`, which watches every array that NumPy asks for and remembers the most that was held.


# %%
def predicted(config, r=None, targets=tuple(SHAPES), batch=4, length=128, **options):
    """The memory of a step on `batch` rows of random tokens, each token but the first of a row scored."""
    tokens, scored = batch * length, batch * (length - 1)
    return predict_memory(config, tokens, scored, rank=r, targets=targets, rows=batch, **options)


def measured_peak(job):
    """What the job holds between two steps, and the most that a step adds to it."""
    job.model.divides = False
    job.optimizer.zero_grad()
    return ledger(job.model, job.optimizer).total + peak(job.step)


forecast, held = {}, {}
for name, r in (("full", None), ("all-linear", 8)):
    memory, job = predicted(small, r), jobs[name]
    learn = ml.count_parameters(job.model).trainable
    forecast[name] = [memory.weights + memory.adapter, memory.moments, 4 * learn, memory.activations, memory.total]
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
figure, axes = plt.subplots(figsize=(8.5, 4.4), layout="constrained")
pairs_of_bars(
    axes,
    {owner: (forecast["full"][i] / 1e6, forecast["all-linear"][i] / 1e6) for i, owner in enumerate(owners)},
    {owner: (held["full"][i] / 1e6, held["all-linear"][i] / 1e6) for i, owner in enumerate(owners)},
)
axes.set_xlabel("MB; bars and numbers: predicted, black strokes: measured")
axes.text(40, 0, "full fine-tuning", color=FULL, va="center", fontweight="bold")
axes.text(40, -0.36, "LoRA on all linear layers, r = 8", color=LORA, va="center", fontweight="bold")
plt.show()

for name in held:
    print(f"{name:<11} predicted {forecast[name][-1] / 1e6:6.2f} MB, measured {held[name][-1] / 1e6:6.2f} MB")

# %% [markdown]
# TEXT5

# %% [markdown]
# ## 6. Against width, rank and context length
#
# One bill says little. What happens when the model gets wider, the rank larger, the text longer? Lines are predicted,
# dots are measured.


# %%
def sweep(axes, label, values, settings, names=("full fine-tuning", "LoRA, r = 8")):
    """Draw memory against `values`; settings(value) gives a model's shape, the rank, and the length of a row."""
    for i, color in enumerate((FULL, LORA)):
        said, found = [], []
        for value in values:
            config, rank, length = settings(value)
            r = rank if i else None
            said.append(predicted(config, r, length=length, batch=2).total / 1e6)
            found.append(measured_peak(Job(config, r, length=length, batch=2)) / 1e6)
        curve(axes, values, said, names[i], color, measured=found, at=-2, offset=(-6, 8) if i == 0 else (6, -10))
    axes.set(xlabel=label, ylabel="MB", ylim=(0, None), xlim=(0, None))


def wide(width):
    """The small model at another width."""
    return replace(small, hidden_size=width, intermediate_size=3 * width, head_dim=width // 8)


figure, (a, b, c) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
sweep(a, "width C (256 tokens, r = 8)", (64, 128, 256, 384, 512), lambda width: (wide(width), 8, 128))
sweep(b, "rank r (C = 256, 256 tokens)", (1, 8, 32, 64, 128), lambda r: (small, r, 128), ("full fine-tuning", "LoRA"))
sweep(c, "tokens in each of 2 rows (C = 256)", (32, 128, 256, 512), lambda length: (small, 8, length))
plt.show()

# %% [markdown]
# TEXT6

# %% [markdown]
# ## 7. Where the saving shrinks, and two more levers
#
# Now the real model. We do not run it here; its shapes are enough for the prediction, and you have just seen how good that
# is. With SmolLM2 at hand, `minilora report --memory` prints the same prediction beside what this machine measures.
#
# How does the factor between full fine-tuning and LoRA depend on the number of tokens whose activations are held at the
# same time?

# %%
print(f"{'SmolLM2, r = 8':<16}{'full':>12}{'all-linear':>12}{'q + v':>12}{'factor':>14}{'factor':>12}")
for tokens in (64, 512, 2048, 8192):
    full = predicted(SMOLLM2, batch=1, length=tokens).total
    lora = predicted(SMOLLM2, 8, batch=1, length=tokens).total
    few = predicted(SMOLLM2, 8, q_and_v, batch=1, length=tokens).total
    print(f"{tokens:>5,} tokens   {full / 1e6:>9,.0f} MB{lora / 1e6:>9,.0f} MB{few / 1e6:>9,.0f} MB"
          f"{full / lora:>13.2f}x{full / few:>11.2f}x")  # fmt: skip

# %% [markdown]
# TEXT7a
#
# Two levers reach what freezing leaves:
#
# - **Recomputation** (`ml.load(..., recompute=True)`, [Chen et al. 2016](https://arxiv.org/abs/1604.06174)) keeps only each
#   block's input and computes the block a second time on the way back: LEVER1.
# - **Packed weights** (`ml.load("smollm2", quantized=True)`, the idea of
#   [QLoRA](https://arxiv.org/abs/2305.14314)) leave the frozen matrices in 4 and 8 bits, as their file holds them, and
#   unpack each one when a product needs it: 97 MB of weights in place of 538.
#
# Both cost time (`minilora bench` measures how much), and the second is possible only *because* the weights are frozen:
# nobody has to write a small change into four bits.

# %%
numbers_in = {"Q4_1": SMOLLM2.num_hidden_layers * sum(m * n for m, n in (shape(SMOLLM2) for shape in SHAPES.values())),
              "Q8_0": SMOLLM2.vocab_size * SMOLLM2.hidden_size}  # fmt: skip
norms = 4 * (base_parameters(SMOLLM2) - sum(numbers_in.values()))
packed = norms + sum(n // BLOCK * BYTES_PER_BLOCK[kind] for kind, n in numbers_in.items())
print(f"packed weights: {packed / 1e6:.1f} MB")

lengths = np.array([64, 128, 256, 512, 1024, 2048, 4096, 8192])
ways = {  # name: (color, line, rank, options)
    "full fine-tuning": (FULL, "-", None, {}),
    "LoRA": (LORA, "-", 8, {}),
    "LoRA, packed": (LORA, "--", 8, {"base_bytes": packed}),
    "LoRA, recomputed": (GREEN, "-", 8, {"recompute": True}),
    "LoRA, both": (GREEN, "--", 8, {"base_bytes": packed, "recompute": True}),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4), layout="constrained")
totals = {}
for name, (color, line, r, options) in ways.items():
    totals[name] = np.array([predicted(SMOLLM2, r, batch=1, length=int(n), **options).total for n in lengths]) / 1e6
    curve(left, lengths, totals[name], name, color, offset=(5, 0), linestyle=line)
    if r is not None:
        curve(right, lengths, totals["full fine-tuning"] / totals[name], name, color, offset=(5, 0), linestyle=line)
ticks = [64, 256, 1024, 8192]
for axes in (left, right):
    axes.set(xscale="log", yscale="log", xlabel="tokens held at the same time", xlim=(60, 60_000))
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
left.set_yticks([100, 300, 1000, 3000, 8000], ["100 MB", "300 MB", "1 GB", "3 GB", "8 GB"])
right.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
right.set_ylabel("full fine-tuning needs this many times as much")
plt.show()

# %% [markdown]
# TEXT7b

# %% [markdown]
# ## 8. Is it faster?
#
# First by counting. Nearly all the time of a step goes into matrix products, and full fine-tuning has three for each matrix
# W, all of the same size: x Wᵀ forward, g W for dx and gᵀ x for dW. LoRA has no dW. It has two large products and six thin
# ones (two forward, four backward), each of which costs r/C of a large one for a square matrix of width C:
#
# $$\frac{\text{LoRA}}{\text{full}} \approx \frac{2 + 6\,r/C}{3}$$
#
# Three readings of this formula. At best, for C much larger than r, it is 2/3: **LoRA cannot be more than 1.5 times faster**
# by saving products. With C = 6 r it is 1: nothing is gained. And for C below 6 r it is *slower* than full fine-tuning. So
# r = 8 pays from a width of about 48, r = 32 from about 192.
#
# That was arithmetic. A clock also sees what is not in the formula: Adam, which has to visit every number that learns (it
# speaks for LoRA), and the cost of starting many small operations, which hardly depends on how small they are (it speaks
# against). Now measure. All jobs of a width take turns, so that a busy moment of the machine hits them all.


# %%
def time_in_turns(jobs, rounds=7):
    """Median seconds of a step of each job; one step each to warm up."""
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
widths, ratio_8, ratio_32 = (32, 64, 128, 256, 512), [], []
print(f"{'width':>5}{'full':>12}{'LoRA r = 8':>14}{'LoRA r = 32':>14}")
for width in widths:
    shape = replace(small, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2, vocab_size=256,
                    num_attention_heads=width // 32, num_key_value_heads=max(1, width // 64), head_dim=32)  # fmt: skip
    contest = {
        "full": Job(shape, length=64),
        "r = 8": Job(shape, r=8, length=64),
        "r = 32": Job(shape, r=32, length=64),
    }
    seconds = time_in_turns(contest)
    ratio_8.append(seconds["r = 8"] / seconds["full"])
    ratio_32.append(seconds["r = 32"] / seconds["full"])
    print(
        f"{width:>5}{1e3 * seconds['full']:>9.1f} ms{1e3 * seconds['r = 8']:>11.1f} ms{1e3 * seconds['r = 32']:>11.1f} ms"
    )

figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
fine = np.geomspace(32, 512, 60)
for r, ratios, color in ((32, ratio_32, QV), (8, ratio_8, LORA)):
    curve(axes, fine, (2 + 6 * r / fine) / 3, "", color, linestyle="--", linewidth=1.3)
    curve(axes, widths, ratios, f"r = {r}", color, marker="o", at=0, offset=(8, 8))
axes.axhline(1, color=FULL, linewidth=1.5)
axes.text(512, 1.03, "full fine-tuning", color=FULL, ha="right")
axes.axhline(2 / 3, color=GREY, linewidth=1)
axes.text(32, 0.58, "2/3: two products instead of three", color="#555555")
axes.set(xscale="log", xlabel="width C", ylabel="step time, full fine-tuning = 1", ylim=(0, 2.5))
axes.set_xticks(widths, [str(width) for width in widths])
axes.minorticks_off()
plt.show()

# %% [markdown]
# **How to read it.** ...

# %% [markdown]
# ## 9. Bytes on disk
#
# The last claim is the simplest. A fine-tuned copy of a model is a whole model; an adapter is a file of the numbers that
# learned. Write both and look at the files.

# %%
with tempfile.TemporaryDirectory() as folder:
    whole = save_folder(Path(folder) / "whole", config, ml.load("tiny")[0].state_dict(), tokenizer)
    thin = ml.save_adapter(model, Path(folder) / "adapter", name="demo")
    real = ml.save_adapter(smollm2, Path(folder) / "smollm2", name="demo")
    files = {
        "tiny, a whole copy": whole / "model.safetensors",
        "tiny, adapter q + v r = 8": thin / "adapter_model.safetensors",
        "SmolLM2, adapter all-linear r = 8": real / "adapter_model.safetensors",
    }
    sizes = {name: path.stat().st_size for name, path in files.items()}
for name, size in sizes.items():
    print(f"{name:<36}{size:>12,} bytes")

learn = ml.count_parameters(smollm2).trainable
print(f"\n4 bytes for each of {learn:,} numbers: {4 * learn:,}; the rest names the tensors")
