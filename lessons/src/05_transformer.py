# %% [markdown]
# # Lesson 5: What is in a transformer?
#
# LoRA adapts a pretrained model. What does such a model consist of? We take it apart down to the last parameter: first
# as a program, then by counting, and finally by an **ablation**: we remove parts and measure the loss.
#
# These letters mean the same in all lessons.
#
# | letter | what it is | in our tiny model |
# |---|---|---|
# | T | number of tokens in a text (sequence length) | any |
# | V | vocabulary size: how many different tokens there are | 2,048 |
# | C | hidden size: the length of the vector of one token | 128 |
# | H, K, D | query heads, key and value heads, head dimension | 4, 2, 32 |
# | F | intermediate size: width inside an MLP | 384 |

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, drawings, predict, show
from minilora.engine import attention, fused
from minilora.models.load import TINY
from minilora.pages.style import BASE

# %% [markdown]
# ## 1. The whole model as a program
#
# The **forward pass** of a Llama turns T token IDs into T rows of V scores, the **logits**: row t says how likely each
# token is to follow token t.

# %%
figure, axes = plt.subplots(figsize=(9, 2), layout="constrained")
drawings.llama(axes, blocks=4)
show(figure, alt="Token IDs, embedding, a block with two branches, attention and MLP, then norm, embedding and logits.")

# %% [markdown]
# *How to read it.* From left to right: each token ID selects its row of a table, the **embedding**. Each block adds to
# these rows twice: what **attention** took from other tokens, and what an **MLP** (multilayer perceptron; here SwiGLU,
# with three matrices) computed from each token alone. These sums are the **residual connections**. Before each part a
# **norm** (RMSNorm) scales every row to the same length, and then multiplies each column by a trained parameter. The
# dot products of the final rows with all rows of the embedding are the logits.
#
# In attention, each token computes from its row a **query**, a **key** and a **value**, with the matrices q_proj,
# k_proj and v_proj. The dot product of its query with the key of an earlier token determines how much it takes of that
# token's value. Several **heads** do this at the same time, each on D columns. Several query heads may share one key
# and value head.
#
# Two functions are taken from minilora: `rope`, which rotates queries and keys by their position, and `attention`,
# which gives each token a weighted mean of rows of v: its own and those of earlier tokens. Lesson 4 builds both.

# %%
model, tokenizer = ml.load("tiny")
weights = ml.base_state(model)  # {"model.embed_tokens.weight": an array (2048, 128), ...}
config = model.config
H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
print(f"V {config.vocab_size:,}, C {config.hidden_size}, F {config.intermediate_size}, H {H}, K {K}, D {D}")


