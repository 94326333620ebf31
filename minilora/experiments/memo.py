"""Results that are computed once: a JSON file for each, found again by what decides it.

    decides = {"lr": 1e-3, "seed": 0, "code": code_sha256(Path(__file__))}
    record = remember(path_of(folder, "train", decides), decides, lambda: train(lr=1e-3, seed=0))
    record["result"], record["seconds"]

`recall` and `keep` are the two halves of `remember`, for callers that have to know whether a result is there.
"""

import ast
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..files.disk import read_json, sha256_of_file, write_json

ROOT = Path(__file__).parents[1]  # the folder minilora/
DATA = ("data", "weights")  # rooms whose files, code apart, decide results as well


def path_of(folder: Path, name: str, decides: Mapping[str, Any]) -> Path:
    """The file in `folder` of the result that is decided by this: its name ends with a digest of `decides`."""
    text = json.dumps(decides, sort_keys=True)
    return folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def recall(path: Path, decides: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record at `path`; None where there is none, or where something else decided it."""
    record = read_json(path) if path.is_file() else {}
    return record if "result" in record and record.get("decides") == as_json(decides) else None


def keep(path: Path, decides: Mapping[str, Any], result: Any, **notes: Any) -> dict[str, Any]:
    """Write a result with what decided it, and return the record: {"decides", "result", and the notes}.

    The file appears whole or not at all. Raises ValueError for a result with NaN or infinity, which JSON cannot hold.
    """
    record = as_json({"decides": decides, "result": result, **notes})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return record


def remember(path: Path, decides: Mapping[str, Any], make: Callable[[], Any]) -> dict[str, Any]:
    """The record at `path`, or that of make(), which is then kept there; `seconds` is the time that make() took."""
    if (record := recall(path, decides)) is not None:
        return record
    start = time.perf_counter()
    result = make()
    return keep(path, decides, result, seconds=time.perf_counter() - start)


def as_json(value: Any) -> Any:
    """The value as JSON gives it back. Raises ValueError for NaN and infinity, TypeError for what JSON cannot hold."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except ValueError as error:
        raise ValueError(f"expected finite numbers, as JSON can hold them ({error})") from error


# -- which code --------------------------------------------------------------------------------------------------------


@cache
def code_sha256(file: Path, root: Path = ROOT) -> str:
    """The fingerprint of the code that a file runs and of the data that come with minilora. A process reads them once.

    The code is the file itself and every file of minilora that it imports, at any depth. Comments, docstrings and
    layout decide no number, nor do the sentences and the band of a CLAIM, nor a `picture`: they may be changed.
    """
    data = (each for room in DATA for each in sorted((root / room).rglob("*")) if each.is_file())
    parts = [f"{each.name} {sha256_of_file(each)}" for each in data if each.suffix not in (".py", ".pyc", ".md")]
    parts += [f"{each.name} {_code(each)[0]}" for each in sorted(_used(file, root))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _used(file: Path, root: Path) -> set[Path]:
    """The file, and all that it imports from minilora, at any depth."""
    found = {file}
    for each in (ahead := [file]):  # the list grows in the loop
        new = set(_imports(each, root)) - found
        found |= new
        ahead += new
    return found


def _imports(file: Path, root: Path) -> Iterator[Path]:
    package = list(file.parent.relative_to(root.parent).parts) if file.is_relative_to(root) else []
    for level, name in _code(file)[1]:
        parts = [*package[: len(package) - level + 1], *name] if level else list(name)
        if parts[0] == root.name:
            bases = [root.parent.joinpath(*parts[:end]) for end in range(2, len(parts) + 1)]
            places = [place for base in bases for place in (base.with_suffix(".py"), base / "__init__.py")]
            yield from [place for place in places if place.is_file()] or [root / "__init__.py"]  # import minilora


@cache
def _code(file: Path) -> tuple[str, tuple[tuple[int, tuple[str, ...]], ...]]:
    """The digest of what a file computes, and its imports: how many dots, and the names."""
    tree = ast.parse(file.read_bytes())
    tree.body = [node for node in tree.body if not _only_words(node)]
    imports: list[tuple[int, tuple[str, ...]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            del node.body[0]
        elif isinstance(node, ast.Import):
            imports += [(0, tuple(alias.name.split("."))) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            imports += [(node.level, (*module, alias.name)) for alias in node.names]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), tuple(imports)


def _only_words(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == "CLAIM" for target in node.targets)
    return isinstance(node, ast.FunctionDef) and node.name == "picture"
