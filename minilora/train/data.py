"""From files to token ids: records, conversations or plain text, checked before any training, packed without padding.

A file is JSONL with `{"question", "answer"}` (optional: "id", "topic", "split", "phrasings", "paraphrase",
"validation_paraphrase", "keywords"), or with `{"messages": [{"role", "content"}, ...]}`, or a plain `.txt` file. Only
the assistant's words are scored; in plain text, everything is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.fused import NOT_SCORED
from ..io.tokenizer import Message, Tokenizer
from ..nn.parts import Sample

SPLITS = ("train", "validation", "test")
BUILT_IN = ("legal", "medical", "support", "finance", "general")
_SHOWN = 20  # problems listed before the rest is only counted


class DataError(ValueError):
    """A data file cannot be used. The message lists every bad line as `file:line: reason`."""


@dataclass(frozen=True)
class Record:
    """One conversation (or, with no messages, one text), and what is known about it."""

    id: str
    messages: tuple[Message, ...] = ()
    text: str = ""
    split: str | None = None
    paraphrase: str | None = None
    keywords: tuple[str, ...] = ()
    phrasings: tuple[str, ...] = ()
    validation_paraphrase: str | None = None

    @property
    def prompt(self) -> list[Message]:
        """The conversation up to where the assistant gives its last answer."""
        return list(self.messages[:-1])

    @property
    def other_questions(self) -> list[str]:
        """All further ways of asking, in training and in measuring."""
        measured = (self.paraphrase, self.validation_paraphrase)
        return [*self.phrasings, *(question for question in measured if question is not None)]

    def asked_otherwise(self) -> Record:
        """The same record with the paraphrase as its question."""
        if self.paraphrase is None:
            raise ValueError(f"record {self.id} has no paraphrase")
        return self.asked(self.paraphrase)

    def asked(self, question: str) -> Record:
        """The same record with another question, and with no further phrasings. Its system message stays."""
        system = [message for message in self.messages[:1] if message["role"] == "system"]
        messages = (*system, {"role": "user", "content": question}, self.messages[-1])
        return replace(self, messages=messages, phrasings=())


# -- reading -----------------------------------------------------------------------------------------------------------


def read_records(source: str | Path, tokenizer: Tokenizer | None = None) -> list[Record]:
    """Read a file, or one of BUILT_IN by its name. Raises DataError that lists every bad line at once.

    tokenizer: if given, text that it cannot express is reported as well.
    """
    built_in = str(source) in BUILT_IN
    path = Path(str(files("minilora") / "data" / f"{source}.jsonl")) if built_in else Path(source)
    if not path.is_file():
        raise DataError(f"{source}: no such data file; use a .jsonl or .txt file, or {', '.join(BUILT_IN)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    if path.suffix == ".txt":
        _raise_if([f"{path}: {problem}" for problem in _unwritable(text, tokenizer)])
        return [Record(id=path.stem, text=text)]
    records: list[Record] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = _parse(line, number)
            for said in (*(m["content"] for m in record.messages), *record.other_questions):
                for problem in _unwritable(said, tokenizer):
                    raise ValueError(problem)
            if record.id in seen:
                raise ValueError(f"id {record.id!r} stands in line {seen[record.id]} already")
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
        else:
            seen[record.id] = number
            records.append(record)
    _raise_if(problems)
    return records


def _raise_if(problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - _SHOWN} more bad lines"] if len(problems) > _SHOWN else []
        raise DataError("\n".join(problems[:_SHOWN] + more))


def _unwritable(text: str, tokenizer: Tokenizer | None) -> Iterator[str]:
    if tokenizer is not None:
        try:
            tokenizer.check(text)
        except ValueError as error:
            yield str(error)


def _parse(line: str, number: int) -> Record:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"expected a JSON object, got {type(raw).__name__}")
    if "messages" in raw:
        messages = _messages(raw["messages"])
    elif "question" in raw or "answer" in raw:
        messages = (
            {"role": "user", "content": _text(raw, "question")},
            {"role": "assistant", "content": _text(raw, "answer")},
        )
    else:
        raise ValueError(f'expected "question" and "answer", or "messages"; got {", ".join(raw) or "an empty object"}')
    split, keywords = raw.get("split"), raw.get("keywords", [])
    if split is not None and split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    if not isinstance(keywords, list) or not all(isinstance(word, str) and word for word in keywords):
        raise ValueError("keywords must be a list of words")
    phrasings = raw.get("phrasings", [])
    if not isinstance(phrasings, list) or not all(isinstance(text, str) and text.strip() for text in phrasings):
        raise ValueError("phrasings must be a list of questions")
    measured = ("paraphrase", "validation_paraphrase")
    paraphrase, validation = (_text(raw, key) if raw.get(key) is not None else None for key in measured)
    name = str(raw.get("id", f"line-{number}"))
    return Record(name, messages, "", split, paraphrase, tuple(keywords), tuple(phrasings), validation)


def _messages(raw: Any) -> tuple[Message, ...]:
    if not isinstance(raw, list) or not raw:
        raise ValueError("messages must be a non-empty list")
    for i, message in enumerate(raw, 1):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"message {i} needs a role of system, user or assistant")
        _text(message, "content")
    if raw[-1]["role"] != "assistant":
        raise ValueError("the last message must be the assistant's: it is what is learned")
    return tuple({"role": m["role"], "content": m["content"]} for m in raw)


def _text(raw: dict[str, Any], key: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} must be a non-empty text, got {value!r}")
    return value


def split_records(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by split. Where none names a split, every tenth goes to "test" and the rest to "train".

    Raises DataError when nothing is left to train on.
    """
    if all(record.split is None for record in records):
        records = [
            replace(record, split="test" if len(records) >= 10 and i % 10 == 9 else "train")
            for i, record in enumerate(records)
        ]
    splits: dict[str, list[Record]] = {name: [] for name in SPLITS}
    for record in records:
        splits[record.split or "train"].append(record)
    if not splits["train"]:
        raise DataError('no record is left to train on: none has "split": "train"')
    return splits


