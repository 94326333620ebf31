"""Fair timings on a busy machine: each contender has its own process, and all take turns.

What slows one turn slows its neighbours too, so ratios of medians are reliable even if the seconds are not. The peak
memory of a process is the contender's alone.

The two sides exchange lines. The contender runs its step once to warm up and prints {"ready": true}. For every line
that it reads it runs the step once and prints {"seconds": s, "peak_bytes": n}; on an error it prints {"error": "why"}
and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from ..progress import progress
from .process import peak_memory

Work = Callable[[], float | None]  # does the work once; may return its own seconds instead of those it took


class BenchError(RuntimeError):
    """A contender has ended too early; the message says which, and why."""


@dataclass(frozen=True)
class Contender:
    """A command that answers as `serve` does, and its name in the results."""

    name: str
    command: Sequence[str]


@dataclass
class Timings:
    """Seconds of each turn, and the most bytes that the process has ever held (None: unknown)."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


# -- the contender's side ----------------------------------------------------------------------------------------------


def serve(setup: Callable[[], Work]) -> int:
    """Answer as described above until stdin ends, with the step that `setup` returns. Returns the exit status.

    What setup or step print goes to stderr.
    """
    answers = sys.stdout

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    with contextlib.redirect_stdout(sys.stderr):
        try:
            step = setup()
            step()
            answer(ready=True)
            for _ in sys.stdin:
                start = time.perf_counter()
                own = step()
                seconds = time.perf_counter() - start if own is None else own
                answer(seconds=seconds, peak_bytes=peak_memory())
        except Exception as error:
            if os.environ.get("MINILORA_TRACEBACK"):
                raise
            answer(error=str(error) or type(error).__name__)
            return 1
    return 0


# -- the other side ----------------------------------------------------------------------------------------------------


def take_turns(contenders: Sequence[Contender], rounds: int, pause: float = 0.2) -> dict[str, Timings]:
    """Start every contender, then let each run its step `rounds` times, one after the other in every round.

    All of them are in memory at the same time. pause: seconds between turns, in which threads that spin while waiting
    for work fall asleep. Raises BenchError when a contender fails; the others are ended first.
    """
    results = {contender.name: Timings() for contender in contenders}
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress("turns", len(contenders) * (1 + rounds), "turn"))
        talks = []
        for contender in contenders:
            talks.append(stack.enter_context(_running(contender)))
            talks[-1].read()  # until it is ready: only then the next one starts
            bar.update(text=contender.name)
        for _ in range(rounds):
            for talk in talks:
                time.sleep(pause)
                turn = talk.ask()
                results[talk.name].seconds.append(turn["seconds"])
                results[talk.name].peak_bytes = turn["peak_bytes"]
                bar.update(text=talk.name)
    return results


@contextlib.contextmanager
def _running(contender: Contender) -> Iterator[_Talk]:
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        process = subprocess.Popen(list(contender.command), stdin=pipe, stdout=pipe, stderr=stderr, text=True)
        try:
            yield _Talk(contender.name, process, stderr)
        finally:
            process.kill()  # it has nothing left to finish
            process.communicate()  # closes the pipes, broken ones too, and waits


@dataclass
class _Talk:
    """A running contender, and where its stderr goes."""

    name: str
    process: subprocess.Popen[str]
    stderr: IO[str]

    def ask(self) -> dict[str, Any]:
        assert self.process.stdin
        with contextlib.suppress(OSError):  # the pipe is broken: read() says why
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": self.last_words()}
        if "error" in answer:
            raise BenchError(f"{self.name}: {answer['error']}")
        return answer

    def last_words(self) -> str:
        status = self.process.wait()
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        if status == -getattr(signal, "SIGKILL", 0):
            how += " (was there enough memory?)"
        self.stderr.seek(0)
        lines = [line.strip() for line in self.stderr if line.strip()]
        return f"{how}: {lines[-1]}" if lines else how
