"""The whole Llama decoder: the architecture of SmolLM2, TinyLlama and the Llama family in one file.

Read it from the bottom: `Llama` predicts the next token, with `Block`s that add the outputs of `Attention` and `MLP` to
the residual stream. Attribute names are Hugging Face's, so the state dict is a Hugging Face checkpoint.

Shapes: B batch, T tokens, C width, H query heads, K key/value heads, D head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine import fused
from ..engine.attention import Packing
from ..engine.backend import Array, array_module
from ..engine.tensor import Tensor
from ..options import short_repr
from .cache import KVCache
from .language_model import (
    LanguageModel,
    attend,
    check_heads,
    check_positive,
    positions_of,
    rotary_angles,
    through_blocks,
)
from .layers import Embedding, Linear, RMSNorm
from .module import Module
from .rope import RopeScaling, frequencies


@dataclass(frozen=True)
class Config:
    """The shape of a Llama model, under Hugging Face's names (`config.json`).

    Raises ValueError for shapes that no Llama model can have.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    # What Llama's relatives add. model_type: a key of families.FAMILIES.
    model_type: str = "llama"
    rope_scaling: RopeScaling | None = None  # Llama 3.1: slower rotations for longer texts
    attention_bias: bool = False  # Qwen2 (arXiv 2407.10671): a bias on q, k and v
    qk_norm: bool = False  # Qwen3 (arXiv 2505.09388): RMSNorm of every head's q and k, before the rotation
    sliding_window: int | None = None  # Mistral 7B (arXiv 2310.06825): how many tokens a token sees, itself included
    no_rope_layer_interval: int = 0  # SmolLM3: such a layer rotates nothing (NoPE, arXiv 2501.18795); 0: all rotate
    embedding_multiplier: float = 1.0  # Granite 3: four factors, as in μP (arXiv 2203.03466)
    attention_multiplier: float = 0.0  # of q kᵀ; 0: 1 / √head_dim
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0  # logits are divided by it

    def __post_init__(self):
        if self.head_dim == 0 and all(isinstance(n, int) and n for n in (self.hidden_size, self.num_attention_heads)):
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        check_positive(self, int, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                       "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip
        check_positive(self, float, "rms_norm_eps", "rope_theta", "embedding_multiplier", "residual_multiplier",
                       "logits_scaling")  # fmt: skip
        counts = {"sliding_window": None, "no_rope_layer_interval": 0}  # and what stands for none
        check_positive(self, int, *(name for name, none in counts.items() if getattr(self, name) != none))
        check_positive(self, float, *(["attention_multiplier"] if self.attention_multiplier != 0 else []))
        check_heads(self)

    __repr__ = short_repr


@dataclass
class Context:
    """What every block needs besides its input: rotary angles (1 or B, T, 1, D/2), KV cache, and packing."""

    cos: Array
    sin: Array
    cache: KVCache | None = None
    packing: Packing | None = None


class Attention(Module):
    """Each token attends to the tokens before it: grouped-query attention with rotary positions."""

    def __init__(self, config: Config, rng: np.random.Generator | None = None):
        C, D, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.config = config
        self.q_proj = Linear(C, H * D, config.attention_bias, rng=rng)
        self.k_proj = Linear(C, K * D, config.attention_bias, rng=rng)
        self.v_proj = Linear(C, K * D, config.attention_bias, rng=rng)
        self.o_proj = Linear(H * D, C, rng=rng)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(D, config.rms_norm_eps), RMSNorm(D, config.rms_norm_eps)

    def forward(self, x: Tensor, context: Context, layer: int = 0) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        B, T, _ = x.shape
        config, D = self.config, self.config.head_dim
        q = self.q_proj(x).reshape(B, T, -1, D)  # (B, T, H, D)
        k = self.k_proj(x).reshape(B, T, -1, D)  # (B, T, K, D)
        v = self.v_proj(x).reshape(B, T, -1, D)  # (B, T, K, D)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if not config.no_rope_layer_interval or (layer + 1) % config.no_rope_layer_interval:
            q, k = (fused.rope(z, context.cos, context.sin) for z in (q, k))
        scale = config.attention_multiplier or None
        y = attend(q, k, v, context, layer, window=config.sliding_window, scale=scale)  # (B, T, H, D)
        return self.o_proj(y.reshape(B, T, -1))


class MLP(Module):
    """Each token by itself: up to width F, gated, and down again (SwiGLU)."""

    def __init__(self, config: Any, rng: np.random.Generator | None = None):
        C, F = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(C, F, rng=rng)
        self.up_proj = Linear(C, F, rng=rng)
        self.down_proj = Linear(F, C, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        return self.down_proj(fused.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(Module):
    """One layer: norm, attention, residual add; norm, MLP, residual add."""

    def __init__(self, config: Config, rng: np.random.Generator | None = None):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rng)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.multiplier = config.residual_multiplier
        self.mlp = MLP(config, rng)

    def forward(self, x: Tensor, context: Context, layer: int = 0) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        x = x + scaled(self.self_attn(self.input_layernorm(x), context, layer), self.multiplier)
        return x + scaled(self.mlp(self.post_attention_layernorm(x)), self.multiplier)


class Decoder(Module):
    """Token ids in, one vector per token out: embedding, blocks, a last norm."""

    def __init__(self, config: Config, rng: np.random.Generator | None = None):
        self.config = config
        self.recompute = False  # activation checkpointing: save only each block's input, see engine/recompute.py
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rng=rng)
        self.layers = [Block(config, rng) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Array, cache: KVCache | None = None, packing: Packing | None = None) -> Tensor:
        """input_ids (B, T) -> (B, T, C)"""
        x = scaled(self.embed_tokens(input_ids), self.config.embedding_multiplier)  # (B, T, C)
        cos, sin = rotary_angles(positions_of(input_ids, cache, packing), self.frequencies(), x.dtype)
        x = through_blocks(self.layers, x, Context(cos, sin, cache, packing), self.recompute)
        return scaled(self.norm(x), 1 / self.config.logits_scaling)

    def frequencies(self) -> Array:
        """By how much each pair of q and k turns from one position to the next, (D/2), float64."""
        config = self.config
        return frequencies(config.rope_theta, config.head_dim, config.rope_scaling, array_module(self.norm.weight.data))


def scaled(x: Tensor, factor: float) -> Tensor:
    """x · factor: Granite's multipliers, which are 1 in all other families."""
    return x if factor == 1 else x * factor


class Llama(LanguageModel):
    """A language model: logits of the next token, and the loss of a labelled text (see language_model.py).

    Its weights are random; seed is a number or a generator, and the same seed gives the same weights.
    `Llama.empty(config)` has zeros instead, to load weights into: they take neither time nor memory.
    """

    config: Config
    model: Decoder
    decoder_class = Decoder
