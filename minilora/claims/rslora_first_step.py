"""rsLoRA: with alpha / r, the first step's effect shrinks as r grows; with alpha / sqrt(r), it does not."""

from typing import Any

import numpy as np

from ..data.samples import encode_text
from ..engine.tensor import no_grad
from ..experiments.claim import Band, Claim, Effect, Setting
from ..lora.adapters import add_adapter
from ..lora.config import LoraConfig
from ..models.load import load
from ..nn.optim import SGD, AdamW, Optimizer

CLAIM = Claim(
    source="Kalajdzievski 2023, rsLoRA (arXiv 2312.03732)",
    where="abstract, and theorem 3.2 as it is reported",
    says="With the scale alpha / r, learning slows down as r grows. For outputs and gradients to keep their size at"
    " any rank, adapters have to be divided by the square root of the rank.",
    here="One step on a text, r from 1 to 64: the change of the logits on it (root mean square), against r on two"
    " logarithmic axes. Measured: the slope with alpha / sqrt(r) under SGD, which the theorem is about; 0 is no"
    " change with r, -1 is a tenth at ten times the rank. For comparison: alpha / r, and both under Adam.",
    switch="The scale is alpha / r.",
    base="tiny",
    minutes=0.5,
    band=Band("slope of the first step's effect over r, with alpha / sqrt(r) and SGD", -0.25, 0.25, -0.5, 0.5),
    second_hand=True,
    one_rate="The change of one step is measured for a learning rate of 1: no rate is better than another.",
    explained={
        "reproduced": "The theorem is about SGD. Under Adam, with which adapters are trained, alpha / sqrt(r) makes"
        " the first step grow with the rank (slope 0.50), and alpha / r keeps it the same for every rank.",
    },
    effect=Effect(paper=0, none=-0.5, std=0.03),
)
LR = {"sgd": 1e-2, "adam": 1e-4}  # small: the change is then proportional to it


def change(r: int, seed: int, rslora: bool, optimizer: str, tokens: int) -> float:
    """How much one step changes the logits, for a learning rate of 1."""
    model, tokenizer = load("tiny")
    text = "The court may order that the tenant pays the rent which is due, with interest from the day it was due. "
    ids = np.array([encode_text(text * 20, tokenizer, tokens)[seed].ids])  # (1, T)
    settings = LoraConfig(r=r, lora_alpha=16, target_modules="all-linear", use_rslora=rslora)
    add_adapter(model, settings, seed=seed)
    parameters = model.trainable_parameters()
    with no_grad():
        before = model(ids).data
    model.loss(ids, ids).backward()
    rate = LR[optimizer]
    step: Optimizer = SGD(parameters, rate) if optimizer == "sgd" else AdamW(parameters, rate, weight_decay=0)
    step.step()
    with no_grad():
        after = model(ids).data
    return float(np.sqrt(np.mean((after.astype(float) - before) ** 2))) / rate


def run(setting: Setting) -> dict[str, Any]:
    """Slopes, and the sizes of the change."""
    ranks = [1, 8, 64] if setting.small else [1, 2, 4, 8, 16, 32, 64]
    main = ("sgd", not setting.switched)
    kinds = [main] if setting.small else [(name, root) for name in LR for root in (False, True)]
    settings = {"tokens": 32 if setting.small else 96}
    trials = [
        {"r": r, "seed": seed, "rslora": root, "optimizer": name, **settings}
        for name, root in kinds
        for seed in setting.seeds
        for r in ranks
    ]
    found = np.array(setting.each(change, trials)).reshape(len(kinds), len(setting.seeds), len(ranks))
    slopes = np.polyfit(np.log(ranks), np.log(found).reshape(-1, len(ranks)).T, 1)[0].reshape(found.shape[:2])
    names = [f"{'SGD' if name == 'sgd' else 'Adam'}, alpha / {'sqrt(r)' if root else 'r'}" for name, root in kinds]
    return {
        "measured": slopes[kinds.index(main)].tolist(),
        "ranks": ranks,
        "slope": dict(zip(names, slopes.mean(axis=1).tolist(), strict=True)),
        "change": dict(zip(names, found.mean(axis=1).tolist(), strict=True)),
    }


def picture(numbers: dict[str, Any]) -> Any:
    """The change against the rank, each as a multiple of that of rank 1."""
    from ..pages.style import BLUE, GREEN, ORANGE, PURPLE, ink, panels

    figure, axes = panels(width=7)
    colors, ends = (BLUE, ORANGE, GREEN, PURPLE), []
    for (name, sizes), color, mark in zip(numbers["change"].items(), colors, "os^D", strict=False):
        axes.loglog(numbers["ranks"], np.array(sizes) / sizes[0], marker=mark, color=color)
        ends.append((sizes[-1] / sizes[0], name, color))
    height = 0.0
    for end, name, color in sorted(ends):  # upwards: none on another
        height = max(end, 1.5 * height)
        axes.annotate(name, (1.02, height), xycoords=("axes fraction", "data"), color=ink(color), va="center")
    axes.set(xlabel="rank r", ylabel="change of the logits (r = 1: 1)", title="What the first step does")
    return figure
