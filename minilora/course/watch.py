"""Watch a student's function while it runs: the shapes it computes, calls of the engine, and the time it takes."""

import _thread
import contextlib
import math
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

from ..engine.tensor import Tensor
from .compare import Wrong

SECONDS = 10.0  # a check that takes longer is stopped
PRINTED = 4000  # characters that an answer may print in one check


class Watched(np.ndarray):
    """An array that records in `seen` the shapes of all results computed from it. Views (.T, slices) do not count."""

    seen: set[tuple[int, ...]]

    def __array_finalize__(self, source: Any) -> None:
        self.seen = getattr(source, "seen", set())

    def __repr__(self) -> str:  # a student who prints an argument sees an array
        return repr(self.view(np.ndarray))

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **settings: Any) -> Any:
        if out is not None:
            settings["out"] = tuple(plain(x) for x in out)
        result = getattr(ufunc, method)(*map(plain, inputs), **plain(settings))
        if out is not None:
            self.seen.update(x.shape for x in out if x is not None)
            return out[0] if len(out) == 1 else out
        return self._note(result)

    def __array_function__(self, function: Any, types: Any, arguments: Any, settings: Any) -> Any:
        given = plain(arguments)
        result = function(*given, **plain(settings))
        if isinstance(result, np.ndarray) and any(is_view(result, x) for x in given):
            return watched(result, self.seen)  # such as np.transpose's
        return self._note(result)

    def dot(self, b: Any, out: Any = None) -> Any:
        """As `ndarray.dot`, which asks neither of the two functions above."""
        return self._note(plain(self).dot(plain(b), out))

    def _note(self, result: Any) -> Any:
        if isinstance(result, tuple):
            return tuple(self._note(part) for part in result)
        if not isinstance(result, np.ndarray):
            return result
        self.seen.add(result.shape)
        return watched(result, self.seen)


Watched.__module__ = "numpy"  # by which the engine finds the array's library


def watched(array: np.ndarray, seen: set[tuple[int, ...]]) -> Watched:
    """The same numbers, watched."""
    view = array.view(Watched)
    view.seen = seen
    return view


def is_view(array: np.ndarray, of: Any) -> bool:
    """Is it other numbers of `of`, or the same in another order, and no copy? An array given for the result is none."""
    return isinstance(of, np.ndarray) and array is not of and np.may_share_memory(array, of)


def plain(value: Any) -> Any:
    """The value with plain arrays and truth values, not watched ones or matrices, also in tuples, lists and dicts."""
    if isinstance(value, np.ndarray) and type(value) is not np.ndarray:
        return value.view(np.ndarray)
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return math.inf  # no float can be compared with it
    if type(value) in (tuple, list):
        return type(value)(plain(part) for part in value)
    if type(value) is dict:
        return {name: plain(part) for name, part in value.items()}
    return value


@contextlib.contextmanager
def without_the_engine() -> Iterator[None]:
    """Within it, `.backward()` raises Wrong: the gradient must be written by hand."""

    def backward(self: Tensor, grad: Any = None) -> None:
        raise Wrong("by hand: write the gradient down yourself, without .backward()")

    with mock.patch.object(Tensor, "backward", backward):
        yield


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raise Wrong in the code within it after SECONDS. Only the main thread has a limit, and none has one in a browser,
    where no thread can wait for the time.

    It interrupts as Ctrl-C does, on every system. A Ctrl-C of the user still raises KeyboardInterrupt.
    """
    if threading.current_thread() is not threading.main_thread() or sys.platform == "emscripten":
        yield
        return
    lock, state = threading.Lock(), {"running": True, "late": False}

    def stop() -> None:
        with lock:
            if state["running"]:
                state["late"] = True
                if (main := threading.main_thread().ident) and hasattr(signal, "pthread_kill"):
                    signal.pthread_kill(main, signal.SIGINT)  # a signal ends a sleep, too
                else:
                    _thread.interrupt_main()

    timer = threading.Timer(SECONDS, stop)
    timer.daemon = True
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, signal.SIG_DFL):  # in a program that a shell started in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    try:
        yield
        with lock:
            state["running"] = False
    except KeyboardInterrupt:
        if not state["late"]:
            raise
        raise Wrong(
            f"stopped after {SECONDS:.0f} seconds: does a loop never end, does it wait for something, or is it slow?"
        ) from None
    finally:
        timer.cancel()
        with lock:
            state["running"] = False
        if before in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGINT, before)


class Shortened:
    """A stream that passes on the first characters of what is written to it, and counts the others."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.room = PRINTED
        self.left_out = 0

    def write(self, text: str) -> int:
        """Pass on what there is room for. Returns the characters of the text, as any stream does."""
        self.stream.write(text[: self.room])
        self.left_out += max(0, len(text) - self.room)
        self.room = max(0, self.room - len(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def readable_output() -> Iterator[None]:
    """Print each warning once, as one line on stdout, and stderr on stdout: nbgrader deducts points for stderr.

    Of what an answer prints, the beginning is shown.
    """
    out = Shortened(sys.stdout)
    with (
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stdout(out),  # type: ignore[type-var]
        contextlib.redirect_stderr(out),  # type: ignore[type-var]
    ):
        warnings.simplefilter("always")
        try:
            yield
        finally:
            if out.left_out:
                out.stream.write(f"\n(your code printed {out.left_out:,} more characters)\n")
            for line in dict.fromkeys(f"{w.category.__name__}: {w.message}" for w in caught):
                out.stream.write(f"(your code warns: {line})\n")
