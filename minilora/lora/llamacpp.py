"""Adapters in llama.cpp's GGUF files.

For each adapted matrix `blk.3.attn_q.weight` (m, n) such a file has `blk.3.attn_q.weight.lora_a` (r, n) and `.lora_b`
(m, r). It differs from PEFT's format in two ways, and ignoring any of them gives a plausible but wrong model:

order   llama.cpp stores the rows of q and k as adjacent rotary pairs, so the rows of their B are reordered too.
scale   there is one `adapter.lora.alpha`, which is divided by the rank of each lora_b: alpha / r, or 1 if alpha is 0.
        For rsLoRA it is alpha sqrt(r). In a module with another alpha, B is multiplied by the quotient.

Source: llama.cpp's src/llama-adapter.cpp and llama-graph.cpp.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np

from ..engine.backend import array_module
from ..files.disk import ModelFileError
from ..files.gguf import write_gguf
from ..files.gguf_header import read_header
from ..files.stored import values_of
from ..files.tensors import check_fit, in_dtype
from ..nn.families import FAMILIES
from ..nn.family import Family
from ..nn.language_model import LanguageModel, check_language_model
from .adapters import adapter_weights, factors_for, install_adapter, plan_adapter
from .config import LoraConfig
from .provenance import KEYS, moved_data, provenance_of_base, read_provenance, refuse_other_base

_TINY, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def save_gguf_adapter(
    model: LanguageModel,
    path: str | Path,
    name: str = "default",
    dtype: str = "float32",
    base_sha256: str | None = None,
) -> Path:
    """Write one adapter as a GGUF file for llama.cpp, in float32 or float16, and return the path.

    It appears whole or not at all. For minilora it holds what the adapter's `minilora.json` says of base and data.
    base_sha256: as for `save_adapter`.

    Raises ValueError for an unknown name, for values too large for `dtype`, or for an adapter that llama.cpp's files
    cannot express and must be merged.
    """
    path = Path(path)
    family = FAMILIES[model.config.model_type]
    weights, pairs = adapter_weights(model, name), factors_for("llama.cpp", model, name)
    wanted = {module: float(weights[module].scale) * b.shape[1] for module, (_, b) in pairs.items()}  # each one's alpha
    alpha = Counter(wanted.values()).most_common(1)[0][0]
    if not _TINY <= alpha <= _LARGEST:
        raise ValueError(f"alpha {alpha:g} is outside the range of float32, in which llama.cpp stores it")
    tensors: dict[str, np.ndarray] = {}
    kind = {"float32": "F32", "float16": "F16"}[dtype]
    for module, (a, b) in pairs.items():
        b = family.to_llama_cpp(module, b, model.config) * b.dtype.type(wanted[module] / alpha)
        tensor = family.llama_cpp_name(f"{module}.weight")
        tensors |= {f"{tensor}.lora_a": a, f"{tensor}.lora_b": b}
    stored = {key: (array, kind) for key, array in in_dtype(tensors, dtype, "--dtype float32").items()}
    metadata = {"general.architecture": family.gguf, "general.type": "adapter", "adapter.type": "lora"}
    known = model.adapters[name]
    entries = {
        "base": provenance_of_base(model, path, sha256=base_sha256),
        "data": moved_data(known.data, known.folder or path, path),
    }
    metadata |= {KEYS[part]: json.dumps(entry) for part, entry in entries.items() if entry}
    write_gguf(path, metadata | {"general.name": name, "adapter.lora.alpha": float(alpha)}, stored)
    return path


def load_gguf_adapter(
    model: LanguageModel,
    path: str | Path,
    name: str = "default",
    force: bool = False,
    base_sha256: str | None = None,
) -> None:
    """Read a llama.cpp adapter into the model as a new, active adapter.

    force, base_sha256: as for `load_adapter`; only a file that minilora wrote names its base.

    Raises ModelFileError, with the model unchanged, for tensors that are not factors of a known matrix, do not fit, or
    hold NaN, or an adapter made for another base.
    """
    check_language_model(model, "an adapter of llama.cpp")
    path = Path(path)
    data = read_provenance(path).get("data")
    refuse_other_base(model, path, force, base_sha256)
    family = FAMILIES[model.config.model_type]
    alpha, tensors = _read(path, family.gguf)
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for tensor, array in tensors.items():
        stem, _, end = tensor.rpartition(".")
        module = _module_of(stem, family)
        if end not in ("lora_a", "lora_b") or module is None:
            raise ModelFileError(
                f"{path}: unexpected tensor {tensor}; expected lora_a and lora_b of the model's matrices"
            )
        pairs.setdefault(module, {})[end] = array
    for module, pair in pairs.items():
        for end in {"lora_a", "lora_b"} - set(pair):
            raise ModelFileError(f"{path}: missing {family.llama_cpp_name(f'{module}.weight')}.{end}")
        if pair["lora_b"].ndim != 2 or not pair["lora_b"].shape[1]:
            raise ModelFileError(f"{path}: lora_b of {module} has shape {pair['lora_b'].shape}, expected (m, r)")
    if not pairs:
        raise ModelFileError(f"{path}: an adapter without any tensor")
    try:
        config = LoraConfig.of_ranks({module: pair["lora_b"].shape[1] for module, pair in pairs.items()}, alpha)
        weights = plan_adapter(model, config, name, any_rank=True)
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from error
    places = {}
    for module, own in weights.items():
        tensor = family.llama_cpp_name(f"{module}.weight")
        places[f"{tensor}.lora_a"] = (module, own.lora_A)
        places[f"{tensor}.lora_b"] = (module, own.lora_B)
    check_fit(tensors, {key: p.shape for key, (_, p) in places.items()}, f"{path} does not fit this model")
    for key, (module, parameter) in places.items():
        array = tensors[key]
        if key.endswith("lora_b"):
            array = family.from_llama_cpp(module, array, model.config)
        parameter.data = array_module(parameter.data).asarray(array, dtype=parameter.dtype, order="C")
    install_adapter(model, config, name, weights, data=data)


def _module_of(tensor: str, family: Family) -> str | None:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj`; None for anything but a matrix of the family."""
    name = family.hugging_face_name(tensor)
    known = name != tensor and tensor.endswith(".weight") and "norm" not in tensor
    return name.removesuffix(".weight") if known else None


def _read(path: Path, architecture: str) -> tuple[float, dict[str, np.ndarray]]:
    """alpha and every tensor of the file, as float32. Raises ModelFileError unless it is a LoRA for this
    architecture.
    """
    header = read_header(path)
    metadata = {key: field.value for key, field in header.fields.items()}
    for key, wanted in (("general.type", "adapter"), ("general.architecture", architecture), ("adapter.type", "lora")):
        if metadata.get(key) != wanted:
            raise ModelFileError(f"{path}: {key} is {metadata.get(key)!r}, expected {wanted!r}")
    if "adapter.alora.invocation_tokens" in metadata:
        raise ModelFileError(f"{path}: minilora does not support activated LoRA (adapter.alora.invocation_tokens)")
    alpha = metadata.get("adapter.lora.alpha", 0.0)  # as in llama.cpp, a missing alpha is 0
    if not isinstance(alpha, float) or not 0 <= alpha < np.inf:
        raise ModelFileError(f"{path}: adapter.lora.alpha is {alpha!r}, expected a number of at least 0")
    return alpha, {tensor.name: values_of(tensor) for tensor in header.tensors}
