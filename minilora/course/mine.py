"""The student's functions, passed from one notebook to the next.

A function that passes its check is written to mine.py in the notebook's folder. A later exercise begins with

    from minilora.course.mine import numerical_gradient

which reads that file. If the function is not there yet, a line says which exercise to do first. What is imported then
looks into the file when it is called, and raises NotImplementedError while the function is missing. Under nbgrader,
which has no such file, it is the solution, in the variant of the exercise that is checked.
"""

import ast
import contextlib
import functools
import inspect
import io
import linecache
import math
import os
import re
import runpy
import sys
import tempfile
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .exercises import EXERCISES

FILE = "mine.py"
HEAD = '''"""Functions of mine that passed their check. Written by `check`; later exercises read it.

See what is done with `minilora progress`.
"""
'''
PREDICTED = re.compile(r"^# predictions\b.*\Z", re.MULTILINE | re.DOTALL)  # what predictions.py puts at the end
VARIANT: int | None = None  # of the exercise that is checked
MARK = re.compile(r"^# (\d+\.\d+) (\w+)(?:, variant (\d+))?$", re.MULTILINE)


def __getattr__(name: str) -> Any:
    """`from minilora.course.mine import NAME`."""
    if name not in EXERCISES:
        raise AttributeError(f"no exercise is called {name}: there are {', '.join(EXERCISES)}")
    path = Path(FILE)
    if path.exists() and (found := load(path).get(name)) is not None:
        return found
    if os.environ.get("NBGRADER_EXECUTION"):
        return lambda *arguments, **settings: EXERCISES[name].form(VARIANT).reference(*arguments, **settings)
    line = f"{name} is not in {FILE} yet: do exercise {EXERCISES[name].number} first"
    absent = "" if path.exists() else f" (there is no {path.absolute()}: is this notebook next to the other exercises?)"
    print(line + absent)

    def missing(*arguments: Any, **settings: Any) -> Any:
        return written()(*arguments, **settings)

    @functools.cache  # an error is not stored: the next call looks again
    def written() -> Callable:
        if path.exists() and (found := load(path).get(name)) is not None:
            return found
        raise NotImplementedError(name)

    missing.__name__, missing.__doc__ = name, line
    return missing


def load(path: Path) -> dict[str, Any]:
    """The names that a mine.py defines. Runs the file, the student's own code. Raises ImportError if that fails."""
    try:
        return runpy.run_path(str(path), run_name="mine")
    except Exception as error:
        line = f"{type(error).__name__}: {error}"
        raise ImportError(f"{path} cannot be run ({line}): fix it, or delete it and check again") from None


def variants(path: Path) -> dict[str, int | None]:
    """The exercises in a mine.py, with the variant of each."""
    return {name: int(v) if v else None for _, name, v in MARK.findall(path.read_text("utf-8"))}


def keep(function: Callable, number: str, variant: int | None, wrong: Callable[[Callable], str]) -> str:
    """Write a function of a notebook or a script into mine.py, replacing an older one. Returns what `check` adds.

    wrong: what is wrong with the function that mine.py then has; "" if nothing is. It may differ, since a notebook's
        cells run in any order. If something is, the file is left as it was.

    Nothing is written for functions from a module, and nothing under nbgrader; then "" is returned.
    """
    if scope_of(function).get("__name__") != "__main__" or os.environ.get("NBGRADER_EXECUTION"):
        return ""
    path, name = Path(FILE), function.__name__
    try:
        imports, sources = needs(function)
    except (OSError, TypeError, IndexError, SyntaxError):
        return " (not kept: its source was not found; leave out %%time or exec)"
    try:
        old = path.read_text("utf-8") if path.exists() else HEAD
        found = PREDICTED.search(old)
        text = _joined(PREDICTED.sub("", old), imports, sources, number, name, variant)
        text += f"\n\n{found[0]}" if found else ""
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            tried = Path(folder, FILE)
            tried.write_text(text, "utf-8")
            try:
                line = wrong(load(tried)[name])
            except ImportError as error:
                line = str(error).replace(str(tried), FILE)
        if line:
            return f" (not kept, since with it {FILE} would be wrong: {line}; restart the kernel and run all cells)"
        path.write_text(text, "utf-8")
    except UnicodeDecodeError:
        return f" (not kept: {FILE} is not UTF-8: save it as UTF-8, or delete it, and check again)"
    except OSError as error:
        return f" (not kept: {error})"
    return f" ({name} is kept in {FILE})"


