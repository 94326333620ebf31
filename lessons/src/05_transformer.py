# %% [markdown]
# # Lesson 5: What is in a transformer?
#
# LoRA adapts a model that is there already. To know what is adapted, and what it costs, one must know what a model
# consists of. Here it is taken apart to the last number: first as a program, then as a count, and at last by taking out
# parts to see what they did.
#
# The letters are the same everywhere.
#
# | letter | what it is | in our tiny model |
# |---|---|---|
# | T | tokens of a text | as many as you like |
# | V | vocabulary: how many tokens there are | 2,048 |
# | C | width: the numbers that stand for one token | 128 |
# | H, K, D | heads of queries, heads of keys and values, width of a head | 4, 2, 32 |
# | F | width inside of an MLP | 384 |

# %%
import matplotlib.pyplot as plt
import numpy as np

import minilora as ml
from minilora.course import claim, show
from minilora.engine import attention, fused
from minilora.measure.predict import SHAPES
from minilora.models.load import TINY
from minilora.pages.style import BASE

# %% [markdown]
# ## 1. The whole model as a program
#
# A Llama turns T token numbers into T rows of V scores: row t says which token may come after token t. It goes like
# this. Each token takes its row from a table, the **embedding**. Then come blocks, all of the same form, and each adds
# something to these rows, twice: what **attention** took from other tokens, and what an **MLP** made of each token on
# its own. (MLP is short for multilayer perceptron: here three matrices.) At the end each row is compared with every row
# of the table again: the more alike, the higher the score of that token. Before each of these steps rows are brought to
# one length, by a **norm**.
#
# That is all. With the weights of the tiny model in a dictionary, it is a program of some twenty lines. Only two steps
# are borrowed: `rope`, which puts positions into queries and keys, and `attention`. Both are the subject of lesson 4;
# here it is enough that attention hands each token a weighted mean of rows of v, its own and those of earlier tokens.

# %%
model, tokenizer = ml.load("tiny")
weights = ml.base_state(model)  # {"model.embed_tokens.weight": an array (2048, 128), ...}
config = model.config
H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
print(f"V {config.vocab_size:,}, C {config.hidden_size}, F {config.intermediate_size}, H {H}, K {K}, D {D}")


def norm(x, weight):
    """Each row divided by the root of its mean square, then each column times a number that was learned."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + config.rms_norm_eps) * weight


def silu(z):
    return z / (1 + np.exp(-z))


def llama(ids):
    """ids (T) -> scores (T, V)"""
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


text = (TINY / "validation.txt").read_text(encoding="utf-8")  # presidents' addresses that were held out
ids = np.array(tokenizer.encode(text)[:200])
with ml.no_grad():
    difference = np.abs(llama(ids) - model(ids[None]).data[0]).max()
claim("largest difference from minilora's model", difference, 0, 1e-3)
last = llama(ids[:20])[-1]
print(repr(tokenizer.decode(ids[:20].tolist())), "->", [tokenizer.decode([i]) for i in np.argsort(-last)[:3].tolist()])

# %% [markdown]
# The names are those of Hugging Face. The numbers behind them, and nothing else, are what pretraining found.
#
# ## 2. Where the numbers are
#
# Every matrix above is stored as (outputs, inputs). A matrix from C to F numbers has F · C parameters. A Llama has no
# other parameters than matrices and norms: no biases.
#
# > **Predict.** Which of the four owners has most of the tiny model's numbers: the embedding, attention, the MLPs, the
# > norms? And which in a model with thousands of times as many?

# %%
models = {
    "tiny": config,
    "SmolLM2-135M": ml.Config(49152, 576, 1536, 30, num_attention_heads=9, num_key_value_heads=3),
    "Llama-2-7B": ml.Config(32000, 4096, 11008, 32, 32, 32, tie_word_embeddings=False),
}


def by_owner(c):
    """Parameters of a Llama with this shape, by owner; SHAPES knows (outputs, inputs) of a block's seven matrices."""
    sizes = {name: c.num_hidden_layers * int(np.prod(shape(c))) for name, shape in SHAPES.items()}
    mlp = sizes["gate_proj"] + sizes["up_proj"] + sizes["down_proj"]
    return {
        "embedding": c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2),
        "attention": sum(sizes.values()) - mlp,
        "MLP": mlp,
        "norms": (2 * c.num_hidden_layers + 1) * c.hidden_size,
    }


