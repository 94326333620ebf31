"""What every language model has, whatever its blocks: logits, a loss that never holds all logits, a KV cache, checks.

A family defines its config, its blocks and a decoder, and derives its class from `LanguageModel`: `Llama`, `GPT2`,
`Gemma3`. Everything else (training, adapters, generation, memory) is written for a `LanguageModel`.

Shapes: B batch, T tokens, C width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from ..engine import fused, ops
from ..engine.attention import Packing, attention
from ..engine.backend import Array, array_module
from ..engine.recompute import recomputed
from ..engine.tensor import Tensor
from .cache import KVCache
from .layers import Embedding, Linear
from .module import Module, check_module, computes_as


class LanguageModel(Module):
    """A language model: logits of the next token, and the loss of a labelled text.

    Its weights are random; seed is a number or a generator, and the same seed gives the same weights.
    `empty(config)` has zeros instead, to load weights into: they take neither time nor memory.

    A family's class says which module its decoder is, and the names that Hugging Face gives to the decoder and to the
    embedding in it. The head is the embedding's table if `config.tie_word_embeddings`, otherwise `lm_head`. A config
    has at least vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
    max_position_embeddings and tie_word_embeddings.
    """

    decoder_class: Callable[..., Module]  # from token ids (B, T) to vectors (B, T, C); its `recompute`: checkpointing
    decoder_name = "model"
    embedding_name = "embed_tokens"

    source: str | None = None  # the argument of `minilora.load` that it was loaded with: "smollm2", a path
    data: Mapping[str, Any] = MappingProxyType({})  # what the whole model was fine-tuned on: see lora/provenance.py
    revision: str | None = None  # of a model that was loaded by its name on Hugging Face
    hub_name: str | None = None  # its name on Hugging Face, if known: for PEFT
    rounded_to: str | None = None  # the kind that its matrices were rounded to when it was loaded: "nf4"
    unrounded_sha256: str | None = None  # of a rounded model: its fingerprint before rounding
    config: Any
    lm_head: Linear

    def __init__(self, config: Any, seed: int | np.random.Generator = 0):
        self._build(config, np.random.default_rng(seed))

    @classmethod
    def empty(cls, config: Any) -> Self:
        """A model whose matrices are zero, for `load_state_dict` or for counting."""
        model = cls.__new__(cls)
        model._build(config, None)
        return model

    def _build(self, config: Any, rng: np.random.Generator | None) -> None:
        if not hasattr(config, "vocab_size"):
            raise TypeError(f"expected a minilora.Config or another family's config, got a {type(config).__name__}")
        self.config = config
        setattr(self, self.decoder_name, self.decoder_class(config, rng))
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, rng=rng)

    @classmethod
    def claims(cls, config: Any) -> dict[str, tuple[int, ...]]:
        """The shapes of a few tensors, which show every size of the config: see `families.check_claims`."""
        C, D, F = config.hidden_size, config.head_dim, config.intermediate_size
        return {
            "model.embed_tokens.weight": (config.vocab_size, C),
            "model.layers.0.self_attn.q_proj.weight": (config.num_attention_heads * D, C),
            "model.layers.0.self_attn.k_proj.weight": (config.num_key_value_heads * D, C),
            "model.layers.0.mlp.gate_proj.weight": (F, C),
        }

    @property
    def decoder(self) -> Any:
        """The module from token ids (B, T) to vectors (B, T, C). Its `recompute` switches checkpointing on."""
        return getattr(self, self.decoder_name)

    @property
    def embedding(self) -> Embedding:
        """The module from token ids to the vectors that the blocks start with."""
        return getattr(self.decoder, self.embedding_name)

    @property
    def head_weight(self) -> Tensor:
        """The output embedding (V, C): the input embedding itself if the two are tied."""
        return self.embedding.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, input_ids: Array, cache: KVCache | None = None, last: bool = False) -> Tensor:
        """Logits: input_ids (B, T) -> (B, T, V), or (B, 1, V) of the last token only, if `last`."""
        input_ids = self.check_ids(input_ids, cache=cache)
        input_ids = array_module(self.head_weight.data).asarray(input_ids)
        x = self.decoder(input_ids, cache)  # (B, T, C)
        x = x[:, -1:] if last else x
        return fused.linear(x, self.head_weight) if self.config.tie_word_embeddings else self.lm_head(x)

    def new_cache(
        self, rows: int, capacity: int, first: Array | None = None, beginning: KVCache | None = None
    ) -> KVCache:
        """An empty KV cache for `forward`, with room for `capacity` tokens in each row.

        first, beginning: as for `KVCache`.
        """
        config = self.config
        shape = (rows, capacity, config.num_key_value_heads, config.head_dim)
        return KVCache(config.num_hidden_layers, shape, self.head_weight.data, first, beginning)

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
        """The head's arguments: x (B, T, C), the shifted labels (B, T), and the indices of scored ones, if known. Of a
        model with a hook or its own `forward`, x are its logits.
        """
        input_ids, labels = self.check_batch(input_ids, labels, packing)
        shifted = fused.next_labels(labels)
        scored = None
        if isinstance(input_ids, np.ndarray) and isinstance(labels, np.ndarray):
            scored = np.flatnonzero(shifted != fused.NOT_SCORED)  # on the host, which would have to wait for a GPU
            xp = array_module(self.head_weight.data)
            input_ids, shifted, scored = (xp.asarray(x) for x in (input_ids, shifted, scored))
        x = self.decoder(input_ids, packing=packing) if self.computes_plainly else self._logits(input_ids, packing)
        return x, shifted, scored

    @property
    def computes_plainly(self) -> bool:
        """Whether its output is the head of its decoder's, with no hook on it and no `forward` of a subclass."""
        return computes_as(self, LanguageModel)

    def _logits(self, input_ids: Array, packing: Packing | None) -> Tensor:
        """Logits (B, T, V) of the model as it is called, for each sequence of a packed row alone."""
        if packing is None:
            return self(input_ids)
        xp, parts = array_module(input_ids), list[Tensor]()
        for start, end in packing.own_spans():
            row = xp.concatenate([input_ids[:, : packing.prefix], input_ids[:, start:end]], axis=1)
            parts.append(self(row)[:, packing.prefix if parts else 0 :])  # with the first, those of the prefix as well
        return ops.concatenate(*parts, axis=1)

    def _head_loss(self, x: Tensor, shifted: Array, scored: Array | None) -> Tensor:
        if not self.computes_plainly:
            return fused.cross_entropy(x, shifted, scored)
        if not self.config.tie_word_embeddings and not computes_as(self.lm_head, Linear):
            return fused.cross_entropy(self.lm_head(x), shifted, scored)  # the head has an adapter or a hook
        return fused.linear_cross_entropy(x, self.head_weight, shifted, scored=scored)

    def check_batch(self, input_ids: Array, labels: Array, packing: Packing | None = None) -> tuple[Array, Array]:
        """Return both as integer arrays (B, T); raise ValueError for another shape, dtype, length or range, or if the
        first own token of a packed sequence has a label.
        """
        input_ids, labels = self.check_ids(input_ids, packing), _without_graph(labels)
        if (shape := np.shape(labels)) != input_ids.shape:
            raise ValueError(f"labels have shape {shape}, input_ids {input_ids.shape}: they must be equal")
        labels = self._integers(labels, "labels", fused.NOT_SCORED)
        if packing and isinstance(labels, np.ndarray):
            starts = [start for start, end in packing.own_spans() if 0 < start < end]
            if wrong := [start for start in starts if labels[0, start] != fused.NOT_SCORED]:
                raise ValueError(
                    f"the packed sequence that begins at {wrong[0]} has a label for its first token, which a token of "
                    "another sequence would predict: make it -100"
                )
        return input_ids, labels

    def check_ids(self, input_ids: Array, packing: Packing | None = None, cache: KVCache | None = None) -> Array:
        """Return `input_ids` as an integer array (B, T); raise ValueError for another shape, dtype, length or range."""
        ids = self._integers(input_ids, "input_ids")
        if packing and (len(ids) != 1 or packing.ends[-1] != ids.shape[1]):
            raise ValueError(f"a packing of {packing.ends[-1]} tokens does not describe input_ids of shape {ids.shape}")
        if cache and len(ids) != cache.batch:
            raise ValueError(f"the cache has {cache.batch} rows, input_ids have {len(ids)}: make a new_cache for these")
        longest = max(packing.positions()) + 1 if packing else ids.shape[1] + (cache.longest if cache else 0)
        if longest > (limit := self.config.max_position_embeddings):
            raise ValueError(f"{longest} tokens are more than the {limit} the model can see")
        return ids

    def _integers(self, values: Any, name: str, not_scored: int | None = None) -> Array:
        """Token ids as an array (B, T) of signed integers; not_scored: a value that is allowed besides them.

        The range is checked on the host only, which would have to wait for a GPU.
        """
        values = _without_graph(values)
        is_array = hasattr(getattr(values, "dtype", None), "kind")  # a list is none, nor is a tensor of torch
        try:
            ids = values if is_array else np.asarray(values)
        except ValueError:  # NumPy's does not name them
            raise ValueError(f"{name} must have rows of one length: pad them, as collate does samples") from None
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
            raise ValueError(f"{name} must be integers of shape (B, T), got {ids.dtype} of shape {ids.shape}")
        ids = ids if ids.dtype.kind == "i" else ids.astype(np.int64)  # which -100 fits into
        if isinstance(ids, np.ndarray):
            tokens, most = ids if not_scored is None else ids[ids != not_scored], self.config.vocab_size - 1
            least, largest = (int(tokens.min()), int(tokens.max())) if tokens.size else (0, 0)
            if least < 0 or largest > most:
                besides = "" if not_scored is None else f", or be {not_scored} where nothing is scored"
                raise ValueError(f"{name} must lie in 0..{most}{besides}, got {least}..{largest}")
        return ids


