"""LoRA's premise: the update of full fine-tuning is close to one of low rank.

Longer than a page: no run of other claims returns the update itself, which is cut here.
"""

from typing import Any

import numpy as np

from ..experiments.claim import Band, Claim, Effect, Setting
from ..experiments.tiny import reset, samples_of, tiny_base, tiny_run
from ..measure.loss import evenly, mean_loss
from ..pages.style import FULL, GREY, name_lines, panels
from ..train.loop import fit

CLAIM = Claim(
    source="Aghajanyan, Zettlemoyer & Gupta 2020 (arXiv 2012.13255); Hu et al. 2021, LoRA (arXiv 2106.09685)",
    where="abstract of the first; section 4.1 of the second",
    says="Fine-tuning needs few dimensions: 200 random ones are enough for 90 % of full fine-tuning's result on one"
    " task with RoBERTa. From this LoRA takes its hypothesis that the update of each weight matrix has a low rank.",
    here="Full fine-tuning of the tiny base, 60 steps on law at its best learning rate. Of every matrix's update only"
    " the first r singular directions are kept, without further training: what share of the gain in test loss is"
    " left? And what share of the update's variance do they explain, compared with a random matrix?",
    switch="r random directions of each update are kept instead of the first r.",
    base="tiny",
    minutes=1,
    band=Band("share of the gain that is left with r = 8 of at most 128 directions", low=0.9, against_below=0.5),
    explained={
        "not at this size": "The first directions do hold most of what was learned: one leaves 43 % of the gain, 8"
        " leave 84 %, 16 leave 90 % and 32 leave 96 %. 8 of them explain 53 % of the variance (of a random matrix: 20"
        " %). But a matrix of the tiny base has at most 128 directions, and 8 are a sixteenth of them; nor was the"
        " update trained to have a low rank, as an adapter's is."
    },
    effect=Effect(
        paper=0.9, none=0.5, std=0.005, short="The band begins at the paper's own share, so that only half pass."
    ),
)
RANKS = (1, 2, 4, 8, 16, 32, 64)
MEASURED = 8
BEGIN = 1e-3


def cut(
    lr: float,
    seed: int,
    ranks: list[int],
    at_random: bool = False,
    steps: int = 60,
    batch_size: int = 4,
    held_out: int = 30,
    data: str = "legal",
) -> dict[str, Any]:
    """Train every weight; of each matrix's update keep r singular directions, the first or random ones.

    Returns {"left": {r: share of the gain}, "variance": {r: mean share of Σ s²}, "chance": {r: the same of random
    matrices of these shapes}, "loss": [before, after]}.
    """
    model, _ = tiny_base()
    held, rng = evenly(samples_of(data)["test"], held_out), np.random.default_rng(seed)
    before = {name: p.data.copy() for name, p in model.named_parameters()}
    first = mean_loss(model, held)
    try:
        fit(model, samples_of(data)["train"], steps, lr, batch_size=batch_size, seed=seed)
        last = mean_loss(model, held)
        updates = {name: p.data - before[name] for name, p in model.named_parameters() if p.ndim == 2}
        parts = {name: np.linalg.svd(update, full_matrices=False) for name, update in updates.items()}
        losses, variance = {}, {}
        for r in ranks:
            for name, p in model.named_parameters():
                if name in parts:
                    u, s, vt = parts[name]
                    kept = rng.permutation(len(s))[:r] if at_random else np.arange(min(r, len(s)))
                    p.data[...] = before[name] + (u[:, kept] * s[kept]) @ vt[kept]
            losses[r] = mean_loss(model, held)
            variance[r] = float(np.mean([(s[:r] ** 2).sum() / (s**2).sum() for _, s, _ in parts.values()]))
        drawn = [rng.standard_normal(update.shape) for update in updates.values()]
        noise = [np.linalg.svd(each, compute_uv=False) ** 2 for each in drawn]
        chance = {r: float(np.mean([s[:r].sum() / s.sum() for s in noise])) for r in ranks}
    finally:
        reset(model)
    left = {r: (first - loss) / (first - last) for r, loss in losses.items()}
    tables = {"left": left, "variance": variance, "chance": chance}
    found: dict[str, Any] = {name: {str(r): value for r, value in table.items()} for name, table in tables.items()}
    return found | {"loss": [first, last]}


def run(setting: Setting) -> dict[str, Any]:
    """Train every weight, and cut the update to a rank."""
    few = {"steps": 20, "batch_size": 2, "held_out": 6} if setting.small else {}
    begin = {"full": {"lr": BEGIN, "method": "full", **few}}
    lr = BEGIN if setting.small else setting.tuned(tiny_run, begin)["full"]["lr"]
    ranks = [MEASURED] if setting.small else list(RANKS)
    trials = [{"lr": lr, "seed": s, "ranks": ranks, "at_random": setting.switched, **few} for s in setting.seeds]
    found = setting.each(cut, trials)
    return {"measured": [each["left"][str(MEASURED)] for each in found], "rate": lr, "by_seed": found}


def picture(numbers: dict[str, Any]) -> Any:
    """The gain that is left, and the variance that is explained, against the rank."""
    figure, axes = panels(1, width=8)
    ranks = [int(r) for r in numbers["by_seed"][0]["left"]]
    ends = []
    for what, name, color, line in (
        ("left", "gain in loss that is left", FULL, "-"),
        ("variance", "variance of the update", FULL, "--"),
        ("chance", "variance of a random matrix", GREY, "--"),
    ):
        for each in numbers["by_seed"]:
            axes.plot(ranks, list(each[what].values()), color=color, linestyle=line, marker="o", markersize=4)
        ends.append((list(numbers["by_seed"][0][what].values())[-1], name, color))
    axes.set(
        xscale="log", xlabel="singular directions kept, r", ylabel="share", title="Full fine-tuning, cut to rank r"
    )
    axes.set_xticks(ranks, [str(r) for r in ranks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.1)
    name_lines(axes, ends)
    return figure
