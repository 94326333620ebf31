"""The training loop: forward, backward, step, and what to do when something goes wrong on the way."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..engine.backend import Array
from ..nn.llama import Llama
from ..nn.optim import AdamW, warmup_cosine
from ..nn.parts import Sample, packed_length
from ..nn.step import NotFiniteError, training_step
from .data import epochs


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

    model.train()
    try:
        for step in range(steps):
            start = time.perf_counter()
            batch = next(batches)
            optimizer.lr = lr * warmup_cosine(step, steps, max(1, round(warmup * steps)))
            current = {name: p.data.copy() for name, p in parameters.items()} if keep else {}  # some megabytes
            try:
                loss, _ = training_step(model, optimizer, batch, max_norm)
            except NotFiniteError as error:
                if error.what == "loss":  # of weights that the last step made
                    for name, array in good.items():
                        parameters[name].data[...] = array
                advice = f"try a lower --lr (it is {lr:g}), a longer warm-up, or look for broken records"
                raise TrainingError(f"the {error} at step {step + 1} of {steps}: {advice}") from error
            good = current  # the weights that gave a finite loss
            history.losses.append(loss)
            history.seconds.append(time.perf_counter() - start)
            history.tokens += packed_length(batch)
            each_step(step + 1)
    finally:
        optimizer.zero_grad()
        model.eval()
