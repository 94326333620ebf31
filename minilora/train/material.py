"""The data of a fine-tuning job, read, split and encoded, and one measurement of a model on them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..data.fields import FieldTask, Task
from ..data.formats import listed
from ..data.labels import LabelTask
from ..data.leaks import leaks, warning_of_leaks
from ..data.passages import TEMPLATE, Handbook
from ..data.records import BUILT_IN, Record, read_handbook, read_records, read_source
from ..data.rows import DataError
from ..data.samples import (
    encode_pairs,
    encode_records,
    mixed,
    truncate_and_log,
)
from ..data.splits import (
    RULE,
    TEXT_RULE,
    check_labels,
    describe_splits,
    follows_rule,
    is_one_text,
    split_records,
    split_text,
)
from ..measure.fields import checked_of
from ..measure.labels import Checked
from ..measure.loss import Item, evenly, held_out, mean_loss
from ..measure.preferences import preferences, with_reference
from ..measure.recall import ANSWER_TOKENS, answer_all, keyword_recall
from ..models.tokenizer import Tokenizer
from ..nn.language_model import LanguageModel
from ..nn.parts import Example, Pair, Sample
from ..pages.text import counted
from ..progress import log, progress

TESTS = ("reworded", "paraphrase", "unseen")  # the sets in which questions are asked, if the data have them
ASKED_LABELS = 320  # labelled records, at most, in the test and in validation: with few, noise decides


@dataclass
class Material:
    """The data, read and encoded: the training set, the sets that are measured, the questions that are asked."""

    train: Sequence[Example]
    validation: Sequence[Example]
    scored: dict[str, Sequence[Example]]  # "reworded", "paraphrase", "unseen", "general"
    asked: dict[str, list[Record]]  # the same for keyword recall
    shown: dict[str, list[Record]] = field(default_factory=dict)  # asked for the page only: they have no keywords
    validation_paraphrase: Sequence[Example] = ()  # training records, paraphrased
    system: str | None = None  # the system prompt of all records, if they have the same one
    split: str | None = None  # the rule that divided data in which no record names a split
    sampled_from: dict[str, int] = field(default_factory=dict)  # the records of each set of which a sample is measured
    task: Task | None = None  # of data with labels or fields
    template: str | None = None  # of prompts with a passage, if the records have passages
    checked: Checked | None = None  # the records whose labels or fields are asked for, if they have any
    validated: Checked | None = None  # those of validation, if they have labels
    mixed: dict[str, int] = field(default_factory=dict)  # how many samples of the training set are of other data

    @property
    def own(self) -> int:
        """The samples of the training set that are not of other data."""
        return len(self.train) - sum(self.mixed.values())

    @property
    def validation_sets(self) -> dict[str, Sequence[Example]]:
        """The validation sets: "unseen" and "paraphrase", as far as the data have them."""
        sets = {"unseen": self.validation, "paraphrase": self.validation_paraphrase}
        return {name: samples for name, samples in sets.items() if samples}

    @property
    def sha256(self) -> str:
        """The fingerprint of what is trained on and validated with, as the model sees it."""
        digest = hashlib.sha256()
        for samples in (self.train, self.validation, self.validation_paraphrase):
            digest.update(b"set")
            for sample in samples:
                digest.update(b"sample")
                for wording in (sample, *sample.others):
                    digest.update(np.array([len(wording.ids), *wording.ids, *wording.labels], "<i8").tobytes())
        return digest.hexdigest()

    def refer_to(self, model: LanguageModel) -> None:
        """Give every pair this model as DPO's reference."""

        def referred(samples: Sequence[Example]) -> Sequence[Example]:
            pairs = [sample for sample in samples if isinstance(sample, Pair)]
            return with_reference(model, pairs) if pairs else samples

        self.train, self.validation, self.validation_paraphrase = (
            referred(samples) for samples in (self.train, self.validation, self.validation_paraphrase)
        )
        self.scored = {name: referred(samples) for name, samples in self.scored.items()}

    def refuse_what_is_longer(self, limit: int, source: str, tokenizer: Tokenizer) -> None:
        """Raise ValueError when a record, or a question and its answer, is longer than a model that sees `limit`.

        A question that would only be shown, and is too long, is left out. So is a record whose answer would be checked,
        which is logged.
        """
        trained = [wording for sample in self.train for wording in (sample, *sample.others)]
        validation = [*self.validation, *self.validation_paraphrase]
        samples = [*trained, *validation, *(sample for scored in self.scored.values() for sample in scored)]
        longest = max(len(each.ids) for sample in samples for each in sample.sequences)
        if longest > limit:
            raise ValueError(f"a record has {longest} tokens, the model can see {limit}: use --max-length {limit}")
        if (held := self.checked) is not None:  # these are never truncated
            lengths = list(zip(held.records, held.lengths(tokenizer), strict=True))
            fitting = [record for record, length in lengths if length <= limit]
            if longer := [record.id for record, length in lengths if length > limit]:
                why = f"with an answer they are longer than the {limit} tokens that the model can see"
                what = f"{len(longer)} of {len(lengths)} records are not asked, since {why}"
                log.warning(f"{source}: {what}: {listed(longer, 5)}; shorten them")
            self.checked = replace(held, records=fitting) if fitting else None

        def length(record: Record) -> int:
            return len(tokenizer.encode_chat(record.prompt, answer_next=True))

        for record in (record for asked in self.asked.values() for record in asked):
            if length(record) + ANSWER_TOKENS > limit:
                raise ValueError(
                    f"{source}: record {record.id}: a question of {length(record)} tokens and an answer of "
                    f"{ANSWER_TOKENS} are more than the {limit} the model can see: shorten it, or leave out its "
                    "keywords"
                )
        for name, records in self.shown.items():
            self.shown[name] = [record for record in records if length(record) + ANSWER_TOKENS <= limit]


