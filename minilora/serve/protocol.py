"""What OpenAI's clients send and expect: requests read and checked; answers, chunks and errors in OpenAI's form.

https://platform.openai.com/docs/api-reference/chat and .../completions. A field that would change the answer and is not
supported is refused, never ignored. `model` is an adapter's name, "base", or a mix as in a chat: "legal=0.7
support=0.3". Without a `temperature` it is 0, where OpenAI's is 1. Of `n` answers the seeds count up from `seed`; at
temperature 0 all are equal. `repetition_penalty` is an addition, as in vLLM. With the `response_format` "json_schema"
the base and every adapter that generates its answer follow the schema of the request, as OpenAI's structured outputs.
An answer that was cut so that its JSON ends within `max_tokens` fits the schema, and its finish_reason is "length".

Adapters that were trained on labels or fields answer the last message alone, which must be the user's:

- An adapter that was trained on labels answers with its most likely label, whatever the temperature, `max_tokens` and
  `stop`. `logprobs` and `top_logprobs` then are of labels as they are of tokens elsewhere, and with the
  `response_format` "json_object" the answer is {"label": ..., "probability": ...}.
- An adapter that was trained on fields answers with a JSON object under its schema. If the request has another schema,
  the adapter reads the conversation as it stands.

Where the server looks up passages, the answer and the first chunk say which one it was given: {"context": {"id": ...,
"text": ...}}, with a "note" if the question shares no word with any passage.
"""

import json
import math
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..data.fields import FieldTask, Task
from ..data.labels import LabelTask
from ..data.passages import NO_WORD, Passage
from ..lora.adapters import Choice
from ..models.tokenizer import Message
from ..models.with_adapters import BASE_NAME, read_combination
from ..options import suggestion

_READ = (
    "model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens", "max_completion_tokens",
    "stop", "seed", "n", "logprobs", "response_format", "repetition_penalty",
)  # fmt: skip
_READ_TEXT = ("prompt", *(name for name in _READ if name not in ("messages", "max_completion_tokens")))
_HARMLESS = (  # they do not change an answer
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "top_logprobs",
)  # fmt: skip
_ONLY: dict[str, tuple[Any, ...]] = {  # they would change an answer, except with these values
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "logit_bias": ({},), "frequency_penalty": (0,), "presence_penalty": (0,), "reasoning_effort": ("none",),
    "modalities": (["text"],), "best_of": (1,), "echo": (False,), "suffix": ("",),
    "audio": (), "prediction": (), "web_search_options": (), "verbosity": (),
}  # fmt: skip
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MAX_ANSWERS = 16
MAX_STOPS = 4
MAX_STOP_LENGTH = 200
MAX_SCHEMA = 1 << 16  # characters; `FieldTask.of` limits what they stand for


class ApiError(Exception):
    """A refusal: HTTP status, one line, and the fields of OpenAI's error objects."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """The JSON object that clients parse."""
        line = _short(" ".join(str(self).split()), 1000)
        return {"error": {"message": line, "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, eq=False)
class Request:
    """A request that was read and checked. No two are equal.

    messages: the conversation to answer, or the text to continue. choice: who answers. limit: tokens of the answer,
    if the request says. task: the labels or fields that the messages ask for, if any. passage: that was put into the
    messages. strange: whether the question shares no word with any passage.
    top_logprobs: how many log-probabilities are told besides that of each token, or of the label, if any. as_json: for
    adapters with labels or fields, whether the answer is a JSON object. schema: what the answer must be, as JSON, if
    the request says. n: how many answers, each with its own seed.
    """

    messages: Sequence[Message] | str
    choice: Choice = None
    limit: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    model: str = BASE_NAME
    stream: bool = False
    usage: bool = False
    usage_always: bool = False
    top_logprobs: int | None = None
    as_json: bool = False
    task: Task | None = None
    passage: Passage | None = None
    strange: bool = False
    schema: FieldTask | None = None

    @property
    def param(self) -> str:
        """The field that has the conversation or text."""
        return "prompt" if isinstance(self.messages, str) else "messages"


LogProb = tuple[bytes, float]  # a token, or a label, and its log-probability


@dataclass(frozen=True)
class Piece:
    """The next piece of an answer.

    tokens: of the answer so far. finished: how it ended, in the last piece. error: why there is no more of it.
    seconds: from the request to this piece, by the engine's clock. cached: tokens of the prompt that were known from
    earlier answers. logprobs: where they are asked for, each token of the piece, and the likeliest in its place, the
    likeliest first; of an answer that is a label, the labels. index: which of the request's `n` answers it is of.
    """

    text: str
    tokens: int
    finished: str | None = None
    error: str | None = None
    seconds: float = 0.0
    cached: int = 0
    logprobs: Sequence[tuple[LogProb, Sequence[LogProb]]] = ()
    index: int = 0


@dataclass(frozen=True)
class Version:
    """What can answer: the base or an adapter.

    size: bytes of its weights. system: the system prompt that it was trained with. note: what users should know.
    labels: those that are its answers, if it was trained on labels. schema: that of its answers, if it has one.
    """

    name: str
    size: int
    system: str | None = None
    note: str | None = None
    labels: tuple[str, ...] | None = None
    schema: Mapping[str, Any] | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def entry(self) -> dict[str, Any]:
        """Its row of GET /v1/models; `size_bytes` and what follows are additions."""
        known = {"id": self.name, "object": "model", "created": self.created, "owned_by": "minilora"}
        more = {"system": self.system, "note": self.note, "labels": self.labels, "schema": self.schema}
        return known | {"size_bytes": self.size, **more}


def read_json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises ApiError for anything else."""
    try:
        value = json.loads(body)
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, got {_kind(value)}")
    return value


