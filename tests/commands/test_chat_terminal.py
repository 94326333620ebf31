"""A talk in a terminal, typed by hand: editing, completion, Ctrl-C in an answer and at the prompt, Ctrl-D."""

import os
import re
import sys

import pytest

pexpect = pytest.importorskip("pexpect", reason="needs pexpect: pip install 'minilora[test]'")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminal")

EDITED = "\x1b[?2004l"  # what the terminal gets when a line has been typed
LEFT, CTRL_C, CTRL_D = "\x1b[D", "\x03", "\x04"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")


class Terminal:
    """A talk in a pseudo-terminal of 60 columns."""

    def __init__(self, shop, folder, *flags):
        environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        words = ["-m", "minilora", "chat", "--base", str(shop / "base"), *flags]
        words += ["--adapter", f"legal={shop / 'legal'}", f"support={shop / 'support'}"]
        self.child = pexpect.spawn(
            sys.executable, words, cwd=folder, env=environment, encoding="utf-8", timeout=60, dimensions=(24, 60)
        )

    def wait_for(self, text):
        """Wait until the terminal shows this, and return what it has shown on the way, without escape codes."""
        self.child.expect_exact(text)
        return ESCAPES.sub("", self.child.before)

    def type(self, keys):
        self.child.send(keys)

    def end(self):
        """Wait for the end of the program, and return its exit status."""
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


@pytest.fixture
def terminal(shop, tmp_path):
    """A function that begins a talk with some flags."""
    begun = []

    def begin(*flags):
        begun.append(Terminal(shop, tmp_path, *flags))
        begun[-1].wait_for("you>")
        return begun[-1]

    yield begin
    for one in begun:
        one.child.close(force=True)


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


def test_ctrl_c_stops_the_answer_then_clears_the_line_and_only_a_second_one_ends(terminal):
    talk = terminal("--max-new-tokens", "950")
    talk.type("hello\r")
    talk.wait_for(EDITED)
    talk.child.expect(r"\w{3}.*\w{3}")  # some of the answer
    talk.type(CTRL_C)
    talk.wait_for("(stopped)")
    talk.wait_for("you>")
    for _ in range(2):  # a line in between, and the next Ctrl-C is a first one again
        talk.type(CTRL_C)
        talk.wait_for("(Ctrl-C again, or Ctrl-D, ends")
        talk.wait_for("you>")
        talk.type("/adapter legal\r")
        talk.wait_for("now answers: legal")
        talk.wait_for("you>")
    talk.type("never asked" + CTRL_C)
    talk.wait_for("(Ctrl-C again")
    talk.wait_for("you>")
    talk.type("nor this" + CTRL_C)
    talk.wait_for("(Ctrl-C again")
    talk.wait_for("you>")
    talk.type("/save talk.txt\r")
    talk.wait_for("saved in talk.txt")
    talk.wait_for("you>")
    talk.type(CTRL_C)
    talk.wait_for("(Ctrl-C again")
    talk.wait_for("you>")
    talk.type(CTRL_C)
    assert talk.end() == 0


def test_an_answer_streams_in_lines_that_fit_and_ctrl_d_ends(terminal, shop):
    talk = terminal("--max-new-tokens", "30")
    talk.type("hello\r")
    talk.wait_for("(answers are cut at 30 tokens: --max-new-tokens")
    talk.wait_for("you>")
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
