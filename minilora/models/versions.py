"""Versions of a base: the adapters in a few folders, on the base that they were made for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files.disk import ModelFileError, read_json
from ..lora.adapters import base_state, set_adapter
from ..lora.peft import CONFIG_FILE, load_adapter, read_adapter_config
from ..lora.provenance import read_provenance
from ..nn.llama import Llama
from ..nn.module import sha256_of
from .load import known_as, load
from .tokenizer import Tokenizer

BASE_NAME = "base"  # what commands call the model without an adapter
DEFAULT_BASE = "smollm2"
MOST_OF_ONE = 100  # times an adapter's update, in a mix: numbers stay finite, and no answer makes sense long before


def named_folders(words: Iterable[str]) -> dict[str, Path]:
    """Adapters as a command is given them: "legal=runs/legal", or "runs/legal", which is called as the folder.

    >>> {name: path.as_posix() for name, path in named_folders(["runs/legal", "law=runs/legal/last"]).items()}
    {'legal': 'runs/legal', 'law': 'runs/legal/last'}

    Raises ValueError for a name that is given twice, "base", or no name for an adapter.
    """
    named: dict[str, Path] = {}
    for word in words:
        name, equals, place = word.partition("=")
        if not equals or Path(word).exists():  # a folder's name may hold a "="
            name, place = _own_name(Path(word)), word
        if not name or not place or "." in name:
            raise ValueError(f"{word}: expected an adapter as DIR or NAME=DIR, with a name without dots")
        if name == BASE_NAME:
            raise ValueError(f"{word}: {BASE_NAME!r} is the model without an adapter: use another name, as NAME=DIR")
        if name in named:
            raise ValueError(f"two adapters are called {name!r}, {named[name]} and {place}: give names, as NAME=DIR")
        named[name] = Path(place)
    return named


def read_mix(text: str) -> dict[str, float]:
    """How much of which adapter, as a talk and a request say it.

    >>> read_mix("legal=0.5 support=0.25"), read_mix("legal=1, support=-1")
    ({'legal': 0.5, 'support': 0.25}, {'legal': 1.0, 'support': -1.0})

    Raises ValueError for what is no mix; which adapters there are is not known here.
    """
    mix: dict[str, float] = {}
    for word in text.replace(",", " ").split():
        name, _, number = word.rpartition("=")  # a folder's name may hold a "="
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if not name or not abs(factor) <= MOST_OF_ONE or name in mix:
            what = f"a mix is NAME=FACTOR NAME=FACTOR, each name once, factors from -{MOST_OF_ONE} to {MOST_OF_ONE}"
            raise ValueError(f"{word}: {what}, such as legal=0.5 support=0.5")
        mix[name] = factor
    return mix


def _own_name(path: Path) -> str:
    """What an adapter is called when nobody says: its folder's name; "legal-last" for the last of the run legal."""
    name = path.stem if path.suffix == ".gguf" else path.resolve().name
    if name == "last":
        name = f"{path.resolve().parent.name}-{name}"
    return name.replace(".", "-")


def load_versions(
    named: Mapping[str, Path],
    base: str | Path | None = None,
    quantized: bool | str = False,
    device: str = "cpu",
    force: bool = False,
    say: Callable[[str], None] | None = None,
    dtype: str = "float32",
) -> tuple[Llama, Tokenizer]:
    """Load a base and several adapters onto it, each under its name; none is active: `set_adapter` chooses.

    named: folders, or llama.cpp adapter files, by name. base: as for `load`; if left out, the one that the folders
    name, and "smollm2" where none names one. force: adapters of another base of the same shape are accepted, too.
    quantized, device, say, dtype: as for `load`.
    Raises ModelFileError for adapters of different bases, a base that is not there, and whatever cannot be read.
    """
    if base is None:
        base = base_of(named)
    else:
        _refuse_what_is_no_adapter(named)
    model, tokenizer = load(base, quantized, device=device, say=say, dtype=dtype)
    for name, folder in named.items():
        learned = read_provenance(folder).get("base", {}).get("rounded_to")
        if say is not None and learned not in (None, "bf16", model.rounded_to):  # bfloat16 is close to any base
            say(f"{name} learned over its base rounded to {learned}, which --quantized {learned} gives")
    told = any(read_provenance(folder).get("base", {}).get("sha256") for folder in named.values())
    digest = sha256_of(base_state(model)) if told and not force else None  # once for all of them
    for name, folder in named.items():
        load_adapter(model, folder, name, force, digest)
    set_adapter(model, None)
    return model, tokenizer


def base_of(named: Mapping[str, Path]) -> str | Path:
    """The base that these adapters were made for: a name or a path for `load`; "smollm2" where none says.

    Raises ModelFileError when they name different ones, or one that is not there.
    """
    _refuse_what_is_no_adapter(named)
    found: dict[Any, tuple[str, str | Path]] = {}
    hashes: set[str | None] = set()
    for name, folder in named.items():
        if (base := _base_named_in(folder)) is not None:
            found.setdefault(known_as(base) or Path(base).resolve(), (name, base))
            hashes.add(read_provenance(folder).get("base", {}).get("sha256"))
    if len(found) > 1 and (len(hashes) > 1 or None in hashes):  # not copies of one
        (one, its), (other, others), *_ = found.values()
        raise ModelFileError(
            f"{one} was made for {its}, {other} for {others}: adapters together need one base; leave some out, or give "
            "--base"
        )
    return next(iter(found.values()))[1] if found else DEFAULT_BASE


def _refuse_what_is_no_adapter(named: Mapping[str, Path]) -> None:
    """Before a base is looked for, fetched or loaded: that takes its time."""
    for folder in named.values():
        if not folder.is_file():
            read_adapter_config(folder)


def _base_named_in(folder: Path) -> str | Path | None:
    """What `load` should be told for the base that a folder names; None when it names none.

    A path is tried as it was seen from the adapter's folder, then from here.
    """
    if not (folder / CONFIG_FILE).is_file():
        return None  # a file of llama.cpp
    note = read_provenance(folder).get("base", {})
    name = note.get("name") or read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
    places = [folder / note["path"]] if note.get("path") else []
    if name:
        if (known := known_as(name)) is not None:
            return known
        places += [Path(name), folder / name]
    if not places:
        return None
    if (there := next((place for place in places if place.exists()), None)) is None:
        raise ModelFileError(
            f"{folder}: made for the base {name}, which is not here: give its folder or .gguf file with --base"
        )
    return there
