"""`minilora.json` in an adapter's folder: which base it was made for, and what it was trained on.

In the folder of a model that was merged, or fine-tuned as a whole, there is one, too, which only has what it was
trained on. A merged GGUF file has this entry, "data", as JSON in its metadata, and an adapter's GGUF file has "base" as
well: `KEYS`.

    {"format": 1,
     "base": {"name": "smollm2", "path": ..., "sha256": ..., "shape": {...},    the model that it was made for
              "rounded_to": "nf4", "unrounded_sha256": ...},                    if quantised: the kind, and the original
     "data": {"name": "legal", "sha256": ..., "records": 240,                   the training data, if known
              "path": "../../mine.csv",                                         where they are, if in a file or folder
              "revision": "3f1c...",                                            of a data set on huggingface.co
              "field": {"question": "q", "label": "kind"},                      their columns under other names
              "system": "You are ...",                                          the system prompt of all its records
              "context": "support-handbook", "context_path": ...,               where the passages of its prompts are
              "context_template": "... {passage} ... {question}",               such a prompt, if there were passages
              "labels": ["billing", ...], "template": "... {text}",             the task, if the data have labels
              "schema": {...}, "copied": [...], "template": ...,                the task, if the data have fields
              "split": "of every ten, ..."},                                    the rule that divided it, if one did
     "config": {"freeze_A": true},                                              fields that PEFT's config does not have
     "dropout": {...}}                                                          the state of its random masks

PEFT's format has no place for these entries. Readers ignore entries they do not know. A folder without this file is a
valid adapter too; PEFT writes such folders.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.disk import ModelFileError, read_json
from ..files.gguf_header import is_gguf, read_header
from ..nn.module import Module, sha256_of
from .adapters import base_state
from .config import OURS

PROVENANCE_FILE = "minilora.json"
DATA_KEY = "minilora.data"
KEYS = {"base": "minilora.base", "data": DATA_KEY}  # of these entries in the metadata of a GGUF file
FORMAT = 1

_CONTEXT = ("context", "context_path", "context_template")
_ENTRIES: dict[str, dict[str, Any]] = {  # those whose type is checked
    "base": {"shape": dict} | dict.fromkeys(("name", "path", "sha256", "rounded_to", "unrounded_sha256"), str),
    "data": {"field": dict, "labels": list, "schema": dict, "copied": list}
    | dict.fromkeys(("name", "path", "sha256", "revision", "system", "split", "template", *_CONTEXT), str),
    "config": OURS,
    "dropout": {},
}

# The fields of a model's config that an adapter depends on, and their wording in messages.
_SHAPE = {
    "num_hidden_layers": "{} blocks",
    "hidden_size": "width {}",
    "intermediate_size": "feed-forward width {}",
    "num_attention_heads": "{} query heads",
    "num_key_value_heads": "{} key/value heads",
    "head_dim": "head width {}",
    "vocab_size": "vocabulary {}",
}


def read_provenance(folder: Path) -> dict[str, Any]:
    """The contents of `minilora.json` in a folder, or the entries of a GGUF file; empty if there are none.

    Raises ModelFileError for another format, or for entries of another type than described above.
    """
    path = folder / PROVENANCE_FILE
    record = read_json(path) if path.is_file() else {}
    if folder.is_file() and is_gguf(folder):
        path, fields = folder, read_header(folder).fields
        for part, key in KEYS.items():
            if (field := fields.get(key)) is not None:
                try:
                    record[part] = json.loads(field.value)
                except (TypeError, ValueError, RecursionError) as error:
                    raise ModelFileError(f"{path}: {key} is not readable as JSON ({error})") from error
    if record.get("format", FORMAT) != FORMAT:
        raise ModelFileError(
            f"{path}: format is {record['format']!r}, this minilora reads {FORMAT}: install a newer minilora"
        )
    for part, entries in _ENTRIES.items():
        if not isinstance(given := record.get(part, {}), dict):
            raise ModelFileError(f"{path}: {part} is a {type(given).__name__}, expected an object")
        for key, kind in entries.items():
            if not isinstance(value := given.get(key), kind | None):
                expected = {dict: "an object", bool: "true or false", list: "a list"}.get(kind, "a text")
                raise ModelFileError(f"{path}: {key} of the {part} is a {type(value).__name__}, expected {expected}")
            if value is None:  # as if it were left out
                given.pop(key, None)
    return record


def provenance_of_base(
    model: Module, folder: Path, name: str | None = None, sha256: str | None = None
) -> dict[str, Any]:
    """The entry "base" for an adapter of this model.

    folder: the adapter's, from which a base in a file or folder is found again.
    name: of the base; if left out, what the model was loaded from.
    sha256: `sha256_of(base_state(model))`, if known; computing it takes 0.3 s for 135 million parameters.
    """
    name = name or getattr(model, "source", None)
    entry = {"name": name, "sha256": sha256 or sha256_of(base_state(model)), "shape": _shape_of(model)}
    if (kind := getattr(model, "rounded_to", None)) is not None:
        entry |= {"rounded_to": kind, "unrounded_sha256": getattr(model, "unrounded_sha256", None)}
    if (revision := getattr(model, "revision", None)) is not None:
        entry["revision"] = revision
    if name is not None and Path(name).exists():
        entry["path"] = path_from(folder, name)
    return entry


def path_from(folder: Path, name: str | Path) -> str:
    """The path to a file from an adapter's folder: it stays valid if both are moved together."""
    try:
        return Path(os.path.relpath(os.path.realpath(name), os.path.realpath(folder))).as_posix()
    except ValueError:  # no path leads from one Windows drive to another
        return Path(name).resolve().as_posix()


