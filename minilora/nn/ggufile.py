"""GGUF containers: open one strictly, write one whole, and translate llama.cpp's tensor names.

The `gguf` library knows the container. It is imported where it is used, so that `import minilora` loads NumPy alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .quant import dequantize
from .tensorfile import ModelFileError, replacing

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
_LLAMA_CPP_BLOCK_NAMES = {theirs: own for own, theirs in _BLOCK_NAMES.items()}
_LLAMA_CPP_TOP_NAMES = {theirs: own for own, theirs in _TOP_NAMES.items()}


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`. An unknown part stays as it is."""
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("blk."):
        _, number, part = stem.split(".", 2)
        return f"model.layers.{number}.{_BLOCK_NAMES.get(part, part)}.{suffix}"
    return f"{_TOP_NAMES.get(stem, stem)}.{suffix}"


def llama_cpp_name(name: str) -> str:
    """The inverse of `hugging_face_name`: `model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        number, part = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{number}.{_LLAMA_CPP_BLOCK_NAMES[part]}.{suffix}"
    return f"{_LLAMA_CPP_TOP_NAMES[stem]}.{suffix}"


def open_gguf(path: Path) -> Any:
    """A GGUFReader over the file. Raises ModelFileError for a file that is missing, cut off, or something else."""
    from gguf import GGUFReader

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


def unpack(tensor: Any) -> np.ndarray:
    """One tensor of a reader as a new float32 array, in the layout of the file."""
    raw = np.asarray(tensor.data)
    w = dequantize(np.atleast_2d(raw).view(np.uint8), tensor.tensor_type.name)
    return w[0] if raw.ndim == 1 else w


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[np.ndarray, str]]) -> None:
    """Write a GGUF file. It appears whole or not at all.

    metadata: strings, booleans, whole numbers (stored as uint32), floats (float32), lists; or `Field`s of another file,
    which keep their type. tensors: (array, kind) by name; packed rows are uint8, see `quant.quantize`.
    """
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32,
             str: GGUFValueType.STRING}  # fmt: skip
    rest = dict(metadata)
    with replacing(path) as partial:
        writer = GGUFWriter(partial, rest.pop("general.architecture"))
        try:
            for key, value in rest.items():
                if isinstance(value, Field):
                    writer.add_key_value(key, value.value, value.type, sub_type=value.item_type)
                elif isinstance(value, list):
                    writer.add_array(key, value)
                else:
                    writer.add_key_value(key, value, kinds[type(value)])
            for name, (array, kind) in tensors.items():
                writer.add_tensor(name, np.ascontiguousarray(array), raw_dtype=GGMLQuantizationType[kind])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


class Field:
    """One metadata entry of an opened file, with the type under which it is stored there."""

    def __init__(self, field: Any):
        self.value = field.contents()
        self.type = field.types[0]
        self.item_type = field.types[-1] if len(field.types) > 1 else None
