"""Labels as answers: how likely a model finds each label after a prompt, and which one it chooses.

The log-likelihood of a label is the sum over its tokens and the end token. With the end token the labels are answers of
which only one can be given, also where one begins like another. A softmax over the sums is the model's distribution of
its answer on the condition that the answer is one of the labels. The sums are not divided by the number of tokens: the
mean is not the probability of anything, and the sum is what training raises. A base that was never trained on the
labels prefers short and common ones (Holtzman et al. 2021, arXiv 2104.08315).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ..data.labels import LabelTask
from ..data.records import Record
from ..data.samples import encode_records
from ..engine.backend import to_numpy
from ..engine.fused import NOT_SCORED
from ..engine.tensor import no_grad
from ..lora.adapters import Choice, factors_of
from ..lora.mixed import mixed_batch
from ..models.tokenizer import Message, Tokenizer
from ..nn.cache import KVCache
from ..nn.llama import Llama
from ..progress import progress

AT_ONCE = 16  # labels that are computed together, at most,
CACHE_BYTES = 2**28  # in a KV cache of so many bytes


def label_task(model: Llama, choice: Choice) -> LabelTask | None:
    """The labels that all adapters of a choice were trained on; None if there are none, or several sets of them."""
    adapters = [model.adapters[name] for name in factors_of(choice) if name in model.adapters]
    tasks = {LabelTask.stored(adapter.data) for adapter in adapters}
    return tasks.pop() if len(tasks) == 1 else None


def label_probabilities(logprobs: np.ndarray) -> np.ndarray:
    """Softmax over the labels: log-likelihoods (N, L) -> (N, L)."""
    p = np.exp(logprobs - logprobs.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def ranked_labels(
    model: Llama, tokenizer: Tokenizer, task: LabelTask, messages: Sequence[Message], choice: Choice
) -> list[tuple[str, float]]:
    """The labels for the last message, each with its probability, the likeliest first.

    messages: a system prompt is taken into account, earlier questions and answers are not.
    choice: who decides, as in a mixed batch.

    Raises ValueError for a message that is too long for the model.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    talk = [*system, {"role": "user", "content": task.prompt(messages[-1]["content"])}]
    (p,) = label_probabilities(label_logprobs(model, tokenizer, [talk], task.labels, True, choice))
    return [(task.labels[i], float(p[i])) for i in np.argsort(-p, kind="stable")]


def label_logprobs(
    model: Llama,
    tokenizer: Tokenizer,
    talks: Sequence[Sequence[Message]],
    labels: Sequence[str],
    mixed: bool = False,
    choice: Choice = None,
) -> np.ndarray:
    """The log-likelihood of each label as the answer to each conversation: (N, L), in nats.

    The tokens that all conversations begin with are computed once, the rest of each once for all labels.

    mixed: compute with `choice`, as in a mixed batch; False for the adapters that are active or merged on the model.
    choice: a name, a weighted combination, or None for the base alone.

    Raises ValueError for a conversation that is too long for the model.
    """
    asked = [_Asked.of(talk, labels, tokenizer) for talk in talks]
    room = max(len(one.prompt) + max(map(len, one.answers)) for one in asked)
    if room > (limit := model.config.max_position_embeddings):
        raise ValueError(f"a message with its label has {room} tokens, the model can see {limit}: shorten it")
    shared = _same([one.prompt[:-1] for one in asked]) if len(asked) > 1 else 0
    row = model.new_cache(1, room)
    bytes_of_row = sum(array.nbytes for array in (*row.keys, *row.values))
    rows = max(1, min(len(labels), AT_ONCE, CACHE_BYTES // bytes_of_row))
    cache = row if rows == 1 else model.new_cache(rows, room)
    found = np.empty((len(asked), len(labels)))
    with no_grad(), _computing(model, mixed, choice) as compute, progress("labels", len(asked), "record") as bar:
        if shared:
            cache.rewind(0)
            compute([asked[0].prompt[:shared]], cache, True)
            cache.fork(rows)
        for i, one in enumerate(asked):
            cache.rewind(shared)
            first = compute([one.prompt[shared:]], cache, True)[0, -1]  # (V), of the first token after the prompt
            cache.fork(rows, shared)
            for start in range(0, len(labels), rows):
                answers = one.answers[start : start + rows]
                cache.rewind(len(one.prompt), len(answers))
                longest = max(map(len, answers))
                padded = [(answer + answer[-1:] * longest)[: longest - 1] for answer in answers]  # (rows, T-1)
                after = compute(padded, cache, False) if longest > 1 else np.empty((len(answers), 0))
                for j, answer in enumerate(answers):
                    each = [first[answer[0]], *(after[j, t, token] for t, token in enumerate(answer[1:]))]
                    found[i, start + j] = sum(each[one.skipped[start + j] :])
            bar.update(1)
    return found


def _same(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    return next((i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), min(map(len, rows)))


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
            before = np.flatnonzero(~scored[:end])  # earlier answers are scored as well
            starts.append(int(before[-1]) + 1)
            wholes.append(list(sample.ids[:end]))
        same = min(*starts, _same([ids[:-1] for ids in wholes]))
        return cls(wholes[0][:same], [ids[same:] for ids in wholes], [start - same for start in starts])


@contextmanager
def _computing(
    model: Llama, mixed: bool, choice: Choice
) -> Iterator[Callable[[list[list[int]], KVCache, bool], np.ndarray]]:
    """A function in this block: tokens (B, T), a cache, and whether only the last token counts -> log-probabilities of
    the next token (B, T or 1, V).
    """

    def logprobs(tokens: list[list[int]], cache: KVCache, last: bool) -> np.ndarray:
        logits = to_numpy(model(np.array(tokens), cache, last=last).data).astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    if not mixed:
        yield logprobs
        return
    with mixed_batch(model, [choice]) as rows:

        def chosen(tokens: list[list[int]], cache: KVCache, last: bool) -> np.ndarray:
            rows.choose([choice] * len(tokens))
            return logprobs(tokens, cache, last)

        yield chosen
