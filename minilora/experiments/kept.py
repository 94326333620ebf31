"""Under what name the numbers of a claim are kept: a fingerprint of the code that computes them, and of no other.

That code is the claim's file and all files of minilora that it uses, and that those use. Comments and docstrings decide
no number, nor do the sentences and the band of CLAIM, nor `picture`: they may be changed after a run.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from .trials import code_sha256, essence

ROOT = Path(__file__).parents[1]  # the folder minilora/


def fingerprint(file: Path, root: Path = ROOT) -> str:
    """SHA-256 of what a file of minilora, or beside it, computes, and of the data that comes with minilora."""
    digest = hashlib.sha256(code_sha256(None, root, ("data", "weights")).encode())
    for each in sorted(_used(file, root)):
        digest.update(f"{each.name} {ast.dump(_essence(each))}".encode())
    return digest.hexdigest()


def _used(file: Path, root: Path) -> set[Path]:
    """The file, and all that it imports from minilora, at any depth."""
    found = {file}
    for each in (stack := [file]):  # grows while it is walked through
        new = set(_imports(each, root)) - found
        found |= new
        stack += new
    return found


def _imports(file: Path, root: Path) -> Iterator[Path]:
    package = list(file.parent.relative_to(root.parent).parts) if file.is_relative_to(root) else []
    for node in ast.walk(_essence(file)):
        names: list[list[str]] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = above + (node.module.split(".") if node.module else [])
            names = [[*module, alias.name] for alias in node.names]
        for name in (name for name in names if name[0] == root.name):
            parts = [root.parent.joinpath(*name[:end]) for end in range(2, len(name) + 1)]
            places = [place for part in parts for place in (part.with_suffix(".py"), part / "__init__.py")]
            yield from [place for place in places if place.is_file()] or [root / "__init__.py"]  # import minilora


@cache
def _essence(file: Path) -> ast.Module:
    """The file as Python reads it, without what decides no number."""
    tree = essence(file)
    tree.body = [node for node in tree.body if not _is_words(node)]
    return tree


def _is_words(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == "CLAIM" for target in node.targets)
    return isinstance(node, ast.FunctionDef) and node.name == "picture"
