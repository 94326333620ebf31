"""Many answers at a time, each with its own adapter: continuous batching.

One step computes one batch: the next token of every running answer. Answers that end leave the batch, and waiting ones
take their places. Orca (Yu et al. 2022, OSDI) introduced it as iteration-level scheduling; S-LoRA (Sheng et al. 2023,
arXiv 2311.03285) serves many adapters in one batch this way.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from numbers import Real
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..engine.backend import to_numpy
from ..engine.tensor import no_grad
from ..lora.adapters import Choice, check_known, factors_of, refuse_merged
from ..lora.mixed import mixed_batch
from ..models.tokenizer import Message, Tokenizer, check_tokenizer
from ..nn.cache import STEP, KVCache
from ..nn.language_model import LanguageModel, check_language_model
from ..options import check_whole
from .prefix_cache import PrefixCache
from .schema import Guide, check_room

LogProb = tuple[int, float]  # a token's id, and its log-probability

UNFINISHED = "\ufffd"  # what an incomplete character is decoded to
PREFILL = 512  # prompt tokens computed in one step, at most: running answers wait for them
JOINING = 2048  # tokens of prompts that join together, at most, those included that are known: they are held twice
_TURN: WeakKeyDictionary[LanguageModel, Lock] = WeakKeyDictionary()  # held by the thread that computes with a model


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen, and how many they are at most: see `Streams.add`.

    Raises ValueError for what is impossible.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_whole("seed", self.seed, 0)
        if not isinstance(self.temperature, Real) or not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or a positive number, got {self.temperature!r}")
        if not isinstance(self.top_p, Real) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie above 0 and be at most 1, got {self.top_p!r}")
        if not isinstance(self.repetition_penalty, Real) or not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be a positive number, got {self.repetition_penalty!r}")


def check_able(model: Any, tokenizer: Any) -> None:
    """Raise TypeError unless these are a language model and a tokenizer."""
    check_language_model(model, "generation")
    check_tokenizer(tokenizer)


@dataclass(eq=False)
class Answer:
    """An answer, as `Streams.add` returns it. Read `text`, `finished`, `prompt_tokens`, `cached` and `tokens`.

    finished: None while it runs or waits; then "stop" (an end token or a stop text), "length" (`max_new_tokens`, which
    a guide ends in time), "cancelled" (by `Streams.cancel`), or "error". error: what its guide or its decoding raised.
    cached: tokens of the prompt that were known from earlier answers. logprobs: of each token of the answer, its id and
    its log-probability, and those of the `top_logprobs` likeliest in its place; empty if that is None.
    """

    tokenizer: Tokenizer = field(repr=False)
    prompt: list[int] = field(repr=False)
    adapter: Choice
    sampling: Sampling
    rng: np.random.Generator = field(repr=False)
    stop: tuple[str, ...] = ()
    raw: bool = False
    ids: list[int] = field(default_factory=list, repr=False)
    text: str = ""  # as far as it is certain: no half character, no white space that may be the end
    finished: str | None = None
    error: Exception | None = None
    guide: Guide | None = field(default=None, repr=False)  # which tokens may come next
    cached: int = 0
    top_logprobs: int | None = None
    logprobs: list[tuple[LogProb, list[LogProb]]] = field(default_factory=list, repr=False)
    read: int = field(default=0, repr=False)  # characters that `new_text` has returned
    settled: tuple[int, str] = field(default=(0, ""), repr=False)  # tokens whose text no later one changes, and it

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens of the conversation."""
        return len(self.prompt)

    @property
    def tokens(self) -> int:
        """The number of tokens of the answer so far."""
        return len(self.ids)

    @property
    def room(self) -> int:
        """The most tokens that conversation and answer have together."""
        return len(self.prompt) + self.sampling.max_new_tokens

    def new_text(self) -> str:
        """The text since the last call; joined, all pieces are the answer. Raises the error that ended the answer."""
        if self.error is not None:
            raise self.error
        piece, self.read = self.text[self.read :], len(self.text)
        return piece

    def take(self, token: int) -> None:
        """Append the next token."""
        if self.guide is not None:
            self.guide.take(token)
        if token in self.tokenizer.end_ids:
            self.finish("length" if self.guide is not None and self.guide.hurried else "stop")
            return
        self.ids.append(token)
        start, text = self.settled
        text += self._decoded(self.ids[start:])
        if self.tokenizer.byte_level and not text.endswith(UNFINISHED):
            self.settled = len(self.ids), text
        text = text if self.raw else text.lstrip()
        if self.stop and (ends := [at for stop in self.stop if (at := text.find(stop)) >= 0]):
            text = text[: min(ends)]
            self.text, self.finished = text if self.raw else text.rstrip(), "stop"
        elif self.tokens == self.sampling.max_new_tokens:
            self.finish("length")
        else:
            known = text.rstrip(UNFINISHED)
            certain = known[: len(known) - _begun(known, self.stop)].rstrip()
            self.text = max(self.text, certain, key=len)

    def finish(self, reason: str) -> None:
        """End the answer: no token follows, and the text that was held back is certain. Half a character is left out
        where the answer was cut.
        """
        text = self._decoded(self.ids)
        text = text if reason == "stop" else text.rstrip(UNFINISHED)
        self.text, self.finished = text if self.raw else text.strip(), reason

    def _decoded(self, ids: list[int]) -> str:
        """The text of tokens of the answer. SentencePiece leaves out a space that begins a text: where a text is
        continued, they are decoded after the prompt.
        """
        if not self.raw or self.tokenizer.byte_level:
            return self.tokenizer.decode(ids)
        return self.tokenizer.decode([*self.prompt, *ids])[len(self.tokenizer.decode(self.prompt)) :]


