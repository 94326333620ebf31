"""An adapter merged into its base and written as a whole model, or handed on as a llama.cpp adapter file.

Both end with what they cost: the written file is read back and compared, and what a 4-bit base would have made of the
update is said in numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..engine.backend import Array, dense
from ..engine.tensor import no_grad
from ..files.disk import ModelFileError, replacing_folder
from ..files.levels import LEVELS
from ..files.quant import bytes_of_row, codes_of, dequantize, quantize
from ..lora.adapters import base_state, lora_modules, merge_adapter, merged_state, set_adapter
from ..lora.llamacpp import save_gguf_adapter
from ..lora.peft import load_adapter
from ..lora.provenance import read_provenance
from ..nn.llama import Config, Llama
from .folder import FILES, load_folder, save_folder
from .gguf import GGUF, GGUF_KINDS, in_pairs, save_gguf
from .load import locate
from .tokenizer import Tokenizer
from .versions import base_of, load_versions

ADAPTER = "default"
FOLDER_KINDS = ("F32", "F16")


@dataclass(frozen=True)
class Requantised:
    """What storing merged matrices in 4 bits does to the update: see `requantised`.

    Of these, `update_kept` foretells best what is left of the learning. SmolLM2 on its own Q4_1 base, 48 steps on the
    legal data: 7 % of the update is kept and 16.5 % of the fall in loss, with a rounding of 123 %. The tiny base in
    float32, 3 steps: 98 % and 69 %, with a rounding of 1,988 %.
    """

    matrices: int
    error: float  # ‖Q(W + ΔW) - (W + ΔW)‖ / ‖ΔW‖: how large the rounding is, measured by the update
    codes_kept: float  # share of 4-bit codes that are the base's, as if nothing had been learned
    update_kept: float  # ⟨Q(W + ΔW) - Q(W), ΔW⟩ / ‖ΔW‖²: how far the stored numbers moved where the update points
    kind: str = "Q4_1"  # or that of the base, if the adapter learned over a rounded one

    def verdict(self) -> str:
        """In words: rounding may be far larger than an update and keep it, as noise does, or swallow it whole."""
        if self.update_kept < 0.5:
            return "most of what was learned is lost"
        return "part of what was learned is lost" if self.update_kept < 0.9 else "what was learned is kept"


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
    rounded_to: str | None = None  # the adapter learned over this base rounded to this: "nf4"

    def __str__(self) -> str:
        lines = [f"wrote   {self.path}: {self.kind}, {self.bytes / 1e6:,.1f} MB, {self.matrices} matrices merged"]
        found = "the same logits, bit for bit"
        if self.logit_error:
            found = f"logits differ by at most {self.logit_error:.2g} (largest logit {self.logit_size:.3g})"
        lines.append(f"check   read back: {found}")
        if self.rounded_to is not None:
            lines.append(f"base    as its file holds it; the adapter learned over it rounded to {self.rounded_to}")
        if (lost := self.requantised) is not None:
            case = "stored" if self.kind == lost.kind else "if stored"
            lines += [
                f"4 bits  {case} as {lost.kind}, {lost.update_kept:.0%} of the update is kept: {lost.verdict()}",
                f"        (rounding {lost.error:.0%} of the update's size; {lost.codes_kept:.1%} of codes as before)",
            ]
            if self.kind == "Q4_1" and lost.update_kept < 0.9:
                lines.append("        --type q8_0 or f16 rounds less; minilora export leaves base and adapter apart")
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
    """(format, kind) as `merge` takes them, defaults filled in.

    Raises ValueError for a pair that does not exist, and for a name that says another format.
    """
    format = format or ("gguf" if out.suffix == ".gguf" else "hf")
    kinds = {"hf": FOLDER_KINDS, "gguf": GGUF_KINDS}[format]
    kind = (kind or {"hf": "F32", "gguf": "F16"}[format]).upper()
    if kind not in kinds:
        raise ValueError(f"a model of format {format} cannot be stored as {kind}; possible: {', '.join(kinds)}")
    if format == "gguf" and out.suffix != ".gguf":
        raise ValueError(f"{out}: the name of a GGUF file must end in .gguf")
    if format == "hf" and out.suffix == ".gguf":
        raise ValueError(f"{out}: format hf writes a folder, and .gguf is the ending of a file: choose another name")
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
    """Merge an adapter into its base and write the model that results.

    base: None for the one that the adapter's folder names. force: another base of the same shape will do.
    format: "hf", a folder that transformers reads; "gguf", a file for llama.cpp; by default as `out` ends.
    kind: how matrices are stored: F32 (default) or F16 in a folder, F16 (default), F32, Q8_0 or Q4_1 in a GGUF file.
    overwrite: replace a model that is there already. The base, the adapter and other files are never replaced.
    What is written appears whole or not at all. Raises ValueError for a combination that does not exist, or when `out`
    is taken; ModelFileError for files that cannot be read, or when what is read back is not what was written.
    """
    out = Path(out)
    format, kind = resolve(out, format, kind)
    place = _place_of_base(base, adapter, out, format, overwrite)
    model, tokenizer = load_versions({ADAPTER: Path(adapter)}, place, force=force)
    source = GGUF(place) if place.suffix == ".gguf" else None
    set_adapter(model, ADAPTER)
    merge_adapter(model)
    before, state = base_state(model), merged_state(model)
    rounded_to = read_provenance(Path(adapter)).get("base", {}).get("rounded_to")
    config = replace(model.config, tie_word_embeddings="lm_head.weight" not in state)
    changed = {name for name in state if name not in before or state[name] is not before[name]}
    if "lm_head.weight" in changed:  # untied: the head is the embedding of before
        changed.discard("lm_head.weight")
    lost = None
    if kind == "Q4_1" or (source is not None and any(_packed_in(source, name) for name in changed)):
        lost = requantised(before, state, changed, config, source)
    elif rounded_to and rounded_to.upper() in LEVELS:
        lost = requantised(before, state, changed, config, kind=rounded_to.upper())
    if format == "hf":
        _save_whole_folder(out, config, state, tokenizer, kind)
        written = load_folder(out)
        size = sum(file.stat().st_size for file in out.iterdir())
    else:
        out.parent.mkdir(parents=True, exist_ok=True)  # as for a folder
        save_gguf(out, config, state, tokenizer, kind, source, unchanged=set(before) - changed)
        written = GGUF(out).load()
        size = out.stat().st_size
    if kind == "F32":
        _check_same(out, state, written.state_dict())
    expected, got = _logits(model), _logits(written)
    apart, largest = float(np.abs(got - expected).max()), float(np.abs(expected).max())
    return MergeReport(out, kind, size, len(changed), apart, largest, lost, rounded_to)


def export(
    base: str | Path | None, adapter: str | Path, out: str | Path, overwrite: bool = False, force: bool = False
) -> ExportReport:
    """Write an adapter folder as a llama.cpp adapter file, and read that back.

    base, force: as for `merge`.
    overwrite: replace a file that is there already, unless it is the base or the adapter.
    Raises ValueError for what such a file cannot express, or when `out` does not end in .gguf or is taken.
    """
    out = Path(out)
    resolve(out, "gguf", "F32")
    place = _place_of_base(base, adapter, out, "gguf", overwrite)
    model, _ = load_versions({ADAPTER: Path(adapter)}, place, force=force)
    set_adapter(model, ADAPTER)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_gguf_adapter(model, out)
    expected = _logits(model)
    load_adapter(model, out, name="written")  # as strict as llama.cpp; active now
    return ExportReport(
        out, out.stat().st_size, len(lora_modules(model)), float(np.abs(_logits(model) - expected).max())
    )


def requantised(
    before: dict[str, Array],
    after: dict[str, Array],
    changed: set[str],
    config: Config,
    source: GGUF | None = None,
    kind: str = "Q4_1",
) -> Requantised:
    """What is left of an update when the merged matrices are packed into 4 bits again.

    before, after: the base's and the merged arrays by name; changed: those that differ. kind: Q4_1, NF4, FP4 or INT4.
    The base's codes are those of `source` where it is stored as Q4_1, else of the base packed here. Matrices whose rows
    are no whole blocks are left out.

    Four bits distinguish 16 values in a block of 32 weights. An update smaller than half such a step moves no code,
    unless the weight was near the border, and what remains of it is the block's step and minimum shifting a little.
    """
    rounding = update = along = 0.0
    kept = codes = matrices = 0
    for name in sorted(changed):
        if after[name].ndim != 2 or not _fits(after[name], kind):
            continue
        w, merged = (in_pairs(name, dense(state[name]), config) for state in (before, after))
        packed = quantize(merged, kind)
        own = np.asarray(source.tensors[name].data) if source and _packed_in(source, name) else quantize(w, kind)
        stored, delta = dequantize(packed, kind), merged - w
        rounding += float(np.square(stored - merged).sum(dtype=np.float64))
        update += float(np.square(delta).sum(dtype=np.float64))
        along += float(((stored - dequantize(own, kind)) * delta).sum(dtype=np.float64))
        kept += int((codes_of(packed, kind) == codes_of(own, kind)).sum())
        codes, matrices = codes + merged.size, matrices + 1
    return Requantised(
        matrices,
        error=(rounding / update) ** 0.5 if update else 0.0,
        codes_kept=kept / codes if codes else 1.0,
        update_kept=along / update if update else 1.0,
        kind=kind,
    )


def _fits(w: Array, kind: str) -> bool:
    try:
        return bytes_of_row(w.shape[1], kind) > 0
    except ValueError:
        return False


def _packed_in(source: GGUF, name: str) -> bool:
    return name in source.tensors and source.tensors[name].tensor_type.name == "Q4_1"


def _place_of_base(base: str | Path | None, adapter: str | Path, out: Path, format: str, overwrite: bool) -> Path:
    """Where the base is; raises before anything is loaded when `out` cannot be written."""
    place = locate(base if base is not None else base_of({ADAPTER: Path(adapter)}))
    _refuse_bad_place(out, {"base": place, "adapter": Path(adapter)}, format, overwrite)
    return place


def _refuse_bad_place(out: Path, sources: dict[str, Path], format: str, overwrite: bool) -> None:
    for what, path in sources.items():
        if out.exists() and path.exists() and out.samefile(path):
            raise ValueError(f"{out} is the {what} itself: choose another place")
    if format == "gguf" and out.is_dir():
        raise ValueError(f"{out} is a folder: choose another name")
    if format == "gguf" and out.exists() and not overwrite:
        raise ValueError(f"{out} is there already: choose another name, or --overwrite (overwrite=True)")
    replaceable = set(FILES if overwrite else ())  # beside an adapter, transformers would add that once more
    if format == "hf" and out.exists() and not (out.is_dir() and {path.name for path in out.iterdir()} <= replaceable):
        only = "; --overwrite (overwrite=True) replaces nothing but a whole model" if out.is_dir() else ""
        raise ValueError(f"{out} is there already: choose a folder that is new or empty{only}")


def _save_whole_folder(out: Path, config: Config, state: dict[str, Array], tokenizer: Tokenizer, kind: str) -> None:
    if kind == "F16":
        with np.errstate(over="ignore"):  # reported below
            half = {name: dense(w).astype(np.float16) for name, w in state.items()}
        if large := [name for name, w in half.items() if not np.isfinite(w).all()]:
            raise ValueError(f"{large[0]} holds numbers that are too large for F16")
        state = half
    with replacing_folder(out) as partial:
        save_folder(partial, config, state, tokenizer)


def _check_same(path: Path, state: dict[str, Array], written: dict[str, Array]) -> None:
    for name, w in state.items():
        if not np.array_equal(dense(w), written[name]):
            raise ModelFileError(f"{path}: {name} read back is not what was written: check the disk, and merge again")


def _logits(model: Llama) -> np.ndarray:
    ids = (np.arange(32) * 7919 % model.config.vocab_size).reshape(2, 16)
    ids = ids[:, : model.config.max_position_embeddings]
    with no_grad():
        return model(ids).data
