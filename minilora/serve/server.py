"""A socket to listen on, and uvicorn's server on it."""

import asyncio
import signal
import socket
from collections.abc import Collection
from types import FrameType

import uvicorn

from ..progress import log
from .app import App
from .bounds import Guard, Listener

MAX_HEAD = 1 << 16  # bytes of a request's line and headers
KEEP_ALIVE = 120  # seconds until another request follows on the same connection: more than clients keep theirs open


class Server(uvicorn.Server):
    """uvicorn's server of an application, for a listener that is bound to `host`. allowed_hosts: as for `Guard`."""

    def __init__(self, app: App, host: str, listener: Listener, allowed_hosts: Collection[str] = ()):
        self.listener = listener
        config = uvicorn.Config(
            Guard(app.asgi(), host, listener, allowed_hosts),
            http="h11",
            ws="none",
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE,
            h11_max_incomplete_event_size=MAX_HEAD,
            log_config=None,
            log_level="critical",  # what goes wrong is logged by the guard, as one line
            access_log=False,
            proxy_headers=False,
            server_header=False,
        )
        super().__init__(config)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until Ctrl-C. Raises KeyboardInterrupt when a second one has stopped answers."""
        try:
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:  # whose sockets `accept`
                runner.run(self.serve(sockets or [self.listener]))
        except KeyboardInterrupt:  # raised again by uvicorn at its end
            if self.force_exit:
                raise

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ctrl-C or SIGTERM: answers under way run to their end; a second Ctrl-C stops them."""
        super().handle_exit(sig, frame)
        if not self.force_exit:
            again = "; Ctrl-C again stops them" if sig == signal.SIGINT else ""
            log.info(f"ending when all answers have ended{again}")


def bind(host: str, port: int, connections: int = Listener.most) -> Listener:
    """A socket that listens. Raises OSError, saying what to do."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise OSError(f"--host {host}: no address of that name ({error.strerror or error})") from error
    listener = Listener(family, kind, protocol)
    listener.most = connections
    try:
        if hasattr(socket, "SO_REUSEPORT"):  # not Windows, where REUSEADDR means something else
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        why = f"cannot listen on port {port} of {host} ({error.strerror}): choose another --port, 0 for a free one"
        raise OSError(why) from error
    return listener
