"""Adapters on disk, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A tensor is called `base_model.model.<module>.lora_A.weight` (r, n) or `.lora_B.weight` (m, r). What minilora has to say
beside, and PEFT has no place for, stands in `minilora.json` (notes.py). llama.cpp's format is in llamacpp.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.backend import Array, array_module, dense, to_numpy
from ..files.disk import ModelFileError, read_json, write_json
from ..files.tensors import check_fit, read_tensors, write_tensors
from ..nn.llama import Llama
from ..nn.module import Module
from .adapters import adapter_weights, base_state, install_adapter, plan_adapter
from .config import LoraConfig
from .layer import LoraWeights
from .llamacpp import load_gguf_adapter
from .notes import FORMAT, NOTES_FILE, base_note, read_notes, refuse_other_base
from .variants import config_with_start

PREFIX = "base_model.model."
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# How PEFT calls the weights of an adapted module. It drops ".weight" where one is a bare parameter.
_SUFFIXES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "bias": "base_layer.bias",
}

# What becomes of each key of PEFT's adapter_config.json (0.21). LoraConfig's own fields are used. Those listed in
# _RECORDED say nothing about what is computed. The others are accepted only with values under which they do nothing,
# and refused with the reason otherwise. Whatever is accepted is kept, and written again by `save_adapter`.
_RECORDED = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_type",
    "peft_version", "revision", "runtime_config", "task_type",
}  # fmt: skip
_INERT: dict[str, tuple[tuple[Any, ...], str]] = {
    "alora_invocation_tokens": ((None,), "activated LoRA, which works only after certain tokens"),
    "arrow_config": ((None,), "Arrow, which routes each token to one of several adapters"),
    "corda_config": ((None,), "CorDA, which starts from changed base weights"),
    "ensure_weight_tying": ((False,), "one update for both uses of a tied embedding"),
    "eva_config": ((None,), "EVA's redistributed ranks"),
    "fan_in_fan_out": ((False,), "matrices stored transposed, as GPT-2's are"),
    "kasa_config": ((None,), "KaSA, which cuts the base weights"),
    "layer_replication": ((None,), "a base whose layers are repeated"),
    "layers_pattern": ((None, "layers"), "layers under another name than 'layers'"),
    "loftq_config": ((None, {}), "LoftQ, which starts from changed base weights"),
    "lora_bias": ((False,), "a bias beside B"),
    "lora_ga_config": ((None,), "LoRA-GA, which starts from changed base weights"),
    "megatron_config": ((None,), "Megatron's parallel layers"),
    "modules_to_save": ((None, []), "whole layers trained beside the adapter"),
    "monteclora_config": ((None,), "MonteCLoRA's sampled weights"),
    "qalora_group_size": ((None, 16), "QA-LoRA"),
    "target_parameters": ((None, []), "adapters on bare parameters, as in mixtures of experts"),
    "trainable_token_indices": ((None,), "single trained rows of the embedding"),
    "use_bdlora": ((None, False), "block-diagonal LoRA"),
    "use_qalora": ((False,), "QA-LoRA"),
    "velora_config": ((None,), "VeLoRA's compressed activations"),
}
_OFF: tuple[Any, ...] = (None, False, [], {})  # how PEFT writes an unused option, also one newer than this list
# Starts after which A and B stand for themselves, and PiSSA's, which can be found again from the base. After the
# others (olora, corda, loftq, pissa_niter_16, ...) the base is not what it was, and only who trained has it.
_KNOWN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica", "pissa")


def peft_name(key: str) -> str:
    """PEFT's tensor name for `<module>.<key>`: `model.x.lora_A` -> `base_model.model.model.x.lora_A.weight`.

    Raises KeyError for a key that PEFT's format does not have.
    """
    module, _, name = key.rpartition(".")
    return f"{PREFIX}{module}.{_SUFFIXES[name]}"


def save_adapter(
    model: Module,
    folder: str | Path,
    name: str = "default",
    base_model: str | None = None,
    base_sha256: str | None = None,
    data: Mapping[str, Any] | None = None,
) -> Path:
    """Write one adapter as a PEFT folder and return it. Files appear whole or not at all.

    base_model: recorded as PEFT's `base_model_name_or_path`; what the model was loaded from if left out. What a loaded
    adapter's file said beside the settings that minilora uses is written again.

    `minilora.json` says for which base it was made, so that no other is taken for it, and where dropout stands, so that
    training can go on with the very holes that would have come next. base_sha256: `sha256_of(base_state(model))`, where
    it is known already; computed if left out. data: what it learned from, recorded there; as loaded, if left out.
    Raises ValueError when the model has no such adapter.
    """
    weights = adapter_weights(model, name)
    own, kept = model.adapters[name].config, model.adapters[name].record
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_FILE, saved_state(model, name))
    config = config_with_start(own)
    record: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True}
    record |= {"base_model_name_or_path": None, **kept} | {f.name: getattr(config, f.name) for f in fields(config)}
    if own.init_lora_weights is True:  # for a loaded one, whatever its file said
        record["init_lora_weights"] = kept.get("init_lora_weights", True)
    source = getattr(model, "source", None)
    if base_model is not None or not record["base_model_name_or_path"]:
        record["base_model_name_or_path"] = base_model or getattr(model, "hub_name", None) or source
    if config.target_modules == "all-linear":  # written out, since PEFT's own meaning depends on its version
        record["target_modules"] = sorted({path.rpartition(".")[2] for path in weights})
    elif isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        record["target_modules"] = sorted(weights)  # PEFT refuses the two together
    write_json(folder / CONFIG_FILE, record, sort_keys=True)
    base = base_note(model, folder, base_model or source or record["base_model_name_or_path"], base_sha256)
    notes: dict[str, Any] = {"format": FORMAT, "base": base}
    if data := data or model.adapters[name].data:
        notes["data"] = dict(data)
    if dropout := {path: one.dropout.state() for path, one in weights.items() if one.dropout is not None}:
        notes["dropout"] = dropout
    write_json(folder / NOTES_FILE, notes)
    return folder


def saved_state(model: Module, name: str) -> dict[str, Array]:
    """What `save_adapter` writes: one adapter's arrays by PEFT's tensor names.

    They are the model's own, but for PiSSA's, whose update is saved as a plain LoRA of twice the rank.
    """
    state: dict[str, Array] = {}
    for module, weights in adapter_weights(model, name).items():
        arrays = {key: parameter.data for key, parameter in weights.named_parameters()}
        if weights.start is not None:
            arrays["lora_A"], arrays["lora_B"] = weights.factors()
        state |= {peft_name(f"{module}.{key}"): array for key, array in arrays.items()}
    return state


def load_adapter(
    model: Llama,
    folder: str | Path,
    name: str = "default",
    force: bool = False,
    base_sha256: str | None = None,
    mapped: bool = False,
) -> None:
    """Read a PEFT folder, or a llama.cpp adapter `.gguf` file, into the model as a new, active adapter.

    Strict: missing, unexpected or wrongly shaped tensors, NaN, and settings that minilora does not compute are each a
    ModelFileError, and the model stays as it was. So is an adapter made for another base, as far as its folder says:
    one of the same shape is accepted with `force`. base_sha256: `sha256_of(base_state(model))`, where it is known
    already.

    mapped: leave the numbers in the folder's file, which stays open, for as long as nobody computes with them: of many
    adapters, those in use take memory (float32 on a model in float32; others are read as without it).
    """
    folder = Path(folder)
    if folder.suffix == ".gguf" and not folder.is_dir():
        load_gguf_adapter(model, folder, name)
        return
    record, notes = _read_record(folder / CONFIG_FILE), read_notes(folder)
    refuse_other_base(model, folder, force, base_sha256)
    config = _config_of(record, folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    tensors = read_tensors(path, mapped)
    _refuse_another_width(model, tensors, path)
    weights = plan_adapter(model, config, name)
    parameters = {
        peft_name(f"{module}.{key}"): parameter
        for module, own in weights.items()
        for key, parameter in own.named_parameters()
    }
    _drop_base_copies(model, list(weights), tensors, path)
    check_fit(tensors, {key: p.shape for key, p in parameters.items()}, f"{path} does not fit this model")
    for key, parameter in parameters.items():
        parameter.data = array_module(parameter.data).asarray(tensors[key], dtype=parameter.dtype)
    _restore_dropout(weights, notes.get("dropout", {}), folder / NOTES_FILE)
    install_adapter(model, config, name, weights, record, notes.get("data"))


def _refuse_another_width(model: Llama, tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Say in a few words what would otherwise be a list of all tensors: the adapter is one of a model of another size.

    An adapter that PEFT wrote has no other trace of its base's shape than its tensors.
    """
    read = re.compile(r"\.layers\.\d+\.(?:self_attn\.[qkv]_proj|mlp\.(?:gate|up)_proj)\.lora_A\.")
    widths = {w.shape[-1] for name, w in tensors.items() if w.ndim and read.search(name)}
    if len(widths) == 1 and widths != {model.config.hidden_size}:
        raise ModelFileError(
            f"{path}: made for a model of width {widths.pop()}, this one has width {model.config.hidden_size}: give "
            "the adapter's own base"
        )


