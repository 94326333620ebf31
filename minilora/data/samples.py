"""Records as samples: encoded, truncated, and dealt out in batches, epoch after epoch.

Of a conversation only the assistant's words are scored, with the token that ends them; of a text, everything is.
"""

import math
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from itertools import count
from typing import TypeVar, cast

import numpy as np

from ..engine.fused import NOT_SCORED
from ..files.disk import ModelFileError
from ..models.tokenizer import Tokenizer, check_tokenizer
from ..nn.parts import Example, Pair, Sample, begin_alike, same_beginning
from ..options import check_whole
from ..progress import log, progress
from .records import Record, check_records

One = TypeVar("One", bound=Example)
_AT_ONCE = 256  # records whose texts are encoded together: work for all cores, in little memory
_QUICK = 2000  # records that are encoded in about a second: no progress is shown
_INTS: dict[int, int] = {}  # one object for each token id: a large data set takes half the memory


def encode_record(record: Record, tokenizer: Tokenizer) -> Sample:
    """A conversation as token ids, with labels for the assistant's words and the token that ends them, but not for
    answers with the weight 0.

    Of a text, all tokens but the first are scored; the token that ends an answer is appended.
    """
    check_records([record])
    return _encoded([record], tokenizer)[0]


def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, phrasings: bool = False, max_length: int | None = None
) -> list[Sample]:
    """Records as samples, in their order: `encode_record` of each, on all cores.

    phrasings: add the records' further phrasings, one of which each epoch takes.
    max_length: texts are divided into samples of at most this many tokens; conversations stay whole.
    """
    check_records(records)
    samples: list[Sample] = []
    with progress("encoding", len(records) if len(records) > _QUICK else 0, "text") as bar:
        for i in range(0, len(records), _AT_ONCE):
            wordings = [
                [record, *(record.asked(text) for text in record.phrasings if phrasings and not record.text)]
                for record in records[i : i + _AT_ONCE]
            ]
            encoded = iter(_encoded([record for each in wordings for record in each], tokenizer))
            for record, *more in wordings:
                sample, others = next(encoded), tuple(next(encoded) for _ in more)
                if record.text:
                    samples += _divided(sample.ids, max(len(sample.ids), 1) if max_length is None else max_length)
                else:
                    samples.append(replace(sample, others=others) if others else sample)
            bar.update(len(wordings))
    return samples


def _encoded(records: Sequence[Record], tokenizer: Tokenizer) -> list[Sample]:
    """`encode_record` of each; the texts of all of them are encoded at once."""
    check_tokenizer(tokenizer)
    wholes = [record.text or _rendered(record, tokenizer) for record in records]
    heads: dict[str, list[int]] = {}
    samples = []
    for record, text, ids in zip(records, wholes, tokenizer.encode_all(wholes), strict=True):
        ids = [_INTS.setdefault(i, i) for i in ids]
        if record.text:
            ids = tokenizer.begun(ids)
            ids = ids if ids[-1:] == [tokenizer.eos_id] else [*ids, tokenizer.eos_id]
            samples.append(Sample(tuple(ids), (NOT_SCORED, *ids[1:])))
        else:
            samples.append(_conversation(record, text, ids, tokenizer, heads))
    return samples


def _rendered(record: Record, tokenizer: Tokenizer) -> str:
    """A conversation as text. Some templates refuse a system message, or roles that do not alternate."""
    try:
        return tokenizer.render(record.messages)
    except ModelFileError as error:
        raise ModelFileError(f"record {record.id}: {error}") from error


