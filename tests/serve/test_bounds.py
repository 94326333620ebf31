"""Strangers, floods, and clients that are slow, silent or gone: the right answer, and others never notice."""

import asyncio
import contextlib
import errno
import json
import socket
import struct
import time
from types import SimpleNamespace

import pytest
from serving import QUESTION, read_response, running, serving

from minilora.serve import bounds
from minilora.serve.server import Server, bind

LONG = {"model": "legal", "messages": QUESTION, "max_tokens": 900, "temperature": 2, "seed": 2, "stream": True}


@pytest.fixture(scope="module")
def served(shop):
    """A server that tests may load, but leave without an answer under way."""
    with serving(shop, shop, slots=1, waiting=1, connections=8) as served:
        yield served
        assert served.said == []


# -- who may ask -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "evil.example:8000", "", "a@localhost",
                                  "localhost, evil.example", "[::1", "xn--localhost"])  # fmt: skip
def test_another_host_is_refused(server, host):
    for path in ("/", "/v1/models", "/nowhere"):
        status, headers, body = server.send("GET", path, host=host)
        assert status == 400 and headers["x-content-type-options"] == "nosniff"
        said = json.loads(body)["error"]
        assert said["code"] == "wrong_host" and repr(host) in said["message"] and "--allowed-hosts" in said["message"]


@pytest.mark.parametrize("host", ["localhost", "localhost:1234", "LOCALHOST", "127.0.0.1", "[::1]:8000", "192.168.1.5"])
def test_names_of_this_machine_and_addresses_are_its_own(server, host):
    assert server.send("GET", "/health", host=host)[0] == 200


def statuses(started, requests):
    """The status that a guard answers requests, each its headers, with. started: its host, then the allowed ones."""

    async def noted(message):
        sent.append(message)

    async def answers(scope, receive, send):
        await send({"type": "http.response.start", "status": 204, "headers": []})

    sent, listener = [], bounds.Listener()
    guard = bounds.Guard(answers, started[0], listener, started[1:])
    for headers in requests:
        given = [(name.encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "client": ["127.0.0.1", 1], "headers": given, "scheme": "http"}
        asyncio.run(guard(scope, None, noted))
    listener.close()
    return [message["status"] for message in sent if "status" in message]


def test_the_name_that_it_was_started_with_and_the_machines_are_its_own_as_well(monkeypatch):
    monkeypatch.setattr(bounds.socket, "gethostname", lambda: "Annas-Mac.local")
    hosts = ("box.example:8000", "BOX.EXAMPLE", "annas-mac.local:8000", "other.example")
    assert statuses(["Box.example"], [{"host": host} for host in hosts]) == [204, 204, 204, 400]


ALLOWED = ["0.0.0.0", "LLM.example", "minilora", "box.example:8443"]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 204) for host in ("llm.example", "llm.example:443", "Minilora:8768", "box.example:8443", "localhost")),
        *((host, 400) for host in ("box.example", "box.example:80", "a.llm.example", "llm.example.evil", "evil", "")),
    ],
)
def test_the_names_that_it_may_be_called_by_are_its_own_as_well(host, status):
    assert statuses(ALLOWED, [{"host": host}]) == [status]


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        *((origin, 204) for origin in ("https://llm.example", "http://minilora:8768", "https://127.0.0.1:8768")),
        *((origin, 403) for origin in ("https://evil", "https://box.example", "ftp://llm.example", "https://", "null")),
    ],
)
def test_its_own_page_may_ask_behind_a_proxy_that_gives_another_host(origin, status):
    assert statuses(ALLOWED, [{"host": "127.0.0.1:8768", "origin": origin}]) == [status]


def test_a_name_that_leads_here_is_refused_whatever_its_page_says():
    evil = [{"host": "evil.example:8000", "origin": f"{scheme}://evil.example:8000"} for scheme in ("http", "https")]
    assert statuses(ALLOWED, evil) == [400, 400]  # DNS rebinding


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://localhost:3000", "http://localhost:3000"])
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/chat/completions"), ("POST", "/adapters"),
                                              ("DELETE", "/adapters/legal"), ("GET", "/v1/models")])  # fmt: skip
def test_another_origin_is_refused(server, method, path, origin):
    status, headers, body = server.send(method, path, {}, host="localhost:8000", origin=origin)
    said = json.loads(body)["error"]
    assert status == 403 and said["code"] == "wrong_origin" and "--allowed-hosts" in said["message"]
    assert not any(name.startswith("access-control") for name in headers)


