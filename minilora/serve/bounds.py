"""What keeps a server usable: whom it answers, how much it reads, how long it waits, which connections it keeps.

Where the libraries have a setting, it is used. uvicorn (server.py) limits the bytes of a request's head, refuses what
is not HTTP, and closes a connection on which no other request follows. They have no setting for the following, which is
why it is written here:

- a `Host` that is not a name of this server: a page from elsewhere could otherwise reach the server under its own name
  that leads here (DNS rebinding). `--allowed-hosts` adds names to this machine's. Starlette's TrustedHostMiddleware
  refuses the others without saying what to do (`Guard`);
- the time that a request's body may take (`Guard`), and, in most versions of Starlette, its size;
- pages of another origin, which Starlette can allow but not refuse (`Guard`);
- a client that does not read its answer (`Guard`);
- connections on which nothing is asked (`Listener`). uvicorn sets them no time, and its `limit_concurrency` counts
  them, so that idle connections would keep everybody else out.
"""

import asyncio
import errno
import ipaddress
import json
import os
import socket
from collections.abc import Collection
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..progress import log
from .protocol import ApiError

MAX_BODY = 1 << 20  # bytes
BODY_SECONDS = 20.0  # until a request's body has arrived
SEND_SECONDS = 30.0  # until the client has read a part of its answer
AT_ONCE = 16  # connections that are being closed

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_OTHER_ORIGIN = (
    "pages of other origins may not ask here; if it is this server's page behind a proxy, start the server with "
    "--allowed-hosts and the page's host name"
)
_SAFE = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}
Client = tuple[str, int]  # address and port, as `accept` and ASGI give them


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response, in ASCII."""
    return Response(json.dumps(value), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    """What went wrong, as OpenAI's clients read it."""
    return json_response(error.body(), error.status, error.headers)


