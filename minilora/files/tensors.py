"""Safetensors files: read and write named arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ..engine.backend import Array, dense, is_packed, to_numpy
from .disk import ModelFileError, replacing
from .stored import StoredTensor

_KINDS = ("F64", "F32", "F16", "BF16")


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name; only its header is read.

    Raises ModelFileError for a missing or damaged file, or for tensors that are not floating point.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ModelFileError(f"{path}: no such file")
    try:
        with safe_open(path, framework="np"), path.open("rb") as file:  # the library checks the header
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path}: damaged safetensors file ({error})") from error
    header.pop("__metadata__", None)
    if wrong := sorted({about["dtype"] for about in header.values()} - {*_KINDS}):
        raise ModelFileError(f"{path}: cannot read tensors of type {', '.join(wrong)}; expected F32, F16 or BF16")
    places = {name: about["data_offsets"] for name, about in header.items()}
    return {
        name: StoredTensor(name, tuple(header[name]["shape"]), header[name]["dtype"], path, start + begin, end - begin)
        for name, (begin, end) in places.items()
    }


def read_tensors(path: Path, mapped: bool = False) -> dict[str, np.ndarray]:
    """Every tensor of one safetensors file, as new arrays; bfloat16, which NumPy lacks, as float32.

    mapped: as views into the file instead, see `StoredTensor.raw`; bfloat16 is not mapped.

    Raises ModelFileError as `stored_tensors`.
    """
    return {name: tensor.array(mapped) for name, tensor in stored_tensors(path).items()}


def each_tensor(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The same one after another, so that no two of them need to be in memory."""
    return ((name, tensor.array()) for name, tensor in stored_tensors(path).items())


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write arrays to one safetensors file, packed ones dequantised. The file appears completely or not at all."""
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(to_numpy(dense(array))) for name, array in tensors.items()}
    with replacing(path, sum(array.nbytes for array in arrays.values())) as partial:
        save_file(arrays, partial, metadata={"format": "pt"})


@np.errstate(over="ignore", invalid="ignore")  # NaN and infinity are reported below
def check_fit(given: Mapping[str, Array], expected: Mapping[str, tuple[int, ...]], subject: str) -> None:
    """Raise ModelFileError that lists missing, unexpected, wrongly shaped and non-finite tensors, if there are any.

    given: arrays by name. expected: shapes by name. subject: what does not fit, for the message.
    """
    problems = [f"missing {name}" for name in expected if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in expected]
    for name, shape in expected.items():
        if name not in given:
            continue
        if tuple(given[name].shape) != shape:
            problems.append(f"{name} has shape {tuple(given[name].shape)}, expected {shape}")
        elif not _is_finite(given[name]):
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        more = f" (and {len(problems) - 6} more)" if len(problems) > 6 else ""
        raise ModelFileError(f"{subject}: {'; '.join(problems[:6])}{more}")


def _is_finite(w: Array) -> bool:
    if is_packed(w):
        return w.is_finite()
    # A sum is NaN or infinite if any element is. A sum in float16 could overflow by itself.
    return bool(np.isfinite(w.sum(dtype=np.promote_types(w.dtype, np.float32))))
