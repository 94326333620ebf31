"""What a family of models is: which class computes it, and how its files name and lay out what is in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..engine.backend import Array, dense
from ..files.gguf import to_halves, to_pairs
from .language_model import LanguageModel

REQUIRED: Any = object()
_BUFFER = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")  # computed, not trained


@dataclass(frozen=True)
class Field:
    """A field of a config, and where the files have it.

    name: of the config's field.
    json: its key in config.json.
    gguf: its key in GGUF metadata, without the architecture before it; "" if it has none there.
    default, gguf_default: its value where one of the files has none; a function gets what was read before it. Without
        a default it is required.
    """

    name: str
    json: str
    gguf: str = ""
    default: Any = REQUIRED
    gguf_default: Any = REQUIRED

    def read(self, found: Mapping[str, Any], before: Mapping[str, Any], gguf: bool = False) -> Any:
        """Its value in config.json, or in metadata. Raises KeyError if it is missing."""
        key, default = (self.gguf, self.gguf_default) if gguf else (self.json, self.default)
        if key not in found and default is REQUIRED:
            raise KeyError(key)
        return found[key] if key in found else default(before) if callable(default) else default


@dataclass(frozen=True)
class Family:
    """One architecture.

    model_type, class_name: in config.json, and transformers' class.
    gguf: llama.cpp's name of the architecture.
    model, config: the class that computes it, and that of its config.
    fields: of the config, that files have.
    always: of the config, that all models of this family have.
    only: keys of config.json that would change the result, with the values that minilora computes; a list may hold any.
    assumed: what transformers assumes where `config.json` lacks a key, and not where the key is null.
    ignored: keys of config.json that do not change the result, besides those of all families.
    from_json: rewrites what config.json says in another form, as fields. to_json: the inverse, from a config.
    gguf_only: as `only`, for metadata.
    to_gguf: more metadata, from a config. Raises ValueError for a model that llama.cpp cannot compute.
    tensors: llama.cpp's name of every tensor, without its ending, and Hugging Face's; {} is the block's number.
    permuted: whether llama.cpp stores the rows of q and k as adjacent rotary pairs instead of halves.
    norm_offset: what llama.cpp has added to the weights of norms.
    transposed: endings of the matrices that Hugging Face stores as (inputs, outputs).
    prefix: of Hugging Face's names, where some checkpoints leave it out.
    """

    model_type: str
    class_name: str
    gguf: str
    model: type[LanguageModel]
    config: type[Any]
    fields: tuple[Field, ...]
    tensors: Mapping[str, str]
    permuted: bool = False
    always: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple] = field(default_factory=dict)
    assumed: Mapping[str, Any] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    from_json: Callable[[dict[str, Any]], dict[str, Any]] = dict
    to_json: Callable[[Any], dict[str, Any]] = lambda config: {}
    gguf_only: Mapping[str, tuple] = field(default_factory=dict)
    to_gguf: Callable[[Any], dict[str, Any]] = lambda config: {}
    norm_offset: float = 0.0
    transposed: tuple[str, ...] = ()
    prefix: str = ""

    # -- names and layout of tensors ----------------------------------------------------------------------------------
    def hugging_face_name(self, name: str) -> str:
        """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. An unknown name is returned unchanged."""
        return _translated(name, self.tensors) or name

    def llama_cpp_name(self, name: str) -> str:
        """The inverse of `hugging_face_name`. Raises KeyError for an unknown name."""
        found = _translated(name, {theirs: own for own, theirs in self.tensors.items()})
        if found is None:
            raise KeyError(name)
        return found

    def to_llama_cpp(self, name: str, w: Array, config: Any) -> Array:
        """A tensor (m, ...), or LoRA's B of a matrix, in llama.cpp's layout. name: Hugging Face's."""
        if self.norm_offset and name.endswith("norm.weight"):
            return w + self.norm_offset
        return self._reordered(to_pairs, name, w, config)

    def from_llama_cpp(self, name: str, w: Array, config: Any) -> Array:
        """The inverse of `to_llama_cpp`; w may also be the packed rows of a matrix."""
        if self.norm_offset and name.endswith("norm.weight"):
            return w - self.norm_offset
        return self._reordered(to_halves, name, w, config)

    def _reordered(self, layout: Callable[[Array, int], Array], name: str, w: Array, config: Any) -> Array:
        """The rows of a q or k projection in another layout, if llama.cpp has another one; any other w unchanged."""
        rows = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        kind = name.removesuffix(".weight").rpartition(".")[2]
        return layout(w, rows[kind]) if self.permuted and kind in rows else w

    # -- Hugging Face's checkpoints -----------------------------------------------------------------------------------
    def from_hugging_face(self, state: Mapping[str, Array]) -> dict[str, Array]:
        """A checkpoint's parameters by their whole names, every matrix as (outputs, inputs). Buffers are left out."""
        own = {name: w for name, w in state.items() if not _BUFFER.search(name)}
        if not any(name.startswith(self.prefix) for name in own):
            own = {name if name.startswith("lm_head.") else f"{self.prefix}{name}": w for name, w in own.items()}
        return {name: w.T if name.endswith(self.transposed) else w for name, w in own.items()}

    def to_hugging_face(self, state: Mapping[str, Array]) -> dict[str, Array]:
        """The arrays of a model as a checkpoint has them."""
        return {name: dense(w).T if name.endswith(self.transposed) else w for name, w in state.items()}


def _translated(name: str, table: Mapping[str, str]) -> str | None:
    stem, _, ending = name.rpartition(".")
    number = re.search(r"(?<=\.)\d+(?=\.)", stem)
    found = table.get(stem.replace(f".{number[0]}.", ".{}.", 1) if number else stem)
    return None if found is None else f"{found.format(number[0] if number else '')}.{ending}"
