"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A tensor is called `base_model.model.<module>.lora_A.weight` (r, n) or `.lora_B.weight` (m, r).
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..engine.backend import array_module
from ..nn.module import Module
from ..nn.tensorfile import ModelFileError, check_fit, read_tensors, replacing, write_tensors
from .adapters import adapter_names, adapter_state, configs_of, install_adapter, lora_modules, plan_adapter
from .config import LoraConfig

PREFIX = "base_model.model."
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# Keys of PEFT's adapter_config.json that minilora does not implement, with the values under which they do nothing.
_INERT: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none",),
    "corda_config": (None,),
    "ensure_weight_tying": (False,),
    "eva_config": (None,),
    "fan_in_fan_out": (False,),
    "layer_replication": (None,),
    "layers_pattern": (None, "layers"),
    "loftq_config": (None, {}),
    "lora_bias": (False,),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "modules_to_save": (None, []),
    "qalora_group_size": (None, 16),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
}
_OFF: tuple[Any, ...] = (
    None,
    False,
    [],
    {},
)  # how PEFT writes an option that is not used, also one that is newer than this list
_PLAIN_STARTS = (
    None,
    True,
    False,
    "gaussian",
    "orthogonal",
    "eva",
    "mica",
)  # the others of PEFT change the base weights
_IGNORED = {  # say nothing about what is computed
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "revision", "runtime_config", "task_type",
}  # fmt: skip


def save_adapter(model: Module, folder: str | Path, name: str = "default", base_model: str | None = None) -> Path:
    """Write one adapter as a PEFT folder and return it. Files appear whole or not at all.

    base_model: recorded as PEFT's `base_model_name_or_path`. Raises ValueError when the model has no such adapter.
    """
    if name not in adapter_names(model):
        raise ValueError(
            f"the model has no adapter called {name!r}; it has: {', '.join(adapter_names(model)) or 'none'}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(
        folder / WEIGHTS_FILE, {f"{PREFIX}{key}.weight": array for key, array in adapter_state(model, name).items()}
    )
    config = configs_of(model)[name]
    record: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}
    record |= {"base_model_name_or_path": base_model, "bias": "none", "lora_dropout": 0.0}
    record |= {f.name: getattr(config, f.name) for f in fields(config)}
    if config.target_modules == "all-linear":  # written out, since PEFT's own meaning depends on its version
        record["target_modules"] = sorted({path.rpartition(".")[2] for path in lora_modules(model)})
    elif (
        isinstance(config.target_modules, str) and config.layers_to_transform is not None
    ):  # PEFT refuses the two together
        record["target_modules"] = sorted(path for path, m in lora_modules(model).items() if name in m.adapters)
    with replacing(folder / CONFIG_FILE) as partial:
        partial.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def load_adapter(model: Module, folder: str | Path, name: str = "default") -> None:
    """Read a PEFT folder into the model as a new, active adapter.

    Strict: missing, unexpected or wrongly shaped tensors, NaN, and settings that minilora does not compute are each an
    ModelFileError, and the model stays as it was.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    path = folder / WEIGHTS_FILE
    tensors = read_tensors(path)
    weights = plan_adapter(model, config, name)
    parameters = {
        f"{PREFIX}{module}.{key}.weight": parameter
        for module, share in weights.items()
        for key, parameter in share.named_parameters()
    }
    check_fit(tensors, {key: p.shape for key, p in parameters.items()}, f"{path} does not fit this model")
    for key, parameter in parameters.items():
        parameter.data = array_module(parameter.data).asarray(tensors[key], dtype=parameter.dtype)
    install_adapter(model, config, name, weights)


def read_adapter_config(folder: Path) -> LoraConfig:
    """The LoraConfig of a PEFT folder. Raises ModelFileError for a key that would change what is computed."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file; expected a PEFT adapter folder")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(record, dict):
        raise ModelFileError(f"{path}: expected a JSON object, got {type(record).__name__}")
    if record.get("peft_type") != "LORA":
        raise ModelFileError(f"{path}: peft_type is {record.get('peft_type')!r}, expected 'LORA'")
    own = {f.name for f in fields(LoraConfig)}
    for key, value in record.items():
        if key in own or key in _IGNORED:
            continue
        if value not in _INERT.get(key, _OFF):
            raise ModelFileError(f"{path}: {key} = {value!r} is not something minilora computes")
    if (start := record.get("init_lora_weights")) not in _PLAIN_STARTS:
        raise ModelFileError(
            f"{path}: init_lora_weights = {start!r} belongs to changed base weights, which are not there"
        )
    missing = [key for key in ("r", "lora_alpha", "target_modules") if record.get(key) is None]
    if missing:
        raise ModelFileError(f"{path}: {missing[0]} is missing")
    values = {key: value for key, value in record.items() if key in own and value is not None}
    values["init_lora_weights"] = True  # how they started does not matter: they are about to be read
    try:
        return LoraConfig(**values)
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"{path}: {error}") from error
