"""Merge an adapter into its base and write the whole model, or export the adapter for llama.cpp.

Both read the written file back and compare it. `save_model` writes a model that is in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.backend import Array, release_memory
from ..engine.tensor import no_grad
from ..files.disk import ModelFileError, entries, replacing_folder, write_bytes, write_json
from ..files.gguf_header import is_gguf
from ..files.tensors import in_dtype
from ..lora.adapters import (
    active_factors,
    base_state,
    is_merged,
    lora_modules,
    merge_adapter,
    merged_state,
    set_adapter,
)
from ..lora.llamacpp import save_gguf_adapter
from ..lora.mlx import FILES as MLX_FILES
from ..lora.mlx import save_mlx_adapter
from ..lora.peft import load_adapter
from ..lora.provenance import FORMAT, PROVENANCE_FILE, moved_data, read_provenance
from ..nn.families import as_llama_cpp_has_it
from ..nn.language_model import LanguageModel, check_language_model
from ..nn.module import sha256_of
from ..terminal import quote
from .folder import FILES, load_folder, save_folder
from .gguf import GGUF, GGUF_KINDS, save_gguf
from .load import locate
from .tokenizer import Tokenizer, check_tokenizer, template_in
from .with_adapters import base_of, load_with_adapters

ADAPTER = "default"
FOLDER_KINDS = ("F32", "F16")
_ASKED = {  # what decides how a model is asked, by the key of "data"
    "labels": "the labels",
    "schema": "the fields",
    "context_template": "the template with a passage",
    "system": "the system prompt",
}


@dataclass(frozen=True)
class MergeReport:
    """What `merge` wrote, and how it compares with the merged model.

    path, kind, bytes: of the file or folder.
    matrices: how many have an update.
    logit_error: the largest difference between the logits of the merged model and those of the written one.
    largest_logit: for comparison.
    rounded_to: the kind to which the base was quantised in training, such as "nf4".
    data: what the adapter was trained on, which the model keeps.
    """

    path: Path
    kind: str
    bytes: int
    matrices: int
    logit_error: float
    largest_logit: float
    rounded_to: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"wrote   {self.path}: {self.kind}, {self.bytes / 1e6:,.1f} MB, {self.matrices} matrices merged"]
        found = "the same logits, bit for bit"
        if self.logit_error:
            found = f"logits differ by at most {self.logit_error:.2g} (largest logit {self.largest_logit:.3g})"
        lines.append(f"check   read back: {found}")
        is_file = self.path.suffix == ".gguf"
        told, reads = ("the file tells", "llama.cpp does") if is_file else ("the folder tells", "transformers does")
        lines += _asked_there(self.data, told, reads)
        return "\n".join([*lines, *_rounded_base(self.rounded_to)])


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote, and the largest difference between the logits of the adapter and of the file."""

    path: Path
    bytes: int
    matrices: int
    logit_error: float | None  # of a folder for mlx-lm, which is not read back
    dtype: str = "float32"
    data: Mapping[str, Any] = field(default_factory=dict)  # what the adapter was trained on
    rounded_to: str | None = None  # the kind to which the base was quantised in training, such as "nf4"
    template: Path | None = None  # the chat template, if the base's files have none

    def __str__(self) -> str:
        what = "mlx-lm" if self.logit_error is None else "llama.cpp"
        wrote = (
            f"wrote   {self.path}: {what} adapter, {self.dtype}, {self.bytes / 1e6:,.1f} MB, {self.matrices} matrices"
        )
        base = _rounded_base(self.rounded_to)
        if self.logit_error is None:
            asked = _asked_there(self.data, "the adapter's own folder tells", f"{what} does")
            return "\n".join([wrote, *asked, *base])
        lines = [wrote, f"check   read back: logits differ by at most {self.logit_error:.2g}"]
        lines += _asked_there(self.data, "the file tells", "llama.cpp does")
        if self.template is not None:
            lines += [
                "prompt  the base's file has no chat template: start",
                f"        llama.cpp with --jinja --chat-template-file {quote(str(self.template))}",
            ]
        return "\n".join([*lines, *base])


