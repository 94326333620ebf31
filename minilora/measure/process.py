"""A process that does one thing: what memory it takes, and how to call a function in one.

`apart` starts Python with `main`, which imports the function's module and calls it.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from ..progress import show_progress

INTERRUPTED = 130  # exit status


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process that does nothing else, so that its peak memory is its own, and return its result.

    function: at the top level of a module. Arguments and result are what JSON can hold. Its lines and progress bars are
    shown if they are shown here. If this process is killed, the other one ends as well, except on Windows. Raises
    RuntimeError with the reason if the function fails or the process is killed, MemoryError if it finds no memory,
    KeyboardInterrupt if it is interrupted.
    """
    shown = show_progress()
    show_progress(shown)
    job = {"arguments": arguments, "shown": shown}
    start = f"import sys; from {__name__} import main; sys.exit(main(*sys.argv[1:]))"  # -m would import it twice
    command = [sys.executable, "-c", start, f"{function.__module__}:{function.__qualname__}", json.dumps(job)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            out, _ = process.communicate()
        except KeyboardInterrupt:  # the terminal has interrupted that process, too: it ends by itself
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            process.terminate()
            raise
    if process.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    answer = json.loads(out) if out else {}
    if "result" not in answer:
        ended = f"its process ended with status {process.returncode}; is there enough memory?"
        raise (MemoryError if answer.get("memory") else RuntimeError)(answer.get("error", ended))
    return answer["result"]


def main(name: str, job: str) -> int:
    """The process: prints {"result": ...} or {"error": why}, and returns its exit status."""
    given, out = json.loads(job), sys.stdout
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    module, _, function = name.partition(":")
    sys.stdout = sys.stderr  # what the function prints is no answer
    show_progress(given["shown"])
    try:
        answer = {"result": getattr(import_module(module), function)(*given["arguments"])}
    except KeyboardInterrupt:
        return INTERRUPTED
    except MemoryError as error:
        answer = {"error": str(error), "memory": True}
    except (ValueError, OSError, RuntimeError, ImportError, AssertionError) as error:
        answer = {"error": str(error) or type(error).__name__}
    try:
        print(json.dumps(answer), file=out, flush=True)
    except BrokenPipeError:  # whoever asked has ended
        os._exit(1)
    return "error" in answer


def _end_with(parent: int) -> None:
    """End this process when its parent has ended: nobody waits for the answer, and the folder may be needed again."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


# -- memory ------------------------------------------------------------------------------------------------------------


def program_memory(arrays: int) -> int | None:
    """What Python, libraries and tokenizer take: what the process holds now, without its `arrays` bytes of arrays.

    On systems that only know the peak so far (macOS), that counts. None where the system knows neither (Windows).
    """
    held = _held_now() or peak_memory()
    return None if held is None else held - arrays


def added_memory(use: Callable[[], object]) -> int:
    """The bytes that this process holds after `use()` and did not hold before; 0 where the system does not know."""
    before = _held_now()
    use()
    return 0 if before is None else max(0, cast(int, _held_now()) - before)


def _held_now() -> int | None:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else None


def peak_memory() -> int | None:
    """The most memory this process has held so far, in bytes; None where the system does not know (Windows)."""
    status = Path("/proc/self/status")  # Linux; getrusage may give the peak of the program that started this one
    if status.is_file() and (line := re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(line[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory() -> int | None:
    """The bytes that this process can have in all without swapping: those that it holds, and those that are free on
    this machine, within the limit of its container. None where the system is not Linux.
    """
    about = Path("/proc/meminfo")
    line = re.search(r"^MemAvailable:\s*(\d+) kB$", about.read_text(), re.MULTILINE) if about.is_file() else None
    if line is None:
        return None
    return (program_memory(0) or 0) + int(min(int(line[1]) * 1024, _left_memory()))


def _left_memory() -> float:
    """The bytes that a container's limit leaves; infinity without one. Cached files can be dropped: they are free."""
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no container, or "max"
        most, held = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, most - held + int(stat["active_file"]) + int(stat["inactive_file"]))
    return math.inf
