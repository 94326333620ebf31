"""What a person sees of work while it runs: lines through `logging`, progress bars through one context.

    log.info("%d records were cut", cut)                     # a line
    with progress("training", steps, "step") as bar:         # a bar
        for step in range(steps):
            bar.update(loss=1.25)

In a library both are silent: lines go to the logger "minilora", where whoever configures logging finds them. The
command line, and a program or notebook that calls `show_progress()`, shows both on stderr.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from .terminal import printable

# What is known of a stage (its loss, for example) comes before the bar, which takes the rest of the line.
WITH_TEXT = "{desc:<14}  {text}  {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
WITH_SPEED = "{desc:<14}  {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"

log = logging.getLogger("minilora")
_hidden: ContextVar[bool] = ContextVar("hidden", default=False)
_innermost: ContextVar[Bar | None] = ContextVar("innermost", default=None)


class Bar:
    """A progress bar, or what takes its place where none is shown. `update` may be called from any thread."""

    def __init__(self, unit: str, shown: Any = None):
        self.unit, self.shown, self.lock = unit, shown, threading.Lock()

    def update(self, count: int = 1, text: str | None = None, **values: float) -> None:
        """Advance by `count`. text: shown in front of the bar; values: the same, each with its name."""
        if self.shown is None:
            return
        known = [*([text] if text else []), *(f"{name}={value:.4g}" for name, value in values.items())]
        with self.lock:
            if known:
                self.shown.set_postfix_str(", ".join(known), refresh=False)
            self.shown.update(count)


@contextmanager
def progress(title: str, total: int, unit: str, initial: int = 0) -> Iterator[Bar]:
    """Show the progress of the work in this block.

    title: what is done, such as "training".
    total, initial: the amount of work, and how much of it is done already.
    unit: "step", "record" and so on.

    Inside another bar of the same unit, the work counts as part of the outer bar's; inside one of another unit, it is
    not shown. So a function that shows its progress can be called by one that shows a larger whole.
    """
    outer = _innermost.get()
    if outer is None:
        bar = Bar(unit, _tqdm(title, total, unit, initial) if total and _shown() else None)
    elif outer.unit == unit:
        bar = outer
        bar.update(initial)
    else:
        bar = Bar(unit)
    token = _innermost.set(bar)
    try:
        yield bar
    finally:
        _innermost.reset(token)
        if bar is not outer and bar.shown is not None:
            bar.shown.close()


def show_progress(on: bool = True) -> bool:
    """Show lines and progress bars on stderr from now on, as the command line does, or show them no longer.

    Returns whether they were shown before.
    """
    before = _HANDLER in log.handlers
    if on and not before:
        log.addHandler(_HANDLER)
        log.setLevel(logging.INFO)
    elif before and not on:
        log.removeHandler(_HANDLER)
        log.setLevel(logging.NOTSET)
    return before


@contextmanager
def hide_progress(hide: bool = True) -> Iterator[None]:
    """In this block, this thread shows no bar and logs no line: for a part of a larger job, which shows its own."""
    token = _hidden.set(hide or _hidden.get())
    try:
        yield
    finally:
        _hidden.reset(token)


class _Stderr:
    """stderr as it is now, on which no work depends: what cannot be written is lost, and no error.

    A pipe loses its reader when Ctrl-C ends `tee` as well, a terminal is closed, the disk of a log file is full.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


STDERR: Any = _Stderr()


class _ToStderr(logging.Handler):
    """Prints each message alone, above the bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        line = printable(self.format(record))
        if (bar := _innermost.get()) is not None and bar.shown is not None:
            bar.shown.write(line, file=STDERR)
        else:
            print(line, file=STDERR)


_HANDLER = _ToStderr()
log.addFilter(lambda record: not _hidden.get())


def _shown() -> bool:
    return _HANDLER in log.handlers and not _hidden.get()


def _tqdm(title: str, total: int, unit: str, initial: int) -> Any:
    """On a terminal, a bar that moves several times a second; elsewhere it prints a line every 20 seconds."""
    pace = 0.2 if sys.stderr.isatty() else 20.0
    return _tqdm_class()(
        desc=title, total=total, initial=initial, unit=unit, mininterval=pace, dynamic_ncols=True, file=STDERR
    )


@functools.cache
def _tqdm_class() -> Any:
    from tqdm import tqdm

    class Shown(tqdm):
        """Shows what `update` was passed, or else its speed."""

        @property
        def format_dict(self) -> dict[str, Any]:
            return super().format_dict | {"bar_format": WITH_TEXT if self.postfix else WITH_SPEED, "text": self.postfix}

    return Shown
