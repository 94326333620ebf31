# %% [markdown]
# # Lesson 15: How few bits are enough?
#
# A frozen weight never receives a small update. So it need not be stored precisely, and the memory of frozen weights
# is what limits LoRA's saving (lesson 13). How coarsely may a weight be stored? How large is the effect of rounding:
# on the weights, the outputs, the loss? And can an adapter that is trained on the coarse base repair the error, as
# QLoRA's success suggests?

# %%
import numpy as np

import minilora as ml
from minilora.course import claim, predict, show
from minilora.course.drawings import line
from minilora.files.levels import LEVELS
from minilora.files.quant import dequantize, quantize
from minilora.measure.statistics import Interval
from minilora.pages.style import BASE, LORA, ink, panels

# %% [markdown]
# ## 1. A scale for each block
#
# With 4 bits, a weight is one of sixteen codes. The simplest code is INT4: the integers from -7 to 7, times a scale
# (one of the sixteen codes stays unused). The scale maps the largest magnitude to 7; this is *absmax* scaling.
# **Block-wise quantisation** gives each block of consecutive weights its own scale. We compute what is left of W after
# quantising and dequantising it. `levels` are the values that a code can have, from -1 to 1, and the scale of a block
# is stored in float16.


# %%
def half(scale):
    """What float16 keeps of the scales."""
    return scale.astype(np.float16).astype(np.float32)


def rounded(W, levels, block, store=half):
    """W with each value replaced by the nearest level, times the stored scale of its block."""
    blocks = W.reshape(-1, block)
    scale = store(np.abs(blocks).max(axis=1, keepdims=True))
    between = (levels[1:] + levels[:-1]) / 2
    return (levels[np.searchsorted(between, blocks / scale)] * scale).reshape(W.shape)


def uniform(bits):
    """Equal steps from -1 to 1, with a zero: 2**bits - 1 levels."""
    return np.linspace(-1, 1, 2**bits - 1, dtype=np.float32)


def error(W, approximation):
    """The squared error, as a share of the squared Frobenius norm of W."""
    return float(((W - approximation) ** 2).sum() / (W**2).sum())


# %% [markdown]
# > **Predict.** A matrix has 65,536 normal weights and a single scale. One weight becomes an outlier, 40 standard
# > deviations large. How much larger does the error of the *other* weights become: hardly larger, twice as large, or
# > so large that nothing is left of them? And with blocks of 64?

# %%
normal = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
outlier = normal.copy()
outlier[0, 0] = 40
print(f"{'block':>6}{'bits per parameter':>20}{'error':>10}{'with an outlier':>17}")
for block in (normal.size, 1024, 256, 64, 16):
    errors = []
    for W in (normal, outlier):
        wrong = (W - rounded(W, uniform(4), block)) ** 2
        wrong[0, 0] = 0  # the outlier itself is exact
        errors.append(wrong.mean())
    print(f"{block:>6,}{4 + 16 / block:>20.3f}{errors[0]:>10.4f}{errors[1]:>17.4f}")
    if block == normal.size:
        claim("one scale, with an outlier: share of the other weights' variance that is lost", errors[1], 0.9, 1)
    if block == 64:
        claim("blocks of 64, with an outlier: error over that without", errors[1] / errors[0], 1, 1.2)

# %% [markdown]
# With one scale, the outlier rounds nearly all other weights to zero. With blocks, the damage is confined to the block
# of the outlier. Even without outliers, the maximum of a small block is lower, so its steps are finer. But the float16
# scale adds 16 / block bits to each parameter. From blocks of 256 to blocks of 16, the error halves, at the price of
# almost one bit more per parameter. QLoRA has blocks of 64.
#
# ## 2. Where should sixteen levels lie?
#
# Most weights are near zero, and few are near the largest magnitude. Equal steps waste levels where there are few
# weights. **NF4** (4-bit NormalFloat, QLoRA) takes quantiles of the normal distribution as its levels, so they are
# dense where weights are frequent. FP4 is a floating-point number with one bit of fraction.
#
# > **Predict.** What is NF4's squared error as a share of INT4's, on normal weights? On those of a trained model?

