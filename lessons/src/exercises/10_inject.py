# %% [markdown]
# # Exercises 10: merging, unmerging, injection
#
# You write three functions and a test that belong to [lesson 10](../10_inject.ipynb). The third function injects your
# own layer into a real model, which is then trained.
#
# **How it works.** Replace `raise NotImplementedError` with your own code, run the cell, then run the cell below it.
# It tries your function on random inputs and prints one line: `ok`, `not written yet`, or what is wrong.
#
# In 10.1 and 10.2 a layer is a dictionary:
#
# | key | what it is |
# |---|---|
# | `W` | (m, n), the weight used in the forward pass |
# | `A`, `B` | (r, n), (m, r), the adapter |
# | `alpha` | a number; the scale is alpha / r |
# | `kept` | the base's array while the update is merged into W, otherwise `None` |

# %%
import numpy as np

import minilora as ml
from minilora.course.mine import inject, lora_forward  # your solutions of exercises 9.1 and 9.3
from minilora.nn.layers import Linear

# %% [markdown]
# ## 10.1 Merge
#
# Change the dictionary so that `layer["W"]` alone gives the output that W, A and B gave together. Keep the base's
# array itself, unchanged, under `kept`. If a layer is already merged, do not change it.


# %% points=2
def merge(layer):
    """Add the update to layer["W"] once. Keep the old array, unchanged, in layer["kept"]."""


# %% [markdown]
# ## 10.2 Unmerge
#
# Undo the merge, bit for bit, so that the dictionary is exactly as it was before. If a layer is not merged, do not
# change it.


# %% points=1
def unmerge(layer):
    """Restore the array in layer["kept"]."""


# %% [markdown]
# ## 10.3 Injection
#
# `model` is an `ml.Module`. Freeze all its parameters. Then replace every `Linear` whose **last** name (after the last
# dot) is one of `targets` by the module that `make_layer(linear)` returns. Return the names of the replaced layers, in
# the order of the model. If a target matches no layer, raise `ValueError` before you change anything.
#
# You need: `model.named_modules()`, `model.requires_grad_(False)`, `model.set_submodule(name, module)`.


# %% points=3
def add_lora(model, targets, make_layer):
    """model: an ml.Module; targets: a list of names such as "q_proj"; make_layer: Linear -> module -> list of names"""


# %% [markdown]
# ## 10.4 A bug hunt: a test for a LoRA layer
#
# Now you write a **test** instead of the code. It is called with `lora(W, r, alpha, rng)`, which returns a layer around the
# frozen matrix W (m, n), ready to train. The layer has
#
# - `layer.A` (r, n) and `layer.B` (m, r), to which a test may assign new arrays, as training would;
#   the scale is alpha / r,
# - `layer.trainable`: a list of the names of what is trained, among `"W"`, `"A"` and `"B"`,
# - `layer.forward(x)` for x (T, n), and `layer.merged()`, the one matrix (m, n) that gives the same output,
# - `layer.save()`, which returns the adapter, and `layer.resume(saved)`, after which a new layer around the same W computes
#   what the saved one did, and can be trained further as before.
#
# The check runs your test on the right version and on six broken ones. Each broken version has one mistake. Your test
# must pass on the right one, and should fail (with an `AssertionError`, or any other error) on all six. The line says
# how many your test caught, and what a version that it missed gets wrong. You do not see the versions: think of what
# must hold, and assert it.


# %% points=2
def test_lora(lora):
    """lora(W, r, alpha, rng) -> a layer: passes if it is right, raises AssertionError if it is broken"""


# %% [markdown]
# ## Your LoRA trains a model
#
# You need to write nothing here. The layer below uses *your* `lora_forward` and *your* `inject` of exercises 9, and
# *your* `add_lora` injects it into the tiny base. It is trained for forty steps on questions about law:


# %%
class MyLayer(ml.Module):
    """A linear layer's own weight, frozen, with my A and B."""

    def __init__(self, linear):
        _, A, B = inject(linear.weight.data, r=8, rng=np.random.default_rng(0))
        self.weight, self.alpha = linear.weight, 16
        self.A, self.B = (ml.Parameter(part.data.astype(np.float32)) for part in (A, B))

    def forward(self, x):
        return lora_forward(x, self.weight, self.A, self.B, self.alpha)


def train_mine():
    """Train the tiny base with my own LoRA; print its validation loss on law."""
    model, tokenizer = ml.load("tiny")
    records = ml.split_records(ml.read_records("legal"))
    train, unseen = (ml.encode_records(records[split], tokenizer) for split in ("train", "validation"))
    names = add_lora(model, ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"], MyLayer)
    print(len(names), "layers adapted:", ml.count_parameters(model))
    before = ml.mean_loss(model, unseen)
    ml.fit(model, train, steps=40, lr=5e-3)
    print(f"validation loss: {before:.2f} before, {ml.mean_loss(model, unseen):.2f} after")


try:
    train_mine()
except NotImplementedError:
    print("write 9.1, 9.3 and 10.3 first, then run this cell again")
