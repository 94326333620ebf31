# %% [markdown]
# # Lesson 13: How much smaller is it?
#
# A popular guide summarises LoRA in four rows:
#
# | what hurts | what LoRA does about it |
# |---|---|
# | huge GPU memory usage | only small matrices are trained |
# | slow training | faster fine-tuning |
# | high cost | much cheaper experiments |
# | storage: large | storage: small |
#
# Each row is a claim about a *number*, but no row gives the number. Here you find the numbers for storage, for cost,
# and for the first half of memory: weights, gradients and optimizer state. Lesson 14 does the rest, where LoRA saves
# less.
#
# From lesson 9: W has the shape (m, n) and is frozen; A has (r, n) and B has (m, r), and they are trainable. r is the
# *rank*. We call n and m the *width*.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, predict, show
from minilora.pages.style import BLACK, GREY, LORA, ink

# %% [markdown]
# ## 1. One matrix
#
# W has m n parameters. A has r n and B has m r, together $r\,(m + n)$. The product m n has become a sum.
#
# > **Predict.** Take r = 4. A small model has matrices of 128 × 128, GPT-3 of 12,288 × 12,288. LoRA has 16 times fewer
# > trainable parameters in the small model. How many times fewer does it have in GPT-3: also 16, or more?

# %%
predict("GPT-3: times fewer trainable parameters")

# %%
times_fewer = {}
for width in (128, 576, 4096, 12288):
    whole, thin = width * width, 4 * (width + width)
    times_fewer[width] = whole / thin
    print(f"{width:>6,} x {width:>6,}: {whole:>11,} parameters; adapter {thin:>6,}, {whole / thin:>5,.0f} times fewer")
claim("GPT-3: times fewer trainable parameters", times_fewer[12288], 1536, 1536)

# %% [markdown]
# For a square matrix of width C the factor is C²/(2 r C) = C/(2 r): *half the width, divided by the rank*. The method
# is the same in every row. The saving comes from the width.
#
# ## 2. A whole model
#
# Do not trust the formula; add an adapter and count. Like the LoRA paper, we adapt `q_proj` and `v_proj` in every
# block: first in the tiny base that comes with minilora, then in the shape of a real model. `Llama.empty` builds this
# model without memory for its weights, because we only count them.

# %%
SMOLLM2 = ml.Config(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3,
)  # fmt: skip
q_and_v = ["q_proj", "v_proj"]

tiny, tokenizer = ml.load("tiny")
smollm2 = ml.Llama.empty(SMOLLM2)
for model in (tiny, smollm2):
    ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules=q_and_v), name="q and v")

for name, W in ml.base_state(tiny).items():
    if "layers.0" in name and ("q_proj" in name or "v_proj" in name):
        print(name, W.shape)
claim("tiny, q and v, r = 8: trainable", ml.count_parameters(tiny).trainable, 14_336, 14_336)
claim("the formula, in 4 blocks", 4 * (8 * (128 + 128) + 8 * (64 + 128)), 14_336, 14_336)
claim("SmolLM2-135M, frozen", ml.count_parameters(smollm2).frozen, 134_515_008, 134_515_008)
claim("SmolLM2-135M, q and v, r = 8: trainable", ml.count_parameters(smollm2).trainable, 460_800, 460_800)

# %% [markdown]
# `v_proj` is *not* square: two or more query heads share one key/value head, so it has fewer rows. A formula for
# square matrices, such as "4 r C in each block", is wrong here and in most current models.
#
# minilora's default adapts all seven matrices of a block, `"all-linear"`:

# %%
ml.remove_adapter(smollm2, "q and v")
ml.add_adapter(smollm2, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), name="all")
claim("SmolLM2-135M, all-linear, r = 8: trainable", ml.count_parameters(smollm2).trainable, 2_442_240, 2_442_240)
print(ml.count_parameters(smollm2))