# %%
predict("normal weights: NF4's error over INT4's")

# %%
print("NF4 ", *(f"{x:.2f}" for x in LEVELS["NF4"]))
print("INT4", *(f"{x:.2f}" for x in uniform(4)))

model, tokenizer = ml.load("tiny")
parameters = dict(model.named_parameters())
original = {name: p.data.copy() for name, p in parameters.items() if name.endswith("_proj.weight")}
every = np.concatenate([W.ravel() for W in original.values()])
found = {}
for name, levels in (("NF4", LEVELS["NF4"]), ("FP4", LEVELS["FP4"]), ("INT4", uniform(4)), ("5 bits", uniform(5))):
    found[name] = [error(W, rounded(W, levels, 64)) for W in (normal, every)]
    print(f"{name:<7} error on normal weights {found[name][0]:.5f}, on the tiny base {found[name][1]:.5f}")
claim("normal weights: NF4's error over INT4's", found["NF4"][0] / found["INT4"][0], 0.7, 0.76)
claim("the tiny base: NF4's error over INT4's", found["NF4"][1] / found["INT4"][1], 0.7, 0.76)
claim("the tiny base: one bit more, uniform, over NF4", found["5 bits"][1] / found["NF4"][1], 0.27, 0.33)
W = original["model.layers.0.mlp.up_proj.weight"]
package = dequantize(quantize(W, "NF4"), "NF4")
claim("minilora's NF4, by hand: differs by", np.abs(package - rounded(W, LEVELS["NF4"], 64, np.copy)).max(), 0, 1e-7)

# %% [markdown]
# NF4 removes a quarter of the error, and the tiny base's weights behave like normal ones. A fifth bit removes more than
# two thirds: no choice of levels replaces a bit.
#
# ## 3. Where does the error go?
#
# The weights have a squared error of 0.8 %. How large is the error of a layer's outputs $x W^\top$? If x and W had
# nothing to do with each other, it would be the same share. So we compare the real inputs of all 28 matrices with
# random ones.


# %%
def watched(base):
    """Record the input of every linear layer: a dictionary, which fills when the model runs."""
    seen = {}
    for name, layer in base.named_modules():
        if name.endswith("_proj"):

            def forward(x, name=name, forward=layer.forward):
                seen[f"{name}.weight"] = x.data.reshape(-1, x.shape[-1])
                return forward(x)

            layer.forward = forward
    return seen


def quantise(levels, block=64, shift=0):
    """Give the model the rounded matrices; None restores the original ones. shift: moves the borders of all blocks."""
    for name, W in original.items():
        moved = np.roll(W.ravel(), shift)
        parameters[name].data = W if levels is None else np.roll(rounded(moved, levels, block), -shift).reshape(W.shape)


records = {data: ml.split_records(ml.read_records(data)) for data in ("legal", "medical", "support", "finance")}
unseen = [record for splits in records.values() for record in splits["validation"] + splits["test"]]
samples = ml.encode_records(unseen[::2], tokenizer)
ids = np.array([sample.ids[:48] for sample in samples if len(sample.ids) >= 48])

other = ml.load("tiny")[0]
inputs = watched(other)
with ml.no_grad():
    other(ids)
    logits = model(ids).data
    quantise(LEVELS["NF4"])
    rough = model(ids).data

rng = np.random.default_rng(0)
shares = []
for name, W in original.items():
    x, change = inputs[name], parameters[name].data
    noise = rng.standard_normal(x.shape, np.float32)
    shares.append([error(W, change), error(noise @ W.T, noise @ change.T), error(x @ W.T, x @ change.T)])
in_weights, with_noise, in_outputs = np.mean(shares, axis=0)
fresh = ml.Llama(model.config, seed=0)
of_fresh = watched(fresh)
with ml.no_grad():
    fresh(ids)
