"""Hugging Face model folders: `config.json` and one or several safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.backend import Array
from ..files.disk import ModelFileError, read_json, write_json
from ..files.quant import Packed
from ..files.stored import StoredTensor, stays_packed, values_of
from ..files.tensors import stored_tensors, write_tensors
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

    One tensor is read after another. Raises ModelFileError that names the file and what is wrong with it.
    """
    config = read_config(folder)
    stored = stored_parameters(folder, config)

    def weight(name: str) -> Array:
        tensor = stored[name]
        if kind is not None and stays_packed(tensor):  # in 16 bits, until it is quantised, some rows at a time
            return Packed(tensor.raw(), tensor.kind)
        return values_of(tensor)

    try:
        check_claims(config, {name: tensor.shape for name, tensor in stored.items()})
        if kind is not None:
            return load_rounded(config, stored, weight, kind)
        model = empty_model(config)
        model.load_state_dict({name: weight(name) for name in stored})
    except ValueError as error:  # not ModelFileError alone: the length of a row may not be a multiple of the block
        raise ModelFileError(f"{folder}: {error}") from error
    return model


def stored_parameters(folder: Path, config: Any) -> dict[str, StoredTensor]:
    """The model's tensors in all files of the folder, by its own names. Raises ModelFileError for a damaged file."""
    index, whole = folder / "model.safetensors.index.json", (folder / "model.safetensors").is_file()
    if index.is_file() and not whole:  # as in transformers, a single file goes first
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelFileError(f"{index}: weight_map is a {type(weight_map).__name__}, expected files by tensor name")
        files = sorted({str(name) for name in weight_map.values()})
        if escaping := [name for name in files if Path(name).name != name or name in ("", "..")]:
            raise ModelFileError(f"{index}: {escaping[0]!r} is outside the folder")
    else:
        files = ["model.safetensors"]
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        if pickles and not whole:
            raise ModelFileError(
                f"{folder}: holds {pickles[0]} and no safetensors, and nothing is unpickled: choose a converted model, "
                "or convert it with transformers (save_pretrained)"
            )
    stored = {name: tensor for file in files for name, tensor in stored_tensors(folder / file).items()}
    family = FAMILIES[config.model_type]
    state = family.from_hugging_face(stored)
    head = state.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    table = state.get(f"{family.tensors['token_embd']}.weight")
    if head is not None and table is not None and not _same(head, table):  # some files store a tied embedding twice
        raise ModelFileError(
            f"{folder}: config.json has tie_word_embeddings true, but lm_head.weight is another matrix than "
            f"{table.name}: set tie_word_embeddings to false, or remove lm_head.weight"
        )
    return state


def _same(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two matrices hold the same values."""
    return (a.shape, a.kind) == (b.shape, b.kind) and np.array_equal(a.raw(), b.raw())


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
