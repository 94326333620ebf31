"""The one thread that owns the model: it computes one batch for all requests, and everything else waits for its turn.

Other threads hand it functions with `call`, which run between two steps. Answers come back piece by piece, through a
function that came with the request.
"""

from __future__ import annotations

import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ..data.fields import FieldTask, Task
from ..data.labels import LabelTask
from ..data.passages import Handbook
from ..generate.as_trained import guide_of, system_of, task_of_adapters, without_passages
from ..generate.conversation import MAX_NEW_TOKENS, TOY
from ..generate.labels import ranked_labels
from ..generate.prefix_cache import PrefixCache
from ..generate.schema import check_room
from ..generate.streams import Answer, LogProb, Streams
from ..lora.adapters import Choice, adapter_state, base_state, factors_of, remove_adapter
from ..lora.peft import load_adapter
from ..models.tokenizer import Tokenizer
from ..models.with_adapters import BASE_NAME
from ..nn.language_model import LanguageModel
from ..nn.module import sha256_of
from ..progress import log
from .protocol import ApiError, Piece, Request, Version, refuse_for_task, unknown_model

Result = TypeVar("Result")


@dataclass(eq=False)
class Job:
    """An answer under way, the function that is called with its pieces, and when it began."""

    answer: Answer
    tell: Callable[[Piece], None] = field(repr=False)
    began: float = field(default_factory=time.monotonic)
    told: int = 0  # tokens whose log-probabilities were in pieces