untrained = [
    error(of_fresh[name] @ p.data.T, of_fresh[name] @ rounded(p.data, LEVELS["NF4"], 64).T)
    for name, p in fresh.named_parameters()
    if name in original
]
centred = [z - z.mean(axis=-1, keepdims=True) for z in (logits, rough)]
claim("error of the weights, in percent", 100 * in_weights, 0.8, 0.9)
claim("error of a layer's outputs, random inputs, in percent", 100 * with_noise, 0.8, 0.9)
claim("error of a layer's outputs, real inputs, in percent", 100 * in_outputs, 0.4, 0.55)
claim("the same of a model that was not trained, in percent", 100 * np.mean(untrained), 0.8, 0.9)
claim("error of the logits, in percent", 100 * error(*centred), 0.4, 1)
claim(
    "most probable next tokens that stay the same, in percent",
    100 * (logits.argmax(-1) == rough.argmax(-1)).mean(),
    85,
    95,
)

# %% [markdown]
# On random inputs the share is the same. On real ones it is about half: training has made W respond strongly to the
# inputs that occur; the rounding error, which does not depend on these inputs, does not. (The control: without
# training, the share on real inputs is that of the weights.) Through four blocks, the errors of all layers add up to
# about one percent of the logits. At a tenth of the positions, another token becomes the most probable next one.
#
# ## 4. How many bits before the loss breaks?
#
# The loss is what counts. A single measurement would mislead: if the borders of the blocks are at other positions, the
# errors and the loss are different. So each row is measured three times, with the borders moved.
#
# > **Predict.** The base has a loss of about 4.4, and 40 steps of LoRA lower it by about 0.6 on one domain. How much
# > does quantising to 8, 6, 5, 4, 3 and 2 bits add to the loss?

# %%
predict("4 bits: added to the loss")
predict("2 bits: added to the loss")

# %%
quantise(None)
base = ml.mean_loss(model, samples)


def added(levels, block=64):
    """What quantising adds to the loss, with three positions of the block borders."""
    losses = []
    for shift in (0, 7, 21):
        quantise(levels, block, shift)
        losses.append(ml.mean_loss(model, samples))
    quantise(None)
    return np.array(losses) - base


kinds = {f"{bits} bits": (bits + 1 / 4, uniform(bits), 64) for bits in (2, 3, 4, 5, 6, 8)}
kinds |= {f"NF4, blocks of {block}": (4 + 16 / block, LEVELS["NF4"], block) for block in (16, 32, 64, 128)}
print(
    f"loss of the base: {base:.3f}\n{'levels':<19}{'bits per parameter':>20}{'added to the loss':>19}{'from - to':>18}"
)
curve = {}
for name, (bits, levels, block) in kinds.items():
    curve[name] = bits, added(levels, block)
    low, *_, high = np.sort(curve[name][1])
    print(f"{name:<19}{bits:>20.3f}{curve[name][1].mean():>19.4f}{low:>10.4f} - {high:.4f}")
claim("8 bits: added to the loss", curve["8 bits"][1].mean(), -0.002, 0.002)
claim("5 bits: added to the loss", curve["5 bits"][1].mean(), 0, 0.01)
claim("4 bits: added to the loss", curve["4 bits"][1].mean(), 0.01, 0.035)
claim("NF4, blocks of 64: added to the loss", curve["NF4, blocks of 64"][1].mean(), 0.005, 0.025)
claim("3 bits: added to the loss", curve["3 bits"][1].mean(), 0.08, 0.18)
claim("2 bits: added to the loss", curve["2 bits"][1].mean(), 1.2, 2)

# %%
figure, axes = panels(height=4)
for start, name, color, style, place in (
    ("NF4", "NF4, blocks of 128 to 16", LORA, {"marker": "s", "linestyle": "--"}, (-10, -26)),
    ("", "equal steps, blocks of 64", BASE, {"marker": "o"}, (8, 8)),
):
    points = sorted(
        (bits, *np.sort(values)) for kind, (bits, values) in curve.items() if kind.startswith("NF4") == bool(start)
    )
    x, low, middle, high = np.array(points).T
    axes.vlines(x, np.maximum(low, 1e-4), high, color=ink(color))
    line(axes, x, middle, name, color, at=-1 if start else 1, place=place, **style)
