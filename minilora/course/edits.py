"""Known mistakes as edits of the solution.

A solution is written once, as a function in a lesson's file. A mistake is the line that the checker prints, and below
it what the student wrote instead:

    scale is alpha / r, not alpha
        alpha / r -> alpha

Several edits below one line are made together. `old ->` removes a text, and `-> statement` puts a statement before the
body. A mistake that is no small change of the solution names a function of
the same file instead of an edit.
"""

from __future__ import annotations

import ast
import importlib.abc
import inspect
import textwrap
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

ARROW = "->"


@dataclass(frozen=True)
class Mistake:
    """A mistake that the checker recognises.

    line: what the checker prints.
    steps: edits "old -> new" of the solution's body, or the name of one function.
    solution: what the edits change.
    """

    line: str
    steps: Sequence[str]
    solution: Callable

    @cached_property
    def function(self) -> Callable:
        """A function that makes this mistake."""
        if len(self.steps) == 1 and self.steps[0].isidentifier():
            return self.solution.__globals__[self.steps[0]]
        head, body = source_of(self.solution)
        for step in self.steps:
            old, arrow, new = map(str.strip, step.partition(ARROW))
            if not arrow or (old and body.count(old) != 1):
                where = f"{body.count(old)} times in the solution, expected once" if arrow else "without an arrow"
                raise ValueError(f"mistake {self.line!r} of {self.solution.__name__}: {old!r} occurs {where}")
            body = body.replace(old, new) if old else f"    {new}\n{body}"
        return compiled(head + body, self.solution)


def parse(text: str, solution: Callable) -> list[Mistake]:
    """The mistakes that a text lists: a line that is printed, then indented lines that say how it is made."""
    if not isinstance(text, str):  # TEMPORARY
        return [types.SimpleNamespace(line=l, function=f, steps=[]) for f, l in text.values()]
    lines = [line for line in textwrap.dedent(text).splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if not line.startswith(" ")]
    blocks = [lines[a:b] for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]
    return [Mistake(line, [step.strip() for step in steps], solution) for line, *steps in blocks]


def source_of(solution: Callable) -> tuple[str, str]:
    """The text of a solution, without its decorators: its signature with the docstring, and its body."""
    text = textwrap.dedent(inspect.getsource(solution))
    node: Any = ast.parse(text).body[0]
    lines = text.splitlines(keepends=True)
    start, end = node.lineno - 1, node.body[1].lineno - 1  # the docstring is the first statement
    return "".join(lines[start:end]), "".join(lines[end:])


def replaced(solution: Callable, replaces: Iterable[tuple[str, str]]) -> Callable:
    """The solution with these texts replaced wherever they occur: how a variant of an exercise is answered."""
    text = "".join(source_of(solution))
    for old, new in replaces:
        text = text.replace(old, new)
    return compiled(text, solution)


class _Text(importlib.abc.InspectLoader):
    """Loads a module from a string. Importlib compiles and runs it, as it does the files of this package."""

    def __init__(self, source: str):
        self.source = source

    def get_source(self, fullname: str) -> str:
        return self.source


def compiled(text: str, solution: Callable) -> Callable:
    """The function that a changed text of a solution defines, with the names that the solution sees.

    The text is the package's own source with edits that stand in the package; nothing from elsewhere is run here. A
    module, rather than a new code object, so that a function that calls itself calls the changed one.
    """
    module = types.ModuleType(solution.__module__)
    vars(module).update(solution.__globals__)
    _Text(text).exec_module(module)
    return getattr(module, solution.__name__)
