"""Read and write models as GGUF files, llama.cpp's single-file format.

files/gguf.py reads and writes the container; names, layout and values are converted here. For Llama and some of its
relatives llama.cpp stores the rows of q and k as adjacent rotary pairs, Hugging Face and minilora store them as halves.
Without reordering, the loss is finite and plausible, and the model is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.backend import Array, dense, to_numpy
from ..engine.parallel import cores
from ..files.disk import ModelFileError
from ..files.gguf import write_gguf
from ..files.gguf_header import read_header
from ..files.quant import BLOCK, Packed, quantize
from ..files.stored import is_quantised, stays_packed, values_of
from ..lora.provenance import DATA_KEY
from ..nn.families import (
    ARCHITECTURES,
    FAMILIES,
    ROPE_DIVISORS,
    TABLES,
    as_llama_cpp_has_it,
    check_claims,
    config_from_gguf,
    config_to_gguf,
    empty_model,
)
from ..nn.language_model import LanguageModel
from ..progress import log
from .gguf_tokenizer import from_gguf, tokenizer_metadata
from .rounded import load_rounded
from .tokenizer import Tokenizer

GGUF_KINDS = ("F32", "F16", "Q8_0", "Q4_1")
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_1": 3, "Q8_0": 7}  # llama.cpp's number for the type of most tensors


class GGUF:
    """An open GGUF file: `metadata`, `fields` (with types), and `tensors` as stored, by Hugging Face name."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        header = read_header(self.path)
        self.fields = header.fields
        self.metadata: dict[str, Any] = {key: field.value for key, field in self.fields.items()}
        self.family = ARCHITECTURES.get(str(self.metadata.get("general.architecture")), FAMILIES["llama"])
        self.tensors = {self.family.hugging_face_name(tensor.name): tensor for tensor in header.tensors}

    def config(self) -> Any:
        """The model's config. Raises ModelFileError for another architecture, or missing or invalid metadata."""
        if (kind := self.metadata.get("general.type", "model")) != "model":
            instead = (
                "give it with --adapter, and its base with --base" if kind == "adapter" else "get the model's file"
            )
            raise ModelFileError(f"{self.path}: general.type is {kind!r}, expected 'model': {instead}")
        divisors = self.tensors.get(ROPE_DIVISORS)
        try:
            shapes = {tensor.name: tensor.shape for tensor in self.tensors.values()}
            return config_from_gguf(self.metadata, shapes, None if divisors is None else values_of(divisors))
        except (TypeError, ValueError, OverflowError) as error:
            raise ModelFileError(f"{self.path}: invalid metadata: {error}") from error

    def weight(self, name: str, config: Any, quantized: bool = False) -> np.ndarray | Packed:
        """One tensor in Hugging Face's layout: a new float32 array; with `quantized`, a quantised matrix as stored."""
        tensor = self.tensors[name]
        if quantized and stays_packed(tensor):
            return Packed(self.family.from_llama_cpp(name, tensor.raw(), config), tensor.kind)  # whole rows
        return self.family.from_llama_cpp(name, values_of(tensor), config)

    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer. Raises ModelFileError for a kind that gguf_tokenizer.py does not know."""
        return from_gguf(self.path, self.metadata)

    def load(self, quantized: bool = False, kind: str | None = None) -> LanguageModel:
        """The whole model, in float32 and trainable.

        quantized: keep quantised matrices as they are stored, frozen, if they are of one of quant.PACKED. Others become
            float32, which the log says.
        kind: quantise all matrices to this kind, such as "NF4", but those that the file stores in it stay as they are.

        Raises ModelFileError if the tensors do not fit the shape, or if there is no quantised matrix to keep.
        """
        from concurrent.futures import ThreadPoolExecutor

        config = self.config()
        if quantized:
            self._check_packed()
        shapes = {name: t.shape for name, t in self.tensors.items() if name != ROPE_DIVISORS}
        try:
            check_claims(config, shapes)
            if kind is not None:
                return load_rounded(config, shapes, lambda name: self.weight(name, config, True), kind)
            with ThreadPoolExecutor(cores()) as pool:  # unpacking releases the GIL
                weights = pool.map(lambda name: self.weight(name, config, quantized), shapes)
                state = dict(zip(shapes, weights, strict=True))
            model = empty_model(config)
            model.load_state_dict(state)
        except ValueError as error:  # not ModelFileError alone: the heads may not divide the rows
            raise ModelFileError(f"{self.path}: {error}") from error
        return model

    def _check_packed(self) -> None:
        matrices = [tensor for tensor in self.tensors.values() if len(tensor.shape) == 2]
        widened = [tensor.kind for tensor in matrices if is_quantised(tensor) and not stays_packed(tensor)]
        if not any(map(stays_packed, matrices)):
            kinds = ", ".join(sorted({tensor.kind for tensor in self.tensors.values()}))
            raise ModelFileError(
                f"{self.path}: the file holds no quantised matrices that can stay so in memory, only {kinds}: leave "
                "--quantized (quantized=True) out, or give it a kind, such as nf4"
            )
        if widened:
            log.warning(
                "%s: %d of %d matrices become float32, because minilora does not keep %s in memory: get the file in "
                "Q4_K_M, or give --quantized a kind, such as nf4",
                self.path, len(widened), len(matrices), ", ".join(sorted(set(widened))),
            )  # fmt: skip


# -- writing -----------------------------------------------------------------------------------------------------------


def save_gguf(
    path: str | Path,
    config: Any,
    state: Mapping[str, Array],
    tokenizer: Tokenizer,
    kind: str = "F16",
    source: GGUF | None = None,
    unchanged: Collection[str] = (),
    data: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model as a GGUF file and return the path. The file appears whole or not at all.

    config, state, tokenizer: the model's shape, its arrays by name, and its tokenizer.
    kind: how matrices are stored, one of GGUF_KINDS. Norms are F32. A matrix whose rows are not a multiple of the block
        size becomes F16, as in llama.cpp.
    source: the file that the model was loaded from; its metadata are copied.
    unchanged: names of tensors that are as in `source`. If `kind` is quantised, their quantised blocks are copied,
        because quantising them again would lose precision.
    data: what the model was trained on; minilora reads it again.

    Raises ModelFileError for a tokenizer that a GGUF file cannot express, ValueError for values too large for `kind`.
    """
    path = Path(path)
    state = as_llama_cpp_has_it(config, state)
    family = FAMILIES[config.model_type]
    metadata, computed = config_to_gguf(config)
    if (length := metadata[f"{family.gguf}.context_length"]) < config.max_position_embeddings:
        log.warning("llama.cpp has no sliding window for this model: the context of the file is %d tokens", length)
    tensors = {name: (w, "F32") for name, w in computed.items()}
    for name, array in state.items():
        stored = source.tensors[name] if source is not None and name in unchanged else None
        if stored is not None and kind.startswith("Q") and is_quantised(stored):
            tensors[family.llama_cpp_name(name)] = (stored.raw(), stored.kind)
            continue
        w = family.to_llama_cpp(name, to_numpy(dense(array)), config)
        own = kind_of(w, kind, name)
        try:
            packed = w.astype(np.float32, copy=False) if w.ndim == 1 else quantize(w, own)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        tensors[family.llama_cpp_name(name)] = (packed, own)
    if kind.startswith("Q") and (odd := [name for name, (_, own) in tensors.items() if own == "F16"]):
        log.warning("%d matrices become F16, not %s: their rows are not a multiple of %d", len(odd), kind, BLOCK)
    if source is None:
        metadata |= tokenizer_metadata(tokenizer, config.vocab_size)
    else:
        anew = ("general.architecture", "general.alignment", DATA_KEY)
        metadata = {key: metadata[key] for key in ("general.architecture", "general.type")}
        metadata |= {key: field for key, field in source.fields.items() if key not in anew}
        metadata["tokenizer.chat_template"] = tokenizer.template  # the file may have none, and the adapter another one
    metadata |= {"general.file_type": _FILE_TYPES[kind], "general.quantization_version": 2}
    if data:
        metadata[DATA_KEY] = json.dumps(data)
    write_gguf(path, metadata, tensors)
    return path


def kind_of(w: np.ndarray, kind: str, name: str = "") -> str:
    """The kind in which `save_gguf` stores this array, if matrices are stored as `kind`.

    With Q4_1 the embedding and the head become Q8_0, because every token's score depends on them.
    """
    if w.ndim == 1:
        return "F32"
    if kind.startswith("Q") and w.shape[1] % BLOCK:
        return "F16"
    return "Q8_0" if kind == "Q4_1" and name in TABLES else kind