def _without_graph(values: Any) -> Any:
    return values.data if isinstance(values, Tensor) else values


@dataclass
class Context:
    """What every block needs besides its input: the KV cache, and the packing of sequences into a row."""

    cache: KVCache | None
    packing: Packing | None


def attend(q: Tensor, k: Tensor, v: Tensor, context: Any, layer: int, **settings: Any) -> Tensor:
    """`attention` of q (B, T, H, D) over k and v (B, T, K, D), and over those of earlier tokens in the KV cache, which
    has no gradient: the backward pass raises ValueError.

    context: has cache and packing. layer: the block's number, for the cache. settings: of `attention`.
    """
    if (cache := context.cache) is None:
        return attention(q, k, v, packing=context.packing, **settings)
    keys, values = cache.extend(layer, k.data, v.data)
    beginning = cache.shared(layer) or (keys[:1, :0], values[:1, :0])  # with one, attention refuses a backward pass
    known = Tensor(keys, node=k.node), Tensor(values, node=v.node)
    return attention(q, *known, first=cache.first, beginning=beginning, **settings)


def through_blocks(blocks: Sequence[Module], x: Tensor, context: Any, recompute: bool = False) -> Tensor:
    """x (B, T, C) after all blocks, (B, T, C). The KV cache of the context, if it has one, grows by T tokens.

    blocks: each is called with x, the context and its own number.
    recompute: activation checkpointing: save only each block's input, see engine/recompute.py.
    """
    for i, layer in enumerate(blocks):
        block = partial(layer, context=context, layer=i)
        x = recomputed(block, x) if recompute else block(x)
    if context.cache is not None:
        context.cache.length += x.shape[1]
    return x


