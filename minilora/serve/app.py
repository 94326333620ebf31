"""The application: each address with its handler, from a request to what the engine computes."""

import asyncio
import base64
import hashlib
import os
import re
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

from ..data.labels import LabelTask
from ..data.passages import Handbook
from ..files.disk import ModelFileError
from ..generate.as_trained import as_trained
from ..generate.conversation import MAX_NEW_TOKENS
from .bounds import error_response, json_response
from .engine import Engine
from .protocol import (
    ApiError,
    Piece,
    Reply,
    Request,
    event,
    read_json_object,
    read_request,
    unknown_model,
)

Result = TypeVar("Result")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class App:
    """The handlers of all addresses.

    folder: adapters can be added from inside it only. default_limit: tokens of an answer where a request does not say.
    handbook: passages, the best of which is put before the last question of a conversation.
    """

    def __init__(
        self, engine: Engine, folder: Path, default_limit: int = MAX_NEW_TOKENS, handbook: Handbook | None = None
    ):
        self.engine, self.folder, self.default_limit, self.handbook = engine, folder.resolve(), default_limit, handbook
        self.page, self.policy = read_page()

    def asgi(self) -> Starlette:
        """The whole application, which bounds.py guards."""
        routes = [
            Route("/", self.get_page),
            Route("/health", self.get_health),
            Route("/v1/models", self.get_models),
            Route("/v1/models/{name:path}", self.get_model),
            Route("/v1/chat/completions", self.post_completion, methods=["POST"]),
            Route("/v1/completions", self.post_completion, methods=["POST"]),
            Route("/adapters", self.post_adapter, methods=["POST"]),
            Route("/adapters/{name:path}", self.delete_adapter, methods=["DELETE"]),
        ]
        wrong = {ApiError: _said, HTTPException: _not_here, Exception: _fault}
        return Starlette(routes=routes, exception_handlers=wrong)

    # -- what is there -------------------------------------------------------------------------------------------------

    async def get_page(self, request: HttpRequest) -> Response:
        """The page. Its policy lets it run its own script and ask this server, and nothing else."""
        headers = {"content-security-policy": self.policy, "x-frame-options": "DENY"}
        return Response(self.page, headers=headers, media_type="text/html")

    async def get_health(self, request: HttpRequest) -> Response:
        """That the server runs, and how many answers are running and waiting."""
        return json_response({"status": "ok", "models": len(self.engine.versions), **self.engine.state()})

    async def get_models(self, request: HttpRequest) -> Response:
        """Everything that can answer, the base first; an addition is `max_tokens`, of an answer by default."""
        entries = [version.entry() for version in self.engine.versions.values()]
        return json_response({"object": "list", "data": entries, "max_tokens": self.default_limit})

    async def get_model(self, request: HttpRequest) -> Response:
        """One of them."""
        versions, name = self.engine.versions, request.path_params["name"]
        if name not in versions:
            raise unknown_model(name, versions)
        return json_response(versions[name].entry())

    # -- adapters come and go ------------------------------------------------------------------------------------------

    async def post_adapter(self, request: HttpRequest) -> Response:
        """Load an adapter: {"name": "legal", "folder": "runs/legal"}. `note` says what it lacks here, if anything."""
        fields = read_json_object(await request.body())
        name, folder = fields.get("name"), fields.get("folder")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ApiError(400, "name must be up to 64 letters, digits, - and _", "name")
        if not isinstance(folder, str) or not folder:
            raise ApiError(400, "folder must be the folder of an adapter", "folder")
        path = self.below(folder)
        version = await self._in_turn(lambda: self.engine.add_adapter(name, path, self.handbook), "folder")
        return json_response(version.entry(), 201)

    async def delete_adapter(self, request: HttpRequest) -> Response:
        """Remove an adapter. Its answers that are under way run to their end."""
        name = request.path_params["name"]
        await self._in_turn(lambda: self.engine.remove_adapter(name))
        return json_response({"id": name, "object": "model", "deleted": True})

    def below(self, folder: str) -> Path:
        """A path inside the folder that the server was started in.

        Raises ApiError for a path outside it, also where links lead outside, for the folder or for a file in it.
        """
        elsewhere = ApiError(403, "folder must be inside the one that the server was started in", "folder")
        try:
            path = (self.folder / folder).resolve()
            if not path.is_relative_to(self.folder):
                raise elsewhere
            if not path.exists():
                raise ApiError(400, f"{folder}: no such folder", "folder")
            within = path.iterdir() if path.is_dir() else ()
            if not all(file.resolve().is_relative_to(self.folder) for file in within):
                raise elsewhere
        except (OSError, ValueError) as error:  # a name that is too long, a null character, a loop of links
            raise ApiError(400, "folder cannot be read", "folder") from error
        return path

    # -- answers -------------------------------------------------------------------------------------------------------

    async def post_completion(self, http: HttpRequest) -> Response:
        """An answer to a conversation, or the continuation of a text; whole, or as a stream of server-sent events."""
        chat = http.url.path.endswith("/chat/completions")
        request = read_request(read_json_object(await http.body()), self.engine.versions, chat)
        if request.n > (most := self.engine.slots + self.engine.waiting):
            raise ApiError(400, f"n is {request.n}: there is room for {most} answers at a time", "n")
        if not isinstance(request.messages, str):
            task, said = self.engine.task(request), request.messages
            asked = as_trained(self.engine.model, request.choice, said, task, handbook=self.handbook)
            strange = self.handbook is not None and not self.handbook.has_words_of(said[-1:])
            request = replace(request, messages=asked.messages, task=task, passage=asked.passage, strange=strange)
            if (role := said[-1]["role"]) != "user" and task is not None:
                wrong = f"the last message must be the user's, which alone is answered here, got one of role {role}"
                raise ApiError(400, wrong, "messages")
        request = replace(request, limit=await self._limit(request))
        pieces = self._pieces(request)
        first = await anext(pieces)  # the number of the prompt's tokens: it runs, or waits for a place
        reply = Reply(request, first.tokens)
        if request.stream:
            return _Events(reply, pieces)
        return json_response(reply.whole(await _unless_gone(http, _gather(pieces))))

    async def _limit(self, request: Request) -> int:
        """How many tokens the answer may have. Raises ApiError if they do not fit into the context.

        A label is not generated: only its question must fit, whatever the request says.
        """
        context = self.engine.context
        try:
            count = await asyncio.to_thread(self.engine.count, request)
        except ValueError as error:
            raise ApiError(400, str(error), request.param) from error
        limit = max(min(self.default_limit, context - count), 1) if request.limit is None else request.limit
        generated = 0 if isinstance(request.task, LabelTask) else limit
        if count + generated > context:
            fits = count <= context
            what = f"the conversation has {count:,} tokens" if fits else "the conversation is too long"
            answer = f"with an answer of up to {generated:,}, " if generated and fits else ""
            raise ApiError(400, f"{what}; {answer}at most {context:,} fit", request.param, "context_length_exceeded")
        return limit

    async def _pieces(self, request: Request) -> AsyncGenerator[Piece, None]:
        """The pieces of all answers; before them, one that has the number of the prompt's tokens.

        However the generator ends, the answers' places are free afterwards.
        """
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Piece] = asyncio.Queue()
        each = [replace(request, seed=request.seed + i) for i in range(request.n)]

        def tell(index: int, piece: Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(arrived.put_nowait, replace(piece, index=index))

        def ask() -> int:
            return max([self.engine.ask(one, partial(tell, i)) for i, one in enumerate(each)])

        try:
            yield Piece("", await self._in_turn(ask, request.param))
            left = request.n
            while left:
                piece = await arrived.get()
                yield piece
                left = 0 if piece.error else left - (piece.finished is not None)
        finally:
            for one in each:
                self.engine.call(partial(self.engine.cancel, one))

    async def _in_turn(self, function: Callable[[], Result], param: str | None = None) -> Result:
        """What the function returns in the engine's thread; its exceptions as ApiErrors. param: the field at fault."""
        try:
            return await asyncio.wrap_future(self.engine.call(function))
        except (ModelFileError, ValueError) as error:
            raise ApiError(400, str(error).replace(f"{self.folder}{os.sep}", ""), param) from error


class _Events(StreamingResponse):
    """An answer as server-sent events. However they end, the answer's place is free afterwards."""

    def __init__(self, reply: Reply, pieces: AsyncGenerator[Piece, None]):
        super().__init__(_events(reply, pieces), media_type="text/event-stream")
        self.pieces = pieces

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.pieces):
            await super().stream_response(send)