owners = {name: by_owner(c) for name, c in models.items()}
claim("parameters of tiny, counted in the model", ml.count_parameters(model).total, 1_049_728, 1_049_728)
claim("parameters of tiny, by owner", sum(owners["tiny"].values()), 1_049_728, 1_049_728)
empty = ml.Llama.empty(models["SmolLM2-135M"])  # all zero: it costs neither time nor memory
claim("parameters of SmolLM2-135M, counted in the model", ml.count_parameters(empty).total, 134_515_008, 134_515_008)
claim("parameters of SmolLM2-135M, by owner", sum(owners["SmolLM2-135M"].values()), 134_515_008, 134_515_008)
claim("parameters of Llama-2-7B, by owner", sum(owners["Llama-2-7B"].values()), 6_738_415_616, 6_738_415_616)

# %%
figure, panels = plt.subplots(1, 3, figsize=(9, 2.5), sharey=True, layout="constrained")
for axes, (name, count) in zip(panels, owners.items(), strict=True):
    shares = 100 * np.array(list(count.values())) / sum(count.values())
    axes.barh(list(count), shares, color=BASE)
    for row, (share, number) in enumerate(zip(shares, count.values(), strict=True)):
        axes.text(share + 1, row, f"{share:.2g} %" if share >= 1 else f"{number:,}", va="center")
    axes.set(
        title=f"{name}: {sum(count.values()):,}", xlim=(0, 90), xticks=(0, 25, 50, 75), xlabel="% of its parameters"
    )
panels[0].invert_yaxis()
show(
    figure, alt="Three panels of bars: in each model the MLPs have most parameters, and the embedding's share shrinks."
)
for name, count in owners.items():
    print(f"{name:<13}" + "".join(f"{owner} {100 * n / sum(count.values()):.2f} %   " for owner, n in count.items()))

# %% [markdown]
# *How to read it.* One panel per model, one bar per owner, in percent of that model; for norms, which are too few for
# a bar, their number stands there.
#
# The MLPs have most everywhere, more than half. The embedding's share shrinks with size: its V · C numbers grow with
# the width, while a block's matrices grow with its square. That is good to remember for LoRA, which is put on the
# matrices of the blocks: the larger the model, the more of it they are.
#
# One thing is easily counted wrong. In the two smaller models the table of the input and that of the output are one and
# the same, **tied**. Who counts it twice finds this for SmolLM2-135M:

# %%
claim("with the tied table counted twice", ml.count_parameters(empty).total + 49152 * 576, 162_826_560, 162_826_560)

# %% [markdown]
# ## 3. Before anything was learned
#
# The loss of a language model is the mean of $-\ln p$, where p is the probability that it gave to the token that really
# came next.
#
# > **Predict.** A new model, all matrices drawn at random, reads its first text. Nobody has told it anything. Its loss
# > can be known before it runs. What is it, for V = 2,048?

# %%
samples = ml.encode_text(text, tokenizer, max_length=256)[:8]
for seed in range(3):
    fresh = ml.Llama(config, seed=seed)
    claim(f"first loss / ln V, seed {seed}", ml.mean_loss(fresh, samples) / np.log(2048), 0.95, 1.05)
print(f"ln V = {np.log(2048):.3f}, the fresh model {ml.mean_loss(fresh, samples):.3f}, the trained one ", end="")
print(f"{ml.mean_loss(model, samples):.3f}")

# %% [markdown]
# Who knows nothing gives every token the same probability, 1 / V, and $-\ln(1/V) = \ln V$. A fresh model comes within a
# few percent of it because its matrices start with small numbers: the scores are all near zero. That makes a test that
# finds many mistakes at once. A first loss far above ln V says that the start is too large, or that the labels do not
# belong to the inputs; one far below it says that the model can see what it should predict.
#
# ## 4. What each part does
#
# Each half of a block *adds* to the row of a token. So a half can be taken out: set its last matrix to zero, and it
# adds nothing, while everything else stays.
#
# > **Predict.** The trained model without attention, without MLPs, without both: how bad is each? Can a model be worse
# > than one that knows nothing, at ln V = 7.62?

