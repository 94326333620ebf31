"""Read and write Llama models as GGUF files, llama.cpp's single-file format.

The `gguf` library reads the container; names, layout and values are converted here. llama.cpp stores the rows of q and
k as adjacent rotary pairs, Hugging Face and minilora store them as halves. Without reordering, the loss is finite and
plausible, and the model is wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.backend import Array, dense, to_numpy
from ..engine.parallel import cores
from ..files.disk import ModelFileError
from ..files.gguf import hugging_face_name, llama_cpp_name, reordered, to_halves, to_pairs, write_gguf
from ..files.gguf_header import read_header
from ..files.quant import BLOCK, BYTES_PER_BLOCK, Packed, dequantize, quantize
from ..nn.llama import Config, Llama, check_claims
from .rounded import load_rounded
from .tokenizer import Tokenizer, from_gguf, tokenizer_metadata

GGUF_KINDS = ("F32", "F16", "Q8_0", "Q4_1")
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_1": 3, "Q8_0": 7}  # llama.cpp's number for the type of most tensors


class GGUF:
    """An open GGUF file: `metadata`, `fields` (with types), and `tensors` as stored, by Hugging Face name."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        header = read_header(self.path)
        self.fields = header.fields
        self.metadata: dict[str, Any] = {key: field.value for key, field in self.fields.items()}
        self.tensors = {hugging_face_name(tensor.name): tensor for tensor in header.tensors}
        unknown = sorted({tensor.kind for tensor in self.tensors.values()} - set(BYTES_PER_BLOCK))
        if unknown:
            raise ModelFileError(
                f"{self.path}: unknown quantisation type {', '.join(unknown)}; "
                f"minilora reads {', '.join(BYTES_PER_BLOCK)}"
            )

    def config(self) -> Config:
        """The model's shape. Raises ModelFileError for another architecture, or missing or invalid metadata."""
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama":
            raise ModelFileError(f"{self.path}: architecture is {architecture!r}, minilora reads 'llama'")
        try:
            heads = int(self._value("attention.head_count"))
            return Config(
                vocab_size=int(self.tensors["model.embed_tokens.weight"].shape[0]),
                hidden_size=int(self._value("embedding_length")),
                intermediate_size=int(self._value("feed_forward_length")),
                num_hidden_layers=int(self._value("block_count")),
                num_attention_heads=heads,
                num_key_value_heads=int(self.metadata.get("llama.attention.head_count_kv", heads)),
                head_dim=int(self.metadata.get("llama.rope.dimension_count", 0)),
                max_position_embeddings=int(self._value("context_length")),
                rms_norm_eps=float(f"{self._value('attention.layer_norm_rms_epsilon'):.6g}"),  # 9.99999975e-06 -> 1e-05
                rope_theta=float(self.metadata.get("llama.rope.freq_base", 10000.0)),
                tie_word_embeddings="lm_head.weight" not in self.tensors,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFileError(f"{self.path}: invalid metadata: {error}") from error

    def _value(self, key: str) -> Any:
        full = f"llama.{key}"
        if full not in self.metadata:
            raise KeyError(f"{full} is missing")
        return self.metadata[full]

    def weight(self, name: str, config: Config, quantized: bool = False) -> np.ndarray | Packed:
        """One tensor in Hugging Face's layout: a new float32 array; with `quantized`, a quantised matrix as stored."""
        tensor = self.tensors[name]
        raw, kind = tensor.raw(), tensor.kind
        raw = reordered(to_halves, name, raw, config.num_attention_heads, config.num_key_value_heads)  # whole rows
        if quantized and kind.startswith("Q"):
            return Packed(raw, kind)
        return dequantize(raw, kind).reshape(tensor.shape)

    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer. Raises ModelFileError for a kind other than byte-level BPE."""
        return from_gguf(self.path, self.metadata)

    def load(self, quantized: bool = False, kind: str | None = None) -> Llama:
        """The whole model, in float32 and trainable.

        quantized: keep quantised matrices as they are stored, frozen.
        kind: quantise all matrices to this kind, such as "NF4", however the file stores them.

        Raises ModelFileError if the tensors do not fit the shape, or if there is no quantised matrix to keep.
        """
        from concurrent.futures import ThreadPoolExecutor

        config = self.config()
        if quantized and not any(t.kind.startswith("Q") for t in self.tensors.values()):
            kinds = ", ".join(sorted({t.kind for t in self.tensors.values()}))
            raise ModelFileError(
                f"{self.path}: the file holds no quantised matrices, only {kinds}: load it without quantized, or with "
                "a kind, such as nf4"
            )
        try:
            check_claims(config, {name: t.shape for name, t in self.tensors.items()})
            if kind is not None:
                return load_rounded(config, self.tensors, lambda name: self.weight(name, config), kind)
            with ThreadPoolExecutor(cores()) as pool:  # unpacking releases the GIL
                weights = pool.map(lambda name: self.weight(name, config, quantized), self.tensors)
                state = dict(zip(self.tensors, weights, strict=True))
            model = Llama.empty(config)
            model.load_state_dict(state)
        except ValueError as error:  # not ModelFileError alone: the heads may not divide the rows
            raise ModelFileError(f"{self.path}: {error}") from error
        return model


# -- writing -----------------------------------------------------------------------------------------------------------


def save_gguf(
    path: str | Path,
    config: Config,
    state: Mapping[str, Array],
    tokenizer: Tokenizer,
    kind: str = "F16",
    source: GGUF | None = None,
    unchanged: Collection[str] = (),
) -> Path:
    """Write a model as a GGUF file and return the path. The file appears whole or not at all.

    path: of the file.
    config, state, tokenizer: the model's shape, its arrays by name, and its tokenizer.
    kind: how matrices are stored, one of GGUF_KINDS. Norms are F32. A matrix whose rows are not a multiple of the block
        size becomes F16, as in llama.cpp.
    source: the file that the model was loaded from; its metadata are copied.
    unchanged: names of tensors that are as in `source`. If `kind` is quantised, their quantised blocks are copied,
        because quantising them again would lose precision.

    Raises ModelFileError for a tokenizer that a GGUF file cannot express, ValueError for values too large for `kind`.
    """
    path = Path(path)
    tensors: dict[str, tuple[np.ndarray, str]] = {}
    for name, array in state.items():
        stored = source.tensors[name] if source is not None and name in unchanged else None
        if stored is not None and kind.startswith("Q") and stored.kind.startswith("Q"):
            tensors[llama_cpp_name(name)] = (stored.raw(), stored.kind)
            continue
        w = in_pairs(name, to_numpy(dense(array)), config)
        own = kind_of(w, kind, name)
        try:
            packed = w.astype(np.float32, copy=False) if w.ndim == 1 else quantize(w, own)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        tensors[llama_cpp_name(name)] = (packed, own)
    description: dict[str, Any] = {"general.architecture": "llama", "general.type": "model"}
    if source is None:
        description |= _shape_metadata(config) | tokenizer_metadata(tokenizer, config.vocab_size)
    else:
        anew = ("general.architecture", "general.alignment")
        description |= {key: field for key, field in source.fields.items() if key not in anew}
    description |= {"general.file_type": _FILE_TYPES[kind], "general.quantization_version": 2}
    write_gguf(path, description, tensors)
    return path


def in_pairs(name: str, w: np.ndarray, config: Config) -> np.ndarray:
    """A tensor in llama.cpp's layout: the rows of q and k as adjacent rotary pairs, other tensors unchanged."""
    return reordered(to_pairs, name, w, config.num_attention_heads, config.num_key_value_heads)


def kind_of(w: np.ndarray, kind: str, name: str = "") -> str:
    """The kind in which `save_gguf` stores this array, if matrices are stored as `kind`.

    With Q4_1 the embedding and the head become Q8_0, because every token's score depends on them.
    """
    if w.ndim == 1:
        return "F32"
    if kind.startswith("Q") and w.shape[1] % BLOCK:
        return "F16"
    return "Q8_0" if kind == "Q4_1" and name in ("model.embed_tokens.weight", "lm_head.weight") else kind


def _shape_metadata(config: Config) -> dict[str, Any]:
    return {
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_theta),
    }
