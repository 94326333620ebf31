"""Labels as answers: how likely a model finds each label after a prompt, and which one it chooses.

The log-likelihood of a label is the sum over its tokens and the end token. With the end token the labels are answers of
which only one can be given, also where one begins like another. A softmax over the sums is the model's distribution of
its answer on the condition that the answer is one of the labels. The sums are not divided by the number of tokens: the
mean is not the probability of anything, and the sum is what training raises. A base that was never trained on the
labels prefers short and common ones (Holtzman et al. 2021, arXiv 2104.08315).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..data.labels import LabelTask
from ..data.records import Record
from ..data.samples import encode_records
from ..engine.backend import array_module, to_numpy
from ..engine.fused import NOT_SCORED
from ..engine.parallel import cores, values
from ..engine.tensor import Tensor, no_grad
from ..lora.adapters import Choice
from ..lora.mixed import mixed_batch
from ..models.tokenizer import Message, Tokenizer
from ..nn.cache import KVCache, rows_at_once
from ..nn.language_model import LanguageModel
from ..nn.parts import same_beginning
from ..progress import progress

RECORDS, LABELS = 32, 16  # computed together, at most: a label of several records, or several labels of one

Compute = Callable[[Sequence[Sequence[int]], KVCache, bool], np.ndarray]


def label_probabilities(logprobs: np.ndarray) -> np.ndarray:
    """Softmax over the labels: log-likelihoods (N, L) -> (N, L)."""
    p = np.exp(logprobs - logprobs.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def without_nan(logprobs: np.ndarray) -> np.ndarray:
    """The same log-likelihoods. Raises ValueError for NaN, from which nothing can be chosen."""
    if np.isnan(logprobs).any():
        raise ValueError("the model predicts NaN or infinity instead of probabilities: look at its weights")
    return logprobs


def ranked_labels(
    model: LanguageModel, tokenizer: Tokenizer, task: LabelTask, messages: Sequence[Message], choice: Choice
) -> list[tuple[str, float]]:
    """The labels, each with its probability as the answer, the likeliest first.

    messages: the question for a label, see `as_trained`.
    choice: who decides, as in a mixed batch.

    Raises ValueError for a message that is too long for the model, and where that predicts NaN.
    """
    found = label_logprobs(model, tokenizer, [messages], task.labels, True, choice)
    (p,) = label_probabilities(without_nan(found))
    return ranked(task, p)


def ranked(task: LabelTask, p: np.ndarray) -> list[tuple[str, float]]:
    """The labels with their probabilities p (L,), the likeliest first."""
    return [(task.labels[i], float(p[i])) for i in np.argsort(-p, kind="stable")]


def label_logprobs(
    model: LanguageModel,
    tokenizer: Tokenizer,
    talks: Sequence[Sequence[Message]],
    labels: Sequence[str],
    mixed: bool = False,
    choice: Choice = None,
) -> np.ndarray:
    """The log-likelihood of each label as the answer to each conversation: (N, L), in nats.

    The tokens that all conversations begin with are computed once, and held once for all; the rest of each is computed
    once for all labels. Each core computes other conversations.

    mixed: compute with `choice`, as in a mixed batch; False for the adapters that are active or merged on the model.
    choice: a name, a weighted combination, or None for the base alone.

    Raises ValueError for a conversation that is too long for the model.
    """
    total = len(talks) if len(talks) > 1 else 0  # a single one has no bar
    with progress("labels", total, "record") as bar, no_grad(), _computing(model, mixed, choice) as compute:
        asked = [_Asked.of(talk, labels, tokenizer) for talk in talks]
        room = max(len(one.prompt) + max(map(len, one.answers)) for one in asked)
        if room > (limit := model.config.max_position_embeddings):
            raise ValueError(f"a message with its label has {room} tokens, the model can see {limit}: shorten it")
        threads = cores() if not mixed and array_module(model.head_weight.data) is np else 1
        shared = same_beginning([one.prompt[:-1] for one in asked]) if len(asked) > 1 else 0
        most = max(1, rows_at_once(model.new_cache(1, room - shared)) // threads)
        prefix = model.new_cache(1, shared) if shared else None
        if prefix is not None:
            compute([asked[0].prompt[:shared]], prefix, True)

        def of_batch(batch: list[int]) -> Tensor:
            logprobs = _of_batch(model, [asked[i] for i in batch], prefix, compute, min(LABELS, most))
            bar.update(len(batch))
            return Tensor(logprobs)

        order = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt))  # little padding
        size = min(RECORDS, most, -(-len(asked) // threads))
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        each = values([partial(of_batch, batch) for batch in batches], min(threads, len(batches)))
    found = np.empty((len(asked), len(labels)))
    for batch, logprobs in zip(batches, each, strict=True):
        found[batch] = logprobs
    return found


def _of_batch(
    model: LanguageModel, asked: Sequence[_Asked], prefix: KVCache | None, compute: Compute, at_once: int
) -> np.ndarray:
    """`label_logprobs` of some conversations: one label at a time for all, or of a single one `at_once` labels.

    prefix: what all of them begin with.
    """
    rests = [one.prompt[prefix.length if prefix else 0 :] for one in asked]
    longest, room = max(map(len, rests)), max(len(answer) for one in asked for answer in one.answers)
    padding = [longest - len(rest) for rest in rests]
    cache = model.new_cache(len(rests), longest + room, np.array(padding), prefix)
    first = compute([[0] * n + rest for n, rest in zip(padding, rests, strict=True)], cache, True)[:, -1]  # (B, V)
    count, step = len(asked[0].answers), len(asked)
    if step == 1:  # a copy of the row for each label
        step = min(at_once, count)
        cache.reserve(step, cache.capacity, step)
        cache.keep([0] * step)
    pairs = [(i, j) for j in range(count) for i in range(len(asked))]
    found = np.empty((len(asked), count))
    for start in range(0, len(pairs), step):
        part = pairs[start : start + step]
        answers = [asked[i].answers[j] for i, j in part]
        cache.batch, cache.length, tokens = len(part), longest, max(map(len, answers)) - 1
        padded = [(answer + answer[-1:] * tokens)[:tokens] for answer in answers]
        after = compute(padded, cache, False) if tokens else np.empty((len(part), 0, 0))  # (rows, T, V)
        for (i, j), answer, later in zip(part, answers, after, strict=True):
            each = [first[i, answer[0]], *later[range(len(answer) - 1), answer[1:]]]
            found[i, j] = sum(map(float, each[asked[i].skipped[j] :]))
    return found


@dataclass
class _Asked:
    """A conversation as tokens: those before every label, and for each label those that follow, up to the end token.

    skipped: how many of these belong to the prompt still, where the tokenizer merges its end with a label.
    """

    prompt: list[int]
    answers: list[list[int]]
    skipped: list[int]

    @classmethod
    def of(cls, talk: Sequence[Message], labels: Sequence[str], tokenizer: Tokenizer) -> _Asked:
        records = [Record("", (*talk, {"role": "assistant", "content": label})) for label in labels]
        wholes, starts = [], []
        for sample in encode_records(records, tokenizer):
            scored = np.array(sample.labels) != NOT_SCORED
            end = int(np.flatnonzero(scored)[-1]) + 1
            starts.append(int(np.flatnonzero(~scored[:end])[-1]) + 1)  # earlier answers are scored as well
            wholes.append(list(sample.ids[:end]))
        same = min(*starts, same_beginning([ids[:-1] for ids in wholes]))
        return cls(wholes[0][:same], [ids[same:] for ids in wholes], [start - same for start in starts])


@contextmanager
def _computing(model: LanguageModel, mixed: bool, choice: Choice) -> Iterator[Compute]:
    """A function in this block: tokens (B, T), a cache, and whether only the last token counts -> log-probabilities of
    the next token (B, T or 1, V).
    """
    with mixed_batch(model, [choice]) if mixed else nullcontext() as rows:

        def logprobs(tokens: Sequence[Sequence[int]], cache: KVCache, last: bool) -> np.ndarray:
            if rows is not None:
                rows.choose([choice] * len(tokens))
            logits = to_numpy(model(np.array(tokens), cache, last=last).data)
            logits -= logits.max(axis=-1, keepdims=True)  # in place: there are as many as tokens times vocabulary
            logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            return logits

        yield logprobs