def norm(x, weight):
    """RMSNorm: each row divided by its root mean square, then each column times a trained parameter."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + config.rms_norm_eps) * weight


def silu(z):
    return z / (1 + np.exp(-z))


def llama(ids):
    """The forward pass: ids (T) -> logits (T, V)"""
    angles = np.arange(len(ids))[:, None] * config.rope_theta ** (-np.arange(0, D, 2) / D)  # (T, D/2)
    cos, sin = np.cos(angles)[:, None].astype(np.float32), np.sin(angles)[:, None].astype(np.float32)
    x = weights["model.embed_tokens.weight"][ids]  # (T, C)
    for layer in range(config.num_hidden_layers):
        start = f"model.layers.{layer}."
        w = {name.removeprefix(start): array for name, array in weights.items() if name.startswith(start)}
        h = norm(x, w["input_layernorm.weight"])
        q = (h @ w["self_attn.q_proj.weight"].T).reshape(1, -1, H, D)  # one batch of T tokens
        k = (h @ w["self_attn.k_proj.weight"].T).reshape(1, -1, K, D)
        v = (h @ w["self_attn.v_proj.weight"].T).reshape(1, -1, K, D)
        q, k = fused.rope(ml.Tensor(q), cos, sin), fused.rope(ml.Tensor(k), cos, sin)
        found = attention.attention(q, k, ml.Tensor(v)).data  # (1, T, H, D)
        x = x + found.reshape(-1, H * D) @ w["self_attn.o_proj.weight"].T
        h = norm(x, w["post_attention_layernorm.weight"])
        gate, up = h @ w["mlp.gate_proj.weight"].T, h @ w["mlp.up_proj.weight"].T  # (T, F) each
        x = x + (silu(gate) * up) @ w["mlp.down_proj.weight"].T
    return norm(x, weights["model.norm.weight"]) @ weights["model.embed_tokens.weight"].T


text = (TINY / "validation.txt").read_text(encoding="utf-8")  # presidents' addresses: the validation set
ids = np.array(tokenizer.encode(text)[:200])
with ml.no_grad():
    difference = np.abs(llama(ids) - model(ids[None]).data[0]).max()
claim("largest difference from minilora's model", difference, 0, 1e-3)
last = llama(ids[:20])[-1]
print(repr(tokenizer.decode(ids[:20].tolist())), "->", [tokenizer.decode([i]) for i in np.argsort(-last)[:3].tolist()])

# %% [markdown]
# The names of the weights are those of Hugging Face.
#
# ## 2. Where the parameters are
#
# Every matrix above is stored as (outputs, inputs), as in PyTorch. A matrix that maps C inputs to F outputs has F · C
# parameters. A Llama has no biases.
#
# > **Predict.** Where are most parameters of the tiny model: in the embedding, attention, the MLPs or the norms? And
# > in a model with thousands of times as many? We count three models: in the one where the MLPs' share is smallest,
# > how large is it?

# %%
predict("smallest share of the MLPs, in percent")

# %%
models = {
    "tiny": config,
    "SmolLM2-135M": ml.Config(49152, 576, 1536, 30, num_attention_heads=9, num_key_value_heads=3),
    "Llama-2-7B": ml.Config(32000, 4096, 11008, 32, 32, 32, tie_word_embeddings=False),
}


parts = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "MLP": ("gate_proj", "up_proj", "down_proj")}
part_of = {kind: part for part, kinds in parts.items() for kind in kinds}
part_of |= {"embed_tokens": "embedding", "lm_head": "embedding"}  # lm_head: the output's own table, if it has one


def by_part(counts):
    """Parameters of each part of a model, added up over its blocks."""
    found = dict.fromkeys(["embedding", "attention", "MLP", "norms"], 0)
    for kind, (_, number) in counts.by_module.items():  # "q_proj": (trainable, total), ...
        found[part_of.get(kind, "norms")] += number
    return found


counts = {name: ml.count_parameters(ml.Llama.empty(c)) for name, c in models.items()}  # empty: no memory is used
claim("parameters of tiny", counts["tiny"].total, 1_049_728, 1_049_728)
claim("parameters of SmolLM2-135M", counts["SmolLM2-135M"].total, 134_515_008, 134_515_008)
claim("parameters of Llama-2-7B", counts["Llama-2-7B"].total, 6_738_415_616, 6_738_415_616)
shares = {}
for name, count in counts.items():
    shares[name] = {part: 100 * number / count.total for part, number in by_part(count).items()}
    print(f"{name:<13}" + "".join(f"{part} {share:.2f} %   " for part, share in shares[name].items()))
claim("smallest share of the MLPs, in percent", min(share["MLP"] for share in shares.values()), 50, 65)

# %%
figure, panels = plt.subplots(1, 3, figsize=(9, 2.5), sharey=True, layout="constrained")
for axes, (name, count) in zip(panels, counts.items(), strict=True):
    axes.barh(list(shares[name]), shares[name].values(), color=BASE)
    for row, (share, number) in enumerate(zip(shares[name].values(), by_part(count).values(), strict=True)):
        axes.text(share + 1, row, f"{share:.2g} %" if share >= 1 else f"{number:,}", va="center")
    axes.set(title=f"{name}: {count.total:,}", xlim=(0, 90), xticks=(0, 25, 50, 75), xlabel="% of its parameters")
panels[0].invert_yaxis()
show(
    figure, alt="Three panels of bars: in each model the MLPs have most parameters, and the embedding's share shrinks."
)

# %% [markdown]
# *How to read it.* One panel per model, one bar per part, in percent of the model's parameters. The norms have too few
# parameters for a visible bar: their number is printed instead.
#
# The MLPs have more than half of the parameters in all three models. The embedding's share shrinks with size: its V ·
# C parameters grow with the hidden size, while the matrices of a block grow with its square. LoRA adapts the matrices
# of the blocks: the larger the model, the larger their share.
#
# One mistake is common. In the two smaller models the input embedding and the output embedding are **tied**: both are
# the same table. Counting it twice gives, for SmolLM2-135M:

# %%
twice = counts["SmolLM2-135M"].total + 49152 * 576
claim("with the tied embedding counted twice", twice, 162_826_560, 162_826_560)

# %% [markdown]
# ## 3. The loss before training
#
# The loss of a language model is the **cross-entropy**: the mean of $-\ln p$ over all tokens, where p is the
# probability that the model gave to the token that really came next. (e to the power of this loss is the
# **perplexity**.)
#
# > **Predict.** A new model has random matrices and has not been trained. You can predict its first loss without
# > running it. What is this loss, for V = 2,048?

# %%
samples = ml.encode_text(text, tokenizer, max_length=256)[:8]
for seed in range(3):
    fresh = ml.Llama(config, seed=seed)
    claim(f"first loss / ln V, seed {seed}", ml.mean_loss(fresh, samples) / np.log(2048), 0.95, 1.05)
print(f"ln V = {np.log(2048):.3f}, the fresh model {ml.mean_loss(fresh, samples):.3f}, the trained one ", end="")
print(f"{ml.mean_loss(model, samples):.3f}")

# %% [markdown]
# Guessing uniformly among V tokens gives each the probability 1 / V and costs $-\ln(1/V) = \ln V$. A fresh model comes
# within a few percent of it because its matrices are initialised with small values, so all logits are near zero. If
# your first loss is far above ln V, the initialisation is too large. If it is far below, the model can see the token
# that it should predict.
#
# ## 4. What each part does
#
# Attention and MLP each *add* to the row of a token. If we set the last matrix of one of these parts to zero, the part
# adds nothing, and everything else stays.
#
# > **Predict.** How large is the loss of the trained model without attention, without MLPs, without both? Can it be
# > higher than ln V = 7.62, the cost of uniform guessing?

# %%
predict("loss without attention")
predict("loss without MLPs")

# %%
whole = ml.base_state(ml.load("tiny")[0])  # of a second model, since parts of the first one are set to zero below
last_matrix = {"attention": "self_attn.o_proj", "MLP": "mlp.down_proj"}
every = range(config.num_hidden_layers)


def without(attention=(), MLP=()):
    """Loss without these parts of these blocks, and the share of positions where the token just read is predicted."""
    zeros = [f"layers.{i}.{last_matrix['attention']}" for i in attention]
    zeros += [f"layers.{i}.{last_matrix['MLP']}" for i in MLP]
    model.load_state_dict({n: 0 * a if any(name in n for name in zeros) else a for n, a in whole.items()})
    with ml.no_grad():
        predicted = model(ids[None]).data[0].argmax(axis=-1)
    return ml.mean_loss(model, samples), float((predicted == ids).mean())


claim("loss of the whole model", without()[0], 3.0, 3.4)
claim("loss without attention", without(attention=every)[0], 4.2, 5.4)
no_mlp, repeated_no_mlp = without(MLP=every)
claim("loss without MLPs", no_mlp, 8, 12)
nothing, repeated = without(attention=every, MLP=every)
claim("loss without both", nothing, 15, 23)

# %% [markdown]
# Without attention the model is poor: it sees the current token and none of those before it. Without MLPs, and without
# both, it is worse than uniform guessing. Why? A first idea: the embedding is tied. If nothing is added, the logits
# are the dot products of a token's row with all rows of the same table, and the product with itself is the largest. So
# the model would confidently repeat each token.
#
# > **Predict.** At what share of positions does the model predict the token that it has just read: without both parts?
# > Without MLPs only?

# %%
claim("without both, it repeats the token at a share of", repeated, 0.9, 1)
claim("without MLPs, it repeats the token at a share of", repeated_no_mlp, 0, 0.2)

# %% [markdown]
# The idea explains the first case, but not the second: without MLPs the model hardly repeats, and is still worse than
# uniform guessing.
#
# > **Predict.** There are four blocks. In which does the MLP matter most?

# %%
for layer in every:
    loss, repeats = without(MLP=[layer])
    print(f"without the MLP of block {layer + 1}: loss {loss:.2f}, repeats {100 * repeats:.1f} % of the tokens")
no_first, repeated_no_first = without(MLP=[0])
claim("without the first MLP", no_first, 7, 10)
claim("without the first MLP, it repeats at a share of", repeated_no_first, 0, 0.1)
claim("highest loss without one of the others", max(without(MLP=[i])[0] for i in every[1:]), 3.1, 3.6)
model.load_state_dict(whole)
claim("whole again: difference of the loss", without()[0] - ml.mean_loss(model, samples), 0, 0)

w = {name.removeprefix("model.layers.0."): array for name, array in whole.items()}
x = w["model.embed_tokens.weight"][ids]
h = norm(x, w["post_attention_layernorm.weight"])
added = (silu(h @ w["mlp.gate_proj.weight"].T) * (h @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
longer = np.linalg.norm(added, axis=1).mean() / np.linalg.norm(x, axis=1).mean()
claim("what the first MLP adds, in lengths of the embedding's row", longer, 5, 20)

# %% [markdown]
# Only the first MLP is indispensable; each of the others could be removed at small cost. The first MLP is not needed to
# prevent repetition: without it the model hardly repeats, either. The row that it adds is about ten times as long as
# the embedding's row. So the second block was trained on rows that consist mostly of the first MLP's output, and
# without that output it receives unfamiliar inputs. This is a likely reason; we have not tested it.
#
# Blocks of the same form do not do the same thing, and parameter counts do not tell which part matters. Remember this
# when lesson 12 asks which matrices to adapt. (Other models may divide the work differently.)
#
# <details><summary>The same in PyTorch</summary>
#
# ```python
# import torch
# from transformers import LlamaConfig, LlamaForCausalLM
#
# shape = LlamaConfig(vocab_size=2048, hidden_size=128, intermediate_size=384,
#                     num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
#                     rms_norm_eps=1e-5, tie_word_embeddings=True)
# theirs = LlamaForCausalLM(shape)
# state = {name: torch.tensor(array) for name, array in weights.items()}
# theirs.load_state_dict(state, strict=False)  # strict would ask for lm_head, which is tied
# logits = theirs(torch.tensor(ids)[None]).logits[0]  # (T, V)
# number = theirs.num_parameters()  # the tied embedding counts once
# ```
#
# </details>
#
# ## What to remember
#
# - A Llama is an embedding, blocks that each add the outputs of attention and of an MLP, and the output embedding.
# - Most parameters are in the MLPs. The embedding's share shrinks as models grow. A tied embedding counts once.
# - The loss of a fresh model is about ln V. Check this before you train.
# - A part that only adds its output can be removed, to measure the loss without it. Test explanations by measuring,
#   too.
#
# ## In the source
#
# [`Llama`](../minilora/nn/llama.py) is this program with gradients, and [`Config`](../minilora/nn/llama.py) its shape.
# [`count_parameters`](../minilora/measure/counts.py) counts a model's parameters, and
# [`predict.py`](../minilora/measure/predict.py) predicts its memory.
#
# **Now you:** [exercises 5](exercises/05_transformer.ipynb): count any Llama from its shape, and derive the backward
# pass of the norm and of the gate by hand.
#
# ## Sources
#
# - SmolLM2-135M: V 49,152, C 576, F 1,536, 30 blocks, H 9, K 3, tied ([its
#   config.json](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct/blob/main/config.json)).
# - Llama-2-7B: V 32,000, C 4,096, F 11,008, 32 blocks, H and K 32, not tied ([its
#   config.json](https://huggingface.co/meta-llama/Llama-2-7b-hf/blob/main/config.json); the model: [Touvron et al.
#   2023](https://arxiv.org/abs/2307.09288)).
# - RMSNorm: [Zhang and Sennrich 2019](https://arxiv.org/abs/1910.07467); the gated MLP, SwiGLU: [Shazeer
#   2020](https://arxiv.org/abs/2002.05202).
