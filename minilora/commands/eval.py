"""Versions of a base beside each other: the loss and the keyword recall of each on several data sets."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ..data.records import BUILT_IN, Record, read_records, sha256_of_data
from ..data.samples import encode_records, truncate
from ..data.splits import follows_rule, is_one_text, split_records, split_text
from ..lora.adapters import set_adapter
from ..lora.provenance import read_provenance
from ..measure.loss import evenly, held_out, sample_losses, scored_tokens
from ..measure.recall import answer_all, recalls
from ..measure.statistics import (
    CONFIDENCE,
    RESAMPLES,
    Interval,
    Resampled,
)
from ..models.load import dtype_of
from ..models.tokenizer import Tokenizer
from ..models.with_adapters import BASE_NAME, base_of, load_with_adapters, named_folders
from ..nn.llama import Llama
from ..nn.parts import Sample
from ..options import BASE, BF16, PACKED, add_flags, from_flags, option
from ..progress import log, progress
from ..train.material import Material
from ..train.options import Options
from .report import rule
from .shared import AS_JSON

KINDS = {"paraphrase": "trained records asked in other words", "unseen": "records never trained", "all": "all of it"}
RECALL, LOSS = "keyword_recall", "loss"
WIDTH = 80


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Which versions to measure on which data, and how. Raises ValueError for values that mean nothing."""

    adapter: Sequence[str] | None = option(None, "folders of adapters; NAME is what the table says", metavar="NAME=DIR")
    data: Sequence[str] | None = option(
        None,
        f"{', '.join(BUILT_IN)}, or data files (default: what the adapters were trained on, and general)",
        metavar="DATA",
    )
    field: Mapping[str, str] | None = option(None, "columns of the data under other names, such as question=q")
    base: str | None = option(None, f"{BASE} (default: the one that the adapters were trained on)")
    limit: int | None = option(
        None, f"records of each set, evenly chosen (default: all; of paraphrases {Options.eval_records}, as finetune)"
    )
    max_length: int = option(Options.max_length, "tokens per record, cut beyond")
    no_recall: bool = option(False, "measure the loss alone: no answers, a fraction of the time")
    matrix: str | None = option(None, "draw a heat map, a .png or an .svg file", metavar="PICTURE")
    seed: int = option(0, "decides the draws of the intervals")
    quantized: bool | str = option(False, **PACKED)
    bf16: bool = option(False, BF16)
    device: str = option("cpu", "where to compute", choices=("cpu", "cuda"))
    force: bool = option(False, "take adapters of another base of the same shape, too")

    def __post_init__(self):
        named_folders(self.adapter or ())  # refuses names that cannot be
        for name, value, least in (
            ("limit", 1 if self.limit is None else self.limit, 1),
            ("max_length", self.max_length, 8),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.matrix is not None and Path(self.matrix).suffix.lower() not in (".png", ".svg"):
            raise ValueError(f"matrix must be a .png or an .svg file, got {self.matrix}")


@dataclass(frozen=True)
class Scores:
    """What an adapter, or the base, scored on one set. nats (N,): each record's loss summed over its scored tokens, of
    which it has `tokens` (N,). recall (M,): the share of keywords in each answer, for those records that have keywords.
    """

    nats: np.ndarray
    tokens: np.ndarray
    recall: np.ndarray


@dataclass(frozen=True)
class MeasuredSet:
    """Some records that versions are measured on. data: where they are from. kind: one of KINDS. asked: those of them
    that have keywords, for recall.
    """

    name: str
    data: str
    kind: str
    samples: list[Sample]
    asked: list[Record]


def evaluate_versions(options: EvalOptions) -> dict[str, Any]:
    """Measure the base and every adapter on every set, and return the numbers with their intervals: see `summary`.

    Raises ValueError for bad input, before anything is measured.
    """
    folders = named_folders(options.adapter or ())
    base = options.base or base_of(folders)
    own = {name: trained_on(folder) for name, folder in folders.items()}
    data = options.data or list(dict.fromkeys([*filter(None, own.values()), "general"]))
    model, tokenizer = load_with_adapters(
        folders, base, options.quantized, options.device, options.force, dtype_of(options.bf16)
    )
    trained = [source for source in data if _trained_by(source, folders.values())]
    sets = read_sets(data, tokenizer, options.limit, options.max_length, options.field, trained)
    for each in sets:
        material = Material([], [], {each.name: each.samples}, {} if options.no_recall else {each.name: each.asked})
        material.refuse_what_is_longer(model.config.max_position_embeddings, each.data, tokenizer)
    versions = {BASE_NAME: None, **{name: name for name in folders}}
    scores = measure(model, tokenizer, versions, sets, answers=not options.no_recall)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": str(base),
        "adapters": {name: {"folder": str(folder), "trained_on": own[name]} for name, folder in folders.items()},
        **summary(scores, sets, options.seed),
    }


