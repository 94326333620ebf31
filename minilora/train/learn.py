"""The part of a job in which it learns: it looks on now and then, keeps the best, and is ready to be stopped."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from ..lora.adapters import activate
from ..measure.loss import mean_loss
from ..nn.llama import Llama
from ..nn.parts import Sample
from ..nn.ranks import Order
from ..progress import Bars
from . import checkpoint
from .loop import Trainer
from .material import Material
from .options import Options


def learn(
    trainer: Trainer,
    material: Material,
    options: Options,
    partial: Path,
    save: Callable[[], None],
    each_step: Callable[[], None],
    bars: Bars,
    say: Callable[[str], None],
) -> None:
    """Train to the end, or until validation has found nothing better for `patience` times.

    Every `eval_every` steps the loss on what is held out is measured, and the best weights are written to `partial`;
    every `save_every` steps, and on Ctrl-C, `save` writes a checkpoint. Raises KeyboardInterrupt after that one, and
    OSError when something cannot be written: the checkpoint before is still there then.
    """
    per_epoch = math.ceil(len(material.train) / options.records_per_step)
    history, steps, ranks = trainer.history, trainer.steps, trainer.ranks
    # A checkpoint of a whole model is three times its size: unasked, it is written on Ctrl-C alone.
    save_every = options.save_every or (per_epoch if options.method == "lora" else math.inf)

    with trainer, _interrupts(say) as interrupted, bars("training", steps, "step", initial=trainer.done) as bar:
        while trainer.done < steps and not _out_of_patience(history.validation, options.patience):
            ranks.tell(Order.STEP)
            loss = trainer.step()
            bar.set_postfix({"loss": f"{loss:.3f}", "tokens/s": f"{history.tokens_per_second:.0f}"}, refresh=False)
            bar.update()
            each_step()
            try:
                if trainer.done % (options.eval_every or per_epoch) == 0 or trainer.done == steps:
                    ranks.tell(Order.VALIDATE)
                    validate_as_kept(trainer, material, options)
                    if options.keep == "best" and history.validation and history.best == history.validation[-1]:
                        checkpoint.save_best(partial, trainer)
                if interrupted or trainer.done % save_every == 0:
                    save()
            except OSError as error:
                raise OSError(f"what {trainer.done} steps have learned cannot be written: {error}") from error
            if interrupted:
                raise KeyboardInterrupt


def validate_as_kept(trainer: Trainer, material: Material, options: Options) -> None:
    """`validate` with the adapter as it will be kept, which may be a part of what is trained."""
    with _at_strength(trainer.model, options.kept_strength):
        validate(trainer, material.validation_sets)


@contextmanager
def _at_strength(model: Llama, strength: float) -> Iterator[None]:
    """Inside this block the adapter takes part as it will be kept. A model that is trained whole has none."""
    activate(model, dict.fromkeys(model.adapters, strength))
    try:
        yield
    finally:
        activate(model, dict.fromkeys(model.adapters, 1.0))


def validate(trainer: Trainer, sets: dict[str, list[Sample]]) -> None:
    """Measure the loss on each set and add it to the history, and as the one number that decides, their mean.

    Each set counts the same, however long it is: trained matter asked in other words says whether it is learned,
    unseen matter whether anything more than that is.
    """
    model, history, ranks = trainer.model, trainer.history, trainer.ranks
    losses = {name: mean_loss(model, samples, ranks=ranks) for name, samples in sets.items()}
    for name, loss in losses.items():
        history.validation_sets.setdefault(name, []).append((trainer.done, loss))
    if losses:
        history.validation.append((trainer.done, sum(losses.values()) / len(losses)))


def _out_of_patience(validation: list[tuple[int, float]], patience: int | None) -> bool:
    """Have the last `patience` measurements all been no better than one before them?"""
    if patience is None or not validation:
        return False
    losses = [loss if math.isfinite(loss) else math.inf for _, loss in validation]
    return len(losses) - 1 - losses.index(min(losses)) >= patience


@contextmanager
def _interrupts(say: Callable[[str], None]) -> Iterator[list[int]]:
    """Inside this block the first Ctrl-C is only noted, in the list, so that a step is taken whole or not at all. The
    second one is a KeyboardInterrupt at once. Where Ctrl-C means something else already, or nothing, that stays.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)
        with suppress(RuntimeError):  # in the midst of writing to the same file
            say("\nstopping after this step; Ctrl-C again stops at once")  # below the bar

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield noted
        return
    try:
        signal.signal(signal.SIGINT, note)
    except ValueError:  # only the main thread hears of it
        yield noted
        return
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