class Listener(socket.socket):
    """A listening socket that holds at most `most` connections: of more, the one that was idle longest is closed.

    A connection is idle until a whole request has arrived on it, and again when that is answered. So however many
    connections others hold open, a new client is served at once. asyncio's selector event loops call `accept`.
    """

    most = 128

    def __init__(self, family: int = -1, kind: int = -1, protocol: int = -1):
        super().__init__(family, kind, protocol)
        self.idle: dict[Client, socket.socket] = {}  # the one that was idle longest comes first
        self.busy: dict[Client, socket.socket] = {}
        self.ended: list[socket.socket] = []  # asyncio has not closed them yet

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection, as `socket.accept`. Raises BlockingIOError while others have yet to be closed."""
        self.ended = [connection for connection in self.ended if connection.fileno() >= 0]
        if len(self.ended) > AT_ONCE:
            raise BlockingIOError  # a flood takes no more file descriptors than needed
        try:
            connection, address = super().accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self.idle:
                raise
            self.end(next(iter(self.idle)))
            raise BlockingIOError from error  # the next time there is a file descriptor
        for held in (self.idle, self.busy):
            for client in [client for client, one in held.items() if one.fileno() < 0]:  # asyncio has closed it
                del held[client]
        self.idle[address[:2]] = connection
        while len(self.idle) > 1 and len(self.idle) + len(self.busy) > self.most:
            self.end(next(iter(self.idle)))
        return connection, address

    def begin(self, client: Client) -> bool:
        """A whole request is here: its connection is no longer idle. False where `most` others are busy already."""
        if client in self.idle:
            self.busy[client] = self.idle.pop(client)
        return len(self.busy) <= self.most

    def answered(self, client: Client) -> None:
        """A request is answered: its connection is idle from now on."""
        connection = self.busy.pop(client, None) or self.idle.pop(client, None)
        if connection is not None:
            self.idle[client] = connection

    def end(self, client: Client) -> None:
        """Close a connection for both sides, whatever still waits to be sent."""
        connection = self.idle.pop(client, None) or self.busy.pop(client, None)
        if connection is not None:
            self.ended.append(connection)
            with suppress(OSError):  # the other side was faster
                connection.shutdown(socket.SHUT_RDWR)


class Guard:
    """The application, guarded: what is refused never reaches it, and a fault inside it is logged as one line.

    host: the address that the server listens on. listener: where its connections come from. allowed_hosts: other names
    that clients reach it by, such as that of a proxy, each with or without a port.
    """

    def __init__(self, app: ASGIApp, host: str, listener: Listener, allowed_hosts: Collection[str] = ()):
        self.app, self.listener = app, listener
        self.allowed = {name.lower() for name in allowed_hosts}
        self.names = {*LOCAL_NAMES, host.lower(), socket.gethostname().lower(), *self.allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        client: Client = tuple(scope["client"])
        bounded, guarded = self._receiver(client, receive), self._sender(client, send)
        headers = {name: value.decode("latin-1").lower() for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        try:
            if (origin := headers.get(b"origin")) is not None and not self._is_own(origin, host):
                raise ApiError(403, _OTHER_ORIGIN, code="wrong_origin")
            if (length := headers.get(b"content-length", "")).isdigit() and int(length) > MAX_BODY:
                raise _too_long()
            if not _is_called_by_address(host) and not _is_one_of(host, self.names):
                told = f"this server is not called {host[:80]!r}: use its IP address, or start it with --allowed-hosts"
                raise ApiError(400, f"{told} and that name", code="wrong_host")
            await self.app(scope, bounded, guarded)
        except ApiError as error:
            await error_response(error)(scope, receive, guarded)
        except ClientDisconnect:
            pass  # nobody is there to be answered
        except Exception as error:  # a fault of ours: the line is for who runs the server, not for the client
            line = f"{scope['method']} {scope['path']!r} failed: {type(error).__name__}: {error}"
            log.error(line, exc_info="MINILORA_TRACEBACK" in os.environ)
        finally:
            self.listener.answered(client)

    def _is_own(self, origin: str, host: str) -> bool:
        """Whether a page is this server's: of the request's own host, or of an allowed one where a proxy changes that.

        A proxy may have added TLS, so that the page's scheme is https.
        """
        scheme, _, authority = origin.partition("://")
        return scheme in ("http", "https") and (authority == host or _is_one_of(authority, self.allowed))

    def _receiver(self, client: Client, receive: Receive) -> Receive:
        """`receive` for a body of limited size and time. Raises ApiError: 413, 408, or 503 where too many are busy."""
        deadline, size, whole = asyncio.get_running_loop().time() + BODY_SECONDS, 0, False

        async def bounded() -> Message:
            nonlocal size, whole
            if whole:  # what still comes is the client's leaving, which has no time
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise ApiError(408, f"the body did not arrive in {BODY_SECONDS:g} s") from error
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise _too_long()
            whole = not message.get("more_body", False)
            if whole and not self.listener.begin(client):
                raise ApiError(503, "too many connections: ask again soon", headers={"retry-after": "1"})
            return message

        return bounded

    def _sender(self, client: Client, send: Send) -> Send:
        """`send` with headers that forbid guessing and keeping. A client that does not read is let go."""

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_SAFE.items()]}
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await send(message)
            except TimeoutError as error:
                self.listener.end(client)
                raise ClientDisconnect from error

        return guarded


def _too_long() -> ApiError:
    return ApiError(413, f"the body is longer than the {MAX_BODY:,} bytes that are read")


def _is_one_of(authority: str, names: Collection[str]) -> bool:
    """Whether a host, with or without a port, is one of these names. A name that has a port is for this port alone.

    >>> [_is_one_of(host, {"box", "llm.example:8443"}) for host in ("box:80", "llm.example:8443", "llm.example")]
    [True, True, False]
    """
    return authority in names or authority.split(":")[0] in names


def _is_called_by_address(host: str) -> bool:
    """Whether a Host header is an IP address: nobody can give that as a name to lead others here.

    >>> [_is_called_by_address(host) for host in ("192.168.1.5:8000", "[::1]", "localhost", "[::1")]
    [True, True, False, False]
    """
    try:
        return bool(ipaddress.ip_address(urlsplit(f"//{host}").hostname or ""))
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can reach the server at this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
