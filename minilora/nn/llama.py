"""The whole Llama decoder: the architecture of SmolLM2, TinyLlama and the Llama family in one file.

Read it from the bottom: `Llama` predicts the next token, with `Block`s that add the outputs of `Attention` and `MLP` to
the residual stream. Attribute names are Hugging Face's, so the state dict is a Hugging Face checkpoint.

Shapes: B batch, T tokens, C width, H query heads, K key/value heads, D head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..engine import fused
from ..engine.attention import Packing, attention
from ..engine.backend import Array, array_module
from ..engine.tensor import Tensor
from ..files.disk import ModelFileError
from .cache import KVCache
from .language_model import LanguageModel, check_numbers, check_sizes, positions_of, rotary_angles, through_blocks
from .layers import Embedding, Linear, RMSNorm
from .module import Module


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

    def __post_init__(self):
        if self.head_dim == 0 and all(isinstance(n, int) and n for n in (self.hidden_size, self.num_attention_heads)):
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        check_sizes(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip
        check_numbers(self, "rms_norm_eps", "rope_theta")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key/value heads evenly"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")


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
        C, D = config.hidden_size, config.head_dim
        self.config = config
        self.q_proj = Linear(C, config.num_attention_heads * D, rng=rng)
        self.k_proj = Linear(C, config.num_key_value_heads * D, rng=rng)
        self.v_proj = Linear(C, config.num_key_value_heads * D, rng=rng)
        self.o_proj = Linear(config.num_attention_heads * D, C, rng=rng)

    def forward(self, x: Tensor, context: Context, layer: int = 0) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        B, T, _ = x.shape
        D = self.config.head_dim
        q = fused.rope(self.q_proj(x).reshape(B, T, -1, D), context.cos, context.sin)  # (B, T, H, D)
        k = fused.rope(self.k_proj(x).reshape(B, T, -1, D), context.cos, context.sin)  # (B, T, K, D)
        v = self.v_proj(x).reshape(B, T, -1, D)  # (B, T, K, D)
        if (cache := context.cache) is None:
            y = attention(q, k, v, packing=context.packing)  # (B, T, H, D)
        else:
            y = attention(q, *cache.extend(layer, k.data, v.data), first=cache.first)  # (B, T, H, D)
        return self.o_proj(y.reshape(B, T, -1))


class MLP(Module):
    """Each token by itself: up to width F, gated, and down again (SwiGLU)."""

    def __init__(self, config: Config, rng: np.random.Generator | None = None):
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
        self.mlp = MLP(config, rng)

    def forward(self, x: Tensor, context: Context, layer: int = 0) -> Tensor:
        """x (B, T, C) -> (B, T, C)"""
        x = x + self.self_attn(self.input_layernorm(x), context, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


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
        x = self.embed_tokens(input_ids)  # (B, T, C)
        cos, sin = rotary_angles(positions_of(input_ids, cache, packing), self.frequencies(), x.dtype)
        x = through_blocks(self.layers, x, Context(cos, sin, cache, packing), self.recompute)
        return self.norm(x)

    def frequencies(self) -> Array:
        """By how much each pair of q and k turns from one position to the next, (D/2), float64."""
        D = self.config.head_dim
        return self.config.rope_theta ** (-array_module(self.norm.weight.data).arange(0, D, 2) / D)


class Llama(LanguageModel):
    """A language model: logits of the next token, and the loss of a labelled text (see language_model.py).

    Its weights are random; seed is a number or a generator, and the same seed gives the same weights.
    `Llama.empty(config)` has zeros instead, to load weights into: they take neither time nor memory.
    """

    config: Config

    def _build(self, config: Config, rng: np.random.Generator | None) -> None:
        self.config = config
        self.model = Decoder(config, rng)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, rng=rng)

    @property
    def decoder(self) -> Decoder:
        return self.model

    @property
    def embedding(self) -> Embedding:
        return self.model.embed_tokens


def check_claims(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ModelFileError if tensors of these shapes contradict the `config` that their file claims.

    Called before a model is made, so that an absurd config takes neither memory nor time.
    """
    if config.num_hidden_layers > len(shapes):
        raise ModelFileError(f"{config.num_hidden_layers} layers claimed, {len(shapes)} tensors held")
    C, D, first = config.hidden_size, config.head_dim, "model.layers.0."
    claimed = {
        "model.embed_tokens.weight": (config.vocab_size, C),
        f"{first}self_attn.q_proj.weight": (config.num_attention_heads * D, C),
        f"{first}self_attn.k_proj.weight": (config.num_key_value_heads * D, C),
        f"{first}mlp.gate_proj.weight": (config.intermediate_size, C),
    }
    for name, shape in claimed.items():
        if name not in shapes:
            raise ModelFileError(f"missing {name}")
        if tuple(shapes[name]) != shape:
            raise ModelFileError(f"{name} has shape {tuple(shapes[name])}, but {shape} is claimed")
