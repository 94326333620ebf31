"""Known mistakes as edits of the solution.

A solution is written once, as a function in a lesson's file, lesson09.py. Below `# 9.1 lora_forward` in
mistakes/lesson09.txt are the mistakes that the checker knows: the line that it prints, and indented what the student
wrote instead.

    scale is alpha / r, not alpha
        alpha / r -> alpha

Several edits below one line are made together. `old ->` removes a text, and `-> statement` puts a statement before the
body. A mistake that is not a small change of the solution names a function of the lesson's file instead of an edit.
"""

from __future__ import annotations

import ast
import importlib.abc
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

EDIT = re.compile(r"(.*?)(?:^| )->(?: |$)(.*)")  # "old -> new"; either may be empty


@dataclass(frozen=True)
class Mistake:
    """A mistake that the checker recognises.

    line: what the checker prints.
    steps: edits "old -> new" of the solution's body, or the name of one function.
    solution: what the edits change.
    otherwise: for a variant, the first form's mistake: it is taken where the edits do not fit the variant's solution.
    """

    line: str
    steps: Sequence[str]
    solution: Callable
    otherwise: Mistake | None = None

    @cached_property
    def function(self) -> Callable:
        """A function that makes this mistake."""
        if len(self.steps) == 1 and self.steps[0].isidentifier():
            return self.solution.__globals__[self.steps[0]]
        head, body = source_of(self.solution)
        for step in self.steps:
            edit = EDIT.fullmatch(step)
            if not edit or (edit[1] and body.count(edit[1]) != 1):
                if self.otherwise:
                    return self.otherwise.function
                count = body.count(edit[1]) if edit else 0
                raise ValueError(
                    f"mistake {self.line!r} of {self.solution.__name__}: {step!r} must be old -> new, where the old "
                    f"text occurs once in the solution; it occurs {count} times"
                )
            body = body.replace(edit[1], edit[2]) if edit[1] else f"    {edit[2]}\n{body}"
        return compiled(head + body, self.solution)

    def within(self, solution: Callable, replaces: Mapping[str, str]) -> Mistake:
        """The same mistake in a variant's solution; these words are replaced in its line and in its edits."""
        return Mistake(swapped(self.line, replaces), [swapped(step, replaces) for step in self.steps], solution, self)


def swapped(text: str, replaces: Mapping[str, str]) -> str:
    """The text with these words replaced, one after the other."""
    for old, new in replaces.items():
        text = text.replace(old, new)
    return text


def listed(number: str, name: str) -> str:
    """What mistakes/lesson09.txt lists for an exercise: number "9.1", name "lora_forward"."""
    return sections(f"lesson{int(number.partition('.')[0]):02}")[f"{number} {name}"]


@cache
def sections(file: str) -> dict[str, str]:
    """What is below each heading of mistakes/FILE.txt."""
    text = (Path(__file__).parent / "mistakes" / f"{file}.txt").read_text("utf-8")
    _, *parts = re.split(r"^# (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def parse(text: str, solution: Callable) -> list[Mistake]:
    """The mistakes that a text lists: a line that is printed, then indented lines that say how it is made."""
    lines = [line for line in textwrap.dedent(text).splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if not line.startswith(" ")]
    blocks = [lines[a:b] for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]
    return [Mistake(" ".join(line.split()), [step.strip() for step in steps], solution) for line, *steps in blocks]


def source_of(solution: Callable) -> tuple[str, str]:
    """The text of a solution, without its decorators: its signature with the docstring, and its body."""
    text = textwrap.dedent(getattr(solution, "text", None) or inspect.getsource(solution))
    node: Any = ast.parse(text).body[0]
    lines = text.splitlines(keepends=True)
    start, end = node.lineno - 1, node.body[1].lineno - 1  # the docstring is the first statement
    return "".join(lines[start:end]), "".join(lines[end:])


def replaced(solution: Callable, replaces: Mapping[str, str], **names: Callable) -> Callable:
    """The solution of a variant: these texts are replaced wherever they occur, and it calls these functions."""
    return compiled(swapped("".join(source_of(solution)), replaces), solution, **names)


class _Text(importlib.abc.InspectLoader):
    """Loads a module from a string. Importlib compiles and runs it, as it does the files of this package."""

    def __init__(self, source: str):
        self.source = source

    def get_source(self, fullname: str) -> str:
        return self.source


def compiled(text: str, solution: Callable, **names: Callable) -> Callable:
    """The function that a changed text of a solution defines. It sees the names that the solution sees, and `names`.

    The text is the package's own source with edits that stand in the package; nothing from elsewhere is run here. A
    module, rather than a new code object, so that a function that calls itself calls the changed one.
    """
    module = types.ModuleType(solution.__module__)
    vars(module).update(solution.__globals__ | names)
    _Text(text).exec_module(module)
    function = getattr(module, solution.__name__)
    function.text = text  # no file has it
    return function
