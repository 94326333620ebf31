"""A whole model as a Hugging Face folder, which `transformers` reads, or as a GGUF file, which llama.cpp reads.

`minilora.load` reads both.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.backend import Array, dense, to_numpy
from ..nn.ggufile import llama_cpp_name, write_gguf
from ..nn.llama import Config, to_pairs
from ..nn.quant import BLOCK, quantize
from ..nn.tensorfile import ModelFileError, replacing, write_tensors
from .gguf import GGUF
from .tokenizer import Tokenizer

GGUF_KINDS = ("F32", "F16", "Q8_0", "Q4_1")
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_1": 3, "Q8_0": 7}  # llama.cpp's number for what most of a file is stored as

# -- a Hugging Face folder ---------------------------------------------------------------------------------------------


def save_folder(folder: str | Path, config: Config, state: Mapping[str, Array], tokenizer: Tokenizer) -> Path:
    """Write `config.json`, `model.safetensors` and the tokenizer's files; return the folder.

    Each file appears whole or not at all, the weights last.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    eos = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    dtype = str(next(iter(state.values())).dtype)
    record = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": dtype}
    record |= {name: getattr(config, name) for name in config.__dataclass_fields__} | eos
    _write_json(folder / "config.json", record)
    with replacing(folder / "tokenizer.json") as partial:
        tokenizer.core.save(str(partial))
    words = {"eos_token": tokenizer.eos, "pad_token": tokenizer.core.id_to_token(tokenizer.pad_id)}
    words |= {"bos_token": tokenizer.bos or None, "chat_template": tokenizer.template}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | words)
    write_tensors(folder / "model.safetensors", state)
    return folder


def _write_json(path: Path, record: dict[str, Any]) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


# -- a GGUF file -------------------------------------------------------------------------------------------------------


def save_gguf(
    path: str | Path,
    config: Config,
    state: Mapping[str, Array],
    tokenizer: Tokenizer,
    kind: str = "F16",
    source: GGUF | None = None,
    unchanged: Collection[str] = (),
) -> Path:
    """Write a model as a GGUF file and return its path. It appears whole or not at all.

    kind: how matrices are stored, one of GGUF_KINDS; norms stay F32, and a matrix whose rows are no whole blocks
    becomes F16, as in llama.cpp. source: the file from which the model came; all that it says about the model and its
    tokenizer is copied. unchanged: tensors that are still what they were there; quantised ones are then copied as they
    are when `kind` is quantised, since packing them anew could only lose.
    Raises ModelFileError when a GGUF file cannot express the tokenizer, ValueError for numbers too large for `kind`.
    """
    path = Path(path)
    tensors: dict[str, tuple[np.ndarray, str]] = {}
    for name, array in state.items():
        stored = source.tensors[name] if source is not None and name in unchanged else None
        if stored is not None and kind.startswith("Q") and stored.tensor_type.name.startswith("Q"):
            tensors[llama_cpp_name(name)] = (np.asarray(stored.data), stored.tensor_type.name)
            continue
        w = in_pairs(name, to_numpy(dense(array)), config)
        try:
            tensors[llama_cpp_name(name)] = _packed(w, kind, name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    description: dict[str, Any] = {"general.architecture": "llama", "general.type": "model"}
    if source is None:
        description |= _shape_metadata(config) | tokenizer_metadata(tokenizer, config.vocab_size)
    else:
        internal = ("GGUF.", "general.architecture", "general.alignment")
        description |= {key: field for key, field in source.fields.items() if not key.startswith(internal)}
    description |= {"general.file_type": _FILE_TYPES[kind], "general.quantization_version": 2}
    write_gguf(path, description, tensors)
    return path


def in_pairs(name: str, w: np.ndarray, config: Config) -> np.ndarray:
    """A tensor as llama.cpp lays it out: rows of q and k as adjacent rotary pairs, anything else as it is."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    part = name.split(".")[-2]
    return to_pairs(w, heads[part]) if part in heads else w


def kind_of(w: np.ndarray, kind: str, name: str = "") -> str:
    """How `save_gguf` stores this array when matrices are to be stored as `kind`.

    With Q4_1 the embedding and the head become Q8_0: every token's score hangs on them.
    """
    if w.ndim == 1:
        return "F32"
    if kind.startswith("Q") and w.shape[1] % BLOCK:
        return "F16"
    return "Q8_0" if kind == "Q4_1" and name in ("model.embed_tokens.weight", "lm_head.weight") else kind


def _packed(w: np.ndarray, kind: str, name: str) -> tuple[np.ndarray, str]:
    kind = kind_of(w, kind, name)
    return (w.astype(np.float32, copy=False), kind) if w.ndim == 1 else (quantize(w, kind), kind)


def _shape_metadata(config: Config) -> dict[str, Any]:
    return {
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_theta),
    }


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """A byte-level BPE tokenizer as a GGUF file describes it; ids up to `vocab_size` without a token are padded.

    Raises ModelFileError, saying why, for a tokenizer that llama.cpp would run differently.
    """
    record = json.loads(tokenizer.core.to_str())
    model = record["model"]
    off = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    used = [key for key in off if model.get(key)] + ["normalizer"] * (record.get("normalizer") is not None)
    added = {entry["content"]: entry["special"] for entry in record["added_tokens"]}
    if model["type"] != "BPE" or (record.get("decoder") or {}).get("type") != "ByteLevel":
        used.append("anything but byte-level BPE")
    if used or (splitting := _splitting(record.get("pre_tokenizer") or {})) is None:
        what = ", ".join(used) or "this way of splitting text into words"
        raise ModelFileError(f"the tokenizer uses {what}: minilora cannot write it to a GGUF file")
    if plain := [token for token, special in added.items() if not special]:
        raise ModelFileError(
            f"the tokenizer's added token {plain[0]!r} is not special: minilora cannot write it to GGUF"
        )
    if not model["merges"]:
        raise ModelFileError("the tokenizer has no merges, and a GGUF file cannot say so")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [5] * vocab_size  # 5: unused, 3: control, 1: normal
    for token, i in tokenizer.core.get_vocab(with_added_tokens=True).items():
        tokens[i], kinds[i] = token, 3 if token in added else 1
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    bos_id = tokenizer.core.token_to_id(tokenizer.bos) if tokenizer.bos else None
    begins = tokenizer.core.encode("a").ids[:1] == [bos_id]
    ids = {"bos": bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": splitting,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None},
        "tokenizer.ggml.add_bos_token": begins,
        "tokenizer.chat_template": tokenizer.template,
    }


def _splitting(record: dict[str, Any]) -> str | None:
    """llama.cpp's name for a pre-tokenizer: `smollm` splits single digits off first, `gpt-2` does not; None else."""
    steps = record.get("pretokenizers", [record])
    digits = [step for step in steps if step.get("type") == "Digits" and step.get("individual_digits")]
    by_bytes = [step for step in steps if step.get("type") == "ByteLevel"]
    if len(by_bytes) != 1 or by_bytes[0].get("add_prefix_space") or not by_bytes[0].get("use_regex", True):
        return None
    return {1: "gpt-2", 2: "smollm"}.get(len(steps)) if steps == [*digits, *by_bytes] else None
