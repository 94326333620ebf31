"""minilora: LoRA written out in NumPy, for people who want to understand it and for people who want to use it.

    import minilora as ml
    model, tokenizer = ml.load("smollm2")
    ml.add_adapter(model, ml.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), name="legal", seed=0)
    loss = ml.loss_and_grad(model, input_ids, labels)

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
