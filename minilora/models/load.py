"""Load a model and its tokenizer: by name, from a GGUF file, or from a Hugging Face folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ..engine import bfloat16
from ..engine.backend import is_packed, to_device
from ..engine.parallel import leave_cores
from ..files.disk import ModelFileError, entries, reading, sha256_of_file
from ..files.gguf_header import is_gguf
from ..lora.provenance import read_provenance
from ..nn.language_model import LanguageModel
from ..options import BASE, suggestion
from ..progress import log
from .folder import load_folder
from .gguf import GGUF
from .hub import SOURCES, TINY, find, known_as, pull
from .repository import download, is_repository
from .rounded import rounded_to
from .tokenizer import Tokenizer, from_folder

__all__ = ["TINY", "dtype_of", "load", "load_tokenizer", "locate", "sha256_of_base"]


def locate(name: str | Path) -> Path:
    """The path of a base: the file of a named model, pulled if missing, the folder of "tiny", or the given path; for
    a name on huggingface.co, the folder of its files, downloaded if missing. Raises ModelFileError for a folder of GGUF
    files, as LM Studio keeps them.
    """
    short = known_as(name)
    if short is not None:
        return find(short) or pull(short)
    path = download(str(name)) if is_repository(name) else Path(name)
    if path.is_dir() and not (path / "config.json").exists() and (files := sorted(path.glob("*.gguf"))):
        raise ModelFileError(f"{path}: a folder without config.json; expected one of its files, such as {files[0]}")
    return path


def sha256_of_base(name: str | Path) -> str:
    """The fingerprint of a base's files; a missing one is pulled first. Raises ValueError where there is none."""
    path = locate(name)
    if not path.exists():
        raise ValueError(f"{path}: no such model; expected {BASE}")
    digest = hashlib.sha256()
    for each in [path] if path.is_file() else [each for each in entries(path) if each.is_file()]:
        digest.update(bytes.fromhex(sha256_of_file(each)))
    return digest.hexdigest()


def load(
    name: str | Path,
    quantized: bool | str = False,
    recompute: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
) -> tuple[LanguageModel, Tokenizer]:
    """Load a model and its tokenizer.

    name: "tiny", "smollm2" (pulled if missing), a name on huggingface.co (repository.py), a GGUF file, or a Hugging
        Face folder.
    quantized: True keeps the matrices of a GGUF file as they are stored (quant.PACKED has the kinds), and frozen. They
        take a fifth of float32's memory, but more time: a matmul with many rows dequantises them. A kind, "nf4",
        "fp4", "int4", "q8_0" or "q4_1", quantises the matrices of any base. All other weights are float32, and
        trainable until an adapter freezes them.
    recompute: activation checkpointing: save only each block's input, and compute the block again in the backward pass.
    device: "cpu" or "cuda".
    dtype: of the matrices. Trainable parameters, and everything between matmuls, are always float32.
        "float32": all of them, trainable until an adapter freezes them.
        "bfloat16": matmuls with frozen matrices are computed in bfloat16 (see engine/bfloat16.py). The matrices are
        rounded to it, or unpacked to it if they are quantised, and frozen. On a machine without bfloat16 matmuls are
        in float32, and a line in the log says so.

    Raises ModelFileError that names the file and what is wrong with it, ValueError for an unknown option.
    """
    kind = rounded_to(quantized)
    in_bfloat16 = _in_bfloat16(dtype, device)
    if in_bfloat16 and not quantized:
        kind = "BF16"
    path = locate(name)
    with reading(path):
        if path.is_dir():
            if quantized and kind is None:
                raise ModelFileError(
                    f"{name}: a Hugging Face folder holds no quantised matrices: leave --quantized "
                    "(quantized=True) out, or give it a kind, such as nf4"
                )
            model, tokenizer = load_folder(path, kind), from_folder(path)
        elif is_gguf(path):
            file = GGUF(path)
            model, tokenizer = file.load(quantized is True, kind), file.tokenizer()
        else:
            raise _unknown(name)
    if tokenizer.pad_id >= model.config.vocab_size:
        tokenizer.pad_id = tokenizer.eos_id  # no token attends to padding
    if not tokenizer.fits(model.config.vocab_size):
        raise ModelFileError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, but the model has only {model.config.vocab_size}: "
            "put the tokenizer of this model there"
        )
    leave_cores(in_bfloat16)
    for _, parameter in model.named_parameters():
        if in_bfloat16 and is_packed(parameter.data):
            parameter.data.in_bfloat16 = True
        if device != "cpu":
            parameter.data = to_device(parameter.data, device)
    model.decoder.recompute = recompute
    short = known_as(name)
    model.source = short or str(name)
    model.data = read_provenance(path).get("data", {})
    model.revision = path.name if is_repository(name) else None
    model.hub_name = SOURCES[short].hub if short in SOURCES else str(name).partition("@")[0] if model.revision else None
    return model, tokenizer


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a model, found as in `load`, without the model's weights. Raises ModelFileError as `load`."""
    path = locate(name)
    with reading(path):
        if path.is_dir():
            return from_folder(path)
        if is_gguf(path):
            return GGUF(path).tokenizer()
    raise _unknown(name)


def dtype_of(options: Any) -> str:
    """The `dtype` of `load` for the flag --bf16."""
    return "bfloat16" if options.bf16 else "float32"


def _in_bfloat16(dtype: str, device: str) -> bool:
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
    if dtype == "bfloat16" and device != "cpu":
        raise ValueError("dtype 'bfloat16' is for device 'cpu': leave out one of the two")
    if dtype == "bfloat16" and (reason := bfloat16.why_not()) is not None:
        log.warning("computing in float32, not in bfloat16: %s", reason)
        return False
    return dtype == "bfloat16"


def _unknown(name: str | Path) -> ModelFileError:
    known = ("tiny", *SOURCES)
    meant = suggestion(str(name), known)
    return ModelFileError(
        f"{name}: no such model{meant}; use {', '.join(known)}, a .gguf file, a Hugging Face folder, or a name on "
        "huggingface.co, such as Qwen/Qwen3-0.6B"
    )
