# %% [markdown]
# # Lesson 20: What differs between models?
#
# Lesson 5 took one Llama apart. The models that people fine-tune today have other names: Qwen, Gemma, Granite. How
# different are they? Here are four of them side by side, from GPT-2 (2019) to Gemma 3 (2025): what changed, where the
# parameters are, and, measured on small models that you train yourself, what some of the changes achieve.

# %%
from collections import Counter
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, drawings, predict, show
from minilora.nn import gemma3, gpt2, layers
from minilora.pages.style import AMBER, BLUE, GREEN, GREY, PURPLE, ink

# %% [markdown]
# ## 1. What is in a block?

# %%
figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
drawings.four_blocks(axes)
show(figure, alt="Four columns of boxes, a block of GPT-2, Llama, Qwen3 and Gemma 3 each; shaded boxes are new")

# %% [markdown]
# *How to read it.* Each column is one model with one of its blocks, from the tokens below to the logits above. The line
# on the left is the residual connection. A shaded box is different from the column to its left.
#
# | | GPT-2 | Llama 3.2 | Qwen3 | Gemma 3 270M |
# |---|---|---|---|---|
# | a token's vector | its row of the embedding | the same | the same | the same, times √C |
# | positions | a learned vector each | RoPE | RoPE | RoPE, faster where a layer has a window |
# | norm | LayerNorm with bias | RMSNorm | RMSNorm, also of q and k | RMSNorm times 1 + w, more of them |
# | biases of the matrices | yes | no | no | no |
# | MLP | GELU | SwiGLU | SwiGLU | GeGLU |
# | key/value heads | as many as query heads | fewer | fewer | one |
# | a token sees | all earlier ones | all | all | all in every sixth layer, else 512 |
#
# LayerNorm subtracts the mean of a row and divides by its standard deviation; RMSNorm only divides, by the root mean
# square. SwiGLU is lesson 5's MLP; GeGLU has another function, GELU, on its gate. GPT-2's MLP has GELU between two
# matrices, without a gate. The skeleton is the same: attention and an MLP that add to the residual stream, and one
# table of embeddings, which also computes the logits. So LoRA works on all of them.
#
# ## 2. Where are the parameters?
#
# A model made with `empty` takes no memory, so even a large one can be counted.
#
# > **Predict.** Gemma 3 270M has a vocabulary of 262,144 tokens and a width of 640. What share of its parameters, in
# > percent, is in the embedding?

# %%
predict("Gemma 3 270M: percent of all parameters in the embedding")

# %%
models = {
    "GPT-2": gpt2.GPT2.empty(gpt2.GPT2Config(50257, 768, 12, 12)),
    "Llama 3.2 1B": ml.Llama.empty(ml.Config(128256, 2048, 8192, 16, 32, 8, head_dim=64)),
    "Qwen3 0.6B": ml.Llama.empty(ml.Config(151936, 1024, 3072, 28, 16, 8, head_dim=128, qk_norm=True)),
    "Gemma 3 270M": gemma3.Gemma3.empty(gemma3.Gemma3Config(262144, 640, 2048, 18, 4, 1)),
}
parts = {}
for name, model in models.items():
    parts[name] = Counter()
    for path, p in model.named_parameters():
        is_norm = "norm" in path or "ln_" in path
        part = "norms" if is_norm else "attention" if "attn" in path else "MLP" if "mlp" in path else "embedding"
        parts[name]["positions" if "wpe" in path else part] += p.size
    print(f"{name:<13}" + "".join(f"{part} {count:>13,}   " for part, count in sorted(parts[name].items())))
totals = {name: counts.total() for name, counts in parts.items()}
claim("GPT-2: parameters", totals["GPT-2"], 124_439_808, 124_439_808)
claim("Llama 3.2 1B: parameters", totals["Llama 3.2 1B"], 1_235_814_400, 1_235_814_400)
claim("Qwen3 0.6B: parameters", totals["Qwen3 0.6B"], 596_049_920, 596_049_920)
claim("Gemma 3 270M: parameters", totals["Gemma 3 270M"], 268_098_176, 268_098_176)
embedded = 100 * parts["Gemma 3 270M"]["embedding"] / totals["Gemma 3 270M"]
claim("Gemma 3 270M: percent of all parameters in the embedding", embedded, 62.5, 62.6)