@pytest.mark.parametrize("scheme", ["http", "https"])  # of a proxy that adds TLS
def test_its_own_page_may_ask(server, scheme):
    assert server.send("GET", "/v1/models", host="localhost:8000", origin=f"{scheme}://localhost:8000")[0] == 200


def test_which_addresses_only_this_machine_can_reach():
    assert all(map(bounds.is_loopback, ("127.0.0.1", "localhost", "::1", "127.1.2.3")))
    assert not any(map(bounds.is_loopback, ("0.0.0.0", "::", "example.org")))


# -- how much ----------------------------------------------------------------------------------------------------------

MUCH = 20_000_000


def test_a_body_of_20_mb_is_refused_and_not_kept(server):
    with server.connect() as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {MUCH}\r\n\r\n"
        connection.sendall(head.encode())
        assert read_response(connection)[0] == 413  # before a byte of it was sent
        for _ in range(MUCH // 1_000_000):
            connection.sendall(bytes(1_000_000))


def test_a_body_of_20_mb_without_a_length_is_refused(server):
    with server.connect() as connection:
        connection.sendall(b"POST /adapters HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(MUCH // 1_000_000):
            connection.sendall(b"f4240\r\n" + bytes(1_000_000) + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        status, _, body = read_response(connection)
        assert status == 413 and "1,048,576 bytes" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "sent", [b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 100_000, b"\x16\x03\x01\x00 hello\r\n\r\n"],
    ids=["a head that does not end", "no HTTP"],
)  # fmt: skip
def test_what_is_no_request_is_refused(server, sent):
    with server.connect() as connection:
        connection.sendall(sent)
        assert connection.recv(12) == b"HTTP/1.1 400"


# -- how many ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent", [b"", b"GET /he", b"POST /adapters HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{"]
)
def test_idle_connections_never_keep_a_new_client_out(served, sent):
    many = [served.connect() for _ in range(300)]
    for connection in many[-8:]:  # the others are closed already
        connection.sendall(sent)
    began = time.monotonic()
    assert served.send("GET", "/health", connection="close")[0] == 200
    assert time.monotonic() - began < 1
    for connection in many:
        connection.close()


def full(listener):
    raise OSError(errno.EMFILE, "full")


def test_a_new_connection_takes_the_file_descriptor_of_the_one_that_was_idle_longest(monkeypatch):
    with bind("127.0.0.1", 0) as listener, contextlib.ExitStack() as opened:
        listener.listen()
        clients = [opened.enter_context(socket.create_connection(listener.getsockname())) for _ in range(3)]
        accepted = [opened.enter_context(listener.accept()[0]) for _ in clients]
        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "accept", full)
            with pytest.raises(BlockingIOError):
                listener.accept()
            assert [gone(client) for client in clients] == [True, False, False]
            listener.idle.clear()
            with pytest.raises(OSError, match="full"):
                listener.accept()
        assert len(accepted) == 3


def test_no_more_are_accepted_while_many_are_being_closed():
    with bind("127.0.0.1", 0, 1) as listener, contextlib.ExitStack() as opened:
        listener.listen()
        listener.setblocking(False)
        many = [opened.enter_context(socket.create_connection(listener.getsockname())) for _ in range(40)]
        accepted = []
        with pytest.raises(BlockingIOError):
            while True:
                accepted.append(opened.enter_context(listener.accept()[0]))
        assert bounds.AT_ONCE < len(accepted) < bounds.AT_ONCE + 4 < len(many)
        for connection in accepted:
            connection.close()
        opened.enter_context(listener.accept()[0])


def test_a_client_closes_its_idle_connections_before_the_server_does(server):
    openai = pytest.importorskip("openai", reason="needs pip install '.[test-serve]'")
    with bounds.Listener() as listener:
        kept = Server(server.app, "127.0.0.1", listener).config.timeout_keep_alive
    assert kept > 10 * openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry  # or a request meets a connection that ends


def test_idle_connections_that_were_answered_before_keep_nobody_out_either(served):
    many = []
    for _ in range(20):
        many.append(served.connect())
        many[-1].sendall(b"POST /adapters HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}")
        assert many[-1].recv(12) == b"HTTP/1.1 400"
    assert sum(gone(connection) for connection in many) >= 12
    for connection in many:
        connection.close()