# %%
whole = {name: array.copy() for name, array in ml.base_state(model).items()}
last_matrix = {"attention": "self_attn.o_proj", "MLP": "mlp.down_proj"}


def without(*parts, layers=range(config.num_hidden_layers)):
    """The loss of the trained model in which these parts of these blocks add nothing."""
    silent = [f"layers.{i}.{last_matrix[part]}" for part in parts for i in layers]
    cut = {n: 0 * a if any(name in n for name in silent) else a for n, a in whole.items()}
    model.load_state_dict(cut)
    return ml.mean_loss(model, samples)


claim("loss of the whole model", without(), 3.0, 3.4)
claim("without attention", without("attention"), 4.2, 5.4)
claim("without MLPs", without("MLP"), 8, 12)
claim("without both", without("attention", "MLP"), 15, 23)

# %% [markdown]
# Without attention it is a poor model: it knows one word and not those before it. Without MLPs, and without anything
# between the two tables, it is far worse than one that knows nothing. How can it be? We look at what it predicts.

# %%
model.load_state_dict({n: 0 * a if "o_proj" in n or "down_proj" in n else a for n, a in whole.items()})
with ml.no_grad():
    same = float((model(ids[None]).data[0].argmax(axis=-1) == ids).mean())
claim("share of places where it predicts the token that it just read", same, 0.9, 1)

# %% [markdown]
# The table is tied. With nothing added, a token's row is compared with all rows of the same table, and is most like
# itself. So the model repeats each token, and is very sure of it. Somebody has to undo that before the end.
#
# > **Predict.** There are four blocks. In which does the MLP matter most?

# %%
for layer in range(config.num_hidden_layers):
    print(f"without the MLP of block {layer + 1}: {without('MLP', layers=[layer]):.2f}")
claim("without the first MLP", without("MLP", layers=[0]), 7, 10)
claim("without the second MLP", without("MLP", layers=[1]), 3.1, 3.6)
model.load_state_dict(whole)
claim("and put together again", without() - ml.mean_loss(model, samples), 0, 0)

# %% [markdown]
# The first one does nearly all of that work; each of the others could be left out at small cost. Blocks of the same
# form do not do the same thing, and counting parameters does not tell who does what. Keep that in mind when lesson 10
# asks which matrices an adapter should be put on. (This is one small model. In another the work may be divided
# otherwise.)
#
# ## What to remember
#
# - A Llama is a table, blocks that each add what attention and an MLP found, and the table again. Norms keep the
#   lengths.
# - Most parameters are in the MLPs. The table's share shrinks as models grow. Tied tables count once.
# - A fresh model's loss is ln V. Check it before you train anything.
# - Parts add up, so a part can be silenced and its worth measured.
#
# ## Where it stands
#
# [`Llama`](../minilora/nn/llama.py) is this program with gradients, and [`Config`](../minilora/nn/llama.py) its shape;
# [`count_parameters`](../minilora/measure/counts.py) counts a model, and [`predict.py`](../minilora/measure/predict.py)
# one that does not exist yet.
#
# **Now you:** [exercises 5](exercises/05_transformer.ipynb): count any Llama from its shape, and find the gradients of
# the norm and of the gate by hand.
#
# ## Sources
#
# - SmolLM2-135M: V 49,152, C 576, F 1,536, 30 blocks, H 9, K 3, tied
#   ([its config.json](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct/blob/main/config.json)).
# - Llama-2-7B: V 32,000, C 4,096, F 11,008, 32 blocks, H and K 32, not tied
#   ([its config.json](https://huggingface.co/meta-llama/Llama-2-7b-hf/blob/main/config.json); the model:
#   [Touvron et al. 2023](https://arxiv.org/abs/2307.09288)).
# - RMSNorm: [Zhang and Sennrich 2019](https://arxiv.org/abs/1910.07467); the gated MLP, SwiGLU:
#   [Shazeer 2020](https://arxiv.org/abs/2002.05202).