# %%
figure, axes = plt.subplots(figsize=(9, 2.8), layout="constrained")
colors = {"embedding": GREY, "positions": AMBER, "attention": BLUE, "MLP": GREEN}
for row, name in enumerate(reversed(models)):
    start = 0.0
    for part, color in colors.items():
        share = 100 * parts[name][part] / totals[name]
        axes.barh(row, share, left=start, color=color, height=0.75, alpha=0.5)
        if share > 8:
            axes.text(start + share / 2, row, f"{part}\n{share:.0f} %", ha="center", va="center")
        start += share
axes.set_yticks(range(len(models)), list(reversed(models)))
axes.set(xlim=(0, 100), xlabel="percent of the parameters")
show(figure, alt="Bars of four models: the share of the embedding is largest in Gemma 3, nearly two thirds")

# %% [markdown]
# *How to read it.* Norms are too few to be seen; the narrow amber strip is GPT-2's positions. In a narrow model such
# as Gemma 3 270M, the embedding of a large vocabulary dominates. An adapter on "all-linear" leaves the embedding out:
# in Gemma 3 270M it adapts little more than a third of the parameters.
#
# ## 3. What must be stored for each token?
#
# While a model generates text, it stores keys and values of every token (lesson 4). Fewer key/value heads make this KV
# cache smaller.

# %%
for name, model in models.items():
    config = model.config
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    print(f"{name:<13} {values:>7,} values for each token, {2 * values:>7,} bytes in bfloat16")
config = models["Gemma 3 270M"].config
full = config.layer_types.count(gemma3.FULL)
claim("Gemma 3 270M: layers that must remember more than 512 tokens", full, 3, 3)

# %% [markdown]
# Qwen3 0.6B stores the most, although two query heads share a key/value head: it has the most layers, and its heads are
# twice as wide as Llama's. Most layers of Gemma 3 270M need to store no more than the tokens in their window.
#
# ## 4. What does a choice buy?
#
# Now we train five small models, and one as a control, from scratch, with the same budget, on a task that needs
# attention: copying. They are GPT-2, GPT-2 with RMSNorm, Llama, Qwen3, and Gemma 3 with a window of 16 letters in one
# of its two layers. A text repeats eight random letters again and again. The first eight cannot be known and are not
# scored; every later letter is the same as the one eight places before it. The training texts have 32 letters. Then we
# test the models on texts of 96 letters.
#
# > **Predict.** Which of them learn the task in the same number of steps? Which of them still copy beyond letter 32?

# %%
predict("GPT-2 beyond the trained length: loss in nats per letter")

# %%
V, C, L, H, PERIOD, TRAINED, TESTED = 16, 32, 2, 2, 8, 32, 96
config = ml.Config(V, C, 88, L, H, 1, max_position_embeddings=TESTED)
windows = gemma3.Gemma3Config(
    V, C, 88, L, H, 1, C // H, TESTED, sliding_window=16, layer_types=(gemma3.SLIDING, gemma3.FULL)
)


def new_gpt2(norm=layers.LayerNorm):
    """A small GPT-2, if asked with other norms."""
    model = gpt2.GPT2(gpt2.GPT2Config(V, C, L, H, max_position_embeddings=TESTED))
    for block in model.transformer.h:
        block.ln_1, block.ln_2 = norm(C), norm(C)
    model.transformer.ln_f = norm(C)
    return model


small = {
    "GPT-2": new_gpt2(),
    "GPT-2 with RMSNorm": new_gpt2(layers.RMSNorm),
    "Llama": ml.Llama(config),
    "Qwen3": ml.Llama(ml.Config(V, C, 88, L, H, 1, max_position_embeddings=TESTED, qk_norm=True)),
    "Gemma 3": gemma3.Gemma3(windows),
    "Gemma 3, wide": gemma3.Gemma3(replace(windows, sliding_window=TESTED)),
}