def read_request(fields: Mapping[str, Any], names: Collection[str], chat: bool = True) -> Request:
    """The fields of a request, read and checked. Raises ApiError, naming the field that is wrong.

    names: of all that can answer. chat: False for a text to continue, /v1/completions. Without a temperature it is 0,
    so that an answer can be had again; without a seed it is a new one.
    """
    read = _READ if chat else _READ_TEXT
    only = _ONLY if chat else _ONLY | {"logprobs": (False,)}
    fields = {name: value for name, value in fields.items() if value is not None}  # null: as if not there
    for name, value in fields.items():
        if name in only and not any(value == nothing for nothing in only[name]):
            raise ApiError(400, f"{name} is not supported here: leave it out", name, "unsupported_parameter")
        if name not in (*read, *_HARMLESS, *_ONLY):
            hint = suggestion(name := _short(name), (*read, *_ONLY))
            raise ApiError(400, f"unknown field {name!r}{hint}", name, "unknown_parameter")
    if "model" not in fields:
        raise ApiError(400, f"model is missing: one of {', '.join(names)}", "model", "missing_required_parameter")
    model = _text(fields["model"], "model")
    options = fields.get("stream_options", {})
    stream = _truth(fields, "stream")
    if not isinstance(options, dict) or (options and not stream):
        raise ApiError(400, "stream_options must be an object, and means nothing without stream", "stream_options")
    limits = [_number(fields, name, 1, whole=True) for name in ("max_completion_tokens", "max_tokens")]
    seed = _number(fields, "seed", whole=True)
    most = int(_number(fields, "top_logprobs", 0, 20, whole=True) or 0)
    if most and not _truth(fields, "logprobs"):
        raise ApiError(400, 'top_logprobs means nothing without "logprobs": true', "top_logprobs")
    return Request(
        model=model,
        choice=read_choice(model, names),
        messages=_messages(fields.get("messages")) if chat else _prompt(fields.get("prompt")),
        limit=next((int(limit) for limit in limits if limit is not None), None),
        temperature=_number(fields, "temperature", 0, 2) or 0.0,
        top_p=1.0 if (top_p := _number(fields, "top_p", 0, 1)) is None else top_p or 1e-9,  # 0: the likeliest alone
        repetition_penalty=_number(fields, "repetition_penalty", 0.1, 2) or 1.0,
        seed=secrets.randbits(63) if seed is None else int(seed) % 2**64,
        n=int(_number(fields, "n", 1, MAX_ANSWERS, whole=True) or 1),
        stop=_stops(fields.get("stop", [])),
        stream=stream,
        usage=_truth(options, "include_usage"),
        usage_always=_truth(options, "continuous_usage_stats"),
        top_logprobs=most if _truth(fields, "logprobs") else None,
        as_json=fields.get("response_format") == {"type": "json_object"},
        schema=_schema(fields.get("response_format", {"type": "text"})),
    )


def refuse_for_task(request: Request) -> None:
    """Raise ApiError for fields that mean nothing where the answer is no label, or has no schema."""
    if request.as_json and request.task is None:
        wrong = '"json_object" is for adapters that were trained on labels or fields; any other takes "json_schema"'
    elif request.schema and isinstance(request.task, LabelTask):
        wrong = '"json_schema" is not for adapters that were trained on labels'
    else:
        return
    raise ApiError(400, f"response_format {wrong}: leave it out", "response_format", "unsupported_parameter")


