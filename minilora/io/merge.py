"""An adapter merged into its base and written as a whole model, or handed on as a llama.cpp adapter file.

Both end with what they cost: the written file is read back and compared, and what a 4-bit base would have made of the
update is said in numbers.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..engine.backend import Array, dense
from ..engine.tensor import no_grad
from ..files.quant import BLOCK, codes_q4_1, dequantize, quantize
from ..lora.adapters import base_state, lora_modules, merge_adapter, merged_state
from ..lora.llamacpp import save_gguf_adapter
from ..lora.peft import load_adapter
from ..nn.llama import Config, Llama
from .folder import load_folder, save_folder
from .gguf import GGUF, GGUF_KINDS, in_pairs, save_gguf
from .zoo import load, locate

FOLDER_KINDS = ("F32", "F16")


@dataclass(frozen=True)
class Requantised:
    """What storing merged matrices as Q4_1 does to the update: see `requantised`."""

    matrices: int
    error: float  # ‖Q(W + ΔW) - (W + ΔW)‖ / ‖ΔW‖: how large the rounding is, measured by the update
    codes_kept: float  # share of 4-bit codes that are the base's, as if nothing had been learned


@dataclass(frozen=True)
class MergeReport:
    """What `merge` wrote, and what it found when it read that back."""

    path: Path
    kind: str
    bytes: int
    matrices: int
    logit_error: float  # largest difference between the logits of the merged model and of the file
    logit_size: float  # the largest logit
    requantised: Requantised | None  # for a base in 4 bits, or when 4 bits were asked for

    def __str__(self) -> str:
        lines = [f"wrote   {self.path}: {self.kind}, {self.bytes / 1e6:,.1f} MB, {self.matrices} matrices merged"]
        found = "the same logits, bit for bit"
        if self.logit_error:
            found = f"logits differ by at most {self.logit_error:.2g} (largest logit {self.logit_size:.3g})"
        lines.append(f"check   read back: {found}")
        if (lost := self.requantised) is not None:
            stored = self.kind == "Q4_1"
            lines += [
                f"4 bits  {'storing' if stored else 'had they gone back into'} the merged matrices as Q4_1"
                f"{' rounded' if stored else ', rounding would have changed'} them by {lost.error:.0%} of the size of "
                "the update itself;",
                f"        {lost.codes_kept:.1%} of their codes {'are' if stored else 'would be'} the base's, unchanged",
            ]
        return "\n".join(lines)


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote, and what it found when it read that back."""

    path: Path
    bytes: int
    matrices: int
    logit_error: float  # largest difference between the logits of the adapter and of the file

    def __str__(self) -> str:
        return (
            f"wrote   {self.path}: llama.cpp adapter, F32, {self.bytes / 1e6:,.1f} MB, {self.matrices} matrices\n"
            f"check   read back: logits differ by at most {self.logit_error:.2g}"
        )


def resolve(out: Path, format: str | None, kind: str | None) -> tuple[str, str]:
    """(format, kind) as `merge` takes them, defaults filled in. Raises ValueError for a pair that does not exist."""
    format = format or ("gguf" if out.suffix == ".gguf" else "hf")
    kinds = {"hf": FOLDER_KINDS, "gguf": GGUF_KINDS}[format]
    kind = (kind or {"hf": "F32", "gguf": "F16"}[format]).upper()
    if kind not in kinds:
        raise ValueError(f"a model of format {format} cannot be stored as {kind}; possible: {', '.join(kinds)}")
    return format, kind


def merge(
    base: str | Path, adapter: str | Path, out: str | Path, format: str | None = None, kind: str | None = None
) -> MergeReport:
    """Merge an adapter into its base and write the model that results.

    format: "hf", a folder that transformers reads; "gguf", a file for llama.cpp; by default as `out` ends.
    kind: how matrices are stored: F32 (default) or F16 in a folder, F16 (default), F32, Q8_0 or Q4_1 in a GGUF file.
    What is written appears whole or not at all. Raises ValueError for a combination that does not exist, or when `out`
    is the base or would mix with files that are there already; ModelFileError for files that cannot be read.
    """
    out = Path(out)
    format, kind = resolve(out, format, kind)
    place = locate(base)
    _refuse_bad_place(out, place, format)
    model, tokenizer = load(place)
    source = GGUF(place) if place.suffix == ".gguf" else None
    load_adapter(model, adapter)
    merge_adapter(model)
    before, state = base_state(model), merged_state(model)
    config = replace(model.config, tie_word_embeddings="lm_head.weight" not in state)
    changed = {name for name in state if name not in before or state[name] is not before[name]}
    if "lm_head.weight" in changed:  # untied: the head is the embedding of before
        changed.discard("lm_head.weight")
    lost = None
    if kind == "Q4_1" or (source is not None and any(_packed_in(source, name) for name in changed)):
        lost = requantised(before, state, changed, config, source)
    if format == "hf":
        _save_whole_folder(out, config, state, tokenizer, kind)
        again = load_folder(out)
        size = sum(file.stat().st_size for file in out.iterdir())
    else:
        unchanged = set(before) - changed
        save_gguf(out, config, state, tokenizer, kind, source, unchanged)
        again = GGUF(out).load()
        size = out.stat().st_size
    expected, got = _logits(model), _logits(again)
    return MergeReport(
        out, kind, size, len(changed), float(np.abs(got - expected).max()), float(np.abs(expected).max()), lost
    )


