"""`minilora eval`: what adapters and their base score on several data sets."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from ..data.fields import stored_tasks
from ..data.formats import listed, with_label
from ..data.labels import LabelTask
from ..data.passages import Handbook
from ..data.records import BUILT_IN, Record, columns_of, read_handbook, sha256_of_data
from ..data.rows import SPLITS
from ..data.trained import data_of, is_same, warning_of_change, warning_of_trained
from ..generate.as_trained import task_of_adapters, without_passages
from ..lora.adapters import Choice, set_adapter
from ..lora.provenance import PROVENANCE_FILE, read_provenance
from ..measure.environment import now
from ..measure.labels import Labelled
from ..measure.open_book import open_book_report, with_own_passages
from ..measure.preferences import Preferred
from ..measure.recall import ANSWER_TOKENS
from ..measure.scores import LOSS, RECALL, MeasuredSet, Scores, Source, measure, read_sets, summary
from ..models.tokenizer import Tokenizer
from ..models.with_adapters import BASE_NAME, base_of, named_folders
from ..nn.language_model import LanguageModel
from ..options import BASE, add_flags, check, from_flags, option
from ..pages.card import HELD_OUT
from ..pages.fields import field_lines
from ..pages.labels import label_lines
from ..pages.open_book import open_book_lines
from ..pages.preferences import preference_lines
from ..pages.style import check_picture, save
from ..pages.text import NARROWEST, NOTHING, counted, interval, padded, percent, plain, rule, shortened, wrapped
from ..progress import log
from ..train.material import Material, refuse_strange, with_passages
from ..train.options import LABEL, MAX_LENGTH, SCHEMA, Options
from .shared import AS_JSON, Loading, Outcome

KINDS = {  # of sets -> what the page calls their records
    **HELD_OUT,
    "all": "all records",
    "train": "the training split",
    "validation": "the validation split",
    "test": "the test split",
}
REPORTS = {  # on a set -> how they are written
    "labels": label_lines,
    "fields": field_lines,
    "preferences": preference_lines,
    "open_book": open_book_lines,
}


@dataclass(frozen=True, kw_only=True)
class EvalOptions(Loading):
    """Which adapters to measure on which data, and how. Raises ValueError for values that mean nothing."""

    adapter: Sequence[str] | None = option(None, "folders of adapters; NAME is shown in the table", metavar="NAME=DIR")
    data: Sequence[str] | None = option(
        None,
        f"{', '.join(BUILT_IN)}, or data files (default: what the adapters, or the whole model, learned, and general)",
        metavar="DATA",
    )
    split: str | None = option(None, "measure this split alone (default: what finetune holds out)", choices=SPLITS)
    field: Mapping[str, str] | None = option(
        None,
        "names of your columns, such as question=q (default: those of the adapter's training)",
        metavar="NAME=COLUMN",
    )
    label: str | None = option(None, LABEL, metavar="COLUMN")
    context: str | None = option(
        None,
        "also ask with a passage in the prompt: with the right one (of the column context, or of FILE), "
        "and with the best match that search finds; the loss is measured with passages if training was",
        metavar="FILE",
    )
    schema: str | None = option(None, f"{SCHEMA}, or that of the adapters)", metavar="FILE")
    base: str | None = option(None, f"{BASE} (default: the one that the adapters were trained on)", path=True)
    limit: int | None = option(
        None,
        f"records of each set, evenly chosen (default: all; {Options.eval_records} paraphrases, as finetune)",
        least=1,
    )
    max_length: int = option(Options.max_length, MAX_LENGTH, least=8)
    no_recall: bool = option(False, "measure the loss alone, without answers, in a fraction of the time")
    matrix: str | None = option(
        None, "draw a heat map of the losses, adapters by data sets: a .png or .svg file", metavar="PICTURE"
    )
    confusion: str | None = option(
        None, "draw the confusion matrix and the calibration of the first labelled set", metavar="PICTURE"
    )
    passages: str | None = option(
        None, "with --context, draw keyword recall with and without passages, of the first set", metavar="PICTURE"
    )
    seed: int = option(0, "seed of the bootstrap draws behind the intervals", least=0)

    def __post_init__(self):
        named_folders(self.adapter or ())  # refuses names that cannot be
        check(self)
        for picture in filter(None, (self.matrix, self.confusion, self.passages)):
            check_picture(Path(picture))
        if self.confusion is not None and self.no_recall:
            raise ValueError("--confusion draws answers: leave out --no-recall")


def evaluate_adapters(options: EvalOptions) -> dict[str, Any]:
    """Measure the base and every adapter on every set, and return the numbers with their intervals: see `summary`.

    Raises ValueError for bad input, before anything is measured.
    """
    folders = named_folders(options.adapter or ())
    base = options.base or base_of(folders)
    whole = {BASE_NAME: Path(base)} if "data" in read_provenance(Path(base)) else {}  # trained by --method full
    trained = folders | whole
    own = {name: data_of(folder) for name, folder in trained.items()}
    data = options.data or list(dict.fromkeys([*filter(None, (own[name] for name in folders or whole)), "general"]))
    if options.data:
        own = {name: _as_given(place, trained[name], data) for name, place in own.items()}
    for name, folder in (folders or whole).items():
        if not options.data:
            _warn_of_other_data(folder)
        if (place := own[name]) is not None and place in data:
            for line in warning_of_change(place, folder):
                log.warning(line)
    model, tokenizer = options.load(folders, base)
    sources = _sources(options, data, own, trained, partial(_given_passages, options, tokenizer, _room(model)))
    read = {source.name for source in sources if source.passages is not None}
    if options.context is not None and options.no_recall and not read:
        raise ValueError(
            "--context measures answers, and no adapter learned these data with passages: leave out --no-recall"
        )
    sets = read_sets(
        sources,
        tokenizer,
        options.max_length,
        options.limit,
        Options.eval_records,
        options.split,
        stored_tasks([*folders.values(), Path(base)]),
    )
    for i, each in enumerate(sets):
        asked, checked = ({}, None) if options.no_recall else ({each.name: each.asked}, each.checked)
        material = Material([], [], {each.name: each.samples}, asked, checked=checked)
        material.refuse_what_is_longer(model.config.max_position_embeddings, each.data, tokenizer)
        if not options.no_recall:
            sets[i] = replace(each, checked=material.checked)
    for name, folder in trained.items():
        measured = [  # other data than its own, whose division holds records out: large data are not read again
            (each.data, *((each.asked, None) if each.checked is None else (each.checked.records, each.checked.task)))
            for each in sets
            if each.kind != "train" and each.data not in (own[name], "general")
        ]
        for line in warning_of_trained(measured, folder, tokenizer):
            log.warning(line)
    if options.confusion and not any(isinstance(each.checked, Labelled) for each in sets):
        raise ValueError("--confusion needs labelled data: name the column of the labels with --label")
    adapters = {BASE_NAME: None, **{name: name for name in folders}}
    open_book = {}
    if options.context is not None and not options.no_recall:
        passages = _with_passages(options.context, model, tokenizer, sets, read)
        open_book = {
            name: open_book_report(model, tokenizer, adapters, records, handbook, options.seed)
            for name, (records, handbook) in passages.items()
        }
    if options.passages and not open_book:
        raise ValueError("--passages draws what --context FILE measures: give both")
    closed_book = not (options.no_recall or open_book)  # the reports have these answers as well
    scores = measure(model, tokenizer, adapters, sets, answers=closed_book)
    reports: dict[str, dict[str, Any]] = {"labels": {}, "fields": {}, "preferences": {}}
    for each in sets if not options.no_recall else ():
        if each.checked is not None:
            reports[each.checked.key][each.name] = _report(
                model, tokenizer, each, scores[each.name], {name: own[name] for name in folders}, options.seed
            )
    return {
        "created": now(),
        "base": str(base),
        "adapters": {name: {"folder": str(folder), "trained_on": own[name]} for name, folder in folders.items()},
        **summary(scores, sets, options.seed),
        **reports,
        "open_book": open_book,
    }


def _sources(
    options: EvalOptions,
    data: Sequence[str],
    own: Mapping[str, str | None],
    trained: Mapping[str, Path],
    given_passages: Callable[[str, list[Record]], list[Record]],
) -> list[Source]:
    """How each data set is read: as by the adapters that were trained on it, unless the options say otherwise. Other
    data have the columns of the adapters' training, if these are the same and are there; built-in data have their own.

    own, trained: the data set and the folder of each adapter. Without --data, the columns that are given are those of
        these data sets alone.
    given_passages: gives the records of a data set their passages. If some adapters learned it without passages, it is
        measured without.

    Raises ValueError for data that two adapters learned with different columns.
    """
    learned = dict[str | None, list[dict[str, Any]]]()  # by data set, what the adapters that learned it store
    for name, place in own.items():
        learned.setdefault(place, []).append(read_provenance(trained[name]).get("data", {}))
    columns = {
        place: [{name: str(column) for name, column in (each.get("field") or {}).items()} for each in stored]
        for place, stored in learned.items()
    }
    given, (first, *others) = with_label(options.field, options.label), [*chain(*columns.values())] or [{}]
    shared = first if all(field == first for field in others) else {}

    def field(name: str) -> Mapping[str, str]:
        if given and (options.data or name in columns):
            return given
        if name in columns:
            first, *others = columns[name]
            if any(other != first for other in others):
                raise ValueError(f"{name}: adapters learned it with different columns: give --field, or evaluate each")
            return first
        if name in BUILT_IN or not shared or not columns_of(name).issuperset(shared.values()):
            return {}
        return shared

    only_built_in = all(name in BUILT_IN for name in data)
    sources = []
    for name in data:
        reads = [("context_template" in stored) for stored in learned.get(name, ())]
        passages = partial(given_passages, name) if reads and all(reads) else None
        schema = options.schema if only_built_in or name not in BUILT_IN else None
        sources.append(Source(name, field(name), name in learned, schema, passages))
    return sources


def _given_passages(
    options: EvalOptions, tokenizer: Tokenizer, room: int, source: str, records: list[Record]
) -> list[Record]:
    """Records with their right passages in the prompts. room: the most tokens of a prompt with one."""
    if options.context is not None:
        records = with_passages(records, options.context, source, tokenizer, room)
    if without := sum(record.context is None for record in records):
        share = f"the loss of {without:,} of {len(records):,} records is without a passage"
        log.warning(f"{source}: {share}: if there was one in training, give it with --context FILE")
    return records


def _room(model: LanguageModel) -> int:
    """The most tokens of a prompt that is answered."""
    return model.config.max_position_embeddings - ANSWER_TOKENS


def _with_passages(
    context: str, model: LanguageModel, tokenizer: Tokenizer, sets: Sequence[MeasuredSet], read: Set[str]
) -> dict[str, tuple[list[Record], Handbook]]:
    """The records of each set that are asked with passages, and these: those of the context, and the records' own.

    read: the data whose loss is measured with passages.

    Raises ValueError for sets without keywords of which none is of `read`.
    """
    asked = {each.name: each.asked for each in sets if each.asked and each.data != "general"}  # of no handbook
    handbook = read_handbook(context, tokenizer, _room(model))
    for line in without_passages(model, handbook):
        log.info(line)
    for data in dict.fromkeys(each.data for each in sets if each.name in asked):
        if data not in read:  # or it was done
            of_data = [record for each in sets if each.data == data for record in each.asked if not record.context]
            refuse_strange(of_data, handbook, data)
    if not asked and read.isdisjoint(each.data for each in sets):
        what = "has keywords, by which answers with passages are measured (general questions are not asked)"
        remedy = "leave out --context, or add a column keywords"
        raise ValueError(f"{', '.join(each.data for each in sets)}: no record {what}: {remedy}")
    return {name: (records, with_own_passages(records, handbook)) for name, records in asked.items()}


def _report(
    model: LanguageModel,
    tokenizer: Tokenizer,
    each: MeasuredSet,
    scores: Mapping[str, Scores],
    own: Mapping[str, str | None],
    seed: int,
) -> dict[str, Any]:
    """The report of a set that is `Checked`, in which the adapter in question is the one that was trained on it."""
    held = each.checked
    assert held is not None
    shots = held.shots_that_fit(tokenizer, model.config.max_position_embeddings)
    whole = task_of_adapters(model, None) is not None
    contenders: dict[str, tuple[Choice, int]] = {f"base, {n or 'zero'}-shot": (None, n) for n in (0, shots)}
    if isinstance(held, Preferred):
        contenders = {BASE_NAME: (None, 0)}
    elif whole:
        contenders = {"the whole model": (None, 0)}
    contenders |= {name: (name, 0) for name in sorted(own, key=lambda name: own[name] == each.data)}
    asked, tasks = held.task, dict[str, LabelTask]()  # of adapters that were trained on another version of the labels
    if isinstance(held, Labelled):
        trained = {name: task_of_adapters(model, choice) for name, (choice, _) in contenders.items()}
        others = {name: task for name, task in trained.items() if isinstance(task, LabelTask) and task != asked}
        tasks = {name: task for name, task in others.items() if task.is_like(asked)}
        held = held.with_labels_of(tasks.values())
        if tasks:
            log.info(
                f"{each.data}: each adapter is asked for the labels that it was trained on, which are not the same; "
                "all losses are measured with one prompt"
            )
    found: dict[str, Sequence[Any]] = {}
    for name, (choice, shots) in contenders.items():
        set_adapter(model, choice)
        if isinstance(held, Preferred):
            found[name] = held.ask_rejected(model, tokenizer, each.samples, scores[name].nats)
        elif isinstance(held, Labelled):
            found[name] = held.ask_as(tasks.get(name, asked), model, tokenizer, shots)
        else:
            found[name] = held.ask(model, tokenizer, shots)
    set_adapter(model, None)
    return {**held.report(found, seed), "adapters": list(own)}


# -- what an adapter was trained on ------------------------------------------------------------------------------------


def _warn_of_other_data(folder: Path) -> None:
    data = read_provenance(folder).get("data", {})
    if "name" not in data:
        log.warning(f"{folder}: no {PROVENANCE_FILE} that names its training data: give --data to measure on them")
        return
    if data_of(folder) is None:
        log.warning(f"{folder}: its training data, {data['name']}, are not here: give their path with --data")


def _as_given(place: str | None, folder: Path, data: Sequence[str]) -> str | None:
    """The data at `place`, on which an adapter was trained, under the name by which `data` has them."""
    sha256 = read_provenance(folder).get("data", {}).get("sha256")
    same = [source for source in data if sha256 is not None and sha256_of_data(source) == sha256]
    same += [source for source in data if is_same(place, source)]  # the file may have changed
    return place if place in data else next(iter(same), place)


# -- the page ----------------------------------------------------------------------------------------------------------


def page(result: Mapping[str, Any]) -> str:
    """The numbers of `evaluate_adapters` as text, a section for each set."""
    lines: list[str] = []
    for name, about in result["sets"].items():
        title = f"{Path(about['data']).name}: {KINDS[about['kind']]}, {counted(about['records'], 'record')}"
        lines += [rule(title), *_values(result["scores"][name])]
        if differences := result["differences"][name]:
            lines += ["", *_changes(differences)]
        for kind, written in REPORTS.items():
            if name in result.get(kind, {}):
                lines += ["", *written(result[kind][name], NARROWEST)]
        lines.append("")
    bare = [Path(about["data"]).name for about in result["sets"].values() if not about["asked"]]
    if bare:
        which = listed([*dict.fromkeys(bare)])
        lines += wrapped(f"{NOTHING}: no record of {which} has keywords, which recall needs: add a column keywords.")
    if any(about["records"] > 1 for about in result["sets"].values()):  # one record has no interval
        draws = f"{percent(result['confidence'])} interval, from {result['resamples']:,} bootstrap draws of the records"
        paired = "; differences are paired. A difference is significant if its interval excludes 0."
        lines += wrapped(f"[low, high]: {draws}{paired if any(result['differences'].values()) else '.'}")
    return "\n".join(lines).rstrip()


def _values(scores: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'':<22}{'loss, nats per token':<25}{'perplexity':>10}   keyword recall, %"
    for name, found in scores.items():
        bare, recall = found["perplexity"]["value"], shown(found[RECALL], RECALL) if RECALL in found else NOTHING
        perplexity = NOTHING if bare is None else plain(bare, 1) if bare < 1e6 else f"{bare:.1e}"
        yield f"{padded(shortened(name, 20), 22)}{shown(found[LOSS], LOSS):<25}{perplexity:>10}   {recall}"


def _changes(differences: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield f"{'difference':<35}{'loss':<27}recall, points"
    for one in differences:
        label = shortened(f"{one['of']} minus {one['less']}", 33)
        recall = shown(one[RECALL], RECALL, sign=True) if RECALL in one else NOTHING
        yield f"{padded(label, 35)}{shown(one[LOSS], LOSS, sign=True):<27}{recall}"


def shown(found: Mapping[str, float | None], measure: str, sign: bool = False) -> str:
    """A number of `summary` with its interval: a loss in nats, recall in percent."""
    factor, digits = (1, 3) if measure == LOSS else (100, 1)
    bounds = (found["value"], found["low"], found["high"])
    value, low, high = (None if x is None else factor * x for x in bounds)
    return interval(value, low, high, digits, sign)


HELP = "measure adapters and their base on data sets: loss, recall, labels, fields, preferences"


def add(parser: argparse.ArgumentParser) -> None:
    """The flags are the fields of EvalOptions."""
    add_flags(parser, EvalOptions)
    parser.add_argument("--json", **AS_JSON)


def run(arguments: argparse.Namespace) -> Outcome:
    """A table of adapters on data sets, and the figures that are asked for."""
    from ..pages.figures import matrix_figure
    from ..pages.labels import labels_figure
    from ..pages.open_book import open_book_figure

    options = from_flags(EvalOptions, arguments)
    result = evaluate_adapters(options)
    if options.matrix:
        save(matrix_figure(result), Path(options.matrix))
    if options.confusion:
        save(labels_figure(next(iter(result["labels"].values()))), Path(options.confusion))
    if options.passages:
        save(open_book_figure(next(iter(result["open_book"].values()))), Path(options.passages))
    return Outcome(result, page)
