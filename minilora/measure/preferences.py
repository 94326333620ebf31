"""Which of two answers a model prefers: for DPO's reference before training, and for what training has changed."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..nn.language_model import LanguageModel
from ..nn.parts import Pair
from .loss import sample_losses


def log_ratios(model: LanguageModel, pairs: Sequence[Pair]) -> np.ndarray:
    """log π(chosen) - log π(rejected) of each pair, summed over the tokens of the answers: (N,)."""
    losses = sample_losses(model, [sample for pair in pairs for sample in pair.sequences])
    return losses[1::2] - losses[::2]


def with_reference(model: LanguageModel, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with this model as DPO's reference: call it before training.

    A reference model never changes, so its log-probabilities are computed once. With LoRA the base needs no second copy
    in memory: the model with its adapter off, or with a new one, is the base.
    """
    return [replace(pair, reference=float(ratio)) for pair, ratio in zip(pairs, log_ratios(model, pairs), strict=True)]


def preferences(model: LanguageModel, pairs: Sequence[Pair]) -> dict[str, float]:
    """What a model prefers.

    "loss": DPO's, the mean over pairs of -log σ(beta (log-ratio - reference)), which `mean_loss` computes as well.
    "chosen": the share of pairs whose chosen answer is more probable than the rejected one.
    "accuracy": the share of pairs in which this has shifted towards the chosen answer since the reference.
    "margin": DPO's mean implicit reward, beta (log-ratio - reference), in nats.
    """
    ratios = log_ratios(model, pairs)
    margins = np.array([pair.beta for pair in pairs]) * (ratios - np.array([pair.reference for pair in pairs]))
    return {
        "loss": float(np.logaddexp(0, -margins).mean()),
        "chosen": float((ratios > 0).mean()),
        "accuracy": float((margins > 0).mean()),
        "margin": float(margins.mean()),
    }
