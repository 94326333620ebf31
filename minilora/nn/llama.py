"""The whole Llama decoder: the architecture of SmolLM2, TinyLlama and the Llama family in one file.

Read it from the bottom: `Llama` predicts the next token, with `Block`s that add the outputs of `Attention` and `MLP` to
the residual stream. Attribute names are Hugging Face's, so the state dict is a Hugging Face checkpoint.

Shapes: B batch, T tokens, C width, H query heads, K key/value heads, D head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..engine import fused
from ..engine.attention import Packing, attention
from ..engine.backend import Array, array_module, to_device_of
from ..engine.recompute import recomputed
from ..engine.tensor import Tensor
from ..files.disk import ModelFileError
from .cache import KVCache
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
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "head_dim", "max_position_embeddings"):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
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
        cos, sin = self.angles(input_ids, cache, packing)
        context = Context(cos, sin, cache, packing)
        for i, layer in enumerate(self.layers):
            block = partial(layer, context=context, layer=i)
            x = recomputed(block, x) if self.recompute else block(x)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.norm(x)

    def angles(self, input_ids: Array, cache: KVCache | None, packing: Packing | None) -> tuple[Array, Array]:
        """cos and sin of position × frequency, (1 or B, T, 1, D/2), computed in float64 and rounded once."""
        xp, config = array_module(input_ids), self.config
        if packing is not None:
            positions = xp.concatenate([xp.arange(p.start, p.stop) for p in packing.ranges()])[None]  # (1, T)
        else:
            start = 0 if cache is None else cache.length
            positions = xp.arange(start, start + input_ids.shape[1])[None]  # (1, T)
        if cache is not None and cache.first is not None:
            positions = xp.maximum(positions - cache.first[:, None], 0)  # (B, T)
        frequencies = config.rope_theta ** (-xp.arange(0, config.head_dim, 2) / config.head_dim)  # (D/2)
        angles = (positions[..., None] * frequencies)[:, :, None]  # (1 or B, T, 1, D/2)
        dtype = self.embed_tokens.weight.dtype
        return xp.cos(angles).astype(dtype), xp.sin(angles).astype(dtype)


class Llama(Module):
    """A language model: logits of the next token, and the loss of a labelled text.

    Its weights are random; seed is a number or a generator, and the same seed gives the same weights.
    `Llama.empty(config)` has zeros instead, to load weights into: they take neither time nor memory.
    """

    source: str | None = None  # the argument of `minilora.load` that it was loaded with: "smollm2", a path
    hub_name: str | None = None  # its name on Hugging Face, if known: for PEFT
    rounded_to: str | None = None  # the kind that its matrices were rounded to when it was loaded: "nf4"
    unrounded_sha256: str | None = None  # of a rounded model: its fingerprint before rounding

    def __init__(self, config: Config, seed: int | np.random.Generator = 0):
        self._build(config, np.random.default_rng(seed))

    @classmethod
    def empty(cls, config: Config) -> Llama:
        """A model whose matrices are zero, for `load_state_dict` or for counting."""
        model = cls.__new__(cls)
        model._build(config, None)
        return model

    def _build(self, config: Config, rng: np.random.Generator | None) -> None:
        self.config = config
        self.model = Decoder(config, rng)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, rng=rng)

    @property
    def head_weight(self) -> Tensor:
        """The output embedding (V, C): the input embedding itself if the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, input_ids: Array, cache: KVCache | None = None, last: bool = False) -> Tensor:
        """Logits: input_ids (B, T) -> (B, T, V), or (B, 1, V) of the last token only, if `last`."""
        input_ids = self.check_ids(input_ids)
        if isinstance(input_ids, np.ndarray):
            (input_ids,) = to_device_of(self.head_weight.data, input_ids)
        x = self.model(input_ids, cache)  # (B, T, C)
        x = x[:, -1:] if last else x
        return fused.linear(x, self.head_weight) if self.config.tie_word_embeddings else self.lm_head(x)

    def new_cache(self, rows: int, capacity: int, first: Array | None = None) -> KVCache:
        """An empty KV cache for `forward`, with room for `capacity` tokens in each row. first: as for `KVCache`."""
        config = self.config
        shape = (rows, capacity, config.num_key_value_heads, config.head_dim)
        return KVCache(config.num_hidden_layers, shape, self.head_weight.data, first)

    def loss(self, input_ids: Array, labels: Array, packing: Packing | None = None) -> Tensor:
        """The mean cross-entropy of predicting each label from the tokens before it.

        input_ids: (B, T) integers.
        labels: (B, T), the same ids, -100 for a token that is not scored. They are shifted here, as in Hugging Face:
            position t predicts label t + 1. Logits are computed for scored tokens only, a block at a time.
        packing: of several sequences in the row (B is 1 then); the first own token of each must not be labelled.

        `loss_and_grad` computes the same loss and its gradients, faster and in less memory. Raises ValueError for a
        batch that the model cannot read, or in which no token is scored.
        """
        return self._head_loss(*self._scored_states(input_ids, labels, packing))

    def loss_of_each(self, input_ids: Array, labels: Array, packing: Packing) -> list[Tensor]:
        """The loss of each sequence of a packed row alone, in their order. Each must have a scored label."""
        x, shifted, scored = self._scored_states(input_ids, labels, packing)
        scored = (shifted[0] != fused.NOT_SCORED).nonzero()[0] if scored is None else scored
        spans = packing.own_spans()
        return [self._head_loss(x, shifted, scored[(scored >= start) & (scored < end)]) for start, end in spans]

    def _scored_states(
        self, input_ids: Array, labels: Array, packing: Packing | None
    ) -> tuple[Tensor, Array, Array | None]:
        """The head's arguments: x (B, T, C), the shifted labels (B, T), and the indices of scored ones, if known."""
        input_ids, labels = self.check_batch(input_ids, labels, packing)
        shifted = array_module(labels).full_like(labels, fused.NOT_SCORED)
        shifted[:, :-1] = labels[:, 1:]
        scored = None
        if isinstance(input_ids, np.ndarray) and isinstance(labels, np.ndarray):
            scored = np.flatnonzero(shifted != fused.NOT_SCORED)  # on the host, which would have to wait for a GPU
            input_ids, shifted, scored = to_device_of(self.head_weight.data, input_ids, shifted, scored)
        return self.model(input_ids, packing=packing), shifted, scored

    def _head_loss(self, x: Tensor, shifted: Array, scored: Array | None) -> Tensor:
        if not self.config.tie_word_embeddings and type(self.lm_head) is not Linear:
            return fused.cross_entropy(self.lm_head(x), shifted, scored)  # the head has an adapter
        return fused.linear_cross_entropy(x, self.head_weight, shifted, scored=scored)

    def check_batch(self, input_ids: Array, labels: Array, packing: Packing | None = None) -> tuple[Array, Array]:
        """Return both as integer arrays (B, T); raise ValueError for another shape, length or range."""
        input_ids = self.check_ids(input_ids, packing)
        labels = np.asarray(labels) if isinstance(labels, (list, tuple)) else labels
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels have shape {labels.shape}, input_ids {input_ids.shape}: they must be equal")
        return input_ids, labels

    def check_ids(self, input_ids: Array, packing: Packing | None = None) -> Array:
        """Return `input_ids` as an integer array (B, T); raise ValueError for another shape, dtype, length or range.

        The range is checked on the host only, which would have to wait for a GPU.
        """
        ids = np.asarray(input_ids) if isinstance(input_ids, (list, tuple)) else input_ids
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise ValueError(f"input_ids must be integers of shape (B, T), got {ids.dtype} of shape {ids.shape}")
        if (
            isinstance(ids, np.ndarray)
            and ids.size
            and not (int(ids.min()) >= 0 and int(ids.max()) < self.config.vocab_size)
        ):
            raise ValueError(
                f"input_ids must lie in 0..{self.config.vocab_size - 1}, got {int(ids.min())}..{int(ids.max())}"
            )
        if packing and (len(ids) != 1 or packing.ends[-1] != ids.shape[1]):
            raise ValueError(f"a packing of {packing.ends[-1]} tokens does not describe input_ids of shape {ids.shape}")
        longest = max(packing.positions()) + 1 if packing else ids.shape[1]
        if longest > self.config.max_position_embeddings:
            raise ValueError(
                f"{longest} tokens are more than the {self.config.max_position_embeddings} the model can see"
            )
        return ids


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