# %% [markdown]
# ## 3. "10,000 times fewer"
#
# The abstract of the paper says that LoRA reduces the trainable parameters of GPT-3 "by 10,000 times". Can you get
# this factor at home? The matrices of a GPT block of width C have 12 C² parameters, and the adapters of its q and v
# have 4 r C:
#
# $$\text{times fewer} \approx \frac{12\,C^2}{4\,r\,C} = \frac{3\,C}{r}$$
#
# *Three times the width, divided by the rank.* The number of blocks has cancelled: depth does not change the factor.
# We have counted the first two models; for the others the published shapes are enough.
#
# > **Predict.** With which of r = 1, 4, 8 does Llama-2-7B, of width 4,096, reach 10,000?

# %%
C, blocks = 1024, 24
gpt_2 = blocks * (12 * C**2 + 13 * C) + (50257 + 1024 + 2) * C  # blocks with biases, two tables, the last norm
llama_2 = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096  # blocks, two tables, a norm
models = {  # name: (width, parameters, what one rank on q and v adds: the sum of all m + n)
    "tiny": (128, ml.count_parameters(tiny).frozen, 14_336 // 8),
    "SmolLM2-135M": (576, ml.count_parameters(smollm2).frozen, 460_800 // 8),
    "GPT-2 medium": (1024, gpt_2, 24 * 2 * (1024 + 1024)),
    "Llama-2-7B": (4096, llama_2, 32 * 2 * (4096 + 4096)),
    "GPT-3": (12288, 175_255_800_000, 96 * 2 * (12288 + 12288)),  # as the paper counts it
}
print(f"{'times fewer (q and v)':<22}{'width':>7}{'parameters':>18}{'r = 1':>9}{'r = 4':>9}{'r = 8':>9}")
for name, (width, total, one) in models.items():
    print(f"{name:<22}{width:>7,}{total:>18,}" + "".join(f"{total / (r * one):>9,.0f}" for r in (1, 4, 8)))

fewer = {(name, r): total / (r * one) for name, (_, total, one) in models.items() for r in (1, 4)}
claim("GPT-3, r = 4, the paper's case", round(fewer["GPT-3", 4]), 9285, 9285)
claim("Llama-2-7B, r = 1", round(fewer["Llama-2-7B", 1]), 12853, 12853)
farthest = max(abs(fewer[name, 4] / (3 * width / 4) - 1) for name, (width, _, _) in models.items() if width >= 1024)
claim("3 C / r against the count, from width 1,024 on: off by, in percent", 100 * farthest, 0, 20)

# %%
figure, axes = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
widths = np.array([128, 16384])
for r, at in ((1, "r = 1"), (4, "r = 4"), (64, "r = 64")):
    axes.plot(widths, 3 * widths / r, color=LORA, linestyle="--", linewidth=1.5)
    axes.annotate(at, (widths[1], 3 * widths[1] / r), (6, 0), textcoords="offset points", va="center", color=ink(LORA))
for name, (width, _, _) in models.items():
    axes.plot(width, fewer[name, 4], "o", color=LORA, markersize=8)
    place, side = ((10, -24 if width == 576 else -15), "left") if width > 128 else ((-9, -4), "right")
    axes.annotate(f"{name}: {fewer[name, 4]:,.0f}", (width, fewer[name, 4]), place, textcoords="offset points", ha=side)
axes.plot(4096, fewer["Llama-2-7B", 1], "o", color=LORA, markerfacecolor="white", markersize=8)
axes.annotate(
    "Llama-2-7B, r = 1: 12,853", (4096, fewer["Llama-2-7B", 1]), (-9, 8), textcoords="offset points", ha="right"
)
axes.axhline(10_000, color=GREY, linewidth=1)
axes.text(25, 10_500, "10,000", color=BLACK, va="bottom")
axes.set(xscale="log", yscale="log", xlabel="width C", ylabel="times fewer trainable parameters")
axes.set(xlim=(24, 40_000), ylim=(2, 90_000))
axes.set_xticks([128, 1024, 4096, 12288], ["128", "1,024", "4,096", "12,288"])
axes.minorticks_off()
axes.spines[["top", "right"]].set_visible(False)
show(
    figure,
    alt="Times fewer against width: three rising dashed lines 3 C / r, for r = 1, 4 and 64. Five models with r = 4 are "
    "on the middle one or just above it; Llama-2-7B with r = 1 is above 10,000.",
)

# %% [markdown]
# *How to read it.* The dashed lines are 3 C/r. The dots are counted with r = 4, and the hollow dot with r = 1. Small
# models lie above the line, because their embeddings, which have no adapter, are a large part of all parameters.
#
# GPT-3's 9,285, rounded up, is the famous number. It belongs to a width and a rank, not to LoRA: with r = 8, SmolLM2
# has 292 times fewer. Nor do you need GPT-3 for a factor of 10,000: with r = 1, Llama-2-7B has 12,853 times fewer
# trainable parameters.
#
# **Does the formula give the paper's other counts?** Here is every count for LoRA in its tables 2, 3 and 4, with the
# ranks of its appendix:

# %%
printed = [  # model, millions as printed, their last digit, blocks, width, rank; each adapts q and v
    ("RoBERTa base", 0.3, 0.1, 12, 768, 8),
    ("RoBERTa large", 0.8, 0.1, 24, 1024, 8),
    ("DeBERTa XXL", 4.7, 0.1, 48, 1536, 8),
    ("GPT-2 medium", 0.35, 0.01, 24, 1024, 4),
    ("GPT-2 large", 0.77, 0.01, 36, 1280, 4),
    ("GPT-3", 4.7, 0.1, 96, 12288, 1),
    ("GPT-3", 37.7, 0.1, 96, 12288, 8),
]
right = 0
for name, millions, digit, blocks, width, r in printed:
    count = blocks * 2 * r * 2 * width
    matches = abs(count / 1e6 - millions) <= digit / 2
    right += matches
    print(f"{name:<14} r = {r:<3} printed {millions:>5} M, formula {count:>10,}  {'' if matches else 'NO'}")
claim("of 7 printed counts, the formula gives", right, 4, 4)
claim("DeBERTa XXL with r = 16, as in the authors' script", 48 * 2 * 16 * 2 * 1536, 4_718_592, 4_718_592)

# %% [markdown]
# With the rank of the paper's appendix, 8, DeBERTa's count is half of what its table prints. The authors' script has r
# = 16, which gives the printed count. So the rank in the appendix or the count must be a misprint.
#
# The two counts for GPT-2 do not match either. We do not know why; both are a thousandth of the size of their models,
# 354.92 and 774.03 million. A number that is quoted everywhere may still be wrong. Count for yourself.
#
# ## 4. Bytes: trainable parameters are expensive, and frozen ones are not free
#
# With Adam, each trainable parameter needs four arrays: the weight, its gradient, and the optimizer state, which has
# two *moments*: running means of the gradient and of its square. In float32 each takes 4 bytes. A frozen parameter
# needs only the first. With P parameters in the base and a in the adapter:
#
# $$\text{full fine-tuning: } 16\,P \text{ bytes} \qquad\qquad \text{LoRA: } 4\,P + 16\,a \text{ bytes}$$
#
# First we check this in a real step: we run one, and add up every array that model and optimizer own.


# %%
def owned(model):
    """Bytes of weights, gradients and optimizer state after a real step of training."""
    optimizer = ml.AdamW(model.trainable_parameters(), lr=1e-3)
    ids = np.arange(64).reshape(1, 64)
    model.loss(ids, ids).backward()
    optimizer.step()
    parameters = [p for _, p in model.named_parameters()]
    arrays = [p.data for p in parameters] + [p.grad for p in parameters if p.grad is not None]
    return sum(array.nbytes for array in arrays + list(optimizer.m) + list(optimizer.v))


P, a = ml.count_parameters(tiny).frozen, ml.count_parameters(tiny).trainable
claim("LoRA: held / (4 P + 16 a)", owned(tiny) / (4 * P + 16 * a), 0.99, 1.01)
ml.remove_adapter(tiny, "q and v")
tiny.requires_grad_(True)
claim("full: held / 16 P", owned(tiny) / (16 * P), 0.99, 1.01)

# %% [markdown]
# > **Predict.** With r = 8 on q and v, GPT-3 has 4,643 times fewer trainable parameters, and SmolLM2 all-linear 55
# > times. How many times less memory do weights, gradients and optimizer state take in each?

# %%
predict("SmolLM2, all-linear, r = 8: times less memory")

# %%
print(f"{'q and v, r = 8':<14}{'full':>14}{'LoRA':>14}{'fewer trainable':>22}{'less memory':>14}")
for name, (_, P, one) in models.items():
    full, lora = 16 * P, 4 * P + 16 * 8 * one
    print(f"{name:<14}{full / 1e6:>11,.0f} MB{lora / 1e6:>11,.0f} MB{P / (8 * one):>21,.0f}x{full / lora:>13.2f}x")
P, a = ml.count_parameters(smollm2).frozen, ml.count_parameters(smollm2).trainable
claim("SmolLM2, all-linear, r = 8: times less memory", 16 * P / (4 * P + 16 * a), 3.72, 3.74)

# %% [markdown]
# At most four times less, however small the adapter: **the frozen weights are still there**, because every token
# passes through them. If you read "10,000 times fewer parameters" and expect 10,000 times less memory, you confuse two
# columns.
#
# Is four a law? No: it follows from how Adam in float32 stores its state. The limit is (bytes per trainable parameter)
# / (bytes per frozen parameter):

# %%
limits = {  # bytes of: a trainable weight, its gradient, the optimizer state; a frozen weight
    "float32, plain SGD": (4, 4, 0, 4),
    "float32, SGD with momentum": (4, 4, 4, 4),
    "float32, Adam": (4, 4, 8, 4),
    "16 bits, Adam with float32 master weights": (2, 2, 12, 2),
    "float32, Adam; base in 4-bit blocks": (4, 4, 8, 20 / 32),
}
for name, (weight, gradient, state, frozen) in limits.items():
    print(f"{name:<43}{weight + gradient + state:>3} / {frozen:<5} = {(weight + gradient + state) / frozen:>4.1f}")

claim("GPT-3 in the paper, 1.2 TB and 350 GB: times less", 1200 / 350, 3.4, 3.5)

# %% [markdown]
# So what counts is how many bytes a frozen weight takes. A frozen weight never receives a small update, so it may be
# quantised, that is, stored in few bits. The last row is the idea of QLoRA, and of minilora's `ml.load("smollm2",
# quantized=True)`. The limits range from 2 to 26: "LoRA's saving" depends on the optimizer and on the number format.
# For GPT-3 the paper reports 1.2 TB and 350 GB, 3.4 times less. These 350 GB are 175 billion parameters of 2 bytes:
# the frozen model.
#
# ## 5. Disk
#
# A fully fine-tuned copy of a model is a whole model. An adapter is a file of the trained parameters.

# %%
with tempfile.TemporaryDirectory() as folder:
    ml.save_adapter(smollm2, folder, name="all")
    size = (Path(folder) / "adapter_model.safetensors").stat().st_size
copy = 4 * P
claim("adapter's file / 4 bytes per trained parameter", size / (4 * a), 1, 1.01)
claim("files of adapters in one copy of SmolLM2", copy / size, 54, 56)
print(f"tensors in the file: {len(ml.adapter_state(smollm2, 'all'))}")
print(f"100 tasks: {100 * copy / 1e9:.1f} GB as copies, {(copy + 100 * size) / 1e9:.2f} GB as base and adapters")

# %% [markdown]
# The file is half a percent larger than its parameters, because it contains the names of 420 tensors. There is a
# condition: an adapter is useless without its base, so the base must be stored once. If you keep a single adapter of
# SmolLM2, whose distributed file has 98 MB, you store 98 + 10 MB. That is not a great saving. With a hundred adapters,
# it is.
#
# ## 6. Money
#
# "Much cheaper" can refer to three different bills. The paper's figures for GPT-3 fill them in: it measured 32.5
# tokens per second per V100 for full fine-tuning, and 43.1 with LoRA.
#
# > **Predict.** By what share does the bill of a training run shrink: nine tenths, a half, a quarter?

# %%
predict("a training run: GPU hours saved, in percent")

# %%
claim("a training run: GPU hours saved, in percent", 100 * (1 - 32.5 / 43.1), 24, 25)
cards = {name: int(np.ceil(gigabytes / 32)) for name, gigabytes in (("full", 1200), ("LoRA", 350))}
few = cards["full"] / cards["LoRA"]
print(f"to be able to start: {cards['full']} cards of 32 GB in full, {cards['LoRA']} with LoRA, {few:.1f} times fewer")
print(f"to keep one more: {2 * 175:,} GB as a copy, {2 * 4 * models['GPT-3'][2] / 1e9:.4f} GB as an adapter of r = 4")

# %% [markdown]
# A training run costs a quarter less. The *smallest machine* that can run it has 11 cards instead of 38, and that
# decides who can do it at all. A stored adapter costs thousands of times less.
#
# **The verdicts so far.** *Storage: small*: true for each adapter, not counting the base: 55 times less for SmolLM2
# (all-linear), 9,285 times for GPT-3 (q and v, r = 4). *High cost: much cheaper*: true for the smallest machine and
# for storage; the GPU hours of a run fall by a quarter in the paper. *Huge memory*: half true; weights, gradients and
# optimizer state take at most four times less with Adam in float32. Activations and speed are the subject of [lesson
# 14](14_what_is_not_saved.ipynb).
#
# <details><summary>The same in PyTorch</summary>
#
# ```python
# import torch
# from peft import LoraConfig, get_peft_model
# from transformers import LlamaConfig, LlamaForCausalLM
#
# shape = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
#                     num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
# with torch.device("meta"):  # shapes without memory, like ml.Llama.empty
#     base = LlamaForCausalLM(shape)
# config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
# model = get_peft_model(base, config, low_cpu_mem_usage=True)
# trainable, total = model.get_nb_trainable_parameters()  # or print_trainable_parameters()
# ```
#
# </details>
#
# ## What to remember
#
# - The adapter of an (m, n) matrix has r (m + n) parameters.
# - With q and v adapted, there are about 3 C/r times fewer trainable parameters. The factor depends on width and rank;
#   depth cancels.
# - A factor in parameters is not a factor in bytes: the frozen weights stay. With Adam in float32 the limit is four
#   times less memory; it depends on the optimizer and the number format.
# - On disk an adapter costs its trained parameters, and nothing more.
#
# Read on in [`counts.py`](../minilora/measure/counts.py) (counting), [`predict.py`](../minilora/measure/predict.py)
# (bytes of a step), [`peft.py`](../minilora/lora/peft.py) (the file). **Now you:** [exercises
# 13](exercises/13_how_much_smaller.ipynb).
#
# ## Sources
#
# - GPT-3: 175,255.8 million parameters, 96 blocks of width 12,288, "10,000 times", the counts of tables 2 to 4, the
#   ranks of its appendix (8 for DeBERTa XXL), GPT-2's 354.92 and 774.03 million, 1.2 TB and 350 GB, 32.5 and 43.1
#   tokens per second on V100 cards: [Hu et al. 2021](https://arxiv.org/abs/2106.09685). The authors' script for
#   DeBERTa XXL has `--lora_r 16` ([repository](https://github.com/microsoft/LoRA/tree/main/examples/NLU)); with it the
#   formula gives 4,718,592, and with 8 it gives 2,359,296.
# - Shapes: Llama-2-7B ([Touvron et al. 2023](https://arxiv.org/abs/2307.09288)), GPT-2 medium with 50,257 tokens and
#   1,024 positions ([its model card](https://huggingface.co/openai-community/gpt2-medium)), SmolLM2 and its file of 98
#   MB ([model card](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)).
# - Master weights in float32 next to 16 bits: [Micikevicius et al. 2017](https://arxiv.org/abs/1710.03740). A frozen
#   base in 4 bits: [Dettmers et al. 2023](https://arxiv.org/abs/2305.14314); here llama.cpp's Q4_1, 20 bytes for 32
#   weights, as in [`quant.py`](../minilora/files/quant.py). V100 cards of 32 GB: [NVIDIA's
#   page](https://www.nvidia.com/en-us/data-center/v100/).
