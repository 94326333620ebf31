"""A talk in a terminal, typed by hand: editing, completion, Ctrl-C in an answer and at the prompt, Ctrl-D."""

import os
import re
import sys

import pytest

pexpect = pytest.importorskip("pexpect", reason="needs pexpect: pip install 'minilora[test]'")
pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminal"),
    pytest.mark.filterwarnings("ignore:.*use of forkpty:DeprecationWarning"),  # pytest's workers have threads
]

LEFT, CTRL_C, CTRL_D = "\x1b[D", "\x03", "\x04"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")
ENDLESS = """  # an answer that has three words and no end
import sys, time
from minilora.cli import main
from minilora.generate.streams import Answer
def take(self, token, original=Answer.take):
    if len(self.text.split()) > 2:
        print("waiting", flush=True)
        time.sleep(600)
    elif token != self.tokenizer.eos_id:
        original(self, token)
Answer.take = take
sys.exit(main(sys.argv[1:]))
"""


class Terminal:
    """A talk in a pseudo-terminal of 60 columns."""

    def __init__(self, shop, folder, *flags, program=("-m", "minilora")):
        environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        words = [*program, "chat", "--base", str(shop / "base"), *flags]
        words += ["--adapter", f"legal={shop / 'legal'}", f"support={shop / 'support'}"]
        self.child = pexpect.spawn(
            sys.executable, words, cwd=folder, env=environment, encoding="utf-8", timeout=60, dimensions=(24, 60)
        )

    def wait_for(self, text):
        """Wait until the terminal shows this, and return what it has shown on the way, without escape codes."""
        self.child.expect_exact(text)
        return ESCAPES.sub("", self.child.before)

    def type(self, keys, shown=None):
        """Type, and wait until this and the next prompt are shown, if anything."""
        self.child.send(keys)
        if shown is not None:
            self.wait_for(shown)
            self.wait_for("you>")

    def end(self):
        """Wait for the end of the program, and return its exit status."""
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


@pytest.fixture
def terminal(shop, tmp_path):
    """A function that begins a talk with some flags."""
    begun = []

    def begin(*flags, **more):
        begun.append(Terminal(shop, tmp_path, *flags, **more))
        begun[-1].wait_for("you>")
        return begun[-1]

    yield begin
    for one in begun:
        one.child.close(force=True)


@pytest.mark.long
def test_a_line_can_be_edited_and_completed_and_exit_ends(terminal):
    talk = terminal()
    talk.type("/bse" + 2 * LEFT + "a\r")
    talk.wait_for("now answers: base")
    talk.type("/adapter sup\t\r")
    talk.wait_for("now answers: support")
    talk.type("/adaptor legal\r")
    talk.wait_for("did you mean /adapter?")
    talk.type("exit\r")
    assert talk.end() == 0


@pytest.mark.long
def test_ctrl_c_stops_the_answer_then_clears_the_line_and_only_a_second_one_ends(terminal):
    talk = terminal("--max-new-tokens", "950", program=("-c", ENDLESS))
    talk.type("hello\r")
    talk.wait_for("waiting")  # with a part of the answer shown
    talk.type(CTRL_C, "(stopped)")
    for _ in range(2):  # a line in between, and the next Ctrl-C is a first one again
        talk.type(CTRL_C, "(Ctrl-C again, or Ctrl-D, ends")
        talk.type("/adapter legal\r", "now answers: legal")
    for line in ("never asked", "nor this"):
        talk.type(line + CTRL_C, "(Ctrl-C again")
    talk.type("/save talk.txt\r", "saved in talk.txt")
    talk.type(CTRL_C, "(Ctrl-C again")
    talk.type(CTRL_C)
    assert talk.end() == 0


def test_an_answer_streams_in_lines_that_fit_and_ctrl_d_ends(terminal, shop):
    talk = terminal("--max-new-tokens", "30")
    talk.type("hello\r", "(answers are cut at 30 tokens: --max-new-tokens")
    talk.type("What is a lien?\r")
    assert "are cut" not in talk.wait_for("you>")
    talk.type("/compare hello\r")
    talk.wait_for("base:\r\n")
    talk.wait_for("legal:\r\n")
    talk.wait_for("support:\r\n")
    answer = talk.wait_for("you>")
    assert answer.strip() and max(map(len, answer.splitlines())) <= 60
    talk.type(CTRL_D)
    assert talk.end() == 0
