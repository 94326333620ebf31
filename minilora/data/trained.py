"""What an adapter was trained on: where these data are, and which of the records that measure it are among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..lora.provenance import place_of, read_provenance
from ..models.tokenizer import Tokenizer
from .fields import Task, stored_tasks
from .formats import listed
from .leaks import NAMED, leaks
from .records import BUILT_IN, Record, read_source, sha256_of_data
from .repository import is_dataset
from .rows import DataError
from .splits import by_split, is_one_text


def data_of(folder: Path) -> str | None:
    """The data that an adapter was trained on: a built-in name, one on huggingface.co, or a file or folder still there.

    It is looked for from where the adapter is, then from the current folder. None where it is unknown or gone.
    """
    data = read_provenance(folder).get("data", {})
    if (name := data.get("name")) in BUILT_IN or (name and is_dataset(name)):
        return str(name)
    places = [str(place_of(folder, data["path"]))] if "path" in data else []
    places += [str(name)] if name else []
    return next((place for place in places if Path(place).exists()), None)


def warning_of_change(folder: Path) -> list[str]:
    """One line if the data that the adapter in `folder` was trained on are still there, and no longer the same."""
    place, sha256 = data_of(folder), read_provenance(folder).get("data", {}).get("sha256")
    if place is None or sha256 is None or sha256_of_data(place) == sha256:
        return []
    return [f"{place} has changed since {folder} was trained on it: the loss may include training records"]


def warning_of_trained(
    source: str, records: Sequence[Record], task: Task | None, folder: Path, tokenizer: Tokenizer
) -> list[str]:
    """One line if the adapter in `folder` was trained on the texts or questions of some of these records, whatever
    their labels: where its data are still there, and the same.

    source: what the records are called. task: theirs.
    """
    splits = {"train": _trained(folder, tokenizer), "validation": [], "test": _plain(records, task)}
    seen = [leak.record.id for leak in leaks(splits) if leak.same != "answer"]
    what = f"{len(seen):,} of {len(records):,} records that are measured are in the training data of {folder}"
    return [f"{source}: {what}, so its numbers look too good: {listed(seen, NAMED)}"] if seen else []


def _trained(folder: Path, tokenizer: Tokenizer) -> list[Record]:
    """The training records of an adapter, as `_plain`; none of data that are unknown, gone, changed or one text."""
    data, place = read_provenance(folder).get("data", {}), data_of(folder)
    if place is None or is_dataset(place) or sha256_of_data(place) != data.get("sha256"):
        return []
    try:
        reading = read_source(place, tokenizer, data.get("field"), stored_tasks([folder]), warn=False)
    except DataError:  # such as fields whose schema is gone
        return []
    return [] if is_one_text(reading.records) else _plain(by_split(reading.records)["train"], reading.task)


def _plain(records: Sequence[Record], task: Task | None) -> list[Record]:
    """The records without what a task or a passage puts around their texts, which differs between adapters."""
    if task is None:
        return [record.closed_book() for record in records]
    return [record.asked(task.text(record.question)) for record in records]
