"""Adapters on disk in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

Tensors are named `base_model.model.<module>.lora_A.weight` (r, n) and `.lora_B.weight` (m, r). Entries for which PEFT
has no place are in `minilora.json` (provenance.py). llama.cpp's format is in llamacpp.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..engine.backend import Array, array_module
from ..files.disk import ModelFileError, entries, read_json, write_json
from ..files.tensors import check_fit, read_tensors, write_tensors
from ..nn.families import FAMILIES, TABLES
from ..nn.language_model import LanguageModel
from ..nn.module import Module, Parameter, check_module
from ..progress import log
from .adapters import Adapter, adapter_weights, base_modules, install_adapter, plan_adapter
from .config import FROM_BASE, OURS, LoraConfig, unsupported
from .layer import LoraWeights
from .llamacpp import load_gguf_adapter
from .provenance import FORMAT, PROVENANCE_FILE, provenance_of_base, read_provenance, refuse_other_base
from .variants import config_with_initial

PREFIX = "base_model.model."
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_IN_PEFT = "if PEFT can merge it (merge_and_unload), save that model and its tokenizer (save_pretrained) as a base"

# PEFT's names for the weights of an adapted module. Bare parameters have no ".weight".
_SUFFIXES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude_vector": "lora_magnitude_vector"}

# Initialisations that leave the base unchanged, and PiSSA's, which can be recomputed from the base. The others (olora,
# corda, loftq, pissa_niter_16, ...) change the base weights, and the changed ones are not in the adapter's folder.
_KNOWN_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva", "mica", *FROM_BASE)


def peft_name(key: str) -> str:
    """PEFT's tensor name for `<module>.<key>`: `model.x.lora_A` -> `base_model.model.model.x.lora_A.weight`.

    Raises KeyError for an unknown key.
    """
    module, _, name = key.rpartition(".")
    return f"{PREFIX}{module}.{_SUFFIXES[name]}"


def peft_parameters(weights: Mapping[str, LoraWeights]) -> dict[str, Parameter]:
    """The parameters of an adapter, given by module, by PEFT's tensor names."""
    return {peft_name(f"{path}.{key}"): p for path, own in weights.items() for key, p in own.named_parameters()}