def texts(rng, rows, length):
    """Letters (rows, length) that repeat after PERIOD."""
    return np.tile(rng.integers(0, V, (rows, PERIOD)), (1, length // PERIOD))


def train(model, steps=150, lr=1e-2):
    """Train on texts of TRAINED letters; the first PERIOD of each are not scored."""
    rng, optimizer = np.random.default_rng(0), ml.AdamW(model.trainable_parameters(), lr=lr, weight_decay=0)
    for step in range(steps):
        optimizer.lr = lr * min(1, (step + 1) / 10)
        ids = texts(rng, 16, TRAINED)
        labels = np.where(np.arange(TRAINED) < PERIOD, -100, ids)
        optimizer.zero_grad()
        model.loss(ids, labels).backward()
        optimizer.step()


def loss_by_place(model):
    """The mean loss of each letter of long texts, from the second on (TESTED - 1)."""
    ids = texts(np.random.default_rng(1), 32, TESTED)
    with ml.no_grad():
        logits = model(ids).data[:, :-1].astype(np.float64)  # (B, T, V)
    p = np.exp(logits)
    p /= p.sum(axis=-1, keepdims=True)
    return -np.log(np.take_along_axis(p, ids[:, 1:, None], axis=-1))[..., 0].mean(axis=0)


curves = {}
for name, model in small.items():
    train(model)
    curves[name] = loss_by_place(model)

# %%
figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
styles = {"GPT-2": (GREY, "-"), "GPT-2 with RMSNorm": (GREY, "--"), "Llama": (BLUE, "-"), "Qwen3": (PURPLE, "-."),
          "Gemma 3": (GREEN, "-"), "Gemma 3, wide": (GREEN, "--")}  # fmt: skip
for name, (color, dashes) in styles.items():
    axes.plot(np.arange(2, TESTED + 1), curves[name], dashes, color=color, label=name)
axes.axvline(TRAINED, color=ink("#000000"), linewidth=1, linestyle=":")
axes.set(xlabel="position in the text (trained up to the dotted line)", ylabel="loss (nats)", ylim=(0, None))
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
show(
    figure,
    alt="Loss by position: beyond the trained length GPT-2 jumps, Llama and Qwen3 rise, Gemma 3 stays at zero, "
    "and rises with a wide window",
)


def mean_loss(name, first, last):
    """The mean loss of letters number first to last."""
    return float(curves[name][first - 2 : last - 1].mean())


for name in small:
    inside, beyond = mean_loss(name, PERIOD + 9, TRAINED), mean_loss(name, TRAINED + 17, TESTED)
    print(f"{name:<19} letters 17 to 32: {inside:6.3f}    letters 49 to 96: {beyond:6.3f}")
    if name != "Llama":
        claim(f"{name}: loss of letters 17 to 32", inside, 0, 0.3)
claim("GPT-2 beyond the trained length: loss in nats per letter", mean_loss("GPT-2", 49, 96), 4, 10)
claim("GPT-2 with RMSNorm beyond it", mean_loss("GPT-2 with RMSNorm", 49, 96), 4, 10)
claim("Qwen3 beyond it", mean_loss("Qwen3", 49, 96), 0.8, 8)
claim("Gemma 3 beyond it", mean_loss("Gemma 3", 49, 96), 0, 0.3)
claim("Gemma 3 beyond it, with a window of 96", mean_loss("Gemma 3, wide", 49, 96), 0.4, 2)
claim("Qwen3's loss minus Llama's, letters 17 to 32", mean_loss("Qwen3", 17, 32) - mean_loss("Llama", 17, 32), -2, -0.2)
SEEDS = range(1, 3)  # in the browser: range(1, 2)
lower = []
for seed in SEEDS:
    for name, norms in (("Llama", False), ("Qwen3", True)):
        model = ml.Llama(replace(config, qk_norm=norms), seed=seed)
        train(model)
        curves[name] = loss_by_place(model)
    lower.append(mean_loss("Llama", 17, 32) - mean_loss("Qwen3", 17, 32))
print("Qwen3 below Llama, other seeds:", ", ".join(f"{nats:.2f}" for nats in lower))
claim("least of these", min(lower), 0.02, 1)

# %% [markdown]
# *How to read it.* A uniform guess costs $\ln 16 \approx 2.8$. A loss far above that means confident mistakes, as on
# the first eight letters.
#
# - **Positions.** GPT-2 has the lowest loss up to the dotted line, and fails at once beyond it: the vectors of later
#   positions were never trained. RoPE has an angle for every position, but scores at distances that never occurred in
#   training are as untrained as GPT-2's vectors: Llama and Qwen3 fail more slowly.
# - **Windows.** A layer that sees only the last few letters meets only distances that occurred in training, however
#   long the text is. Gemma 3 keeps copying. The control is the same model with a window as wide as the text ("wide"):
#   its loss rises to 1.1. So the window is a reason, and, besides the smaller cache, an argument for windows in most
#   layers. It is not the only reason, since without it the loss is still lower than that of Llama and Qwen3.
# - **Norms of q and k.** They are the only difference between Llama and Qwen3. With these norms the model has learned
#   to copy; without them, after the same number of steps, Llama has learned only a part of the task. With two other
#   seeds Qwen3 is ahead, too, but once by little. The norms bound the scores, which probably helps training at this
#   learning rate.
# - **LayerNorm or RMSNorm.** No difference can be seen: RMSNorm needs less computation, and the loss is the same
#   ([Zhang & Sennrich 2019](https://arxiv.org/abs/1910.07467)).
#
# This is one task, for which it is enough to look back eight letters, and all results but the comparison of Llama with
# Qwen3 are from one seed.
#
# ## 5. What differs for LoRA?
#
# The names of the layers differ. GPT-2 stores q, k and v as one matrix, `c_attn`, so one A and one B serve all three,
# and "q and v alone" cannot be chosen. "all-linear" finds every linear layer in all four families. A list of target
# modules must contain the names of the model at hand:

# %%
for name, model in small.items():
    names = ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=4), name="trial")
    print(f"{name:<19} {len(names):>2} layers: {', '.join(dict.fromkeys(n.rpartition('.')[2] for n in names))}")
