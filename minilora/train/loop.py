"""The training loop: forward, backward, step, and what to do when something goes wrong on the way."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..engine.backend import Array, to_floats
from ..nn.llama import Llama
from ..nn.optim import AdamW, clip_grad_norm, warmup_cosine
from .data import Sample, epochs


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what to try."""


@dataclass
class History:
    """What happened: loss and seconds per step, tokens computed, and (step, loss) on held-out samples."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    validation: list[tuple[int, float]] = field(default_factory=list)

    @property
    def seconds_per_step(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / sum(self.seconds) if self.seconds else math.nan


def train(
    model: Llama,
    samples: Sequence[Sample],
    steps: int,
    history: History,
    lr: float = 1e-3,
    batch_size: int = 8,
    seed: int = 0,
    warmup: float = 0.1,
    max_norm: float = 1.0,
    each_step: Callable[[int], object] = lambda step: None,
) -> None:
    """Train whatever requires a gradient for `steps` steps of AdamW, filling `history` as it goes.

    lr rises over the first `warmup` share of the steps and then falls along half a cosine to zero; gradients are
    clipped to a common norm of `max_norm`. The same seed gives the same numbers, bit for bit, on the same machine.
    each_step: called after every step with the number of steps done.

    Raises TrainingError when the loss or the gradient is not a finite number: an adapter is then what it was when the
    loss was last finite. ValueError when nothing is trainable.
    """
    parameters = model.trainable_parameters()
    optimizer = AdamW(parameters, lr=lr, weight_decay=0.0)
    keep = sum(p.size for p in parameters.values()) < 0.5 * sum(p.size for _, p in model.named_parameters())
    good: dict[str, Array] = {}
    batches = epochs(samples, batch_size, seed)  # on the host: the model sends each to its weights, in one crossing

    def stop(what: str, step: int) -> TrainingError:
        advice = f"try a lower --lr (it is {lr:g}), a longer warm-up, or look for broken records"
        return TrainingError(f"the {what} at step {step + 1} of {steps}: {advice}")

    model.train()
    try:
        for step in range(steps):
            start = time.perf_counter()
            batch = next(batches)
            optimizer.lr = lr * warmup_cosine(step, steps, max(1, round(warmup * steps)))
            optimizer.zero_grad()
            loss = model.loss(batch.input_ids, batch.labels, batch.packing)
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is reported below
                loss.backward()
                norm = clip_grad_norm(parameters.values(), max_norm)
            value, norm = to_floats(loss.data, norm)  # the one time in a step that the host waits for a GPU
            if not math.isfinite(value):
                for name, array in good.items():
                    parameters[name].data[...] = array
                raise stop(f"loss became {value}", step)
            if keep:  # the weights that gave a finite loss; a few megabytes for an adapter
                good = {name: p.data.copy() for name, p in parameters.items()}
            if not math.isfinite(norm):
                raise stop(f"gradient became {norm}", step)
            optimizer.step()
            history.losses.append(value)
            history.seconds.append(time.perf_counter() - start)
            history.tokens += batch.input_ids.size
            each_step(step + 1)
    finally:
        optimizer.zero_grad()
        model.eval()