class Engine:
    """A model and its adapters in their own thread.

        with Engine(model, tokenizer) as engine:
            engine.call(lambda: engine.ask(Request(messages, "legal"), tell=print)).result()

    Every thread may use `call`, `task`, `count`, `state` and `versions` (what can answer, by name); the other methods
    are for functions that `call` runs. slots: answers computed at a time. waiting: how many more may wait. context:
    tokens of a conversation and its answer, where that must be fewer than the model can see.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, slots: int = 16, waiting: int = 64, context: int | None = None
    ):
        self.model, self.tokenizer, self.slots, self.waiting = model, tokenizer, slots, waiting
        limit = model.config.max_position_embeddings
        self.context = min(context or limit, limit)
        self.streams = Streams(model, tokenizer, slots, known=PrefixCache())
        self.jobs: dict[Request, Job] = {}
        self.leaving: set[str] = set()  # adapters that are removed when their last answer has ended
        self.seconds = 1.0  # that an answer takes, about
        self.digest: str | None = None  # the base's fingerprint, from when it is first needed
        size, note = sum(array.nbytes for array in base_state(model).values()), TOY if model.source == "tiny" else None
        self.versions = {BASE_NAME: Version(BASE_NAME, size, note=note, **self._answers(None))}
        self.versions |= {name: self._version(name) for name in model.adapters}
        self._longest = max(map(len, tokenizer.core.get_vocab(with_added_tokens=True)))
        self._bytes = tokenizer.token_bytes()
        self._inbox: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="minilora-engine", daemon=True)

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._inbox.put(None)
        self._thread.join(timeout=10)  # a step may be under way

    # -- from any thread -----------------------------------------------------------------------------------------------

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Let the engine's thread run a function between two steps."""
        future: Future[Result] = Future()
        self._inbox.put((function, future))
        return future

    def task(self, request: Request) -> Task | None:
        """What the adapters of a request were trained to do, unless it has another schema."""
        task = task_of_adapters(self.model, request.choice)
        other = isinstance(task, FieldTask) and request.schema is not None and request.schema.fields != task.fields
        return None if other else task

    def count(self, request: Request) -> int:
        """The tokens of its prompt; for one that is far too long, some number that is too large as well.

        Raises ValueError for a conversation that the model's template cannot render.
        """
        messages = request.messages
        if isinstance(messages, str):
            text = self.tokenizer.plain(messages)
        else:
            text = self.tokenizer.render(messages, answer_next=True)
        if (least := len(text) // self._longest) > self.context:  # no token is longer
            return least
        ids = self.tokenizer.encode(text)
        return len(self.tokenizer.begun(ids) if isinstance(messages, str) else ids)

    def state(self) -> dict[str, int]:
        """How many answers are under way, and how many wait."""
        jobs = len(self.jobs)
        return {"running": min(jobs, self.slots), "waiting": max(jobs - self.slots, 0)}

    # -- between two steps ---------------------------------------------------------------------------------------------

    def ask(self, request: Request, tell: Callable[[Piece], None]) -> int:
        """Let an answer run, or wait for a place. Returns the number of tokens of its prompt.

        tell: called in the engine's thread with each piece. Raises ApiError for an unknown adapter and where too many
        wait, and ValueError as `Streams.add`.
        """
        self._refuse_unknown(request.choice)
        if (ahead := len(self.jobs) - self.slots) >= self.waiting:
            seconds = min(60, math.ceil(self.seconds * (1 + max(ahead, 0) / self.slots)))
            line = f"{ahead} answers wait for a place already: ask again in {seconds} s"
            raise ApiError(429, line, code="rate_limit_exceeded", headers={"retry-after": str(seconds)})
        task, messages = request.task, request.messages
        refuse_for_task(request)
        if isinstance(task, LabelTask):
            return self._label(request, task, tell)
        said = "" if isinstance(messages, str) else messages[-1]["content"]
        text = said if task is None else task.text(said)
        schema, limit = task or request.schema, request.limit or MAX_NEW_TOKENS
        if schema is not None:
            try:
                check_room(schema.least(), limit)  # before an automaton is built
            except ValueError as error:
                raise ApiError(400, str(error), "max_tokens") from error
        guide = None if schema is None else guide_of(schema, self.tokenizer, text)
        answer = self.streams.add(
            messages, request.choice, limit, request.temperature, request.top_p,
            request.seed, request.stop, raw=isinstance(messages, str), guide=guide, top_logprobs=request.top_logprobs,
            repetition_penalty=request.repetition_penalty,
        )  # fmt: skip
        self.jobs[request] = Job(answer, tell)
        return answer.prompt_tokens

    def _label(self, request: Request, task: LabelTask, tell: Callable[[Piece], None]) -> int:
        """Answer with a label at once; the answers that are running wait for it as for a prompt."""
        began = time.monotonic()
        assert not isinstance(request.messages, str)  # a text to continue has no task
        labels = ranked_labels(self.model, self.tokenizer, task, request.messages, request.choice)
        label, p = labels[0]
        text = json.dumps({"label": label, "probability": p}, ensure_ascii=False) if request.as_json else label
        tokens = len(self.tokenizer.encode(text))
        odds = [(name.encode(), math.log(p) if p > 0 else -math.inf) for name, p in labels]
        tell(Piece(text, tokens, "stop", seconds=time.monotonic() - began, logprobs=[(odds[0], odds)]))
        return self.count(request)

    def cancel(self, request: Request) -> None:
        """End an answer that no client waits for; its place is free at once."""
        if (job := self.jobs.pop(request, None)) is not None:
            self.streams.cancel(job.answer)
            self._let_go()

    def add_adapter(self, name: str, folder: Path, handbook: Handbook | None = None) -> Version:
        """Load an adapter under a name. What the command line would say of it is in its note, and in the log.

        handbook: the passages that questions are answered from, if any.

        Raises ApiError for a name that is taken, ModelFileError, ValueError; nothing has changed then.
        """
        if name in self.model.adapters or name == BASE_NAME:
            why = "is leaving: its last answers run on" if name in self.leaving else "is taken"
            raise ApiError(409, f"the name {name!r} {why}", "name", "name_taken")
        if self.digest is None:
            self.digest = sha256_of(base_state(self.model))
        load_adapter(self.model, folder, name, base_sha256=self.digest)  # active now, which no mixed batch asks
        try:
            lines = without_passages(self.model, handbook, [name])
            version = replace(self._version(name), note="; ".join(lines) or None)
        except Exception:  # its notes cannot be what they say
            remove_adapter(self.model, name)
            raise
        for line in lines:
            log.info(line)
        self.versions = {**self.versions, name: version}
        return version

    def remove_adapter(self, name: str) -> None:
        """Refuse an adapter to new requests, and remove it when its last answer has ended.

        Raises ApiError for an unknown name and for the base.
        """
        if name == BASE_NAME:
            raise ApiError(400, f"{name!r} is not an adapter: it stays")
        if name not in self.versions:
            raise unknown_model(name, self.versions)
        self.versions = {other: version for other, version in self.versions.items() if other != name}
        self.leaving.add(name)
        self._let_go()

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                item = self._inbox.get(block=not self.streams.busy)
                while item is not None:
                    _answer(*item)
                    item = self._inbox.get_nowait()
            except queue.Empty:
                pass
            if self.streams.busy:
                self._step()

    def _step(self) -> None:
        try:
            self.streams.step()
            self._tell()
        except Exception as error:  # the next request must find an engine at work
            failed, self.jobs = [*self.jobs.values()], {}
            self.streams = Streams(self.model, self.tokenizer, self.slots, known=PrefixCache())
            self._fail(error, failed)
            self._let_go()

    def _tell(self) -> None:
        """Hand on what the step added to every answer, and let those go that have ended."""
        ended = []
        for request, job in self.jobs.items():
            answer = job.answer
            if answer.error is not None:
                self._fail(answer.error, [job])
            elif (text := answer.new_text()) or answer.finished:
                seconds = time.monotonic() - job.began
                logprobs = [(self._named(token), [*map(self._named, others)])
                            for token, others in answer.logprobs[job.told :]]  # fmt: skip
                job.told += len(logprobs)
                job.tell(Piece(text, answer.tokens, answer.finished, None, seconds, answer.cached, logprobs))
            if answer.finished:
                ended.append(request)
        for request in ended:
            self.seconds += (time.monotonic() - self.jobs.pop(request).began - self.seconds) / 5
        if ended:
            self._let_go()

    def _named(self, of: LogProb) -> tuple[bytes, float]:
        """A token by its bytes instead of its id. Control tokens have those of their name, unused ids have none."""
        token, logprob = of
        return self._bytes.get(token) or (self.tokenizer.core.id_to_token(token) or "").encode(), logprob

    def _fail(self, error: Exception, failed: Sequence[Job]) -> None:
        line = f"{len(failed)} answer{'' if len(failed) == 1 else 's'} could not be computed"
        shown = error if "MINILORA_TRACEBACK" in os.environ else None
        log.error(f"{line}: {str(error) or type(error).__name__}", exc_info=shown)
        for job in failed:
            job.tell(Piece("", job.answer.tokens, error="the answer could not be computed"))

    def _let_go(self) -> None:
        """Remove the adapters that are leaving and that no answer needs any longer."""
        needed = {name for job in self.jobs.values() for name in factors_of(job.answer.adapter)}
        for name in self.leaving - needed:
            remove_adapter(self.model, name)
            self.streams.known.forget(name)
            self.leaving.remove(name)

    def _version(self, name: str) -> Version:
        size = sum(array.nbytes for array in adapter_state(self.model, name).values())
        return Version(name, size, **self._answers(name))

    def _refuse_unknown(self, choice: Choice) -> None:
        for name in factors_of(choice):
            if name not in self.versions:
                raise unknown_model(name, self.versions)

    def _answers(self, choice: Choice) -> dict[str, Any]:
        """The system prompt that a choice of adapters is asked under, and the labels or the schema of its answers."""
        task = task_of_adapters(self.model, choice)
        labels = task.labels if isinstance(task, LabelTask) else None
        schema = task.schema() if isinstance(task, FieldTask) else None
        return {"system": system_of(self.model, choice), "labels": labels, "schema": schema}


def _answer(function: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return  # nobody waits for it any longer
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
