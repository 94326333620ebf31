"""A run of `finetune` in a process that does nothing else, so that its peak of memory is its own.

The process, `python -m minilora.commands.apart RUN`, shows progress bars on stderr, and writes its result on stdout.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..progress import show_progress
from ..train.job import finetune
from ..train.loop import TrainingError
from ..train.options import Options
from .compare_table import NAMES


@dataclass(frozen=True)
class Run:
    """What to run. measure: losses, recall and answers are wanted, or else validation alone."""

    options: Options
    measure: bool

    def __str__(self) -> str:
        return f"{NAMES[self.options.method]}, learning rate {self.options.lr:g}, {self.options.steps} steps"

    @property
    def record(self) -> Path:
        """Where what it found is kept, beside its folder."""
        return self.options.folder.with_name(f"{self.options.folder.name}.json")


def apart(run: Run) -> dict[str, Any]:
    """Make a run in a process that does nothing else, with its progress bars, and return its metrics.

    {"failed": why} when its numbers ceased to be finite. Raises RuntimeError with the reason when it cannot be made.
    """
    command = [sys.executable, "-m", __name__, json.dumps(asdict(run))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            out, _ = process.communicate()
        except KeyboardInterrupt:  # of a terminal the run has heard it, too, and ends by itself
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            process.terminate()
            raise
    if process.returncode == 130:
        raise KeyboardInterrupt
    answer = json.loads(out) if out else {}
    if process.returncode or not answer:
        ended = f"its process ended with status {process.returncode}; is there memory enough?"
        raise RuntimeError(f"{run}: {answer.get('error', ended)}")
    return answer


def main(job: str) -> int:
    """The process: a run as JSON in, its metrics as JSON on stdout."""
    given = json.loads(job)
    show_progress()
    status = 0
    try:
        answer = finetune(Options(**given["options"]), given["measure"])
    except TrainingError as error:
        answer = {"failed": str(error)}
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, RuntimeError, MemoryError, ImportError, AssertionError) as error:
        answer, status = {"error": str(error) or type(error).__name__}, 1
    print(json.dumps(answer))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