def needs(function: Callable) -> tuple[list[str], list[str]]:
    """The imports that a function uses, and the sources of what it uses from its notebook, its own source last."""
    imports: list[str] = []
    sources: list[str] = []
    seen: set[str] = set()

    def visit(source: str, name: str) -> None:
        seen.add(name)
        nodes = list(ast.walk(ast.parse(source)))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        local = {n.arg for n in nodes if isinstance(n, ast.arg)}
        local |= {n.id for n in names if isinstance(n.ctx, ast.Store)}
        local -= {each for n in nodes if isinstance(n, ast.Global) for each in n.names}
        for used in dict.fromkeys(n.id for n in sorted(names, key=lambda n: (n.lineno, n.col_offset))):
            if used in seen or used not in scope:
                continue
            value = scope[used]
            own = getattr(value, "__name__", None)
            if isinstance(value, types.ModuleType):
                imports.append(f"import {own}" if own == used else f"import {own} as {used}")
            elif own and getattr(value, "__module__", "__main__") not in ("__main__", "mine", "minilora.course.mine"):
                imports.append(f"from {value.__module__} import {own}" + ("" if own == used else f" as {used}"))
            elif inspect.isfunction(value) or inspect.isclass(value):
                if used not in EXERCISES and value.__module__ == "__main__":
                    visit(source_of(value), used)
            elif used not in local:
                plain = type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))
                if statement := f"{used} = {value!r}\n" if plain else assigned(used):
                    visit(statement, used)
        sources.append(source)

    scope = scope_of(function)
    visit(source_of(function), function.__name__)
    return list(dict.fromkeys(imports)), sources


def assigned(name: str) -> str:
    """The last statement of a notebook or script that assigns or imports a global name; "" if there is none."""
    for file in cells():
        text = "".join(linecache.getlines(file))
        for node in reversed(statements(text)) if name in text else ():
            if isinstance(node, ast.ImportFrom):
                found = [alias.asname or alias.name for alias in node.names]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
            else:
                continue
            if name in found:
                return f"{ast.get_source_segment(text, node)}\n"
    return ""


def cells() -> list[str]:
    """The cells of a notebook, or a script, the last one first: what `linecache` has read, without modules."""
    modules = {getattr(module, "__file__", None) for key, module in sys.modules.items() if key != "__main__"}
    return [file for file in reversed(linecache.cache) if file not in modules]


def statements(text: str) -> list[ast.stmt]:
    """The statements of a file; none if it is not Python, or not finished."""
    try:
        return ast.parse(text).body
    except SyntaxError:
        return []


def methods_of(thing: Any) -> list[Any]:
    """The functions of an answer: a function itself, or the methods of a class."""
    return [thing] if inspect.isfunction(thing) else [m for m in vars(thing).values() if inspect.isfunction(m)]


def scope_of(thing: Any) -> dict[str, Any]:
    """The global names of the notebook or file in which a function or a class was written."""
    return next((method.__globals__ for method in methods_of(thing)), {}) if hasattr(thing, "__dict__") else {}


def source_of(thing: Any) -> str:
    """The source of a function or of a class, also of a class in a notebook, for which Python knows no file."""
    if inspect.isfunction(thing):
        return textwrap.dedent(inspect.getsource(thing)).rstrip() + "\n"
    files = [method.__code__.co_filename for method in methods_of(thing)]
    for file in [*files, *cells()]:  # all cells, too: the methods of a dataclass have no file
        text = "".join(linecache.getlines(file))
        for node in ast.walk(ast.parse(text)) if f"class {thing.__name__}" in text else ():
            if isinstance(node, ast.ClassDef) and node.name == thing.__name__:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                lines = text.splitlines()[first - 1 : node.end_lineno]
                return textwrap.dedent("\n".join(lines)).rstrip() + "\n"
    if statement := assigned(thing.__name__):  # a class that a call has made, such as a namedtuple
        return statement
    raise OSError(f"the source of {thing.__name__} was not found")


def _joined(old: str, imports: list[str], sources: list[str], number: str, name: str, variant: int | None) -> str:
    """The text of a mine.py with one function added or replaced."""
    head, *blocks = re.split(r"(?=^# \d+\.\d+ )", old, flags=re.MULTILINE)
    kept = {m[2]: block.rstrip() + "\n" for block in blocks if (m := MARK.match(block))}
    mark = f"# {number} {name}" + ("" if variant is None else f", variant {variant}")
    kept[name] = mark + "\n" + "\n\n".join(sources)
    lines = head.rstrip().splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith(("import ", "from "))), len(lines))
    doc, have = lines[:first], [line for line in lines[first:] if line.strip()]
    both = sorted({*have, *imports}, key=lambda line: (line.startswith("from"), line))
    order = sorted(kept.values(), key=lambda block: [int(n) for n in block.split()[1].split(".")])
    return "\n".join(["\n".join(doc).rstrip(), "", *both]).rstrip() + "\n\n\n" + "\n\n".join(order)
