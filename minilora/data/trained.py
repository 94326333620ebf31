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


def is_same(place: str | None, source: str) -> bool:
    """Whether data at two places are one file or folder, whatever is in it now."""
    return place is not None and Path(place).exists() and Path(source).exists() and Path(source).samefile(place)


def warning_of_change(place: str, folder: Path) -> list[str]:
    """One line if the data at `place`, on which the adapter in `folder` was trained, are no longer the same."""
    if read_provenance(folder).get("data", {}).get("sha256") in (None, sha256_of_data(place)):
        return []
    return [f"{place} has changed since {folder} was trained on it: the loss may include training records"]


def warning_of_trained(
    measured: Sequence[tuple[str, Sequence[Record], Task | None]], folder: Path, tokenizer: Tokenizer
) -> list[str]:
    """A line for each set with records on whose texts or questions the adapter in `folder` was trained, whatever their
    labels: where its data are still there, and the same. They are read once, since they may be large.

    measured: what each set is called, its records and their task.
    """
    held = [_plain(records, task) for _, records, task in measured]
    trained = _trained(folder, tokenizer) if any(held) else []
    found = leaks({"train": trained, "validation": [], "test": [record for records in held for record in records]})
    known = {id(leak.record) for leak in found if leak.same != "answer"}
    lines = []
    for (source, *_), records in zip(measured, held, strict=True):
        if seen := [record.id for record in records if id(record) in known]:
            what = f"{len(seen):,} of {len(records):,} records that are measured are in the training data of {folder}"
            lines.append(f"{source}: {what}, so its numbers look too good: {listed(seen, NAMED)}")
    return lines


def _trained(folder: Path, tokenizer: Tokenizer) -> list[Record]:
    """The training records of an adapter, as `_plain`; none of data that are unknown, gone, changed, unreadable
    or one text.
    """
    data, place = read_provenance(folder).get("data", {}), data_of(folder)
    if place is None or is_dataset(place):
        return []
    try:
        if sha256_of_data(place) != data.get("sha256"):
            return []
        reading = read_source(place, tokenizer, data.get("field"), stored_tasks([folder]), warn=False)
    except (DataError, OSError):  # such as fields whose schema is gone, or a folder that is empty now
        return []
    return [] if is_one_text(reading.records) else _plain(by_split(reading.records)["train"], reading.task)


def _plain(records: Sequence[Record], task: Task | None) -> list[Record]:
    """The records without what a task or a passage puts around their texts, which differs between adapters."""
    if task is None:
        return [record.closed_book() for record in records]
    return [record.asked(task.text(record.question)) for record in records]
