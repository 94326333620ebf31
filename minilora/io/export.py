"""A whole model as a Hugging Face folder: what `transformers` and `minilora.load` read."""

from __future__ import annotations

import json
from pathlib import Path

from ..engine.backend import Array
from ..nn.llama import Config
from ..nn.tensorfile import write_tensors
from .tokenizer import Tokenizer


def save_folder(folder: str | Path, config: Config, state: dict[str, Array], tokenizer: Tokenizer) -> Path:
    """Write `config.json`, `model.safetensors` and the tokenizer's files; return the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    eos = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    record = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "float32"}
    record |= {name: getattr(config, name) for name in config.__dataclass_fields__} | eos
    _write_json(folder / "config.json", record)
    write_tensors(folder / "model.safetensors", state)
    tokenizer.core.save(str(folder / "tokenizer.json"))
    words = {"eos_token": tokenizer.eos, "pad_token": tokenizer.core.id_to_token(tokenizer.pad_id)}
    words |= {"bos_token": tokenizer.bos or None, "chat_template": tokenizer.template}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | words)
    return folder


def _write_json(path: Path, record: dict) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
