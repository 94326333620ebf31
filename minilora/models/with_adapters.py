"""Load a base together with adapters, and read how commands and requests name adapters."""

from __future__ import annotations

import math
import re
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
from .tokenizer import Message, Tokenizer, template_in

BASE_NAME = "base"  # the name of the model without an adapter in commands
DEFAULT_BASE = "smollm2"
_SEPARATOR = re.compile(r"[\s,=]")  # in a weighted combination
_TALK: list[Message] = [{"role": role, "content": "Why?"} for role in ("user", "assistant", "user")]
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


def mixable(named: Mapping[str, Path]) -> dict[str, Path]:
    """Adapters under names that `read_combination` can read: spaces, commas and = become -, which the log says.

    >>> list(mixable({"legal": Path("legal"), "my law, r=8": Path("law")}))
    ['legal', 'my-law--r-8']

    Raises ValueError if two names become the same.
    """
    renamed: dict[str, Path] = {}
    for name, folder in named.items():
        if (new := _SEPARATOR.sub("-", name)) in renamed or (new != name and new in named):
            raise ValueError(f"two adapters would be called {new!r}, one of them {folder}: name them as NAME=DIR")
        renamed[new] = folder
    if told := [f"{name!r} as {new}" for name, new in zip(named, renamed, strict=True) if name != new]:
        log.info(f"served under names without spaces, commas and =, so that they can be mixed: {', '.join(told)}")
    return renamed


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
    return model, _as_trained(tokenizer, named)


def _as_trained(tokenizer: Tokenizer, named: Mapping[str, Path]) -> Tokenizer:
    """The tokenizer with the chat template of the adapters' folders, in which TRL and transformers write the one that
    they trained with. Without one, or if the adapters have different ones, the base's stays.
    """
    own = own_templates(tokenizer, named)
    if own.keys() == named.keys() and len({_rendered(each) for each in own.values()}) == 1:
        name, found = next(iter(own.items()))
        log.info(f"{named[name]} has another chat template than the base, and is asked with its own")
        return found
    for name in own:
        log.warning(f"{named[name]} {OTHER_TEMPLATE}: load it alone")
    return tokenizer


OTHER_TEMPLATE = "was trained with its own chat template, and is asked here with another one"


def own_templates(tokenizer: Tokenizer, named: Mapping[str, Path]) -> dict[str, Tokenizer]:
    """The tokenizer with the template in the folder of each adapter that has one, if it renders a talk otherwise."""
    templates = {name: template_in(folder) for name, folder in named.items()}
    found = {name: tokenizer.with_template(each) for name, each in templates.items() if each is not None}
    return {name: each for name, each in found.items() if _rendered(each) != _rendered(tokenizer)}


def _rendered(tokenizer: Tokenizer) -> str | None:
    """A conversation that an answer follows; None if the template refuses it."""
    try:
        return tokenizer.render(_TALK, answer_next=True)
    except ModelFileError:
        return None


def log_other_rounding(model: LanguageModel, named: Mapping[str, Path]) -> None:
    """Log the lines of `other_rounding`: for commands that have --quantized."""
    for line in other_rounding(model, named):
        log.info(line)


def other_rounding(model: LanguageModel, named: Mapping[str, Path]) -> list[str]:
    """One line for each adapter that was trained on its base quantised otherwise."""
    kinds = {name: read_provenance(folder).get("base", {}).get("rounded_to") for name, folder in named.items()}
    return [
        f"{name} was trained on its base quantised to {kind}, which --quantized {kind} gives"
        for name, kind in kinds.items()
        if kind not in (None, "bf16", model.rounded_to)  # the differences of bfloat16 are small
    ]


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