def _schema(value: Any) -> FieldTask | None:
    kind = value.get("type") if isinstance(value, dict) else None
    of_schema = kind == "json_schema" and isinstance(value.get("json_schema"), dict)
    plain = value in ({"type": "text"}, {"type": "json_object"})
    expected = '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": {...}}}'
    _check(plain or of_schema, "response_format", expected)
    if plain:
        return None
    schema = value["json_schema"].get("schema")
    _check(len(json.dumps(schema)) <= MAX_SCHEMA, "response_format", f"a schema of at most {MAX_SCHEMA:,} characters")
    try:
        return FieldTask.of(schema)
    except ValueError as error:
        raise ApiError(400, f"response_format: {error}", "response_format") from error


def read_choice(model: str, names: Collection[str]) -> Choice:
    """Who answers: None for the base, an adapter's name, or a mix. Raises ApiError, 404, for an unknown name.

    >>> read_choice("legal", ["base", "legal"]), read_choice("base", ["base"])
    ('legal', None)
    >>> read_choice("legal=0.5 support=1", ["base", "legal", "support"])
    {'legal': 0.5, 'support': 1.0}
    """
    if model in names:
        return None if model == BASE_NAME else model
    if "=" not in model:
        raise unknown_model(model, names)
    try:
        mix = read_combination(model)
    except ValueError as error:
        raise ApiError(400, str(error), "model") from error
    adapters = [name for name in names if name != BASE_NAME]
    if unknown := [name for name in mix if name not in adapters]:
        raise unknown_model(unknown[0], adapters)
    return mix


def unknown_model(name: str, names: Collection[str]) -> ApiError:
    """404 for an unknown name, with the known one that resembles it, or all."""
    hint = suggestion(name := _short(name), names) or f" (there is: {', '.join(names) or 'none'})"
    return ApiError(404, f"the model {name!r} does not exist{hint}", "model", "model_not_found")


def _check(fits: bool, name: str, expected: str) -> None:
    if not fits:
        raise ApiError(400, f"{name} must be {expected}", name)


def _messages(value: Any) -> list[Message]:
    _check(isinstance(value, list) and bool(value), "messages", "a list with at least one message")
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(value)]
    if not messages[-1]["content"].strip():
        raise ApiError(400, "the question is empty", f"messages[{len(messages) - 1}].content")
    return messages


def _message(value: Any, where: str) -> Message:
    _check(isinstance(value, dict), where, f"an object with role and content, got {_kind(value)}")
    role, content = value.get("role"), value.get("content")
    known = isinstance(role, str) and role in _ROLES
    _check(known, f"{where}.role", f"one of {', '.join(_ROLES)}, got {_short(role)!r}")
    if unread := [name for name in ("tool_calls", "function_call", "audio") if value.get(name)]:
        name = f"{where}.{unread[0]}"
        raise ApiError(400, f"{name} is not supported here: leave it out", name, "unsupported_parameter")
    parts = content if isinstance(content, list) else [{"text": content}]
    wrong = [part for part in parts if not (isinstance(part, dict) and isinstance(part.get("text"), str))]
    kind = wrong[0].get("type") if wrong and isinstance(wrong[0], dict) else None
    got = _kind(content) if kind is None else f"a part of type {_short(kind)!r}"
    _check(not wrong, f"{where}.content", f"text, or a list of parts of text, got {got}")
    text = _encodable("".join(part["text"] for part in parts), f"{where}.content")
    return {"role": _ROLES[role], "content": text.replace("\r\n", "\n")}  # as the data are read


def _prompt(value: Any) -> str:
    texts = value if isinstance(value, list) else [value]
    _check(len(texts) == 1, "prompt", f"one text per request, got {len(texts)}")
    return _text(texts[0], "prompt").replace("\r\n", "\n")  # as the data are read


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    fits = isinstance(stops, list) and len(stops) <= MAX_STOPS
    fits = fits and all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in stops)
    _check(fits, "stop", f"a text or up to {MAX_STOPS}, each of 1 to {MAX_STOP_LENGTH} characters")
    return tuple(stops)


def _text(value: Any, name: str) -> str:
    got = "an empty one" if value == "" else _kind(value)
    _check(isinstance(value, str) and value != "", name, f"a text that is not empty, got {got}")
    return _encodable(value, name)


def _encodable(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, f"{name} holds half a character, \\ud800 to \\udfff", name) from error
    return text


