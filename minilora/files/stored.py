"""A tensor of a file, GGUF or safetensors: what it is, and where its bytes lie. They are read when they are used."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from .disk import reading
from .quant import PACKED, dequantize

_PLAIN = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    name: the file's. shape: outermost dimension first, as in NumPy. kind: "BF16", "Q4_1" and so on.
    path, offset, nbytes: where its bytes lie.
    transposed: whether the file has them as the rows of the transposed matrix; not for blocks of quantised values.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    path: Path
    offset: int
    nbytes: int
    transposed: bool = False

    @property
    def T(self) -> StoredTensor:
        """The transposed tensor, with the same bytes."""
        return replace(self, shape=self.shape[::-1], transposed=not self.transposed)

    def raw(self) -> np.ndarray:
        """Its bytes, row by row, a new array: (m, bytes per row) uint8; (1, bytes) of a vector."""
        with reading(self.path):
            raw = np.fromfile(self.path, np.uint8, self.nbytes, offset=self.offset)
        if self.transposed and self.nbytes:
            values = raw.view(f"V{self.nbytes // prod(self.shape)}").reshape(self.shape[::-1])
            raw = np.ascontiguousarray(values.T).view(np.uint8)
        rows = prod(self.shape[:-1])
        return raw.reshape(rows, self.nbytes // max(1, rows))

    def array(self) -> np.ndarray:
        """The tensor in its own type, a new array; in float32 if NumPy lacks that type."""
        if self.kind not in _PLAIN:
            return dequantize(self.raw(), self.kind).reshape(self.shape)
        return self.raw().view(_PLAIN[self.kind]).reshape(self.shape)


def values_of(tensor: StoredTensor) -> np.ndarray:
    """One tensor as a new float32 array, in the layout of the file."""
    if tensor.kind == "F64":
        return tensor.array().astype(np.float32)
    return dequantize(tensor.raw(), tensor.kind).reshape(tensor.shape)


def is_quantised(tensor: StoredTensor) -> bool:
    """True if its values are rounded to codes, in blocks: its type is none of the floating-point types."""
    return tensor.kind not in {*_PLAIN, "BF16"}


def stays_packed(tensor: StoredTensor) -> bool:
    """True for a matrix that a `Packed` can hold as it is stored."""
    return len(tensor.shape) == 2 and tensor.kind in PACKED