def _conversation(
    record: Record, text: str, ids: list[int], tokenizer: Tokenizer, heads: dict[str, list[int]]
) -> Sample:
    """A conversation as a sample. text, ids: all of it, rendered and encoded. heads: see `_answer_start`."""
    labels = [NOT_SCORED] * len(ids)
    marks = [place for place, i in enumerate(ids) if i in tokenizer.control_ids]
    for i, message in enumerate(record.messages):
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        answer, asked = message["content"], any(one["role"] == "user" for one in record.messages[:i])
        before = tokenizer.render(record.messages[:i], answer_next=True) if asked else None  # a greeting has no prompt
        if before is None or not text.startswith(before):
            before = _found_before(record, i, text, ids, tokenizer)
        start = _answer_start(before, text, ids, marks, tokenizer, heads)
        # Usually the first end token is the answer's own, and the answer need not be encoded to find its end.
        usual = any(end not in answer and text.startswith(f"{before}{answer}{end}") for end in tokenizer.ends)
        end = next((place for place in range(start, len(ids)) if ids[place] in tokenizer.end_ids), len(ids))
        if not usual or end == len(ids):
            plain = tokenizer.plain(answer)
            said = tokenizer.encode(plain)
            if ids[start : (after := start + len(said))] == said:  # False if the template trims or merges
                apart = end == len(ids) or tokenizer.decode(ids[after:end]).strip()
                end = after if apart else end  # which may follow a space, as in Llama 2's template
            else:  # in a template whose turns end with no end token, neither beyond the answer nor beyond its turn
                places = (before + plain, tokenizer.render(record.messages[: i + 1]))
                place = next((place for place in places if text.startswith(place)), None)
                if place is None and end == len(ids):
                    raise _cannot_tell(record, i, "the turn")
                known = ids if place is None else tokenizer.encode(place)
                same = same_beginning([known, ids])
                end = min(end, same + (same < len(known)))  # with the token that reaches across the end
        end += end < len(ids) and ids[end] in tokenizer.end_ids
        labels[start:end] = ids[start:end]
    return Sample(tuple(ids), tuple(labels))


def _found_before(record: Record, i: int, text: str, ids: list[int], tokenizer: Tokenizer) -> str:
    """What comes before answer i in a conversation whose beginning is not the prompt, as some templates render it.

    Rendered with two other answers in its place, the conversation changes where the answer begins. Raises ValueError if
    the words are not there, or if tokens reach across that place, so that a label would belong to another token.
    """
    changed = [
        tokenizer.render([*record.messages[:i], {**record.messages[i], "content": other}, *record.messages[i + 1 :]])
        for other in ("0", "1")
    ]
    apart = (j for j, letters in enumerate(zip(*changed, text, strict=False)) if len(set(letters)) > 1)
    before = text[: next(apart, len(text))]
    answer, start = tokenizer.plain(record.messages[i]["content"]), tokenizer.encode(before)
    if not text.startswith((answer, answer.strip()), len(before)) or ids[: len(start)] != start:
        raise _cannot_tell(record, i, "the prompt")
    return before


def _cannot_tell(record: Record, i: int, what: str) -> ValueError:
    return ValueError(
        f"record {record.id}: the model's chat template renders {what} of answer {i} differently from the whole "
        "conversation, and its words cannot be told apart: use another base, or one answer in each record"
    )


def _answer_start(
    before: str, text: str, ids: list[int], marks: list[int], tokenizer: Tokenizer, heads: dict[str, list[int]]
) -> int:
    """At which token the answer begins: after the tokens of `before`, or at the one that reaches from there into it.

    If the text with these ids begins with it, only what follows its last control token is encoded, which is usually the
    same in all records. marks: the places of the control tokens. heads: the tokens of what was encoded already.
    """
    control = tokenizer.control_tokens(before) if text.startswith(before) else []
    whole = len(marks) < len(control) or not control
    tail = before if whole else before[control[-1][0] :]
    if tail not in heads:
        heads[tail] = tokenizer.encode(tail)
    begin = 0 if whole else marks[len(control) - 1]
    start = begin + len(heads[tail])
    return start if ids[begin:start] == heads[tail] else same_beginning([tokenizer.encode(before), ids])


def encode_text(text: str, tokenizer: Tokenizer, max_length: int) -> list[Sample]:
    """A text as consecutive sequences of at most `max_length` tokens; every token but each first one is scored.

    Raises ValueError for a `max_length` below 1.
    """
    check_tokenizer(tokenizer)
    if not isinstance(text, str):
        raise TypeError(f"expected a text, got a {type(text).__name__}")
    return _divided(tokenizer.begun(tokenizer.encode(text)), max_length)


def _divided(ids: Sequence[int], max_length: int) -> list[Sample]:
    check_whole("max_length", max_length, 1)
    sequences = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    return [Sample(tuple(row), (NOT_SCORED, *row[1:])) for row in sequences if len(row) > 1]


