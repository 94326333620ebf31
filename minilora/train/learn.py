"""Training inside a job: validation, the best weights so far, checkpoints, and Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, cast

import numpy as np

from ..engine.backend import release_memory
from ..lora.adapters import activate
from ..nn.language_model import LanguageModel
from ..nn.optim import AdamW
from ..nn.parts import Example
from ..progress import log, progress
from .loop import Trainer, out_of_patience, validate


def learn(
    trainer: Trainer,
    validation: Mapping[str, Sequence[Example]],
    scale: float,
    *,
    eval_every: int,
    save_every: float,
    patience: int | None,
    each_step: Callable[[dict[str, float]], object] = lambda values: None,
    save: Callable[[], object] = lambda: None,
    save_best: Callable[[], object] = lambda: None,
) -> None:
    """Train to the last step, or until validation has found nothing better for `patience` times.

    validation: the sets whose loss is measured every `eval_every` steps and after the last one.
    scale: the adapter scale of these measurements, the one with which the adapter will be saved.
    eval_every, save_every: numbers of steps. Every rank has the same; the first rank decides when to stop.
    patience: None never stops early.
    each_step: called after each step, and its validation if there was one, with `values_of` the step.
    save: writes a checkpoint: every `save_every` steps, and on Ctrl-C, SIGTERM or SIGUSR1.
    save_best: called when the last validation loss is the lowest.

    Raises KeyboardInterrupt after the checkpoint that Ctrl-C asks for; OSError when something cannot be written, which
    leaves the previous checkpoint as it was.
    """
    history, ranks = trainer.history, trainer.ranks
    _begin_together(trainer)

    def finished() -> bool:
        return trainer.done >= trainer.steps or out_of_patience(history.validation, patience)

    with trainer, _interrupts() as interrupted, progress("training", trainer.steps, "step", trainer.done) as bar:
        stop, interrupt = ranks.same((finished(), False))
        while not stop:
            loss = trainer.step()
            bar.update(text=f"loss={loss:.3f}, tokens/s={history.tokens_per_second:.0f}")
            with _named_errors(trainer.done):
                if trainer.done % eval_every == 0 or trainer.done == trainer.steps:
                    with _scaled(trainer.model, scale):
                        validate(trainer, validation)
                    release_memory()  # which the threads of the next step might not find
                    if history.best is not None and history.best == history.validation[-1]:
                        save_best()
            each_step(values_of(trainer))
            with _named_errors(trainer.done):
                stop, interrupt = ranks.same((finished(), bool(interrupted)))
                if interrupt or trainer.done % save_every == 0:
                    save()
            if interrupt:
                raise KeyboardInterrupt


def values_of(trainer: Trainer) -> dict[str, float]:
    """The values of the last step, under the names of Hugging Face's Trainer: train/loss, train/grad_norm before
    clipping, train/learning_rate, train/epoch; after a validation eval/loss, and eval/NAME_loss of each set.
    """
    history, step = trainer.history, trainer.done
    values = {
        "train/loss": history.losses[-1],
        "train/grad_norm": history.norms[-1],
        "train/learning_rate": history.rates[-1],
        "train/epoch": step / trainer.steps_per_epoch,
    }
    sets = {"loss": history.validation} | {f"{name}_loss": each for name, each in history.validation_sets.items()}
    return values | {f"eval/{name}": each[-1][1] for name, each in sets.items() if each and each[-1][0] == step}


def _begin_together(trainer: Trainer) -> None:
    """Give every rank the state of the first one, at the first step or at that of a checkpoint.

    Dropout draws another mask on each rank. After a checkpoint, the masks of the other ranks are not those of an
    uninterrupted run, since the number of ranks may have changed.
    """
    ranks, optimizer = trainer.ranks, cast(AdamW, trainer.optimizer)
    done = ranks.same(trainer.done)
    trainer.level()
    if done:
        ranks.level([*optimizer.m, *optimizer.v])
    if not ranks.first:
        trainer.go_to(done)
        optimizer.steps = [done] * len(optimizer.parameters)
        for weights in trainer.adapters():
            if weights.dropout is not None:
                own = np.random.default_rng([weights.dropout.seed, ranks.number, done])
                weights.dropout.restore({"seed": int(own.integers(2**63)), "draws": {}})


@contextmanager
def _named_errors(step: int) -> Iterator[None]:
    """In this block an OSError gets a message that names the step whose weights are not saved."""
    try:
        yield
    except OSError as error:
        raise OSError(f"the weights of step {step} cannot be saved: {error}") from error


@contextmanager
def _scaled(model: LanguageModel, scale: float) -> Iterator[None]:
    """In this block the adapter has this scale. A model that is trained whole has no adapter."""
    activate(model, dict.fromkeys(model.adapters, scale))
    try:
        yield
    finally:
        activate(model, dict.fromkeys(model.adapters, 1.0))


@contextmanager
def _interrupts() -> Iterator[list[int]]:
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
