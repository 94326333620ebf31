"""minilora: LoRA written out in NumPy, for people who want to understand it and for people who want to use it.

    import minilora as ml
    model, tokenizer = ml.load("smollm2")
    ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), name="legal", seed=0)
    loss = ml.loss_and_grad(model, input_ids, labels)

Models
  load               a model and its tokenizer: "tiny", "smollm2", a GGUF file or a Hugging Face folder
  pull               fetch a named model, checked against its SHA-256
  Config             the shape of a Llama model
  Llama              the model: ids in, logits or a loss out
  generate           an answer to a conversation

Adapters
  LoraConfig         rank, scale, target modules and variant of an adapter
  add_adapter        put a new adapter on a model and freeze the base
  set_adapter        choose which adapter is active, or mix several
  disable_adapter    run the base alone
  mixed_batch        another adapter for each row of a batch
  merge_adapter      add the active adapter into the base's weights
  unmerge_adapter    take it out again, to the bit
  remove_adapter     forget an adapter
  combine_adapters   make one adapter of several
  delta_weight       what an adapter adds to one matrix
  save_adapter       write an adapter as a folder that PEFT reads
  load_adapter       read a PEFT folder or a llama.cpp adapter file
  lora_plus          LoRA+: another learning rate for B than for A
  count_parameters   trainable and frozen parameters
  audit              prove what an adapter claims
  AuditError         the first claim that does not hold

Gradients
  Tensor             an array that remembers how it was computed
  op                 make a function of arrays, with its VJPs, an operation
  no_grad            compute without remembering
  gradcheck          compare gradients with measured derivatives
  GradientError      the first gradient that is wrong: where, got, expected

Training
  loss_and_grad      the loss of a batch and its gradients, in micro-batches on all cores
  Module             named parameters and submodules
  Parameter          a tensor that a module owns
  SGD                stochastic gradient descent
  AdamW              Adam with decoupled weight decay

Importing this package loads NumPy and no other third-party package; the rest is loaded by what needs it.
"""

from .cost.counts import count_parameters
from .engine.gradcheck import GradientError, gradcheck
from .engine.tensor import Tensor, no_grad, op
from .io.zoo import load, pull
from .lora.adapters import (
    add_adapter,
    delta_weight,
    disable_adapter,
    merge_adapter,
    mixed_batch,
    remove_adapter,
    set_adapter,
    unmerge_adapter,
)
from .lora.audit import AuditError, audit
from .lora.combine import combine_adapters
from .lora.config import LoraConfig
from .lora.peft import load_adapter, save_adapter
from .lora.variants import lora_plus
from .nn.llama import Config, Llama
from .nn.module import Module, Parameter
from .nn.optim import SGD, AdamW
from .nn.step import loss_and_grad
from .train.generate import generate
from .version import __version__

__all__ = [
    "SGD",
    "AdamW",
    "AuditError",
    "Config",
    "GradientError",
    "Llama",
    "LoraConfig",
    "Module",
    "Parameter",
    "Tensor",
    "__version__",
    "add_adapter",
    "audit",
    "combine_adapters",
    "count_parameters",
    "delta_weight",
    "disable_adapter",
    "generate",
    "gradcheck",
    "load",
    "load_adapter",
    "lora_plus",
    "loss_and_grad",
    "merge_adapter",
    "mixed_batch",
    "no_grad",
    "op",
    "pull",
    "remove_adapter",
    "save_adapter",
    "set_adapter",
    "unmerge_adapter",
]