def positions_of(input_ids: Array, cache: KVCache | None, packing: Packing | None) -> Array:
    """Each token's position in its own sequence, (1 or B, T) integers: after the cached ones, or as in the packing.

    Padding on the left has position 0.
    """
    input_ids = Tensor(input_ids).data  # a decoder may be given a list
    xp = array_module(input_ids)
    if packing is not None:
        return xp.concatenate([xp.arange(p.start, p.stop) for p in packing.ranges()])[None]  # (1, T)
    before, start = (0, 0) if cache is None else (cache.before, cache.length)
    positions = xp.arange(start, start + input_ids.shape[1])[None]  # (1, T)
    if cache is not None and cache.first is not None:
        positions = xp.maximum(positions - cache.first[:, None], 0)  # (B, T)
    return before + positions


def rotary_angles(positions: Array, frequencies: Array, dtype: Any) -> tuple[Array, Array]:
    """cos and sin of position × frequency, each (1 or B, T, 1, D/2), computed in float64 and rounded once.

    positions: (1 or B, T). frequencies: (D/2). dtype: of the results.
    """
    xp = array_module(positions)
    angles = (positions[..., None] * frequencies)[:, :, None]  # (1 or B, T, 1, D/2)
    return xp.cos(angles).astype(dtype), xp.sin(angles).astype(dtype)


def check_language_model(model: Any, what: str) -> None:
    """Raise TypeError for anything but a language model. what: the name of the function that needs one."""
    check_module(model)
    if not isinstance(model, LanguageModel):
        raise TypeError(
            f"{what} needs a language model, such as ml.Llama, got a {type(model).__name__}: call another module "
            "itself, and train it in a loop of your own, with optimizer.zero_grad(), loss.backward(), optimizer.step()"
        )


def check_heads(config: Any) -> None:
    """Raise ValueError unless query heads share key/value heads evenly, and heads can be rotated in pairs."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"{config.num_attention_heads} query heads cannot share {config.num_key_value_heads} key/value heads evenly"
        )
    if config.head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary positions, got {config.head_dim}")


def check_positive(config: Any, kind: type[int] | type[float], *names: str) -> None:
    """Raise ValueError unless these fields of a config are positive: integers, or finite numbers for float."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int if kind is int else (int, float)) or not 0 < value < math.inf:
            expected = "integer" if kind is int else "number"
            raise ValueError(f"{name} must be a positive {expected}, got {value!r}")
