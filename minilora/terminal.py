"""What a terminal may be shown, and what a shell reads."""

from __future__ import annotations

import os
import re
import shlex

_CONTROL = re.compile(r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but the tab and the end of a line


def printable(text: str) -> str:
    """The text with U+FFFD for each control character: data, files and models may hold any, and some steer a terminal.

    >>> printable("a\\x1b[2Jb\\n")
    'a�[2Jb\\n'
    """
    return _CONTROL.sub("\ufffd", text)


def quote(word: str, system: str = os.name) -> str:
    """A word of a command that a line tells people to type, as their shell reads it.

    On Windows, cmd.exe and PowerShell both read double quotes. cmd.exe takes single quotes for letters of the word.
    A backslash there counts as itself, except before a double quote, where it is written twice.

    >>> quote("my run", "posix"), quote("my run", "nt")
    ("'my run'", '"my run"')
    """
    if system != "nt":
        return shlex.quote(word)
    inside = re.sub(r'(\\*)("|\Z)', lambda found: 2 * found[1] + ('\\"' if found[2] else ""), word)
    return word if re.fullmatch(r"[\w:./\\=+-]+", word) else f'"{inside}"'