def trained_on(folder: Path) -> str | None:
    """The data that an adapter was trained on, as its folder says: a built-in name, or a file that is still there."""
    name = read_provenance(folder).get("data", {}).get("name")
    return str(name) if name and (name in BUILT_IN or Path(str(name)).exists()) else None


def _trained_by(source: str, folders: Iterable[Path]) -> bool:
    """Was one of the adapters trained on these data?"""
    notes = [read_provenance(folder).get("data", {}) for folder in folders]
    if any(note.get("name") == source for note in notes):
        return True
    hashes = {note["sha256"] for note in notes if "sha256" in note}
    return bool(hashes) and sha256_of_data(source) in hashes


# -- sets --------------------------------------------------------------------------------------------------------------


def read_sets(
    data: Sequence[str],
    tokenizer: Tokenizer,
    limit: int | None = None,
    max_length: int = Options.max_length,
    field: Mapping[str, str] | None = None,
    trained: Sequence[str] = (),
) -> list[MeasuredSet]:
    """The sets of each data set: what `finetune` holds out of it, or all of it.

    limit: records of each set, evenly chosen. max_length: longer records are truncated. field: as for `read_records`.
    trained: those of `data` that an adapter was trained on; where they name no split, they are divided as `finetune`
    divides them. Raises DataError for bad data, ValueError for the same data twice.
    """
    if twice := [name for name, times in Counter(data).items() if times > 1]:
        raise ValueError(f"{twice[0]} is given twice as data: once is enough")
    stems = Counter(Path(name).stem for name in data)
    sets: list[MeasuredSet] = []
    for source in data:
        stem = Path(source).stem
        called = stem if stems[stem] == 1 else source
        records = read_records(source, tokenizer, field)
        divided = is_one_text(records) and source in trained
        if divided and (sequences := split_text(records[0].text, tokenizer, max_length)["test"]):
            sets.append(MeasuredSet(f"{called}/unseen", source, "unseen", evenly(sequences, limit), []))
            continue
        for kind, chosen in _chosen(records, source, limit, source in trained):
            name = called if kind == "all" else f"{called}/{kind}"
            whole = evenly(encode_records(chosen, tokenizer, max_length=max_length), limit)  # a text is several
            samples, longer, dropped = truncate(whole, max_length)
            if longer:
                lost = f", and {dropped} of them dropped: nothing of their answer was left" if dropped else ""
                limit_of = f"longer than --max-length {max_length} and were truncated{lost}"
                log.info(f"{name}: {longer} of {len(whole)} records are {limit_of}")
            if not samples:
                raise ValueError(f"{source}: nothing is left to score within --max-length {max_length}")
            sets.append(MeasuredSet(name, source, kind, samples, [record for record in chosen if record.keywords]))
    return sets


