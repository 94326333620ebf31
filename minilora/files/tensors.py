"""Safetensors files: read and write named arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.backend import Array, array_module, dense, is_packed, to_numpy
from .disk import ModelFileError, replacing
from .stored import StoredTensor

_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def in_dtype(tensors: Mapping[str, Array], dtype: str, instead: str) -> dict[str, Array]:
    """The arrays as "float32" or "float16". Raises ValueError, naming a flag `instead`, for values too large for it."""
    with np.errstate(over="ignore"):  # reported below
        found = {name: dense(w).astype(dtype, copy=False) for name, w in tensors.items()}
    if large := [name for name, w in found.items() if not np.isfinite(w).all()]:
        raise ValueError(f"{large[0]} holds values that are too large for {dtype}: use {instead}")
    return found


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name; only its header is read.

    The file is the header's length in eight bytes, the header in JSON, and the tensors' bytes, one after another:

        {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {"format": "pt"}}

    Raises ModelFileError for a missing or damaged file, or for tensors that are not floating point.
    """
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = 8 + int.from_bytes(file.read(8), "little")
            if not 8 < start <= size:
                raise ValueError(f"a header of {start - 8:,} bytes in a file of {size:,}")
            header = json.loads(file.read(start - 8))
        header.pop("__metadata__", None)
        if wrong := sorted({str(about["dtype"]) for about in header.values()} - {*_WIDTHS}):
            raise ModelFileError(f"{path}: cannot read tensors of type {', '.join(wrong)}; expected F32, F16 or BF16")
        stored = [_stored(name, about, path, start) for name, about in header.items()]
        end = start
        for tensor in sorted(stored, key=lambda tensor: (tensor.offset, tensor.nbytes)):
            if tensor.offset != end:
                raise ValueError(f"{tensor.name} begins at byte {tensor.offset:,}, expected {end:,}")
            end += tensor.nbytes
        if end != size:
            raise ValueError(f"its tensors end at byte {end:,} of {size:,}")
    except ModelFileError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(f"{path}: damaged safetensors file ({error})") from error
    return {tensor.name: tensor for tensor in stored}


def _stored(name: str, about: Mapping[str, Any], path: Path, start: int) -> StoredTensor:
    """A tensor of the header. Raises ValueError, KeyError or TypeError if its entry makes no sense."""
    shape, (begin, end) = about["shape"], about["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name} has shape {shape} and offsets {begin}, {end}: expected integers from 0")
    if len(shape) > 32 or prod(n for n in shape if n) >= 1 << 60:
        raise ValueError(f"{name} has {len(shape)} dimensions, {shape!r:.80}: no model has such an array")
    if end - begin != prod(shape) * _WIDTHS[about["dtype"]]:
        raise ValueError(f"{name} has {end - begin:,} bytes for shape {shape} in {about['dtype']}")
    return StoredTensor(name, tuple(shape), about["dtype"], path, start + begin, end - begin)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of one safetensors file, as new arrays; bfloat16, which NumPy lacks, as float32.

    Raises ModelFileError as `stored_tensors`.
    """
    return {name: tensor.array() for name, tensor in stored_tensors(path).items()}


def each_tensor(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The same one after another, so that no two of them need to be in memory."""
    return ((name, tensor.array()) for name, tensor in stored_tensors(path).items())


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write arrays to one safetensors file, packed ones dequantised. The file appears completely or not at all.

    As other writers do, the tensors of the widest type come first, each type in the order of names, so that each begins
    at a multiple of its width; spaces fill the header up to a multiple of eight bytes.
    """
    arrays = {name: np.asarray(to_numpy(dense(array)), order="C") for name, array in tensors.items()}
    arrays = dict(sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        kind = f"{array.dtype.kind.upper()}{8 * array.itemsize}"  # F32, I64
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path, end) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(array.data)


@np.errstate(over="ignore", invalid="ignore")  # NaN and infinity are reported below
def check_fit(given: Mapping[str, Array], expected: Mapping[str, tuple[int, ...]], subject: str) -> None:
    """Raise ModelFileError that lists missing, unexpected, wrongly shaped and non-finite tensors, if there are any.

    given: arrays by name. expected: shapes by name. subject: what does not fit, for the message.
    """
    missing = [f"missing {name}" for name in expected if name not in given]
    unexpected = [f"unexpected {name}" for name in given if name not in expected]
    wrong = []
    for name, shape in expected.items():
        if name not in given:
            continue
        if tuple(given[name].shape) != shape:
            wrong.append(f"{name} has shape {tuple(given[name].shape)}, expected {shape}")
        elif not is_packed(given[name]) and given[name].dtype.kind in "iubc":
            wrong.append(f"{name} has dtype {given[name].dtype}, expected floating-point numbers")
        elif not _is_finite(given[name]):
            wrong.append(f"{name} holds NaN or infinity")
    if kinds := [kind for kind in (missing, unexpected, wrong) if kind]:
        shown = [problem for kind in kinds for problem in kind[: 6 // len(kinds)]]  # some of each
        rest = sum(map(len, kinds)) - len(shown)
        raise ModelFileError(f"{subject}: {'; '.join(shown)}{f' (and {rest} more)' if rest else ''}")


def _is_finite(w: Array) -> bool:
    if is_packed(w):
        return w.is_finite()
    # A sum is NaN or infinite if any element is, and if it overflows by itself, as in float16 it often would.
    total = w.sum(dtype=np.promote_types(w.dtype, np.float32))
    return bool(np.isfinite(total)) or bool(array_module(w).isfinite(w).all())
