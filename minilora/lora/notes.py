"""`minilora.json`: what minilora says of an adapter and PEFT's format has no place for.

    {"format": 1,
     "base": {"name": "smollm2", "path": ..., "sha256": ..., "shape": {...},    the model that it was made for;
              "rounded_to": "nf4", "unrounded_sha256": ...},                    of a rounded one, what it was before
     "data": {"name": "legal", "sha256": ..., "records": 240,                   what it was trained on, if given
              "system": "You are ..."},                                         the system prompt of all records, if any
     "dropout": {...}}                                                          where its random numbers go on

A reader takes the entries that it knows. A folder without the file is an adapter all the same, as PEFT writes them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.disk import ModelFileError, read_json
from ..nn.module import Module, sha256_of
from .adapters import base_state

NOTES_FILE = "minilora.json"
FORMAT = 1

# What of a model's config decides whether an adapter's matrices fit and mean the same; how a message says it.
_SHAPE = {
    "num_hidden_layers": "{} blocks",
    "hidden_size": "width {}",
    "intermediate_size": "feed-forward width {}",
    "num_attention_heads": "{} query heads",
    "num_key_value_heads": "{} key/value heads",
    "head_dim": "head width {}",
    "vocab_size": "vocabulary {}",
}


def read_notes(folder: Path) -> dict[str, Any]:
    """The notes of an adapter's folder; empty when there are none, as for a file.

    Raises ModelFileError for a file of a later format, or for entries of another type than they have here.
    """
    path = folder / NOTES_FILE
    notes = read_json(path) if path.is_file() else {}
    if notes.get("format", FORMAT) != FORMAT:
        raise ModelFileError(f"{path}: format is {notes['format']!r}, this minilora reads {FORMAT}: use a newer one")
    for key in ("base", "data", "dropout"):
        if not isinstance(notes.get(key, {}), dict):
            raise ModelFileError(f"{path}: {key} is a {type(notes[key]).__name__}, expected an object")
    if not isinstance(notes.get("data", {}).get("system", ""), str):
        raise ModelFileError(
            f"{path}: system of the data is a {type(notes['data']['system']).__name__}, expected a text"
        )
    base = notes.get("base", {})
    for key in ("name", "path", "sha256", "shape", "rounded_to", "unrounded_sha256"):
        kind, expected = (dict, "an object") if key == "shape" else (str, "a text")
        if not isinstance(base.get(key), kind | None):
            raise ModelFileError(f"{path}: {key} of the base is a {type(base[key]).__name__}, expected {expected}")
    return notes


def base_note(model: Module, folder: Path, name: str | None = None, sha256: str | None = None) -> dict[str, Any]:
    """The entry "base" for an adapter of this model in this folder.

    name: of the base; what the model was loaded from if left out. sha256: `sha256_of(base_state(model))`, if the caller
    has it already: computing it takes a third of a second on a model of 135 million parameters.
    """
    name = name or getattr(model, "source", None)
    note = {"name": name, "sha256": sha256 or sha256_of(base_state(model)), "shape": _shape_of(model)}
    if (kind := getattr(model, "rounded_to", None)) is not None:
        note |= {"rounded_to": kind, "unrounded_sha256": getattr(model, "unrounded_sha256", None)}
    if name is not None and Path(name).exists():  # found again from anywhere, also when both have moved together
        try:
            note["path"] = Path(os.path.relpath(os.path.realpath(name), os.path.realpath(folder))).as_posix()
        except ValueError:  # on another drive of Windows
            note["path"] = Path(name).resolve().as_posix()
    return note


def refuse_other_base(model: Module, folder: Path, force: bool = False, sha256: str | None = None) -> None:
    """Raise ModelFileError when the folder's notes say that its adapter was made for another base than this model.

    force: another base of the same shape will do. sha256: as for `base_note`. Without notes, nothing is known. A base
    that was rounded as it was loaded is the same base as before, on either side.
    """
    base = read_notes(folder).get("base", {})
    wanted, own = base.get("shape") or {}, _shape_of(model)
    name = base.get("name") or "a base without a name"
    if different := [key for key in own if key in wanted and wanted[key] != own[key]]:
        theirs, ours = (", ".join(_SHAPE[key].format(shape[key]) for key in different) for shape in (wanted, own))
        raise ModelFileError(f"{folder}: made for {name}, with {theirs}; this model has {ours}: give the base it names")
    if force or base.get("sha256") is None:
        return
    sha256 = sha256 or sha256_of(base_state(model))
    if {sha256, getattr(model, "unrounded_sha256", None)}.isdisjoint(
        {base["sha256"], base.get("unrounded_sha256", "")}
    ):
        raise ModelFileError(
            f"{folder}: made for {name} with sha256 {base['sha256']}; this model has the same shape and sha256 "
            f"{sha256}: give the base it names, or --force (force=True) if you know better"
        )


def _shape_of(model: Module) -> Mapping[str, int]:
    config = getattr(model, "config", None)
    return {key: getattr(config, key) for key in _SHAPE if hasattr(config, key)}
