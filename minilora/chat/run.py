"""`minilora chat`: one answer, a talk in a terminal, or an answer for each line of a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..models.tokenizer import Tokenizer
from ..nn.llama import Llama
from ..train.options import ChatOptions
from .commands import Chat
from .output import Output, Screen
from .talk import Talk, name_of

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession


def run(model: Llama, tokenizer: Tokenizer, names: Sequence[str], options: ChatOptions) -> None:
    """Answer `--prompt`, or talk until the end. names: of the model's adapters; the first one answers first.

    Raises RuntimeError at the end of a pipe of which some lines could not be answered, and what `Talk.ask` raises for
    a prompt.
    """
    to_terminal = sys.stdout.isatty()
    output = Screen() if to_terminal else Output()
    chat = Chat(Talk(model, tokenizer, options, output.note), names, output)
    if names:
        chat.talk.choose(names[0])
    if options.prompt is not None:
        if len(names) > 1:
            chat.compare(options.prompt, names)
        else:
            chat.answer(options.prompt)
    elif to_terminal and sys.stdin.isatty():
        in_a_terminal(chat)
    else:
        in_a_pipe(chat)


def in_a_pipe(chat: Chat) -> None:
    """A question or a command per line of standard input, until it ends. What cannot be answered does not stop it."""
    lines = failed = 0
    for line in _lines():
        lines += 1
        try:
            if not chat.handle(line):
                break
        except BrokenPipeError:  # nobody reads the answers any longer
            raise
        except (ValueError, OSError) as error:
            failed += 1
            chat.output.note(f"minilora: line {lines}: {error}")
    if failed:
        raise RuntimeError(f"{failed} of {lines} lines could not be answered")


def in_a_terminal(chat: Chat) -> None:
    """Questions and commands with line editing, until the end is asked for. Ctrl-C stops an answer, not the talk."""
    session = _session(chat)
    others = f", one of {len(chat.names)} adapters," if len(chat.names) > 1 else ""
    chat.output.note(f"{name_of(chat.talk.choice)}{others} answers.")
    chat.output.note("Ask something. /help lists commands, Ctrl-C stops an answer, Ctrl-D ends.\n")
    while True:
        try:
            line = session.prompt("you> ")
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if not chat.handle(line):
                return
        except KeyboardInterrupt:
            chat.output.note("(stopped)\n")
        except (ValueError, OSError) as error:
            chat.output.note(f"minilora: {error}\n")


def _lines() -> Iterator[str]:
    """The lines of standard input. Where that is a terminal after all, it is asked for them."""
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
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.shortcuts import CompleteStyle

    after: dict[str, Completer] = {
        "/adapter": WordCompleter(chat.names),
        "/mix": WordCompleter([f"{name}=0.5" for name in chat.names], WORD=True),
        "/save": PathCompleter(expanduser=True),
    }

    def below() -> str:
        talk = chat.talk
        return f" {name_of(talk.choice)} · {talk.used} of {talk.limit} tokens · /help"

    return PromptSession(
        completer=NestedCompleter({name: after.get(name) for name in chat.commands}),
        complete_style=CompleteStyle.READLINE_LIKE,  # on Tab, as in a shell: nothing opens while a question is typed
        complete_while_typing=False,
        reserve_space_for_menu=0,
        history=InMemoryHistory(),
        bottom_toolbar=below,
    )
