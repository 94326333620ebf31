"""GGUF files: open one strictly, write one, and translate llama.cpp's tensor names.

The `gguf` library knows the format. It is imported where it is used, so that `import minilora` loads only NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np

from ..engine.backend import Array
from .disk import ModelFileError, replacing
from .quant import dequantize

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
    """A GGUFReader of the file. Raises ModelFileError if it is missing, cut off, or no GGUF file."""
    from gguf import GGUFReader, GGUFValueType

    class StrictReader(GGUFReader):
        """Fails at the end of the file, where the library would read on and count up to any absurd length.

        Reads an array of strings or numbers at once: the library makes two NumPy arrays of every string, which for the
        100,000 of a tokenizer takes longer than reading the model.
        """

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            stored = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
            # Slicing the memory map is slow; `frombuffer` fails at the end of the file.
            return np.frombuffer(self.data, stored, int(count), int(offset))

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)
            raw_kind, (count,) = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            kind, start = GGUFValueType(raw_kind[0]), orig_offs + 12
            if kind == GGUFValueType.ARRAY or count == 0:
                return super()._get_field_parts(orig_offs, raw_type)
            if kind == GGUFValueType.STRING:
                items, end = self._strings(start, int(count))
            else:
                items = [self._get(start, self.gguf_scalar_to_np[kind], count)]
                end = start + items[0].nbytes
            return end - orig_offs, items, list(range(len(items))), [GGUFValueType.ARRAY, kind]

        def _strings(self, start: int, count: int) -> tuple[list[memoryview], int]:
            """The bytes of `count` strings, each stored after its length, and where they end."""
            content, length_at, items = self.data.data, Struct("=Q").unpack_from, []
            for _ in range(count):
                (length,) = length_at(content, start)  # fails at the end of the file
                end = start + 8 + length
                items.append(content[start + 8 : end])
                start = end
            if start > len(content):  # a slice beyond the end is no error
                raise ValueError("it ends in the middle of a text")
            return items, start

    if not path.is_file():
        raise ModelFileError(f"{path}: no such model file")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelFileError(f"{path}: not a GGUF file (it starts with {magic!r})")
    try:
        reader = StrictReader(path)
    except Exception as error:  # for a damaged header the library raises errors of many types
        raise ModelFileError(f"{path}: cut off or damaged GGUF file ({error}); get it again") from error
    if reader.byte_order != "I":
        raise ModelFileError(f"{path}: big-endian GGUF file; expected one in this machine's byte order")
    return reader


def read_raw(path: Path, tensor: Any) -> np.ndarray:
    """The bytes of one tensor of a reader, with the rows of the file: a new array (m, bytes per row) uint8.

    Read from the file, not through the reader's memory map, whose pages would count as the process's memory.
    """
    raw = np.fromfile(path, np.uint8, int(tensor.n_bytes), offset=int(tensor.data_offset))
    return raw.reshape(tensor.data.shape[0] if tensor.data.ndim > 1 else 1, -1)


def unpack(path: Path, tensor: Any) -> np.ndarray:
    """One tensor of a reader of this file as a new float32 array, in the layout of the file."""
    return dequantize(read_raw(path, tensor), tensor.tensor_type.name).reshape(tensor.shape[::-1])


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[np.ndarray, str]]) -> None:
    """Write a GGUF file. It appears completely or not at all.

    metadata: strings, booleans, integers (stored as uint32), floats (float32), lists; or `Field`s of another file,
    which keep their type. tensors: (array, kind) by name; packed rows are uint8, see `quant.quantize`.
    """
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32,
             str: GGUFValueType.STRING}  # fmt: skip
    rest = dict(metadata)
    with replacing(path, sum(array.nbytes for array, _ in tensors.values())) as partial:
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
            end = writer.fout[0].tell()  # type: ignore[index]
        finally:
            writer.close()
        if (written := partial.stat().st_size) < end:  # NumPy does not notice if the last bytes find no space
            raise OSError(f"{end} requested and {written} written")


class Field:
    """One metadata entry of an opened file, with its stored type."""

    def __init__(self, field: Any):
        self.value = field.contents()
        self.type = field.types[0]
        self.item_type = field.types[-1] if len(field.types) > 1 else None


# -- the two layouts of rotary pairs: halves in minilora and Hugging Face, adjacent pairs in llama.cpp's files ---------


def to_halves(w: Array, heads: int) -> Array:
    """Reorder the rows of q or k, (m, ...), from adjacent rotary pairs (llama.cpp) to halves (Hugging Face)."""
    m = w.shape[0]
    return w.reshape(heads, m // heads // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)


def to_pairs(w: Array, heads: int) -> Array:
    """The inverse of `to_halves`: from halves (Hugging Face) to adjacent rotary pairs (llama.cpp)."""
    m = w.shape[0]
    return w.reshape(heads, 2, m // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def reordered(layout: Callable[[Array, int], Array], name: str, w: Array, heads: int, kv_heads: int) -> Array:
    """The rows of a q or k projection in another layout; any other tensor unchanged.

    layout: `to_halves` or `to_pairs`.
    name: of the module or its weight, in Hugging Face's form.
    w: (m, ...), the weight, its packed rows, or LoRA's B.
    heads, kv_heads: how many query and key/value heads the model has.
    """
    kind = name.removesuffix(".weight").rpartition(".")[2]
    rows_of = {"q_proj": heads, "k_proj": kv_heads}
    return layout(w, rows_of[kind]) if kind in rows_of else w
