"""Which of two answers a model prefers: for DPO's reference before training, and for what training has changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..data.samples import encode_pairs
from ..generate.labels import without_nan
from ..models.tokenizer import Tokenizer
from ..nn.language_model import LanguageModel, check_language_model
from ..nn.parts import Pair, Sample, references
from .labels import Checked
from .loss import sample_losses
from .statistics import Resampled, interval_as_json, wilson


def log_ratios(model: LanguageModel, pairs: Sequence[Pair]) -> np.ndarray:
    """log π(chosen) - log π(rejected) of each pair, summed over the tokens of the answers: (N,)."""
    check_language_model(model, "preferences")
    for pair in pairs:
        if not isinstance(pair, Pair):
            raise TypeError(f"expected pairs, got a {type(pair).__name__}: encode_pairs makes them of records")
    losses = sample_losses(model, [sample for pair in pairs for sample in pair.sequences])
    return losses[1::2] - losses[::2]


def with_reference(model: LanguageModel, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with this model as DPO's reference: call it before training.

    A reference model never changes, so its log-probabilities are computed once. With LoRA the base needs no second copy
    in memory: the model with its adapter off, or with a new one, is the base.
    """
    return [replace(pair, reference=float(ratio)) for pair, ratio in zip(pairs, log_ratios(model, pairs), strict=True)]


def preferences(model: LanguageModel, pairs: Sequence[Pair]) -> dict[str, float]:
    """Measure which of two answers a model prefers.

    "loss": DPO's, the mean over pairs of -log σ(beta (log-ratio - reference)), which `mean_loss` computes as well.
    "chosen": the share of pairs whose chosen answer is more probable than the rejected one.
    "accuracy": the share of pairs in which this has shifted towards the chosen answer since the reference.
    "margin": DPO's mean implicit reward, beta (log-ratio - reference), in nats.

    Raises ValueError for no pairs.
    """
    ratios = log_ratios(model, pairs)
    if not pairs:
        raise ValueError("no pairs to evaluate")
    margins = np.array([pair.beta for pair in pairs]) * (ratios - references(pairs))
    return {
        "loss": float(np.logaddexp(0, -margins).mean()),
        "chosen": float((ratios > 0).mean()),
        "accuracy": float((margins > 0).mean()),
        "margin": float(margins.mean()),
    }


@dataclass(frozen=True)
class Preferred(Checked):
    """Records with a rejected answer. What `ask` gives for each is log π(chosen) - log π(rejected), in nats."""

    key = "preferences"

    def lengths(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens of each prompt with the longer one of its answers."""
        return [max(len(each.ids) for each in pair.sequences) for pair in encode_pairs(self.records, tokenizer)]

    def ask(self, model: LanguageModel, tokenizer: Tokenizer, shots: int = 0) -> list[float]:
        """log π(chosen) - log π(rejected) of each record, (N,)."""
        return without_nan(log_ratios(model, encode_pairs(self.records, tokenizer))).tolist()

    def ask_rejected(
        self, model: LanguageModel, tokenizer: Tokenizer, samples: list[Sample], nats: np.ndarray
    ) -> list[float]:
        """What `ask` gives, where losses are known: nats (N,) of `samples`, the chosen answers, perhaps truncated."""
        pairs = encode_pairs(self.records, tokenizer)
        if [pair.chosen for pair in pairs] != samples:
            return self.ask(model, tokenizer)
        return without_nan(sample_losses(model, [pair.rejected for pair in pairs]) - nats).tolist()

    def report(self, answers: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
        """How often the chosen answer is more probable, and how often by more than for the first contender, the
        reference; and the mean log-ratio, in nats.
        """
        names, ratios = list(answers), np.array(list(answers.values()))  # (contenders, N)
        chosen, shifted, n = ratios > 0, ratios > ratios[0], ratios.shape[1]
        share = Resampled(chosen.astype(float), np.ones(n), seed)
        rows: list[dict[str, Any]] = [
            {
                "name": name,
                "chosen": interval_as_json(wilson(chosen[k])),
                "log_ratio": float(ratios[k].mean()),
                "lead": interval_as_json(share.difference(len(names) - 1, k)),  # of the last contender over this one
            }
            | ({"shifted": interval_as_json(wilson(shifted[k]))} if k else {})
            for k, name in enumerate(names)
        ]
        return {"records": n, "reference": names[0], "subject": names[-1], "rows": rows}
