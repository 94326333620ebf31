"""A server at work in this process, for tests that ask it over a socket."""

import contextlib
import json
import logging
import socket
import threading
import time

import pytest

pytest.importorskip("starlette", reason="needs pip install '.[serve]'")
pytest.importorskip("uvicorn", reason="needs pip install '.[serve]'")

from minilora.models.with_adapters import load_with_adapters
from minilora.serve.app import App
from minilora.serve.engine import Engine
from minilora.serve.protocol import Request
from minilora.serve.server import Server, bind

HEARING = []  # what the terminals of all servers at work have shown; a line is that of the last one
QUESTION = [{"role": "user", "content": "hello"}]


class Served:
    """engine, app, address, port; `said`: what a terminal would have shown."""

    def __init__(self, engine, app, port, said):
        self.engine, self.app, self.port, self.said = engine, app, port, said
        self.address = f"http://127.0.0.1:{port}"

    def client(self):
        """OpenAI's own, which does not ask again by itself."""
        import openai

        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=60)

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def send(self, method, path, body=None, **headers):
        """Status, headers and body of an answer to a request; body: bytes, or what becomes JSON."""
        body = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        given = {"host": f"127.0.0.1:{self.port}", "content-length": len(body)} | headers
        lines = [
            f"{method} {path} HTTP/1.1",
            *(f"{name}: {value}" for name, value in given.items() if value is not None),
        ]
        with self.connect() as connection:
            connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
            return read_response(connection)

    def begin(self, fields):
        """A connection on which a conversation is sent, and nothing of the answer is read."""
        connection, body = self.connect(), json.dumps(fields).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection

    def ask(self, model="legal", max_new_tokens=64, **fields):
        """An answer as the engine's thread alone would give it: text, tokens, how it ended."""
        pieces, done = [], threading.Event()

        def tell(piece):
            pieces.append(piece)
            if piece.finished or piece.error:
                done.set()

        request = Request(QUESTION, model, max_new_tokens, **fields)
        self.engine.call(lambda: self.engine.ask(request, tell)).result(30)
        assert done.wait(60)
        return "".join(piece.text for piece in pieces), pieces[-1].tokens, pieces[-1].finished

    def until(self, **state):
        """Wait until so many run, and so many wait."""
        wait_until(self.engine.state, state)

    def until_said(self, *lines):
        """Wait until a terminal would have shown these lines: a fault is logged after the client has its answer."""
        wait_until(lambda: tuple(self.said), lines)


def wait_until(look, wanted):
    end = time.monotonic() + 30
    while look() != wanted:
        assert time.monotonic() < end, look()
        time.sleep(0.005)


def read_response(connection):
    """Status, headers by name, and body of the one response on a connection."""
    with connection.makefile("rb") as file:
        status = int(file.readline().split()[1])
        headers = {}
        while line := file.readline().strip():
            name, _, value = line.decode().partition(": ")
            headers[name.lower()] = value
        length = headers.get("content-length")
        return status, headers, file.read(int(length) if length else -1).decode()


@contextlib.contextmanager
def running(app, connections=128):
    """The port of a server of an application, at work in a thread."""
    with bind("127.0.0.1", 0, connections) as listener:
        listener.listen()
        server = Server(app, "127.0.0.1", listener)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


@contextlib.contextmanager
def serving(shop, start, adapters=("legal", "support"), connections=128, default_limit=16, **bounds):
    """The shop, served. start: the folder that it was started in."""
    said = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: said.append(record.getMessage()) if HEARING[-1] is said else None
    HEARING.append(said)
    model, tokenizer = load_with_adapters({name: shop / name for name in adapters}, shop / "base")
    logging.getLogger("minilora").addHandler(handler)
    try:
        with Engine(model, tokenizer, **bounds) as engine:
            app = App(engine, start, default_limit)
            with running(app, connections) as port:
                yield Served(engine, app, port, said)
    finally:
        logging.getLogger("minilora").removeHandler(handler)
        HEARING[:] = [one for one in HEARING if one is not said]
