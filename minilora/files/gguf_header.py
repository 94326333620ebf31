"""The header of a GGUF file: its metadata, and where each tensor lies. A damaged file is refused, whatever it claims.

All numbers are little-endian. A text is its length and its bytes; a dimension that changes fastest comes first.

    magic "GGUF", version, number of tensors, number of entries
    entries    key, type, value; an array is the type of its items, their number, and the items
    tensors    name, number of dimensions, dimensions, type, offset from the beginning of the data
    data       begins at the next multiple of general.alignment, 32 by default

Source: gguf.md in ggml's docs.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from .disk import ModelFileError, reading
from .quant import readable
from .stored import StoredTensor

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))  # struct's letters
_TEXT, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4  # in ggml


@dataclass(frozen=True)
class Field:
    """One metadata entry: its value, its stored type, and the type of an array's items (numbers of GGUFValueType)."""

    value: Any
    type: int
    item_type: int | None = None


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself: metadata by key, and tensors."""

    fields: dict[str, Field]
    tensors: list[StoredTensor]


def is_gguf(path: Path) -> bool:
    """Whether the name says that it is a GGUF file, or the first bytes: ollama's files are called sha256-..."""
    if path.suffix == ".gguf":
        return True
    if not path.is_file():
        return False
    with reading(path), path.open("rb") as file:
        return file.read(4) == b"GGUF"


def read_header(path: Path) -> Header:
    """The header of a GGUF file.

    Raises ModelFileError if it is missing, cut off, damaged, or no GGUF file; if it has tensors of a type that neither
    minilora nor the gguf library can dequantise; and if it is a part of a split model.
    """
    if not path.is_file():
        raise ModelFileError(f"{path}: no such model file")
    with reading(path), path.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ModelFileError(f"{path}: not a GGUF file (it starts with {magic!r})")
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(path, content).header()
        except ModelFileError:
            raise
        except (ValueError, struct.error, RecursionError) as error:
            raise ModelFileError(f"{path}: cut off or damaged GGUF file ({error}); get it again") from error


class _Reader:
    """Reads one value after another. Raises struct.error or ValueError at the end of the file and for nonsense."""

    def __init__(self, path: Path, content: mmap.mmap):
        self.path, self.content, self.at = path, content, 4

    def header(self) -> Header:
        version = self.number("I")
        if version & 0xFFFF == 0:
            raise ModelFileError(f"{self.path}: big-endian GGUF file; expected a little-endian one")
        if version not in (2, 3):
            raise ModelFileError(f"{self.path}: GGUF version {version}; minilora reads versions 2 and 3")
        tensors, entries = self.number("Q"), self.number("Q")
        fields: dict[str, Field] = {}
        for _ in range(entries):  # absurd numbers end with the file
            key = self.text()
            if key in fields:
                raise ValueError(f"{key!r} occurs twice")
            fields[key] = self.field()
        if "split.count" in fields and fields["split.count"].value not in (0, 1):
            raise ModelFileError(f"{self.path}: a part of a split model: join the parts with llama-gguf-split")
        described = [self.tensor() for _ in range(tensors)]
        alignment = fields["general.alignment"].value if "general.alignment" in fields else 32
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r}, expected a power of 2")
        start = -(-self.at // alignment) * alignment
        found = [self.placed(start, alignment, *each) for each in described]
        if twice := [name for name, times in Counter(tensor.name for tensor in found).items() if times > 1]:
            raise ModelFileError(f"{self.path}: two tensors are called {twice[0]!r}")
        return Header(fields, found)

    def number(self, letter: str) -> Any:
        return self.numbers(f"<{letter}")[0]

    def numbers(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self.content, self.at)  # fails at the end of the file
        self.at += struct.calcsize(form)
        return found

    def text(self) -> str:
        return self.texts(1)[0]

    def texts(self, count: int) -> list[str]:
        content, at, length_at, found = self.content, self.at, struct.Struct("<Q").unpack_from, []
        for _ in range(count):  # a tokenizer has 100,000 texts: this is the loop that takes the time
            (length,) = length_at(content, at)
            end = at + 8 + length
            if end > len(content):
                raise ValueError("it ends in the middle of a text")
            found.append(content[at + 8 : end].decode())
            at = end
        self.at = at
        return found

    def field(self) -> Field:
        kind = self.number("I")
        if kind != _ARRAY:
            return Field(self.values(kind, 1)[0], kind)
        item_type, value = self.array()
        return Field(value, kind, item_type)

    def array(self) -> tuple[int, list[Any]]:
        """The innermost items' type, and the items; an array can hold arrays."""
        kind, count = self.numbers("<IQ")
        if kind != _ARRAY:
            return kind, self.values(kind, count)
        inner = [self.array() for _ in range(count)]
        return inner[-1][0] if inner else kind, [items for _, items in inner]

    def values(self, kind: int, count: int) -> list[Any]:
        if kind == _TEXT:
            return self.texts(count)
        if kind not in _SCALARS:
            raise ValueError(f"a value of the unknown type {kind}")
        return list(self.numbers(f"<{count}{_SCALARS[kind]}"))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, and offset of the next tensor."""
        name, dimensions = self.text(), self.number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{name!r} has {dimensions} dimensions, expected 1 to {_MOST_DIMENSIONS}")
        shape = self.numbers(f"<{dimensions}Q")[::-1]
        return name, shape, *self.numbers("<IQ")

    def placed(self, start: int, alignment: int, name: str, shape: tuple[int, ...], number: int, offset: int) -> Any:
        if number not in _kinds():
            raise ModelFileError(
                f"{self.path}: tensor {name} is of the unknown type {number}: try pip install --upgrade gguf, or "
                "get a file of another type, such as Q4_K_M"
            )
        kind, block, size = _kinds()[number]
        if shape[-1] % block:
            raise ValueError(f"{name!r} has rows of {shape[-1]} values, which are not whole blocks of {kind}")
        nbytes = prod(shape) // block * size
        if 0 in shape or offset % alignment or start + offset + nbytes > len(self.content):
            raise ValueError(f"{name!r} of shape {shape} at offset {offset} is not inside the file")
        if not readable(kind):
            raise ModelFileError(
                f"{self.path}: tensor {name} is stored as {kind}, which neither minilora nor the gguf library "
                "dequantises: get a file of another type, such as Q4_K_M"
            )
        return StoredTensor(name, shape, kind, self.path, start + offset, nbytes)


@cache
def _kinds() -> dict[int, tuple[str, int, int]]:
    """The name, values per block and bytes per block of each type that the gguf library knows, by its number."""
    from gguf import GGML_QUANT_SIZES  # imported here, so that `import minilora` loads only NumPy

    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
