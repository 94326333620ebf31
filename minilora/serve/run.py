"""`minilora serve`: from the options to a server that ends well."""

from __future__ import annotations

import signal
import socket
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from ..models.load import dtype_of
from ..models.versions import load_versions, named_folders
from .app import App
from .bounds import bounded_protocol, is_loopback
from .engine import Engine
from .options import ServeOptions


class Server(uvicorn.Server):
    """uvicorn's server, which says what it does when it is to end. ready: called when it listens."""

    def __init__(self, config: uvicorn.Config, say: Callable[[str], None], ready: Callable[[], None] = lambda: None):
        super().__init__(config)
        self.say, self.ready = say, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; then it is ready."""
        await super().startup(sockets)
        self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ctrl-C: answers under way run to their end; a second one stops them."""
        super().handle_exit(sig, frame)
        if not self.force_exit and sig == signal.SIGINT:
            self.say("ending when all answers have; Ctrl-C again stops them")


def new_server(
    app: App, host: str, connections: int, say: Callable[[str], None], ready: Callable[[], None] = lambda: None
) -> Server:
    """A server of an application, for a socket that is bound to `host`."""
    config = uvicorn.Config(
        app.asgi(host, say),
        http=bounded_protocol(connections),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",  # what goes wrong is said by the guard, in a line
        access_log=False,
        proxy_headers=False,
        server_header=False,
    )
    return Server(config, say, ready)


def run(
    options: ServeOptions,
    say: Callable[[str], None],
    demo: Callable[[Callable[[str], None]], tuple[str, dict[str, Path]]],
) -> None:
    """Load, listen, answer, until Ctrl-C.

    demo: makes the base and the folders that --demo serves.

    Raises ValueError or OSError for what cannot be served, KeyboardInterrupt when answers were stopped.
    """
    named = named_folders(options.adapter)
    listener = bind(options.host, options.port)  # first: what follows may take minutes
    with listener:
        base = options.base
        if options.demo:
            base, named = demo(say)
        model, tokenizer = load_versions(
            named, base, options.quantized, options.device, options.force, say, dtype_of(options.bf16)
        )
        address = f"http://{_in_address(options.host)}:{listener.getsockname()[1]}"

        def ready() -> None:
            names = ", ".join(engine.versions)
            say(f"{names}: {address} (the page), {address}/v1 (for OpenAI's clients); Ctrl-C ends")
            if not is_loopback(options.host):
                say("warning: others can reach it, and nobody is asked for a password")
            if options.demo and not options.no_open:
                threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()

        with Engine(model, tokenizer, options.slots, options.queue, options.context, say) as engine:
            app = App(engine, Path.cwd(), options.max_new_tokens)
            server = new_server(app, options.host, options.connections, say, ready)
            try:
                server.run(sockets=[listener])
            except KeyboardInterrupt:  # raised again by uvicorn at its end
                if server.force_exit:
                    raise


def bind(host: str, port: int) -> socket.socket:
    """A socket with an address, that does not listen yet. Raises OSError, saying what to do."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise OSError(f"--host {host}: no address of that name ({error.strerror or error})") from error
    listener = socket.socket(family, kind, protocol)
    try:
        if hasattr(socket, "SO_REUSEPORT"):  # not Windows, where REUSEADDR means something else
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        why = f"cannot listen on port {port} of {host} ({error.strerror}): choose another --port, 0 for a free one"
        raise OSError(why) from error
    return listener


def _in_address(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1" if host == "0.0.0.0" else "[::1]"
    return f"[{host}]" if ":" in host else host
