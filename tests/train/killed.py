"""A program that kills a training process again and again, at random moments, and continues from its last checkpoint.

python killed.py FOLDER KILLS: prints how often the process was killed, and the steps of the checkpoints found. Each
process is a fork of this one, so that it need not import anything, and kills itself by SIGKILL in the midst of a step
or of a checkpoint.
"""

import math
import os
import random
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import minilora as ml
from minilora.train import checkpoint, job
from minilora.train.loop import Trainer

MOST = 6  # steps that a process takes before it dies


def options(folder: Path, out: str, kills: int) -> ml.Options:
    """A run of short steps on the tiny base, with all that a checkpoint has to keep."""
    return ml.Options(
        base="tiny", data=str(folder / "data.jsonl"), out=str(folder / out), r=2, steps=5 * kills, batch_size=2,
        max_length=32, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], save_every=1, eval_every=5,
    )  # fmt: skip


def main(folder: Path, kills: int) -> None:
    """Run, kill, go on, ...; then let it end, and run the same without being killed."""
    os.fsync = lambda descriptor: None  # a killed process takes nothing out of the system's memory
    chosen, moments = options(folder, "killed", kills), random.Random(0)
    killed, steps = 0, []
    while killed < kills:
        child = os.fork()
        if child == 0:
            _train_until_killed(replace(chosen, resume=begun(folder)), moments.randrange(MOST), moments.random())
        moments.randrange(MOST), moments.random()  # as the child has, from its copy
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            sys.exit(f"it ended by itself with {os.WEXITSTATUS(status)} after {killed} kills")
        killed += os.WTERMSIG(status) == signal.SIGKILL
        try:
            steps.append(len(checkpoint.read_state(folder / "killed.partial").history.losses))
        except ValueError:  # before the first one, or between two renames: the next process sees to that
            steps.append(-1)
    job.finetune(replace(chosen, resume=begun(folder)), measure=False, answers=False)
    job.finetune(replace(options(folder, "straight", kills), save_every=10_000), measure=False, answers=False)
    print(killed, *steps)


def begun(folder: Path) -> bool:
    """Is there a checkpoint, under its own name or under the one that it has for the time of a rename?"""
    partial = folder / "killed.partial"
    names = [path.name for path in partial.iterdir()] if partial.is_dir() else []
    return any(name == "checkpoint" or (name.startswith(".checkpoint") and name.endswith(".old")) for name in names)


def _train_until_killed(chosen: ml.Options, steps: int, part: float) -> None:
    """Die after so many steps and a part of what the next one takes, its checkpoint included."""

    class Doomed(Trainer):
        began = math.inf

        def step(self):
            now = time.perf_counter()
            self.first = min(self.done, getattr(self, "first", self.done))
            if self.done - self.first == steps:
                least = 0.05 if self.began == math.inf else now - self.began
                threading.Timer(part * least, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
            self.began = now
            return super().step()

    job.Trainer = Doomed
    try:
        job.finetune(chosen, measure=False, answers=False)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(3)
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