@dataclass
class Measured:
    """What a model knew at one time: mean loss, keyword recall and the answers themselves, by set; and what
    `Checked.ask` answered, by who was asked.
    """

    loss: dict[str, float] = field(default_factory=dict)
    recall: dict[str, float] = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)
    checked: dict[str, list[Any]] = field(default_factory=dict)
    preferences: dict[str, dict[str, float]] = field(default_factory=dict)  # of pairs, by set


def prepare(
    data: str,
    tokenizer: Tokenizer,
    *,
    field: Mapping[str, str] | None = None,
    context: str | None = None,
    mix: Mapping[str, float] | None = None,
    max_length: int,
    eval_records: int,
    stored: Sequence[Task] = (),
    schema: str | None = None,
    beta: float | None = None,
) -> Material:
    """Read and encode the data.

    data: a built-in data set, a file or a folder.
    field: columns of the data that have other names.
    context: passages, the right one of which goes into the prompts of each record that has none.
    mix: other data to train on, each with its share of the records of an epoch.
    max_length: the tokens of a record; longer conversations are truncated, which is logged, longer texts divided.
    eval_records: the most records of each set that are measured.
    stored: the task of the adapter that is trained further, if it has one.
    schema: the file with the JSON Schema of data with fields.
    beta: DPO's, for pairs of a chosen and a rejected answer instead of samples.

    Raises DataError listing every bad line, ValueError when nothing is left to train on.
    """
    reading = read_source(data, tokenizer, field, stored, schema)
    records, task = reading.records, reading.task
    for line in reading.notes() if data not in BUILT_IN else ():
        log.info(f"{data}: {line}")
    if context is not None:
        records = with_passages(records, context, data, tokenizer, max_length)
    if beta is not None and (without := [record.id for record in records if record.rejected is None]):
        needed = "DPO needs the columns prompt, chosen and rejected, such as legal-pairs has"
        raise ValueError(f"{data}: record {without[0]} has no rejected answer: {needed}")
    if beta is None and any(record.rejected is not None for record in records):
        log.info(f"{data}: only the chosen answers are learned; --loss dpo learns from the rejected ones as well")
    made = Material([], [], {}, {}, system=common_system(records), task=task)
    made.template = TEMPLATE if any(record.context for record in records) else None
    samples: dict[str, list[Example]] = {}
    splits: dict[str, list[Record]] = {}
    if is_one_text(records):
        parts = split_text(records[0].text, tokenizer, max_length)
        log.info(describe_splits({name: len(part) for name, part in parts.items()}, text=True))
        samples = {"train": list(parts["train"])}
        for name, part in (("validation", parts["validation"]), ("unseen", parts["test"])):
            samples[name] = _sampled(part, name, eval_records, made.sampled_from)
    else:
        splits = split_records(records)
        columns = ", ".join(reading.formats)
        if isinstance(task, FieldTask):
            copied = f"; copied from the text: {listed(task.copied)}" if task.copied else ""
            log.info(f"{data}: {len(task.fields)} fields ({columns}): {listed([f.name for f in task.fields])}{copied}")
        elif task is not None:
            log.info(f"{data}: {len(task.labels)} labels ({columns}): {listed(task.labels)}")
            for line in check_labels(splits, data):
                log.warning(line)
        validated = max(eval_records, ASKED_LABELS) if isinstance(task, LabelTask) else eval_records
        sets = _sets(records, splits, eval_records, validated, made.sampled_from)
        for name, chosen in sets.items():
            if beta is None:
                samples[name] = list(encode_records(chosen, tokenizer, name == "train", max_length))
            else:
                samples[name] = list(encode_pairs(chosen, tokenizer, beta))
        if task is None:
            made.asked, made.shown = _questions(sets)
        elif sets["unseen"]:
            tested = evenly(splits["test"], max(eval_records, ASKED_LABELS))
            made.checked = checked_of(task, tested, splits["train"])
        if isinstance(task, LabelTask) and sets["validation"]:
            made.validated = checked_of(task, sets["validation"], ())
    if follows_rule(records):
        made.split = RULE if splits else TEXT_RULE
    samples = {name: truncate_and_log(name, whole, max_length) for name, whole in samples.items()}
    if not samples["train"]:
        raise ValueError(f"{data}: nothing is left to train on within --max-length {max_length}")
    mix = mix or {}
    whole = len(samples["train"]) / (1 - sum(mix.values()))
    for source, share in mix.items():
        others = _others(source, tokenizer, max_length, splits, field)
        more = mixed(others, round(whole * share) or 1)
        samples["train"] += more
        made.mixed[source] = len(more)
        which = f"{len(more):,} of its {len(others):,} training records"
        if len(more) > len(others):
            which = f"its {counted(len(others), 'training record')} {len(more) / len(others):.1f} times"
        log.info(f"{source}: each epoch has {which}")
    general = read_records("general", tokenizer)
    samples["general"] = list(encode_records(general, tokenizer))  # never cut: the same measure for every run
    made.train, made.validation = samples["train"], samples["validation"]
    made.validation_paraphrase = samples.get("validation_paraphrase", [])
    made.scored = {name: samples[name] for name in (*TESTS, "general") if samples.get(name)}
    return made


