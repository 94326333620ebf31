# %% [markdown]
# # Exercises 9: in, merged, out
#
# Three functions that belong to [lesson 9](../09_inject.ipynb). The last one puts your own layer into a real model, and
# then it trains.
#
# **How it works.** Replace `raise NotImplementedError` by your own code, run the cell, then run the cell below it. It
# tries your function on random inputs and prints one line: `ok`, `not written yet`, or what is wrong.
#
# In 9.1 and 9.2 a layer is a dictionary:
#
# | key | what it is |
# |---|---|
# | `W` | (m, n), the weight that is used |
# | `A`, `B` | (r, n), (m, r), the adapter |
# | `alpha` | a number; the scale is alpha / r |
# | `kept` | `None`; or, while the update is merged into W, the base's own array |

# %%
import numpy as np

import minilora as ml
from minilora.course.mine import inject, lora_forward  # your own, from exercises 8.1 and 8.3
from minilora.nn.layers import Linear

# %% [markdown]
# ## 9.1 Merge
#
# Change the dictionary so that `layer["W"]` alone computes what W, A and B compute together, and nothing is lost: the
# base's own array must be found under `kept`, unchanged. A layer that is merged already stays as it is.


# %% points=3
def merge(layer):
    """Add the update into layer["W"], once. The array that was there is kept, and its numbers do not change."""


# %% [markdown]
# ## 9.2 Unmerge
#
# The way back, exact to the last bit. A layer that is not merged stays as it is.


# %% points=1
def unmerge(layer):
    """Put the base's own array back."""


# %% [markdown]
# ## 9.3 Into a model
#
# `model` is an `ml.Module`. Freeze all that is in it, then replace every `Linear` whose **last** name is one of `targets`
# by what `make_layer(linear)` returns. Return the names of the replaced layers, in the order of the model. If one of the
# targets names no layer, raise `ValueError` before anything is changed.
#
# What you need: `model.named_modules()`, `model.requires_grad_(False)`, `model.set_submodule(name, module)`.


# %% points=4
def add_lora(model, targets, make_layer):
    """model: an ml.Module; targets: a list of names such as "q_proj"; make_layer: Linear -> module -> list of names"""


# %% [markdown]
# ## Your LoRA trains a model
#
# Nothing is left to write. The layer below is made of *your* `lora_forward` and *your* `inject` of lesson 8, and *your*
# `add_lora` puts it into the tiny base. Forty steps on questions of law:


# %%
class MyLayer(ml.Module):
    """A linear layer's own weight, frozen, and beside it my A and B."""

    def __init__(self, linear):
        _, A, B = inject(linear.weight.data, r=8, rng=np.random.default_rng(0))
        self.weight, self.alpha = linear.weight, 16
        self.A, self.B = (ml.Parameter(part.data.astype(np.float32)) for part in (A, B))

    def forward(self, x):
        return lora_forward(x, self.weight, self.A, self.B, self.alpha)


def train_mine():
    """Train the tiny base with my own LoRA; print the loss on terms of law that it never sees."""
    model, tokenizer = ml.load("tiny")
    records = ml.split_records(ml.read_records("legal"))
    train, unseen = (ml.encode_records(records[split], tokenizer) for split in ("train", "validation"))
    names = add_lora(model, ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"], MyLayer)
    print(len(names), "layers adapted:", ml.count_parameters(model))
    before = ml.mean_loss(model, unseen)
    ml.fit(model, train, steps=40, lr=5e-3)
    print(f"loss on unseen terms: {before:.2f} before, {ml.mean_loss(model, unseen):.2f} after")


try:
    train_mine()
except NotImplementedError:
    print("write 8.1, 8.3 and 9.3 first, then run this cell again")
