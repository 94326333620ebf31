"""GGUF files: write one, and reorder rotary pairs as llama.cpp does. gguf_header.py reads them.

The `gguf` library writes the format. It is imported where it is used, so that `import minilora` loads only NumPy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.backend import Array
from .disk import replacing
from .gguf_header import Field


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
                    item = None if value.item_type is None else GGUFValueType(value.item_type)
                    writer.add_key_value(key, value.value, GGUFValueType(value.type), sub_type=item)
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


# -- the two layouts of rotary pairs: halves in minilora and Hugging Face, adjacent pairs in llama.cpp's files ---------


def to_halves(w: Array, heads: int) -> Array:
    """Reorder the rows of q or k, (m, ...), from adjacent rotary pairs (llama.cpp) to halves (Hugging Face)."""
    m = w.shape[0]
    return w.reshape(heads, m // heads // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)


def to_pairs(w: Array, heads: int) -> Array:
    """The inverse of `to_halves`: from halves (Hugging Face) to adjacent rotary pairs (llama.cpp)."""
    m = w.shape[0]
    return w.reshape(heads, 2, m // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)
