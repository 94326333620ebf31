"""Mistakes that LoRA projects have shipped: each plants itself in the live package, with pytest's monkeypatch."""

from dataclasses import replace

import numpy as np

from minilora.engine.tensor import Tensor
from minilora.lora import adapters, peft, variants
from minilora.lora.adapters import add_adapter
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoraLinear, LoraWeights
from minilora.nn.llama import Block, Config, Llama
from minilora.nn.module import Module

SHAPE = Config(64, 32, 48, 2, 4, 2, max_position_embeddings=128)


def new_model():
    return Llama(SHAPE, np.random.default_rng(0))


def adapted(**settings):
    """A model with an adapter that changes the output, as if trained."""
    model = new_model()
    add_adapter(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings))
    return model


def alpha_for_alpha_over_r(plant):
    plant.setattr(LoraConfig, "scale_of", lambda self, name: float(self.alpha_of(name)))


def rslora_ignored(plant):
    plant.setattr(LoraConfig, "scale_of", lambda self, name: self.alpha_of(name) / self.rank_of(name))


def rslora_ignored_by_the_loader(plant):
    real = peft._config_of
    plant.setattr(peft, "_config_of", lambda *inputs: replace(real(*inputs), use_rslora=False))


def an_empty_adapter_saved(plant):
    real = peft.write_tensors
    plant.setattr(peft, "write_tensors", lambda path, tensors: real(path, {}))


def factors_transposed_in_the_file(plant):
    real = peft.write_tensors
    plant.setattr(peft, "write_tensors", lambda path, tensors: real(path, {k: v.T for k, v in tensors.items()}))


def a_resumed_adapter_that_is_frozen(plant):
    plant.setattr(LoraWeights, "requires_grad_", lambda self, wanted=True: Module.requires_grad_(self, False))


def a_base_that_is_not_frozen(plant):
    plant.setattr(adapters, "_freeze", lambda modules: None)


def gradients_cut_below_the_second_block(plant):
    real = Block.forward

    def cut(self, x, context, layer=0):
        y = real(self, x, context, layer)
        return Tensor(y.data) if layer == 0 else y

    plant.setattr(Block, "forward", cut)


def merged_a_second_time(plant):
    real = LoraLinear.merge

    def again(self):
        base, self.unmerged = self.unmerged, None
        real(self)
        self.unmerged = self.unmerged if base is None else base

    plant.setattr(LoraLinear, "merge", again)


def a_merge_that_adds_nothing(plant):
    plant.setattr(LoraLinear, "merge", lambda self: setattr(self, "unmerged", self.weight.data.copy()))


def unmerged_by_subtraction(plant):
    def subtract(self):
        if self.unmerged is not None:
            self.unmerged = None
            self.weight.data = self.weight.data - self.delta_weight(self.active)

    plant.setattr(LoraLinear, "unmerge", subtract)


def an_adapter_that_stays_on(plant):
    real = LoraLinear.active_adapters
    always = lambda self, rows=None: real(self, rows) or [(weights, 1.0) for weights in self.adapters.values()]
    plant.setattr(LoraLinear, "active_adapters", always)


def dropout_that_never_ends(plant):
    plant.setattr(variants.Dropout, "active", True)