# -- encoding ----------------------------------------------------------------------------------------------------------


def encode_record(record: Record, tokenizer: Tokenizer) -> Sample:
    """A conversation as token ids, with labels for the assistant's words and the token that ends them."""
    ids = tokenizer.encode_chat(record.messages)
    labels = [NOT_SCORED] * len(ids)
    for i, message in enumerate(record.messages):
        if message["role"] != "assistant":
            continue
        start = len(tokenizer.encode_chat(record.messages[:i], answer_next=True))
        answer = tokenizer.encode(message["content"])
        end = start + len(answer)
        if ids[start:end] != answer:  # a template that trims or merges: score up to its end mark
            end = ids.index(tokenizer.eos_id, start) if tokenizer.eos_id in ids[start:] else len(ids)
        end += end < len(ids) and ids[end] == tokenizer.eos_id
        labels[start:end] = ids[start:end]
    return Sample(tuple(ids), tuple(labels))


def encode_records(records: Sequence[Record], tokenizer: Tokenizer, phrasings: bool = False) -> list[Sample]:
    """Conversations as samples, in their order: `encode_record` of each.

    phrasings: with the records' further ways of asking, one of which each pass of `fit` takes.
    """
    samples = [encode_record(record, tokenizer) for record in records]
    if phrasings:
        asked = [[encode_record(record.asked(text), tokenizer) for text in record.phrasings] for record in records]
        samples = [replace(sample, others=tuple(others)) for sample, others in zip(samples, asked, strict=True)]
    return samples


def encode_text(text: str, tokenizer: Tokenizer, max_length: int) -> list[Sample]:
    """A text as consecutive sequences of at most `max_length` tokens; every token but each first one is scored."""
    ids = tokenizer.encode(text)
    sequences = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    return [Sample(tuple(row), (NOT_SCORED, *row[1:])) for row in sequences if len(row) > 1]


def cut(samples: Sequence[Sample], max_length: int) -> tuple[list[Sample], int, int]:
    """Cut samples to `max_length` tokens. Returns those with something left to score, how many were cut, and how many
    of these had to be left out.
    """
    longer = sum(len(sample.ids) > max_length for sample in samples)
    short = [
        Sample(sample.ids[:max_length], sample.labels[:max_length], tuple(cut(sample.others, max_length)[0]))
        for sample in samples
    ]
    kept = [sample for sample in short if sample.scored]
    return kept, longer, len(short) - len(kept)


# -- batching ----------------------------------------------------------------------------------------------------------


def epochs(samples: Sequence[Sample], batch_size: int, seed: int) -> Iterator[list[Sample]]:
    """Batches of samples without end: every epoch all samples once, in a new order that `seed` determines.

    A sample with `others` comes as another one of them in every epoch; which is first differs by sample.
    """
    rng = np.random.default_rng(seed)
    for epoch in count():
        order = rng.permutation(len(samples))
        for i in range(0, len(order), batch_size):
            yield [samples[j].in_turn(epoch + int(j)) for j in order[i : i + batch_size]]