def gone(connection):
    """Whether the server has closed a connection: now, or within a moment."""
    connection.settimeout(0.05)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def test_as_many_requests_as_connections_are_served_and_the_next_is_told_to_come_again(shop, monkeypatch):
    with serving(shop, shop, connections=4) as served:
        monkeypatch.setattr(served.engine.streams, "step", endless_after(served, 0))
        first = [served.begin(LONG) for _ in range(4)]
        served.until(running=4, waiting=0)
        status, headers, body = served.send("POST", "/v1/chat/completions", LONG)
        assert status == 503 and headers["retry-after"] == "1" and "too many connections" in body
        many = [served.connect() for _ in range(50)]
        assert served.send("GET", "/health", connection="close")[0] == 200
        served.until(running=4, waiting=0)  # an answer under way is never given up for others
        for connection in [*first, *many]:
            connection.close()
        served.until(running=0, waiting=0)


# -- how long ----------------------------------------------------------------------------------------------------------


def test_a_body_that_comes_byte_by_byte_has_a_time(served, monkeypatch):
    monkeypatch.setattr(bounds, "BODY_SECONDS", 0.3)
    with served.connect() as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 500\r\n\r\n")
        with contextlib.suppress(OSError):  # the other side has had enough
            for _ in range(30):
                connection.sendall(b" ")
                time.sleep(0.02)
        status, _, body = read_response(connection)
        assert status == 408 and "body did not arrive in 0.3 s" in body


def test_a_client_that_does_not_read_is_let_go(monkeypatch):
    monkeypatch.setattr(bounds, "SEND_SECONDS", 0.3)
    ended, sent = [], []

    async def pours(scope, receive, send):
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": bytes(1_000_000), "more_body": True})
                sent.append(1_000_000)
        finally:
            ended.append(scope["path"])

    with (
        running(SimpleNamespace(asgi=lambda: pours)) as port,
        socket.create_connection(("127.0.0.1", port), timeout=10) as connection,
    ):
        connection.sendall(b"GET /all HTTP/1.1\r\nhost: localhost\r\n\r\n")
        while not ended:
            time.sleep(0.01)
        time.sleep(0.1)
        received = 0
        while part := connection.recv(1 << 20):
            received += len(part)
        assert 0 < received < sum(sent)  # what waited to be sent is given up, too


def test_a_client_that_reads_slowly_but_reads_is_served_to_the_end(monkeypatch):
    monkeypatch.setattr(bounds, "SEND_SECONDS", 0.2)

    async def slow(message):
        await asyncio.sleep(0.1)
        sent.append(message["type"])

    async def answers(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for more in (True, True, True, True, False):
            await send({"type": "http.response.body", "body": b"x", "more_body": more})

    sent, listener = [], bounds.Listener()
    scope = {"type": "http", "client": ["127.0.0.1", 1], "headers": [(b"host", b"localhost")], "scheme": "http"}
    asyncio.run(bounds.Guard(answers, "127.0.0.1", listener)(scope, None, slow))  # 0.6 s, each part below 0.2 s
    listener.close()
    assert len(sent) == 6


# -- who goes away -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("abrupt", [True, False])
def test_a_client_that_goes_away_in_mid_answer_frees_its_place(served, stream, abrupt):
    alone = served.ask(max_new_tokens=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.engine.streams, "step", endless_after(served, 4))
        connection = served.begin(LONG | {"stream": stream, "n": 2})
        served.until(running=1, waiting=1)
        if stream:
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
        if abrupt:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        served.until(running=0, waiting=0)
    assert served.ask(max_new_tokens=8) == alone


def endless_after(served, steps):
    """A step that gives answers some tokens and then no more: only a request that is cancelled frees its place."""
    step, left = served.engine.streams.step, iter(range(steps))
    return lambda: step() if next(left, None) is not None else time.sleep(0.001)


def test_a_client_that_goes_away_while_waiting_frees_its_place_in_the_queue(served, monkeypatch):
    monkeypatch.setattr(served.engine.streams, "step", endless_after(served, 0))
    connections = [served.begin(LONG)]
    served.until(running=1, waiting=0)
    connections.append(served.begin(LONG))
    served.until(running=1, waiting=1)
    connections[1].close()
    served.until(running=1, waiting=0)
    connections[0].close()
    served.until(running=0, waiting=0)


def test_every_answer_forbids_guessing_and_keeping(server):
    for path in ("/", "/health", "/nowhere"):
        headers = server.send("GET", path)[1]
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        assert "server" not in headers