async def _events(reply: Reply, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[bytes, None]:
    for chunk in reply.begin():
        yield event(chunk)
    async for piece in pieces:
        if piece.error:
            yield event(ApiError(500, piece.error).body())
            return
        for chunk in reply.chunks(piece):
            yield event(chunk)
    yield event("[DONE]")


async def _gather(pieces: AsyncGenerator[Piece, None]) -> list[Piece]:
    """Each whole answer: its last piece, with the text and the log-probabilities of all."""
    whole: dict[int, Piece] = {}
    async with aclosing(pieces):
        async for piece in pieces:
            if piece.error:
                raise ApiError(500, piece.error)
            before = whole.get(piece.index, Piece("", 0))
            logprobs = [*before.logprobs, *piece.logprobs]
            whole[piece.index] = replace(piece, text=before.text + piece.text, logprobs=logprobs)
    return [whole[i] for i in range(len(whole))]


async def _unless_gone(http: HttpRequest, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of the work. If the client leaves first, the work is cancelled: raises ClientDisconnect."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _said(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _fault(request: HttpRequest, error: Exception) -> Response:
    return error_response(ApiError(500, "something went wrong here"))


async def _not_here(request: HttpRequest, error: Exception) -> Response:
    """404 and 405, in the form of all other errors."""
    assert isinstance(error, HTTPException)
    missing = error.status_code == 404
    what = "there is nothing at" if missing else f"{request.method} is not possible at"
    hint = "; OpenAI's clients need the base URL /v1, below which are models, chat/completions and completions"
    line = f"{what} {request.url.path[:200]}{hint if missing else ''}"
    wrong = ApiError(error.status_code, line, headers=error.headers)
    return error_response(wrong)


def read_page() -> tuple[str, str]:
    """The page, and the policy that lets its own style and script run and nothing else, by their hashes."""
    page = files(__package__).joinpath("page.html").read_text("utf-8")
    allowed = {}
    for element in ("style", "script"):
        (source,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        allowed[element] = f"{element}-src 'sha256-{digest}'"
    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return page, f"default-src 'none'; {allowed['style']}; {allowed['script']}; {rest}"
