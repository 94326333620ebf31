"""Functions that tests give to run_trials: at the top level of a file, so that a process of its own finds them."""

import os
import time
from pathlib import Path


def double(x, until=None):
    """until: a file, for which it waits a while."""
    waited = 0
    while until and not Path(until).exists() and waited < 1000:
        time.sleep(0.02)
        waited += 1
    return {"twice": 2 * x, "process": os.getpid()}


def same(x):
    return x


def counted(x, folder):
    """One more file in the folder for every call."""
    Path(folder, f"{time.perf_counter_ns()}").touch()
    if x < 0:
        raise ValueError("x must be\nat least 0")
    return {"x": x, "both": (x, x)}


def odd(x):
    return {"neither": {x}} if x else {"missing": {}[x]}


def threads():
    from minilora.engine.parallel import cores

    return {"told": os.environ["OPENBLAS_NUM_THREADS"], "cores": cores()}


def ended(x):
    if x == 1:
        os._exit(3)
    time.sleep(0.3)
    return {"x": x}


def endless(folder, number):
    """Says that it is at work, as a file with its process's number, and never ends."""
    Path(folder, str(os.getpid())).touch()
    while number:
        time.sleep(0.05)
    return {}
