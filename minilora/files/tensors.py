"""Safetensors files: read and write named arrays. bfloat16, which NumPy lacks, is read as float32."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..engine import bfloat16
from ..engine.backend import Array, dense, is_packed, to_numpy
from .disk import ModelFileError, replacing

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def read_tensors(path: Path, mapped: bool = False) -> dict[str, np.ndarray]:
    """Every tensor of one safetensors file, as new arrays.

    mapped: as views into the file instead, which stays open. The system reads their pages when they are used, and can
    drop them again; writing to them changes memory, never the file. bfloat16 is not mapped.

    Raises ModelFileError for a missing or damaged file, or for tensors that are not floating point.
    """
    from safetensors import deserialize

    with _opened(path) as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dict
        if wrong := sorted({kind for kind in kinds.values() if kind not in (*_DTYPES, "BF16")}):
            raise ModelFileError(f"{path}: cannot read tensors of type {', '.join(wrong)}; expected F32, F16 or BF16")
        if "BF16" not in kinds.values():
            return _views(path) if mapped else {name: file.get_tensor(name) for name in kinds}
        return {name: _from_bytes(view) for name, view in deserialize(path.read_bytes())}


def each_tensor(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a safetensors file one after another, so that no two of them need to be in memory.

    Raises ModelFileError for a missing or damaged file. Types are NumPy's: not for bfloat16.
    """
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            yield name, file.get_tensor(name)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ModelFileError(f"{path}: no such file")
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path}: damaged safetensors file ({error})") from error


def _views(path: Path) -> dict[str, np.ndarray]:
    """Views into a file that the library has validated. The library itself returns only copies."""
    whole = np.asarray(np.memmap(path, np.uint8, mode="c"))
    start = 8 + int(whole[:8].view("<u8")[0])
    header: dict[str, Any] = json.loads(whole[8:start].tobytes())
    header.pop("__metadata__", None)
    places = {name: whole[start:][slice(*about["data_offsets"])] for name, about in header.items()}
    return {name: places[name].view(_DTYPES[about["dtype"]]).reshape(about["shape"]) for name, about in header.items()}


def _from_bytes(view: dict[str, Any]) -> np.ndarray:
    if view["dtype"] == "BF16":
        return bfloat16.to_float32(np.frombuffer(view["data"], np.uint16)).reshape(view["shape"])
    return np.frombuffer(view["data"], _DTYPES[view["dtype"]]).reshape(view["shape"]).copy()


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