def _restore_dropout(weights: Mapping[str, LoraWeights], states: Mapping[str, Any], path: Path) -> None:
    """Let dropout go on as `minilora.json` says; without one, or for a module that it does not name, it starts anew."""
    for module, own in weights.items():
        if own.dropout is not None and module in states:
            try:
                own.dropout.restore(states[module])
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                raise ModelFileError(f"{path}: dropout of {module} is no seed and counts of draws ({error})") from error


def _drop_base_copies(model: Module, modules: list[str], tensors: dict[str, np.ndarray], path: Path) -> None:
    """Take out the copy of the base's table that PEFT saves beside an adapted embedding, if it is the base's.

    Raises ModelFileError for another table: the adapter was made for another base.
    """
    for module in modules:
        copy = tensors.pop(f"{PREFIX}{module}.base_layer.weight", None)
        if copy is None:
            continue
        own = to_numpy(dense(base_state(model)[f"{module}.weight"]))
        if copy.shape != own.shape or not np.allclose(copy, own, rtol=1e-2, atol=1e-5):  # it may be in half precision
            raise ModelFileError(f"{path}: it holds a {module} that differs from this model's: made for another base")


def read_adapter_config(folder: Path) -> LoraConfig:
    """The LoraConfig of a PEFT folder. Raises ModelFileError for a key that would change what is computed."""
    return _config_of(_read_record(folder / CONFIG_FILE), folder / CONFIG_FILE)


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        if (path.parent / "config.json").is_file():
            raise ModelFileError(f"{path.parent}: a whole model and no adapter: give it with --base")
        raise ModelFileError(f"{path}: no such file; expected a PEFT adapter folder")
    return read_json(path)


