"""Exact: LoRA learns a planted update of rank k entirely if r is at least k, and else all that rank r can hold."""

from typing import Any

import numpy as np

from ..engine.fused import lora_linear
from ..engine.tensor import Tensor
from ..experiments.claim import Band, Claim, Effect, Setting
from ..nn.optim import SCHEDULES, AdamW

CLAIM = Claim(
    source="Eckart and Young 1936",
    where="Psychometrika 1, 211-218, as LoRA uses it: an update B A has rank r",
    says="The best approximation of rank r leaves the sum of the squared singular values after the r-th, and nothing"
    " if there are no more than r.",
    here="LoRA with Adam trains a matrix towards itself plus a planted update of rank k, for r below, at and above k."
    " Measured: the largest distance of the final loss from that sum, as a share of it; from r = k on, where the sum"
    " is 0, as a share of the update's squared Frobenius norm.",
    switch="The planted update has full rank.",
    base="matrices",
    minutes=0.3,
    band=Band("largest distance from the squared norm beyond rank r (share)", low=0, high=0.01, against_above=0.1),
    one_rate="There is one method, and no other to compare it with.",
    effect=Effect(paper=0, none=0.43, std=0),
)


def train(d: int, k: int, r: int, seed: int, full_rank: bool, steps: int) -> dict[str, float]:
    """The loss after training with rank r, and the squared norm of what rank r cannot hold, and of the update."""
    rng = np.random.default_rng(seed)
    w, left, right = rng.standard_normal((3, d, d))
    values = np.zeros(d)
    values[:k] = np.linspace(2, 1, k)
    if full_rank:
        values[k:] = 0.5
    update = np.linalg.qr(left)[0] * values @ np.linalg.qr(right)[0].T
    a, b = Tensor(rng.standard_normal((r, d)) / np.sqrt(d), True), Tensor(np.zeros((d, r)), True)
    optimizer = AdamW([a, b], lr=0.03, weight_decay=0)
    x, target = np.eye(d), Tensor((w + update).T)
    for step in range(steps):
        optimizer.lr = 0.03 * SCHEDULES["cosine"](step, steps, steps // 10)
        loss = ((lora_linear(x, w, a, b, scale=1.0) - target) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"loss": loss.item(), "tail": float((values[r:] ** 2).sum()), "whole": float((values**2).sum())}


def run(setting: Setting) -> dict[str, Any]:
    """The final loss for each rank, and its distance from the tail."""
    d, k, steps = (24, 4, 200) if setting.small else (64, 8, 2000)
    ranks = [k // 4, k // 2, k - 1, k, 2 * k]
    settings = {"d": d, "k": k, "full_rank": setting.switched, "steps": steps}
    trials = [settings | {"seed": seed, "r": r} for seed in setting.seeds for r in ranks]
    found = setting.each(train, trials)
    apart = [
        abs(one["loss"] - one["tail"]) / one["tail"] if trial["r"] < k else one["loss"] / one["whole"]
        for one, trial in zip(found, trials, strict=True)
    ]
    n = len(ranks)
    return {
        "measured": [max(apart[i : i + n]) for i in range(0, len(apart), n)],
        "ranks": ranks,
        "k": k,
        "loss": [found[i]["loss"] / found[i]["whole"] for i in range(n)],
        "tail": [found[i]["tail"] / found[i]["whole"] for i in range(n)],
    }


def picture(numbers: dict[str, Any]) -> Any:
    """Loss against rank, with the squared norm that the rank cannot hold."""
    from ..pages.style import BASE, LORA, ink, panels

    figure, axes = panels(width=6)
    axes.plot(numbers["ranks"], numbers["tail"], color=BASE, linestyle="--", label="beyond rank r")
    axes.plot(numbers["ranks"], numbers["loss"], "o", color=LORA, label="LoRA, trained")
    axes.axvline(numbers["k"], color=ink(BASE), linewidth=0.8)
    axes.annotate(" k", (numbers["k"], axes.get_ylim()[1]), va="top", color=ink(BASE))
    axes.set(
        xlabel="rank r", ylabel="loss (share of the update's squared norm)", title="The planted rank is where it ends"
    )
    axes.legend(frameon=False)
    return figure
