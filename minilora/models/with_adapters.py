"""Load a base together with adapters, and read how commands and requests name adapters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files.disk import ModelFileError, read_json
from ..lora.adapters import base_state, set_adapter
from ..lora.peft import CONFIG_FILE, load_adapter, read_adapter_config
from ..lora.provenance import place_of, read_provenance
from ..nn.language_model import LanguageModel
from ..nn.module import sha256_of
from ..progress import log
from .hub import SOURCES, known_as
from .load import load
from .repository import is_repository
from .tokenizer import Tokenizer

BASE_NAME = "base"  # the name of the model without an adapter in commands
DEFAULT_BASE = "smollm2"
LARGEST_FACTOR = 100  # of an adapter: activations stay finite, although answers make no sense long before


def named_folders(words: Iterable[str]) -> dict[str, Path]:
    """Adapters given to a command as "legal=runs/legal", or as "runs/legal", which is named after its folder.

    >>> {name: path.as_posix() for name, path in named_folders(["runs/legal", "law=runs/legal/last"]).items()}
    {'legal': 'runs/legal', 'law': 'runs/legal/last'}

    Raises ValueError for a name that is used twice, "base", or an invalid name.
    """
    named: dict[str, Path] = {}
    for word in words:
        name, equals, place = word.partition("=")
        if not equals or Path(word).exists():  # a folder's name may contain "="
            name, place = _own_name(Path(word)), word
        if not name or not place or "." in name:
            raise ValueError(f"{word}: expected an adapter as DIR or NAME=DIR, with a name without dots")
        if name == BASE_NAME:
            raise ValueError(f"{word}: {BASE_NAME!r} is the model without an adapter: use another name, as NAME=DIR")
        if name in named:
            raise ValueError(f"two adapters are called {name!r}, {named[name]} and {place}: name them as NAME=DIR")
        named[name] = Path(place).expanduser()  # most shells leave a tilde after = as it is
    return named


def _own_name(path: Path) -> str:
    """An adapter's default name: that of its folder, or "legal-last" for the folder `last` of the run `legal`."""
    name = path.stem if path.suffix == ".gguf" else path.resolve().name
    if name == "last":
        name = f"{path.resolve().parent.name}-{name}"
    return name.replace(".", "-")


def read_combination(text: str) -> dict[str, float]:
    """A weighted combination of adapters, as written in the chat and in requests.

    >>> read_combination("legal=0.5 support=0.25"), read_combination("legal=1, support=-1")
    ({'legal': 0.5, 'support': 0.25}, {'legal': 1.0, 'support': -1.0})

    Raises ValueError for any other text. Whether the adapters exist is not checked here.
    """
    factors: dict[str, float] = {}
    for word in text.replace(",", " ").split():
        name, _, number = word.rpartition("=")  # a folder's name may contain "="
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not name or not abs(factor) <= LARGEST_FACTOR or name in factors:
            raise ValueError(
                f"{word}: expected NAME=FACTOR NAME=FACTOR, each name once, with factors from -{LARGEST_FACTOR} to "
                f"{LARGEST_FACTOR}, such as legal=0.5 support=0.5"
            )
        factors[name] = factor
    return factors


def load_with_adapters(
    named: Mapping[str, Path],
    base: str | Path | None = None,
    quantized: bool | str = False,
    device: str = "cpu",
    force: bool = False,
    dtype: str = "float32",
) -> tuple[LanguageModel, Tokenizer]:
    """Load a base and adapters for it. None of them is active: call `set_adapter` to choose.

    named: folders, or llama.cpp adapter files, by the adapters' names.
    base: if left out, the base that the folders name, or "smollm2" if none does.
    force: accept adapters of another base of the same shape. The others are as for `load`.

    Raises ModelFileError for adapters of different bases, a base that is missing, and unreadable files.
    """
    if base is None:
        base = base_of(named)
    else:
        _refuse_other_folders(named)
    model, tokenizer = load(base, quantized, device=device, dtype=dtype)
    stored = any(read_provenance(folder).get("base", {}).get("sha256") for folder in named.values())
    digest = sha256_of(base_state(model)) if stored and not force else None  # once for all of them
    for name, folder in named.items():
        load_adapter(model, folder, name, force, digest)
    set_adapter(model, None)
    return model, tokenizer


def base_of(named: Mapping[str, Path]) -> str | Path:
    """The base of these adapters, as a name or path for `load`; "smollm2" if no folder names one.

    Raises ModelFileError if they name different bases, or one that is missing.
    """
    _refuse_other_folders(named)
    found: dict[Any, tuple[str, str | Path]] = {}
    hashes: set[str | None] = set()
    for name, folder in named.items():
        if (base := _base_named_in(folder)) is not None:
            found.setdefault(known_as(base) or Path(base).resolve(), (name, base))
            hashes.add(read_provenance(folder).get("base", {}).get("sha256"))
    if len(found) > 1 and (len(hashes) > 1 or None in hashes):  # not copies of one base
        (one, its), (other, others), *_ = found.values()
        raise ModelFileError(
            f"{one} was made for {its}, {other} for {others}, but adapters that are loaded together need one base: "
            "leave some out, or give --base"
        )
    if not found and named:
        log.info(f"{next(iter(named.values()))} names no base: {DEFAULT_BASE} is taken, or another with --base")
    return next(iter(found.values()))[1] if found else DEFAULT_BASE


def _refuse_other_folders(named: Mapping[str, Path]) -> None:
    """Refuse folders that hold no adapter, before time is spent on downloading and loading a base."""
    for folder in named.values():
        if folder.suffix != ".gguf" or not folder.is_file():
            read_adapter_config(folder)


def _base_named_in(folder: Path) -> str | Path | None:
    """The base that a folder names, for `load`; None if it names none.

    First is minilora's own path, from the adapter's folder. A relative path in PEFT's config is tried from the current
    folder, as PEFT does, then from the adapter's.
    """
    entry, config = read_provenance(folder).get("base", {}), folder / CONFIG_FILE  # a llama.cpp file has none
    record = read_json(config) if config.is_file() else {}
    name = entry.get("name") or record.get("base_model_name_or_path")
    if name and (known := known_as(name)) is not None:
        if known != name:  # by PEFT, on the original: minilora.json has the short name
            rounded = f"{SOURCES[known].file}, in which matrices are rounded"
            log.info(f"{folder} was made for {name}, and is loaded on {rounded}: for the original, --base {name}@main")
        return known
    places = [place_of(folder, entry["path"])] if entry.get("path") else []
    places += [Path(name), folder / name] if name else []
    if there := next((place for place in places if place.exists()), None):
        return there
    revision = entry.get("revision") or record.get("revision")
    if name and revision and "@" not in name and is_repository(name):
        name = f"{name}@{revision}"
    if places and not (name and entry.get("revision")):
        raise ModelFileError(
            f"{folder}: made for the base {name}, which is not here: give its folder or .gguf file with --base"
        )
    return name or None  # on the hub, or none
