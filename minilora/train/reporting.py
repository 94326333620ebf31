"""`--report-to`: the values of each step, for TensorBoard, Trackio or Weights & Biases.

Nothing leaves the machine unless the user's environment says so.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from .run_folder import TENSORBOARD

PROJECT = "minilora"


class Reporter(Protocol):
    """What receives the values of the steps."""

    def log(self, metrics: dict[str, float], step: int) -> object:
        """Take the values of a step."""

    def finish(self) -> object:
        """Write what is left."""


class TensorBoard:
    """TensorBoard's event files, as PyTorch's SummaryWriter writes scalars. done: steps after it are forgotten."""

    def __init__(self, folder: Path, done: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.writer, self.event, self.summary = EventFileWriter(str(folder)), Event, Summary
        if done:
            start = SessionLog(status=SessionLog.START)
            self.writer.add_event(Event(wall_time=time.time(), step=done + 1, session_log=start))

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write one event with all values."""
        values = [self.summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self.writer.add_event(self.event(wall_time=time.time(), step=step, summary=self.summary(value=values)))
        self.writer.flush()

    def finish(self) -> None:
        """Close the file."""
        self.writer.close()


def _trackio(folder: Path, name: str, config: Mapping[str, Any], done: int) -> Reporter:
    """A run in the local store of Trackio, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says."""
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    with redirect_stdout(sys.stderr):  # it prints how to see the run
        return trackio.init(project=project, name=name, config=dict(config), resume="allow" if done else "never")


def _wandb(folder: Path, name: str, config: Mapping[str, Any], done: int) -> Reporter:
    """A run that `wandb sync` can upload; WANDB_MODE=online uploads it at once."""
    import wandb

    project, mode = os.environ.get("WANDB_PROJECT", PROJECT), os.environ.get("WANDB_MODE", "offline")
    return wandb.init(project=project, name=name, config=dict(config), mode=mode)


REPORTERS: dict[str, Callable[[Path, str, Mapping[str, Any], int], Reporter]] = {
    "tensorboard": lambda folder, name, config, done: TensorBoard(folder / TENSORBOARD, done),
    "trackio": _trackio,
    "wandb": _wandb,
}


def check_service(service: str) -> None:
    """Raise ValueError if the library of one of REPORTERS is not installed."""
    if find_spec(service) is None:
        raise ValueError(f"report_to {service} needs its library: pip install 'minilora[{service}]'")


def reporter_to(service: str, folder: Path, name: str, config: Mapping[str, Any], done: int) -> Reporter:
    """Begin a report.

    service: one of REPORTERS.
    folder: of the run, for files of TensorBoard.
    name: the run's.
    config: its options.
    done: steps that were taken before, of a resumed run.

    Raises ValueError in one line if the library refuses.
    """
    try:
        return REPORTERS[service](folder, name, config, done)
    except Exception as error:  # each library has its own errors: without a login or a network, for example
        raise ValueError(f"report_to {service}: {' '.join(str(error).split()) or type(error).__name__}") from error
