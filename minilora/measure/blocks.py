"""What one block of each family is made of, as far as memory is concerned: its operations in their order.

Each operation's docstring says what it saves for the backward pass; here are its numbers of values per token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..nn.gemma3 import Gemma3Config
from ..nn.gpt2 import GPT2Config


@dataclass(frozen=True)
class Saves:
    """An operation that saves `values` values per token if a gradient flows to it.

    again: linear layers after it compute its value again instead of saving it.
    parameters: how many it has.
    """

    operation: str
    values: int
    again: bool = False
    parameters: int = 0


@dataclass(frozen=True)
class Linears:
    """Linear layers that read the same input, `width` values per token. outputs: of each, by its name.

    bias: whether they have one.
    saved: the names of those whose output the operation after them saves.
    """

    width: int
    outputs: Mapping[str, int]
    bias: bool = False
    saved: Collection[str] = ()

    @property
    def parameters(self) -> int:
        return sum(self.outputs.values()) * (self.width + self.bias)


Part = Saves | Linears


def block_of(config: Any, layer: int = 0) -> list[Part]:
    """The operations of a block of a model with this config; those that save nothing are left out."""
    if isinstance(config, GPT2Config):
        return _gpt2(config)
    C, F, H, K = (
        config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads,
    )  # fmt: skip
    heads, keys, gemma = H * config.head_dim, K * config.head_dim, isinstance(config, Gemma3Config)
    bias, normed = getattr(config, "attention_bias", False), gemma or config.qk_norm
    norm = Saves("rms_norm", C + 1, again=True, parameters=C)  # x and one value
    # A sum with a bias, and what rope has rotated, are other arrays than the output that is saved with DoRA.
    interval = getattr(config, "no_rope_layer_interval", 0)
    rotated = not normed and (not interval or (layer + 1) % interval)
    saved = () if bias else ("v_proj",) if rotated else ("q_proj", "k_proj", "v_proj")
    qkv = Linears(C, {"q_proj": heads, "k_proj": keys, "v_proj": keys}, bias, saved)
    before_norm = ("o_proj", "down_proj") if gemma else ()
    of_heads = [Saves("rms_norm", heads + keys + H + K, parameters=2 * config.head_dim)]  # q, k and one value per head
    return [
        norm,
        qkv,
        *(of_heads if normed else []),
        Saves("attention", heads + 2 * keys + H),  # q, k, v, and one value per head
        Linears(heads, {"o_proj": C}, saved=before_norm),
        *([norm, norm] if gemma else [norm]),
        Linears(C, {"gate_proj": F, "up_proj": F}, saved=("gate_proj", "up_proj")),
        Saves("geglu" if gemma else "swiglu", 2 * F, again=True),
        Linears(F, {"down_proj": C}, saved=before_norm),
        *([norm] if gemma else []),
    ]


def _gpt2(config: GPT2Config) -> list[Part]:
    C, F = config.hidden_size, config.intermediate_size
    norm = Saves("layer_norm", C + 2, again=True, parameters=2 * C)
    return [
        norm,
        Linears(C, {"c_attn": 3 * C}, bias=True),
        Saves("attention", 3 * C + config.num_attention_heads),
        Linears(C, {"attn.c_proj": C}, bias=True),
        norm,
        Linears(C, {"c_fc": F}, bias=True),
        Saves("gelu", F, again=True),
        Linears(F, {"mlp.c_proj": C}, bias=True),
    ]


def matrices(config: Any) -> list[tuple[str, int, int]]:
    """(name, outputs, inputs) of every matrix of a block. A name that occurs twice there has its module's before it."""
    layers = [part for part in block_of(config) if isinstance(part, Linears)]
    return [(name, m, part.width) for part in layers for name, m in part.outputs.items()]


def names_of(config: Any) -> tuple[str, ...]:
    """The names of the modules of a block that have a matrix: what "all-linear" adapts."""
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name, _, _ in matrices(config)))
