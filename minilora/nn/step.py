"""One training step, the same for jobs, benchmarks and memory reports; and a loss on all cores, with or without
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
from ..engine.backend import Array, array_module, to_numpy
from ..engine.parallel import cores, values, values_and_gradients
from ..engine.tensor import Tensor, no_grad
from .language_model import LanguageModel, check_language_model
from .optim import Optimizer, clip_grad_norm
from .parts import Batch, Example, Sample, divided_samples, micro_batches, pack
from .ranks import ALONE, Ranks


class NotFiniteError(ArithmeticError):
    """The loss or the gradient norm of a step is not finite. what: "loss" or "gradient". value: of it."""

    def __init__(self, what: str, value: float):
        super().__init__(f"{what} became {value}")
        self.what, self.value = what, value


def loss_and_grad(model: LanguageModel, input_ids: Array, labels: Array, packing: Packing | None = None) -> Tensor:
    """Forward and backward pass at once: return the loss, and add the gradients of trainable parameters to `.grad`.

    The result is that of `loss = model.loss(input_ids, labels, packing); loss.backward()`. But the batch is computed in
    micro-batches, on all cores, and the activations of one are freed before the next begins. Gradients are
    added in a fixed order: the same batch gives the same bits. On a GPU, and inside `mixed_batch`, the batch is not
    divided.

    packing: of several sequences in one row, whose ends are known: `minilora.engine.attention.Packing(0, ends)`.

    Returns a scalar without a graph. Raises TypeError for a module that is not a language model, ValueError for a batch
    that it cannot read, and RuntimeError if nothing is trainable, an adapter is merged, or inside `no_grad()`.
    """
    check_language_model(model, "loss_and_grad")
    return Tensor(add_gradients(model, Batch(*model.check_batch(input_ids, labels, packing), packing)))


def training_step(
    model: LanguageModel,
    optimizer: Optimizer,
    batch: Batch | Sequence[Example],
    max_norm: float = math.inf,
    at_once: int | None = None,
    ranks: Ranks = ALONE,
    before_update: Callable[[], object] | None = None,
) -> tuple[float, float]:
    """One step: zero_grad, forward and backward pass, clipping, optimizer step.

    batch: a batch, or samples, which are divided into micro-batches and then packed.
    max_norm: gradients are clipped to this common norm.
    at_once: accumulate gradients: samples computed at a time, also on a GPU. The result is that of the whole batch, the
        memory is that of `at_once` samples.
    ranks: the processes that share the batch: each computes some of its samples, and all take the same step.
    before_update: called when loss and gradients are known to be finite, before any parameter changes.

    Returns the loss and the gradients' norm before clipping. Raises NotFiniteError if one of them is not finite, before
    any parameter changes.
    """
    optimizer.zero_grad()
    with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinity are reported below
        share = ranks.share(batch)
        loss = 0.0 if ranks.size > 1 and not share else add_gradients(model, share, at_once)
        loss = ranks.mean(optimizer.parameters, loss, share)
        norm = clip_grad_norm(optimizer.parameters, max_norm)
    value, norm = float(loss), float(norm)
    for what, number in (("loss", value), ("gradient", norm)):
        if not math.isfinite(number):
            raise NotFiniteError(what, number)
    if before_update is not None:
        before_update()
    optimizer.step()
    return value, norm


def loss_without_grad(model: LanguageModel, batch: Batch | Sequence[Example]) -> float:
    """The loss of a batch, or of samples, computed on all cores: for evaluation."""
    batches = divided(model, batch)
    with no_grad():
        losses = [partial(each.loss, model) for each in batches]
        found = values(losses, min(cores(), len(batches)))
    return float(sum(x * w for x, w in zip(found, _weights(batches), strict=True)))


def losses_without_grad(model: LanguageModel, samples: Sequence[Sample]) -> list[float]:
    """The loss of each sample alone, computed on all cores."""
    xp = array_module(model.head_weight.data)
    parts = divided_samples(samples, cores()) if xp is np else [list(range(len(samples)))]

    def of_each(part: list[int]) -> Tensor:
        batch = pack([samples[i] for i in part])
        losses = model.loss_of_each(batch.input_ids, batch.labels, cast(Packing, batch.packing))
        return Tensor(array_module(losses[0].data).stack([loss.data for loss in losses]))

    with no_grad():
        found = values([partial(of_each, part) for part in parts], min(cores(), len(parts)))
    by_index = zip(chain(*parts), chain(*(to_numpy(each).tolist() for each in found)), strict=True)
    return [loss for _, loss in sorted(by_index)]


def divided(model: LanguageModel, batch: Batch | Sequence[Example], threads: int | None = None) -> list[Batch]:
    """The micro-batches in which a model computes a batch, or samples: one alone on a GPU, and inside `mixed_batch`.

    threads: None for all cores.
    """
    arrays = [model.head_weight.data, *((batch.input_ids, batch.labels) if isinstance(batch, Batch) else ())]
    on_host = all(array_module(x) is np for x in arrays)
    if not on_host or any(module.rows_differ for _, module in model.named_modules()):
        return [batch if isinstance(batch, Batch) else pack(batch)]
    return micro_batches(batch, threads or cores())


def add_gradients(model: LanguageModel, batch: Batch | Sequence[Example], at_once: int | None = None) -> Array:
    """The loss of a batch, or of samples; the gradients of trainable parameters are added to `.grad`.

    at_once: as for `training_step`.
    """
    accumulated = [batch]
    if at_once is not None and not isinstance(batch, Batch):
        accumulated = [batch[i : i + at_once] for i in range(0, len(batch), at_once)]
    divisions = [divided(model, each) for each in accumulated]
    weights = _weights([each for batches in divisions for each in batches])
    losses: list[Array] = []

    def loss_of(each: Batch) -> Tensor:
        loss = each.loss(model)
        if not loss.requires_grad:
            raise RuntimeError(
                "nothing is trainable here: add an adapter, choose one with set_adapter, call unmerge_adapter if it is "
                "merged, or unfreeze the model with requires_grad_(); and train outside of no_grad()"
            )
        return loss

    for batches in divisions:
        own = weights[len(losses) : len(losses) + len(batches)]
        losses += values_and_gradients([partial(loss_of, each) for each in batches], own, min(cores(), len(batches)))
    return losses[0] if len(losses) == 1 else sum(x * w for x, w in zip(losses, weights, strict=True))


def _weights(batches: Sequence[Batch]) -> list[float]:
    """The share of each micro-batch in the mean: of scored tokens, or of pairs."""
    if len(batches) == 1:
        return [1.0]  # without counting, which would make the host wait for a GPU
    whole = sum(batch.weight for batch in batches)
    return [batch.weight / whole for batch in batches]