axes.set(yscale="log", xlabel="bits per parameter, with the scales", ylabel="added to the loss (nats per token)")
axes.set(ylim=(1e-4, 4), xlim=(2, 9))
axes.set_yticks([0.001, 0.01, 0.1, 1], ["0.001", "0.01", "0.1", "1"])
axes.minorticks_off()
show(
    figure,
    alt="The added loss falls from 1.6 at 2 bits to 0.0004 at 8; NF4 lies at or below equal steps, near 4 bits.",
)

# %% [markdown]
# *How to read it.* The axis of the loss is logarithmic. A marker is the middle one of three measurements, and a bar
# reaches from the lowest to the highest.
#
# Each bit less multiplies the squared error by more than four, and from 4 bits down the loss grows faster still. There
# is a knee: 5 bits are nearly free, 4 cost one or two hundredths of a nat, 3 cost almost a quarter of what LoRA gains,
# and 2 break the model. (Two bits with equal steps are three levels, -1, 0 and 1: one code in four is unused.)
#
# This does *not* show that NF4 has a lower loss than INT4 at 4 bits, or blocks of 64 than blocks of 128. The error of
# the weights is smaller, but the differences in loss are only about as large as the bars. In exercise 15.2 you build NF
# levels for fewer bits, where the difference is clear. Other models have other weights: measure yours.
#
# ## 5. QLoRA's step
#
# QLoRA is LoRA on a frozen W that is stored in NF4. Each matmul dequantises its W, uses the result and discards it.
# With $\tilde W$ for the dequantised matrix:
#
# $$y = x\,\tilde W^\top + s\,(x A^\top) B^\top $$
#
# The layers below need a gradient, too, so g passes through $\tilde W$ in the backward pass, and W is dequantised a
# second time. x, A and B are floats (bfloat16 in the paper). W itself gets no gradient: rounding is a staircase, whose
# derivative is zero or undefined.
#
# > **Predict.** Is this gradient only an approximation, because W has been rounded?

# %%
small, _ = ml.load("tiny", quantized="nf4")
layer = dict(small.named_modules())["model.layers.0.self_attn.k_proj"]
print(layer.weight.data)
W = original["model.layers.0.self_attn.k_proj.weight"]
x, A, B = (rng.standard_normal(shape) for shape in [(3, 128), (2, 128), (64, 2)])


def qlora(x, A, B):
    return layer(x) + 2.0 * (x @ A.T) @ B.T


report = ml.gradcheck(qlora, x, A, B)
claim("largest relative error of dx, dA, dB, W in NF4", report.max_relative_error, 0, 1e-6)