def _rounded_base(kind: str | None) -> list[str]:
    """The line on a base that was quantised in training."""
    small = kind in (None, "bf16")  # the differences of bfloat16 are small
    return [] if small else [f"base    as in its file; the adapter was trained on it quantised to {kind}"]


def _asked_there(data: Mapping[str, Any], told: str, reads: str) -> list[str]:
    """The lines on what decides how a model is asked, where another program does not know it.

    data: as in `minilora.json`. told, reads: the beginning of the sentence, and of its second half.
    """
    if not (known := [what for key, what in _ASKED.items() if key in data]):
        return []
    return [
        f"prompt  {told} minilora {', '.join(known)}; {reads} not read that:",
        f"        write it into the prompt there, as the adapter's {PROVENANCE_FILE} has it",
    ]


def resolve(out: Path, format: str | None, kind: str | None) -> tuple[str, str]:
    """The (format, kind) of `merge`, with defaults.

    Raises ValueError for a kind that the format does not have, and for a file name of another format.
    """
    format = format or ("gguf" if out.suffix == ".gguf" else "hf")
    kinds = {"hf": FOLDER_KINDS, "gguf": GGUF_KINDS}[format]
    kind = (kind or {"hf": "F32", "gguf": "F16"}[format]).upper()
    if kind not in kinds:
        raise ValueError(f"a model of format {format} cannot be stored as {kind}; possible: {', '.join(kinds)}")
    if format == "gguf" and out.suffix != ".gguf":
        raise ValueError(f"{out}: the name of a GGUF file must end in .gguf")
    if format == "hf" and out.suffix == ".gguf":
        raise ValueError(f"{out}: format hf writes a folder, but .gguf is for files: choose another name")
    return format, kind


