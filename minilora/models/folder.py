"""Hugging Face model folders: `config.json` and one or several safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..engine.backend import Array
from ..files.disk import ModelFileError, read_json, write_json
from ..files.tensors import read_tensors, write_tensors
from ..nn.llama import Config, Llama, check_claims
from .rounded import load_rounded
from .tokenizer import Tokenizer, to_folder

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")  # what `save_folder` writes


def read_config(folder: Path) -> Config:
    """`config.json` as a Config. Raises ModelFileError for an architecture or option that minilora does not support."""
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != "llama":
        raise ModelFileError(f"{path}: model_type is {raw.get('model_type')!r}, minilora reads 'llama'")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelFileError(f"{path}: rope_parameters and rope_scaling must be objects, got {rope!r}")
    refused = {
        "attention_bias": bool(raw.get("attention_bias")),
        "mlp_bias": bool(raw.get("mlp_bias")),
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "rope_scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
    }
    if any(refused.values()):
        names = ", ".join(name for name, used in refused.items() if used)
        raise ModelFileError(f"{path}: minilora does not support this value of {names}")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    try:
        return Config(
            **{name: raw[name] for name in required},
            num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim") or 0,
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or raw.get("rope_theta") or 10000.0,
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ModelFileError(f"{path}: {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"{path}: {error}") from error


def load_folder(folder: Path, kind: str | None = None) -> Llama:
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
    state: dict[str, np.ndarray] = {}
    for name in files:
        state.update(read_tensors(folder / name, mapped=kind is not None))
    if kind is None:
        state = {name: w.astype(np.float32, copy=False) for name, w in state.items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)  # some files store a tied embedding twice
    state = {name: w for name, w in state.items() if not name.endswith("rotary_emb.inv_freq")}  # computed, not trained
    try:
        check_claims(config, {name: w.shape for name, w in state.items()})
        if kind is not None:
            return load_rounded(config, state, lambda name: state[name].astype(np.float32, copy=False), kind)
        model = Llama.empty(config)
        model.load_state_dict(state)
    except ValueError as error:  # not ModelFileError alone: the length of a row may not be a multiple of the block
        raise ModelFileError(f"{folder}: {error}") from error
    return model


def save_folder(folder: str | Path, config: Config, state: Mapping[str, Array], tokenizer: Tokenizer) -> Path:
    """Write `config.json`, the tokenizer's files and `model.safetensors`, in this order; return the folder.

    folder: is created if missing. Each file appears whole or not at all.
    config, state, tokenizer: the model's shape, its arrays by name, and its tokenizer.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    eos = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    dtype = str(next(iter(state.values())).dtype)
    record = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": dtype}
    record |= {name: getattr(config, name) for name in config.__dataclass_fields__} | eos
    write_json(folder / "config.json", record)
    to_folder(tokenizer, folder)
    write_tensors(folder / "model.safetensors", state)
    return folder
