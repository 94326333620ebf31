"""Load a Llama model from a GGUF file, llama.cpp's single-file format.

The `gguf` library reads the container; names, layout and numbers are put right here. The trap: llama.cpp stores the
rows of q and k as adjacent rotary pairs, Hugging Face (and minilora) as halves. Forgetting to reorder them gives a
finite, plausible loss and a model that is wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..engine.parallel import cores
from ..nn.ggufile import Field, hugging_face_name, open_gguf, read_raw
from ..nn.llama import Config, Llama, check_claims, to_halves
from ..nn.quant import BYTES_PER_BLOCK, Packed, dequantize
from ..nn.tensorfile import ModelFileError


class GGUF:
    """An open GGUF file: `metadata` (`fields` has the types, too), and `tensors` by Hugging Face name, still packed."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        reader = open_gguf(self.path)
        try:
            self.fields = {key: Field(field) for key, field in reader.fields.items()}
            self.metadata: dict[str, Any] = {key: field.value for key, field in self.fields.items()}
            self.tensors = {hugging_face_name(t.name): t for t in reader.tensors}
        except Exception as error:
            raise ModelFileError(f"{self.path}: damaged GGUF file ({error}); get it again") from error
        unknown = sorted({t.tensor_type.name for t in self.tensors.values()} - set(BYTES_PER_BLOCK))
        if unknown:
            raise ModelFileError(
                f"{self.path}: unknown quantisation type {', '.join(unknown)}; "
                f"minilora reads {', '.join(BYTES_PER_BLOCK)}"
            )

    def config(self) -> Config:
        """The model's shape. Raises ModelFileError for another architecture or for numbers that contradict the file."""
        architecture = self.metadata.get("general.architecture")
        if architecture != "llama":
            raise ModelFileError(f"{self.path}: architecture is {architecture!r}, minilora reads 'llama'")
        try:
            heads = int(self._value("attention.head_count"))
            config = Config(
                vocab_size=int(self.tensors["model.embed_tokens.weight"].shape[1]),
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
            raise ModelFileError(f"{self.path}: unusable model description: {error}") from error
        return config

    def _value(self, key: str) -> Any:
        full = f"llama.{key}"
        if full not in self.metadata:
            raise KeyError(f"{full} is missing")
        return self.metadata[full]

    def weight(self, name: str, config: Config, quantized: bool = False) -> np.ndarray | Packed:
        """One tensor in Hugging Face's layout: a new float32 array, or with `quantized` a packed matrix as it is."""
        tensor = self.tensors[name]
        raw, kind, heads = read_raw(self.path, tensor), tensor.tensor_type.name, _heads(name, config)
        if heads:
            raw = to_halves(raw, heads)  # no block reaches into another row
        if quantized and kind.startswith("Q"):
            return Packed(raw, kind)
        return dequantize(raw, kind).reshape(tensor.shape[::-1])

    def load(self, quantized: bool = False) -> Llama:
        """The whole model in float32, frozen nowhere; with `quantized`, packed matrices stay packed, and frozen.

        Raises ModelFileError when tensors and shape disagree, or when there is nothing packed to keep.
        """
        from concurrent.futures import ThreadPoolExecutor

        config = self.config()
        if quantized and not any(t.tensor_type.name.startswith("Q") for t in self.tensors.values()):
            kinds = ", ".join(sorted({t.tensor_type.name for t in self.tensors.values()}))
            raise ModelFileError(
                f"{self.path}: the file holds no packed matrices ({kinds} alone): load it without quantized"
            )
        try:
            check_claims(config, {name: tuple(t.shape[::-1].tolist()) for name, t in self.tensors.items()})
            with ThreadPoolExecutor(cores()) as pool:  # unpacking frees the interpreter lock
                weights = pool.map(lambda name: self.weight(name, config, quantized), self.tensors)
                state = dict(zip(self.tensors, weights, strict=True))
            model = Llama(config)
            model.load_state_dict(state)
        except ValueError as error:  # not ModelFileError alone: rows that no number of heads divides
            raise ModelFileError(f"{self.path}: {error}") from error
        return model


def _heads(name: str, config: Config) -> int:
    """How many heads the rows of this tensor are to be reordered in; 0 for all but q and k."""
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("k_proj.weight") else 0
