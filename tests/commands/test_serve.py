"""The command: what it says when it starts, how it ends, what it refuses, and the demo."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from commandline import complaint, status
from serving import QUESTION, Served, read_response

from minilora.commands import demo, serve
from minilora.lora.peft import WEIGHTS_FILE
from minilora.serve.app import App
from minilora.serve.bounds import Guard
from minilora.serve.protocol import Request
from minilora.serve.server import Server


class Process:
    """`minilora serve` in its own process, and the lines that it has said."""

    def __init__(self, shop, start, *flags):
        command = [sys.executable, "-m", "minilora", "serve", "--base", shop / "base", "--port", "0"]
        command += ["--adapter", f"legal={shop / 'legal'}", *flags]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [str(word) for word in command], cwd=start, env=environment, stderr=subprocess.PIPE, text=True
        )
        self.first = self.process.stderr.readline()
        assert "http://" in self.first, self.first + self.process.stderr.read()
        self.served = Served(None, None, int(self.first.partition("127.0.0.1:")[2].split()[0]), [])

    def begin(self, tokens, **more):
        """A connection on which an answer begins."""
        asked = {"model": "legal", "messages": QUESTION, "max_tokens": tokens, "temperature": 2, "seed": 1}
        return self.served.begin(asked | more)

    def running(self):
        return json.loads(self.served.send("GET", "/health")[2])["running"]

    def end(self, seconds=60):
        _, said = self.process.communicate(timeout=seconds)
        return self.process.returncode, said


@pytest.fixture
def process(shop, tmp_path):
    started = []

    def start(*flags):
        started.append(Process(shop, tmp_path, *flags))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait(30)
        one.process.stderr.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C goes another way there")
@pytest.mark.parametrize(("sent", "code", "more"), [(signal.SIGINT, 0, "; Ctrl-C again stops them"),
                                                   pytest.param(15, -15, "", marks=pytest.mark.long)])  # fmt: skip
def test_ctrl_c_and_sigterm_let_running_answers_end(process, sent, code, more):
    one = process()
    assert one.first.startswith("base, legal: http://127.0.0.1:") and "Ctrl-C ends" in one.first
    connection = one.begin(400)
    while not one.running():
        time.sleep(0.01)
    one.process.send_signal(sent)
    given, _, body = read_response(connection)
    connection.close()
    answer = json.loads(body)
    assert given == 200 and answer["choices"][0]["finish_reason"] in ("stop", "length")
    assert one.end() == (code, f"ending when all answers have ended{more}\n")
    with pytest.raises(OSError):
        one.served.connect()


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C goes another way there")
def test_a_second_ctrl_c_stops_them(process):
    one = process()
    asked = [one.begin(900, stream=True) for _ in range(3)]
    while not one.running():
        time.sleep(0.01)
    one.process.send_signal(signal.SIGINT)
    line = one.process.stderr.readline()
    one.process.send_signal(signal.SIGINT)
    code, said = one.end(20)
    for connection in asked:
        connection.close()
    assert line.startswith("ending when") and (code, said) == (130, "\nminilora: interrupted\n")


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(shop, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert status("serve", "--base", shop / "base", "--port", port) == 1
    said = complaint(capsys)
    assert f"cannot listen on port {port} of 127.0.0.1" in said and "choose another --port" in said


def test_a_host_that_is_none(capsys):
    assert status("serve", "--base", "tiny", "--host", "nowhere.invalid") == 1
    assert "--host nowhere.invalid: no address of that name" in complaint(capsys)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--adapter", "legal=a", "--adapter", "legal=b"], "two adapters are called 'legal'"),
        (["--adapter", "base=a"], "'base' is the model without an adapter"),
        (["--demo", "--adapter", "a"], "--demo has its own base and adapters"),
        (["--allowed-hosts", "*"], "--allowed-hosts *: expected a name as in llm.example.com"),
        (["--allowed-hosts", "a.example", "https://b.example"], "--allowed-hosts https://b.example: expected a name"),
        (["--port", "70000"], "port must be from 0 to 65535"),
        (["--context", "2048"], "--context is a file of passages; the number of tokens is --context-length"),
    ],
)
def test_what_means_nothing_is_refused(flags, said, capsys):
    assert status("serve", *flags) == 2
    assert said in complaint(capsys)


def test_the_help_says_where_defaults_differ_from_openais(capsys):
    assert status("serve", "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"no temperature, it is {Request(QUESTION).temperature:g}, unlike OpenAI's 1" in said
    assert "cut to fit a schema within max_tokens has the finish_reason length" in said


def test_packages_that_are_missing_are_named(monkeypatch, capsys):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert status("serve", "--base", "tiny") == 1
    assert complaint(capsys) == "minilora serve needs starlette and uvicorn: pip install 'minilora[serve]'"


@pytest.mark.parametrize("command", [("serve", "--port", "0"), ("chat", "--prompt", "hello")])
@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no such data file"), (b"", "the file is empty"), (b"\xff\xe9", "cannot be read as UTF-8"),
     (b"owl " * 200, "paragraph 1 makes a prompt of")],
)  # fmt: skip
def test_a_context_that_cannot_be_used_is_one_line(command, content, said, shop, tmp_path, capsys):
    path = tmp_path / "book.txt"
    if content is not None:
        path.write_bytes(content)
    assert status(*command, "--base", shop / "base", "--context", path) == 1
    assert f"{path}: " in (line := complaint(capsys)) and said in line


@pytest.mark.parametrize("command", ["serve", "chat", "predict"])
def test_an_answer_takes_room_from_the_passages(command, shop, tmp_path, opened, capsys):
    book, asked = tmp_path / "book.txt", tmp_path / "asked.txt"
    book.write_text("Owls eat mice. " * 56)
    asked.write_text("hello")
    words = {"serve": ["--port", 0], "chat": ["--prompt", "hello"], "predict": [asked]}[command]
    flags = [*words, "--base", shop / "base", "--context", book]
    for others in ([], ["--adapter", shop / "legal"]):
        capsys.readouterr()
        assert status(command, *flags, *others) == 1
        assert "there is room for 768 before an answer of 256: " in (line := complaint(capsys))
        assert line.endswith("divide it into shorter passages, or give fewer --max-new-tokens")
        assert status(command, *flags, *others, "--max-new-tokens", 2) == 0
    assert status(command, *flags, "--max-new-tokens", 1024) == 2


@pytest.fixture
def opened(monkeypatch):
    """Servers end when they have started; the addresses that a browser was sent to."""
    opened = []
    monkeypatch.setattr(serve.webbrowser, "open", opened.append)
    monkeypatch.setattr(Server, "run", lambda self: None)
    return opened


def joined(opened):
    for thread in threading.enumerate():
        if thread.name.startswith("Thread") and thread.daemon:
            thread.join(5)
    return opened


def test_the_user_is_warned_if_others_can_reach_the_server(shop, opened, capsys):
    assert status("serve", "--base", shop / "base", "--host", "0.0.0.0", "--port", 0) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert "http://127.0.0.1:" in first
    assert second == "warning: other machines can reach it, and load and remove adapters, without a password"


def test_the_limits_are_those_that_were_given_and_the_names_of_the_hosts_reach_the_guard(shop, opened, monkeypatch):
    made = {App: [], Guard: []}
    for kind, usual in ((App, App.__init__), (Guard, Guard.__init__)):
        own = lambda self, *given, usual=usual, kind=kind: made[kind].append(self) or usual(self, *given)
        monkeypatch.setattr(kind, "__init__", own)
    limits = ["--slots", 3, "--queue", 5, "--context-length", 99, "--max-new-tokens", 7]
    names = ["--allowed-hosts", "llm.example.com", "minilora:8768", "--allowed-hosts", "box_1"]
    assert status("serve", "--base", shop / "base", "--port", 0, *limits, *names) == 0
    (app,), (guard,) = made.values()
    assert (app.engine.slots, app.engine.waiting, app.engine.context, app.default_limit) == (3, 5, 99, 7)
    assert {"llm.example.com", "minilora:8768", "box_1", "localhost"} <= guard.names


@pytest.mark.long
def test_the_demo_trains_what_is_missing_once_and_opens_the_page(tmp_path, monkeypatch, opened, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "STEPS", 1)
    monkeypatch.setattr("minilora.train.job.run_picture", lambda metrics, path: path.touch())
    monkeypatch.setattr(demo, "DOMAINS", ("legal",))
    monkeypatch.setattr(demo, "SKILLS", ("support-labels", "support-fields"))
    (tmp_path / "runs" / "demo-legal.partial").mkdir(parents=True)  # what a demo leaves that was interrupted
    (tmp_path / "runs" / "demo-legal.partial" / WEIGHTS_FILE).write_bytes(b"")
    assert status("serve", "--demo", "--port", 0) == 0
    said = capsys.readouterr().err.splitlines()
    told = [line for line in said if line.startswith("training") and line.endswith(")")]
    names = ["legal", "support-labels", "support-fields"]
    assert told == [f"training {name} on the tiny base ({i} of 3)" for i, name in enumerate(names, 1)]
    assert any(line.startswith(f"base, {', '.join(names)}: http://") for line in said)
    assert status("serve", "--demo", "--port", 0, "--no-open") == 0
    assert "training" not in capsys.readouterr().err
    assert len(joined(opened)) == 1 and opened[0].startswith("http://127.0.0.1:")


def test_no_open_is_accepted_without_the_demo(shop, opened, capsys):
    served = ["--adapter", shop / "legal", shop / "support", "--base", shop / "base", "--port", 0]
    for flags in ([], ["--no-open"]):
        assert status("serve", *served, *flags) == 0
        assert capsys.readouterr().err.startswith("base, legal, support: http://")
    assert joined(opened) == []


def test_the_demo_opens_the_page_unless_it_is_told_not_to(shop, opened, monkeypatch):
    monkeypatch.setattr(demo, "demo_folders", lambda: (shop / "base", {"legal": shop / "legal"}))
    assert status("serve", "--demo", "--port", 0, "--no-open") == 0 and joined(opened) == []
    assert status("serve", "--demo", "--port", 0) == 0 and len(joined(opened)) == 1
