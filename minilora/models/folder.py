"""Hugging Face model folders: `config.json` and one or several safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.backend import Array
from ..files.disk import ModelFileError, read_json, write_json
from ..files.tensors import read_tensors, write_tensors
from ..nn.families import FAMILIES, check_claims, config_from_json, config_to_json, empty_model
from ..nn.language_model import LanguageModel
from .rounded import load_rounded
from .tokenizer import Tokenizer, to_folder

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")  # what `save_folder` writes


def read_config(folder: Path) -> Any:
    """`config.json` as a config. Raises ModelFileError for a family or a field that minilora does not support."""
    path = folder / "config.json"
    raw = read_json(path)
    try:
        return config_from_json(raw)
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from error


def load_folder(folder: Path, kind: str | None = None) -> LanguageModel:
    """Load a Hugging Face model folder in float32, or with its matrices quantised to `kind`, such as "NF4".

    Raises ModelFileError that names the file and what is wrong with it.
    """
    config = read_config(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelFileError(f"{index}: weight_map is a {type(weight_map).__name__}, expected files by tensor name")
        files = sorted({str(name) for name in weight_map.values()})
        if escaping := [name for name in files if Path(name).name != name or name in ("", "..")]:
            raise ModelFileError(f"{index}: {escaping[0]!r} is outside the folder")
    else:
        files = ["model.safetensors"]
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        if pickles and not (folder / files[0]).exists():
            raise ModelFileError(
                f"{folder}: holds {pickles[0]} and no safetensors, and nothing is unpickled: choose a converted model, "
                "or convert it with transformers (save_pretrained)"
            )
    state: dict[str, np.ndarray] = {}
    for name in files:
        state.update(read_tensors(folder / name, mapped=kind is not None))
    if kind is None:
        state = {name: w.astype(np.float32, copy=False) for name, w in state.items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)  # some files store a tied embedding twice
    state = FAMILIES[config.model_type].from_hugging_face(state)
    try:
        check_claims(config, {name: w.shape for name, w in state.items()})
        if kind is not None:
            return load_rounded(config, state, lambda name: state[name].astype(np.float32, copy=False), kind)
        model = empty_model(config)
        model.load_state_dict(state)
    except ValueError as error:  # not ModelFileError alone: the length of a row may not be a multiple of the block
        raise ModelFileError(f"{folder}: {error}") from error
    return model


def save_folder(folder: str | Path, config: Any, state: Mapping[str, Array], tokenizer: Tokenizer) -> Path:
    """Write `config.json`, the tokenizer's files and `model.safetensors`, in this order; return the folder.

    folder: is created if missing. Each file appears whole or not at all.
    config, state, tokenizer: the model's shape, its arrays by name, and its tokenizer.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ends = sorted(tokenizer.end_ids)
    eos = {"eos_token_id": ends if len(ends) > 1 else tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    dtype = str(next(iter(state.values())).dtype)
    write_json(folder / "config.json", config_to_json(config) | {"dtype": dtype} | eos)
    to_folder(tokenizer, folder)
    write_tensors(folder / "model.safetensors", FAMILIES[config.model_type].to_hugging_face(state))
    return folder
