"""The training loop: forward, backward, step, and what to do when something goes wrong on the way."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..engine.backend import Array
from ..nn.llama import Llama
from ..nn.optim import AdamW, Optimizer, warmup_cosine
from ..nn.parts import Sample, packed_length
from ..nn.step import NotFiniteError, training_step
from .data import epochs


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what to try."""


@dataclass(repr=False)
class History:
    """What happened in training: loss and seconds of each step, tokens computed, (step, loss) on held-out samples."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    validation: list[tuple[int, float]] = field(default_factory=list)

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
    def tokens_per_second(self) -> float:
        return self.tokens / sum(self.seconds) if self.seconds else math.nan


def fit(
    model: Llama,
    samples: Sequence[Sample],
    steps: int,
    lr: float | None = None,
    batch_size: int = 8,
    seed: int = 0,
    warmup: float = 0.1,
    max_norm: float = 1.0,
    optimizer: Optimizer | None = None,
    each_step: Callable[[int], object] = lambda step: None,
    history: History | None = None,
) -> History:
    """Train whatever requires a gradient for `steps` steps, and return what happened.

    lr: the peak, 1e-3 if left out. The learning rate rises over the first `warmup` share of the steps and then falls
        along half a cosine to zero.
    batch_size: samples per step. Every epoch takes all samples once, in a new order that `seed` determines; of a sample
        with `others`, another one each time.
    max_norm: gradients are clipped to this common norm.
    optimizer: AdamW without weight decay if left out. One that is given trains the parameters that it holds; its own lr
        is the peak then, and its settings, such as LoRA+'s `lr_scale`, stay in force.
    each_step: called after every step with the number of steps done.
    history: filled as training goes on, for a caller who wants it even where training breaks off.

    The same seed gives the same numbers, bit for bit, on the same machine. Raises TrainingError when the loss or the
    gradient is not a finite number: an adapter is then what it was when the loss was last finite. ValueError when
    nothing is trainable, or nothing is there to train on.
    """
    _check(samples, steps, batch_size, lr, optimizer)
    parameters = model.trainable_parameters()
    if optimizer is None:
        optimizer = AdamW(parameters, lr=1e-3 if lr is None else lr, weight_decay=0.0)
    history = History() if history is None else history
    peak = optimizer.lr
    keep = sum(p.size for p in parameters.values()) < 0.5 * sum(p.size for _, p in model.named_parameters())
    good: dict[str, Array] = {}
    batches = epochs(samples, batch_size, seed)  # on the host: the model sends each to its weights, in one crossing

    model.train()
    try:
        for step in range(steps):
            start = time.perf_counter()
            batch = next(batches)
            optimizer.lr = peak * warmup_cosine(step, steps, max(1, round(warmup * steps)))
            current = {name: p.data.copy() for name, p in parameters.items()} if keep else {}  # some megabytes
            try:
                loss, _ = training_step(model, optimizer, batch, max_norm)
            except NotFiniteError as error:
                if error.what == "loss":  # of weights that the last step made
                    for name, array in good.items():
                        parameters[name].data[...] = array
                advice = f"try a lower learning rate (it is {peak:g}), a longer warm-up, or look for broken records"
                raise TrainingError(f"the {error} at step {step + 1} of {steps}: {advice}") from error
            good = current  # the weights that gave a finite loss
            history.losses.append(loss)
            history.seconds.append(time.perf_counter() - start)
            history.tokens += packed_length(batch)
            each_step(step + 1)
    finally:
        optimizer.zero_grad()
        optimizer.lr = peak
        model.eval()
    return history


def _check(
    samples: Sequence[Sample], steps: int, batch_size: int, lr: float | None, optimizer: Optimizer | None
) -> None:
    if not samples:
        raise ValueError("no samples to train on")
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if lr is not None and optimizer is not None:
        raise ValueError(f"lr is {lr:g} and the optimizer's own is {optimizer.lr:g}: give one of them")
    if lr is not None and not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be a positive number, got {lr}")