before = ml.sha256_of(ml.base_state(small))
ml.add_adapter(small, ml.LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"), name="law", seed=0)
law = ml.encode_records(records["legal"]["train"], tokenizer)
ml.fit(small, law, steps=2, lr=1e-2, batch_size=4)
claim("after two steps: codes and scales are the same (1: yes)", ml.sha256_of(ml.base_state(small)) == before, 1, 1)
claim(
    "bytes of gradients of the base",
    sum(0 if p.grad is None else p.grad.nbytes for n, p in small.named_parameters() if "lora" not in n),
    0,
    0,
)

matrices, table, norms = every.size, 2048 * 128, 9 * 128
predicted = (matrices * (4 + 32 / 64) + table * (8 + 16 / 32) + norms * 32) / 8
held = sum(array.nbytes for array in ml.base_state(small).values())
claim("bytes of the base, held / predicted", held / predicted, 1, 1)
print(f"{held:,} bytes instead of {4 * (matrices + table + norms):,} in float32")

# %% [markdown]
# No: the gradient is exact for the function that is computed, which has $\tilde W$ in it. The loss is that of the
# quantised model, and training reduces this loss.
#
# minilora stores float32 scales in blocks of 64, so 32 / 64 = 0.5 bits per parameter for the scales; the table of
# embeddings has 8 bits. **Double quantisation** quantises the scales, too: QLoRA stores them in 8 bits, with one
# float32 scale for each block of 256 of them. minilora does not do this. What would it save, and what would it cost?


# %%
def in_8_bits(scale):
    """Scales in 8-bit integers, in blocks of 256. Scales are positive: their mean is subtracted first."""
    mean = scale.mean()
    return mean + rounded(scale - mean, uniform(8), 256, np.copy)


bits = 4 + 8 / 64 + 32 / (64 * 256)
twice, once = (error(every, rounded(every, LEVELS["NF4"], 64, store)) for store in (in_8_bits, np.copy))
claim("bits per parameter for the scales", bits - 4, 0.126, 0.128)
claim("squared error of NF4, grows by, in percent", 100 * (twice / once - 1), -0.1, 0.1)
for size, name in ((7e9, "7"), (65e9, "65")):
    sizes = ", ".join(f"{size * b / 8e9:.1f} GB at {b:.3f} bits" for b in (16, 4.5, bits))
    print(f"{name:>2} billion parameters: {sizes}")
claim("65 billion parameters: GB saved by double quantisation", 65e9 * (4.5 - bits) / 8e9, 3, 3.1)

# %% [markdown]
# The additional error of the scales is negligible compared with that of the codes. A base of 65 billion parameters
# then fits into a GPU with 48 GB, the QLoRA paper's headline. Activations do not shrink, and each step dequantises
# every matrix two times: 4 bits save memory, not time.
#
# ## 6. Does the adapter repair the error?
#
# QLoRA matched 16-bit fine-tuning. There are two explanations: the adapter repairs the rounding error, or there was
# little to repair. To tell them apart, we train adapters on three bases, and also use the adapters of the *float32*
# base on the quantised ones. These adapters have never seen the error.
#
# > **Predict.** Which of the two explanations holds at 4 bits? And at 2?

# %%
EVERY = 1  # in the browser: 2
unseen_law = ml.encode_records((records["legal"]["validation"] + records["legal"]["test"])[::EVERY], tokenizer)
bases = {"float32": None, "NF4": LEVELS["NF4"], "2 bits": uniform(2)}
untrained, trained, moved, back, again, flips = {}, *({name: [] for name in bases} for _ in range(5))


def loss_on(levels):
    """The loss on unseen records of law, with the base quantised like this."""
    quantise(levels)
    return ml.mean_loss(model, unseen_law)


for name, levels in bases.items():
    untrained[name] = loss_on(levels)
    for seed in range(3):
        ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"), name="law", seed=seed)
        ml.fit(model, law, steps=40, lr=1e-2, batch_size=4, seed=seed)
        trained[name].append(loss_on(levels))
        if levels is None:
            for other in bases:
                moved[other].append(loss_on(bases[other]))
        back[name].append(loss_on(None))
        quantise(levels)
        ml.merge_adapter(model)
        for key, whole in original.items() if levels is not None else ():
            parameters[key].data = rounded(parameters[key].data, levels, 64)
            flips[name].append(100 * (np.sign(parameters[key].data) != np.sign(rounded(whole, levels, 64))).mean())
        again[name].append(ml.mean_loss(model, unseen_law))
        ml.unmerge_adapter(model)
        ml.remove_adapter(model, "law")
        quantise(levels)


def difference(first, second):
    """The mean over seeds, with its 95 % confidence interval."""
    found = Interval.of(np.subtract(first, second))
    return found, f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


columns = {"trained on it": trained, "trained on float32": moved, "used on float32": back, "merged, rounded": again}
print(f"{'base':<8}{'before':>8}" + "".join(f"{column:>20}" for column in columns))
for name in bases:
    print(f"{name:<8}{untrained[name]:>8.3f}" + "".join(f"{np.mean(c[name]):>20.3f}" for c in columns.values()))
for name in ("NF4", "2 bits"):
    repaired, text = difference(moved[name], trained[name])
    print(f"\n{name}: the error adds {untrained[name] - untrained['float32']:.3f} before training")
    print(f"   repaired by training on it:              {text}")
    remains, text = difference(trained[name], trained["float32"])
    print(f"   remains after training:                  {text}")
    rounding, text = difference(again[name], trained[name])
    print(f"   added by rounding the merged matrices:   {text}")
    bands = [(-0.03, 0.03), (-0.01, 0.04), (0.003, 0.03)] if name == "NF4" else [(0.9, 1.6), (0.4, 0.75), (0.9, 1.5)]
    for what, interval, band in zip(
        ("repaired", "remains", "added"), (repaired, remains, rounding), bands, strict=True
    ):
        claim(f"{name}: {what}", interval.mean, *band)
    better, text = difference(trained[name], back[name])
    print(f"   lower if the adapter moves to float32:   {text}")
    claim(f"{name}: lower if the adapter moves to float32, lowest in the interval", better.low, 0, 0.1)
claim("2 bits: of the codes, the update changes, in percent", np.mean(flips["2 bits"]), 0.5, 3)

# %% [markdown]
# At 4 bits the second explanation holds. The error costs 0.015 nats, as much after training as before, and adapters
# that have never seen the error do as well: the interval of the difference contains zero. (Three seeds cannot exclude
# a repair of 0.02.) At 2 bits the first one holds: training on the quantised base repairs most of the error. But it
# does not repair all, and the result is no better than the untrained float32 base. All runs have the same learning
# rate; another might repair more. LoftQ goes further: it initialises A and B so that they undo a part of the error.
#
# **Merging is another matter.** The merged matrix $\tilde W + s\,BA$ is dense, in float32. If you quantise it again,
# its values are rounded again. At 4 bits you pay for the rounding error a second time. At 2 bits, nearly all that
# training has repaired is lost: the update moves about one weight in a hundred to another code. So keep the adapter
# next to a quantised base. Or merge it into the original base, on which it does slightly better here. Measure what you
# ship.
#
# <details><summary>The same in PyTorch</summary>
#
# ```python
# import torch
#
# # transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
# #     bnb_4bit_use_double_quant=True) quantises a model while it is loaded; by hand:
# levels = torch.tensor(LEVELS["NF4"])
# blocks = torch.tensor(W).view(-1, 64)
# absmax = blocks.abs().amax(1, keepdim=True)
# codes = torch.bucketize(blocks / absmax, (levels[1:] + levels[:-1]) / 2)
# x, A, B = (torch.tensor(array, requires_grad=True) for array in (x, A, B))
# W4 = (levels[codes] * absmax).view(W.shape).double()  # in each step, for both passes
# y = x @ W4.T + 2.0 * (x @ A.T) @ B.T
# y.sum().backward()
# ```
#
# </details>
#
# ## What to remember
#
# - Block-wise: a scale for each block confines outliers, and costs 16 / block or 32 / block bits per parameter.
# - NF4 has a quarter less squared error than INT4 on normal weights; one bit more removes over two thirds of it.
# - 5 bits are nearly free for this base, 4 cost little, 3 hurt, 2 break it.
# - QLoRA dequantises W for every matmul. Its gradients are exact for the quantised model, and W gets none.
# - At 4 bits we measured no repair by the adapter. At 2 bits it repaired much of the error, but not all.
# - Quantising a merged model costs the rounding error again.
#
# Read on in [`levels.py`](../minilora/files/levels.py) (NF4, FP4, INT4), [`quant.py`](../minilora/files/quant.py) (the
# blocks, and matrices that stay quantised) and [`rounded.py`](../minilora/models/rounded.py) (quantising a model while
# it is loaded). `minilora reproduce nf4-below-others training-on-4-bits` runs two claims of the paper. **Now you:**
# [exercises 15](exercises/15_how_few_bits.ipynb).
#
# ## Sources
#
# - QLoRA: NF4, blocks of 64, double quantisation (from 0.5 to 0.127 bits per parameter, about 3 GB for 65 billion
#   parameters), 65 billion parameters on a GPU of 48 GB, 16-bit performance preserved: [Dettmers et al.
#   2023](https://arxiv.org/abs/2305.14314). Its scales have 8-bit floats, ours 8-bit integers; its third part, *paged
#   optimizers*, moves optimizer state between a GPU's memory and the CPU's. LoftQ: [Li et al.
#   2023](https://arxiv.org/abs/2310.08659).
