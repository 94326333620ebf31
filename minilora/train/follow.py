"""What every rank but the first does in a job of several: what the first one tells it, until all is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import cast

import numpy as np

from ..lora.adapters import adapter_weights
from ..lora.layer import LoraWeights
from ..measure.loss import mean_loss
from ..models.tokenizer import Tokenizer
from ..nn.llama import Llama
from ..nn.optim import AdamW
from ..nn.ranks import Order, Several
from ..progress import Bars
from .learn import validate_as_kept
from .loop import Trainer, TrainingError
from .material import Material, evaluate
from .options import Options


def follow(
    model: Llama,
    tokenizer: Tokenizer,
    material: Material,
    options: Options,
    ranks: Several,
    begin: Callable[[], Trainer],
) -> None:
    """Take part in a job. begin: puts what is to be trained in place, and returns what trains it."""
    trainer = cast(Trainer, None)  # until the first rank has measured the base
    while (order := ranks.hear()) is not Order.END:
        match order:
            case Order.MEASURE:
                evaluate(model, tokenizer, material, Bars(quiet=True), "", ranks)
            case Order.BEGIN:
                trainer = begin()
            case Order.START:
                start(trainer)
            case Order.STEP:
                with suppress(TrainingError):  # the first rank has the same one, keeps what there is, and ends the job
                    trainer.step()
            case Order.VALIDATE:
                validate_as_kept(trainer, material, options)
            case Order.LEVEL:
                level(trainer)
            case Order.SCORE:
                score(trainer, material)


def start(trainer: Trainer) -> None:
    """Let every rank begin where the first one stands, at the first step or at that of a checkpoint.

    Dropout draws other holes on each rank, and after a checkpoint on each but the first others than it would have
    drawn: by how many ranks it is gone on with cannot be known.
    """
    ranks = trainer.ranks
    ranks.tell(Order.START)
    done, optimizer = ranks.same(trainer.done), cast(AdamW, trainer.optimizer)
    _level(trainer)
    if done:
        ranks.level([*optimizer.m, *optimizer.v])
    if ranks.number:
        trainer.go_to(done)
        optimizer.steps = done
        trainer.model.train()
        for weights in _adapter(trainer):
            if weights.dropout is not None:
                own = np.random.default_rng([weights.dropout.seed, ranks.number, done])
                weights.dropout.restore({"seed": int(own.integers(2**63)), "draws": {}})


def level(trainer: Trainer) -> None:
    """Let every rank have the weights that the first one has."""
    trainer.ranks.tell(Order.LEVEL)
    _level(trainer)


def score(trainer: Trainer, material: Material) -> dict[str, float]:
    """The loss on each set that is measured before and after, as the weights are now."""
    ranks = trainer.ranks
    ranks.tell(Order.SCORE)
    return {name: mean_loss(trainer.model, samples, ranks=ranks) for name, samples in material.scored.items()}


def _level(trainer: Trainer) -> None:
    starts = [array for weights in _adapter(trainer) for array in weights.initial or ()]  # PiSSA's, which an SVD gave
    trainer.ranks.level([*(p.data for p in trainer.parameters.values()), *starts])


def _adapter(trainer: Trainer) -> Iterator[LoraWeights]:
    for name in trainer.model.adapters:
        yield from adapter_weights(trainer.model, name).values()
