"""What adapters and their base score on data sets: loss and keyword recall, record by record, with intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np

from ..data.fields import FieldTask, Task
from ..data.formats import listed
from ..data.labels import LabelTask
from ..data.records import BUILT_IN, Record, read_source
from ..data.rows import SPLITS
from ..data.samples import encode_records, truncate_and_log
from ..data.splits import by_split, follows_rule, is_one_text, split_text
from ..lora.adapters import Choice, set_adapter
from ..models.tokenizer import Tokenizer
from ..nn.language_model import LanguageModel
from ..nn.parts import Sample
from ..progress import log, progress
from .fields import checked_of
from .labels import Checked
from .loss import evenly, held_out, sample_losses, scored_tokens
from .recall import answer_all, recalls
from .statistics import CONFIDENCE, RESAMPLES, Resampled, interval_as_json

LOSS, RECALL = "loss", "keyword_recall"


@dataclass(frozen=True)
class Source:
    """Data to measure on, and how they are read.

    name: a data set, a file or a folder. field: as for `read_records`. trained: whether an adapter was trained on them:
    if they name no split, they are divided as `finetune` divides them. schema: the file with the JSON Schema of data
    with fields. passages: gives records their passages, where these were in the prompts of training.
    """

    name: str
    field: Mapping[str, str] | None = None
    trained: bool = False
    schema: str | None = None
    passages: Callable[[list[Record]], list[Record]] | None = None


@dataclass(frozen=True)
class MeasuredSet:
    """Records to measure on. data: the source they are from. kind: "reworded", "paraphrase", "unseen", "all" or
    the name of a split. asked: those that have keywords, for recall. checked: those with a label, with fields, or with
    a rejected answer.
    """

    name: str
    data: str
    kind: str
    samples: list[Sample]
    asked: list[Record]
    checked: Checked | None = None


@dataclass(frozen=True)
class Scores:
    """What one adapter, or the base, scored on one set.

    nats (N,): each record's loss, summed over its scored tokens, of which it has `tokens` (N,). recall (M,): the share
    of keywords in each answer, for those records that have keywords.
    """

    nats: np.ndarray
    tokens: np.ndarray
    recall: np.ndarray


# -- sets --------------------------------------------------------------------------------------------------------------


def read_sets(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    max_length: int,
    limit: int | None = None,
    paraphrases: int | None = None,
    split: str | None = None,
    stored: Sequence[Task] = (),
) -> list[MeasuredSet]:
    """The sets of each source: what `finetune` holds out of it, or all of it.

    max_length: longer conversations are truncated, longer texts divided.
    limit: records of each set, evenly chosen.
    paraphrases: records of a set of paraphrased questions, where `limit` is None.
    split: measure this split alone, "train", "validation" or "test", instead of the validation and test sets.
    stored: the tasks that the adapters were trained on.

    Raises DataError for bad data, ValueError for the same data twice, and for a split without records.
    """
    if twice := [name for name, times in Counter(each.name for each in sources).items() if times > 1]:
        raise ValueError(f"{twice[0]} is given twice as data: once is enough")
    stems = Counter(Path(each.name).stem for each in sources)
    sets: list[MeasuredSet] = []
    for given in sources:
        source = given.name
        called = Path(source).stem if stems[Path(source).stem] == 1 else source
        reading = read_source(source, tokenizer, given.field, stored, given.schema)
        records, task = reading.records, reading.task
        if source not in BUILT_IN:
            classified = task is None and any(isinstance(each, LabelTask) for each in stored)
            hint = ["to measure labels, name their column with --label"] * classified
            for line in [*reading.notes(), *hint]:
                log.info(f"{source}: {line}")
        if task is not None and task not in stored and (wrong := _unlike(task, stored)):
            log.warning(f"{source}: {wrong}: its prompts differ from those of training")
        if given.passages is not None:
            records = given.passages(records)
        chosen: list[tuple[str, list[Sample], list[Record]]]
        divided = split_text(records[0].text, tokenizer, max_length) if is_one_text(records) else {}
        if divided and (split or (given.trained and divided["test"])):
            sequences = divided[split or "test"]
            chosen = [(split or "unseen", evenly(sequences, limit), [])] if sequences else []
        else:
            parts = _chosen(records, source, limit, paraphrases, given.trained, split)
            text = [*chain(*divided.values())]  # as it is trained: without an end token
            chosen = [
                (kind, evenly(text if divided else encode_records(part, tokenizer, max_length=max_length), limit), part)
                for kind, part in parts
            ]
        if not chosen:
            raise ValueError(f"{source}: no record of the split {split!r}: leave out --split to measure all")
        for kind, whole, own in chosen:
            name = called if kind == "all" else f"{called}/{kind}"
            if not (samples := truncate_and_log(name, whole, max_length)):
                raise ValueError(f"{source}: nothing is left to score within --max-length {max_length}")
            examples = by_split(records)["train"] if kind not in ("all", "train") else []
            asked = [one for one in own if one.keywords]
            sets.append(MeasuredSet(name, source, kind, samples, asked, checked_of(task, own, examples)))
    return sets


def _unlike(task: Task, stored: Sequence[Task]) -> str:
    """What makes a task another one than a similar one of an adapter; nothing if none is similar."""
    if isinstance(task, LabelTask):
        labels = [{*each.labels} for each in stored if isinstance(each, LabelTask)]
        new = [listed(sorted({*task.labels} - known)) for known in labels if known.intersection(task.labels)]
        return f"no adapter was trained on all of its labels (not on {new[0]})" if new else ""
    names = [{field.name for field in each.fields} for each in (task, *stored) if isinstance(each, FieldTask)]
    similar = any(names[0] <= known or known <= names[0] for known in names[1:])
    return "its schema is not the one that the adapter was trained on" if similar else ""


def _chosen(
    records: Sequence[Record], source: str, limit: int | None, paraphrases: int | None, trained: bool, split: str | None
) -> Iterator[tuple[str, list[Record]]]:
    """The records of each kind that a source has."""
    splits = by_split(records)
    if split is not None:
        if splits[split]:
            yield split, evenly(splits[split], limit)
        return
    if trained or any(record.split == SPLITS[0] for record in records):
        sets = held_out(splits, limit or paraphrases or len(records))
        if any(sets.values()):
            yield from ((kind, evenly(part, limit)) for kind, part in sets.items() if part)
            return
        log.warning(f"{source}: nothing is held out, so this loss includes training records")
    elif source not in BUILT_IN and follows_rule(records):
        log.info(f"{source}: no record names a split, and no adapter here was trained on it: all is measured")
    yield "all", evenly(records, limit)


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(
    model: LanguageModel,
    tokenizer: Tokenizer,
    adapters: Mapping[str, Choice],
    sets: Sequence[MeasuredSet],
    answers: bool = True,
) -> dict[str, dict[str, Scores]]:
    """Scores by set and adapter.

    adapters: by name, what `set_adapter` takes.
    answers: False to leave out recall, whose array is then empty.

    The model ends as its base alone.
    """

    def measured(
        title: str, unit: str, size: Callable[[MeasuredSet], int], values: Callable[[MeasuredSet], np.ndarray]
    ) -> dict[tuple[str, str], np.ndarray]:
        found = {}
        with progress(title, len(adapters) * sum(map(size, sets)), unit) as bar:
            for name, choice in adapters.items():
                for each in sets:
                    bar.update(0, text=f"{name}, {each.name}")
                    set_adapter(model, choice)
                    found[name, each.name] = values(each)
        return found

    def shares(each: MeasuredSet) -> np.ndarray:
        return np.array(recalls(answer_all(model, tokenizer, each.asked), each.asked))

    nats = measured("losses", "record", lambda each: len(each.samples), lambda each: sample_losses(model, each.samples))
    recall = measured("answers", "answer", lambda each: len(each.asked), shares) if answers else {}
    set_adapter(model, None)
    return {
        each.name: {
            name: Scores(nats[name, each.name], scored_tokens(each.samples), recall.get((name, each.name), np.empty(0)))
            for name in adapters
        }
        for each in sets
    }


# -- numbers -----------------------------------------------------------------------------------------------------------


def summary(scores: Mapping[str, Mapping[str, Scores]], sets: Sequence[MeasuredSet], seed: int = 0) -> dict[str, Any]:
    """Scores by set and adapter as numbers for JSON: value, low and high of every measure, and paired differences.

    A number that is not finite, and the interval of a single record, are None.
    """
    measures = {name: _resampled(found, seed) for name, found in scores.items()}
    return {
        "resamples": RESAMPLES,
        "confidence": CONFIDENCE,
        "seed": seed,
        "sets": {
            each.name: {
                "data": each.data,
                "kind": each.kind,
                "records": len(each.samples),
                "scored_tokens": int(scored_tokens(each.samples).sum()),
                "asked": len(each.checked.records if each.checked else each.asked),
            }
            for each in sets
        },
        "scores": {name: _means(list(found), measures[name]) for name, found in scores.items()},
        "differences": {name: _differences(list(found), measures[name]) for name, found in scores.items()},
    }


def _resampled(scores: Mapping[str, Scores], seed: int) -> dict[str, Resampled]:
    """Scores by adapter on one set, resampled, by measure; without recall where nothing was asked."""
    each = list(scores.values())
    measures = {LOSS: Resampled(np.array([one.nats for one in each]), each[0].tokens, seed)}
    if each[0].recall.size:
        measures[RECALL] = Resampled(np.array([one.recall for one in each]), np.ones(each[0].recall.size), seed)
    return measures


def _means(adapters: Sequence[str], measures: Mapping[str, Resampled]) -> dict[str, Any]:
    found = {}
    for i, name in enumerate(adapters):
        found[name] = {key: interval_as_json(draws.mean(i)) for key, draws in measures.items()}
        found[name]["perplexity"] = interval_as_json(measures[LOSS].mean(i).map(_exp))
    return found


def _differences(adapters: Sequence[str], measures: Mapping[str, Resampled]) -> list[dict[str, Any]]:
    """Every adapter minus each one before it: the base is the first."""
    return [
        {"of": of, "less": less, **{name: interval_as_json(draws.difference(j, i)) for name, draws in measures.items()}}
        for (i, less), (j, of) in combinations(enumerate(adapters), 2)
    ]


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
