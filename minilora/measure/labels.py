"""How well labels are told apart: accuracy, macro-F1, confusion, calibration; and what a model has to be better than.

Every contender gives probabilities (N, L) for N records and L labels, and chooses the most probable label.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, ClassVar

import numpy as np

from ..data.labels import LabelTask
from ..data.records import Record
from ..data.samples import encode_records
from ..data.words import words
from ..generate.labels import label_logprobs, label_probabilities, without_nan
from ..models.tokenizer import Message, Tokenizer
from ..nn.language_model import LanguageModel
from ..progress import log
from .statistics import Interval, Resampled, bootstrap, interval_as_json, middle, wilson

SHOTS = 8  # examples in the prompt of the base, at most
BINS = 10  # of confidence
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # of confidence, from which on a model answers
KINDS = 5  # of texts, at most, whose accuracy is reported apart
MAJORITY, CLASSIC = "majority class", "TF-IDF + logistic regression"
MISSING = "needs pip install scikit-learn"
WEIGHTS = 1 << 22  # of the logistic regression, at most: labels times words and pairs of words, of which rare ones go


@dataclass(frozen=True)
class Checked:
    """Records whose answers can be checked: `Labelled`, `WithFields` (fields.py), or `Preferred` (preferences.py).

    task: what is asked, if it is a task. examples: the training records, for the baselines and for few-shot prompts;
    there may be none.
    """

    task: Any
    records: Sequence[Record]
    examples: Sequence[Record] = ()
    key: ClassVar[str]  # of the report, in metrics and in what `minilora eval --json` prints

    def ask(self, model: LanguageModel, tokenizer: Tokenizer, shots: int = 0) -> Sequence[Any]:
        """The answer to each record, as JSON stores it, by the adapters that are active.

        shots: training records that are put before the question, as earlier turns of the conversation.
        ranks: the processes that share the work; all of them must call this.

        Raises ValueError where the model predicts NaN.
        """
        raise NotImplementedError

    def lengths(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens of each record with the longest answer: none may have more than the model can see."""
        raise NotImplementedError

    def shots_that_fit(self, tokenizer: Tokenizer, limit: int) -> int:
        """How many examples fit before every record in a model that sees `limit` tokens. None where the answers are
        those to the prompt as it is.
        """
        return 0

    def report(self, answers: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
        """Everything that pages, pictures and metrics say of the answers, as JSON stores it.

        answers: of `ask`, by the name of who gave them. The last one's is the model in question, whose mistakes are
        given, and which is compared with every other contender on the same records.
        seed: of the bootstrap draws.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Labelled(Checked):
    """Records to label. An answer is the log-likelihood of each label: (N, L) of all records."""

    task: LabelTask
    key = "labels"

    @property
    def truth(self) -> np.ndarray:
        """The number of each record's label: (N,)."""
        return numbers(self.records, self.task)

    def ask(self, model: LanguageModel, tokenizer: Tokenizer, shots: int = 0) -> list[list[float]]:
        """The log-likelihood of each label for each record, (N, L)."""
        records = with_examples(self.records, few_shot(self.examples, shots))
        return without_nan(label_logprobs(model, tokenizer, records, self.task.labels)).tolist()

    def with_labels_of(self, tasks: Iterable[LabelTask]) -> Labelled:
        """The same records, to which an answer may also be a label that only these tasks have."""
        known = {label for task in (self.task, *tasks) for label in task.labels}
        return replace(self, task=replace(self.task, labels=tuple(sorted(known))))

    def ask_as(self, task: LabelTask, model: LanguageModel, tokenizer: Tokenizer, shots: int = 0) -> list[list[float]]:
        """`ask` in the prompt of another task, for one of its labels: -inf for each label that it does not have."""
        records, examples = (
            [record.asked(task.prompt(self.task.text(record.question))) for record in each]
            for each in (self.records, self.examples)
        )
        found = np.full((len(records), len(self.task.labels)), -math.inf)
        places = [self.task.labels.index(label) for label in task.labels]
        found[:, places] = Labelled(task, records, examples).ask(model, tokenizer, shots)
        return found.tolist()

    def lengths(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens of each record with the longest label."""
        longest = max(self.task.labels, key=lambda label: len(tokenizer.encode(label)))
        samples = encode_records([record.answered(longest) for record in self.records], tokenizer)
        return [len(sample.ids) for sample in samples]

    def shots_that_fit(self, tokenizer: Tokenizer, limit: int) -> int:
        """How many examples of `few_shot`, up to SHOTS, fit before every record."""

        def length(records: Sequence[Record]) -> list[int]:
            return [len(tokenizer.encode_chat(list(record.messages))) for record in records]

        room = limit - max(length(self.records)) - max(len(tokenizer.encode(label)) for label in self.task.labels)
        return int((np.cumsum(length(few_shot(self.examples, SHOTS))) <= room).sum())

    def report(self, answers: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
        """Accuracy, macro-F1, confusion, calibration, mistakes and baselines."""
        truth, labels = self.truth, self.task.labels
        contenders: dict[str, np.ndarray | str] = {}
        if self.examples:
            contenders = {MAJORITY: majority(self), CLASSIC: classic(self)}
        contenders |= {name: label_probabilities(np.asarray(logprobs)) for name, logprobs in answers.items()}
        known = {name: p for name, p in contenders.items() if not isinstance(p, str)}
        *_, subject = known
        chosen = {name: p.argmax(axis=1) for name, p in known.items()}
        kinds = _kinds(self.records)
        right = Resampled(np.array([each == truth for each in chosen.values()], float), np.ones(len(truth)), seed)
        rows: list[dict[str, Any]] = []
        for name, found in contenders.items():
            if isinstance(found, str):
                rows.append({"name": name, "missing": found})
                continue
            k, hits = list(known).index(name), chosen[name] == truth
            bins = reliability(known[name].max(axis=1), hits)
            rows.append(
                {
                    "name": name,
                    "accuracy": interval_as_json(wilson(hits)),
                    "accuracy_of_kind": {kind: interval_as_json(wilson(hits[those])) for kind, those in kinds.items()},
                    "macro_f1": interval_as_json(_macro_f1(truth, chosen[name], len(labels), seed)),
                    "ece": calibration_error(bins),
                    "reliability": bins,
                    "coverage": coverage(known[name].max(axis=1), hits),
                    "lead": interval_as_json(right.difference(len(known) - 1, k)),  # of the model over this one
                }
            )
        return {
            "labels": list(labels),
            "records": len(truth),
            "kinds": {kind: len(those) for kind, those in kinds.items()},
            "subject": subject,
            "rows": rows,
            "confusion": confusion(truth, chosen[subject], len(labels)).tolist(),
            "mistakes": _mistakes(self, known[subject]),
        }


def numbers(records: Sequence[Record], task: LabelTask) -> np.ndarray:
    """The number of each record's label in the task: (N,)."""
    return np.array([task.labels.index(str(record.label)) for record in records])


def with_examples(records: Sequence[Record], examples: Sequence[Record]) -> list[list[Message]]:
    """The prompt of each record, with the examples before its question as earlier turns of the conversation."""
    turns = [message for example in examples for message in example.messages if message["role"] != "system"]
    return [[*record.prompt[:-1], *turns, record.prompt[-1]] for record in records]


def few_shot(records: Sequence[Record], shots: int) -> list[Record]:
    """The first record of each label, then the second of each, and so on: `shots` in all."""
    seen: Counter[str | None] = Counter()
    turns = []
    for record in records:
        seen[record.label] += 1
        turns.append((seen[record.label], record))
    return [record for _, record in sorted(turns, key=itemgetter(0))][:shots]


# -- contenders that are not language models ---------------------------------------------------------------------------


def majority(held: Labelled) -> np.ndarray:
    """The shares of the labels in the training records, whatever the text: (N, L)."""
    counts = np.bincount(numbers(held.examples, held.task), minlength=len(held.task.labels))
    return np.tile(counts / counts.sum(), (len(held.records), 1))


def classic(held: Labelled) -> np.ndarray | str:
    """TF-IDF of words and pairs of words, and logistic regression: (N, L). Why there are none, where that is so."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression, SGDClassifier
    except ImportError:
        return MISSING
    truth = numbers(held.examples, held.task)
    if len(np.unique(truth)) < 2:
        return "the training records have one label"

    def longer(text: str) -> list[str]:
        """Scikit-learn's own words of two or more characters, but in any script."""
        return [word for word in words(text) if len(word) > 1]

    most = WEIGHTS // len(held.task.labels)
    tfidf = TfidfVectorizer(
        tokenizer=longer, token_pattern=None, ngram_range=(1, 2), sublinear_tf=True, max_features=most
    )
    texts, tested = (
        [held.task.text(record.prompt[-1]["content"]) for record in each] for each in (held.examples, held.records)
    )
    if not any(map(tfidf.build_analyzer(), texts)):
        return "the training texts have no words of two or more characters"
    features = tfidf.fit_transform(texts)
    if features.shape[1] < most:
        known = LogisticRegression(C=10, max_iter=1000)
    else:  # whose solver would take gigabytes and minutes: the same loss of each label, by stochastic gradient descent
        log.info(f"{CLASSIC} learns from {len(texts):,} texts and their {most:,} most frequent words and pairs")
        known = SGDClassifier(loss="log_loss", alpha=1 / (10 * len(texts)), random_state=0)
    known.fit(features, truth)
    p = np.zeros((len(held.records), len(held.task.labels)))
    p[:, known.classes_] = known.predict_proba(tfidf.transform(tested))
    return p


# -- numbers -----------------------------------------------------------------------------------------------------------


def confusion(truth: np.ndarray, chosen: np.ndarray, labels: int) -> np.ndarray:
    """How many records of each label (row) were given each label (column): (L, L)."""
    return np.bincount(truth * labels + chosen, minlength=labels * labels).reshape(labels, labels)


def macro_f1(truth: np.ndarray, chosen: np.ndarray, labels: int, times: np.ndarray | None = None) -> np.ndarray:
    """The mean over labels of F1 = 2 TP / (2 TP + FP + FN): for each row of `times`, how often each record counts.

    truth, chosen: (N,). A label that is neither a record's own nor given to one does not count, as in scikit-learn.
    """
    times = np.ones((1, len(truth))) if times is None else times
    real, given = np.eye(labels)[truth], np.eye(labels)[chosen]  # (N, L)
    hits, either = times @ (real * given), times @ (real + given)  # (R, L)
    with np.errstate(invalid="ignore"):
        return np.nanmean(2 * hits / either, axis=1)


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """The records by confidence, in bins of equal width: how many, their mean confidence, the share that is right."""
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    found = []
    for place in np.unique(places):
        inside = places == place
        mean, share = float(confidence[inside].mean()), float(right[inside].mean())
        found.append({"from": place / BINS, "records": int(inside.sum()), "confidence": mean, "accuracy": share})
    return found


def calibration_error(bins: Sequence[Mapping[str, float]]) -> float:
    """ECE: the mean distance of confidence and accuracy over the bins, weighted by records (Guo et al. 2017, arXiv
    1706.04599).
    """
    gaps = [one["records"] * abs(one["confidence"] - one["accuracy"]) for one in bins]
    return sum(gaps) / sum(one["records"] for one in bins)


def coverage(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    """What a model answers if it answers only from a threshold of confidence on, for each of `THRESHOLDS`: how many
    records, their share of all (the coverage), and the share of them that is right, with Wilson's interval
    (selective classification: Geifman and El-Yaniv 2017, arXiv 1705.08500).
    """
    found = []
    for threshold in THRESHOLDS:
        answered = confidence >= threshold
        share = wilson(right[answered]) if answered.any() else Interval(math.nan, math.nan, math.nan, 0)
        counts = {"from": threshold, "records": int(answered.sum()), "coverage": float(answered.mean())}
        found.append({**counts, "accuracy": interval_as_json(share)})
    return found


def _kinds(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """The places of the records of each kind, where every record names one of a few kinds."""
    named = np.array([record.kind or "" for record in records])
    kinds = {str(kind): np.flatnonzero(named == kind) for kind in np.unique(named)}
    return kinds if 1 < len(kinds) <= KINDS and "" not in kinds else {}


def _macro_f1(truth: np.ndarray, chosen: np.ndarray, labels: int, seed: int) -> Interval:
    value = float(macro_f1(truth, chosen, labels)[0])
    if len(truth) < 2:
        return Interval(value, math.nan, math.nan, 1)
    draws = bootstrap(len(truth), lambda times: macro_f1(truth, chosen, labels, times), seed)
    return Interval(value, *middle(draws), len(truth))


def _mistakes(held: Labelled, p: np.ndarray) -> list[dict[str, Any]]:
    """The records that were given a wrong label, the most confident first."""
    wrong = np.flatnonzero(p.argmax(axis=1) != held.truth).tolist()
    return [
        {
            "id": held.records[i].id,
            "text": held.task.text(held.records[i].prompt[-1]["content"]),
            "label": held.records[i].label,
            "chosen": held.task.labels[int(p[i].argmax())],
            "confidence": float(p[i].max()),
        }
        for i in sorted(wrong, key=lambda i: -p[i].max())
    ]
