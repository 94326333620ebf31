"""The command line: finds the command's file in `commands/`, reads its flags, runs it, and turns errors into one line.

Exit status: 0, 1 (the job failed; one line says why), 2 (bad arguments), 130 (interrupted). A user's mistake never
shows a traceback; MINILORA_TRACEBACK=1 shows it all the same, for those who look for a fault in minilora.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Collection, Sequence
from contextlib import nullcontext, redirect_stderr
from importlib import import_module
from io import StringIO, TextIOWrapper
from pathlib import Path

from .commands import NAMES
from .commands.shared import Outcome
from .nn.ranks import ALONE, Ranks, world
from .options import Parser, UsageError, parse, suggestion
from .progress import show_progress
from .terminal import printable
from .version import __version__

ELSEWHERE = {  # what other programs call a command -> its name here
    "train": "finetune", "sft": "finetune", "lora": "finetune", "fuse": "merge", "generate": "chat", "evaluate": "eval",
    "convert": "export",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    ranks: Ranks = ALONE
    flags: Collection[str] = ()  # that the command knows
    words = sys.argv[1:] if argv is None else list(argv)
    shown = show_progress()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the program or the shell (`>&-`) that started this one
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if isinstance(sys.stdout, TextIOWrapper):  # a letter that its encoding lacks is escaped, and no error after hours
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            ranks = world()
            show_progress(not ranks.number)
            with redirect_stderr(StringIO()) if ranks.number else nullcontext():  # the first rank prints it
                _refuse_unknown_command(words)
                _refuse_what_cannot_be_stored(words)
                if argv is None and sys.path[0] not in ("", os.getcwd()):  # else this process imports from there, too
                    os.environ["PYTHONSAFEPATH"] = "1"  # Python that a command starts runs no file of this folder
                arguments = parse(build_parser(words[:1]), words)
                flags = arguments.parser._option_string_actions
                _refuse_an_archive()
            if ranks.size > 1 and arguments.command != "finetune":
                raise UsageError(f"{arguments.parser.prog} is for one process: leave out mpiexec")
            if (outcome := arguments.run(arguments)) is not None:
                _show(outcome, as_json="json" in arguments and arguments.json)
        finally:
            show_progress(shown)
            _flush()
    except KeyboardInterrupt:
        return ranks.fail("\nminilora: interrupted", 130)
    except (UsageError, ValueError, OSError, RuntimeError, MemoryError, ImportError, AssertionError) as error:
        if _is_broken_pipe(error):  # `minilora report | head`: nothing more can be printed, not even at exit
            sys.stdout = None  # type: ignore[assignment]
            return 0
        if os.environ.get("MINILORA_TRACEBACK"):
            raise
        line = _line(error, [flag for flag in flags if flag not in words])
        return ranks.fail(f"minilora: {printable(line)}", 2 if isinstance(error, UsageError) else 1)
    return 0


def _show(outcome: Outcome, as_json: bool) -> None:
    """Draw the figures of what a command has found, and print it. Raises RuntimeError where it failed all the same."""
    for path, draw in outcome.figures.items():
        import_module(".pages.style", __package__).save_themes(draw, path)
    print(json.dumps(outcome.result, indent=2) if as_json else printable(outcome.page(outcome.result)))
    if outcome.failed:
        raise RuntimeError(outcome.failed)


def _flush() -> None:
    """Write what was printed: what cannot be written must show here, under its name, and not when Python ends."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if not _is_broken_pipe(error):
            error.filename = "standard output"
        sys.stdout = None  # type: ignore[assignment]  # Python would try again at its end
        raise


def _is_broken_pipe(error: Exception) -> bool:
    """Whether nobody reads the output any longer. Windows calls that an invalid argument, of no file."""
    unnamed = isinstance(error, OSError) and error.filename is None and getattr(error, "winerror", None) is None
    return isinstance(error, BrokenPipeError) or (sys.platform == "win32" and unnamed and error.errno == errno.EINVAL)


def _line(error: Exception, flags: Collection[str]) -> str:
    """What is said of an error: of one of the system, the file and its reason.

    flags: those of the command that were not given.
    """
    if isinstance(error, MemoryError):  # Python's own is empty, NumPy's says how much it could not get
        asked = f" ({error})" if str(error) else ""
        ways = " or ".join(flag for flag in ("--quantized", "--recompute") if flag in flags)
        ways = ways and f"try {ways}, "
        return f"there is not enough memory{asked}: end other programs, {ways}or use a smaller model or batch"
    if str(error) == "can't start new thread":
        return f"{error}: memory or processes are used up: end other programs, or set OMP_NUM_THREADS=1"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _refuse_unknown_command(words: Sequence[str]) -> None:
    """Raise UsageError when the first word is no command, and suggest the one that it resembles."""
    if not words:
        raise UsageError("which command? Start with: minilora finetune; minilora --help lists all commands")
    if not words[0].startswith("-") and words[0] not in NAMES:
        meant = suggestion(ELSEWHERE.get(words[0], words[0]), NAMES)
        raise UsageError(f"there is no command {words[0]!r}{meant}; minilora --help lists all commands")


def _refuse_what_cannot_be_stored(words: Sequence[str]) -> None:
    """Raise UsageError for a word whose bytes are no text, and OSError where relative paths lead nowhere."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            coding = sys.getfilesystemencoding()
            what = "rename such a file or folder, or set a locale (LC_ALL) with its letters"
            raise UsageError(f"{word!a} is not text in {coding}: {what}") from None
    try:
        os.getcwd()
    except FileNotFoundError:
        raise OSError("the folder you are in was removed: change to another one (cd)") from None


def _refuse_an_archive() -> None:
    """Raise OSError where the package is in no folder, since it opens its models and data by their paths."""
    if not (package := Path(__file__).parent).is_dir():
        why = "minilora cannot run from inside an archive: unpack it, or install it with pip"
        raise OSError(f"{package}: no such folder; {why}")


def build_parser(named: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of one command, or of all where none of them is named; each file in `commands/` adds its own flags."""
    parser = Parser(
        prog="minilora",
        description="LoRA written out in NumPy: fine-tune a real language model on a laptop.",
        epilog="Start with: minilora finetune",
    )
    parser.add_argument("--version", action="version", version=f"minilora {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in [name for name in named if name in NAMES] or NAMES:
        command = import_module(f".commands.{name}", __package__)
        help = command.HELP
        own = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        own.set_defaults(run=command.run, parser=own, command=name)
        command.add(own)
    return parser
