"""Many small runs, some at a time, each in a process with its share of the cores.

def trial(lr, seed):                    # a function at the top level of a file; JSON in, JSON out
    ...
    return {"loss": 2.5}

results = run_trials(trial, [{"lr": 1e-3, "seed": 0}, {"lr": 1e-2, "seed": 0}], jobs=2)

Processes are started afresh ("spawn"), the same on every system: a script that calls this keeps what it does under
`if __name__ == "__main__":`.
"""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from ..engine.parallel import THREADS, processors
from .memo import as_json, code_sha256, keep, path_of, recall

Trial = Mapping[str, Any]
Done = Callable[[int, Any], object]


def run_trials(
    function: Callable[..., Any],
    trials: Sequence[Trial],
    jobs: int | None = None,
    done: Done = lambda index, result: None,
    folder: Path | None = None,
) -> list[Any]:
    """Call function(**trial) for every trial, `jobs` of them at a time, and return what they gave, in their order.

    A trial that raises gives {"failed": why}, in one line, and the others go on. So does one whose process ends, for
    example because memory ran out: it has {"again": True} as well, as one that lacked memory or a file, since it may
    succeed another time. MINILORA_TRACEBACK=1 shows the traceback. Ctrl-C ends all processes.

    function: at the top level of a file. Arguments and result are what JSON can hold.
    jobs: processes; the cores if left out, and 1 is this process. Each has its share of the cores for its threads.
    done: is called with index and result of each trial as soon as it ends.
    folder: where results are kept and found again (`memo`), as long as the code that decides them is the same. Failed
        trials are not kept.
    """
    results: list[Any] = [None] * len(trials)
    left = dict(enumerate(trials))
    decides = [_decisive(function, trial) for trial in trials] if folder else []
    places = [path_of(folder, function.__name__, each) for each in decides] if folder else []

    def finish(index: int, result: Any, found: bool = False) -> None:
        if places and not found and not has_failed(result):
            keep(places[index], decides[index], result)
        results[index] = result
        done(index, result)

    for i, place in enumerate(places):
        if (record := recall(place, decides[i])) is not None:
            del left[i]
            finish(i, record["result"], found=True)
    jobs = min(jobs or processors(), len(left))
    if jobs <= 1:
        for i, trial in left.items():
            finish(i, _attempt(function, trial))
    while left and jobs > 1:
        for i in _together(function, left, jobs, finish):  # one of these ended its process: now each runs alone
            alone = {i: left.pop(i)}
            if _together(function, alone, 1, finish):
                finish(i, {"failed": "its process ended before it did: is there memory enough?", "again": True})
    return results


def has_failed(result: Any) -> bool:
    """Whether this is the reason why a trial has no result."""
    return isinstance(result, Mapping) and "failed" in result


def reason(error: Exception) -> str:
    """Why something failed, in one line. Errors written for people are their sentence; others begin with their kind.

    MINILORA_TRACEBACK=1 prints the traceback as well.
    """
    if os.environ.get("MINILORA_TRACEBACK"):
        traceback.print_exception(error)
    words, kind = " ".join(str(error).split()), type(error).__name__
    return (
        words if words and isinstance(error, (ValueError, OSError, RuntimeError)) else f"{kind}: {words}".rstrip(": ")
    )


def _decisive(function: Callable[..., Any], trial: Trial) -> dict[str, Any]:
    file = getattr(sys.modules.get(function.__module__), "__file__", None)
    named = f"{function.__module__}.{function.__qualname__}"
    return {"function": named, "trial": dict(trial), "code": code_sha256(Path(file)) if file else None}


# -- processes ---------------------------------------------------------------------------------------------------------


def _attempt(function: Callable[..., Any], trial: Trial) -> Any:
    """The result as JSON keeps it, or why there is none."""
    try:
        return as_json(function(**trial))
    except Exception as error:
        again = {"again": True} if isinstance(error, (OSError, MemoryError)) else {}
        return {"failed": reason(error)} | again


def _together(function: Callable[..., Any], left: dict[int, Trial], jobs: int, finish: Done) -> list[int]:
    """Run what is `left`, and take out of it what ends. If one ends its process, return all that were running then."""
    from concurrent.futures import ProcessPoolExecutor  # imported here, since a browser's Python has no processes

    waiting = iter(list(left))
    flying: dict[Future[Any], int] = {}
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_begin)
    with _threads(max(1, processors() // jobs)), _ended(executor) as pool:
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


def _begin() -> None:
    """In a new process: leave Ctrl-C to the process that started this one, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    from multiprocessing.connection import wait

    wait([sentinel])
    os._exit(1)


@contextmanager
def _ended(pool: Executor) -> Iterator[Executor]:
    """If the block fails, by Ctrl-C for example, end what is running instead of waiting for it."""
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
    """Processes that start in this block have `share` threads for matrices, or fewer if the environment asks for it."""
    before = {name: os.environ.get(name) for name in THREADS}
    for name, value in before.items():
        os.environ[name] = str(min(share, int(value)) if value and value.isdigit() and int(value) else share)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
