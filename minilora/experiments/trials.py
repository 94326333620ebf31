"""Many small runs, some at a time, each in a process with its share of the cores; and a cache of what they found.

def trial(lr, seed):                    # a function at the top level of a file; JSON in, JSON out
    ...
    return {"loss": 2.5}

results = run_trials(trial, [{"lr": 1e-3, "seed": 0}, {"lr": 1e-2, "seed": 0}], jobs=2)

Processes are started afresh ("spawn"), the same on every system: a script that calls this keeps what it does under
`if __name__ == "__main__":`.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

from ..engine.parallel import THREADS, processors
from ..files.disk import read_json, write_json
from ..nn.ranks import world

DECISIVE = ("data", "engine", "experiments", "files", "io", "lora", "nn", "tasks", "train", "weights")

Trial = Mapping[str, Any]
Done = Callable[[int, Any], object]


def run_trials(
    function: Callable[..., Any],
    trials: Sequence[Trial],
    jobs: int | None = None,
    done: Done = lambda index, result: None,
    cache: Path | None = None,
) -> list[Any]:
    """Call function(**trial) for every trial, `jobs` of them at a time, and return what they gave, in their order.

    A trial that raises gives {"failed": why}, in one line, and the others go on; so does one whose process ends, for
    want of memory for instance. MINILORA_TRACEBACK=1 shows where it was. Ctrl-C ends all processes; what `done` has
    heard of until then is done.

    function: at the top level of a file, or a `partial` of such a one. Arguments and result are what JSON can hold.
    jobs: processes; the cores if left out, and 1 is this process. Each has its share of the cores for its threads.
    done: hears index and result of each trial as it ends. cache: a folder where results are kept, see `cached`; failed
    trials are not.
    """
    results: list[Any] = [None] * len(trials)

    def finish(index: int, result: Any) -> None:
        results[index] = result
        done(index, result)

    left = dict(enumerate(trials))
    if cache is not None:
        for i, trial in enumerate(trials):
            if (path := _place(function, trial, cache)).is_file():
                finish(i, read_json(path)["result"])
                del left[i]
        function = partial(cached, function, folder=cache)
        left = {i: {"trial": dict(trial)} for i, trial in left.items()}
    jobs = min(jobs or usual_jobs(), len(left))
    if jobs <= 1:
        for i, trial in left.items():
            finish(i, _attempt(function, trial))
    while left and jobs > 1:
        for i in _together(function, left, jobs, finish):  # one of these has ended its process: each by itself, now
            alone = {i: left.pop(i)}
            if _together(function, alone, 1, finish):
                finish(i, {"failed": "its process ended before it did: is there memory enough?"})
    return results


def usual_jobs() -> int:
    """Trials at a time where nothing is said: one per core; under mpiexec one per rank but the first."""
    return world().size - 1 or processors()


# -- processes ---------------------------------------------------------------------------------------------------------


def _attempt(function: Callable[..., Any], trial: Trial) -> Any:
    """The result as JSON keeps it, or why there is none."""
    try:
        return json.loads(json.dumps(function(**trial)))
    except Exception as error:
        if os.environ.get("MINILORA_TRACEBACK"):
            traceback.print_exc()
        words = " ".join(str(error).split())
        kind = type(error).__name__
        told = isinstance(error, (ValueError, OSError, RuntimeError))  # errors for people; the others need their kind
        return {"failed": words if words and told else f"{kind}: {words}" if words else kind}


def _together(function: Callable[..., Any], left: dict[int, Trial], jobs: int, finish: Done) -> list[int]:
    """Take what ends out of `left`, until all has. Returns early, with those at work, when one ends its process."""
    waiting = iter(list(left))
    flying: dict[Future[Any], int] = {}
    with _threads(max(1, processors() // jobs)), _ended(_executor(jobs)) as pool:
        try:
            for i in islice(waiting, jobs):
                flying[pool.submit(_attempt, function, left[i])] = i
            while flying:
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    i = flying.pop(future)
                    del left[i]
                    finish(i, result)
                    for following in islice(waiting, 1):
                        flying[pool.submit(_attempt, function, left[following])] = following
        except BrokenExecutor:
            return [i for i in flying.values() if i in left]
    return []


def _executor(jobs: int) -> Executor:
    """What the trials run in, the one place that knows: under mpiexec the other ranks, else processes here."""
    here = multiprocessing.get_context("spawn")
    return world().pool or ProcessPoolExecutor(jobs, mp_context=here, initializer=_begin)


def _begin() -> None:
    """A process of its own begins: Ctrl-C is for the one that started it, and with that one it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)


@contextmanager
def _ended(pool: Executor) -> Iterator[Executor]:
    """When the block fails, as by Ctrl-C, what runs is not waited for."""
    others = set(multiprocessing.active_children())
    with pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise


@contextmanager
def _threads(share: int) -> Iterator[None]:
    """Processes started in this block give their matrix library so many threads, or fewer where fewer are asked for."""
    before = {name: os.environ.get(name) for name in THREADS}
    for name, value in before.items():
        os.environ[name] = str(min(share, int(value)) if value and value.isdigit() and int(value) else share)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# -- the cache ---------------------------------------------------------------------------------------------------------


def cached(function: Callable[..., Any], trial: Trial, folder: Path) -> Any:
    """function(**trial), or what it gave when it was called like that before: `folder` holds a file of each result.

    A result is found again as long as function, arguments, and the code that decides what it is are the same: the
    function's file, and the rooms of minilora in DECISIVE. Comments and docstrings decide nothing.
    """
    path = _place(function, trial, folder)
    if path.is_file():
        return read_json(path)["result"]
    result = json.loads(json.dumps(function(**trial)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"function": _named(function), "trial": dict(trial), "result": result})
    return result


def _place(function: Callable[..., Any], trial: Trial, folder: Path) -> Path:
    told = json.dumps([_named(function), trial, _bound(function), code_sha256(_file(function))], sort_keys=True)
    return folder / f"{_inner(function).__name__}-{hashlib.sha256(told.encode()).hexdigest()[:20]}.json"


def _inner(function: Any) -> Any:
    return _inner(function.func) if isinstance(function, partial) else function


def _bound(function: Any) -> list[Any]:
    """What partials have fixed, from the outermost in."""
    return [function.args, function.keywords, *_bound(function.func)] if isinstance(function, partial) else []


def _named(function: Any) -> str:
    inner = _inner(function)
    return f"{inner.__module__}.{inner.__qualname__}"


def _file(function: Any) -> Path | None:
    name = getattr(sys.modules.get(_inner(function).__module__), "__file__", None)
    return Path(name) if name else None


@functools.cache
def code_sha256(
    file: Path | None = None, root: Path = Path(__file__).parents[1], rooms: Sequence[str] = DECISIVE
) -> str:
    """The fingerprint of the code and data that decide what a trial finds: of the rooms, and of one file besides.

    Of a Python file it is that of what it says, without comments, docstrings and layout.
    """
    digest = hashlib.sha256()
    inside = (each for room in rooms for each in sorted((root / room).rglob("*")) if each.is_file())
    for each in [*inside, *([file] if file else [])]:
        if "__pycache__" in each.parts or each.suffix == ".md":
            continue
        digest.update(each.name.encode())
        digest.update(ast.dump(essence(each)).encode() if each.suffix == ".py" else each.read_bytes())
    return digest.hexdigest()


def essence(file: Path) -> ast.Module:
    """What a Python file says, without comments, docstrings and layout."""
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node, clean=False
        ):
            del node.body[0]
    return tree
