"""Data sets by their names on huggingface.co: `org/set`, `org/set:train`, `org/set@REVISION:main/train`.

After the colon is a split, a subset, or both. The names of files say which split they belong to, as in the library
`datasets`: data/train-00000-of-00002.parquet, train.jsonl, test/part1.csv. Folders other than these are subsets. Only
data files are downloaded: no code of a repository is run.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path, PurePosixPath

from ..models.repository import is_repository, snapshot
from ..progress import log
from .formats import listed
from .rows import SPLIT_NAMES, SPLITS, TEXT_SUFFIXES, DataError

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv", ".json")  # the first that a repository has is read
_ABOUT = {"dataset_infos.json", "dataset_dict.json", "state.json"}  # these describe data
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}(-\w+)?")  # train-00000-of-00002


def is_dataset(source: str | Path) -> bool:
    """True for a name on huggingface.co, maybe with a revision and a split; an existing path takes precedence.

    >>> is_dataset("org/set:train"), is_dataset("org/set.jsonl"), is_dataset("legal")
    (True, False, False)
    """
    name = str(source).partition(":")[0]
    return is_repository(name) and not name.lower().endswith((*SUFFIXES, *TEXT_SUFFIXES))


@cache
def fetched(source: str) -> tuple[str, dict[Path, str | None]]:
    """The revision of a data set, and its files, downloaded if missing, each with its split.

    If there is one split alone, it is None: then the rule of `splits.py` decides, as for any single file.

    Raises ModelFileError for a data set that cannot be downloaded; DataError for one without data files, and for an
    unknown split.
    """
    name, _, part = source.partition(":")
    folder = snapshot(name, ["README.md"], "dataset")  # finds the revision
    names = _names_of(name.partition("@")[0], folder)
    splits = _chosen(source, _by_split(name, names), part)
    pinned = f"{name.partition('@')[0]}@{folder.name}"
    snapshot(pinned, [file for files in splits.values() for file in files], "dataset")
    several = len(splits) > 1
    return folder.name, {
        folder / file: SPLIT_NAMES[split] if several else None for split, files in splits.items() for file in files
    }


def _names_of(repository: str, folder: Path) -> list[str]:
    """The names of a revision's files: those on the hub, or without a network those in the cache."""
    from huggingface_hub import HfApi, errors

    try:
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        return sorted(file.rfilename for file in api.dataset_info(repository, revision=folder.name).siblings or [])
    except (errors.HTTPError, OSError):
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _by_split(name: str, names: list[str]) -> dict[str, list[str]]:
    """The data files of each split, "train", or of each split of each subset, "main/train"."""
    names = [each for each in names if not re.search(r"(^|/)\.", each) and PurePosixPath(each).name not in _ABOUT]
    kinds = [[each for each in names if each.lower().endswith(suffix)] for suffix in SUFFIXES]
    files = next(filter(None, kinds), [])
    if not files and (scripts := [each for each in names if each.endswith(".py")]):
        raise DataError(
            f"{name}: holds a loading script, {scripts[0]}, and no data files, and no code of a repository is run; "
            f"it may have been converted: try {name.partition('@')[0]}@refs/convert/parquet"
        )
    if not files:
        raise DataError(f"{name}: holds no {', '.join(SUFFIXES)} file; there are {listed(names) or 'no files'}")
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(_split_of(file), []).append(file)
    return splits


def _split_of(file: str) -> str:
    """The split of a file by its name, after its subset and a slash if it has one.

    >>> [_split_of(f) for f in ("data/train-00000-of-00002.parquet", "en/dev.jsonl", "all/test/0.csv", "alpaca.json")]
    ['train', 'en/validation', 'all/test', 'train']
    """
    *folders, name = file.split("/")
    stem = PurePosixPath(name).stem
    split = shard[1] if (shard := _SHARD.fullmatch(stem)) else _word_of(stem)
    for folder in reversed(folders) if split is None else ():
        if (split := _word_of(folder)) is not None:
            folders.remove(folder)
            break
    return "/".join([*(folder for folder in folders if folder != "data"), split or "train"])


def _word_of(text: str) -> str | None:
    """The split that is a word of a name, such as test-file."""
    return next((SPLIT_NAMES[word] for word in re.split(r"[^a-z]+", text.lower()) if word in SPLIT_NAMES), None)


def _chosen(source: str, splits: dict[str, list[str]], part: str) -> dict[str, list[str]]:
    """The files of the splits that are wanted: of one subset, by the names train, validation and test if several."""
    there = f"there are {listed(sorted(splits))}"
    found = {key: files for key, files in splits.items() if not part or key == part or key.startswith(f"{part}/")}
    if not found:
        raise DataError(f"{source}: no such split; {there}")
    subset, *others = sorted({key.rpartition("/")[0] for key in found})
    if subset and others:
        raise DataError(f"{source}: which subset? Name it, as {source.partition(':')[0]}:{subset}; {there}")
    found = {key.rpartition("/")[2]: files for key, files in found.items() if key.rpartition("/")[0] == subset}
    if len(found) == 1:
        return found
    known = sorted(found.keys() & SPLIT_NAMES.keys(), key=lambda split: SPLITS.index(SPLIT_NAMES[split]))
    if not known or SPLIT_NAMES[known[0]] != SPLITS[0]:
        raise DataError(f"{source}: which split? Name it after a colon; {there}")
    if unknown := sorted(found.keys() - set(known)):
        log.info(f"{source}: not read, since they are not a train, validation or test split: {listed(unknown)}")
    return {split: found[split] for split in known}
