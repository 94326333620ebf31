"""Mistakes that LoRA projects have shipped: each plants itself in the live package, with pytest's monkeypatch."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from minilora.engine import fused, ops, tensor
from minilora.engine.tensor import OPS, Tensor, op
from minilora.lora import adapters, layer, peft, variants
from minilora.lora.adapters import add_adapter
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoraLayer, LoraWeights
from minilora.nn import family
from minilora.nn.llama import Block, Config, Llama
from minilora.nn.module import Module
from minilora.nn.optim import AdamW

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


def a_default_for_alpha(plant):
    real = LoraConfig.__init__
    plant.setattr(LoraConfig, "__init__", lambda self, lora_alpha=16, **rest: real(self, lora_alpha=lora_alpha, **rest))


def unmatched_targets_ignored(plant):
    real = adapters.find_targets

    def lenient(names, config):
        known = [t for t in config.target_modules if any(n.endswith(f".{t}") for n in names)]
        return real(names, replace(config, target_modules=known))

    plant.setattr(adapters, "find_targets", lenient)


def unloaded_keys_only_warned_about(plant):
    plant.setattr(peft, "check_fit", lambda *inputs: None)
    real = peft.read_tensors

    class Lenient(dict):
        def __missing__(self, key):
            return np.zeros(())

    plant.setattr(peft, "read_tensors", lambda path, mapped=False: Lenient(real(path, mapped)))


def an_empty_adapter_saved(plant):
    real = peft.write_tensors
    plant.setattr(peft, "write_tensors", lambda path, tensors: real(path, {}))


def factors_transposed_in_the_file(plant):
    real = peft.write_tensors
    plant.setattr(peft, "write_tensors", lambda path, tensors: real(path, {k: v.T for k, v in tensors.items()}))


def rows_of_a_in_another_order(plant):
    real = peft.read_tensors
    flip = lambda name, array: array[::-1].copy() if "lora_A" in name else array
    plant.setattr(
        peft, "read_tensors", lambda path, mapped=False: {k: flip(k, x) for k, x in real(path, mapped).items()}
    )


def q_and_k_not_permuted(plant):
    plant.setattr(family, "to_pairs", lambda w, heads: w)


def a_resumed_adapter_that_is_frozen(plant):
    plant.setattr(LoraWeights, "requires_grad_", lambda self, wanted=True: Module.requires_grad_(self, False))


def a_base_that_is_not_frozen(plant):
    plant.setattr(Llama, "requires_grad_", lambda self, wanted=True: self)


def gradients_cut_below_the_second_block(plant):
    real = Block.forward

    def cut(self, x, context, layer=0):
        y = real(self, x, context, layer)
        return Tensor(y.data) if layer == 0 else y

    plant.setattr(Block, "forward", cut)


def merged_a_second_time(plant):
    real = LoraLayer.merge

    def again(self):
        base, self.unmerged = self.unmerged, None
        real(self)
        self.unmerged = self.unmerged if base is None else base

    plant.setattr(LoraLayer, "merge", again)


def a_merge_that_adds_nothing(plant):
    plant.setattr(LoraLayer, "merge", lambda self: setattr(self, "unmerged", self.weight.data.copy()))


def merged_without_the_scale(plant):
    plant.setattr(LoraWeights, "delta", lambda self, w=None: self.lora_B.data @ self.lora_A.data)


def unmerged_by_subtraction(plant):
    def subtract(self):
        if self.unmerged is not None:
            self.unmerged = None
            self.weight.data = self.weight.data - self.delta_weight(self.active)

    plant.setattr(LoraLayer, "unmerge", subtract)


def an_adapter_that_stays_on(plant):
    real = LoraLayer.active_adapters
    always = lambda self, rows=None: real(self, rows) or [(weights, 1.0) for weights in self.adapters.values()]
    plant.setattr(LoraLayer, "active_adapters", always)


def b_that_does_not_start_at_zero(plant):
    real = layer._initial_linear
    plant.setattr(layer, "_initial_linear", lambda m, n, r, init, rng: real(m, n, r, False, rng))


def dropout_that_never_ends(plant):
    plant.setattr(variants.Dropout, "active", True)


def a_tied_embedding_counted_twice(plant):
    real = Llama.named_parameters

    def twice(self):
        yield from real(self)
        yield "lm_head.weight", self.head_weight

    plant.setattr(Llama, "named_parameters", twice)


def no_sum_over_broadcast_axes(plant):
    plant.setattr(ops, "sum_to", lambda x: lambda g: g)


def b_whose_gradient_lacks_the_scale(plant):
    def lora_linear(x, w, a, b, scale):
        y, dx, dw, da, db = fused.lora_linear.forward(x, w, a, b, scale)
        return y, dx, dw, da, lambda g: db(g) / scale

    plant.setitem(OPS, "lora_linear", None)  # so that it is put back
    op(lora_linear)


def a_rotation_that_is_not_turned_back(plant):
    def rope(x, cos, sin):
        y, _ = fused.rope.forward(x, cos, sin)
        return y, lambda g: fused.rope.forward(g, cos, sin)[0]

    plant.setitem(OPS, "rope", None)
    op(rope)


def repeated_tokens_that_overwrite(plant):
    add = SimpleNamespace(at=lambda out, i, g: out.__setitem__(i, g))
    xp = SimpleNamespace(zeros=np.zeros, ascontiguousarray=np.ascontiguousarray, add=add)
    plant.setattr(fused, "array_module", lambda x: xp)


def a_graph_that_can_be_used_twice(plant):
    real = tensor.backward_pass

    def keeping(y, grad=None):
        before = {node: list(node.edges) for node in tensor._reachable(y.node)}
        yield from real(y, grad)
        for node, edges in before.items():
            node.edges = edges

    plant.setattr(tensor, "backward_pass", keeping)


def a_gradient_that_is_never_zeroed(plant):
    plant.setattr(AdamW, "zero_grad", lambda self: None)


def numpy_taken_for_granted(plant):
    plant.setattr(fused, "array_module", lambda x: np)
