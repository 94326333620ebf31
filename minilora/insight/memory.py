"""Where the bytes go: what a training job will hold, predicted from shapes, and what the process really took.

Freezing saves gradients and Adam's two moments. It does not save activations, the arrays that operations keep for
backward: those depend on tokens and layers, and every layer still passes a gradient on.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass

from ..nn.llama import Config

FLOAT = 4  # bytes of a float32
LOGIT_BLOCK = 512  # scored tokens whose logits exist at the same time: the block of linear_cross_entropy

SHAPES = {  # (outputs, inputs) of a block's matrices
    "q_proj": lambda c: (c.num_attention_heads * c.head_dim, c.hidden_size),
    "k_proj": lambda c: (c.num_key_value_heads * c.head_dim, c.hidden_size),
    "v_proj": lambda c: (c.num_key_value_heads * c.head_dim, c.hidden_size),
    "o_proj": lambda c: (c.hidden_size, c.num_attention_heads * c.head_dim),
    "gate_proj": lambda c: (c.intermediate_size, c.hidden_size),
    "up_proj": lambda c: (c.intermediate_size, c.hidden_size),
    "down_proj": lambda c: (c.hidden_size, c.intermediate_size),
}


@dataclass(frozen=True)
class Memory:
    """Bytes by owner, at the moment of a training step when most is held."""

    weights: int
    adapter: int
    gradients: int
    moments: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.gradients + self.moments + self.activations + self.logits


def base_parameters(config: Config) -> int:
    """The number of parameters of a Llama model with this shape."""
    C = config.hidden_size
    block = sum(m * n for m, n in (shape(config) for shape in SHAPES.values())) + 2 * C
    embeddings = config.vocab_size * C * (1 if config.tie_word_embeddings else 2)
    return embeddings + config.num_hidden_layers * block + C


def predict_memory(
    config: Config,
    tokens: int,
    scored: int,
    rank: int | None = None,
    targets: Collection[str] = tuple(SHAPES),
) -> Memory:
    """What a step holds on a row of `tokens` tokens, `scored` of which count in the loss.

    rank: of the adapter on the modules named in `targets` of every block; None for full fine-tuning.
    """
    C, F, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    adapted = set(SHAPES) if rank is None else set(targets)
    base = base_parameters(config)
    adapter = 0 if rank is None else layers * sum(rank * sum(SHAPES[name](config)) for name in adapted)
    trained = base if rank is None else adapter

    per_token = 2 * (C + 1)  # both norms keep their input and one number
    per_token += heads + 2 * keys  # attention keeps q, k, v
    per_token += 2 * F  # swiglu keeps gate and up
    per_token += C * bool(adapted & {"q_proj", "k_proj", "v_proj"})  # x of a trained matrix, shared by q, k and v
    per_token += heads * ("o_proj" in adapted)
    per_token += C * bool(adapted & {"gate_proj", "up_proj"})
    per_token += F * ("down_proj" in adapted)
    per_token += (rank or 0) * len(adapted)  # x Aᵀ of each adapter
    activations = tokens * (layers * per_token + C) + scored * C
    logits = min(scored, LOGIT_BLOCK) * config.vocab_size
    gradients = trained
    if rank is None:  # gradients grow while activations go: the peak is one end or the other
        gradients += config.vocab_size * C  # the tied embedding receives two of its own size
        if activations + logits > gradients:
            gradients = 0
        else:
            activations = logits = 0
    numbers = [base, adapter, gradients, 2 * trained, activations, logits]
    return Memory(*(FLOAT * n for n in numbers))


def peak_memory() -> int | None:
    """The most memory this process has held so far, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
