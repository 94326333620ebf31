"""The whole Gemma 3 decoder for text (Gemma Team 2025, arXiv 2503.19786): read llama.py first, then what is different.

Four norms in a block, also after attention and MLP; norms of every head's q and k; every norm times 1 + w; embeddings
times √C; GELU in the gate. Five of six layers see only the last `sliding_window` tokens, with fast rotations; every
sixth sees all, with slow ones.

Attribute names are Hugging Face's, so the state dict is a Hugging Face checkpoint.

Shapes: B batch, T tokens, C width, H query heads, K key/value heads, D head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine import fused
from ..engine.attention import Packing
from ..engine.backend import Array, array_module
from ..engine.tensor import Tensor
from ..options import short_repr
from . import llama
from .cache import KVCache
from .language_model import (
    Context,
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
from .rope import frequencies

SLIDING, FULL = "sliding_attention", "full_attention"


def every_nth(layers: Any, n: Any = 6) -> tuple[str, ...]:
    """The types of layers of which every n-th sees all tokens. Raises ValueError for numbers that no model has."""
    if not all(isinstance(number, int) and 0 < number < 10_000 for number in (layers, n)):
        raise ValueError(f"no model has {layers!r} layers of which every {n!r}th sees all tokens")
    return tuple(SLIDING if (i + 1) % n else FULL for i in range(layers))


@dataclass(frozen=True)
class Gemma3Config:
    """The shape of a Gemma 3 text model, under Hugging Face's names (`config.json`).

    Raises ValueError for shapes that no Gemma 3 can have.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 256
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0  # of layers that see all tokens
    rope_local_base_freq: float = 10_000.0  # of layers with a window
    sliding_window: int = 512  # tokens that a token sees in these layers, itself included
    layer_types: tuple[str, ...] = ()  # of each layer; (): every sixth sees all tokens
    query_pre_attn_scalar: float = 0.0  # scores are q kᵀ divided by its root; 0: head_dim
    tie_word_embeddings: bool = True
    model_type: str = "gemma3_text"

    def __post_init__(self):
        check_positive(self, int, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                       "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
                       "sliding_window")  # fmt: skip
        object.__setattr__(self, "query_pre_attn_scalar", self.query_pre_attn_scalar or self.head_dim)
        check_positive(self, float, "rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar")
        check_heads(self)
        types = tuple(self.layer_types or every_nth(self.num_hidden_layers))
        object.__setattr__(self, "layer_types", types)
        if len(types) != self.num_hidden_layers or set(types) - {SLIDING, FULL}:
            raise ValueError(f"layer_types must be {self.num_hidden_layers} of {SLIDING} and {FULL}, got {types}")

    __repr__ = short_repr


@dataclass
class TwoAngles(Context):
    """What every block needs besides its input: also rotary angles, (cos, sin) for each type of layer."""

    angles: dict[str, tuple[Array, Array]]


class Attention(Module):
    """Each token attends to the tokens before it, or to the last of them: grouped queries, normed and rotated."""

    def __init__(self, config: Gemma3Config, layer_type: str, rng: np.random.Generator | None = None):
        C, D = config.hidden_size, config.head_dim
        self.layer_type = layer_type
        self.scale = config.query_pre_attn_scalar**-0.5
        self.window = config.sliding_window if layer_type == SLIDING else None
        self.q_proj = Linear(C, config.num_attention_heads * D, rng=rng)
        self.k_proj = Linear(C, config.num_key_value_heads * D, rng=rng)
        self.v_proj = Linear(C, config.num_key_value_heads * D, rng=rng)
        self.o_proj = Linear(config.num_attention_heads * D, C, rng=rng)
        self.q_norm = RMSNorm(D, config.rms_norm_eps, offset=1.0)
        self.k_norm = RMSNorm(D, config.rms_norm_eps, offset=1.0)

    def forward(self, x: Tensor, context: TwoAngles, layer: int = 0) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        B, T, _ = x.shape
        D, (cos, sin) = self.q_norm.weight.size, context.angles[self.layer_type]
        q = fused.rope(self.q_norm(self.q_proj(x).reshape(B, T, -1, D)), cos, sin)  # (B, T, H, D)
        k = fused.rope(self.k_norm(self.k_proj(x).reshape(B, T, -1, D)), cos, sin)  # (B, T, K, D)
        v = self.v_proj(x).reshape(B, T, -1, D)  # (B, T, K, D)
        y = attend(q, k, v, context, layer, window=self.window, scale=self.scale)  # (B, T, H, D)
        return self.o_proj(y.reshape(B, T, -1))


class MLP(llama.MLP):
    """Llama's, with GELU in the gate (GeGLU)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        return self.down_proj(fused.geglu(self.gate_proj(x), self.up_proj(x)))


class Block(Module):
    """One layer: norm, attention, norm, residual add; norm, MLP, norm, residual add."""

    def __init__(self, config: Gemma3Config, layer_type: str, rng: np.random.Generator | None = None):
        C, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(C, eps, offset=1.0)
        self.self_attn = Attention(config, layer_type, rng)
        self.post_attention_layernorm = RMSNorm(C, eps, offset=1.0)
        self.pre_feedforward_layernorm = RMSNorm(C, eps, offset=1.0)
        self.mlp = MLP(config, rng)
        self.post_feedforward_layernorm = RMSNorm(C, eps, offset=1.0)

    def forward(self, x: Tensor, context: TwoAngles, layer: int = 0) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), context, layer))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Decoder(Module):
    """Token ids in, one vector per token out: embedding times √C, blocks, a last norm."""

    def __init__(self, config: Gemma3Config, rng: np.random.Generator | None = None):
        self.config = config
        self.recompute = False  # activation checkpointing: save only each block's input, see engine/recompute.py
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rng=rng)
        self.layers = [Block(config, kind, rng) for kind in config.layer_types]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, offset=1.0)

    def forward(self, input_ids: Array, cache: KVCache | None = None, packing: Packing | None = None) -> Tensor:
        """input_ids (B, T) -> (B, T, C)"""
        x = self.embed_tokens(input_ids) * math.sqrt(self.config.hidden_size)  # (B, T, C)
        context = TwoAngles(cache, packing, self.angles(positions_of(input_ids, cache, packing), x.dtype))
        return self.norm(through_blocks(self.layers, x, context, self.recompute))

    def angles(self, positions: Array, dtype: np.dtype) -> dict[str, tuple[Array, Array]]:
        """cos and sin of every token's rotations, (1 or B, T, 1, D/2) each, for each type of layer."""
        config, xp = self.config, array_module(positions)
        bases = {SLIDING: config.rope_local_base_freq, FULL: config.rope_theta}
        turns = {kind: frequencies(bases[kind], config.head_dim, xp=xp) for kind in set(config.layer_types)}
        return {kind: rotary_angles(positions, each, dtype) for kind, each in turns.items()}


class Gemma3(LanguageModel):
    """A Gemma 3 model. `LanguageModel` describes its logits, its loss and its random weights."""

    config: Gemma3Config
    model: Decoder
    decoder_class = Decoder
