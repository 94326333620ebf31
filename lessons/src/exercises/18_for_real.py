# %% [markdown]
# # Exercises 18: a configuration, a table, and your LoRA in a real model
#
# You write two functions that are needed before and after each real job. Then the layer that you wrote in lesson 9
# goes into SmolLM2. The exercises belong to [lesson 18](../18_for_real.ipynb). The first two need no model.
#
# **How it works.** Replace `raise NotImplementedError` with your own code, run the cell, then run the cell below it.
# It tries your function on models and runs of random size and prints one line: `ok`, `not written yet`, or what is
# wrong.

# %%
import math

import numpy as np

import minilora as ml
from minilora.course.mine import add_lora, inject, lora_forward  # your own, from exercises 10.3, 9.3 and 9.1

# %% [markdown]
# ## 18.1 Choose a configuration for a machine
#
# `shapes` is a dictionary with the name and shape of every matrix and norm in a model's file, as in exercises 13. The
# adapter goes on *all linear layers*, whose names contain `_proj`, with r (m + n) parameters for each (m, n). Where
# `tied` is true, the head is the embedding: the file lists `lm_head.weight`, but memory holds the table once.
#
# The machine has `gib` GiB of free memory; a GiB is 2³⁰ bytes. A training step holds three things in memory:
#
# - the frozen base: 4 bytes per parameter in float32, or 5 bits if it is quantised (4 for the code, and one as the
#   share of its block's scale and minimum);
# - 16 bytes per parameter of the adapter: weight, gradient, and Adam's optimizer state (two moments);
# - `activations` bytes, which have been measured for you.
#
# Return three values:
#
# - `r`: the largest rank that fits, but at most 256; 0 if none does.
# - `alpha`: the value for which the scale alpha / r is 2; 0 if r is 0. Our learning rate was tuned for this scale.
# - `quantized`: `False` if r = 8 or more fits with a base in float32, because dequantising takes time; otherwise
#   `True`.


# %% points=4
def choose_config(shapes, tied, gib, activations):
    """shapes: a dictionary of name -> shape; tied: is the head the embedding?; gib: GiB; activations: bytes
    -> r, alpha, quantized"""


# %% [markdown]
# ## 18.2 The table, from the records of two runs
#
# Each run has left a dictionary. Compute its column of the table:
#
# | key of `run` | what it is |
# |---|---|
# | `method` | `"lora"` or `"full"` |
# | `base_parameters` | parameters of the base |
# | `trained_parameters` | trainable parameters: with LoRA those of the adapter, otherwise those of the base |
# | `peak_bytes` | the peak memory of its process |
# | `base_bytes`, `result_bytes` | on disk: the base; and one result, an adapter or a whole copy |
# | `search_seconds`, `seconds` | to find the learning rate; and for the run itself |
# | `cores` | cores in use all the time |
# | `loss` | `[before, after]`, on the test set |
#
# Return five numbers:
#
# - `updated`: the percentage of all parameters in the model during training, the adapter included, that were trained.
# - `memory`: the peak in GB, of 10⁹ bytes.
# - `disk`: the GB of disk space for `count` such results, with everything that is needed to use them. An adapter is
#   useless without its base.
# - `dollars`: the cost at `price` dollars per core and hour. The search for a learning rate costs money, too.
# - `change`: of the loss, in percent of the loss before; negative if it fell.


# %% points=4
def table_from_metrics(run, count, price):
    """run: a dictionary; count: how many results are kept; price: dollars per core and hour
    -> updated, memory, disk, dollars, change"""


# %% [markdown]
# ## Your LoRA in SmolLM2
#
# You do not write anything here. The layer below uses *your* `lora_forward` and *your* `inject`, and *your* `add_lora`
# puts it into all 210 linear layers. It trains for ten steps on legal terms. Then your A and B are copied into
# minilora's own layers, which must give the same loss, and are saved as a folder that PEFT loads. This needs the model
# (`minilora pull smollm2`) and a minute or two: set `REAL = True`. On the tiny base (`BASE = "tiny"`) it takes
# seconds. If your exercise 9.1 had the scale α / √r (rsLoRA), set `RSLORA = True`; otherwise minilora's layers would
# use another scale.

# %%
REAL = False
BASE = "smollm2"
RSLORA = False


class MyLayer(ml.Module):
    """A linear layer's own weight, frozen, with my A and B."""

    def __init__(self, linear):
        _, A, B = inject(linear.weight.data, r=8, rng=np.random.default_rng(0))
        self.weight, self.alpha = linear.weight, 16
        self.A, self.B = (ml.Parameter(part.data.astype(np.float32)) for part in (A, B))

    def forward(self, x):
        return lora_forward(x, self.weight, self.A, self.B, self.alpha)


def train_mine(folder="runs/mine"):
    """Train the base with my own LoRA, hand A and B over to minilora, and save them in PEFT's format."""
    model, tokenizer = ml.load(BASE)
    records = ml.split_records(ml.read_records("legal"))
    train, unseen = (ml.encode_records(records[split], tokenizer) for split in ("train", "validation"))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    names = add_lora(model, targets, MyLayer)
    print(len(names), "layers adapted:", ml.count_parameters(model))
    before = ml.mean_loss(model, unseen[:10])
    ml.fit(model, train, steps=10, lr=2e-3, batch_size=4)
    mine = ml.mean_loss(model, unseen[:10])
    print(f"loss on unseen terms: {before:.3f} before, {mine:.3f} after")

    layers, (model, _) = dict(model.named_modules()), ml.load(BASE)
    ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, use_rslora=RSLORA, target_modules=targets), name="mine")
    arrays = ml.adapter_state(model, "mine")
    for name in names:
        for part in ("A", "B"):
            arrays[f"{name}.lora_{part}"][...] = getattr(layers[name], part).data
    print(f"in minilora's layers: {ml.mean_loss(model, unseen[:10]):.3f}")
    print("saved for PEFT:", ml.save_adapter(model, folder, name="mine"))


if REAL:
    train_mine()
