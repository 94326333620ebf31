"""Answers of a model: one, whole or as a stream, or many at a time. The tokens come from `Streams`."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal, overload

from ..models.tokenizer import Message, Tokenizer
from ..nn.cache import rows_at_once
from ..nn.language_model import LanguageModel
from ..nn.parts import same_beginning
from ..progress import progress
from .schema import Guide
from .streams import Answer, Sampling, Streams, check_able

SHARED = 16


@overload
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    messages: Sequence[Message] | str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stream: Literal[False] = False,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> str: ...
@overload
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    messages: Sequence[Message] | str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    *,
    stream: Literal[True],
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> Iterator[str]: ...
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    messages: Sequence[Message] | str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stream: bool = False,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> str | Iterator[str]:
    """The assistant's answer to a conversation, or to one question given as a string.

    messages: [{"role": "user", "content": "..."}, ...], or a question. Nothing is added to them: `predict` asks as an
        adapter was trained, with its system prompt, labels or fields.
    max_new_tokens: the most tokens of the answer.
    temperature: 0 takes the likeliest token; above 0, tokens are sampled from softmax(logits / temperature).
    seed: of the sampling.
    stream: True for an iterator of pieces of text, each as soon as it is certain; joined, they are the answer.
    top_p: sample only from the likeliest tokens whose probabilities add up to this.
    repetition_penalty: above 1, such as 1.1, against answers that repeat themselves.

    Raises ValueError, before anything is computed, for messages that are not a conversation or too long for the model.
    """
    streams = Streams(model, tokenizer, slots=1, mixed=False)
    settings = (max_new_tokens, temperature, top_p, seed)
    answer = streams.add(messages, None, *settings, repetition_penalty=repetition_penalty)
    pieces = _pieces(streams, answer)
    return pieces if stream else "".join(pieces)


def generate_batch(
    model: LanguageModel,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 48,
    guides: Sequence[Guide | None] | None = None,
) -> list[str]:
    """The answers to conversations, in their order; each is the one that `generate` gives.

    If all conversations begin with the same `SHARED` tokens or more, such as examples, these are computed once, and
    their keys and values are held once for all.

    max_new_tokens, temperature, seed: as for `generate`, of each answer.
    batch_size: how many are generated at a time, at most; fewer if their KV cache would be too large.
    guides: for each conversation, what decides which tokens may come next.

    Raises ValueError as `generate` does.
    """
    check_able(model, tokenizer)
    Sampling(max_new_tokens, temperature, seed=seed)  # refused before prompts are encoded
    prompts = [tokenizer.encode_chat(talk, answer_next=True)[:-1] for talk in conversations]
    same = same_beginning(prompts) if len(prompts) > 1 else 0
    prefix = prompts[0][:same] if same >= SHARED else ()
    room = max(map(len, prompts), default=0) - len(prefix) + max_new_tokens
    slots = min(batch_size, rows_at_once(model.new_cache(1, room)))
    streams = Streams(model, tokenizer, slots, mixed=False, prefix=prefix)
    answers = [
        streams.add(talk, None, max_new_tokens, temperature, seed=seed, guide=guide)
        for talk, guide in zip(conversations, guides or [None] * len(conversations), strict=True)
    ]
    streams.waiting = deque(sorted(streams.waiting, key=lambda answer: answer.prompt_tokens))  # little padding
    with progress("answers", len(answers), "answer") as bar:
        while left := streams.left:
            streams.step()
            bar.update(left - streams.left)
    return [answer.new_text() for answer in answers]


def _pieces(streams: Streams, answer: Answer) -> Iterator[str]:
    """An answer's text as it becomes certain."""
    while streams.busy:
        streams.step()
        if piece := answer.new_text():
            yield piece
