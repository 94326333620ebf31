"""`minilora serve`: a base and its adapters over HTTP, for a page in the browser and OpenAI's clients."""

import argparse
import re
import threading
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..generate.conversation import MAX_NEW_TOKENS
from ..options import add_flags, check, from_flags, option
from ..progress import log
from .asking import Answering, read_context
from .shared import adapters

HELP = "serve a base and its adapters over HTTP: a page in the browser, and OpenAI's API"
_HOST = re.compile(r"[A-Za-z0-9._-]+(:[0-9]+)?")
_LIMITS: dict[str, Any] = {"group": "limits"}


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Answering):
    """What is served, to whom, and how much at a time. Raises ValueError for values that are not possible."""

    demo: bool = option(
        False, "serve eight adapters of the tiny base, which are trained first if they are missing, and open the page"
    )
    no_open: bool = option(False, "with --demo: do not open the page in a browser")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines reach it")
    allowed_hosts: Sequence[str] = option(
        (),
        "other host names under which clients reach it, as behind a proxy or in a container; any IP address is allowed",
        metavar="NAME[:PORT]",
    )
    port: int = option(8000, "port to listen on; 0 takes a free one", least=0, most=65535)

    slots: int = option(16, "answers that are computed at the same time; further ones wait", least=1, **_LIMITS)
    queue: int = option(64, "answers that may wait; further ones are refused", least=0, **_LIMITS)
    context_length: int = option(
        2048, "tokens of a conversation and its answer, at most what the model can see", least=2, **_LIMITS
    )
    max_new_tokens: int = option(MAX_NEW_TOKENS, "tokens of an answer, if the request does not say", least=1, **_LIMITS)
    connections: int = option(128, "open connections; beyond that, the one idle longest is closed", least=1, **_LIMITS)

    def __post_init__(self):
        if self.demo and (self.adapter or self.base):
            raise ValueError("--demo has its own base and adapters: leave out --adapter and --base, or --demo")
        if (self.context or "").isdecimal():
            raise ValueError("--context is a file of passages; the number of tokens is --context-length")
        if wrong := [name for name in self.allowed_hosts if not _HOST.fullmatch(name)]:
            raise ValueError(
                f"--allowed-hosts {wrong[0]}: expected a name as in llm.example.com or llm.example.com:8443"
            )
        check(self)


def add(parser: argparse.ArgumentParser) -> None:
    """The flags are the fields of ServeOptions."""
    add_flags(parser, ServeOptions)
    parser.epilog = (
        "Where a request gives no temperature, it is 0, unlike OpenAI's 1: the same question has the same answer, and "
        "n answers are equal. An answer that was cut to fit a schema within max_tokens has the finish_reason length."
    )


def run(arguments: argparse.Namespace) -> None:
    """Load, listen and answer until Ctrl-C; with --demo, train the adapters that are missing first.

    Raises ValueError or OSError for what cannot be served, KeyboardInterrupt when a second Ctrl-C stopped answers.
    """
    options = from_flags(ServeOptions, arguments)
    named = adapters(options.adapter)
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise RuntimeError(f"minilora serve needs {' and '.join(missing)}: pip install 'minilora[serve]'")
    from ..serve.app import App
    from ..serve.bounds import is_loopback
    from ..serve.engine import Engine
    from ..serve.server import Server, bind
    from .demo import demo_folders

    with bind(options.host, options.port, options.connections) as listener:  # first: the rest may take minutes
        base = options.base
        if options.demo:
            base, named = demo_folders()
        model, tokenizer = options.load(named, base)
        with Engine(model, tokenizer, options.slots, options.queue, options.context_length) as engine:
            handbook = read_context(options.context, model, tokenizer, options.max_new_tokens, engine.context)
            app = App(engine, Path.cwd(), options.max_new_tokens, handbook)
            server = Server(app, options.host, listener, options.allowed_hosts)
            listener.listen()
            address = f"http://{_reachable(options.host)}:{listener.getsockname()[1]}"
            names = ", ".join(engine.versions)
            log.info(f"{names}: {address} (the page), {address}/v1 (for OpenAI's clients); Ctrl-C ends")
            if not is_loopback(options.host):
                log.info("warning: other machines can reach it, and load and remove adapters, without a password")
            if options.demo and not options.no_open:
                threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
            server.run()


def _reachable(host: str) -> str:
    """An address at which a server that listens on `host` answers, as it is written in a URL."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1" if host == "0.0.0.0" else "[::1]"
    return f"[{host}]" if ":" in host else host
