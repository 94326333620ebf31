"""One small training run on the tiny base, as a trial: settings in, numbers out.

    result = tiny_run(lr=1e-2)                                       # LoRA on every linear layer: some 4 s on one core
    result = tiny_run(lr=1e-3, method="full")
    result = tiny_run(lr=1e-2, targets=["q_proj", "v_proj"], r=4, variant="dora", data="support", seed=1)
    result = tiny_run(lr=1e-2, targets={"q_proj": 6, "v_proj": 8})   # a rank for each
    result = tiny_run(lr=1e-2, frozen=["lora_B"])                    # B stays at its initialisation
    result = tiny_run(lr=1e-3, method="full", frozen=["embed_tokens"])

    many = setting.each(tiny_run, [{"lr": lr, "seed": seed} for lr in (3e-3, 1e-2) for seed in setting.seeds])

Everything that decides the result is an argument, so that experiments that ask for the same run share one. `tuned`
finds each contender's best learning rate.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from ..data.records import read_records
from ..data.samples import encode_records
from ..data.splits import split_records
from ..engine.backend import Array
from ..lora.adapters import add_adapter, lora_modules, remove_adapter
from ..lora.config import ALL_LINEAR, LoraConfig
from ..lora.variants import lora_plus
from ..measure.loss import evenly, mean_loss
from ..models.load import load
from ..models.tokenizer import Tokenizer
from ..nn.language_model import LanguageModel
from ..nn.optim import AdamW
from ..nn.parts import Sample
from ..train.loop import fit

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "lora+": {},
    "dora": {"use_dora": True},
    "lora-fa": {"freeze_A": True},
    "zero-a": {"init_lora_weights": False},
    "pissa": {"init_lora_weights": "pissa"},
}
FULL = "full"
_NAME = "trial"
MEASURED = ("validation", "test", "general")


def tiny_run(
    lr: float,
    method: str = "lora",
    r: int = 8,
    alpha: float = 32,
    targets: str | Sequence[str] | Mapping[str, int] = ALL_LINEAR,
    variant: str = "lora",
    ratio: float = 16,
    steps: int = 60,
    batch_size: int = 4,
    data: str = "legal",
    seed: int = 0,
    every: int = 0,
    held_out: int = 30,
    shuffled: bool = False,
    records: int | None = None,
    frozen: Sequence[str] = (),
    schedule: str = "cosine",
) -> dict[str, Any]:
    """Train the tiny base on a domain and return losses in nats per scored token.

    lr: the peak, after `fit`'s warm-up. schedule: `fit`'s.
    method: "lora" or "full", which trains every weight.
    r, alpha: LoRA's. alpha is 32 for every r, so that the scale is alpha / r, as in "LoRA Without Regret".
    targets: module names, or a rank for each name.
    variant: "lora", "rslora", "lora+" (B learns `ratio` times as fast), "dora", "pissa", "lora-fa" (A is frozen) or
        "zero-a" (A is initialised to zero, and B at random with variance 1/r).
    ratio: of LoRA+.
    steps, batch_size: the length of training, and records per step.
    data: a domain that comes with minilora, or a path.
    seed: of the adapter's initialisation and of the order of the samples, so that two contenders with one seed see the
        same batches.
    every: if given, `curve` has (step, validation loss) after each `every` steps, from 0 on.
    held_out: records, at most, in each of the sets that are measured.
    shuffled: every token of the vocabulary means another one, the same everywhere: a language to be learned anew.
    records: of the training set, drawn by `seed`; all if left out.
    frozen: parameters whose names contain one of these words are not trained: "lora_A", "lora_B", "embed_tokens".

    Returns {"validation", "test": on records that were not trained on; "general": on everyday questions, where a rise
    is forgetting; "before": these three of the base; "train": the loss of every step; "curve"; "trained": how many
    parameters}. Raises TrainingError if the loss stops being finite, ValueError for settings that mean nothing.
    """
    if method not in ("lora", FULL):
        raise ValueError(f"method must be lora or full, got {method!r}")
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    model, _ = tiny_base()
    sets = samples_of(data, shuffled)
    chosen = np.random.default_rng(seed).permutation(len(sets["train"]))[:records]
    training = [sets["train"][i] for i in sorted(chosen)]
    held = {name: evenly(sets[name], held_out) for name in MEASURED}
    before = dict(_before(data, held_out, shuffled))
    curve = [(0, before["validation"])] if every else []

    def look(step: int) -> None:
        if every and step % every == 0:
            model.eval()
            curve.append((step, mean_loss(model, held["validation"])))
            model.train()

    try:
        if method == FULL:
            model.requires_grad_(True)
        else:
            add_adapter(model, lora_config(r, alpha, targets, variant), _NAME, seed)
            if variant == "zero-a":
                for module in lora_modules(model).values():
                    module.adapters[_NAME].lora_A.data[...] = 0
        for word in frozen:
            if not (found := [parameter for name, parameter in model.named_parameters() if word in name]):
                raise ValueError(f"no parameter's name contains {word!r}, which should be frozen")
            for parameter in found:
                parameter.requires_grad = False
        parameters = model.trainable_parameters()
        faster = lora_plus(parameters, ratio) if method != FULL and variant == "lora+" else None
        optimizer = AdamW(parameters, lr, weight_decay=0.0, lr_scale=faster)
        history = fit(
            model, training, steps, batch_size=batch_size, seed=seed, optimizer=optimizer, each_step=look,
            schedule=schedule,
        )  # fmt: skip
        after = {name: mean_loss(model, samples) for name, samples in held.items()}
    finally:
        reset(model)
    trained = sum(p.size for p in parameters.values())
    return after | {"before": before, "train": history.losses, "curve": curve, "trained": trained}


def lora_config(
    r: int, alpha: float, targets: str | Sequence[str] | Mapping[str, int], variant: str = "lora"
) -> LoraConfig:
    """The adapter that `tiny_run` trains. targets may give each module's name its own rank."""
    more: dict[str, Any] = dict(VARIANTS[variant])
    if isinstance(targets, Mapping):
        more["rank_pattern"], targets = dict(targets), list(targets)
    return LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, **more)


