"""`minilora chat` as a command: a prompt, a pipe, what is refused; and that no terminal library is loaded for them."""

import io
import subprocess
import sys

import pytest

import minilora as ml
from minilora.cli import main
from minilora.generate.answers import generate


@pytest.fixture
def words(shop, tmp_path, monkeypatch):
    """The arguments of a talk with two adapters, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return ["chat", "--base", str(shop / "base"), "--adapter", str(shop / "legal"), "--adapter",
            f"help={shop / 'support'}", "--max-new-tokens", "12"]  # fmt: skip


@pytest.fixture
def typed(monkeypatch):
    """A function that puts lines on standard input."""
    return lambda *lines: monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def alone(model, tokenizer, choice, talk, **settings):
    ml.set_adapter(model, choice)
    return generate(model, tokenizer, talk, 12, **settings)


def test_a_prompt_is_answered_by_every_adapter_named(words, capsys, model, tokenizer):
    assert main([*words, "--prompt", "What is a lien?"]) == 0
    legal, support = (alone(model, tokenizer, name, "What is a lien?") for name in ("legal", "support"))
    assert capsys.readouterr().out == f"legal:\n{legal}\nhelp:\n{support}\n"


@pytest.mark.parametrize("flags", [[], ["--temperature", "2", "--top-p", "0.8", "--seed", "3"]], ids=" ".join)
def test_a_prompt_to_one_adapter_or_the_base_is_answered_without_a_name(shop, capsys, flags, model, tokenizer):
    settings = {"temperature": 2.0, "top_p": 0.8, "seed": 3} if flags else {}
    for choice in (None, "legal"):
        adapter = [] if choice is None else ["--adapter", str(shop / choice)]
        line = ["chat", "--base", str(shop / "base"), *adapter, *flags, "--max-new-tokens", "12", "--prompt", "hello"]
        assert main(line) == 0
        assert capsys.readouterr().out == alone(model, tokenizer, choice, "hello", **settings) + "\n"


def test_a_pipe_gets_plain_text_one_answer_per_line_of_input(words, typed, capsys, model, tokenizer):
    typed("hello", "", "/adapter help", "x", "exit", "never asked")
    assert main(words) == 0
    out, err = capsys.readouterr()
    first = alone(model, tokenizer, "legal", "hello")  # the first adapter begins
    talk = [{"role": role, "content": text} for role, text in (("user", "hello"), ("assistant", first), ("user", "x"))]
    assert out == f"{first}\n{alone(model, tokenizer, 'support', talk)}\n"
    assert err == "now answers: help\n"


def test_a_line_that_cannot_be_answered_does_not_stop_the_others_and_shows_in_the_status(words, typed, capsys):
    typed("hello", "x" * 1100, "/nonsense", "hello")
    assert main(words) == 1
    out, err = capsys.readouterr()
    told = err.splitlines()
    assert out.count("\n") >= 2 and len(told) == 3
    assert told[0].startswith("minilora: line 2: a question of ") and "--max-new-tokens" in told[0]
    assert told[1] == "minilora: line 3: no command /nonsense; /help lists them"
    assert told[2] == "minilora: 2 of 4 lines could not be answered"


def test_a_long_talk_goes_on_beyond_the_context(words, typed, capsys):
    typed(*(f"{i}" + "x" * 150 for i in range(12)))
    assert main(words) == 0
    assert capsys.readouterr().err.splitlines() == [
        "the oldest turns are left out from here on: 1024 tokens are all the model can see"
    ]


def test_an_interrupted_pipe_is_status_130(words, monkeypatch, capsys):
    class Interrupted(io.StringIO):
        def readline(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupted())
    assert main(words) == 130
    assert capsys.readouterr().err == "\nminilora: interrupted\n"


def test_a_pipe_that_nobody_reads_any_longer_is_the_end(words, typed, monkeypatch, capsys):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    typed("hello", "hello")
    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(words) == 0
    assert capsys.readouterr().err == "" and sys.stdin.readline() == "hello\n"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--adapter", "legal=elsewhere"], "two adapters are called 'legal'"),
        (["--adapter", "base=legal"], "'base' is the model without an adapter"),
        (["--top-p", "0"], "top_p must lie above 0 and be at most 1, got 0"),
        (["--top-p", "1.1"], "top_p must"),
    ],
)
def test_what_means_nothing_is_status_2(words, capsys, flags, reason):
    assert main([*words, *flags]) == 2
    assert reason in capsys.readouterr().err


def test_an_adapter_that_is_not_there_is_status_1(words, capsys):
    assert main([*words, "--adapter", "more=absent", "--prompt", "hello"]) == 1
    assert "absent" in capsys.readouterr().err


def test_without_a_terminal_no_library_for_one_is_loaded(words):
    program = (
        "import sys; from minilora.cli import main; status = main(sys.argv[1:]);"
        "assert 'prompt_toolkit' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words], input="hello\n", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout and "\x1b" not in done.stdout + done.stderr