def merge(
    base: str | Path | None,
    adapter: str | Path,
    out: str | Path,
    format: str | None = None,
    kind: str | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> MergeReport:
    """Merge an adapter into its base and write the resulting model. It appears whole or not at all.

    base: as for `load`; None for the one that the adapter's folder names.
    adapter: its folder, or a llama.cpp adapter file.
    out: a new folder or file.
    format: "hf", a folder for transformers, or "gguf", a file for llama.cpp; by default from the ending of `out`.
    kind: how matrices are stored: F32 (default) or F16 in a folder; F16 (default), F32, Q8_0 or Q4_1 in a GGUF file.
    overwrite: replace a model at `out`. The base, the adapter and other files are never replaced.
    force: accept another base of the same shape.

    Raises ValueError for an invalid combination, or if `out` exists; ModelFileError for files that cannot be read, or
    if the written model differs from the merged one.
    """
    out = Path(out)
    format, kind = resolve(out, format, kind)
    place = _locate_base(base, adapter, out, format, overwrite)
    model, tokenizer = load_with_adapters({ADAPTER: Path(adapter)}, place, force=force)
    source = GGUF(place) if is_gguf(place) else None
    set_adapter(model, ADAPTER)
    merge_adapter(model)
    config, before, state, known = model.config, base_state(model), merged_state(model), read_provenance(Path(adapter))
    rounded_to, data = known.get("base", {}).get("rounded_to"), moved_data(known.get("data", {}), Path(adapter), out)
    changed = {name for name in state if name not in before or state[name] is not before[name]}
    expected, unchanged = _logits(model), set(before) - changed
    del model, before  # the base, for which there may be no room next to the model that is written and read back
    release_memory()
    _write(out, format, kind, config, state, tokenizer, source, unchanged, data)
    wanted = _fingerprints(format, config, state) if kind == "F32" else {}
    del state
    release_memory()
    written = _read(out)
    size = sum(file.stat().st_size for file in (out.iterdir() if format == "hf" else [out]))
    _check_same(out, wanted, written.state_dict())
    got = _logits(written)
    apart, largest = float(np.abs(got - expected).max()), float(np.abs(expected).max())
    return MergeReport(out, kind, size, len(changed), apart, largest, rounded_to, data)


def save_model(
    model: LanguageModel, tokenizer: Tokenizer, out: str | Path, kind: str | None = None, overwrite: bool = False
) -> Path:
    """Write a whole model, trained as a whole or with a merged adapter: a folder for transformers, or, if `out` ends in
    .gguf, a file for llama.cpp. Return its path. It appears whole or not at all.

    model, tokenizer: as `load` returns them.
    kind, overwrite: as for `merge`.

    What decides how the model is asked (labels, fields, system prompt) is written as well, where it is known: of the
    merged adapter, or else of the whole model, which had been fine-tuned and was loaded.

    Raises ValueError while an adapter is active that is not merged, for layers of your own, a kind that the format does
    not have, values too large for it, or if `out` exists.
    """
    check_language_model(model, "save_model")
    check_tokenizer(tokenizer)
    out = Path(out)
    format, kind = resolve(out, None, kind)
    _refuse_existing(out, format, overwrite)
    if active_factors(model) and not is_merged(model):
        raise ValueError(
            "an adapter is active that is not merged: call merge_adapter to write it into the weights, or "
            "set_adapter(model, None) to save the base alone"
        )
    config, state = model.config, merged_state(model) if is_merged(model) else base_state(model)
    if own := sorted(state.keys() - type(model).empty(config).state_dict().keys()):
        raise ValueError(
            f"{own[0]} is not a parameter of a {config.model_type} model, so no program would compute with it: put the "
            "model's own layers back, with what yours have learned in their weights"
        )
    _write(out, format, kind, config, state, tokenizer, data=_data_in(model, out))
    return out


def _data_in(model: LanguageModel, to: Path) -> dict[str, Any]:
    """What the one merged adapter, or else the whole model, was trained on, for a model at `to`; empty for several."""
    merged = [model.adapters[name] for name in active_factors(model)]
    found = [(one.data, one.folder) for one in merged if one.data] or [(model.data, model.source)]
    data, folder = found[0]
    return moved_data(data, Path(folder or to), to) if len(found) == 1 else {}


def export(
    base: str | Path | None,
    adapter: str | Path,
    out: str | Path,
    overwrite: bool = False,
    force: bool = False,
    format: str = "gguf",
    dtype: str = "float32",
) -> ExportReport:
    """Write an adapter folder as a llama.cpp adapter file, and compare the file with it; or as mlx-lm's folder. Next to
    the file is the chat template, if the base's files have none.

    base, adapter, force: as for `merge`.
    out: a file that ends in .gguf; for mlx-lm, a new folder.
    overwrite: replace such an adapter at `out`, or any file that is neither the base nor the adapter.
    format: "gguf" or "mlx".
    dtype: "float32", or "float16" in half the space.

    Raises ValueError for an adapter that such a file cannot express, or if `out` is invalid or exists.
    """
    out, is_file = Path(out), format == "gguf"
    resolve(out, "gguf" if is_file else "hf", "F32")
    name = base if base is not None else base_of({ADAPTER: Path(adapter)})  # which the file names, not its place here
    place = _locate_base(name, adapter, out, format, overwrite)
    model, tokenizer = load_with_adapters({ADAPTER: Path(adapter)}, name, force=force)
    set_adapter(model, ADAPTER)
    data, rounded_to = model.adapters[ADAPTER].data, read_provenance(Path(adapter)).get("base", {}).get("rounded_to")
    if not is_file:
        save_mlx_adapter(model, out, dtype=dtype)
        size = sum(file.stat().st_size for file in out.iterdir())
        return ExportReport(out, size, len(lora_modules(model)), None, dtype, data, rounded_to)
    out.parent.mkdir(parents=True, exist_ok=True)
    digest = sha256_of(base_state(model))
    save_gguf_adapter(model, out, dtype=dtype, base_sha256=digest)
    expected = _logits(model)
    load_adapter(model, out, name="written", base_sha256=digest)  # becomes the active one
    apart = float(np.abs(_logits(model) - expected).max())
    own = GGUF(place).metadata.get("tokenizer.chat_template") if place.is_file() else template_in(place)
    template = out.with_suffix(".jinja") if own is None else None
    if template is not None:
        write_bytes(template, tokenizer.template.encode())
    size, matrices = out.stat().st_size, len(lora_modules(model))
    return ExportReport(out, size, matrices, apart, dtype, data, rounded_to, template)


def _locate_base(base: str | Path | None, adapter: str | Path, out: Path, format: str, overwrite: bool) -> Path:
    """The path of the base. Raises, before anything is loaded, if `out` cannot be written."""
    place = locate(base if base is not None else base_of({ADAPTER: Path(adapter)}))
    for what, path in (("base", place), ("adapter", Path(adapter))):
        if out.exists() and path.exists() and out.samefile(path):
            raise ValueError(f"{out} is the {what} itself: choose another name")
    _refuse_existing(out, format, overwrite)
    return place


def _refuse_existing(out: Path, format: str, overwrite: bool) -> None:
    if format == "gguf" and out.is_dir():
        raise ValueError(f"{out} is a folder: choose another name")
    beside = (out, out.with_suffix(".jinja"))  # which may have been edited since
    if format == "gguf" and not overwrite and (there := [path for path in beside if path.exists()]):
        raise ValueError(f"{there[0]} exists: choose another name, or --overwrite (overwrite=True)")
    whole = {*FILES, PROVENANCE_FILE}  # an adapter next to it would be applied again
    known, what = ({*MLX_FILES}, "an adapter of mlx-lm") if format == "mlx" else (whole, "a whole model")
    replaceable = out.is_dir() and {path.name for path in entries(out)} <= (known if overwrite else set())
    if format != "gguf" and out.exists() and not replaceable:
        only = f"; --overwrite (overwrite=True) replaces only {what}" if out.is_dir() else ""
        raise ValueError(f"{out} exists: choose a new or empty folder{only}")


def _write(
    out: Path,
    format: str,
    kind: str,
    config: Any,
    state: dict[str, Array],
    tokenizer: Tokenizer,
    source: GGUF | None = None,
    unchanged: Collection[str] = (),
    data: Mapping[str, Any] | None = None,
) -> None:
    if format == "hf":
        state = in_dtype(state, {"F32": "float32", "F16": "float16"}[kind], "--type f32 (kind='F32')")
        with replacing_folder(out) as partial:
            save_folder(partial, config, state, tokenizer)
            if data:  # whoever loads the model asks it as it was trained
                write_json(partial / PROVENANCE_FILE, {"format": FORMAT, "data": data})
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_gguf(out, config, state, tokenizer, kind, source, unchanged, data)


def _read(out: Path) -> LanguageModel:
    return load_folder(out) if out.is_dir() else GGUF(out).load()


def _fingerprints(format: str, config: Any, state: Mapping[str, Array]) -> dict[str, str]:
    """The fingerprint of each tensor of a model, as a file in this format has it."""
    there = state if format == "hf" else as_llama_cpp_has_it(config, state)
    return {name: sha256_of({name: w}) for name, w in there.items()}


def _check_same(path: Path, wanted: Mapping[str, str], written: Mapping[str, Array]) -> None:
    for name, sha256 in wanted.items():
        if sha256_of({name: written[name]}) != sha256:
            raise ModelFileError(
                f"{path}: {name} in the written file differs from the merged one: check the disk, merge again"
            )


def _logits(model: LanguageModel) -> np.ndarray:
    ids = (np.arange(32) * 7919 % model.config.vocab_size).reshape(2, 16)
    ids = ids[:, : model.config.max_position_embeddings]
    with no_grad():
        return model(ids).data
