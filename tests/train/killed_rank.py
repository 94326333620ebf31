"""A rank of a job that is killed in the midst of a step. mpiexec -n 2 python killed_rank.py STEP WORD...: a command of
minilora, whose second rank dies by SIGKILL before that step has ended.
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
        if self.ranks.number == 1 and self.done + 1 == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step()


job.Trainer = Doomed
sys.exit(main(sys.argv[2:]))