def _chosen(
    records: Sequence[Record], source: str, limit: int | None, trained: bool
) -> Iterator[tuple[str, list[Record]]]:
    """The records of each kind that a data set has something of. trained: was an adapter trained on it?"""
    if trained or any(record.split == "train" for record in records):
        sets = held_out(split_records(records), limit or Options.eval_records)
        if any(sets.values()):
            yield from ((kind, evenly(chosen, limit)) for kind, chosen in sets.items() if chosen)
            return
        log.info(f"{source}: nothing is held out, so this loss includes training records")
    elif source not in BUILT_IN and follows_rule(records):
        log.info(f"{source}: no record names a split, and no adapter here was trained on it: all is measured")
    yield "all", evenly(records, limit)


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(
    model: Llama,
    tokenizer: Tokenizer,
    versions: Mapping[str, str | Mapping[str, float] | None],
    sets: Sequence[MeasuredSet],
    answers: bool = True,
    wanted: Callable[[str, MeasuredSet], bool] = lambda version, each: True,
    known: MutableMapping[tuple[str, str, str], np.ndarray] | None = None,
) -> dict[str, dict[str, Scores]]:
    """Scores by set and version. versions: what `set_adapter` is told, by what the version is called.

    answers: False to leave out recall, whose array is then empty. wanted: which version is measured on which set.
    known: nats and recall by (measure, version, set) that are not measured again, and where new ones are put at once.
    The model ends as its base alone.
    """
    known = {} if known is None else known
    pairs = [(version, each) for version in versions for each in sets if wanted(version, each)]
    with progress("losses", sum(len(each.samples) for _, each in pairs), "record") as bar:
        for version, each in pairs:
            bar.update(0, text=f"{version}, {each.name}")
            if (LOSS, version, each.name) in known:
                bar.update(len(each.samples))
                continue
            set_adapter(model, versions[version])
            known[LOSS, version, each.name] = sample_losses(model, each.samples)
    with progress("answers", sum(len(each.asked) for _, each in pairs) if answers else 0, "answer") as bar:
        for version, each in pairs if answers else ():
            bar.update(0, text=f"{version}, {each.name}")
            if (RECALL, version, each.name) in known:
                bar.update(len(each.asked))
                continue
            set_adapter(model, versions[version])
            known[RECALL, version, each.name] = np.array(recalls(answer_all(model, tokenizer, each.asked), each.asked))
    set_adapter(model, None)
    scores: dict[str, dict[str, Scores]] = {each.name: {} for each in sets}
    for version, each in pairs:
        recall = known[RECALL, version, each.name] if answers else np.empty(0)
        scores[each.name][version] = Scores(known[LOSS, version, each.name], scored_tokens(each.samples), recall)
    return scores


# -- numbers -----------------------------------------------------------------------------------------------------------


def summary(scores: Mapping[str, Mapping[str, Scores]], sets: Sequence[MeasuredSet], seed: int = 0) -> dict[str, Any]:
    """Scores by set and version as numbers for JSON: value, low and high of every measure, and paired differences.

    A number that is not finite, and the interval of a single record, are None.
    """
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
                "asked": len(each.asked),
            }
            for each in sets
        },
        "scores": {name: _scored(found, seed) for name, found in scores.items()},
        "differences": {name: _differences(found, seed) for name, found in scores.items()},
    }


def resampled(scores: Mapping[str, Scores], seed: int) -> dict[str, Resampled]:
    """Scores by version on one set, resampled, by measure; without recall where nothing was asked."""
    each = list(scores.values())
    measures = {LOSS: Resampled(np.array([one.nats for one in each]), each[0].tokens, seed)}
    if each[0].recall.size:
        measures[RECALL] = Resampled(np.array([one.recall for one in each]), np.ones(each[0].recall.size), seed)
    return measures


def _scored(scores: Mapping[str, Scores], seed: int) -> dict[str, Any]:
    found = {}
    measures = resampled(scores, seed)
    for i, version in enumerate(scores):
        found[version] = {name: plain(draws.mean(i)) for name, draws in measures.items()}
        found[version]["perplexity"] = plain(measures[LOSS].mean(i).map(_exp))
    return found