def place_of(folder: Path, path: str) -> Path:
    """Where a path of `path_from` leads. The adapter may be a file, too: its name counts as a folder."""
    return Path(os.path.normpath(os.path.join(os.path.realpath(folder), path)))


def moved_data(data: Mapping[str, Any], folder: Path, to: Path) -> dict[str, Any]:
    """The entry "data" of an adapter in one place, for another: the paths to its files lead from there."""
    return {
        **data,
        **{key: path_from(to, place_of(folder, data[key])) for key in ("path", "context_path") if key in data},
    }


def refuse_other_base(model: Module, folder: Path, force: bool, sha256: str | None) -> None:
    """Raise ModelFileError if the adapter in this folder was made for another base than this model.

    folder: the adapter's. If it has no `minilora.json`, any base is accepted.
    force: accept another base of the same shape.
    sha256: as for `provenance_of_base`.

    A base that is quantised on loading counts as the same base as the original.
    """
    base = read_provenance(folder).get("base", {})
    wanted, own = base.get("shape") or {}, _shape_of(model)
    name, right = base.get("name") or "another base", base.get("name") or "the base that it was trained on"
    if different := [key for key in own if key in wanted and wanted[key] != own[key]]:
        theirs, ours = (", ".join(_SHAPE[key].format(shape[key]) for key in different) for shape in (wanted, own))
        raise ModelFileError(f"{folder}: made for {name} with {theirs}; this model has {ours}: load {right} instead")
    if force or base.get("sha256") is None:
        return
    sha256 = sha256 or sha256_of(base_state(model))
    if {sha256, getattr(model, "unrounded_sha256", None)}.isdisjoint(
        {base["sha256"], base.get("unrounded_sha256", "")}
    ):
        same = "the same shape, but " if wanted and own else ""
        raise ModelFileError(
            f"{folder}: made for {name} with sha256 {base['sha256']}; this model has {same}sha256 "
            f"{sha256}: load {right} instead, or use --force (force=True) to accept this base"
        )


def _shape_of(model: Module) -> Mapping[str, int]:
    config = getattr(model, "config", None)
    return {key: getattr(config, key) for key in _SHAPE if hasattr(config, key)}
