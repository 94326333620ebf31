"""Repositories by their names on huggingface.co, such as `Qwen/Qwen3-0.6B` or `Qwen/Qwen3-0.6B@REVISION`.

The library `huggingface_hub` (pip install 'minilora[hub]') downloads, and keeps its cache, tokens (HF_TOKEN), mirror
(HF_ENDPOINT) and offline switch (HF_HUB_OFFLINE). Of a model, only safetensors and the texts of config and tokenizer
are downloaded: nothing is ever unpickled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..files.disk import ModelFileError

FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
         "tokenizer_config.json", "chat_template.jinja")  # fmt: skip


def is_repository(name: str | Path) -> bool:
    """True for `ORGANISATION/NAME`, maybe with `@REVISION`, if it is no path: a folder that exists takes precedence.

    >>> is_repository("Qwen/Qwen3-0.6B"), is_repository("models/base.gguf"), is_repository("tiny")
    (True, False, False)
    """
    text = str(name)
    named = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", text) is not None and not text.endswith(".gguf")
    return named and not Path(text).exists() and not Path(text).parent.exists()


def download(name: str) -> Path:
    """The folder of a model's files, as `snapshot`. Raises ModelFileError also for a model without safetensors."""
    folder = snapshot(name, FILES)
    if not any(folder.glob("*.safetensors")):
        raise ModelFileError(f"{name}: holds no safetensors, and nothing else is loaded: choose a converted model")
    return folder


def snapshot(name: str, files: Sequence[str], kind: str = "model") -> Path:
    """The folder of a repository's files in the library's cache, downloaded if missing. Its own name is the revision.

    files: which files, as names or patterns. kind: "model" or "dataset".

    Raises ModelFileError in one line: without the library, without a network, for an unknown name or revision, for a
    repository whose terms were not accepted, and if the disk is full.
    """
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise ModelFileError(
            f"{name}: no such path; for a name on huggingface.co: pip install 'minilora[hub]'"
        ) from error
    repository, _, revision = name.partition("@")
    endpoint = os.environ.get("HF_ENDPOINT")
    where = endpoint or "https://huggingface.co"
    page = f"{where}/datasets/{repository}" if kind == "dataset" else f"{where}/{repository}"
    absent = "no such path here,"
    reasons = {  # the first that fits
        errors.GatedRepoError: f"accept its terms at {page}, then: hf auth login",
        errors.RepositoryNotFoundError: f"{absent} no such {kind} at {where}, or a private one: hf auth login",
        errors.RevisionNotFoundError: f"{repository} has no revision {revision!r}",
        errors.LocalEntryNotFoundError: f"{absent} not in the cache, and {where} cannot be reached: check the network",
    }
    try:
        found = snapshot_download(
            repository, repo_type=kind, revision=revision or None, allow_patterns=list(files), endpoint=endpoint
        )
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:  # also a full disk, a broken connection
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        why = next((reason for known, reason in reasons.items() if isinstance(error, known)), None)
        line = f"{name}: {why or f'cannot be downloaded from {where}: {said}'}"
        raise ModelFileError(re.sub(r"//[^/@\s]*:[^/@\s]*@", "//", line)) from error  # no password of a mirror
    return Path(found)