def export(base: str | Path, adapter: str | Path, out: str | Path) -> ExportReport:
    """Write an adapter folder as a llama.cpp adapter file, and read that back.

    Raises ValueError for what such a file cannot express, or when `out` does not end in .gguf.
    """
    out = Path(out)
    place = locate(base)
    _refuse_bad_place(out, place, "gguf")
    model, _ = load(place)
    load_adapter(model, adapter)
    save_gguf_adapter(model, out)
    expected = _logits(model)
    load_adapter(model, out, name="again")  # as strict as llama.cpp; active now
    return ExportReport(
        out, out.stat().st_size, len(lora_modules(model)), float(np.abs(_logits(model) - expected).max())
    )


def requantised(
    before: dict[str, Array], after: dict[str, Array], changed: set[str], config: Config, source: GGUF | None = None
) -> Requantised:
    """What is left of an update when the merged matrices are packed into Q4_1 again.

    before, after: the base's and the merged arrays by name; changed: those that differ. The base's codes are those of
    `source` where it is stored as Q4_1, else of the base packed here. Matrices that Q4_1 cannot hold are left out.

    Four bits distinguish 16 values in a block of 32 weights. An update smaller than half such a step moves no code,
    unless the weight was near the border, and what remains of it is the block's step and minimum shifting a little.
    """
    rounding = update = 0.0
    kept = codes = matrices = 0
    for name in sorted(changed):
        if after[name].ndim != 2 or after[name].shape[1] % BLOCK:
            continue
        w, merged = (in_pairs(name, dense(state[name]), config) for state in (before, after))
        packed = quantize(merged, "Q4_1")
        own = source.tensors[name].data if source and _packed_in(source, name) else quantize(w, "Q4_1")
        rounding += float(np.square(dequantize(packed, "Q4_1") - merged).sum(dtype=np.float64))
        update += float(np.square(merged - w).sum(dtype=np.float64))
        kept += int((codes_q4_1(packed) == codes_q4_1(np.asarray(own))).sum())
        codes, matrices = codes + merged.size, matrices + 1
    return Requantised(matrices, (rounding / update) ** 0.5 if update else 0.0, kept / codes if codes else 1.0)


def _packed_in(source: GGUF, name: str) -> bool:
    return name in source.tensors and source.tensors[name].tensor_type.name == "Q4_1"


def _refuse_bad_place(out: Path, base: Path, format: str) -> None:
    if out.exists() and base.exists() and out.samefile(base):
        raise ValueError(f"{out} is the base itself: choose another place")
    if format == "gguf" and (out.is_dir() or out.suffix != ".gguf"):
        raise ValueError(f"{out}: the name of a GGUF file must end in .gguf")
    if format == "hf" and out.exists() and (not out.is_dir() or any(out.iterdir())):
        # Beside an adapter, transformers would add that to the merged model once more.
        raise ValueError(f"{out} is there already: choose a folder that is new or empty")


def _save_whole_folder(out: Path, config: Config, state: dict[str, Array], tokenizer, kind: str) -> None:
    """`save_folder` beside `out`, then moved to its place in one step."""
    if kind == "F16":
        half = {name: dense(w).astype(np.float16) for name, w in state.items()}
        if large := [name for name, w in half.items() if not np.isfinite(w).all()]:
            raise ValueError(f"{large[0]} holds numbers that are too large for F16")
        state = half
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        save_folder(partial, config, state, tokenizer)
        if out.is_dir():  # empty, or this fails
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _logits(model: Llama) -> np.ndarray:
    ids = (np.arange(32) * 7919 % model.config.vocab_size).reshape(2, 16)
    ids = ids[:, : model.config.max_position_embeddings]
    with no_grad():
        return model(ids).data