def _others(
    source: str,
    tokenizer: Tokenizer,
    max_length: int,
    splits: Mapping[str, Sequence[Record]],
    field: Mapping[str, str] | None,
) -> list[Sample]:
    """The training samples of data that are mixed in.

    splits: the records of the data themselves, to name leaks. field: their columns, which these may have as well.
    """
    try:
        records = read_source(source, tokenizer, field).records
    except DataError:
        records = read_source(source, tokenizer).records
    samples: list[Sample] = []
    if is_one_text(records):
        samples = split_text(records[0].text, tokenizer, max_length)["train"]
    elif any(record.split in (None, "train") for record in records):
        trained = split_records(records)["train"]
        for line in warning_of_leaks(leaks({**splits, "train": trained}) if splits else []):
            log.info(f"{source}: {line}")
        samples = truncate_and_log(source, encode_records(trained, tokenizer, True, max_length), max_length)
    if not samples:
        raise ValueError(f"{source}: there is no record to train on in it: leave it out of mix")
    return samples


def with_passages(records: Sequence[Record], context: str, data: str, tokenizer: Tokenizer, limit: int) -> list[Record]:
    """The records, each with the right passage of a context in its prompts, unless it has one already.

    limit: the most tokens of a prompt with one. Raises ValueError for records that ask nothing, or for a label, and if
    no record shares a word with a passage.
    """
    if any(record.text or record.label is not None for record in records):
        raise ValueError(f"{data}: a context is for questions with answers, not for texts or labels: leave it out")
    handbook = read_handbook(context, tokenizer, limit)
    refuse_strange([record for record in records if not record.context], handbook, data)
    return [r if r.context else r.open_book(handbook.right(r.messages).text) for r in records]


def refuse_strange(asked: Sequence[Record], handbook: Handbook, data: str) -> None:
    """Warn of records that share no word with any passage. Raises ValueError if that is so for all."""
    if strange := [record.id for record in asked if not handbook.has_words_of(record.messages)]:
        share = f"{len(strange):,} of {len(asked):,} records share no word with any passage of {handbook.source}"
        if len(strange) == len(asked):
            raise ValueError(f"{data}: {share}: give the passages that have their answers")
        log.warning(f"{data}: {share}, such as {strange[0]}: each gets a passage that is not about it")


def common_system(records: Sequence[Record]) -> str | None:
    """The system prompt with which every record begins; None if they differ, or have none."""
    first = {(record.messages[0]["role"], record.messages[0]["content"]) for record in records if record.messages}
    (role, prompt), *others = first or {("", "")}
    return prompt if role == "system" and not others else None


