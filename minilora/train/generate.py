"""Answers, token by token: with a key/value cache, for one conversation or for many at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, overload

import numpy as np

from ..engine.backend import array_module, to_numpy
from ..engine.tensor import no_grad
from ..io.tokenizer import Message, Tokenizer
from ..nn.llama import KVCache, Llama

UNFINISHED = "\ufffd"  # what decoding puts where the bytes of a character are not all there


def check_settings(max_new_tokens: int, temperature: float, seed: int) -> None:
    """Raise ValueError for settings that no answer can be made with."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or a positive number, got {temperature}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")


@overload
def generate(
    model: Llama,
    tokenizer: Tokenizer,
    messages: Sequence[Message] | str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stream: Literal[False] = False,
) -> str: ...
@overload
def generate(
    model: Llama,
    tokenizer: Tokenizer,
    messages: Sequence[Message] | str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    *,
    stream: Literal[True],
) -> Iterator[str]: ...
def generate(
    model: Llama,
    tokenizer: Tokenizer,
    messages: Sequence[Message] | str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stream: bool = False,
) -> str | Iterator[str]:
    """The assistant's answer to a conversation, or to one question given as a string.

    messages: [{"role": "user", "content": "..."}, ...].
    temperature: 0 takes the likeliest token; above 0, tokens are drawn from softmax(logits / temperature) with `seed`.
    stream: True for an iterator of pieces, each as soon as its text is certain; together they are the answer.
    Raises ValueError, before anything is computed, when the conversation is none or too long for the model.
    """
    conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    if stream:
        prompts = _encode(model, tokenizer, [conversation], max_new_tokens, temperature, seed)
        steps = _steps(model, tokenizer, prompts, max_new_tokens, temperature, np.random.default_rng(seed))
        return _pieces(tokenizer, (int(tokens[0]) for _, tokens in steps))
    return generate_batch(model, tokenizer, [conversation], max_new_tokens, temperature, seed)[0]


def generate_batch(
    model: Llama,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 48,
    done: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """One answer per conversation, in their order; `batch_size` of similar length are worked on at a time.

    done: called with the number of answers that have just been finished. Raises ValueError as `generate` does.
    """
    prompts = _encode(model, tokenizer, conversations, max_new_tokens, temperature, seed)
    rng = np.random.default_rng(seed)
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        outputs: list[list[int]] = [[] for _ in chosen]
        for rows, tokens in _steps(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens, temperature, rng):
            for row, token in zip(rows, tokens, strict=True):
                outputs[row].append(int(token))
        for i, output in zip(chosen, outputs, strict=True):
            answers[i] = tokenizer.decode(output).strip()
        done(len(chosen))
    return answers


def _encode(
    model: Llama,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    check_settings(max_new_tokens, temperature, seed)
    prompts = [tokenizer.encode_chat(conversation, answer_next=True) for conversation in conversations]
    longest, limit = max(map(len, prompts), default=0), model.config.max_position_embeddings
    if prompts and longest + max_new_tokens > limit:
        raise ValueError(
            f"{longest} tokens and an answer of {max_new_tokens} are more than the {limit} the model can see"
        )
    return prompts


def _steps(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    rng: np.random.Generator,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Step by step: the prompts that go on, by number, and the token that each has got. Both (rows,)."""
    longest = max(map(len, prompts))
    weight = model.head_weight.data
    xp = array_module(weight)
    padding = np.array([longest - len(prompt) for prompt in prompts])
    tokens = np.array([[tokenizer.pad_id] * int(n) + prompt for n, prompt in zip(padding, prompts, strict=True)])
    first = xp.asarray(padding) if padding.any() else None
    cache = KVCache(model.config, len(prompts), longest + max_new_tokens, first, like=weight)
    rows = np.arange(len(prompts))  # which prompt each row of the batch belongs to; finished ones leave the batch
    for _ in range(max_new_tokens):
        with no_grad():  # not around the yield: who reads the stream may train meanwhile
            logits = to_numpy(model(tokens, cache, last=True).data[:, -1])  # (rows, V)
        chosen = _choose(logits, temperature, rng)  # (rows,)
        alive = np.flatnonzero(chosen != tokenizer.eos_id)
        if len(alive) == 0:
            return
        if len(alive) < len(rows):
            cache.keep(xp.asarray(alive))
            rows, chosen = rows[alive], chosen[alive]
        yield rows, chosen
        tokens = chosen[:, None]  # (rows, 1)


def _pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as it becomes certain: not half a character, and no white space that may be the end."""
    ids: list[int] = []
    told = 0
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids).lstrip().rstrip(UNFINISHED).rstrip()
        if len(text) > told:
            yield text[told:]
            told = len(text)
    if rest := tokenizer.decode(ids).strip()[told:]:
        yield rest


def _choose(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> np.ndarray:
    if temperature <= 0:
        return logits.argmax(axis=-1)
    noise = rng.gumbel(size=logits.shape)  # argmax(logits / t + Gumbel noise) is a draw from softmax(logits / t)
    return (logits.astype(np.float64) / temperature + noise).argmax(axis=-1)