def encode_pairs(records: Sequence[Record], tokenizer: Tokenizer, beta: float = 0.1) -> list[Pair]:
    """Records with a chosen and a rejected answer as pairs, in their order. beta: DPO's, above 0.

    Raises ValueError for a record without a rejected answer.
    """
    check_records(records)
    if without := [record.id for record in records if record.rejected is None]:
        raise ValueError(
            f"record {without[0]} has no rejected answer: DPO needs the columns prompt, chosen and rejected"
        )
    rejected = [
        replace(record, messages=(*record.prompt, {"role": "assistant", "content": record.rejected or ""}))
        for record in records
    ]
    sides = zip(encode_records(records, tokenizer), encode_records(rejected, tokenizer), strict=True)
    return [Pair(chosen, other, beta=beta) for chosen, other in sides]


def check_mix(mix: Mapping[str, float]) -> None:
    """Raise ValueError unless each source has a share above 0, and all together less than 1."""
    for source, share in mix.items():
        if not 0 < share < 1:
            raise ValueError(f"mix {source}={share}: a share of the records is above 0 and below 1, such as 0.2")
    if (whole := sum(mix.values())) >= 1:
        raise ValueError(f"mix: the shares add up to {whole:g}, which leaves nothing for the data themselves")


def mixed(samples: Sequence[Sample], number: int) -> list[Sample]:
    """This number of samples, for data that are mixed into others. If there are more, each epoch takes other ones, as
    of phrasings; if there are fewer, they are repeated.
    """
    found = []
    for i in range(number):
        turns = [(one, *one.others) for one in samples[i::number] or [samples[i % len(samples)]]]
        first, *later = (replace(each, others=()) for turn in turns for each in turn)
        found.append(replace(first, others=tuple(later)))
    return found


def truncate(samples: Sequence[One], max_length: int) -> tuple[list[One], int, int]:
    """Truncate samples or pairs to `max_length` tokens. Returns those in which every answer still has a scored token,
    how many were truncated, and how many of these are dropped.
    """
    longer = sum(any(len(each.ids) > max_length for each in sample.sequences) for sample in samples)
    short = [cast(One, sample.truncated(max_length)) for sample in samples]
    scored = [sample for sample in short if all(each.scored for each in sample.sequences)]
    return scored, longer, len(short) - len(scored)


def truncate_and_log(name: str, samples: Sequence[One], max_length: int) -> list[One]:
    """What `truncate` leaves of a set. A line in the log says how many of its records were too long, if any."""
    kept, longer, dropped = truncate(samples, max_length)
    if longer:
        lost = f", and {dropped} of them dropped: nothing of their answer was left" if dropped else ""
        what = f"longer than --max-length {max_length} and were truncated{lost}"
        log.info(f"{name}: {longer} of {len(samples)} records are {what}")
    return kept


def steps_per_epoch(samples: Sized, records_per_step: int) -> int:
    """The steps in which an epoch takes every sample once; the last one may have fewer samples than the others."""
    return math.ceil(len(samples) / records_per_step)


def epochs(samples: Sequence[Example], batch_size: int, seed: int) -> Iterator[list[Example]]:
    """Batches of samples without end: every epoch has each sample once, in a new order that `seed` determines.

    Each epoch takes the next phrasing of a sample that has `others`; which phrasing is first differs by sample. Of
    samples that begin alike, with the same document, up to half a batch follow one another: their beginning is then
    computed once (see `divided_samples`).
    """
    rng = np.random.default_rng(seed)
    group_of = {i: group[0] for group in begin_alike(samples) for i in group}
    for epoch in count():
        order = _together(rng.permutation(len(samples)).tolist(), group_of, max(1, batch_size // 2))
        for i in range(0, len(order), batch_size):
            yield [samples[j].in_turn(epoch + j) for j in order[i : i + batch_size]]


def _together(order: Sequence[int], group_of: Mapping[int, int], most: int) -> list[int]:
    """The order, changed so that up to `most` of a group follow one another, where the first of them was."""
    chunks: dict[int, list[list[int]]] = {}
    found: list[list[int]] = []
    for i in order:
        own = chunks.setdefault(group_of[i], [])
        if not own or len(own[-1]) == most:
            own.append([])
            found.append(own[-1])
        own[-1].append(i)
    return [i for chunk in found for i in chunk]
