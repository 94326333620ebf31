"""Strangers, floods, and clients that are slow, silent or gone: the right answer, and others never notice."""

import contextlib
import json
import socket
import struct
import time

import pytest
from serving import QUESTION, read_response, serving

from minilora.serve import bounds

LONG = {"model": "legal", "messages": QUESTION, "max_tokens": 900, "temperature": 2, "seed": 2, "stream": True}


def begin(served, fields):
    """A connection with a request sent, and a part of the answer read."""
    connection = served.connect()
    body = json.dumps(fields).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


# -- who may ask -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "evil.example:8000", "", "a@localhost",
                                  "localhost:x", "localhost, evil.example", "[::1", "xn--localhost"])  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/v1/models", "/nowhere"])
def test_another_host_is_refused(server, host, path):
    status, _, body = server.send("GET", path, host=host)
    assert status == 403 and json.loads(body)["error"]["code"] == "wrong_host"


@pytest.mark.parametrize("host", ["localhost", "localhost:1234", "LOCALHOST", "127.0.0.1", "[::1]:8000", "192.168.1.5"])
def test_names_of_this_machine_and_addresses_are_its_own(server, host):
    assert server.send("GET", "/health", host=host)[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://localhost:8000", "http://localhost:3000"])
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/chat/completions"), ("POST", "/adapters"),
                                              ("DELETE", "/adapters/legal"), ("GET", "/v1/models")])  # fmt: skip
def test_another_origin_is_refused(server, method, path, origin):
    status, headers, body = server.send(method, path, {}, host="localhost:8000", origin=origin)
    assert status == 403 and json.loads(body)["error"]["code"] == "wrong_origin"
    assert not any(name.startswith("access-control") for name in headers)


def test_its_own_page_may_ask(server):
    assert server.send("GET", "/v1/models", host="localhost:8000", origin="http://localhost:8000")[0] == 200


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.1.2.3", True), ("0.0.0.0", False), ("::", False),
     ("example.org", False)],
)  # fmt: skip
def test_which_addresses_only_this_machine_can_reach(host, local):
    assert bounds.is_loopback(host) == local


# -- how much ----------------------------------------------------------------------------------------------------------

HUNDRED = 100_000_000