@dataclass
class Reading:
    """Prompts in prefill: their tokens (B, T), padded on the left, and the KV cache of those computed so far."""

    answers: list[Answer]
    tokens: np.ndarray
    cache: KVCache


class Streams:
    """Answers generated on one model, `slots` at a time; others wait for a place, in their order.

        streams = Streams(model, tokenizer)
        answers = [streams.add("What is a lien?", adapter=name) for name in ("legal", "support", None)]
        while streams.busy:
            streams.step()
            print([answer.new_text() for answer in answers])

    A request gives the same text whatever else is in the batch, except for rounding: each answer has its own seed.
    Between steps the model is unchanged, and can be trained or given other adapters. The KV cache has room for `slots`
    answers as long as the longest of them. Several threads may each have streams of one model: their steps take turns,
    because the adapters that compute a batch are state of the model.

    mixed: False computes every answer with the adapters that are active or merged on the model; `add` takes none then.
    prefix: tokens with which every prompt begins, computed and held once: for adapters that are active or merged.
    known: prefix caching: it keeps the KV cache of earlier prompts, from which a prompt that continues one of them is
        computed. Without `mixed` it must be for these active adapters alone.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        slots: int = 16,
        mixed: bool = True,
        prefix: Sequence[int] = (),
        known: PrefixCache | None = None,
    ):
        check_able(model, tokenizer)
        check_whole("slots", slots, 1)
        self.model, self.tokenizer, self.slots, self.mixed = model, tokenizer, slots, mixed
        self.known = PrefixCache(0) if known is None else known
        self.waiting: deque[Answer] = deque()
        self.running: list[Answer] = []  # in the order of the cache's rows
        self.cache: KVCache | None = None
        self.reading: Reading | None = None  # the answers that join next
        self.torn = False  # was a step interrupted where cache and answers do not belong together?
        if mixed and len(prefix):
            raise ValueError("a prefix is computed with the adapters that are active or merged: give mixed=False")
        self.prefix_ids, self.prefix_length = list(prefix), len(prefix)
        self.prefix_kv = model.new_cache(1, self.prefix_length) if self.prefix_length else None
        if self.prefix_kv is not None:
            self._compute([], np.array([prefix]), self.prefix_kv)

    @property
    def left(self) -> int:
        """The number of answers that have not ended yet."""
        return len(self.waiting) + len(self.running) + (len(self.reading.answers) if self.reading else 0)

    @property
    def busy(self) -> bool:
        """Is any answer left?"""
        return self.left > 0

    def add(
        self,
        messages: Sequence[Message] | str,
        adapter: Choice = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        raw: bool = False,
        guide: Guide | None = None,
        top_logprobs: int | None = None,
        repetition_penalty: float = 1.0,
    ) -> Answer:
        """Queue an answer to a conversation, or to one question. It runs from the next step with a free place on.

        adapter: a name, a weighted combination such as {"legal": 0.5, "support": 0.5}, or None for the base alone.
        max_new_tokens: the most tokens of the answer.
        temperature: 0 takes the likeliest token; above 0, tokens are sampled from softmax(logits / temperature).
        top_p: sample only from the likeliest tokens whose probabilities add up to this (nucleus sampling, Holtzman et
            al. 2019, arXiv 1904.09751).
        seed: of the sampling.
        stop: texts that end the answer and are not part of it.
        raw: continue `messages`, a text, without the chat template, and keep the white space around the answer.
        guide: decides which tokens may come next, such as those of JSON under a schema.
        top_logprobs: the log-probabilities that `Answer.logprobs` has next to each token's own; None for no
            `Answer.logprobs`. They are the model's own, whatever the other settings make of them.
        repetition_penalty: above 1, tokens that the conversation or the answer has already become less likely, see
            `penalised`.

        Raises ValueError for impossible settings, an unknown adapter, messages that are not a conversation, do not
        begin with the prefix or are too long for the model, and fewer new tokens than the guide's shortest answer.
        """
        sampling = Sampling(max_new_tokens, temperature, top_p, seed, repetition_penalty)
        if top_logprobs is not None:
            check_whole("top_logprobs", top_logprobs, 0)
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop must be texts that are not empty, got {stop!r}")
        if self.mixed:
            check_known(self.model, factors_of(adapter))
            refuse_merged(self.model, "mixing adapters in a batch")
        elif adapter is not None:
            raise ValueError(f"these streams use the adapters that are active on the model, not {adapter!r}")
        if raw and isinstance(messages, str):
            prompt = self.tokenizer.begun(self.tokenizer.encode(self.tokenizer.plain(messages)))
        else:
            talk = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
            if isinstance(talk, Sequence) and not talk:
                raise ValueError("a conversation without a message has no answer: give a question or messages")
            prompt = self.tokenizer.encode_chat(talk, answer_next=True)
        length, limit = len(prompt), self.model.config.max_position_embeddings
        if not prompt:
            raise ValueError("a conversation without a token has no answer")
        if prompt[: self.prefix_length] != self.prefix_ids or length == self.prefix_length:
            raise ValueError("the conversation's tokens are not the prefix of these streams and at least one more")
        if length + max_new_tokens > limit:
            both = f"{length} tokens and an answer of {max_new_tokens}"
            raise ValueError(f"{both} are more than the {limit} the model can see")
        if guide is not None:
            check_room(guide.least, max_new_tokens)
        answer = Answer(
            self.tokenizer, prompt, adapter, sampling, np.random.default_rng(seed), stop, raw, guide=guide,
            top_logprobs=top_logprobs,
        )  # fmt: skip
        self.waiting.append(answer)
        return answer

    def cancel(self, answer: Answer) -> None:
        """End an answer now, which frees its place. An answer that has ended already is not changed."""
        if answer.finished is None:
            answer.finish("cancelled")
            self._leave()

    def step(self) -> None:
        """Give every running answer one token. Waiting answers join if there are free places.

        An error in one answer's guide or decoding ends that answer, and its `new_text` raises it. A step that Ctrl-C
        stops is repeated by the next one, which raises RuntimeError where a part of it is done.
        """
        if self.torn:
            raise RuntimeError("an earlier step was interrupted half-way: make new Streams, and add the requests again")
        self.torn = True
        if self.running:
            assert self.cache is not None
            longest = max(len(answer.prompt) + answer.tokens for answer in self.running) - self.prefix_length
            if self.cache.length == self.cache.capacity or self.cache.length - longest > STEP:
                self.cache.trim()  # positions that only answers had that have ended
            self._advance(self.running, np.array([answer.ids[-1:] for answer in self.running]), self.cache)  # (B, 1)
            self._leave()
        if self.reading is None and (joining := self._next_to_join()):
            self.reading = self._begin_to_read(joining)
        if self.reading is not None:
            self._read(self.reading)
        self.torn = False

    def _next_to_join(self) -> list[Answer]:
        """Waiting answers for the free places whose prompts, padded to the longest, can be computed in one step."""
        chosen: list[Answer] = []
        longest = unknown = 0
        while self.waiting and len(self.running) + len(chosen) < self.slots:
            known, _ = self.known.longest(self.waiting[0].adapter, self.waiting[0].prompt)
            longest = max(longest, len(self.waiting[0].prompt) - self.prefix_length)
            unknown = max(unknown, len(self.waiting[0].prompt) - max(self.prefix_length, known))
            rows = len(chosen) + 1
            if chosen and (unknown * rows > PREFILL or longest * rows > JOINING):
                break
            chosen.append(self.waiting.popleft())
        return chosen

    def _begin_to_read(self, joining: list[Answer]) -> Reading:
        """The prompts of answers, padded on the left to one length, and a cache with what is known of all of them."""
        prompts = [answer.prompt[self.prefix_length :] for answer in joining]
        longest = max(map(len, prompts))
        padding = np.array([longest - len(prompt) for prompt in prompts])
        tokens = [[self.tokenizer.pad_id] * int(n) + prompt for n, prompt in zip(padding, prompts, strict=True)]
        capacity = longest if self.running else max(answer.room for answer in joining) - self.prefix_length
        cache = self.model.new_cache(len(joining), capacity, padding, self.prefix_kv)
        known = [self.known.longest(answer.adapter, answer.prompt) for answer in joining]
        unknown = max(len(prompt) - count for prompt, (count, _) in zip(prompts, known, strict=True))
        cache.begin(longest - unknown, [row for _, row in known])
        for answer, start in zip(joining, padding, strict=True):
            answer.cached = max(cache.length - int(start), 0)
        return Reading(joining, np.array(tokens), cache)

    def _read(self, reading: Reading) -> None:
        """Compute the next `PREFILL` tokens of prompts. Once they are complete, their cache joins that of the running
        answers.
        """
        start = reading.cache.length
        part = reading.tokens[:, start : start + PREFILL // len(reading.answers)]
        if start + part.shape[1] < reading.tokens.shape[1]:
            self._compute(reading.answers, part, reading.cache)
            return
        self._advance(reading.answers, part, reading.cache)
        room = max(answer.room for answer in (*reading.answers, *self.running)) - self.prefix_length
        if self.cache is None:
            self.cache = reading.cache
            self.cache.reserve(self.cache.batch, room)
        else:
            self.cache.join(reading.cache, room, most=self.slots)
        self.running += reading.answers
        self.reading = None
        self._leave()

    def _advance(self, answers: list[Answer], tokens: np.ndarray, cache: KVCache) -> None:
        """Compute tokens (B, T) that follow those in the cache, and give each answer its next token."""
        logits = self._compute(answers, tokens, cache)  # (B, V)
        likeliest = logits.argmax(axis=-1)  # (B)
        for row, answer in enumerate(answers):
            if answer.finished:  # cancelled in prefill
                continue
            try:
                own, allowed, sampling = logits[row], None, answer.sampling
                scores = own
                if not math.isfinite(scores[likeliest[row]]):  # the largest, or NaN
                    raise ValueError("the model predicts NaN or infinity instead of a next token: look at its weights")
                if sampling.repetition_penalty != 1:
                    scores = penalised(scores, answer.prompt + answer.ids, sampling.repetition_penalty)
                if answer.guide is not None:
                    allowed = answer.guide.allowed(sampling.max_new_tokens - answer.tokens)
                    scores = scores[allowed]
                if sampling.temperature > 0:
                    chosen = draw(scores, sampling.temperature, sampling.top_p, answer.rng)
                else:
                    chosen = int(likeliest[row] if scores is own else scores.argmax())
                token = chosen if allowed is None else int(allowed[chosen])
                answer.take(token)
                if answer.top_logprobs is not None and answer.tokens > len(answer.logprobs):  # no end token
                    answer.logprobs.append(_logprobs(logits[row], token, answer.top_logprobs))
            except Exception as error:  # in what is this answer's alone: the others continue
                answer.finished, answer.error = "error", error

    def _compute(self, answers: list[Answer], tokens: np.ndarray, cache: KVCache) -> np.ndarray:
        choices = mixed_batch(self.model, [answer.adapter for answer in answers]) if self.mixed else nullcontext()
        length = cache.length
        try:
            with no_grad(), _TURN.setdefault(self.model, Lock()), choices:
                return to_numpy(self.model(tokens, cache, last=True).data[:, -1])
        except BaseException:  # no answer has a token of it
            cache.length, self.torn = length, False
            raise

    def _leave(self) -> None:
        """Remove the answers that have ended. The last rows of the batch fill the gaps."""
        if any(answer.finished for answer in self.waiting):
            self.waiting = deque(answer for answer in self.waiting if not answer.finished)
        if self.reading is not None and all(answer.finished for answer in self.reading.answers):
            self.reading = None
        alive = [row for row, answer in enumerate(self.running) if not answer.finished]
        if len(alive) == len(self.running):
            return
        for row, answer in enumerate(self.running):
            if answer.finished and self.cache is not None and self.known.most_bytes:
                self.known.keep(answer.adapter, answer.prompt + answer.ids, self.cache.row(row))
        count = len(alive)
        movable = [row for row in alive if row >= count]
        rows = [row if not self.running[row].finished else movable.pop() for row in range(count)]
        self.running = [self.running[row] for row in rows]
        if not rows:
            self.cache = None
        elif self.cache is not None:
            self.cache.keep(rows)


def penalised(logits: np.ndarray, ids: Sequence[int], penalty: float) -> np.ndarray:
    """Logits (V) in which those of the tokens `ids` are divided by a penalty, or multiplied by it if they are negative
    (Keskar et al. 2019, arXiv 1909.05858), as `repetition_penalty` of transformers.
    """
    seen = np.unique(ids)
    found = logits.copy()
    found[seen] = np.where(found[seen] < 0, found[seen] * penalty, found[seen] / penalty)
    return found


def draw(logits: np.ndarray, temperature: float, top_p: float, rng: np.random.Generator) -> int:
    """Sample a token from softmax(logits / temperature), among the likeliest whose probabilities add up to `top_p`.

    logits (V). Tokens as likely as the last of these are among them, too. The argmax of logits plus Gumbel noise is
    such a sample, and needs no normalisation.
    """
    scores = logits.astype(np.float64) - logits.max()  # (V), the likeliest 0
    with np.errstate(over="ignore"):  # a temperature near 0 makes all but the likeliest -inf
        scores /= temperature
    if top_p < 1:
        p = np.exp(scores)
        p /= p.sum()
        ordered = np.sort(p)[::-1]
        least = ordered[min(int(np.searchsorted(np.cumsum(ordered), top_p)), len(p) - 1)]
        scores[p < least] = -np.inf
    return int((scores + rng.gumbel(size=scores.shape)).argmax())


def _logprobs(logits: np.ndarray, token: int, count: int) -> tuple[LogProb, list[LogProb]]:
    """A token with its log-probability, and the `count` likeliest ones, the likeliest first. logits: (V)."""
    scores = logits.astype(np.float64) - logits.max()  # (V)
    scores -= np.log(np.exp(scores).sum())
    likeliest = np.argpartition(-scores, min(count, len(scores) - 1))[:count]
    odds = sorted(((int(i), float(scores[i])) for i in likeliest), key=lambda one: -one[1])
    return (token, float(scores[token])), odds


def _begun(text: str, stops: Sequence[str]) -> int:
    """The number of characters at the end of a text that may be the beginning of a stop text.

    >>> _begun("one\\nQ", ["\\nQ:"]), _begun("one", ["\\nQ:"])
    (2, 0)
    """
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
