"""Where answers go: a pipe gets them as they are, a terminal gets lines that break between words."""

from __future__ import annotations

import re
import shutil
import sys

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what could steer a terminal; a model may write anything


class Output:
    """Plain text: answers on standard output, everything else on standard error."""

    def piece(self, text: str) -> None:
        """The next piece of an answer."""
        self._write(text)

    def end(self) -> None:
        """The answer has ended."""
        self._write("\n")

    def title(self, name: str) -> None:
        """Whose answer follows, where there are several."""
        self._write(f"{name}:\n")

    def note(self, line: str) -> None:
        """A line that is no answer."""
        print(line, file=sys.stderr, flush=True)

    def hint(self, line: str) -> None:
        """A line for who reads along: a pipe has nobody."""

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()


class Screen(Output):
    """A terminal. A word is shown when its end is known, and stands on a new line where it does not fit."""

    def __init__(self) -> None:
        self.word, self.space, self.column = "", "", 0

    def piece(self, text: str) -> None:
        """The next piece of an answer: its whole words, and what stands between them."""
        for part in re.findall(r"\n|[^\S\n]+|\S+", CONTROL.sub("\ufffd", text)):
            if not part.isspace():
                self.word += part
                continue
            self._show_word()
            if part == "\n":
                self._write("\n")
                self.space, self.column = "", 0
            else:
                self.space += part.replace("\t", "    ")

    def end(self) -> None:
        """The answer has ended: its last word, and an empty line."""
        self._show_word()
        self._write("\n\n")
        self.space, self.column = "", 0

    def note(self, line: str) -> None:
        """A line that is no answer, between answers: a terminal shows it among them."""
        print(line, flush=True)

    hint = note

    def _show_word(self) -> None:
        if not self.word:
            return
        from prompt_toolkit.utils import get_cwidth  # a character may be two columns wide, or none

        width = get_cwidth(self.word)
        if self.column and self.column + len(self.space) + width >= shutil.get_terminal_size().columns:
            self._write("\n")
            self.space, self.column = "", 0
        self._write(self.space + self.word)
        self.column += len(self.space) + width
        self.word = self.space = ""