def _differences(scores: Mapping[str, Scores], seed: int) -> list[dict[str, Any]]:
    """Every version less each that stands before it: the base first."""
    measures = resampled(scores, seed)
    return [
        {"of": of, "less": less, **{name: plain(measures[name].difference(j, i)) for name in measures}}
        for (i, less), (j, of) in combinations(enumerate(scores), 2)
    ]


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def plain(interval: Interval) -> dict[str, float | None]:
    """An interval as JSON has it: what is not finite is None."""
    numbers = {"value": interval.mean, "low": interval.low, "high": interval.high}
    return {name: x if math.isfinite(x) else None for name, x in numbers.items()}


# -- the page ----------------------------------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """The numbers of `evaluate_versions` as text, a section for each set."""
    lines: list[str] = []
    for name, about in result["sets"].items():
        title = f"{Path(about['data']).name}: {KINDS[about['kind']]}, {about['records']} records"
        lines += [rule(title, WIDTH), *_values(result["scores"][name])]
        if differences := result["differences"][name]:
            lines += ["", *_changes(differences)]
        lines.append("")
    share, draws = f"{result['confidence']:.0%}", f"{result['resamples']:,}"
    lines += [f"[low, high]: the middle {share} of {draws} bootstrap draws of the records. Differences"]
    lines += ["are paired, both versions on the same draw: where 0 is outside of the interval,"]
    lines += ["one version is better than the choice of records can explain."]
    return "\n".join(lines)


def _values(scores: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'':<22}{'loss, nats per token':<25}{'perplexity':>10}   keyword recall"
    for version, found in scores.items():
        recall = shown(found[RECALL], "{:.1f}%", "{:.1f}", 100) if RECALL in found else "-"
        perplexity = found["perplexity"]["value"]
        bare = "-" if perplexity is None else f"{perplexity:,.1f}" if perplexity < 1e6 else f"{perplexity:.1e}"
        yield f"{_fit(version, 20):<22}{shown(found[LOSS], '{:.3f}', '{:.3f}'):<25}{bare:>10}   {recall}"


def _changes(differences: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield f"{'difference':<35}{'of loss':<27}of recall, points"
    for one in differences:
        label = _fit(f"{one['of']} less {one['less']}", 33)
        recall = shown(one[RECALL], "{:+.1f}", "{:+.1f}", 100) if RECALL in one else "-"
        yield f"{label:<35}{shown(one[LOSS], '{:+.3f}', '{:+.3f}'):<27}{recall}"


def shown(interval: Mapping[str, float | None], value: str, bound: str, factor: float = 1) -> str:
    """An interval as pages have it: the value, and its bounds in brackets if there are some."""
    if interval["value"] is None:
        return "not finite"
    text = value.format(factor * interval["value"])
    if interval["low"] is None or interval["high"] is None:
        return text
    return f"{text} [{bound.format(factor * interval['low'])}, {bound.format(factor * interval['high'])}]"


def _fit(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


HELP = "measure the loss and keyword recall of adapters and their base on data sets, with intervals"


def add(parser: argparse.ArgumentParser) -> None:
    """The flags are the fields of EvalOptions."""
    add_flags(parser, EvalOptions)
    parser.add_argument("--json", **AS_JSON)


def run(arguments: argparse.Namespace) -> None:
    """Print a table of versions on data sets, or its numbers; with --matrix draw a heat map, too."""
    from ..pages.matrix import matrix_figure
    from ..pages.style import save

    options = from_flags(EvalOptions, arguments)
    if options.matrix:  # before minutes are spent
        Path(options.matrix).parent.mkdir(parents=True, exist_ok=True)
    result = evaluate_versions(options)
    if options.matrix:
        save(matrix_figure(result), Path(options.matrix))
    print(json.dumps(result, indent=2) if arguments.json else table(result))