def _truth(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    _check(isinstance(value, bool), name, f"true or false, got {_kind(value)}")
    return bool(value)


def _number(
    fields: Mapping[str, Any], name: str, least: float = -math.inf, most: float = math.inf, whole: bool = False
) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    kinds: Any = int if whole else int | float
    fits = isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most
    bounds = f" from {least:g} to {most:g}" if most < math.inf else f" from {least:g} on" if least > -math.inf else ""
    got = _short(value if isinstance(value, int | float) else repr(value))
    _check(fits, name, f"a {'whole ' if whole else ''}number{bounds}, got {got}")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")


def _short(value: Any, most: int = 80) -> str:
    text = str(value) if not isinstance(value, int) or abs(value) < 10**20 else "a very large number"
    return text if len(text) <= most else f"{text[: most - 3]}..."


# -- what goes out -----------------------------------------------------------------------------------------------------


class Reply:
    """The objects of a request's answers, whole or in chunks: all have the same id, model and time."""

    def __init__(self, request: Request, prompt_tokens: int):
        self.request, self.prompt_tokens = request, prompt_tokens
        self.latest: dict[int, Piece] = {}  # of each answer
        self.chat = not isinstance(request.messages, str)
        self.id, self.created = f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}", int(time.time())

    def whole(self, answers: Sequence[Piece]) -> dict[str, Any]:
        """The answers to a request without `stream`, each a piece."""
        self.latest = dict(enumerate(answers))
        choices = []
        for answer in answers:
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            said = {"message": message} if self.chat else {"text": answer.text}
            choices.append(_choice(said, answer, self._logprobs(answer)))
        return self._object(choices, "") | {"usage": self._usage()} | self._context()

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks of a stream that a piece becomes: its text, if any, and after the last piece how it ended."""
        chunks = []
        self.latest[piece.index] = piece
        if piece.text or piece.logprobs:
            chunks.append(self._chunk({"content": piece.text}, replace(piece, finished=None)))
        if piece.finished:
            chunks.append(self._chunk({}, replace(piece, text="", logprobs=())))
            ended = [each for each in self.latest.values() if each.finished]
            if self.request.usage and len(ended) == self.request.n:  # stream_options: {"include_usage": true}
                chunks.append(self._object([]) | {"usage": self._usage()})
        return chunks

    def begin(self) -> list[dict[str, Any]]:
        """The first chunk of each answer to a conversation, which has the role."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        first = [Piece("", 0, index=i) for i in range(self.request.n)]
        return [self._chunk(delta, piece) | self._context() for piece in first] if self.chat else []

    def _context(self) -> dict[str, Any]:
        """The passage that the answer was given, an addition."""
        passage = self.request.passage
        note = {"note": NO_WORD} if self.request.strange else {}
        return {} if passage is None else {"context": {"id": passage.id, "text": passage.text, **note}}

    def _chunk(self, delta: dict[str, Any], piece: Piece) -> dict[str, Any]:
        """A chunk. `seconds`, next to the counts that `continuous_usage_stats` asks for, is an addition."""
        said = {"delta": delta} if self.chat else {"text": piece.text}
        chunk = self._object([_choice(said, piece, self._logprobs(piece))])
        if self.request.usage or self.request.usage_always:
            chunk["usage"] = self._usage() if self.request.usage_always else None
        if self.request.usage_always:
            chunk["seconds"] = round(piece.seconds, 4)
        return chunk

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """The log-probabilities, if they were asked for."""
        if self.request.top_logprobs is None or not piece.logprobs:
            return None
        most = self.request.top_logprobs
        told = [_told(token) | {"top_logprobs": [*map(_told, others[:most])]} for token, others in piece.logprobs]
        return {"content": told, "refusal": None}

    def _object(self, choices: list[dict[str, Any]], part: str = ".chunk") -> dict[str, Any]:
        kind = f"chat.completion{part}" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model, "choices": choices}

    def _usage(self) -> dict[str, Any]:
        """The tokens so far: of the prompt once, and of all answers."""
        tokens = sum(piece.tokens for piece in self.latest.values())
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
            "prompt_tokens_details": {"cached_tokens": max((p.cached for p in self.latest.values()), default=0)},
        }


def _told(of: LogProb) -> dict[str, Any]:
    token, logprob = of
    return {"token": token.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(token)}


def _choice(said: dict[str, Any], piece: Piece, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": piece.index, **said, "logprobs": logprobs, "finish_reason": piece.finished}


def event(value: dict[str, Any] | str) -> bytes:
    """A value as a server-sent event."""
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()