def test_a_body_of_100_mb_is_refused_and_not_kept(server):
    with server.connect() as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {HUNDRED}\r\n\r\n"
        connection.sendall(head.encode())
        assert read_response(connection)[0] == 413  # before a byte of it was sent
        for _ in range(HUNDRED // 1_000_000):
            connection.sendall(bytes(1_000_000))


def test_a_body_of_100_mb_without_a_length_is_refused(server):
    with server.connect() as connection:
        connection.sendall(b"POST /adapters HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(HUNDRED // 1_000_000):
            connection.sendall(b"f4240\r\n" + bytes(1_000_000) + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        status, _, body = read_response(connection)
        assert status == 413 and "1,048,576 bytes" in json.loads(body)["error"]["message"]


def test_a_thousand_connections_at_once_are_bounded_and_who_is_answered_never_notices(shop):
    with serving(shop, shop, connections=50) as served:
        settings = {"temperature": 2, "seed": 5, "max_tokens": 300}
        asked = {"model": "legal", "messages": QUESTION, **settings}
        alone = json.loads(served.send("POST", "/v1/chat/completions", asked, connection="close")[2])
        running = begin(served, asked)
        served.until(running=1, waiting=0)
        many = [served.connect() for _ in range(1000)]
        refused = 0
        for connection in many[100:]:
            status, headers, body = read_response(connection)
            assert status == 503 and headers["retry-after"] == "1" and "too many connections" in body
            refused += 1
        answer = json.loads(read_response(running)[2])
        assert answer["choices"] == alone["choices"] and refused == 900
        for connection in [*many, running]:
            connection.close()
        served.until(running=0, waiting=0)
        for _ in range(100):  # the server learns of the ends one by one
            try:
                assert served.send("GET", "/health")[0] == 200
                break
            except (AssertionError, OSError):
                time.sleep(0.05)
        else:
            pytest.fail("nobody can ask any longer")


# -- how long ----------------------------------------------------------------------------------------------------------


def drip(connection, data, seconds):
    """One byte at a time until the data end or the other side has had enough."""
    for byte in data:
        try:
            connection.sendall(bytes([byte]))
        except OSError:
            return
        time.sleep(seconds)


def test_a_head_that_comes_byte_by_byte_has_a_time(shop, monkeypatch):
    monkeypatch.setattr(bounds, "HEAD_SECONDS", 0.3)
    with serving(shop, shop) as served, served.connect() as connection:
        began = time.monotonic()
        connection.settimeout(20)
        drip(connection, b"GET /health HTTP/1.1\r\nhost:", 0.02)
        status, _, body = read_response(connection)
        assert status == 408 and "head did not arrive in 0.3 s" in body and time.monotonic() - began < 15
        assert served.send("GET", "/health")[0] == 200


def test_who_says_nothing_is_let_go(shop, monkeypatch):
    monkeypatch.setattr(bounds, "HEAD_SECONDS", 0.2)
    with serving(shop, shop) as served, served.connect() as connection:
        assert read_response(connection)[0] == 408


def test_a_second_head_on_the_same_connection_has_its_time_too(shop, monkeypatch):
    monkeypatch.setattr(bounds, "HEAD_SECONDS", 0.3)
    with serving(shop, shop) as served, served.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        drip(connection, b"GET /health HTTP/1.1\r\nhost: localhost" + b"x" * 200, 0.01)
        connection.settimeout(10)
        with pytest.raises(ConnectionError):
            while connection.recv(4096):
                pass
            raise ConnectionError  # closed without an answer to half a head


def test_a_body_that_comes_byte_by_byte_has_a_time(shop, monkeypatch):
    monkeypatch.setattr(bounds, "BODY_SECONDS", 0.3)
    with serving(shop, shop) as served, served.connect() as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 500\r\n\r\n")
        drip(connection, b"{" + b" " * 30, 0.02)
        status, _, body = read_response(connection)
        assert status == 408 and "body did not arrive in 0.3 s" in body


def test_who_does_not_read_is_let_go(shop, monkeypatch):
    monkeypatch.setattr(bounds, "SEND_SECONDS", 0.3)
    with serving(shop, shop) as served:
        monkeypatch.setattr(served.app, "page", bytes(100_000_000))
        with served.connect() as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
            time.sleep(1)
            received = 0
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(1 << 20):
                    received += len(part)
            assert received < 90_000_000
        assert served.send("GET", "/health")[0] == 200


# -- who goes away -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("abrupt", [True, False])
def test_who_goes_away_in_mid_answer_frees_the_place(shop, stream, abrupt):
    with serving(shop, shop, slots=1) as served:
        alone = served.ask(max_new_tokens=8)
        connection = begin(served, LONG | {"stream": stream})
        served.until(running=1, waiting=0)
        if stream:
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
        if abrupt:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        served.until(running=0, waiting=0)
        assert served.ask(max_new_tokens=8) == alone
        assert served.said == []


def test_who_goes_away_while_waiting_frees_the_place_in_the_queue(shop):
    with serving(shop, shop, slots=1, waiting=1) as served:
        with served.held():
            connections = [begin(served, LONG) for _ in range(2)]
        served.until(running=1, waiting=1)
        connections[1].close()
        served.until(running=1, waiting=0)
        connections[0].close()
        served.until(running=0, waiting=0)


def test_others_go_on_unchanged_when_one_goes_away(shop):
    with serving(shop, shop) as served:
        alone = served.ask("support", max_new_tokens=200)
        with served.held():
            leaving = begin(served, LONG)
            staying = begin(served, LONG | {"model": "support", "max_tokens": 200, "temperature": 0, "stream": False})
        served.until(running=2, waiting=0)
        leaving.close()
        answer = json.loads(read_response(staying)[2])
        staying.close()
        assert answer["choices"][0]["message"]["content"] == alone[0]


def test_what_is_no_http_is_answered_and_over(server):
    with server.connect() as connection:
        connection.sendall(b"\x16\x03\x01\x00\xa5 hello\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 400"


def test_every_answer_forbids_guessing_and_keeping(server):
    for path in ("/", "/health", "/nowhere"):
        headers = server.send("GET", path)[1]
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        assert "server" not in headers
