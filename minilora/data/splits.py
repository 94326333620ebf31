"""Which records are trained on, which validate and which test: as the data say, or else by one rule.

Every command divides a file by this rule, so that `eval` tests on the records that `finetune` did not train on.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from ..models.tokenizer import Tokenizer
from ..nn.parts import Sample
from .labels import doubts
from .leaks import contradictions
from .records import Record, check_records
from .rows import SPLITS, DataError
from .samples import encode_text

LEAST = 10  # records, or sequences of a text: with fewer, all are trained on
RULE = "of every ten, the fifth is for validation and the tenth for the test"
TEXT_RULE = "the last tenth of the text is for the test, the tenth before it for validation"


def split_records(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by split: "train", "validation", "test". Where none names a split, the fifth of every ten
    is for validation and the tenth for the test.

    Raises DataError when nothing is left to train on.
    """
    check_records(records)
    splits = by_split(records)
    if not splits["train"]:
        raise DataError('no record is left to train on: give some "split": "train", or leave the column out')
    return splits


def by_split(records: Sequence[Record]) -> dict[str, list[Record]]:
    """`split_records`, also for data without training records. A record without a split is trained on if another record
    names one. The first record of a label that the rule would only hold out is trained on, too.
    """
    splits: dict[str, list[Record]] = {name: [] for name in SPLITS}
    ruled = follows_rule(records) and len(records) >= LEAST
    named = [
        record.split or (ruled and {4: "validation", 9: "test"}.get(i % 10)) or "train"
        for i, record in enumerate(records)
    ]
    trained = {record.label for record, name in zip(records, named, strict=True) if name == "train"}
    for record, name in zip(records, named, strict=True):
        new = ruled and record.label not in trained
        splits["train" if new else name].append(record)
        trained.add(record.label)
    return splits


def follows_rule(records: Sequence[Record]) -> bool:
    """Does no record name a split?"""
    return all(record.split is None for record in records)


def describe_splits(sizes: Mapping[str, int], text: bool = False) -> str:
    """What the rule makes of data that name no split. sizes: samples or records by split. text: of a single text."""
    things, rule = ("sequences", TEXT_RULE) if text else ("records", RULE)
    if not any(sizes[name] for name in SPLITS[1:]):
        return f"all is trained on and nothing is held out: that takes {LEAST} {things}, and there are {sizes['train']}"
    held_out = f"{sizes['validation']:,} for validation, {sizes['test']:,} for the test"
    return f"{sizes['train']:,} {things} to train on, {held_out}: none names a split, so {rule}"


def is_one_text(records: Sequence[Record]) -> bool:
    """Are the data a single text that names no split?"""
    return len(records) == 1 and bool(records[0].text) and records[0].split is None


def has_validation(records: Sequence[Record], tokenizer: Callable[[], Tokenizer], max_length: int) -> bool:
    """Is there anything for validation? tokenizer: called for a text, to divide it into sequences of `max_length`."""
    if is_one_text(records):
        return bool(split_text(records[0].text, tokenizer(), max_length)["validation"])
    return bool(split_records(records)["validation"])


def split_text(text: str, tokenizer: Tokenizer, max_length: int) -> dict[str, list[Sample]]:
    """The sequences of `encode_text` by split, as TEXT_RULE says."""
    sequences = encode_text(text, tokenizer, max_length)
    tenth = len(sequences) // LEAST
    trained = len(sequences) - 2 * tenth
    ends = (0, trained, trained + tenth, len(sequences))
    return {name: sequences[ends[i] : ends[i + 1]] for i, name in enumerate(SPLITS)}


def check_labels(splits: Mapping[str, Sequence[Record]], source: object) -> list[str]:
    """Warnings, one line each, about labels that hardly can be learned. splits: the records of each split.

    Raises DataError for a label that must be recognised and is never trained on.
    """
    counts = Counter(record.label for record in splits[SPLITS[0]])
    for name in SPLITS[1:] if counts else ():
        new = [record for record in splits[name] if record.label is not None and record.label not in counts]
        if new:
            also = f", and {len(new) - 1} more such record{'s' * (len(new) > 2)}" if len(new) > 1 else ""
            raise DataError(
                f"{source}: {new[0].id} ({name}) has the label {new[0].label!r}, which no training record has{also}: "
                "add training records with it, or leave it out"
            )
    lines = doubts({label: count for label, count in counts.items() if label is not None})
    for name in SPLITS[1:] if len(counts) > 1 else ():
        if len({record.label for record in splits[name]}) == 1 < len(splits[name]):
            alone = f"all {len(splits[name])} records for {name} have the label {splits[name][0].label!r}"
            lines.append(f"{alone}: put the records in another order, or name splits in a column split")
    return lines + contradictions([record for name in SPLITS for record in splits[name]])