claim("GPT-2: adapted layers of a block", len(ml.adapter_state(small["GPT-2"], "trial")) / (2 * L), 4, 4)

# %% [markdown]
# <details><summary>The same in PyTorch</summary>
#
# ```python
# import torch
# from transformers import GPT2Config, GPT2LMHeadModel
#
# sizes = dict(vocab_size=V, n_positions=TESTED, n_embd=C, n_layer=L, n_head=H)
# shape = GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
# theirs = GPT2LMHeadModel(shape)
# print(theirs.num_parameters())
# long = torch.randint(V, (1, TESTED))
# print(theirs(long, labels=long).loss.item())  # untrained: about ln V, a uniform guess
# ```
#
# </details>
#
# ## What to remember
#
# - Four families, one skeleton: what changed is the norms, the gate, the encoding of positions, and which tokens a
#   token sees.
# - In a narrow model the embedding of a large vocabulary can hold most of the parameters.
# - The KV cache depends on layers, key/value heads and head width.
# - A model works at the positions and distances that it was trained on. A layer with a sliding window never meets
#   other distances.
# - LoRA works in the same way on all of them. What differs is the names of the modules, and in GPT-2 that q, k and v
#   are one matrix.
#
# `ml.load` takes a folder or a GGUF file of each family. Read on in [`gpt2.py`](../minilora/nn/gpt2.py),
# [`gemma3.py`](../minilora/nn/gemma3.py) and the [table of families](../minilora/nn/families.py).
# **Now you:** [exercises 20](exercises/20_what_differs.ipynb).
#
# ## Sources
#
# - Shapes of the models, from their `config.json` ([GPT-2](https://huggingface.co/openai-community/gpt2),
#   [Llama 3.2 1B](https://huggingface.co/meta-llama/Llama-3.2-1B), [Qwen3 0.6B](https://huggingface.co/Qwen/Qwen3-0.6B),
#   [Gemma 3 270M](https://huggingface.co/google/gemma-3-270m)): vocabularies of 50257, 128256, 151936 and 262,144
#   tokens; Gemma's width of 640 and its windows of 512 tokens.
# - [GPT-2](https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf),
#   [Llama 3](https://arxiv.org/abs/2407.21783), [Qwen3](https://arxiv.org/abs/2505.09388),
#   [Gemma 3](https://arxiv.org/abs/2503.19786).
