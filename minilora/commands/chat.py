"""`minilora chat`: one answer, a conversation in a terminal, or an answer for each line of a pipe."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.fields import read_schema
from ..data.passages import NO_WORD
from ..generate.conversation import TOY, Talk, name_of
from ..generate.streams import Sampling
from ..lora.adapters import Choice
from ..options import add_flags, from_flags, option
from ..pages.text import counted, shortened
from ..terminal import printable
from .asking import Asking, read_context
from .shared import Instead, adapters

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

HELP = "talk to a model, with or without adapters"
LAST_WORDS = ("exit", "quit", "/quit", "/exit")
_FOREIGN = re.compile(r"[\udc80-\udcff]")  # what `surrogateescape` makes of a byte that is not in the encoding


@dataclass(frozen=True, kw_only=True)
class ChatOptions(Asking):
    """Which model to talk to, and how it answers. Raises ValueError for values that are not possible."""

    prompt: str | None = option(
        None, "print the answer of every adapter to this question, and exit (default: a conversation)"
    )
    top_p: float = option(
        1.0, "nucleus sampling: only from the most likely tokens whose probabilities add up to this", above=0, most=1
    )
    repetition_penalty: float = option(
        1.0, "above 1, such as 1.1: tokens that are there already become less likely, against repetition", above=0
    )

    def __post_init__(self):
        super().__post_init__()
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("--prompt is empty: give a question, or leave it out to talk")


def add(parser: argparse.ArgumentParser) -> None:
    """The flags are the fields of ChatOptions."""
    add_flags(parser, ChatOptions)
    parser.add_argument(
        "--ask-file",
        nargs=1,
        action=Instead,
        const="minilora predict FILE asks each line of it",
        help=argparse.SUPPRESS,
    )


def run(arguments: argparse.Namespace) -> None:
    """Answer `--prompt`; else talk in the terminal, or answer each line of a pipe.

    Raises RuntimeError at the end of a pipe of which some lines could not be answered.
    """
    options = from_flags(ChatOptions, arguments)
    named = adapters(options.adapter)
    schema = None if options.schema is None else read_schema(options.schema)
    model, tokenizer = options.load(named, options.base)
    handbook = read_context(options.context, model, tokenizer, options.max_new_tokens)
    sampling = Sampling(**{name: getattr(options, name) for name in vars(Sampling())})
    talk = Talk(model, tokenizer, sampling, options.system, handbook, schema)
    to_terminal = sys.stdout.isatty()
    chat = Chat(talk, list(named), Screen() if to_terminal else Output())
    if named:
        talk.choose(chat.names[0])
    if options.prompt is not None:
        chat.ask_all(options.prompt.strip())
    elif to_terminal and sys.stdin.isatty():
        in_a_terminal(chat)
    else:
        each_line(chat, _typed_lines())


def each_line(chat: Chat, lines: Iterable[str]) -> None:
    """Handle each line until one ends it. A line that cannot be answered does not stop the others."""
    count = failed = 0
    for line in lines:
        count += 1
        try:
            if _FOREIGN.search(line):
                raise ValueError(f"not text in {sys.stdin.encoding}: convert it first, as iconv -t UTF-8 does")
            if not chat.handle(line):
                break
        except BrokenPipeError:  # nobody reads the answers any longer
            raise
        except (ValueError, OSError) as error:
            failed += 1
            chat.output.note(f"minilora: line {count}: {error}")
    if failed:
        raise RuntimeError(f"{failed} of {count} lines could not be answered")


def in_a_terminal(chat: Chat) -> None:
    """Questions and commands with line editing. Ctrl-C stops an answer or clears the line; pressed again, it ends."""
    session = _session(chat)
    others = f", one of {len(chat.names)} adapters," if len(chat.names) > 1 else ""
    chat.output.note(f"{chat.who}{others} answers.")
    if chat.talk.model.source == "tiny":
        chat.output.note(TOY)
    chat.output.note("Ask something. /help lists commands, Ctrl-C stops an answer, Ctrl-D ends.\n")
    leaving = False  # Ctrl-C was the last key
    while True:
        try:
            line = session.prompt("you> ")
        except KeyboardInterrupt:
            if leaving and not session.default_buffer.text:
                return
            leaving = True
            chat.output.note("(Ctrl-C again, or Ctrl-D, ends; /save FILE keeps what was said)")
            continue
        except EOFError:
            return
        leaving = False
        try:
            if not chat.handle(line):
                return
        except KeyboardInterrupt:
            chat.output.note("(stopped)\n")
        except (ValueError, OSError) as error:
            chat.output.note(f"minilora: {error}\n")


def _typed_lines() -> Iterator[str]:
    """The lines of standard input. If that is a terminal after all, there is a prompt for each."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # such a line is refused, and the others are answered
    while True:
        if sys.stdin.isatty():
            print("you> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        yield line


def _session(chat: Chat) -> PromptSession[str]:
    """Line editing, the lines typed before, and completion of commands, adapters and files."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, NestedCompleter, PathCompleter, WordCompleter
    from prompt_toolkit.shortcuts import CompleteStyle

    after: dict[str, Completer] = {
        "/adapter": WordCompleter(chat.names),
        "/mix": WordCompleter([f"{name}=0.5" for name in chat.names], WORD=True),
        "/save": PathCompleter(expanduser=True),
        "/load": PathCompleter(expanduser=True),
    }

    return PromptSession(
        completer=NestedCompleter({name: after.get(name) for name in chat.commands}),
        complete_style=CompleteStyle.READLINE_LIKE,  # on Tab, as in a shell: nothing opens while a question is typed
        complete_while_typing=False,
        reserve_space_for_menu=0,
        bottom_toolbar=lambda: f" {chat.who} · {chat.talk.used} of {chat.talk.limit} tokens · /help",
    )


# -- what a line does --------------------------------------------------------------------------------------------------


class Chat:
    """A conversation, the commands that steer it, and where its answers go. names: of all adapters."""

    def __init__(self, talk: Talk, names: Sequence[str], output: Output):
        self.talk, self.names, self.output = talk, list(names), output
        self.question = ""  # the last one
        self.told = False  # that answers are cut
        every = [  # how a command is written, what it does, and the function that takes the rest of the line
            ("/adapter NAME", "let this adapter answer; without a name, list all", self._adapter),
            ("/base", "let the base answer, without an adapter", lambda rest: self._choose(None)),
            ("/mix NAME=FACTOR ...", "let a weighted combination answer: legal=0.5 support=0.5", self._mix),
            ("/compare [QUESTION]", "base and all adapters answer this, or the last question", self._compare),
            ("/system [TEXT]", "set or show the system prompt; `default` is the adapter's", self._system),
            ("/temperature [T]", "set or show it: 0 takes the most likely token", self._temperature),
            ("/retry", "answer the last question again, with the next seed", self._retry),
            ("/undo", "forget the last question and its answer", self._undo),
            ("/clear", "forget what was said", self._clear),
            ("/save FILE", "write what was said, as text or as .jsonl to train on", self._save),
            ("/load FILE", "continue what was saved as .jsonl", self._load),
            ("/help", "show this list", self._help),
            ("/quit", "end; so do exit, quit and Ctrl-D", self._help),
        ]
        self.commands = {command[0].split()[0]: command for command in every}

    @property
    def who(self) -> str:
        """The name of the version that answers."""
        return name_of(self.talk.choice)

    def handle(self, line: str) -> bool:
        """Answer a question, or do what a command says. False when the conversation is to end.

        Raises ValueError or OSError, in one line, for what cannot be done; nothing has changed then.
        """
        line = line.strip()
        if line.lower() in LAST_WORDS:
            return False
        if line.startswith("/"):
            word, _, rest = line.partition(" ")
            known = self._known(word, self.commands, "command", "/help lists them")
            self.commands[known][2](rest.strip())
        elif line:
            self.answer(line)
        return True

    def answer(self, question: str) -> None:
        """Show the answer of the version that is chosen."""
        self.question = question
        if (passage := self.talk.passage(question, self.talk.choice)) is not None:
            self.output.note(f"(passage {passage.id}: {shortened(passage.text, 60)})")
            self._doubt(question)
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
            limit = self.talk.sampling.max_new_tokens
            self.output.hint(f"(answers are cut at {limit} tokens: --max-new-tokens allows for more)\n")

    def ask_all(self, question: str) -> None:
        """Show the answers of all adapters, or of the base, to a question alone."""
        if len(self.names) > 1:
            self.compare(question, self.names)
        else:
            self.answer(question)

    def compare(self, question: str, names: Sequence[str]) -> None:
        """Show the answers of several versions, each after its name."""
        shown, doubted = "", False
        try:
            for name, piece in self.talk.compare(question, {name: None if name == "base" else name for name in names}):
                if name != shown:
                    if shown:
                        self.output.end()
                    passage = self.talk.passage(question, None if name == "base" else name)
                    if passage is not None and not doubted:
                        doubted = True
                        self._doubt(question)
                    self.output.title(f"{name}:" if passage is None else f"{name}, with passage {passage.id}:")
                    shown = name
                self.output.piece(piece)
        finally:
            if shown:
                self.output.end()

    def _doubt(self, question: str) -> None:
        """Say so if the passage for a question was found by none of its words."""
        handbook = self.talk.handbook
        if handbook is not None and not handbook.has_words_of([{"role": "user", "content": question}]):
            self.output.note(f"({NO_WORD})")

    def _known(self, word: str, known: Iterable[str], what: str, otherwise: str) -> str:
        """The word, if it is known. Raises ValueError, with the one that it resembles or is the beginning of."""
        if word in known:
            return word
        lower = word.lower()
        near = [one for one in known if len(lower) > 1 and one.startswith(lower)]
        near = near or get_close_matches(lower, known, 1, cutoff=0.7)
        raise ValueError(f"no {what} {word} ({f'did you mean {near[0]}?' if near else otherwise})")

    def _adapter_known(self, name: str) -> str:
        there = f"there is: {', '.join(self.names) or 'only the base'}"
        return self._known(name, self.names, "adapter", there)

    def _adapter(self, rest: str) -> None:
        if rest:
            self.talk.choose(self._adapter_known(rest))
        elif self.names:
            self.output.note(f"adapters: {', '.join(self.names)}")
        self.output.note(f"now answers: {self.who}")

    def _choose(self, choice: Choice) -> None:
        self.talk.choose(choice)
        self.output.note(f"now answers: {self.who}")

    def _mix(self, rest: str) -> None:
        from ..models.with_adapters import read_combination

        mix = read_combination(rest)
        if not mix:
            raise ValueError("/mix needs adapters and a factor for each, such as /mix legal=0.5 support=0.5")
        self._choose({self._adapter_known(name): factor for name, factor in mix.items()})

    def _compare(self, rest: str) -> None:
        question = rest or self.question
        if not question:
            raise ValueError("nothing was asked yet: /compare QUESTION")
        if not self.names:
            raise ValueError("there is only the base: start with --adapter NAME=DIR to compare adapters")
        self.question = question
        self.compare(question, ["base", *self.names])

    def _system(self, rest: str) -> None:
        if rest:
            self.talk.system = None if rest == "default" else rest
        system = self.talk.system_for(self.talk.choice)
        self.output.note(f"system prompt: {'that of the model, if it has one' if system is None else system}")

    def _temperature(self, rest: str) -> None:
        if rest:
            try:
                self.talk.sampling = replace(self.talk.sampling, temperature=float(rest))
            except ValueError as error:
                raise ValueError(f"/temperature takes 0 or a positive number, such as 0.7, got {rest}") from error
        self.output.note(f"temperature: {self.talk.sampling.temperature:g}")

    def _retry(self, rest: str) -> None:
        turn = self.talk.undo()
        try:
            self.answer(turn.question)
        except ValueError:
            self.talk.turns.append(turn)
            raise

    def _undo(self, rest: str) -> None:
        self.output.note(f"forgotten: {shortened(self.talk.undo().question, 60)}")

    def _clear(self, rest: str) -> None:
        self.talk.clear()
        self.output.note("the conversation begins anew")

    def _save(self, rest: str) -> None:
        if not rest:
            raise ValueError("/save needs a file: /save talk.txt")
        self.talk.save(Path(rest).expanduser())
        self.output.note(f"saved in {rest}")

    def _load(self, rest: str) -> None:
        if not rest:
            raise ValueError("/load needs a file: /load talk.jsonl")
        self.talk.load(Path(rest).expanduser())
        last = self.talk.turns[-1]
        self.question = last.question
        self.output.note(f"continues after {counted(len(self.talk.turns), 'answer')}: {shortened(last.answer, 60)}")
        if self.talk.system is not None:
            self._system("")

    def _help(self, rest: str) -> None:
        width = max(len(usage) for usage, _, _ in self.commands.values())
        for usage, does, _ in self.commands.values():
            self.output.note(f"{usage:{width}}  {does}")


# -- where answers go --------------------------------------------------------------------------------------------------


class Output:
    """Plain text: answers on standard output as they are, everything else on standard error."""

    def piece(self, text: str) -> None:
        """The next piece of an answer."""
        self._write(text)

    def end(self) -> None:
        """The answer has ended."""
        self._write("\n")

    def title(self, line: str) -> None:
        """A line before an answer, where there are several."""
        self._write(f"{line}\n")

    def note(self, line: str) -> None:
        """A line that is not an answer."""
        print(printable(line), file=sys.stderr, flush=True)

    def hint(self, line: str) -> None:
        """A line for a person at a terminal: a pipe does not get it."""

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()


class Screen(Output):
    """A terminal: an empty line follows each answer, and what would steer it is replaced."""

    def piece(self, text: str) -> None:
        """The next piece of an answer."""
        self._write(printable(text))

    def end(self) -> None:
        """The answer has ended."""
        self._write("\n\n")

    def note(self, line: str) -> None:
        """A line that is not an answer, between the answers."""
        print(printable(line), flush=True)

    hint = note
