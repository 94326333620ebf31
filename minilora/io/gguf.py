"""Load a Llama model from a GGUF file, llama.cpp's single-file format.

The `gguf` library reads the container; names, layout and numbers are put right here. The trap: llama.cpp stores the
rows of q and k as adjacent rotary pairs, Hugging Face (and minilora) as halves. Forgetting to reorder them gives a
finite, plausible loss and a model that is wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..nn.llama import Config, Llama, check_claims, to_halves
from ..nn.quant import BYTES_PER_BLOCK, dequantize
from ..nn.tensorfile import ModelFileError

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class GGUF:
    """An open GGUF file: `metadata` (a dict) and `tensors` by Hugging Face name, still packed."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        reader = _open(self.path)
        try:
            self.metadata: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
            self.tensors = {_hugging_face_name(t.name): t for t in reader.tensors}
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

    def weight(self, name: str, config: Config) -> np.ndarray:
        """One tensor as float32 in Hugging Face's layout, a new array."""
        tensor = self.tensors[name]
        raw = np.asarray(tensor.data)
        w = dequantize(np.atleast_2d(raw).view(np.uint8), tensor.tensor_type.name)
        if name.endswith("q_proj.weight"):
            return to_halves(w, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            return to_halves(w, config.num_key_value_heads)
        return w[0] if raw.ndim == 1 else w

    def load(self) -> Llama:
        """The whole model in float32, frozen nowhere. Raises ModelFileError when tensors and shape disagree."""
        config = self.config()
        try:
            check_claims(config, {name: tuple(t.shape[::-1].tolist()) for name, t in self.tensors.items()})
            model = Llama(config)
            model.load_state_dict({name: self.weight(name, config) for name in self.tensors})
        except ValueError as error:  # not ModelFileError alone: rows that no number of heads divides
            raise ModelFileError(f"{self.path}: {error}") from error
        return model


def _open(path: Path) -> Any:
    from gguf import GGUFReader  # here, so that `import minilora` loads NumPy alone

    class StrictReader(GGUFReader):
        """Stops at the end of the file, where the library would read on, and count through any absurd length."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data):,}, in the middle of something")
            return super()._get(offset, dtype, count, override_order)

    if not path.is_file():
        raise ModelFileError(f"{path}: no such model file")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelFileError(f"{path}: not a GGUF file (it starts with {magic!r})")
    try:
        reader = StrictReader(path)
    except Exception as error:  # the library raises whatever a cut-off or absurd header leads it to
        raise ModelFileError(f"{path}: cut off or damaged GGUF file ({error}); get it again") from error
    if reader.byte_order != "I":
        raise ModelFileError(f"{path}: big-endian GGUF file; minilora reads files of this machine's byte order")
    return reader


def _hugging_face_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("blk."):
        _, number, part = stem.split(".", 2)
        return f"model.layers.{number}.{_BLOCK_NAMES.get(part, part)}.{suffix}"
    return f"{_TOP_NAMES.get(stem, stem)}.{suffix}"
