"""What is known of a run in the end: the record in metrics.json."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from ..data.samples import epochs
from ..lora.adapters import base_state
from ..lora.audit import AuditError, audit
from ..measure.counts import count_parameters
from ..measure.environment import now
from ..measure.predict import Step, alive_at_once, kept_activations, predict_memory, recomputed_activations
from ..nn.language_model import LanguageModel
from ..nn.module import sha256_of
from ..nn.parts import Example
from ..nn.step import divided
from .checkpoint import State
from .loop import Trainer
from .material import Material, Measured, learned

FIRST = 300  # batches, of which the largest is predicted; dividing them takes half a second


def metrics_of(
    trainer: Trainer, material: Material, state: State, after: Measured, kept: Mapping[str, Any]
) -> dict[str, Any]:
    """The metrics of a run, except what the job alone knows: options, memory, and bytes on disk.

    trainer: holds the trained model, with the weights that are the result.
    state: holds the history, and what was measured before training.
    after: what was measured after training.
    kept: which weights are the result, as `History.kept` gives them.
    """
    model, history, counts = trainer.model, state.history, count_parameters(trainer.model)
    return {
        "created": now(),
        "steps": len(history.losses),
        "planned_steps": trainer.steps,
        **sizes_of(material),
        "trainable_parameters": counts.trainable,
        "total_parameters": counts.total,
        **_audited(model, state.base),
        **learned(material, state.before, after, "LoRA" if model.adapters else "full fine-tuning"),
        "train_loss": history.losses,
        "validation_loss": history.validation,
        "validation": history.validation_sets,
        "seconds_per_step": history.seconds_per_step,
        "tokens_per_second": history.tokens_per_second,
        "training_seconds": sum(history.seconds),
        "kept": dict(kept),
        "last": {"loss": state.last_loss or after.loss},
        "base_bytes": base_bytes(model),
        "base_rounded_to": model.rounded_to,
        "ranks": trainer.ranks.size,
        "versions": {"python": sys.version.split()[0], "numpy": np.__version__},
    }


def sizes_of(material: Material) -> dict[str, Any]:
    """The number of records of each set, of how many they are a sample, and how many of other data are mixed in."""
    counted = {"validation_paraphrase": material.validation_paraphrase, **material.scored}
    records = {"train": material.own, "validation": len(material.validation)}
    records |= {name: len(samples) for name, samples in counted.items() if samples}
    return {"records": records, "sampled_from": material.sampled_from, "mixed": material.mixed}


def base_bytes(model: LanguageModel) -> int:
    """The bytes of the base's arrays in memory."""
    return sum(array.nbytes for array in base_state(model).values())


def memory_of(
    model: LanguageModel, material: Material, batch_size: int, seed: int, program: int | None
) -> dict[str, Any]:
    """The memory of a training step, predicted for the largest of the `FIRST` batches.

    program: the bytes that the process held before training besides the base, None where they do not count.
    """

    def size(samples: Sequence[Example]) -> int:
        return sum(each.input_ids.size for each in alive_at_once(divided(model, samples))[0])

    batches = islice(epochs(material.train, batch_size, seed), FIRST)
    step = Step.of(model, max(batches, key=size), program=program or 0)
    alone = replace(step, rank=None, modules=None, others=0, base_bytes=None, unpacks=False)
    mine = predict_memory(step)
    saved = recomputed_activations(step) if step.recompute else kept_activations(step)
    return {
        "predicted": mine.total,
        "full_predicted": predict_memory(alone).total,
        "by_owner": mine.by_owner(),
        "activations": sum(saved.values()),  # as the backward pass begins: full fine-tuning may have its peak later
    }


def _audited(model: LanguageModel, before: str) -> dict[str, Any]:
    """The promises that the audit of the adapter found to hold, or the broken one, which does not end the job.

    before: the fingerprint of the base when the run began. That of the base now is returned next to it.
    """
    found: dict[str, Any] = {"audit": {}}
    for name in model.adapters:
        try:
            found["audit"] = dict(audit(model, name, base_sha256=before).checks)
        except AuditError as error:
            found["audit_failed"] = str(error)
    after = before if "base" in found["audit"] else sha256_of(base_state(model))  # the audit has just compared them
    return found | {"base_sha256": [before, after]}
