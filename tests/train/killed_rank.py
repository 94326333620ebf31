"""A rank of a job that gets a signal in the midst of a step. mpiexec -n 2 python killed_rank.py STEP SIGNAL WORD...: a
command of minilora, whose second rank gets the signal before that step has ended; all ranks get a SIGINT, as of Ctrl-C.
"""

import os
import signal
import sys

from minilora.cli import main
from minilora.train import job
from minilora.train.loop import Trainer


class Doomed(Trainer):
    """Trains up to a step."""

    def step(self):
        if self.done + 1 == int(sys.argv[1]) and (self.ranks.number == 1 or sys.argv[2] == "SIGINT"):
            os.kill(os.getpid(), signal.Signals[sys.argv[2]])
        return super().step()


job.Trainer = Doomed
sys.exit(main(sys.argv[3:]))
