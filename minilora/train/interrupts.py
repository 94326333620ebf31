"""Ctrl-C and the other signals that end a job: each step is taken whole or not at all."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from ..progress import log


@contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """In this block the first Ctrl-C is only noted, in the list, so that each step is taken whole or not at all.

    So are SIGTERM, by which `kill`, `timeout` and batch systems ask a program to end, SIGUSR1, which Slurm can send
    before the time limit, and SIGHUP, by which a terminal does that is closed: these may come several times. Ctrl-C
    after a first signal raises KeyboardInterrupt at once. A handler other than Python's own is left in place.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if len(noted) > 1:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        with suppress(RuntimeError):  # while the same file is being written to
            log.info("\nstopping after this step; Ctrl-C again stops at once")  # below the bar

    own: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if hasattr(signal, "SIGHUP"):  # not on Windows
        own |= {signal.SIGHUP: signal.SIG_DFL, signal.SIGUSR1: signal.SIG_DFL}
    taken = {number: usual for number, usual in own.items() if signal.getsignal(number) == usual}
    try:
        for number in taken:
            signal.signal(number, note)
    except ValueError:  # only the main thread receives signals
        taken = {}
    try:
        yield noted
    finally:
        for number, usual in taken.items():
            signal.signal(number, usual)
