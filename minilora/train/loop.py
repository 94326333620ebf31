"""The training loop: forward, backward, step, and what to do when something goes wrong on the way."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, cast

import numpy as np

from ..data.samples import epochs, steps_per_epoch
from ..engine.backend import Array, release_memory
from ..lora.adapters import activate, adapter_weights
from ..measure.loss import mean_loss
from ..nn.language_model import LanguageModel, check_language_model
from ..nn.optim import SCHEDULES, AdamW, Optimizer
from ..nn.parts import Example, check_samples, distinct_length
from ..nn.ranks import world
from ..nn.step import NotFiniteError, training_step
from ..options import check_value, check_whole
from .options import Training


class TrainingError(RuntimeError):
    """Training cannot continue; the message names the step, the reason, and what to try."""


@dataclass(repr=False)
class History:
    """The record of training: of each step the loss, the seconds, the learning rate, and the gradient norm before
    clipping; of all steps the number of tokens, where samples that begin alike count their beginning once; and (step,
    loss) of each validation, also by set.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    tokens: int = 0
    validation: list[tuple[int, float]] = field(default_factory=list)
    validation_sets: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def __repr__(self) -> str:
        if not self.losses:
            return "History(0 steps)"
        ends = f"loss {self.losses[0]:.3f} at first, {self.losses[-1]:.3f} at last"
        return f"History({len(self.losses)} steps, {ends}, {self.seconds_per_step:.2f} s per step)"

    @property
    def seconds_per_step(self) -> float:
        """The median."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def best(self) -> tuple[int, float] | None:
        """The step with the lowest validation loss, the first of equal ones, and that loss; None if none is finite."""
        return min((at for at in self.validation if math.isfinite(at[1])), key=lambda at: at[1], default=None)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / sum(self.seconds) if self.seconds else math.nan

    def kept(self, keep: str) -> dict[str, Any]:
        """Which weights are the result: of which step, whether as the "best" or the "last", with which validation loss.

        keep: "best" or "last". Without a finite validation loss the last ones are the result.
        """
        if keep == "best" and self.best is not None:
            step, loss = self.best
            return {"step": step, "which": "best", "loss": loss}
        return {"step": len(self.losses), "which": "last", "loss": dict(self.validation).get(len(self.losses))}


def fit(
    model: LanguageModel,
    samples: Sequence[Example],
    steps: int,
    lr: float | None = None,
    batch_size: int = 8,
    seed: int = 0,
    *,
    max_norm: float = 1.0,
    optimizer: Optimizer | None = None,
    each_step: Callable[[int], object] | None = None,
    history: History | None = None,
    validation: Sequence[Example] = (),
    **settings: Any,
) -> History:
    """Train the trainable parameters for `steps` steps, and return the history.

    samples: samples, or pairs for DPO, which have had their reference from `with_reference`.
    lr: the peak learning rate, 1e-3 by default. It rises during the first `warmup` share of the steps (0.1), one or
        more, and then falls to zero along half a "cosine" or a "linear" line, or stays "constant": `schedule`. With a
        `warmup` of 0 the first step has the peak, and the fall begins with the second one.
    batch_size: samples per batch. Every epoch takes all samples once, in a new order that `seed` decides; of a sample
        with `others`, it takes another one each time.
    max_norm: gradients are clipped to this global norm.
    optimizer: AdamW by default. A given optimizer trains the parameters that it holds; its own lr is the peak, and its
        options, such as LoRA+'s `lr_scale`, stay in effect. One of your own derives from `SGD`.
    each_step: called after every step with the number of steps taken. Training ends when it returns "stop".
    history: filled during training, so that it is there even when training raises an error.
    validation: samples that are not trained on, whose mean loss is added to `history.validation`.
    settings: `warmup` and `schedule`, as above; `grad_accumulation`, the batches per step (1), which give the result of
        a larger batch in the memory of one; `weight_decay`, AdamW's, on all trainable parameters (0); `eval_every`, the
        steps between measurements on `validation` (an epoch; the last step is followed by one, too); `patience`, the
        number of these without a lower loss that ends the training (none); `keep`, the weights that the model ends
        with: those of the lowest validation loss ("best"), or the "last".

    In a program that mpiexec starts, all ranks call this, on the same model and samples: see nn/ranks.py.
    The model ends in eval mode, without dropout. The same seed gives the same result, bit for bit, on the same machine,
    unless other threads of the process compute meanwhile.
    Raises TrainingError when the loss or the gradient is not finite; an adapter then has the weights that gave the last
    finite loss. Raises ValueError when nothing is trainable, or when there are no samples, and TypeError for a module
    that is not a language model.
    """
    check_language_model(model, "fit")
    check_whole("steps", steps, 1)
    check_value(Training, "max_grad_norm", max_norm, "max_norm")
    chosen = Training(steps=steps, lr=lr, batch_size=batch_size, seed=seed, max_grad_norm=max_norm, **settings)
    check_samples(validation)
    if not validation and (chosen.eval_every or chosen.patience):
        raise ValueError("eval_every and patience are about validation=..., samples that are not trained on: give some")
    trainer = Trainer(model, samples, chosen, _optimizer(model, optimizer, chosen), history)
    best: dict[str, Array] = {}

    def remember() -> None:
        best.update({name: p.data.copy() for name, p in trainer.parameters.items()})

    trainer.run({"validation": validation} if validation else {}, each_step or (lambda done: None), remember)
    for name, array in best.items():
        trainer.parameters[name].data[...] = array
    return trainer.history


class Trainer:
    """The training loop, whole by `run`, or one step at a time, for a caller that does something in between:

        trainer = Trainer(model, samples, Training(steps=60), optimizer)
        with trainer:                           # dropout is on in this block
            while trainer.done < trainer.steps:
                print(trainer.step())           # the loss

    The next step depends on the trainable `parameters`, the state of the optimizer, the state of dropout, and the
    number of steps `done`, which decides the learning rate and the samples of the next batch. The peak learning rate is
    that of the optimizer; the other arguments are those of `fit`.
    """

    def __init__(
        self,
        model: LanguageModel,
        samples: Sequence[Example],
        settings: Training,
        optimizer: Optimizer,
        history: History | None = None,
    ):
        check_samples(samples)
        if not samples:
            raise ValueError("no samples to train on")
        scored = [sample.scored and all(other.scored for other in sample.others) for sample in samples]
        if (empty := next((i for i, is_scored in enumerate(scored) if not is_scored), None)) is not None:
            raise ValueError(f"sample {empty} has no token that is scored: every label is -100; leave it out")
        self.model, self.samples, self.settings, self.ranks = model, samples, settings, world()
        self.steps_per_epoch = steps_per_epoch(samples, settings.records_per_step)
        self.steps = settings.steps or math.ceil(settings.epochs * self.steps_per_epoch)
        self.warmup = max(1, round(settings.warmup * self.steps)) if settings.warmup else 0
        self.schedule = SCHEDULES[settings.schedule]
        self.parameters = model.trainable_parameters()
        self.optimizer, self.peak = optimizer, optimizer.lr
        self.history = History() if history is None else history
        whole = sum(p.size for _, p in model.named_parameters())
        self.few = sum(p.size for p in self.parameters.values()) < 0.5 * whole  # an adapter: a copy is some megabytes
        self.good: dict[str, Array] = {}  # the weights that gave the last finite loss, where they are few
        self.go_to(0)

    def go_to(self, done: int) -> None:
        """Continue after `done` steps, with the samples of the next one."""
        batches = epochs(self.samples, self.settings.records_per_step, self.settings.seed)  # on the host
        self.batches, self.done = islice(batches, done, None), done

    def run(
        self,
        validation: Mapping[str, Sequence[Example]],
        each_step: Callable[[int], object],
        save_best: Callable[[], object],
        scale: float = 1.0,
    ) -> None:
        """Train to the last step, until `each_step` says "stop", or until patience ends.

        validation: the sets whose loss is measured every `eval_every` steps, by default an epoch, and after the last.
        each_step: called with the number of steps taken, after their validation if there is one.
        save_best: with `keep` "best", called when the last validation loss is the lowest.
        scale: the adapter scale of these measurements, the one with which the adapter will be saved.
        """
        history, settings = self.history, self.settings
        every = settings.eval_every or self.steps_per_epoch
        begun = 0 if self.done else len(history.validation)  # a history may go on from an earlier training

        def finished() -> bool:
            return self.done >= self.steps or out_of_patience(history.validation[begun:], settings.patience)

        with self:
            stop = self.ranks.same(finished())
            while not stop:
                self.step()
                if validation and (self.done % every == 0 or self.done == self.steps):
                    with _scaled(self.model, scale):
                        validate(self, validation)
                    release_memory()  # which the threads of the next step might not find
                    *before, last = _losses(history.validation[begun:])
                    if settings.keep == "best" and last < min(before, default=math.inf):
                        save_best()
                asked = each_step(self.done) == "stop"
                stop = self.ranks.same(asked or finished())

    def __enter__(self) -> Trainer:
        self.model.train()
        return self

    def __exit__(self, *error: object) -> None:
        self.optimizer.zero_grad()
        self.optimizer.lr = self.peak
        self.model.eval()

    def step(self) -> float:
        """Take one step, add it to the history, and return the loss. Raises TrainingError as `fit` does."""
        start, size = time.perf_counter(), self.settings.batch_size
        batch = next(self.batches)
        self.optimizer.lr = self.peak * self.schedule(self.done, self.steps, self.warmup)
        try:
            loss, norm = training_step(
                self.model,
                self.optimizer,
                batch,
                self.settings.max_grad_norm,
                at_once=-(-size // self.ranks.size),
                ranks=self.ranks,
                before_update=self._remember if self.few else None,
            )
        except NotFiniteError as error:
            if error.what == "loss":  # of the weights after the last step
                for name, array in self.good.items():
                    self.parameters[name].data[...] = array
            advice = f"try a lower learning rate (it is {self.peak:g}), a longer warm-up, or look for broken records"
            raise TrainingError(f"the {error} at step {self.done + 1} of {self.steps}: {advice}") from error
        self.done += 1
        self.history.losses.append(loss)
        self.history.seconds.append(time.perf_counter() - start)
        self.history.rates.append(self.optimizer.lr)
        self.history.norms.append(norm)
        batches = [batch[i : i + size] for i in range(0, len(batch), size)]
        self.history.tokens += sum(map(distinct_length, batches))
        return loss

    def _remember(self) -> None:
        """Copy the weights, into the arrays of the last copy."""
        for name, p in self.parameters.items():
            if name in self.good:
                self.good[name][...] = p.data
            else:
                self.good[name] = p.data.copy()


def validate(trainer: Trainer, sets: Mapping[str, Sequence[Example]]) -> None:
    """Measure the loss on each set and add it to the history, with their mean, which decides which weights are best.

    Each set has the same weight, whatever its length: the loss on paraphrases shows whether the training data are
    learned, the loss on unseen records whether the model generalises.
    """
    history = trainer.history
    losses = {name: mean_loss(trainer.model, samples) for name, samples in sets.items()}
    for name, loss in losses.items():
        history.validation_sets.setdefault(name, []).append((trainer.done, loss))
    if losses:
        history.validation.append((trainer.done, sum(losses.values()) / len(losses)))


def out_of_patience(validation: Sequence[tuple[int, float]], patience: int | None) -> bool:
    """Whether none of the last `patience` losses is lower than the lowest one before them."""
    if patience is None or not validation:
        return False
    losses = _losses(validation)
    return len(losses) - 1 - losses.index(min(losses)) >= patience


def begin_together(trainer: Trainer) -> None:
    """Give every rank the state of the first one, at the first step or at that of a checkpoint.

    Dropout draws another mask on each rank.
    """
    ranks, optimizer = trainer.ranks, cast(AdamW, trainer.optimizer)
    ranks.level([*(p.data for p in trainer.parameters.values()), *optimizer.m, *optimizer.v])
    done = ranks.same(trainer.done)
    if ranks.number:
        trainer.go_to(done)
        optimizer.steps = [done] * len(optimizer.parameters)
        for name in trainer.model.adapters:
            for weights in adapter_weights(trainer.model, name).values():
                if weights.dropout is not None:
                    own = np.random.default_rng([weights.dropout.seed, ranks.number, done])
                    weights.dropout.restore({"seed": int(own.integers(2**63)), "draws": {}})


def _losses(validation: Sequence[tuple[int, float]]) -> list[float]:
    """The losses, one that is no number as the highest."""
    return [loss if math.isfinite(loss) else math.inf for _, loss in validation]


@contextmanager
def _scaled(model: LanguageModel, scale: float) -> Iterator[None]:
    """In this block the adapters have this scale. A model that is trained whole has none."""
    if scale != 1:
        activate(model, dict.fromkeys(model.adapters, scale))
    try:
        yield
    finally:
        if scale != 1:
            activate(model, dict.fromkeys(model.adapters, 1.0))


def _optimizer(model: LanguageModel, given: Optimizer | None, settings: Training) -> Optimizer:
    """The optimizer given, or AdamW. Raises ValueError or TypeError for what neither could follow."""
    lr, weight_decay = settings.lr, settings.weight_decay
    if given is None:
        return AdamW(model.trainable_parameters(), lr=1e-3 if lr is None else lr, weight_decay=weight_decay)
    if not isinstance(given, Optimizer):
        kind = type(given).__name__
        raise TypeError(f"optimizer must be an ml.AdamW or ml.SGD, or derived from one, got a {kind}")
    own = {id(parameter) for parameter in model.trainable_parameters().values()}
    if not any(id(parameter) in own for parameter in given.parameters):
        raise ValueError(
            "the optimizer holds no parameter of this model that is trainable now: make it of "
            "model.trainable_parameters() after add_adapter or set_adapter"
        )
    if lr is not None:
        raise ValueError(f"lr is {lr:g} and the optimizer's own is {given.lr:g}: give one of them")
    if weight_decay:
        raise ValueError(f"weight_decay is {weight_decay:g}, and an optimizer has its own: give one of them")
    return given
