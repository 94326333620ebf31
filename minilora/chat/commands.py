"""What a line that begins with / does in a talk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from ..models.versions import read_mix
from .output import Output
from .talk import Talk, name_of

LAST_WORDS = ("exit", "quit", "/quit", "/exit")


@dataclass(frozen=True)
class Command:
    """One command: how it is written, what it does, and what does it, given the rest of the line."""

    usage: str
    help: str
    run: Callable[[str], None]

    @property
    def name(self) -> str:
        """Its first word."""
        return self.usage.split()[0]


class Chat:
    """A talk, the commands that steer it, and where its answers go. names: of the adapters that can be chosen."""

    def __init__(self, talk: Talk, names: Sequence[str], output: Output):
        self.talk, self.names, self.output = talk, list(names), output
        self.question = ""  # the last one
        self.told = False  # that answers are cut
        every = [
            Command("/adapter NAME", "let this adapter answer; without a name, list all", self._adapter),
            Command("/base", "let the base answer, without an adapter", self._base),
            Command("/mix NAME=FACTOR ...", "let a mix answer: legal=0.5 support=0.5", self._mix),
            Command("/compare [QUESTION]", "base and all adapters answer this, or the last question", self._compare),
            Command("/clear", "forget what was said", self._clear),
            Command("/save FILE", "write what was said, as text or as .jsonl to train on", self._save),
            Command("/help", "show this list", self._help),
            Command("/quit", "end; so do exit, quit and Ctrl-D", self._help),
        ]
        self.commands = {command.name: command for command in every}

    def handle(self, line: str) -> bool:
        """Answer a question, or do what a command says. False when the talk is to end.

        Raises ValueError or OSError, in one line, for what cannot be done; the talk is as before then.
        """
        line = line.strip()
        if line.lower() in LAST_WORDS:
            return False
        if line.startswith("/"):
            word, _, rest = line.partition(" ")
            self._command(word).run(rest.strip())
        elif line:
            self.answer(line)
        return True

    def answer(self, question: str) -> None:
        """The answer of who answers at the moment."""
        self.question = question
        began = False

        def show(piece: str) -> None:
            nonlocal began
            began = True
            self.output.piece(piece)

        try:
            whole = self.talk.ask(question, show)
        finally:
            if began:
                self.output.end()
        if not whole and not self.told:
            self.told = True
            limit = self.talk.options.max_new_tokens
            self.output.hint(f"(answers are cut at {limit} tokens: --max-new-tokens allows for more)\n")

    def compare(self, question: str, names: Sequence[str | None]) -> None:
        """The answers of several, named, one below the other."""
        shown = ""
        try:
            for name, piece in self.talk.compare(question, {name_of(name): name for name in names}):
                if name != shown:
                    if shown:
                        self.output.end()
                    self.output.title(name)
                    shown = name
                self.output.piece(piece)
        finally:
            if shown:
                self.output.end()

    def _command(self, word: str) -> Command:
        if word in self.commands:
            return self.commands[word]
        near = get_close_matches(word.lower(), self.commands, 1, cutoff=0.5)
        raise ValueError(f"no command {word}{f' (did you mean {near[0]}?)' if near else ''}; /help lists them")

    def _known(self, name: str) -> str:
        if name in self.names:
            return name
        near = get_close_matches(name, self.names, 1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there is: {', '.join(self.names) or 'none, only the base'}"
        raise ValueError(f"no adapter {name} ({hint})")

    def _adapter(self, rest: str) -> None:
        if rest:
            self.talk.choose(self._known(rest))
        elif self.names:
            self.output.note(f"adapters: {', '.join(self.names)}")
        self._say_who()

    def _base(self, rest: str) -> None:
        self.talk.choose(None)
        self._say_who()

    def _mix(self, rest: str) -> None:
        mix = read_mix(rest)
        if not mix:
            raise ValueError("/mix needs adapters and how much of each, such as /mix legal=0.5 support=0.5")
        self.talk.choose({self._known(name): factor for name, factor in mix.items()})
        self._say_who()

    def _compare(self, rest: str) -> None:
        question = rest or self.question
        if not question:
            raise ValueError("nothing was asked yet: /compare QUESTION")
        if not self.names:
            raise ValueError("there is only the base: start with --adapter NAME=DIR to compare adapters")
        self.question = question
        self.compare(question, [None, *self.names])

    def _clear(self, rest: str) -> None:
        self.talk.clear()
        self.output.note("forgotten")

    def _save(self, rest: str) -> None:
        if not rest:
            raise ValueError("/save needs a file: /save talk.txt")
        self.talk.save(Path(rest).expanduser())
        self.output.note(f"saved in {rest}")

    def _help(self, rest: str) -> None:
        width = max(len(command.usage) for command in self.commands.values())
        for command in self.commands.values():
            self.output.note(f"{command.usage:{width}}  {command.help}")

    def _say_who(self) -> None:
        self.output.note(f"now answers: {name_of(self.talk.choice)}")
