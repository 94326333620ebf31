"""One step of training, the same for jobs, benchmarks and memory reports; and a loss on all cores, with or without
gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import cast

import numpy as np

from ..engine.attention import Packing
from ..engine.backend import Array, array_module, to_floats, to_numpy
from ..engine.parallel import cores, values, values_and_gradients
from ..engine.tensor import Tensor, no_grad
from .llama import Llama
from .optim import Optimizer, clip_grad_norm
from .parts import Batch, Sample, micro_batches, pack, shares

Mean = Callable[[Sequence[Tensor], Array, int], Array]  # see `training_step`


class NotFiniteError(ArithmeticError):
    """The loss or the gradient of a step is not a finite number. what: "loss" or "gradient". value: the number."""

    def __init__(self, what: str, value: float):
        super().__init__(f"{what} became {value}")
        self.what, self.value = what, value


def loss_and_grad(model: Llama, input_ids: Array, labels: Array, packing: Packing | None = None) -> Tensor:
    """Forward and back at once: return the loss, and add the gradients of whatever is trainable to its `.grad`.

    The numbers are those of `loss = model.loss(input_ids, labels, packing); loss.backward()`. But the batch is computed
    in micro-batches, on all cores, and what one keeps for backward is gone before the next begins. Sums are taken in a
    fixed order: the same batch gives the same bits. On a GPU, and where rows differ by their place in the batch (inside
    `mixed_batch`), the batch stays whole.

    input_ids, labels, packing: as for `Llama.loss`. The returned tensor is a scalar without graph.

    Raises ValueError for a batch that the model cannot read, RuntimeError when nothing is trainable or inside
    `no_grad()`.
    """
    return Tensor(_loss_and_grad(model, Batch(*model.check_batch(input_ids, labels, packing), packing)))


def training_step(
    model: Llama,
    optimizer: Optimizer,
    batch: Batch | Sequence[Sample],
    max_norm: float = math.inf,
    at_once: int | None = None,
    mean: Mean | None = None,
) -> tuple[float, float]:
    """One step: forgotten gradients, forward and back, gradients clipped to a common norm of `max_norm`, the optimizer.

    batch: a batch, or samples, which are divided into micro-batches first and packed then. at_once: of more samples
    than these, so many go forward and back at a time, one lot after another, also on a GPU. The numbers are those of
    all at once, and the memory is that of one lot. mean: where the samples are one process's share of a batch, perhaps
    none of it, mean(parameters, loss, scored tokens) turns loss and gradients into those of the whole batch (see
    nn/ranks.py). Returns the loss and the gradients' norm before clipping. Raises NotFiniteError when one of them is
    not finite, before any weight moves.
    """
    optimizer.zero_grad()
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is reported below
        loss = _loss_and_grad(model, batch, at_once) if batch or mean is None else 0.0
        if mean is not None:
            scored = batch.scored if isinstance(batch, Batch) else sum(sample.scored for sample in batch)
            loss = mean(optimizer.parameters, loss, scored)
        norm = clip_grad_norm(optimizer.parameters, max_norm)
    value, norm = to_floats(loss, norm)  # the one time in a step that the host waits for a GPU
    for what, number in (("loss", value), ("gradient", norm)):
        if not math.isfinite(number):
            raise NotFiniteError(what, number)
    optimizer.step()
    return value, norm


def loss_without_grad(model: Llama, batch: Batch | Sequence[Sample]) -> float:
    """The loss of a batch, or of samples, computed on all cores: for evaluation."""
    batches = divided(model, batch)
    with no_grad():
        found = values([_loss_of(model, each) for each in batches], min(cores(), len(batches)))
    return to_floats(sum(x * w for x, w in zip(found, _weights(batches), strict=True)))[0]


def losses_without_grad(model: Llama, samples: Sequence[Sample]) -> list[float]:
    """The loss of each sample alone, computed on all cores: for what is known of every record."""
    xp = array_module(model.head_weight.data)
    divided_so = shares(samples, cores()) if xp is np else [list(range(len(samples)))]

    def of_each(share: list[int]) -> Tensor:
        batch = pack([samples[i] for i in share])
        losses = model.loss_of_each(batch.input_ids, batch.labels, cast(Packing, batch.packing))
        return Tensor(array_module(losses[0].data).stack([loss.data for loss in losses]))

    with no_grad():
        found = values([partial(of_each, share) for share in divided_so], min(cores(), len(divided_so)))
    by_number = zip(chain(*divided_so), chain(*(to_numpy(each).tolist() for each in found)), strict=True)
    return [loss for _, loss in sorted(by_number)]


def divided(model: Llama, batch: Batch | Sequence[Sample], threads: int | None = None) -> list[Batch]:
    """The micro-batches in which a model computes a batch, or samples, in so many threads: None for all cores."""
    arrays = [model.head_weight.data, *((batch.input_ids, batch.labels) if isinstance(batch, Batch) else ())]
    on_host = all(array_module(x) is np for x in arrays)
    if not on_host or any(module.rows_differ for _, module in model.named_modules()):
        return [batch if isinstance(batch, Batch) else pack(batch)]
    return micro_batches(batch, threads or cores())


def _loss_and_grad(model: Llama, batch: Batch | Sequence[Sample], at_once: int | None = None) -> Array:
    lots = [batch]
    if at_once is not None and not isinstance(batch, Batch):
        lots = [batch[i : i + at_once] for i in range(0, len(batch), at_once)]
    divisions = [divided(model, lot) for lot in lots]
    weights = _weights([each for batches in divisions for each in batches])
    losses: list[Array] = []
    for batches in divisions:
        losses += _forward_and_back(model, batches, weights[len(losses) : len(losses) + len(batches)])
    return losses[0] if len(losses) == 1 else sum(x * w for x, w in zip(losses, weights, strict=True))


def _forward_and_back(model: Llama, batches: Sequence[Batch], weights: Sequence[float]) -> list[Array]:
    """The loss of each, while the gradients of their weighted sum are added up."""
    if len(batches) > 1:
        return values_and_gradients([_loss_of(model, each) for each in batches], weights, min(cores(), len(batches)))
    loss = _loss_of(model, batches[0])()  # here the matrix library may use all cores
    loss.backward(array_module(loss.data).full_like(loss.data, weights[0]))
    return [loss.data]


def _loss_of(model: Llama, batch: Batch) -> Callable[[], Tensor]:
    return partial(model.loss, batch.input_ids, batch.labels, batch.packing)


def _weights(batches: Sequence[Batch]) -> list[float]:
    """Each micro-batch's share of the scored tokens."""
    if len(batches) == 1:
        return [1.0]  # nothing to count, for which a GPU would have to be waited for
    scored = sum(batch.scored for batch in batches)
    return [batch.scored / scored for batch in batches]
