"""What keeps a server usable: whom it answers, how much it reads, and how long it waits.

Connections above a number are refused; a request's head, its body and a reader that is slow have a time limit each. A
`Host` other than the server's own is refused, since a page from elsewhere could otherwise reach it under a name that
leads here (DNS rebinding), and so is another page's `Origin`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import re
import socket
import traceback
from collections.abc import Callable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .protocol import ApiError

MAX_BODY = 1 << 20  # bytes
HEAD_SECONDS = 10.0  # until a request's head is here, also after another one on the same connection
BODY_SECONDS = 20.0
SEND_SECONDS = 30.0  # for a reader to take what waits for it

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_SAFE = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response, in ASCII."""
    return Response(json.dumps(value), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    """What went wrong, as OpenAI's clients read it."""
    return json_response(error.body(), error.status, error.headers)


async def read_body(request: HttpRequest) -> bytes:
    """The body of a request, up to `MAX_BODY`. Raises ApiError: 413 for a longer one, 408 for one that takes long."""
    too_long = ApiError(413, f"the body is longer than the {MAX_BODY:,} bytes that are read")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > MAX_BODY:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise too_long
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive in {BODY_SECONDS:g} s") from error
    return bytes(body)


class Guard:
    """Around the application: other hosts and origins are refused; what went wrong inside is one line, said here.

    host: the address that the server listens on. say: hears of faults.
    """

    def __init__(self, app: ASGIApp, host: str, say: Callable[[str], None]):
        self.app, self.say = app, say
        self.names = {*LOCAL_NAMES, host.lower(), socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name for name, _ in message["headers"]}
                safe = [item for item in _SAFE.items() if item[0] not in known]
                message = {**message, "headers": [*message["headers"], *safe]}
            await send(message)

        try:
            self.refuse_strangers(scope)
            await self.app(scope, receive, guarded)
        except ApiError as error:
            await error_response(error)(scope, receive, guarded)
        except ClientDisconnect:
            pass  # nobody is there to be answered
        except Exception as error:  # a fault of ours: the line goes to who runs the server, not to who asks
            self.say(f"{scope['method']} {scope['path']!r} failed: {type(error).__name__}: {error}")
            if os.environ.get("MINILORA_TRACEBACK"):
                self.say(traceback.format_exc())

    def refuse_strangers(self, scope: Scope) -> None:
        """Raise ApiError, 403, for a request that was meant for another host, or sent by another host's page.

        An address as `Host` is nobody's name, so it can lead nobody here who did not mean it.
        """
        headers = [(name, value.decode("latin-1").lower()) for name, value in scope["headers"]]
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not self._own(_name(hosts[0])):
            raise ApiError(403, "this server is not called as the Host header says", code="wrong_host")
        for origin in (value for name, value in headers if name == b"origin"):
            if origin != f"{scope['scheme']}://{hosts[0]}":
                raise ApiError(403, "pages of other origins may not ask here", code="wrong_origin")

    def _own(self, name: str | None) -> bool:
        return name is not None and (name in self.names or _is_address(name))


def _name(host: str) -> str | None:
    """A Host header's name, without the port.

    >>> _name("localhost:8000"), _name("[::1]:8000"), _name("a@localhost"), _name("localhost:x")
    ('localhost', '::1', None, None)
    """
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?", host)
    return (found[1] or found[2]) if found else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Can nobody but this machine's own programs reach the server at this address?"""
    return host in LOCAL_NAMES or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def bounded_protocol(connections: int) -> type[H11Protocol]:
    """uvicorn's protocol, with what it has no setting for: a number of connections, time for heads and readers."""

    class Bounded(H11Protocol):
        """One connection."""

        deadline: asyncio.TimerHandle | None = None
        unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """Count it, and let its time run."""
            super().connection_made(transport)
            if len(self.connections) > connections:
                self.refuse(ApiError(503, "too many connections: ask again soon", headers={"retry-after": "1"}))
            else:
                self.expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            """It is gone."""
            self.arrived()
            self.taken()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """Bytes came; whether they are a whole head, the parser says."""
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:
                self.arrived()

        def on_response_complete(self) -> None:
            """A response is out: another request may follow, and has its time."""
            super().on_response_complete()
            if self.cycle.response_complete and not self.transport.is_closing():
                self.expect_head()

        def expect_head(self) -> None:
            """From now on, so many seconds."""
            self.arrived()
            self.deadline = self.loop.call_later(HEAD_SECONDS, self.too_slow)

        def arrived(self) -> None:
            """Its time no longer runs."""
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

        def too_slow(self) -> None:
            """Its time is over. Who was answered before is not answered again: what still comes was no head."""
            if self.cycle is None and not self.transport.is_closing():
                self.refuse(ApiError(408, f"the request's head did not arrive in {HEAD_SECONDS:g} s"))
            else:
                self.transport.abort()

        def pause_writing(self) -> None:
            """What was written is not read: that has its time, too."""
            super().pause_writing()
            self.unread = self.loop.call_later(SEND_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            """It was read after all."""
            super().resume_writing()
            self.taken()

        def taken(self) -> None:
            """The reader's time no longer runs."""
            if self.unread is not None:
                self.unread.cancel()
                self.unread = None

        def refuse(self, error: ApiError) -> None:
            """An answer without a request, and the end of the connection."""
            body = json.dumps(error.body()).encode()
            headers = {"content-type": "application/json", "content-length": len(body), **error.headers}
            status = f"HTTP/1.1 {error.status} {'Request Timeout' if error.status == 408 else 'Service Unavailable'}"
            lines = [status, *(f"{name}: {value}" for name, value in headers.items()), "connection: close", "", ""]
            self.transport.write("\r\n".join(lines).encode() + body)
            self.transport.close()

    return Bounded
