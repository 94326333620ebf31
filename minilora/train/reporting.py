"""`--report-to`: the values of each step, for TensorBoard, Trackio or Weights & Biases."""

import os
import sys
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from time import time
from typing import Any


class _TensorBoard:
    def __init__(self, folder: Path, done: int):
        self.event = import_module("tensorboard.compat.proto.event_pb2").Event
        self.writer = import_module("tensorboard.summary.writer.event_file_writer").EventFileWriter(str(folder))
        self.finish = self.writer.close
        if done:
            self._add(done + 1, session_log={"status": "START"})  # the steps after `done` are forgotten

    def log(self, values: dict[str, float], step: int) -> None:
        self._add(step, summary={"value": [{"tag": name, "simple_value": one} for name, one in values.items()]})

    def _add(self, step: int, **what: Any) -> None:
        self.writer.add_event(self.event(wall_time=time(), step=step, **what))
        self.writer.flush()


def reporter_to(service: str, folder: Path, name: str, config: dict[str, Any], done: int) -> Any:
    """Begin the report of a run that has taken `done` steps already: it has `log(values, step)` and `finish()`."""
    if service == "tensorboard":
        return _TensorBoard(folder / service, done)
    project = os.environ.get(f"{service.upper()}_PROJECT", "minilora")
    mode = {"mode": os.environ.get("WANDB_MODE", "offline")} if service == "wandb" else {}
    try:
        with redirect_stdout(sys.stderr):  # Trackio prints how to see the run
            init = import_module(service).init
            return init(project=project, name=name, config=config, resume="allow" if done else "never", **mode)
    except Exception as error:  # each library has its own: without a login, for example
        raise ValueError(f"report_to {service}: {' '.join(str(error).split())}") from error
