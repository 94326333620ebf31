"""Full fine-tuning of the tiny base, whose update is cut to a rank afterwards: how much of the gain is left?"""

from typing import Any

import numpy as np

from ..lora.spectra import singular_values, svd
from ..measure.loss import evenly, mean_loss
from ..train.loop import fit
from .tiny import reset, samples_of, tiny_base


def cut_update(
    lr: float,
    seed: int,
    ranks: list[int],
    at_random: bool = False,
    steps: int = 60,
    batch_size: int = 4,
    held_out: int = 30,
    data: str = "legal",
) -> dict[str, Any]:
    """Train every weight, and measure how much of the gain is left with r directions of each matrix's update.

    lr, seed, steps, batch_size, data: as for `tiny_run`.
    ranks: each r. Vectors, such as the scales of the norms, keep their whole update.
    at_random: keep r random singular directions, not the first r.
    held_out: records, at most, that are measured.

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
        parts = {name: svd(update) for name, update in updates.items()}
        losses, variance = {}, {}
        for r in ranks:
            for name, p in model.named_parameters():
                if name in parts:
                    u, s, vt = parts[name]
                    kept = rng.permutation(len(s))[:r] if at_random else np.arange(min(r, len(s)))
                    p.data[...] = before[name] + (u[:, kept] * s[kept]) @ vt[kept]
            losses[r] = mean_loss(model, held)
            variance[r] = float(np.mean([(s[:r] ** 2).sum() / (s**2).sum() for _, s, _ in parts.values()]))
        noise = [singular_values(rng.standard_normal(update.shape)) ** 2 for update in updates.values()]
        chance = {r: float(np.mean([s[:r].sum() / s.sum() for s in noise])) for r in ranks}
    finally:
        reset(model)
    left = {r: (first - loss) / (first - last) for r, loss in losses.items()}
    tables = {"left": left, "variance": variance, "chance": chance}
    return {name: {str(r): value for r, value in table.items()} for name, table in tables.items()} | {
        "loss": [first, last]
    }