def _config_of(record: dict[str, Any], path: Path) -> LoraConfig:
    if record.get("peft_type") != "LORA":
        raise ModelFileError(f"{path}: peft_type is {record.get('peft_type')!r}, expected 'LORA'")
    if not isinstance(base := record.get("base_model_name_or_path"), str | None):
        raise ModelFileError(f"{path}: base_model_name_or_path is a {type(base).__name__}, expected a text")
    own = {f.name for f in fields(LoraConfig)}
    for key, value in record.items():
        if key in own or key in _RECORDED:
            continue
        harmless, what = _INERT.get(key, (_OFF, "an option that it does not know"))
        if value not in harmless:
            raise ModelFileError(f"{path}: {key} = {value!r} is not something minilora computes: {what}")
    if (start := record.get("init_lora_weights")) not in _KNOWN_STARTS:
        raise ModelFileError(
            f"{path}: init_lora_weights = {start!r} belongs to changed base weights, which are not there"
        )
    missing = [key for key in ("r", "lora_alpha", "target_modules") if record.get(key) is None]
    if missing:
        raise ModelFileError(f"{path}: {missing[0]} is missing")
    values = {key: value for key, value in record.items() if key in own and value is not None}
    if start != "pissa":
        values["init_lora_weights"] = True  # how they started does not matter: they are about to be read
    try:
        return LoraConfig(**values)
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"{path}: {error}") from error