def evaluate(model: LanguageModel, tokenizer: Tokenizer, material: Material, when: str) -> Measured:
    """Measure a model on all sets.

    material: the sets that are scored, and the questions that are asked.
    when: "before" or "after" training, for the progress bars.
    """
    result = Measured()
    sequences = [sequence for samples in material.scored.values() for each in samples for sequence in each.sequences]
    with progress(f"loss {when}", len(sequences), "record"):
        for name, samples in material.scored.items():
            if pairs := [sample for sample in samples if isinstance(sample, Pair)]:
                result.preferences[name] = preferences(model, pairs)
                result.loss[name] = result.preferences[name].pop("loss")
            else:
                result.loss[name] = mean_loss(model, samples)
    questions = material.asked | material.shown
    with progress(f"answers {when}", sum(map(len, questions.values())), "answer"):
        for name, records in questions.items():
            result.answers[name] = answer_all(model, tokenizer, records)
            if name in material.asked:
                result.recall[name] = keyword_recall(result.answers[name], records)
    if (held := material.checked) is not None:
        asked = {when: 0}
        if when == "before":
            who = "old adapter" if model.adapters else "base"
            shots = held.shots_that_fit(tokenizer, model.config.max_position_embeddings)
            asked = {f"{who}, {n or 'zero'}-shot": n for n in (0, shots)} if held.examples else {}  # not of a trial
        result.checked = {name: list(held.ask(model, tokenizer, n)) for name, n in asked.items()}
    return result


def learned(material: Material, before: Measured, after: Measured, trained: str) -> dict[str, Any]:
    """What a job's metrics hold of two measurements: losses, recalls and some answers, before and after; and of labels
    or fields the report, in which the trained model is called `trained`.
    """
    more: dict[str, Any] = {}
    if (held := material.checked) is not None:
        (answers,) = after.checked.values()
        more[held.key] = held.report({**before.checked, trained: answers})
    if before.preferences:
        more["preferences"] = {
            name: {kind: [value, after.preferences[name][kind]] for kind, value in found.items()}
            for name, found in before.preferences.items()
        }
    return {
        "loss": {name: [loss, after.loss[name]] for name, loss in before.loss.items()},
        "keyword_recall": {name: [recall, after.recall[name]] for name, recall in before.recall.items()},
        "answers": _examples(material, before.answers, after.answers),
        **more,
    }


def _examples(material: Material, before: dict[str, list[str]], after: dict[str, list[str]]) -> list[dict[str, str]]:
    """Three questions with both answers: two training questions, paraphrased where there are such, and one unseen."""
    questions = material.asked | material.shown
    trained = "paraphrase" if "paraphrase" in questions else "train"
    wanted = [(trained, 0), (trained, 1), ("unseen", 0)]
    chosen = []
    for name, position in wanted:
        records = questions.get(name, [])
        if position < len(records):
            i = position * (len(records) // 2)
            question = records[i].prompt[-1]["content"]
            if (passage := records[i].context) is not None:
                question = question.replace(passage, "[the passage]")
            chosen.append({"set": name, "question": question, "before": before[name][i], "after": after[name][i]})
    return chosen


def _sets(
    records: Sequence[Record],
    splits: Mapping[str, list[Record]],
    eval_records: int,
    validated: int,
    sampled_from: dict[str, int],
) -> dict[str, list[Record]]:
    """Records by set: at most `validated` for validation, and `eval_records` for the other measures."""
    if follows_rule(records):
        log.info(describe_splits({name: len(part) for name, part in splits.items()}))
    for line in warning_of_leaks(leaks(splits)):
        log.info(line)
    paraphrased = [r.asked(r.validation_paraphrase) for r in splits["train"] if r.validation_paraphrase is not None]
    measured = held_out(splits, eval_records)
    return {
        "train": splits["train"],
        "validation": _sampled(splits["validation"], "validation", validated, sampled_from),
        "validation_paraphrase": evenly(paraphrased, eval_records),
        "reworded": measured["reworded"],
        "paraphrase": measured["paraphrase"],
        "unseen": _sampled(measured["unseen"], "unseen", eval_records, sampled_from),
    }


def _questions(sets: Mapping[str, list[Record]]) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """The records that have keywords to look for, by set; where none has, a few to show."""
    asked = {name: [record for record in sets[name] if record.keywords] for name in TESTS}
    asked = {name: chosen for name, chosen in asked.items() if chosen}
    trained = "paraphrase" if sets["paraphrase"] else "train"
    shown = {name: _few(sets[name]) for name in (trained, "unseen") if name not in asked}
    return asked, {name: chosen for name, chosen in shown.items() if chosen}


def _sampled(items: Sequence[Item], name: str, most: int, sampled_from: dict[str, int]) -> list[Item]:
    """At most `most` of the items, evenly chosen. If others are left out, it is logged and noted in `sampled_from`."""
    chosen = evenly(items, most)
    if len(chosen) < len(items):
        sampled_from[name] = len(items)
        log.info(f"{name}: a sample of {len(chosen):,} of {len(items):,} is measured (--eval-records {most})")
    return chosen


def _few(records: Sequence[Record]) -> list[Record]:
    """The first and the middle one of those that ask something."""
    questions = [record for record in records if record.messages]
    return [questions[i] for i in sorted({0, len(questions) // 2})] if questions else []