@cache
def tiny_base() -> tuple[LanguageModel, Tokenizer]:
    """The tiny base, read once in a process. After changing its weights, `reset` it."""
    return load("tiny")


def reset(model: LanguageModel) -> None:
    """Restore the model of `tiny_base`: no adapter, every weight as it was read."""
    if _NAME in model.adapters:
        remove_adapter(model, _NAME)
    model.requires_grad_(True)
    for name, parameter in model.named_parameters():
        parameter.data[...] = _originals()[name]
        parameter.grad = None
    model.eval()


@cache
def _originals() -> dict[str, Array]:
    fresh, _ = load("tiny")
    return {name: parameter.data for name, parameter in fresh.named_parameters()}


@cache
def samples_of(data: str, shuffled: bool = False) -> dict[str, list[Sample]]:
    """The samples "train", "validation" and "test" of a domain, and "general", for the tiny base. If the data hold
    nothing out for validation, every second test record is that. shuffled: as in `tiny_run`.
    """
    model, tokenizer = tiny_base()
    splits = split_records(read_records(data, tokenizer))
    if not splits["validation"]:
        splits["validation"], splits["test"] = splits["test"][::2], splits["test"][1::2]
    splits["general"] = read_records("general", tokenizer)
    samples = {name: encode_records(records, tokenizer) for name, records in splits.items()}
    if not shuffled:
        return samples
    means = np.random.default_rng(0).permutation(model.config.vocab_size).tolist()
    return {name: [_in_other_words(sample, means) for sample in part] for name, part in samples.items()}


def _in_other_words(sample: Sample, means: list[int]) -> Sample:
    ids, labels = ([means[i] if i >= 0 else i for i in row] for row in (sample.ids, sample.labels))
    return Sample(tuple(ids), tuple(labels), tuple(_in_other_words(other, means) for other in sample.others))


@cache
def _before(data: str, held_out: int, shuffled: bool) -> dict[str, float]:
    model, _ = tiny_base()
    sets = samples_of(data, shuffled)
    return {name: mean_loss(model, evenly(sets[name], held_out)) for name in MEASURED}