def save_adapter(
    model: Module,
    folder: str | Path,
    name: str = "default",
    base_model: str | None = None,
    base_sha256: str | None = None,
    data: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write one adapter as a PEFT folder and return the folder. Each file appears whole or not at all.

    folder: is created if missing. An adapter in it is replaced only if this one was loaded from there or saved there
        before, or with `overwrite`.
    base_model: for PEFT's `base_model_name_or_path`; if left out, what the model was loaded from.
    base_sha256: `sha256_of(base_state(model))`, if known; otherwise it is computed.
    data: a record of the training data for `minilora.json`; if left out, as loaded.
    overwrite: replace any adapter in the folder.

    `minilora.json` identifies the base, so that the adapter is not loaded onto another one, and stores whether A is
    frozen and the state of dropout, so that training can continue. Options in a loaded adapter's file that minilora
    does not use are written again.

    Warns if other parameters are trainable as well, such as those of a head of your own: they are not saved. Raises
    ValueError for an unknown name, a folder with another adapter, or weights that are not finite, or of another rank or
    scale than the adapter's config.
    """
    weights, known = adapter_weights(model, name), model.adapters[name]
    folder, state = Path(folder), saved_state(model, name)
    if broken := [key for key, array in state.items() if not array_module(array).isfinite(array).all()]:
        raise ValueError(f"{broken[0]} of adapter {name!r} holds NaN or infinity: nothing is saved")
    for path, own in weights.items():  # which code of the caller's may have pruned, or scaled
        expected = known.config.rank_of(path), known.config.scale_of(path)
        if own.rank != expected[0] or not math.isclose(own.scale, expected[1], rel_tol=1e-6):
            raise ValueError(
                f"{path} of adapter {name!r} has rank {own.rank} and scale {own.scale:g}, and its config says rank "
                f"{expected[0]} and scale {expected[1]:g}: nothing is saved. Save a new adapter with the same update, "
                f"combine_adapters(model, [{name!r}], [1.0], name=...)"
            )
    _refuse_replacing(folder, known.folder, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_FILE, state)
    config = config_with_initial(known.config).in_any_order(weights)
    record = _record_of(model, known, config, list(weights), base_model)
    write_json(folder / CONFIG_FILE, record, sort_keys=True)
    name_of_base = base_model or getattr(model, "source", None) or record["base_model_name_or_path"]
    base = provenance_of_base(model, folder, name_of_base, base_sha256)
    provenance: dict[str, Any] = {"format": FORMAT, "base": base}
    if ours := {name: getattr(config, name) for name in OURS if getattr(config, name)}:
        provenance["config"] = ours
    if data := data or known.data:
        provenance["data"] = dict(data)
    if dropout := {path: one.dropout.state() for path, one in weights.items() if one.dropout is not None}:
        provenance["dropout"] = dropout
    write_json(folder / PROVENANCE_FILE, provenance)
    known.folder = folder.resolve()
    if others := [path for path in model.trainable_parameters() if ".adapters." not in path]:
        log.warning(
            "%s holds the adapter alone, and not %s (trainable parameters of no adapter: %d): save these with "
            "np.savez, and set them before load_adapter",
            folder,
            others[0],
            len(others),
        )
    return folder


def _record_of(
    model: Module, known: Adapter, config: LoraConfig, modules: Sequence[str], base_model: str | None
) -> dict[str, Any]:
    """What `adapter_config.json` says of an adapter. config: of what is saved. modules: the adapted ones, by name."""
    record: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none"}
    record |= {"base_model_name_or_path": None, **known.record}
    record |= {f.name: getattr(config, f.name) for f in fields(config) if f.name not in OURS}
    if known.config.init_lora_weights is True:  # a loaded adapter's file may say otherwise
        record["init_lora_weights"] = known.record.get("init_lora_weights", True)
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    if family is not None and family.transposed:
        record["fan_in_fan_out"] = True
    if base_model is not None or not record["base_model_name_or_path"]:
        source = getattr(model, "hub_name", None) or getattr(model, "source", None)
        record["base_model_name_or_path"] = base_model or source
        if base_model is None and (revision := getattr(model, "revision", None)) is not None:
            record["revision"] = revision
    if config.target_modules == "all-linear":  # written out, because its meaning depends on PEFT's version
        record["target_modules"] = sorted({path.rpartition(".")[2] for path in modules})
    elif isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        record["target_modules"] = sorted(modules)  # PEFT refuses a pattern together with layers_to_transform
    return record


def _refuse_replacing(folder: Path, own: Path | None, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose a folder for the adapter")
    taken = (folder / CONFIG_FILE).exists() or (folder / WEIGHTS_FILE).exists()
    if taken and not overwrite and folder.resolve() != own:
        raise ValueError(f"{folder} already holds an adapter: choose another folder, or overwrite=True to replace it")


def saved_state(model: Module, name: str) -> dict[str, Array]:
    """The arrays that `save_adapter` writes, by PEFT's tensor names.

    They are the model's own arrays, except PiSSA's, whose update is saved as a plain LoRA of twice the rank.
    """
    weights = adapter_weights(model, name)
    state: dict[str, Array] = {key: parameter.data for key, parameter in peft_parameters(weights).items()}
    for module, own in weights.items():
        if own.initial is not None:
            state[peft_name(f"{module}.lora_A")], state[peft_name(f"{module}.lora_B")] = own.factors()
    return state


def load_adapter(
    model: Module,
    folder: str | Path,
    name: str = "default",
    force: bool = False,
    base_sha256: str | None = None,
) -> None:
    """Read a PEFT folder, or a llama.cpp adapter `.gguf` file, into the model as a new, active adapter.

    It is trainable, so one with `lora_dropout` drops inputs until `model.eval()`, except under `no_grad`, as in
    generation.

    force: accept an adapter that was made for another base of the same shape.
    base_sha256: `sha256_of(base_state(model))`, if known.

    Raises ModelFileError, with the model unchanged, for missing, unexpected or wrongly shaped tensors, NaN, options
    that minilora does not compute, or an adapter made for another base.
    """
    check_module(model)
    folder = Path(folder)
    if folder.suffix == ".gguf" and not folder.is_dir():
        load_gguf_adapter(cast(LanguageModel, model), folder, name, force, base_sha256)
        return
    record, provenance = _read_record(folder / CONFIG_FILE), read_provenance(folder)
    refuse_other_base(model, folder, force, base_sha256)
    config = _config_of(record, provenance, folder / CONFIG_FILE)
    modules = [path for path, _ in base_modules(model)]
    config = config.without_absent_targets(modules)  # its tensors show all that was trained
    path = folder / WEIGHTS_FILE
    if not path.is_file() and (pickled := path.with_suffix(".bin")).is_file():
        raise ModelFileError(f"{pickled}: nothing is unpickled: load it with PEFT, and save it again (save_pretrained)")
    tensors = read_tensors(path)
    if table := next((key for key in tensors if key.endswith(".lora_embedding_A")), None):
        raise ModelFileError(f"{path}: {table}: minilora does not support adapters on embeddings; {_IN_PEFT}")
    _refuse_another_width(model, tensors, path)
    longest = max((n for tensor in tensors.values() for n in tensor.shape), default=0)
    if (r := max(config.r, *config.rank_pattern.values(), 0)) > longest:  # before A and B of that rank are made
        raise ModelFileError(
            f"{folder / CONFIG_FILE}: a rank of {r:,}, but no tensor of {WEIGHTS_FILE} has an axis longer than "
            f"{longest:,}: the two files do not belong together"
        )
    weights = plan_adapter(model, config, name, any_rank=True)
    for pattern in config.patterns_in_order(weights) if not provenance else ():  # save_adapter names modules instead
        log.warning(
            f"{folder / CONFIG_FILE}: several keys of {pattern} match one module, and the first counts; PEFT saves "
            "them sorted, so ranks and scales may be others than in training"
        )
    parameters = peft_parameters(weights)
    copies = [f"{module}.base_layer.weight" for module in weights]  # of the base's tables, which PEFT saves as well
    for copy in (*copies, *TABLES):
        tensors.pop(f"{PREFIX}{copy}", None)
    check_fit(tensors, {key: p.shape for key, p in parameters.items()}, f"{path} does not fit this model")
    for key, parameter in parameters.items():
        parameter.data = array_module(parameter.data).asarray(tensors[key], dtype=parameter.dtype)
    _restore_dropout(weights, provenance.get("dropout", {}), folder / PROVENANCE_FILE)
    install_adapter(model, config, name, weights, record, provenance.get("data"), folder.resolve())


def _refuse_another_width(model: Module, tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Raise a short ModelFileError for an adapter of a model with another width, instead of a list of all tensors.

    In a folder that PEFT wrote, only the tensors show the base's shape.
    """
    read = re.compile(r"\.layers\.\d+\.(?:self_attn\.[qkv]_proj|mlp\.(?:gate|up)_proj)\.lora_A\.")
    widths = {w.shape[-1] for name, w in tensors.items() if w.ndim and read.search(name)}
    own = getattr(getattr(model, "config", None), "hidden_size", None)  # a module of one's own may have none
    if own is not None and len(widths) == 1 and widths != {own}:
        raise ModelFileError(
            f"{path}: made for a model of width {widths.pop()}, this one has width {own}: load the base that it was "
            "trained on"
        )


def _restore_dropout(weights: Mapping[str, LoraWeights], states: Mapping[str, Any], path: Path) -> None:
    """Continue dropout with the states in `minilora.json`; modules without a state start with new masks."""
    for module, own in weights.items():
        if own.dropout is not None and module in states:
            try:
                own.dropout.restore(states[module])
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                raise ModelFileError(f"{path}: dropout of {module} needs a seed and draws ({error})") from error


def read_adapter_config(folder: Path) -> LoraConfig:
    """The LoraConfig of a PEFT folder. Raises ModelFileError for a key that would change what is computed."""
    return _config_of(_read_record(folder / CONFIG_FILE), read_provenance(folder), folder / CONFIG_FILE)


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        if path.parent.is_file():
            raise ModelFileError(f"{path.parent} is a file: expected the folder of a PEFT adapter, or a .gguf file")
        if (path.parent / "config.json").is_file():
            raise ModelFileError(f"{path.parent} is a whole model, not an adapter: use it with --base")
        here = entries(path.parent) if path.parent.is_dir() else []
        below = [each.name for each in here if (each / path.name).is_file()]
        where = f"such as its {', '.join(below[-3:])}" if below else "such as one that `minilora runs` lists"
        raise ModelFileError(f"{path}: no such file: expected the folder of a PEFT adapter, {where}")
    return read_json(path)


def _config_of(record: dict[str, Any], provenance: Mapping[str, Any], path: Path) -> LoraConfig:
    if record.get("peft_type") != "LORA":
        advice = f": {_IN_PEFT}" if isinstance(record.get("peft_type"), str) else ""
        raise ModelFileError(f"{path}: peft_type is {record.get('peft_type')!r}, expected 'LORA'{advice}")
    if not isinstance(base := record.get("base_model_name_or_path"), str | None):
        raise ModelFileError(f"{path}: base_model_name_or_path is a {type(base).__name__}, expected a text")
    own = {f.name for f in fields(LoraConfig)} - {*OURS}
    if refusal := unsupported({key: value for key, value in record.items() if key not in own}):
        advice = "" if record.get("ensure_weight_tying") else f"; {_IN_PEFT}"  # which PEFT merges twice
        raise ModelFileError(f"{path}: {refusal}{advice}")
    if (init := record.get("init_lora_weights")) not in _KNOWN_INITIALISATIONS:
        raise ModelFileError(f"{path}: init_lora_weights = {init!r} changes the base weights: {_IN_PEFT}")
    missing = [key for key in ("r", "lora_alpha", "target_modules") if record.get(key) is None]
    if missing:
        raise ModelFileError(f"{path}: {missing[0]} is missing")
    values = {key: value for key, value in record.items() if key in own and value is not None}
    if values.get("layers_to_transform") == []:  # all of them
        del values["layers_to_transform"]
    if init not in FROM_BASE:
        values["init_lora_weights"] = True  # the initial values do not matter, because the file's replace them
    try:
        ours = {name: value for name, value in provenance.get("config", {}).items() if name in OURS}
        return LoraConfig(**values, **ours)
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"{path}: {error}") from error
