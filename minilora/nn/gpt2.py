"""The whole GPT-2 decoder (Radford et al. 2019): read llama.py first, then what is different here.

LayerNorm instead of RMSNorm, a bias in every linear layer, GELU without a gate, one matrix for q, k and v, as many
key/value heads as query heads, and a learned vector for every position instead of rotations.

Attribute names are Hugging Face's. Its checkpoints store the four matrices of a block transposed, (inputs, outputs);
here they are (outputs, inputs) as everywhere else, and are transposed where files are read and written.

Shapes: B batch, T tokens, C width, H heads, D head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..engine import fused
from ..engine.attention import Packing
from ..engine.backend import Array
from ..engine.tensor import Tensor
from ..options import short_repr
from .cache import KVCache
from .language_model import Context, LanguageModel, attend, check_positive, positions_of, through_blocks
from .layers import Embedding, LayerNorm, Linear
from .module import Module


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2, under the names that Llama's has; in `config.json` they are n_embd, n_layer, and so on.

    Raises ValueError for shapes that no GPT-2 can have.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int = 0  # 0: 4 hidden_size
    max_position_embeddings: int = 1024
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    model_type: str = "gpt2"

    def __post_init__(self):
        if self.intermediate_size == 0 and isinstance(self.hidden_size, int):
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        check_positive(self, int, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                       "intermediate_size", "max_position_embeddings")  # fmt: skip
        check_positive(self, float, "layer_norm_epsilon")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    __repr__ = short_repr


class Attention(Module):
    """Each token attends to the tokens before it. Positions are already in x."""

    def __init__(self, config: GPT2Config, rng: np.random.Generator | None = None):
        C = config.hidden_size
        self.heads = config.num_attention_heads
        self.c_attn = Linear(C, 3 * C, bias=True, rng=rng)  # q, k and v
        self.c_proj = Linear(C, C, bias=True, rng=rng, std=residual_std(config))

    def forward(self, x: Tensor, context: Context, layer: int = 0) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        B, T, _ = x.shape
        qkv = self.c_attn(x).reshape(B, T, 3, self.heads, -1)  # (B, T, 3, H, D)
        q, k, v = (qkv[:, :, i] for i in range(3))  # (B, T, H, D) each
        return self.c_proj(attend(q, k, v, context, layer).reshape(B, T, -1))


class MLP(Module):
    """Each token by itself: up to width F, GELU, and down again."""

    def __init__(self, config: GPT2Config, rng: np.random.Generator | None = None):
        C, F = config.hidden_size, config.intermediate_size
        self.c_fc = Linear(C, F, bias=True, rng=rng)
        self.c_proj = Linear(F, C, bias=True, rng=rng, std=residual_std(config))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        return self.c_proj(fused.gelu(self.c_fc(x)))


class Block(Module):
    """One layer: norm, attention, residual add; norm, MLP, residual add."""

    def __init__(self, config: GPT2Config, rng: np.random.Generator | None = None):
        self.ln_1 = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = Attention(config, rng)
        self.ln_2 = LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = MLP(config, rng)

    def forward(self, x: Tensor, context: Context, layer: int = 0) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        x = x + self.attn(self.ln_1(x), context, layer)
        return x + self.mlp(self.ln_2(x))


class Decoder(Module):
    """Token ids in, one vector per token out: embeddings of tokens and positions, blocks, a last norm."""

    def __init__(self, config: GPT2Config, rng: np.random.Generator | None = None):
        self.recompute = False  # activation checkpointing: save only each block's input, see engine/recompute.py
        self.wte = Embedding(config.vocab_size, config.hidden_size, rng=rng)
        self.wpe = Embedding(config.max_position_embeddings, config.hidden_size, rng=rng)
        self.h = [Block(config, rng) for _ in range(config.num_hidden_layers)]
        self.ln_f = LayerNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(self, input_ids: Array, cache: KVCache | None = None, packing: Packing | None = None) -> Tensor:
        """input_ids (B, T) -> (B, T, C)"""
        x = self.wte(input_ids) + self.wpe(positions_of(input_ids, cache, packing))  # (B, T, C)
        return self.ln_f(through_blocks(self.h, x, Context(cache, packing), self.recompute))


class GPT2(LanguageModel):
    """A GPT-2 model. `LanguageModel` describes its logits, its loss and its random weights."""

    config: GPT2Config
    transformer: Decoder
    decoder_class = Decoder
    decoder_name = "transformer"
    embedding_name = "wte"

    @classmethod
    def claims(cls, config: GPT2Config) -> dict[str, tuple[int, ...]]:
        """The shapes of a few tensors, which show every size of the config: see `families.check_claims`."""
        C = config.hidden_size
        return {
            "transformer.wte.weight": (config.vocab_size, C),
            "transformer.wpe.weight": (config.max_position_embeddings, C),
            "transformer.h.0.mlp.c_fc.weight": (config.intermediate_size, C),
        }


def residual_std(config: GPT2Config) -> float:
    """The initial standard deviation of matrices whose output is added to the residual stream, 2 in every block."""
    return 0.02 / (2 * config.num_hidden_layers) ** 0.5
